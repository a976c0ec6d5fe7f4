"""How much a score loses under corruption: the grid of conditions, areas under degradation curves, relative robustness.

A *condition* keeps some modalities, loses a share of their tokens, and adds noise to the rest; the clean condition does
none of it. Of the scores under all conditions follow, for records that are in conflict, for those that are not, and for
all together:

* *constant answer*: the score of always giving the most frequent class (or, for a cross-entropy, the classes'
  shares); what a model scores above it is what it has read in its input.
* *share kept* of a condition: (score - constant) / (clean - constant), where clean is all modalities, nothing lost, no
  noise. 1: nothing was lost. 0: as good as an answer without input. May be negative.
* *area under the degradation curve*: the trapezoid area under the score as a function of one level, divided by the
  range of the levels, so that it is a mean score. This is the relative robustness of MultiBench (Liang et al.,
  "MultiBench: Multiscale Benchmarks for Multimodal Representation Learning", NeurIPS Datasets and Benchmarks 2021),
  without the rescaling to [0, 1] over the methods compared, which changes with them.
* *relative robustness*: (area - constant) / (first score of the curve - constant), the mean share kept along the curve.
  It tells how fast a score falls, whatever its height; MultiBench's tells both in one.
* *effective robustness* against a baseline: the mean of what a curve lies above the baseline's, once the baseline's is
  shifted to begin at the same score (Taori et al., "Measuring Robustness to Natural Distribution Shifts in Image
  Classification", NeurIPS 2020, as MultiBench takes it over; it sums over the levels, this takes the mean).
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from clu.metrics import Metric
from jaxtyping import Float

from mmei_jax.recognition_metrics import ConfusionMatrix, MultiLabelConfusion, Sentiment
from mmei_jax.types import MODALITIES, InputError

# Kinds of records. "all" holds the others, and records of which nothing is known.
ALL, CONFLICT, NO_CONFLICT = "all", "conflict", "no conflict"
# Along which a score may fall: tokens lost without noise, noise without loss, and the surface of both.
AXES = ("missing", "noise", "both")
# Metrics of which areas and shares are told, as far as they are measured; the first of each task is also drawn.
SCORES = (
    *(f"emotion/{name}" for name in ("accuracy", "acc2_has0", "macro_f1", "mae", "cross_entropy")),
    *(f"{task}/{name}" for task in ("intent", "joint") for name in ("accuracy", "macro_f1", "cross_entropy")),
)


@dataclass(frozen=True)
class Grid:
    """Conditions: every non-empty subset of the modalities, times missing rates, times noise levels.

    Attributes:
        modalities: those that the model reads, in the order of :data:`~mmei_jax.types.MODALITIES`.
        missing_rates: rising from 0, at most 1: the probability that a token is lost.
        noise_levels: rising from 0: standard deviation of the added noise, in units of each feature's own.

    Example:
        >>> grid = Grid(modalities=("vision", "text"), missing_rates=(0.0, 0.5), noise_levels=(0.0,))
        >>> grid.subsets, grid.shape
        ((('vision',), ('text',), ('vision', 'text')), (3, 2, 1))
    """

    modalities: tuple[str, ...]
    missing_rates: tuple[float, ...]
    noise_levels: tuple[float, ...]

    def __post_init__(self) -> None:
        """Refuses what is no grid."""
        known = [name for name in MODALITIES if name in self.modalities]
        if not known or list(self.modalities) != known:
            raise InputError(f"modalities = {self.modalities}: expected some of {', '.join(MODALITIES)}, in this order")
        for name, levels, most in (
            ("missing_rates", self.missing_rates, 1.0),
            ("noise_levels", self.noise_levels, 1e6),
        ):
            is_rising = all(low < high for low, high in itertools.pairwise(levels))
            if not (levels and levels[0] == 0.0 and is_rising and levels[-1] <= most):
                given = ", ".join(f"{level:g}" for level in levels)
                raise InputError(f"{name} = {given}: expected numbers that rise from 0 to at most {most:,.0f}")

    @property
    def subsets(self) -> tuple[tuple[str, ...], ...]:
        """Single modalities first, all of them last."""
        sizes = range(1, len(self.modalities) + 1)
        return tuple(part for size in sizes for part in itertools.combinations(self.modalities, size))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of subsets, missing rates and noise levels."""
        return len(self.subsets), len(self.missing_rates), len(self.noise_levels)

    @property
    def clean(self) -> tuple[int, int, int]:
        """Place of the clean condition."""
        return len(self.subsets) - 1, 0, 0


