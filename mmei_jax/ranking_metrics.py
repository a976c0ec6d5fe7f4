"""Ranking metrics over a whole catalogue, record by record, as trec_eval defines them.

Ties: items with equal scores are ordered by *falling* catalogue row. That is trec_eval's rule (falling document id)
when ids are written with leading zeros, so the figures equal pytrec_eval's.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# What a record's own value is called, where its mean over records has a name of its own.
RECORD_NAMES = {"map": "average_precision", "mrr": "reciprocal_rank"}


def relevant_ranks(
    scores: Float[Array, "batch items"], relevant_index: Int[Array, "batch relevant"]
) -> Float[Array, "batch relevant"]:
    """The rank of every relevant item when the whole catalogue is sorted by score.

    Args:
        scores: ``[batch, items]`` float; higher is better.
        relevant_index: ``[batch, relevant]`` int32 catalogue rows, each at most once per record; -1 is filler.

    Returns:
        ``[batch, relevant]`` float32 ranks from 1; infinity at filler; NaN throughout a record of which any score is
        NaN, because such a record has no order.

    Example:
        >>> relevant_ranks(jnp.array([[0.5, 0.9, 0.5]]), jnp.array([[0, 2, -1]])).tolist()
        [[3.0, 2.0, inf]]
    """
    is_relevant = relevant_index >= 0
    safe_index = jnp.where(is_relevant, relevant_index, 0)
    own_score = jnp.take_along_axis(scores, safe_index, axis=-1)
    num_ahead = count_ahead(scores, jnp.arange(scores.shape[-1]), own_score, safe_index)
    ranks = jnp.where(is_relevant, 1.0 + num_ahead.astype(jnp.float32), jnp.inf)
    is_ordered = ~jnp.any(jnp.isnan(scores), axis=-1)
    return jnp.where(is_ordered[:, None], ranks, jnp.nan)


def count_ahead(
    scores: Float[Array, "batch items"],
    item_index: Int[Array, "items"],
    own_score: Float[Array, "batch relevant"],
    own_index: Int[Array, "batch relevant"],
) -> Int[Array, "batch relevant"]:
    """How many of some items come before each relevant one; over all blocks of a catalogue it sums to its rank minus 1.

    Args:
        scores: ``[batch, items]`` float; higher is better.
        item_index: ``[items]`` int32 catalogue rows of these items.
        own_score: ``[batch, relevant]`` float, the relevant items' scores.
        own_index: ``[batch, relevant]`` int32 catalogue rows of the relevant items.

    Example:
        >>> scores, index = jnp.array([[0.5, 0.9, 0.5]]), jnp.array([4, 5, 6])
        >>> count_ahead(scores, index, jnp.array([[0.5, 0.2]]), jnp.array([[5, 9]])).tolist()
        [[2, 3]]
    """

    def of_one(column: tuple[Array, Array]) -> Array:
        score, index = column
        is_ahead = scores > score[:, None]
        is_tied_ahead = (scores == score[:, None]) & (item_index[None, :] > index[:, None])
        return jnp.sum(is_ahead | is_tied_ahead, axis=-1, dtype=jnp.int32)

    # One relevant column at a time: memory stays [batch, items] however many items are relevant.
    return jax.lax.map(of_one, (own_score.T, own_index.T)).T


def ranking_values(
    scores: Float[Array, "batch items"], relevant_index: Int[Array, "batch relevant"], cutoffs: tuple[int, ...] = (10,)
) -> dict[str, Float[Array, "batch"]]:
    """Average precision, reciprocal rank, NDCG, hit rate and recall of every record.

    * ``map``: mean over the relevant items of the precision at their ranks (trec_eval ``map``).
    * ``mrr``: one over the rank of the best relevant item (``recip_rank``).
    * ``ndcg@k``: sum of ``1 / log2(rank + 1)`` over relevant items in the top k, over the same sum of an ideal ranking
      (``ndcg_cut_k``).
    * ``hr@k``: 1 if any relevant item is in the top k (``success_k``).
    * ``recall@k``: share of the relevant items in the top k (``recall_k``).

    Args:
        scores: ``[batch, items]`` float; higher is better.
        relevant_index: ``[batch, relevant]`` int32 catalogue rows, each at most once per record; -1 is filler.
        cutoffs: the values of k.

    Returns:
        ``[batch]`` float32 by name, in [0, 1]. A record without any relevant item has the value 0 everywhere, and is
        not to be counted; a record with a NaN score has NaN.

    Example:
        >>> values = ranking_values(jnp.array([[0.1, 0.9, 0.5]]), jnp.array([[2]]), cutoffs=(1,))
        >>> {name: float(value[0]) for name, value in values.items()}
        {'map': 0.5, 'mrr': 0.5, 'ndcg@1': 0.0, 'hr@1': 0.0, 'recall@1': 0.0}
    """
    return values_of_ranks(relevant_ranks(scores, relevant_index), relevant_index >= 0, cutoffs)


def values_of_ranks(
    ranks: Float[Array, "batch relevant"], is_relevant: Bool[Array, "batch relevant"], cutoffs: tuple[int, ...] = (10,)
) -> dict[str, Float[Array, "batch"]]:
    """What :func:`ranking_values` gives, from ranks.

    Args:
        ranks: ``[batch, relevant]`` float32 from 1; infinity where not relevant, and for relevant items that are not
            ranked at all, which trec_eval counts as never found; NaN for a record without an order.
        is_relevant: ``[batch, relevant]`` bool.
        cutoffs: the values of k.

    Example:
        >>> values = values_of_ranks(jnp.array([[2.0, jnp.inf]]), jnp.array([[True, True]]), cutoffs=(2,))
        >>> {name: round(float(value[0]), 2) for name, value in values.items()}
        {'map': 0.25, 'mrr': 0.5, 'ndcg@2': 0.39, 'hr@2': 1.0, 'recall@2': 0.5}
    """
    num_relevant = jnp.sum(is_relevant, axis=-1)
    denominator = jnp.maximum(num_relevant, 1).astype(jnp.float32)
    # Relevant items up to and including each relevant item's rank; infinity never counts for a finite rank.
    num_found = jnp.sum(ranks[:, None, :] <= ranks[:, :, None], axis=-1)
    values = {
        "map": jnp.sum(num_found / ranks, axis=-1) / denominator,
        "mrr": 1.0 / jnp.min(ranks, axis=-1, initial=jnp.inf),
    }
    gains = 1.0 / jnp.log2(ranks + 1.0)
    is_ordered = ~jnp.any(jnp.isnan(ranks), axis=-1)
    positions = jnp.arange(ranks.shape[-1])
    for cutoff in cutoffs:
        is_in_top = ranks <= cutoff
        is_ideal = (positions[None, :] < num_relevant[:, None]) & (positions[None, :] < cutoff)
        ideal = jnp.sum(jnp.where(is_ideal, 1.0 / jnp.log2(positions + 2.0)[None, :], 0.0), axis=-1)
        gained = jnp.sum(jnp.where(is_in_top, gains, 0.0), axis=-1)
        values[f"ndcg@{cutoff}"] = gained / jnp.where(ideal > 0.0, ideal, 1.0)
        values[f"hr@{cutoff}"] = jnp.any(is_in_top, axis=-1).astype(jnp.float32)
        values[f"recall@{cutoff}"] = jnp.sum(is_in_top, axis=-1) / denominator
    return {name: jnp.where(is_ordered, value, jnp.nan) for name, value in values.items()}
