"""Reads a data set's manifest and opens its Arrow IPC files, and refuses what does not fit."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mmei_jax.record_schema import FORMAT_KEY, RECORDS_FORMAT, SCHEMA_VERSION, SPLIT_KEY, VERSION_KEY, DatasetSpec
from mmei_jax.types import InputError

MANIFEST_NAME = "manifest.json"
_FILE_KEYS = {"file", "num_bytes", "num_records", "sha256"}
_SPLIT_KEYS = {"num_records", "shards", "longest_tokens", "reference"}


def read_manifest(folder: Path) -> tuple[dict[str, Any], DatasetSpec]:
    """Reads ``manifest.json``; gives its JSON values and the description among them.

    Raises:
        InputError: it is missing, not JSON, foreign, of another version or incomplete; names the file.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise InputError(f"{folder}: not a data set: expected a folder with {MANIFEST_NAME}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != RECORDS_FORMAT:
        raise InputError(f"{path}: a foreign file: expected 'format' to be {RECORDS_FORMAT!r}")
    version = manifest.get("schema_version")
    if version != SCHEMA_VERSION:
        raise InputError(f"{path}: schema version {version}: this program reads version {SCHEMA_VERSION}")
    try:
        spec = DatasetSpec.from_json(manifest["spec"])
        entries = [shard for split in manifest["splits"].values() for shard in split["shards"]]
        if manifest["catalogue"] is not None:
            entries.append(manifest["catalogue"])
        lacking = [_FILE_KEYS - entry.keys() for entry in entries]
        lacking += [_SPLIT_KEYS - split.keys() for split in manifest["splits"].values()]
        lacking.append({"counts"} - manifest.keys())
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not a complete manifest: {error!r}") from error
    missing = sorted(set().union(*lacking))
    if missing:
        raise InputError(f"{path}: not a complete manifest: {missing[0]!r} is missing")
    return manifest, spec


def open_batches(path: Path, format_name: str, schema: pa.Schema, entry: dict[str, Any]) -> list[pa.RecordBatch]:
    """Maps a file into memory, checked against its entry in the manifest.

    Args:
        path: the file.
        format_name: what its metadata must say it is.
        schema: the expected columns and metadata.
        entry: ``num_bytes`` and ``num_records`` of the manifest.

    Returns:
        Record batches whose buffers are views of the file.

    Raises:
        InputError: the file is missing, truncated, corrupt, foreign or of another version; names it.
    """
    if not path.is_file():
        raise InputError(f"{path}: missing; the manifest lists it")
    num_bytes = path.stat().st_size
    try:
        # The batches keep the map alive; closing the source frees its file descriptor, one per shard otherwise.
        with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as file:
            _check_schema(path, file.schema, format_name, schema)
            if num_bytes != entry["num_bytes"]:
                raise InputError(f"{path}: {num_bytes} bytes, the manifest says {entry['num_bytes']}")
            batches = [file.get_batch(index) for index in range(file.num_record_batches)]
            for batch in batches:
                batch.validate()
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{path}: not a readable Arrow IPC file ({reason}); it has {num_bytes} bytes, "
            f"the manifest says {entry['num_bytes']}"
        ) from error
    num_records = sum(batch.num_rows for batch in batches)
    if num_records != entry["num_records"]:
        raise InputError(f"{path}: {num_records} records, the manifest says {entry['num_records']}")
    return batches


