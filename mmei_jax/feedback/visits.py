"""Users who come back: a policy fills their slates, they react, several visits in one compiled program."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from mmei_jax.feedback.environment import EnvironmentConfig, Users, World, show
from mmei_jax.feedback.policies import draw_slates
from mmei_jax.feedback.slate_policies import SlatePolicy


@struct.dataclass
class Visits:
    """What happened; a leading axis of visits, then one of users.

    Attributes:
        record: ``[visits, users]`` int32, what was shown.
        kind: ``[visits, users]`` int32, what was asked for.
        items: ``[visits, users, slate]`` int32.
        propensity: ``[visits, users, slate]`` float32, of each item given those before it.
        dwell_seconds: ``[visits, users, slate]`` float32.
        num_replays: ``[visits, users, slate]`` int32.
        is_liked: ``[visits, users, slate]`` bool.
        rating: ``[visits, users]`` float32 of that visit's slate; NaN where none was given, or none arrived within
            these visits.
        satisfaction: ``[visits, users]`` float32, the environment's *hidden* score: for the A/B, never for a policy.
    """

    record: Any
    kind: Any
    items: Any
    propensity: Any
    dwell_seconds: Any
    num_replays: Any
    is_liked: Any
    rating: Any
    satisfaction: Any


def visit(
    key: Array,
    world: World,
    users: Users,
    policy: SlatePolicy,
    *,
    num_visits: int,
    slate_size: int,
    config: EnvironmentConfig,
    is_placebo: bool = False,
) -> tuple[Users, Visits]:
    """Lets every user visit several times.

    With the same key and users, two policies meet the same moods, records and chances: they differ by their slates
    alone. What is drawn depends on the policy only through the items that it chooses.

    Args:
        key: random key.
        world: of :func:`~mmei_jax.feedback.environment.make_world`.
        users: at their next visit.
        policy: fills the slates with items of the kind that was asked for.
        num_visits: of each user.
        slate_size: items of a slate.
        config: of the environment.
        is_placebo: the policy reads another user's record, a permutation over the users of the same visit.

    Returns:
        The users after their last visit, and the visits.
    """
    found: tuple[Users, Visits] = _visit(
        key,
        world,
        users,
        policy,
        jnp.asarray(is_placebo),
        num_visits=num_visits,
        slate_size=slate_size,
        config=config,
    )
    return found


@functools.partial(jax.jit, static_argnames=("num_visits", "slate_size", "config"))
def _visit(
    key: Array,
    world: World,
    users: Users,
    policy: SlatePolicy,
    is_placebo: Array,
    *,
    num_visits: int,
    slate_size: int,
    config: EnvironmentConfig,
) -> tuple[Users, Visits]:
    number = jnp.arange(users.record.shape[0])

    def once(users: Users, key: Array) -> tuple[Users, Visits]:
        slate_key, show_key, placebo_key = jax.random.split(key, 3)
        record = jnp.where(is_placebo, jax.random.permutation(placebo_key, users.record), users.record)
        choice = draw_slates(
            slate_key,
            policy.scores(number, record),
            is_allowed(world.item_kind, users.kind),
            slate_size=slate_size,
            temperature=policy.temperature,
            uniform_share=policy.uniform_share,
        )
        later, feedback = show(show_key, world, users, choice.items, config)
        return later, Visits(
            record=users.record,
            kind=users.kind,
            items=choice.items,
            propensity=choice.propensity,
            dwell_seconds=feedback.dwell_seconds,
            num_replays=feedback.num_replays,
            is_liked=feedback.is_liked,
            rating=feedback.rating,
            satisfaction=feedback.satisfaction,
        )

    users, visits = jax.lax.scan(once, users, jax.random.split(key, num_visits))
    rating = of_their_slates(visits.rating, config.rating_delay_visits)
    return users, dataclasses.replace(visits, rating=rating)


def is_allowed(item_kind: Int[Array, "items"], kind: Int[Array, "visits"]) -> Any:
    """``[visits, items]`` bool: items of the kind that a visit asks for."""
    return item_kind[None] == kind[:, None]


def of_their_slates(arrived: Float[Array, "visits users"], delay: int) -> Float[Array, "visits users"]:
    """Ratings by the visit whose slate they are of, from ratings by the visit at which they arrive.

    Those of slates before the first visit are dropped; those that would arrive after the last are NaN.
    """
    delay = min(delay, arrived.shape[0])
    return jnp.concatenate([arrived[delay:], jnp.full((delay, arrived.shape[1]), jnp.nan)])
