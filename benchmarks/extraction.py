"""How fast do clips become features, against a loop of PyAV and Hugging Face's models?

    python -m benchmarks.extraction [--quick] [--case=WORDS] [--workdir=runs/benchmarks/extraction]
        [--clips=FOLDER] [--results=benchmarks/results/DATE_extraction.json]

The clips are simulated (``mmei_jax.simulation.render``: 128 x 128 pixels, ten frames and 16,000 samples a second, 2 to
3 seconds), made once below ``--workdir``; ``--clips`` names a folder that the same program rendered before.
Encoders have random weights, made by Hugging Face's library and converted by the package. Wav2Vec2 has layer norm at
its front and is given masks, so that padding changes nothing on either side.

* **end to end**: from files to features on disk, of every modality, the loading of the encoders included. Ours is
  ``extraction.extract`` with the default batches; it finds its programs in JAX's persistent cache, as the command does
  from its second run on. The peers (``extraction_torch.py``) decode, process, encode and write eight clips at a time,
  padded to the longest; one of them decodes ahead in threads. All features of all clips must agree within 1e-4.
* **decoding alone**: ``decode_clips`` in threads against bare calls of PyAV on as many (``extraction_pyav.py``). Frames
  and samples must be the same to the bit. Only ours finds out whether a file is whole.
* **peak memory** of ours for 50 and for 200 clips, each in a process of its own, in shards of 16. The "ratio" is what
  is allowed divided by what was measured.
* **base size on a GPU**, in bfloat16: clips per second, the device's busy share, and which stage bounds it. The "ratio"
  is the seconds of the slower of decoding and encoding alone, divided by those of both together: 1 hides one behind
  the other.
"""

import argparse
import dataclasses
import functools
import os
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import rounds
from benchmarks.extraction_cases import (
    BASE,
    FRAMES_PER_SECOND,
    LIST_NAME,
    MAX_FRAMES,
    MAX_TOKENS,
    MODALITIES,
    SMALL,
    Case,
    Features,
    render_clips,
    save_checkpoints,
)

LOOP, LOOP_AHEAD, BARE = "Hugging Face + PyAV loop", "the same, decoding ahead in threads", "bare PyAV loop"
END_TO_END, DECODING, MEMORY, GPU = "end to end", "decoding alone", "peak memory", "base size on a GPU"
SIDES = {
    rounds.OURS: "benchmarks.extraction:our_side",
    LOOP: "benchmarks.extraction_torch:loop",
    LOOP_AHEAD: "benchmarks.extraction_torch:loop_decoding_ahead",
}
DECODING_SIDES = {rounds.OURS: "benchmarks.extraction:our_decoding", BARE: "benchmarks.extraction_pyav:bare_loop"}
GOALS = {LOOP: 2.0, LOOP_AHEAD: None, BARE: 0.9}
TOLERANCE = 1e-4
FEW_CLIPS, MANY_CLIPS, MOST_GROWTH = 50, 200, 1.1
_RECORDS_PER_SHARD_OF_MEMORY_CASE = 16
_STAGES = "the slower of its stages alone"


@dataclasses.dataclass(frozen=True)
class _Named:
    """A case by name alone, for ``--case``."""

    name: str


def our_side(case: Case) -> rounds.Ready:
    """``extract``, its programs in the persistent cache."""
    _keep_programs(case)
    # The first compiles, the second finds programs.
    _extract(case)
    seconds, evidence = _extract(case, reads=True)
    settings = {"batches": "default", "pre_run_seconds": round(seconds, 3), "threads that decode": case.num_threads}
    return rounds.Ready(
        lambda: _extract(case)[0], evidence, {**settings, **rounds.versions("jax", "jaxlib", "flax", "grain", "av")}
    )


