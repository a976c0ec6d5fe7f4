"""Means over seeds of many rows, with the same records drawn anew for all of them: differences and ratios follow."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from mmei_jax.reports.record_table import RecordTable
from mmei_jax.reports.resampling import LEVEL, WeightedMetrics, resampling_units
from mmei_jax.types import InputError

# A value with the bounds of its interval.
Bounded = tuple[float, float, float]


@dataclass(frozen=True)
class ResampledMeans:
    """The metrics of one row, each the mean over its seeds.

    Attributes:
        metrics: names.
        whole: ``[metrics]`` of the split itself; NaN where undefined.
        draws: ``[resamples, metrics]`` of the resamples, in the order that all rows share.
    """

    metrics: tuple[str, ...]
    whole: Float[np.ndarray, "metrics"]
    draws: Float[np.ndarray, "resamples metrics"]

    def value(self, metric: str) -> Bounded:
        """The metric with its interval."""
        place = self.metrics.index(metric)
        return _bounded(self.whole[place], self.draws[:, place])

    def difference(self, other: "ResampledMeans", metric: str) -> Bounded:
        """This row minus another, with its interval."""
        place = self.metrics.index(metric)
        return _bounded(self.whole[place] - other.whole[place], self.draws[:, place] - other.draws[:, place])

    def relative_change(self, other: "ResampledMeans", metric: str) -> Bounded:
        """This row over another, minus 1, with its interval."""
        place = self.metrics.index(metric)
        with np.errstate(divide="ignore", invalid="ignore"):
            whole, draws = self.whole[place] / other.whole[place], self.draws[:, place] / other.draws[:, place]
        return _bounded(whole - 1.0, draws - 1.0)


def resample_rows(
    rows: Mapping[str, Sequence[RecordTable]], metrics: Sequence[str], *, num_resamples: int, seed: int = 0
) -> dict[str, ResampledMeans]:
    """A paired bootstrap (Efron and Tibshirani, 1993) over rows that were evaluated on the same records.

    Records (or users, see :func:`~mmei_jax.reports.resampling.resampling_units`) are drawn with replacement, the same
    for every row and seed. So the intervals are those of other records with these trained models; how much the seeds
    differ is told by their standard deviation.

    Args:
        rows: by name, each seed's predictions.
        metrics: names, as :class:`~mmei_jax.reports.resampling.WeightedMetrics` gives them.
        num_resamples: draws.
        seed: of the draws.

    Raises:
        InputError: the rows were evaluated on other records, or in another order.
    """
    _check_records(rows)
    _, unit_of_record = resampling_units(next(iter(rows.values()))[0].user_ids)
    num_units = int(unit_of_record.max(initial=-1)) + 1
    generator = np.random.default_rng(seed)
    weights = [np.ones(len(unit_of_record))]
    for _ in range(num_resamples):
        times = np.bincount(generator.integers(0, num_units, num_units), minlength=num_units)
        weights.append(times[unit_of_record].astype(np.float64))
    found = {}
    for name, parts in rows.items():
        means = np.zeros((len(weights), len(metrics)))
        for part in parts:
            measure = WeightedMetrics(part)
            for place, drawn in enumerate(weights):
                figures = measure(drawn)
                means[place] += [figures.get(metric, np.nan) for metric in metrics]
        means /= len(parts)
        found[name] = ResampledMeans(tuple(metrics), means[0], means[1:])
    return found


def _check_records(rows: Mapping[str, Sequence[RecordTable]]) -> None:
    first_name, first_parts = next(iter(rows.items()))
    first = first_parts[0].ids
    for name, parts in rows.items():
        for part in parts:
            if part.ids != first:
                pairs = enumerate(zip(first, part.ids, strict=False))
                place = next((place for place, (one, other) in pairs if one != other), min(len(first), len(part.ids)))
                raise InputError(
                    f"rows {first_name!r} and {name!r} have other records, first at place {place}: expected data sets "
                    f"of the same records in the same order ({len(first)} and {len(part.ids)} here)"
                )


def _bounded(value: float, draws: Float[np.ndarray, "resamples"]) -> Bounded:
    known = draws[np.isfinite(draws)]
    if not len(known):
        return float(value), float("nan"), float("nan")
    low, high = np.percentile(known, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return float(value), float(low), float(high)
