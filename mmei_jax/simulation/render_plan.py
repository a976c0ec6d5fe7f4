"""What is rendered of each record (*simulated*): latents, as drawn for ``features`` depth, and random numbers."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from mmei_jax.simulation.aigc_int import (
    CHUNK_RECORDS,
    DISPLAY_CLASS,
    INFORMATIVE_RATE,
    Latents,
    draw_latents,
    make_generator,
)
from mmei_jax.simulation.aigc_int_dataset import split_membership
from mmei_jax.simulation.render_constants import BASE_SECONDS, SECONDS_PER_AUDIO_TOKEN, SECONDS_PER_VISION_TOKEN
from mmei_jax.types import MODALITIES

# Purposes of random numbers; those of `features` depth have smaller numbers in the generators' key.
_PURPOSES = ("face", "background", "pixels", "voice", "breath", "text", "user")
_FIRST_PURPOSE = 64
_NUMBER_BITS = 48


# By parameter a value for each class id.
ValuesOfClasses = Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class RecordPlan:
    """One record to render.

    Attributes:
        seed: of the records.
        number: of the record within its seed, from 0.
        split: train, validation or test; by record, as at ``features`` depth.
        user: number of the user; face and voice belong to the user.
        emotion, intent, manner: class ids of the labels and of the manner.
        shown_class: by modality the class that it shows, also where it is absent.
        is_informative: by modality ``[tokens]`` bool: whether the token, here a part of the clip or a phrase, shows
            anything. No entry where the modality is absent.
    """

    seed: int
    number: int
    split: str
    user: int
    emotion: int
    intent: int
    manner: int
    shown_class: Mapping[str, int]
    is_informative: Mapping[str, Bool[np.ndarray, "tokens"]]

    @property
    def id(self) -> str:
        """The same as that of the record at ``features`` depth."""
        return f"aigc-int-sim-{self.seed}-{self.number:09d}"

    @property
    def speaker(self) -> str:
        """The same as the user's id at ``features`` depth."""
        return f"user-{self.user:08d}"

    def is_present(self, modality: str) -> bool:
        """Whether the record has this modality."""
        return modality in self.is_informative

    def num_frames(self, frames_per_second: int) -> int:
        """How many frames the clip has; its sound lasts exactly as long."""
        num_tokens = {name: len(self.is_informative.get(name, ())) for name in ("vision", "audio")}
        seconds = (
            BASE_SECONDS
            + SECONDS_PER_VISION_TOKEN * num_tokens["vision"]
            + SECONDS_PER_AUDIO_TOKEN * num_tokens["audio"]
        )
        return max(1, round(seconds * frames_per_second))

    def generator(self, purpose: str) -> np.random.Generator:
        """The record's random numbers for one purpose; a function of seed and number alone."""
        return _make_generator(self.seed, purpose, self.number)

    def user_generator(self) -> np.random.Generator:
        """The random numbers that make the user's face and voice: the same in every record of the user."""
        return _make_generator(self.seed, "user", self.user)


def _make_generator(seed: int, purpose: str, number: int) -> np.random.Generator:
    stream = _FIRST_PURPOSE + _PURPOSES.index(purpose)
    return np.random.Generator(np.random.Philox(key=np.array([seed, (stream << _NUMBER_BITS) | number], np.uint64)))


def informative_tokens(seed: int, chunk: int, latents: Latents, modality: str) -> Bool[np.ndarray, "total"]:
    """Which tokens of one modality are informative: the very ones of ``aigc_int.draw_tokens``.

    Args:
        seed: of the records.
        chunk: number of the chunk.
        latents: of all records of the chunk.
        modality: one of MODALITIES.

    Returns:
        The tokens of all records end to end.
    """
    lengths = np.maximum(latents.num_tokens[:, MODALITIES.index(modality)], 0)
    return make_generator(seed, modality, chunk).random(int(lengths.sum())) < INFORMATIVE_RATE


def plan_chunk(seed: int, chunk: int) -> list[RecordPlan]:
    """The :data:`CHUNK_RECORDS` records of one chunk.

    Raises:
        InputError: ``seed`` cannot be used.
    """
    latents = draw_latents(seed, chunk)
    splits = split_membership(latents, "record")
    flags: dict[str, list[np.ndarray]] = {}
    for column, name in enumerate(MODALITIES):
        ends = np.cumsum(np.maximum(latents.num_tokens[:, column], 0))
        flags[name] = np.split(informative_tokens(seed, chunk, latents, name), ends[:-1])
    shown = {
        name: DISPLAY_CLASS[name][latents.manner, latents.displayed_emotion[:, column]]
        for column, name in enumerate(MODALITIES)
    }
    is_present = latents.is_present()
    return [
        RecordPlan(
            seed=seed,
            number=chunk * CHUNK_RECORDS + row,
            split=next(name for name, is_member in splits.items() if is_member[row]),
            user=int(latents.user[row]),
            emotion=int(latents.emotion[row]),
            intent=int(latents.intent[row]),
            manner=int(latents.manner[row]),
            shown_class={name: int(shown[name][row]) for name in MODALITIES},
            is_informative={
                name: flags[name][row] for column, name in enumerate(MODALITIES) if is_present[row, column]
            },
        )
        for row in range(CHUNK_RECORDS)
    ]


def plan_records(seed: int, num_records: int) -> Iterator[list[RecordPlan]]:
    """Yields records ``0 .. num_records - 1``, a chunk at a time; a record does not depend on how many there are.

    Raises:
        InputError: ``seed`` cannot be used.
    """
    for chunk in range(-(-num_records // CHUNK_RECORDS)):
        yield plan_chunk(seed, chunk)[: num_records - chunk * CHUNK_RECORDS]


def vary_over_parts(
    tables: Mapping[str, ValuesOfClasses],
    classes: Mapping[str, int],
    is_informative: Bool[np.ndarray, "parts"],
    strength: float,
) -> Float[np.ndarray, "parts parameters"]:
    """What each part of a clip shows, without noise: full strength where informative, the neutral class elsewhere.

    Args:
        tables: ``class`` with a row of values (one for each class id) per parameter; further tables (manner, intent)
            may name some of the same parameters, and add to them.
        classes: by table the class id.
        is_informative: of each part.
        strength: how far parameters go from neutral to what the class shows.

    Returns:
        float64, in the order of the parameters of ``class``.
    """
    neutral = np.array([row[0] for row in tables["class"].values()])
    shown = np.array([row[classes["class"]] for row in tables["class"].values()])
    for name, table in tables.items():
        if name != "class":
            shown += [table[key][classes[name]] if key in table else 0.0 for key in tables["class"]]
    return neutral + np.where(is_informative[:, None], strength * (shown - neutral), 0.0)


def interpolate_parts(
    values: Float[np.ndarray, "parts parameters"], positions: Float[np.ndarray, "times"]
) -> Float[np.ndarray, "times parameters"]:
    """Values at ``positions`` in [0, 1] of the clip: linear between the middles of its equal parts.

    >>> interpolate_parts(np.array([[0.0], [1.0]]), np.array([0.0, 0.5, 1.0])).tolist()
    [[0.0], [0.5], [1.0]]
    """
    middles = (np.arange(len(values)) + 0.5) / len(values)
    return np.stack([np.interp(positions, middles, column) for column in values.T], axis=1)
