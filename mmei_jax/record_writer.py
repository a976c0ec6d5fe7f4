"""Writes records as shards: checked, streamed in bounded memory, the same bytes for the same records.

A data set appears under its name only when it is complete: it is built in a hidden folder beside it, which is renamed
on a clean exit and removed after an exception.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa

from mmei_jax import record_arrow
from mmei_jax.record_files import MANIFEST_NAME
from mmei_jax.record_schema import (
    RECORDS_FORMAT,
    SCHEMA_VERSION,
    Catalogue,
    DatasetSpec,
    Record,
    RecordColumns,
    check_name,
    shard_schema,
)
from mmei_jax.types import InputError

CATALOGUE_NAME = "catalogue.arrow"
# Single records are turned into columns this many at a time.
_RECORDS_PER_CONVERSION = 256


class _SplitWriter:
    """Shards of one split: what waits to be written, and what the manifest will say."""

    def __init__(self, name: str, spec: DatasetSpec) -> None:
        self.name = name
        self.schema = shard_schema(spec, name)
        self.records: list[Record] = []
        self.tables: list[pa.Table] = []
        self.num_waiting = 0
        self.shards: list[dict[str, Any]] = []
        self.longest = dict.fromkeys(sorted(spec.modalities), 0)
        self.id_hashes: list[np.ndarray] = []
        self.num_records = 0


class DatasetWriter:
    """Context manager that writes a data set.

    Records are checked as they come: dims, dtypes, finite values (after rounding to the stored type), label ranges,
    slate lengths, propensities. When the data set is closed, ids must be unique within each split (8 bytes per record
    are kept for that) and item indices must lie within the catalogue. At most ``records_per_shard`` records per split,
    and what one call brings, are in memory. Use::

        with DatasetWriter(path, spec) as writer:
            writer.write("train", Record("a", features={"text": tokens}))
    """

    def __init__(
        self, path: str | os.PathLike[str], spec: DatasetSpec, *, records_per_shard: int = 4096, overwrite: bool = False
    ) -> None:
        """Prepares, without touching the disk.

        Args:
            path: folder to make.
            spec: what the records carry.
            records_per_shard: records per file, at least 1.
            overwrite: whether a data set that is already there is replaced, at the end.

        Raises:
            InputError: ``path`` exists and is not to be replaced, or is not a data set.
        """
        self.path = Path(path)
        self.spec = spec
        if records_per_shard < 1:
            raise InputError(f"records_per_shard = {records_per_shard}: expected at least 1")
        self._records_per_shard = records_per_shard
        if self.path.exists():
            if not overwrite:
                raise InputError(f"{self.path}: exists already; name a new folder, or overwrite it (--overwrite)")
            if not self.path.is_dir() or (any(self.path.iterdir()) and not (self.path / MANIFEST_NAME).is_file()):
                raise InputError(f"{self.path}: is not a data set (no {MANIFEST_NAME}); it is not overwritten")
        self._folder = self.path.parent / f".{self.path.name}.{os.getpid()}.partial"
        self._splits: dict[str, _SplitWriter] = {}
        self._catalogue: dict[str, Any] | None = None
        self._references: dict[str, dict[str, float]] = {}
        self._counts: dict[str, dict[str, Any]] = {}
        self._largest_item: tuple[int, str] = (-1, "")

    def __enter__(self) -> "DatasetWriter":
        """Makes the hidden folder."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self._folder.exists():
            shutil.rmtree(self._folder)
        self._folder.mkdir()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Completes the data set and renames it into place, or removes every trace of it."""
        try:
            if kind is None:
                self._close()
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)

    def write(self, split: str, record: Record) -> None:
        """Adds one record to ``split``. An error may surface up to 256 records later, or at the end.

        Raises:
            InputError: a record does not fit the description; names the record.
        """
        writer = self._split(split)
        writer.records.append(record)
        if len(writer.records) >= _RECORDS_PER_CONVERSION:
            self._convert_records(writer)

    def write_columns(self, split: str, columns: RecordColumns) -> None:
        """Adds many records to ``split``. The arrays are copied: the caller may reuse them.

        Raises:
            InputError: a record does not fit the description; names the record.
        """
        writer = self._split(split)
        self._convert_records(writer)
        self._add(writer, columns)

    def write_catalogue(self, catalogue: Catalogue) -> None:
        """Writes the catalogue, once.

        Raises:
            InputError: its columns differ in length, ids repeat, a kind is unknown, features are not finite.
        """
        if self._catalogue is not None:
            raise InputError(f"{self.path}: the catalogue was written already")
        self._catalogue = write_catalogue_file(self._folder, CATALOGUE_NAME, catalogue)

    def set_reference(self, split: str, figures: dict[str, float]) -> None:
        """Notes known figures of a split, such as exact ceilings, by metric name.

        Raises:
            InputError: a figure is not finite. That the split exists is checked when the data set is closed.
        """
        for name, value in figures.items():
            if not np.isfinite(value):
                raise InputError(f"reference {name!r} of split {split!r} = {value}: expected a finite number")
        self._references[split] = {name: float(value) for name, value in figures.items()}

    def set_counts(self, name: str, counts: dict[str, Any]) -> None:
        """Notes counts in the manifest, such as sanitised values per modality; JSON values only."""
        self._counts[name] = counts

    def _split(self, name: str) -> _SplitWriter:
        if name not in self._splits:
            check_name(name, "split")
            if f"{name}.arrow" == CATALOGUE_NAME:
                raise InputError(f"split {name!r}: this name is taken by the catalogue")
            self._splits[name] = _SplitWriter(name, self.spec)
        return self._splits[name]

    def _convert_records(self, writer: _SplitWriter) -> None:
        if writer.records:
            self._add(writer, record_arrow.records_to_columns(writer.records, self.spec))
            writer.records = []

    def _add(self, writer: _SplitWriter, columns: RecordColumns) -> None:
        if not len(columns.ids):
            return
        writer.tables.append(record_arrow.columns_to_table(columns, self.spec, writer.schema))
        for name, ragged in columns.features.items():
            writer.longest[name] = max(writer.longest[name], int(np.max(ragged.lengths)))
        writer.id_hashes.append(np.fromiter(map(hash, columns.ids), np.int64, len(columns.ids)))
        self._largest_item = max(self._largest_item, record_arrow.largest_item(columns))
        writer.num_waiting += len(columns.ids)
        while writer.num_waiting >= self._records_per_shard:
            self._write_shard(writer, self._records_per_shard)

    def _write_shard(self, writer: _SplitWriter, num_records: int) -> None:
        table = pa.concat_tables(writer.tables)
        rest = table.slice(num_records)
        writer.tables = [rest] if rest.num_rows else []
        writer.num_waiting = rest.num_rows
        name = f"{writer.name}-{len(writer.shards):05d}.arrow"
        writer.shards.append(write_arrow_file(self._folder, name, writer.schema, table.slice(0, num_records)))
        writer.num_records += num_records

    def _close(self) -> None:
        for writer in self._splits.values():
            self._convert_records(writer)
            if writer.num_waiting:
                self._write_shard(writer, writer.num_waiting)
            self._check_ids(writer)
        if not self._splits or not all(writer.num_records for writer in self._splits.values()):
            raise InputError(f"{self.path}: no record was written; a data set has at least one in every split")
        num_items = self._catalogue["num_records"] if self._catalogue else 0
        if self._largest_item[0] >= num_items:
            index, record_id = self._largest_item
            raise InputError(f"record {record_id!r}: item index {index}: the catalogue has {num_items} items")
        unknown = sorted(set(self._references) - set(self._splits))
        if unknown:
            raise InputError(f"reference of split {unknown[0]!r}: there is no such split")
        splits = {
            name: {
                "num_records": writer.num_records,
                "shards": writer.shards,
                "longest_tokens": writer.longest,
                "reference": self._references.get(name, {}),
            }
            for name, writer in self._splits.items()
        }
        write_manifest(self._folder, self.spec, splits, self._catalogue, self._counts)
        self._move_into_place()

    def _check_ids(self, writer: _SplitWriter) -> None:
        """Raises InputError for an id that occurs twice; equal hashes are looked up in the shards."""
        hashes = np.sort(np.concatenate([np.empty(0, np.int64), *writer.id_hashes]))
        suspects = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
        if not suspects:
            return
        seen: set[str] = set()
        for shard in writer.shards:
            for record_id in _read_ids(self._folder / shard["file"]):
                if hash(record_id) not in suspects:
                    continue
                if record_id in seen:
                    raise InputError(f"record {record_id!r}: occurs twice in split {writer.name!r}; ids must be unique")
                seen.add(record_id)

    def _move_into_place(self) -> None:
        if not self.path.exists():
            self._folder.rename(self.path)
            return
        replaced = self._folder.with_suffix(".replaced")
        self.path.rename(replaced)
        try:
            self._folder.rename(self.path)
        except OSError:
            replaced.rename(self.path)
            raise
        shutil.rmtree(replaced)


def write_arrow_file(folder: Path, name: str, schema: pa.Schema, table: pa.Table) -> dict[str, Any]:
    """Writes one Arrow IPC file of one record batch; gives its entry in the manifest."""
    path = folder / name
    options = pa.ipc.IpcWriteOptions(compression=None, allow_64bit=True)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema, options=options) as file:
        file.write_batch(_compact(table))
    with path.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"file": name, "num_bytes": path.stat().st_size, "num_records": table.num_rows, "sha256": sha256}


def write_catalogue_file(folder: Path, name: str, catalogue: Catalogue) -> dict[str, Any]:
    """Writes a catalogue; gives its entry in the manifest.

    Args:
        folder: of the data set.
        name: of the file.
        catalogue: the items.

    Raises:
        InputError: its columns differ in length, ids repeat, a kind is unknown, features are not finite.
    """
    table = record_arrow.catalogue_to_table(catalogue)
    described = {"dim": catalogue.features.shape[1], "kind_names": list(catalogue.kind_names)}
    return {**write_arrow_file(folder, name, table.schema, table), **described}


def write_manifest(
    folder: Path,
    spec: DatasetSpec,
    splits: dict[str, dict[str, Any]],
    catalogue: dict[str, Any] | None,
    counts: dict[str, dict[str, Any]],
) -> None:
    """Writes the file that makes a folder of shards a data set, in one step: it is there as a whole or not at all.

    Args:
        folder: where the shards are.
        spec: what the records carry.
        splits: per split ``num_records``, ``shards`` (entries of :func:`write_arrow_file`), ``longest_tokens`` and
            ``reference``.
        catalogue: the catalogue's entry; None where there is none.
        counts: further counts by name, JSON values only.
    """
    manifest = {
        "format": RECORDS_FORMAT,
        "schema_version": SCHEMA_VERSION,
        "spec": spec.to_json(),
        "splits": splits,
        "catalogue": catalogue,
        "counts": counts,
    }
    text = json.dumps(manifest, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
    unfinished = folder / f".{MANIFEST_NAME}.{os.getpid()}.partial"
    unfinished.write_text(text + "\n", encoding="utf-8")
    unfinished.rename(folder / MANIFEST_NAME)


def _compact(table: pa.Table) -> pa.RecordBatch:
    """One record batch of these rows and nothing else: a slice would drag its neighbours' values into the file."""
    # Unlike Table.combine_chunks, this copies the rows of a single chunk too.
    columns = [column.combine_chunks() for column in table.columns]
    return pa.RecordBatch.from_arrays(columns, schema=table.schema)


def _read_ids(path: Path) -> Sequence[str]:
    with pa.memory_map(str(path)) as source:
        ids: list[str] = pa.ipc.open_file(source).read_all().column("id").to_pylist()
    return ids
