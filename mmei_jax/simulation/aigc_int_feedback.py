"""Catalogue and feedback of AIGC-INT-Sim: what users are shown, how they receive it, what would have suited them best.

Expected satisfaction of a user in state (e, i) with taste u with item j, in (1, 5):

    s(e, i, u, j) = 1 + 4 * sigmoid(emotion_fit[j, e] + intent_fit[j, i] + 0.7 * <u, style[j]> + 0.4 * quality[j])

where fits, quality, and style times sqrt(tastes) are standard normal over items: the state has four times the variance
of the taste. An item's features are a fixed rotation of (emotion_fit, intent_fit, style, quality, nuisance): what a
two-tower model needs is there, but not laid out. Taste leaves no trace in the tokens.

The slate is drawn without replacement from the record's content kind by a logging policy that knows the user type and
the kind only. Feedback follows a position-based model: the item at position p is examined with a known
probability, and one that is not examined gets no dwell, replay or like and satisfaction 1.
"""

import functools
import json
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from mmei_jax.simulation.aigc_int import (
    EMOTIONS,
    INTENTS,
    KIND_PRIOR,
    KINDS,
    NUM_TASTES,
    USER_TYPE_INTENT,
    USER_TYPES,
    Latents,
    make_generator,
    make_world_generator,
)

NUM_ITEMS = 2000
ITEM_DIM = 32
NUM_RELEVANT = 20
SLATE_SIZE = 8
TASTE_WEIGHT = 0.7
QUALITY_WEIGHT = 0.4
# Satisfaction as observed: expected satisfaction plus normal noise, clipped to [1, 5].
SATISFACTION_NOISE = 0.5
# P(examined) at position p (from 0).
EXAMINATION = (1.0 + np.arange(SLATE_SIZE)) ** -0.4
# Logging policy: a share of uniform choice, and else a softmax of quality and fit to the user type's intent.
UNIFORM_SHARE = 0.1
POLICY_QUALITY_WEIGHT = 0.3
POLICY_INTENT_WEIGHT = 0.3
# Typical seconds that an examined item of each kind holds a user whose satisfaction is 3, and the spread of their log.
DWELL_SECONDS = np.array([90.0, 60.0, 8.0, 40.0])
DWELL_LOG_DEVIATION = 0.4
# Dwell seconds are proportional to satisfaction over this one; mean replays rise by REPLAY_RATE with each point above.
TYPICAL_SATISFACTION = 3.0
REPLAY_RATE = 0.5
# P(like) = sigmoid(LIKE_SLOPE * (satisfaction - LIKE_MIDPOINT)).
LIKE_SLOPE = 2.0
LIKE_MIDPOINT = 3.5
# Tastes over which the share of users who find an item relevant is averaged.
_NUM_SAMPLED_TASTES = 2000
_MOODS = ("calm", "bright", "unexpected", "fierce", "wistful", "uneasy", "biting")
_NOUNS = {
    "music": ("melody", "beat", "song", "mix"),
    "video": ("clip", "scene", "film", "vlog"),
    "image": ("picture", "poster", "sketch", "collage"),
    "text": ("story", "poem", "guide", "essay"),
}


@dataclass(frozen=True)
class ItemWorld:
    """The catalogue with its hidden causes; the same for every seed of the records.

    Attributes:
        kind: ``[items]`` int32 into KINDS.
        emotion_fit: ``[items, emotions]`` float64; intent_fit: ``[items, intents]``; style: ``[items, tastes]``;
            quality: ``[items]``. What expected satisfaction is made of.
        features: ``[items, 32]`` float32, a rotation of all of these and of nuisance.
        is_ai_generated: ``[items]`` bool; without influence on satisfaction.
        creator: ``[items]`` int64.
    """

    kind: Int[np.ndarray, "items"]
    emotion_fit: Float[np.ndarray, "items emotions"]
    intent_fit: Float[np.ndarray, "items intents"]
    style: Float[np.ndarray, "items tastes"]
    quality: Float[np.ndarray, "items"]
    features: Float[np.ndarray, "items dim"]
    is_ai_generated: Bool[np.ndarray, "items"]
    creator: Int[np.ndarray, "items"]

    def state_score(self) -> Float[np.ndarray, "states items"]:
        """The score, before the sigmoid, for a user of average (zero) taste; state = emotion * 4 + intent; float64."""
        by_state = self.emotion_fit.T[:, None] + self.intent_fit.T[None] + QUALITY_WEIGHT * self.quality
        return by_state.reshape(len(EMOTIONS) * len(INTENTS), -1)


