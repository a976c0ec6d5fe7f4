"""Objectives without labels: against references, in chunks of any size, with modalities missing, on many devices."""

import dataclasses
import itertools
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmei_jax.pretraining_config import PretrainingConfig
from mmei_jax.pretraining_losses import (
    bounded_scale,
    contrastive_alignment,
    masked_feature_prediction,
    objective_counts,
    objective_losses,
    objective_weights,
    scale_parameter,
)
from mmei_jax.sharding import batch_sharding, mesh_over, place_activations
from mmei_jax.types import Batch, MaskedTokens, PretrainingOutputs, TokenSequence
from tests import processes

NAMES = ("vision", "audio", "text")
NUM_RECORDS, PROJECTION, SCALE = 13, 6, 7.0
CONFIG = PretrainingConfig(
    contrastive_weight=0.5,
    contrastive_chunk_size=4,
    projection_dim=PROJECTION,
    initial_temperature=0.07,
    masked_weight=2.0,
    mask_rate=1.0,
    mask_span=1,
)
EIGHT_DEVICES = "from tests.pretraining_losses_test import work_on_eight_devices; work_on_eight_devices()"


def make_projections(num_records=NUM_RECORDS, seed=0):
    random = np.random.default_rng(seed)
    drawn = {name: random.normal(size=(num_records, PROJECTION)).astype(np.float32) for name in NAMES}
    return {name: jnp.asarray(own / np.linalg.norm(own, axis=-1, keepdims=True)) for name, own in drawn.items()}


def make_presence(num_records=NUM_RECORDS, seed=1):
    """Some records lack a modality, one has a single one, one has none."""
    present = np.random.default_rng(seed).uniform(size=(num_records, 3)) > 0.2
    present[0] = True, False, False
    present[1] = False
    return {name: jnp.asarray(present[:, place]) for place, name in enumerate(NAMES)}


def reference(projections, present, scale):
    """Every score at once, in float64: by record the mean over its pairs, NaN where it has none."""
    found = np.full((3, len(present["text"])), np.nan)
    for place, (one, other) in enumerate(itertools.combinations(NAMES, 2)):
        both = np.flatnonzero(np.asarray(present[one] & present[other]))
        scores = scale * np.float64(projections[one])[both] @ np.float64(projections[other])[both].T
        lse = np.log(np.exp(scores).sum(axis=1)) + np.log(np.exp(scores).sum(axis=0))
        found[place, both] = lse / 2 - np.diag(scores)
    counted = (~np.isnan(found)).any(axis=0)
    means = np.full(found.shape[1], np.nan)
    means[counted] = np.nanmean(found[:, counted], axis=0)
    return means


def unchunked(projections, present, scale):
    """The same mean as ordinary JAX operations on all scores."""
    total, count = 0.0, 0.0
    for one, other in itertools.combinations(NAMES, 2):
        both = present[one] & present[other]
        scores = scale * jnp.matmul(projections[one], projections[other].T, precision="highest")
        scores = jnp.where(both[:, None] & both[None, :], scores, -1e30)
        lse = jax.nn.logsumexp(scores, axis=0) + jax.nn.logsumexp(scores, axis=1)
        total = total + jnp.where(both, lse / 2 - jnp.diagonal(scores), 0.0)
        count = count + both
    return jnp.sum(total / jnp.maximum(count, 1)) / jnp.sum(count > 0)


@pytest.mark.parametrize("chunk_size", [1, 4, 5, 13, 1000])
def test_alignment_equals_the_reference_whatever_the_chunk(chunk_size):
    projections, present = make_projections(), make_presence()
    losses = contrastive_alignment(projections, present, SCALE, chunk_size=chunk_size)
    expected = reference(projections, present, SCALE)
    np.testing.assert_array_equal(losses.is_counted, ~np.isnan(expected))
    assert not losses.is_counted[:2].any()
    np.testing.assert_allclose(losses.values, np.nan_to_num(expected), atol=1e-6)


