"""Off-policy learning: the gradient is that of the true reward, clipping and the penalty do what they say."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmei_jax.feedback.learning import (
    LearningConfig,
    LoggedSlates,
    PolicyParameters,
    RewardConfig,
    item_rewards,
    learn_policy,
    objective,
    policy_scores,
)
from mmei_jax.feedback.policies import slate_propensities
from mmei_jax.types import InputError

# Two states, three items, slates of two.
STATES = jnp.array([[1.0, 0.0], [0.0, 1.0]])
ITEMS = jnp.array([[1.0, 0.2], [-0.3, 1.0], [0.1, 0.1]])
REWARD = np.array([[0.1, 0.9, 0.3], [0.8, 0.2, 0.5]], np.float32)
LOGGING = np.array([[0.5, -0.2, 0.1], [0.0, 0.3, 0.6]], np.float32)
PLAIN = LearningConfig(
    gradient="reinforce", largest_weight=1e9, divergence_weight=0.0, temperature=0.5, uniform_share=0.2
)
ROBUST = dataclasses.replace(PLAIN, gradient="doubly_robust")
PAIRS = np.array(list(itertools.permutations(range(3), 2)), np.int32)


def start():
    generator = np.random.default_rng(0)
    return PolicyParameters(
        state_map=jnp.asarray(0.1 * generator.normal(size=(2, 2)), jnp.float32),
        item_bias=jnp.asarray(0.1 * generator.normal(size=3), jnp.float32),
    )


def probabilities(scores, items, **options):
    allowed = jnp.ones((len(items), 3), bool)
    return slate_propensities(jnp.asarray(scores), allowed, jnp.asarray(items), **options)


def everything():
    """Every slate of every state, and how often the logging policy draws it."""
    state = np.repeat([0, 1], len(PAIRS))
    items = np.tile(PAIRS, (2, 1))
    propensities = probabilities(LOGGING[state], items, temperature=1.0, uniform_share=0.3)
    logged = LoggedSlates(
        states=np.asarray(STATES)[state],
        is_allowed=np.ones((len(items), 3), bool),
        items=items,
        propensities=propensities,
        rewards=np.take_along_axis(REWARD[state], items, axis=1),
    )
    return logged, np.asarray(propensities).prod(axis=1) / 2


def log(count, seed=0):
    logged, share = everything()
    rows = np.random.default_rng(seed).choice(len(share), count, p=share / share.sum())
    return jax.tree.map(lambda leaf: np.asarray(leaf)[rows], logged)


def true_reward(parameters, config=PLAIN):
    """Mean reward per item of the policy itself, over all slates."""
    total = 0.0
    for state in range(2):
        scores = policy_scores(parameters, STATES[state : state + 1], ITEMS)
        each = probabilities(
            jnp.tile(scores, (len(PAIRS), 1)),
            PAIRS,
            temperature=config.temperature,
            uniform_share=config.uniform_share,
        )
        total += (each.prod(axis=1) * REWARD[state][PAIRS].mean(axis=1)).sum() / 2
    return total


def one(logged, row):
    """A single slate."""
    return jax.tree.map(lambda leaf: leaf[row : row + 1], logged)


def expected_gradient(config=PLAIN, **changes):
    """Of the surrogate at first positions, every slate as often as the logging policy draws it."""
    logged, share = everything()
    first = dataclasses.replace(
        logged,
        items=logged.items[:, :1],
        propensities=logged.propensities[:, :1],
        rewards=logged.rewards[:, :1],
        **changes,
    )

    def total(parameters):
        return sum(weight * objective(parameters, ITEMS, one(first, row), config) for row, weight in enumerate(share))

    return jax.grad(total)(start())


def true_gradient():
    def reward(parameters):
        scores = policy_scores(parameters, STATES, ITEMS)
        preferred = jax.nn.softmax(scores / PLAIN.temperature, axis=1)
        probability = (1 - PLAIN.uniform_share) * preferred + PLAIN.uniform_share / 3
        return (probability * REWARD).sum(axis=1).mean()

    return jax.grad(reward)(start())


@pytest.mark.parametrize("has_model", [False, True], ids=["reinforce", "doubly_robust"])
def test_gradient_is_that_of_the_true_reward(has_model):
    model, config = {}, PLAIN
    if has_model:
        config = ROBUST
        wrong = np.array([[0.4, 0.4, 0.2], [0.3, 0.6, 0.1]], np.float32)
        logged, _ = everything()
        model = {"predicted": logged.states @ wrong, "position_factor": np.full((12, 1), 0.7, np.float32)}
    found = expected_gradient(config, **model)
    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=1e-5), found, true_gradient())


def test_gradient_is_the_one_that_the_configuration_names():
    """Whether a model's answers are there or not."""
    logged, wrong = log(50), np.array([[0.4, 0.4, 0.2], [0.3, 0.6, 0.1]], np.float32)
    with_model = dataclasses.replace(logged, predicted=logged.states @ wrong)
    without = jax.grad(objective)(start(), ITEMS, logged, PLAIN)
    jax.tree.map(np.testing.assert_array_equal, jax.grad(objective)(start(), ITEMS, with_model, PLAIN), without)
    robust = jax.grad(objective)(start(), ITEMS, with_model, ROBUST)
    assert np.abs(robust.item_bias - without.item_bias).max() > 1e-3
    with pytest.raises(InputError, match=r"config.learning.gradient = 'doubly_robust': expected predicted rewards"):
        learn_policy(start(), ITEMS, logged, ROBUST)