@dataclass(frozen=True)
class Robustness:
    """What one model scores under every condition of a grid.

    Attributes:
        name: of the model; several seeds of one may share it.
        grid: the conditions.
        figures: by kind of records (``all`` first) and metric, ``[subsets, missing_rates, noise_levels]`` float64; NaN
            where nothing was counted. Without ``conflict`` and ``no conflict`` where no record tells.
        constant: by kind of records and metric, the score of a constant answer, where it follows from counts.
        num_records: by kind of records.

    Example:
        >>> grid = Grid(modalities=("text",), missing_rates=(0.0, 1.0), noise_levels=(0.0, 2.0))
        >>> surface = np.array([[[0.9, 0.6], [0.3, 0.3]]])
        >>> found = Robustness("ours", grid, {"all": {"a": surface}}, {"all": {"a": 0.3}}, {"all": 8})
        >>> float(found.share_kept("a")[0, 0, 1]), round(found.area("a", ("text",), "missing"), 3)
        (0.5, 0.6)
        >>> round(found.relative("a", ("text",), "missing"), 3), round(found.relative("a", ("text",), "both"), 3)
        (0.5, 0.375)
    """

    name: str
    grid: Grid
    figures: Mapping[str, Mapping[str, Float[np.ndarray, "subsets missing noise"]]]
    constant: Mapping[str, Mapping[str, float]]
    num_records: Mapping[str, int]

    def has(self, metric: str) -> bool:
        """Whether the model has the metric's task."""
        return metric in self.figures[ALL]

    def share_kept(self, metric: str, part: str = ALL) -> Float[np.ndarray, "subsets missing noise"]:
        """Of every condition, against the clean one; NaN where a constant answer is not defined, or is as good."""
        scores, constant = self.figures[part][metric], self.constant[part].get(metric, float("nan"))
        gain = scores[self.grid.clean] - constant
        return (scores - constant) / (gain if gain else float("nan"))

    def curve(
        self, metric: str, subset: tuple[str, ...], axis: str, part: str = ALL
    ) -> tuple[Float[np.ndarray, "levels"], Float[np.ndarray, "levels"]]:
        """Levels and scores along ``missing`` (without noise) or ``noise`` (nothing missing).

        Raises:
            KeyError: there is no such axis.
        """
        surface = self.figures[part][metric][self.grid.subsets.index(subset)]
        levels = {"missing": self.grid.missing_rates, "noise": self.grid.noise_levels}[axis]
        return np.array(levels), surface[:, 0] if axis == "missing" else surface[0]

    def area(self, metric: str, subset: tuple[str, ...], axis: str, part: str = ALL) -> float:
        """Under the curve along an axis; for ``both``, under the surface of both (trapezoids in turn)."""
        if axis == "both":
            surface = self.figures[part][metric][self.grid.subsets.index(subset)]
            rows = [area_under_curve(np.array(self.grid.noise_levels), row) for row in surface]
            return area_under_curve(np.array(self.grid.missing_rates), np.array(rows))
        return area_under_curve(*self.curve(metric, subset, axis, part))

    def relative(self, metric: str, subset: tuple[str, ...], axis: str, part: str = ALL) -> float:
        """Relative robustness of the curve (or surface) of a subset of the modalities, from that subset's own start."""
        start = float(self.figures[part][metric][self.grid.subsets.index(subset), 0, 0])
        constant = self.constant[part].get(metric, float("nan"))
        return relative_robustness(self.area(metric, subset, axis, part), start, constant)


def scores_of(found: Robustness) -> list[str]:
    """The metrics among :data:`SCORES` that were measured.

    Example:
        >>> grid = Grid(modalities=("text",), missing_rates=(0.0,), noise_levels=(0.0,))
        >>> one = np.ones((1, 1, 1))
        >>> found = Robustness("ours", grid, {"all": {"alpha/text": one, "emotion/mae": one}}, {"all": {}}, {"all": 8})
        >>> scores_of(found)
        ['emotion/mae']
    """
    return [name for name in SCORES if found.has(name)]


