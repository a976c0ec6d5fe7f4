"""Samples to tokens, in batches of few lengths."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from mmei_jax.encoders import preprocessing
from mmei_jax.encoders.audio_cnn import SAMPLING_RATE, AudioCnnConfig
from mmei_jax.encoders.outputs import NUM_LAYERS_SUMMED, mean_of_frames, sum_of_last_layers
from mmei_jax.encoders.pretrained_files import read_preprocessing
from mmei_jax.encoders.wav2vec2 import Wav2Vec2Config
from mmei_jax.extraction.decoding import AudioSettings
from mmei_jax.extraction.encoder_loading import (
    Collect,
    Devices,
    apply_encoder,
    encoder_fingerprint,
    encoder_name,
    load_encoder,
)
from mmei_jax.extraction.extraction_config import AudioExtraction, ExtractionConfig
from mmei_jax.records import Producer
from mmei_jax.types import InputError

# Rounding to samples may make a clip of the longest allowed duration that much longer.
_ROUNDING_SAMPLES = 16
# What is left of a bucket at a shard's end goes in batches of this part of the rows.
_PART_OF_ROWS = 4


class AudioEncoder:
    """Samples to tokens; attributes as those of :class:`VisionEncoder`."""

    def __init__(self, config: ExtractionConfig, device: Devices) -> None:
        """Loads the checkpoint; raises as :class:`VisionEncoder`."""
        audio: AudioExtraction = config.audio
        encoder = load_encoder(audio.checkpoint, "audio", (Wav2Vec2Config, AudioCnnConfig), config)
        self.preprocessing = preprocessing.AudioPreprocessing.read(read_preprocessing(Path(audio.checkpoint)))
        rate = self.preprocessing.sample_rate_hz
        self.settings = AudioSettings(rate, encoder.config.receptive_field)
        self.dim = _token_dim(encoder.config, audio.layers, rate)
        self.dtype = config.dtype
        self.token_shape: tuple[int, ...] = ()
        self.producer = Producer(
            encoder=encoder_name(encoder),
            revision=encoder_fingerprint(encoder),
            layer=audio.layers,
            pooling=None if audio.frames_per_token == 1 else f"mean of {audio.frames_per_token} frames",
            sample_rate_hz=rate,
            # An Audio-CNN knows one way alone: windows read zeros behind the end.
            padding_policy=getattr(encoder.module, "padding", "exact"),
        )
        self._device = device
        self.widths = tuple(round(seconds * rate) + _ROUNDING_SAMPLES for seconds in audio.bucket_seconds)
        most_samples = round(audio.seconds_per_batch * rate) + _ROUNDING_SAMPLES
        self.rows = {width: device.rows(most_samples // width) for width in self.widths}
        # Not one: such a program may take XLA minutes to compile.
        self.rows_at_end = {
            width: min(rows, device.rows(max(rows // _PART_OF_ROWS, 2))) for width, rows in self.rows.items()
        }
        self.parameters = device.copy(encoder.parameters)

        @jax.jit
        def encode(
            parameters: Any, samples: Float[Array, "rows samples"], num_samples: Int[Array, "rows"]
        ) -> tuple[Array, Array]:
            sums = audio.layers == "sum_of_last_four"
            outputs = apply_encoder(encoder, parameters, samples, num_samples, with_hidden_states=sums)
            states = sum_of_last_layers(outputs) if sums else outputs.last_hidden_state
            return mean_of_frames(states, outputs.is_valid, audio.frames_per_token)

        self.encode = encode

    def start(self) -> "_AudioShard":
        """Begins a shard."""
        return _AudioShard(self)

    def dispatch(self, width: int, waveforms: Sequence[np.ndarray], num_rows: int) -> tuple[Array, Array]:
        """Encodes a batch of a bucket, filled up to so many rows."""
        samples = np.zeros((num_rows, width), np.float32)
        for row, waveform in enumerate(waveforms):
            samples[row, : len(waveform)] = waveform
        lengths = np.zeros(num_rows, np.int32)
        lengths[: len(waveforms)] = [len(waveform) for waveform in waveforms]
        return self.encode(self.parameters, self._device.place(samples), self._device.place(lengths))


def _token_dim(config: Wav2Vec2Config | AudioCnnConfig, layers: str, sample_rate_hz: int) -> int:
    """Features of a token, where the encoder has such layers and hears samples of that rate."""
    if isinstance(config, AudioCnnConfig):
        if layers != "last":
            raise InputError(f"config.audio.layers = {layers!r}: expected 'last' for an Audio-CNN")
        if sample_rate_hz != SAMPLING_RATE:
            wanted = f"expected {SAMPLING_RATE} for an Audio-CNN"
            raise InputError(f"{preprocessing.FILE_NAME}: sampling_rate = {sample_rate_hz}: {wanted}")
        return config.dim
    has_adapter = config.num_adapter_layers > 0
    if layers != "last" and (has_adapter or config.stack.num_layers < NUM_LAYERS_SUMMED):
        wanted = "'last' for an encoder with an adapter, or with fewer than 4 layers"
        raise InputError(f"config.audio.layers = {layers!r}: expected {wanted}")
    return config.adapter_dim if has_adapter else config.stack.dim


class _AudioShard:
    """Sound of one shard's clips, bucket by bucket."""

    def __init__(self, encoder: AudioEncoder) -> None:
        self.encoder = encoder
        self._waiting: dict[int, list[tuple[int, np.ndarray]]] = {width: [] for width in encoder.widths}
        self._sent: list[tuple[list[int], Array, Array]] = []

    def add(self, record: int, samples: Float32[np.ndarray, "samples"]) -> None:
        """Puts a clip into the narrowest bucket that holds it; a full batch is sent off."""
        width = next(width for width in self.encoder.widths if len(samples) <= width)
        self._waiting[width].append((record, self.encoder.preprocessing.normalise(samples)))
        if len(self._waiting[width]) == self.encoder.rows[width]:
            self._send(width, self.encoder.rows[width])

    def finish(self) -> Collect:
        """Sends the rest off."""
        waiting = self._waiting
        for width in reversed(self.encoder.widths):
            num_rows = self.encoder.rows_at_end[width]
            while waiting[width]:
                if len(waiting[width]) < num_rows:
                    self._fill(width, num_rows)
                self._send(width, num_rows)
        sent = self._sent

        def collect() -> dict[int, np.ndarray]:
            found: dict[int, np.ndarray] = {}
            for records, *outputs in sent:
                states, is_valid = (np.asarray(output) for output in outputs)
                found.update({record: states[row, is_valid[row]] for row, record in enumerate(records)})
            return found

        return collect

    def _fill(self, width: int, num_rows: int) -> None:
        """Puts what waits for narrower batches into rows that would be empty, the longest first."""
        narrower = [
            (len(own[1]), name, own) for name, all_own in self._waiting.items() if name < width for own in all_own
        ]
        narrower.sort(key=lambda each: -each[0])
        for _, name, own in narrower[: num_rows - len(self._waiting[width])]:
            self._waiting[width].append(own)
            self._waiting[name] = [other for other in self._waiting[name] if other is not own]

    def _send(self, width: int, num_rows: int) -> None:
        """Sends the first ``num_rows`` that wait for batches of ``width`` samples, or all if they are fewer."""
        records, waveforms = zip(*self._waiting[width][:num_rows], strict=True)
        self._waiting[width] = self._waiting[width][num_rows:]
        self._sent.append((list(records), *self.encoder.dispatch(width, waveforms, num_rows)))
