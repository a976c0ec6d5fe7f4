"""Eq. 1-3, each against an independent computation on single, unpadded records."""

import dataclasses
import importlib.util
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from mmei_jax import config as config_module
from mmei_jax.models import fusion
from mmei_jax.types import MODALITIES, TokenSequence

DEFAULT_CONFIG = Path(__file__).parents[1] / "configs" / "default.py"
DIM, HEADS = 8, 2
# Two rows, two records in each. Record (0, 2) has text only, (1, 1) no text, (1, 2) nothing at all.
SEGMENT_IDS = {
    "vision": np.array([[1, 1, 1, 0], [1, 1, 0, 0]], np.int32),
    "audio": np.array([[1, 1, 0, 0, 0], [0, 1, 1, 1, 0]], np.int32),
    "text": np.array([[1, 2, 2], [0, 0, 0]], np.int32),
}


def make_config(**changes):
    spec = importlib.util.spec_from_file_location("default_config", DEFAULT_CONFIG)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = config_module.parse(module.get_config().to_dict()).model
    small = {"dim": DIM, "num_heads": HEADS, "num_layers": 1, "feedforward_dim": 12, "dropout_rate": 0.0}
    return dataclasses.replace(config, **{**small, **changes})


def make_states(seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=(*ids.shape, DIM)).astype(np.float32) for name, ids in SEGMENT_IDS.items()}


