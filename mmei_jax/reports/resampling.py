"""Bootstrap intervals: the metrics of a split whose records, or users, are drawn anew with replacement.

Every resample goes through the metrics of :mod:`mmei_jax.metrics` themselves: their sums and counts are weighted by how
often each record was drawn. With each record drawn once they are the metrics of the evaluation.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from clu.metrics import Metric
from jaxtyping import Bool, Float, Int

from mmei_jax.metrics import ConfusionMatrix, Means, MultiLabelConfusion, Sentiment, compute_all
from mmei_jax.reports.calibration import reliability
from mmei_jax.reports.record_table import RecordTable, TaskRecords
from mmei_jax.types import MODALITIES

NUM_RESAMPLES = 1_000
LEVEL = 0.95
# Fewer units give no interval: resamples of a handful repeat the same few records, and their percentiles are far too
# narrow (two users whose figures agree would give an interval of no width).
MIN_UNITS = 10


@dataclass(frozen=True)
class Intervals:
    """Percentile intervals by metric name.

    Attributes:
        unit: what is drawn, "record" or "user".
        num_units: how many there are.
        bounds: (low, high); a metric that no resample defines has none. {} for fewer than :data:`MIN_UNITS` units.
        num_undefined: resamples in which a metric was undefined, where there were any; the others give its interval.
        too_few_units: by metric, how many units count for it, where these are fewer than :data:`MIN_UNITS`; such a
            metric has no bounds.
    """

    unit: str
    num_units: int
    bounds: dict[str, tuple[float, float]]
    num_undefined: dict[str, int]
    too_few_units: dict[str, int]

    def missing(self, name: str) -> str:
        """Why a metric has no bounds, in a few words; "" where it has some or is never given any."""
        if name in self.bounds or name not in self.too_few_units:
            return ""
        number = self.too_few_units[name]
        return f"too few {self.unit}s ({number})"


def bootstrap_intervals(records: RecordTable, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0) -> Intervals:
    """Draws units with replacement and takes the percentiles of each metric (Efron and Tibshirani, 1993, ch. 13).

    A metric for which fewer than :data:`MIN_UNITS` units count (labelled, judged, with the modality) gets none.

    Args:
        records: the split.
        num_resamples: draws.
        seed: of the draws.
    """
    unit, unit_of_record = resampling_units(records.user_ids)
    num_units = int(unit_of_record.max(initial=-1)) + 1
    measure, generator = WeightedMetrics(records), np.random.default_rng(seed)
    names = measure(np.ones(len(unit_of_record)))
    counted = {name: len(np.unique(unit_of_record[measure.is_counted(name)])) for name in names}
    too_few = {name: number for name, number in counted.items() if number < MIN_UNITS}
    if len(too_few) == len(names):
        return Intervals(unit, num_units, {}, {}, too_few)
    found = []
    for _ in range(num_resamples):
        drawn = np.bincount(generator.integers(0, num_units, num_units), minlength=num_units)
        found.append(measure(drawn[unit_of_record].astype(np.float64)))
    bounds, num_undefined = {}, {}
    for name in (name for name in names if name not in too_few):
        values = np.array([figures[name] for figures in found])
        defined = values[np.isfinite(values)]
        if len(defined):
            low, high = np.percentile(defined, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
            bounds[name] = (float(low), float(high))
        if len(defined) < num_resamples:
            num_undefined[name] = num_resamples - len(defined)
    return Intervals(unit, num_units, bounds, num_undefined, too_few)


def resampling_units(user_ids: list[str | None]) -> tuple[str, Int[np.ndarray, "records"]]:
    """What to draw: users when every record names one and some user has several records, else records.

    Returns:
        "user" or "record", and ``[records]`` the unit of each record, from 0.

    Example:
        >>> resampling_units(["anna", "ben", "anna"])
        ('user', array([0, 1, 0]))
        >>> resampling_units(["anna", None, "anna"])
        ('record', array([0, 1, 2]))
    """
    if all(user is not None for user in user_ids):
        users, unit_of_record = np.unique(np.array(user_ids, dtype=str), return_inverse=True)
        if len(users) < len(user_ids):
            return "user", unit_of_record
    return "record", np.arange(len(user_ids))


class WeightedMetrics:
    """The metrics of a split as a function of how often each record counts.

    Besides those of the evaluation: ``<task>/ece``, for several classes at once ``emotion/ece/<class>``.
    """

    def __init__(self, records: RecordTable):
        self._records = records
        self._tasks = {"emotion": records.emotion} | ({"intent": records.intent} if records.intent else {})

    def __call__(self, weights: Float[np.ndarray, "records"]) -> dict[str, float]:
        """Floats by name, NaN where nothing was counted; the evaluation's losses are not among them."""
        records = self._records
        metrics: dict[str, Metric] = {}
        ece: dict[str, float] = {}
        for place, name in enumerate(MODALITIES):
            alpha = {name: records.alpha[:, place]}
            metrics[f"alpha/{name}"] = _means(alpha, weights * records.has_modality[:, place])
        for task, part in self._tasks.items():
            metrics |= _task_metrics(task, part, weights)
            ece |= _calibration_errors(task, part, weights)
        if records.intent is not None and records.emotion.kind == "softmax":
            metrics |= _joint_metrics(records.emotion, records.intent, weights)
        if records.ranking:
            metrics["ranking/catalogue"] = _means(records.ranking, weights * records.is_judged)
        return {**compute_all(metrics), **ece}

    def is_counted(self, name: str) -> Bool[np.ndarray, "records"]:
        """Which records the metric of this name is measured on."""
        records, (group, _, rest) = self._records, name.partition("/")
        if group == "alpha":
            return records.has_modality[:, MODALITIES.index(rest)]
        if group == "ranking":
            return records.is_judged
        if group == "joint" and records.intent is not None:
            return records.emotion.is_labelled & records.intent.is_labelled
        if group in self._tasks:
            return self._tasks[group].is_labelled
        # A mean over tasks: what the scarcest is measured on.
        return min((part.is_labelled for part in self._tasks.values()), key=np.count_nonzero)


