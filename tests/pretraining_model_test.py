"""The model behind the objectives: what is masked, what a prediction may read, and that tasks notice none of it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import default
from mmei_jax.config import parse
from mmei_jax.models.mmei import Mmei, ModalityInput
from mmei_jax.models.pretraining import PretrainingMmei, draw_masks
from mmei_jax.pretraining_losses import masked_feature_prediction
from mmei_jax.raw_inputs import raw_encoding
from mmei_jax.state import build_model_for, initialize
from mmei_jax.types import MODALITIES, Batch, TokenSequence
from tests import mmei_test, random_encoders
from tests.mmei_test import TASKS, make_batch, make_records, make_variables, without
from tests.pretraining_losses_test import CONFIG

OBJECTIVES = dataclasses.replace(CONFIG, projection_dim=4)
NO_TASK = dataclasses.replace(
    TASKS, emotion="none", num_emotions=1, num_intents=None, has_ranking=False, learns_task_weights=False
)
NUM_RECORDS = 6


def make_model(tasks=NO_TASK, objectives=OBJECTIVES, **changes):
    return PretrainingMmei(mmei_test.make_model(**changes).config, tasks, objectives)


@functools.cache
def compiled(model, field, is_training):
    def answer(variables, batch, rngs):
        outputs = model.apply(variables, batch, is_training=is_training, rngs=rngs)
        return getattr(outputs, field) if field else outputs

    return jax.jit(answer, compiler_options=mmei_test.COMPILE_QUICKLY)


def apply(model, batch, variables=None, *, field="pretraining", is_training=False, rngs=None):
    """What the model says, or one field of it: nothing else is then computed."""
    return compiled(model, field, is_training)(variables or make_variables(model), batch, rngs or {})


@functools.cache
def answers(model, num_segments=1, field="pretraining"):
    return apply(model, make_batch(make_records(), num_segments), field=field)


def make_ids(num_records, num_tokens=7, seed=0):
    """Records of one to all tokens; some lack modalities."""
    random = np.random.default_rng(seed)
    ids = {}
    for name in MODALITIES:
        lengths = random.integers(1, num_tokens + 1, num_records) * (random.uniform(size=num_records) > 0.3)
        ids[name] = jnp.asarray(np.arange(num_tokens)[None] < lengths[:, None], jnp.int32)
    return ids


def draw(ids, record_index=None, *, rate=1.0, span=1, seed=0):
    num_records = len(ids["text"])
    index = jnp.arange(num_records) if record_index is None else record_index
    masks = draw_masks(jax.random.key(seed), ids, index, rate=rate, span=span)
    return {name: np.asarray(mask) for name, mask in masks.items()}


def test_one_modality_of_every_record_that_has_two_is_masked_whole():
    ids = make_ids(600)
    masks = draw(ids)
    has = np.stack([np.asarray(ids[name]).any(axis=1) for name in MODALITIES], axis=1)
    is_masked = np.stack([masks[name].any(axis=1) for name in MODALITIES], axis=1)
    np.testing.assert_array_equal(is_masked.sum(axis=1), has.sum(axis=1) > 1)
    assert not np.any(is_masked & ~has)
    for name in MODALITIES:
        chosen = masks[name].any(axis=1)
        np.testing.assert_array_equal(masks[name][chosen], np.asarray(ids[name])[chosen] > 0)
    # Each as often as the others, where all are there.
    np.testing.assert_allclose(is_masked[has.all(axis=1)].mean(axis=0), 1 / 3, atol=0.08)


@pytest.mark.parametrize("span", [1, 3])
def test_share_of_tokens_is_the_rate_and_no_record_goes_without(span):
    ids = {name: jnp.ones((2000, 30), jnp.int32) for name in ("audio", "text")}
    masks = draw(ids, rate=0.3, span=span)
    is_masked = np.where(masks["audio"].any(axis=1)[:, None], masks["audio"], masks["text"])
    assert is_masked.any(axis=1).all()
    # One token is masked in any case, which adds (1 - rate) / tokens to the rate.
    np.testing.assert_allclose(is_masked.mean(), 0.3 + 0.7 / 30, atol=0.01)
    # At every position alike, and in spans: a masked token's neighbour is masked more often.
    np.testing.assert_allclose(is_masked.mean(axis=0), 0.3 + 0.7 / 30, atol=0.05)
    together = is_masked[:, 1:][is_masked[:, :-1]].mean()
    assert (together > 0.6) if span == 3 else (together < 0.4)
    short = draw({name: own[:, :1] for name, own in ids.items()}, rate=0.01)
    assert (short["audio"] ^ short["text"]).all()


def test_what_is_masked_depends_on_the_record_and_not_on_its_place():
    ids, order = make_ids(12), np.random.default_rng(3).permutation(12)
    for rate in (1.0, 0.5):
        masks = draw(ids, rate=rate)
        moved = draw({name: own[order] for name, own in ids.items()}, jnp.asarray(order), rate=rate)
        for name in MODALITIES:
            np.testing.assert_array_equal(moved[name], masks[name][order])
    assert any((draw(ids, seed=1)[name] != draw(ids)[name]).any() for name in MODALITIES)


def test_packed_records_are_masked_and_projected_as_in_rows_of_their_own():
    model = make_model(objectives=dataclasses.replace(OBJECTIVES, mask_rate=0.5))
    alone, packed = answers(model), answers(model, 3)
    for name in MODALITIES:
        np.testing.assert_allclose(packed.projections[name], alone.projections[name], atol=1e-5)
        np.testing.assert_array_equal(packed.is_present[name], alone.is_present[name])
        ours = packed.masked[name].predicted[np.asarray(packed.masked[name].segment_ids) > 0]
        theirs = alone.masked[name].predicted[np.asarray(alone.masked[name].segment_ids) > 0]
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert sum(np.sum(own.segment_ids > 0) for own in alone.masked.values()) > 4


def test_projections_are_those_of_a_record_that_has_the_modality_alone():
    model, batch = make_model(), make_batch(make_records())
    found = answers(model)
    for name in MODALITIES:
        lonely = without(batch, *(other for other in MODALITIES if other != name))
        alone = apply(model, lonely)
        np.testing.assert_allclose(found.projections[name], alone.projections[name], atol=1e-6)
        present = np.asarray(found.is_present[name])
        np.testing.assert_allclose(np.linalg.norm(found.projections[name], axis=1), present, atol=1e-5)
        # The head reads what the model itself makes of such a record.
        variables = make_variables(model)
        head = variables["params"][f"project_{name}"]
        vectors = apply(model, lonely, field="modality_vectors")
        vector = np.asarray(vectors)[:, MODALITIES.index(name)]
        hidden = jax.nn.gelu(vector @ head["hidden"]["kernel"] + head["hidden"]["bias"][None], approximate=False)
        output = hidden @ head["output"]["kernel"] + head["output"]["bias"][None]
        expected = output / np.linalg.norm(output, axis=1, keepdims=True)
        np.testing.assert_allclose(found.projections[name][present], expected[present], atol=1e-4)


def features_of(batch):
    return {name: sequence.features for name, sequence in batch.sequences().items()}


@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_prediction_of_masked_tokens_reads_the_others_and_of_its_own_modality_what_is_shown(rate):
    model, batch = make_model(objectives=dataclasses.replace(OBJECTIVES, mask_rate=rate)), make_batch(make_records())
    variables = make_variables(model)

    def total(features):
        filled = {name: dataclasses.replace(getattr(batch, name), features=own) for name, own in features.items()}
        masked = model.apply(variables, dataclasses.replace(batch, **filled), is_training=False).pretraining.masked
        return sum(
            jnp.sum(jnp.where(own.segment_ids[..., None] > 0, own.predicted, 0.0) ** 2) for own in masked.values()
        )

    gradient = jax.jit(jax.grad(total), compiler_options=mmei_test.COMPILE_QUICKLY)(features_of(batch))
    num_read = 0
    for name, own in answers(model).masked.items():
        is_masked, segments = np.asarray(own.segment_ids) > 0, np.asarray(getattr(batch, name).segment_ids)
        reached = np.abs(gradient[name]).max(axis=-1)
        assert not reached[is_masked].any()
        chosen = is_masked.any(axis=1)
        if rate == 1.0:
            assert not reached[chosen].any()
        # Other modalities of records of which one is masked.
        is_masked_elsewhere = np.stack(
            [np.asarray(other.segment_ids).any(axis=1) for other in answers(model).masked.values()]
        ).any(axis=0)
        read = is_masked_elsewhere & ~chosen & segments.any(axis=1)
        assert (reached[read] > 0)[segments[read] > 0].all()
        num_read += int(read.sum())
    assert num_read >= 4


def test_targets_are_the_standardised_features_and_get_no_gradient():
    model, batch = make_model(), make_batch(make_records())
    variables = make_variables(model)
    for name, own in answers(model).masked.items():
        statistics, sequence = variables["statistics"][f"embed_{name}"], getattr(batch, name)
        expected = (sequence.features - statistics["mean"][None, None]) * statistics["scale"][None, None]
        is_token = np.asarray(sequence.segment_ids) > 0
        np.testing.assert_allclose(own.target[is_token], expected[is_token], atol=1e-6)


def test_tasks_are_answered_as_without_objectives():
    tasks = dataclasses.replace(TASKS, learns_task_weights=False)
    model, batch = make_model(tasks), make_batch(make_records())
    plain = Mmei(model.config, tasks)
    variables = make_variables(model)
    own = {name: group for name, group in variables["params"].items() if not name.startswith(("project_", "predict_"))}
    assert own.keys() - make_variables(plain)["params"].keys() == {"contrastive_scale"}
    expected = apply(plain, batch, {**variables, "params": own}, field=None)
    found = answers(model, field=None)
    assert expected.pretraining is None
    jax.tree.map(np.testing.assert_array_equal, dataclasses.replace(found, pretraining=None), expected)


def test_model_without_tasks_has_no_heads_and_tells_no_weights():
    model = make_model()
    found = answers(model, field=None)
    names = make_variables(model)["params"].keys()
    assert not [name for name in names if name.endswith("_head") or name.startswith(("user_", "content_"))]
    assert found.emotion is found.intent is found.user_embedding is None
    assert not np.any(found.modality_weights)
    assert np.any(found.modality_vectors)


@pytest.mark.parametrize("off", ["contrastive_weight", "masked_weight"])
def test_objective_that_is_off_has_no_parameters(off):
    model = make_model(objectives=dataclasses.replace(OBJECTIVES, **{off: 0.0}))
    names, found = make_variables(model)["params"].keys(), answers(model)
    has_projections = off == "masked_weight"
    assert any(name.startswith("project_") for name in names) == bool(found.projections) == has_projections
    assert any(name.startswith("predict_") for name in names) == bool(found.masked) == (not has_projections)
    assert ("contrastive_scale" in names) == (found.scale is not None) == has_projections


def test_training_draws_other_masks_at_every_update_and_evaluation_none():
    model, batch = make_model(), make_batch(make_records())

    def masks(seed):
        rngs = {name: jax.random.key(seed) for name in ("dropout", "modality_dropout")}
        found = apply(model, batch, is_training=True, rngs=rngs).masked
        return np.concatenate([np.asarray(own.segment_ids).ravel() for own in found.values()])

    drawn = [masks(seed) for seed in range(4)]
    np.testing.assert_array_equal(drawn[0], masks(0))
    assert any((drawn[0] != other).any() for other in drawn[1:])
    again = apply(model, batch)
    jax.tree.map(np.testing.assert_array_equal, again, answers(model))


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """A model over frames and token ids, its variables, and a batch of four records."""
    folders = random_encoders.make(tmp_path_factory.mktemp("raw") / "encoders").converted
    values = default.get_config()
    values.data.modalities = ("vision", "text")
    values.data.max_tokens.update(vision=(2,), text=(5,))
    values.model.update(dim=8, num_heads=2, num_layers=1, feedforward_dim=12, dropout_rate=0.0)
    values.model.encoders.update({name: str(folders[name]) for name in ("vision", "text")})
    values.loss.update(emotion="none", intent="none", ranking="none")
    values.pretraining.masked_weight = 1.0
    config = parse(values.to_dict())
    specs = random_encoders.raw_specs(str(folders["text"]))
    inputs = {
        name: ModalityInput(
            specs[name].dim, getattr(config.data.max_tokens, name)[-1], raw_encoding(config, name, specs[name])
        )
        for name in ("vision", "text")
    }
    model = build_model_for(config, dataclasses.replace(NO_TASK, audio=None, **inputs))
    random = np.random.default_rng(0)
    vision = TokenSequence(jnp.asarray(random.integers(0, 256, (4, 2, 3072)), jnp.uint8), jnp.ones((4, 2), jnp.int32))
    text = TokenSequence(jnp.asarray(random.integers(5, 10, (4, 5, 1)), jnp.int32), jnp.ones((4, 5), jnp.int32))
    batch = Batch(vision, None, text, is_record=jnp.ones(4, bool), record_index=jnp.arange(4))
    return model, jax.jit(lambda: initialize(model, 0))(), batch


def test_encoders_states_are_predicted_scaled_and_teach_no_encoder_by_being_targets(raw):
    model, variables, batch = raw

    def loss(parameters, record):
        outputs = model.apply({**variables, "params": parameters}, batch, is_training=False).pretraining
        return masked_feature_prediction(outputs.masked, 4).values[record], outputs.masked

    differentiate = jax.jit(jax.grad(loss, has_aux=True), compiler_options=mmei_test.COMPILE_QUICKLY)
    seen = set()
    for record in range(4):
        gradients, masked = differentiate(variables["params"], record)
        (hidden,) = (name for name, own in masked.items() if np.asarray(own.segment_ids)[record].any())
        (shown,) = {"vision", "text"} - {hidden}
        seen.add(hidden)
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradients[f"encoder_{hidden}"]))
        assert any(np.any(leaf) for leaf in jax.tree.leaves(gradients[f"encoder_{shown}"]))
    assert seen == {"vision", "text"}
    for own in masked.values():
        np.testing.assert_allclose(own.target.mean(axis=-1), 0.0, atol=1e-5)
        np.testing.assert_allclose(own.target.std(axis=-1), 1.0, atol=1e-3)
