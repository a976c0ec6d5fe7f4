"""A catalogue index on disk: embeddings and descriptions of items, added to and removed from without a rebuild.

An index is a folder::

    manifest.json             what follows, and the hash of the tower that made the embeddings
    segment-00000.arrow ...   items, one a row: id, kind, creator, origin, text, embedding, and scale for int8
    removed-00000.arrow ...   ids that were removed, and of how many segments

Files that a manifest lists never change. An update writes new ones and then, by a rename, the manifest: a process that
is killed at any moment leaves the old index or the new one, and whoever reads meanwhile goes on with the old one. What
a killed process left is cleared away by the next update. An item is where the last segment that has it says, unless it
was removed after that segment was written.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float32, Int32, Integer, Shaped

from mmei_jax.config_values import build
from mmei_jax.fingerprints import check_hash
from mmei_jax.record_files import open_batches
from mmei_jax.record_gathering import aligned_empty
from mmei_jax.record_schema import FORMAT_KEY, VERSION_KEY
from mmei_jax.records import Catalogue
from mmei_jax.types import InputError
from mmei_jax.workdir import read_versioned

FORMAT, VERSION = "mmei_jax.catalogue_index", 1
MANIFEST_NAME = "manifest.json"
TOWER_KEY = b"mmei_jax.tower_sha256"
DTYPES = ("float32", "bfloat16", "int8")
# How Arrow holds each type; it has no bfloat16.
STORED_DTYPES = {"float32": "float32", "bfloat16": "uint16", "int8": "int8"}
# Bytes whose hashes are compared whenever an index is opened, together; some 30 ms of one CPU core.
HASHED_BYTES = 16 * 2**20
VERIFY_HELP = (
    "read the whole index first and compare every file's SHA-256; without it sizes are compared, and the hashes of the "
    f"smallest files, {HASHED_BYTES // 2**20} MiB at most: a byte that was changed in a larger one goes unnoticed"
)


@dataclass(frozen=True)
class Segment:
    """A file of items.

    Attributes:
        file: its name.
        num_bytes, num_records: its size.
        sha256: of its bytes.
    """

    file: str
    num_bytes: int
    num_records: int
    sha256: str


@dataclass(frozen=True)
class Removal(Segment):
    """A file of ids that were removed.

    Attributes:
        num_segments: how many segments there were then; later ones may have the items again.
    """

    num_segments: int


@dataclass(frozen=True)
class Manifest:
    """What an index consists of.

    Attributes:
        format, version: of the index.
        tower_sha256: of the tower that made the embeddings.
        embedding_dim: numbers of an embedding.
        dtype: of the stored embeddings.
        kind_names: kinds of items, in the order of their numbers.
        num_items: items that are there now.
        segments, removals: files, oldest first.
    """

    format: str
    version: int
    tower_sha256: str
    embedding_dim: int
    dtype: Literal["float32", "bfloat16", "int8"]
    kind_names: tuple[str, ...]
    num_items: int
    segments: tuple[Segment, ...] = ()
    removals: tuple[Removal, ...] = ()


@dataclass(frozen=True)
class EncodedItems:
    """Items with their embeddings.

    Attributes:
        items: what is known of them.
        embedding: ``[items, embedding]`` float32, finite.
    """

    items: Catalogue
    embedding: Float32[np.ndarray, "items embedding"]


@dataclass(frozen=True)
class CatalogueIndex:
    """The items of an index, memory-mapped: every row of its segments, also of items that were replaced or removed.

    Attributes:
        folder: of the index.
        manifest: what it consists of.
        batches: the rows, of :func:`segment_schema`.
        is_live: ``[rows]`` bool, False for an item that was replaced or removed.
    """

    folder: Path
    manifest: Manifest
    batches: tuple[pa.RecordBatch, ...]
    is_live: Bool[np.ndarray, "rows"]

    @functools.cached_property
    def live_ids(self) -> pa.Array:
        """Ids of the items that are there, ``large_string``, in the order of their rows."""
        ids = pa.chunked_array([batch.column("id") for batch in self.batches])
        return ids.filter(pa.array(self.is_live)).combine_chunks()

    def kind(self) -> Int32[np.ndarray, "rows"]:
        """``[rows]`` int32 numbers of kinds."""
        return np.concatenate([batch.column("kind").to_numpy() for batch in self.batches])

    def rows_of(self, ids: Sequence[str]) -> Int32[np.ndarray, "ids"]:
        """``[ids]`` int32 rows of items; -1 for an id that is not there."""
        return np.fromiter((self._row_of.get(item, -1) for item in ids), np.int32, len(ids))

    @functools.cached_property
    def _row_of(self) -> dict[str, int]:
        """Made once for all lists that are looked up; takes some 150 bytes an item."""
        return dict(zip(self.live_ids.to_pylist(), np.flatnonzero(self.is_live).tolist(), strict=True))

    def padded_embeddings(
        self, num_rows: int
    ) -> tuple[Shaped[np.ndarray, "padded embedding"], Float32[np.ndarray, "padded"] | None]:
        """All embeddings as they are stored, copied once, to where a CPU device uses them in place.

        Args:
            num_rows: at least the index's; what follows them is 0.

        Returns:
            ``[num_rows, embedding]`` float32, bfloat16 or int8, and for int8 ``[num_rows]`` float32 factors, else None.
        """
        dtype, size = self.manifest.dtype, self.manifest.embedding_dim
        stored = aligned_empty((num_rows, size), STORED_DTYPES[dtype])
        scales = aligned_empty((num_rows,), "float32") if dtype == "int8" else None
        start = 0
        for batch in self.batches:
            part = slice(start, start + batch.num_rows)
            stored[part] = _matrix(batch, size)
            if scales is not None:
                scales[part] = batch.column("scale").to_numpy()
            start += batch.num_rows
        stored[start:] = 0
        if scales is not None:
            scales[start:] = 0.0
        return (stored.view(jnp.bfloat16) if dtype == "bfloat16" else stored), scales

    def take(self, rows: Integer[np.ndarray, "taken"]) -> tuple[dict[str, list[Any]], Float32[np.ndarray, "taken dim"]]:
        """Some rows, in the order given: columns by name without the embedding, and ``[taken, embedding]`` float32.

        Args:
            rows: ``[taken]`` rows, all of them there.
        """
        starts = np.cumsum([0, *(batch.num_rows for batch in self.batches)])
        places = np.searchsorted(starts, rows, side="right") - 1
        order = np.argsort(places, kind="stable")
        parts = [
            self.batches[place].take(pa.array(rows[places == place] - starts[place])) for place in np.unique(places)
        ]
        table = pa.Table.from_batches(parts, segment_schema(self.manifest)).take(pa.array(np.argsort(order)))
        (batch,) = table.combine_chunks().to_batches() or [pa.RecordBatch.from_pylist([], table.schema)]
        stored = _matrix(batch, self.manifest.embedding_dim)
        if self.manifest.dtype == "bfloat16":
            stored = stored.view(jnp.bfloat16)
        embedding = stored.astype(np.float32)
        if self.manifest.dtype == "int8":
            embedding *= batch.column("scale").to_numpy()[:, None]
        names = [name for name in batch.schema.names if name not in ("embedding", "scale")]
        return {name: batch.column(name).to_pylist() for name in names}, embedding


def read_manifest(folder: Path) -> Manifest:
    """What an index consists of.

    Raises:
        InputError: there is no index, or it is damaged, foreign or of another version.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise InputError(f"{folder}: no catalogue index; expected a folder that mmei_jax.recommendation build made")
    values = read_versioned(path, FORMAT, VERSION, "the manifest of a catalogue index")
    manifest: Manifest = build(Manifest, values, str(path))
    for entry in (*manifest.segments, *manifest.removals):
        if Path(entry.file).name != entry.file:
            raise InputError(f"{path}: file {entry.file!r}: expected the name of a file in the same folder")
    return manifest


