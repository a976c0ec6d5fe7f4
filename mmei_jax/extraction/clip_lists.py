"""Reads a list of clips: CSV, TSV or Parquet, one clip a row. Nothing that it names is opened here.

Columns, all but one of ``path``, ``audio_path`` and ``text`` optional: ``id`` (path and start where missing), ``split``
("all" where missing), ``path``, ``audio_path``, ``boxes_path``, ``start_seconds``, ``end_seconds``, ``text``,
``speaker``, ``dialogue``, ``turn``, ``optional`` (modalities that may be missing, joined by "|"), and one per label: a
class name or id, names joined by "|" (multi_label), or a number (real). An empty cell says nothing.
"""

import csv
import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from jaxtyping import Shaped

from mmei_jax.extraction import label_columns
from mmei_jax.extraction.clips import Clip
from mmei_jax.extraction.media import MediaError
from mmei_jax.fingerprints import canonical_json
from mmei_jax.record_schema import check_name
from mmei_jax.records import LabelSpec, MaskedColumn
from mmei_jax.types import InputError

COLUMNS = (
    "id",
    "split",
    "path",
    "audio_path",
    "boxes_path",
    "start_seconds",
    "end_seconds",
    "text",
    "speaker",
    "dialogue",
    "turn",
    "optional",
)
DEFAULT_SPLIT = "all"
_DELIMITERS = {".csv": ",", ".tsv": "\t"}


