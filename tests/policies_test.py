"""Policies: the probabilities that they state are those with which they choose."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.linear_model

from mmei_jax.feedback.policies import (
    LinearBandit,
    choose_penalty,
    draw_slates,
    factorise,
    popularity_scores,
    slate_propensities,
    uniform_slates,
)
from mmei_jax.types import InputError

SCORES = np.array([0.0, 1.0, -1.0, 2.0], np.float32)
ALLOWED = np.array([True, True, True, True])


def drawn(count, **options):
    scores, allowed = jnp.tile(SCORES, (count, 1)), jnp.tile(ALLOWED, (count, 1))
    return jax.device_get(draw_slates(jax.random.key(0), scores, allowed, slate_size=2, **options))


@pytest.mark.parametrize("uniform_share", [0.0, 0.4])
def test_slates_come_as_often_as_their_propensities_say(uniform_share):
    count = 40_000
    found = drawn(count, temperature=1.5, uniform_share=uniform_share)
    weights = np.exp(SCORES / 1.5)
    for first, second in itertools.permutations(range(4), 2):
        left = weights.sum() - weights[first]
        one = (1 - uniform_share) * weights[first] / weights.sum() + uniform_share / 4
        other = (1 - uniform_share) * weights[second] / left + uniform_share / 3
        is_pair = (found.items == [first, second]).all(axis=1)
        np.testing.assert_allclose(found.propensity[is_pair], np.tile([one, other], (is_pair.sum(), 1)), rtol=1e-5)
        expected = float(one * other)
        assert is_pair.mean() == pytest.approx(expected, abs=4 * (expected / count) ** 0.5)


def test_propensities_of_given_slates_are_those_of_drawing_them():
    found = drawn(200, temperature=0.7, uniform_share=0.1)
    scores, allowed = jnp.tile(SCORES, (200, 1)), jnp.tile(ALLOWED, (200, 1))
    again = slate_propensities(scores, allowed, jnp.asarray(found.items), temperature=0.7, uniform_share=0.1)
    np.testing.assert_allclose(again, found.propensity, rtol=1e-6)


def test_small_temperature_is_greedy_and_what_is_not_allowed_never_comes():
    allowed = jnp.array([[True, True, True, False]] * 50)
    scores = jnp.tile(SCORES, (50, 1))
    found = draw_slates(jax.random.key(1), scores, allowed, slate_size=3, temperature=1e-3)
    np.testing.assert_array_equal(found.items, np.tile([1, 0, 2], (50, 1)))
    np.testing.assert_allclose(found.propensity, 1.0)
    mixed = draw_slates(jax.random.key(2), scores, allowed, slate_size=3, temperature=1.0, uniform_share=0.5)
    assert (np.sort(mixed.items, axis=1) == [0, 1, 2]).all()


def test_uniform_slates_are_those_of_uniform_choice():
    count, num_items = 60_000, 5
    found = jax.device_get(uniform_slates(jax.random.key(3), count, num_items, slate_size=3))
    scores, allowed = jnp.zeros((count, num_items)), jnp.ones((count, num_items), bool)
    stated = slate_propensities(scores, allowed, jnp.asarray(found.items), temperature=1.0, uniform_share=1.0)
    np.testing.assert_allclose(found.propensity, stated, rtol=1e-6)
    slates, counts = np.unique(found.items, axis=0, return_counts=True)
    assert len(slates) == 5 * 4 * 3
    expected = count / len(slates)
    np.testing.assert_allclose(counts, expected, atol=4.5 * expected**0.5)


def test_popularity_ranks_by_click_rate_and_doubts_rare_items():
    scores = popularity_scores(np.array([50, 1, 0, 5]), np.array([100, 1, 0, 100]))
    assert list(np.argsort(-scores)) == [0, 1, 2, 3]
    assert np.exp(scores[2]) == pytest.approx(0.1)


def test_factors_find_who_likes_what_and_know_nothing_of_strangers():
    generator = np.random.default_rng(0)
    num_users, num_items = 60, 40
    taste, style = generator.choice([-1.0, 1.0], num_users), generator.choice([-1.0, 1.0], num_items)
    user = generator.integers(0, num_users - 1, 6_000)
    item = generator.integers(0, num_items, 6_000)
    is_click = generator.uniform(size=6_000) < 0.5 + 0.4 * taste[user] * style[item]
    found = factorise(user, item, is_click, num_users=num_users, num_items=num_items, rank=2)
    scores = found.user @ found.item.T
    likes = np.outer(taste, style) > 0
    assert (scores[:-1][likes[:-1]].mean() - scores[:-1][~likes[:-1]].mean()) > 0.5
    # The last user was shown nothing: the items' click rates are all that there is.
    np.testing.assert_allclose(scores[-1], found.item[:, -1])
    with pytest.raises(InputError, match="0 views"):
        factorise(user[:0], item[:0], is_click[:0], num_users=1, num_items=1)


@pytest.mark.parametrize(("strength", "expected"), [(3.0, 1.0), (0.0, 300.0)])
def test_penalty_is_the_one_that_tells_held_out_clicks(strength, expected):
    """Little where users differ; where they do not, the largest, which leaves the items' click rates alone."""
    generator = np.random.default_rng(0)
    num_users, num_items, count = 60, 40, 12_000
    taste, style = generator.normal(size=(num_users, 2)), generator.normal(size=(num_items, 2))
    user, item = generator.integers(0, num_users, count), generator.integers(0, num_items, count)
    probability = 1.0 / (1.0 + np.exp(-strength * (taste[user] * style[item]).sum(axis=1)))
    is_click = generator.random(count) < probability
    sizes = {"num_users": num_users, "num_items": num_items, "rank": 2, "num_sweeps": 6}
    assert choose_penalty(user, item, is_click, (1.0, 30.0, 300.0), **sizes) == expected


def test_linear_bandit_is_ridge_regression_with_its_posterior():
    generator = np.random.default_rng(1)
    features = generator.normal(size=(80, 3)).astype(np.float32)
    rewards = (features @ [1.0, -2.0, 0.5] + generator.normal(size=80)).astype(np.float32)
    bandit = LinearBandit.fresh(3, penalty=2.0)
    for part in (slice(0, 30), slice(30, 80)):
        bandit = bandit.update(jnp.asarray(features[part]), jnp.asarray(rewards[part]))
    ridge = sklearn.linear_model.Ridge(alpha=2.0, fit_intercept=False).fit(features, rewards)
    new = generator.normal(size=(7, 3)).astype(np.float32)
    np.testing.assert_allclose(bandit.upper_bounds(jnp.asarray(new), 0.0), ridge.predict(new), atol=1e-4)
    covariance = np.linalg.inv(features.T @ features + 2.0 * np.eye(3))
    deviation = np.sqrt(np.einsum("rf,fg,rg->r", new, covariance, new))
    np.testing.assert_allclose(
        bandit.upper_bounds(jnp.asarray(new), 1.5), ridge.predict(new) + 1.5 * deviation, atol=1e-4
    )
    draws = np.stack([bandit.sample(jax.random.key(seed), 2.0) for seed in range(2_000)])
    np.testing.assert_allclose(draws.mean(axis=0), ridge.coef_, atol=0.03)
    np.testing.assert_allclose(np.cov(draws.T), 4.0 * covariance, atol=0.1 * np.abs(4.0 * covariance).max())
