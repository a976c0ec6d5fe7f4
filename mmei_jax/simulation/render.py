"""AIGC-INT-Sim at ``raw`` depth: **simulated** clips, drawn faces, synthesised voices and generated words, as files.

A record has the latents that it has at ``features`` depth for the same seed: labels, manner, the class that each
modality shows, which modalities are absent, which tokens are informative. From these a face is drawn
(``render_face.py``, ``render_drawing.py``), a voice synthesised (``render_voice.py``) and a transcript written
(``render_text.py``). No person was filmed or recorded, and no number measured on these clips says anything of people.

The exact ceiling of ``features`` depth does **not** bound what can be read from the clips: what a token of features
holds and what pixels and samples hold are different observations of the same latents. Results at ``raw`` depth are
therefore reported without a ceiling.

The command writes ``clips.csv``, one row per record that has any modality, with the columns of
``extraction.clips.Clip``; ``latents.csv``, what else is true of each record, to look at results by;
``catalogue.jsonl``, ``slates.csv`` and ``relevant_items.csv``, what the records' users were shown and liked
(``render_feedback.py``); and the files under ``media/``: mp4 (H.264, AAC) for a record with vision, without an audio
stream where audio is absent; wav for a record with audio and no vision; txt where there is text::

    python -m mmei_jax.simulation.render --output=runs/data/rendered --num_records=200 --seed=1
    python -m mmei_jax.simulation.render --contact_sheet=faces.png
"""

import argparse
import csv
import functools
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from jaxtyping import Float

from mmei_jax.command import EXIT_TERMINATED, CommandParser, report_errors
from mmei_jax.simulation.aigc_int import CHUNK_RECORDS, EMOTIONS, INTENTS
from mmei_jax.simulation.render_drawing import draw_frames
from mmei_jax.simulation.render_feedback import (
    CATALOGUE_NAME,
    RELEVANT_COLUMNS,
    RELEVANT_NAME,
    SLATE_COLUMNS,
    SLATES_NAME,
    catalogue_lines,
    relevant_rows,
    slate_rows,
)
from mmei_jax.simulation.render_media import SAMPLE_RATES_HZ, encode_mp4, encode_wav
from mmei_jax.simulation.render_plan import RecordPlan, plan_records
from mmei_jax.simulation.render_sheet import write_contact_sheet
from mmei_jax.simulation.render_text import write_text
from mmei_jax.simulation.render_voice import VoiceTrack, draw_voice, synthesise
from mmei_jax.types import MODALITIES, InputError

LIST_NAME = "clips.csv"
LATENTS_NAME = "latents.csv"
MEDIA_FOLDER = "media"
COLUMNS = (
    "id",
    "split",
    "path",
    "audio_path",
    "start_seconds",
    "end_seconds",
    "text",
    "speaker",
    "dialogue",
    "turn",
    "emotion",
    "intent",
    "optional",
)
LATENT_COLUMNS = ("id", "manner", *(f"{name}_class" for name in MODALITIES), *(f"{name}_tokens" for name in MODALITIES))
_RECORDS_PER_TASK = 4
# A process takes about a second to start: as long as it takes to render so many records.
_RECORDS_PER_WORKER = 16


@dataclass(frozen=True)
class RenderOptions:
    """How clips are rendered.

    Attributes:
        size: height and width of frames in pixels; even, 32 to 1024.
        frames_per_second: 1 to 60.
        sample_rate_hz: samples per second of the sound, one of ``render_media.SAMPLE_RATES_HZ``.
    """

    size: int = 128
    frames_per_second: int = 10
    sample_rate_hz: int = 16_000

    def __post_init__(self) -> None:
        """Refuses what no codec could write."""
        if not 32 <= self.size <= 1024 or self.size % 2:
            raise InputError(f"size = {self.size}: expected an even number from 32 to 1024")
        if not 1 <= self.frames_per_second <= 60:
            raise InputError(f"frames_per_second = {self.frames_per_second}: expected 1 to 60")
        if self.sample_rate_hz not in SAMPLE_RATES_HZ:
            accepted = ", ".join(str(rate) for rate in SAMPLE_RATES_HZ)
            raise InputError(f"sample_rate_hz = {self.sample_rate_hz}: expected one of {accepted}")

    def num_samples(self, num_frames: int) -> int:
        """Samples that last as long as so many frames, rounded."""
        return round(num_frames * self.sample_rate_hz / self.frames_per_second)


