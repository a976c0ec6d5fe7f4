"""Frames to one token each, in batches of one shape."""

from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from jaxtyping import Array, Float, UInt8

from mmei_jax.encoders import preprocessing
from mmei_jax.encoders.outputs import EncoderOutputs
from mmei_jax.encoders.pretrained_files import read_preprocessing
from mmei_jax.encoders.resnet import ResNetConfig
from mmei_jax.encoders.vit import VitConfig, mean_of_patches
from mmei_jax.extraction.decoding import Frames, VisionSettings
from mmei_jax.extraction.encoder_loading import (
    Collect,
    Devices,
    apply_encoder,
    encoder_fingerprint,
    encoder_name,
    load_encoder,
)
from mmei_jax.extraction.extraction_config import ExtractionConfig, VisionExtraction
from mmei_jax.records import Producer
from mmei_jax.types import InputError


class VisionEncoder:
    """Frames to one token each.

    Attributes:
        dim, dtype, token_shape: of a token, as data sets have it.
        settings: how workers take frames.
        producer: what data sets say about the features.
        preprocessing: of what the encoder takes.
        parameters: of the encoder, on every device.
        encode: from parameters and a batch to states; jitted.
    """

    def __init__(self, config: ExtractionConfig, device: Devices) -> None:
        """Loads the checkpoint.

        Raises:
            InputError: it is none, of another kind, has no such token, or its preprocessing is not implemented.
        """
        vision: VisionExtraction = config.vision
        encoder = load_encoder(vision.checkpoint, "vision", (VitConfig, ResNetConfig), config)
        self.preprocessing = preprocessing.ImagePreprocessing.read(read_preprocessing(Path(vision.checkpoint)))
        self.dim = _token_dim(encoder.config, vision.token)
        self.settings = VisionSettings(
            vision.frames_per_second, vision.max_frames, vision.faces, vision.face_margin, self.preprocessing
        )
        self.dtype = config.dtype
        self.token_shape: tuple[int, ...] = ()
        self.producer = Producer(
            encoder=encoder_name(encoder),
            revision=encoder_fingerprint(encoder),
            layer="last",
            pooling=vision.token,
            frames_per_second=vision.frames_per_second,
        )
        self._device = device
        self._frames_per_batch = device.rows(vision.frames_per_batch)
        self.parameters = device.copy(encoder.parameters)

        @jax.jit
        def encode(parameters: Any, pixels: UInt8[Array, "frames height width 3"]) -> Float[Array, "frames dim"]:
            outputs = apply_encoder(encoder, parameters, self.preprocessing.normalise(pixels))
            return _token(outputs, vision.token)

        self.encode = encode

    def start(self) -> "_VisionShard":
        """Begins a shard."""
        return _VisionShard(self)

    def dispatch(self, pixels: UInt8[np.ndarray, "frames height width 3"]) -> Float[Array, "batch dim"]:
        """Encodes a batch, filled up to its size."""
        filler = np.zeros((self._frames_per_batch - len(pixels), *pixels.shape[1:]), np.uint8)
        return self.encode(self.parameters, self._device.place(np.concatenate([pixels, filler])))

    @property
    def frames_per_batch(self) -> int:
        """Frames of every batch."""
        return self._frames_per_batch


def _token_dim(config: VitConfig | ResNetConfig, token: str) -> int:
    """Features of the state that stands for a frame, where the encoder has such a one."""
    if isinstance(config, ResNetConfig):
        if token != "pooled":
            raise InputError(f"config.vision.token = {token!r}: expected 'pooled' for a ResNet")
        return config.stage_dims[-1]
    if token != "pooled":
        return config.stack.dim
    if not config.has_pooler:
        raise InputError(
            "config.vision.token = 'pooled': expected 'first' or 'mean_of_patches' for a ViT without pooler"
        )
    return config.pooler_dim


def _token(outputs: EncoderOutputs, token: str) -> Array:
    """``[frames, dim]``."""
    if token == "pooled":
        # None is not met here: the encoder was asked for its pooler before.
        return cast(Array, outputs.pooled)
    return mean_of_patches(outputs) if token == "mean_of_patches" else outputs.last_hidden_state[:, 0]


class _VisionShard:
    """Frames of one shard's clips, batch by batch."""

    def __init__(self, encoder: VisionEncoder) -> None:
        self.encoder = encoder
        self._waiting: list[np.ndarray] = []
        self._owners: list[int] = []
        self._states: list[Array] = []

    def add(self, record: int, frames: Frames) -> None:
        """Takes the frames with a face; a full batch is sent off."""
        self._waiting.extend(frames.pixels[frames.has_face])
        self._owners.extend([record] * int(frames.has_face.sum()))
        size = self.encoder.frames_per_batch
        while len(self._waiting) >= size:
            self._states.append(self.encoder.dispatch(np.stack(self._waiting[:size])))
            self._waiting = self._waiting[size:]

    def finish(self) -> Collect:
        """Sends the rest off."""
        if self._waiting:
            self._states.append(self.encoder.dispatch(np.stack(self._waiting)))
            self._waiting = []
        owners, states = np.array(self._owners), self._states

        def collect() -> dict[int, np.ndarray]:
            if not states:
                return {}
            tokens = np.concatenate([np.asarray(state) for state in states])[: len(owners)]
            return {int(record): tokens[owners == record] for record in np.unique(owners)}

        return collect
