"""Reward models: least squares as a library does it, and no peeking."""

import numpy as np
import pytest
import sklearn.linear_model

from mmei_jax.feedback.reward_models import cross_fit, fit_reward_model
from mmei_jax.types import InputError

NUM_SLATES, NUM_ITEMS = 300, 12


def log(seed=0, num_positions=3):
    generator = np.random.default_rng(seed)
    scores = generator.normal(size=(NUM_SLATES, NUM_ITEMS))
    items = np.stack([generator.permutation(NUM_ITEMS)[:num_positions] for _ in range(NUM_SLATES)])
    effect = generator.normal(size=NUM_ITEMS)
    factor = np.array([1.0, 0.6, 0.3])[:num_positions]
    mean = factor * (2.0 + 0.5 * np.take_along_axis(scores, items, axis=1) + effect[items])
    return scores, items, mean + 0.1 * generator.normal(size=mean.shape)


def test_one_position_is_ridge_regression():
    scores, items, rewards = log(num_positions=1)
    found = fit_reward_model(scores, items, rewards, penalty=3.0)
    # Item columns so large that the penalty weighs on nothing else.
    one_hot = np.eye(NUM_ITEMS)[items[:, 0]]
    features = np.concatenate([1e4 * np.take_along_axis(scores, items, axis=1), one_hot], axis=1)
    ridge = sklearn.linear_model.Ridge(alpha=3.0).fit(features, rewards[:, 0])
    assert found.slope == pytest.approx(1e4 * ridge.coef_[0], abs=1e-4)
    # With unpenalised level, effects are those of centred ridge regression up to what the level takes.
    np.testing.assert_allclose(found.level + found.item_effect, ridge.intercept_ + ridge.coef_[1:], atol=1e-4)


def test_model_recovers_positions_slope_and_items():
    scores, items, rewards = log()
    found = fit_reward_model(scores, items, rewards, penalty=0.1)
    np.testing.assert_allclose(found.position_factor, [1.0, 0.6, 0.3], atol=0.05)
    assert found.slope == pytest.approx(0.5, abs=0.05)
    truth = (rewards - found.position_factor * 0.5 * np.take_along_axis(scores, items, axis=1))[:, 0]
    for item in range(NUM_ITEMS):
        assert found.level + found.item_effect[item] == pytest.approx(truth[items[:, 0] == item].mean(), abs=0.1)
    shrunk = fit_reward_model(scores, items, rewards, penalty=1e6)
    assert np.abs(shrunk.item_effect).max() < 1e-3
    assert found.predict(scores).shape == scores.shape


def test_predictions_come_from_other_units_alone():
    scores, items, rewards = log()
    units = np.arange(NUM_SLATES) // 3
    found = cross_fit(scores, items, rewards, units, num_folds=4)
    changed = rewards.copy()
    changed[units == 7] += 50.0
    again = cross_fit(scores, items, changed, units, num_folds=4)
    same = (found.predicted == again.predicted).all(axis=1)
    assert same[units == 7].all()
    # The other slates of its fold do not see it either; three folds do.
    assert 0.2 <= same.mean() <= 0.3


def test_what_cannot_be_fitted_is_refused():
    scores, items, rewards = log()
    with pytest.raises(InputError, match="reward model of 0 slates"):
        fit_reward_model(scores[:0], items[:0], rewards[:0])
    with pytest.raises(InputError, match="cross-fitting of 1 units in 5 folds"):
        cross_fit(scores, items, rewards, np.zeros(NUM_SLATES, int))
