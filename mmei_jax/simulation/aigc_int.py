"""AIGC-INT-Sim at ``features`` depth: simulated users whose emotion and intent are shown in video, voice and words.

Every latent that touches the evidence is discrete, and given the latents all tokens are independent, so the posterior
of (emotion, intent) is a closed form (``aigc_int_posterior.py``): what a model can reach at best is known exactly. This
file is the causal model and its constants; ``data/aigc_int/README.md`` says the same in words and tables.

One record, in order:

1. A user (user type, taste), a content kind, an emotion e, and an intent i from P(i | e, kind, user type).
2. The shown emotion s: e, but with :data:`MISLABEL_RATE` another one, in all modalities alike.
3. With :data:`CONFLICT_RATE` one random modality displays another emotion than s; the others display s.
4. A manner k, shared by all modalities: modality m displays emotion z as class ``DISPLAY_CLASS[m][k, z]``.
5. Every modality is absent at its own rate, independent of everything; else its number of tokens is drawn.
6. A token is informative with :data:`INFORMATIVE_RATE`; then it is
   N(amplitude * (E[class] + :data:`MANNER_SCALE` * M[k] + :data:`INTENT_SCALE` * I[i]), 1), else N(0, 1) in every
   dimension, where the rows of E, M and I are orthonormal.

Records are drawn in chunks of :data:`CHUNK_RECORDS` from counter-based generators keyed by (seed, stream, chunk). So a
record depends on the seed and its own number alone, not on how many records are made, and memory does not grow.
The same NumPy gives the same bytes for the same seed.

Commands (``--help`` explains each)::

    python -m mmei_jax.simulation.aigc_int generate --output=runs/data/aigc_int_quickstart --num_records=20000 --dim=32
    python -m mmei_jax.simulation.aigc_int calibrate
    python -m mmei_jax.simulation.aigc_int report
"""

import functools
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields

import numpy as np
from jaxtyping import Bool, Float, Int

from mmei_jax.types import MODALITIES, InputError

EMOTIONS = ("neutral", "joy", "surprise", "anger", "sadness", "fear", "disgust")
INTENTS = ("relax", "learn", "create", "be_entertained")
KINDS = ("music", "video", "image", "text")
USER_TYPES = ("unwinder", "learner", "maker", "fan")
NUM_MANNERS = 3

EMOTION_PRIOR = np.array([0.24, 0.18, 0.16, 0.14, 0.11, 0.09, 0.08])
KIND_PRIOR = np.array([0.35, 0.35, 0.15, 0.15])
USER_TYPE_PRIOR = np.array([0.30, 0.25, 0.20, 0.25])
# The intent that each emotion favours, in the order of EMOTIONS.
FAVOURITE_INTENT = np.array([1, 3, 2, 0, 0, 1, 3])
FAVOURITE_PROBABILITY = 0.7
# Kind and user type each pull towards one intent: P(i | e, kind, type) = P(i | e) + tilt[kind, i] + tilt[type, i],
# where tilt[x, i] = strength * ([i is x's intent] - P(a random x has intent i)). The mean tilt is zero, so P(i | e),
# all that the tokens can know of it, is exactly 0.7 for the favourite and 0.1 for the others.
KIND_INTENT = np.array([0, 3, 2, 1])
USER_TYPE_INTENT = np.array([0, 1, 2, 3])
KIND_TILT = 0.08
USER_TYPE_TILT = 0.20

MISLABEL_RATE = 0.05
CONFLICT_RATE = 0.2
MANNER_PRIOR = np.array([0.5, 0.3, 0.2])
ABSENCE_RATE = {"vision": 0.08, "audio": 0.05, "text": 0.02}
# Class as which emotion z is displayed: row k = 0 is the identity, rows 1 and 2 are derangements, no two of which (of
# any modality) send an emotion to the same class.
DISPLAY_CLASS = {
    "vision": np.array([[0, 1, 2, 3, 4, 5, 6], [1, 3, 0, 6, 2, 4, 5], [2, 6, 4, 1, 5, 3, 0]]),
    "audio": np.array([[0, 1, 2, 3, 4, 5, 6], [3, 4, 5, 2, 6, 0, 1], [6, 5, 1, 0, 3, 2, 4]]),
    "text": np.array([[0, 1, 2, 3, 4, 5, 6], [4, 0, 3, 5, 1, 6, 2], [5, 2, 6, 4, 0, 1, 3]]),
}
# Tokens per record: Poisson, clipped to [1, maximum].
MEAN_TOKENS = {"vision": 8, "audio": 12, "text": 8}
MAX_TOKENS = {"vision": 16, "audio": 50, "text": 32}

