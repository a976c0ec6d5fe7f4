"""Reads tables that users bring, as JSON lines, CSV or Parquet, row by row; names file and row where one is wrong."""

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from mmei_jax.types import InputError

SUFFIXES = (".jsonl", ".csv", ".parquet")
# Rows of a Parquet file that are in memory at once.
_ROWS_PER_BATCH = 4_096
# Characters of a value that a message shows.
_SHOWN = 60

# Where a row stands in its file, and its cells by column; what is missing or null says nothing.
Row = tuple[str, dict[str, Any]]
# From the text of a cell, and where it stands, to what JSON lines and Parquet would hold.
Reading = Callable[[str, str], Any]


def read_rows(path: Path, what: str, readings: Mapping[str, Reading]) -> Iterator[Row]:
    """The rows of a file, in its order.

    Args:
        path: ``.jsonl``, ``.csv`` or ``.parquet``.
        what: is expected, in words for messages.
        readings: of columns that are no text, for CSV; an empty cell is None.

    Raises:
        InputError: there is no such file, or it cannot be read; names file and row.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file: expected a {what} ({', '.join(SUFFIXES)})")
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(f"{path}: expected a name that ends in {', '.join(SUFFIXES)}")
    try:
        if suffix == ".csv":
            yield from _csv_rows(path, readings)
        else:
            yield from _json_rows(path) if suffix == ".jsonl" else _parquet_rows(path)
    except (UnicodeDecodeError, csv.Error, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: not a readable {what} ({path.suffix}): {reason}") from error


def refuse_unknown_columns(cells: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    """Raises InputError for a column that means nothing.

    Args:
        cells: of a row.
        known: columns that there may be.
        where: the row stands.
    """
    unknown = sorted(set(cells) - set(known))
    if unknown:
        raise InputError(f"{where}: column {unknown[0]!r}: expected some of {', '.join(known)}")


def read_text(cells: Mapping[str, Any], name: str, where: str) -> str | None:
    """A cell that holds a text; None where it says nothing.

    Args:
        cells: of a row.
        name: of the column.
        where: the row stands.

    Raises:
        InputError: it holds something else.
    """
    value = cells.get(name)
    if value is None or value == "":
        return None
    try:
        is_text = isinstance(value, str) and bool(value.encode("utf-8"))
    except UnicodeEncodeError:
        is_text = False
    if not is_text:
        raise InputError(f"{where}: {name} {shown(value)}: expected a text")
    return str(value)


def read_json(cell: str, where: str) -> Any:
    """A cell of CSV that holds a JSON list.

    Args:
        cell: its text.
        where: it stands, with the column's name.

    Raises:
        InputError: it is no JSON.
    """
    try:
        return json.loads(cell)
    except ValueError as error:
        raise InputError(f"{where} {shown(cell)}: expected a JSON list: {error}") from error


def shown(value: Any) -> str:
    """A value for a message, cut where it is long."""
    text = "missing" if value is None else repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _json_rows(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                cells = json.loads(line)
            except ValueError as error:
                raise InputError(f"{where}: not JSON: {error}") from error
            if not isinstance(cells, dict):
                raise InputError(f"{where}: {shown(cells)}: expected a JSON object")
            yield where, cells


def _csv_rows(path: Path, readings: Mapping[str, Reading]) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, strict=True)
        names = list(reader.fieldnames or ())
        if len(set(names)) != len(names):
            raise InputError(f"{path}: columns {', '.join(names)}: each name once")
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            # Cells beyond the header's are a list under None, and those that are missing are None.
            num_cells = len(row.get(None, ())) + sum(row[name] is not None for name in names)
            if num_cells != len(names):
                raise InputError(
                    f"{where}: {num_cells} cells: expected {len(names)}, as the header has; a cell with commas in it "
                    "stands between double quotes"
                )
            cells: dict[str, Any] = {name: value or None for name, value in row.items()}
            for name, reading in readings.items():
                if cells.get(name) is not None:
                    cells[name] = reading(cells[name], f"{where}: {name}")
            yield where, cells


def _parquet_rows(path: Path) -> Iterator[Row]:
    number = 0
    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=_ROWS_PER_BATCH):
            for cells in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", cells
