"""Off-policy evaluation: what a policy would have earned, from decisions that another one made and logged.

Everything here is of single decisions: a context, the action that the logging policy chose with a known probability
(its propensity), and the reward that followed. A slate is as many decisions as it has positions, and ``units`` says
which of them belong together. Estimators are sums over decisions, divided once, so that a bootstrap over units takes a
matrix product.

References:
    Dudík et al., "Doubly robust policy evaluation and optimization", Statistical Science 2014 (DM, IPS, DR).
    Swaminathan and Joachims, "The self-normalized estimator for counterfactual learning", NeurIPS 2015 (SNIPS).
    Wang et al., "Optimal and adaptive off-policy evaluation in contextual bandits", ICML 2017 (SWITCH-DR).
    Saito et al., "Open Bandit Dataset and Pipeline", NeurIPS 2021: ``obp`` 0.4.1, whose numbers these functions
    give (it clips no weights).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from mmei_jax.feedback.rows import refuse_rows
from mmei_jax.types import InputError

ESTIMATORS = ("dm", "ips", "clipped_ips", "snips", "dr", "sndr", "switch_dr")
# Estimators that read a reward model.
MODEL_BASED = ("dm", "dr", "sndr", "switch_dr")


@dataclass(frozen=True)
class LoggedDecisions:
    """Decisions of a logging policy, and what a new policy makes of them.

    Attributes:
        rewards: ``[decisions]`` finite.
        propensities: ``[decisions]`` in (0, 1], of the logged action under the logging policy.
        target_probabilities: ``[decisions]`` in [0, 1], of the logged action under the new policy.
        units: ``[decisions]`` int, what is drawn anew together (a session, a user); None: each decision alone.
        predicted_rewards: ``[decisions]``, a reward model's answer for the logged action; None without a model.
        predicted_values: ``[decisions]``, its mean over the actions of the new policy; None without a model.

    Raises:
        InputError: lengths differ, or a value is not allowed; names the rows.
    """

    # "_": lengths are the users' to get wrong, and then told in one line.
    rewards: Float[np.ndarray, "_"]
    propensities: Float[np.ndarray, "_"]
    target_probabilities: Float[np.ndarray, "_"]
    units: Int[np.ndarray, "_"] | None = None
    predicted_rewards: Float[np.ndarray, "_"] | None = None
    predicted_values: Float[np.ndarray, "_"] | None = None

    def __post_init__(self) -> None:
        columns = {name: value for name, value in vars(self).items() if value is not None}
        lengths = {name: len(value) for name, value in columns.items()}
        if len(set(lengths.values())) != 1 or not len(self.rewards):
            raise InputError(f"logged decisions of lengths {lengths}: expected the same for all, at least 1")
        if (self.predicted_rewards is None) != (self.predicted_values is None):
            raise InputError("logged decisions: expected predicted_rewards and predicted_values, or neither")
        for name, value in columns.items():
            refuse_rows(np.isfinite(value), name, value.__getitem__, "a finite number")
        positive = (self.propensities > 0.0) & (self.propensities <= 1.0)
        refuse_rows(positive, "propensities", self.propensities.__getitem__, "above 0 and at most 1")
        probable = (self.target_probabilities >= 0.0) & (self.target_probabilities <= 1.0)
        refuse_rows(probable, "target_probabilities", self.target_probabilities.__getitem__, "from 0 to 1")

    @property
    def weights(self) -> Float[np.ndarray, "decisions"]:
        """Importance weights, ``target / propensity``; their expectation is 1 where the logging policy has overlap."""
        return self.target_probabilities / self.propensities


@dataclass(frozen=True)
class Overlap:
    """How well the logging policy's decisions cover the new policy's.

    Attributes:
        num_decisions: logged.
        mean_weight: 1 in expectation; another value says that propensities are wrong, or that the logging policy never
            takes actions that the new one takes.
        largest_weight: of one decision.
        effective_sample_size: Kish's, ``(sum w)^2 / sum w^2``: decisions of the new policy itself that would tell as
            much.
        share_without_support: share of the decisions that the new policy would never make.
    """

    num_decisions: int
    mean_weight: float
    largest_weight: float
    effective_sample_size: float
    share_without_support: float


def overlap(logged: LoggedDecisions) -> Overlap:
    """Diagnostics of the importance weights.

    Example:
        >>> half = np.array([0.5, 0.5])
        >>> overlap(LoggedDecisions(np.zeros(2), half, np.array([1.0, 0.0]))).effective_sample_size
        1.0
    """
    weights = logged.weights
    squares = float((weights**2).sum())
    return Overlap(
        num_decisions=len(weights),
        mean_weight=float(weights.mean()),
        largest_weight=float(weights.max()),
        effective_sample_size=float(weights.sum() ** 2 / squares) if squares else 0.0,
        share_without_support=float((weights == 0.0).mean()),
    )


@dataclass(frozen=True)
class Estimate:
    """The mean reward of a decision under the new policy.

    Attributes:
        value: the estimate; NaN for a self-normalised one all of whose weights are 0.
        low, high: bounds of its bootstrap interval.
        draws: ``[draws]`` the estimate of each bootstrap draw.
    """

    value: float
    low: float
    high: float
    draws: Float[np.ndarray, "draws"]


def estimate(
    logged: LoggedDecisions,
    estimators: Sequence[str] | None = None,
    *,
    largest_weight: float = 10.0,
    num_draws: int = 1_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Several estimators with percentile intervals of one bootstrap over units, whose draws all of them share.

    Args:
        logged: the decisions.
        estimators: some of :data:`ESTIMATORS`; None takes all that the decisions allow.
        largest_weight: weights above it are clipped to it ("clipped_ips"), or give way to the model ("switch_dr").
        num_draws: of the bootstrap.
        confidence: of the intervals.
        seed: of the draws.

    Raises:
        InputError: an estimator is unknown, or reads a reward model that is not there.
    """
    has_model = logged.predicted_rewards is not None
    names = [name for name in ESTIMATORS if has_model or name not in MODEL_BASED] if estimators is None else estimators
    parts = []
    for name in names:
        if name not in ESTIMATORS:
            raise InputError(f"estimator {name!r}: expected one of {', '.join(ESTIMATORS)}")
        if name in MODEL_BASED and not has_model:
            raise InputError(
                f"estimator {name!r} reads a reward model: expected predicted_rewards and predicted_values"
            )
        parts.append(_terms(name, logged, largest_weight))
    # [decisions, 3 * estimators]: what each decision adds to offset, numerator and denominator.
    terms = np.stack([column for part in parts for column in part], axis=1)
    count = len(logged.rewards)
    if logged.units is None:
        sums, sizes = terms, np.ones(count)
    else:
        _, place = np.unique(logged.units, return_inverse=True)
        sums = np.stack([np.bincount(place, column) for column in terms.T], axis=1)
        sizes = np.bincount(place).astype(np.float64)
    generator, num_units = np.random.default_rng(seed), len(sums)
    draws = np.empty((num_draws, len(names)))
    for index in range(num_draws):
        times = np.bincount(generator.integers(0, num_units, num_units), minlength=num_units)
        draws[index] = _divide(times @ sums, float(times @ sizes))
    values = _divide(sums.sum(axis=0), float(count))
    tail = (1.0 - confidence) / 2.0
    found = {}
    for column, name in enumerate(names):
        known = draws[np.isfinite(draws[:, column]), column]
        low, high = np.quantile(known, [tail, 1.0 - tail]) if len(known) else (np.nan, np.nan)
        found[name] = Estimate(float(values[column]), float(low), float(high), draws[:, column])
    return found


