"""The gate: what it lets through, and why it refuses the rest."""

import numpy as np
import pytest

from mmei_jax.feedback.estimators import LoggedDecisions
from mmei_jax.feedback.gate import GateConfig, judge
from mmei_jax.types import InputError

LOGGING = np.array([0.4, 0.4, 0.2])
REWARD = np.array([0.2, 0.5, 0.4])
GATE = GateConfig(estimator="snips", num_draws=300)


def log(target, count=4_000, seed=0, **changes):
    """Decisions of the logging policy among three actions; the target's probabilities of them."""
    generator = np.random.default_rng(seed)
    action = generator.choice(3, count, p=LOGGING)
    rewards = (generator.uniform(size=count) < REWARD[action]).astype(float)
    values = {"rewards": rewards, "propensities": LOGGING[action], "target_probabilities": np.array(target)[action]}
    return LoggedDecisions(**{**values, **changes})


def test_better_policy_is_promoted_and_worse_ones_are_refused():
    better = judge(log([0.1, 0.8, 0.1]), GATE)
    assert better.is_promoted
    assert better.low > 0.0
    assert better.gain == pytest.approx(np.dot([0.1, 0.8, 0.1], REWARD) - np.dot(LOGGING, REWARD), abs=0.03)
    assert better.current == pytest.approx(np.dot(LOGGING, REWARD), abs=0.03)
    worse = judge(log([0.8, 0.1, 0.1]), GATE)
    assert not worse.is_promoted
    assert "refused: gain -" in worse.reason
    same = judge(log(LOGGING), GATE)
    assert (same.is_promoted, same.gain, same.low) == (False, 0.0, 0.0)
    # Beyond doubt better, but not by what was asked.
    assert not judge(log([0.1, 0.8, 0.1]), GateConfig(estimator="snips", least_gain=0.2)).is_promoted


def test_promotions_of_a_policy_that_is_no_better_are_rare():
    promoted = [judge(log([0.45, 0.3, 0.25], 400, seed), GATE).is_promoted for seed in range(100)]
    # Its true gain is -0.01: the bound fails in at most 5 % of the logs, here within chance.
    assert np.mean(promoted) <= 0.1


def test_policy_that_the_log_does_not_cover_is_refused():
    thin = log(np.array([0.0, 0.0, 1.0]), 50)
    verdict = judge(thin, GateConfig(estimator="snips", least_effective_share=0.5))
    assert not verdict.is_promoted
    assert "refused: the log is worth" in verdict.reason
    wrong = log([0.1, 0.8, 0.1], propensities=np.full(4_000, 0.9))
    verdict = judge(wrong, GATE)
    assert not verdict.is_promoted
    assert "refused: mean weight 0." in verdict.reason


def test_bound_that_does_not_exist_is_told_as_such():
    """No decision of the log is one that the candidate would make, and the gate does not ask for overlap."""
    open_gate = GateConfig(estimator="snips", num_draws=5, least_effective_share=0.0, mean_weight_range=(0.0, 9.0))
    verdict = judge(log([0.0, 0.0, 0.0], 50), open_gate)
    assert not verdict.is_promoted
    assert np.isnan(verdict.low)
    assert verdict.reason == "refused: no bound of the gain: snips is undefined in every draw of the bootstrap"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"estimator": "guess"}, "gate.estimator = 'guess': expected one of dm, ips"),
        ({"confidence": 0.3}, "gate.confidence = 0.3"),
        ({"least_effective_share": 2.0}, "gate.least_effective_share = 2.0"),
        ({"mean_weight_range": (1.1, 1.2)}, "gate.mean_weight_range"),
        ({"largest_weight": -1.0}, "gate.largest_weight = -1.0: expected above 0"),
        ({"largest_weight": float("nan")}, "gate.largest_weight = nan: expected above 0"),
        ({"least_gain": float("nan")}, "gate.least_gain = nan: expected a finite number"),
        ({"num_draws": 0}, "gate.num_draws = 0: expected at least 1"),
        ({"num_draws": -1}, "gate.num_draws = -1: expected at least 1"),
        ({"seed": -1}, "gate.seed = -1: expected at least 0"),
    ],
)
def test_gates_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        GateConfig(**changes)


def test_gate_that_reads_a_model_wants_one():
    with pytest.raises(InputError, match=r"config.gate.estimator = 'dr': expected predicted rewards"):
        judge(log(LOGGING), GateConfig())