def our_decoding(case: Case) -> rounds.Ready:
    """``decode_clips`` in threads."""
    from mmei_jax.encoders import preprocessing
    from mmei_jax.encoders.pretrained_files import read_preprocessing
    from mmei_jax.extraction.decoding import AudioSettings, DecodeSettings, VisionSettings, decode_clips

    config, clips = _read(case)
    images = preprocessing.ImagePreprocessing.read(read_preprocessing(case.encoders / "vision"))
    settings = DecodeSettings(
        base=case.clips,
        root=None,
        optional=(),
        max_clip_seconds=config.max_clip_seconds,
        vision=VisionSettings(FRAMES_PER_SECOND, MAX_FRAMES, config.vision.faces, config.vision.face_margin, images),
        audio=AudioSettings(16_000, 400),
        has_text=False,
    )
    decode = functools.partial(
        decode_clips, [clip for clip in clips if clip.path], settings, case.num_threads, "threads"
    )

    def media() -> Iterator[tuple[Any, Any]]:
        for clip in decode():
            if clip.failure is not None:
                raise clip.failure
            yield None if clip.frames is None else clip.frames.pixels, clip.samples

    return decoding_side(media, {"threads": case.num_threads, **rounds.versions("av", "grain", "soundfile")})


def decoding_side(media: Callable[[], Iterator[tuple[Any, Any]]], settings: dict[str, Any]) -> rounds.Ready:
    """A side that decodes.

    Args:
        media: gives the frames ``[frames, height, width, 3]`` and samples ``[samples]`` of each clip, or None.
        settings: what is printed about it.
    """

    def measure() -> float:
        started = time.perf_counter()
        for _ in media():
            pass
        return time.perf_counter() - started

    evidence = [tuple(_checksum(array) for array in each) for each in media()]
    measure()
    return rounds.Ready(measure, evidence, settings)


def _checksum(array: np.ndarray | None) -> Any:
    return None if array is None else (str(array.dtype), array.shape, zlib.crc32(np.ascontiguousarray(array).data))


def agree_on_media(ours: list[Any], theirs: list[Any]) -> str:
    """Names the first clip whose frames or samples differ in one bit; "" if all are the same."""
    if len(ours) != len(theirs):
        return f"{len(theirs)} clips against {len(ours)}"
    for index, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        for name, a, b in zip(("frames", "samples"), our, their, strict=True):
            if a != b:
                return f"{name} of clip {index}: {b} against {a} (type, shape, checksum)"
    return ""


def agree_on_features(ours: Features, theirs: Features) -> str:
    """Names the first clip whose features differ by more than :data:`TOLERANCE`; "" where all agree."""
    for name in MODALITIES:
        if ours[name].keys() != theirs[name].keys():
            return f"{name} of {len(theirs[name])} clips against {len(ours[name])}, or of others"
        for key, states in ours[name].items():
            other = theirs[name][key]
            if states.shape != other.shape:
                return f"{name} of {key}: shape {other.shape} against {states.shape}"
            difference = float(np.abs(states - other).max(initial=0.0))
            if not difference <= TOLERANCE:  # nor NaN
                return f"{name} of {key}: largest absolute difference {difference:.3g}, allowed {TOLERANCE:g}"
    return ""


def _read(case: Case, **changes: Any) -> tuple[Any, Any]:
    """The default configuration with the case's encoders, and the clips."""
    from configs import extraction as defaults
    from mmei_jax.extraction.clip_lists import read_clips
    from mmei_jax.extraction.extraction_config import parse

    values = defaults.get_config()
    for name in MODALITIES:
        values[name].checkpoint = str(case.encoders / name)
    values.vision.update(frames_per_second=FRAMES_PER_SECOND, max_frames=MAX_FRAMES)
    values.text.max_tokens = MAX_TOKENS
    values.compute_dtype = case.compute_dtype
    values.update(changes)
    clips, _ = read_clips(case.clips / LIST_NAME, {})
    return parse(values.to_dict()), clips[: case.num_clips]


