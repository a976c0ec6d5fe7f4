"""Transformer blocks and masks, shared by every encoder and by the fusion model.

Masks say what may be attended to (True) and come from segment ids: 0 is padding, ``s >= 1`` the row's ``s``-th record
(see :class:`~mmei_jax.types.TokenSequence`). Parameters are float32 with logical axis names; ``compute_dtype`` is the
type in which matrix products read their operands: they sum and return float32, and so is everything in between.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import export, lax
from jaxtyping import Array, Bool, Float, Int

from mmei_jax.activations import placed

Initializer = Callable[..., Any]

kernel_init = nn.initializers.xavier_uniform()
embedding_init = nn.initializers.normal(stddev=0.02)

# Score of a masked place: finite, so that a row without any other stays finite, and exp() of the difference is 0.
_MASKED_SCORE = float(np.finfo(np.float32).min)


def with_axes(init: Initializer, *axes: str) -> Initializer:
    """An initializer whose parameter carries logical axis names, one for each of its dimensions."""
    return nn.with_logical_partitioning(init, axes)


def attendable(
    query_segment_ids: Int[Array, "rows queries"], key_segment_ids: Int[Array, "rows keys"]
) -> Bool[Array, "rows queries keys"]:
    """Which keys each query may attend to: tokens of its own record, padding never.

    Args:
        query_segment_ids: ``[rows, queries]`` int32, 0 for padding.
        key_segment_ids: ``[rows, keys]`` int32, 0 for padding.

    Returns:
        ``[rows, queries, keys]`` bool; all False in the row of a padding query.
    """
    query_ids = query_segment_ids[:, :, None]
    return (query_ids == key_segment_ids[:, None, :]) & (query_ids > 0)


def positions_in_segment(segment_ids: Int[Array, "rows tokens"]) -> Int[Array, "rows tokens"]:
    """Each token's place within its own record, from 0; 0 for padding.

    Args:
        segment_ids: ``[rows, tokens]`` int32; the tokens of one record are contiguous.
    """
    index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1], dtype=jnp.int32), segment_ids.shape)
    before = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    start = lax.cummax(jnp.where(segment_ids != before, index, 0), axis=1)
    return jnp.where(segment_ids > 0, index - start, 0)


def masked_softmax(scores: Float[Array, "*places"], is_attendable: Bool[Array, "*places"]) -> Float[Array, "*places"]:
    """Softmax over the last axis, over the True places only, in float32.

    A masked place gets exactly 0, and exactly zero gradient; so does every place where none is True.

    Args:
        scores: ``[..., places]``, finite.
        is_attendable: bool, of a shape that broadcasts to the scores'.
    """
    scores = jnp.where(is_attendable, scores.astype(jnp.float32), _MASKED_SCORE)
    shifted = scores - lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    weights = jnp.where(is_attendable, jnp.exp(shifted), 0.0)
    total = weights.sum(axis=-1, keepdims=True)
    return weights / jnp.where(total > 0.0, total, 1.0)


def attend(
    query: Float[Array, "rows queries heads dim"],
    key: Float[Array, "rows keys heads dim"],
    value: Float[Array, "rows keys heads dim"],
    is_attendable: Bool[Array, "rows queries keys"] | None,
    compute_dtype: jnp.dtype | str = "float32",
) -> Float[Array, "rows queries heads dim"]:
    """Scaled dot-product attention (Eq. 2); the only attention of the package.

    Departs from Eq. 2 where a query has nothing to attend to: its output is exactly zero and no gradient passes, where
    the formula gives NaN, and ``jax.nn.dot_product_attention`` the mean of the masked values.

    On CUDA, 16-bit operands go through cuDNN's fused attention where it takes their heads (:func:`is_fusible`), whose
    weights are never stored. Everything else is plain XLA: there the sum of the exponentials divides *after* the
    product with the values, which is up to four times faster on CPUs.

    Args:
        query: ``[rows, queries, heads, dim]``.
        key: ``[rows, keys, heads, dim]``. Masked keys must be finite; they change nothing.
        value: ``[rows, keys, heads, dim]``. As the keys.
        is_attendable: ``[rows, queries, keys]`` bool; None where every query may attend to every key.
        compute_dtype: type in which the two matrix products read their operands.

    Returns:
        ``[rows, queries, heads, dim]`` float32.

    References:
        Vaswani et al., "Attention Is All You Need", 2017, Eq. 1.
    """
    query, key, value = (array.astype(compute_dtype) for array in (query * query.shape[-1] ** -0.5, key, value))
    if has_fused_attention() and is_fusible(query):
        # The platform is known when the program is lowered: the same trace may be exported for another one.
        mixed = lax.platform_dependent(query, key, value, is_attendable, cuda=_attend_fused, default=_attend_plain)
    else:
        mixed = _attend_plain(query, key, value, is_attendable)
    if is_attendable is None:
        return mixed
    # A row in which everything is masked is finite in both, and cut off here in both directions.
    return jnp.where(is_attendable.any(axis=-1)[:, :, None, None], mixed, 0.0)


def has_fused_attention() -> bool:
    """Whether programs are traced where cuDNN's fused attention is: beside a CUDA device of Ampere or later."""
    device: Any = jax.devices()[0]
    is_cuda = device.platform == "gpu" and "cuda" in device.client.platform_version
    return is_cuda and float(device.compute_capability) >= 8.0


