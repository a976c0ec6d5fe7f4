"""MELD as clips: official, episode-disjoint or speaker-disjoint splits, with or without media and context."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np

from mmei_jax.extraction.clip_builder import BuilderOption, ClipBuilder
from mmei_jax.extraction.clips import Clip
from mmei_jax.extraction.published_facts import FILE_NAME, read_published
from mmei_jax.extraction.splitting import split_like
from mmei_jax.extraction.utterance_lists import MELD_SPLITS, label_clips, read_meld

# Of the disjoint splits; the card gives the sizes that come of it.
_SEED = 0


class Meld(ClipBuilder):
    """MELD's utterances; published.json has the label order, the card everything else."""

    OPTIONS: ClassVar = {
        "folder": BuilderOption("folder with train_sent_emo.csv, dev_sent_emo.csv and test_sent_emo.csv"),
        "clips_folder": BuilderOption("folder laid out as MELD.Raw (train_splits, ...); empty: text alone", ""),
        "splits": BuilderOption(
            "official, or all of an episode's or of a speaker's utterances in one split",
            "official",
            ("official", "episode", "speaker"),
        ),
    }
    labels = read_published(Path(__file__).with_name(FILE_NAME)).labels

    @classmethod
    def list_files(cls, options: Mapping[str, str]) -> list[Path]:
        """The three CSVs."""
        return [Path(options["folder"]) / file_name for _, file_name, _ in MELD_SPLITS]

    @classmethod
    def read_clips(cls, options: Mapping[str, str]) -> Iterable[Clip]:
        """All utterances, bad clips among them, in the order of the files; see :class:`ClipBuilder`."""
        clips_folder = options["clips_folder"]
        utterances = read_meld(Path(options["folder"]), Path(clips_folder) if clips_folder else None)
        clips = label_clips(utterances, cls.labels)
        if options["splits"] == "official":
            return clips
        groups = [item.episode if options["splits"] == "episode" else item.clip.speaker for item in utterances]
        splits = split_like(np.array(groups), np.array([clip.split for clip in clips]), _SEED)
        return [replace(clip, split=str(split)) for clip, split in zip(clips, splits, strict=True)]

    @classmethod
    def read_episodes(cls, options: Mapping[str, str]) -> Mapping[str, str]:
        """Season and episode."""
        utterances = read_meld(Path(options["folder"]))
        return {item.clip.id: item.episode for item in utterances if item.episode is not None}
