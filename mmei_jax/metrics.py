"""What a model is measured by: one pytree per batch on devices, merged on the host, divided once at the end.

:func:`batch_metrics` runs under ``jax.jit``; ``jax.device_get`` brings its result to the host, where :func:`merge_all`
adds in float64 and int64 and :func:`compute_all` divides. Records without a label and filler records are never counted.
Every metric is a ``clu.metrics.Metric`` (``merge``, ``compute``) whose ``compute`` gives Python floats by name, and NaN
where nothing was counted.

Names, as ``<task>/<figure>``:

* one class of several (``emotion``, ``intent``): ``accuracy``, ``macro_precision``, ``macro_recall``, ``f1_of_macro``,
  ``macro_f1``, ``weighted_f1``, ``cross_entropy``; ``joint``, the pair of both as one class, has the same;
* several emotions at once: see :class:`MultiLabelConfusion`, and ``cross_entropy``; sentiment: see :class:`Sentiment`;
* ``ranking`` over the whole catalogue: ``map``, ``mrr``, ``ndcg@10``, ``hr@10``, ``recall@10``;
* ``alpha/<modality>``: mean of alpha (Eq. 3) over the records that have the modality;
* ``mean_accuracy``: mean of the accuracies of emotion and intent, or emotion's alone without intent.
"""

import functools
from collections.abc import Iterable, Mapping

import jax.numpy as jnp
from clu.metrics import Metric
from jaxtyping import Array, Bool, Float

from mmei_jax.config import LossConfig
from mmei_jax.mergeable import Means
from mmei_jax.recognition_metrics import ConfusionMatrix, MultiLabelConfusion, Sentiment
from mmei_jax.record_metrics import (
    modality_presence,
    record_binary_cross_entropy,
    record_cross_entropy,
    record_ranking_values,
)
from mmei_jax.types import MODALITIES, Batch, Label, Outputs, RankingTargets

__all__ = [
    "ConfusionMatrix",
    "Means",
    "MultiLabelConfusion",
    "Sentiment",
    "batch_metrics",
    "catalogue_metrics",
    "classification_metrics",
    "compute_all",
    "is_smaller_better",
    "joint_metrics",
    "merge_all",
    "modality_weight_metrics",
    "multi_label_metrics",
]


def batch_metrics(
    outputs: Outputs,
    batch: Batch,
    config: LossConfig,
    *,
    catalogue_embedding: Float[Array, "items embedding"] | None = None,
    emotion_names: tuple[str, ...] = (),
    cutoffs: tuple[int, ...] = (10,),
) -> dict[str, Metric]:
    """Everything that can be measured on one batch. Pure; meant for ``jax.jit``.

    A task is measured when it is on in the configuration and both outputs and batch hold it; ranking also needs the
    catalogue. The keys depend on nothing else, so that all batches of one evaluation merge.

    Args:
        outputs: what the model says.
        batch: targets.
        config: which tasks are on, and the emotion task's kind.
        catalogue_embedding: ``[items, embedding]`` float, E_c of the whole catalogue in row order.
        emotion_names: classes in label order, for figures per class of a multi-label task; () uses class ids.
        cutoffs: k of the ranking metrics.

    Returns:
        Metrics by key; what stands before the key's first "/" is the task that :func:`compute_all` prefixes.

    Raises:
        ValueError: ranking is on and can be measured, but the outputs have no user embedding.

    Example:
        >>> config = LossConfig(
        ...     emotion="softmax", emotion_label="emotion", emotion_class_weights=(), focal_gamma=0.0,
        ...     logit_adjustment=0.0, intent="none", ranking="none", recognition_weight=1.0,
        ...     ranking_weight=0.5, task_weighting="fixed", temperature=1.0, logq_correction=True,
        ...     remove_accidental_hits=True,
        ... )
        >>> from mmei_jax.types import TokenSequence
        >>> tokens = TokenSequence(features=jnp.zeros((2, 1, 3)), segment_ids=jnp.ones((2, 1), int))
        >>> batch = Batch(
        ...     vision=None, audio=None, text=tokens, is_record=jnp.ones(2, bool), record_index=jnp.arange(2),
        ...     emotion=Label(value=jnp.array([0, 1]), is_labelled=jnp.array([True, True])),
        ... )
        >>> alpha = jnp.array([[0.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
        >>> known = {"emotion": jnp.array([[2.0, 1.0], [3.0, 0.0]]), "modality_weights": alpha}
        >>> outputs = Outputs(**{**dict.fromkeys(Outputs.__annotations__), **known})
        >>> figures = compute_all(batch_metrics(outputs, batch, config))
        >>> figures["emotion/accuracy"], figures["mean_accuracy"], figures["alpha/text"]
        (0.5, 0.5, 1.0)
    """
    has_task = config.emotion != "none"
    found: dict[str, Metric] = modality_weight_metrics(outputs, batch) if has_task else {}
    emotion, intent = outputs.emotion, outputs.intent if config.intent != "none" else None
    if emotion is not None and batch.emotion is not None:
        if config.emotion == "softmax":
            found |= classification_metrics("emotion", emotion, batch.emotion)
        elif config.emotion == "sigmoid":
            found |= multi_label_metrics("emotion", emotion, batch.emotion, class_names=emotion_names)
        else:
            label = batch.emotion
            found["emotion/sentiment"] = Sentiment.from_model_output(emotion, label.value, label.is_labelled)
    if intent is not None and batch.intent is not None:
        found |= classification_metrics("intent", intent, batch.intent)
        if emotion is not None and batch.emotion is not None and config.emotion == "softmax":
            found |= joint_metrics(emotion, batch.emotion, intent, batch.intent)
    if config.ranking != "none" and batch.ranking is not None and catalogue_embedding is not None:
        if outputs.user_embedding is None:
            raise ValueError("outputs.user_embedding is None, but the configuration switches ranking on")
        found |= catalogue_metrics(
            outputs.user_embedding, catalogue_embedding, batch.ranking, batch.is_record, cutoffs=cutoffs
        )
    return found


