"""Objectives that need no label: contrastive alignment of the modalities, and prediction of masked tokens.

As in :mod:`mmei_jax.losses`: one value per record and a mask of the records that count, in float32. A record that has
fewer than two modalities has nothing to align and nothing to predict from: it is not counted.
"""

import functools
import itertools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from mmei_jax.activations import placed
from mmei_jax.pretraining_config import PretrainingConfig
from mmei_jax.record_losses import RecordLosses, make_losses, one_if_zero
from mmei_jax.types import Batch, MaskedTokens, PretrainingOutputs

# Names of the objectives; ``loss/<name>`` are their figures.
CONTRASTIVE, MASKED_PREDICTION = "contrastive", "masked_prediction"

# Stands for minus infinity among masked scores: exp() of it is exactly 0, and a row of nothing else stays finite.
_MASKED_SCORE = -1e30
# Bounds of the factor on inner products; the upper one is CLIP's. The lower one is a temperature of 1.
_LARGEST_LOG_SCALE = float(np.log(100.0))


def contrastive_alignment(
    projections: Mapping[str, Float[Array, "batch projection"]],
    is_present: Mapping[str, Bool[Array, "batch"]],
    scale: float | Float[Array, ""],
    *,
    chunk_size: int,
) -> RecordLosses:
    """Symmetric InfoNCE over every pair of modalities: a record's own other modality against those of all records.

    For the pair ``(m, n)``, over the records ``i, j`` that have both, with ``s_ij = scale <m_i, n_j>``, the value is
    ``(logsumexp_j s_ij + logsumexp_j s_ji) / 2 - s_ii``: CLIP's loss (Radford et al., "Learning transferable visual
    models from natural language supervision", ICML 2021, Fig. 3), which is InfoNCE (van den Oord et al.,
    "Representation learning with contrastive predictive coding", 2018, Eq. 4) both ways. ``values`` is the mean over
    the record's pairs. Projections that say nothing give the log of the number of records that have both.

    Scores are made of ``chunk_size`` columns at a time and made again in the backward pass, so that memory grows with
    ``batch * (projection + chunk_size)``, not with the square of the batch. Called under ``jax.jit`` on a batch that is
    split over devices, negatives come from every device (the columns are gathered once). Under gradient accumulation
    they come from the micro-batch.

    Args:
        projections: by modality, ``[batch, projection]`` float; anything where the modality is absent.
        is_present: by modality, ``[batch]`` bool, False for filler.
        scale: 1 over the temperature; positive.
        chunk_size: columns whose scores are in memory at once; at least 1. The loss does not depend on it.

    Returns:
        RecordLosses, counted where a record has two modalities; without any negative the value is 0.

    Example:
        >>> own = {"vision": jnp.eye(2), "text": jnp.eye(2)}
        >>> everywhere = {name: jnp.ones(2, bool) for name in own}
        >>> [round(float(contrastive_alignment(own, everywhere, s, chunk_size=1).mean()), 4) for s in (1e-6, 1.0, 10.0)]
        [0.6931, 0.3133, 0.0]
    """
    values = num_pairs = jnp.zeros(next(iter(is_present.values())).shape)
    for one, other in itertools.combinations(projections, 2):
        has_both = is_present[one] & is_present[other]
        # Both the inputs and the result are masked: see softmax_cross_entropy.
        rows, columns = (
            jnp.where(has_both[:, None], projections[name].astype(jnp.float32), 0.0) for name in (one, other)
        )
        by_row, by_column = _logsumexps(rows, columns, jnp.asarray(scale, jnp.float32), has_both, chunk_size)
        positive = scale * jnp.sum(rows * columns, axis=-1)
        values = values + jnp.where(has_both, 0.5 * (by_row + by_column) - positive, 0.0)
        num_pairs = num_pairs + has_both.astype(jnp.float32)
    return make_losses(values / one_if_zero(num_pairs), num_pairs > 0.0, None)


