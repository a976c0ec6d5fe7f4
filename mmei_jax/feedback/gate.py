"""The gate before deployment: a policy is promoted when the current one's log shows that it is better, never before."""

from dataclasses import dataclass, replace

import numpy as np

from mmei_jax.config_values import require
from mmei_jax.feedback.estimators import ESTIMATORS, MODEL_BASED, LoggedDecisions, Overlap, estimate, overlap


@dataclass(frozen=True)
class GateConfig:
    """What a candidate must show.

    Attributes:
        estimator: of :data:`~mmei_jax.feedback.estimators.ESTIMATORS`.
        largest_weight: of the estimators that clip.
        confidence: of the one-sided bound that the gain must be above 0 with.
        least_gain: by which the bound must exceed 0, in rewards.
        least_effective_share: of the decisions, the effective sample size must be at least this share.
        mean_weight_range: within which the mean importance weight must lie; it is 1 in expectation.
        num_draws: of the bootstrap.
        seed: of the bootstrap.
    """

    estimator: str = "dr"
    largest_weight: float = 10.0
    confidence: float = 0.95
    least_gain: float = 0.0
    least_effective_share: float = 0.05
    mean_weight_range: tuple[float, float] = (0.9, 1.1)
    num_draws: int = 1_000
    seed: int = 0

    def __post_init__(self) -> None:
        low, high = self.mean_weight_range
        for key, is_good, accepted in (
            ("estimator", self.estimator in ESTIMATORS, f"one of {', '.join(ESTIMATORS)}"),
            ("confidence", 0.5 <= self.confidence < 1.0, "at least 0.5 and below 1"),
            ("least_effective_share", 0.0 <= self.least_effective_share <= 1.0, "from 0 to 1"),
            ("mean_weight_range", 0.0 <= low <= 1.0 <= high, "a range around 1"),
            ("largest_weight", self.largest_weight > 0.0, "above 0"),
            ("least_gain", bool(np.isfinite(self.least_gain)), "a finite number"),
            ("num_draws", self.num_draws >= 1, "at least 1"),
            ("seed", self.seed >= 0, "at least 0"),
        ):
            require(is_good, f"gate.{key}", getattr(self, key), accepted)


@dataclass(frozen=True)
class Verdict:
    """What the gate says.

    Attributes:
        is_promoted: whether the candidate replaces the current policy.
        reason: one line.
        gain: the candidate's estimated mean reward less the current policy's.
        low: the lower bound of the gain; NaN where the estimate is undefined in every bootstrap draw.
        current: the current policy's mean reward on its log.
        overlap: how well the log covers the candidate.
    """

    is_promoted: bool
    reason: str
    gain: float
    low: float
    current: float
    overlap: Overlap


def judge(candidate: LoggedDecisions, config: GateConfig) -> Verdict:
    """Judges a candidate on the current policy's log.

    The two values are of the same bootstrap draws, so that what both share does not blur their difference.

    Args:
        candidate: the log, with the candidate's probabilities as the target.
        config: see :class:`GateConfig`.

    Raises:
        InputError: the estimator reads a reward model that is not there.
    """
    has_rewards = config.estimator not in MODEL_BASED or candidate.predicted_rewards is not None
    require(has_rewards, "gate.estimator", config.estimator, "predicted rewards of the reward model that it reads")
    found = overlap(candidate)
    options = {"num_draws": config.num_draws, "seed": config.seed}
    theirs = estimate(candidate, [config.estimator], largest_weight=config.largest_weight, **options)[config.estimator]
    on_policy = replace(candidate, target_probabilities=candidate.propensities)
    current = estimate(on_policy, ["ips"], **options)["ips"]
    gain = theirs.value - current.value
    differences = (theirs.draws - current.draws)[np.isfinite(theirs.draws)]
    low = float(np.quantile(differences, 1.0 - config.confidence)) if len(differences) else float("nan")
    share = found.effective_sample_size / found.num_decisions
    least, most = config.mean_weight_range
    if share < config.least_effective_share:
        reason = f"refused: the log is worth {share:.1%} of its decisions, at least {config.least_effective_share:.1%}"
    elif not least <= found.mean_weight <= most:
        reason = f"refused: mean weight {found.mean_weight:.3f}, expected from {least} to {most}"
    elif np.isnan(low):
        reason = f"refused: no bound of the gain: {config.estimator} is undefined in every draw of the bootstrap"
    elif not low > config.least_gain:
        reason = f"refused: gain {gain:+.4f}, with {config.confidence:.0%} confidence above {low:+.4f}: not beyond"
        reason += f" {config.least_gain:g}"
    else:
        reason = f"promoted: gain {gain:+.4f}, with {config.confidence:.0%} confidence above {low:+.4f}"
        return Verdict(True, reason, gain, low, current.value, found)
    return Verdict(False, reason, gain, low, current.value, found)
