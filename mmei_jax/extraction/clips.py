"""One clip of a list: where its media are, what was said, by whom, and how it is labelled."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Int32

from mmei_jax.records import Slate
from mmei_jax.types import MODALITIES, InputError


@dataclass(frozen=True)
class Clip:
    """What a list or a dataset builder says of one record, before anything is read.

    Attributes:
        id: unique within its split.
        split: such as train.
        path: media file: video with or without sound, or sound alone; None for text alone.
        audio_path: sound in a file of its own, taken instead of ``path``'s; None otherwise.
        start_seconds, end_seconds: the part of the media that is the clip; None: from the start, to the end.
        boxes_path: CSV of face boxes (:class:`mmei_jax.extraction.faces.GivenBoxes`); None where there is none.
        text: transcript; None where there is none.
        speaker: speaker or user; None where unknown.
        dialogue, turn: conversation and position in it, from 0; None where unknown.
        labels: per label's name a class id (categorical), ``[classes]`` floats (multi_label) or number (real); no entry
            where not labelled.
        optional: modalities that may be missing without the clip being bad.
        slate: what the clip's user was shown, and how it was received; None where unknown.
        relevant_items: ``[relevant]`` int32 catalogue rows of what is relevant to the user; None where unknown.
    """

    id: str
    split: str
    path: str | None = None
    audio_path: str | None = None
    boxes_path: str | None = None
    start_seconds: float | None = None
    end_seconds: float | None = None
    text: str | None = None
    speaker: str | None = None
    dialogue: str | None = None
    turn: int | None = None
    labels: dict[str, Any] = field(default_factory=dict)
    optional: tuple[str, ...] = ()
    slate: Slate | None = None
    relevant_items: Int32[np.ndarray, "relevant"] | None = None

    def __post_init__(self) -> None:
        """Refuses what no file could fulfil."""
        unknown = sorted(set(self.optional) - set(MODALITIES))
        if unknown:
            raise InputError(f"clip {self.id!r}: optional {unknown[0]!r}: expected some of {', '.join(MODALITIES)}")
