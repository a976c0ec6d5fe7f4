"""Off-policy estimators: exact where everything is known, obp's elsewhere, and right about real logs."""

import dataclasses
import itertools
import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from mmei_jax.feedback.estimators import (
    ESTIMATORS,
    MODEL_BASED,
    LoggedDecisions,
    estimate,
    overlap,
)
from mmei_jax.types import InputError
from tests import processes

# Two contexts, three actions, in parts that are whole numbers of decisions.
CONTEXT = np.array([0.25, 0.75])
LOGGING = np.array([[0.5, 0.25, 0.25], [0.1, 0.3, 0.6]])
TARGET = np.array([[0.1, 0.2, 0.7], [0.6, 0.3, 0.1]])
REWARD = np.array([[1.0, 0.2, -0.4], [0.0, 2.0, 0.5]])
TRUE_VALUE = float((CONTEXT[:, None] * TARGET * REWARD).sum())
# A reward model that is wrong.
MODEL = np.array([[0.7, 0.3, 0.1], [0.4, 1.1, 0.2]])


def whole_population():
    """Every (context, action) as often as the logging policy makes it: sample means are expectations."""
    rows = []
    for context, action in itertools.product(range(2), range(3)):
        rows += [(context, action)] * round(400 * CONTEXT[context] * LOGGING[context, action])
    return np.array(rows).T


def decisions(context, action, reward=None, **changes):
    values = {
        "rewards": REWARD[context, action] if reward is None else reward,
        "propensities": LOGGING[context, action],
        "target_probabilities": TARGET[context, action],
        "predicted_rewards": MODEL[context, action],
        "predicted_values": (TARGET * MODEL).sum(axis=1)[context],
    }
    return LoggedDecisions(**{**values, **changes})


def values(logged, **options):
    found = estimate(logged, num_draws=2, **options)
    return {name: one.value for name, one in found.items()}


@pytest.mark.parametrize("name", ["ips", "snips", "dr", "sndr"])
def test_unbiased_estimators_give_the_true_value_of_the_whole_population(name):
    logged = decisions(*whole_population())
    assert values(logged)[name] == pytest.approx(TRUE_VALUE, abs=1e-12)
    # Upside down, or left out, the weights give something else.
    context, action = whole_population()
    inverted = decisions(
        context,
        action,
        propensities=TARGET[context, action],
        target_probabilities=LOGGING[context, action],
    )
    assert abs(values(inverted)[name] - TRUE_VALUE) > 0.05
    ones = decisions(context, action, target_probabilities=LOGGING[context, action])
    assert abs(values(ones)[name] - TRUE_VALUE) > 0.05


def test_each_estimator_is_its_formula():
    logged = decisions(*whole_population())
    weights, rest = logged.weights, logged.rewards - logged.predicted_rewards
    baseline = logged.predicted_values.mean()
    found = values(logged, largest_weight=2.0)
    assert (weights > 2.0).any()
    expected = {
        "dm": (CONTEXT[:, None] * TARGET * MODEL).sum(),
        "clipped_ips": (np.minimum(weights, 2.0) * logged.rewards).mean(),
        "switch_dr": baseline + (weights * (weights <= 2.0) * rest).mean(),
        "sndr": baseline + (weights * rest).sum() / weights.sum(),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-12), name
    assert set(found) == set(ESTIMATORS)


def test_a_right_model_makes_the_doubly_robust_estimators_exact_whatever_the_propensities():
    context, action = whole_population()
    wrong = np.full(len(context), 0.2)
    right_model = {
        "predicted_rewards": REWARD[context, action],
        "predicted_values": (TARGET * REWARD).sum(axis=1)[context],
    }
    found = values(decisions(context, action, propensities=wrong, **right_model))
    for name in ("dm", "dr", "sndr", "switch_dr"):
        assert found[name] == pytest.approx(TRUE_VALUE, abs=1e-12), name
    assert abs(found["ips"] - TRUE_VALUE) > 0.05