def _extract(case: Case, *, reads: bool = False, **changes: Any) -> tuple[float, Features]:
    """Seconds of an extraction into a new folder, and its features if ``reads``."""
    from mmei_jax.extraction.extract import extract

    config, clips = _read(case, **changes)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "data"
        started = time.perf_counter()
        extract(
            config,
            clips,
            output,
            labels={},
            base=case.clips,
            num_workers=case.num_threads,
            max_bad_fraction=0.0,
            report=lambda line: None,
        )
        seconds = time.perf_counter() - started
        return seconds, read_features(output) if reads else {}


def read_features(folder: Path) -> Features:
    """Of all splits, by modality and clip; without padding, and without the clips that lack the modality."""
    from mmei_jax.records import Dataset

    dataset = Dataset.open(folder)
    found: Features = {name: {} for name in MODALITIES}
    for split in map(dataset.split, dataset.manifest["splits"]):
        rows = np.arange(split.num_records)
        for name, features in found.items():
            lengths = split.lengths(name)
            tokens, _ = split.gather_tokens(name, rows, max(int(lengths.max()), 1))
            features.update(
                {
                    key: np.asarray(tokens[row, :length])
                    for row, (key, length) in enumerate(zip(split.ids(rows), lengths.tolist(), strict=True))
                    if length
                }
            )
    return found


def _keep_programs(case: Case) -> None:
    from mmei_jax import compilation_cache

    os.environ["XDG_CACHE_HOME"] = str((case.encoders / "programs").absolute())
    compilation_cache.enable()


def measure_peak_memory(case: Case) -> int:
    """Bytes: the most that this process, which must be new, held while it extracted the clips."""
    _keep_programs(case)
    _extract(case, records_per_shard=_RECORDS_PER_SHARD_OF_MEMORY_CASE)
    # Not getrusage's: that starts at the peak of the process that started this one.
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])


def peak_memory(case: Case) -> dict[str, Any]:
    """The entry of the case of that name."""
    found = []
    for num_clips in (FEW_CLIPS, MANY_CLIPS):
        bytes_held = rounds.in_new_process(measure_peak_memory, dataclasses.replace(case, num_clips=num_clips))
        print(f"peak memory of {num_clips} clips: {bytes_held / 1e6:.0f} MB", flush=True)
        found.append(bytes_held)
    return {
        "case": f"{MEMORY}, {MANY_CLIPS} clips",
        "peer": f"at most {MOST_GROWTH:g} x that of {FEW_CLIPS}",
        "ratio": round(MOST_GROWTH * found[0] / found[1], 4),
        "goal": 1.0,
        "peak_bytes": found,
    }


def on_gpu(case: Case) -> dict[str, Any]:
    """The entry of the case of that name: throughput, busy share, and the stage that bounds it."""
    import jax

    from mmei_jax.extraction.decoding import DecodeSettings, decode_clips
    from mmei_jax.extraction.encoding import ClipEncoder
    from mmei_jax.profiling import traces

    config, clips = _read(case)
    encoder = ClipEncoder(config)
    settings = DecodeSettings(
        base=case.clips,
        root=None,
        optional=(),
        max_clip_seconds=config.max_clip_seconds,
        vision=encoder.vision_settings,
        audio=encoder.audio_settings,
        has_text=encoder.has_text,
    )
    decode = functools.partial(decode_clips, clips, settings, case.num_threads, "threads")

    def encode(decoded: Any) -> float:
        started = time.perf_counter()
        shard = encoder.dispatch(decoded)
        for collect in shard.collect.values():
            collect()
        return time.perf_counter() - started

    decoded = list(decode())
    encode(decoded)
    started = time.perf_counter()
    decoded = list(decode())
    decoding, encoding = time.perf_counter() - started, encode(decoded)
    together = encode(decode())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            traced = encode(decode())
        spans = traces.device_spans(Path(folder))
    whole = min(_extract(case)[0] for _ in range(2))
    return {
        "case": f"{GPU}, {len(clips)} clips",
        "peer": _STAGES,
        "ratio": round(max(decoding, encoding) / together, 4),
        "goal": None,
        "bounded_by": "decoding" if decoding > encoding else "encoding",
        "clips_per_second": round(len(clips) / together, 1),
        "clips_per_second_with_loading_and_writing": round(len(clips) / whole, 1),
        "device_busy_share": round(traces.busy_seconds(spans) / traced, 4) if spans else None,
        "decoding_seconds": round(decoding, 3),
        "encoding_seconds": round(encoding, 3),
        "together_seconds": round(together, 3),
        "num_threads": case.num_threads,
        "device": jax.devices()[0].device_kind,
    }


