"""Wav2Vec2: waveforms to states, about fifty a second.

Equal to Hugging Face's ``Wav2Vec2Model`` on every row alone and unpadded, for both front ends (group norm, layer norm),
both encoders (post-LN, "stable" pre-LN), with convolution biases and with the convolutional adapter.

**Padding.** Elsewhere a row's output changes with its padding: the group norm's statistics run over the padded row, and
the adapter's windows reach into what stands behind the end. Here (``padding="exact"``) statistics are of valid frames
only and windows read zeros behind the end, so that a batched row equals the row alone. ``padding="huggingface"`` gives
Hugging Face's padded numbers instead, at padded frames too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, Shaped

from mmei_jax.encoders.convolution import Convolution
from mmei_jax.encoders.hugging_face_config import ConfigReader
from mmei_jax.encoders.outputs import ArrayLike, EncoderOutputs, places
from mmei_jax.encoders.stack import ComputeOptions, Stack, StackConfig
from mmei_jax.encoders.transformer import ACTIVATIONS, Dense, LayerNorm, attendable, with_axes
from mmei_jax.types import Dimension, InputError

# torch's default, which the front end's and the adapter's norms keep whatever the configuration says.
_FRONT_NORM_EPSILON = 1e-5
_ADAPTER_PADDING = 1
SAMPLING_RATE = 16_000
# Longer rows want gigabytes for a layer of the front end; whoever has longer audio splits it.
LONGEST_SECONDS = 120.0


@dataclass(frozen=True)
class Wav2Vec2Config:
    """Architecture of a Wav2Vec2.

    Attributes:
        stack: shape of the Transformer layers; ``norm_comes_first`` is Hugging Face's ``do_stable_layer_norm``.
        front_dims: channels after each convolution of the front end.
        front_kernels: samples, then frames, that each convolution reads.
        front_strides: step of each convolution.
        front_has_bias: whether the convolutions have a bias.
        front_norm: "group" (each channel over time, after the first convolution only) or "layer" (each frame over
            channels, after every convolution).
        front_activation: a key of :data:`~mmei_jax.encoders.transformer.ACTIVATIONS`.
        position_kernel: frames that the convolution reads which tells positions.
        position_groups: groups of its channels.
        num_adapter_layers: strided convolutions after the encoder; 0 for none.
        adapter_dim: features of a frame after the adapter.
        adapter_kernel: frames that its convolutions read.
        adapter_stride: their step.
    """

    stack: StackConfig
    front_dims: tuple[int, ...]
    front_kernels: tuple[int, ...]
    front_strides: tuple[int, ...]
    front_has_bias: bool
    front_norm: str
    front_activation: str
    position_kernel: int
    position_groups: int
    num_adapter_layers: int
    adapter_dim: int
    adapter_kernel: int
    adapter_stride: int

    def __post_init__(self) -> None:
        front = (self.front_dims, self.front_kernels, self.front_strides)
        if not self.front_dims or len({len(values) for values in front}) != 1 or min(map(min, front)) < 1:
            raise InputError(f"conv_dim, conv_kernel, conv_stride = {front}: expected as many of each, at least 1")
        if self.front_norm not in ("group", "layer"):
            raise InputError(f"feat_extract_norm = {self.front_norm!r} is not implemented; expected group or layer")
        if self.front_activation not in ACTIVATIONS:
            raise InputError(f"feat_extract_activation = {self.front_activation!r}: expected {', '.join(ACTIVATIONS)}")
        if self.position_groups < 1 or self.stack.dim % self.position_groups:
            raise InputError(
                f"num_conv_pos_embedding_groups = {self.position_groups}: expected a divisor of {self.stack.dim}"
            )
        for key, value in (
            ("num_conv_pos_embeddings", self.position_kernel),
            ("output_hidden_size", self.adapter_dim),
            ("adapter_kernel_size", self.adapter_kernel),
            ("adapter_stride", self.adapter_stride),
        ):
            if value < 1:
                raise InputError(f"{key} = {value}: expected at least 1")

    @classmethod
    def read(cls, reader: ConfigReader) -> "Wav2Vec2Config":
        """See :meth:`from_hugging_face`."""
        reader.refuse("adapter_attn_dim", None)
        dim = reader.get("hidden_size", 768)
        stack = StackConfig(
            num_layers=reader.get("num_hidden_layers", 12),
            dim=dim,
            num_heads=reader.get("num_attention_heads", 12),
            feedforward_dim=reader.get("intermediate_size", 3072),
            activation=reader.get("hidden_act", "gelu"),
            layer_norm_epsilon=reader.get("layer_norm_eps", 1e-5),
            norm_comes_first=reader.get("do_stable_layer_norm", False),
        )
        has_adapter = reader.get("add_adapter", False)
        num_adapter_layers = reader.get("num_adapter_layers", 3)
        if has_adapter and num_adapter_layers < 1:
            raise InputError(f"num_adapter_layers = {num_adapter_layers}: expected at least 1 with add_adapter")
        adapter_dim = reader.get_or_none("output_hidden_size", int) or dim
        return cls(
            stack=stack,
            front_dims=reader.get_list("conv_dim", (512,) * 7),
            front_kernels=reader.get_list("conv_kernel", (10, 3, 3, 3, 3, 2, 2)),
            front_strides=reader.get_list("conv_stride", (5, 2, 2, 2, 2, 2, 2)),
            front_has_bias=reader.get("conv_bias", False),
            front_norm=reader.get("feat_extract_norm", "group"),
            front_activation=reader.get("feat_extract_activation", "gelu"),
            position_kernel=reader.get("num_conv_pos_embeddings", 128),
            position_groups=reader.get("num_conv_pos_embedding_groups", 16),
            num_adapter_layers=num_adapter_layers if has_adapter else 0,
            adapter_dim=adapter_dim if has_adapter else dim,
            adapter_kernel=reader.get("adapter_kernel_size", 3),
            adapter_stride=reader.get("adapter_stride", 2),
        )

    @classmethod
    def from_hugging_face(cls, config: Mapping[str, Any]) -> "Wav2Vec2Config":
        """The architecture that a Hugging Face ``config.json`` of type ``wav2vec2`` describes.

        Raises:
            InputError: another model type, a value of the wrong kind, or a feature that is not implemented.
        """
        return cls.read(ConfigReader(config, "wav2vec2"))

    @property
    def receptive_field(self) -> int:
        """Samples that one frame of the front end hears: the shortest audio that gives a frame."""
        field = 1
        for kernel, stride in zip(self.front_kernels[::-1], self.front_strides[::-1], strict=True):
            field = (field - 1) * stride + kernel
        return field

    def num_encoder_frames(self, num_samples: Any) -> Any:
        """Frames that the front end makes of so many samples; whole numbers or arrays of them."""
        # In one step: of a chain of divisions, XLA takes minutes to compile the program of one row.
        return _num_windows(num_samples, self.receptive_field, int(np.prod(self.front_strides)))

    def num_frames(self, num_samples: Any) -> Any:
        """Frames that the whole encoder makes of so many samples; whole numbers or arrays of them."""
        frames = self.num_encoder_frames(num_samples)
        for _ in range(self.num_adapter_layers):
            frames = self.num_adapted_frames(frames)
        return frames

    def num_adapted_frames(self, num_frames: Any) -> Any:
        """Frames after one layer of the adapter; none stay none."""
        windows = _num_windows(num_frames + 2 * _ADAPTER_PADDING, self.adapter_kernel, self.adapter_stride)
        return windows * (num_frames > 0)

    def frame_times_seconds(self, num_frames: Dimension) -> ArrayLike:
        """The middle of what each frame hears, ``[num_frames]`` float32 seconds from the start of the audio."""
        step = float(np.prod(self.front_strides))
        first = self.receptive_field / 2.0
        for _ in range(self.num_adapter_layers):
            first += step * ((self.adapter_kernel - 1) / 2.0 - _ADAPTER_PADDING)
            step *= self.adapter_stride
        times: ArrayLike = ((first + step * places(num_frames)) / SAMPLING_RATE).astype(np.float32)
        return times


def _num_windows(length: Any, kernel: int, stride: int) -> Any:
    """How often a window fits; 0 where it never does."""
    windows = (length - kernel) // stride + 1
    return windows * (windows > 0)


@runtime_checkable
class ReadsWaveforms(Protocol):
    """Configuration of an encoder of waveforms: :class:`Wav2Vec2Config` or ``AudioCnnConfig``."""

    @property
    def receptive_field(self) -> int:
        """Samples of the shortest audio that gives a token."""
        ...


def check_waveform(samples: Shaped[np.ndarray, "..."], sampling_rate: int, config: ReadsWaveforms) -> None:
    """Refuses audio that the encoder cannot or should not read, before it reaches a compiled program.

    Args:
        samples: ``[samples]`` of a floating type: one channel.
        sampling_rate: samples per second.
        config: the encoder's.

    Raises:
        InputError: the array has another number of axes or is of whole numbers, the sampling rate is not
            :data:`SAMPLING_RATE`, a sample is NaN or infinite, or the audio is shorter than the encoder's
            ``receptive_field`` or longer than :data:`LONGEST_SECONDS`.
    """
    if samples.ndim != 1:
        raise InputError(f"audio of shape {samples.shape}: expected one channel, (samples,); average the channels")
    if not jnp.issubdtype(samples.dtype, jnp.floating):
        raise InputError(f"audio of type {samples.dtype}: expected a floating type; divide 16-bit samples by 32768")
    if sampling_rate != SAMPLING_RATE:
        raise InputError(f"audio of {sampling_rate} samples per second: expected {SAMPLING_RATE}; resample it")
    if len(samples) < config.receptive_field:
        raise InputError(f"audio of {len(samples)} samples: one frame takes at least {config.receptive_field}")
    seconds = len(samples) / SAMPLING_RATE
    if seconds > LONGEST_SECONDS:
        raise InputError(f"audio of {seconds:.1f} seconds: expected at most {LONGEST_SECONDS:.0f}; split it")
    is_wrong = ~np.isfinite(samples)
    if is_wrong.any():
        raise InputError(
            f"audio with {int(is_wrong.sum())} samples that are not finite, the first at {is_wrong.argmax()}"
        )


class ChannelNorm(nn.Module):
    """Group norm with one channel per group: each channel over time.

    The mean and variance are those of frames where ``is_counted``.
    """

    @nn.compact
    def __call__(
        self, states: Float[Array, "rows frames channels"], is_counted: Bool[Array, "rows frames"]
    ) -> Float[Array, "rows frames channels"]:
        """Normalises every frame, also those that are not counted."""
        shape = (states.shape[-1],)
        scale = self.param("scale", with_axes(nn.initializers.ones, "channels"), shape).astype(jnp.float32)
        bias = self.param("bias", with_axes(nn.initializers.zeros, "channels"), shape).astype(jnp.float32)
        counted = is_counted[..., None].astype(jnp.float32)
        count = jnp.maximum(counted.sum(axis=1, keepdims=True), 1.0)
        mean = (states * counted).sum(axis=1, keepdims=True) / count
        centred = states - mean
        variance = (centred**2 * counted).sum(axis=1, keepdims=True) / count
        inverse = (variance + _FRONT_NORM_EPSILON) ** -0.5
        return centred * inverse * scale[None, None] + bias[None, None]


def _channel_layer_norm(name: str, epsilon: float) -> nn.LayerNorm:
    """A norm over channels that are not the model's dimension."""
    return LayerNorm(
        epsilon=epsilon,
        scale_init=with_axes(nn.initializers.ones, "channels"),
        bias_init=with_axes(nn.initializers.zeros, "channels"),
        name=name,
    )


