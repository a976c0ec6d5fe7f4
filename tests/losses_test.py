import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from mmei_jax import losses as losses_lib
from mmei_jax.config import LossConfig
from mmei_jax.losses import (
    RecordLosses,
    absolute_error,
    class_weights_by_name,
    sigmoid_cross_entropy,
    softmax_cross_entropy,
    task_counts,
    task_losses,
    total_loss,
)
from mmei_jax.types import Batch, InputError, Items, Label, Outputs, RankingTargets, Slate

NUM_RECORDS, EMOTIONS, INTENTS, SLATE, EMBEDDING = 12, 5, 3, 4, 6
CONFIG = LossConfig(
    emotion="softmax",
    emotion_label="emotion",
    emotion_class_weights=(),
    focal_gamma=0.0,
    logit_adjustment=0.0,
    intent="softmax",
    ranking="in_batch_softmax",
    recognition_weight=1.0,
    ranking_weight=0.5,
    task_weighting="fixed",
    temperature=0.5,
    logq_correction=True,
    remove_accidental_hits=True,
)
CLASS_WEIGHTS = jnp.array([0.5, 2.0, 1.0, 0.25, 3.0], jnp.float32)
KINDS = ("softmax", "sigmoid", "regression")
RANKINGS = ("in_batch_softmax", "bpr", "listnet")


def make_config(**changes):
    return dataclasses.replace(CONFIG, **changes)


def make_items(*shape):
    return Items(features=jnp.zeros((*shape, 2)), kind=jnp.zeros(shape, jnp.int32))


def make_outputs(seed=0, *, kind="softmax", num_records=NUM_RECORDS):
    random = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(random.normal(size=shape), jnp.float32)

    return Outputs(
        emotion=normal(num_records) if kind == "regression" else normal(num_records, EMOTIONS),
        intent=normal(num_records, INTENTS),
        modality_weights=jnp.zeros((num_records, 3)),
        modality_vectors=jnp.zeros((num_records, 3, 2)),
        fused=jnp.zeros((num_records, 2)),
        emotion_state=None,
        intent_state=None,
        user_embedding=normal(num_records, EMBEDDING),
        positive_embedding=normal(num_records, EMBEDDING),
        slate_embedding=normal(num_records, SLATE, EMBEDDING),
        task_log_variances=None,
    )


def make_label(random, kind, is_labelled):
    if kind == "softmax":
        value = jnp.asarray(random.integers(0, EMOTIONS, NUM_RECORDS), jnp.int32)
    elif kind == "sigmoid":
        value = jnp.asarray(random.integers(0, 2, (NUM_RECORDS, EMOTIONS)), jnp.float32)
    else:
        value = jnp.asarray(random.uniform(-3, 3, NUM_RECORDS), jnp.float32)
    return Label(value=value, is_labelled=jnp.asarray(is_labelled))


def make_batch(seed=1, *, kind="softmax"):
    """Records with an emotion: all but 1, 6. With an intent: all but 0. With a positive: all but 2, 7."""
    random = np.random.default_rng(seed)
    record = np.arange(NUM_RECORDS)
    is_shown = (
        (record != 2)[:, None] & (record != 7)[:, None] & (np.arange(SLATE)[None, :] < 1 + record[:, None] % SLATE)
    )
    has_positive = is_shown.any(axis=1)
    slate = Slate(
        items=make_items(NUM_RECORDS, SLATE),
        item_index=jnp.asarray(np.where(is_shown, random.integers(0, 50, is_shown.shape), -1), jnp.int32),
        feedback=jnp.asarray(np.where(is_shown, random.integers(1, 6, is_shown.shape), 0), jnp.float32),
        is_shown=jnp.asarray(is_shown),
    )
    ranking = RankingTargets(
        positive=make_items(NUM_RECORDS),
        # Four items only: accidental hits abound.
        positive_index=jnp.asarray(np.where(has_positive, record % 4, -1), jnp.int32),
        has_positive=jnp.asarray(has_positive),
        log_sampling_probability=jnp.asarray(
            np.where(has_positive, np.log(np.array([0.1, 0.2, 0.3, 0.4]))[record % 4], 0), jnp.float32
        ),
        relevant_index=jnp.full((NUM_RECORDS, 1), -1, jnp.int32),
        slate=slate,
    )
    return Batch(
        vision=None,
        audio=None,
        text=None,
        is_record=jnp.ones(NUM_RECORDS, bool),
        record_index=jnp.arange(NUM_RECORDS, dtype=jnp.int32),
        emotion=make_label(random, kind, ~np.isin(record, [1, 6])),
        intent=Label(
            value=jnp.asarray(random.integers(0, INTENTS, NUM_RECORDS), jnp.int32), is_labelled=jnp.asarray(record != 0)
        ),
        ranking=ranking,
    )