INFORMATIVE_RATE = 0.8
MANNER_SCALE = 0.5
INTENT_SCALE = 0.3
# Set by `calibrate` on the unimodal accuracies that the paper's Table 1 reports, and frozen. They hold for any dim:
# the likelihoods depend on tokens through inner products with the orthonormal rows alone.
AMPLITUDE = {"vision": 1.8, "audio": 1.297, "text": 2.036}

NUM_TASTES = 4
CHUNK_RECORDS = 1000
CHUNK_USERS = 100
# E, M and I have 7 + 3 + 4 orthonormal rows.
MIN_DIM = len(EMOTIONS) + NUM_MANNERS + len(INTENTS)
# The world (bases, catalogue) is the same for every seed of the records.
_WORLD_SEED = 251210963
_STREAMS = ("users", "latents", "vision", "audio", "text", "slates", "basis", "catalogue", "tastes", "record_splits")
_CHUNK_BITS = 48


def make_generator(seed: int, stream: str, chunk: int) -> np.random.Generator:
    """The generator of one purpose (``stream``, one of a fixed list) in one chunk; independent of all others.

    Raises:
        InputError: ``seed`` is not in [0, 2**63).
    """
    if not 0 <= seed < 2**63:
        raise InputError(f"seed = {seed}: expected an integer in [0, 2**63)")
    key = np.array([seed, (_STREAMS.index(stream) << _CHUNK_BITS) | chunk], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


def make_world_generator(stream: str, index: int = 0) -> np.random.Generator:
    """The generator of a constant of the simulated world: the same whatever the seed of the records."""
    return make_generator(_WORLD_SEED, stream, index)


def choose(
    generator: np.random.Generator, probabilities: Float[np.ndarray, "*rows classes"], num: int
) -> Int[np.ndarray, "num"]:
    """Draws ``num`` class ids, from one distribution or from one per draw; int64."""
    cumulative = np.cumsum(probabilities, axis=-1)
    drawn = (generator.random(num)[:, None] >= cumulative).sum(axis=-1)
    # Rounding may leave the last sum a hair below 1.
    return np.minimum(drawn, probabilities.shape[-1] - 1)


def _tilt(strength: float, favoured: Int[np.ndarray, "groups"], prior: Float[np.ndarray, "groups"]) -> np.ndarray:
    one_hot = np.eye(len(INTENTS))[favoured]
    return strength * (one_hot - prior @ one_hot)


def intent_given_emotion() -> Float[np.ndarray, "emotions intents"]:
    """P(i | e): the mean of :func:`intent_table` over kinds and user types."""
    table = np.full((len(EMOTIONS), len(INTENTS)), (1.0 - FAVOURITE_PROBABILITY) / (len(INTENTS) - 1))
    table[np.arange(len(EMOTIONS)), FAVOURITE_INTENT] = FAVOURITE_PROBABILITY
    return table


def intent_given_kind() -> Float[np.ndarray, "kinds emotions intents"]:
    """P(i | e, c): the mean of :func:`intent_table` over user types."""
    return intent_given_emotion() + _tilt(KIND_TILT, KIND_INTENT, KIND_PRIOR)[:, None, :]


def intent_table() -> Float[np.ndarray, "types kinds emotions intents"]:
    """P(i | e, c, user type), float64; positive, sums to 1 over the last axis."""
    return intent_given_kind() + _tilt(USER_TYPE_TILT, USER_TYPE_INTENT, USER_TYPE_PRIOR)[:, None, None, :]


@functools.lru_cache(maxsize=16)
def basis(modality: str, dim: int) -> Float[np.ndarray, "directions dim"]:
    """Orthonormal rows E (7 classes), M (3 manners), I (4 intents) of one modality; float64, the same for every seed.

    Raises:
        InputError: ``dim`` is smaller than :data:`MIN_DIM`.
    """
    if dim < MIN_DIM:
        raise InputError(f"dim = {dim}: expected at least {MIN_DIM}, one per class, manner and intent")
    generator = make_world_generator("basis", MODALITIES.index(modality))
    return np.ascontiguousarray(np.linalg.qr(generator.standard_normal((dim, MIN_DIM)))[0].T)


def token_means(modality: str, dim: int, amplitude: float) -> Float[np.ndarray, "manners classes intents dim"]:
    """Mean of an informative token by manner, displayed class and intent; float64."""
    rows = basis(modality, dim)
    num_classes = len(EMOTIONS)
    classes, manners, intents = np.split(rows, [num_classes, num_classes + NUM_MANNERS])
    return amplitude * (
        classes[None, :, None] + MANNER_SCALE * manners[:, None, None] + INTENT_SCALE * intents[None, None, :]
    )


@functools.cache
def length_probabilities(modality: str) -> Float[np.ndarray, "lengths"]:
    """P(number of tokens = 1, 2, ... MAX_TOKENS) of a present modality: a Poisson count clipped to that range."""
    mean, longest = MEAN_TOKENS[modality], MAX_TOKENS[modality]
    poisson = np.array([math.exp(n * math.log(mean) - mean - math.lgamma(n + 1)) for n in range(longest)])
    clipped = np.append(poisson[1:], 1.0 - poisson.sum())
    clipped[0] += poisson[0]
    return clipped


@dataclass(frozen=True)
class Latents:
    """What is true of the records of one chunk. Every array has one entry per record.

    Attributes:
        user: int64, unique over all chunks.
        user_type, kind, emotion, intent, shown_emotion, manner: int64 class ids.
        taste: ``[batch, tastes]`` float64, of the record's user; standard normal over users.
        conflict_modality: int64 position in MODALITIES of the one that displays another emotion; -1 for none. It may be
            absent.
        displayed_emotion: ``[batch, modalities]`` int64.
        num_tokens: ``[batch, modalities]`` int64; -1 where the modality is absent.
        split_draw: ``[batch]`` int64 in [0, 20): evenly spread over every twenty consecutive records.
        user_split_draw: ``[batch]`` int64 in [0, 20), of the record's user: evenly spread over twenty users.
    """

    user: Int[np.ndarray, "batch"]
    user_type: Int[np.ndarray, "batch"]
    taste: Float[np.ndarray, "batch tastes"]
    kind: Int[np.ndarray, "batch"]
    emotion: Int[np.ndarray, "batch"]
    intent: Int[np.ndarray, "batch"]
    shown_emotion: Int[np.ndarray, "batch"]
    conflict_modality: Int[np.ndarray, "batch"]
    displayed_emotion: Int[np.ndarray, "batch modalities"]
    manner: Int[np.ndarray, "batch"]
    num_tokens: Int[np.ndarray, "batch modalities"]
    split_draw: Int[np.ndarray, "batch"]
    user_split_draw: Int[np.ndarray, "batch"]

    def is_present(self) -> Bool[np.ndarray, "batch modalities"]:
        """Whether each modality is there."""
        return self.num_tokens > 0

    def take(self, num_records: int) -> "Latents":
        """The first ``num_records`` of them."""
        return Latents(**{field.name: getattr(self, field.name)[:num_records] for field in fields(self)})


@dataclass(frozen=True)
class Tokens:
    """One modality of the records of one chunk.

    Attributes:
        values: ``[total, dim]`` float32, the tokens of all records end to end.
        lengths: ``[batch]`` int64 tokens per record, -1 where the modality is absent.
    """

    values: Float[np.ndarray, "total dim"]
    lengths: Int[np.ndarray, "batch"]

    def take(self, num_records: int) -> "Tokens":
        """Those of the first ``num_records`` records."""
        lengths = self.lengths[:num_records]
        return Tokens(self.values[: np.maximum(lengths, 0).sum()], lengths)


@dataclass(frozen=True)
class Chunk:
    """Consecutive records: ``first_record`` is the number of the first, ``index`` the chunk's own."""

    index: int
    first_record: int
    latents: Latents
    tokens: Mapping[str, Tokens]


def _another(generator: np.random.Generator, emotion: np.ndarray) -> np.ndarray:
    """For each entry an emotion that is not it, each of the six with equal chance."""
    num_emotions = len(EMOTIONS)
    return (emotion + 1 + generator.integers(0, num_emotions - 1, len(emotion))) % num_emotions


def _spread(generator: np.random.Generator, num: int) -> np.ndarray:
    """``num`` (a multiple of 20) integers in which every run of twenty is a permutation of 0..19."""
    return generator.permuted(np.tile(np.arange(20), (num // 20, 1)), axis=1).ravel()


def draw_latents(seed: int, chunk: int) -> Latents:
    """Everything but the tokens of the :data:`CHUNK_RECORDS` records of one chunk."""
    num = CHUNK_RECORDS
    users = make_generator(seed, "users", chunk)
    type_of_user = choose(users, USER_TYPE_PRIOR, CHUNK_USERS)
    taste_of_user = users.standard_normal((CHUNK_USERS, NUM_TASTES))
    split_of_user = _spread(users, CHUNK_USERS)
    user = users.integers(0, CHUNK_USERS, num)

    generator = make_generator(seed, "latents", chunk)
    kind = choose(generator, KIND_PRIOR, num)
    emotion = choose(generator, EMOTION_PRIOR, num)
    intent = choose(generator, intent_table()[type_of_user[user], kind, emotion], num)
    is_mislabelled = generator.random(num) < MISLABEL_RATE
    shown = np.where(is_mislabelled, _another(generator, emotion), emotion)
    has_conflict = generator.random(num) < CONFLICT_RATE
    conflict_modality = np.where(has_conflict, generator.integers(0, len(MODALITIES), num), -1)
    is_conflicting = conflict_modality[:, None] == np.arange(len(MODALITIES))
    displayed = np.where(is_conflicting, _another(generator, shown)[:, None], shown[:, None])
    manner = choose(generator, MANNER_PRIOR, num)
    num_tokens = np.stack([1 + choose(generator, length_probabilities(name), num) for name in MODALITIES], axis=1)
    is_absent = generator.random((num, len(MODALITIES))) < [ABSENCE_RATE[name] for name in MODALITIES]
    return Latents(
        user=chunk * CHUNK_USERS + user,
        user_type=type_of_user[user],
        taste=taste_of_user[user],
        kind=kind,
        emotion=emotion,
        intent=intent,
        shown_emotion=shown,
        conflict_modality=conflict_modality,
        displayed_emotion=displayed,
        manner=manner,
        num_tokens=np.where(is_absent, -1, num_tokens),
        split_draw=_spread(make_generator(seed, "record_splits", chunk), num),
        user_split_draw=split_of_user[user],
    )


def draw_tokens(
    seed: int, chunk: int, latents: Latents, modality: str, dim: int, amplitude: float | None = None
) -> Tokens:
    """The tokens of one modality, given the latents of all :data:`CHUNK_RECORDS` records of the chunk.

    The same seed and chunk give the same noise whatever the amplitude: that is what calibration compares.
    """
    amplitude = AMPLITUDE[modality] if amplitude is None else amplitude
    generator = make_generator(seed, modality, chunk)
    column = MODALITIES.index(modality)
    lengths = latents.num_tokens[:, column]
    record = np.repeat(np.arange(len(lengths)), np.maximum(lengths, 0))
    is_informative = generator.random(len(record)) < INFORMATIVE_RATE
    values = generator.standard_normal((len(record), dim), dtype=np.float32)
    shown_class = DISPLAY_CLASS[modality][latents.manner, latents.displayed_emotion[:, column]]
    means = token_means(modality, dim, amplitude).astype(np.float32)
    values[is_informative] += means[latents.manner, shown_class, latents.intent][record[is_informative]]
    return Tokens(values, lengths)


def stream(
    seed: int, num_records: int, dim: int, modalities: tuple[str, ...] = MODALITIES, first_chunk: int = 0
) -> Iterator[Chunk]:
    """Yields records ``0 .. num_records - 1`` of a seed in order, a chunk at a time.

    Args:
        seed: any integer in [0, 2**63).
        num_records: how many; any number, memory does not depend on it.
        dim: features per token.
        modalities: those whose tokens are drawn; the others' are left out and nothing else changes.
        first_chunk: chunk to begin at, for drawing parts of a large set apart; ``num_records`` counts from there.

    Raises:
        InputError: ``num_records``, ``dim`` or ``seed`` cannot be used.
    """
    if num_records < 1:
        raise InputError(f"num_records = {num_records}: expected at least 1")
    num_chunks = -(-num_records // CHUNK_RECORDS)
    for index in range(first_chunk, first_chunk + num_chunks):
        latents = draw_latents(seed, index)
        tokens = {name: draw_tokens(seed, index, latents, name, dim) for name in modalities}
        kept = min(CHUNK_RECORDS, num_records - (index - first_chunk) * CHUNK_RECORDS)
        yield Chunk(
            index, index * CHUNK_RECORDS, latents.take(kept), {name: tokens[name].take(kept) for name in modalities}
        )


def main() -> int:
    """Runs one of the commands ``generate``, ``calibrate`` and ``report``; returns the exit code."""
    from mmei_jax.simulation import aigc_int_calibration, aigc_int_dataset, aigc_int_report

    commands = {
        "generate": aigc_int_dataset.main,
        "calibrate": aigc_int_calibration.main,
        "report": aigc_int_report.main,
    }
    arguments = sys.argv[1:]
    if not arguments or arguments[0] not in commands:
        is_asked_for = arguments[:1] in (["--help"], ["-h"])
        usage = f"usage: python -m mmei_jax.simulation.aigc_int {{{','.join(commands)}}} [--help]"
        print(usage, file=sys.stdout if is_asked_for else sys.stderr)
        return 0 if is_asked_for else 2
    return commands[arguments[0]](arguments[1:])


if __name__ == "__main__":
    sys.exit(main())
