"""Table 1's other rows: late fusion, early concatenation, pooled logistic regression."""

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from mmei_jax.config import parse
from mmei_jax.losses import task_losses
from mmei_jax.models.baselines import ARCHITECTURES, LateFusion, MultiModalTransformer, PooledLogistic
from mmei_jax.models.mmei import Mmei, ModalityInput
from mmei_jax.state import build_model_for, variable_shapes
from mmei_jax.table_config import parse_table
from mmei_jax.types import MODALITIES, Label
from tests.mmei_test import TASKS, compiled, default_config, make_batch, make_records, make_variables, without

ROWS = sorted(ARCHITECTURES)


def make(architecture, tasks=TASKS, **changes):
    small = {
        "architecture": architecture,
        "dim": 8,
        "num_heads": 2,
        "num_layers": 1,
        "feedforward_dim": 12,
        "embedding_dim": 5,
        "dropout_rate": 0.0,
        "modality_dropout_rate": 0.0,
    }
    return ARCHITECTURES[architecture](dataclasses.replace(default_config(), **{**small, **changes}), tasks)


def apply(model, variables, batch):
    return compiled(model)(variables, batch)


def labelled(batch, num_emotions):
    """The batch with a label for every record."""
    count = batch.is_record.shape[0]
    label = Label(value=jnp.arange(count, dtype=jnp.int32) % num_emotions, is_labelled=jnp.ones(count, bool))
    intent = Label(value=jnp.arange(count, dtype=jnp.int32) % 2, is_labelled=jnp.ones(count, bool))
    return dataclasses.replace(batch, emotion=label, intent=intent)


@pytest.mark.parametrize("architecture", ROWS)
def test_packed_rows_and_other_padding_change_nothing(architecture):
    model, records = make(architecture), make_records()
    variables = make_variables(model)
    separate = apply(model, variables, make_batch(records))
    packed = apply(model, variables, make_batch(records, num_segments=3, num_tokens=11, padding=np.nan))
    for name in ("emotion", "intent", "modality_weights", "fused", "user_embedding", "positive_embedding"):
        np.testing.assert_allclose(getattr(packed, name), getattr(separate, name), atol=1e-5, err_msg=name)
    assert np.isfinite(separate.emotion).all()


@pytest.mark.parametrize("architecture", ROWS)
def test_absent_modality_sends_no_gradient(architecture):
    model = make(architecture)
    variables = make_variables(model)
    batch = labelled(without(make_batch(make_records()), "audio"), TASKS.num_emotions)
    config = parse(importlib.import_module("configs.default").get_config().to_dict()).loss

    def loss(parameters):
        outputs = model.apply({**variables, "params": parameters}, batch, is_training=False)
        losses = task_losses(outputs, batch, config)
        return sum(records.mean() for records in losses.values())

    gradient = jax.jit(jax.grad(loss))(variables["params"])
    flat = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(gradient)}
    of_audio = {name: leaf for name, leaf in flat.items() if "audio" in name and "projection" in name}
    assert of_audio or architecture == "pooled_logistic"
    assert not any(np.any(leaf) for leaf in of_audio.values())
    assert any(np.any(leaf) for leaf in flat.values())


def branch(model, variables, name):
    """One modality's model alone, with its part of late fusion's variables."""
    others = {other: None for other in MODALITIES if other != name}
    tasks = dataclasses.replace(model.tasks, **others, has_ranking=False, learns_task_weights=False)
    part = f"branch_{name}"
    return Mmei(model.config, tasks), {group: variables[group][part] for group in ("params", "statistics")}


def branch_outputs(model, variables, batch):
    found = {}
    for name in MODALITIES:
        alone, part = branch(model, variables, name)
        others = {other: None for other in MODALITIES if other != name}
        found[name] = apply(alone, part, dataclasses.replace(batch, **others, ranking=None))
    return found


def test_late_fusion_averages_the_probabilities_of_the_present_branches():
    model, batch = make("late_fusion"), make_batch(make_records())
    variables = make_variables(model)
    variables["statistics"]["emotion_temperature"] = jnp.array([2.0, 0.5, 1.0])
    variables["statistics"]["intent_temperature"] = jnp.ones(3)
    outputs, branches = apply(model, variables, batch), branch_outputs(model, variables, batch)
    present = np.stack([np.asarray(getattr(batch, name).segment_ids > 0).any(axis=1) for name in MODALITIES], axis=1)
    weights = np.where(present.any(axis=1, keepdims=True), present, True).astype(float)
    weights /= weights.sum(axis=1, keepdims=True)
    for task, temperatures in (("emotion", (2.0, 0.5, 1.0)), ("intent", (1.0, 1.0, 1.0))):
        mean = sum(
            weights[:, [place]] * jax.nn.softmax(getattr(branches[name], task) / temperatures[place])
            for place, name in enumerate(MODALITIES)
        )
        np.testing.assert_allclose(jax.nn.softmax(getattr(outputs, task)), mean, atol=1e-6)
    np.testing.assert_allclose(outputs.modality_weights, weights * present.any(axis=1, keepdims=True), atol=1e-7)
    # A record without any modality is weighed by none, and answered by all.
    assert not np.any(outputs.modality_weights[1])


