"""The benchmark of training end to end: the torch peer makes our updates, and one that makes others is refused."""

import dataclasses

import pytest
import transformers

from benchmarks import agreement, fusion_step, torch_mmei
from benchmarks.end_to_end_cases import Case, save_checkpoints
from benchmarks.fusion_cases import EAGER

_STACK = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
TINY = Case(
    "tiny",
    {EAGER: 1.0},
    batch_size=3,
    feature_dim=12,
    changes={
        "model__dim": 16,
        "model__num_heads": 2,
        "model__num_layers": 1,
        "model__feedforward_dim": 24,
        "model__embedding_dim": 8,
        # 23 frames of sound, so that the last token is the mean of three and not of five.
        "data__max_tokens": {"vision": (2,), "audio": (7_500,), "text": (6,)},
    },
    sizes={
        "vision": _STACK | {"image_size": 32, "patch_size": 16},
        "audio": _STACK | {"conv_dim": (8,) * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4},
        "text": _STACK | {"vocab_size": 40},
    },
)
# A model so small learns nothing in five updates at a large one's rate.
COMPARED = {**agreement.CHANGES, "optimizer__learning_rate": 1e-3}


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    made = dataclasses.replace(TINY, folder=tmp_path_factory.mktemp("checkpoints"))
    save_checkpoints(made)
    return made


@pytest.fixture(scope="module")
def batches(case):
    return case.batches(case.tasks(case.config()))


@pytest.fixture(scope="module")
def our_evidence(case, batches):
    return fusion_step.OurRun(case, case.config(**COMPARED), batches).evidence()


def their_evidence(case, batches, **changes):
    tensors = [torch_mmei.to_torch(batch, "cpu") for batch in batches[:1]]
    return fusion_step.TorchRun(case, case.config(**COMPARED | changes), tensors, "cpu", mode=None).evidence()


def test_torch_peer_makes_our_updates_of_encoders_and_fusion(case, batches, our_evidence):
    theirs = their_evidence(case, batches)
    assert agreement.differ(our_evidence, theirs, tolerance=case.tolerance) == ""
    assert {name for name in theirs.moments if name.startswith("encoder_")} == {
        f"encoder_{name}" for name in ("vision", "audio", "text")
    }
    assert min(theirs.moments.values()) > 0.0
    assert (our_evidence.losses[1:] < our_evidence.losses[0] * (1 - 100 * case.tolerance)).all()


def test_peer_whose_encoders_learn_at_another_rate_is_refused(case, batches, our_evidence):
    theirs = their_evidence(case, batches, optimizer__rate_multipliers=(("^encoder_", 0.2),))
    assert "losses of 5 updates" in agreement.differ(our_evidence, theirs, tolerance=case.tolerance)


def test_peer_whose_front_end_learns_is_refused(case, batches, our_evidence, monkeypatch):
    monkeypatch.setattr(transformers.Wav2Vec2Model, "freeze_feature_encoder", lambda self: None)
    theirs = their_evidence(case, batches)
    assert theirs.moments["encoder_audio"] != pytest.approx(our_evidence.moments["encoder_audio"], rel=1e-2)
    assert agreement.differ(our_evidence, theirs, tolerance=case.tolerance)
