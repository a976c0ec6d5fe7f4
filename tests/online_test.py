"""The A/B: arms that differ by their slates alone, intervals, and a placebo that must lose the uplift."""

import dataclasses

import jax
import numpy as np
import pytest

from mmei_jax.feedback.environment import new_users
from mmei_jax.feedback.learning import PolicyParameters
from mmei_jax.feedback.online import CONTROL, METRICS, PLACEBO, TREATMENT, ArmTotals, compare, summarise
from mmei_jax.feedback.slate_policies import NamedPolicy, PolicyMaker
from mmei_jax.feedback.visits import visit
from tests import synthetic_pool

NUM_USERS = 200
CONFIG = synthetic_pool.make_config(visits__num_users=NUM_USERS, ab__num_visits=3, ab__num_seeds=3, ab__num_draws=300)


@pytest.fixture(scope="module")
def setting():
    pool, world = synthetic_pool.make_pool()
    users = new_users(jax.random.key(0), world, NUM_USERS, CONFIG.environment)
    maker = PolicyMaker(pool, NUM_USERS, CONFIG.policies, 0.1)
    parameters = PolicyParameters.zeros(pool.user_embedding.shape[1], len(pool.item_ids))
    emotion_driven = maker.model(parameters, 0.5)
    uniform = dataclasses.replace(CONFIG, visits=dataclasses.replace(CONFIG.visits, visits_per_round=10))
    log = synthetic_pool.write_visits(jax.random.key(1), world, maker.uniform(), uniform)
    behaviour = maker.behaviour_only(log, seed=0)
    return world, users, NamedPolicy("mf", 1, behaviour), NamedPolicy("softmax", 0, emotion_driven)


def run(setting, behaviour, emotion, config=CONFIG):
    world, users, *_ = setting
    return compare(
        jax.random.key(5),
        world,
        users,
        behaviour,
        emotion,
        slate_size=config.visits.slate_size,
        environment=config.environment,
        config=config.ab,
    )


@pytest.fixture(scope="module")
def found(setting):
    return run(setting, *setting[2:])


def test_emotions_give_an_uplift_which_the_placebo_loses(found):
    for metric in METRICS:
        treatment, placebo = found["uplift"][TREATMENT][metric], found["uplift"][PLACEBO][metric]
        assert treatment["low"] > 0.0, metric
        assert placebo["low"] <= 0.0, metric
        assert placebo["high"] < treatment["low"], metric
        assert found["placebo_loses_uplift"][metric]
        assert len(treatment["by_seed"]) == 3
    assert found["policies"] == {CONTROL: "mf-1", TREATMENT: "softmax-0", PLACEBO: "softmax-0"}
    assert found["is_simulated"]


def test_placebo_of_a_policy_that_reads_no_record_changes_nothing(setting):
    same = run(setting, setting[2], setting[2])
    for arm in (TREATMENT, PLACEBO):
        for metric in METRICS:
            one = same["uplift"][arm][metric]
            assert (one["value"], one["low"], one["high"]) == (0.0, 0.0, 0.0)
    assert not any(same["placebo_loses_uplift"].values())


def test_arms_meet_the_same_moods_records_and_chances(setting):
    world, users, behaviour, emotion = setting
    options = {"num_visits": 3, "slate_size": 3, "config": CONFIG.environment}
    key = jax.random.key(2)
    last, ours = visit(key, world, users, emotion.policy, **options)
    other, theirs = visit(key, world, users, behaviour.policy, **options)
    _, placebo = visit(key, world, users, emotion.policy, is_placebo=True, **options)
    for each in (theirs, placebo):
        np.testing.assert_array_equal(each.record, ours.record)
        np.testing.assert_array_equal(each.kind, ours.kind)
        np.testing.assert_array_equal(np.isnan(each.rating), np.isnan(ours.rating))
        np.testing.assert_array_equal(np.asarray(each.dwell_seconds) > 0, np.asarray(ours.dwell_seconds) > 0)
    np.testing.assert_array_equal(last.taste, other.taste)
    assert (np.asarray(ours.items) != np.asarray(theirs.items)).mean() > 0.5
    assert (np.asarray(ours.items) != np.asarray(placebo.items)).mean() > 0.5


def arm(totals, counts=None):
    totals = np.asarray(totals, float)
    counts = np.ones_like(totals) if counts is None else np.asarray(counts, float)
    return ArmTotals(dict.fromkeys(METRICS, totals), dict.fromkeys(METRICS, counts))


def test_levels_and_uplifts_are_ratios_of_sums():
    config = dataclasses.replace(CONFIG.ab, num_draws=50)
    control = arm([[2.0, 4.0], [4.0, 2.0]], [[1, 1], [1, 1]])
    treatment = arm([[3.0, 6.0], [6.0, 6.0]], [[1, 2], [1, 1]])
    found = summarise({CONTROL: control, TREATMENT: treatment, PLACEBO: control}, config)
    assert found["arms"][CONTROL]["rating"]["value"] == pytest.approx(3.0)
    assert found["arms"][TREATMENT]["rating"]["value"] == pytest.approx(21 / 5)
    one = found["uplift"][TREATMENT]["rating"]
    assert one["value"] == pytest.approx(21 / 5 / 3 - 1)
    assert one["by_seed"] == [pytest.approx(0.0), pytest.approx(1.0)]
    # No rating at all has no mean.
    silent = arm([[0.0, 0.0]] * 2, [[0.0, 0.0]] * 2)
    undefined = summarise({CONTROL: control, TREATMENT: silent, PLACEBO: control}, config)
    assert undefined["uplift"][TREATMENT]["rating"]["value"] is None
    assert not undefined["placebo_loses_uplift"]["rating"]


@pytest.mark.parametrize("num_replications", [60, pytest.param(400, marks=pytest.mark.slow)])
def test_intervals_cover_the_uplift_of_all_users_and_pairing_narrows_them(num_replications):
    """Users differ far more from each other than arms do."""
    config = dataclasses.replace(CONFIG.ab, num_draws=300, num_seeds=4)
    hits, widths = [], []
    for seed in range(num_replications):
        generator = np.random.default_rng(seed)
        users = generator.gamma(2.0, 5.0, (1, 200)) + generator.normal(size=(4, 200))
        ours = 1.1 * users + generator.normal(size=(4, 200))
        found = summarise({CONTROL: arm(users), TREATMENT: arm(ours), PLACEBO: arm(users)}, config, seed=seed)
        one = found["uplift"][TREATMENT]["rating"]
        hits.append(one["low"] <= 0.1 <= one["high"])
        widths.append(one["high"] - one["low"])
    # Drawing users and seeds at once counts their common noise twice: never too narrow, at times too wide.
    assert np.mean(hits) >= (0.93 if num_replications > 100 else 0.88)
    assert np.mean(widths) < 0.05