def is_fusible(query: Float[Array, "rows queries heads dim"]) -> bool:
    """Whether cuDNN's fused attention, forward and backward, takes such heads.

    It wants 16 bits, at most 128 features of a head in multiples of 8, and sizes that are numbers: programs that are
    exported with symbolic ones are plain XLA on every platform.
    """
    dim = query.shape[-1]
    has_numbers = not any(map(export.is_symbolic_dim, query.shape))
    return has_numbers and query.dtype.itemsize == 2 and dim <= 128 and dim % 8 == 0


def _attend_fused(query: Array, key: Array, value: Array, is_attendable: Array | None) -> Array:
    rows, num_queries, num_keys = *query.shape[:2], key.shape[1]
    # Its gradient is for even lengths only (and jax refuses odd ones): one place more, which nothing attends to.
    more_queries, more_keys = (0, num_queries % 2), (0, num_keys % 2)
    options: dict[str, Any] = {}
    if is_attendable is not None:
        options["mask"] = jnp.pad(is_attendable, ((0, 0), more_queries, more_keys))[:, None]
    elif num_keys % 2:
        options["key_value_seq_lengths"] = jnp.full((rows,), num_keys, jnp.int32)
    query = jnp.pad(query, ((0, 0), more_queries, (0, 0), (0, 0)))
    key, value = (jnp.pad(array, ((0, 0), more_keys, (0, 0), (0, 0))) for array in (key, value))
    mixed = jax.nn.dot_product_attention(query, key, value, scale=1.0, implementation="cudnn", **options)
    return mixed[:, :num_queries].astype(jnp.float32)


