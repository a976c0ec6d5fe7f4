"""AIGC-INT-Sim's users, online: **simulated** people who are shown slates and react, thousands at once.

The causes are those of the simulator (:mod:`mmei_jax.simulation.aigc_int_feedback`): a user's satisfaction with an item
follows from their emotion, intent and taste; items at a position are examined with a known probability; dwell, replays
and likes follow from satisfaction. Here users come back: each visit has a new emotion and intent, tastes drift, and
ratings arrive some visits after the slate that they are about.

What a user shows of their state is a record of a pool: one of those whose emotion and intent are the user's. A policy
may read that record, the user's id and what was fed back; everything else is hidden. This module knows no model.
"""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from mmei_jax.config_values import require
from mmei_jax.simulation import aigc_int, aigc_int_feedback
from mmei_jax.simulation.aigc_int import EMOTION_PRIOR, EMOTIONS, INTENTS, KIND_PRIOR, NUM_TASTES, USER_TYPE_PRIOR
from mmei_jax.simulation.aigc_int_feedback import (
    DWELL_LOG_DEVIATION,
    DWELL_SECONDS,
    LIKE_MIDPOINT,
    LIKE_SLOPE,
    REPLAY_RATE,
    SATISFACTION_NOISE,
    TASTE_WEIGHT,
    TYPICAL_SATISFACTION,
)
from mmei_jax.types import InputError

# Of an item in a visit.
_MOST_REPLAYS = 10


@dataclass(frozen=True)
class EnvironmentConfig:
    """What the users are like beyond the simulator's constants.

    Attributes:
        taste_drift: in [0, 1]: each visit a taste becomes ``sqrt(1 - drift^2) * taste + drift * noise``, so that tastes
            stay standard normal over users.
        position_exponent: an item at position p is examined with probability ``(1 + p) ** -exponent``; 0 removes the
            position bias.
        rating_probability: that a user rates a slate at all.
        rating_delay_visits: visits until a rating arrives; 0 at once.
    """

    taste_drift: float = 0.05
    position_exponent: float = 0.4
    rating_probability: float = 0.3
    rating_delay_visits: int = 2

    def __post_init__(self) -> None:
        for name in ("taste_drift", "rating_probability"):
            value = getattr(self, name)
            require(0.0 <= value <= 1.0, f"environment.{name}", value, "from 0 to 1")
        for name in ("position_exponent", "rating_delay_visits"):
            value = getattr(self, name)
            require(value >= 0, f"environment.{name}", value, "at least 0")


@struct.dataclass
class World:
    """What is the same for all users; arrays on the devices.

    Attributes:
        state_score: ``[emotions * intents, items]`` float32, the part of a score that follows from state and quality.
        style: ``[items, tastes]`` float32.
        item_kind: ``[items]`` int32.
        intent_table: ``[types, kinds, emotions, intents]`` float32, P(i | e, c, type).
        pool: ``[emotions * intents, most]`` int32 records of each state, the last one again where it has fewer.
        pool_size: ``[emotions * intents]`` int32.
    """

    state_score: Any
    style: Any
    item_kind: Any
    intent_table: Any
    pool: Any
    pool_size: Any


@struct.dataclass
class Users:
    """Users between two visits, or within one.

    Attributes:
        taste: ``[users, tastes]`` float32, hidden.
        user_type: ``[users]`` int32, hidden.
        kind: ``[users]`` int32: the kind of content that this visit asks for.
        emotion, intent: ``[users]`` int32 of this visit, hidden.
        record: ``[users]`` int32: what the user shows, a record of the pool.
        num_visits: ``[users]`` int32.
        waiting: ``[users, delay]`` float32 ratings that have not arrived, NaN where none was given.
    """

    taste: Any
    user_type: Any
    kind: Any
    emotion: Any
    intent: Any
    record: Any
    num_visits: Any
    waiting: Any


