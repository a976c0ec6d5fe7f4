"""The device's part of extraction: decoded clips to token states, in batches of few shapes.

Batches are made of the clips of one shard alone, in the list's order, so that a shard is the same whether or not the
run was interrupted; a clip's features do not depend on its batch (docs/encoders.md). Programs run asynchronously: what
a shard's batches give is fetched only when the next shard's are under way.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np

from mmei_jax.extraction.audio_encoding import AudioEncoder
from mmei_jax.extraction.decoding import DecodedClip
from mmei_jax.extraction.encoder_loading import Collect, Devices
from mmei_jax.extraction.extraction_config import ExtractionConfig, parse
from mmei_jax.extraction.media import MediaError
from mmei_jax.extraction.text_encoding import TextEncoder
from mmei_jax.extraction.vision_encoding import VisionEncoder
from mmei_jax.records import DatasetSpec
from mmei_jax.types import InputError


@runtime_checkable
class HasEncoders(Protocol):
    """What turns clips into tokens."""

    @property
    def encoders(self) -> Mapping[str, Any]:
        """By modality, what has a ``producer``."""


Encoders = TypeVar("Encoders", bound=HasEncoders)


@dataclass(frozen=True)
class EncodedClip:
    """What is known of a clip when it has been sent to the devices.

    Attributes:
        failure: why it is not used; None if it is.
        frames_without_face: which of its sampled frames; None where faces are not sought, or without frames.
        is_text_cut: whether words were cut off.
    """

    failure: MediaError | None
    frames_without_face: tuple[int, ...] | None
    is_text_cut: bool


@dataclass(frozen=True)
class EncodedShard:
    """A shard's clips, and per modality what fetches the states from the devices, by the clip's index."""

    clips: list[EncodedClip]
    collect: dict[str, Collect]


def frames_without_face(clip: DecodedClip, marks_faces: bool) -> tuple[int, ...] | None:
    """Which of a clip's sampled frames show no face; None where faces are not sought, or without frames."""
    if clip.frames is None or not marks_faces:
        return None
    return tuple(np.flatnonzero(~clip.frames.has_face).tolist())


class ClipEncoder:
    """The encoders of all modalities of a configuration.

    Attributes:
        vision, audio, text: of each modality; None where it is not wanted.
        vision_settings, audio_settings: what workers decode for them.
        has_text: whether words are wanted.
        num_devices: over which batches are split.
    """

    def __init__(self, config: ExtractionConfig) -> None:
        """Loads the checkpoints; raises InputError as :class:`VisionEncoder`."""
        device = Devices()
        self._marks_faces = config.vision.faces != "none"
        self.num_devices = device.num_devices
        self.vision = VisionEncoder(config, device) if "vision" in config.modalities else None
        self.audio = AudioEncoder(config, device) if "audio" in config.modalities else None
        self.text = TextEncoder(config, device) if "text" in config.modalities else None

        self.vision_settings = self.vision.settings if self.vision else None
        self.audio_settings = self.audio.settings if self.audio else None
        self.has_text = self.text is not None

    @property
    def encoders(self) -> dict[str, VisionEncoder | AudioEncoder | TextEncoder]:
        """Those that there are, by modality."""
        named = (("vision", self.vision), ("audio", self.audio), ("text", self.text))
        return {name: encoder for name, encoder in named if encoder is not None}

    def dispatch(self, clips: Iterable[DecodedClip]) -> EncodedShard:
        """Sends a shard's clips to the devices as they are decoded."""
        vision = self.vision.start() if self.vision else None
        audio = self.audio.start() if self.audio else None
        text = self.text.start() if self.text else None
        encoded = []
        for index, clip in enumerate(clips):
            is_cut = False
            if vision is not None and clip.frames is not None:
                vision.add(index, clip.frames)
            if audio is not None and clip.samples is not None:
                audio.add(index, clip.samples)
            if text is not None and self.text is not None and clip.text is not None:
                words = self.text.tokenizer.encode(clip.text)
                text.add(index, words.token_ids)
                is_cut = words.is_cut
            encoded.append(EncodedClip(clip.failure, frames_without_face(clip, self._marks_faces), is_cut))
        shards = (("vision", vision), ("audio", audio), ("text", text))
        return EncodedShard(encoded, {name: shard.finish() for name, shard in shards if shard is not None})


def open_encoders(
    path: Path, modalities: Sequence[str], spec: DatasetSpec, make: Callable[[ExtractionConfig], Encoders]
) -> tuple[Encoders, ExtractionConfig]:
    """What made a data set's features or raw media, and the configuration of its extraction, for some modalities.

    Args:
        path: the ``extraction.json`` that :mod:`mmei_jax.extraction.extract` left.
        modalities: which of them.
        spec: of the data set.
        make: :class:`ClipEncoder` for features, :class:`mmei_jax.extraction.raw_media.RawClips` for raw media.

    Raises:
        InputError: the file is missing or no such configuration, or its checkpoints are not those of the features.
    """
    if not path.is_file():
        raise InputError(
            f"{path}: missing: how this run's features were made is not known, and no clip can be read as they were; "
            "expected a run on features that mmei_jax.extraction.extract made of clips (simulated and imported "
            "features have no encoders), or --extraction, the file that it left beside them"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))["config"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a configuration of an extraction: {error!r}") from error
    config = dataclasses.replace(parse(values), modalities=tuple(modalities))
    encoder = make(config)
    for name, own in encoder.encoders.items():
        expected = spec.modalities[name].producer.revision
        if own.producer.revision != expected:
            raise InputError(
                f"config.{name}.checkpoint of {path}: its weights are {own.producer.revision}, "
                f"the run's features were made by {expected}"
            )
    return encoder, config