def test_diagnostics_are_their_formulas():
    context, action = whole_population()
    target = np.where(action == 0, 0.0, TARGET[context, action])
    logged = decisions(context, action, target_probabilities=target)
    found, weights = overlap(logged), target / LOGGING[context, action]
    assert found.mean_weight == pytest.approx(1.0 - (CONTEXT * TARGET[:, 0]).sum())
    assert found.largest_weight == weights.max()
    assert found.effective_sample_size == pytest.approx(weights.sum() ** 2 / (weights**2).sum())
    assert found.share_without_support == pytest.approx((action == 0).mean())
    alike = overlap(decisions(context, action, target_probabilities=LOGGING[context, action]))
    assert alike.effective_sample_size == pytest.approx(len(context))
    nothing = decisions(context, action, target_probabilities=np.zeros(len(context)))
    assert overlap(nothing).effective_sample_size == 0.0
    assert np.isnan(estimate(nothing, ["snips"], num_draws=2)["snips"].value)


def test_units_are_drawn_whole():
    context, action = whole_population()
    units = np.arange(len(context)) // 10 + 3
    logged = decisions(context, action, units=units)
    found = estimate(logged, ["sndr"], num_draws=4, seed=5)["sndr"]
    generator = np.random.default_rng(5)
    for draw in found.draws:
        chosen = 3 + generator.integers(0, 40, 40)
        rows = np.concatenate([np.flatnonzero(units == unit) for unit in chosen])
        again = decisions(context[rows], action[rows])
        assert draw == pytest.approx(values(again)["sndr"], abs=1e-12)
    # Decisions that repeat each other tell nothing new: the interval of units is wider.
    repeated = decisions(*(np.repeat(part[::10], 10) for part in (context, action)))
    alone = estimate(repeated, ["ips"])["ips"]
    together = estimate(dataclasses.replace(repeated, units=np.repeat(np.arange(40), 10)), ["ips"])["ips"]
    assert together.high - together.low > 2 * (alone.high - alone.low)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"propensities": np.array([0.5, 0.0, 0.0])}, r"propensities, row 1, 2: 0.0: expected above 0 and at most 1"),
        ({"propensities": np.array([0.5, 1.5, 1.0])}, r"propensities, row 1: 1.5: expected above 0"),
        ({"propensities": np.array([0.5, np.nan, 1.0])}, r"propensities, row 1: nan: expected a finite number"),
        ({"rewards": np.array([np.nan, 1.0, 1.0])}, r"rewards, row 0: nan: expected a finite number"),
        ({"target_probabilities": np.array([0.0, 1.0, 1.1])}, r"target_probabilities, row 2: 1.1: expected from 0 to"),
        ({"rewards": np.ones(2)}, r"lengths .*'rewards': 2.*expected the same"),
        ({"predicted_values": np.ones(3)}, r"expected predicted_rewards and predicted_values, or neither"),
    ],
)
def test_what_is_not_allowed_is_refused_with_its_rows(changes, message):
    good = {"rewards": np.ones(3), "propensities": np.full(3, 0.5), "target_probabilities": np.full(3, 0.5)}
    with pytest.raises(InputError, match=message):
        LoggedDecisions(**{**good, **changes})


def test_estimators_that_cannot_be_had_are_refused():
    logged = LoggedDecisions(np.ones(3), np.full(3, 0.5), np.full(3, 0.5))
    assert set(estimate(logged, num_draws=2)) == set(ESTIMATORS) - set(MODEL_BASED)
    with pytest.raises(InputError, match="estimator 'dr' reads a reward model"):
        estimate(logged, ["dr"])
    with pytest.raises(InputError, match="estimator 'magic': expected one of dm, ips"):
        estimate(logged, ["magic"])


def sampled(generator, count):
    """Decisions as they fall, with noise in the rewards."""
    context = generator.choice(2, count, p=CONTEXT)
    action = (generator.uniform(size=(count, 1)) > LOGGING[context].cumsum(axis=1)).sum(axis=1)
    return decisions(context, action, REWARD[context, action] + generator.normal(size=count))


