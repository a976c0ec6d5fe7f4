import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from mmei_jax.ranking_losses import bpr, in_batch_softmax, listnet
from mmei_jax.types import Items, RankingTargets, Slate

NUM_RECORDS, EMBEDDING, SLATE = 10, 4, 5


def make_items(*shape):
    return Items(features=jnp.zeros((*shape, 2)), kind=jnp.zeros(shape, jnp.int32))


def make_targets(positive_index, log_probability=None):
    positive_index = np.asarray(positive_index)
    log_probability = np.zeros(len(positive_index)) if log_probability is None else np.asarray(log_probability)
    return RankingTargets(
        positive=make_items(len(positive_index)),
        positive_index=jnp.asarray(positive_index, jnp.int32),
        has_positive=jnp.asarray(positive_index >= 0),
        log_sampling_probability=jnp.asarray(log_probability, jnp.float32),
        relevant_index=jnp.full((len(positive_index), 1), -1, jnp.int32),
    )


def make_embeddings(seed=0, num_records=NUM_RECORDS):
    random = np.random.default_rng(seed)
    users, items = random.normal(size=(2, num_records, EMBEDDING))
    return jnp.asarray(users, jnp.float32), jnp.asarray(items, jnp.float32)


# Items 3 and 4 occur several times, records 2 and 7 have none.
POSITIVE_INDEX = np.array([3, 4, -1, 5, 3, 4, 6, -1, 3, 9])
LOG_PROBABILITY = np.where(POSITIVE_INDEX >= 0, np.log(0.01 * (POSITIVE_INDEX + 2)), 0.0)


def in_batch_options(**changes):
    return {"temperature": 0.3, "logq_correction": True, "remove_accidental_hits": True} | changes


@functools.partial(jax.jit, static_argnames="name")
def ranking_loss(name, users, items, targets):
    if name == "bpr":
        return bpr(users, items, targets, temperature=0.3, remove_accidental_hits=True)
    return in_batch_softmax(users, items, targets, **in_batch_options())


def negatives(index, remove_accidental_hits):
    """By the definition, one record at a time."""
    return [
        other
        for other in range(NUM_RECORDS)
        if other != index
        and POSITIVE_INDEX[other] >= 0
        and not (remove_accidental_hits and POSITIVE_INDEX[other] == POSITIVE_INDEX[index])
    ]


@pytest.mark.parametrize("logq_correction", [True, False])
@pytest.mark.parametrize("remove_accidental_hits", [True, False])
def test_in_batch_softmax_equals_torch_cross_entropy_over_the_definitions_candidates(
    logq_correction, remove_accidental_hits
):
    users, items = make_embeddings()
    targets = make_targets(POSITIVE_INDEX, LOG_PROBABILITY)
    options = in_batch_options(logq_correction=logq_correction, remove_accidental_hits=remove_accidental_hits)

    losses = in_batch_softmax(users, items, targets, **options)

    scores = np.asarray(users, np.float64) @ np.asarray(items, np.float64).T / 0.3
    scores = scores - LOG_PROBABILITY[None, :] * logq_correction
    for index in range(NUM_RECORDS):
        if POSITIVE_INDEX[index] < 0:
            assert losses.values[index] == 0.0
            continue
        candidates = [index, *negatives(index, remove_accidental_hits)]
        peer = torch.nn.functional.cross_entropy(torch.tensor(scores[index, candidates]), torch.tensor(0))
        np.testing.assert_allclose(losses.values[index], peer.item(), rtol=1e-5, atol=1e-6)
    assert losses.count() == 8


@pytest.mark.parametrize("remove_accidental_hits", [True, False])
def test_bpr_is_the_mean_over_the_definitions_negatives(remove_accidental_hits):
    users, items = make_embeddings()

    losses = bpr(
        users, items, make_targets(POSITIVE_INDEX), temperature=0.3, remove_accidental_hits=remove_accidental_hits
    )

    scores = np.asarray(users, np.float64) @ np.asarray(items, np.float64).T / 0.3
    for index in range(NUM_RECORDS):
        if POSITIVE_INDEX[index] < 0:
            assert losses.values[index] == 0.0
            continue
        difference = scores[index, index] - scores[index, negatives(index, remove_accidental_hits)]
        peer = -torch.nn.functional.logsigmoid(torch.tensor(difference)).mean()
        np.testing.assert_allclose(losses.values[index], peer.item(), rtol=1e-5, atol=1e-6)
    assert losses.count() == 8


