"""What is extracted from clips, and how: the configuration of ``python -m mmei_jax.extraction.extract``.

``configs/extraction.py`` holds the default of every key and explains it; this file holds types, choices and checks.
"""

import dataclasses
import math
import typing
from dataclasses import dataclass
from typing import Any, Literal

from mmei_jax.config_values import build, require
from mmei_jax.extraction.faces import Method
from mmei_jax.record_schema import LabelSpec
from mmei_jax.types import MODALITIES


@dataclass(frozen=True)
class VisionExtraction:
    """Which frames are taken, what of them, and how they are encoded."""

    checkpoint: str
    token: Literal["first", "mean_of_patches", "pooled"]
    frames_per_second: float
    max_frames: int
    faces: Method
    face_margin: float
    frames_per_batch: int


@dataclass(frozen=True)
class AudioExtraction:
    """How sound is encoded."""

    checkpoint: str
    layers: Literal["last", "sum_of_last_four"]
    frames_per_token: int
    bucket_seconds: tuple[float, ...]
    seconds_per_batch: float


@dataclass(frozen=True)
class TextExtraction:
    """How words are tokenised and encoded."""

    checkpoint: str
    max_tokens: int
    stored: Literal["all", "after_context"]
    tokens_per_row: int
    rows_per_batch: int


@dataclass(frozen=True)
class ExtractionConfig:
    """Everything that features depend on, besides the clips themselves."""

    name: str
    source: str
    licence: str
    modalities: tuple[str, ...]
    optional: tuple[str, ...]
    labels: tuple[tuple[str, str, tuple[str, ...]], ...]
    vision: VisionExtraction
    audio: AudioExtraction
    text: TextExtraction
    max_clip_seconds: float
    records_per_shard: int
    dtype: Literal["float16", "float32"]
    compute_dtype: Literal["float32", "bfloat16"]

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready nested dict from which :func:`parse` makes an equal configuration."""
        return dataclasses.asdict(self)

    @property
    def label_specs(self) -> dict[str, LabelSpec]:
        """The labels as data sets have them."""
        return {name: LabelSpec(typing.cast(Any, kind), class_names) for name, kind, class_names in self.labels}


def parse(values: dict[str, Any]) -> ExtractionConfig:
    """Turns a ConfigDict's ``to_dict()``, or what ``to_json`` gave, into a checked configuration.

    Raises:
        InputError: a key is unknown or missing, a value has the wrong type or is not accepted; names the key.
    """
    config = typing.cast(ExtractionConfig, build(ExtractionConfig, values, "config"))
    modalities = f"some of {', '.join(MODALITIES)}, each once"
    for key in ("modalities", "optional"):
        given = getattr(config, key)
        require(set(given) <= set(MODALITIES) and len(set(given)) == len(given), key, given, modalities)
    require(bool(config.modalities), "modalities", config.modalities, modalities)
    for key in ("name", "source", "licence"):
        require(bool(getattr(config, key)), key, getattr(config, key), "some text: data sets say where they come from")
    require(bool(config.label_specs) == bool(config.labels), "labels", config.labels, "each label once")
    for modality in config.modalities:
        group = getattr(config, modality)
        require(bool(group.checkpoint), f"{modality}.checkpoint", "", "folder of a converted checkpoint")
    _check_positive(config)
    vision, audio, text = config.vision, config.audio, config.text
    require(vision.face_margin >= 0, "vision.face_margin", vision.face_margin, "at least 0")
    widths = audio.bucket_seconds
    is_rising = bool(widths) and widths[0] > 0 and list(widths) == sorted(set(widths))
    require(is_rising, "audio.bucket_seconds", widths, "rising numbers of seconds")
    longest = f"at least max_clip_seconds ({config.max_clip_seconds:g}) at the end"
    require(widths[-1] >= config.max_clip_seconds, "audio.bucket_seconds", widths, longest)
    accepted = f"at least audio.bucket_seconds[-1] ({widths[-1]:g})"
    require(audio.seconds_per_batch >= widths[-1], "audio.seconds_per_batch", audio.seconds_per_batch, accepted)
    accepted = f"at most text.tokens_per_row ({text.tokens_per_row})"
    require(2 < text.max_tokens <= text.tokens_per_row, "text.max_tokens", text.max_tokens, accepted)
    return config


def _check_positive(config: ExtractionConfig) -> None:
    keys = {
        "": ("max_clip_seconds", "records_per_shard"),
        "vision": ("frames_per_second", "max_frames", "frames_per_batch"),
        "audio": ("frames_per_token", "seconds_per_batch"),
        "text": ("tokens_per_row", "rows_per_batch"),
    }
    for group, names in keys.items():
        values = getattr(config, group) if group else config
        for name in names:
            value = getattr(values, name)
            is_positive = value > 0 and math.isfinite(value)
            require(is_positive, f"{group}.{name}" if group else name, value, "a positive number")