@pytest.mark.parametrize("num_replications", [60, pytest.param(400, marks=pytest.mark.slow)])
def test_intervals_of_the_doubly_robust_estimator_cover_the_true_value(num_replications):
    generator = np.random.default_rng(0)
    hits, clipped = [], []
    for _ in range(num_replications):
        found = estimate(sampled(generator, 400), ["dr", "clipped_ips"], largest_weight=1.5, num_draws=400)
        hits.append(found["dr"].low <= TRUE_VALUE <= found["dr"].high)
        clipped.append(found["clipped_ips"].value)
    low, high = (0.90, 0.98) if num_replications >= 200 else (0.85, 1.0)
    assert low <= np.mean(hits) <= high
    # Clipping is biased, and in the direction that its formula says.
    context, action = whole_population()
    logged = decisions(context, action)
    expected = (np.minimum(logged.weights, 1.5) * logged.rewards).mean()
    assert np.mean(clipped) == pytest.approx(expected, abs=4 * np.std(clipped) / num_replications**0.5)
    assert abs(expected - TRUE_VALUE) > 0.03


# Its plots want a library that the estimators do not.
OBP = """
import json
import sys
import types
import numpy as np
sys.modules.setdefault("seaborn", types.ModuleType("seaborn"))
from obp.ope import estimators as theirs
data = np.load(sys.argv[1])
rewards, propensities, target, model = (data[name] for name in ("rewards", "propensities", "target", "model"))
actions, largest = data["actions"], float(data["largest"])
count = len(rewards)
action_dist, predicted = target[:, :, None], model[:, :, None]
common = dict(reward=rewards, action=actions, position=np.zeros(count, int), action_dist=action_dist)
logged = dict(common, pscore=propensities)
both = dict(logged, estimated_rewards_by_reg_model=predicted)
print(json.dumps([float(value) for value in [
    theirs.DirectMethod().estimate_policy_value(
        position=common["position"], action_dist=action_dist, estimated_rewards_by_reg_model=predicted
    ),
    theirs.InverseProbabilityWeighting().estimate_policy_value(**logged),
    theirs.SelfNormalizedInverseProbabilityWeighting().estimate_policy_value(**logged),
    theirs.DoublyRobust().estimate_policy_value(**both),
    theirs.SelfNormalizedDoublyRobust().estimate_policy_value(**both),
    theirs.SwitchDoublyRobust(tau=largest).estimate_policy_value(**both),
]]))
"""


