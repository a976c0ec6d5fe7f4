"""AIGC-INT-Sim at raw depth as clips: **simulated** faces, voices and words, from the list that the renderer writes."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import ClassVar

from mmei_jax.extraction.clip_builder import BuilderOption, ClipBuilder
from mmei_jax.extraction.clips import Clip
from mmei_jax.extraction.utterance_lists import label_clips, read_clip_list
from mmei_jax.records import LabelSpec
from mmei_jax.simulation.aigc_int import EMOTIONS, INTENTS


class AigcInt(ClipBuilder):
    """Rendered records; the label order is the simulator's, the card has everything else."""

    OPTIONS: ClassVar = {"list": BuilderOption("clips.csv of python -m mmei_jax.simulation.render")}
    labels: ClassVar = {"emotion": LabelSpec("categorical", EMOTIONS), "intent": LabelSpec("categorical", INTENTS)}

    @classmethod
    def list_files(cls, options: Mapping[str, str]) -> list[Path]:
        """The list."""
        return [Path(options["list"])]

    @classmethod
    def read_clips(cls, options: Mapping[str, str]) -> Iterable[Clip]:
        """All clips in the order of the list, their paths with its folder; see :class:`ClipBuilder`."""
        return label_clips(read_clip_list(Path(options["list"])), cls.labels)
