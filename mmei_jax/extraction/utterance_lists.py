"""Reads lists of utterances as their authors publish them: MELD, MIntRec, MMSA's label.csv; and lists of clips.

Every reader gives :class:`Utterance`, in the order of the files, labels still by name: what a label may be is known to
whoever has the label order, and a wrong name is an error here and a finding there.
"""

import csv
import dataclasses
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from mmei_jax.extraction.clip_lists import DEFAULT_SPLIT
from mmei_jax.extraction.clips import Clip
from mmei_jax.records import LabelSpec
from mmei_jax.types import InputError

# Official splits of MELD: name, CSV, and where MELD.Raw has the split's clips.
MELD_SPLITS = (
    ("train", "train_sent_emo.csv", "train_splits"),
    ("dev", "dev_sent_emo.csv", "dev_splits_complete"),
    ("test", "test_sent_emo.csv", "output_repeated_splits_test"),
)
MINTREC_SPLITS = (("train", "train.tsv"), ("dev", "dev.tsv"), ("test", "test.tsv"))
_MELD_COLUMNS = ("Utterance", "Speaker", "Emotion", "Sentiment", "Dialogue_ID", "Utterance_ID", "Season", "Episode")
_MELD_TIMES = ("StartTime", "EndTime")
_MINTREC_COLUMNS = ("season", "episode", "clip", "text", "label")
_MOSEI_COLUMNS = ("video_id", "clip_id", "text", "label", "mode")
# What a list of clips may have besides labels; the names are those of Clip.
CLIP_COLUMNS = tuple(spec.name for spec in dataclasses.fields(Clip) if spec.name != "labels")


@dataclass(frozen=True)
class Utterance:
    """One row of a list.

    Attributes:
        clip: all but its labels.
        labels: what the cells say, by label; "" where not labelled.
        episode: episode, video or whatever else utterances share; None where the list has none.
        seconds: how long it is, as the list says; None where it does not.
    """

    clip: Clip
    labels: dict[str, str] = field(default_factory=dict)
    episode: str | None = None
    seconds: float | None = None


def label_clips(utterances: Iterable[Utterance], labels: Mapping[str, LabelSpec]) -> list[Clip]:
    """Clips with labels as ids and numbers.

    Raises:
        InputError: a cell is none of the classes, or no number; names the clip.
    """
    return [
        dataclasses.replace(
            utterance.clip,
            labels={
                name: _label_value(utterance, name, spec) for name, spec in labels.items() if utterance.labels.get(name)
            },
        )
        for utterance in utterances
    ]


def _label_value(utterance: Utterance, name: str, spec: LabelSpec) -> Any:
    cell = utterance.labels[name]
    wrong = f"clip {utterance.clip.id!r}: {name} = {cell!r}: expected "
    if spec.kind == "real":
        number = _number(cell)
        if number is None:
            raise InputError(f"{wrong}a number")
        return number
    position = {class_name: index for index, class_name in enumerate(spec.class_names)}
    names = [cell] if spec.kind == "categorical" else [part for part in cell.split("|") if part != "none"]
    unknown = [part for part in names if part not in position]
    if unknown:
        raise InputError(f"{wrong}{'one' if spec.kind == 'categorical' else 'some'} of {', '.join(position)}")
    if spec.kind == "categorical":
        return position[cell]
    value = np.zeros(len(position), np.float32)
    value[[position[part] for part in names]] = 1
    return value


def read_meld(folder: Path, clips_folder: Path | None = None) -> list[Utterance]:
    """MELD's three CSVs.

    Ids are ``<split>_dia<d>_utt<u>``, unique over all splits as dialogue numbers are not; so are dialogues,
    ``<split>_dia<d>``. Clips are files of their own, so start and end are None; ``seconds`` is what the CSV's times,
    which are of the episode, say.

    Args:
        folder: with ``train_sent_emo.csv``, ``dev_sent_emo.csv`` and ``test_sent_emo.csv``.
        clips_folder: laid out as MELD.Raw; every clip gets its path there, whether or not the file exists. None: text
            alone.

    Raises:
        InputError: a file or column is missing, or a cell is not a number where one belongs; names the line.
    """
    utterances = []
    for split, file_name, clips_name in MELD_SPLITS:
        for line, row in _read_rows(folder / file_name, _MELD_COLUMNS + _MELD_TIMES, ","):
            where = f"{folder / file_name}: line {line}"
            dialogue, turn = (_whole(row[name], f"{where}: {name}") for name in ("Dialogue_ID", "Utterance_ID"))
            name = f"dia{dialogue}_utt{turn}"
            path = None if clips_folder is None else os.path.join(clips_folder, clips_name, f"{name}.mp4")
            clip = Clip(
                f"{split}_{name}",
                split,
                path=path,
                text=row["Utterance"] or None,
                speaker=row["Speaker"] or None,
                dialogue=f"{split}_dia{dialogue}",
                turn=turn,
            )
            start, end = (_meld_seconds(row[time], f"{where}: {time}") for time in _MELD_TIMES)
            labels = {"emotion": row["Emotion"], "sentiment": row["Sentiment"]}
            utterances.append(Utterance(clip, labels, f"s{row['Season']}e{row['Episode']}", round(end - start, 3)))
    return utterances