def test_alignment_of_two_modalities_is_the_loss_of_clip_in_torch():
    # The process of eight devices imports this file without torch.
    import torch

    own = make_projections()
    pair = {name: own[name] for name in ("audio", "text")}
    everywhere = dict.fromkeys(pair, jnp.ones(NUM_RECORDS, bool))
    losses = contrastive_alignment(pair, everywhere, SCALE, chunk_size=4)
    audio, text = (torch.tensor(np.asarray(pair[name])) for name in pair)
    logits, target = SCALE * audio @ text.T, torch.arange(NUM_RECORDS)
    ours = torch.nn.functional.cross_entropy
    np.testing.assert_allclose(losses.mean(), (ours(logits, target) + ours(logits.T, target)) / 2, rtol=1e-6)


@pytest.mark.parametrize("chunk_size", [1, 5, 1000])
def test_gradients_equal_those_of_all_scores_at_once(chunk_size):
    present = make_presence()

    def chunked(projections, scale):
        return contrastive_alignment(projections, present, scale, chunk_size=chunk_size).mean()

    arguments = make_projections(), jnp.float32(SCALE)
    ours = jax.jit(jax.grad(chunked, argnums=(0, 1)))(*arguments)
    theirs = jax.grad(lambda *given: unchunked(given[0], present, given[1]), argnums=(0, 1))(*arguments)
    jax.tree.map(lambda own, other: np.testing.assert_allclose(own, other, atol=1e-6), ours, theirs)
    assert abs(theirs[1]) > 1e-3


def test_absent_modalities_and_filler_change_nothing_and_get_no_gradient():
    projections, present = make_projections(), make_presence()
    dirty = {name: jnp.where(present[name][:, None], own, jnp.nan) for name, own in projections.items()}

    def mean(given):
        return contrastive_alignment(given, present, SCALE, chunk_size=4).mean()

    clean_value, clean = jax.value_and_grad(mean)(projections)
    value, gradient = jax.value_and_grad(mean)(dirty)
    assert value == clean_value
    for name in NAMES:
        np.testing.assert_array_equal(gradient[name], clean[name])
        np.testing.assert_array_equal(gradient[name][~present[name]], 0.0)
    assert all(np.abs(gradient[name]).max() > 0 for name in NAMES)


def test_batch_without_a_pair_is_zero_with_zero_gradient():
    lonely = {name: jnp.full(NUM_RECORDS, name == "text") for name in NAMES}

    def total(projections, scale):
        losses = contrastive_alignment(projections, lonely, scale, chunk_size=4)
        return losses.mean() + losses.count()

    value, gradients = jax.value_and_grad(total, argnums=(0, 1))(make_projections(), jnp.float32(SCALE))
    assert value == 0.0
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(gradients))