def _attend_plain(query: Array, key: Array, value: Array, is_attendable: Array | None) -> Array:
    # [rows, heads, length, dim]: the layout in which both products are plain batched matrix products
    query, key, value = (array.transpose(0, 2, 1, 3) for array in (query, key, value))
    scores = jnp.einsum("rhqd,rhkd->rhqk", query, key, preferred_element_type=jnp.float32)
    if is_attendable is not None:
        scores = jnp.where(is_attendable[:, None], scores, _MASKED_SCORE)
    weights = jnp.exp(scores - lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    total = weights.sum(axis=-1, keepdims=True)
    mixed = jnp.einsum("rhqk,rhkd->rhqd", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
    return (mixed / total).transpose(0, 2, 1, 3)


def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Exact GELU. ``jax.nn.gelu(approximate=False)`` is the same function through a slower ``erfc``.

    References:
        Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016.
    """
    return 0.5 * x * (1.0 + lax.erf(x * (0.5**0.5)))


# By the names that Hugging Face gives them. "gelu" is the exact one; the others are the tanh approximation.
ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}


class Dense(nn.Module):
    """``x @ kernel + bias`` on the last axis; returns float32.

    Attributes:
        num_features: size of the last axis of the result.
        axes: logical names of the kernel's two dimensions; the bias carries the second.
        use_bias: whether there is a bias.
        compute_dtype: type in which the product reads its operands.
        kernel_init: initializer of the kernel.
    """

    num_features: int
    axes: tuple[str, str]
    use_bias: bool = True
    compute_dtype: str = "float32"
    kernel_init: Initializer = kernel_init

    @nn.compact
    def __call__(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch features"]:
        """Maps ``[..., dim]`` to ``[..., num_features]``."""
        kernel = self.param("kernel", with_axes(self.kernel_init, *self.axes), (x.shape[-1], self.num_features))
        # One flat matrix product is faster than a batched one, in the backward pass above all.
        flat = x.reshape(-1, x.shape[-1]).astype(self.compute_dtype)
        y = jnp.matmul(flat, kernel.astype(self.compute_dtype), preferred_element_type=jnp.float32)
        if self.use_bias:
            y = y + self.param("bias", with_axes(nn.initializers.zeros, self.axes[1]), (self.num_features,))[None]
        return y.reshape(*x.shape[:-1], self.num_features)


# Statistics in float32, of squared deviations from the mean: the "fast" variance cancels when the mean is large.
LayerNorm = partial(
    nn.LayerNorm,
    epsilon=1e-5,
    dtype=jnp.float32,
    use_fast_variance=False,
    scale_init=with_axes(nn.initializers.ones, "embed"),
    bias_init=with_axes(nn.initializers.zeros, "embed"),
)


class Dropout(nn.Module):
    """Inverted dropout, whose rate may be a traced value (``nn.Dropout`` takes Python numbers only).

    Draws from the generator ``dropout``: same key, same mask.

    Attributes:
        rate: chance that a value is zeroed, in [0, 1), rounded to a multiple of 2**-16. A Python 0.0 costs nothing.
    """

    rate: float | Float[Array, ""]

    @nn.compact
    def __call__(self, x: Float[Array, "*shape"], *, is_training: bool) -> Float[Array, "*shape"]:
        """Zeroes values at random and scales the others so that the expectation stays; identity when not training."""
        if not is_training or (isinstance(self.rate, int | float) and self.rate == 0.0):
            return x
        # Two draws of 16 bits from each 32-bit word: random bits are the larger part of what dropout costs on a CPU.
        words = jax.random.bits(self.make_rng("dropout"), (*x.shape[:-1], (x.shape[-1] + 1) // 2), jnp.uint32)
        draws = lax.bitcast_convert_type(words, jnp.uint16).reshape(*x.shape[:-1], -1)[..., : x.shape[-1]]
        num_kept = jnp.round((1.0 - self.rate) * 2.0**16)
        return jnp.where(draws < num_kept, x * (2.0**16 / num_kept), 0.0)


def add_branch(states: Float[Array, "*shape"], branch: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """``states + branch``, the residual stream ``[rows, ..., dim]`` after a branch: stored once, as is its gradient.

    Without the barrier a compiler may fuse the sum into each of its readers. The stream is a sum over all layers, so
    every layer would add up all earlier ones again, and its gradient all later ones.
    """
    return placed_states(lax.optimization_barrier(states + branch))


def placed_states(states: Float[Array, "*rows dim"]) -> Float[Array, "*rows dim"]:
    """The states of tokens or records, on the devices that have their rows (:mod:`mmei_jax.activations`).

    A single state, of one item of a :func:`jax.lax.map`, say, stays where it is.
    """
    if states.ndim == 1:
        return states
    return placed(states, "batch", *(None,) * (states.ndim - 2), "embed")


class MultiHeadAttention(nn.Module):
    """Projections to heads, :func:`attend`, and the projection back.

    Attributes:
        num_heads: attention heads; divides the dimension of the queries.
        compute_dtype: type in which matrix products read their operands.
        projections_have_bias: whether those of queries, keys and values have a bias.
        output_has_bias: whether the last projection has one; without it, a query with nothing to attend to gets
            exactly zero.
    """

    num_heads: int
    compute_dtype: str = "float32"
    projections_have_bias: bool = True
    output_has_bias: bool = False

    @nn.compact
    def __call__(
        self,
        queries: Float[Array, "rows queries dim"],
        context: Float[Array, "rows keys dim"],
        is_attendable: Bool[Array, "rows queries keys"] | None,
    ) -> Float[Array, "rows queries dim"]:
        """Each query token reads the context tokens that it may attend to; all of them where ``None``."""
        rows, num_queries, dim = queries.shape

        def project(name: str, x: Array) -> Array:
            dense = Dense(
                dim,
                ("embed", "heads"),
                use_bias=self.projections_have_bias,
                compute_dtype=self.compute_dtype,
                name=name,
            )
            heads = dense(x).reshape(rows, x.shape[1], self.num_heads, dim // self.num_heads)
            return placed(heads, "batch", None, "heads", None)

        mixed = attend(
            project("query", queries),
            project("key", context),
            project("value", context),
            is_attendable,
            self.compute_dtype,
        )
        mixed = placed(mixed, "batch", None, "heads", None)
        output = Dense(
            dim,
            ("heads", "embed"),
            use_bias=self.output_has_bias,
            compute_dtype=self.compute_dtype,
            name="output",
        )
        return output(mixed.reshape(rows, num_queries, dim))


class FeedForward(nn.Module):
    """Two linear layers with an activation between them.

    Attributes:
        hidden_dim: features between the layers.
        compute_dtype: type in which matrix products read their operands.
        activation: a key of :data:`ACTIVATIONS`.
    """

    hidden_dim: int
    compute_dtype: str = "float32"
    activation: str = "gelu"

    @nn.compact
    def __call__(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        """Maps each token on its own."""
        hidden = Dense(self.hidden_dim, ("embed", "mlp"), compute_dtype=self.compute_dtype, name="hidden")(x)
        hidden = placed(hidden, "batch", *(None,) * (x.ndim - 2), "mlp")
        output = Dense(x.shape[-1], ("mlp", "embed"), compute_dtype=self.compute_dtype, name="output")
        return output(ACTIVATIONS[self.activation](hidden))


class EncoderLayer(nn.Module):
    """A Transformer layer: self-attention, then feed-forward, each on a residual branch with dropout.

    Attributes:
        num_heads: attention heads.
        feedforward_dim: hidden features of the feed-forward block.
        dropout_rate: dropout on both branches.
        compute_dtype: type in which matrix products read their operands.
        norm_comes_first: whether the norms stand before the branches (pre-LN) or after the sums (post-LN).
        layer_norm_epsilon: added to the variance.
        activation: of the feed-forward block, a key of :data:`ACTIVATIONS`.
        projections_have_bias: as in :class:`MultiHeadAttention`.
        output_has_bias: as in :class:`MultiHeadAttention`.
    """

    num_heads: int
    feedforward_dim: int
    dropout_rate: float | Float[Array, ""] = 0.0
    compute_dtype: str = "float32"
    norm_comes_first: bool = True
    layer_norm_epsilon: float = 1e-5
    activation: str = "gelu"
    projections_have_bias: bool = True
    output_has_bias: bool = False

    @nn.compact
    def __call__(
        self,
        states: Float[Array, "rows tokens dim"],
        is_attendable: Bool[Array, "rows tokens tokens"] | None,
        *,
        is_training: bool,
    ) -> Float[Array, "rows tokens dim"]:
        """The states after the layer; normalised where the norms come last."""
        drop = partial(Dropout(self.dropout_rate), is_training=is_training)
        attention_norm = LayerNorm(epsilon=self.layer_norm_epsilon, name="attention_norm")
        attention = MultiHeadAttention(
            self.num_heads, self.compute_dtype, self.projections_have_bias, self.output_has_bias, name="attention"
        )
        feed_forward_norm = LayerNorm(epsilon=self.layer_norm_epsilon, name="feed_forward_norm")
        feed_forward = FeedForward(self.feedforward_dim, self.compute_dtype, self.activation, name="feed_forward")
        if self.norm_comes_first:
            normed = attention_norm(states)
            states = add_branch(states, drop(attention(normed, normed, is_attendable)))
            return add_branch(states, drop(feed_forward(feed_forward_norm(states))))
        states = attention_norm(placed_states(states + drop(attention(states, states, is_attendable))))
        return feed_forward_norm(placed_states(states + drop(feed_forward(states))))