def emotion_loss(kind, logits, label, class_weights=None):
    if kind == "softmax":
        return softmax_cross_entropy(logits, label, class_weights)
    return sigmoid_cross_entropy(logits, label) if kind == "sigmoid" else absolute_error(logits, label)


def torch_emotion_loss(kind, logits, value, class_weights=None):
    if kind == "softmax":
        weight = None if class_weights is None else torch.tensor(np.asarray(class_weights))
        return torch.nn.functional.cross_entropy(logits, torch.tensor(value, dtype=torch.int64), weight=weight)
    function = (
        torch.nn.functional.binary_cross_entropy_with_logits if kind == "sigmoid" else torch.nn.functional.l1_loss
    )
    return function(logits, torch.tensor(value))


@pytest.mark.parametrize(("kind", "class_weights"), [*((kind, None) for kind in KINDS), ("softmax", CLASS_WEIGHTS)])
def test_mean_and_gradient_equal_torch_on_the_labelled_records(kind, class_weights):
    logits, label = make_outputs(kind=kind).emotion * 20, make_batch(kind=kind).emotion
    keep = np.asarray(label.is_labelled)
    peer_logits = torch.tensor(np.asarray(logits)[keep], requires_grad=True)
    peer = torch_emotion_loss(kind, peer_logits, np.asarray(label.value)[keep], class_weights)
    peer.backward()

    mean, gradient = jax.value_and_grad(lambda x: emotion_loss(kind, x, label, class_weights).mean())(logits)

    np.testing.assert_allclose(mean, peer.item(), rtol=1e-6)
    np.testing.assert_allclose(np.asarray(gradient)[keep], peer_logits.grad.numpy(), atol=1e-7)
    assert not np.asarray(gradient)[~keep].any()


