"""Searches a catalogue index: the best allowed items for each user embedding; exact, or approximate with its recall."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float32, Int32, Integer, Shaped

from mmei_jax.recommendation.index_files import CatalogueIndex, EncodedItems
from mmei_jax.recommendation.top_k import Filters, ItemTable, TopItems, padded_rows, top_items
from mmei_jax.sharding import batch_sharding
from mmei_jax.types import InputError

# Queries searched at once; the last are padded, so that one program serves any number.
QUERIES_PER_BLOCK = 64
# Items that are missing from a catalogue, of which a message names some.
_IDS_TOLD = 5


@dataclass(frozen=True)
class FoundItems:
    """What a search found for each query, the best first: what is shown, and what a re-ranking needs.

    Attributes:
        row: ``[queries, k]`` int32 rows of the index; -1 where fewer items are allowed, and everything else is empty.
        score: ``[queries, k]`` float32, Eq. 7; -inf there.
        embedding: ``[queries, k, embedding]`` float32, as the index holds it; 0 there.
        id, kind, title, creator, origin: ``[queries, k]`` objects: texts, None where unknown and there.
    """

    row: Int32[np.ndarray, "queries k"]
    score: Float32[np.ndarray, "queries k"]
    embedding: Float32[np.ndarray, "queries k embedding"]
    id: Shaped[np.ndarray, "queries k"]
    kind: Shaped[np.ndarray, "queries k"]
    title: Shaped[np.ndarray, "queries k"]
    creator: Shaped[np.ndarray, "queries k"]
    origin: Shaped[np.ndarray, "queries k"]


@dataclass(frozen=True)
class Wanted:
    """What may be answered, for all queries.

    Attributes:
        kinds: names of kinds; None allows all.
        allowed: ids; None allows all.
        denied: ids.
    """

    kinds: Sequence[str] | None = None
    allowed: Sequence[str] | None = None
    denied: Sequence[str] = ()


class IndexSearch:
    """An index on the devices, an equal part on each.

    Args:
        index: the items.
        mesh: devices.
        exact: ``[rows, embedding]`` float32 embeddings to search in the place of those that the index stores.
    """

    def __init__(self, index: CatalogueIndex, mesh: Mesh, exact: Float32[np.ndarray, "rows embedding"] | None = None):
        self.index, self._mesh = index, mesh
        num_rows = padded_rows(len(index.is_live), mesh)
        self._padding = num_rows - len(index.is_live)
        if exact is None:
            embeddings, scales = index.padded_embeddings(num_rows)
        else:
            embeddings, scales = np.pad(exact, ((0, self._padding), (0, 0))), None
        table = ItemTable(
            embeddings=embeddings,
            scales=scales,
            kind=np.pad(index.kind(), (0, self._padding)),
            is_listed=np.pad(index.is_live, (0, self._padding)),
        )
        self._table: ItemTable = jax.device_put(table, batch_sharding(mesh))

    def top(
        self,
        queries: Float32[np.ndarray, "queries embedding"],
        k: int,
        wanted: Wanted | None = None,
        *,
        seen: Sequence[Sequence[str]] | None = None,
        is_approximate: bool = False,
    ) -> TopItems:
        """The best allowed items for each query, on the host; exact, but where that is not asked for.

        Args:
            queries: ``[queries, embedding]`` float32 user embeddings.
            k: items for each; no more are given than the index has rows.
            wanted: what may be answered.
            seen: by query, ids that may not be answered; those that the index lacks change nothing.
            is_approximate: see :func:`~mmei_jax.recommendation.top_k.top_items`.

        Raises:
            InputError: a kind is unknown.
        """
        wanted = Wanted() if wanted is None else wanted
        num_queries, k = len(queries), min(k, len(self.index.is_live))
        padding = -num_queries % QUERIES_PER_BLOCK
        allows_kind, is_allowed = self._allowed_kinds(wanted), self._allowed_rows(wanted)
        excluded = None if seen is None else np.pad(self._rows_of_lists(seen), ((0, padding), (0, 0)))
        padded = np.pad(queries, ((0, padding), (0, 0)))
        parts = []
        for start in range(0, len(padded), QUERIES_PER_BLOCK):
            part = slice(start, start + QUERIES_PER_BLOCK)
            filters = Filters(
                allows_kind=allows_kind,
                excluded=None if excluded is None else excluded[part],
                is_allowed=is_allowed,
            )
            found = top_items(
                jnp.asarray(padded[part]), self._table, filters, k=k, mesh=self._mesh, is_approximate=is_approximate
            )
            parts.append(jax.device_get(found))
        joined: TopItems = jax.tree.map(lambda *leaves: np.concatenate(leaves)[:num_queries], *parts)
        return joined

    def describe(self, found: TopItems) -> FoundItems:
        """What the index knows of the items found.

        Args:
            found: of :meth:`top`.
        """
        row = np.asarray(found.row)
        is_item = row >= 0
        columns, vectors = self.index.take(row[is_item])
        names = self.index.manifest.kind_names
        texts = [json.loads(text) for text in columns["text"]]
        embedding = np.zeros((*row.shape, vectors.shape[1]), np.float32)
        embedding[is_item] = vectors

        def spread(values: Iterable[Any]) -> np.ndarray:
            places = np.full(row.shape, None, object)
            places[is_item] = list(values)
            return places

        return FoundItems(
            row=row,
            score=np.asarray(found.score),
            embedding=embedding,
            id=spread(columns["id"]),
            kind=spread(names[kind] for kind in columns["kind"]),
            title=spread(text.get("title") for text in texts),
            creator=spread(columns["creator"]),
            origin=spread(columns["origin"]),
        )

    def _allowed_kinds(self, wanted: Wanted) -> Bool[np.ndarray, "queries kinds"] | None:
        if wanted.kinds is None:
            return None
        names = self.index.manifest.kind_names
        unknown = sorted(set(wanted.kinds) - set(names))
        if unknown:
            raise InputError(f"kind {unknown[0]!r}: expected some of {', '.join(names)}")
        return np.tile(np.isin(names, wanted.kinds), (QUERIES_PER_BLOCK, 1))

    def _allowed_rows(self, wanted: Wanted) -> Bool[Array, "rows"] | None:
        if wanted.allowed is None and not wanted.denied:
            return None
        is_allowed = np.full(len(self.index.is_live) + self._padding, wanted.allowed is None)
        for ids, value in ((wanted.allowed or (), True), (wanted.denied, False)):
            rows = self.index.rows_of(ids)
            is_allowed[rows[rows >= 0]] = value
        placed: Array = jax.device_put(is_allowed, batch_sharding(self._mesh))
        return placed

    def _rows_of_lists(self, lists: Sequence[Sequence[str]]) -> Int32[np.ndarray, "queries width"]:
        """Rows of ids by query, -1 for none; at least one column."""
        flat = self.index.rows_of([item for ids in lists for item in ids])
        width = max(1, *(len(ids) for ids in lists))
        rows = np.full((len(lists), width), -1, np.int32)
        start = 0
        for row, ids in zip(rows, lists, strict=True):
            row[: len(ids)] = flat[start : start + len(ids)]
            start += len(ids)
        return rows


def answers(found: FoundItems) -> list[list[dict[str, Any]]]:
    """JSON values by query: id, title, creator, origin, kind and score of each item, the best first."""
    names = ("id", "title", "creator", "origin", "kind")
    return [
        [
            {**{name: getattr(found, name)[query, rank] for name in names}, "score": float(found.score[query, rank])}
            for rank in np.flatnonzero(rows >= 0)
        ]
        for query, rows in enumerate(found.row)
    ]


def answer_lines(items: Sequence[dict[str, Any]]) -> list[str]:
    """Lines for a reader: score, kind, id, title and creator of each item.

    Args:
        items: of one query, see :func:`answers`.
    """
    return [
        f"  {item['score']:8.4f}  {item['kind']:<8} {item['id']:<16} {item['title'] or '-'}, {item['creator'] or '-'}"
        for item in items
    ]


def exact_embeddings(index: CatalogueIndex, blocks: Iterable[EncodedItems]) -> Float32[np.ndarray, "rows embedding"]:
    """``[rows, embedding]`` float32 embeddings of the items of an index that stores them smaller.

    Args:
        index: the items.
        blocks: the same items, and maybe others, embedded anew.

    Raises:
        InputError: items of the index are missing.
    """
    found = np.zeros((len(index.is_live), index.manifest.embedding_dim), np.float32)
    is_missing = index.is_live.copy()
    for block in blocks:
        rows = index.rows_of(block.items.ids)
        is_here = rows >= 0
        found[rows[is_here]] = block.embedding[is_here]
        is_missing[rows[is_here]] = False
    missing = np.flatnonzero(is_missing)
    if missing.size:
        ids = index.take(missing[:_IDS_TOLD])[0]["id"]
        raise InputError(
            f"{missing.size} items of {index.folder} are not in the catalogue, such as {ids[0]!r}; exact answers need "
            "all of them: expected another --catalogue"
        )
    return found


def recall(found: Integer[np.ndarray, "queries k"], exact: Integer[np.ndarray, "queries k"]) -> float:
    """Share of the exact answers that were found, over all queries; NaN where there are none.

    Args:
        found: ``[queries, k]`` rows, -1 for none.
        exact: the same, of an exact search.
    """
    is_found = (exact[:, :, None] == found[:, None, :]).any(axis=-1)
    return float(is_found[exact >= 0].mean()) if (exact >= 0).any() else float("nan")