def test_estimates_are_those_of_the_open_bandit_pipeline(tmp_path):
    generator = np.random.default_rng(3)
    context = generator.choice(2, 500, p=CONTEXT)
    action = (generator.uniform(size=(500, 1)) > LOGGING[context].cumsum(axis=1)).sum(axis=1)
    rewards = REWARD[context, action] + generator.normal(size=500)
    path = tmp_path / "decisions.npz"
    np.savez(
        path,
        rewards=rewards,
        actions=action,
        propensities=LOGGING[context, action],
        target=TARGET[context],
        model=MODEL[context],
        largest=2.0,
    )
    done = subprocess.run(
        [sys.executable, "-c", OBP, path], cwd=processes.ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode and "No module named" in done.stderr:
        pytest.skip(f"obp 0.4.1 is not installed (pip install --no-deps obp==0.4.1): {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    expected = json.loads(done.stdout)
    found = values(decisions(context, action, rewards), largest_weight=2.0)
    # It clips no weights.
    for name, value in zip((name for name in ESTIMATORS if name != "clipped_ips"), expected, strict=True):
        assert found[name] == pytest.approx(value, abs=1e-6), name


def read_obd(policy):
    """The rows of one log: item, position, click and propensity."""
    folder = processes.ROOT.parent / "shared" / "data" / "obd" / policy
    if not folder.exists():
        pytest.skip(f"{folder}: no Open Bandit Dataset beside the checkout")
    return pd.read_csv(folder / "men.csv.gz", usecols=["item_id", "position", "click", "propensity_score"])


def mean_clicks(log, cells, target):
    """A reward model by item and position, cross-fitted in five parts: its answers, and its means over the target.

    Args:
        log: of :func:`read_obd`.
        cells: every (position, item), in order.
        target: probability of each cell's item at its position.
    """
    cell, click = (
        cells.get_indexer(pd.MultiIndex.from_frame(log[["position", "item_id"]])),
        log["click"].to_numpy(float),
    )
    place = cells.codes[0]
    part = np.random.default_rng(0).permutation(len(log)) % 5
    predicted, expected = np.empty(len(log)), np.empty(len(log))
    for held_out in range(5):
        rest = part != held_out
        clicks, views = (np.bincount(cell[rest], each[rest], len(cells)) for each in (click, np.ones(len(log))))
        rate = (np.bincount(place, clicks) / np.bincount(place, views))[place]
        # Pulled to the position's rate by 20 views, as the loop's reward models are by reward_model.penalty.
        means = (clicks + 20.0 * rate) / (views + 20.0)
        values = np.bincount(place, target * means)
        predicted[~rest], expected[~rest] = means[cell[~rest]], values[place[cell[~rest]]]
    return {"predicted_rewards": predicted, "predicted_values": expected}


def test_logs_of_each_real_policy_tell_the_click_rate_of_the_other(capsys):
    """Open Bandit Dataset, men's campaign: 10,000 decisions of a uniform policy, and 10,000 of Thompson sampling.

    Thompson sampling's propensities changed while it ran, so it is no fixed policy: as a target it is its items'
    frequency at each position.

    Not every interval covers. The direct method's never does: its interval is that of the model, which is wrong here.
    From Thompson sampling's log, whose weights reach 178, the self-normalised doubly robust one ends just below the
    other's rate, and the doubly robust one would too under a model that trusts items of few views (pulled by 1 view).
    """
    logs = {policy: read_obd(policy) for policy in ("random", "bts")}
    kinds = [np.unique(logs["random"][name]) for name in ("position", "item_id")]
    cells = pd.MultiIndex.from_product(kinds, names=["position", "item_id"])
    frequency = logs["bts"].groupby(["position", "item_id"]).size() / logs["bts"].groupby("position").size()
    targets = {
        "bts": np.full(len(cells), 1.0 / 34.0),
        "random": frequency.reindex(cells, fill_value=0.0).to_numpy(),
    }
    for logging, of_cells in targets.items():
        log, other = logs[logging], logs["bts" if logging == "random" else "random"]
        rewards, propensities = log["click"].to_numpy(float), log["propensity_score"].to_numpy(float)
        target = of_cells[cells.get_indexer(pd.MultiIndex.from_frame(log[["position", "item_id"]]))]
        logged = LoggedDecisions(rewards, propensities, target, **mean_clicks(log, cells, of_cells))
        diagnostics, found = overlap(logged), estimate(logged, num_draws=2_000)
        rate = float(other["click"].mean())
        with capsys.disabled():
            print(f"\n{logging}'s log: {diagnostics}; the other's click rate {rate:.5f}")
            print(
                "\n".join(
                    f"  {name}: {one.value:.5f} [{one.low:.5f}, {one.high:.5f}]"
                    f"{'' if one.low <= rate <= one.high else ' does not cover'}"
                    for name, one in found.items()
                )
            )
        assert 0.9 <= diagnostics.mean_weight <= 1.1
        for name in ("ips", "clipped_ips", "snips", "dr", "switch_dr"):
            assert found[name].low <= rate <= found[name].high, name
        # Upside down, the weights are far from 1.
        upside_down = np.mean(propensities / np.maximum(target, 1e-9))
        assert not 0.9 <= upside_down <= 1.1
