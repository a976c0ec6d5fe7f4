"""The difference of two rows, seed by seed, with an interval for training again from other seeds."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from mmei_jax.reports.resampling import LEVEL


@dataclass(frozen=True)
class SeedDifference:
    """A mean difference over the seeds that two rows have in common.

    Attributes:
        value: the mean; NaN without a seed in common.
        low: bound of the 95 % interval; NaN with fewer than two seeds in common.
        high: the other bound.
        num_seeds: seeds in common.
    """

    value: float
    low: float
    high: float
    num_seeds: int


def difference_over_seeds(ours: Mapping[int, float], other: Mapping[int, float]) -> SeedDifference:
    """One row minus another: the mean over seeds, with the interval of a paired t test (Student, 1908).

    Rows of one seed read the records in the same order. The differences are taken to be normal; the interval is of what
    other seeds would show on these records, which says nothing of other records.

    Args:
        ours: a metric by seed; a seed for which either row has no finite number does not count.
        other: the same metric of the row to compare with.

    Example:
        >>> difference_over_seeds({0: 0.5, 1: 0.7, 2: 0.9}, {0: 0.4, 1: 0.7, 2: 0.7, 3: 0.1})
        SeedDifference(value=0.100, low=-0.148, high=0.348, num_seeds=3)
    """
    pairs = np.array([ours[seed] - other[seed] for seed in ours if seed in other], float)
    differences = pairs[np.isfinite(pairs)]
    count = len(differences)
    mean = float(differences.mean()) if count else math.nan
    if count < 2:
        return SeedDifference(mean, math.nan, math.nan, count)
    half = float(stdtrit(count - 1, 0.5 * (1.0 + LEVEL)) * differences.std(ddof=1)) / math.sqrt(count)
    return SeedDifference(mean, mean - half, mean + half, count)
