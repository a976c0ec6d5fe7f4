"""The online users: the simulator's causes, seen from another side."""

import ast
import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from mmei_jax.feedback import environment
from mmei_jax.feedback.environment import (
    EnvironmentConfig,
    draw_replays,
    expected_satisfaction,
    make_world,
    new_users,
    show,
)
from mmei_jax.simulation import aigc_int
from mmei_jax.simulation.aigc_int_feedback import (
    EXAMINATION,
    SLATE_SIZE,
    draw_slates,
    relevant_items,
    satisfaction_from_score,
    true_scores,
)
from mmei_jax.types import InputError

NUM_USERS = 4_000
NO_DRIFT = EnvironmentConfig(taste_drift=0.0, rating_delay_visits=0, rating_probability=1.0)


@pytest.fixture(scope="module")
def latents():
    return aigc_int.draw_latents(3, 0)


@pytest.fixture(scope="module")
def world(latents):
    every = np.arange(28)
    emotion = np.concatenate([every // 4, latents.emotion])
    intent = np.concatenate([every % 4, latents.intent])
    return make_world(emotion, intent)


def users_like(latents, world):
    """Users in the state of the simulator's records."""
    users = new_users(jax.random.key(0), world, len(latents.emotion), NO_DRIFT)
    return users.replace(
        taste=jnp.asarray(latents.taste, jnp.float32),
        user_type=jnp.asarray(latents.user_type),
        kind=jnp.asarray(latents.kind),
        emotion=jnp.asarray(latents.emotion),
        intent=jnp.asarray(latents.intent),
    )


def test_replays_are_poisson():
    count, rates = 200_000, np.array([0.0, 0.3, 1.0], np.float32)
    found = draw_replays(jax.random.key(0), jnp.tile(rates, (count, 1)))
    for rate, drawn in zip(rates, np.asarray(found).T, strict=True):
        expected = count * scipy.stats.poisson.pmf(np.arange(12), rate)
        counts = np.bincount(drawn, minlength=12)
        assert len(counts) == 12
        np.testing.assert_array_less(np.abs(counts - expected), 4.5 * expected**0.5 + 1.0)


def test_satisfaction_is_the_simulators(latents, world):
    items = relevant_items(latents)[:, :SLATE_SIZE]
    expected = np.take_along_axis(satisfaction_from_score(true_scores(latents)), items, axis=1)
    found = expected_satisfaction(world, users_like(latents, world), jnp.asarray(items))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_feedback_has_the_simulators_distribution(latents, world):
    """On the simulator's slates, in the simulator's states: the same means, within four standard errors."""
    slates = [draw_slates(seed, 0, latents) for seed in range(8)]
    users, step = users_like(latents, world), jax.jit(show, static_argnames="config")
    ours = []
    for seed, slate in enumerate(slates):
        _, found = step(jax.random.key(seed), world, users, jnp.asarray(slate.item_index), config=NO_DRIFT)
        ours.append(jax.device_get(found))
    for name in ("dwell_seconds", "num_replays", "is_liked"):
        mine = np.concatenate([np.asarray(getattr(part, name), float) for part in ours])
        theirs = np.concatenate([np.asarray(getattr(part, name), float) for part in slates])
        # Slates ask for the record's kind, so that the kind of an item is that of the visit.
        error = (mine.var(axis=0) + theirs.var(axis=0)) ** 0.5 / len(mine) ** 0.5
        assert (np.abs(mine.mean(axis=0) - theirs.mean(axis=0)) < 4 * error).all(), name
    examined = np.concatenate([part.dwell_seconds > 0 for part in ours]).mean(axis=0)
    np.testing.assert_allclose(examined, EXAMINATION, atol=0.03)
    # The rating is of what was noticed, and so is the hidden score.
    ratings = np.concatenate([part.rating for part in ours])
    assert np.isfinite(ratings).all()
    assert 1.0 <= ratings.min() < ratings.max() <= 5.0


def test_visits_follow_the_simulators_priors_and_show_a_record_of_their_state(latents, world):
    users = new_users(jax.random.key(1), world, NUM_USERS, NO_DRIFT)
    counts = np.bincount(users.emotion, minlength=7) / NUM_USERS
    np.testing.assert_allclose(counts, aigc_int.EMOTION_PRIOR, atol=0.03)
    table = aigc_int.intent_table()[users.user_type, users.kind, users.emotion]
    intents = np.bincount(users.intent, minlength=4) / NUM_USERS
    np.testing.assert_allclose(intents, table.mean(axis=0), atol=0.03)
    every = np.arange(28)
    emotion = np.concatenate([every // 4, latents.emotion])
    intent = np.concatenate([every % 4, latents.intent])
    np.testing.assert_array_equal(emotion[users.record], users.emotion)
    np.testing.assert_array_equal(intent[users.record], users.intent)
    assert len(np.unique(users.record)) > 500


def test_tastes_drift_and_stay_standard_normal(world):
    config = dataclasses.replace(NO_DRIFT, taste_drift=0.3)
    users = first = new_users(jax.random.key(2), world, NUM_USERS, config)
    items = jnp.zeros((NUM_USERS, 1), jnp.int32)
    for seed in range(5):
        users, _ = show(jax.random.key(seed), world, users, items, config)
    assert np.std(users.taste) == pytest.approx(1.0, abs=0.03)
    correlation = np.corrcoef(np.ravel(first.taste), np.ravel(users.taste))[0, 1]
    assert correlation == pytest.approx((1 - 0.3**2) ** 2.5, abs=0.03)
    still, _ = show(jax.random.key(0), world, first, items, NO_DRIFT)
    np.testing.assert_array_equal(still.taste, first.taste)
    assert int(users.num_visits[0]) == 5


def test_ratings_arrive_late_and_only_where_given(world):
    config = dataclasses.replace(NO_DRIFT, rating_delay_visits=2, rating_probability=0.5)
    at_once = dataclasses.replace(config, rating_delay_visits=0)
    late, soon = (new_users(jax.random.key(3), world, 200, each) for each in (config, at_once))
    items = jnp.tile(jnp.arange(4), (200, 1))
    arrived, given = [], []
    for seed in range(4):
        late, found = show(jax.random.key(seed), world, late, items, config)
        soon, now = show(jax.random.key(seed), world, soon, items, at_once)
        arrived.append(np.asarray(found.rating))
        given.append(np.asarray(now.rating))
    assert np.isnan(arrived[0]).all()
    assert np.isnan(arrived[1]).all()
    np.testing.assert_array_equal(arrived[2], given[0])
    np.testing.assert_array_equal(arrived[3], given[1])
    assert np.isnan(given).mean() == pytest.approx(0.5, abs=0.1)


def test_without_position_bias_every_item_is_examined(world):
    config = dataclasses.replace(NO_DRIFT, position_exponent=0.0)
    users = new_users(jax.random.key(4), world, 50, config)
    _, found = show(jax.random.key(5), world, users, jnp.tile(jnp.arange(8), (50, 1)), config)
    assert (np.asarray(found.dwell_seconds) > 0).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"taste_drift": 1.5}, "environment.taste_drift = 1.5: expected from 0 to 1"),
        ({"rating_probability": -0.1}, "environment.rating_probability = -0.1"),
        ({"position_exponent": -1.0}, "environment.position_exponent = -1.0: expected at least 0"),
        ({"rating_delay_visits": -1}, "environment.rating_delay_visits = -1"),
    ],
)
def test_what_users_cannot_be_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        EnvironmentConfig(**changes)


def test_pool_that_lacks_a_state_is_refused():
    with pytest.raises(InputError, match="none shows neutral with learn"):
        make_world(np.zeros(5, int), np.zeros(5, int))


def test_environment_never_imports_the_model():
    """Nor anything that could hold one: the simulator, types, checks of values and libraries alone."""
    tree = ast.parse(Path(environment.__file__).read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    ours = {name for name in imported if name.startswith("mmei_jax")}
    assert ours == {
        "mmei_jax.config_values",
        "mmei_jax.simulation",
        "mmei_jax.simulation.aigc_int",
        "mmei_jax.simulation.aigc_int_feedback",
        "mmei_jax.types",
    }
