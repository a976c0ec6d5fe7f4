"""Replicas that train as one program are the runs that they would be alone."""

import dataclasses
import functools
import subprocess
import sys

import jax
import numpy as np
import pytest

from mmei_jax import input_pipeline
from mmei_jax.batching import BatchReader
from mmei_jax.device_split import Planner, gather_batch, read_device_split
from mmei_jax.item_words import open_dataset
from mmei_jax.optimizer import make_optimizer, make_schedule
from mmei_jax.packing import Arranger
from mmei_jax.records import Dataset
from mmei_jax.replica_memory import estimate_replicas
from mmei_jax.replicas import VARIED_KEYS, Replicas, ReplicaState, replace_key
from mmei_jax.sharding import batch_sharding, make_evaluation_mesh, mesh_over, replicated
from mmei_jax.state import build_model, initial_encoders, initial_state, state_shapes, tasks_of, variable_shapes
from mmei_jax.train_step import jit_train_step, make_train_step
from mmei_jax.types import InputError
from tests import processes, random_encoders, tiny

PACKING = {"records_per_row": 4, "num_rows": (8, 10), "tokens_per_row": {"vision": 28, "audio": 40, "text": 28}}
VARIED = {
    "seed": [0, 2**32 - 1],
    "optimizer.learning_rate": [1e-3, 3e-3],
    "optimizer.weight_decay": [0.0, 0.1],
    "model.dropout_rate": [0.1, 0.3],
    "model.modality_dropout_rate": [0.2, 0.0],
    "loss.recognition_weight": [1.0, 0.5],
    "loss.ranking_weight": [0.5, 0.0],
    "loss.temperature": [0.1, 0.2],
}


def prepare(config, varied, mesh=None):
    dataset = open_dataset(config)
    split = dataset.split(*config.data.train_splits)
    mesh = mesh or make_evaluation_mesh()
    replicas = Replicas(config, varied, tasks_of(config, dataset), split, mesh)
    table = read_device_split(split, config, input_pipeline.ranking_statistics(dataset, config))
    return replicas, jax.device_put(table, replicated(mesh))


def train_together(config, varied, num_steps, steps_per_dispatch=None, mesh=None):
    """States after, and the losses ``[replicas, steps]``."""
    replicas, table = prepare(config, varied, mesh)
    state, losses = replicas.initial_state({}, initial_encoders(config.model)), []
    for start in range(0, num_steps, steps_per_dispatch or num_steps):
        stop = min(start + (steps_per_dispatch or num_steps), num_steps)
        plan = replicas.plan(start, stop, steps_per_dispatch)
        state, report = replicas.update(state, table, plan, stop - start)
        losses.append(jax.device_get(report.loss)[:, : stop - start])
    return state, np.concatenate(losses, axis=1)


def train_alone(config, num_steps):
    """The state after, and the losses ``[steps]``, of an ordinary run."""
    dataset, mesh = open_dataset(config), mesh_over(jax.devices()[:1])
    model = build_model(config, dataset)
    num_records = dataset.split(*config.data.train_splits).num_records
    total = input_pipeline.num_steps(num_records, config.data.batch_size, config.train.num_epochs)
    schedule = make_schedule(config.optimizer, num_steps=total, steps_per_epoch=num_records / config.data.batch_size)
    optimizer = make_optimizer(config.optimizer, variable_shapes(model)["params"], schedule)
    encoder = initial_encoders(config.model)
    state = initial_state(model, optimizer, mesh, seed=config.seed, statistics={}, encoders=encoder)
    step = jit_train_step(make_train_step(model, optimizer, config, None), state_shapes(model, optimizer, mesh))
    losses = []
    batches = input_pipeline.train_iterator(dataset, config, batch_sharding(mesh))
    for _ in range(num_steps):
        state, report = step(state, next(batches))
        losses.append(float(report.loss))
    batches.close()
    return state, np.array(losses)


@functools.cache
def compiled_model(config):
    model = build_model(config, Dataset.open(config.data.path))
    return jax.jit(functools.partial(model.apply, is_training=False))


def logits(config, variables):
    """Of the validation records, ``[records, emotions + intents]``."""
    dataset, mesh = Dataset.open(config.data.path), mesh_over(jax.devices()[:1])
    batches = input_pipeline.evaluation_batches(dataset, config, config.data.validation_splits, batch_sharding(mesh))
    outputs = [jax.device_get(compiled_model(config)(variables, batch)) for batch in batches]
    batches.close()
    return np.concatenate([np.concatenate([part.emotion, part.intent], axis=1) for part in outputs])


def replica(tree, index):
    return jax.tree.map(lambda leaf: np.asarray(leaf)[index], tree)


def assert_replica_equals_run_alone(config, own_config, num_steps, losses, variables):
    """Losses and logits are those of the run that the replica's own configuration describes."""
    alone, expected = train_alone(own_config, num_steps)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    found, own = logits(config, variables), logits(config, jax.device_get(alone.variables))
    np.testing.assert_allclose(found, own, atol=1e-5)