def merge_all(parts: Iterable[Mapping[str, Metric]]) -> dict[str, Metric]:
    """Merges what :func:`batch_metrics` gave for each batch; on the host after ``jax.device_get``.

    Raises:
        ValueError: there is no part, or parts hold different metrics.

    Example:
        >>> import jax
        >>> is_counted = jnp.array([True, True])
        >>> first = {"a/b": Means.from_model_output({"loss": jnp.array([1.0, 2.0])}, is_counted)}
        >>> second = {"a/b": Means.from_model_output({"loss": jnp.array([6.0, 9.0])}, ~is_counted)}
        >>> compute_all(merge_all(jax.device_get([first, second])))
        {'a/loss': 1.5}
    """

    def merge(left: dict[str, Metric], right: Mapping[str, Metric]) -> dict[str, Metric]:
        if left.keys() != right.keys():
            raise ValueError(f"cannot merge the metrics {sorted(left)} with {sorted(right)}")
        return {key: metric.merge(right[key]) for key, metric in left.items()}

    remaining = iter(parts)
    first = next(remaining, None)
    if first is None:
        raise ValueError("there are no metrics to merge: the evaluation saw no batch")
    return functools.reduce(merge, remaining, dict(first))


def compute_all(metrics: Mapping[str, Metric]) -> dict[str, float]:
    """Figures by full name, such as "emotion/accuracy"; see the module's docstring.

    Args:
        metrics: merged metrics, on the host or on devices.

    Returns:
        Python floats; NaN where nothing was counted.

    Example:
        >>> label = Label(value=jnp.array([0, 1]), is_labelled=jnp.array([True, False]))
        >>> figures = compute_all(classification_metrics("emotion", jnp.array([[2.0, 1.0], [3.0, 0.0]]), label))
        >>> figures["emotion/accuracy"], figures["mean_accuracy"], round(figures["emotion/cross_entropy"], 4)
        (1.0, 1.0, 0.3133)
    """
    figures: dict[str, float] = {}
    for key, metric in metrics.items():
        task = key.partition("/")[0]
        figures |= {f"{task}/{name}": value for name, value in metric.compute().items()}
    accuracies = [figures[name] for name in ("emotion/accuracy", "intent/accuracy") if name in figures]
    if "emotion/accuracy" in figures:
        figures["mean_accuracy"] = sum(accuracies) / len(accuracies)
    return figures


def is_smaller_better(name: str) -> bool:
    """Whether a metric is a loss or an error, of which the smallest value is the best.

    Example:
        >>> is_smaller_better("validation/loss/emotion"), is_smaller_better("emotion/accuracy")
        (True, False)
    """
    return "loss" in name.split("/") or name.endswith(("cross_entropy", "/mae"))


def classification_metrics(task: str, logits: Float[Array, "batch classes"], label: Label) -> dict[str, Metric]:
    """Confusion matrix and cross-entropy (in nats, without class weights) of a task with one class per record.

    Args:
        task: prefix of the keys.
        logits: ``[batch, classes]`` float; the first of equal largest logits is the prediction.
        label: ``[batch]`` int class ids.

    Returns:
        Metrics by key.

    Example:
        >>> label = Label(value=jnp.array([0, 1]), is_labelled=jnp.array([True, True]))
        >>> found = classification_metrics("intent", jnp.array([[2.0, 1.0], [3.0, 0.0]]), label)
        >>> sorted(found), found["intent/confusion"].compute()["accuracy"]
        (['intent/confusion', 'intent/cross_entropy'], 0.5)
    """
    confusion = ConfusionMatrix.from_model_output(
        jnp.argmax(logits, axis=-1), label.value, label.is_labelled, num_classes=logits.shape[-1]
    )
    cross_entropy = Means.from_model_output({"cross_entropy": record_cross_entropy(logits, label)}, label.is_labelled)
    return {f"{task}/confusion": confusion, f"{task}/cross_entropy": cross_entropy}


