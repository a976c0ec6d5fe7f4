"""Ranking metrics over catalogues of millions: every item is ranked, and the score matrix is never there.

Items are scored in blocks, twice: once to learn the scores of the relevant items, once to count the items that come
before each of them. Ranks are exact, and the metrics those of :mod:`mmei_jax.ranking_metrics`, ties included: items
with equal scores (as computed) are ordered by falling row, as trec_eval does. Ranks are float32, exact to 16 million.

Figures, as shares of 1 but for popularity; k is one of the cutoffs:

* ``map``, ``mrr``, ``ndcg@k``, ``hr@k``, ``recall@k``: means over the queries that have a relevant item.
* ``coverage@k``: items that are among the first k of any query.
* ``gini@k``: how unequally the first k places are shared among the items: 0 all alike, near 1 one item has them all.
* ``mean_popularity@k``: mean over the first k places of the item's number of training positives.
* ``popularity_ratio@k``: that over the same mean of the training positives themselves: above 1 the recommendations are
  more popular than what people chose.

They exist for all queries, for those of ``warm`` users (who have training records) and ``cold`` ones, and for each kind
of content, as ``kind/NAME``: there the relevant items of that kind alone are relevant, still among all items, and the
figures of places are those of the kind's items.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from mmei_jax.mergeable import Means, add_counts, divide
from mmei_jax.ranking_metrics import count_ahead, values_of_ranks
from mmei_jax.recommendation.top_k import Filters, ItemTable, TablePart, make_table, map_parts, top_items
from mmei_jax.types import InputError

ALL, WARM, COLD = "all", "warm", "cold"


@dataclass(frozen=True)
class RankedCatalogue:
    """What is ranked, and what training saw of it.

    Attributes:
        table: the items.
        kind: ``[items]`` int, index into ``kinds``.
        kinds: names of the kinds of content.
        popularity: ``[items]`` int, how many training records have the item as their positive.
        mesh: devices that have the table.
        block_size: items scored at once on each device; None: what suits them.
        is_listed: ``[items]`` bool, as in the table, False for an item that can be relevant but not be recommended: it
            counts as never found; None: all are listed.
    """

    table: ItemTable
    kind: Int[np.ndarray, "items"]
    kinds: Sequence[str]
    popularity: Int[np.ndarray, "items"]
    mesh: Mesh
    block_size: int | None = None
    is_listed: Bool[np.ndarray, "items"] | None = None

    @classmethod
    def place(
        cls,
        embeddings: Float[np.ndarray, "items dim"],
        kind: Int[np.ndarray, "given_kinds"],
        kinds: Sequence[str],
        popularity: Int[np.ndarray, "given_numbers"],
        mesh: Mesh,
        *,
        block_size: int | None = None,
    ) -> "RankedCatalogue":
        """Puts the items on the devices.

        Args:
            embeddings: ``[items, dim]``, E_c of Eq. 7.
            kind: ``[items]``.
            kinds: names.
            popularity: ``[items]``.
            mesh: devices.
            block_size: items scored at once on each device; None: what suits them.

        Raises:
            InputError: there are no items, or not one kind (with a name) and one number for each.
        """
        if len(popularity) != len(embeddings):
            raise InputError(
                f"{len(embeddings)} embeddings and {len(popularity)} numbers of positives: expected as many"
            )
        table = make_table(embeddings, kind, mesh, block_size=block_size)
        if kind.min() < 0 or kind.max() >= len(kinds):
            raise InputError(f"kinds of items from {kind.min()} to {kind.max()}: expected from 0 to {len(kinds) - 1}")
        return cls(table, kind, kinds, popularity, mesh, block_size)


@struct.dataclass
class Queries:
    """Some records to rank for.

    Attributes:
        embedding: ``[queries, dim]`` float32, F_u of Eq. 7.
        relevant: ``[queries, relevant]`` int32 rows of the catalogue, each at most once per query; -1 is filler.
        is_query: ``[queries]`` bool, False for filler.
        is_warm: ``[queries]`` bool, whether the user has training records; None where that is not asked.
    """

    embedding: Any
    relevant: Any
    is_query: Any
    is_warm: Any = None


@functools.partial(jax.jit, static_argnames=("mesh", "block_size"))
def streamed_ranks(
    queries: Float[Array, "queries dim"],
    relevant: Int[Array, "queries relevant"],
    table: ItemTable,
    filters: Filters,
    *,
    mesh: Mesh,
    block_size: int | None = None,
) -> Float[Array, "queries relevant"]:
    """The rank of every relevant item among all items, as :func:`mmei_jax.ranking_metrics.relevant_ranks` gives it.

    Args:
        queries: ``[queries, dim]`` float32.
        relevant: ``[queries, relevant]`` int32 rows of the table; -1 is filler.
        table: from :func:`~mmei_jax.recommendation.top_k.make_table`, on the same mesh and with the same block size.
        filters: what is not ranked (what a user has seen, say).
        mesh: devices.
        block_size: items scored at once on each device; None: what suits them.

    Returns:
        ``[queries, relevant]`` float32 ranks from 1; infinity at filler and for what is not ranked; NaN throughout a
        query of which any score is NaN.
    """

    # The scores come from the same product in both functions: another one would differ in the last bits, and make or
    # break ties.
    def own_scores(part: TablePart, queries: Array, relevant: Array) -> tuple[Array, Array]:
        def in_block(block: Array) -> tuple[Array, Array]:
            scores = part.scores(queries, block).T
            place = relevant - part.start - block * part.size
            is_here = (place >= 0) & (place < part.size)
            own = jnp.take_along_axis(scores, jnp.where(is_here, place, 0), axis=1)
            return jnp.where(is_here, own, -jnp.inf), jnp.isnan(scores).any(axis=1)

        own, is_unordered = lax.map(in_block, part.blocks)
        return own.max(axis=0), is_unordered.any(axis=0)

    def num_ahead(part: TablePart, queries: Array, relevant: Array, own: Array) -> Array:
        def with_block(total: Array, block: Array) -> tuple[Array, None]:
            rows = part.start + block * part.size + jnp.arange(part.size, dtype=jnp.int32)
            return total + count_ahead(part.scores(queries, block).T, rows, own, relevant), None

        return lax.scan(with_block, jnp.zeros(relevant.shape, jnp.int32), part.blocks)[0]

    options: dict[str, Any] = {"mesh": mesh, "block_size": block_size}
    own, is_unordered = map_parts(own_scores, table, filters, queries, relevant, **options)
    own, is_unordered = own.max(axis=0), is_unordered.any(axis=0)
    counts = map_parts(num_ahead, table, filters, queries, relevant, own, **options).sum(axis=0)
    # What is not ranked has the score -inf.
    ranks = jnp.where((relevant >= 0) & (own > -jnp.inf), 1.0 + counts.astype(jnp.float32), jnp.inf)
    return jnp.where(is_unordered[:, None], jnp.nan, ranks)


@dataclass(frozen=True)
class RankingSums:
    """Sums over some queries, on the host; those of several batches merge.

    Attributes:
        means: by group of queries or kind of content, the sums of the metrics and the number of queries they are of.
        exposure: by group of queries, ``[cutoffs, items]`` int64: how often each item was among the first k.
    """

    means: Mapping[str, Means]
    exposure: Mapping[str, Int[np.ndarray, "cutoffs items"]]

    def merge(self, other: "RankingSums") -> "RankingSums":
        """Adds those of other queries, evaluated on the same catalogue for the same cutoffs."""
        return RankingSums(
            {name: means.merge(other.means[name]) for name, means in self.means.items()},
            {name: add_counts(counts, other.exposure[name]) for name, counts in self.exposure.items()},
        )


def rank_queries(
    queries: Queries, catalogue: RankedCatalogue, *, cutoffs: tuple[int, ...] = (10,), filters: Filters | None = None
) -> RankingSums:
    """Ranks all items for some queries.

    Args:
        queries: any number; a program is compiled for each shape.
        catalogue: what is ranked.
        cutoffs: the values of k.
        filters: what is neither ranked nor recommended.
    """
    filters = filters or Filters()
    embedding, relevant = jnp.asarray(queries.embedding, jnp.float32), jnp.asarray(queries.relevant, jnp.int32)
    options: dict[str, Any] = {"mesh": catalogue.mesh, "block_size": catalogue.block_size}
    ranks = streamed_ranks(embedding, relevant, catalogue.table, filters, **options)
    most = min(max(cutoffs), len(catalogue.kind))
    top = np.asarray(top_items(embedding, catalogue.table, filters, k=most, **options).row)
    is_query = np.asarray(queries.is_query)
    groups = {ALL: is_query}
    if queries.is_warm is not None:
        is_warm = np.asarray(queries.is_warm)
        groups |= {WARM: is_query & is_warm, COLD: is_query & ~is_warm}
    kinds = jnp.asarray(catalogue.kind, jnp.int32)
    device_groups = {name: jnp.asarray(keep) for name, keep in groups.items()}
    means = _means(ranks, relevant, kinds, device_groups, cutoffs=cutoffs, num_kinds=len(catalogue.kinds))
    means = jax.device_get(means)
    by_kind = means.pop("kinds")
    means |= {
        f"kind/{name}": jax.tree.map(lambda leaf, at=at: leaf[at], by_kind) for at, name in enumerate(catalogue.kinds)
    }
    num_items = len(catalogue.kind)

    def exposure(keep: np.ndarray) -> np.ndarray:
        shown = [top[keep, :cutoff] for cutoff in cutoffs]
        return np.stack([np.bincount(rows[rows >= 0], minlength=num_items) for rows in shown])

    return RankingSums(means, {name: exposure(keep) for name, keep in groups.items()})


@functools.partial(jax.jit, static_argnames=("cutoffs", "num_kinds"))
def _means(
    ranks: Array, relevant: Array, kind: Array, groups: dict[str, Array], *, cutoffs: tuple[int, ...], num_kinds: int
) -> dict[str, Means]:
    """Means of each group of queries; under "kinds" those of each kind of content, stacked."""
    is_relevant = relevant >= 0
    values = values_of_ranks(ranks, is_relevant, cutoffs)
    found = {name: Means.from_model_output(values, keep & is_relevant.any(axis=1)) for name, keep in groups.items()}

    def of_kind(wanted: Array) -> Means:
        is_of_kind = is_relevant & (kind[jnp.maximum(relevant, 0)] == wanted)
        # NaN stays: such a query has no order.
        own = jnp.where(is_of_kind | jnp.isnan(ranks), ranks, jnp.inf)
        keep = groups[ALL] & is_of_kind.any(axis=1)
        return Means.from_model_output(values_of_ranks(own, is_of_kind, cutoffs), keep)

    return found | {"kinds": lax.map(of_kind, jnp.arange(num_kinds))}


def ranking_figures(
    sums: RankingSums, catalogue: RankedCatalogue, *, cutoffs: tuple[int, ...] = (10,)
) -> dict[str, float]:
    """The figures of the module's docstring, by group and name: "all/map", "cold/coverage@10", "kind/music/ndcg@10".

    Args:
        sums: of all queries.
        catalogue: that was ranked.
        cutoffs: that it was ranked for.

    Returns:
        Python floats; NaN where there is nothing to take a mean of.
    """
    figures: dict[str, float] = {}
    for name, means in sums.means.items():
        figures |= {f"{name}/{metric}": value for metric, value in means.compute().items()}
    everything = np.ones(len(catalogue.kind), bool)
    is_listed = everything if catalogue.is_listed is None else catalogue.is_listed
    exposures = {name: (counts, everything) for name, counts in sums.exposure.items()}
    for place, kind in enumerate(catalogue.kinds):
        exposures[f"kind/{kind}"] = (sums.exposure[ALL], catalogue.kind == place)
    for name, (counts, own) in exposures.items():
        for cutoff, shown in zip(cutoffs, counts, strict=True):
            found = _place_figures(shown[own], catalogue.popularity[own], is_listed[own])
            figures |= {f"{name}/{metric}@{cutoff}": value for metric, value in found.items()}
    return figures


def evaluate_ranking(
    batches: Iterable[Queries],
    catalogue: RankedCatalogue,
    *,
    cutoffs: tuple[int, ...] = (10,),
) -> dict[str, float]:
    """Ranks all items for all queries, batch by batch; see :func:`ranking_figures`.

    Args:
        batches: of queries; those of one shape share their programs.
        catalogue: what is ranked.
        cutoffs: the values of k.

    Raises:
        InputError: there are no batches.
    """
    parts = (rank_queries(batch, catalogue, cutoffs=cutoffs) for batch in batches)
    first = next(parts, None)
    if first is None:
        raise InputError("ranking evaluation of 0 batches of queries: expected at least one")
    return ranking_figures(functools.reduce(RankingSums.merge, parts, first), catalogue, cutoffs=cutoffs)


def _place_figures(shown: np.ndarray, popularity: np.ndarray, is_listed: np.ndarray) -> dict[str, float]:
    """Figures of how often each item was shown, given how popular it is, and whether it could be shown."""
    popularity = popularity.astype(np.float64)
    mean = divide((shown * popularity).sum(), shown.sum())
    of_positives = divide((popularity**2).sum(), popularity.sum())
    return {
        "coverage": divide((shown > 0).sum(), is_listed.sum()),
        "gini": _gini(shown[is_listed]),
        "mean_popularity": mean,
        "popularity_ratio": mean / of_positives,
    }


def _gini(counts: np.ndarray) -> float:
    """Half the mean absolute difference of two items' counts, over their mean; NaN where all are 0."""
    ordered = np.sort(counts).astype(np.float64)
    rank = np.arange(1, len(ordered) + 1)
    return divide(((2 * rank - len(ordered) - 1) * ordered).sum(), len(ordered) * ordered.sum())
