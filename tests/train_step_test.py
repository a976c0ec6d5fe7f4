"""One update: compiled once a shape, without implicit transfers, the same however it is cut into micro-batches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mmei_jax import input_pipeline
from mmei_jax.data_statistics import class_log_priors
from mmei_jax.losses import task_losses
from mmei_jax.records import Dataset
from mmei_jax.sharding import batch_sharding, make_mesh
from mmei_jax.state import build_model, initial_state, state_shapes
from mmei_jax.train_step import jit_train_step, make_train_step
from tests import tiny

# No randomness, and no loss that looks across the records of a micro-batch.
SEPARABLE = {"model__dropout_rate": 0.0, "model__modality_dropout_rate": 0.0, "loss__ranking": "none"}


# Losses for unbalanced classes.
BALANCED = {"loss__focal_gamma": 2.0, "loss__logit_adjustment": 1.0}
# Two modalities have all that three have, and one has dropout and frozen parameters: compiling takes the time here.
TWO = {"data__modalities": ("audio", "text")}
ONE = {"data__modalities": ("text",), "loss__ranking": "none"}


def prepare(config):
    """A jitted step, a fresh state and training batches on the mesh."""
    dataset = Dataset.open(config.data.path)
    mesh = make_mesh(config)
    model = build_model(config, dataset)
    optimizer = optax.sgd(0.1)
    state = initial_state(model, optimizer, mesh, seed=config.seed, statistics={})
    batches = input_pipeline.train_iterator(dataset, config, batch_sharding(mesh))
    log_priors = class_log_priors(dataset.split(*config.data.train_splits), config.loss)
    step = make_train_step(model, optimizer, config, None, log_priors)
    step = jit_train_step(step, state_shapes(model, optimizer, mesh))
    return step, state, batches


@pytest.mark.parametrize("changes", [TWO, {**BALANCED, **tiny.LEAST}], ids=["plain", "balanced"])
def test_accumulated_micro_batches_equal_the_whole_batch(data, changes):
    whole = tiny.config(data, **SEPARABLE, **changes)
    results = []
    for num_micro_batches in (1, 4):
        config = dataclasses.replace(
            whole, train=dataclasses.replace(whole.train, gradient_accumulation_steps=num_micro_batches)
        )
        step, state, batches = prepare(config)
        results.append(jax.device_get(step(state, next(batches))))
        batches.close()
    (state, report), (accumulated_state, accumulated_report) = results
    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=2e-6), accumulated_state, state)
    np.testing.assert_allclose(accumulated_report.loss, report.loss, rtol=1e-6)
    np.testing.assert_allclose(accumulated_report.gradient_norm, report.gradient_norm, rtol=1e-5)
    np.testing.assert_allclose(accumulated_report.modality_weights, report.modality_weights, rtol=1e-5)
    assert sorted(accumulated_report.record_index) == sorted(report.record_index)
    assert report.task_totals.keys() == {"emotion", "intent"}


def test_each_shape_compiles_once_and_no_update_transfers_implicitly(data):
    config = tiny.config(data, **tiny.LEAST)
    buckets = dataclasses.replace(config.data.max_tokens, vision=(10, 16), audio=(14, 24), text=(10, 16))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, max_tokens=buckets, batch_size=4))
    step, state, batches = prepare(config)
    compiled, shapes = [], set()

    def note(event, _seconds, **_):
        compiled.extend([event] if event == "/jax/core/compile/backend_compile_duration" else [])

    jax.monitoring.register_event_duration_secs_listener(note)
    counts = []
    with jax.transfer_guard("disallow"):
        for _, batch in zip(range(40), batches, strict=False):
            state, _ = step(state, batch)
            shapes.add(batch.audio.features.shape)
            counts.append((len(shapes), len(compiled)))
    batches.close()
    jax.monitoring.unregister_event_duration_listener(note)
    assert counts[-1] == (2, 2)
    assert all(num_shapes == num_compiled for num_shapes, num_compiled in counts)


def test_transfer_guard_would_catch_a_batch_on_the_host(data):
    step, state, batches = prepare(tiny.config(data, **tiny.LEAST))
    batch = jax.device_get(next(batches))
    batches.close()
    with jax.transfer_guard("disallow"), pytest.raises(Exception, match=r"[Dd]isallowed host-to-device transfer"):
        step(state, batch)


def test_dropout_depends_on_seed_and_step_alone(data):
    config = tiny.config(data, model__dropout_rate=0.5, **ONE)
    step, state, batches = prepare(config)
    batch = next(batches)
    batches.close()
    variables = jax.device_get(state)

    def loss(number):
        fresh = jax.tree.map(jax.numpy.asarray, variables)
        return float(step(fresh.replace(step=jax.numpy.asarray(number, "int32")), batch)[1].loss)

    assert loss(3) == loss(3)
    assert loss(3) != loss(4)


def test_frozen_parameters_do_not_move_and_are_not_in_the_gradient_norm(data):
    config = tiny.config(data, **{**SEPARABLE, **ONE})
    frozen = dataclasses.replace(
        config, optimizer=dataclasses.replace(config.optimizer, rate_multipliers=(("^embed_", 0.0),))
    )
    norms = []
    for used in (config, frozen):
        step, state, batches = prepare(used)
        before = jax.device_get(state.parameters)
        state, report = step(state, next(batches))
        batches.close()
        norms.append(float(report.gradient_norm))
    after = jax.device_get(state.parameters)
    names = [name for name in before if name.startswith("embed_")]
    assert names
    for name in names:
        jax.tree.map(np.testing.assert_array_equal, after[name], before[name])
    assert norms[1] < norms[0]


def test_update_adjusts_the_logits_by_the_training_splits_shares_and_evaluation_does_not(data):
    config = tiny.config(data, **SEPARABLE, **tiny.LEAST, loss__logit_adjustment=1.0)
    step, state, batches = prepare(config)
    batch = next(batches)
    batches.close()
    dataset = Dataset.open(data)
    model = build_model(config, dataset)
    outputs = model.apply({"params": state.parameters, "statistics": state.statistics}, batch, is_training=False)
    plain = {task: losses.mean() for task, losses in task_losses(outputs, batch, config.loss).items()}
    split = dataset.split("train")
    _, report = step(state, batch)
    for task in ("emotion", "intent"):
        value, _ = split.gather_label(task, np.arange(split.num_records))
        shares = np.bincount(value) / len(value)
        shifted = jax.nn.log_softmax(getattr(outputs, task) + jnp.log(shares)[None])
        label = getattr(batch, task)
        expected = -np.asarray(shifted)[np.arange(len(label.value)), label.value].mean()
        found = report.task_totals[task] / report.task_counts[task]
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        assert abs(found - plain[task]) > 0.01


def test_adjustment_without_priors_is_refused(data):
    config = tiny.config(data, **tiny.LEAST, loss__logit_adjustment=1.0)
    model = build_model(config, Dataset.open(data))
    with pytest.raises(ValueError, match="logit_adjustment is on, but log_priors is empty"):
        make_train_step(model, optax.sgd(0.1), config, None)
