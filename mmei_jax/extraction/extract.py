r"""From clips to feature shards: decodes, crops, tokenises, encodes, and writes what survives being killed.

Command, for instance::

    python -m mmei_jax.extraction.extract --config=configs/extraction.py --input=clips.csv --output=runs/data/mine \
        --config.vision.checkpoint=runs/encoders/vit --config.audio.checkpoint=runs/encoders/wav2vec2 \
        --config.text.checkpoint=runs/encoders/bert

``--catalogue``, ``--slates`` and ``--relevant_items`` add what the clips' users were shown
(:mod:`mmei_jax.extraction.slate_files`), for runs that learn to rank.

The same command goes on where it stopped. Several processes share the work with ``--process_index`` and
``--num_processes`` (or as SLURM or Kubernetes tells); the last to finish completes the data set.
"""

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

from mmei_jax.extraction.clip_lists import check_clips, fingerprint, read_clips
from mmei_jax.extraction.clips import Clip
from mmei_jax.extraction.decoding import choose_workers, decode_clips
from mmei_jax.extraction.encoding import EncodedShard
from mmei_jax.extraction.extraction_config import ExtractionConfig
from mmei_jax.extraction.media import REASONS
from mmei_jax.extraction.shard_extraction import Depth, Extraction, ShardExtractor
from mmei_jax.extraction.shard_units import Unit, make_units
from mmei_jax.extraction.slate_files import Recommendations, read_recommendations
from mmei_jax.records import LabelSpec
from mmei_jax.sharding import ProcessShare, process_share
from mmei_jax.types import InputError

