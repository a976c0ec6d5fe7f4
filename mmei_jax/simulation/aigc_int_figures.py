"""Sums over records from which accuracy, macro averages, cross-entropy, calibration and rank metrics follow.

Written for the exact ceilings of the simulation, in float64 NumPy; what a trained model reaches is measured elsewhere.
"""

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Int

RANKING_CUTOFF = 10
NUM_CALIBRATION_BINS = 20


@dataclass
class ClassificationTotals:
    """Sums over records from which every figure follows; parts add up in any order.

    Attributes:
        confusion: ``[classes, classes]`` int64, true class by predicted class.
        cross_entropy: sum of -log p(true class), nats.

    Example:
        >>> totals = ClassificationTotals.empty(2)
        >>> totals.add(np.log([[0.5, 0.5], [0.75, 0.25]]), np.array([0, 1]))
        >>> totals.figures()["accuracy"], round(totals.figures()["cross_entropy"], 4)
        (0.5, 1.0397)
    """

    confusion: Int[np.ndarray, "classes classes"]
    cross_entropy: float = 0.0

    @classmethod
    def empty(cls, num_classes: int) -> "ClassificationTotals":
        """Of no records."""
        return cls(np.zeros((num_classes, num_classes), np.int64))

    def add(self, log_probabilities: Float[np.ndarray, "batch classes"], true_class: Int[np.ndarray, "batch"]) -> None:
        """Counts records in."""
        num_classes = len(self.confusion)
        pairs = true_class * num_classes + log_probabilities.argmax(axis=1)
        self.confusion += np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)
        self.cross_entropy -= float(log_probabilities[np.arange(len(true_class)), true_class].sum())

    def figures(self) -> dict[str, float]:
        """Accuracy, macro precision and recall (in [0, 1]) and cross-entropy (nats); empty for no records."""
        num_records = int(self.confusion.sum())
        if num_records == 0:
            return {}
        right = np.diag(self.confusion)
        num_true, num_predicted = self.confusion.sum(axis=1), self.confusion.sum(axis=0)
        occurs = (num_true + num_predicted) > 0
        return {
            "accuracy": float(right.sum() / num_records),
            "macro_precision": float((right / np.maximum(num_predicted, 1))[occurs].mean()),
            "macro_recall": float((right / np.maximum(num_true, 1))[occurs].mean()),
            "cross_entropy": self.cross_entropy / num_records,
        }


@dataclass
class CalibrationTotals:
    """How often the most probable class is right, by how probable it was said to be, in equal bins of probability.

    Example:
        >>> totals = CalibrationTotals()
        >>> totals.add(np.log([[0.75, 0.25], [0.75, 0.25]]), np.array([0, 1]))
        >>> totals.expected_calibration_error()
        0.25
    """

    num_records: Int[np.ndarray, "bins"] = field(default_factory=lambda: np.zeros(NUM_CALIBRATION_BINS, np.int64))
    num_right: Int[np.ndarray, "bins"] = field(default_factory=lambda: np.zeros(NUM_CALIBRATION_BINS, np.int64))
    confidence: Float[np.ndarray, "bins"] = field(default_factory=lambda: np.zeros(NUM_CALIBRATION_BINS))

    def add(self, log_probabilities: Float[np.ndarray, "batch classes"], true_class: Int[np.ndarray, "batch"]) -> None:
        """Counts records in."""
        confidence = np.exp(log_probabilities.max(axis=1))
        bins = np.minimum((confidence * NUM_CALIBRATION_BINS).astype(int), NUM_CALIBRATION_BINS - 1)
        is_right = log_probabilities.argmax(axis=1) == true_class
        self.num_records += np.bincount(bins, minlength=NUM_CALIBRATION_BINS)
        self.num_right += np.bincount(bins[is_right], minlength=NUM_CALIBRATION_BINS)
        self.confidence += np.bincount(bins, weights=confidence, minlength=NUM_CALIBRATION_BINS)

    def expected_calibration_error(self) -> float:
        """Mean over records of |share right - mean confidence| of their bin (Naeini et al., 2015); in [0, 1]."""
        return float(np.abs(self.num_right - self.confidence).sum() / max(int(self.num_records.sum()), 1))


@dataclass
class RankingTotals:
    """Sums over records of the rank metrics of the whole catalogue.

    Example:
        >>> totals = RankingTotals()
        >>> totals.add(np.array([[0, 3], [1, 20]]))
        >>> {name: round(value, 4) for name, value in totals.figures().items()}
        {'map': 0.5238, 'ndcg@10': 0.6319, 'hr@10': 1.0}
    """

    average_precision: float = 0.0
    ndcg: float = 0.0
    hit: float = 0.0
    num_records: int = 0

    def add(self, ranks: Int[np.ndarray, "batch relevant"]) -> None:
        """Counts in records whose relevant items were ranked at ``ranks`` (0 is best, in rising order)."""
        counts = np.arange(1, ranks.shape[1] + 1)
        ideal = (1.0 / np.log2(np.arange(min(RANKING_CUTOFF, ranks.shape[1])) + 2.0)).sum()
        gains = np.where(ranks < RANKING_CUTOFF, 1.0 / np.log2(ranks + 2.0), 0.0)
        self.average_precision += float((counts / (ranks + 1.0)).mean(axis=1).sum())
        self.ndcg += float(gains.sum() / ideal)
        self.hit += float((ranks[:, 0] < RANKING_CUTOFF).sum())
        self.num_records += len(ranks)

    def figures(self) -> dict[str, float]:
        """MAP, NDCG@10 (binary gains) and HR@10 (any relevant item among the first ten); empty for no records."""
        if self.num_records == 0:
            return {}
        sums = {"map": self.average_precision, f"ndcg@{RANKING_CUTOFF}": self.ndcg, f"hr@{RANKING_CUTOFF}": self.hit}
        return {name: value / self.num_records for name, value in sums.items()}


def relevant_ranks(
    scores: Float[np.ndarray, "batch items"], relevant: Int[np.ndarray, "batch relevant"]
) -> Int[np.ndarray, "batch relevant"]:
    """Ranks (0 is best) of the relevant items when items are ranked by score, in rising order; ties count as lost.

    Example:
        >>> relevant_ranks(np.array([[0.1, 0.9, 0.5, 0.5]]), np.array([[1, 2]])).tolist()
        [[0, 2]]
    """
    ordered = np.sort(scores, axis=1)
    wanted = np.take_along_axis(scores, relevant, axis=1)
    not_above = [np.searchsorted(row, values, side="left") for row, values in zip(ordered, wanted, strict=True)]
    return np.sort(scores.shape[1] - 1 - np.array(not_above), axis=1)