@dataclass(frozen=True)
class Slates:
    """What was shown, and what came of it; every array is ``[batch, slate]``, in the order shown.

    Attributes:
        item_index: int64 catalogue row; no item twice.
        propensity: float32, probability that the policy puts this item here, given the items placed before it. Their
            product is the probability of the whole slate.
        is_examined: bool; not observed.
        dwell_seconds: float32, 0 exactly where not examined.
        num_replays: int64.
        is_liked: bool.
        satisfaction: float32 in [1, 5]; 1 where not examined.
    """

    item_index: Int[np.ndarray, "batch slate"]
    propensity: Float[np.ndarray, "batch slate"]
    is_examined: Bool[np.ndarray, "batch slate"]
    dwell_seconds: Float[np.ndarray, "batch slate"]
    num_replays: Int[np.ndarray, "batch slate"]
    is_liked: Bool[np.ndarray, "batch slate"]
    satisfaction: Float[np.ndarray, "batch slate"]


@functools.cache
def item_world() -> ItemWorld:
    """The 2,000 items."""
    generator = make_world_generator("catalogue")
    causes = generator.standard_normal((NUM_ITEMS, ITEM_DIM))
    ends = np.cumsum([len(EMOTIONS), len(INTENTS), NUM_TASTES, 1])
    causes[:, ends[1] : ends[2]] /= np.sqrt(NUM_TASTES)
    emotion_fit, intent_fit, style, quality, _ = np.split(causes, ends, axis=1)
    rotation = np.linalg.qr(generator.standard_normal((ITEM_DIM, ITEM_DIM)))[0]
    kind = np.repeat(np.arange(len(KINDS)), np.round(KIND_PRIOR * NUM_ITEMS).astype(int))
    return ItemWorld(
        kind=generator.permutation(kind).astype(np.int32),
        emotion_fit=emotion_fit,
        intent_fit=intent_fit,
        style=style,
        quality=quality[:, 0],
        features=(causes @ rotation).astype(np.float32),
        is_ai_generated=generator.random(NUM_ITEMS) < 0.5,
        creator=generator.integers(0, 200, NUM_ITEMS),
    )


def item_ids() -> list[str]:
    """One name per item, in catalogue order."""
    return [f"item-{index:04d}" for index in range(NUM_ITEMS)]


def item_texts() -> list[str]:
    """Title, tags, creator and origin of each item, as JSON text."""
    world = item_world()
    texts = []
    for index in range(NUM_ITEMS):
        kind = KINDS[world.kind[index]]
        emotion, intent = int(world.emotion_fit[index].argmax()), int(world.intent_fit[index].argmax())
        noun = _NOUNS[kind][int(np.abs(world.style[index]).argmax())]
        text = {
            "title": f"A {_MOODS[emotion]} {noun} ({index:04d})",
            "tags": [kind, EMOTIONS[emotion], INTENTS[intent]],
            "creator": f"creator-{world.creator[index]:03d}",
            "origin": "ai_generated" if world.is_ai_generated[index] else "human",
        }
        texts.append(json.dumps(text, sort_keys=True))
    return texts