def masked_feature_prediction(masked: Mapping[str, MaskedTokens], num_records: int) -> RecordLosses:
    """Mean squared error over a record's masked tokens and their features.

    Targets have about unit variance, so the value is the share of the variance that is not predicted: 1 is what the
    features' mean gives. Predicting features of what is hidden, from what is shown, is what masked autoencoders do with
    pixels (He et al., CVPR 2022) and data2vec with states (Baevski et al., ICML 2022).

    Args:
        masked: by modality; what stands where nothing is masked has no effect.
        num_records: of the batch; a multiple of the rows.

    Returns:
        RecordLosses, counted where a record has a masked token.

    Example:
        >>> tokens = MaskedTokens(
        ...     predicted=jnp.zeros((2, 2, 3)), target=jnp.full((2, 2, 3), 2.0), segment_ids=jnp.array([[1, 0], [0, 0]])
        ... )
        >>> losses = masked_feature_prediction({"text": tokens}, 2)
        >>> losses.values.tolist(), losses.is_counted.tolist()
        ([4.0, 0.0], [True, False])
    """
    totals, counts = jnp.zeros(num_records), jnp.zeros(num_records)
    for tokens in masked.values():
        is_masked = tokens.segment_ids > 0
        differences = tokens.predicted.astype(jnp.float32) - tokens.target.astype(jnp.float32)
        # Both the differences and the result are masked: see softmax_cross_entropy.
        errors = jnp.mean(jnp.square(jnp.where(is_masked[..., None], differences, 0.0)), axis=-1)
        # The row's records; 0 of them for a token that is not masked.
        record = jax.nn.one_hot(tokens.segment_ids - 1, num_records // is_masked.shape[0])
        totals = totals + jnp.einsum("rt,rts->rs", errors, record, precision=jax.lax.Precision.HIGHEST).reshape(-1)
        counts = counts + record.sum(axis=1).reshape(-1)
    return make_losses(totals / one_if_zero(counts), counts > 0.0, None)


def bounded_scale(parameter: Float[Array, ""]) -> Float[Array, ""]:
    """1 over a learned temperature, which stays between 0.01 and 1.

    CLIP cuts its logarithm off at the same upper bound; here it approaches the bounds, where it can still turn round.

    Args:
        parameter: any number; :func:`scale_parameter` gives the one to begin with.

    Example:
        >>> round(float(bounded_scale(scale_parameter(0.07))), 3), float(bounded_scale(jnp.array(-1e3)))
        (14.286, 1.0)
    """
    return jnp.exp(_LARGEST_LOG_SCALE * jax.nn.sigmoid(parameter))


def scale_parameter(temperature: float) -> Float[Array, ""]:
    """The parameter with which :func:`bounded_scale` gives 1 over the temperature.

    Args:
        temperature: between 0.01 and 1.

    Example:
        >>> float(scale_parameter(0.1))
        0.0
    """
    share = -np.log(temperature) / _LARGEST_LOG_SCALE
    return jnp.asarray(np.log(share / (1.0 - share)), jnp.float32)


def objective_weights(config: PretrainingConfig) -> dict[str, float]:
    """By name, the weights of the objectives that are on.

    Example:
        >>> config = PretrainingConfig(
        ...     contrastive_weight=1.0, contrastive_chunk_size=8, projection_dim=4, initial_temperature=0.07,
        ...     masked_weight=0.0, mask_rate=1.0, mask_span=1,
        ... )
        >>> objective_weights(config)
        {'contrastive': 1.0}
    """
    found = {CONTRASTIVE: config.contrastive_weight, MASKED_PREDICTION: config.masked_weight}
    return {name: weight for name, weight in found.items() if weight > 0.0}


def objective_losses(
    outputs: PretrainingOutputs | None, batch: Batch, config: PretrainingConfig
) -> dict[str, RecordLosses]:
    """The losses of the objectives that are on, by name.

    Args:
        outputs: what the model says; None where no objective is on.
        batch: whose number of records counts.
        config: which objectives are on.

    Raises:
        ValueError: an objective is on, but the outputs lack it.

    Example:
        >>> batch = Batch(
        ...     vision=None, audio=None, text=None, is_record=jnp.ones(2, bool), record_index=jnp.arange(2)
        ... )
        >>> own = {"audio": jnp.eye(2), "text": jnp.eye(2)}
        >>> everywhere = {name: jnp.ones(2, bool) for name in own}
        >>> config = PretrainingConfig(
        ...     contrastive_weight=1.0, contrastive_chunk_size=8, projection_dim=2, initial_temperature=0.07,
        ...     masked_weight=0.0, mask_rate=1.0, mask_span=1,
        ... )
        >>> losses = objective_losses(PretrainingOutputs(own, everywhere, jnp.ones(()), {}), batch, config)
        >>> {name: round(float(records.mean()), 4) for name, records in losses.items()}
        {'contrastive': 0.3133}
    """
    losses: dict[str, RecordLosses] = {}
    weights = objective_weights(config)
    if not weights:
        return losses
    if outputs is None or (CONTRASTIVE in weights and outputs.scale is None):
        raise ValueError(f"the outputs lack what the objectives {', '.join(weights)} compare")
    if CONTRASTIVE in weights and outputs.scale is not None:
        losses[CONTRASTIVE] = contrastive_alignment(
            outputs.projections, outputs.is_present, outputs.scale, chunk_size=config.contrastive_chunk_size
        )
    if MASKED_PREDICTION in weights:
        losses[MASKED_PREDICTION] = masked_feature_prediction(outputs.masked, batch.is_record.shape[0])
    return losses


def objective_counts(batch: Batch, config: PretrainingConfig) -> dict[str, Float[Array, ""]]:
    """What :meth:`RecordLosses.count` of each objective will be, from the batch alone: records with two modalities.

    Example:
        >>> from mmei_jax.types import TokenSequence
        >>> audio = TokenSequence(features=jnp.zeros((2, 1, 3)), segment_ids=jnp.array([[1], [0]]))
        >>> text = TokenSequence(features=jnp.zeros((2, 1, 3)), segment_ids=jnp.array([[1], [1]]))
        >>> batch = Batch(
        ...     vision=None, audio=audio, text=text, is_record=jnp.ones(2, bool), record_index=jnp.arange(2)
        ... )
        >>> config = PretrainingConfig(
        ...     contrastive_weight=1.0, contrastive_chunk_size=8, projection_dim=4, initial_temperature=0.07,
        ...     masked_weight=0.0, mask_rate=1.0, mask_span=1,
        ... )
        >>> {name: float(count) for name, count in objective_counts(batch, config).items()}
        {'contrastive': 1.0}
    """
    num_records = batch.is_record.shape[0]
    num_present = jnp.zeros(num_records)
    for sequence in batch.sequences().values():
        num_segments = num_records // sequence.segment_ids.shape[0]
        num_present = num_present + jax.nn.one_hot(sequence.segment_ids - 1, num_segments).max(axis=1).reshape(-1)
    count = jnp.sum(batch.is_record & (num_present > 1.0), dtype=jnp.float32)
    return dict.fromkeys(objective_weights(config), count)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _logsumexps(
    rows: Float[Array, "batch projection"],
    columns: Float[Array, "batch projection"],
    scale: Float[Array, ""],
    is_counted: Bool[Array, "batch"],
    chunk_size: int,
) -> tuple[Float[Array, "batch"], Float[Array, "batch"]]:
    """Of ``scale * rows @ columns.T`` the logsumexp of each row and of each column, over what is counted.

    Rows stay on the devices that have them; columns go to all, a chunk of them at a time.
    """
    num_records = rows.shape[0]

    def add(carry: tuple[Array, Array], chunk: tuple[Array, Array]) -> tuple[tuple[Array, Array], Array]:
        largest, total = carry
        own, is_column = chunk
        scores = scale * _scores(rows, own)
        of_rows = jnp.where(is_column[None, :], scores, _MASKED_SCORE)
        new = jnp.maximum(largest, of_rows.max(axis=1))
        total = total * jnp.exp(largest - new) + jnp.exp(of_rows - new[:, None]).sum(axis=1)
        by_column = jax.nn.logsumexp(jnp.where(is_counted[:, None], scores, _MASKED_SCORE), axis=0)
        return (new, total), by_column

    chunks = (_in_chunks(columns, chunk_size), _in_chunks(is_counted, chunk_size))
    start = (jnp.full(num_records, _MASKED_SCORE), jnp.zeros(num_records))
    (largest, total), by_column = jax.lax.scan(add, start, chunks)
    return largest + jnp.log(total), by_column.reshape(-1)[:num_records]


def _logsumexps_forward(
    rows: Array, columns: Array, scale: Array, is_counted: Array, chunk_size: int
) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    found = _logsumexps(rows, columns, scale, is_counted, chunk_size)
    return found, (rows, columns, scale, is_counted, *found)


def _logsumexps_backward(
    chunk_size: int, kept: tuple[Array, ...], gradients: tuple[Array, Array]
) -> tuple[Array, Array, Array, None]:
    """Scores are made again, chunk by chunk; each is weighed by its share of its row and of its column."""
    rows, columns, scale, is_counted, by_row, by_column = kept
    of_row, of_column = (jnp.where(is_counted, gradient, 0.0) for gradient in gradients)

    def add(carry: tuple[Array, Array], chunk: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
        of_rows, of_scale = carry
        own, is_column, own_by_column, of_own = chunk
        products = _scores(rows, own)
        scores = scale * products
        shares = of_row[:, None] * jnp.exp(scores - by_row[:, None])
        shares = shares + of_own[None, :] * jnp.exp(scores - own_by_column[None, :])
        shares = jnp.where(is_counted[:, None] & is_column[None, :], shares, 0.0)
        of_rows = of_rows + scale * jnp.matmul(shares, own, precision=jax.lax.Precision.HIGHEST)
        of_chunk = scale * jnp.matmul(shares.T, rows, precision=jax.lax.Precision.HIGHEST)
        return (of_rows, of_scale + jnp.sum(shares * products)), of_chunk

    chunks = tuple(_in_chunks(array, chunk_size) for array in (columns, is_counted, by_column, of_column))
    (of_rows, of_scale), of_chunks = jax.lax.scan(add, (jnp.zeros_like(rows), jnp.zeros_like(scale)), chunks)
    return of_rows, of_chunks.reshape(-1, columns.shape[1])[: columns.shape[0]], of_scale, None


_logsumexps.defvjp(_logsumexps_forward, _logsumexps_backward)


def _scores(rows: Array, chunk: Array) -> Array:
    # HIGHEST: on accelerators the default would round float32 inputs of the product to fewer bits.
    return placed(jnp.matmul(rows, chunk.T, precision=jax.lax.Precision.HIGHEST), "batch", None)


def _in_chunks(array: Array, chunk_size: int) -> Array:
    """``[batch, ...]`` as ``[chunks, chunk, ...]``, whole on every device; zeros (False) complete the last chunk."""
    size = min(chunk_size, array.shape[0])
    filled = jnp.pad(array, ((0, -array.shape[0] % size), *((0, 0),) * (array.ndim - 1)))
    chunks = filled.reshape(-1, size, *array.shape[1:])
    return placed(chunks, *(None,) * chunks.ndim)