def _print(entry: dict[str, Any]) -> None:
    ratio = "not given" if entry["ratio"] is None else f"{entry['ratio']:.2f}"
    print(f"{entry['case']}: {ratio} against {entry['peer']}", flush=True)
    for key, value in entry.items():
        if key not in ("case", "peer", "ratio", "goal"):
            print(f"  {key}: {value}", flush=True)


def _timed_cases(case: Case, name: str, num_rounds: int) -> list[dict[str, Any]]:
    """One entry for each peer of a case that is measured in rounds; raises rounds.SidesDiffer."""
    is_whole = name == END_TO_END
    sides = dict(SIDES if is_whole else DECODING_SIDES)
    if is_whole and case.is_quick:
        del sides[LOOP_AHEAD]
    cpu = {"JAX_PLATFORMS": "cpu"}
    timing = rounds.measure_sides(
        sides,
        case,
        num_rounds=num_rounds,
        agree=agree_on_features if is_whole else agree_on_media,
        environment=dict.fromkeys(sides, cpu),
        is_quick=case.is_quick,
    )
    clips = {"our_clips_per_second": round(case.num_clips / timing.median_seconds(rounds.OURS), 2)}
    title = f"{name}, {case.num_clips} clips" + (f", {SMALL}" if is_whole else f", {case.num_threads} threads")
    return [rounds.case_record(title, timing, peer, goal=GOALS[peer], **clips) for peer in sides if peer != rounds.OURS]


def main() -> None:
    """Measures every case, prints a table, and a JSON line at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the timed cases on 24 clips, 2 rounds, within a minute")
    parser.add_argument("--num_rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--workdir", type=Path, default=Path("runs/benchmarks/extraction"), help="default: %(default)s")
    parser.add_argument("--clips", type=Path, help="folder of clips that the package rendered, in place of new ones")
    parser.add_argument("--results", help="JSON file for the figures, date, versions and command")
    arguments = parser.parse_args()
    names = (END_TO_END, DECODING) if arguments.quick else (END_TO_END, DECODING, MEMORY, GPU)
    chosen = [case.name for case in rounds.chosen_cases(parser, [_Named(name) for name in names], arguments.case)]
    num_clips = 24 if arguments.quick else MANY_CLIPS
    num_rounds = 2 if arguments.quick else arguments.num_rounds
    num_cores = len(os.sched_getaffinity(0))
    clips = arguments.clips or arguments.workdir / f"clips_{num_clips}"
    render_clips(clips, num_clips, num_cores)
    entries: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        case = Case(clips, Path(folder) / "small", num_clips, num_threads=num_cores, is_quick=arguments.quick)
        if set(chosen) != {GPU}:
            # In a process of its own: torch's threads stay out of this one.
            rounds.in_new_process(save_checkpoints, case.encoders, clips, SMALL)
        for name in chosen:
            if name in (END_TO_END, DECODING):
                found = _timed_cases(case, name, num_rounds)
            elif name == MEMORY:
                found = [peak_memory(case)]
            elif rounds.missing_gpu():
                found = [rounds.unmeasured(name, _STAGES, rounds.missing_gpu(), goal=None)]
            else:
                base = dataclasses.replace(case, encoders=Path(folder) / "base", compute_dtype="bfloat16")
                rounds.in_new_process(save_checkpoints, base.encoders, clips, BASE)
                found = [rounds.in_new_process(on_gpu, base)]
            for entry in found:
                _print(entry)
            entries += found
    versions = rounds.versions("jax", "torch", "transformers", "av", "grain")
    rounds.print_summary("extraction", entries, arguments.results, versions=versions)


if __name__ == "__main__":
    main()