ALONE = ProcessShare(0, 1)
# Extracts clips, and gives counts of the whole; None if the whole is not finished.
Extractor = Callable[[Extraction, Sequence[Clip]], dict[str, Any] | None]


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
    recommendations: Recommendations | None = None,
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
        recommendations: what the clips' slates are about; None where they have none.
        report: takes lines on the progress.

    Returns:
        Counts of the whole extraction; None if other processes are still at work.

    Raises:
        InputError: a checkpoint, the folder or a clip's face boxes cannot be used, or too many clips are quarantined.
    """
    check_clips(clips, output)
    extraction = Extraction(
        config,
        fingerprint(clips),
        output,
        labels,
        base,
        depth,
        root,
        num_workers,
        max_bad_fraction,
        recommendations,
    )
    return extract_share(extraction, clips, share, report)


def extract_share(
    extraction: Extraction, clips: Sequence[Clip], share: ProcessShare, report: Callable[[str], None] = print
) -> dict[str, Any] | None:
    """See :func:`extract`."""
    extractor = ShardExtractor(extraction)
    folder = extractor.folder
    if folder.is_finished:
        return folder.summary()
    units = make_units(clips, extraction.config.records_per_shard)
    todo = folder.unfinished(units, share)
    todo_clips = [clip for unit in todo for clip in unit.clips]
    workers = choose_workers(todo_clips, extractor.settings, extraction.num_workers)
    report(
        f"process {share.index} of {share.count}: {len(todo)} of {len(units)} shards to do; "
        f"decoding in {workers[0]} {workers[1]}"
    )
    decoded = decode_clips(todo_clips, extractor.settings, *workers)
    max_bad = extraction.max_bad_fraction
    num_bad = len(folder.quarantined(units))

    def write(unit: Unit, shard: EncodedShard) -> None:
        report(extractor.write(unit, shard))

    # A shard is fetched and written beside the work on the next one.
    with ThreadPoolExecutor(max_workers=1) as writer:
        written: Future[None] | None = None
        for unit in todo:
            shard = extractor.encoder.dispatch(itertools.islice(decoded, len(unit.clips)))
            if written is not None:
                written.result()
            written = writer.submit(write, unit, shard)
            num_bad += sum(clip.failure is not None for clip in shard.clips)
            if num_bad > max_bad * len(clips):
                break
        if written is not None:
            written.result()
    folder.check_bad_fraction(units, max_bad)
    return extractor.complete(units)


def _describe(counts: dict[str, Any], output: Path) -> str:
    """Lines for a finished data set."""
    quarantined = counts["quarantined"]
    lines = [f"{output}: {counts['clips']} clips, {sum(quarantined.values())} quarantined"]
    lines += [f"  {reason}: {count} ({REASONS[reason]})" for reason, count in quarantined.items()]
    lines += [f"  {name}: {count}" for name, count in counts.items() if name not in ("clips", "quarantined")]
    return "\n".join(lines)


def main(begin: Callable[[], Extractor] | None = None) -> None:
    """The command: parses flags, extracts, and says what came of it.

    Args:
        begin: defines flags of another runner of the units, and gives what hands them out; by default processes share
            them.
    """
    from absl import flags
    from ml_collections import config_flags

    from mmei_jax import command, compilation_cache
    from mmei_jax.extraction.extraction_config import parse
    from mmei_jax.host_memory import keep_freed_memory

    values: Any = None
    extractor: Extractor

    def define() -> None:
        nonlocal values, extractor
        values = config_flags.DEFINE_config_file(
            "config", "configs/extraction.py", "What is extracted, and how; --config.group.key=value changes a key."
        )
        flags.DEFINE_string("input", None, "List of clips: .csv, .tsv or .parquet.")
        flags.DEFINE_string("builder", None, "Builder of clips, such as data/meld, in place of a list.")
        flags.DEFINE_multi_string("option", [], "Option of the builder, NAME=VALUE, such as folder=MELD.")
        flags.DEFINE_string("data_dir", "runs/tfds", "Folder for what the builder builds.")
        flags.DEFINE_string("catalogue", None, "Items that may be recommended: .jsonl, .csv or .parquet.")
        flags.DEFINE_string("slates", None, "What was shown and how it was received, an item a row; with --catalogue.")
        flags.DEFINE_string("relevant_items", None, "What is relevant to whom, an item a row; with --slates.")
        flags.DEFINE_string("output", None, "Folder of the data set.", required=True)
        flags.DEFINE_enum(
            "depth", "features", get_args(Depth), "Features, or raw: uint8 frames, int16 samples, token ids."
        )
        flags.DEFINE_string("root", None, "Folder that no path of a clip may lead out of.")
        flags.DEFINE_integer(
            "workers", None, "Threads that decode (default: one per processor, or processes if faster)."
        )
        flags.DEFINE_float("max_bad_fraction", 0.01, "Most clips in quarantine, as a share of all.")
        extractor = (begin or _in_processes)()

    def run() -> int:
        given = flags.FLAGS
        config = parse(values.value.to_dict())
        clips, labels, base = _find_clips(config, given.input, given.builder, given.option, given.data_dir)
        paths = [Path(name) if name else None for name in (given.catalogue, given.slates, given.relevant_items)]
        clips, recommendations = read_recommendations(clips, *paths)
        compilation_cache.enable()
        keep_freed_memory()
        extraction = Extraction(
            config=config,
            clips_sha256=fingerprint(clips),
            output=Path(given.output),
            labels=labels,
            base=base,
            depth=given.depth,
            root=Path(given.root) if given.root else None,
            num_workers=given.workers,
            max_bad_fraction=given.max_bad_fraction,
            recommendations=recommendations,
        )
        counts = extractor(extraction, clips)
        if counts is None:
            print("this process's share is done; the last to finish completes the data set")
        else:
            print(_describe(counts, Path(given.output)))
        return 0

    command.run(run, define=define, keys_file="configs/extraction.py")


def _in_processes() -> Extractor:
    """Flags of processes that share the units, and what does one process's share."""
    from absl import flags

    flags.DEFINE_integer("process_index", None, "This process, from 0 (default: as SLURM or Kubernetes says).")
    flags.DEFINE_integer("num_processes", None, "How many processes share the work.")

    def run(extraction: Extraction, clips: Sequence[Clip]) -> dict[str, Any] | None:
        share = process_share(flags.FLAGS.process_index, flags.FLAGS.num_processes)
        return extract_share(extraction, clips, share)

    return run


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
    check_clips(clips, Path(builder or ""))
    return clips, dataset_builders.label_specs(built), Path()


if __name__ == "__main__":
    main()
