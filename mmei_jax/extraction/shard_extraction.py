"""What every runner of an extraction does with a unit of work: encoded clips become a shard that is there for good.

:mod:`mmei_jax.extraction.extract` gives units to processes, :mod:`mmei_jax.extraction.extract_beam` to Beam's workers;
both write the same bytes.
"""

import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from mmei_jax.extraction.clips import Clip
from mmei_jax.extraction.decoding import DecodeSettings
from mmei_jax.extraction.encoding import ClipEncoder, EncodedClip, EncodedShard
from mmei_jax.extraction.extraction_config import ExtractionConfig
from mmei_jax.extraction.raw_media import RawClips
from mmei_jax.extraction.shard_units import ExtractionFolder, Quarantined, Unit
from mmei_jax.extraction.slate_files import Recommendations
from mmei_jax.records import DatasetSpec, LabelSpec, ModalitySpec, Record
from mmei_jax.types import InputError

Depth = Literal["features", "raw"]
# Whose versions change bytes.
_PACKAGES = ("av", "jax", "jaxlib", "numpy", "pillow", "soundfile", "soxr", "tokenizers")


@dataclass(frozen=True)
class Extraction:
    """An extraction as a whole: all that a worker has to know besides its clips.

    Attributes:
        config: what is extracted, and how.
        clips_sha256: of all clips (:func:`mmei_jax.extraction.clip_lists.fingerprint`).
        output: folder of the data set; one of the same extraction is gone on with.
        labels: what the clips' labels are, by name.
        base: folder that the clips' paths are relative to.
        depth: "features", or "raw": what the encoders would be given (:mod:`mmei_jax.extraction.raw_media`).
        root: folder that no path may lead out of, symbolic links followed; None: no limit.
        num_workers: threads that decode; None: one worker per processor.
        max_bad_fraction: most clips that may be quarantined, as a share of all, in [0, 1].
        recommendations: what the clips' slates are about; None where they have none.
    """

    config: ExtractionConfig
    clips_sha256: str
    output: Path
    labels: dict[str, LabelSpec]
    base: Path
    depth: Depth
    root: Path | None
    num_workers: int | None
    max_bad_fraction: float
    recommendations: Recommendations | None = None

    def __post_init__(self) -> None:
        """Refuses what no run could keep to."""
        if not 0.0 <= self.max_bad_fraction <= 1.0:
            raise InputError(f"max_bad_fraction = {self.max_bad_fraction}: expected a share in [0, 1]")
        if self.num_workers is not None and self.num_workers < 1:
            raise InputError(f"workers = {self.num_workers}: expected at least 1")


class ShardExtractor:
    """The loaded encoders of an extraction, and the folder that it writes.

    Attributes:
        encoder: of clips.
        folder: of the data set.
        spec: what its records carry.
        settings: what of clips is decoded.
    """

    def __init__(self, extraction: Extraction) -> None:
        """Loads the encoders, and begins or goes on with the folder.

        Raises:
            InputError: a checkpoint or the folder cannot be used.
        """
        config = extraction.config
        is_encoded = extraction.depth == "features"
        self.encoder: ClipEncoder | RawClips = ClipEncoder(config) if is_encoded else RawClips(config)
        self._recommendations = extraction.recommendations
        self._max_bad_fraction = extraction.max_bad_fraction
        self.spec = make_spec(config, self.encoder, extraction.labels, extraction.recommendations)
        self.settings = make_settings(config, self.encoder, extraction.base, extraction.root)
        # Everything that the result depends on but the media themselves.
        identity = {
            "config": config.to_json(),
            "clips_sha256": extraction.clips_sha256,
            "spec": self.spec.to_json(),
            "num_devices": self.encoder.num_devices,
            "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        }
        if extraction.recommendations is not None:
            identity["catalogue_sha256"] = extraction.recommendations.sha256()
        self.folder = ExtractionFolder(extraction.output, identity)

    def complete(self, units: Sequence[Unit]) -> dict[str, Any] | None:
        """Turns the folder into a data set, see :meth:`ExtractionFolder.complete`.

        Args:
            units: all of the extraction.
        """
        catalogue = None if self._recommendations is None else self._recommendations.catalogue
        return self.folder.complete(units, self.spec, self._max_bad_fraction, catalogue)

    def write(self, unit: Unit, shard: EncodedShard) -> str:
        """Fetches a unit's features and writes them; gives a line on what came of it."""
        features = {name: collect() for name, collect in shard.collect.items()}
        kept = [index for index, clip in enumerate(shard.clips) if clip.failure is None]
        quarantined = [
            Quarantined.of(unit.clips[index], clip.failure)
            for index, clip in enumerate(shard.clips)
            if clip.failure is not None
        ]
        records = [
            make_record(unit.clips[index], shard.clips[index], {name: own.get(index) for name, own in features.items()})
            for index in kept
        ]
        missing = [shard.clips[index].frames_without_face or () for index in kept]
        counts = {
            **{f"{name}_absent": sum(index not in own for index in kept) for name, own in features.items()},
            "frames_without_face": sum(map(len, missing)),
            "texts_cut": sum(shard.clips[index].is_text_cut for index in kept),
        }
        if self._recommendations is not None:
            counts["clips_without_slate"] = sum(unit.clips[index].slate is None for index in kept)
        self.folder.write(unit, self.spec, records, quarantined, counts)
        return f"{unit.name}: {len(kept)} clips, {len(quarantined)} quarantined"


def make_spec(
    config: ExtractionConfig,
    encoder: ClipEncoder | RawClips,
    labels: dict[str, LabelSpec],
    recommendations: Recommendations | None = None,
) -> DatasetSpec:
    """What the records of an extraction carry."""
    extras = {"path": "string", "text": "string"}
    if "vision" in config.modalities and config.vision.faces != "none":
        extras["frames_without_face"] = "string"
    return DatasetSpec(
        name=config.name,
        description=f"Extracted from clips by mmei_jax: {', '.join(config.modalities)}.",
        source=config.source,
        licence=config.licence,
        modalities={
            name: ModalitySpec(own.dim, cast(Any, own.dtype), own.producer, own.token_shape)
            for name, own in encoder.encoders.items()
        },
        labels=labels,
        has_slates=recommendations is not None,
        has_relevant_items=recommendations is not None and recommendations.has_relevant_items,
        extras=extras,
    )


def make_settings(
    config: ExtractionConfig, encoder: ClipEncoder | RawClips, base: Path, root: Path | None
) -> DecodeSettings:
    """What workers decode."""
    return DecodeSettings(
        base=base,
        root=root,
        optional=config.optional,
        max_clip_seconds=config.max_clip_seconds,
        vision=encoder.vision_settings,
        audio=encoder.audio_settings,
        has_text=encoder.has_text,
    )


def make_record(clip: Clip, encoded: EncodedClip, features: dict[str, np.ndarray | None]) -> Record:
    """The record of a clip.

    Args:
        clip: what the list says.
        encoded: what became of it.
        features: per modality ``[tokens, dim]``; None where the clip lacks it.
    """
    extras: dict[str, int | float | str | None] = {"path": clip.path, "text": clip.text}
    if encoded.frames_without_face is not None:
        extras["frames_without_face"] = " ".join(map(str, encoded.frames_without_face))
    return Record(
        id=clip.id,
        user_id=clip.speaker,
        dialogue_id=clip.dialogue,
        turn=clip.turn,
        features=features,
        labels=clip.labels,
        slate=clip.slate,
        relevant_items=clip.relevant_items,
        extras=extras,
    )
