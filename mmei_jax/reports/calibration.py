"""How far probabilities keep what they promise: reliability in bins of equal width, ECE, and the temperature."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

NUM_BINS = 15
# Standard normal quantile of two-sided 95 %.
_Z95 = 1.959963984540054
# The temperatures among which calibration chooses, evenly on the logarithm.
_TEMPERATURES = np.geomspace(0.1, 10.0, 801)


@dataclass(frozen=True)
class Reliability:
    """Records by how sure the model was; bin b holds probabilities in ``(b / bins, (b + 1) / bins]``, the first 0 too.

    Attributes:
        count: ``[bins]`` records (sum of weights).
        probability_sum: ``[bins]``, sum of the probabilities.
        hit_sum: ``[bins]``, records for which the event happened.
    """

    count: Float[np.ndarray, "bins"]
    probability_sum: Float[np.ndarray, "bins"]
    hit_sum: Float[np.ndarray, "bins"]

    @property
    def ece(self) -> float:
        """Expected calibration error of Guo et al. (ICML 2017, Eq. 3): ``sum_b n_b / n |hits_b - probability_b|``.

        NaN without records.
        """
        total = self.count.sum()
        return float(np.abs(self.hit_sum - self.probability_sum).sum() / total) if total else float("nan")

    @property
    def mean_probability(self) -> Float[np.ndarray, "bins"]:
        """NaN for a bin without records."""
        return _share(self.probability_sum, self.count)

    @property
    def hit_share(self) -> Float[np.ndarray, "bins"]:
        """NaN for a bin without records."""
        return _share(self.hit_sum, self.count)

    def hit_interval(self) -> Float[np.ndarray, "2 bins"]:
        """Wilson's 95 % interval of :attr:`hit_share` (JASA 1927); NaN for a bin without records."""
        share, count = self.hit_share, np.where(self.count > 0, self.count, np.nan)
        centre = (share + _Z95**2 / (2 * count)) / (1 + _Z95**2 / count)
        half = _Z95 / (1 + _Z95**2 / count) * np.sqrt(share * (1 - share) / count + _Z95**2 / (4 * count**2))
        return np.stack([centre - half, centre + half])


def reliability(
    probability: Float[np.ndarray, "records"],
    is_hit: Bool[np.ndarray, "records"],
    weights: Float[np.ndarray, "records"] | None = None,
    *,
    num_bins: int = NUM_BINS,
) -> Reliability:
    """Sorts records into bins.

    Args:
        probability: in [0, 1], given to the event.
        is_hit: whether the event happened.
        weights: how often each record counts; None counts each once.
        num_bins: bins of equal width.

    Example:
        >>> found = reliability(np.array([0.9, 0.9, 0.6, 0.6]), np.array([True, True, True, False]), num_bins=10)
        >>> round(found.ece, 3)
        0.1
    """
    edges = np.linspace(0.0, 1.0, num_bins + 1)
    place = np.searchsorted(edges[1:-1], probability, side="left")
    weights = np.ones(len(probability)) if weights is None else weights

    def total(values: np.ndarray) -> np.ndarray:
        return np.bincount(place, weights=values, minlength=num_bins).astype(np.float64)

    return Reliability(total(weights), total(weights * probability), total(weights * is_hit))


def best_temperature(logits: Float[np.ndarray, "records classes"], label: Int[np.ndarray, "records"]) -> float:
    """The temperature that minimises the mean cross-entropy of ``logits / temperature``, within 0.6 %, in [0.1, 10].

    Args:
        logits: ``[records, classes]`` float.
        label: ``[records]`` class ids.
    """
    logits = logits.astype(np.float64)
    losses = []
    for temperature in _TEMPERATURES:
        scaled = logits / temperature
        shifted = scaled - scaled.max(axis=1, keepdims=True)
        log_total = np.log(np.exp(shifted).sum(axis=1))
        losses.append(np.mean(log_total - np.take_along_axis(shifted, label[:, None], axis=1)[:, 0]))
    return float(_TEMPERATURES[int(np.argmin(losses))])


def _share(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    return np.divide(total, count, out=np.full(len(count), np.nan), where=count > 0)
