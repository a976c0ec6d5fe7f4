"""CMU-MOSEI as clips: raw segments, or whole videos, with MMSA's label.csv."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import ClassVar

from mmei_jax.extraction.clip_builder import BuilderOption, ClipBuilder
from mmei_jax.extraction.clips import Clip
from mmei_jax.extraction.published_facts import FILE_NAME, read_published
from mmei_jax.extraction.utterance_lists import Utterance, label_clips, read_mosei


class CmuMosei(ClipBuilder):
    """CMU-MOSEI's segments; published.json has the sizes of the folds, the card everything else."""

    OPTIONS: ClassVar = {
        "labels": BuilderOption("label.csv: video_id, clip_id, text, label, mode, and for whole videos start and end"),
        "media_folder": BuilderOption("folder of the media; empty: text alone", ""),
        "media": BuilderOption(
            "segments: <video_id>/<clip_id>.mp4; videos: <video_id>.mp4, cut by start and end",
            "segments",
            ("segments", "videos"),
        ),
    }
    labels = read_published(Path(__file__).with_name(FILE_NAME)).labels

    @classmethod
    def list_files(cls, options: Mapping[str, str]) -> list[Path]:
        """The CSV of labels."""
        return [Path(options["labels"])]

    @classmethod
    def read_clips(cls, options: Mapping[str, str]) -> Iterable[Clip]:
        """All segments in the order of the CSV; see :class:`ClipBuilder`."""
        return label_clips(_read(options), cls.labels)

    @classmethod
    def read_episodes(cls, options: Mapping[str, str]) -> Mapping[str, str]:
        """The video that a segment is part of."""
        return {item.clip.id: item.episode for item in _read(options) if item.episode is not None}


def _read(options: Mapping[str, str]) -> list[Utterance]:
    folder = Path(options["media_folder"]) if options["media_folder"] else None
    return read_mosei(Path(options["labels"]), folder, has_whole_videos=options["media"] == "videos")