class Wav2Vec2(nn.Module):
    """The encoder.

    Attributes:
        config: architecture.
        options: how it is computed.
        padding: "exact" (a row does not depend on its padding) or "huggingface" (its padded numbers).
    """

    config: Wav2Vec2Config
    options: ComputeOptions = ComputeOptions()
    padding: str = "exact"

    @nn.compact
    def __call__(
        self,
        samples: Float[ArrayLike, "rows samples"],
        num_samples: Int[ArrayLike, "rows"] | None = None,
        *,
        with_hidden_states: bool = False,
    ) -> EncoderOutputs:
        """Encodes waveforms of 16,000 samples per second.

        A row of fewer samples than the receptive field, 0 included, has no frames. A valid sample that is NaN or
        infinite makes its row's outputs NaN (:func:`check_waveform` refuses such audio beforehand).

        Args:
            samples: ``[rows, samples]`` float32, normalised as the checkpoint's preprocessing says. What stands behind
                the end may be anything with ``padding="exact"``; Hugging Face puts zeros there.
            num_samples: ``[rows]`` int32, valid samples of each row, which come first; all where not given.
            with_hidden_states: whether the states around each Transformer layer are returned too, at the rate before
                the adapter.

        Returns:
            With ``padding="huggingface"``, padded frames hold what Hugging Face's hold; else zeros.

        Raises:
            InputError: the rows are shorter than the receptive field or longer than :data:`LONGEST_SECONDS`, padding
                included, or there is no such padding.
        """
        config = self.config
        if self.padding not in ("exact", "huggingface"):
            raise InputError(f"padding = {self.padding!r}: expected exact or huggingface")
        is_exact = self.padding == "exact"
        samples = jnp.asarray(samples, jnp.float32)
        rows, width = samples.shape
        if width < config.receptive_field:
            raise InputError(f"rows of {width} samples: one frame takes at least {config.receptive_field}")
        if width > int(LONGEST_SECONDS * SAMPLING_RATE):
            raise InputError(
                f"rows of {width} samples: expected at most {LONGEST_SECONDS:.0f} seconds; split longer ones"
            )
        lengths = jnp.full((rows,), width, jnp.int32) if num_samples is None else jnp.asarray(num_samples)
        if is_exact:
            samples = jnp.where(_is_before(lengths, width), samples, 0.0)

        states = self._front_end(samples, lengths if is_exact else jnp.full_like(lengths, width))
        num_frames = config.num_encoder_frames(lengths)
        is_valid = _is_before(num_frames, states.shape[1])
        states = jnp.where(is_valid[..., None], states, 0.0)
        states = states + self._positions(states)
        if not config.stack.norm_comes_first:
            states = self._encoder_norm()(states)
        segment_ids = is_valid.astype(jnp.int32)
        # There, padding attends to what is valid.
        query_ids = segment_ids if is_exact else jnp.ones_like(segment_ids)
        is_attendable = None if num_samples is None else attendable(query_ids, segment_ids)
        stack = Stack(config.stack, self.options, name="encoder")
        all_states = stack(states, is_attendable, keeps_all=with_hidden_states)
        last = self._encoder_norm()(all_states[-1]) if config.stack.norm_comes_first else all_states[-1]
        if is_exact:
            all_states = tuple(jnp.where(is_valid[..., None], states, 0.0) for states in all_states)
            last = jnp.where(is_valid[..., None], last, 0.0)
        last, num_frames = self._adapt(last, num_frames, is_exact=is_exact)
        return EncoderOutputs(
            last_hidden_state=last,
            is_valid=_is_before(num_frames, last.shape[1]),
            hidden_states=all_states if with_hidden_states else None,
            frame_times_seconds=jnp.asarray(config.frame_times_seconds(last.shape[1])),
        )

    def _encoder_norm(self) -> nn.LayerNorm:
        return LayerNorm(epsilon=self.config.stack.layer_norm_epsilon, name="encoder_norm")

    def _convolve(self, name: str, num_features: int, kernel: int, stride: int = 1, **options: Any) -> Convolution:
        compute_dtype = self.options.compute_dtype
        return Convolution(num_features, (kernel,), (stride,), compute_dtype=compute_dtype, name=name, **options)

    def _front_end(self, samples: Float[Array, "rows samples"], lengths: Int[Array, "rows"]) -> Array:
        """Frames of the model's dimension; the group norm counts those that hear the first ``lengths`` samples only."""
        config = self.config
        states = samples[..., None]
        layers = zip(config.front_dims, config.front_kernels, config.front_strides, strict=True)
        for index, (dim, kernel, stride) in enumerate(layers):
            states = self._convolve(f"front_{index}", dim, kernel, stride, use_bias=config.front_has_bias)(states)
            if config.front_norm == "layer":
                states = _channel_layer_norm(f"front_norm_{index}", _FRONT_NORM_EPSILON)(states)
            elif index == 0:
                is_counted = _is_before(_num_windows(lengths, kernel, stride), states.shape[1])
                states = ChannelNorm(name="front_norm_0")(states, is_counted)
            states = ACTIVATIONS[config.front_activation](states)
        states = _channel_layer_norm("projection_norm", config.stack.layer_norm_epsilon)(states)
        projection = Dense(
            config.stack.dim, ("channels", "embed"), compute_dtype=self.options.compute_dtype, name="projection"
        )
        return projection(states)

    def _positions(self, states: Float[Array, "rows frames dim"]) -> Float[Array, "rows frames dim"]:
        """What the neighbourhood of each frame tells about its place."""
        config = self.config
        # As many frames as before: of the padding of half a window at both ends, an even window has one too many.
        before = config.position_kernel // 2
        after = before - (1 - config.position_kernel % 2)
        convolve = self._convolve(
            "position",
            config.stack.dim,
            config.position_kernel,
            padding=((before, after),),
            num_groups=config.position_groups,
        )
        return ACTIVATIONS[config.front_activation](convolve(states))

    def _adapt(
        self, states: Float[Array, "rows frames dim"], num_frames: Int[Array, "rows"], *, is_exact: bool
    ) -> tuple[Float[Array, "rows adapted_frames adapter_dim"], Int[Array, "rows"]]:
        """The states after the adapter, and how many of each row are valid."""
        config = self.config
        if config.num_adapter_layers and config.adapter_dim != config.stack.dim:
            dense = Dense(
                config.adapter_dim, ("embed", "channels"), compute_dtype=self.options.compute_dtype, name="adapter"
            )
            states = _channel_layer_norm("adapter_norm", _FRONT_NORM_EPSILON)(dense(states))
        padding = ((_ADAPTER_PADDING, _ADAPTER_PADDING),)
        for index in range(config.num_adapter_layers):
            if is_exact:
                states = jnp.where(_is_before(num_frames, states.shape[1])[..., None], states, 0.0)
            name, width = f"adapter_{index}", 2 * config.adapter_dim
            convolve = self._convolve(name, width, config.adapter_kernel, config.adapter_stride, padding=padding)
            states = nn.glu(convolve(states))
            num_frames = config.num_adapted_frames(num_frames)
        if is_exact and config.num_adapter_layers:
            states = jnp.where(_is_before(num_frames, states.shape[1])[..., None], states, 0.0)
        return states, num_frames


def _is_before(lengths: Int[Array, "rows"], width: Dimension) -> Bool[Array, "rows width"]:
    """Which places of a row of ``width`` come before its length."""
    return jnp.arange(width)[None] < lengths[:, None]
