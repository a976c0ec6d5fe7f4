"""Metrics of emotion and intent: one class of several, several at once, and MOSEI's conventions for sentiment."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from clu import metrics as clu_metrics
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from mmei_jax.mergeable import add_counts, divide, promote


@struct.dataclass
class ConfusionMatrix(clu_metrics.Metric):
    """Counts of (label, prediction) pairs, and the figures that follow from them.

    Averages run over the classes that occur among labels or predictions, scikit-learn's default; a ratio without
    denominator is 0 (``zero_division=0``). ``f1_of_macro`` is the harmonic mean of macro precision and macro recall,
    the paper's F1; ``macro_f1`` and ``weighted_f1`` are means of per-class F1, the latter weighted by label counts.

    Attributes:
        counts: ``[classes, classes]`` int32 (int64 on the host); rows are labels, columns predictions.

    Example:
        >>> ids, labels = jnp.array([0, 1, 1, 2]), jnp.array([0, 1, 0, 1])
        >>> matrix = ConfusionMatrix.from_model_output(ids, labels, jnp.array([True, True, True, False]), num_classes=3)
        >>> {name: round(value, 3) for name, value in matrix.compute().items()}
        {'accuracy': 0.667, 'macro_precision': 0.75, 'macro_recall': 0.75, 'f1_of_macro': 0.75, 'macro_f1': 0.667, \
'weighted_f1': 0.667}
    """

    counts: Any

    @classmethod
    def from_model_output(
        cls,
        predictions: Int[Array, "batch"],
        labels: Int[Array, "batch"],
        is_counted: Bool[Array, "batch"],
        *,
        num_classes: int,
    ) -> "ConfusionMatrix":
        """Counts the pairs (label, prediction) of the records that are counted.

        Args:
            predictions: ``[batch]`` int class ids in [0, num_classes).
            labels: ``[batch]`` int class ids in [0, num_classes); anything where not counted.
            is_counted: ``[batch]`` bool.
            num_classes: size of the matrix.
        """
        cell = jnp.where(is_counted, labels * num_classes + predictions, 0)
        counts = jnp.zeros(num_classes * num_classes, jnp.int32).at[cell].add(is_counted.astype(jnp.int32))
        return cls(counts=counts.reshape(num_classes, num_classes))

    def merge(self, other: "ConfusionMatrix") -> "ConfusionMatrix":
        """Adds counts."""
        return self.replace(counts=add_counts(self.counts, other.counts))

    def compute(self) -> dict[str, float]:
        """Accuracy, macro precision and recall, and the three F1, in [0, 1]; NaN where nothing was counted."""
        counts = np.asarray(self.counts, np.float64)
        hits, num_labels, num_predictions = np.diagonal(counts), counts.sum(axis=1), counts.sum(axis=0)
        occurs = (num_labels + num_predictions) > 0
        precision = _zero_division(hits, num_predictions)
        recall = _zero_division(hits, num_labels)
        f1 = _zero_division(2.0 * hits, num_labels + num_predictions)
        macro_precision, macro_recall = _mean(precision[occurs]), _mean(recall[occurs])
        return {
            "accuracy": divide(hits.sum(), counts.sum()),
            "macro_precision": macro_precision,
            "macro_recall": macro_recall,
            "f1_of_macro": _harmonic_mean(macro_precision, macro_recall),
            "macro_f1": _mean(f1[occurs]),
            "weighted_f1": divide((f1 * num_labels).sum(), num_labels.sum()),
        }


@struct.dataclass
class MultiLabelConfusion(clu_metrics.Metric):
    """One 2 x 2 confusion matrix per class, for several emotions at once (MOSEI's six).

    A class is predicted when its probability is above one half (logit > 0), and present when its target is above one
    half. ``accuracy`` is the mean over classes of binary accuracy; ``weighted_accuracy`` of the mean of true-positive
    and true-negative rate (Tong et al., ACL 2017; a rate without records is left out). ``macro_f1`` and ``weighted_f1``
    average the F1 of presence over all classes, the latter by how often each is present. Per class, as MOSEI work
    reports them: ``accuracy/<class>``, ``weighted_accuracy/<class>``, and ``weighted_f1/<class>``, the F1 of presence
    and of absence weighted by their counts.

    Attributes:
        counts: ``[classes, 2, 2]`` int32 (int64 on the host): class, is present, is predicted.
        num_exact: int32 scalar, records with every class right.
        class_names: names in label order; () uses the class ids.

    Example:
        >>> logits, targets = jnp.array([[1.0, -1.0], [1.0, 1.0]]), jnp.array([[1.0, 0.0], [0.0, 1.0]])
        >>> is_counted = jnp.array([True, True])
        >>> matrix = MultiLabelConfusion.from_model_output(logits, targets, is_counted, class_names=("a", "b"))
        >>> matrix.compute()["accuracy"], matrix.compute()["accuracy/a"], matrix.compute()["exact_match"]
        (0.75, 0.5, 0.5)
    """

    counts: Any
    num_exact: Any
    class_names: tuple[str, ...] = struct.field(pytree_node=False, default=())  # type: ignore[no-untyped-call]

    @classmethod
    def from_model_output(
        cls,
        logits: Float[Array, "batch classes"],
        targets: Float[Array, "batch classes"],
        is_counted: Bool[Array, "batch"],
        *,
        class_names: tuple[str, ...] = (),
    ) -> "MultiLabelConfusion":
        """Counts presence and prediction of every class over the records that are counted.

        Args:
            logits: ``[batch, classes]`` float.
            targets: ``[batch, classes]`` float in [0, 1]; anything where not counted.
            is_counted: ``[batch]`` bool.
            class_names: classes in label order; () uses the class ids.
        """
        is_predicted, is_present = logits > 0.0, targets > 0.5
        mask = is_counted[:, None]

        def count(row: Array, column: Array) -> Array:
            return jnp.sum(row & column & mask, axis=0, dtype=jnp.int32)

        absent = [count(~is_present, ~is_predicted), count(~is_present, is_predicted)]
        present = [count(is_present, ~is_predicted), count(is_present, is_predicted)]
        counts = jnp.stack([jnp.stack(absent, axis=-1), jnp.stack(present, axis=-1)], axis=-2)
        num_exact = jnp.sum(jnp.all(is_predicted == is_present, axis=-1) & is_counted, dtype=jnp.int32)
        return cls(counts=counts, num_exact=num_exact, class_names=class_names)

    def merge(self, other: "MultiLabelConfusion") -> "MultiLabelConfusion":
        """Adds counts."""
        return self.replace(
            counts=add_counts(self.counts, other.counts), num_exact=add_counts(self.num_exact, other.num_exact)
        )

    def compute(self) -> dict[str, float]:
        """The averages over classes, exact match, and three figures per class; in [0, 1], NaN without a record."""
        counts = np.asarray(self.counts, np.float64)
        num_classes, num_records = counts.shape[0], counts[0].sum()
        hits, num_labels, num_predictions = counts[:, 1, 1], counts[:, 1].sum(axis=-1), counts[:, :, 1].sum(axis=-1)
        f1 = _zero_division(2.0 * hits, num_labels + num_predictions)
        names = self.class_names or tuple(str(index) for index in range(num_classes))
        accuracy, weighted_accuracy, class_weighted_f1 = [], [], []
        for binary in counts:
            accuracy.append(divide(np.trace(binary), num_records))
            rows = binary.sum(axis=1)
            rates = np.diagonal(binary)[rows > 0] / rows[rows > 0]
            weighted_accuracy.append(_mean(rates))
            class_weighted_f1.append(ConfusionMatrix(counts=binary).compute()["weighted_f1"])
        figures = {
            "accuracy": _mean(np.asarray(accuracy)),
            "weighted_accuracy": _mean(np.asarray(weighted_accuracy)),
            "macro_f1": _mean(f1) if num_records else float("nan"),
            # scikit-learn gives 0 when no class is present in any record.
            "weighted_f1": _mean(f1, num_labels) if num_records else float("nan"),
            "exact_match": divide(self.num_exact, num_records),
        }
        for index, name in enumerate(names):
            figures[f"accuracy/{name}"] = accuracy[index]
            figures[f"weighted_accuracy/{name}"] = weighted_accuracy[index]
            figures[f"weighted_f1/{name}"] = class_weighted_f1[index]
        return figures


@struct.dataclass
class Sentiment(clu_metrics.Metric):
    """MOSEI's figures for sentiment in [-3, 3], by the conventions of MulT (Tsai et al., ACL 2019) and MMSA.

    * ``acc2_has0``, ``f1_has0``: negative (< 0) against the rest (>= 0), all records.
    * ``acc2_non0``, ``f1_non0``: positive (> 0) against the rest, records with the label 0 left out.
    * ``acc7``, ``acc5``: label and prediction clipped to [-3, 3] or [-2, 2] and rounded (half to even) are equal.
    * ``mae``: mean absolute error. ``pearson``: correlation of labels and predictions; NaN when either is constant.

    Both F1 are weighted by label counts.

    Attributes:
        has0, non0: confusion matrices of two classes.
        num_right7, num_right5: int32 scalars.
        absolute_error: float32 scalar, sum.
        count: int32 scalar, counted records.
        means: ``[2]`` float32, means of (prediction, label).
        comoments: ``[2, 2]`` float32, sums of products of deviations from the means. Merged by Chan et al., "Updating
            formulae and a pairwise algorithm for computing sample variances" (1979), which cancels nothing.

    Example:
        >>> predictions, labels = jnp.array([0.2, -1.6, 2.9]), jnp.array([0.0, -2.0, 3.0])
        >>> sentiment = Sentiment.from_model_output(predictions, labels, jnp.ones(3, bool))
        >>> sentiment.compute()["acc2_has0"], sentiment.compute()["acc7"], round(sentiment.compute()["mae"], 3)
        (1.0, 1.0, 0.233)
    """

    has0: ConfusionMatrix
    non0: ConfusionMatrix
    num_right7: Any
    num_right5: Any
    absolute_error: Any
    count: Any
    means: Any
    comoments: Any

    @classmethod
    def from_model_output(
        cls, predictions: Float[Array, "batch"], labels: Float[Array, "batch"], is_counted: Bool[Array, "batch"]
    ) -> "Sentiment":
        """Sums over the records that are counted.

        Args:
            predictions: ``[batch]`` float, on the labels' scale; not clipped before ``mae`` and ``pearson``.
            labels: ``[batch]`` float in [-3, 3]; both may be anything where not counted.
            is_counted: ``[batch]`` bool.
        """
        pairs = jnp.stack([predictions, labels], axis=-1).astype(jnp.float32)
        pairs = jnp.where(is_counted[:, None], pairs, 0.0)
        predictions, labels = pairs[:, 0], pairs[:, 1]
        count = jnp.sum(is_counted, dtype=jnp.int32)
        means = jnp.sum(pairs, axis=0) / jnp.maximum(count, 1)
        deviations = jnp.where(is_counted[:, None], pairs - means[None, :], 0.0)
        # A second pass takes out what rounding left of the mean.
        rest = jnp.sum(deviations, axis=0) / jnp.maximum(count, 1)
        deviations = jnp.where(is_counted[:, None], deviations - rest[None, :], 0.0)

        def binarize(is_positive: Array, is_label_positive: Array, mask: Array) -> ConfusionMatrix:
            prediction_id, label_id = is_positive.astype(jnp.int32), is_label_positive.astype(jnp.int32)
            return ConfusionMatrix.from_model_output(prediction_id, label_id, mask, num_classes=2)

        def count_right(limit: float) -> Array:
            rounded = jnp.round(jnp.clip(pairs, -limit, limit))
            return jnp.sum((rounded[:, 0] == rounded[:, 1]) & is_counted, dtype=jnp.int32)

        return cls(
            has0=binarize(predictions >= 0.0, labels >= 0.0, is_counted),
            non0=binarize(predictions > 0.0, labels > 0.0, is_counted & (labels != 0.0)),
            num_right7=count_right(3.0),
            num_right5=count_right(2.0),
            absolute_error=jnp.sum(jnp.abs(predictions - labels)),
            count=count,
            means=means + rest,
            comoments=jnp.einsum("bi,bj->ij", deviations, deviations, precision="highest"),
        )

    def merge(self, other: "Sentiment") -> "Sentiment":
        """Adds counts and sums, and merges the moments."""
        left_count, right_count = promote(self.count), promote(other.count)
        count = left_count + right_count
        # Both counts may be 0, hence the 1 in the denominator; the shift is then 0 as well.
        right_share = right_count / (count + (count == 0))
        shift = promote(other.means) - promote(self.means)
        return self.replace(
            has0=self.has0.merge(other.has0),
            non0=self.non0.merge(other.non0),
            num_right7=add_counts(self.num_right7, other.num_right7),
            num_right5=add_counts(self.num_right5, other.num_right5),
            absolute_error=add_counts(self.absolute_error, other.absolute_error),
            count=count,
            means=promote(self.means) + shift * right_share,
            comoments=add_counts(self.comoments, other.comoments)
            + shift[:, None] * shift[None, :] * (left_count * right_share),
        )

    def compute(self) -> dict[str, float]:
        """The figures by name: shares and F1 in [0, 1], ``mae`` on the labels' scale, ``pearson`` in [-1, 1]."""
        has0, non0 = self.has0.compute(), self.non0.compute()
        comoments = np.asarray(self.comoments, np.float64)
        return {
            "acc2_has0": has0["accuracy"],
            "f1_has0": has0["weighted_f1"],
            "acc2_non0": non0["accuracy"],
            "f1_non0": non0["weighted_f1"],
            "acc7": divide(self.num_right7, self.count),
            "acc5": divide(self.num_right5, self.count),
            "mae": divide(self.absolute_error, self.count),
            "pearson": divide(comoments[0, 1], np.sqrt(comoments[0, 0] * comoments[1, 1])),
        }


def _zero_division(numerator: npt.NDArray[Any], denominator: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.where(denominator > 0.0, numerator / np.where(denominator > 0.0, denominator, 1.0), 0.0)


def _mean(values: npt.NDArray[Any], weights: npt.NDArray[Any] | None = None) -> float:
    if not values.size:
        return float("nan")
    if weights is None:
        return float(values.mean())
    return float((values * weights).sum() / (weights.sum() or 1.0))


def _harmonic_mean(left: float, right: float) -> float:
    return 2.0 * left * right / (left + right) if left + right else 0.0
