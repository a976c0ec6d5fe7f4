"""ResNet: images to one state for each place of a coarse grid, and their mean.

Equal to Hugging Face's ``ResNetModel`` (ResNet-50 and its siblings, basic and bottleneck blocks) in evaluation mode.
Batch normalisation always uses its stored statistics, in training too: an image never depends on the others of its
batch. Means and variances get no gradient; fine-tuning moves scales and biases only.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float

from mmei_jax.encoders.convolution import Convolution
from mmei_jax.encoders.hugging_face_config import ConfigReader
from mmei_jax.encoders.outputs import ArrayLike, EncoderOutputs
from mmei_jax.encoders.stack import ComputeOptions
from mmei_jax.encoders.transformer import ACTIVATIONS, with_axes
from mmei_jax.types import InputError

_NORM_EPSILON = 1e-5
_BOTTLENECK = 4


@dataclass(frozen=True)
class ResNetConfig:
    """Architecture of a ResNet.

    Attributes:
        num_channels: colours of a pixel.
        stem_dim: channels after the first convolution.
        stage_dims: channels after each stage.
        depths: blocks of each stage.
        has_bottlenecks: whether blocks have three convolutions (1 x 1, 3 x 3, 1 x 1) or two (3 x 3 each).
        activation: what follows the stem and each sum, a key of :data:`~mmei_jax.encoders.transformer.ACTIVATIONS`;
            inside blocks it is ReLU.
        first_stage_halves: whether the first stage halves height and width, as all others do.
        first_convolution_halves: whether a bottleneck's first convolution does it, or its second.
    """

    num_channels: int
    stem_dim: int
    stage_dims: tuple[int, ...]
    depths: tuple[int, ...]
    has_bottlenecks: bool
    activation: str
    first_stage_halves: bool
    first_convolution_halves: bool

    def __post_init__(self) -> None:
        if not self.depths or len(self.depths) != len(self.stage_dims) or min(*self.depths, *self.stage_dims) < 1:
            raise InputError(f"hidden_sizes, depths = {self.stage_dims}, {self.depths}: expected as many of each")
        if min(self.num_channels, self.stem_dim) < 1:
            raise InputError("num_channels, embedding_size: expected at least 1")
        if self.has_bottlenecks and any(dim < _BOTTLENECK for dim in self.stage_dims):
            raise InputError(f"hidden_sizes = {self.stage_dims}: expected at least {_BOTTLENECK}")
        if self.activation not in ACTIVATIONS:
            raise InputError(f"activation {self.activation!r}: not implemented; there are {', '.join(ACTIVATIONS)}")

    @classmethod
    def read(cls, reader: ConfigReader) -> "ResNetConfig":
        """Reads the keys of a ``config.json``; see :meth:`from_hugging_face`."""
        reader.refuse("layer_type", "bottleneck", "basic")
        return cls(
            num_channels=reader.get("num_channels", 3),
            stem_dim=reader.get("embedding_size", 64),
            stage_dims=reader.get_list("hidden_sizes", (256, 512, 1024, 2048)),
            depths=reader.get_list("depths", (3, 4, 6, 3)),
            has_bottlenecks=reader.get("layer_type", "bottleneck") == "bottleneck",
            activation=reader.get("hidden_act", "relu"),
            first_stage_halves=reader.get("downsample_in_first_stage", False),
            first_convolution_halves=reader.get("downsample_in_bottleneck", False),
        )

    @classmethod
    def from_hugging_face(cls, config: Mapping[str, Any]) -> "ResNetConfig":
        """The architecture that a Hugging Face ``config.json`` of type ``resnet`` describes.

        Raises:
            InputError: another model type, a value of the wrong kind, or a feature that is not implemented.
        """
        return cls.read(ConfigReader(config, "resnet"))

    def has_shortcut(self, dim_before: int, stage: int, block: int) -> bool:
        """Whether a block's residual branch is projected, because its size changes."""
        return dim_before != self.stage_dims[stage] or self.stride(stage, block) != 1

    def stride(self, stage: int, block: int) -> int:
        """Step of a block: 2 in the first of a stage that halves the image."""
        return 2 if block == 0 and (stage > 0 or self.first_stage_halves) else 1

    def convolutions(self, stage: int, block: int) -> tuple[tuple[int, int, int], ...]:
        """Channels, window and step of each convolution of a block."""
        dim, stride = self.stage_dims[stage], self.stride(stage, block)
        if not self.has_bottlenecks:
            return (dim, 3, stride), (dim, 3, 1)
        narrow = dim // _BOTTLENECK
        first, second = (stride, 1) if self.first_convolution_halves else (1, stride)
        return (narrow, 1, first), (narrow, 3, second), (dim, 1, 1)


