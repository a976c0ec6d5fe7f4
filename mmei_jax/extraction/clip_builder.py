"""What every TFDS builder of clips derives from: how a clip is stored, and the options that all of them have."""

import dataclasses
import math
import re
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from mmei_jax.extraction.clips import Clip
from mmei_jax.extraction.conversation_context import ContextOptions, add_context
from mmei_jax.fingerprints import canonical_json
from mmei_jax.records import LabelSpec
from mmei_jax.types import InputError

_SPLIT_NAME = re.compile(r"[A-Za-z_]\w*")
# Fields of a clip that are strings; which of them there are is known to Clip alone.
_STRINGS = (str, str | None)
_TEXTS = tuple(spec.name for spec in dataclasses.fields(Clip) if spec.type in _STRINGS and spec.name != "split")
# TFDS stores floats in 32 bits, which is too coarse for times: they are stored as text.
_TIMES = ("start_seconds", "end_seconds")
# How what a clip lacks is stored; of a text, "".
_NO_TURN = -1
_NO_CLASS = -1


@dataclass(frozen=True)
class BuilderOption:
    """One option of a builder, a string.

    Attributes:
        description: what it does, for messages.
        default: None if it must be given.
        choices: what is accepted; () for anything.
    """

    description: str
    default: str | None = None
    choices: tuple[str, ...] = ()


CONTEXT_OPTIONS: Mapping[str, BuilderOption] = {
    "context_turns": BuilderOption("previous turns of the dialogue that precede a text", "0"),
    "context_separator": BuilderOption("between them and the text, such as [SEP] for BERT", "</s></s>"),
}


@dataclasses.dataclass(eq=False, kw_only=True)
class ClipConfig(tfds.core.BuilderConfig):
    """TFDS configuration of a builder: its options, complete."""

    options: dict[str, str] = dataclasses.field(default_factory=dict)


class ClipBuilder(tfds.core.GeneratorBasedBuilder):
    """Builds a data set of clips; derived classes say which options and labels there are, and read the clips.

    Attributes:
        OPTIONS: by name.
        labels: by name, in label order.
    """

    VERSION = tfds.core.Version("1.0.0")
    OPTIONS: ClassVar[Mapping[str, BuilderOption]] = {}
    labels: ClassVar[Mapping[str, LabelSpec]] = {}

    @classmethod
    @abstractmethod
    def list_files(cls, options: Mapping[str, str]) -> list[Path]:
        """The lists that are read, media aside; they need not exist."""

    @classmethod
    @abstractmethod
    def read_clips(cls, options: Mapping[str, str]) -> Iterable[Clip]:
        """All clips, always in the same order; InputError where the lists are wrong."""

    @classmethod
    def read_episodes(cls, options: Mapping[str, str]) -> Mapping[str, str]:
        """By clip id, the episode, video or whatever else clips share that a split should not divide; {} for none."""
        return {}

    def _info(self) -> tfds.core.DatasetInfo:
        features: dict[str, Any] = {name: tfds.features.Text() for name in (*_TEXTS, *_TIMES, "optional", "episode")}
        features["turn"] = np.int32
        features["labels"] = {name: _label_feature(spec) for name, spec in self.labels.items()}
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"Clips of {self.name}, options {canonical_json(self.builder_config.options)}",
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        clips: dict[str, list[Clip]] = {}
        for clip in _with_context(self.read_clips(self.builder_config.options), self.builder_config.options):
            clips.setdefault(clip.split, []).append(clip)
        for split, found in clips.items():
            if not _SPLIT_NAME.fullmatch(split):
                raise InputError(f"split {split!r}: expected letters, digits and '_', not beginning with a digit")
            ids = [clip.id for clip in found]
            if len(set(ids)) < len(ids):
                twice = next(name for position, name in enumerate(ids) if name in ids[:position])
                raise InputError(f"clip {twice!r}: occurs twice in split {split!r}; ids must be unique")
        episodes = self.read_episodes(self.builder_config.options)
        return {split: self._generate_examples(found, episodes) for split, found in clips.items()}

    def _generate_examples(
        self, clips: list[Clip], episodes: Mapping[str, str]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for key, clip in enumerate(clips):
            yield key, {**_to_example(clip, self.labels), "episode": episodes.get(clip.id, "")}


def _with_context(clips: Iterable[Clip], options: Mapping[str, str]) -> list[Clip]:
    return add_context(list(clips), ContextOptions(int(options["context_turns"]), options["context_separator"]))


def _label_feature(spec: LabelSpec) -> Any:
    if spec.kind == "categorical":
        return tfds.features.ClassLabel(names=spec.class_names)
    shape = () if spec.kind == "real" else (len(spec.class_names),)
    return tfds.features.Tensor(shape=shape, dtype=np.float32)


def _to_example(clip: Clip, labels: Mapping[str, LabelSpec]) -> dict[str, Any]:
    missing: dict[str, Any] = {name: math.nan for name, spec in labels.items() if spec.kind == "real"}
    missing |= {name: _NO_CLASS for name, spec in labels.items() if spec.kind == "categorical"}
    missing |= {
        name: np.full(len(spec.class_names), np.nan, np.float32)
        for name, spec in labels.items()
        if spec.kind == "multi_label"
    }
    return {
        **{name: getattr(clip, name) or "" for name in _TEXTS},
        "optional": "|".join(clip.optional),
        **{name: "" if getattr(clip, name) is None else repr(float(getattr(clip, name))) for name in _TIMES},
        "turn": _NO_TURN if clip.turn is None else clip.turn,
        "labels": {name: clip.labels.get(name, missing[name]) for name in labels},
    }


def to_clip(example: dict[str, Any], split: str, labels: Mapping[str, LabelSpec]) -> Clip:
    """The clip that an example of a built data set stores; a real label is rounded to float32, as in shards."""
    texts: dict[str, Any] = {name: example[name].decode() or None for name in _TEXTS}
    optional = example["optional"].decode()
    seconds: dict[str, Any] = {name: float(example[name]) if example[name] else None for name in _TIMES}
    values: dict[str, Any] = {}
    for name, spec in labels.items():
        value = example["labels"][name]
        if spec.kind == "categorical" and value != _NO_CLASS:
            values[name] = int(value)
        elif spec.kind != "categorical" and not np.isnan(value).any():
            values[name] = float(value) if spec.kind == "real" else np.asarray(value)
    return Clip(
        split=split,
        **texts,
        **seconds,
        turn=None if example["turn"] == _NO_TURN else int(example["turn"]),
        labels=values,
        optional=tuple(optional.split("|")) if optional else (),
    )
