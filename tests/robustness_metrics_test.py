"""Areas, relative and effective robustness, and constant answers, against NumPy and scikit-learn."""

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.dummy import DummyClassifier
from sklearn.metrics import accuracy_score, f1_score, log_loss

from mmei_jax.metrics import joint_metrics, multi_label_metrics
from mmei_jax.recognition_metrics import ConfusionMatrix, Sentiment
from mmei_jax.robustness_metrics import (
    Grid,
    Robustness,
    area_under_curve,
    constant_answer,
    effective_robustness,
    relative_robustness,
)
from mmei_jax.types import InputError, Label

LEVELS = np.array([0.0, 0.25, 0.5, 2.0])


def scores(seed, *shape):
    return np.random.default_rng(seed).random(shape)


def test_area_is_numpys_trapezoid_over_the_range():
    values = scores(0, 4)
    np.testing.assert_allclose(area_under_curve(LEVELS, values), np.trapezoid(values, LEVELS) / 2.0)


def test_area_of_a_flat_curve_is_its_height_whatever_the_levels():
    assert area_under_curve(LEVELS, np.full(4, 0.7)) == pytest.approx(0.7)
    assert area_under_curve(LEVELS[:1], np.array([0.7])) == 0.7


def test_relative_robustness_is_the_mean_share_kept_along_the_curve():
    values, constant = scores(1, 4), 0.2
    shares = (values - constant) / (values[0] - constant)
    found = relative_robustness(area_under_curve(LEVELS, values), values[0], constant)
    np.testing.assert_allclose(found, np.trapezoid(shares, LEVELS) / 2.0)


def test_relative_robustness_of_a_score_that_was_never_above_a_constant_answer_is_undefined():
    assert np.isnan(relative_robustness(0.3, 0.4, 0.4))


def test_effective_robustness_ignores_a_difference_that_is_there_without_corruption():
    values = scores(2, 4)
    assert effective_robustness(LEVELS, values, values - 0.1) == pytest.approx(0.0)
    slower = values + np.array([0.0, 0.1, 0.1, 0.1])
    assert effective_robustness(LEVELS, slower, values) == pytest.approx(0.1 * (0.125 + 1.75) / 2.0)


def test_scores_along_axes_and_surface():
    grid = Grid(("vision", "text"), (0.0, 0.5, 1.0), (0.0, 1.0, 3.0))
    surface = scores(3, *grid.shape)
    found = Robustness("ours", grid, {"all": {"a": surface}}, {"all": {"a": 0.1}}, {"all": 5})
    levels, curve = found.curve("a", ("text",), "noise")
    assert levels.tolist() == [0.0, 1.0, 3.0]
    assert curve.tolist() == surface[1, 0].tolist()
    assert found.curve("a", ("text",), "missing")[1].tolist() == surface[1, :, 0].tolist()
    inner = np.trapezoid(surface[1], [0.0, 1.0, 3.0], axis=1) / 3.0
    np.testing.assert_allclose(found.area("a", ("text",), "both"), np.trapezoid(inner, [0.0, 0.5, 1.0]))
    clean = surface[2, 0, 0]
    np.testing.assert_allclose(found.share_kept("a"), (surface - 0.1) / (clean - 0.1))


def test_seven_subsets_end_with_all_modalities():
    subsets = Grid(("vision", "audio", "text"), (0.0,), (0.0,)).subsets
    assert len(set(subsets)) == 7
    assert subsets[-1] == ("vision", "audio", "text")


@pytest.mark.parametrize(
    ("missing_rates", "noise_levels", "part"),
    [
        ((0.1, 0.5), (0.0,), "missing_rates = 0.1, 0.5"),
        ((0.0, 0.5, 0.2), (0.0,), "missing_rates"),
        ((0.0, 1.5), (0.0,), "at most 1"),
        ((0.0,), (), "noise_levels"),
        ((0.0,), (0.0, float("nan")), "noise_levels"),
    ],
)
def test_levels_that_are_no_grid_are_refused(missing_rates, noise_levels, part):
    with pytest.raises(InputError, match=part):
        Grid(("text",), missing_rates, noise_levels)


def test_unknown_modalities_are_refused():
    with pytest.raises(InputError, match="vision, audio, text"):
        Grid(("text", "vision"), (0.0,), (0.0,))


def labels_of(num_classes, seed, num_records=60):
    generator = np.random.default_rng(seed)
    return generator.choice(num_classes, num_records, p=generator.dirichlet(np.ones(num_classes)))


def label(values):
    return Label(value=jnp.asarray(values), is_labelled=jnp.ones(len(values), bool))


def test_constant_answer_is_scikit_learns_dummy():
    emotion, intent = labels_of(5, 0), labels_of(3, 1)
    logits = [jnp.asarray(scores(seed, 60, size), jnp.float32) for seed, size in ((4, 5), (5, 3))]
    found = constant_answer(
        {
            **joint_metrics(logits[0], label(emotion), logits[1], label(intent)),
            "emotion/confusion": ConfusionMatrix.from_model_output(
                jnp.argmax(logits[0], axis=1), jnp.asarray(emotion), jnp.ones(60, bool), num_classes=5
            ),
        }
    )
    for task, truth in (("emotion", emotion), ("joint", emotion * 3 + intent)):
        features = np.zeros((60, 1))
        answer = DummyClassifier(strategy="most_frequent").fit(features, truth).predict(features)
        shares = DummyClassifier(strategy="prior").fit(features, truth).predict_proba(features)
        assert found[f"{task}/accuracy"] == pytest.approx(accuracy_score(truth, answer))
        assert found[f"{task}/macro_f1"] == pytest.approx(f1_score(truth, answer, average="macro", zero_division=0))
        assert found[f"{task}/cross_entropy"] == pytest.approx(log_loss(truth, shares, labels=np.unique(truth)))


def test_constant_answer_of_several_classes_at_once_takes_each_class_apart():
    targets = (scores(6, 50, 3) < np.array([0.2, 0.5, 0.9])).astype(np.float32)
    logits = jnp.asarray(scores(7, 50, 3) - 0.5, jnp.float32)
    found = constant_answer(multi_label_metrics("emotion", logits, label(targets)))
    most = np.maximum(targets.mean(axis=0), 1 - targets.mean(axis=0))
    assert found["emotion/accuracy"] == pytest.approx(most.mean())
    answer = np.broadcast_to(targets.mean(axis=0) > 0.5, targets.shape).astype(int)
    assert found["emotion/macro_f1"] == pytest.approx(f1_score(targets, answer, average="macro", zero_division=0))
    assert "emotion/exact_match" not in found
    assert "emotion/cross_entropy" not in found


def test_constant_answer_of_sentiment_is_that_of_its_two_classes():
    truth = np.array([-1.0, 0.0, 2.0, 1.0, 0.5], np.float32)
    sentiment = Sentiment.from_model_output(jnp.zeros(5), jnp.asarray(truth), jnp.ones(5, bool))
    found = constant_answer({"emotion/sentiment": sentiment})
    assert found["emotion/acc2_has0"] == pytest.approx(0.8)
    assert found["emotion/acc2_non0"] == pytest.approx(0.75)
    assert "emotion/mae" not in found


def test_nothing_counted_gives_no_constant_answer():
    assert constant_answer({"emotion/confusion": ConfusionMatrix(counts=np.zeros((3, 3), int))}) == {}