@pytest.mark.parametrize("packing", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["padded", "packed"])
def test_replica_equals_the_run_of_its_seed_and_numbers(data, packing):
    # Two modalities have all that three have, and compile in two thirds of the time.
    two = {"train__num_epochs": 6, "data__modalities": ("vision", "text")}
    config = tiny.config(data, **two, **({"data__packing": PACKING} if packing else {}))
    num_steps = 50
    state, losses = train_together(config, VARIED, num_steps, steps_per_dispatch=7)
    assert set(VARIED) == set(VARIED_KEYS)
    for index in range(2):
        alone = config
        for key, values in VARIED.items():
            alone = replace_key(alone, key, values[index])
        variables = replica(state.train.variables, index)
        assert_replica_equals_run_alone(config, alone, num_steps, losses[index], variables)
    # What is compared differs: the replicas learn different things.
    assert np.abs(losses[0] - losses[1]).max() > 0.1


# Two modalities and half the width: what is left to compile in the quick tier.
SMALL = {"model__dim": 8, "data__modalities": ("vision", "text")}


@pytest.mark.parametrize(
    ("num_steps", "compared", "changes"),
    [(4, (5,), SMALL), pytest.param(50, (0, 5), {}, marks=pytest.mark.slow)],
    ids=["small", "long"],
)
@pytest.mark.parametrize("architecture", ["multimodal_transformer", "late_fusion", "pooled_logistic"])
def test_replica_of_every_architecture_equals_the_run_of_its_seed(data, architecture, num_steps, compared, changes):
    config = tiny.config(data, model__architecture=architecture, train__num_epochs=6, **changes)
    state, losses = train_together(config, {"seed": [0, 5]}, num_steps)
    for seed in compared:
        index = [0, 5].index(seed)
        alone = dataclasses.replace(config, seed=seed)
        variables = replica(state.train.variables, index)
        assert_replica_equals_run_alone(config, alone, num_steps, losses[index], variables)
    assert np.abs(losses[0] - losses[1]).max() > 0.01


@pytest.fixture(scope="module")
def word_encoder(tmp_path_factory):
    return random_encoders.make(tmp_path_factory.mktemp("encoders")).converted["text"]


@pytest.mark.parametrize("training", ["frozen", "trained"])
def test_replica_with_a_tower_over_words_equals_the_run_of_its_seed(data, word_encoder, training):
    words = {
        "model__content_encoder": str(word_encoder),
        "model__content_encoder_training": training,
        "model__content_max_tokens": 8,
    }
    config = tiny.config(data, model__architecture="pooled_logistic", **words)
    state, losses = train_together(config, {"seed": [0, 5]}, 4)
    for seed, found in zip([0, 5], losses, strict=True):
        _, expected = train_alone(dataclasses.replace(config, seed=seed), 4)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert ("encoder" in state.train.parameters["content_tower"]) == (training == "trained")


def test_stopped_replica_stays_as_it_is_and_one_whose_loss_is_not_finite_stops_alone(data):
    config = tiny.config(data, model__architecture="pooled_logistic")
    varied = {"seed": [0, 1, 0], "optimizer.learning_rate": [1e-3, 1e-3, 1e30]}
    replicas, table = prepare(config, varied)
    state = replicas.initial_state({})
    before = jax.device_get(state.train)
    is_active = jax.device_put(np.array([True, False, True]), batch_sharding(replicas.mesh))
    state = ReplicaState(train=state.train, is_active=is_active)
    state, report = replicas.update(state, table, replicas.plan(0, 6), 6)
    after, losses = jax.device_get(state.train), jax.device_get(report.loss)
    assert list(jax.device_get(state.is_active)) == [True, False, False]
    jax.tree.map(lambda old, new: np.testing.assert_array_equal(old[1], new[1]), before, after)
    assert after.step[0] == 6
    assert after.step[2] == 0
    jax.tree.map(lambda old, new: np.testing.assert_array_equal(old[2], new[2]), before, after)
    assert np.isfinite(losses[:2]).all()
    assert not np.isfinite(losses[2]).all()
    _, alone = train_alone(replace_key(config, "optimizer.learning_rate", 1e-3), 6)
    np.testing.assert_allclose(losses[0], alone, rtol=1e-5)


TWO_DEVICES = """
import sys
import jax, numpy as np
from tests import tiny
from tests.replicas_test import train_together
assert jax.device_count() == 2
config = tiny.config(sys.argv[1], model__architecture=sys.argv[3])
_, losses = train_together(config, {"seed": [0, 1, 2, 3]}, 5)
np.save(sys.argv[2], losses)
"""


