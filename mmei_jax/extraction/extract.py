"""From clips to feature shards: decodes, crops, tokenises, encodes, and writes what survives being killed.

Command, for instance::

    python -m mmei_jax.extraction.extract --config=configs/extraction.py --input=clips.csv --output=runs/data/mine \
        --config.vision.checkpoint=runs/encoders/vit --config.audio.checkpoint=runs/encoders/wav2vec2 \
        --config.text.checkpoint=runs/encoders/bert

The same command goes on where it stopped. Several processes share the work with ``--process_index`` and
``--num_processes`` (or as SLURM or Kubernetes tells); the last to finish completes the data set.
"""

import importlib.metadata
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np

from mmei_jax.extraction.clip_lists import check_clips, fingerprint, read_clips
from mmei_jax.extraction.clips import Clip
from mmei_jax.extraction.decoding import DecodeSettings, choose_workers, decode_clips
from mmei_jax.extraction.encoding import ClipEncoder, EncodedClip, EncodedShard
from mmei_jax.extraction.extraction_config import ExtractionConfig
from mmei_jax.extraction.media import REASONS
from mmei_jax.extraction.raw_media import RawClips
from mmei_jax.extraction.shard_units import ExtractionFolder, Quarantined, Unit, check_bad_fraction, make_units
from mmei_jax.records import DatasetSpec, LabelSpec, ModalitySpec, Record
from mmei_jax.sharding import ProcessShare
from mmei_jax.types import InputError

Depth = Literal["features", "raw"]
ALONE = ProcessShare(0, 1)
# Whose versions change bytes.
_PACKAGES = ("av", "jax", "jaxlib", "numpy", "pillow", "soundfile", "soxr", "tokenizers")


def extract(
    config: ExtractionConfig,
    clips: Sequence[Clip],
    output: Path,
    *,
    labels: dict[str, LabelSpec],
    base: Path,
    depth: Depth = "features",
    root: Path | None = None,
    share: ProcessShare = ALONE,
    num_workers: int | None = None,
    max_bad_fraction: float = 0.01,
    report: Callable[[str], None] = print,
) -> dict[str, Any] | None:
    """Extracts this process's share of the clips, and completes the data set if it is the last to finish.

    Args:
        config: what is extracted, and how.
        clips: all of them, of all processes.
        output: folder of the data set; one of the same extraction is gone on with.
        labels: what the clips' labels are, by name.
        base: folder that the clips' paths are relative to.
        depth: "features", or "raw": what the encoders would be given (:mod:`mmei_jax.extraction.raw_media`).
        root: folder that no path may lead out of, symbolic links followed; None: no limit.
        share: which part of the work is this process's.
        num_workers: threads that decode; None: one worker per processor, threads or processes, whichever is faster.
        max_bad_fraction: most clips that may be quarantined, as a share of all, in [0, 1].
        report: takes lines on the progress.

    Returns:
        Counts of the whole extraction; None if other processes are still at work.

    Raises:
        InputError: a checkpoint, the folder or a clip's face boxes cannot be used, or too many clips are quarantined.
    """
    if not 0.0 <= max_bad_fraction <= 1.0:
        raise InputError(f"max_bad_fraction = {max_bad_fraction}: expected a share in [0, 1]")
    check_clips(clips, output)
    encoder = ClipEncoder(config) if depth == "features" else RawClips(config)
    spec = make_spec(config, encoder, labels)
    units = make_units(clips, config.records_per_shard)
    folder = ExtractionFolder(output, _identity(config, encoder, clips, spec))
    if folder.is_finished:
        return folder.summary()
    todo = folder.unfinished(units, share)
    settings = make_settings(config, encoder, base, root)
    todo_clips = [clip for unit in todo for clip in unit.clips]
    workers = choose_workers(todo_clips, settings, num_workers)
    report(
        f"process {share.index} of {share.count}: {len(todo)} of {len(units)} shards to do; "
        f"decoding in {workers[0]} {workers[1]}"
    )
    decoded = decode_clips(todo_clips, settings, *workers)
    num_bad = sum(folder.reasons(units).values())
    # A shard is fetched and written beside the work on the next one.
    with ThreadPoolExecutor(max_workers=1) as writer:
        written: Future[None] | None = None
        for unit in todo:
            shard = encoder.dispatch(itertools.islice(decoded, len(unit.clips)))
            if written is not None:
                written.result()
            written = writer.submit(_write, folder, spec, unit, shard, report)
            num_bad += sum(clip.failure is not None for clip in shard.clips)
            if num_bad > max_bad_fraction * len(clips):
                break
        if written is not None:
            written.result()
    check_bad_fraction(output, folder.reasons(units), len(clips), max_bad_fraction)
    return folder.complete(units, spec, max_bad_fraction)


