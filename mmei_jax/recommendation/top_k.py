"""Exact maximum inner product search: the best items of a catalogue for each query, over all devices.

Scores of a catalogue are never all there at once. Items are scored in blocks, and of each block stays the best score of
every :data:`GROUP_SIZE` items. The ``k`` best items lie in the ``k`` groups with the best scores, so those groups alone
are scored a second time, query by query. Devices have an equal part of the items each, and exchange their ``k`` best.

Ties: of items with equal scores, as they were computed, the highest row comes first: the order of
:mod:`mmei_jax.ranking_metrics`.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Shaped

from mmei_jax.record_gathering import aligned_empty
from mmei_jax.sharding import batch_sharding, replicated, spread_over
from mmei_jax.types import InputError

GROUP_SIZE = 32
# Items scored at once on each device. On a processor a block of items and its scores stay in its caches: with 256
# float32 features and 64 queries they are 1.3 MB. Accelerators want large blocks: scores of 64 queries are 8 MiB.
CPU_BLOCK_SIZE, BLOCK_SIZE = 1_024, 32_768


@struct.dataclass
class ItemTable:
    """Items of a catalogue as they are searched; rows are padded to a multiple of blocks and devices.

    Attributes:
        embeddings: ``[rows, dim]`` float32, bfloat16 or int8.
        scales: ``[rows]`` float32 factors of int8 embeddings; None for the other types.
        kind: ``[rows]`` int32.
        is_listed: ``[rows]`` bool, False for padding and for items that were taken off.
    """

    # Any: arrays on devices, NumPy arrays, and shapes.
    embeddings: Any
    scales: Any
    kind: Any
    is_listed: Any


@struct.dataclass
class Filters:
    """What may not be answered, by query.

    Attributes:
        allows_kind: ``[queries, kinds]`` bool; None allows all.
        excluded: ``[queries, exclusions]`` int32 rows of items (seen, denied), -1 for none; None excludes none.
        is_allowed: ``[rows]`` bool, an allow list for all queries; None allows all.
    """

    allows_kind: Any = None
    excluded: Any = None
    is_allowed: Any = None


@struct.dataclass
class TopItems:
    """The best items of each query, the best first.

    Attributes:
        row: ``[queries, k]`` int32 rows of the table; -1 where fewer items are allowed.
        score: ``[queries, k]`` float32; -inf there.
    """

    row: Any
    score: Any


def make_table(
    embeddings: np.ndarray, kind: np.ndarray, mesh: Mesh, *, dtype: str = "float32", block_size: int | None = None
) -> ItemTable:
    """Puts items on the devices, an equal part on each.

    Args:
        embeddings: ``[items, dim]`` float.
        kind: ``[items]`` int.
        mesh: devices.
        dtype: of storage: "float32", "bfloat16", or "int8" with a factor for each item.
        block_size: of :func:`top_items`.

    Raises:
        InputError: there are no items, another number of kinds, or the dtype is another one.
    """
    if not len(embeddings) or len(kind) != len(embeddings):
        raise InputError(f"{len(embeddings)} embeddings and {len(kind)} kinds: expected one kind for each, at least 1")
    num_rows = padded_rows(len(embeddings), mesh, block_size)
    padding = num_rows - len(embeddings)
    stored, scales = compress(_padded(embeddings, num_rows), dtype)
    table = ItemTable(
        embeddings=stored,
        scales=scales,
        kind=np.pad(np.asarray(kind, np.int32), (0, padding)),
        is_listed=np.arange(num_rows) < len(embeddings),
    )
    placed: ItemTable = jax.device_put(table, batch_sharding(mesh))
    return placed


def padded_rows(num_items: int, mesh: Mesh, block_size: int | None = None) -> int:
    """Rows of a table of ``num_items``: whole blocks, as many on every device.

    Args:
        num_items: at least 1.
        mesh: devices.
        block_size: of :func:`top_items`.
    """
    size = _block_size(num_items, mesh, block_size) * mesh.size
    return -(-num_items // size) * size


def compress(
    embeddings: Float[np.ndarray, "items dim"], dtype: str
) -> tuple[Shaped[np.ndarray, "items dim"], Float[np.ndarray, "items"] | None]:
    """Embeddings as a table stores them.

    Args:
        embeddings: ``[items, dim]`` float32.
        dtype: "float32", "bfloat16", or "int8" with a factor for each item.

    Returns:
        ``[items, dim]`` of that type, and ``[items]`` float32 factors for int8, else None.

    Raises:
        InputError: the dtype is another one.
    """
    if dtype == "int8":
        scales = np.maximum(np.abs(embeddings).max(axis=1), 1e-30).astype(np.float32) / np.float32(127.0)
        return np.round(embeddings / scales[:, None]).astype(np.int8), scales
    if dtype == "bfloat16":
        return embeddings.astype(jnp.bfloat16), None
    if dtype != "float32":
        raise InputError(f"dtype {dtype!r}: expected float32, bfloat16 or int8")
    return embeddings, None


@partial(jax.jit, static_argnames=("k", "mesh", "block_size", "is_approximate"))
def top_items(
    queries: Float[Array, "queries dim"],
    table: ItemTable,
    filters: Filters,
    *,
    k: int,
    mesh: Mesh,
    block_size: int | None = None,
    is_approximate: bool = False,
) -> TopItems:
    """The ``k`` allowed items with the largest inner products.

    Args:
        queries: ``[queries, dim]`` float32.
        table: from :func:`make_table`, on the same mesh and with the same block size.
        filters: what may not be answered.
        k: at most the rows of the table.
        mesh: devices.
        block_size: items scored at once on each device; None: what suits them.
        is_approximate: whether the groups are chosen by ``lax.approx_max_k``, which misses some on accelerators.
    """

    def on_device(part: TablePart, queries: Array) -> TopItems:
        return _top_of_part(part, queries, k, is_approximate)

    parts = map_parts(on_device, table, filters, queries, mesh=mesh, block_size=block_size)
    # [devices, queries, k] -> the k best of all devices' best, the highest rows first.
    rows, scores = (
        lax.with_sharding_constraint(each, replicated(mesh))[::-1].transpose(1, 0, 2).reshape(queries.shape[0], -1)
        for each in (parts.row, parts.score)
    )
    score, place = lax.top_k(scores, k)
    return TopItems(row=jnp.take_along_axis(rows, place, axis=1), score=score)


@dataclass(frozen=True)
class TablePart:
    """The rows of a table that one device has, within a program that runs on it.

    Attributes:
        table: these rows, those that are allowed for no query not listed.
        filters: by query.
        start: scalar int32, number of the first row in the whole table.
        size: rows of a block.
    """

    table: ItemTable
    filters: Filters
    start: Array
    size: int

    @property
    def blocks(self) -> Int[Array, "blocks"]:
        """Numbers of the blocks."""
        return jnp.arange(self.table.embeddings.shape[0] // self.size, dtype=jnp.int32)

    def scores(self, queries: Float[Array, "queries dim"], block: Int[Array, ""]) -> Float[Array, "size queries"]:
        """``[size, queries]`` float32 inner products with the rows of a block; -inf for what may not be answered.

        Items come first: so the best of a group are maxima of whole rows of queries, which processors take many at a
        time, and the matrix product is one of many rows with few columns, which XLA does faster than its transpose.

        Args:
            queries: ``[queries, dim]`` float32.
            block: its number.
        """
        first, filters, size = block * self.size, self.filters, self.size
        here: ItemTable = jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, first, size), self.table)
        allowed = jnp.broadcast_to(here.is_listed[:, None], (size, queries.shape[0]))
        if filters.allows_kind is not None:
            allowed &= filters.allows_kind.T[here.kind]
        scores = jnp.where(allowed, _scores(here.embeddings, here.scales, queries), -jnp.inf)
        if filters.excluded is not None:
            places = filters.excluded - self.start - first
            # Negative places would count from the end.
            places = jnp.where((places >= 0) & (places < size), places, size)
            scores = scores.at[places, jnp.arange(queries.shape[0])[:, None]].set(-jnp.inf, mode="drop")
        return scores


def map_parts(
    function: Callable[..., Any], table: ItemTable, filters: Filters, *others: Any, mesh: Mesh, block_size: int | None
) -> Any:
    """What a function gives for each device's rows, without communication, with a leading axis of devices.

    Args:
        function: of a :class:`TablePart` and the others.
        table: from :func:`make_table`, on the same mesh and with the same block size.
        filters: what may not be answered.
        others: arrays that every device has whole.
        mesh: devices.
        block_size: items scored at once on each device; None: what suits them.
    """
    num_rows = table.embeddings.shape[0]
    size = _block_size(num_rows, mesh, block_size)

    def on_device(table: ItemTable, is_allowed: Any, start: Array, filters: Filters, *others: Any) -> Any:
        if is_allowed is not None:
            table = dataclasses.replace(table, is_listed=table.is_listed & is_allowed)
        return jax.tree.map(lambda leaf: leaf[None], function(TablePart(table, filters, start[0], size), *others))

    starts = jnp.arange(mesh.size, dtype=jnp.int32) * (num_rows // mesh.size)
    spread = spread_over(mesh, on_device, is_split=(True, True, True, False, *(False for _ in others)))
    by_query = dataclasses.replace(filters, is_allowed=None)
    return spread(table, filters.is_allowed, starts, by_query, *others)


def _padded(embeddings: np.ndarray, num_rows: int) -> np.ndarray:
    """A float32 copy with rows of zeros behind, where a CPU device uses it in place."""
    padded = aligned_empty((num_rows, embeddings.shape[1]), "float32")
    padded[: len(embeddings)] = embeddings
    padded[len(embeddings) :] = 0.0
    return padded


def _block_size(num_rows: int, mesh: Mesh, block_size: int | None) -> int:
    """Items of a block, in whole groups: at most ``block_size``, and such that little padding completes the blocks.

    The same for a catalogue and for the table to which it is padded.
    """
    if block_size is None:
        block_size = CPU_BLOCK_SIZE if mesh.devices.flat[0].platform == "cpu" else BLOCK_SIZE
    most = max(GROUP_SIZE, block_size // GROUP_SIZE * GROUP_SIZE)
    of_device = -(-num_rows // mesh.size)
    num_blocks = -(-of_device // most)
    return -(-of_device // (num_blocks * GROUP_SIZE)) * GROUP_SIZE


def _scores(embeddings: Array, scales: Array | None, queries: Array) -> Array:
    """``[items, queries]`` float32."""
    found = lax.dot_general(
        embeddings if scales is None else embeddings.astype(jnp.float32),
        queries.astype(embeddings.dtype) if embeddings.dtype == jnp.bfloat16 else queries,
        (((1,), (1,)), ((), ())),
        # Else accelerators would round float32 factors to fewer bits.
        precision=None if embeddings.dtype == jnp.bfloat16 else lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return found if scales is None else found * scales[:, None]


def _top_of_part(part: TablePart, queries: Array, k: int, is_approximate: bool) -> TopItems:
    """The best of one device's rows."""
    table, filters, start, num_queries = part.table, part.filters, part.start, queries.shape[0]

    def best_of_groups(block: Array) -> Array:
        return part.scores(queries, block).reshape(-1, GROUP_SIZE, num_queries).max(axis=1)

    best = lax.map(best_of_groups, part.blocks)
    # Groups and items from the last to the first: of equal ones the choice takes the first.
    best = best.reshape(-1, num_queries)[::-1].T
    num_groups = min(k, best.shape[1])
    choose = lax.approx_max_k if is_approximate else lax.top_k
    _, group = choose(best, num_groups)
    group = best.shape[1] - 1 - jnp.sort(group, axis=1)
    inside = jnp.arange(GROUP_SIZE, dtype=jnp.int32)[::-1]

    def answer(query: Array, group: Array, allows_kind: Any, excluded: Any) -> TopItems:
        place = (group[:, None] * GROUP_SIZE + inside[None]).reshape(-1)
        scales = None if table.scales is None else table.scales[place]
        score = _scores(table.embeddings[place], scales, query[None])[:, 0]
        allowed = table.is_listed[place]
        if allows_kind is not None:
            allowed &= allows_kind[table.kind[place]]
        if excluded is not None:
            allowed &= ~(excluded[:, None] == start + place[None]).any(axis=0)
        score = jnp.where(allowed, score, -jnp.inf)
        best, chosen = lax.top_k(score, min(k, len(place)))
        row = jnp.where(jnp.isfinite(best), start + place[chosen], -1)
        missing = k - len(best)
        return TopItems(
            row=jnp.pad(row, (0, missing), constant_values=-1),
            score=jnp.pad(best, (0, missing), constant_values=-jnp.inf),
        )

    return lax.map(lambda each: answer(*each), (queries, group, filters.allows_kind, filters.excluded))