def test_late_fusion_averages_the_scores_of_items():
    model, batch = make("late_fusion", normalize_embeddings=False), make_batch(make_records())
    variables = make_variables(model)
    outputs, branches = apply(model, variables, batch), branch_outputs(model, variables, batch)
    items = model.apply(variables, batch.ranking.positive, method="embed_items")
    expected = 0.0
    for place, name in enumerate(MODALITIES):
        found, projection = branches[name], jax.device_get(variables["params"][f"user_projection_{name}"])
        read = np.concatenate([found.fused, found.emotion_state, found.intent_state], axis=1)
        user = read @ projection["kernel"] + projection["bias"]
        expected = expected + outputs.modality_weights[:, [place]] * (user @ items.T)
    np.testing.assert_allclose(outputs.user_embedding @ items.T, expected, atol=1e-4)


def test_late_fusion_trains_each_branch_as_if_alone():
    """Where all modalities are present, a branch's gradient is a third of that of the same model alone."""
    records = [record for record in make_records() if all(len(tokens) for tokens in record.values())]
    assert records
    model, batch = make("late_fusion", dataclasses.replace(TASKS, has_ranking=False)), make_batch(records)
    batch = labelled(dataclasses.replace(batch, ranking=None), TASKS.num_emotions)
    variables = make_variables(model)
    loss = parse(importlib.import_module("configs.default").get_config().to_dict()).loss
    loss = dataclasses.replace(loss, ranking="none")

    def total(model, statistics, batch, parameters):
        outputs = model.apply({"params": parameters, "statistics": statistics}, batch, is_training=False)
        return sum(records.mean() for records in task_losses(outputs, batch, loss).values())

    def gradient_of(*arguments):
        return jax.jit(jax.grad(functools.partial(total, *arguments)))

    together = gradient_of(model, variables["statistics"], batch)(variables["params"])
    for name in MODALITIES:
        alone, part = branch(model, variables, name)
        others = {other: None for other in MODALITIES if other != name}
        only = dataclasses.replace(batch, **others)
        expected = gradient_of(alone, part["statistics"], only)(part["params"])
        found = jax.tree.map(lambda leaf: 3.0 * leaf, together[f"branch_{name}"])
        difference = optax.tree.norm(jax.tree.map(jnp.subtract, found, expected))
        assert float(difference / optax.tree.norm(expected)) < 1e-5


@pytest.mark.parametrize("emotion", ["sigmoid", "regression"])
def test_late_fusion_averages_what_other_tasks_say(emotion):
    tasks = dataclasses.replace(TASKS, emotion=emotion, num_emotions=1 if emotion == "regression" else 6)
    model, batch = make("late_fusion", tasks), make_batch(make_records())
    variables = make_variables(model)
    variables["statistics"]["emotion_temperature"] = jnp.ones(3)
    outputs, branches = apply(model, variables, batch), branch_outputs(model, variables, batch)
    weights = np.asarray(outputs.modality_weights)
    judged = weights.sum(axis=1) > 0
    squash = jax.nn.sigmoid if emotion == "sigmoid" else (lambda value: value)
    answers = [np.asarray(squash(branches[name].emotion)) for name in MODALITIES]
    expected = sum(
        weights[:, place].reshape(-1, *[1] * (answer.ndim - 1)) * answer for place, answer in enumerate(answers)
    )
    np.testing.assert_allclose(squash(outputs.emotion)[judged], expected[judged], atol=1e-6)


def test_early_concatenation_is_a_torch_encoder_over_all_tokens():
    """Pre-norm layers with the same weights, each record alone, without padding; F is the mean over all its tokens."""
    model, records = make("multimodal_transformer", num_layers=2), make_records()
    variables, batch = make_variables(model), make_batch(records)
    outputs = apply(model, variables, batch)
    parameters, statistics = jax.device_get((variables["params"], variables["statistics"]))
    dim, size = model.config.dim, model.config.feedforward_dim
    for index, record in enumerate(records):
        tokens = []
        for name in MODALITIES:
            part, constants = parameters[f"embed_{name}"], statistics[f"embed_{name}"]
            features = (record[name] - constants["mean"]) * constants["scale"]
            embedded = features @ part["projection"]["kernel"] + part["projection"]["bias"] + part["type_embedding"]
            tokens.append(embedded + part["position_embedding"][: len(features)])
        states = torch.tensor(np.concatenate(tokens))[None]
        if not states.shape[1]:
            np.testing.assert_array_equal(outputs.fused[index], 0.0)
            continue
        for number in range(model.config.num_layers):
            layer = torch.nn.TransformerEncoderLayer(
                dim, model.config.num_heads, size, 0.0, "gelu", batch_first=True, norm_first=True
            )
            load_layer(layer, parameters[f"layer_{number}"])
            states = layer.eval()(states)
        norm = parameters["norm"]
        states = torch.nn.functional.layer_norm(
            states, (dim,), torch.tensor(norm["scale"]), torch.tensor(norm["bias"]), 1e-5
        )
        np.testing.assert_allclose(outputs.fused[index], states[0].mean(dim=0).detach(), atol=2e-5)


