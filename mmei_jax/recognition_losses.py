"""Losses of emotion and intent: one class of several, several at once, or a number.

Unbalanced classes: weights by class, the focal loss, and a shift of the logits by the classes' shares.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mmei_jax.record_losses import RecordLosses, make_losses
from mmei_jax.types import InputError, Label

# Stands for -inf, whose gradients would be NaN.
_LOWEST = float(np.finfo(np.float32).min)


def softmax_cross_entropy(
    logits: Float[Array, "batch classes"],
    label: Label,
    class_weights: Float[Array, "classes"] | None = None,
    *,
    focal_gamma: float = 0.0,
    logit_shift: Float[Array, "classes"] | None = None,
) -> RecordLosses:
    """Cross-entropy of one class per record, the CE of Eq. 6.

    ``values[b] = -w[y_b] (1 - p_b)^gamma log p_b`` with ``p_b = softmax(logits[b] + shift)[y_b]``, and the mean divides
    by the sum of ``w[y_b]``: with gamma 0 as ``torch.nn.CrossEntropyLoss(weight)`` does, else the focal loss (Lin et
    al., "Focal loss for dense object detection", ICCV 2017, Eq. 5). With tau times the log priors as the shift it is
    the logit-adjusted loss (Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, Eq. 10).

    Args:
        logits: ``[batch, classes]`` float; anything where not labelled.
        label: ``[batch]`` int class ids. A labelled id outside ``[0, classes)`` gives NaN, never another class.
        class_weights: ``[classes]`` float32 in label order, see :func:`class_weights_by_name`; None weighs all 1.
        focal_gamma: at least 0; how much less records count that are already told well.
        logit_shift: ``[classes]`` float32, added to every record's logits; None adds nothing.

    Returns:
        RecordLosses, counted where labelled.

    Example:
        >>> label = Label(value=jnp.array([0, 1]), is_labelled=jnp.array([True, False]))
        >>> [f"{value:.4f}" for value in softmax_cross_entropy(jnp.zeros((2, 4)), label).values.tolist()]
        ['1.3863', '0.0000']
        >>> [f"{value:.4f}" for value in softmax_cross_entropy(jnp.zeros((2, 4)), label, focal_gamma=2.0).values]
        ['0.7798', '0.0000']
    """
    is_counted = label.is_labelled
    # Both the logits and the result are masked: where() on the result alone would still send 0 * inf = NaN backwards.
    safe_logits = jnp.where(is_counted[:, None], logits.astype(jnp.float32), 0.0)
    if logit_shift is not None:
        safe_logits = safe_logits + logit_shift[None, :]
    class_id = jnp.where(is_counted, label.value, 0)
    log_probabilities = jax.nn.log_softmax(safe_logits, axis=-1)
    num_classes = logits.shape[-1]
    is_class = (class_id >= 0) & (class_id < num_classes)
    safe_class = jnp.clip(class_id, 0, num_classes - 1)
    values = -jnp.take_along_axis(log_probabilities, safe_class[:, None], axis=-1)[:, 0]
    if focal_gamma:
        # 1 - p is the other classes' share: as a logarithm it neither cancels nor has an infinite gradient.
        is_other = jnp.arange(num_classes)[None, :] != safe_class[:, None]
        log_rest = jax.nn.logsumexp(jnp.where(is_other, log_probabilities, _LOWEST), axis=-1)
        values = values * jnp.exp(focal_gamma * log_rest)
    values = jnp.where(is_class, values, jnp.nan)
    weights = None if class_weights is None else class_weights.astype(jnp.float32)[safe_class]
    return make_losses(values, is_counted, weights)


def sigmoid_cross_entropy(
    logits: Float[Array, "batch classes"], label: Label, *, focal_gamma: float = 0.0
) -> RecordLosses:
    """Binary cross-entropy averaged over classes, for several emotions at once (MOSEI).

    ``values[b] = mean_c -[y (1 - p)^gamma log p + (1 - y) p^gamma log (1 - p)]`` with ``p = sigmoid(x_bc)``; the mean
    over records is with gamma 0 that of ``torch.nn.BCEWithLogitsLoss()``, else the focal loss (Lin et al., 2017).

    Args:
        logits: ``[batch, classes]`` float; anything where not labelled.
        label: ``[batch, classes]`` float targets in [0, 1].
        focal_gamma: at least 0, see :func:`softmax_cross_entropy`.

    Returns:
        RecordLosses, counted where labelled.

    Example:
        >>> label = Label(value=jnp.array([[0.0, 1.0]]), is_labelled=jnp.array([True]))
        >>> round(float(sigmoid_cross_entropy(jnp.zeros((1, 2)), label).mean()), 4)
        0.6931
    """
    is_counted = label.is_labelled
    safe_logits = jnp.where(is_counted[:, None], logits.astype(jnp.float32), 0.0)
    targets = jnp.where(is_counted[:, None], label.value, 0).astype(jnp.float32)
    # -log p and -log (1 - p), without overflow.
    present, absent = jax.nn.softplus(-safe_logits), jax.nn.softplus(safe_logits)
    if focal_gamma:
        present, absent = present * jnp.exp(-focal_gamma * absent), absent * jnp.exp(-focal_gamma * present)
    values = targets * present + (1.0 - targets) * absent
    return make_losses(jnp.mean(values, axis=-1), is_counted, None)


def absolute_error(predictions: Float[Array, "batch"], label: Label) -> RecordLosses:
    """Absolute error of a real-valued target.

    The paper names no loss for MOSEI's sentiment. Absolute error is what MOSEI work trains with (MulT, MMSA) and is the
    MAE that it reports.

    Args:
        predictions: ``[batch]`` float; anything where not labelled.
        label: ``[batch]`` float targets.

    Returns:
        RecordLosses, counted where labelled.

    Example:
        >>> label = Label(value=jnp.array([1.0, -2.0]), is_labelled=jnp.array([True, True]))
        >>> absolute_error(jnp.array([0.5, 1.0]), label).values.tolist()
        [0.5, 3.0]
    """
    is_counted = label.is_labelled
    safe_predictions = jnp.where(is_counted, predictions.astype(jnp.float32), 0.0)
    targets = jnp.where(is_counted, label.value, 0).astype(jnp.float32)
    return make_losses(jnp.abs(safe_predictions - targets), is_counted, None)


def class_weights_by_name(
    pairs: tuple[tuple[str, float], ...], class_names: tuple[str, ...]
) -> Float[Array, "classes"]:
    """Class weights in label order, from pairs in any order.

    Args:
        pairs: (class name, weight) pairs; every class exactly once.
        class_names: the data set's classes in label order.

    Returns:
        ``[classes]`` float32.

    Raises:
        InputError: a class is unknown, missing or named twice.

    Example:
        >>> class_weights_by_name((("joy", 2.0), ("neutral", 0.5)), ("neutral", "joy")).tolist()
        [0.5, 2.0]
    """
    names = [name for name, _ in pairs]
    accepted = f"expected each of {', '.join(class_names)} once"
    for name in names:
        if name not in class_names:
            raise InputError(f"config.loss.emotion_class_weights: unknown class {name!r}; {accepted}")
        if names.count(name) > 1:
            raise InputError(
                f"config.loss.emotion_class_weights: class {name!r} occurs {names.count(name)} times; {accepted}"
            )
    for name in class_names:
        if name not in names:
            raise InputError(f"config.loss.emotion_class_weights: class {name!r} is missing; {accepted}")
    weights = dict(pairs)
    return jnp.asarray([weights[name] for name in class_names], dtype=jnp.float32)
