"""Writes catalogue indexes: builds them, adds items, removes items; whole or not at all."""

import dataclasses
import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmei_jax.recommendation.catalogue_files import ROWS_PER_BLOCK, describe
from mmei_jax.recommendation.index_files import (
    MANIFEST_NAME,
    STORED_DTYPES,
    CatalogueIndex,
    EncodedItems,
    Manifest,
    Removal,
    Segment,
    open_index,
    read_manifest,
    removal_schema,
    segment_schema,
)
from mmei_jax.recommendation.top_k import compress
from mmei_jax.types import InputError
from mmei_jax.workdir import locked, write_json

_BLOCKS_PER_SEGMENT = 2**20 // ROWS_PER_BLOCK
# What an update that was killed may leave.
_LEFTOVERS = ("segment-*.arrow", "removed-*.arrow", "*.arrow.partial", f"{MANIFEST_NAME}.partial")
# Ids that a message names; a list with more of them that are wrong is the wrong list.
_IDS_TOLD = 100


@dataclass(frozen=True)
class Change:
    """What an update did.

    Attributes:
        num_added: items written.
        num_replaced: those of them that the index had before.
        num_removed: items removed.
        manifest: of the index after it.
    """

    num_added: int
    num_replaced: int
    num_removed: int
    manifest: Manifest


def create_index(folder: Path, manifest: Manifest, blocks: Iterable[EncodedItems]) -> Manifest:
    """Writes an index, whole or not at all.

    Args:
        folder: to be made.
        manifest: what it shall be; segments, removals and number of items are filled in.
        blocks: its items, each id once.

    Raises:
        InputError: the folder holds something already, another process writes there, or it cannot be written.
    """
    with locked(folder, "--output"):
        if (folder / MANIFEST_NAME).exists():
            raise InputError(f"--output={folder}: is an index already; expected a new folder, or the command update")
        leftovers = {path for pattern in _LEFTOVERS for path in folder.glob(pattern)}
        others = sorted(path.name for path in folder.iterdir() if path not in leftovers and path.name != ".lock")
        if others:
            raise InputError(f"--output={folder}: holds {others[0]!r}; expected a new or an empty folder")
        try:
            segments = _write_segments(folder, manifest, blocks)
            num_items = sum(segment.num_records for segment in segments)
            whole = dataclasses.replace(manifest, segments=segments, num_items=num_items)
            write_json(folder / MANIFEST_NAME, dataclasses.asdict(whole))
        finally:
            _clear_leftovers(folder)
    return whole


def update_index(
    folder: Path,
    *,
    blocks: Iterable[EncodedItems] = (),
    removed: Sequence[str] = (),
    tower_sha256: str | None = None,
    verify: bool = False,
) -> Change:
    """Adds items, where one that is there is replaced, and removes others; both or neither.

    Args:
        folder: of the index.
        blocks: items to add, each id once.
        removed: ids of items to remove.
        tower_sha256: of the tower that embedded the items; None where there are none.
        verify: whether what is there is read in full before, and its hashes compared.

    Raises:
        InputError: there is no sound index of this tower, another process writes there, an id to remove is not there or
            is added as well (all such ids are named), or the folder cannot be written.
    """
    # A folder without an index is not even locked, for that would make it.
    read_manifest(folder)
    with locked(folder, "--index"):
        index = open_index(folder, tower_sha256, verify=verify)
        try:
            return _update(index, blocks, pa.array(removed, pa.large_string()).unique())
        finally:
            _clear_leftovers(folder)