def load_layer(layer, parameters):
    """Our layer's weights into torch's; ours has no bias after attention."""
    attention = parameters["attention"]
    with torch.no_grad():
        names = ("query", "key", "value")
        layer.self_attn.in_proj_weight.copy_(
            torch.tensor(np.concatenate([attention[name]["kernel"] for name in names], axis=1).T)
        )
        layer.self_attn.in_proj_bias.copy_(torch.tensor(np.concatenate([attention[name]["bias"] for name in names])))
        layer.self_attn.out_proj.weight.copy_(torch.tensor(attention["output"]["kernel"].T))
        layer.self_attn.out_proj.bias.zero_()
        for theirs, ours in ((layer.linear1, "hidden"), (layer.linear2, "output")):
            theirs.weight.copy_(torch.tensor(parameters["feed_forward"][ours]["kernel"].T))
            theirs.bias.copy_(torch.tensor(parameters["feed_forward"][ours]["bias"]))
        for theirs, ours in ((layer.norm1, "attention_norm"), (layer.norm2, "feed_forward_norm")):
            theirs.weight.copy_(torch.tensor(parameters[ours]["scale"]))
            theirs.bias.copy_(torch.tensor(parameters[ours]["bias"]))


def test_pooled_logistic_is_linear_in_the_means():
    model, records = make("pooled_logistic"), make_records()
    variables = make_variables(model)
    outputs = apply(model, variables, make_batch(records))
    parameters, statistics = jax.device_get((variables["params"], variables["statistics"]))
    for index, record in enumerate(records):
        features = []
        for name in MODALITIES:
            constants = statistics[f"embed_{name}"]
            tokens = (record[name] - constants["mean"]) * constants["scale"]
            features += [tokens.mean(axis=0) if len(tokens) else np.zeros(tokens.shape[1]), [float(len(tokens) > 0)]]
        joined = np.concatenate(features)
        for task in ("emotion", "intent"):
            layer = parameters[f"{task}_logits"]
            expected = joined @ layer["kernel"] + layer["bias"]
            np.testing.assert_allclose(getattr(outputs, task)[index], expected, atol=1e-5)


def test_uniform_weights_and_no_cross_attention_have_no_parameters_of_either():
    names = {
        jax.tree_util.keystr(path)
        for path, _ in jax.tree_util.tree_leaves_with_path(
            variable_shapes(make("mmei", modality_weighting="uniform", cross_attention=False))["params"]
        )
    }
    assert names
    assert not any("scorer" in name or "cross_attention" in name or "cross_norm" in name for name in names)
    model, batch = make("mmei", modality_weighting="uniform", cross_attention=False), make_batch(make_records())
    outputs = apply(model, make_variables(model), batch)
    present = np.stack([np.asarray(getattr(batch, name).segment_ids > 0).any(axis=1) for name in MODALITIES], axis=1)
    expected = present / np.maximum(present.sum(axis=1, keepdims=True), 1)
    np.testing.assert_allclose(outputs.modality_weights, expected, atol=1e-7)
    # Without reading one another, a modality's vector is what it is without the others.
    alone = apply(model, make_variables(model), without(batch, "audio", "text"))
    np.testing.assert_allclose(alone.modality_vectors[:, 0], outputs.modality_vectors[:, 0], atol=1e-6)


@pytest.mark.parametrize(("name", "dim"), [("table1", 768), ("table1_small", 32), ("table1_raw", 768)])
def test_rows_of_several_modalities_have_as_many_parameters_as_mmei(name, dim):
    table = parse_table(importlib.import_module(f"configs.{name}").get_config().to_dict())
    assert table.rows["mmei"].loss.ranking != "none"
    inputs = {"vision": ModalityInput(dim, 16), "audio": ModalityInput(dim, 50), "text": ModalityInput(dim, 32)}
    tasks = dataclasses.replace(
        TASKS, **inputs, num_emotions=7, num_intents=4, has_ranking=True, item_dim=dim, num_kinds=4
    )
    sizes = {}
    for row in ("late_fusion", "multimodal_transformer", "mmei"):
        shapes = variable_shapes(build_model_for(table.rows[row], tasks))["params"]
        sizes[row] = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert all(abs(size / sizes["mmei"] - 1.0) <= 0.1 for size in sizes.values()), sizes


def test_every_architecture_is_of_its_class():
    assert isinstance(make("late_fusion"), LateFusion)
    assert isinstance(make("multimodal_transformer"), MultiModalTransformer)
    assert isinstance(make("pooled_logistic"), PooledLogistic)
    assert type(make("mmei")) is Mmei