def segment_schema(manifest: Manifest) -> pa.Schema:
    """The Arrow schema of the segments of an index."""
    stored = pa.from_numpy_dtype(np.dtype(STORED_DTYPES[manifest.dtype]))
    columns = [
        pa.field("id", pa.large_string(), nullable=False),
        pa.field("kind", pa.int32(), nullable=False),
        pa.field("creator", pa.large_string()),
        pa.field("origin", pa.large_string()),
        pa.field("text", pa.large_string(), nullable=False),
        pa.field("embedding", pa.list_(stored, manifest.embedding_dim), nullable=False),
    ]
    if manifest.dtype == "int8":
        columns.append(pa.field("scale", pa.float32(), nullable=False))
    return pa.schema(columns, metadata=_metadata(manifest))


def removal_schema(manifest: Manifest) -> pa.Schema:
    """The Arrow schema of the lists of removed ids."""
    return pa.schema([pa.field("id", pa.large_string(), nullable=False)], metadata=_metadata(manifest))


def open_index(folder: Path, tower_sha256: str | None = None, *, verify: bool = False) -> CatalogueIndex:
    """Maps an index into memory; every file's format, size and number of rows is checked against the manifest.

    Of files that have at most :data:`HASHED_BYTES` together, the smallest first, the hash is compared too, so that a
    small index is checked in full, and of a large one the lists of removed ids and the small segments.

    Args:
        folder: of the index.
        tower_sha256: of the tower whose embeddings it must hold; None takes any.
        verify: whether all other files are also read in full and their hashes compared.

    Raises:
        InputError: there is no index, a file is missing or damaged, or it is of another tower.
    """
    manifest = read_manifest(folder)
    if tower_sha256 is not None and manifest.tower_sha256 != tower_sha256:
        raise InputError(
            f"{folder}: embeddings of the content tower {manifest.tower_sha256[:16]}..., the run's is "
            f"{tower_sha256[:16]}...; expected an index that this run built"
        )
    segments = [_open(folder, segment, segment_schema(manifest)) for segment in manifest.segments]
    removals = [_open(folder, removal, removal_schema(manifest)) for removal in manifest.removals]
    # Sizes are those of the files by now.
    for entry in (*manifest.segments, *manifest.removals) if verify else _hashed_always(manifest):
        check_hash(folder / entry.file, entry.sha256)
    if not removals and manifest.num_items == sum(segment.num_records for segment in manifest.segments):
        # Nothing was replaced either: no id has to be looked at.
        is_live = np.ones(manifest.num_items, bool)
    else:
        is_live = _live_rows(
            [[batch.column("id") for batch in batches] for batches in segments],
            [
                (removal.num_segments, [batch.column("id") for batch in batches])
                for removal, batches in zip(manifest.removals, removals, strict=True)
            ],
        )
    if is_live.sum() != manifest.num_items:
        raise InputError(
            f"{folder / MANIFEST_NAME}: num_items = {manifest.num_items}: its segments hold {is_live.sum()} items"
        )
    return CatalogueIndex(folder, manifest, tuple(batch for batches in segments for batch in batches), is_live)


