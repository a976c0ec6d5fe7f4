"""Reliability and ECE beside scikit-learn's and a plain loop's, intervals and the temperature beside scipy's."""

import numpy as np
import pytest
from scipy import optimize, stats
from sklearn.calibration import calibration_curve

from mmei_jax.reports.calibration import best_temperature, reliability


@pytest.fixture(params=[0, 1, 2])
def answers(request):
    generator = np.random.default_rng(request.param)
    probability = generator.beta(4, 2, 700)
    # Borders of bins, where the convention decides.
    probability[:16] = np.linspace(0.0, 1.0, 16)
    return probability, generator.random(700) < probability**1.5


def plain_ece(probability, is_hit, num_bins):
    """Guo et al.: bin m is (m - 1, m] / M."""
    ece = 0.0
    for place in range(num_bins):
        low, high = place / num_bins, (place + 1) / num_bins
        inside = [
            index for index, value in enumerate(probability) if low < value <= high or (place == 0 and value == 0)
        ]
        if inside:
            gap = np.mean([is_hit[index] for index in inside]) - np.mean([probability[index] for index in inside])
            ece += len(inside) / len(probability) * abs(gap)
    return ece


@pytest.mark.parametrize("num_bins", [1, 10, 15])
def test_ece_is_that_of_a_plain_loop(answers, num_bins):
    probability, is_hit = answers
    # Thirds and fifteenths are no binary fractions: keep the borders out of the comparison of different arithmetic.
    probability, is_hit = (probability, is_hit) if num_bins == 1 else (probability[16:], is_hit[16:])
    found = reliability(probability, is_hit, num_bins=num_bins)
    assert found.ece == pytest.approx(plain_ece(probability, is_hit, num_bins), abs=1e-12)
    assert found.count.sum() == len(probability)


def test_bins_are_those_of_scikit_learn(answers):
    probability, is_hit = answers
    found = reliability(probability, is_hit, num_bins=15)
    share, confidence = calibration_curve(is_hit, probability, n_bins=15, strategy="uniform")
    occupied = found.count > 0
    np.testing.assert_allclose(found.hit_share[occupied], share, rtol=1e-12)
    np.testing.assert_allclose(found.mean_probability[occupied], confidence, rtol=1e-12)


def test_empty_bins_are_unknown_and_count_for_nothing():
    found = reliability(np.array([0.95, 0.97]), np.array([True, False]))
    assert np.isnan(found.hit_share[:14]).all()
    assert np.isnan(found.hit_interval()[:, :14]).all()
    assert found.ece == pytest.approx(0.96 - 0.5)
    assert np.isnan(reliability(np.zeros(0), np.zeros(0, bool)).ece)


def test_weights_count_records_as_often_as_they_say(answers):
    probability, is_hit = answers
    times = np.random.default_rng(9).integers(0, 4, len(probability))
    weighted = reliability(probability, is_hit, times.astype(float))
    repeated = reliability(np.repeat(probability, times), np.repeat(is_hit, times))
    assert weighted.ece == pytest.approx(repeated.ece, abs=1e-12)
    np.testing.assert_array_equal(weighted.count, repeated.count)


def test_intervals_of_bins_are_wilsons(answers):
    found = reliability(*answers)
    for place, count in enumerate(found.count):
        if count:
            expected = stats.binomtest(int(found.hit_sum[place]), int(count)).proportion_ci(method="wilson")
            np.testing.assert_allclose(found.hit_interval()[:, place], [expected.low, expected.high], atol=1e-9)


def test_best_temperature_is_that_of_a_minimiser():
    generator = np.random.default_rng(0)
    label = generator.integers(0, 4, 300)
    logits = 3.0 * generator.normal(size=(300, 4)) + 2.0 * np.eye(4)[label]

    def loss(log_temperature):
        scaled = logits / np.exp(log_temperature)
        return np.mean(np.log(np.exp(scaled).sum(axis=1)) - scaled[np.arange(300), label])

    expected = np.exp(optimize.minimize_scalar(loss, bounds=(-2, 2), method="bounded").x)
    assert best_temperature(logits, label) == pytest.approx(expected, rel=0.01)