def test_clipping_changes_the_gradient():
    clipped = expected_gradient(dataclasses.replace(PLAIN, largest_weight=0.5))
    assert np.abs(clipped.item_bias - true_gradient().item_bias).max() > 0.01


def test_learned_policy_is_better_and_the_penalty_holds_it_back():
    config = dataclasses.replace(PLAIN, largest_weight=10.0, learning_rate=0.05, num_steps=150)
    before = PolicyParameters.zeros(2, 3)
    learned, objectives = learn_policy(before, ITEMS, log(2_000), config)
    assert float(true_reward(learned)) > float(true_reward(before)) + 0.05
    assert np.isfinite(objectives).all()
    assert objectives.shape == (150,)
    held, _ = learn_policy(before, ITEMS, log(2_000), dataclasses.replace(config, divergence_weight=10.0))
    logged = log(2_000)

    def distance(parameters):
        scores = policy_scores(parameters, jnp.asarray(logged.states), ITEMS)
        each = probabilities(scores, logged.items, temperature=PLAIN.temperature, uniform_share=PLAIN.uniform_share)
        return float((np.log(logged.propensities) - np.log(each)).mean())

    assert distance(held) < 0.2 * distance(learned)


def test_slates_drawn_for_each_gradient_teach_the_same():
    config = dataclasses.replace(PLAIN, largest_weight=10.0, learning_rate=0.05, num_steps=150)
    before, logged = PolicyParameters.zeros(2, 3), log(2_000)
    whole, _ = learn_policy(before, ITEMS, logged, config)
    drawn = dataclasses.replace(config, batch_size=200)
    first, second = (learn_policy(before, ITEMS, logged, drawn, seed=seed)[0] for seed in (1, 2))
    assert float(true_reward(first)) == pytest.approx(float(true_reward(whole)), abs=0.01)
    again, _ = learn_policy(before, ITEMS, logged, drawn, seed=1)
    np.testing.assert_array_equal(again.item_bias, first.item_bias)
    assert np.abs(second.item_bias - first.item_bias).max() > 0.0


def test_model_makes_the_learned_policy_less_a_matter_of_chance():
    config = dataclasses.replace(PLAIN, largest_weight=10.0, learning_rate=0.05, num_steps=60)
    without, with_model = [], []
    for seed in range(5):
        logged = log(60, seed)
        noisy = dataclasses.replace(logged, rewards=logged.rewards + np.random.default_rng(seed).normal(size=(60, 2)))
        model = {"predicted": (logged.states @ REWARD).astype(np.float32)}
        start_here = PolicyParameters.zeros(2, 3)
        noisy = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32) if leaf.dtype == np.float64 else leaf, noisy)
        without.append(float(true_reward(learn_policy(start_here, ITEMS, noisy, config)[0])))
        robust = dataclasses.replace(noisy, **model)
        learned, _ = learn_policy(start_here, ITEMS, robust, dataclasses.replace(config, gradient="doubly_robust"))
        with_model.append(float(true_reward(learned)))
    assert np.mean(with_model) > np.mean(without)


def test_rewards_are_their_formula():
    config = RewardConfig(
        dwell=0.5, replays=0.2, like=0.3, satisfaction=1.0, full_dwell_seconds=100.0, full_replays=2.0
    )
    found = item_rewards(
        jnp.array([[50.0, 300.0], [0.0, 0.0]]),
        jnp.array([[1, 5], [0, 0]]),
        jnp.array([[True, False], [False, False]]),
        jnp.array([3.0, jnp.nan]),
        config,
    )
    np.testing.assert_allclose(found, [[0.25 + 0.1 + 0.3 + 0.5, 0.5 + 0.2 + 0.5], [0.0, 0.0]], rtol=1e-6)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (RewardConfig, {"like": -1.0}, "reward.like = -1.0: expected at least 0"),
        (RewardConfig, {"full_replays": 0.0}, "reward.full_replays = 0.0: expected above 0"),
        (LearningConfig, {"temperature": 0.0}, "learning.temperature = 0.0: expected above 0"),
        (LearningConfig, {"num_steps": 0}, "learning.num_steps = 0: expected at least 1"),
        (LearningConfig, {"batch_size": -1}, "learning.batch_size = -1: expected at least 0"),
        (LearningConfig, {"divergence_weight": -0.1}, "learning.divergence_weight = -0.1"),
        (LearningConfig, {"uniform_share": 1.5}, "learning.uniform_share = 1.5: expected from 0 to 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(kind, changes, message):
    with pytest.raises(InputError, match=message):
        kind(**changes)