@struct.dataclass
class Feedback:
    """What came of a slate.

    Attributes:
        dwell_seconds: ``[users, slate]`` float32, 0 where the item was not examined.
        num_replays: ``[users, slate]`` int32.
        is_liked: ``[users, slate]`` bool.
        rating: ``[users]`` float32, the rating that arrives at this visit, of the slate ``rating_delay_visits`` ago;
            NaN where none arrives.
        satisfaction: ``[users]`` float32, the *hidden* mean expected satisfaction of the slate's items as they were
            examined: what an A/B test of this simulation measures, and no policy may read.
    """

    dwell_seconds: Any
    num_replays: Any
    is_liked: Any
    rating: Any
    satisfaction: Any


def make_world(emotion: Int[np.ndarray, "records"], intent: Int[np.ndarray, "records"]) -> World:
    """The world, with a pool of records that users may show.

    Args:
        emotion: ``[records]`` true emotions of the pool.
        intent: ``[records]`` true intents.

    Raises:
        InputError: a state has no record.
    """
    items = aigc_int_feedback.item_world()
    state = np.asarray(emotion) * len(INTENTS) + np.asarray(intent)
    num_states = len(EMOTIONS) * len(INTENTS)
    sizes = np.bincount(state, minlength=num_states)
    if (sizes == 0).any():
        missing = int(np.flatnonzero(sizes == 0)[0])
        names = EMOTIONS[missing // len(INTENTS)], INTENTS[missing % len(INTENTS)]
        raise InputError(f"pool of {len(state)} records: none shows {names[0]} with {names[1]}; expected every state")
    pool = np.zeros((num_states, sizes.max()), np.int32)
    for index in range(num_states):
        members = np.flatnonzero(state == index)
        pool[index] = members[np.minimum(np.arange(sizes.max()), len(members) - 1)]
    return World(
        state_score=jnp.asarray(items.state_score(), jnp.float32),
        style=jnp.asarray(items.style, jnp.float32),
        item_kind=jnp.asarray(items.kind, jnp.int32),
        intent_table=jnp.asarray(aigc_int.intent_table(), jnp.float32),
        pool=jnp.asarray(pool),
        pool_size=jnp.asarray(sizes, jnp.int32),
    )


@functools.partial(jax.jit, static_argnames=("num_users", "config"))
def new_users(key: Array, world: World, num_users: int, config: EnvironmentConfig) -> Users:
    """Users at their first visit.

    Args:
        key: random key.
        world: of :func:`make_world`.
        num_users: how many.
        config: see :class:`EnvironmentConfig`.
    """
    taste_key, type_key, visit_key = jax.random.split(key, 3)
    zeros = jnp.zeros(num_users, jnp.int32)
    users = Users(
        taste=jax.random.normal(taste_key, (num_users, NUM_TASTES)),
        user_type=jax.random.categorical(type_key, jnp.log(jnp.asarray(USER_TYPE_PRIOR)), shape=(num_users,)),
        kind=zeros,
        emotion=zeros,
        intent=zeros,
        record=zeros,
        num_visits=zeros,
        waiting=jnp.full((num_users, config.rating_delay_visits), jnp.nan),
    )
    return new_visit(visit_key, world, users)


def expected_satisfaction(world: World, users: Users, items: Int[Array, "users slate"]) -> Float[Array, "users slate"]:
    """Hidden: the mean satisfaction of each user with items, in (1, 5)."""
    state = users.emotion * len(INTENTS) + users.intent
    score = world.state_score[state[:, None], items]
    taste = jnp.einsum("ut,ust->us", users.taste, world.style[items], precision=jax.lax.Precision.HIGHEST)
    return 1.0 + 4.0 * jax.nn.sigmoid(score + TASTE_WEIGHT * taste)


def show(
    key: Array, world: World, users: Users, items: Int[Array, "users slate"], config: EnvironmentConfig
) -> tuple[Users, Feedback]:
    """Shows each user a slate; gives what came of it, and the users at their next visit.

    Args:
        key: random key.
        world: of :func:`make_world`.
        users: at this visit.
        items: ``[users, slate]`` int32 rows of the catalogue, the first at position 0.
        config: see :class:`EnvironmentConfig`.
    """
    keys = jax.random.split(key, 8)
    shape, slate = items.shape, items.shape[1]
    expected = expected_satisfaction(world, users, items)
    examination = (1.0 + jnp.arange(slate)) ** -config.position_exponent
    is_examined = jax.random.uniform(keys[0], shape) < examination[None]
    noisy = jnp.clip(expected + SATISFACTION_NOISE * jax.random.normal(keys[1], shape), 1.0, 5.0)
    satisfaction = jnp.where(is_examined, noisy, 1.0)
    seconds = jnp.asarray(DWELL_SECONDS, jnp.float32)[world.item_kind[items]] * satisfaction / TYPICAL_SATISFACTION
    dwell = seconds * jnp.exp(DWELL_LOG_DEVIATION * jax.random.normal(keys[2], shape))
    replays = draw_replays(keys[3], REPLAY_RATE * jnp.maximum(satisfaction - TYPICAL_SATISFACTION, 0.0))
    likes = jax.random.uniform(keys[4], shape) < jax.nn.sigmoid(LIKE_SLOPE * (satisfaction - LIKE_MIDPOINT))
    mean = satisfaction.mean(axis=1)
    gives = jax.random.uniform(keys[5], mean.shape) < config.rating_probability
    ratings = jnp.concatenate([users.waiting, jnp.where(gives, mean, jnp.nan)[:, None]], axis=1)
    noise = jax.random.normal(keys[6], users.taste.shape)
    drift = config.taste_drift
    later = dataclasses.replace(
        users,
        taste=(1.0 - drift**2) ** 0.5 * users.taste + drift * noise,
        num_visits=users.num_visits + 1,
        waiting=ratings[:, 1:],
    )
    feedback = Feedback(
        dwell_seconds=jnp.where(is_examined, dwell, 0.0),
        num_replays=jnp.where(is_examined, replays, 0),
        is_liked=is_examined & likes,
        rating=ratings[:, 0],
        satisfaction=(expected * examination[None]).sum(axis=1) / examination.sum(),
    )
    return new_visit(keys[7], world, later), feedback


def draw_replays(key: Array, rate: Float[Array, "users slate"]) -> Int[Array, "users slate"]:
    """Poisson numbers by inversion; jax.random.poisson, for rates of any size, takes 30 times as long on a processor.

    Args:
        key: random key.
        rate: ``[users, slate]`` float32 in [0, 1]: that more than :data:`_MOST_REPLAYS` follow is then less likely than
            a float32 can tell.
    """
    uniform = jax.random.uniform(key, rate.shape)
    probability = jnp.exp(-rate)
    at_most, replays = probability, jnp.zeros(rate.shape, jnp.int32)
    for number in range(1, _MOST_REPLAYS + 1):
        replays += uniform >= at_most
        probability = probability * rate / number
        at_most += probability
    return replays


def new_visit(key: Array, world: World, users: Users) -> Users:
    """A new emotion, intent and kind for each user, and a record that shows them.

    Args:
        key: random key.
        world: whose records are shown.
        users: whose tastes and past stay.
    """
    kind_key, emotion_key, intent_key, record_key = jax.random.split(key, 4)
    shape = users.user_type.shape
    kind = jax.random.categorical(kind_key, jnp.log(jnp.asarray(KIND_PRIOR)), shape=shape)
    emotion = jax.random.categorical(emotion_key, jnp.log(jnp.asarray(EMOTION_PRIOR)), shape=shape)
    intent = jax.random.categorical(intent_key, jnp.log(world.intent_table[users.user_type, kind, emotion]))
    state = emotion * len(INTENTS) + intent
    place = jnp.floor(jax.random.uniform(record_key, shape) * world.pool_size[state]).astype(jnp.int32)
    record = world.pool[state, jnp.minimum(place, world.pool_size[state] - 1)]
    changed: Users = dataclasses.replace(users, kind=kind, emotion=emotion, intent=intent, record=record)
    return changed