def _open(folder: Path, entry: Segment, schema: pa.Schema) -> list[pa.RecordBatch]:
    return open_batches(folder / entry.file, FORMAT, schema, dataclasses.asdict(entry))


def _hashed_always(manifest: Manifest) -> list[Segment]:
    """The smallest files, as many as have :data:`HASHED_BYTES` together."""
    files = sorted((*manifest.segments, *manifest.removals), key=lambda entry: entry.num_bytes)
    return [
        entry
        for entry, total in zip(files, itertools.accumulate(entry.num_bytes for entry in files), strict=True)
        if total <= HASHED_BYTES
    ]


def _live_rows(segments: list[list[pa.Array]], removals: list[tuple[int, list[pa.Array]]]) -> np.ndarray:
    """``[rows]`` bool, from the ids of each segment, and the ids removed with the number of segments that they are of.

    Every id is hashed once, however many segments there are.
    """
    segment = _numbered(segments)
    of_segments = np.array([count for count, _ in removals], np.int64)[_numbered([ids for _, ids in removals])]
    every = [part for parts in (*segments, *(ids for _, ids in removals)) for part in parts]
    ids = pa.chunked_array(every, pa.large_string()).dictionary_encode().combine_chunks()
    rows, removed = np.split(ids.indices.to_numpy(), [len(segment)])
    # Rows come in the order of their segments, and of several assignments the last one stays.
    last, num_gone = np.zeros((2, len(ids.dictionary)), np.int64)
    last[rows] = segment
    np.maximum.at(num_gone, removed, of_segments)
    return (last[rows] == segment) & (num_gone[rows] <= segment)


def _numbered(groups: list[list[pa.Array]]) -> np.ndarray:
    """The number of its group for each entry of the groups."""
    return np.repeat(np.arange(len(groups)), np.array([sum(map(len, parts)) for parts in groups], np.int64))


def _matrix(batch: pa.RecordBatch, size: int) -> np.ndarray:
    """``[rows, size]`` embeddings as they are stored."""
    values: np.ndarray = batch.column("embedding").flatten().to_numpy()
    return values.reshape(-1, size)


def _metadata(manifest: Manifest) -> dict[bytes, str]:
    return {FORMAT_KEY: FORMAT, VERSION_KEY: str(VERSION), TOWER_KEY: manifest.tower_sha256}
