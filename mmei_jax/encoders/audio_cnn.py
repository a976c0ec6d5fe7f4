"""Audio-CNN: waveforms to log-mel spectrograms to states, about six a second; Table 1's audio baseline.

The paper names an "Audio-CNN" and says nothing about it: this one is ours, and is trained from scratch. Like the other
encoders' its outputs do not depend on padding or on the rest of the batch: windows read zeros behind the end of a row,
and every norm is of one place over channels.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float, Float32, Int

from mmei_jax.encoders.convolution import Convolution
from mmei_jax.encoders.hugging_face_config import ConfigReader
from mmei_jax.encoders.outputs import ArrayLike, EncoderOutputs, mean_of_tokens, places
from mmei_jax.encoders.stack import ComputeOptions
from mmei_jax.encoders.transformer import Dense, LayerNorm, gelu, with_axes
from mmei_jax.types import Dimension, InputError

SAMPLING_RATE = 16_000
WINDOW_SAMPLES = 400
HOP_SAMPLES = 160
FFT_SAMPLES = 512
# Power under which nothing is told apart from silence.
POWER_FLOOR = 1e-6


@dataclass(frozen=True)
class AudioCnnConfig:
    """Architecture of an Audio-CNN.

    Attributes:
        dim: features of a token.
        channels: channels after each convolution; each halves time and frequency.
        num_mels: bands of the spectrogram.
    """

    dim: int = 256
    channels: tuple[int, ...] = (32, 64, 128, 256)
    num_mels: int = 64

    def __post_init__(self) -> None:
        if not self.channels or min(self.dim, *self.channels, self.num_mels) < 1:
            raise InputError("dim, channels, num_mels of the Audio-CNN: expected at least 1 of each")

    @classmethod
    def read(cls, reader: ConfigReader) -> "AudioCnnConfig":
        """Reads the keys of a ``config.json`` of type ``audio_cnn``, which are the attributes' names.

        Raises:
            InputError: a value of the wrong kind.
        """
        return cls(
            dim=reader.get("dim", cls.dim),
            channels=reader.get_list("channels", cls.channels),
            num_mels=reader.get("num_mels", cls.num_mels),
        )

    @property
    def receptive_field(self) -> int:
        """Samples of one window of the spectrogram: the shortest audio that gives a token."""
        return WINDOW_SAMPLES

    def num_tokens(self, num_samples: Any) -> Any:
        """Tokens that so many samples give; whole numbers or arrays of them."""
        places = num_spectra(num_samples)
        for _ in self.channels:
            places = halved(places)
        return places

    def frame_times_seconds(self, num_tokens: Dimension) -> ArrayLike:
        """The middle of what each token hears, ``[num_tokens]`` float32 seconds."""
        # A window of three with one place of padding is centred on the first place that it keeps.
        step = HOP_SAMPLES * 2 ** len(self.channels)
        middles: ArrayLike = WINDOW_SAMPLES / 2.0 + step * places(num_tokens)
        return (middles / SAMPLING_RATE).astype(np.float32)


def num_spectra(num_samples: Any) -> Any:
    """Windows of the spectrogram that fit into so many samples."""
    windows = (num_samples - WINDOW_SAMPLES) // HOP_SAMPLES + 1
    return windows * (windows > 0)


def halved(places: Any) -> Any:
    """Places that a convolution of step 2 leaves."""
    return (places + 1) // 2


def mel_filters(num_mels: int) -> Float32[np.ndarray, "frequencies {num_mels}"]:
    """Triangles between points that are equally far apart on the mel scale (HTK's), from 0 to 8000 Hz; peaks are 1."""
    frequencies = np.linspace(0.0, SAMPLING_RATE / 2, FFT_SAMPLES // 2 + 1)
    mels = np.linspace(0.0, 2595.0 * np.log10(1.0 + SAMPLING_RATE / 2 / 700.0), num_mels + 2)
    corners = 700.0 * (10.0 ** (mels / 2595.0) - 1.0)
    rising = (frequencies[:, None] - corners[:-2]) / (corners[1:-1] - corners[:-2])
    falling = (corners[2:] - frequencies[:, None]) / (corners[2:] - corners[1:-1])
    return np.maximum(0.0, np.minimum(rising, falling)).astype(np.float32)


def log_mel(samples: Float[Array, "rows samples"], num_mels: int) -> Float[Array, "rows spectra mels"]:
    """Logarithm of the power in each mel band of Hann windows of 25 ms, every 10 ms, no padding at the ends.

    Args:
        samples: ``[rows, samples]`` float32 at 16 kHz, at least one window.
        num_mels: bands.

    Returns:
        Natural logarithms, of powers of at least :data:`POWER_FLOOR`.
    """
    starts = HOP_SAMPLES * places(num_spectra(samples.shape[1]))
    windows = samples[:, starts[:, None] + np.arange(WINDOW_SAMPLES)[None]]
    # The transform as one matrix product: a window of 400 samples, zeros up to 512.
    angles = 2.0 * np.pi * np.outer(np.arange(WINDOW_SAMPLES), np.arange(FFT_SAMPLES // 2 + 1)) / FFT_SAMPLES
    hann = 0.5 - 0.5 * np.cos(2.0 * np.pi * np.arange(WINDOW_SAMPLES) / WINDOW_SAMPLES)
    waves = np.concatenate([np.cos(angles), np.sin(angles)], axis=1) * hann[:, None]
    parts = jnp.matmul(windows, waves.astype(np.float32), precision=lax.Precision.HIGHEST)
    real, imaginary = jnp.split(parts, 2, axis=-1)
    power = jnp.matmul(real**2 + imaginary**2, mel_filters(num_mels), precision=lax.Precision.HIGHEST)
    return jnp.log(jnp.maximum(power, POWER_FLOOR))


class AudioCnn(nn.Module):
    """The encoder.

    Attributes:
        config: architecture.
        options: how it is computed; there are no layers to scan.
    """

    config: AudioCnnConfig = AudioCnnConfig()
    options: ComputeOptions = ComputeOptions()

    @nn.compact
    def __call__(
        self,
        samples: Float[ArrayLike, "rows samples"],
        num_samples: Int[ArrayLike, "rows"] | None = None,
        *,
        with_hidden_states: bool = False,
    ) -> EncoderOutputs:
        """Encodes waveforms of 16,000 samples per second.

        A row of fewer samples than one window of 25 ms, 0 included, has no tokens. Samples behind the last window that
        fits are not read. A valid sample that is NaN or infinite makes the tokens that hear it, and the mean of its
        row, NaN.

        Args:
            samples: ``[rows, samples]`` float32 in [-1, 1]; what stands behind the end may be anything.
            num_samples: ``[rows]`` int32, valid samples of each row, which come first; all where not given.
            with_hidden_states: whether the spectrogram and what leaves each convolution are returned too.

        Returns:
            ``pooled`` is the mean over a row's tokens.

        Raises:
            InputError: the rows are shorter than a window, or layers are to be scanned.
        """
        config, compute_dtype = self.config, self.options.compute_dtype
        samples = jnp.asarray(samples, jnp.float32)
        rows, width = samples.shape
        if width < WINDOW_SAMPLES:
            raise InputError(f"rows of {width} samples: one window takes at least {WINDOW_SAMPLES}")
        if self.options.scan_layers:
            raise InputError("scan_layers: the convolutions of an Audio-CNN differ and cannot be scanned")
        if self.options.remat != "none":
            raise InputError(
                f"remat = {self.options.remat!r}: an Audio-CNN has no layers to compute again; expected none"
            )
        lengths = jnp.full((rows,), width, jnp.int32) if num_samples is None else jnp.asarray(num_samples)
        samples = jnp.where(jnp.arange(width)[None] < lengths[:, None], samples, 0.0)

        x = log_mel(samples, config.num_mels)[..., None]
        places = num_spectra(lengths)
        stages = []
        for index, channels in enumerate(config.channels):
            x = _without_padding(x, places)
            stages.append(x.reshape(rows, x.shape[1], -1))
            window = ((1, 1), (1, 1))
            convolution = Convolution(
                channels, (3, 3), (2, 2), window, compute_dtype=compute_dtype, name=f"conv_{index}"
            )
            norm = LayerNorm(
                scale_init=with_axes(nn.initializers.ones, "channels"),
                bias_init=with_axes(nn.initializers.zeros, "channels"),
                name=f"norm_{index}",
            )
            x = gelu(norm(convolution(x)))
            places = halved(places)
        x = _without_padding(x, places).reshape(rows, x.shape[1], -1)
        projection = Dense(config.dim, ("channels", "embed"), compute_dtype=compute_dtype, name="projection")
        is_valid = jnp.arange(x.shape[1])[None] < places[:, None]
        states = jnp.where(is_valid[..., None], LayerNorm(name="last_norm")(projection(x)), 0.0)
        return EncoderOutputs(
            last_hidden_state=states,
            is_valid=is_valid,
            pooled=mean_of_tokens(states, is_valid.astype(jnp.int32)),
            hidden_states=(*stages, x) if with_hidden_states else None,
            frame_times_seconds=jnp.asarray(config.frame_times_seconds(x.shape[1])),
        )


def _without_padding(
    x: Float[Array, "rows places bands channels"], lengths: Int[Array, "rows"]
) -> Float[Array, "rows places bands channels"]:
    """Zeros behind the end of each row."""
    return jnp.where((jnp.arange(x.shape[1])[None] < lengths[:, None])[..., None, None], x, 0.0)
