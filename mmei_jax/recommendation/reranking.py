"""Re-ranking of what a search found: how much affect weighs, diversity, and caps on exposure.

**Score.** A candidate c of a user u has an affective score S(u, c) (Eq. 7) and a score that knows nothing of affect
(its popularity, say, or its fit to the user's long-term profile). Both are standardised over the query's candidates and
mixed: ``relevance = w * affect + (1 - w) * affect_free``. The weight w is 1 minus the entropy of the calibrated
probabilities of (emotion, intent), as a share of the largest entropy that they could have, and never below
``least_affect_weight``: the less the model knows how a user feels, the less it acts on it.

**Diversity.** Maximal marginal relevance (Carbonell and Goldstein, SIGIR 1998): places are filled one after the other,
each with the candidate of the largest ``m * relevance - (1 - m) * (largest cosine with what is placed)``, where m is
``relevance_weight``; nothing is subtracted at the first place. Among equals the first of the search comes first.

**Caps.** Of the answered items at most ``most_per_creator`` are one creator's, and at most a share is AI-generated, or
human. They hold for what is *answered*: where candidates are too few or too alike, fewer items are answered, and never
fewer than the caps allow. To that end a place is not given to an item after which the later places could not be filled:
which can be told in advance, from the counts by creator and origin (the largest flow from creators to two origins).
"""

import dataclasses
import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from mmei_jax.reports.calibration import best_temperature
from mmei_jax.types import InputError

# Why a candidate with a better score did not get a place: the cap that ruled it out.
CAPS = ("none", "creator", "ai_generated", "human", "later_places")


