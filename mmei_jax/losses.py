"""Losses of Eq. 6: one value per record, and a mask that says which records count.

Every loss gives a :class:`RecordLosses`: sum and count, divided once. A record that is not counted has the value 0 and
sends exactly zero gradient, whatever its logits hold; a counted record whose loss is not finite keeps that value, so
that training can name it. Everything is computed in float32.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mmei_jax.config import LossConfig
from mmei_jax.ranking_losses import bpr, in_batch_softmax, listnet
from mmei_jax.recognition_losses import (
    absolute_error,
    class_weights_by_name,
    sigmoid_cross_entropy,
    softmax_cross_entropy,
)
from mmei_jax.record_losses import RecordLosses, one_if_zero
from mmei_jax.types import Batch, Outputs

__all__ = [
    "RecordLosses",
    "absolute_error",
    "bpr",
    "class_weights_by_name",
    "in_batch_softmax",
    "listnet",
    "sigmoid_cross_entropy",
    "softmax_cross_entropy",
    "task_counts",
    "task_losses",
    "total_loss",
]

T = TypeVar("T")


def task_losses(
    outputs: Outputs,
    batch: Batch,
    config: LossConfig,
    class_weights: Float[Array, "classes"] | None = None,
    *,
    log_priors: Mapping[str, Float[Array, "_"]] | None = None,
) -> dict[str, RecordLosses]:
    """The losses of all tasks that the configuration switches on.

    Args:
        outputs: what the model says.
        batch: targets.
        config: which loss each task uses.
        class_weights: ``[emotions]`` float32 for the softmax emotion loss, see :func:`class_weights_by_name`.
        log_priors: by task, ``[classes]`` float32 log share of each class in training; ``config.logit_adjustment``
            times these is added to the logits of the softmax losses. Only training gives them: None adjusts nothing.

    Returns:
        RecordLosses by task, in the order "emotion", "intent", "ranking", without the tasks that are off.

    Raises:
        ValueError: a task is on, but outputs or batch lack it.

    Example:
        >>> from mmei_jax.types import Label
        >>> config = LossConfig(
        ...     emotion="softmax", emotion_label="emotion", emotion_class_weights=(), focal_gamma=0.0,
        ...     logit_adjustment=0.0, intent="softmax", ranking="none", recognition_weight=1.0,
        ...     ranking_weight=0.5, task_weighting="fixed", temperature=1.0, logq_correction=True,
        ...     remove_accidental_hits=True,
        ... )
        >>> batch = Batch(
        ...     vision=None, audio=None, text=None, is_record=jnp.ones(2, bool), record_index=jnp.arange(2),
        ...     emotion=Label(value=jnp.array([0, 1]), is_labelled=jnp.array([True, True])),
        ...     intent=Label(value=jnp.array([2, 0]), is_labelled=jnp.array([True, False])),
        ... )
        >>> logits = {"emotion": jnp.zeros((2, 4)), "intent": jnp.zeros((2, 3))}
        >>> outputs = Outputs(**{**dict.fromkeys(Outputs.__annotations__), **logits})
        >>> losses = task_losses(outputs, batch, config)
        >>> {task: (round(float(records.mean()), 4), int(records.count())) for task, records in losses.items()}
        {'emotion': (1.3863, 2), 'intent': (1.0986, 1)}
    """
    shifts = {task: config.logit_adjustment * prior for task, prior in (log_priors or {}).items()}
    losses = {}
    if config.emotion != "none":
        losses["emotion"] = _emotion_losses(outputs, batch, config, class_weights, shifts.get("emotion"))
    if config.intent != "none":
        intent, label = _require(outputs.intent, "outputs.intent"), _require(batch.intent, "batch.intent")
        intent_losses = partial(
            softmax_cross_entropy, label=label, focal_gamma=config.focal_gamma, logit_shift=shifts.get("intent")
        )
        if outputs.intent_branches is None:
            losses["intent"] = intent_losses(intent)
        else:
            losses["intent"] = _branch_losses(intent_losses, outputs.intent_branches, outputs.modality_weights)
    if config.ranking != "none":
        losses["ranking"] = _ranking_losses(outputs, batch, config)
    return losses


def task_counts(
    batch: Batch, config: LossConfig, class_weights: Float[Array, "classes"] | None = None
) -> dict[str, Float[Array, ""]]:
    """What :meth:`RecordLosses.count` of each task will be, from the targets alone.

    Gradient accumulation divides every micro-batch's total by the whole batch's count, and so needs it beforehand.

    Args:
        batch: targets.
        config: which loss each task uses.
        class_weights: as for :func:`task_losses`.

    Returns:
        float32 scalars by task, in the order of :func:`task_losses`.

    Raises:
        ValueError: a task is on, but the batch lacks it.

    Example:
        >>> from mmei_jax.types import Label
        >>> config = LossConfig(
        ...     emotion="softmax", emotion_label="emotion", emotion_class_weights=(), focal_gamma=0.0,
        ...     logit_adjustment=0.0, intent="softmax", ranking="none", recognition_weight=1.0,
        ...     ranking_weight=0.5, task_weighting="fixed", temperature=1.0, logq_correction=True,
        ...     remove_accidental_hits=True,
        ... )
        >>> batch = Batch(
        ...     vision=None, audio=None, text=None, is_record=jnp.ones(2, bool), record_index=jnp.arange(2),
        ...     emotion=Label(value=jnp.array([0, 1]), is_labelled=jnp.array([True, True])),
        ...     intent=Label(value=jnp.array([2, 0]), is_labelled=jnp.array([True, False])),
        ... )
        >>> {task: float(count) for task, count in task_counts(batch, config).items()}
        {'emotion': 2.0, 'intent': 1.0}
        >>> weights = class_weights_by_name((("neutral", 0.5), ("joy", 2.0)), ("neutral", "joy"))
        >>> float(task_counts(batch, config, weights)["emotion"])
        2.5
    """
    counts = {}
    if config.emotion != "none":
        emotion = _require(batch.emotion, "batch.emotion")
        weights = emotion.is_labelled.astype(jnp.float32)
        if config.emotion == "softmax" and class_weights is not None:
            class_id = jnp.clip(jnp.where(emotion.is_labelled, emotion.value, 0), 0, class_weights.shape[0] - 1)
            weights = weights * class_weights.astype(jnp.float32)[class_id]
        counts["emotion"] = jnp.sum(weights)
    if config.intent != "none":
        counts["intent"] = jnp.sum(_require(batch.intent, "batch.intent").is_labelled, dtype=jnp.float32)
    if config.ranking != "none":
        targets = _require(batch.ranking, "batch.ranking")
        is_counted = targets.has_positive
        if config.ranking == "listnet":
            is_counted = jnp.any(_require(targets.slate, "batch.ranking.slate").is_shown, axis=-1)
        counts["ranking"] = jnp.sum(is_counted, dtype=jnp.float32)
    return counts


def total_loss(
    losses: Mapping[str, RecordLosses],
    config: LossConfig,
    task_log_variances: Float[Array, "tasks"] | None = None,
    *,
    counts: Mapping[str, Float[Array, ""]] | None = None,
    objective_weights: Mapping[str, float] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Eq. 6: ``lambda_1 (CE_emotion + CE_intent) + lambda_2 L_rec``, each a masked mean over its records.

    With ``config.task_weighting == "uncertainty"`` every task's mean ``L_t`` becomes ``exp(-s_t) L_t + s_t / 2``, with
    a learned log variance ``s_t`` (Kendall et al., "Multi-task learning using uncertainty to weigh losses", CVPR 2018,
    Eq. 10), inside the lambdas. Their form for classification serves all tasks; another constant before a regression
    loss would only shift ``s_t``. A task without a counted record adds 0, and no gradient to its ``s_t``.

    Args:
        losses: what :func:`task_losses` gave.
        config: lambdas and weighting.
        task_log_variances: ``[tasks]`` float32 in the order of ``losses``; None unless weights are learned.
        counts: by task, the denominators to use in place of the batch's own counts. With the whole batch's counts
            (:func:`task_counts`), losses and gradients of its micro-batches *add up* to the whole batch's.
        objective_weights: by name, the weights of objectives beyond Eq. 6 among the losses.

    Returns:
        The loss, float32, and float32 scalars to log: "loss", and "loss/<task>" for each task's mean.

    Raises:
        ValueError: the weights are learned, but there is not one log variance per task.

    Example:
        >>> one = RecordLosses(values=jnp.array([2.0]), is_counted=jnp.array([True]), weights=jnp.ones(1))
        >>> config = LossConfig(
        ...     emotion="softmax", emotion_label="emotion", emotion_class_weights=(), focal_gamma=0.0,
        ...     logit_adjustment=0.0, intent="none", ranking="in_batch_softmax", recognition_weight=1.0,
        ...     ranking_weight=0.5, task_weighting="fixed", temperature=1.0, logq_correction=True,
        ...     remove_accidental_hits=True,
        ... )
        >>> loss, scalars = total_loss({"emotion": one, "ranking": one}, config)
        >>> float(loss), sorted(scalars)
        (3.0, ['loss', 'loss/emotion', 'loss/ranking'])
    """
    is_learned = config.task_weighting == "uncertainty"
    if is_learned and (task_log_variances is None or task_log_variances.shape != (len(losses),)):
        raise ValueError(f"task_log_variances = {task_log_variances}: expected one for each of {', '.join(losses)}")
    lambdas = {
        "emotion": config.recognition_weight,
        "intent": config.recognition_weight,
        "ranking": config.ranking_weight,
        **(objective_weights or {}),
    }
    loss = jnp.zeros((), jnp.float32)
    scalars: dict[str, Array] = {}
    for index, (task, records) in enumerate(losses.items()):
        denominator = one_if_zero(records.count() if counts is None else counts[task])
        mean = records.total() / denominator
        scalars[f"loss/{task}"] = mean
        if is_learned and task_log_variances is not None:
            log_variance = task_log_variances[index].astype(jnp.float32)
            # The share of the count that is here: 1 for a whole batch, less for a micro-batch, 0 without any record.
            share = records.count() / denominator
            mean = jnp.exp(-log_variance) * mean + 0.5 * log_variance * share
        loss = loss + lambdas[task] * mean
    return loss, {"loss": loss, **scalars}