@pytest.mark.parametrize("architecture", [pytest.param("mmei", marks=pytest.mark.slow), "pooled_logistic"])
def test_replicas_on_two_devices_equal_those_on_one(data, tmp_path, architecture):
    path = tmp_path / "losses.npy"
    done = subprocess.run(
        [sys.executable, "-c", TWO_DEVICES, str(data), str(path), architecture],
        env=processes.environment(num_devices=2),
        cwd=processes.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    config = tiny.config(data, model__architecture=architecture)
    _, expected = train_together(config, {"seed": [0, 1, 2, 3]}, 5)
    np.testing.assert_allclose(np.load(path), expected, rtol=1e-5)


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("ranking", ["in_batch_softmax", "listnet", "none"])
def test_gathered_batch_is_what_the_reader_reads(data, packing, ranking):
    config = tiny.config(data, loss__ranking=ranking, **({"data__packing": PACKING} if packing else {}))
    dataset = Dataset.open(data)
    split, statistics = dataset.split("train"), input_pipeline.ranking_statistics(dataset, config)
    indices = np.random.default_rng(0).permutation(split.num_records)[: config.data.batch_size]
    indices[3] = -1
    layout, places = Arranger(split, config.data, len(indices)).arrange(indices)
    expected = BatchReader(split, config, statistics).read(places, layout)
    assert (layout.records_per_row > 1) == packing
    table = read_device_split(split, config, statistics)
    found = gather_batch(table, replica(Planner(split, config).plan([indices]), 0))
    for name, sequence in expected.sequences().items():
        ours = getattr(found, name)
        np.testing.assert_array_equal(ours.segment_ids, sequence.segment_ids)
        is_token = sequence.segment_ids > 0
        np.testing.assert_array_equal(np.asarray(ours.features)[is_token], np.asarray(sequence.features)[is_token])
    is_record = np.asarray(expected.is_record)
    np.testing.assert_array_equal(found.is_record, is_record)
    np.testing.assert_array_equal(found.record_index, expected.record_index)
    for name in ("emotion", "intent"):
        np.testing.assert_array_equal(getattr(found, name).is_labelled, getattr(expected, name).is_labelled)
    parts = [(found.emotion, expected.emotion), (found.intent, expected.intent), (found.ranking, expected.ranking)]
    for ours, theirs in parts:
        jax.tree.map(
            lambda one, other: np.testing.assert_array_equal(np.asarray(one)[is_record], np.asarray(other)[is_record]),
            ours,
            theirs,
        )
    if expected.ranking is not None:
        for name in ("positive_index", "has_positive", "relevant_index"):
            np.testing.assert_array_equal(getattr(found.ranking, name), getattr(expected.ranking, name))
        if ranking == "listnet":
            np.testing.assert_array_equal(found.ranking.slate.is_shown, expected.ranking.slate.is_shown)


def test_batches_planned_together_share_the_larger_layout(data):
    config = tiny.config(data, data__packing={**PACKING, "num_rows": (6, 8)})
    split = Dataset.open(data).split("train")
    total = sum(split.lengths(name) for name in config.data.modalities)
    order = np.argsort(total, kind="stable")
    short, long = order[:16], order[-16:]
    planner = Planner(split, config)
    alone = planner.plan([short])
    together = planner.plan([short, long])
    assert together.record_index.shape[1] > alone.record_index.shape[1]
    for index, records in enumerate((short, long)):
        found = together.record_index[index]
        assert sorted(found[found >= 0]) == sorted(records)


@pytest.mark.parametrize(
    ("varied", "message"),
    [
        ({"seed": [0], "model.dim": [8]}, "'model.dim' cannot differ between replicas; expected one of seed, "),
        ({"seed": [0, 1], "loss.temperature": [0.1]}, "1 values of loss.temperature for 2 replicas"),
    ],
)
def test_what_cannot_differ_is_refused(data, varied, message):
    with pytest.raises(InputError, match=message):
        prepare(tiny.config(data), varied)


def test_predicted_memory_grows_with_the_replicas(data):
    config = tiny.config(data, model__architecture="pooled_logistic")
    bytes_needed = []
    for count in (1, 3):
        replicas, table = prepare(config, {"seed": list(range(count))})
        bytes_needed.append(replicas.peak_bytes(table, 4))
    state = sum(leaf.nbytes for leaf in jax.tree.leaves(replicas.initial_state({}))) / 3
    data_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(table))
    assert bytes_needed[0] > data_bytes + state
    assert bytes_needed[1] - bytes_needed[0] > 2 * state


def test_estimated_memory_is_like_the_compilers(data):
    """To the byte where kinds are arrays, and within a factor all together."""
    replicas, table = prepare(tiny.config(data, **tiny.LEAST), {"seed": [0, 1, 2]})
    by_kind = estimate_replicas(replicas, table, 4)
    state = replicas.initial_state({})
    assert by_kind["parameters"] == sum(leaf.nbytes for leaf in jax.tree.leaves(state.train.parameters))
    assert by_kind["optimizer state"] == sum(leaf.nbytes for leaf in jax.tree.leaves(state.train.optimizer_state))
    assert by_kind["records"] == sum(leaf.nbytes for leaf in jax.tree.leaves(table))
    assert by_kind["plans"] == 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(replicas.plan(0, 4)))
    # Each replica's best parameters and the next plan are no part of the program.
    best = sum(leaf.nbytes for leaf in jax.tree.leaves(state.train.variables))
    outside = best + by_kind["plans"] / 2
    assert 0.5 < (sum(by_kind.values()) - outside) / replicas.peak_bytes(table, 4) < 2.0
