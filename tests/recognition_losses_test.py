"""Losses for unbalanced classes: the focal loss and the logit adjustment, against torch and by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from mmei_jax.data_statistics import class_log_priors
from mmei_jax.losses import sigmoid_cross_entropy, softmax_cross_entropy, task_counts, task_losses
from mmei_jax.records import Dataset
from mmei_jax.types import InputError, Label
from tests import losses_test

GAMMAS = (0.5, 1.0, 2.0, 5.0)
PRIORS = np.array([0.5, 0.2, 0.15, 0.1, 0.05], np.float32)


def torch_focal(kind, logits, value, gamma, weight=None):
    """Lin et al.'s formula as it stands, of records that all carry labels."""
    if kind == "softmax":
        log_p = torch.log_softmax(logits, -1).gather(-1, torch.tensor(value, dtype=torch.int64)[:, None])[:, 0]
        weights = torch.ones_like(log_p) if weight is None else torch.tensor(np.asarray(weight, np.float64))[value]
        return (-weights * (1 - log_p.exp()) ** gamma * log_p).sum() / weights.sum()
    target = torch.tensor(value, dtype=logits.dtype)
    p = torch.sigmoid(logits)
    of_class = target * p + (1 - target) * (1 - p)
    return (-((1 - of_class) ** gamma) * of_class.log()).mean()


def our_focal(kind, logits, label, gamma, weight=None):
    if kind == "softmax":
        return softmax_cross_entropy(logits, label, weight, focal_gamma=gamma)
    return sigmoid_cross_entropy(logits, label, focal_gamma=gamma)


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize(
    ("kind", "weight"), [("softmax", None), ("softmax", losses_test.CLASS_WEIGHTS), ("sigmoid", None)]
)
def test_focal_loss_and_its_gradient_are_those_of_the_formula_in_torch(kind, weight, gamma):
    logits = losses_test.make_outputs(kind=kind).emotion * 3
    label = losses_test.make_batch(kind=kind).emotion
    keep = np.asarray(label.is_labelled)
    peer_logits = torch.tensor(np.asarray(logits, np.float64)[keep], requires_grad=True)
    peer = torch_focal(kind, peer_logits, np.asarray(label.value)[keep], gamma, weight)
    peer.backward()

    mean, gradient = jax.value_and_grad(lambda x: our_focal(kind, x, label, gamma, weight).mean())(logits)

    np.testing.assert_allclose(mean, peer.item(), rtol=1e-5)
    np.testing.assert_allclose(np.asarray(gradient)[keep], peer_logits.grad.numpy(), atol=1e-6)
    assert not np.asarray(gradient)[~keep].any()


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_focal_loss_of_extreme_logits_is_finite_with_a_finite_gradient(kind, gamma):
    """Where p is 1 to the last digit, a power of 1 - p would have the gradient 0 * inf."""
    logits = jnp.array([[300.0, -300.0], [-300.0, 300.0], [40.0, -40.0], [0.0, 0.0]])
    value = jnp.zeros(4, jnp.int32) if kind == "softmax" else jnp.array([[1.0, 0.0]] * 4)
    label = Label(value=value, is_labelled=jnp.ones(4, bool))

    values, backward = jax.vjp(lambda x: our_focal(kind, x, label, gamma).values, logits)
    (gradient,) = backward(jnp.ones(4))

    assert values[0] == 0.0
    np.testing.assert_allclose(values[1], 600.0 if kind == "softmax" else 300.0)
    assert np.isfinite(gradient).all()
    assert not gradient[0].any()


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_focal_loss_weighs_down_what_is_told_well_already(kind):
    logits = jnp.array([[3.0, -3.0], [0.1, -0.1]])
    value = jnp.zeros(2, jnp.int32) if kind == "softmax" else jnp.array([[1.0, 0.0]] * 2)
    label = Label(value=value, is_labelled=jnp.ones(2, bool))
    shares = our_focal(kind, logits, label, 2.0).values / our_focal(kind, logits, label, 0.0).values
    assert shares[0] < 0.01
    assert 0.15 < shares[1] < 1.0


def test_focal_loss_of_the_only_class_is_zero():
    label = Label(value=jnp.zeros(2, jnp.int32), is_labelled=jnp.ones(2, bool))
    mean, gradient = jax.value_and_grad(lambda x: softmax_cross_entropy(x, label, focal_gamma=2.0).mean())(
        jnp.ones((2, 1))
    )
    assert mean == 0.0
    assert not gradient.any()


@pytest.mark.parametrize("fill", [np.nan, np.inf])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_unlabelled_records_add_nothing_to_balanced_losses(kind, fill):
    logits, label = losses_test.make_outputs(kind=kind).emotion, losses_test.make_batch(kind=kind).emotion
    keep = np.asarray(label.is_labelled)

    def mean(x):
        if kind == "softmax":
            return softmax_cross_entropy(x, label, focal_gamma=2.0, logit_shift=jnp.log(PRIORS)).mean()
        return sigmoid_cross_entropy(x, label, focal_gamma=2.0).mean()

    clean, gradient = jax.value_and_grad(mean)(logits)
    value, spoiled = jax.value_and_grad(mean)(jnp.asarray(np.where(keep[:, None], logits, fill)))
    assert value == clean
    np.testing.assert_array_equal(spoiled, gradient)
    assert not np.asarray(spoiled)[~keep].any()