class StoredNorm(nn.Module):
    """Batch normalisation by stored statistics, which are parameters without a gradient."""

    @nn.compact
    def __call__(self, x: Float[Array, "*places channels"]) -> Float[Array, "*places channels"]:
        """Normalises each channel."""
        shape = (x.shape[-1],)
        scale, bias, mean, variance = (
            self.param(name, with_axes(init, "channels"), shape).astype(jnp.float32)
            for name, init in (
                ("scale", nn.initializers.ones),
                ("bias", nn.initializers.zeros),
                ("mean", nn.initializers.zeros),
                ("variance", nn.initializers.ones),
            )
        )
        factor = scale * lax.stop_gradient(variance + _NORM_EPSILON) ** -0.5
        row = (1,) * (x.ndim - 1) + (-1,)
        return (x - lax.stop_gradient(mean).reshape(row)) * factor.reshape(row) + bias.reshape(row)


class Block(nn.Module):
    """Convolutions on a residual branch.

    Attributes:
        config: architecture.
        stage: number of the stage, from 0.
        block: number of the block in the stage, from 0.
        compute_dtype: type in which convolutions read their operands.
    """

    config: ResNetConfig
    stage: int
    block: int
    compute_dtype: str

    @nn.compact
    def __call__(
        self, x: Float[Array, "frames height width channels"]
    ) -> Float[Array, "frames new_height new_width new_channels"]:
        """The image after the block."""
        config = self.config
        layers = config.convolutions(self.stage, self.block)
        y = x
        for index, (dim, kernel, stride) in enumerate(layers):
            y = _convolve_and_normalise(f"convolution_{index}", y, dim, kernel, stride, self.compute_dtype)
            if index < len(layers) - 1:
                y = nn.relu(y)
        if config.has_shortcut(x.shape[-1], self.stage, self.block):
            stride = config.stride(self.stage, self.block)
            x = _convolve_and_normalise("shortcut", x, config.stage_dims[self.stage], 1, stride, self.compute_dtype)
        return ACTIVATIONS[config.activation](y + x)


def _convolve_and_normalise(name: str, x: Array, dim: int, kernel: int, stride: int, compute_dtype: str) -> Array:
    convolution = Convolution(
        dim,
        (kernel, kernel),
        (stride, stride),
        padding=((kernel // 2, kernel // 2),) * 2,
        use_bias=False,
        compute_dtype=compute_dtype,
        name=name,
    )
    return StoredNorm(name=f"{name}_norm")(convolution(x))


class ResNet(nn.Module):
    """The encoder.

    Attributes:
        config: architecture.
        options: how it is computed; there are no layers to scan.
    """

    config: ResNetConfig
    options: ComputeOptions = ComputeOptions()

    @nn.compact
    def __call__(
        self, pixels: Float[ArrayLike, "frames height width channels"], *, with_hidden_states: bool = False
    ) -> EncoderOutputs:
        """Encodes images, each on its own.

        Args:
            pixels: ``[frames, height, width, channels]`` float32, normalised as the checkpoint's preprocessing says;
                channels come last; any size. NaN gives NaN, in the outputs of its image alone.
            with_hidden_states: whether what enters the first stage and what leaves each is returned too.

        Returns:
            Tokens are places of the last grid, row by row; ``pooled`` is their mean. Hidden states have as many tokens
            and features as their stage.

        Raises:
            InputError: the image has no pixels or another number of channels, or layers are to be scanned.
        """
        config, compute_dtype = self.config, self.options.compute_dtype
        pixels = jnp.asarray(pixels)
        if pixels.shape[-1] != config.num_channels:
            raise InputError(f"image with {pixels.shape[-1]} channels, which come last: expected {config.num_channels}")
        if 0 in pixels.shape[1:3]:
            raise InputError(f"image of {pixels.shape[1]} x {pixels.shape[2]} pixels: expected at least 1 x 1")
        if self.options.scan_layers:
            raise InputError("scan_layers: the blocks of a ResNet differ from each other and cannot be scanned")
        if self.options.remat == "products":
            raise InputError("remat = 'products': a ResNet has convolutions instead; expected none or layer")
        x = _convolve_and_normalise("stem", pixels, config.stem_dim, 7, 2, compute_dtype)
        x = ACTIVATIONS[config.activation](x)
        x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))  # type: ignore[no-untyped-call]
        block: Any = Block if self.options.remat == "none" else nn.remat(Block)
        stages = [x]
        for stage, depth in enumerate(config.depths):
            for index in range(depth):
                x = block(config, stage, index, compute_dtype, name=f"stage_{stage}_block_{index}")(x)
            stages.append(x)
        all_states = tuple(states.reshape(states.shape[0], -1, states.shape[-1]) for states in stages)
        last = all_states[-1]
        return EncoderOutputs(
            last_hidden_state=last,
            is_valid=jnp.ones(last.shape[:2], bool),
            pooled=last.mean(axis=1),
            hidden_states=all_states if with_hidden_states else None,
        )