def satisfaction_from_score(score: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """Expected satisfaction, in (1, 5), from a score of any sign."""
    return 1.0 + 4.0 / (1.0 + np.exp(-score))


def true_scores(latents: Latents) -> Float[np.ndarray, "batch items"]:
    """Scores of the whole catalogue under the true (e, i, taste); float64. Satisfaction rises with the score."""
    world = item_world()
    state = latents.emotion * len(INTENTS) + latents.intent
    return world.state_score()[state] + TASTE_WEIGHT * (latents.taste @ world.style.T)


def _shown_scores(latents: Latents, items: Int[np.ndarray, "batch slate"]) -> Float[np.ndarray, "batch slate"]:
    """What :func:`true_scores` says of some items."""
    world = item_world()
    state = latents.emotion * len(INTENTS) + latents.intent
    fit = world.state_score()[state[:, None], items]
    return fit + TASTE_WEIGHT * np.einsum("bt,bst->bs", latents.taste, world.style[items])


def top_items(scores: Float[np.ndarray, "batch items"], num: int) -> Int[np.ndarray, "batch num"]:
    """The ``num`` items of highest score, best first."""
    found = np.argpartition(scores, -num, axis=1)[:, -num:]
    order = np.argsort(-np.take_along_axis(scores, found, axis=1), axis=1, kind="stable")
    return np.take_along_axis(found, order, axis=1)


def relevant_items(latents: Latents) -> Int[np.ndarray, "batch relevant"]:
    """The 20 items, of any kind, of highest expected satisfaction under the true (e, i, taste), best first."""
    return top_items(true_scores(latents), NUM_RELEVANT)


@functools.cache
def policy() -> Float[np.ndarray, "types kinds items"]:
    """The logging policy's first choice: probability of each item, by user type and kind; sums to 1 over items.

    Later positions draw from the same probabilities, renormalised over the items that are left.
    """
    world = item_world()
    logits = POLICY_QUALITY_WEIGHT * world.quality + POLICY_INTENT_WEIGHT * world.intent_fit.T[USER_TYPE_INTENT]
    is_of_kind = world.kind == np.arange(len(KINDS))[:, None]
    weights = np.exp(logits)[:, None] * is_of_kind
    preferred = weights / weights.sum(axis=-1, keepdims=True)
    return (1.0 - UNIFORM_SHARE) * preferred + UNIFORM_SHARE * is_of_kind / is_of_kind.sum(axis=-1, keepdims=True)


def _draw_slates(generator: np.random.Generator, latents: Latents) -> tuple[np.ndarray, np.ndarray]:
    """Items and their conditional probabilities.

    An item is drawn from the first-choice probabilities until one comes up that is not on the slate yet: the same as
    drawing from the probabilities renormalised over the items that are left.
    """
    context = latents.user_type * len(KINDS) + latents.kind
    probabilities = policy().reshape(len(USER_TYPES) * len(KINDS), NUM_ITEMS)
    # One sorted row of all contexts: context c owns the interval (c, c + 1].
    cumulative = np.cumsum(probabilities, axis=1)
    cumulative = (cumulative / cumulative[:, -1:] + np.arange(len(probabilities))[:, None]).ravel()
    num = len(context)
    items = np.full((num, SLATE_SIZE), -1)
    propensity = np.empty((num, SLATE_SIZE))
    left = np.ones(num)
    for position in range(SLATE_SIZE):
        waiting = np.arange(num)
        while len(waiting):
            point = context[waiting] + generator.random(len(waiting))
            drawn = np.searchsorted(cumulative, point, side="right") - context[waiting] * NUM_ITEMS
            is_new = (items[waiting] != drawn[:, None]).all(axis=1)
            items[waiting[is_new], position] = drawn[is_new]
            waiting = waiting[~is_new]
        probability = probabilities[context, items[:, position]]
        propensity[:, position] = probability / left
        left -= probability
    return items, propensity


def draw_slates(seed: int, chunk: int, latents: Latents) -> Slates:
    """Slates and feedback, given the latents of all records of the chunk."""
    generator = make_generator(seed, "slates", chunk)
    items, propensity = _draw_slates(generator, latents)
    shape = items.shape
    expected = satisfaction_from_score(_shown_scores(latents, items))
    is_examined = generator.random(shape) < EXAMINATION
    noisy = np.clip(expected + SATISFACTION_NOISE * generator.standard_normal(shape), 1.0, 5.0)
    satisfaction = np.where(is_examined, noisy, 1.0)
    typical_seconds = DWELL_SECONDS[latents.kind][:, None] * satisfaction / TYPICAL_SATISFACTION
    dwell = typical_seconds * np.exp(DWELL_LOG_DEVIATION * generator.standard_normal(shape))
    replays = generator.poisson(REPLAY_RATE * np.maximum(satisfaction - TYPICAL_SATISFACTION, 0.0))
    is_liked = generator.random(shape) < 1.0 / (1.0 + np.exp(-LIKE_SLOPE * (satisfaction - LIKE_MIDPOINT)))
    return Slates(
        item_index=items,
        propensity=propensity.astype(np.float32),
        is_examined=is_examined,
        dwell_seconds=np.where(is_examined, dwell, 0.0).astype(np.float32),
        num_replays=np.where(is_examined, replays, 0),
        is_liked=is_examined & is_liked,
        satisfaction=satisfaction.astype(np.float32),
    )


@functools.cache
def relevance_given_state() -> Float[np.ndarray, "states items"]:
    """P(item is relevant | e, i), over 2,000 sampled tastes; float32, rows sum to 20; state = emotion * 4 + intent."""
    world = item_world()
    tastes = make_world_generator("tastes").standard_normal((_NUM_SAMPLED_TASTES, NUM_TASTES))
    by_taste = TASTE_WEIGHT * (tastes @ world.style.T)
    counts = [
        np.bincount(
            np.argpartition(score + by_taste, -NUM_RELEVANT, axis=1)[:, -NUM_RELEVANT:].ravel(), minlength=NUM_ITEMS
        )
        for score in world.state_score()
    ]
    return (np.array(counts) / _NUM_SAMPLED_TASTES).astype(np.float32)


def posterior_scores(log_posterior: Float[np.ndarray, "batch emotions intents"]) -> Float[np.ndarray, "batch items"]:
    """P(item is relevant | tokens): ranking by it is best for NDCG, and what a model of tokens alone can know.

    Among items that no sampled taste finds relevant, expected satisfaction of an average taste decides. float32.
    """
    states = np.exp(log_posterior).reshape(len(log_posterior), -1).astype(np.float32)
    tie_breaker = satisfaction_from_score(item_world().state_score()).astype(np.float32)
    return states @ (relevance_given_state() + np.float32(1e-4) * tie_breaker)


def expected_satisfaction(
    log_posterior: Float[np.ndarray, "batch emotions intents"],
) -> Float[np.ndarray, "batch items"]:
    """Expected satisfaction under the posterior of (e, i), for a user of average (zero) taste; float32."""
    states = np.exp(log_posterior).reshape(len(log_posterior), -1).astype(np.float32)
    return states @ satisfaction_from_score(item_world().state_score()).astype(np.float32)
