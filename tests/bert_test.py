"""BERT against Hugging Face's, stage by stage and in its gradients; packing; what does not change a text's outputs."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from mmei_jax.encoders.bert import Bert, BertConfig
from mmei_jax.encoders.hugging_face_config import ConfigReader
from mmei_jax.encoders.outputs import first_token, mean_of_tokens
from mmei_jax.encoders.stack import ComputeOptions, stack_layers, unstack_layers
from mmei_jax.sharding import LOGICAL_AXIS_RULES
from mmei_jax.types import InputError
from tests import hugging_face

# Differently shaped, each with something of its own.
SHAPES = {
    "two_layers": dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64),
    "minilm_like": dict(hidden_size=48, num_attention_heads=12, intermediate_size=192),
    "one_head": dict(hidden_size=24, num_hidden_layers=1, num_attention_heads=1, intermediate_size=40),
    "multilingual": dict(vocab_size=2003, hidden_size=32, num_attention_heads=2, type_vocab_size=1),
    "three_token_types": dict(hidden_size=40, num_attention_heads=5, type_vocab_size=3, max_position_embeddings=17),
    "without_pooler": dict(hidden_size=32, num_attention_heads=8, intermediate_size=33),
    "tanh_gelu": dict(hidden_size=32, num_attention_heads=4, hidden_act="gelu_new"),
    "norm_epsilon": dict(hidden_size=32, num_attention_heads=4, layer_norm_eps=1e-2),
    "relu": dict(hidden_size=32, num_attention_heads=4, hidden_act="relu", layer_norm_eps=1e-5),
}
LENGTHS = (11, 4, 1, 7)


@functools.cache
def make_reference(name):
    shape = dict(vocab_size=97, num_hidden_layers=2, intermediate_size=64, max_position_embeddings=24)
    config = transformers.BertConfig(**{**shape, **SHAPES[name]})
    return hugging_face.randomised(transformers.BertModel(config, add_pooling_layer=name != "without_pooler"))


@functools.cache
def make_ours(name):
    converted = hugging_face.converted(make_reference(name))
    return converted.config, jax.tree.map(jnp.asarray, converted.parameters)


@functools.cache
def jitted(config):
    return jax.jit(Bert(config).apply, static_argnames=("num_segments", "with_hidden_states"))


def make_texts(config, lengths=LENGTHS, seed=0):
    """Ragged rows: ids from 1 (0 is padding_idx in torch, which gets no gradient there), types, mask."""
    generator = np.random.default_rng(seed)
    shape = (len(lengths), max(lengths))
    token_ids = generator.integers(1, config.vocabulary_size, shape, dtype=np.int32)
    token_type_ids = generator.integers(0, config.num_token_types, shape, dtype=np.int32)
    return token_ids, (np.arange(shape[1]) < np.array(lengths)[:, None]).astype(np.int32), token_type_ids


def run_reference(model, token_ids, mask, token_type_ids):
    return model(
        input_ids=torch.tensor(token_ids, dtype=torch.long),
        attention_mask=torch.tensor(mask, dtype=torch.long),
        token_type_ids=torch.tensor(token_type_ids, dtype=torch.long),
        output_hidden_states=True,
    )


@pytest.mark.parametrize("name", SHAPES)
def test_stages_end_and_gradients_equal_hugging_face(name):
    model = make_reference(name)
    config, parameters = make_ours(name)
    token_ids, mask, token_type_ids = make_texts(config)
    generator = np.random.default_rng(1)
    weights = generator.normal(size=(*mask.shape, config.stack.dim)).astype(np.float32) * mask[..., None]
    pooled_weights = generator.normal(size=(len(mask), config.stack.dim)).astype(np.float32)

    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss_and_outputs(parameters):
        outputs = Bert(config).apply({"params": parameters}, token_ids, mask, token_type_ids, with_hidden_states=True)
        loss = jnp.sum(outputs.last_hidden_state * weights)
        if config.has_pooler:
            loss = loss + jnp.sum(outputs.pooled * pooled_weights)
        return loss, outputs

    (_, outputs), gradients = jax.jit(loss_and_outputs)(parameters)

    model.zero_grad()
    expected = run_reference(model, token_ids, mask, token_type_ids)
    loss = (expected.last_hidden_state * torch.tensor(weights)).sum()
    if config.has_pooler:
        loss = loss + (expected.pooler_output * torch.tensor(pooled_weights)).sum()
    loss.backward()

    assert len(outputs.hidden_states) == config.stack.num_layers + 1
    is_valid = torch.tensor(mask)[..., None].bool()
    for ours, theirs in zip(outputs.hidden_states, expected.hidden_states, strict=True):
        hugging_face.assert_close(ours, theirs.where(is_valid, 0.0), hugging_face.STAGE_TOLERANCE)
    hugging_face.assert_close(
        outputs.last_hidden_state, expected.last_hidden_state.where(is_valid, 0.0), hugging_face.END_TOLERANCE
    )
    assert config.has_pooler == (name != "without_pooler")
    if config.has_pooler:
        hugging_face.assert_close(outputs.pooled, expected.pooler_output, hugging_face.STAGE_TOLERANCE)
    else:
        assert outputs.pooled is None
    np.testing.assert_array_equal(outputs.is_valid, mask.astype(bool))
    hugging_face.assert_gradients_agree(gradients, model)


@pytest.mark.slow
def test_base_size_equals_hugging_face():
    model = hugging_face.randomised(transformers.BertModel(transformers.BertConfig()))
    converted = hugging_face.converted(model)
    assert sum(leaf.size for leaf in jax.tree.leaves(converted.parameters)) == 109_482_240
    texts = make_texts(converted.config, (128, 37, 1))
    outputs = jax.jit(functools.partial(Bert(converted.config).apply, with_hidden_states=True))(
        {"params": converted.parameters}, *texts
    )
    with torch.no_grad():
        expected = run_reference(model, *texts)
    is_valid = torch.tensor(texts[1])[..., None].bool()
    for ours, theirs in zip(outputs.hidden_states, expected.hidden_states, strict=True):
        hugging_face.assert_close(ours, theirs.where(is_valid, 0.0), hugging_face.STAGE_TOLERANCE)
    hugging_face.assert_close(outputs.pooled, expected.pooler_output, hugging_face.END_TOLERANCE)


def test_token_types_default_to_zero():
    config, parameters = make_ours("two_layers")
    token_ids, mask, _ = make_texts(config)
    apply = jitted(config)
    np.testing.assert_array_equal(
        apply({"params": parameters}, token_ids, mask).last_hidden_state,
        apply({"params": parameters}, token_ids, mask, np.zeros_like(mask)).last_hidden_state,
    )


def pack(texts, rows):
    """Rows of several texts, one after the other with a gap between, from ragged rows of one text each."""
    token_ids, mask, token_type_ids = texts
    width = max(sum(mask[index].sum() + 1 for index in row) for row in rows)
    packed = np.full((3, len(rows), width), 0, np.int32)
    packed[0] = 10**6  # what padding holds must not matter
    packed[2] = -5
    for row, indices in enumerate(rows):
        start = 0
        for segment, index in enumerate(indices, 1):
            length = mask[index].sum()
            span = slice(start, start + length)
            packed[0, row, span] = token_ids[index, :length]
            packed[1, row, span] = segment
            packed[2, row, span] = token_type_ids[index, :length]
            start += length + 1
    return packed


@pytest.mark.parametrize("name", ["minilm_like", "three_token_types"])
def test_packed_texts_give_what_hugging_face_gives_each_alone(name):
    config, parameters = make_ours(name)
    texts = make_texts(config)
    rows = [(0, 2, 1), (3,)]
    packed = pack(texts, rows)
    generator = np.random.default_rng(1)
    weights = generator.normal(size=(*packed[0].shape, config.stack.dim)).astype(np.float32)
    pooled_weights = generator.normal(size=(len(rows) * 3, config.stack.dim)).astype(np.float32)

    @functools.partial(jax.grad, has_aux=True)
    def gradients_and_outputs(parameters):
        outputs = Bert(config).apply({"params": parameters}, *packed, num_segments=3)
        return jnp.sum(outputs.last_hidden_state * weights) + jnp.sum(outputs.pooled * pooled_weights), outputs

    gradients, outputs = jax.jit(gradients_and_outputs)(parameters)
    states = np.asarray(outputs.last_hidden_state)
    pooled = outputs.pooled.reshape(len(rows), 3, -1)
    model = make_reference(name)
    model.zero_grad()
    for row, indices in enumerate(rows):
        for segment, index in enumerate(indices, 1):
            alone = run_reference(model, *(array[index : index + 1, : LENGTHS[index]] for array in texts))
            is_own = packed[1, row] == segment
            own = states[row][is_own]
            hugging_face.assert_close(own, alone.last_hidden_state[0], hugging_face.STAGE_TOLERANCE)
            hugging_face.assert_close(pooled[row, segment - 1], alone.pooler_output[0], hugging_face.STAGE_TOLERANCE)
            loss = (alone.last_hidden_state[0] * torch.tensor(weights[row][is_own])).sum()
            (loss + alone.pooler_output[0] @ torch.tensor(pooled_weights[3 * row + segment - 1])).backward()
    hugging_face.assert_gradients_agree(gradients, model)
    assert not np.any(pooled[1, 1:])
    assert not np.any(states[packed[1] == 0])


def test_packed_row_may_be_longer_than_the_longest_text():
    config, parameters = make_ours("three_token_types")
    assert sum(LENGTHS) + 3 > config.max_tokens
    packed = pack(make_texts(config), [(0, 1, 2, 3)])
    outputs = jitted(config)({"params": parameters}, *packed, num_segments=4)
    assert np.isfinite(outputs.last_hidden_state).all()


def test_text_beyond_num_segments_is_never_dropped_silently():
    config, parameters = make_ours("minilm_like")
    packed = pack(make_texts(config), [(0, 2, 1), (3,)])
    with pytest.raises(InputError, match="num_segments = 2: expected at least 3"):
        Bert(config).apply({"params": parameters}, *packed, num_segments=2)
    # A compiled program cannot look at its arguments.
    outputs = jitted(config)({"params": parameters}, *packed, num_segments=2)
    assert np.isnan(outputs.pooled[:2]).all()
    assert np.isfinite(outputs.pooled[2:]).all()
    assert np.isfinite(outputs.last_hidden_state).all()
    for reduce in (first_token, mean_of_tokens):
        with pytest.raises(InputError, match="num_segments = 1: expected at least 3"):
            reduce(outputs.last_hidden_state, packed[1])
        vectors = jax.jit(reduce)(outputs.last_hidden_state, packed[1])
        np.testing.assert_array_equal(np.isnan(vectors).all(axis=1), [True, False])


def test_row_does_not_depend_on_padding_or_batch_mates():
    config, parameters = make_ours("two_layers")
    token_ids, mask, token_type_ids = make_texts(config)
    apply = jitted(config)
    batched = apply({"params": parameters}, token_ids, mask, token_type_ids)
    others = make_texts(config, LENGTHS, seed=5)
    longer = [np.pad(array, ((0, 0), (0, 6))) for array in others]
    for array, own in zip(longer, (token_ids, mask, token_type_ids), strict=True):
        array[1, :] = 0
        array[1, 5 : 5 + LENGTHS[1]] = own[1, : LENGTHS[1]]  # padding before the text, and more of it behind
    moved = apply({"params": parameters}, *longer)
    np.testing.assert_allclose(
        moved.last_hidden_state[1, 5 : 5 + LENGTHS[1]],
        batched.last_hidden_state[1, : LENGTHS[1]],
        rtol=0,
        atol=1e-5,
    )
    np.testing.assert_allclose(moved.pooled[1], batched.pooled[1], rtol=0, atol=1e-5)


def test_row_without_text_gives_zeros_and_no_gradient():
    config, parameters = make_ours("two_layers")
    token_ids, mask, token_type_ids = make_texts(config)
    mask[2] = 0

    def loss(parameters):
        outputs = Bert(config).apply({"params": parameters}, token_ids, mask, token_type_ids)
        return (outputs.pooled[2] ** 2).sum() + (outputs.last_hidden_state[2] ** 2).sum(), outputs

    gradients, outputs = jax.jit(jax.grad(loss, has_aux=True))(parameters)
    assert not np.any(outputs.last_hidden_state[2])
    assert not np.any(outputs.pooled[2])
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize(
    ("what", "value"), [("token_ids", 97), ("token_ids", -1), ("token_type_ids", 2), ("token_type_ids", -1)]
)
def test_id_outside_its_table_gives_nan_never_another_embedding(what, value):
    config, parameters = make_ours("two_layers")
    token_ids, mask, token_type_ids = make_texts(config)
    inputs = dict(token_ids=token_ids, segment_ids=mask, token_type_ids=token_type_ids)
    inputs[what][1, 2] = value
    states = np.asarray(jitted(config)({"params": parameters}, **inputs).last_hidden_state)
    assert np.isnan(states[1, : LENGTHS[1]]).all()
    assert np.isfinite(states[[0, 2, 3]]).all()


def test_text_longer_than_the_positions_gives_nan():
    config, parameters = make_ours("three_token_types")
    texts = make_texts(config, (config.max_tokens + 1, 3))
    outputs = jitted(config)({"params": parameters}, *texts)
    assert np.isnan(outputs.last_hidden_state[0]).all()
    assert np.isfinite(outputs.last_hidden_state[1]).all()


def test_first_and_mean_token_of_each_text():
    states = np.random.default_rng(0).normal(size=(2, 6, 4)).astype(np.float32)
    segment_ids = np.array([[0, 1, 1, 2, 0, 0], [1, 1, 1, 0, 3, 3]], np.int32)
    first = first_token(states, segment_ids, 3).reshape(2, 3, 4)
    mean = mean_of_tokens(states, segment_ids, 3).reshape(2, 3, 4)
    places = {(0, 0): [1, 2], (0, 1): [3], (1, 0): [0, 1, 2], (1, 2): [4, 5]}
    for row in range(2):
        for segment in range(3):
            tokens = places.get((row, segment), [])
            np.testing.assert_allclose(first[row, segment], states[row, tokens[0]] if tokens else np.zeros(4))
            expected = states[row, tokens].mean(0) if tokens else np.zeros(4)
            np.testing.assert_allclose(mean[row, segment], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [dict(scan_layers=True), dict(remat="layer"), dict(remat="products"), dict(scan_layers=True, remat="layer")],
    ids=str,
)
def test_scan_and_remat_change_neither_outputs_nor_gradients(options):
    config, parameters = make_ours("minilm_like")
    texts = make_texts(config)

    def outputs_and_gradients(options, parameters):
        def loss(parameters):
            outputs = Bert(config, options).apply({"params": parameters}, *texts, with_hidden_states=True)
            return jnp.sum(jnp.sin(outputs.last_hidden_state)) + jnp.sum(outputs.pooled), outputs

        return jax.jit(jax.grad(loss, has_aux=True))(parameters)

    plain_gradients, plain = outputs_and_gradients(ComputeOptions(), parameters)
    options = ComputeOptions(**options)
    given = stack_layers(parameters) if options.scan_layers else parameters
    gradients, outputs = outputs_and_gradients(options, given)
    gradients = unstack_layers(gradients) if options.scan_layers else gradients
    for actual, expected in zip(jax.tree.leaves(outputs), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), gradients, plain_gradients)


def test_remat_computes_layers_again_in_the_backward_pass():
    config, parameters = make_ours("minilm_like")
    texts = make_texts(config)

    def count(options):
        def loss(parameters):
            return Bert(config, options).apply({"params": parameters}, *texts).pooled.sum()

        return str(jax.make_jaxpr(jax.grad(loss))(parameters)).count("dot_general")

    assert count(ComputeOptions()) < count(ComputeOptions(remat="products")) < count(ComputeOptions(remat="layer"))


def test_stacking_layers_is_undone_by_unstacking():
    _, parameters = make_ours("minilm_like")
    stacked = stack_layers(parameters)
    assert set(stacked["encoder"]) == {"layers"}
    again = unstack_layers(stacked)
    jax.tree.map(np.testing.assert_array_equal, again, parameters)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_every_parameter_has_logical_axis_names(scan_layers):
    config, _ = make_ours("two_layers")
    texts = make_texts(config)
    module = Bert(config, ComputeOptions(scan_layers=scan_layers))
    variables = jax.eval_shape(lambda: module.init(jax.random.key(0), *texts))
    known = set(LOGICAL_AXIS_RULES)
    leaves = jax.tree.leaves(variables["params"], is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))
    for leaf in leaves:
        assert isinstance(leaf, nn.LogicallyPartitioned)
        assert len(leaf.names) == leaf.value.ndim
        assert set(leaf.names) <= known


def test_rows_without_places_are_refused():
    ours, parameters = make_ours("two_layers")
    empty = np.zeros((2, 0), np.int32)
    with pytest.raises(InputError, match="rows of 0 tokens: expected at least 1"):
        Bert(ours).apply({"params": parameters}, empty, empty)


def test_defaults_are_hugging_faces():
    ours = BertConfig.from_hugging_face({"model_type": "bert"})
    assert ours == BertConfig.from_hugging_face(transformers.BertConfig().to_dict())
    assert dataclasses.astuple(ours.stack)[:6] == (12, 768, 12, 3072, "gelu", 1e-12)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("position_embedding_type", "relative_key"),
        ("is_decoder", True),
        ("add_cross_attention", True),
        ("is_encoder_decoder", True),
        ("hidden_act", "laplace"),
        ("hidden_size", "wide"),
        ("hidden_size", 50),
        ("num_hidden_layers", True),
        ("layer_norm_eps", None),
        ("vocab_size", 0),
        ("auto_map", {"AutoModel": "modeling.Bert"}),
        ("model_type", "roberta"),
    ],
)
def test_configuration_that_is_not_implemented_is_refused_by_name(key, value):
    named = {"hidden_act": "activation", "vocab_size": "vocabulary_size"}.get(key, key)
    if value == 50:
        named = "dim = 50"
    with pytest.raises(InputError, match=named):
        BertConfig.from_hugging_face({"model_type": "bert", key: value})


def test_keys_that_change_nothing_are_listed():
    reader = ConfigReader({"model_type": "bert", "hidden_dropout_prob": 0.1, "id2label": {}}, "bert")
    BertConfig.read(reader)
    assert reader.unread == ["hidden_dropout_prob", "id2label"]


def test_unknown_options_are_refused():
    with pytest.raises(InputError, match="remat = 'all'"):
        ComputeOptions(remat="all")
    with pytest.raises(InputError, match="compute_dtype = 'int8'"):
        ComputeOptions(compute_dtype="int8")