class _Columns:
    """The list's cells as strings, "" where empty."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise InputError(f"{path}: no such file: expected a list of clips (.csv, .tsv or .parquet)")
        suffix = path.suffix.lower()
        if suffix in _DELIMITERS:
            self.cells = _read_delimited(path, _DELIMITERS[suffix])
        elif suffix == ".parquet":
            self.cells = _read_parquet(path)
        else:
            raise InputError(f"{path}: expected a name that ends in .csv, .tsv or .parquet")
        self.num_clips = len(next(iter(self.cells.values()), ()))
        if not self.num_clips:
            raise InputError(f"{path}: no clip in it")

    def column(self, key: str) -> Shaped[np.ndarray, "records ..."]:
        """One string per clip; all empty where the list has no such column."""
        return np.array(self.cells.get(key) or [""] * self.num_clips)

    def strings(self, key: str) -> list[str | None]:
        """One string per clip; None where empty."""
        return [cell or None for cell in self.cells.get(key) or [""] * self.num_clips]


def _read_delimited(path: Path, delimiter: str) -> dict[str, list[str]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, delimiter=delimiter, strict=True)
            names = list(reader.fieldnames or ())
            if len(set(names)) != len(names):
                raise InputError(f"{path}: columns {', '.join(names)}: each name once")
            cells: dict[str, list[str]] = {name: [] for name in names}
            for row in reader:
                if None in row or None in row.values():
                    raise InputError(f"{path}, line {reader.line_num}: expected {len(names)} cells, as the header has")
                for name in names:
                    cells[name].append(row[name])
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a readable UTF-8 list: {error}") from error
    return cells


def _read_parquet(path: Path) -> dict[str, list[str]]:
    try:
        table = pyarrow.parquet.read_table(path)
        return {
            name: ["" if value is None else value for value in column.cast(pa.string()).to_pylist()]
            for name, column in zip(table.column_names, table.columns, strict=True)
        }
    except pa.ArrowException as error:
        raise InputError(f"{path}: not a Parquet file of plain columns: {' '.join(str(error).split())}") from error


def read_clips(path: Path, labels: dict[str, LabelSpec]) -> tuple[list[Clip], list[str]]:
    """Reads a list.

    Args:
        path: the list.
        labels: which columns are labels, and of what kind.

    Returns:
        Clips in the order of the list, and columns that mean nothing here.

    Raises:
        InputError: the list cannot be read, a label's column is missing, a cell does not hold what its column says, a
            clip has nothing to read, or an id occurs twice in a split; names the clip.
    """
    columns = _Columns(path)
    missing = sorted(set(labels) - set(columns.cells))
    if missing:
        raise InputError(f"{path}: no column {missing[0]!r} for the label: it has {', '.join(columns.cells)}")
    clashing = sorted(set(labels) & set(COLUMNS))
    if clashing:
        raise InputError(f"label {clashing[0]!r}: this column means something else in a list")
    texts = {name: columns.strings(name) for name in COLUMNS}
    ids = [given or _default_id(texts, row) for row, given in enumerate(texts["id"])]
    numbers = {
        name: _numbers(label_columns.read_numbers(columns, name, ids, np.float64))
        for name in ("start_seconds", "end_seconds")
    }
    turns = _numbers(label_columns.read_numbers(columns, "turn", ids, np.int64))
    values = {
        name: _values(label_columns.read_label(columns, name, label, ids), label) for name, label in labels.items()
    }
    clips = [
        Clip(
            id=ids[row],
            split=texts["split"][row] or DEFAULT_SPLIT,
            path=texts["path"][row],
            audio_path=texts["audio_path"][row],
            boxes_path=texts["boxes_path"][row],
            start_seconds=numbers["start_seconds"][row],
            end_seconds=numbers["end_seconds"][row],
            text=texts["text"][row],
            speaker=texts["speaker"][row],
            dialogue=texts["dialogue"][row],
            turn=turns[row],
            labels={name: column[row] for name, column in values.items() if column[row] is not None},
            optional=tuple((texts["optional"][row] or "").split("|")) if texts["optional"][row] else (),
        )
        for row in range(columns.num_clips)
    ]
    check_clips(clips, path)
    return clips, sorted(set(columns.cells) - set(COLUMNS) - set(labels))


def check_clips(clips: Sequence[Clip], source: Path) -> None:
    """Raises InputError for what no data set can hold, naming the clip.

    That is a clip with nothing to read, a span that ends before it starts, a turn beyond 32 bits, an id used twice, and
    a split that cannot be part of a file's name.
    """
    for split in dict.fromkeys(clip.split for clip in clips):
        check_name(split, f"{source}: split")
    seen: set[tuple[str, str]] = set()
    for clip in clips:
        if clip.path is None and clip.audio_path is None and clip.text is None:
            raise InputError(f"{source}: clip {clip.id!r}: path, audio_path and text are empty: expected one of them")
        start, end = clip.start_seconds or 0.0, clip.end_seconds
        if start < 0 or not math.isfinite(start) or (end is not None and not start < end < math.inf):
            raise InputError(f"{source}: clip {clip.id!r}: from {start} to {end} s: expected 0 <= start < end")
        if clip.turn is not None and not 0 <= clip.turn < 2**31:
            raise InputError(f"{source}: clip {clip.id!r}: turn = {clip.turn}: expected 0 or more, below 2**31")
        key = (clip.split, clip.id)
        if key in seen:
            raise InputError(f"{source}: clip {clip.id!r}: occurs twice in split {clip.split!r}; ids must be unique")
        seen.add(key)


def fingerprint(clips: Sequence[Clip]) -> str:
    """SHA-256 of everything that the clips say, in their order."""
    digest = hashlib.sha256()
    for clip in clips:
        said = asdict(clip)
        said["labels"] = {name: np.asarray(value).tolist() for name, value in clip.labels.items()}
        # Left out where nothing is recommended: such lists have the fingerprint that they always had.
        slate, relevant = said.pop("slate"), said.pop("relevant_items")
        if slate is not None:
            said["slate"] = {name: None if value is None else value.tolist() for name, value in slate.items()}
        if relevant is not None:
            said["relevant_items"] = relevant.tolist()
        digest.update(canonical_json(said).encode())
    return digest.hexdigest()


def media_path(given: str, base: Path, root: Path | None) -> Path:
    """Where a list's path leads: relative to ``base``, and not out of ``root``, symbolic links followed.

    Raises:
        MediaError: it leads out of ``root``.
    """
    path = base / given
    if root is not None and not path.resolve().is_relative_to(root.resolve()):
        raise MediaError("list", "outside_root", f"{given}: leads out of {root}")
    return path


def _default_id(texts: dict[str, list[str | None]], row: int) -> str:
    name = texts["path"][row] or texts["audio_path"][row]
    if name is None:
        return f"row{row}"
    start = texts["start_seconds"][row]
    return name if start is None else f"{name}@{start}"


def _numbers(column: MaskedColumn) -> list[Any]:
    values: list[Any] = np.asarray(column.values).tolist()
    if column.is_present is None:
        return values
    return [value if is_present else None for value, is_present in zip(values, column.is_present, strict=True)]


def _values(column: MaskedColumn, label: LabelSpec) -> list[Any]:
    if label.kind != "multi_label":
        return _numbers(column)
    rows = np.asarray(column.values)
    presence = np.ones(len(rows), bool) if column.is_present is None else column.is_present
    return [row if is_present else None for row, is_present in zip(rows, presence, strict=True)]
