"""The Transformer layers that BERT, ViT and Wav2Vec2 share: norms before or after the branches, one attention.

Parameters keep one entry per layer, ``layer_0`` onwards. With ``scan_layers`` they are stacked along a leading axis
``layers`` instead (:func:`stack_layers` and :func:`unstack_layers` convert), so that the program holds one layer.
The layers are deterministic: what a Hugging Face configuration says about dropout and LayerDrop is not applied.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from mmei_jax.encoders.transformer import Dense, LayerNorm, attend, gelu
from mmei_jax.types import InputError

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
REMAT_POLICIES: Mapping[str, Callable[..., Any] | None] = {
    "layer": None,
    "products": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@dataclass(frozen=True)
class ComputeOptions:
    """How an encoder is computed. None of it changes what is computed, beyond the rounding of ``compute_dtype``.

    Attributes:
        compute_dtype: type in which matrix products and convolutions read their operands; they sum and return float32.
        scan_layers: one compiled layer run over stacked parameters (:func:`stack_layers`).
        remat: what the backward pass computes again instead of keeping: "none", "layer" (everything inside a layer) or
            "products" (all but the results of matrix products with parameters).

    Raises:
        InputError: a value that is not accepted.
    """

    compute_dtype: str = "float32"
    scan_layers: bool = False
    remat: str = "none"

    def __post_init__(self) -> None:
        if self.compute_dtype not in ("float32", "bfloat16", "float16"):
            raise InputError(f"compute_dtype = {self.compute_dtype!r}: expected float32, bfloat16 or float16")
        if self.remat not in ("none", *REMAT_POLICIES):
            raise InputError(f"remat = {self.remat!r}: expected none, {' or '.join(REMAT_POLICIES)}")


@dataclass(frozen=True)
class StackConfig:
    """Shape of a stack of layers.

    Attributes:
        num_layers: layers, at least 1.
        dim: features of a token.
        num_heads: attention heads; divides ``dim``.
        feedforward_dim: hidden features of the feed-forward block.
        activation: a key of :data:`ACTIVATIONS`.
        layer_norm_epsilon: added to the variance.
        norm_comes_first: whether the norms stand before the branches (pre-LN) or after the sums (post-LN).
        query_key_value_have_bias: whether these three projections have a bias; the others always do.
    """

    num_layers: int
    dim: int
    num_heads: int
    feedforward_dim: int
    activation: str
    layer_norm_epsilon: float
    norm_comes_first: bool
    query_key_value_have_bias: bool = True

    def __post_init__(self) -> None:
        for name in ("num_layers", "dim", "num_heads", "feedforward_dim"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} = {getattr(self, name)}: expected at least 1")
        if self.dim % self.num_heads:
            raise InputError(f"dim = {self.dim}: expected a multiple of the {self.num_heads} attention heads")
        if self.activation not in ACTIVATIONS:
            raise InputError(f"activation {self.activation!r}: not implemented; there are {', '.join(ACTIVATIONS)}")


class SelfAttention(nn.Module):
    """Projections to heads, attention among a row's tokens, and the projection back.

    Attributes:
        config: shape of the layer.
        compute_dtype: type in which matrix products read their operands.
    """

    config: StackConfig
    compute_dtype: str

    @nn.compact
    def __call__(
        self, states: Float[Array, "rows tokens dim"], is_attendable: Bool[Array, "rows tokens tokens"]
    ) -> Float[Array, "rows tokens dim"]:
        """Each token reads those that it may attend to; a token without any gets the last projection's bias."""
        rows, num_tokens, dim = states.shape
        num_heads = self.config.num_heads

        def project(name: str) -> Array:
            dense = Dense(
                dim,
                ("embed", "heads"),
                use_bias=self.config.query_key_value_have_bias,
                compute_dtype=self.compute_dtype,
                name=name,
            )
            return dense(states).reshape(rows, num_tokens, num_heads, dim // num_heads)

        mixed = attend(project("query"), project("key"), project("value"), is_attendable, self.compute_dtype)
        output = Dense(dim, ("heads", "embed"), compute_dtype=self.compute_dtype, name="output")
        return output(mixed.reshape(rows, num_tokens, dim))


class FeedForward(nn.Module):
    """Two linear layers with the configured activation between them.

    Attributes:
        config: shape of the layer.
        compute_dtype: type in which matrix products read their operands.
    """

    config: StackConfig
    compute_dtype: str

    @nn.compact
    def __call__(self, states: Float[Array, "rows tokens dim"]) -> Float[Array, "rows tokens dim"]:
        """Maps each token on its own."""
        config = self.config
        hidden = Dense(config.feedforward_dim, ("embed", "mlp"), compute_dtype=self.compute_dtype, name="hidden")
        output = Dense(config.dim, ("mlp", "embed"), compute_dtype=self.compute_dtype, name="output")
        return output(ACTIVATIONS[config.activation](hidden(states)))


class Layer(nn.Module):
    """Self-attention, then feed-forward, each on a residual branch.

    Attributes:
        config: shape of the layer.
        compute_dtype: type in which matrix products read their operands.
    """

    config: StackConfig
    compute_dtype: str

    @nn.compact
    def __call__(
        self, states: Float[Array, "rows tokens dim"], is_attendable: Bool[Array, "rows tokens tokens"]
    ) -> tuple[Float[Array, "rows tokens dim"], Float[Array, "rows tokens dim"]]:
        """The states after the layer, twice: ``nn.scan`` carries the first on and stacks the second."""
        attention = SelfAttention(self.config, self.compute_dtype, name="attention")
        attention_norm = LayerNorm(epsilon=self.config.layer_norm_epsilon, name="attention_norm")
        feed_forward = FeedForward(self.config, self.compute_dtype, name="feed_forward")
        feed_forward_norm = LayerNorm(epsilon=self.config.layer_norm_epsilon, name="feed_forward_norm")
        if self.config.norm_comes_first:
            states = states + attention(attention_norm(states), is_attendable)
            states = states + feed_forward(feed_forward_norm(states))
        else:
            states = attention_norm(states + attention(states, is_attendable))
            states = feed_forward_norm(states + feed_forward(states))
        return states, states


class Stack(nn.Module):
    """All layers of an encoder, one after the other; a norm before or after them is the encoder's own.

    Attributes:
        config: shape of the layers.
        options: how they are computed.
    """

    config: StackConfig
    options: ComputeOptions

    @nn.compact
    def __call__(
        self, states: Float[Array, "rows tokens dim"], is_attendable: Bool[Array, "rows tokens tokens"]
    ) -> tuple[Float[Array, "rows tokens dim"], ...]:
        """``num_layers + 1`` states: the given ones, and those after each layer."""
        layer: Any = Layer
        if self.options.remat != "none":
            layer = nn.remat(Layer, policy=REMAT_POLICIES[self.options.remat], prevent_cse=not self.options.scan_layers)
        if self.options.scan_layers:
            scanned = nn.scan(
                layer,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=self.config.num_layers,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            _, after = scanned(self.config, self.options.compute_dtype, name="layers")(states, is_attendable)
            return (states, *after)
        collected = [states]
        for index in range(self.config.num_layers):
            states, _ = layer(self.config, self.options.compute_dtype, name=f"layer_{index}")(states, is_attendable)
            collected.append(states)
        return tuple(collected)


def stack_layers(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of an encoder with one entry per layer, as ``scan_layers`` wants them.

    Args:
        parameters: nested mappings of arrays, without axis names (``flax.linen.meta.unbox``).

    Returns:
        The same tree where ``layer_0 .. layer_n`` is one entry ``layers`` with a leading axis.
    """
    names = sorted((name for name in parameters if name.startswith("layer_")), key=lambda name: int(name[6:]))
    kept = {
        name: stack_layers(value) if isinstance(value, Mapping) else value
        for name, value in parameters.items()
        if name not in names
    }
    if names:
        kept["layers"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(parameters[name] for name in names))
    return kept


def unstack_layers(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`stack_layers`."""
    kept = {
        name: unstack_layers(value) if isinstance(value, Mapping) else value
        for name, value in parameters.items()
        if name != "layers"
    }
    if "layers" in parameters:
        num_layers = len(jax.tree.leaves(parameters["layers"])[0])
        for index in range(num_layers):
            kept[f"layer_{index}"] = jax.tree.map(lambda leaf, index=index: leaf[index], parameters["layers"])
    return kept