@pytest.mark.parametrize("fill", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_unlabelled_records_add_nothing_even_when_their_logits_are_not_finite(kind, fill):
    logits, label = make_outputs(kind=kind).emotion, make_batch(kind=kind).emotion
    keep = np.asarray(label.is_labelled)
    spoiled = jnp.asarray(np.where(keep.reshape(-1, *[1] * (logits.ndim - 1)), logits, fill))

    def mean(x):
        return emotion_loss(kind, x, label).mean()

    clean, gradient = jax.value_and_grad(mean)(logits)
    value, spoiled_gradient = jax.value_and_grad(mean)(spoiled)

    assert value == clean
    np.testing.assert_array_equal(spoiled_gradient, gradient)
    assert not np.asarray(spoiled_gradient)[~keep].any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_task_without_any_label_is_zero_with_zero_gradient(kind):
    logits, label = make_outputs(kind=kind).emotion, make_batch(kind=kind).emotion
    label = label.replace(is_labelled=jnp.zeros(NUM_RECORDS, bool))

    mean, gradient = jax.value_and_grad(lambda x: emotion_loss(kind, x, label).mean())(logits)

    assert mean == 0.0
    np.testing.assert_array_equal(gradient, np.zeros_like(logits))


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_that_is_not_finite_stays_visible_at_its_record_alone(kind):
    logits, label = make_outputs(kind=kind).emotion.at[3].set(jnp.nan), make_batch(kind=kind).emotion

    losses = emotion_loss(kind, logits, label)

    np.testing.assert_array_equal(np.flatnonzero(~np.isfinite(losses.values)), [3])
    assert not np.isfinite(losses.mean())


@pytest.mark.parametrize("class_id", [-1, EMOTIONS])
@pytest.mark.parametrize("class_weights", [None, CLASS_WEIGHTS])
def test_a_labelled_class_id_out_of_range_gives_nan_instead_of_another_class(class_id, class_weights):
    label = Label(value=jnp.array([class_id, 0], jnp.int32), is_labelled=jnp.array([True, True]))

    values = softmax_cross_entropy(jnp.zeros((2, EMOTIONS)), label, class_weights).values

    assert np.isnan(values).tolist() == [True, False]


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_outputs_are_computed_in_float32(kind):
    logits, label = make_outputs(kind=kind).emotion.astype(jnp.bfloat16), make_batch(kind=kind).emotion

    losses = emotion_loss(kind, logits, label)

    assert losses.values.dtype == jnp.float32
    np.testing.assert_array_equal(losses.values, emotion_loss(kind, logits.astype(jnp.float32), label).values)


def test_class_weights_follow_names_and_not_positions():
    pairs = (("joy", 2.0), ("anger", 0.5), ("neutral", 1.5))

    weights = class_weights_by_name(pairs, ("neutral", "joy", "anger"))

    assert weights.dtype == jnp.float32
    assert weights.tolist() == [1.5, 2.0, 0.5]


@pytest.mark.parametrize(
    ("pairs", "named"),
    [
        ((("joy", 1.0), ("neutral", 1.0), ("anger", 1.0)), "unknown class 'anger'"),
        ((("joy", 1.0),), "class 'neutral' is missing"),
        ((("joy", 1.0), ("neutral", 1.0), ("joy", 2.0)), "class 'joy' occurs 2 times"),
    ],
)
def test_class_weights_that_do_not_match_the_classes_are_refused(pairs, named):
    with pytest.raises(InputError, match=named) as error:
        class_weights_by_name(pairs, ("neutral", "joy"))

    assert "emotion_class_weights" in str(error.value)
    assert "neutral, joy" in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranking", RANKINGS)
def test_task_losses_are_those_that_the_configuration_names(kind, ranking):
    outputs, batch = make_outputs(kind=kind), make_batch(kind=kind)
    class_weights = CLASS_WEIGHTS if kind == "softmax" else None
    config = make_config(emotion=kind, ranking=ranking)

    found = task_losses(outputs, batch, config, class_weights)

    options = {"temperature": config.temperature}
    if ranking == "listnet":
        expected = losses_lib.listnet(outputs.user_embedding, outputs.slate_embedding, batch.ranking.slate, **options)
    else:
        options["remove_accidental_hits"] = True
        options |= {"logq_correction": True} if ranking == "in_batch_softmax" else {}
        function = getattr(losses_lib, ranking)
        expected = function(outputs.user_embedding, outputs.positive_embedding, batch.ranking, **options)
    assert list(found) == ["emotion", "intent", "ranking"]
    np.testing.assert_array_equal(
        found["emotion"].values, emotion_loss(kind, outputs.emotion, batch.emotion, class_weights).values
    )
    np.testing.assert_array_equal(found["intent"].values, softmax_cross_entropy(outputs.intent, batch.intent).values)
    np.testing.assert_array_equal(found["ranking"].values, expected.values)


@pytest.mark.parametrize(
    ("key", "value", "ranking"),
    [
        *(("temperature", 2.0, ranking) for ranking in RANKINGS),
        ("logq_correction", False, "in_batch_softmax"),
        ("remove_accidental_hits", False, "in_batch_softmax"),
        ("remove_accidental_hits", False, "bpr"),
    ],
)
def test_every_key_of_a_ranking_loss_changes_it(key, value, ranking):
    outputs, batch, config = make_outputs(), make_batch(), make_config(ranking=ranking)

    default = task_losses(outputs, batch, config)["ranking"].mean()
    changed = task_losses(outputs, batch, dataclasses.replace(config, **{key: value}))["ranking"].mean()

    assert abs(default - changed) > 1e-3


def test_tasks_that_are_off_give_no_loss():
    outputs = make_outputs().replace(intent=None, user_embedding=None, positive_embedding=None, slate_embedding=None)
    batch = make_batch().replace(intent=None, ranking=None)

    assert list(task_losses(outputs, batch, make_config(intent="none", ranking="none"))) == ["emotion"]


@pytest.mark.parametrize(
    ("holder", "field"),
    [
        *(("outputs", field) for field in ("emotion", "intent", "user_embedding", "positive_embedding")),
        *(("batch", field) for field in ("emotion", "intent", "ranking")),
    ],
)
def test_a_task_that_is_on_but_missing_is_named(holder, field):
    parts = {"outputs": make_outputs(), "batch": make_batch()}
    parts[holder] = parts[holder].replace(**{field: None})

    with pytest.raises(ValueError, match=f"{holder}.{field} is None"):
        task_losses(parts["outputs"], parts["batch"], CONFIG)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranking", [*RANKINGS, "none"])
def test_counts_from_targets_alone_equal_the_losses_counts(kind, ranking):
    class_weights = CLASS_WEIGHTS if kind == "softmax" else None
    batch, config = make_batch(kind=kind), make_config(emotion=kind, ranking=ranking)
    losses = task_losses(make_outputs(kind=kind), batch, config, class_weights)

    counts = task_counts(batch, config, class_weights)

    assert list(counts) == list(losses)
    assert counts == {task: records.count() for task, records in losses.items()}


def make_record_losses(*values):
    return RecordLosses(
        values=jnp.asarray(values, jnp.float32), is_counted=jnp.ones(len(values), bool), weights=jnp.ones(len(values))
    )


def test_total_loss_is_equation_6():
    values = {"emotion": (1.0, 2.0), "intent": (4.0,), "ranking": (3.0, 7.0)}
    losses = {task: make_record_losses(*some) for task, some in values.items()}

    loss, scalars = total_loss(losses, make_config(recognition_weight=2.0, ranking_weight=0.25))

    assert loss == 2.0 * (1.5 + 4.0) + 0.25 * 5.0
    expected = {"loss": 12.25, "loss/emotion": 1.5, "loss/intent": 4.0, "loss/ranking": 5.0}
    assert {name: float(value) for name, value in scalars.items()} == expected


def test_uncertainty_weighs_each_task_by_its_own_learned_variance():
    losses = {"emotion": make_record_losses(2.0), "ranking": make_record_losses(8.0)}
    log_variances = jnp.log(jnp.array([2.0, 4.0]))
    config = make_config(task_weighting="uncertainty", ranking_weight=0.5)

    loss, scalars = total_loss(losses, config, log_variances)

    expected = (2.0 / 2.0 + np.log(2.0) / 2) + 0.5 * (8.0 / 4.0 + np.log(4.0) / 2)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert scalars["loss/ranking"] == 8.0


def test_uncertainty_is_least_where_the_variance_fits_the_loss():
    def loss(log_variances):
        config = make_config(task_weighting="uncertainty")
        return total_loss({"emotion": make_record_losses(3.0)}, config, log_variances)[0]

    # d/ds [exp(-s) L + s / 2] = 0 at exp(s) = 2 L.
    np.testing.assert_allclose(jax.grad(loss)(jnp.log(jnp.array([6.0]))), [0.0], atol=1e-7)


def test_an_absent_task_sends_no_gradient_to_its_variance():
    empty = RecordLosses(values=jnp.zeros(2), is_counted=jnp.zeros(2, bool), weights=jnp.zeros(2))
    losses = {"emotion": make_record_losses(3.0), "intent": empty}
    config = make_config(task_weighting="uncertainty")

    gradient = jax.grad(lambda log_variances: total_loss(losses, config, log_variances)[0])(jnp.array([0.5, 0.7]))

    assert gradient[0] != 0.0
    assert gradient[1] == 0.0


@pytest.mark.parametrize("log_variances", [None, jnp.zeros(3)])
def test_learned_weights_without_one_variance_per_task_are_refused(log_variances):
    losses = {"emotion": make_record_losses(3.0), "intent": make_record_losses(1.0)}

    with pytest.raises(ValueError, match="one for each of emotion, intent"):
        total_loss(losses, make_config(task_weighting="uncertainty"), log_variances)


@pytest.mark.parametrize("task_weighting", ["fixed", "uncertainty"])
def test_micro_batches_divided_by_the_whole_batchs_counts_add_up_to_the_whole_batch(task_weighting):
    # Of the second micro-batch two emotions and one slate are missing: the micro-batches' own means differ.
    config = make_config(ranking="listnet", task_weighting=task_weighting)
    outputs, batch = make_outputs(), make_batch()
    outputs = outputs.replace(task_log_variances=jnp.array([0.3, -0.4, 0.1]))
    counts = task_counts(batch, config, CLASS_WEIGHTS)

    def loss(logits, log_variances, rows, counts):
        some = jax.tree.map(lambda leaf: leaf[rows], outputs.replace(emotion=logits, task_log_variances=None))
        losses = task_losses(some, jax.tree.map(lambda leaf: leaf[rows], batch), config, CLASS_WEIGHTS)
        return total_loss(losses, config, log_variances, counts=counts)

    differentiate = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    whole = differentiate(outputs.emotion, outputs.task_log_variances, np.arange(NUM_RECORDS), None)
    parts = [
        differentiate(outputs.emotion, outputs.task_log_variances, rows, counts)
        for rows in np.array([[0, 2, 3, 4], [1, 6, 7, 11], [5, 8, 9, 10]])
    ]

    added = jax.tree.map(lambda *leaves: sum(leaves), *parts)
    jax.tree.map(lambda left, right: np.testing.assert_allclose(left, right, atol=1e-6), added, whole)


def test_a_jitted_step_through_every_task_equals_the_eager_one():
    outputs, batch = make_outputs(), make_batch()

    def loss(outputs, batch):
        return total_loss(task_losses(outputs, batch, CONFIG, CLASS_WEIGHTS), CONFIG)[0]

    np.testing.assert_allclose(jax.jit(loss)(outputs, batch), loss(outputs, batch), rtol=1e-6)