def test_logq_by_hand():
    # All inner products are 0, items are drawn with 1/2 and 1/4: corrected scores log 2 and log 4.
    targets = make_targets([0, 1], np.log([0.5, 0.25]))

    values = in_batch_softmax(jnp.zeros((2, 2)), jnp.zeros((2, 2)), targets, **in_batch_options()).values

    np.testing.assert_allclose(values, [-np.log(2 / 6), -np.log(4 / 6)], rtol=1e-6)


def test_accidental_hits_by_hand():
    # Records 0 and 1 share an item: each has one negative, record 2; record 2 has both.
    targets, zeros = make_targets([7, 7, 8]), jnp.zeros((3, 2))

    removed = in_batch_softmax(zeros, zeros, targets, **in_batch_options()).values
    kept = in_batch_softmax(zeros, zeros, targets, **in_batch_options(remove_accidental_hits=False)).values

    np.testing.assert_allclose(removed, np.log([2, 2, 3]), rtol=1e-6)
    np.testing.assert_allclose(kept, np.log([3, 3, 3]), rtol=1e-6)


@pytest.mark.parametrize("name", ["in_batch_softmax", "bpr"])
@pytest.mark.parametrize("fill", [1e3, np.nan, np.inf])
def test_a_record_without_positive_is_neither_row_nor_candidate(name, fill):
    users, items = make_embeddings()
    keep = POSITIVE_INDEX >= 0
    users, items = (jnp.where(jnp.asarray(keep)[:, None], value, fill) for value in (users, items))

    def mean(users, items):
        return ranking_loss(name, users, items, make_targets(POSITIVE_INDEX, LOG_PROBABILITY)).mean()

    value, gradients = jax.value_and_grad(mean, argnums=(0, 1))(users, items)

    without = ranking_loss(name, users[keep], items[keep], make_targets(POSITIVE_INDEX[keep], LOG_PROBABILITY[keep]))
    np.testing.assert_allclose(value, without.mean(), rtol=1e-6)
    for gradient in gradients:
        assert not np.asarray(gradient)[~keep].any()
        assert np.asarray(gradient)[keep].any(axis=1).all()


@pytest.mark.parametrize("name", ["in_batch_softmax", "bpr"])
@pytest.mark.parametrize(("positive_index", "count"), [([-1, -1, -1], 0), ([-1, 4, -1], 1), ([4, 4, 4], 3)])
def test_without_any_negative_loss_and_gradient_are_zero(name, positive_index, count):
    users, items = make_embeddings(num_records=3)

    def loss(users, items):
        return ranking_loss(name, users, items, make_targets(positive_index)).mean()

    value, gradients = jax.value_and_grad(loss, argnums=(0, 1))(users, items)

    assert value == 0.0
    assert not any(np.asarray(gradient).any() for gradient in gradients)
    assert ranking_loss(name, users, items, make_targets(positive_index)).count() == count


@pytest.mark.parametrize("name", ["in_batch_softmax", "bpr"])
def test_an_embedding_that_is_not_finite_stays_visible(name):
    users, items = make_embeddings()

    losses = ranking_loss(name, users.at[4].set(jnp.nan), items, make_targets(POSITIVE_INDEX))

    np.testing.assert_array_equal(np.flatnonzero(~np.isfinite(losses.values)), [4])


@pytest.mark.parametrize("name", ["in_batch_softmax", "bpr"])
def test_large_scores_stay_finite(name):
    users, items = make_embeddings()

    def loss(users):
        return ranking_loss(name, users * 1e4, items, make_targets(POSITIVE_INDEX)).mean()

    value, gradient = jax.value_and_grad(loss)(users)

    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("name", ["in_batch_softmax", "bpr", "listnet"])
