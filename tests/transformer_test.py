"""Masks, attention and blocks, against PyTorch and against what masking promises."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax import export
from transformers import activations

from mmei_jax.encoders import transformer

ROWS, QUERIES, KEYS, HEADS, DIM = 3, 5, 7, 2, 4


def make_attention_inputs(seed=0):
    rng = np.random.default_rng(seed)
    query = rng.normal(size=(ROWS, QUERIES, HEADS, DIM)).astype(np.float32)
    key, value = rng.normal(size=(2, ROWS, KEYS, HEADS, DIM)).astype(np.float32)
    is_attendable = rng.random((ROWS, QUERIES, KEYS)) < 0.5
    is_attendable[:, :, 0] = True
    cotangent = rng.normal(size=query.shape).astype(np.float32)
    return query, key, value, is_attendable, cotangent


def attend_and_differentiate(query, key, value, is_attendable, cotangent):
    def attend(*arrays):
        return transformer.attend(*arrays, jnp.asarray(is_attendable))

    output, pull_back = jax.vjp(attend, *map(jnp.asarray, (query, key, value)))
    return output, pull_back(jnp.asarray(cotangent))


def relative_error(actual, expected):
    actual, expected = np.asarray(actual), np.asarray(expected)
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


def test_attention_and_its_gradients_equal_torch():
    *arrays, is_attendable, cotangent = make_attention_inputs()
    output, gradients = attend_and_differentiate(*arrays, is_attendable, cotangent)

    torch_inputs = [torch.tensor(array.transpose(0, 2, 1, 3), requires_grad=True) for array in arrays]
    expected = torch.nn.functional.scaled_dot_product_attention(
        *torch_inputs, attn_mask=torch.tensor(is_attendable)[:, None]
    )
    expected.backward(torch.tensor(cotangent.transpose(0, 2, 1, 3)))

    np.testing.assert_allclose(output.transpose(0, 2, 1, 3), expected.detach(), atol=1e-5)
    for gradient, array in zip(gradients, torch_inputs, strict=True):
        np.testing.assert_allclose(gradient.transpose(0, 2, 1, 3), array.grad, atol=1e-5)


def test_attention_survives_large_scores():
    query, key, value, is_attendable, cotangent = make_attention_inputs()
    output, gradients = attend_and_differentiate(query * 1e4, key, value, is_attendable, cotangent)
    assert all(np.isfinite(array).all() for array in (output, *gradients))
    assert np.abs(output).max() <= np.abs(value).max()


def test_query_with_nothing_to_attend_to_gives_exactly_zero():
    query, key, value, is_attendable, cotangent = make_attention_inputs()
    is_attendable[1, 2] = False
    is_attendable[2] = False
    output, (query_gradient, key_gradient, value_gradient) = attend_and_differentiate(
        query, key, value, is_attendable, cotangent
    )
    for array in (output, query_gradient):
        assert not np.any(array[1, 2])
        assert not np.any(array[2])
        assert np.any(array[1, 1])
    assert not np.any(key_gradient[2])
    assert not np.any(value_gradient[2])
    assert all(np.isfinite(array).all() for array in (query_gradient, key_gradient, value_gradient))


def test_masked_keys_change_nothing_and_get_zero_gradient():
    query, key, value, is_attendable, cotangent = make_attention_inputs()
    is_attendable[:, :, 3:] = False
    output, gradients = attend_and_differentiate(query, key, value, is_attendable, cotangent)
    key[:, 3:], value[:, 3:] = 1e6, -1e6
    other_output, _ = attend_and_differentiate(query, key, value, is_attendable, cotangent)
    np.testing.assert_array_equal(output, other_output)
    assert not np.any(gradients[1][:, 3:])
    assert not np.any(gradients[2][:, 3:])


def test_bfloat16_attention_is_within_its_rounding():
    query, key, value, is_attendable, _ = make_attention_inputs()
    exact = transformer.attend(*map(jnp.asarray, (query, key, value, is_attendable)))
    rounded = transformer.attend(*map(jnp.asarray, (query, key, value, is_attendable)), compute_dtype="bfloat16")
    assert rounded.dtype == jnp.float32
    # Four operands are rounded, each by at most half of 2**-7: the sum bounds the relative error of the products.
    assert 0 < relative_error(rounded, exact) < 4 * 2**-8


@pytest.mark.parametrize("is_masked", [True, False])
def test_lengths_made_even_change_nothing(monkeypatch, is_masked):
    """What cuDNN would be given, computed by XLA instead."""
    plain = jax.nn.dot_product_attention
    lengths = []

    def stand_in(*arrays, implementation, **options):
        assert implementation == "cudnn"
        lengths.append((arrays[0].shape[1], arrays[1].shape[1]))
        return plain(*arrays, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    query, key, value, is_attendable, _ = (jnp.asarray(array) for array in make_attention_inputs())
    is_attendable = is_attendable if is_masked else None
    found = transformer._attend_fused(query, key, value, is_attendable)
    np.testing.assert_allclose(found, transformer._attend_plain(query, key, value, is_attendable), atol=1e-6)
    assert lengths == [(QUERIES + 1, KEYS + 1)]


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_attention_without_a_mask_is_attention_to_everything(compute_dtype):
    query, key, value, is_attendable, _ = make_attention_inputs()
    unmasked = transformer.attend(*map(jnp.asarray, (query, key, value)), None, compute_dtype)
    masked = transformer.attend(*map(jnp.asarray, (query, key, value)), jnp.ones_like(is_attendable), compute_dtype)
    np.testing.assert_allclose(unmasked, masked, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "dim", "expected"),
    [
        ("bfloat16", 64, True),
        ("float16", 128, True),
        ("float32", 64, False),
        ("bfloat16", 36, False),
        ("bfloat16", 136, False),
    ],
)
def test_heads_that_fused_attention_takes(dtype, dim, expected):
    assert transformer.is_fusible(jnp.zeros((2, 6, 4, dim), dtype)) is expected


def test_fused_attention_takes_no_symbolic_sizes():
    """As while a program for any batch is exported."""
    (batch,) = export.symbolic_shape("batch")
    found = []
    for rows in (2, batch):
        query = jax.ShapeDtypeStruct((rows, 6, 4, 64), jnp.bfloat16)
        jax.jit(lambda query: found.append(transformer.is_fusible(query))).trace(query)
    assert found == [True, False]


class TestFusedAttention:
    """Which attention a program for a GPU holds is seen where it is lowered; what it gives, only on one."""

    @staticmethod
    def lowered(monkeypatch, platform, dtype, *, is_masked, num_tokens=6):
        # What tracing asks the machine.
        monkeypatch.setattr(transformer, "has_fused_attention", lambda: True)
        monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)
        query = jax.ShapeDtypeStruct((2, num_tokens, 4, 64), "float32")
        mask = jax.ShapeDtypeStruct((2, num_tokens, num_tokens), bool)

        def total(query, key, value, mask):
            return transformer.attend(query, key, value, mask, dtype).sum()

        program = jax.jit(jax.grad(total, argnums=(0, 1, 2))).trace(query, query, query, mask if is_masked else None)
        return program.lower(lowering_platforms=(platform,)).as_text()

    @pytest.mark.parametrize(("is_masked", "num_tokens"), [(True, 6), (True, 7), (False, 6), (False, 7)])
    def test_sixteen_bits_on_cuda_go_through_cudnn_in_both_directions(self, monkeypatch, is_masked, num_tokens):
        text = self.lowered(monkeypatch, "cuda", "bfloat16", is_masked=is_masked, num_tokens=num_tokens)
        name = "__cudnn$fmhaScaleBiasSoftmax" if is_masked else "__cudnn$fmhaSoftmax"
        assert text.count(name) == 2
        assert f"{name}Backward" in text

    @pytest.mark.parametrize(("platform", "dtype"), [("cuda", "float32"), ("cpu", "bfloat16"), ("tpu", "bfloat16")])
    def test_everything_else_does_not(self, monkeypatch, platform, dtype):
        assert "cudnn" not in self.lowered(monkeypatch, platform, dtype, is_masked=True)

    @pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU: cuDNN's attention runs nowhere else")
    @pytest.mark.parametrize("is_masked", [True, False])
    @pytest.mark.parametrize("num_tokens", [64, 63])
    def test_fused_attention_equals_plain_attention(self, is_masked, num_tokens):
        generator = np.random.default_rng(0)
        shape = (3, num_tokens, 4, 64)
        query, key, value = (jnp.asarray(generator.normal(size=shape), jnp.float32) for _ in range(3))
        segment_ids = jnp.asarray(np.repeat([[1, 2, 0], [1, 1, 1], [0, 0, 0]], [24, 24, num_tokens - 48], axis=1))
        mask = transformer.attendable(segment_ids, segment_ids) if is_masked else None

        def run(dtype):
            output, pull_back = jax.vjp(lambda *arrays: transformer.attend(*arrays, mask, dtype), query, key, value)
            return output, *pull_back(jnp.ones_like(output))

        for fused, plain in zip(jax.jit(run, static_argnums=0)("bfloat16"), run("float32"), strict=True):
            assert relative_error(fused, plain) <= 2e-2
            if is_masked:
                assert not np.any(fused[2])


def test_tokens_attend_to_their_own_record_only():
    query_ids = jnp.array([[1, 1, 2, 0]])
    key_ids = jnp.array([[1, 2, 2, 0, 3]])
    expected = [[[1, 0, 0, 0, 0], [1, 0, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 0, 0]]]
    np.testing.assert_array_equal(transformer.attendable(query_ids, key_ids), np.array(expected, bool))


def test_positions_count_from_the_start_of_each_record():
    ids = jnp.array([[1, 1, 1, 2, 2, 0], [0, 0, 1, 1, 3, 0], [2, 2, 2, 2, 2, 2], [0, 0, 0, 0, 0, 0]])
    expected = [[0, 1, 2, 0, 1, 0], [0, 0, 0, 1, 0, 0], [0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 0, 0]]
    np.testing.assert_array_equal(transformer.positions_in_segment(ids), expected)


def test_masked_softmax_normalises_over_what_is_left():
    scores = jnp.array([[1.0, 2.0, 3.0], [1e30, 5.0, -1e30], [0.0, 1.0, 2.0]])
    mask = jnp.array([[True, True, True], [False, True, True], [False, False, False]])
    weights = transformer.masked_softmax(scores, mask)
    np.testing.assert_allclose(weights[0], np.exp([1, 2, 3]) / np.exp([1, 2, 3]).sum(), rtol=1e-6)
    np.testing.assert_array_equal(weights[1:], [[0, 1, 0], [0, 0, 0]])
    gradient = jax.grad(lambda scores: (transformer.masked_softmax(scores, mask) * jnp.arange(3.0)[None]).sum())(scores)
    assert np.all(np.isfinite(gradient))
    np.testing.assert_array_equal(gradient[2], 0.0)
    assert gradient[1, 0] == 0.0


def test_gelu_is_the_exact_one():
    x = np.linspace(-6, 6, 1001, dtype=np.float32)
    gelu = np.asarray(transformer.gelu(jnp.asarray(x)))
    np.testing.assert_allclose(gelu, torch.nn.functional.gelu(torch.tensor(x)), atol=1e-6)
    tanh_gelu = torch.nn.functional.gelu(torch.tensor(x), approximate="tanh")
    assert np.abs(gelu - tanh_gelu.numpy()).max() > 1e-4


@pytest.mark.parametrize("name", transformer.ACTIVATIONS)
def test_activation_is_hugging_faces_of_that_name(name):
    x = np.linspace(-6.0, 6.0, 1001, dtype=np.float32)
    expected = activations.ACT2FN[name](torch.tensor(x))
    np.testing.assert_allclose(transformer.ACTIVATIONS[name](jnp.asarray(x)), expected, rtol=0, atol=1e-6)


def test_layer_norm_keeps_its_precision_far_from_zero():
    x = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32) + 1000
    variables = transformer.LayerNorm().init(jax.random.key(0), jnp.asarray(x))
    normed = transformer.LayerNorm().apply(nn.meta.unbox(variables), jnp.asarray(x))
    expected = torch.nn.functional.layer_norm(torch.tensor(x, dtype=torch.float64), (64,))
    # The mean of the inputs is known to 1000 * 2**-24 = 6e-5 of their deviation.
    np.testing.assert_allclose(normed, expected, atol=2e-4)


def test_dropout_keeps_the_expectation_and_its_rate():
    x = jnp.full((200, 500), 2.0)
    dropped = transformer.Dropout(0.2).apply({}, x, is_training=True, rngs={"dropout": jax.random.key(3)})
    num_zeros = int((dropped == 0).sum())
    standard_error = (x.size * 0.2 * 0.8) ** 0.5
    assert abs(num_zeros - 0.2 * x.size) < 4 * standard_error
    # The rate is rounded to a multiple of 2**-16.
    np.testing.assert_allclose(dropped[dropped != 0], 2.0 / 0.8, rtol=2**-16)
    # Two values share one random word, and are independent all the same.
    num_pairs = int(((dropped[:, 0::2] == 0) & (dropped[:, 1::2] == 0)).sum())
    assert abs(num_pairs - 0.04 * x.size / 2) < 4 * (x.size / 2 * 0.04 * 0.96) ** 0.5


def test_dropout_follows_its_key_and_stops_outside_training():
    x = jnp.ones((8, 33))

    def drop(seed, is_training=True, rate=0.5):
        module = transformer.Dropout(rate)
        return np.asarray(module.apply({}, x, is_training=is_training, rngs={"dropout": jax.random.key(seed)}))

    np.testing.assert_array_equal(drop(0), drop(0))
    assert np.any(drop(0) != drop(1))
    np.testing.assert_array_equal(drop(0, is_training=False), x)
    np.testing.assert_array_equal(drop(0, rate=0.0), x)


def test_dropout_takes_a_traced_rate():
    x = jnp.ones((8, 33))

    @jax.jit
    def drop(rate):
        return transformer.Dropout(rate).apply({}, x, is_training=True, rngs={"dropout": jax.random.key(0)})

    static = transformer.Dropout(0.5).apply({}, x, is_training=True, rngs={"dropout": jax.random.key(0)})
    np.testing.assert_array_equal(drop(0.5), static)
    np.testing.assert_array_equal(drop(0.0), x)


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_dense_equals_torch_in_value_and_gradient(compute_dtype):
    rng = np.random.default_rng(0)
    x, cotangent = rng.normal(size=(2, 3, 5)).astype(np.float32), rng.normal(size=(2, 3, 4)).astype(np.float32)
    dense = transformer.Dense(4, ("embed", "mlp"), compute_dtype=compute_dtype)
    params = nn.meta.unbox(dense.init(jax.random.key(0), jnp.asarray(x)))["params"]
    params = {"kernel": params["kernel"], "bias": jnp.asarray(rng.normal(size=4), jnp.float32)}
    output, pull_back = jax.vjp(lambda params, x: dense.apply({"params": params}, x), params, jnp.asarray(x))
    gradients, x_gradient = pull_back(jnp.asarray(cotangent))

    kernel, bias, torch_x = (torch.tensor(np.asarray(array), requires_grad=True) for array in (*params.values(), x))
    expected = torch_x @ kernel + bias
    expected.backward(torch.tensor(cotangent))
    # bfloat16 rounds two operands of each product by at most half of 2**-7.
    tolerance = 1e-6 if compute_dtype == "float32" else 2 * 2**-8
    assert output.dtype == gradients["kernel"].dtype == x_gradient.dtype == jnp.float32
    assert relative_error(output, expected.detach()) < tolerance
    assert relative_error(gradients["kernel"], kernel.grad) < tolerance
    assert relative_error(gradients["bias"], bias.grad) < 1e-6
    assert relative_error(x_gradient, torch_x.grad) < tolerance


def test_encoder_layer_equals_torch():
    rows, tokens, dim, heads, hidden = 2, 6, 8, 2, 16
    rng = np.random.default_rng(0)
    states = rng.normal(size=(rows, tokens, dim)).astype(np.float32)
    lengths = np.array([6, 4])
    ids = (np.arange(tokens)[None] < lengths[:, None]).astype(np.int32)
    mask = transformer.attendable(jnp.asarray(ids), jnp.asarray(ids))
    layer = transformer.EncoderLayer(heads, hidden, dropout_rate=0.0)
    params = nn.meta.unbox(layer.init(jax.random.key(0), jnp.asarray(states), mask, is_training=False))["params"]
    params = jax.tree.map(lambda leaf: leaf + 0.1 * jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), params)
    output = layer.apply({"params": params}, jnp.asarray(states), mask, is_training=False)

    peer = torch.nn.TransformerEncoderLayer(
        dim, heads, hidden, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    attention, feed_forward = params["attention"], params["feed_forward"]
    projections = [attention[name] for name in ("query", "key", "value")]
    copied = {
        "self_attn.in_proj_weight": np.concatenate([each["kernel"].T for each in projections]),
        "self_attn.in_proj_bias": np.concatenate([each["bias"] for each in projections]),
        "self_attn.out_proj.weight": attention["output"]["kernel"].T,
        "self_attn.out_proj.bias": np.zeros(dim, np.float32),
        "linear1.weight": feed_forward["hidden"]["kernel"].T,
        "linear1.bias": feed_forward["hidden"]["bias"],
        "linear2.weight": feed_forward["output"]["kernel"].T,
        "linear2.bias": feed_forward["output"]["bias"],
        "norm1.weight": params["attention_norm"]["scale"],
        "norm1.bias": params["attention_norm"]["bias"],
        "norm2.weight": params["feed_forward_norm"]["scale"],
        "norm2.bias": params["feed_forward_norm"]["bias"],
    }
    peer.load_state_dict({name: torch.tensor(np.asarray(array)) for name, array in copied.items()})
    expected = peer(torch.tensor(states), src_key_padding_mask=torch.tensor(ids == 0)).detach().numpy()
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(output[row, :length], expected[row, :length], atol=1e-5)