def read_mintrec(folder: Path) -> list[Utterance]:
    """MIntRec's ``train.tsv``, ``dev.tsv`` and, where it is there, ``test.tsv``: text and one intent.

    Ids are ``<season>_<episode>_<clip>``; neither speakers nor dialogues are known.

    Raises:
        InputError: a file or column is missing; names it.
    """
    utterances = []
    for split, file_name in MINTREC_SPLITS:
        if split == "test" and not (folder / file_name).exists():
            continue
        for _, row in _read_rows(folder / file_name, _MINTREC_COLUMNS, "\t", is_quoted=False):
            name = f"{row['season']}_{row['episode']}_{row['clip']}"
            clip = Clip(name, split, text=row["text"] or None)
            utterances.append(Utterance(clip, {"intent": row["label"]}, f"{row['season']}{row['episode']}"))
    return utterances


def read_mosei(path: Path, media_folder: Path | None = None, *, has_whole_videos: bool = False) -> list[Utterance]:
    """CMU-MOSEI as MMSA's ``label.csv`` lists it: video_id, clip_id, text, label, mode, and maybe start and end.

    Args:
        path: the CSV; ``mode`` is the split, ``label`` the sentiment in [-3, 3].
        media_folder: ``<video_id>/<clip_id>.mp4``, or ``<video_id>.mp4`` for whole videos; None: text alone.
        has_whole_videos: whether clips are cut out of whole videos by the columns start and end, in seconds.

    Raises:
        InputError: the file or a column is missing, or a cell is not a number where one belongs; names the line.
    """
    columns = _MOSEI_COLUMNS + (("start", "end") if has_whole_videos else ())
    utterances = []
    for line, row in _read_rows(path, columns, ","):
        times = [_seconds(row[name], f"{path}: line {line}: {name}") if row.get(name) else None for name in _TIMES]
        if has_whole_videos and None in times:
            raise InputError(f"{path}: line {line}: start or end is empty: whole videos need both")
        video, name = row["video_id"], row["clip_id"]
        file = f"{video}.mp4" if has_whole_videos else os.path.join(video, f"{name}.mp4")
        clip = Clip(
            f"{video}$_${name}",
            row["mode"],
            path=None if media_folder is None else os.path.join(media_folder, file),
            start_seconds=times[0] if has_whole_videos else None,
            end_seconds=times[1] if has_whole_videos else None,
            text=row["text"] or None,
            speaker=video,
            dialogue=video,
            turn=int(name) if name.isdecimal() else None,
        )
        start, end = times
        seconds = None if start is None or end is None else round(end - start, 3)
        utterances.append(Utterance(clip, {"sentiment": row["label"]}, video, seconds))
    return utterances