def temporary_bytes(num_records, chunk_size):
    """What the compiler sets aside for the loss and its gradients."""
    shapes = {name: jax.ShapeDtypeStruct((num_records, PROJECTION), jnp.float32) for name in NAMES}
    presence = {name: jax.ShapeDtypeStruct((num_records,), bool) for name in NAMES}

    def mean(projections, present, scale):
        return contrastive_alignment(projections, present, scale, chunk_size=chunk_size).mean()

    compiled = jax.jit(jax.grad(mean, argnums=(0, 2))).lower(shapes, presence, jnp.float32(1.0)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_grows_with_the_batch_not_with_its_square():
    small, large, whole = temporary_bytes(1024, 32), temporary_bytes(2048, 32), temporary_bytes(2048, 2048)
    assert large < 2.2 * small
    # All scores of one pair at once: 16 MiB.
    assert large < 2048 * 2048 < whole


def make_masked(num_rows=4, num_segments=2, seed=2):
    """Two modalities; the first record has no masked token."""
    random = np.random.default_rng(seed)
    masked = {}
    for name, num_tokens, dim in (("audio", 5, 3), ("text", 4, 6)):
        ids = random.integers(0, num_segments + 1, (num_rows, num_tokens)).astype(np.int32)
        ids[0] = np.where(ids[0] == 1, 0, ids[0])
        drawn = random.normal(size=(2, num_rows, num_tokens, dim)).astype(np.float32)
        masked[name] = MaskedTokens(jnp.asarray(drawn[0]), jnp.asarray(drawn[1]), jnp.asarray(ids))
    return masked


def test_masked_prediction_is_the_mean_over_each_records_masked_tokens():
    masked = make_masked()
    losses = masked_feature_prediction(masked, 8)
    for record in range(8):
        row, segment = divmod(record, 2)
        errors = []
        for tokens in masked.values():
            is_own = np.asarray(tokens.segment_ids[row]) == segment + 1
            errors += list(np.square(np.asarray(tokens.predicted - tokens.target)[row, is_own]).mean(axis=-1))
        assert bool(losses.is_counted[record]) == bool(errors)
        np.testing.assert_allclose(losses.values[record], np.mean(errors) if errors else 0.0, rtol=1e-6)
    assert not losses.is_counted[0]
    assert losses.is_counted[1:].any()


def test_masked_prediction_of_one_full_modality_is_torchs_mean_squared_error():
    import torch

    tokens = make_masked(num_segments=1)["text"].replace(segment_ids=jnp.ones((4, 4), jnp.int32))
    predicted, target = (torch.tensor(np.asarray(own)) for own in (tokens.predicted, tokens.target))
    expected = torch.nn.functional.mse_loss(predicted, target)
    np.testing.assert_allclose(masked_feature_prediction({"text": tokens}, 4).mean(), expected, rtol=1e-6)


def test_tokens_that_are_not_masked_have_no_effect_and_no_gradient():
    masked = make_masked()

    def mean(predicted):
        own = {name: tokens.replace(predicted=predicted[name]) for name, tokens in masked.items()}
        return masked_feature_prediction(own, 8).mean()

    clean = {name: tokens.predicted for name, tokens in masked.items()}
    dirty = {name: jnp.where(masked[name].segment_ids[..., None] > 0, own, jnp.nan) for name, own in clean.items()}
    value, gradient = jax.value_and_grad(mean)(dirty)
    assert value == mean(clean)
    for name, own in gradient.items():
        is_masked = np.asarray(masked[name].segment_ids) > 0
        np.testing.assert_array_equal(own[~is_masked], 0.0)
        assert np.abs(own[is_masked]).min() > 0


def test_nothing_masked_is_zero_with_zero_gradient():
    tokens = make_masked()["audio"]
    nothing = tokens.replace(segment_ids=jnp.zeros_like(tokens.segment_ids))

    def total(predicted):
        losses = masked_feature_prediction({"audio": nothing.replace(predicted=predicted)}, 8)
        return losses.mean() + losses.count()

    value, gradient = jax.value_and_grad(total)(tokens.predicted)
    assert value == 0.0
    assert not np.any(gradient)


def test_temperature_begins_where_it_is_told_and_stays_within_its_bounds():
    for temperature in (0.02, 0.07, 0.9):
        np.testing.assert_allclose(bounded_scale(scale_parameter(temperature)), 1 / temperature, rtol=1e-5)
    scales = jax.vmap(bounded_scale)(jnp.array([-50.0, -1.0, 1.0, 50.0]))
    assert scales.min() >= 1.0
    assert scales.max() <= 100.001
    # Within them it can always turn round.
    assert jax.grad(bounded_scale)(jnp.float32(5.0)) > 0.0


def make_batch():
    present = make_presence()
    sequences = {
        name: TokenSequence(jnp.zeros((NUM_RECORDS, 1, 2)), own[:, None].astype(int)) for name, own in present.items()
    }
    is_record = jnp.arange(NUM_RECORDS) < NUM_RECORDS - 2
    return Batch(**sequences, is_record=is_record, record_index=jnp.arange(NUM_RECORDS)), present


def test_objectives_are_those_that_are_on_and_their_counts_are_known_beforehand():
    batch, present = make_batch()
    present = {name: own & batch.is_record for name, own in present.items()}
    tokens = {
        "text": MaskedTokens(
            jnp.zeros((NUM_RECORDS, 1, 2)), jnp.ones((NUM_RECORDS, 1, 2)), jnp.ones((NUM_RECORDS, 1), int)
        )
    }
    outputs = PretrainingOutputs(make_projections(), present, jnp.float32(SCALE), tokens)
    losses = objective_losses(outputs, batch, CONFIG)
    counts = objective_counts(batch, CONFIG)
    assert list(losses) == list(counts) == list(objective_weights(CONFIG)) == ["contrastive", "masked_prediction"]
    assert (
        counts["contrastive"]
        == losses["contrastive"].count()
        == np.sum(sum(map(np.asarray, present.values()), 0 * np.zeros(NUM_RECORDS)) > 1)
    )
    chunk = contrastive_alignment(outputs.projections, present, SCALE, chunk_size=4)
    np.testing.assert_array_equal(losses["contrastive"].values, chunk.values)
    np.testing.assert_array_equal(losses["masked_prediction"].values, 1.0)
    for off, left in (("contrastive_weight", "masked_prediction"), ("masked_weight", "contrastive")):
        config = dataclasses.replace(CONFIG, **{off: 0.0})
        assert list(objective_losses(outputs, batch, config)) == list(objective_counts(batch, config)) == [left]
    nothing = dataclasses.replace(CONFIG, contrastive_weight=0.0, masked_weight=0.0)
    assert objective_losses(None, batch, nothing) == objective_counts(batch, nothing) == {}


def test_objective_whose_outputs_are_missing_is_refused():
    batch, present = make_batch()
    for outputs in (None, PretrainingOutputs({}, present, None, {})):
        with pytest.raises(ValueError, match="the outputs lack what the objectives contrastive, masked_prediction"):
            objective_losses(outputs, batch, CONFIG)


def work_on_eight_devices():
    """Writes losses and gradients of one batch on one device and split over eight, and what they compile to."""
    num_records = 64
    arguments = make_projections(num_records), make_presence(num_records), jnp.float32(SCALE)

    def mean(projections, present, scale):
        return contrastive_alignment(projections, present, scale, chunk_size=8).mean()

    found = {}
    for num_devices in (1, 8):
        mesh = mesh_over(jax.devices()[:num_devices])
        split = batch_sharding(mesh)
        placed = jax.device_put(arguments[:2], split)
        function = jax.jit(place_activations(mesh, jax.value_and_grad(mean, argnums=(0, 2))))
        compiled = function.lower(*placed, arguments[2]).compile()
        value, gradients = compiled(*placed, arguments[2])
        found[num_devices] = [float(value), *(np.asarray(leaf).tolist() for leaf in jax.tree.leaves(gradients))]
        text = compiled.as_text()
        # A device's scores: its own rows against a chunk of columns.
        found[f"scores on {num_devices}"] = f"f32[{num_records // num_devices},8]" in text
        found[f"gathers on {num_devices}"] = "all-gather" in text
    Path(sys.argv[1]).write_text(json.dumps(found))


def test_negatives_come_from_every_device_and_losses_are_those_of_one(tmp_path):
    path = tmp_path / "found.json"
    code, output = processes.run("-c", EIGHT_DEVICES, str(path), env=processes.environment(num_devices=8))
    assert code == 0, output
    found = json.loads(path.read_text())
    for ours, theirs in zip(found["8"], found["1"], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    expected = reference(make_projections(64), make_presence(64), SCALE)
    np.testing.assert_allclose(found["8"][0], np.nanmean(expected), rtol=1e-5)
    assert found["scores on 8"]
    assert found["gathers on 8"]
    assert not found["gathers on 1"]