def test_adjusted_loss_and_its_gradient_are_torchs_of_shifted_logits_for_emotion_and_intent():
    outputs, batch = losses_test.make_outputs(), losses_test.make_batch()
    config = losses_test.make_config(logit_adjustment=1.5)
    log_priors = {"emotion": np.log(PRIORS), "intent": np.log([0.7, 0.2, 0.1]).astype(np.float32)}
    for task in ("emotion", "intent"):
        label, logits = getattr(batch, task), getattr(outputs, task)
        keep = np.asarray(label.is_labelled)
        peer_logits = torch.tensor(np.asarray(logits)[keep], requires_grad=True)
        target = torch.tensor(np.asarray(label.value)[keep], dtype=torch.int64)
        peer = torch.nn.functional.cross_entropy(peer_logits + 1.5 * torch.tensor(log_priors[task]), target)
        peer.backward()

        def mean(x, task=task):
            changed = outputs.replace(**{task: x})
            return task_losses(changed, batch, config, log_priors=jax.tree.map(jnp.asarray, log_priors))[task].mean()

        value, gradient = jax.value_and_grad(mean)(logits)
        np.testing.assert_allclose(value, peer.item(), rtol=1e-6)
        np.testing.assert_allclose(np.asarray(gradient)[keep], peer_logits.grad.numpy(), atol=1e-7)


def test_adjusted_loss_is_least_where_the_logits_say_nothing_but_the_classes_shares():
    """Records that differ in nothing: with tau 1 equal logits are best, whatever the shares."""
    value = np.repeat(np.arange(5), (PRIORS * 100).round().astype(int))
    label = Label(value=jnp.asarray(value, jnp.int32), is_labelled=jnp.ones(100, bool))

    def mean(logits, tau):
        rows = jnp.broadcast_to(logits[None], (100, 5))
        return softmax_cross_entropy(rows, label, logit_shift=tau * jnp.log(PRIORS)).mean()

    np.testing.assert_allclose(jax.grad(mean)(jnp.zeros(5), 1.0), np.zeros(5), atol=1e-7)
    np.testing.assert_allclose(jax.grad(mean)(jnp.log(PRIORS), 0.0), np.zeros(5), atol=1e-7)


def test_without_priors_as_in_evaluation_nothing_is_adjusted():
    outputs, batch = losses_test.make_outputs(), losses_test.make_batch()
    plain = task_losses(outputs, batch, losses_test.CONFIG)
    adjusting = task_losses(outputs, batch, losses_test.make_config(logit_adjustment=1.0))
    jax.tree.map(np.testing.assert_array_equal, adjusting, plain)


def test_focal_loss_reaches_both_tasks_and_counts_stay_those_of_the_targets():
    outputs, batch = losses_test.make_outputs(), losses_test.make_batch()
    config = losses_test.make_config(focal_gamma=2.0)
    found = task_losses(outputs, batch, config, losses_test.CLASS_WEIGHTS)
    expected = {
        "emotion": softmax_cross_entropy(outputs.emotion, batch.emotion, losses_test.CLASS_WEIGHTS, focal_gamma=2.0),
        "intent": softmax_cross_entropy(outputs.intent, batch.intent, focal_gamma=2.0),
    }
    for task, losses in expected.items():
        np.testing.assert_array_equal(found[task].values, losses.values)
        assert task_counts(batch, config, losses_test.CLASS_WEIGHTS)[task] == losses.count()


@pytest.fixture(scope="module")
def train_split(data):
    return Dataset.open(data).split("train")


def test_priors_are_the_shares_among_the_labelled_records_of_the_split(train_split, monkeypatch):
    records = np.arange(train_split.num_records)
    values = {name: train_split.gather_label(name, records)[0] for name in ("emotion", "intent")}
    # Every other record is not labelled.
    monkeypatch.setattr(type(train_split), "gather_label", lambda self, name, _: (values[name], records % 2 == 0))
    found = class_log_priors(train_split, losses_test.make_config(logit_adjustment=0.5))
    assert list(found) == ["emotion", "intent"]
    for name, value in values.items():
        np.testing.assert_allclose(np.exp(found[name]), np.bincount(value[::2]) / len(value[::2]), rtol=1e-6)
    emotion_only = losses_test.make_config(logit_adjustment=0.5, intent="none")
    assert list(class_log_priors(train_split, emotion_only)) == ["emotion"]
    assert class_log_priors(train_split, losses_test.CONFIG) == {}


def test_class_without_a_training_record_is_refused_by_name(train_split, monkeypatch):
    records = np.arange(train_split.num_records)
    value = np.zeros(len(records), np.int32)
    monkeypatch.setattr(type(train_split), "gather_label", lambda self, name, _: (value, records >= 0))
    config = dataclasses.replace(losses_test.CONFIG, logit_adjustment=1.0)
    with pytest.raises(InputError, match=r"logit_adjustment = 1\.0: no record of split train .* has emotion 'joy'"):
        class_log_priors(train_split, config)