@dataclass(frozen=True)
class RerankConfig:
    """How candidates are ranked again.

    Attributes:
        relevance_weight: in [0, 1], m above; 1 asks for no diversity.
        least_affect_weight: in [0, 1], the smallest w above; 1 never reads the affect-free scores.
        most_per_creator: items of one creator; None: any number.
        most_ai_generated_share: in [0, 1], of the answered items.
        most_human_share: in [0, 1]; the two shares leave room for all items, so they sum to 1 at least.
        emotion_temperature, intent_temperature: that divide the logits; see :meth:`calibrated`.
    """

    relevance_weight: float = 0.7
    least_affect_weight: float = 0.2
    most_per_creator: int | None = None
    most_ai_generated_share: float = 1.0
    most_human_share: float = 1.0
    emotion_temperature: float = 1.0
    intent_temperature: float = 1.0

    def __post_init__(self) -> None:
        for name in ("relevance_weight", "least_affect_weight", "most_ai_generated_share", "most_human_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise InputError(f"rerank.{name} = {getattr(self, name)}: expected from 0 to 1")
        for name in ("emotion_temperature", "intent_temperature"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise InputError(f"rerank.{name} = {getattr(self, name)}: expected a positive number")
        most = self.most_per_creator
        if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 1):
            raise InputError(f"rerank.most_per_creator = {most}: expected a whole number of at least 1, or None")
        total = self.most_ai_generated_share + self.most_human_share
        if total < 1.0:
            raise InputError(
                f"rerank.most_ai_generated_share + rerank.most_human_share = {total:g}: expected at least 1, "
                "because every item is one or the other"
            )

    def calibrated(
        self,
        emotion: tuple[Float[np.ndarray, "records emotions"], Shaped[np.ndarray, "records ..."]] | None,
        intent: tuple[Float[np.ndarray, "others intents"], Int[np.ndarray, "others"]] | None,
        *,
        emotion_kind: str = "softmax",
    ) -> "RerankConfig":
        """With the temperatures that minimise the cross-entropy of labelled validation records.

        The pair's probability is the product of the two heads', so that its cross-entropy is least where both are.

        Logarithms of probabilities are logits too: they differ by a constant of each record, which changes nothing.

        Args:
            emotion: ``[records, emotions]`` logits, and ``[records]`` class ids or, for sigmoid, ``[records,
                emotions]`` targets, of which those above 0.5 are there; None leaves the temperature as it is.
            intent: ``[others, intents]`` logits and ``[others]`` class ids; None leaves the temperature as it is.
            emotion_kind: "softmax", or "sigmoid" where several emotions are possible at once.
        """
        if emotion is not None and emotion_kind == "sigmoid":
            # Each class is a choice of two.
            logits, label = emotion[0].reshape(-1), (emotion[1] > 0.5).reshape(-1).astype(np.int32)
            emotion = np.stack([np.zeros_like(logits), logits], axis=1), label
        return replace(
            self,
            emotion_temperature=self.emotion_temperature if emotion is None else best_temperature(*emotion),
            intent_temperature=self.intent_temperature if intent is None else best_temperature(*intent),
        )

    def limits(self, k: int) -> "Limits":
        """The same as arrays: programs are compiled for shapes, not for values.

        Args:
            k: places.
        """
        # So many of n places; rounding of the product must not take one away.
        most_ai, most_human = (
            np.floor(share * np.arange(k + 1) + 1e-9).astype(np.int32)
            for share in (self.most_ai_generated_share, self.most_human_share)
        )
        return Limits(
            relevance_weight=np.float32(self.relevance_weight),
            least_affect_weight=np.float32(self.least_affect_weight),
            most_per_creator=np.int32(k if self.most_per_creator is None else self.most_per_creator),
            most_of_origin=np.stack([most_human, most_ai]),
            emotion_temperature=np.float32(self.emotion_temperature),
            intent_temperature=np.float32(self.intent_temperature),
        )


@struct.dataclass
class Limits:
    """Values of a :class:`RerankConfig`.

    Attributes:
        relevance_weight, least_affect_weight, emotion_temperature, intent_temperature: float32 scalars.
        most_per_creator: int32 scalar.
        most_of_origin: ``[2, k + 1]`` int32: human and AI-generated items among n answered ones, for every n.
    """

    relevance_weight: Any
    least_affect_weight: Any
    most_per_creator: Any
    most_of_origin: Any
    emotion_temperature: Any
    intent_temperature: Any


@struct.dataclass
class Candidates:
    """What a search found for each query.

    Attributes:
        item: ``[queries, candidates]`` int32 rows of the catalogue, -1 for filler; what filler holds is arbitrary.
        affect: ``[queries, candidates]`` float32, S(u, c) of Eq. 7.
        affect_free: ``[queries, candidates]`` float32 on any scale. Where all of a query's are equal (a user of whom
            nothing is known but the moment, say) there is nothing to mix: its affect weighs 1.
        embedding: ``[queries, candidates, dim]`` float32, E_c.
        creator: ``[queries, candidates]`` int32, -1 for an unknown one, who has one item only.
        is_ai_generated: ``[queries, candidates]`` bool.
    """

    item: Any
    affect: Any
    affect_free: Any
    embedding: Any
    creator: Any
    is_ai_generated: Any


@struct.dataclass
class AffectState:
    """What the model read of each query's user.

    Attributes:
        emotion: ``[queries, emotions]`` float32 logits; None where the model has no such probabilities (a regression).
        intent: ``[queries, intents]`` float32 logits; None where the model has no such task.
        modality_weights: ``[queries, modalities]`` float32, alpha of Eq. 3.
    """

    emotion: Any
    intent: Any
    modality_weights: Any


@struct.dataclass
class Reranked:
    """The answers, best first.

    Attributes:
        place: ``[queries, k]`` int32 place among the candidates; -1 beyond the answered items, where the rest is 0.
        score: ``[queries, k]`` float32, the sum of the three parts.
        affect, affect_free, diversity: ``[queries, k]`` float32, the parts; the last one is at most 1 - m.
        cap: ``[queries, k]`` int32 index into :data:`CAPS`: what ruled out the candidate with the best score.
        in_place_of: ``[queries, k]`` int32 place of that candidate; -1 where it got the place itself.
        num_answered: ``[queries]`` int32.
        num_candidates: ``[queries]`` int32, filler left out.
        affect_weight: ``[queries]`` float32, w above.
        emotion, intent: ``[queries, classes]`` float32 calibrated probabilities, or None.
    """

    place: Any
    score: Any
    affect: Any
    affect_free: Any
    diversity: Any
    cap: Any
    in_place_of: Any
    num_answered: Any
    num_candidates: Any
    affect_weight: Any
    emotion: Any
    intent: Any


def affect_certainty(
    emotion: Float[Array, "queries emotions"] | None,
    intent: Float[Array, "queries intents"] | None,
    *,
    emotion_kind: str = "softmax",
) -> Float[Array, "queries"]:
    """1 minus the entropy of (emotion, intent) as a share of the largest possible: 1 is sure, 0 knows nothing.

    The pair's probability is the product of the two, so that its entropy is the sum of theirs.

    Args:
        emotion: ``[queries, emotions]`` probabilities of one class of several (softmax) or of each class (sigmoid).
        intent: ``[queries, intents]`` probabilities of one class of several.
        emotion_kind: "softmax" or "sigmoid".

    Raises:
        InputError: neither is given.
    """
    entropy, most = [], 0.0
    if emotion is not None:
        terms = jax.scipy.special.entr(emotion)
        if emotion_kind == "sigmoid":
            terms += jax.scipy.special.entr(1.0 - emotion)
        entropy.append(terms.sum(axis=-1))
        classes = emotion.shape[-1]
        most += classes * math.log(2.0) if emotion_kind == "sigmoid" else math.log(classes)
    if intent is not None:
        entropy.append(jax.scipy.special.entr(intent).sum(axis=-1))
        most += math.log(intent.shape[-1])
    if not entropy:
        raise InputError("re-ranking without probabilities of emotions or intents: expected at least one of the two")
    # A single class is always sure.
    return jnp.clip(1.0 - sum(entropy[1:], entropy[0]) / (most or 1.0), 0.0, 1.0)


@partial(jax.jit, static_argnames=("k", "emotion_kind"))
def rerank(
    candidates: Candidates, state: AffectState, limits: Limits, *, k: int, emotion_kind: str = "softmax"
) -> Reranked:
    """Ranks the candidates of each query again; see the module. One program for all values of the configuration.

    Args:
        candidates: in the order of the search.
        state: of the queries' users.
        limits: ``config.limits(k)``.
        k: places; more than there are candidates leaves the last ones empty.
        emotion_kind: "softmax", or "sigmoid" where several emotions are possible at once.

    Raises:
        InputError: there are neither emotions nor intents.
    """
    emotion, intent = state.emotion, state.intent
    if emotion is not None:
        squash = jax.nn.sigmoid if emotion_kind == "sigmoid" else jax.nn.softmax
        emotion = squash(emotion.astype(jnp.float32) / limits.emotion_temperature)
    if intent is not None:
        intent = jax.nn.softmax(intent.astype(jnp.float32) / limits.intent_temperature)
    certainty = affect_certainty(emotion, intent, emotion_kind=emotion_kind)
    weight = jnp.maximum(certainty, limits.least_affect_weight)
    found: Reranked = jax.vmap(partial(_rerank_query, limits=limits, k=k))(candidates, weight)
    return dataclasses.replace(found, emotion=emotion, intent=intent)


@struct.dataclass
class _Room:
    """What the caps leave: by owner ``room`` for items and items ``left`` of each origin; ``quota`` of each origin."""

    room: Any
    left: Any
    quota: Any

    def most(self, item_owner: Array, item_origin: Array) -> Array:
        """How many places could be filled after each item: the smallest cut between owners and origins."""
        room, left = self.room[item_owner], self.left[:, item_owner]
        is_own = jnp.arange(2)[:, None] == item_origin[None]
        # One item less for its owner, of its origin.
        change = jnp.minimum(room[None] - 1, left - is_own) - jnp.minimum(room[None], left)
        of_origin = jnp.minimum(self.room[None], self.left).sum(axis=1)[:, None] + change
        of_all = jnp.minimum(self.room, self.left.sum(axis=0)).sum() - 1
        quota = self.quota[:, None] - is_own
        crossed = jnp.minimum(quota[0] + of_origin[1], quota[1] + of_origin[0])
        return jnp.minimum(jnp.minimum(quota.sum(axis=0), of_all), crossed)

    def most_answered(self, most_of_origin: Array) -> Array:
        """The largest number of items whose shares leave room for as many."""
        human, ai = jnp.minimum(self.room[None], self.left).sum(axis=1)
        of_all = jnp.minimum(self.room, self.left.sum(axis=0)).sum()
        quota = most_of_origin
        crossed = jnp.minimum(quota[0] + ai, quota[1] + human)
        fits = jnp.minimum(jnp.minimum(quota.sum(axis=0), of_all), crossed)
        number = jnp.arange(quota.shape[1])
        return jnp.max(jnp.where(fits >= number, number, 0))


def _rerank_query(candidates: Candidates, weight: Array, *, limits: Limits, k: int) -> Reranked:
    """One query; every array without its leading axis."""
    item, origin = candidates.item, candidates.is_ai_generated.astype(jnp.int32)
    num_candidates = len(item)
    is_candidate = (item >= 0) & jnp.isfinite(candidates.affect)
    affect, _ = _standardised(candidates.affect, is_candidate)
    affect_free, is_informed = _standardised(candidates.affect_free, is_candidate)
    weight = jnp.where(is_informed, weight, 1.0)
    relevance_weight = limits.relevance_weight
    affect, affect_free = relevance_weight * weight * affect, relevance_weight * (1.0 - weight) * affect_free
    length = jnp.linalg.norm(candidates.embedding, axis=-1, keepdims=True)
    direction = jnp.where(is_candidate[:, None], candidates.embedding / jnp.maximum(length, 1e-30), 0.0)
    owner = _owners(candidates.creator)
    left = jnp.zeros((2, num_candidates), jnp.int32).at[origin, owner].add(is_candidate.astype(jnp.int32))
    most_each = jnp.full(num_candidates, limits.most_per_creator, jnp.int32)
    at_first = _Room(room=most_each, left=left, quota=jnp.zeros(2, jnp.int32))
    num_answered = at_first.most_answered(limits.most_of_origin)
    at_first = dataclasses.replace(at_first, quota=limits.most_of_origin[:, num_answered])

    def fill(carry: tuple[Array, Array, _Room], position: Array) -> tuple[Any, Any]:
        is_left, nearest, caps = carry
        diversity = jnp.where(position == 0, 0.0, (relevance_weight - 1.0) * nearest)
        score = jnp.where(is_left, affect + affect_free + diversity, -jnp.inf)
        has_room, has_quota = caps.room[owner] > 0, caps.quota[origin] > 0
        leaves_rest = caps.most(owner, origin) >= num_answered - position - 1
        place = jnp.argmax(jnp.where(has_room & has_quota & leaves_rest, score, -jnp.inf))
        best = jnp.argmax(score)
        # Indices of CAPS, the first that holds.
        cap = jnp.where(~has_room[best], 1, jnp.where(~has_quota[best], 3 - origin[best], 4))
        is_answered, is_moved = position < num_answered, best != place
        parts = {"affect": affect, "affect_free": affect_free, "diversity": diversity, "score": score}
        found = {name: jnp.where(is_answered, values[place], 0.0) for name, values in parts.items()}
        found |= {
            "place": jnp.where(is_answered, place, -1).astype(jnp.int32),
            "cap": jnp.where(is_answered & is_moved, cap, 0).astype(jnp.int32),
            "in_place_of": jnp.where(is_answered & is_moved, best, -1).astype(jnp.int32),
        }
        cosine = jnp.matmul(direction, direction[place], precision=lax.Precision.HIGHEST)
        caps = _Room(
            room=caps.room.at[owner[place]].add(-1),
            left=caps.left.at[origin[place], owner[place]].add(-1),
            quota=caps.quota.at[origin[place]].add(-1),
        )
        return (is_left.at[place].set(False), jnp.maximum(nearest, cosine), caps), found

    # Cosines are at least -1.
    nothing_near = jnp.full(num_candidates, -1.0, jnp.float32)
    _, found = lax.scan(fill, (is_candidate, nothing_near, at_first), jnp.arange(k))
    return Reranked(
        **found,
        num_answered=num_answered.astype(jnp.int32),
        num_candidates=is_candidate.sum(dtype=jnp.int32),
        affect_weight=weight,
        emotion=None,
        intent=None,
    )


def _standardised(scores: Array, is_candidate: Array) -> tuple[Array, Array]:
    """Scores of mean 0 and variance 1 over the candidates, and whether they differ at all: 0 where they do not."""
    scores = jnp.where(is_candidate, scores, 0.0).astype(jnp.float32)
    count = jnp.maximum(is_candidate.sum(), 1)
    # Not by the variance: that of equal scores is not 0 in float32.
    highest = jnp.max(jnp.where(is_candidate, scores, -jnp.inf))
    lowest = jnp.min(jnp.where(is_candidate, scores, jnp.inf))
    differ = highest > lowest
    # First to the range [0, 1], which scores near the ends of float32 want.
    scaled = jnp.where(is_candidate & differ, (scores - lowest) / jnp.where(differ, highest - lowest, 1.0), 0.0)
    centred = jnp.where(is_candidate, scaled - scaled.sum() / count, 0.0)
    deviation = jnp.sqrt((centred**2).sum() / count)
    return jnp.where(differ, centred / jnp.where(differ, deviation, 1.0), 0.0), differ


def _owners(creator: Array) -> Array:
    """Creators as numbers below the number of candidates; each unknown one has a number of its own."""
    order = jnp.argsort(creator)
    ordered = creator[order]
    is_new = (ordered[1:] != ordered[:-1]) | (ordered[1:] < 0)
    number = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(is_new, dtype=jnp.int32)])
    return jnp.zeros(len(creator), jnp.int32).at[order].set(number)