def list_parts(file: str, name: str, batch: pa.RecordBatch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A list column as flat values (a view), and int64 starts and lengths per record (0 where null).

    Raises:
        InputError: offsets fall, or run outside the values; names the file and the record.
    """
    column = batch.column(name)
    flat = column.values
    if pa.types.is_fixed_size_list(flat.type):
        values = flat.values.to_numpy(zero_copy_only=False).reshape(-1, flat.type.list_size)
    else:
        values = flat.to_numpy(zero_copy_only=False)
    offsets = column.offsets.to_numpy()
    lengths = np.diff(offsets)
    bad = np.flatnonzero((lengths < 0) | (offsets[:-1] < 0) | (offsets[1:] > len(values)))
    if bad.size:
        raise InputError(f"{file}: {_record(batch, int(bad[0]))}: the offsets of {name} run outside its values")
    if column.null_count:
        lengths = np.where(column.is_valid().to_numpy(zero_copy_only=False), lengths, 0)
    return values, offsets[:-1], lengths


def scalar_parts(name: str, batch: pa.RecordBatch) -> tuple[np.ndarray, np.ndarray]:
    """A scalar or fixed-size column as values (0 where null), and bool: where it is not null."""
    column = batch.column(name)
    is_present = column.is_valid().to_numpy(zero_copy_only=False)
    if not pa.types.is_fixed_size_list(column.type):
        return column.fill_null(0).to_numpy(zero_copy_only=False), is_present
    stored = column.values.to_numpy(zero_copy_only=False).reshape(-1, column.type.list_size)
    return np.where(is_present[:, None], stored, stored.dtype.type(0)), is_present


def check_contents(file: str, batch: pa.RecordBatch, spec: DatasetSpec, num_items: int) -> None:
    """Reads every value of a record batch.

    Raises:
        InputError: text is not UTF-8, offsets are corrupt, features are not finite, a label or item is out of range;
            names the file, and the record where one is at fault.
    """
    lists = [field.name for field in batch.schema if pa.types.is_large_list(field.type)]
    parts = {name: list_parts(file, name, batch) for name in lists}
    for name in spec.modalities:
        values, starts, _ = parts[name]
        bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
        if bad.size:
            row = int(np.searchsorted(starts, bad[0], side="right")) - 1
            raise InputError(f"{file}: {_record(batch, row)}: {name} is not finite")
    for name, label in spec.labels.items():
        if label.kind == "categorical":
            values = batch.column(f"label_{name}").fill_null(0).to_numpy()
            bad = np.flatnonzero((values < 0) | (values >= len(label.class_names)))
            if bad.size:
                row = int(bad[0])
                raise InputError(
                    f"{file}: {_record(batch, row)}: label {name} = {values[row]}: "
                    f"expected a class id in [0, {len(label.class_names)})"
                )
    for name in ("slate_item_index", "relevant_items"):
        if name in batch.schema.names:
            values, starts, _ = parts[name]
            bad = np.flatnonzero((values < 0) | (values >= num_items))
            if bad.size:
                row = int(np.searchsorted(starts, bad[0], side="right")) - 1
                raise InputError(
                    f"{file}: {_record(batch, row)}: {name} holds {values[bad[0]]}: the catalogue has {num_items} items"
                )
    try:
        batch.validate(full=True)
    except pa.ArrowException as error:
        raise InputError(f"{file}: corrupt: {' '.join(str(error).split())}") from error


def _record(batch: pa.RecordBatch, row: int) -> str:
    return f"record {row} (id {batch.column('id')[row].as_py()!r})"


def _check_schema(path: Path, found: pa.Schema, format_name: str, expected: pa.Schema) -> None:
    metadata = found.metadata or {}
    if metadata.get(FORMAT_KEY) != format_name.encode():
        raise InputError(f"{path}: a foreign Arrow file: its metadata does not say {format_name!r}")
    version = metadata.get(VERSION_KEY, b"none").decode()
    accepted = expected.metadata[VERSION_KEY].decode()
    if version != accepted:
        raise InputError(f"{path}: schema version {version}: this program reads version {accepted}")
    if not found.equals(expected):
        for wanted in expected:
            index = found.get_field_index(wanted.name)
            kind = "missing" if index < 0 else str(found.field(index).type)
            if index < 0 or not found.field(index).equals(wanted):
                raise InputError(f"{path}: column {wanted.name!r} is {kind}: the manifest says {wanted.type}")
        raise InputError(f"{path}: columns {', '.join(found.names)}: the manifest says {', '.join(expected.names)}")
    if metadata.get(SPLIT_KEY) != expected.metadata.get(SPLIT_KEY):
        split = metadata.get(SPLIT_KEY, b"none").decode()
        raise InputError(f"{path}: holds records of split {split!r}, the manifest lists it under another")
    if metadata != expected.metadata:
        raise InputError(
            f"{path}: was written with another description (producer, classes or source) than the manifest's"
        )
