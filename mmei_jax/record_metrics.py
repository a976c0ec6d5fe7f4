"""What each record contributes to the metrics: values of single records, of which ``metrics.py`` takes means."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mmei_jax.ranking_metrics import ranking_values
from mmei_jax.types import Batch, Label, RankingTargets


def record_cross_entropy(logits: Float[Array, "batch classes"], label: Label) -> Float[Array, "batch"]:
    """``[batch]`` float32 nats: minus the log probability of each record's class; arbitrary where not labelled.

    Args:
        logits: ``[batch, classes]`` float.
        label: ``[batch]`` int class ids.

    Example:
        >>> label = Label(value=jnp.array([1]), is_labelled=jnp.array([True]))
        >>> record_cross_entropy(jnp.zeros((1, 2)), label).tolist()
        [0.69]
    """
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    safe_class = jnp.where(label.is_labelled, label.value, 0)
    return -jnp.take_along_axis(log_probabilities, safe_class[:, None], axis=-1)[:, 0]


def record_binary_cross_entropy(logits: Float[Array, "batch classes"], label: Label) -> Float[Array, "batch"]:
    """``[batch]`` float32 nats: mean over classes of the binary cross-entropies; arbitrary where not labelled.

    Args:
        logits: ``[batch, classes]`` float.
        label: ``[batch, classes]`` float targets in [0, 1].

    Example:
        >>> label = Label(value=jnp.array([[1.0, 0.0]]), is_labelled=jnp.array([True]))
        >>> record_binary_cross_entropy(jnp.zeros((1, 2)), label).tolist()
        [0.69]
    """
    logits = logits.astype(jnp.float32)
    values = label.value * jax.nn.softplus(-logits) + (1.0 - label.value) * jax.nn.softplus(logits)
    return jnp.mean(values, axis=-1)


def modality_presence(batch: Batch) -> dict[str, Bool[Array, "batch"]]:
    """``[batch]`` bool for each modality that the batch carries: whether a record, not filler, has a token of it.

    Example:
        >>> from mmei_jax.types import TokenSequence
        >>> text = TokenSequence(features=jnp.zeros((2, 1, 3)), segment_ids=jnp.array([[1], [0]]))
        >>> batch = Batch(
        ...     vision=None, audio=None, text=text, is_record=jnp.ones(2, bool), record_index=jnp.arange(2)
        ... )
        >>> modality_presence(batch)["text"].tolist()
        [True, False]
    """
    num_records = batch.is_record.shape[0]
    present = {}
    for name, sequence in batch.sequences().items():
        segments = 1 + jnp.arange(num_records // sequence.segment_ids.shape[0])
        has_tokens = jnp.any(sequence.segment_ids[:, None, :] == segments[None, :, None], axis=-1)
        present[name] = batch.is_record & has_tokens.reshape(num_records)
    return present


def record_ranking_values(
    user_embedding: Float[Array, "batch embedding"],
    catalogue_embedding: Float[Array, "items embedding"],
    targets: RankingTargets,
    is_record: Bool[Array, "batch"],
    *,
    cutoffs: tuple[int, ...] = (10,),
) -> tuple[dict[str, Float[Array, "batch"]], Bool[Array, "batch"]]:
    """The ranking metrics of each record; see :mod:`mmei_jax.ranking_metrics`.

    Args:
        user_embedding: ``[batch, embedding]`` float, F_u.
        catalogue_embedding: ``[items, embedding]`` float, E_c in catalogue order.
        targets: relevant items. A record without any is not counted, as trec_eval leaves out unjudged queries.
        is_record: ``[batch]`` bool, False for filler.
        cutoffs: k.

    Returns:
        ``[batch]`` float32 by name, and ``[batch]`` bool: which records are counted; what others hold is arbitrary.

    Example:
        >>> from mmei_jax.types import Items
        >>> targets = RankingTargets(
        ...     positive=Items(features=jnp.zeros((1, 4)), kind=jnp.zeros(1, int)),
        ...     positive_index=jnp.array([2]),
        ...     has_positive=jnp.array([True]),
        ...     log_sampling_probability=jnp.zeros(1),
        ...     relevant_index=jnp.array([[2, -1]]),
        ... )
        >>> user, catalogue = jnp.array([[1.0, 0.0]]), jnp.array([[0.9, 0.0], [0.1, 1.0], [0.5, 0.0]])
        >>> values, is_counted = record_ranking_values(user, catalogue, targets, jnp.array([True]), cutoffs=(1,))
        >>> values["map"].tolist(), values["hr@1"].tolist(), is_counted.tolist()
        ([0.5], [0.0], [True])
    """
    # HIGHEST: on accelerators the default would round float32 inputs of the product to fewer bits, and make ties.
    scores = jnp.matmul(
        user_embedding.astype(jnp.float32),
        catalogue_embedding.astype(jnp.float32).T,
        precision=jax.lax.Precision.HIGHEST,
    )
    is_counted = is_record & jnp.any(targets.relevant_index >= 0, axis=-1)
    return ranking_values(scores, targets.relevant_index, cutoffs), is_counted
