"""The benchmark of the train step: its torch peer computes what we compute, and one that does not is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from benchmarks import agreement, fusion_step, rounds, torch_mmei
from benchmarks.fusion_cases import EAGER, NUM_BATCHES, Case
from benchmarks.matmul import matmul_operations
from mmei_jax.types import TokenSequence

TINY = Case(
    "tiny",
    {EAGER: 1.0},
    batch_size=4,
    feature_dim=12,
    changes={
        "model__dim": 16,
        "model__num_heads": 2,
        "model__num_layers": 1,
        "model__feedforward_dim": 24,
        "model__embedding_dim": 8,
        "data__max_tokens": {"vision": (3,), "audio": (5,), "text": (4,)},
        "optimizer__learning_rate": 1e-3,
    },
)
NUM_UPDATES = 5
# A model so small learns nothing in five updates at a large one's rate.
COMPARED = {**agreement.CHANGES, "optimizer__learning_rate": 1e-3}


def tiny_batches():
    return TINY.batches(TINY.tasks(TINY.config()))


def with_padding(batches):
    """The batches, with records of different lengths; some lack a modality."""
    lengths = np.array([[3, 5, 4], [1, 0, 2], [0, 2, 0], [2, 4, 3]])

    def pad(batch):
        padded = {}
        for index, (name, each) in enumerate(batch.sequences().items()):
            is_token = np.arange(each.segment_ids.shape[1])[None] < lengths[:, index, None]
            padded[name] = TokenSequence(each.features, is_token.astype(np.int32))
        return dataclasses.replace(batch, **padded)

    return [pad(batch) for batch in batches]


@pytest.fixture(scope="module")
def our_losses():
    """The losses of our first updates on given batches, by a step that is compiled once."""
    run = fusion_step.OurRun(TINY, TINY.config(**COMPARED), tiny_batches())
    placement = jax.tree.map(lambda leaf: leaf.sharding, run.shapes)
    initial = jax.device_get(run.state)

    def losses(batches, num_updates=NUM_UPDATES):
        run.state = jax.device_put(initial, placement)
        run.place(batches)
        return np.array([float(run.update(index)) for index in range(num_updates)])

    losses.run = run
    return losses


def their_losses(batches, config=None):
    tensors = [torch_mmei.to_torch(batch, "cpu") for batch in batches]
    config = config or TINY.config(**COMPARED)
    run = fusion_step.TorchRun(TINY, config, tensors, "cpu", mode=None)
    return np.array([float(run.update(index)) for index in range(NUM_UPDATES)])


@pytest.mark.parametrize("change", [lambda batches: batches, with_padding], ids=["full", "padded"])
def test_torch_peer_has_our_losses_over_several_updates(our_losses, change):
    batches = change(tiny_batches())
    ours = our_losses(batches)
    assert len(set(ours)) == NUM_UPDATES
    np.testing.assert_allclose(their_losses(batches), ours, rtol=5e-6)


def test_torch_peer_computes_in_bfloat16_as_the_gpu_cases_do(our_losses):
    batches = tiny_batches()
    theirs = their_losses(batches, TINY.config(**COMPARED, model__compute_dtype="bfloat16"))
    np.testing.assert_allclose(theirs[0], our_losses(batches, 1)[0], rtol=2e-2)


def test_peer_that_learns_at_another_rate_is_found_to_differ(our_losses):
    batches = tiny_batches()
    changed = TINY.config(**{**COMPARED, "optimizer__learning_rate": 1.1e-3})
    assert rounds.differ_by(our_losses(batches), their_losses(batches, changed), relative=TINY.tolerance)


@pytest.fixture(scope="module")
def our_evidence(our_losses):
    our_losses(tiny_batches(), 0)
    return our_losses.run.evidence()


def their_run():
    tensors = [torch_mmei.to_torch(batch, "cpu") for batch in tiny_batches()]
    return fusion_step.TorchRun(TINY, TINY.config(**COMPARED), tensors, "cpu", mode=None)


def test_evidence_of_both_sides_agrees_and_the_repeated_batchs_loss_falls(our_evidence):
    assert agreement.differ(our_evidence, their_run().evidence(), tolerance=TINY.tolerance) == ""
    assert (np.diff(our_evidence.losses) < -100 * TINY.tolerance * our_evidence.losses[0]).all()


@pytest.mark.parametrize("tolerance", [TINY.tolerance, 2e-2], ids=["cpu", "gpu"])
def test_peer_whose_gradients_are_scaled_is_refused(our_evidence, tolerance):
    """AdamW takes the same steps, so that no loss tells."""
    run = their_run()
    for parameter in run.model.parameters():
        parameter.register_hook(lambda gradient: 1.1 * gradient)
    evidence = run.evidence()
    np.testing.assert_allclose(evidence.losses, our_evidence.losses, rtol=1e-4)
    assert "norms of the gradients" in agreement.differ(our_evidence, evidence, tolerance=tolerance)


@pytest.mark.parametrize("tolerance", [TINY.tolerance, 2e-2], ids=["cpu", "gpu"])
def test_peer_that_does_not_update_is_refused(our_evidence, tolerance, monkeypatch):
    run = their_run()
    monkeypatch.setattr(run.optimizer, "step", lambda: None)
    assert "losses of 5 updates on one batch" in agreement.differ(our_evidence, run.evidence(), tolerance=tolerance)


def test_peer_that_lacks_one_groups_gradient_is_refused(our_evidence):
    theirs = {**our_evidence.moments, "weighting": 0.9 * our_evidence.moments["weighting"]}
    evidence = dataclasses.replace(our_evidence, moments=theirs)
    assert "first moment of weighting" in agreement.differ(our_evidence, evidence, tolerance=2e-2)


def test_torch_peer_drops_out(our_losses):
    batches = tiny_batches()
    torch.manual_seed(0)
    assert not np.allclose(their_losses(batches, TINY.config()), our_losses(batches), rtol=1e-2)


def evidence_of(*losses):
    return agreement.Evidence(np.array(losses), np.ones(2), {"all": 1.0})


def stub_side(case):
    """Stands in for ours."""
    return rounds.Ready(measure=lambda: 1.0, evidence=evidence_of(2.0, 1.9))


def perturbed_side(case):
    """Loses a little more."""
    return rounds.Ready(measure=lambda: pytest.fail("measured"), evidence=evidence_of(2.0, 1.9002))


def test_ratio_is_refused_when_losses_differ():
    sides = {rounds.OURS: "tests.fusion_step_test:stub_side", EAGER: "tests.fusion_step_test:perturbed_side"}
    with pytest.raises(rounds.SidesDiffer, match="torch eager and ours differ"):
        fusion_step.measure_case(TINY, num_rounds=1, sides=sides)


def test_several_updates_in_one_call_are_the_same_updates(our_losses):
    batches = tiny_batches()
    expected = our_losses(batches, 2 * NUM_BATCHES)
    our_losses(batches, 0)
    dispatch = our_losses.run.dispatcher(NUM_BATCHES)
    found = [float(dispatch()) for _ in range(2)]
    np.testing.assert_allclose(found, expected[NUM_BATCHES - 1 :: NUM_BATCHES], rtol=1e-6)


def test_operations_of_matrix_products_are_counted_through_loops():
    def function(x):
        return jax.lax.scan(lambda carry, _: (carry @ x, None), x, None, length=3)[0] + jax.jit(jnp.matmul)(x, x)

    assert matmul_operations(function, jnp.ones((5, 5))) == 4 * 2 * 5**3