def _emotion_losses(
    outputs: Outputs, batch: Batch, config: LossConfig, class_weights: Array | None, logit_shift: Array | None
) -> RecordLosses:
    emotion, label = _require(outputs.emotion, "outputs.emotion"), _require(batch.emotion, "batch.emotion")
    gamma = config.focal_gamma

    def losses(logits: Array) -> RecordLosses:
        if config.emotion == "softmax":
            return softmax_cross_entropy(logits, label, class_weights, focal_gamma=gamma, logit_shift=logit_shift)
        if config.emotion == "sigmoid":
            return sigmoid_cross_entropy(logits, label, focal_gamma=gamma)
        return absolute_error(logits, label)

    if outputs.emotion_branches is None:
        return losses(emotion)
    return _branch_losses(losses, outputs.emotion_branches, outputs.modality_weights)


def _branch_losses(
    losses: Callable[[Array], RecordLosses],
    branches: Float[Array, "batch modalities *outputs"],
    weights: Float[Array, "batch modalities"],
) -> RecordLosses:
    """Late fusion's: each record's mean over its present branches; 0 for a record without any."""
    each = jax.vmap(losses, in_axes=1)(branches)
    values = jnp.sum(each.values * jnp.moveaxis(weights, 1, 0), axis=0)
    return RecordLosses(values=values, is_counted=each.is_counted[0], weights=each.weights[0])


def _ranking_losses(outputs: Outputs, batch: Batch, config: LossConfig) -> RecordLosses:
    users = _require(outputs.user_embedding, "outputs.user_embedding")
    targets = _require(batch.ranking, "batch.ranking")
    if config.ranking == "listnet":
        slate_embedding = _require(outputs.slate_embedding, "outputs.slate_embedding")
        slate = _require(targets.slate, "batch.ranking.slate")
        return listnet(users, slate_embedding, slate, temperature=config.temperature)
    items = _require(outputs.positive_embedding, "outputs.positive_embedding")
    if config.ranking == "bpr":
        return bpr(
            users,
            items,
            targets,
            temperature=config.temperature,
            remove_accidental_hits=config.remove_accidental_hits,
        )
    return in_batch_softmax(
        users,
        items,
        targets,
        temperature=config.temperature,
        logq_correction=config.logq_correction,
        remove_accidental_hits=config.remove_accidental_hits,
    )


def _require(value: T | None, name: str) -> T:
    if value is None:
        raise ValueError(f"{name} is None, but the configuration switches its task on")
    return value