def joint_metrics(
    emotion: Float[Array, "batch emotions"],
    emotion_label: Label,
    intent: Float[Array, "batch intents"],
    intent_label: Label,
) -> dict[str, Metric]:
    """The (emotion, intent) pair as one class, right when both are, over the records that carry both labels.

    Cross-entropy is that of the product of the two heads' probabilities.

    Args:
        emotion: ``[batch, emotions]`` float logits.
        emotion_label: ``[batch]`` int class ids.
        intent: ``[batch, intents]`` float logits.
        intent_label: ``[batch]`` int class ids.

    Returns:
        Metrics by key.

    Example:
        >>> label = Label(value=jnp.array([0, 1]), is_labelled=jnp.array([True, True]))
        >>> right, half_right = jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.array([[1.0, 0.0], [1.0, 0.0]])
        >>> joint_metrics(right, label, half_right, label)["joint/confusion"].compute()["accuracy"]
        0.5
    """
    num_intents = intent.shape[-1]
    is_counted = emotion_label.is_labelled & intent_label.is_labelled
    confusion = ConfusionMatrix.from_model_output(
        jnp.argmax(emotion, axis=-1) * num_intents + jnp.argmax(intent, axis=-1),
        emotion_label.value * num_intents + intent_label.value,
        is_counted,
        num_classes=emotion.shape[-1] * num_intents,
    )
    values = record_cross_entropy(emotion, emotion_label) + record_cross_entropy(intent, intent_label)
    return {
        "joint/confusion": confusion,
        "joint/cross_entropy": Means.from_model_output({"cross_entropy": values}, is_counted),
    }


def multi_label_metrics(
    task: str, logits: Float[Array, "batch classes"], label: Label, *, class_names: tuple[str, ...] = ()
) -> dict[str, Metric]:
    """Confusion per class and binary cross-entropy (mean over classes) of a task with several classes per record.

    Args:
        task: prefix of the keys.
        logits: ``[batch, classes]`` float.
        label: ``[batch, classes]`` float targets in [0, 1].
        class_names: classes in label order.

    Returns:
        Metrics by key.

    Example:
        >>> label = Label(value=jnp.array([[1.0, 0.0]]), is_labelled=jnp.array([True]))
        >>> found = multi_label_metrics("emotion", jnp.zeros((1, 2)), label, class_names=("joy", "fear"))
        >>> figures = compute_all(found)
        >>> figures["emotion/accuracy/joy"], figures["emotion/accuracy/fear"], figures["emotion/exact_match"]
        (0.0, 1.0, 0.0)
    """
    confusion = MultiLabelConfusion.from_model_output(logits, label.value, label.is_labelled, class_names=class_names)
    values = record_binary_cross_entropy(logits, label)
    cross_entropy = Means.from_model_output({"cross_entropy": values}, label.is_labelled)
    return {f"{task}/confusion": confusion, f"{task}/cross_entropy": cross_entropy}


def catalogue_metrics(
    user_embedding: Float[Array, "batch embedding"],
    catalogue_embedding: Float[Array, "items embedding"],
    targets: RankingTargets,
    is_record: Bool[Array, "batch"],
    *,
    cutoffs: tuple[int, ...] = (10,),
) -> dict[str, Metric]:
    """Ranks the whole catalogue by Eq. 7 for each record; see :func:`record_ranking_values`, of which it takes means.

    Returns:
        Metrics by key.

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
        >>> compute_all(catalogue_metrics(user, catalogue, targets, jnp.array([True]), cutoffs=(1,)))
        {'ranking/map': 0.5, 'ranking/mrr': 0.5, 'ranking/ndcg@1': 0.0, 'ranking/hr@1': 0.0, 'ranking/recall@1': 0.0}
    """
    values, is_counted = record_ranking_values(user_embedding, catalogue_embedding, targets, is_record, cutoffs=cutoffs)
    return {"ranking/catalogue": Means.from_model_output(values, is_counted)}


def modality_weight_metrics(outputs: Outputs, batch: Batch) -> dict[str, Metric]:
    """Mean alpha of each modality of the batch, over the records that have the modality.

    Args:
        outputs: ``modality_weights`` in the order of ``MODALITIES``.
        batch: token sequences, which say who has what.

    Returns:
        Metrics by key, one for each modality that the batch carries.

    Example:
        >>> from mmei_jax.types import TokenSequence
        >>> tokens = TokenSequence(features=jnp.zeros((2, 1, 3)), segment_ids=jnp.array([[1], [0]]))
        >>> batch = Batch(
        ...     vision=None, audio=tokens, text=None, is_record=jnp.ones(2, bool), record_index=jnp.arange(2)
        ... )
        >>> alpha = {"modality_weights": jnp.array([[0.0, 0.75, 0.25], [0.0, 0.0, 1.0]])}
        >>> outputs = Outputs(**{**dict.fromkeys(Outputs.__annotations__), **alpha})
        >>> compute_all(modality_weight_metrics(outputs, batch))
        {'alpha/audio': 0.75}
    """
    found: dict[str, Metric] = {}
    for name, is_present in modality_presence(batch).items():
        alpha = outputs.modality_weights[:, MODALITIES.index(name)]
        found[f"alpha/{name}"] = Means.from_model_output({name: alpha}, is_present)
    return found