def render_voice(plan: RecordPlan, options: RenderOptions) -> tuple[VoiceTrack, Float[np.ndarray, "samples"] | None]:
    """The voice of a record, and its sound; None where audio is absent."""
    num_frames = plan.num_frames(options.frames_per_second)
    track = draw_voice(plan, num_frames / options.frames_per_second)
    if not plan.is_present("audio"):
        return track, None
    samples = synthesise(track, options.num_samples(num_frames), options.sample_rate_hz, plan.generator("breath"))
    return track, samples


def render_files(plan: RecordPlan, options: RenderOptions) -> dict[str, bytes]:
    """The files of one record: content by name. A function of its arguments alone, on one machine."""
    track, sound = render_voice(plan, options)
    files = {}
    if plan.is_present("vision"):
        num_frames = plan.num_frames(options.frames_per_second)
        frames = draw_frames(plan, track, num_frames, options.frames_per_second, options.size)
        files[f"{plan.id}.mp4"] = encode_mp4(
            frames, options.size, options.frames_per_second, sound, options.sample_rate_hz
        )
    elif sound is not None:
        files[f"{plan.id}.wav"] = encode_wav(sound, options.sample_rate_hz)
    if plan.is_present("text"):
        files[f"{plan.id}.txt"] = (write_text(plan) + "\n").encode()
    return files


def media_folder(plan: RecordPlan) -> str:
    """Where the files of a record lie, below the data set: 1,000 records share a folder."""
    return f"{MEDIA_FOLDER}/{plan.number // CHUNK_RECORDS:05d}"


def list_row(plan: RecordPlan) -> dict[str, str]:
    """The row of ``clips.csv``: paths relative to its folder, empty cells for what is not there or not known."""
    media = ".mp4" if plan.is_present("vision") else ".wav" if plan.is_present("audio") else None
    row = dict.fromkeys(COLUMNS, "")
    row |= {
        "id": plan.id,
        "split": plan.split,
        "path": f"{media_folder(plan)}/{plan.id}{media}" if media else "",
        "text": write_text(plan) if plan.is_present("text") else "",
        "speaker": plan.speaker,
        "emotion": EMOTIONS[plan.emotion],
        "intent": INTENTS[plan.intent],
        "optional": "|".join(name for name in MODALITIES if not plan.is_present(name)),
    }
    return row


def latents_row(plan: RecordPlan) -> dict[str, str]:
    """The row of ``latents.csv``: class ids that are shown, present or not, and tokens; 0 tokens where absent."""
    row = {"id": plan.id, "manner": str(plan.manner)}
    for name in MODALITIES:
        row[f"{name}_class"] = str(plan.shown_class[name])
        row[f"{name}_tokens"] = str(len(plan.is_informative.get(name, ())))
    return row


def write_files(plan: RecordPlan, options: RenderOptions, folder: Path) -> int:
    """Renders one record into a data set's folder, whose media folders exist; returns the number of bytes."""
    files = render_files(plan, options)
    for name, content in files.items():
        (folder / media_folder(plan) / name).write_bytes(content)
    return sum(len(content) for content in files.values())


