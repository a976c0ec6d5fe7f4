"""MIntRec as clips: text and one of 20 real intents."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import ClassVar

from mmei_jax.extraction.clip_builder import BuilderOption, ClipBuilder
from mmei_jax.extraction.clips import Clip
from mmei_jax.extraction.published_facts import FILE_NAME, read_published
from mmei_jax.extraction.utterance_lists import MINTREC_SPLITS, label_clips, read_mintrec


class Mintrec(ClipBuilder):
    """MIntRec's utterances; published.json has the label order, the card everything else."""

    OPTIONS: ClassVar = {"folder": BuilderOption("folder with train.tsv, dev.tsv and, where you have it, test.tsv")}
    labels = read_published(Path(__file__).with_name(FILE_NAME)).labels

    @classmethod
    def list_files(cls, options: Mapping[str, str]) -> list[Path]:
        """The TSVs."""
        return [Path(options["folder"]) / file_name for _, file_name in MINTREC_SPLITS]

    @classmethod
    def read_clips(cls, options: Mapping[str, str]) -> Iterable[Clip]:
        """All utterances in the order of the files; see :class:`ClipBuilder`."""
        return label_clips(read_mintrec(Path(options["folder"])), cls.labels)

    @classmethod
    def read_episodes(cls, options: Mapping[str, str]) -> Mapping[str, str]:
        """Season and episode."""
        utterances = read_mintrec(Path(options["folder"]))
        return {item.clip.id: item.episode for item in utterances if item.episode is not None}
