"""The stack of Transformer layers that BERT, ViT and Wav2Vec2 share, and the ways in which it is computed.

Parameters keep one entry per layer, ``layer_0`` onwards. With ``scan_layers`` they are stacked along a leading axis
``layers`` instead (:func:`stack_layers` and :func:`unstack_layers` convert), so that the program holds one layer.
The layers are deterministic: what a Hugging Face configuration says about dropout and LayerDrop is not applied.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from mmei_jax.encoders.transformer import ACTIVATIONS, EncoderLayer
from mmei_jax.types import InputError

REMAT_POLICIES: Mapping[str, Callable[..., Any] | None] = {
    "layer": None,
    "products": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@dataclass(frozen=True)
class ComputeOptions:
    """How an encoder is computed. None of it changes what is computed, beyond the rounding of ``compute_dtype``.

    Attributes:
        compute_dtype: type in which matrix products and convolutions read their operands. Matrix products sum in
            float32 and return float32. A convolution's result is rounded to this type, and becomes float32 after that.
            All else (norms, softmax, activations, sums of the residual stream, spectrograms) is float32. float16 holds
            no more than 65504 and, without a scaled loss, loses small gradients: bfloat16 is the type to train in.
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


class Layer(nn.Module):
    """An :class:`~mmei_jax.encoders.transformer.EncoderLayer` in the form that ``nn.scan`` repeats.

    Attributes:
        config: shape of the layer.
        compute_dtype: type in which matrix products read their operands.
        is_kept: whether ``nn.scan`` stacks the states of every layer.
    """

    config: StackConfig
    compute_dtype: str
    is_kept: bool

    @nn.compact
    def __call__(
        self, states: Float[Array, "rows tokens dim"], is_attendable: Bool[Array, "rows tokens tokens"] | None
    ) -> tuple[Float[Array, "rows tokens dim"], Float[Array, "rows tokens dim"] | None]:
        """The states after the layer: ``nn.scan`` carries the first on and stacks the second, if there is one."""
        config = self.config
        layer = EncoderLayer(
            num_heads=config.num_heads,
            feedforward_dim=config.feedforward_dim,
            compute_dtype=self.compute_dtype,
            norm_comes_first=config.norm_comes_first,
            layer_norm_epsilon=config.layer_norm_epsilon,
            activation=config.activation,
            projections_have_bias=config.query_key_value_have_bias,
            output_has_bias=True,
        )
        nn.share_scope(self, layer)
        states = layer(states, is_attendable, is_training=False)
        return states, states if self.is_kept else None


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
        self,
        states: Float[Array, "rows tokens dim"],
        is_attendable: Bool[Array, "rows tokens tokens"] | None,
        *,
        keeps_all: bool,
    ) -> tuple[Float[Array, "rows tokens dim"], ...]:
        """The states after the last layer, alone or, kept all, behind the given ones and those after each layer."""
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
            layers = scanned(self.config, self.options.compute_dtype, keeps_all, name="layers")
            last, after = layers(states, is_attendable)
            return (states, *after) if keeps_all else (last,)
        collected = [states]
        for index in range(self.config.num_layers):
            named = layer(self.config, self.options.compute_dtype, keeps_all, name=f"layer_{index}")
            states, _ = named(states, is_attendable)
            collected.append(states)
        return tuple(collected) if keeps_all else (states,)


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