def _update(index: CatalogueIndex, blocks: Iterable[EncodedItems], removed: pa.Array) -> Change:
    folder, manifest, live_ids = index.folder, index.manifest, index.live_ids
    # Ids of the change are hashed, not those of the whole index, which only go past.
    known = live_ids.filter(pc.is_in(live_ids, value_set=removed))
    unknown = removed.filter(pc.invert(pc.is_in(removed, value_set=known)))
    if len(unknown):
        raise InputError(
            f"{folder}: {len(unknown)} of {len(removed)} ids to remove are not in the index: {_told(unknown)}; "
            "expected ids of its items; nothing was changed"
        )
    removals = manifest.removals
    if len(removed):
        schema = removal_schema(manifest)
        path = folder / f"removed-{len(removals):05d}.arrow"
        entry = _write_file(path, schema, [pa.RecordBatch.from_arrays([removed], schema=schema)])
        removals = (*removals, Removal(**dataclasses.asdict(entry), num_segments=len(manifest.segments)))
    added_ids: list[pa.Array] = []
    segments = _write_segments(folder, manifest, blocks, added_ids)
    added = pa.chunked_array(added_ids, pa.large_string())
    both = added.filter(pc.is_in(added, value_set=removed))
    if len(both):
        raise InputError(
            f"{len(both)} ids are both added and removed: {_told(both)}; expected one of the two; nothing was changed"
        )
    num_replaced = int(pc.sum(pc.is_in(live_ids, value_set=added), min_count=0).as_py())
    changed = dataclasses.replace(
        manifest,
        segments=(*manifest.segments, *segments),
        removals=removals,
        num_items=manifest.num_items + len(added) - num_replaced - len(removed),
    )
    write_json(folder / MANIFEST_NAME, dataclasses.asdict(changed))
    return Change(len(added), num_replaced, len(removed), changed)


def _write_segments(
    folder: Path, manifest: Manifest, blocks: Iterable[EncodedItems], written_ids: list[pa.Array] | None = None
) -> tuple[Segment, ...]:
    """Writes items to new files; their ids are appended to ``written_ids``."""
    schema = segment_schema(manifest)
    found: list[Segment] = []
    for _, group in itertools.groupby(enumerate(blocks), lambda pair: pair[0] // _BLOCKS_PER_SEGMENT):
        name = f"segment-{len(manifest.segments) + len(found):05d}.arrow"
        batches = (_to_arrow(block, manifest, schema) for _, block in group)
        found.append(_write_file(folder / name, schema, _noting_ids(batches, written_ids)))
    return tuple(found)


def _noting_ids(batches: Iterable[pa.RecordBatch], ids: list[pa.Array] | None) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        if ids is not None:
            ids.append(batch.column("id"))
        yield batch


def _to_arrow(block: EncodedItems, manifest: Manifest, schema: pa.Schema) -> pa.RecordBatch:
    items = block.items
    described = [describe(text, item_id) for text, item_id in zip(items.texts, items.ids, strict=True)]
    stored, scales = compress(block.embedding, manifest.dtype)
    values = np.ascontiguousarray(stored).view(STORED_DTYPES[manifest.dtype]).reshape(-1)
    columns = [
        pa.array(items.ids, pa.large_string()),
        pa.array(np.asarray(items.kind, np.int32)),
        pa.array([item.get("creator") for item in described], pa.large_string()),
        pa.array([item.get("origin") for item in described], pa.large_string()),
        pa.array(items.texts, pa.large_string()),
        pa.FixedSizeListArray.from_arrays(pa.array(values), manifest.embedding_dim),
    ]
    if scales is not None:
        columns.append(pa.array(scales))
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _write_file(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> Segment:
    """Writes an Arrow IPC file, which appears whole."""
    partial, num_records = path.with_name(f"{path.name}.partial"), 0
    with partial.open("wb") as file:
        with pa.ipc.new_file(file, schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
                num_records += batch.num_rows
        # The manifest must not come to the disk before what it lists.
        file.flush()
        os.fsync(file.fileno())
    with partial.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    entry = Segment(path.name, partial.stat().st_size, num_records, sha256)
    partial.replace(path)
    return entry


def _clear_leftovers(folder: Path) -> None:
    """Removes what no manifest lists: of an update that did not come to its end, this one or an earlier one."""
    path = folder / MANIFEST_NAME
    manifest = read_manifest(folder) if path.exists() else None
    kept = set() if manifest is None else {entry.file for entry in (*manifest.segments, *manifest.removals)}
    for pattern in _LEFTOVERS:
        for found in folder.glob(pattern):
            if found.name not in kept:
                found.unlink()


def _told(ids: pa.Array | pa.ChunkedArray) -> str:
    told = ", ".join(repr(item) for item in ids[:_IDS_TOLD].to_pylist())
    return told if len(ids) <= _IDS_TOLD else f"{told} and {len(ids) - _IDS_TOLD:,} more"