def _terms(name: str, logged: LoggedDecisions, largest_weight: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What each decision adds; the estimate is ``mean(offset) + sum(numerator) / sum(denominator)``."""
    weights, rewards = logged.weights, logged.rewards.astype(np.float64)
    ones, zeros = np.ones(len(weights)), np.zeros(len(weights))
    if name == "ips":
        return zeros, weights * rewards, ones
    if name == "clipped_ips":
        return zeros, np.minimum(weights, largest_weight) * rewards, ones
    if name == "snips":
        return zeros, weights * rewards, weights
    values, rest = _model(logged)
    if name == "dm":
        return values, zeros, ones
    if name == "dr":
        return values, weights * rest, ones
    if name == "sndr":
        return values, weights * rest, weights
    return values, np.where(weights <= largest_weight, weights, 0.0) * rest, ones


def _model(logged: LoggedDecisions) -> tuple[np.ndarray, np.ndarray]:
    """The model's values, and what it leaves of the rewards."""
    if logged.predicted_rewards is None or logged.predicted_values is None:
        raise ValueError("no reward model")
    return logged.predicted_values.astype(np.float64), logged.rewards - logged.predicted_rewards.astype(np.float64)


def _divide(sums: np.ndarray, count: float) -> np.ndarray:
    offset, numerator, denominator = sums.reshape(-1, 3).T
    with np.errstate(divide="ignore", invalid="ignore"):
        result: np.ndarray = offset / count + numerator / denominator
    return result