def test_scores_are_full_float32_products_on_accelerators_too(name):
    users, items = make_embeddings()
    if name == "listnet":
        vectors = jnp.zeros((NUM_RECORDS, SLATE, EMBEDDING))
        program = jax.make_jaxpr(lambda *inputs: listnet(*inputs, temperature=1.0).values)(users, vectors, make_slate())
    else:
        program = jax.make_jaxpr(lambda *inputs: ranking_loss(name, *inputs).values)(
            users, items, make_targets(POSITIVE_INDEX)
        )

    assert str(program).count("dot_general") == 1
    assert "precision=(Precision.HIGHEST, Precision.HIGHEST)" in str(program)


def make_slate(seed=0):
    """Slates of 0 to 5 shown items."""
    random = np.random.default_rng(seed)
    is_shown = np.arange(SLATE)[None, :] < (np.arange(NUM_RECORDS) % (SLATE + 1))[:, None]
    return Slate(
        items=make_items(NUM_RECORDS, SLATE),
        item_index=jnp.asarray(np.where(is_shown, 1, -1), jnp.int32),
        feedback=jnp.asarray(np.where(is_shown, random.integers(1, 6, is_shown.shape), 0), jnp.float32),
        is_shown=jnp.asarray(is_shown),
    )


def test_listnet_equals_torch_over_the_shown_items():
    users, _ = make_embeddings()
    slate_embedding = jnp.asarray(np.random.default_rng(5).normal(size=(NUM_RECORDS, SLATE, EMBEDDING)), jnp.float32)
    slate = make_slate()

    losses = listnet(users, slate_embedding, slate, temperature=0.3)

    for index in range(NUM_RECORDS):
        shown = np.asarray(slate.is_shown[index])
        assert losses.is_counted[index] == shown.any()
        if not shown.any():
            assert losses.values[index] == 0.0
            continue
        vectors = np.asarray(slate_embedding, np.float64)[index, shown]
        scores = torch.tensor(vectors @ np.asarray(users[index], np.float64) / 0.3)
        targets = torch.softmax(torch.tensor(np.asarray(slate.feedback, np.float64)[index, shown]), dim=0)
        peer = torch.nn.functional.cross_entropy(scores, targets)
        np.testing.assert_allclose(losses.values[index], peer.item(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fill", [1e3, np.nan])
def test_positions_that_were_not_shown_send_no_gradient(fill):
    users, _ = make_embeddings()
    slate = make_slate()
    is_shown = np.asarray(slate.is_shown)
    clean = np.random.default_rng(5).normal(size=(NUM_RECORDS, SLATE, EMBEDDING))
    spoiled = jnp.asarray(np.where(is_shown[:, :, None], clean, fill), jnp.float32)
    slate = slate.replace(feedback=jnp.where(slate.is_shown, slate.feedback, 9.0))

    def mean(users, vectors):
        return listnet(users, vectors, slate, temperature=0.3).mean()

    value, (user_gradient, gradient) = jax.value_and_grad(mean, argnums=(0, 1))(users, spoiled)

    assert value == mean(users, jnp.asarray(clean, jnp.float32))
    assert not np.asarray(gradient)[~is_shown].any()
    assert not np.asarray(user_gradient)[~is_shown.any(axis=1)].any()
    assert np.isfinite(gradient).all()
    assert np.isfinite(user_gradient).all()


def test_a_batch_split_over_devices_sees_the_negatives_of_all():
    program = """
import jax, jax.numpy as jnp, json, numpy as np
from tests.ranking_losses_test import LOG_PROBABILITY, POSITIVE_INDEX, make_embeddings, make_targets, ranking_loss
mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
users, items = make_embeddings(num_records=8)
targets = make_targets(POSITIVE_INDEX[:8], LOG_PROBABILITY[:8])
found = {}
for name in ("in_batch_softmax", "bpr"):
    function = jax.jit(jax.value_and_grad(lambda u, v, t: ranking_loss(name, u, v, t).mean()))
    split = jax.device_put((users, items, targets), sharding)
    assert len(split[0].sharding.device_set) == 4
    found[name] = [[np.asarray(x).tolist() for x in function(*inputs)] for inputs in (split, (users, items, targets))]
print(json.dumps(found))
"""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False, timeout=120
    )

    assert result.returncode == 0, result.stderr
    for split, single in json.loads(result.stdout.splitlines()[-1]).values():
        np.testing.assert_allclose(split[0], single[0], rtol=1e-6)
        np.testing.assert_allclose(split[1], single[1], atol=1e-6)