def _means(values: dict[str, Any], weights: np.ndarray) -> Means:
    # What a record holds that is not counted may be anything: it must not meet the sum even as 0 * NaN.
    counted = weights > 0
    totals = {name: np.dot(weights[counted], value[counted].astype(np.float64)) for name, value in values.items()}
    return Means(totals=totals, count=weights.sum())


def _confusion(label: np.ndarray, choice: np.ndarray, num_classes: int, weights: np.ndarray) -> ConfusionMatrix:
    cells = label.astype(np.int64) * num_classes + choice
    counts = np.bincount(cells, weights=weights, minlength=num_classes**2)
    return ConfusionMatrix(counts=counts.reshape(num_classes, num_classes))


def _task_metrics(task: str, part: TaskRecords, weights: np.ndarray) -> dict[str, Metric]:
    weights = weights * part.is_labelled
    if part.choice is None or part.cross_entropy is None:
        return {f"{task}/sentiment": _sentiment(part.answer, part.label, weights)}
    cross_entropy = _means({"cross_entropy": part.cross_entropy}, weights)
    if part.kind == "softmax":
        confusion: Metric = _confusion(part.label, part.choice, len(part.class_names), weights)
    else:
        confusion = _multi_label_confusion(part, part.choice, weights)
    return {f"{task}/confusion": confusion, f"{task}/cross_entropy": cross_entropy}


def _joint_metrics(emotion: TaskRecords, intent: TaskRecords, weights: np.ndarray) -> dict[str, Metric]:
    if emotion.choice is None or intent.choice is None or emotion.cross_entropy is None or intent.cross_entropy is None:
        return {}
    weights = weights * emotion.is_labelled * intent.is_labelled
    num_intents = len(intent.class_names)
    label = emotion.label.astype(np.int64) * num_intents + intent.label
    choice = emotion.choice.astype(np.int64) * num_intents + intent.choice
    return {
        "joint/confusion": _confusion(label, choice, len(emotion.class_names) * num_intents, weights),
        "joint/cross_entropy": _means({"cross_entropy": emotion.cross_entropy + intent.cross_entropy}, weights),
    }


def _multi_label_confusion(part: TaskRecords, choice: np.ndarray, weights: np.ndarray) -> MultiLabelConfusion:
    is_present = part.label > 0.5
    num_classes = len(part.class_names)
    cells = 4 * np.arange(num_classes) + 2 * is_present + choice
    counts = np.bincount(cells.reshape(-1), weights=np.repeat(weights, num_classes), minlength=4 * num_classes)
    num_exact = np.dot(weights, (is_present == choice).all(axis=1))
    return MultiLabelConfusion(
        counts=counts.reshape(num_classes, 2, 2), num_exact=num_exact, class_names=part.class_names
    )


def _sentiment(predictions: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> Sentiment:
    pairs = np.stack([predictions, labels], axis=1)

    def binarize(is_positive: np.ndarray, is_label_positive: np.ndarray, counted: np.ndarray) -> ConfusionMatrix:
        return _confusion(is_label_positive, is_positive, 2, counted)

    def count_right(limit: float) -> float:
        rounded = np.round(np.clip(pairs, -limit, limit))
        return float(np.dot(weights, rounded[:, 0] == rounded[:, 1]))

    count = weights.sum()
    # Equal weights for nothing: the moments of no record are those of any, and are divided by 0 later.
    shares = weights / count if count else weights
    means = shares @ pairs.astype(np.float64)
    deviations = pairs - means
    return Sentiment(
        has0=binarize(predictions >= 0, labels >= 0, weights),
        non0=binarize(predictions > 0, labels > 0, weights * (labels != 0)),
        num_right7=count_right(3.0),
        num_right5=count_right(2.0),
        absolute_error=np.dot(weights, np.abs(pairs[:, 0] - pairs[:, 1]).astype(np.float64)),
        count=count,
        means=means,
        comoments=(deviations * weights[:, None]).T @ deviations,
    )


def _calibration_errors(task: str, part: TaskRecords, weights: np.ndarray) -> dict[str, float]:
    return {
        f"{task}/ece{'/' + name if name else ''}": reliability(probability, is_hit, weights[part.is_labelled]).ece
        for name, (probability, is_hit) in calibration_events(part).items()
    }


def calibration_events(part: TaskRecords) -> dict[str, tuple[Float[np.ndarray, "labelled"], np.ndarray]]:
    """Probabilities of the labelled records and whether what they promise happened.

    Returns:
        For one class of several, under "": the top class's probability, and whether that class is right. For several at
        once, by class: its probability, and whether it is present. {} for a regression.
    """
    if part.choice is None:
        return {}
    answer, label, choice = part.answer[part.is_labelled], part.label[part.is_labelled], part.choice[part.is_labelled]
    if part.kind == "softmax":
        top = np.take_along_axis(answer, choice[:, None].astype(np.int64), axis=1)[:, 0]
        return {"": (top, choice == label)}
    return {name: (answer[:, place], label[:, place] > 0.5) for place, name in enumerate(part.class_names)}