def area_under_curve(levels: Float[np.ndarray, "levels"], scores: Float[np.ndarray, "levels"]) -> float:
    """Trapezoid area over the range of the levels; the score itself where there is one level only.

    Args:
        levels: ``[levels]`` rising.
        scores: ``[levels]``.

    Example:
        >>> area_under_curve(np.array([0.0, 1.0, 3.0]), np.array([1.0, 0.5, 0.5]))
        0.583
    """
    if len(levels) == 1:
        return float(scores[0])
    widths = np.diff(levels)
    return float(widths @ (scores[1:] + scores[:-1]) / 2.0 / widths.sum())


def relative_robustness(area: float, start: float, constant: float) -> float:
    """Mean share kept along a curve; NaN where the curve begins at the score of a constant answer.

    Args:
        area: :func:`area_under_curve`, a mean score.
        start: first score of the curve.
        constant: score of a constant answer.

    Example:
        >>> relative_robustness(0.6, 0.9, 0.3)
        0.5
    """
    return (area - constant) / (start - constant) if start != constant else float("nan")


def effective_robustness(
    levels: Float[np.ndarray, "levels"], scores: Float[np.ndarray, "levels"], baseline: Float[np.ndarray, "levels"]
) -> float:
    """Mean of what scores lie above a baseline's, once that begins at the same score.

    Args:
        levels: ``[levels]`` rising.
        scores: ``[levels]``.
        baseline: ``[levels]`` scores of another model.

    Example:
        >>> effective_robustness(np.array([0.0, 1.0]), np.array([0.9, 0.7]), np.array([0.8, 0.5]))
        0.05
    """
    return area_under_curve(levels, scores - baseline - (scores[0] - baseline[0]))


def constant_answer(metrics: Mapping[str, Metric]) -> dict[str, float]:
    """Figures of the best answer that reads nothing: the most frequent class, or the classes' shares.

    Args:
        metrics: what :func:`~mmei_jax.metrics.merge_all` gave; of their counts those of the labels alone matter.

    Returns:
        Figures by name. One class of several: all of its metrics, with the entropy of the labels (nats) as
        cross-entropy. Several at once: accuracy, macro and weighted F1 of each class's more frequent case. Sentiment:
        those of two classes. Others, and whatever nothing was counted for, are left out.

    Example:
        >>> found = constant_answer({"emotion/confusion": ConfusionMatrix(counts=np.array([[3, 1], [4, 0]]))})
        >>> found["emotion/accuracy"], found["emotion/cross_entropy"]
        (0.5, 0.693)
    """
    figures: dict[str, float] = {}
    for key, metric in metrics.items():
        task = key.partition("/")[0]
        found: dict[str, float] = {}
        if isinstance(metric, ConfusionMatrix):
            counts = np.asarray(metric.counts)
            found = ConfusionMatrix(counts=_constant_counts(counts)).compute() | _entropy(counts.sum(axis=1))
        elif isinstance(metric, MultiLabelConfusion):
            constant = np.stack([_constant_counts(counts) for counts in np.asarray(metric.counts)])
            figures_of = MultiLabelConfusion(counts=constant, num_exact=0).compute()
            found = {name: figures_of[name] for name in ("accuracy", "macro_f1", "weighted_f1")}
        elif isinstance(metric, Sentiment):
            for name in ("has0", "non0"):
                counts = np.asarray(getattr(metric, name).counts)
                constant_figures = ConfusionMatrix(counts=_constant_counts(counts)).compute()
                found |= {f"acc2_{name}": constant_figures["accuracy"], f"f1_{name}": constant_figures["weighted_f1"]}
        figures |= {f"{task}/{name}": value for name, value in found.items() if not np.isnan(value)}
    accuracies = [figures[name] for name in ("emotion/accuracy", "intent/accuracy") if name in figures]
    return figures | ({"mean_accuracy": sum(accuracies) / len(accuracies)} if accuracies else {})


def _constant_counts(counts: np.ndarray) -> np.ndarray:
    """The same labels, all answered with the most frequent class (the first of several)."""
    constant = np.zeros_like(counts)
    constant[:, counts.sum(axis=1).argmax()] = counts.sum(axis=1)
    return constant


def _entropy(num_labels: np.ndarray) -> dict[str, Any]:
    total = num_labels.sum()
    if not total:
        return {}
    shares = num_labels[num_labels > 0] / total
    return {"cross_entropy": float(-(shares * np.log(shares)).sum())}
