"""Exact maximum inner product search: the best items of a catalogue for each query, over all devices.

Scores of a catalogue are never all there at once. Items are scored in blocks, and of each block stays the best score of
every :data:`GROUP_SIZE` items. The ``k`` best items lie in the ``k`` groups with the best scores, so those groups alone
are scored a second time, query by query. Devices have an equal part of the items each, and exchange their ``k`` best.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from mmei_jax.sharding import batch_sharding, replicated, spread_over
from mmei_jax.types import InputError

GROUP_SIZE = 32
# Items scored at once, by 64 queries in float32 8 MiB.
BLOCK_SIZE = 32_768


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
    embeddings: np.ndarray, kind: np.ndarray, mesh: Mesh, *, dtype: str = "float32", block_size: int = BLOCK_SIZE
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
    size = _block_size(len(embeddings), mesh.size, block_size) * mesh.size
    padding = -len(embeddings) % size
    padded = np.pad(np.asarray(embeddings, np.float32), ((0, padding), (0, 0)))
    scales = None
    if dtype == "int8":
        scales = np.maximum(np.abs(padded).max(axis=1), 1e-30).astype(np.float32) / 127.0
        padded = np.round(padded / scales[:, None]).astype(np.int8)
    elif dtype == "bfloat16":
        padded = padded.astype(jnp.bfloat16)
    elif dtype != "float32":
        raise InputError(f"dtype {dtype!r}: expected float32, bfloat16 or int8")
    table = ItemTable(
        embeddings=padded,
        scales=scales,
        kind=np.pad(np.asarray(kind, np.int32), (0, padding)),
        is_listed=np.arange(len(padded)) < len(embeddings),
    )
    placed: ItemTable = jax.device_put(table, batch_sharding(mesh))
    return placed


@partial(jax.jit, static_argnames=("k", "mesh", "block_size", "is_approximate"))
def top_items(
    queries: Float[Array, "queries dim"],
    table: ItemTable,
    filters: Filters,
    *,
    k: int,
    mesh: Mesh,
    block_size: int = BLOCK_SIZE,
    is_approximate: bool = False,
) -> TopItems:
    """The ``k`` allowed items with the largest inner products; among equal scores any.

    Args:
        queries: ``[queries, dim]`` float32.
        table: from :func:`make_table`, on the same mesh and with the same block size.
        filters: what may not be answered.
        k: at most the rows of the table.
        mesh: devices.
        block_size: items scored at once on each device.
        is_approximate: whether the groups are chosen by ``lax.approx_max_k``, which misses some on accelerators.
    """
    num_rows = table.embeddings.shape[0] // mesh.size
    size = _block_size(table.embeddings.shape[0], mesh.size, block_size)

    def on_device(table: ItemTable, is_allowed: Any, start: Array, queries: Array, filters: Filters) -> TopItems:
        listed = table.is_listed if is_allowed is None else table.is_listed & is_allowed
        own = filters.replace(is_allowed=None)  # type: ignore[attr-defined]
        found = _top_of_part(queries, table.replace(is_listed=listed), own, start[0], k, size, is_approximate)  # type: ignore[attr-defined]
        return jax.tree.map(lambda leaf: leaf[None], found)

    starts = jnp.arange(mesh.size, dtype=jnp.int32) * num_rows
    spread = spread_over(mesh, on_device, is_split=(True, True, True, False, False))
    others = filters.replace(is_allowed=None)  # type: ignore[attr-defined]
    parts = spread(table, filters.is_allowed, starts, queries, others)
    # [devices, queries, k] -> the k best of all devices' best.
    rows = lax.with_sharding_constraint(parts.row, replicated(mesh)).transpose(1, 0, 2).reshape(len(queries), -1)
    scores = lax.with_sharding_constraint(parts.score, replicated(mesh)).transpose(1, 0, 2).reshape(len(queries), -1)
    score, place = lax.top_k(scores, k)
    return TopItems(row=jnp.take_along_axis(rows, place, axis=1), score=score)


def _block_size(num_rows: int, num_devices: int, block_size: int) -> int:
    """Items of a block: at most ``block_size``, and no more than a small table has, in whole groups."""
    most = -(-num_rows // num_devices)
    return max(GROUP_SIZE, min(block_size, -(-most // GROUP_SIZE) * GROUP_SIZE) // GROUP_SIZE * GROUP_SIZE)


def _scores(queries: Array, embeddings: Array, scales: Array | None) -> Array:
    """``[queries, items]`` float32."""
    found = lax.dot_general(
        queries.astype(embeddings.dtype) if embeddings.dtype == jnp.bfloat16 else queries,
        embeddings if scales is None else embeddings.astype(jnp.float32),
        (((1,), (1,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
    return found if scales is None else found * scales[None]


def _top_of_part(
    queries: Array, table: ItemTable, filters: Filters, start: Array, k: int, size: int, is_approximate: bool
) -> TopItems:
    """The best of one device's rows, which begin at ``start``."""
    num_queries, num_rows = len(queries), table.embeddings.shape[0]
    num_blocks = num_rows // size

    def best_of_groups(block: Array) -> Array:
        first = block * size
        here: ItemTable = jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, first, size), table)
        allowed = jnp.broadcast_to(here.is_listed[None], (num_queries, size))
        if filters.allows_kind is not None:
            allowed &= filters.allows_kind[:, here.kind]
        scores = jnp.where(allowed, _scores(queries, here.embeddings, here.scales), -jnp.inf)
        if filters.excluded is not None:
            places = filters.excluded - start - first
            # Negative places would count from the end.
            places = jnp.where((places >= 0) & (places < size), places, size)
            scores = scores.at[jnp.arange(num_queries)[:, None], places].set(-jnp.inf, mode="drop")
        return scores.reshape(num_queries, size // GROUP_SIZE, GROUP_SIZE).max(axis=-1)

    best = lax.map(best_of_groups, jnp.arange(num_blocks, dtype=jnp.int32))
    best = best.transpose(1, 0, 2).reshape(num_queries, -1)
    num_groups = min(k, best.shape[1])
    choose = lax.approx_max_k if is_approximate else lax.top_k
    _, group = choose(best, num_groups)
    inside = jnp.arange(GROUP_SIZE, dtype=jnp.int32)

    def answer(query: Array, group: Array, allows_kind: Any, excluded: Any) -> TopItems:
        place = (group[:, None] * GROUP_SIZE + inside[None]).reshape(-1)
        scales = None if table.scales is None else table.scales[place]
        score = _scores(query[None], table.embeddings[place], scales)[0]
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
