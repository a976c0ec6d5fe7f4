"""The choices for L_rec of Eq. 6, which the paper names but does not define.

All compare inner products of user and item embeddings (Eq. 7), divided by a temperature, in float32.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mmei_jax.record_losses import RecordLosses, make_losses, one_if_zero
from mmei_jax.types import RankingTargets, Slate

# Stands for minus infinity among masked scores: exp() of it is exactly 0, and a row of nothing else stays finite.
_MASKED_SCORE = -1e30


def in_batch_softmax(
    user_embedding: Float[Array, "batch embedding"],
    item_embedding: Float[Array, "batch embedding"],
    targets: RankingTargets,
    *,
    temperature: float | Float[Array, ""],
    logq_correction: bool,
    remove_accidental_hits: bool,
) -> RecordLosses:
    """Softmax over the batch's positives: each record's own item against those of all other records.

    ``s_ij = <u_i, v_j> / temperature - log q_j``; ``values[i] = logsumexp_j s_ij - s_ii``, over the records ``j`` that
    have a positive. The paper names L_rec but does not define it. ``log q_j`` is the log of how often item ``j`` is
    drawn as a candidate, so that popular items are not pushed down for being popular; it is taken off the positive's
    score too (Yi et al., "Sampling-bias-corrected neural modeling for large corpus item recommendations", RecSys 2019,
    Eq. 3). An accidental hit is another record's positive that is this record's own item.

    Called under ``jax.jit`` on a batch that is split over devices, it sees the whole batch: negatives come from every
    device (XLA inserts the gather). Under gradient accumulation they come from the micro-batch.

    Args:
        user_embedding: ``[batch, embedding]`` float, F_u of Eq. 7.
        item_embedding: ``[batch, embedding]`` float, E_c of each record's positive.
        targets: positives, their catalogue rows and their log sampling probabilities.
        temperature: divides the inner products; positive.
        logq_correction: whether ``log q_j`` is subtracted.
        remove_accidental_hits: whether accidental hits are left out of the sum.

    Returns:
        RecordLosses, counted where a record has a positive; a record without any negative has the value 0.

    Example:
        >>> from mmei_jax.types import Items
        >>> targets = RankingTargets(
        ...     positive=Items(features=jnp.zeros((2, 4)), kind=jnp.zeros(2, int)),
        ...     positive_index=jnp.array([5, 7]),
        ...     has_positive=jnp.array([True, True]),
        ...     log_sampling_probability=jnp.zeros(2),
        ...     relevant_index=jnp.full((2, 1), -1),
        ... )
        >>> options = dict(temperature=1.0, logq_correction=True, remove_accidental_hits=True)
        >>> round(float(in_batch_softmax(jnp.zeros((2, 3)), jnp.eye(2, 3), targets, **options).mean()), 4)
        0.6931
    """
    is_counted = targets.has_positive
    scores = _in_batch_scores(user_embedding, item_embedding, is_counted, temperature)
    if logq_correction:
        scores = scores - jnp.where(is_counted, targets.log_sampling_probability, 0.0).astype(jnp.float32)[None, :]
    is_self = jnp.eye(scores.shape[0], dtype=bool)
    is_candidate = is_self | _is_negative(targets, remove_accidental_hits)
    positive_score = jnp.diagonal(scores)
    values = jax.nn.logsumexp(jnp.where(is_candidate, scores, _MASKED_SCORE), axis=-1) - positive_score
    return make_losses(values, is_counted, None)


def bpr(
    user_embedding: Float[Array, "batch embedding"],
    item_embedding: Float[Array, "batch embedding"],
    targets: RankingTargets,
    *,
    temperature: float | Float[Array, ""],
    remove_accidental_hits: bool,
) -> RecordLosses:
    """Bayesian personalised ranking against the other records' positives.

    ``values[i] = mean_j -log sigmoid((<u_i, v_i> - <u_i, v_j>) / temperature)`` over the negatives ``j``: the other
    records that have a positive, accidental hits removed (Rendle et al., UAI 2009, with all in-batch negatives in place
    of one sampled).

    Args:
        user_embedding: ``[batch, embedding]`` float, F_u of Eq. 7.
        item_embedding: ``[batch, embedding]`` float, E_c of each record's positive.
        targets: positives and their catalogue rows.
        temperature: divides the inner products; positive.
        remove_accidental_hits: whether another record's positive that is this record's own item is no negative.

    Returns:
        RecordLosses, counted where a record has a positive; a record without any negative has the value 0.

    Example:
        >>> from mmei_jax.types import Items
        >>> targets = RankingTargets(
        ...     positive=Items(features=jnp.zeros((3, 4)), kind=jnp.zeros(3, int)),
        ...     positive_index=jnp.array([5, 7, 5]),
        ...     has_positive=jnp.array([True, True, True]),
        ...     log_sampling_probability=jnp.zeros(3),
        ...     relevant_index=jnp.full((3, 1), -1),
        ... )
        >>> losses = bpr(jnp.zeros((3, 2)), jnp.ones((3, 2)), targets, temperature=1.0, remove_accidental_hits=True)
        >>> round(float(losses.mean()), 4)
        0.6931
    """
    is_counted = targets.has_positive
    scores = _in_batch_scores(user_embedding, item_embedding, is_counted, temperature)
    is_negative = _is_negative(targets, remove_accidental_hits)
    differences = jnp.diagonal(scores)[:, None] - scores
    terms = jnp.where(is_negative, jax.nn.softplus(-differences), 0.0)
    num_negatives = jnp.sum(is_negative, axis=-1, dtype=jnp.float32)
    return make_losses(jnp.sum(terms, axis=-1) / one_if_zero(num_negatives), is_counted, None)


def listnet(
    user_embedding: Float[Array, "batch embedding"],
    slate_embedding: Float[Array, "batch slate embedding"],
    slate: Slate,
    *,
    temperature: float | Float[Array, ""],
) -> RecordLosses:
    """Cross-entropy between the top-one probabilities of feedback and of scores, over the items that were shown.

    ``values[b] = -sum_p softmax(feedback[b])_p log softmax(<u_b, v_b> / temperature)_p`` (Cao et al., "Learning to
    rank: from pairwise approach to listwise approach", ICML 2007, with top-one probabilities). Its smallest value is
    the entropy of the feedback's softmax, not 0.

    Args:
        user_embedding: ``[batch, embedding]`` float, F_u of Eq. 7.
        slate_embedding: ``[batch, slate, embedding]`` float, E_c of the shown items.
        slate: feedback and which positions were shown.
        temperature: divides the inner products, not the feedback; positive.

    Returns:
        RecordLosses, counted where at least one item was shown.

    Example:
        >>> from mmei_jax.types import Items
        >>> slate = Slate(
        ...     items=Items(features=jnp.zeros((1, 3, 4)), kind=jnp.zeros((1, 3), int)),
        ...     item_index=jnp.array([[3, 4, -1]]),
        ...     feedback=jnp.array([[1.0, 1.0, 0.0]]),
        ...     is_shown=jnp.array([[True, True, False]]),
        ... )
        >>> round(float(listnet(jnp.zeros((1, 2)), jnp.zeros((1, 3, 2)), slate, temperature=1.0).mean()), 4)
        0.6931
    """
    is_shown = slate.is_shown
    is_counted = jnp.any(is_shown, axis=-1)
    safe_users = jnp.where(is_counted[:, None], user_embedding.astype(jnp.float32), 0.0)
    safe_items = jnp.where(is_shown[:, :, None], slate_embedding.astype(jnp.float32), 0.0)
    scores = jnp.einsum("be,bse->bs", safe_users, safe_items, precision=jax.lax.Precision.HIGHEST) / temperature
    log_probabilities = jax.nn.log_softmax(jnp.where(is_shown, scores, _MASKED_SCORE), axis=-1)
    feedback = jnp.where(is_shown, slate.feedback, 0.0).astype(jnp.float32)
    targets = jax.nn.softmax(jnp.where(is_shown, feedback, _MASKED_SCORE), axis=-1)
    values = -jnp.sum(jnp.where(is_shown, targets * log_probabilities, 0.0), axis=-1)
    return make_losses(values, is_counted, None)


def _in_batch_scores(
    users: Float[Array, "batch embedding"],
    items: Float[Array, "batch embedding"],
    has_positive: Bool[Array, "batch"],
    temperature: float | Float[Array, ""],
) -> Float[Array, "batch batch"]:
    safe_users = jnp.where(has_positive[:, None], users.astype(jnp.float32), 0.0)
    safe_items = jnp.where(has_positive[:, None], items.astype(jnp.float32), 0.0)
    # HIGHEST: on accelerators the default would round float32 inputs of the product to fewer bits.
    return jnp.matmul(safe_users, safe_items.T, precision=jax.lax.Precision.HIGHEST) / temperature


def _is_negative(targets: RankingTargets, remove_accidental_hits: bool) -> Bool[Array, "batch batch"]:
    """``[i, j]``: record ``j``'s positive is a negative for record ``i``."""
    has_positive, index = targets.has_positive, targets.positive_index
    is_negative = has_positive[:, None] & has_positive[None, :] & ~jnp.eye(index.shape[0], dtype=bool)
    if remove_accidental_hits:
        is_negative = is_negative & (index[:, None] != index[None, :])
    return is_negative