def make_spec(config: ExtractionConfig, encoder: ClipEncoder | RawClips, labels: dict[str, LabelSpec]) -> DatasetSpec:
    """What the records of an extraction carry."""
    extras = {"path": "string", "text": "string"}
    if "vision" in config.modalities and config.vision.faces != "none":
        extras["frames_without_face"] = "string"
    return DatasetSpec(
        name=config.name,
        description=f"Extracted from clips by mmei_jax: {', '.join(config.modalities)}.",
        source=config.source,
        licence=config.licence,
        modalities={
            name: ModalitySpec(own.dim, cast(Any, own.dtype), own.producer, own.token_shape)
            for name, own in encoder.encoders.items()
        },
        labels=labels,
        extras=extras,
    )


def make_settings(
    config: ExtractionConfig, encoder: ClipEncoder | RawClips, base: Path, root: Path | None
) -> DecodeSettings:
    """What workers decode."""
    return DecodeSettings(
        base=base,
        root=root,
        optional=config.optional,
        max_clip_seconds=config.max_clip_seconds,
        vision=encoder.vision_settings,
        audio=encoder.audio_settings,
        has_text=encoder.has_text,
    )


def _identity(
    config: ExtractionConfig, encoder: ClipEncoder | RawClips, clips: Sequence[Clip], spec: DatasetSpec
) -> dict[str, Any]:
    """Everything that the result depends on but the media themselves."""
    return {
        "config": config.to_json(),
        "clips_sha256": fingerprint(clips),
        "spec": spec.to_json(),
        "num_devices": encoder.num_devices,
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def _write(
    folder: ExtractionFolder,
    spec: DatasetSpec,
    unit: Unit,
    shard: EncodedShard,
    report: Callable[[str], None],
) -> None:
    """Fetches a shard's features and writes them."""
    features = {name: collect() for name, collect in shard.collect.items()}
    kept = [index for index, clip in enumerate(shard.clips) if clip.failure is None]
    quarantined = [
        Quarantined.of(unit.clips[index], clip.failure)
        for index, clip in enumerate(shard.clips)
        if clip.failure is not None
    ]
    records = [
        make_record(unit.clips[index], shard.clips[index], {name: own.get(index) for name, own in features.items()})
        for index in kept
    ]
    missing = [shard.clips[index].frames_without_face or () for index in kept]
    counts = {
        **{f"{name}_absent": sum(index not in own for index in kept) for name, own in features.items()},
        "frames_without_face": sum(map(len, missing)),
        "texts_cut": sum(shard.clips[index].is_text_cut for index in kept),
    }
    folder.write(unit, spec, records, quarantined, counts)
    report(f"{unit.name}: {len(kept)} clips, {len(quarantined)} quarantined")


def make_record(clip: Clip, encoded: EncodedClip, features: dict[str, np.ndarray | None]) -> Record:
    """The record of a clip.

    Args:
        clip: what the list says.
        encoded: what became of it.
        features: per modality ``[tokens, dim]``; None where the clip lacks it.
    """
    extras: dict[str, int | float | str | None] = {"path": clip.path, "text": clip.text}
    if encoded.frames_without_face is not None:
        extras["frames_without_face"] = " ".join(map(str, encoded.frames_without_face))
    return Record(
        id=clip.id,
        user_id=clip.speaker,
        dialogue_id=clip.dialogue,
        turn=clip.turn,
        features=features,
        labels=clip.labels,
        extras=extras,
    )


def _describe(counts: dict[str, Any], output: Path) -> str:
    """Lines for a finished data set."""
    quarantined = counts["quarantined"]
    lines = [f"{output}: {counts['clips']} clips, {sum(quarantined.values())} quarantined"]
    lines += [f"  {reason}: {count} ({REASONS[reason]})" for reason, count in quarantined.items()]
    lines += [f"  {name}: {count}" for name, count in counts.items() if name not in ("clips", "quarantined")]
    return "\n".join(lines)


def main() -> None:
    """The command: parses flags, extracts, and says what came of it."""
    from absl import flags
    from ml_collections import config_flags

    from mmei_jax import command, compilation_cache
    from mmei_jax.extraction.extraction_config import parse
    from mmei_jax.sharding import process_share

    values = config_flags.DEFINE_config_file(
        "config", "configs/extraction.py", "What is extracted, and how; --config.group.key=value changes a key."
    )
    flags.DEFINE_string("input", None, "List of clips: .csv, .tsv or .parquet.")
    flags.DEFINE_string("builder", None, "Builder of clips, such as data/meld, in place of a list.")
    flags.DEFINE_multi_string("option", [], "Option of the builder, NAME=VALUE, such as folder=MELD.")
    flags.DEFINE_string("data_dir", "runs/tfds", "Folder for what the builder builds.")
    flags.DEFINE_string("output", None, "Folder of the data set.", required=True)
    flags.DEFINE_enum("depth", "features", get_args(Depth), "Features, or raw: uint8 frames, int16 samples, token ids.")
    flags.DEFINE_string("root", None, "Folder that no path of a clip may lead out of.")
    flags.DEFINE_integer("workers", None, "Threads that decode (default: one per processor, or processes if faster).")
    flags.DEFINE_float("max_bad_fraction", 0.01, "Most clips in quarantine, as a share of all.")
    flags.DEFINE_integer("process_index", None, "This process, from 0 (default: as SLURM or Kubernetes says).")
    flags.DEFINE_integer("num_processes", None, "How many processes share the work.")

    def run() -> int:
        given = flags.FLAGS
        config = parse(values.value.to_dict())
        clips, labels, base = _find_clips(config, given.input, given.builder, given.option, given.data_dir)
        compilation_cache.enable()
        counts = extract(
            config,
            clips,
            Path(given.output),
            labels=labels,
            base=base,
            depth=given.depth,
            root=Path(given.root) if given.root else None,
            share=process_share(given.process_index, given.num_processes),
            num_workers=given.workers,
            max_bad_fraction=given.max_bad_fraction,
        )
        if counts is None:
            print("this process's share is done; the last process to finish completes the data set")
        else:
            print(_describe(counts, Path(given.output)))
        return 0

    command.run(run)


def _find_clips(
    config: ExtractionConfig, source: str | None, builder: str | None, options: Sequence[str], data_dir: str
) -> tuple[list[Clip], dict[str, LabelSpec], Path]:
    """Clips, their labels and the folder that their paths are relative to, of a list or of a builder."""
    if (source is None) == (builder is None):
        raise InputError(f"--input={source}, --builder={builder}: expected exactly one of them")
    if source is not None:
        clips, unused = read_clips(Path(source), config.label_specs)
        if unused:
            print(f"{source}: columns without a meaning here: {', '.join(unused)}")
        return clips, config.label_specs, Path(source).parent
    # Loads TFDS, which takes seconds.
    from mmei_jax.extraction import dataset_builders

    if config.labels:
        raise InputError(f"config.labels = {config.labels}: expected () with --builder, which has labels of its own")
    built = dataset_builders.open_builder(builder or "", dataset_builders.parse_options(options), data_dir)
    names = dataset_builders.split_names(built)
    clips = [clip for name in names for clip in dataset_builders.builder_clips(built, name)]
    return clips, dataset_builders.label_specs(built), Path()


if __name__ == "__main__":
    main()
