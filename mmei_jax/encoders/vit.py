"""ViT: images to one state for the image and one for each of its patches.

Equal to Hugging Face's ``ViTModel`` for any image size, patch size and depth, with and without pooler. Where an image
is of another size than the position embeddings, these are interpolated as with ``interpolate_pos_encoding=True``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float, Float32

from mmei_jax.encoders.hugging_face_config import ConfigReader
from mmei_jax.encoders.outputs import ArrayLike, EncoderOutputs
from mmei_jax.encoders.stack import ComputeOptions, Stack, StackConfig
from mmei_jax.encoders.transformer import ACTIVATIONS, Dense, LayerNorm, embedding_init, with_axes
from mmei_jax.types import InputError

# torch's constant of the bicubic kernel.
_BICUBIC_A = -0.75


@dataclass(frozen=True)
class VitConfig:
    """Architecture of a ViT.

    Attributes:
        stack: shape of the layers.
        image_size: height and width, in pixels, that the position embeddings are made for.
        patch_size: height and width of a patch, in pixels.
        num_channels: colours of a pixel.
        has_pooler: whether the first token's state goes through a further linear layer and an activation.
        pooler_dim: features of the pooler's output.
        pooler_activation: its activation, a key of :data:`~mmei_jax.encoders.transformer.ACTIVATIONS`.
    """

    stack: StackConfig
    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    num_channels: int
    has_pooler: bool
    pooler_dim: int
    pooler_activation: str

    def __post_init__(self) -> None:
        if min(*self.patch_size, self.num_channels, self.pooler_dim) < 1:
            raise InputError("patch_size, num_channels and pooler_dim: expected at least 1")
        if self.image_size[0] < self.patch_size[0] or self.image_size[1] < self.patch_size[1]:
            raise InputError(f"image_size = {self.image_size}: expected at least one patch of {self.patch_size}")
        if self.pooler_activation not in ACTIVATIONS:
            raise InputError(
                f"pooler_act {self.pooler_activation!r}: not implemented; there are {', '.join(ACTIVATIONS)}"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Patches from top to bottom and from left to right in an image of :attr:`image_size`."""
        return self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1]

    @classmethod
    def read(cls, reader: ConfigReader, *, has_pooler: bool = True) -> "VitConfig":
        """Reads the keys of a ``config.json``; see :meth:`from_hugging_face`."""
        dim = reader.get("hidden_size", 768)
        num_heads = reader.get("num_attention_heads", 12)
        reader.refuse("head_dim", None, dim // max(num_heads, 1))
        stack = StackConfig(
            num_layers=reader.get("num_hidden_layers", 12),
            dim=dim,
            num_heads=num_heads,
            feedforward_dim=reader.get("intermediate_size", 3072),
            activation=reader.get("hidden_act", "gelu"),
            layer_norm_epsilon=reader.get("layer_norm_eps", 1e-12),
            norm_comes_first=True,
            query_key_value_have_bias=reader.get("qkv_bias", True),
        )
        return cls(
            stack=stack,
            image_size=reader.get_pair("image_size", 224),
            patch_size=reader.get_pair("patch_size", 16),
            num_channels=reader.get("num_channels", 3),
            has_pooler=has_pooler,
            pooler_dim=reader.get_or_none("pooler_output_size", int) or dim,
            pooler_activation=reader.get("pooler_act", "tanh"),
        )

    @classmethod
    def from_hugging_face(cls, config: Mapping[str, Any], *, has_pooler: bool = True) -> "VitConfig":
        """The architecture that a Hugging Face ``config.json`` of type ``vit`` describes.

        Args:
            config: what the file holds; missing keys have Hugging Face's defaults.
            has_pooler: the file does not say it: base models have one, classifiers have none.

        Raises:
            InputError: another model type, a value of the wrong kind, or a feature that is not implemented.
        """
        return cls.read(ConfigReader(config, "vit"), has_pooler=has_pooler)


def bicubic_weights(size: int, new_size: int) -> Float32[np.ndarray, "{new_size} {size}"]:
    """The matrix that resamples ``size`` values to ``new_size`` as torch's bicubic interpolation does.

    Cubic convolution with a = -0.75 between pixel centres (``align_corners=False``), edges repeated, no antialiasing.

    References:
        Keys, "Cubic Convolution Interpolation for Digital Image Processing", 1981.
    """
    centres = (np.arange(new_size) + 0.5) * (size / new_size) - 0.5
    start = np.floor(centres)
    weights = np.zeros((new_size, size))
    for tap in (-1, 0, 1, 2):
        distance = np.abs(centres - (start + tap))
        near = (_BICUBIC_A + 2) * distance**3 - (_BICUBIC_A + 3) * distance**2 + 1
        far = _BICUBIC_A * (distance**3 - 5 * distance**2 + 8 * distance - 4)
        index = np.clip(start + tap, 0, size - 1).astype(int)
        np.add.at(weights, (np.arange(new_size), index), np.where(distance <= 1, near, far))
    return weights.astype(np.float32)


def interpolate_positions(
    positions: Float[Array, "patches dim"], grid: tuple[int, int], new_grid: tuple[int, int]
) -> Float[Array, "new_patches dim"]:
    """Position embeddings of a grid of patches, resampled to another grid.

    Args:
        positions: ``[rows * columns, dim]``, row by row.
        grid: rows and columns of ``positions``.
        new_grid: rows and columns of the result.
    """
    if grid == new_grid:
        return positions
    vertical, horizontal = (bicubic_weights(*sizes) for sizes in zip(grid, new_grid, strict=True))
    square = positions.reshape(*grid, -1)
    resampled = jnp.einsum("vr,hc,rcd->vhd", vertical, horizontal, square, precision=lax.Precision.HIGHEST)
    return resampled.reshape(new_grid[0] * new_grid[1], -1)


def mean_of_patches(outputs: EncoderOutputs) -> Float[Array, "frames dim"]:
    """The mean state over an image's patches, without the first token."""
    return outputs.last_hidden_state[:, 1:].mean(axis=1)


class Vit(nn.Module):
    """The encoder.

    Attributes:
        config: architecture.
        options: how it is computed.
    """

    config: VitConfig
    options: ComputeOptions = ComputeOptions()

    @nn.compact
    def __call__(
        self, pixels: Float[ArrayLike, "frames height width channels"], *, with_hidden_states: bool = False
    ) -> EncoderOutputs:
        """Encodes images, each on its own.

        Args:
            pixels: ``[frames, height, width, channels]`` float32, normalised as the checkpoint's preprocessing says;
                channels come last. What a whole number of patches does not cover, at the bottom and at the right, is
                not read. NaN gives NaN, in the outputs of its image alone.
            with_hidden_states: whether the states around each layer are returned too.

        Returns:
            Token 0 stands for the image, the others for its patches, row by row; all are valid.

        Raises:
            InputError: the image is smaller than a patch, or has another number of channels.
        """
        config, options = self.config, self.options
        pixels = jnp.asarray(pixels)
        num_frames, height, width, num_channels = pixels.shape
        patch_height, patch_width = config.patch_size
        rows, columns = height // patch_height, width // patch_width
        if num_channels != config.num_channels:
            raise InputError(f"image with {num_channels} channels, which come last: expected {config.num_channels}")
        if min(rows, columns) == 0:
            raise InputError(f"image of {height} x {width} pixels: expected at least one patch of {config.patch_size}")

        patches = pixels[:, : rows * patch_height, : columns * patch_width]
        patches = patches.reshape(num_frames, rows, patch_height, columns, patch_width, num_channels)
        # One matrix product is faster than the convolution that it equals.
        patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(num_frames, rows * columns, -1)
        dim = config.stack.dim
        embed = Dense(dim, ("features", "embed"), compute_dtype=options.compute_dtype, name="patch_embedding")
        first = self.param("first_token", with_axes(embedding_init, "embed"), (dim,)).astype(jnp.float32)
        shape = (1 + config.grid[0] * config.grid[1], dim)
        positions = self.param("position_embedding", with_axes(embedding_init, "position", "embed"), shape)
        positions = positions.astype(jnp.float32)
        states = jnp.concatenate(
            [
                jnp.broadcast_to(first + positions[0], (num_frames, 1, dim)),
                embed(patches) + interpolate_positions(positions[1:], config.grid, (rows, columns))[None],
            ],
            axis=1,
        )
        num_tokens = states.shape[1]
        all_states = Stack(config.stack, options, name="encoder")(states, None, keeps_all=with_hidden_states)
        last = LayerNorm(epsilon=config.stack.layer_norm_epsilon, name="last_norm")(all_states[-1])
        pooled = None
        if config.has_pooler:
            pooler = Dense(config.pooler_dim, ("embed", "features"), compute_dtype=options.compute_dtype, name="pooler")
            pooled = ACTIVATIONS[config.pooler_activation](pooler(last[:, 0]))
        return EncoderOutputs(
            last_hidden_state=last,
            is_valid=jnp.ones((num_frames, num_tokens), bool),
            pooled=pooled,
            hidden_states=all_states if with_hidden_states else None,
        )