def make_params(model, *arguments, seed=1, **keywords):
    """Random parameters, away from zeros and ones, so that a swapped or forgotten one is seen."""
    shapes = jax.eval_shape(partial(model.init, **keywords), jax.random.key(0), *arguments)
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        offset = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(offset + 0.3 * rng.normal(size=leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, nn.meta.unbox(shapes)["params"])


def differentiate(function, *arguments):
    """The function's value, and its gradients when the last argument is the value's cotangent."""

    # Compiling is what takes time here.
    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def run(cotangent, *primals):
        value, pull_back = jax.vjp(function, *primals)
        return value, *pull_back(cotangent)

    return run(arguments[-1], *arguments[:-1])


def relative_error(actual, expected):
    actual, expected = np.asarray(actual), np.asarray(expected)
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


class TorchCrossModalTransformer:
    """The same mathematics for one record without padding: no masks, no batches, one head at a time."""

    def __init__(self, params):
        self.params = jax.tree.map(lambda leaf: torch.tensor(np.asarray(leaf), requires_grad=True), params)

    def dense(self, params, x):
        return x @ params["kernel"] + params.get("bias", 0.0)

    def norm(self, params, x):
        return torch.nn.functional.layer_norm(x, (DIM,), params["scale"], params["bias"])

    def attention(self, params, queries, context):
        query = self.dense(params["query"], queries)
        key, value = self.dense(params["key"], context), self.dense(params["value"], context)
        size = DIM // HEADS
        heads = []
        for start in range(0, DIM, size):
            part = slice(start, start + size)
            weights = torch.softmax(query[:, part] @ key[:, part].T / size**0.5, dim=-1)
            heads.append(weights @ value[:, part])
        return self.dense(params["output"], torch.cat(heads, dim=-1))

    def __call__(self, record, num_layers):
        for index in range(num_layers):
            layer = self.params[f"layer_{index}"]
            for name, state in record.items():
                normed = self.norm(layer[f"{name}_self_norm"], state)
                record = record | {name: state + self.attention(layer[f"{name}_self_attention"], normed, normed)}
            normed = {name: self.norm(layer[f"{name}_cross_norm"], state) for name, state in record.items()}
            for name, state in record.items():
                others = [normed[other] for other in record if other != name]
                if others:
                    read = self.attention(layer[f"{name}_cross_attention"], normed[name], torch.cat(others))
                    record = record | {name: state + read}
            for name, state in record.items():
                params = layer[f"{name}_feed_forward"]
                hidden = self.dense(params["hidden"], self.norm(layer[f"{name}_feed_forward_norm"], state))
                record = record | {name: state + self.dense(params["output"], torch.nn.functional.gelu(hidden))}
        return {name: self.norm(self.params[f"{name}_norm"], state) for name, state in record.items()}


def test_cross_modal_transformer_equals_torch_record_by_record():
    num_layers = 2
    model = fusion.CrossModalTransformer(make_config(num_layers=num_layers))
    states = jax.tree.map(jnp.asarray, make_states())
    segment_ids = jax.tree.map(jnp.asarray, SEGMENT_IDS)
    params = make_params(model, states, segment_ids, is_training=False)
    cotangents = make_states(seed=2)
    cotangents = {name: value * (SEGMENT_IDS[name] > 0)[..., None] for name, value in cotangents.items()}

    def apply(params, states):
        return model.apply({"params": params}, states, segment_ids, is_training=False)

    cotangents = jax.tree.map(jnp.asarray, cotangents)
    outputs, param_gradients, state_gradients = differentiate(apply, params, states, cotangents)

    peer = TorchCrossModalTransformer(params)
    torch_states = {name: torch.tensor(np.asarray(state), requires_grad=True) for name, state in states.items()}
    loss = torch.zeros(())
    for row in range(2):
        for segment in (1, 2):
            places = {name: np.flatnonzero(ids[row] == segment) for name, ids in SEGMENT_IDS.items()}
            places = {name: found for name, found in places.items() if found.size}
            record = {name: torch_states[name][row, found] for name, found in places.items()}
            expected = peer(record, num_layers)
            for name, found in places.items():
                np.testing.assert_allclose(outputs[name][row, found], expected[name].detach(), atol=1e-5)
                loss = loss + (expected[name] * torch.tensor(np.asarray(cotangents[name])[row, found])).sum()
    loss.backward()
    for name, state in torch_states.items():
        assert relative_error(state_gradients[name], state.grad) < 1e-5
        assert not np.any(np.asarray(state_gradients[name])[SEGMENT_IDS[name] == 0])
    flat_params = jax.tree_util.tree_leaves_with_path(peer.params)
    for (path, parameter), gradient in zip(flat_params, jax.tree.leaves(param_gradients), strict=True):
        # Softmax does not see what the bias of the keys adds: its true gradient is zero.
        if [key.key for key in path[-2:]] == ["key", "bias"]:
            np.testing.assert_allclose(gradient, 0.0, atol=1e-5)
        else:
            assert relative_error(gradient, parameter.grad) < 1e-5, path


def test_one_modality_has_no_cross_attention():
    model = fusion.CrossModalTransformer(make_config())
    states, ids = {"audio": jnp.asarray(make_states()["audio"])}, {"audio": jnp.asarray(SEGMENT_IDS["audio"])}
    params = make_params(model, states, ids, is_training=False)
    assert "audio_self_attention" in params["layer_0"]
    assert not [name for name in params["layer_0"] if "cross" in name]


@pytest.mark.parametrize("has_extras", [True, False])
def test_embedding_is_eq_1_plus_what_is_switched_on(has_extras):
    config = make_config(projection_bias=has_extras, modality_embedding=has_extras, position_embedding=has_extras)
    rng = np.random.default_rng(0)
    ids = np.array([[1, 1, 2, 2, 2, 0]], np.int32)
    features = rng.normal(size=(1, 6, 3)).astype(np.float32)
    mean, scale = rng.normal(size=(2, 3)).astype(np.float32)
    model = fusion.ModalityEmbedding(config, max_positions=4)
    sequence = TokenSequence(jnp.asarray(features), jnp.asarray(ids))
    params = make_params(model, sequence, is_training=False)
    variables = {"params": params, "statistics": {"mean": jnp.asarray(mean), "scale": jnp.asarray(scale)}}
    output = model.apply(variables, sequence, is_training=False)
    params = jax.tree.map(np.asarray, params)
    expected = (features - mean) * scale @ params["projection"]["kernel"]
    if has_extras:
        positions = params["position_embedding"][np.array([0, 1, 0, 1, 2])]
        expected[:, :5] += params["projection"]["bias"] + params["type_embedding"] + positions
    else:
        assert list(params) == ["projection"]
        assert list(params["projection"]) == ["kernel"]
    np.testing.assert_allclose(output[:, :5], expected[:, :5], atol=1e-5)


def test_token_beyond_the_position_table_is_not_a_number():
    model = fusion.ModalityEmbedding(make_config(), max_positions=2)
    ids = np.array([[1, 1, 2, 2, 2, 0]], np.int32)
    sequence = TokenSequence(jnp.ones((1, 6, 3)), jnp.asarray(ids))
    output, _ = model.init_with_output(jax.random.key(0), sequence, is_training=False)
    np.testing.assert_array_equal(np.isnan(output).any(axis=-1), [[False, False, False, False, True, False]])


@pytest.mark.parametrize("kind", ["mean", "attention", "first"])
def test_pooling_equals_pooling_each_record_alone(kind):
    model = fusion.Pooling(kind)
    query = np.random.default_rng(1).normal(size=DIM).astype(np.float32)
    variables = {"params": {"query": jnp.asarray(query)}} if kind == "attention" else {}

    def pool(states, ids):
        return model.apply(variables, states, ids, 2)

    for name, state in make_states().items():
        ids = SEGMENT_IDS[name]
        pooled, gradient = differentiate(partial(pool, ids=jnp.asarray(ids)), jnp.asarray(state), jnp.ones((2, 2, DIM)))
        assert not np.any(np.asarray(gradient)[ids == 0])
        for row, segment in np.ndindex(2, 2):
            tokens = state[row][ids[row] == segment + 1]
            if not len(tokens):
                np.testing.assert_array_equal(pooled[row, segment], 0.0)
                continue
            if kind == "attention":
                scores = tokens @ query / DIM**0.5
                expected = np.exp(scores) / np.exp(scores).sum() @ tokens
            else:
                expected = tokens.mean(axis=0) if kind == "mean" else tokens[0]
            np.testing.assert_allclose(pooled[row, segment], expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["additive", "concatenation", "scalars"])
def test_alpha_is_a_softmax_over_present_modalities(kind):
    rng = np.random.default_rng(0)
    is_present = np.array([[(subset >> index) & 1 for index in range(3)] for subset in range(8)], bool)
    vectors = {
        name: jnp.asarray(rng.normal(size=(8, DIM)) * is_present[:, index, None], jnp.float32)
        for index, name in enumerate(MODALITIES)
    }
    model = fusion.ModalityWeighting(kind)
    params = make_params(model, vectors, jnp.asarray(is_present))

    def weigh(params, vectors):
        return model.apply({"params": params}, vectors, jnp.asarray(is_present))

    cotangent = jnp.asarray(rng.normal(size=is_present.shape), jnp.float32)
    alpha, _, vector_gradients = differentiate(weigh, params, vectors, cotangent)
    np.testing.assert_allclose(alpha.sum(axis=-1), is_present.any(axis=-1), atol=1e-6)
    np.testing.assert_array_equal(np.asarray(alpha) > 0, is_present)
    for index, name in enumerate(MODALITIES):
        gradient = np.asarray(vector_gradients[name])
        assert np.isfinite(gradient).all()
        if kind != "concatenation":
            assert not np.any(gradient[~is_present[:, index]])
        assert np.any(gradient) == (kind != "scalars")
    params, vectors = jax.tree.map(np.asarray, (params, vectors))
    if kind == "scalars":
        scores = np.array([params[f"{name}_score"] for name in MODALITIES])
    elif kind == "additive":
        hidden = [vectors[name] @ params[f"{name}_scorer_hidden"]["kernel"] for name in MODALITIES]
        hidden = [
            np.tanh(each + params[f"{name}_scorer_hidden"]["bias"])
            for each, name in zip(hidden, MODALITIES, strict=True)
        ]
        outputs = [params[f"{name}_scorer_output"]["kernel"] for name in MODALITIES]
        scores = np.concatenate([each @ output for each, output in zip(hidden, outputs, strict=True)], axis=-1)[7]
    else:
        joined = np.concatenate([vectors[name] for name in MODALITIES], axis=-1)[7]
        hidden = np.tanh(joined @ params["scorer_hidden"]["kernel"] + params["scorer_hidden"]["bias"])
        scores = hidden @ params["scorer_output"]["kernel"] + params["scorer_output"]["bias"]
    np.testing.assert_allclose(alpha[7], np.exp(scores) / np.exp(scores).sum(), atol=1e-6)


def test_weighted_sum_is_eq_3():
    rng = np.random.default_rng(0)
    weights, vectors = rng.random((4, 3)).astype(np.float32), rng.normal(size=(4, 3, DIM)).astype(np.float32)
    fused = fusion.weighted_sum(jnp.asarray(weights), jnp.asarray(vectors))
    np.testing.assert_allclose(fused, np.einsum("bm,bmd->bd", weights, vectors), atol=1e-6)


def test_modality_dropout_hides_whole_modalities_of_single_records():
    ids = {name: jnp.tile(jnp.asarray(value), (200, 1)) for name, value in SEGMENT_IDS.items()}
    hidden = fusion.hide_modalities(jax.random.key(0), ids, 2, 0.5)
    for name, before in ids.items():
        after, before = np.asarray(hidden[name]), np.asarray(before)
        assert np.all((after == before) | (after == 0))
        for segment in (1, 2):
            had, has = (before == segment).sum(axis=1), (after == segment).sum(axis=1)
            assert np.all((has == had) | (has == 0))
    kept = np.stack([(np.asarray(each)[0::2] == 1).any(axis=1) for each in hidden.values()], axis=-1)
    assert len(np.unique(kept, axis=0)) == 7


def test_modality_dropout_has_its_rate_and_never_hides_the_last():
    num_rows, rate = 20_000, 0.6
    everything = {name: jnp.ones((num_rows, 2), jnp.int32) for name in MODALITIES}
    hidden = fusion.hide_modalities(jax.random.key(0), everything, 1, rate)
    is_kept = np.stack([np.asarray(ids)[:, 0] > 0 for ids in hidden.values()], axis=-1)
    assert is_kept.any(axis=-1).all()
    expected = rate - rate**3 / 3
    standard_error = (expected * (1 - expected) / num_rows) ** 0.5
    np.testing.assert_allclose(1 - is_kept.mean(axis=0), expected, atol=4 * standard_error)
    # Two hidden at once: independent of each other, or all three drawn and one of them kept.
    pair_rate = (~is_kept).all(axis=-1, where=np.array([True, True, False])).mean()
    expected = rate**2 * (1 - rate) + rate**3 / 3
    assert abs(pair_rate - expected) < 4 * (expected * (1 - expected) / num_rows) ** 0.5

    text_only = everything | {name: jnp.zeros((num_rows, 2), jnp.int32) for name in ("vision", "audio")}
    hidden = fusion.hide_modalities(jax.random.key(1), text_only, 1, rate)
    assert np.all(hidden["text"] == 1)


def test_modality_dropout_follows_its_key():
    ids = {name: jnp.ones((50, 2), jnp.int32) for name in MODALITIES}
    first, again, other = (fusion.hide_modalities(jax.random.key(seed), ids, 1, 0.5) for seed in (0, 0, 1))
    for name in MODALITIES:
        np.testing.assert_array_equal(first[name], again[name])
    assert any(np.any(first[name] != other[name]) for name in MODALITIES)