def write_dataset(
    output: str | os.PathLike[str], num_records: int, seed: int, options: RenderOptions, num_workers: int = 1
) -> int:
    """Renders records ``0 .. num_records - 1`` of a seed; returns the number of bytes of their media.

    The data set appears under its name only when it is complete: it is built in a hidden folder beside it, which is
    removed after an exception. The bytes do not depend on the number of workers.

    Args:
        output: folder to make.
        num_records: how many, at least 1.
        seed: any integer in [0, 2**63).
        options: how clips are rendered.
        num_workers: processes; 1 renders in this one.

    Raises:
        InputError: ``output`` exists, a number cannot be used, or a worker process died.
    """
    output = Path(output)
    for name, number in (("num_records", num_records), ("workers", num_workers)):
        if number < 1:
            raise InputError(f"{name} = {number}: expected at least 1")
    if output.exists() or output.is_symlink():
        raise InputError(f"{output}: exists already; name a new folder")
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = output.parent / f".{output.name}.{os.getpid()}.partial"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        num_bytes = _write(folder, plan_records(seed, num_records), options, num_workers)
        folder.rename(output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return num_bytes


def _write(folder: Path, chunks: Iterable[list[RecordPlan]], options: RenderOptions, num_workers: int) -> int:
    render = functools.partial(write_files, options=options, folder=folder)
    num_bytes = 0
    with (folder / CATALOGUE_NAME).open("w", encoding="utf-8", newline="") as file:
        file.writelines(catalogue_lines())
    with (
        _open_table(folder / LIST_NAME, COLUMNS) as clips,
        _open_table(folder / LATENTS_NAME, LATENT_COLUMNS) as latents,
        _open_table(folder / SLATES_NAME, SLATE_COLUMNS) as slates,
        _open_table(folder / RELEVANT_NAME, RELEVANT_COLUMNS) as relevant,
        _start_workers(num_workers) as map_in_order,
    ):
        for plans in chunks:
            (folder / media_folder(plans[0])).mkdir(parents=True)
            num_bytes += sum(map_in_order(render, plans))
            # About one record in 12,000 lacks all modalities: there is no clip to list.
            listed = [plan for plan in plans if plan.is_informative]
            clips.writerows(map(list_row, listed))
            latents.writerows(map(latents_row, plans))
            if listed:
                slates.writerows(slate_rows(listed))
                relevant.writerows(relevant_rows(listed))
    return num_bytes


@contextmanager
def _open_table(path: Path, columns: tuple[str, ...]) -> Iterator[Any]:
    """A writer of rows below a header; UTF-8, lines end with a newline alone."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        yield writer


@contextmanager
def _start_workers(num_workers: int) -> Iterator[Callable[..., Iterator[int]]]:
    """A ``map`` over so many processes."""
    if num_workers == 1:
        yield map
        return
    # Forking a process that has threads, as JAX starts them, may hang.
    pool = ProcessPoolExecutor(num_workers, get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_IGN))
    try:
        yield functools.partial(pool.map, chunksize=_RECORDS_PER_TASK)
    except BrokenProcessPool as error:
        raise InputError("a worker process died, perhaps for lack of memory; try fewer --workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _end_on_signals() -> Iterator[None]:
    """Within the block, SIGTERM and Ctrl-C raise SystemExit, so that what was begun is removed."""

    def end(number: int, frame: object) -> NoReturn:
        print("error: interrupted; nothing was written", file=sys.stderr, flush=True)
        sys.exit(EXIT_TERMINATED)

    previous = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(
        prog="python -m mmei_jax.simulation.render",
        description="Renders simulated records as video, sound and text files, with a list of them. Same seed, same "
        "bytes on the same machine.",
    )
    defaults = RenderOptions()
    parser.add_argument("--output", help="folder to make")
    parser.add_argument("--num_records", type=int, default=200, help="how many clips (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the records (default: %(default)s)")
    parser.add_argument(
        "--size", type=int, default=defaults.size, help="height and width in pixels (default: %(default)s)"
    )
    parser.add_argument(
        "--frames_per_second", type=int, default=defaults.frames_per_second, help="default: %(default)s"
    )
    parser.add_argument("--sample_rate_hz", type=int, default=defaults.sample_rate_hz, help="default: %(default)s")
    parser.add_argument("--workers", type=int, help="processes (default: one per core, fewer for few clips)")
    parser.add_argument(
        "--contact_sheet",
        metavar="FILE.png",
        help="draw a picture of every emotion's faces, beside or without --output",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: renders what the flags ask for; returns the exit code."""
    flags = _parse(arguments)

    def run() -> int:
        if flags.output is None and flags.contact_sheet is None:
            raise InputError("nothing to do: expected --output, --contact_sheet or both")
        options = RenderOptions(flags.size, flags.frames_per_second, flags.sample_rate_hz)
        num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        enough = max(1, flags.num_records // _RECORDS_PER_WORKER)
        num_workers = min(num_cores, enough) if flags.workers is None else flags.workers
        with _end_on_signals():
            if flags.output is not None:
                num_bytes = write_dataset(flags.output, flags.num_records, flags.seed, options, num_workers)
                print(f"{flags.output}: {flags.num_records} simulated clips, {num_bytes / 1e6:.1f} MB of media")
            if flags.contact_sheet is not None:
                write_contact_sheet(flags.contact_sheet, flags.seed, options.size, options.frames_per_second)
                print(f"{flags.contact_sheet}: faces of simulated records")
        return 0

    return report_errors(run)


if __name__ == "__main__":
    sys.exit(main())