def read_clip_list(path: Path, media_folder: Path | None = None) -> list[Utterance]:
    """A list of clips as extraction takes it: CSV, TSV or Parquet, by the file's ending.

    Columns are named after :class:`~mmei_jax.extraction.clips.Clip`, none of them needed (``id`` is the path where it
    is missing, ``split`` "all"; paths are relative to ``media_folder``, None for the list's own; ``optional`` is joined
    by "|"); ``episode``; every other column is a label (names; several joined by "|", "none" for none of them;
    numbers). Empty cells are unknown.

    Raises:
        InputError: the file is missing or unreadable, or a cell is not a number where one belongs; names the line.
    """
    utterances: list[Utterance] = []
    for line, row in _read_list(path):
        where = f"{path}: line {line}"
        cells = [row.get(f"{name}_seconds") for name in _TIMES]
        start, end = (_seconds(cell, where) if cell else None for cell in cells)
        files: dict[str, Any] = {
            name: os.path.join(media_folder or path.parent, row[name])
            for name in CLIP_COLUMNS
            if name.endswith("path") and row.get(name)
        }
        name = row.get("path") or row.get("audio_path") or f"row{len(utterances)}"
        clip = Clip(
            row.get("id") or (f"{name}@{cells[0]}" if cells[0] and row.get("path") else name),
            row.get("split") or DEFAULT_SPLIT,
            **files,
            start_seconds=start,
            end_seconds=end,
            text=row.get("text") or None,
            speaker=row.get("speaker") or None,
            dialogue=row.get("dialogue") or None,
            turn=_whole(row["turn"], f"{where}: turn") if row.get("turn") else None,
            optional=tuple(row["optional"].split("|")) if row.get("optional") else (),
        )
        labels = {name: cell for name, cell in row.items() if name not in CLIP_COLUMNS and name != "episode"}
        seconds = None if start is None or end is None else round(end - start, 3)
        utterances.append(Utterance(clip, labels, row.get("episode") or None, seconds))
    return utterances


def write_clip_list(path: Path, utterances: Sequence[Utterance]) -> None:
    """Writes what :func:`read_clip_list` reads; paths as they are. Overwrites."""
    labels = list(dict.fromkeys(name for utterance in utterances for name in utterance.labels))
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, [*CLIP_COLUMNS, "episode", *labels], restval="")
        writer.writeheader()
        for utterance in utterances:
            row = {name: getattr(utterance.clip, name) for name in CLIP_COLUMNS}
            row |= {"optional": "|".join(utterance.clip.optional), "episode": utterance.episode, **utterance.labels}
            writer.writerow({name: "" if value is None else value for name, value in row.items()})


_TIMES = ("start", "end")


def _read_list(path: Path) -> list[tuple[int, dict[str, str]]]:
    """Row number and cells of a list of clips."""
    if path.suffix != ".parquet":
        return _read_rows(path, (), "\t" if path.suffix == ".tsv" else ",")
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable Parquet file: {' '.join(str(error).split())}") from error
    if not rows:
        raise InputError(f"{path}: no rows")
    cells = [{name: "" if value is None else str(value) for name, value in row.items()} for row in rows]
    return list(enumerate(cells, start=1))


def _read_rows(
    path: Path, needed: Sequence[str], delimiter: str, *, is_quoted: bool = True
) -> list[tuple[int, dict[str, str]]]:
    """Line number and cells by column of every row of a UTF-8 table; without ``is_quoted`` quotes are part of cells."""
    if not path.is_file():
        raise InputError(f"{path}: no such file: expected a table with the columns {', '.join(needed)}")
    quoting: Any = csv.QUOTE_MINIMAL if is_quoted else csv.QUOTE_NONE
    rows = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.reader(stream, delimiter=delimiter, quoting=quoting, strict=True)
            header = next(reader, [])
            missing = [name for name in needed if name not in header]
            if missing or len(set(header)) < len(header):
                found = f"{path}: columns {', '.join(header)}: expected each once"
                raise InputError(found + (f", among them {', '.join(missing)}" if missing else ""))
            for cells in reader:
                if len(cells) != len(header):
                    where = f"{path}: line {reader.line_num}"
                    raise InputError(f"{where}: {len(cells)} cells, the header has {len(header)}")
                rows.append((reader.line_num, dict(zip(header, cells, strict=True))))
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a UTF-8 table: {error}") from error
    if not rows:
        raise InputError(f"{path}: no rows")
    return rows


def _whole(cell: str, where: str) -> int:
    if not cell.strip().isdecimal():
        raise InputError(f"{where} = {cell!r}: expected a whole number")
    return int(cell)


def _number(cell: str) -> float | None:
    try:
        number = float(cell)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _seconds(cell: str, where: str) -> float:
    number = _number(cell)
    if number is None:
        raise InputError(f"{where}: {cell!r}: expected seconds")
    return number


def _meld_seconds(cell: str, where: str) -> float:
    """Seconds of ``00:20:57,256``."""
    hours, minutes, seconds = (*cell.replace(",", ".").split(":"), "", "")[:3]
    numbers = [_number(part) for part in (hours, minutes, seconds)]
    if None in numbers or cell.count(":") != 2:
        raise InputError(f"{where} = {cell!r}: expected hours:minutes:seconds,milliseconds")
    return sum(number * scale for number, scale in zip(numbers, (3600, 60, 1), strict=True) if number is not None)
