"""Policies that fill slates: what each one would do is a table of probabilities, so that every choice can be judged.

A policy scores the whole catalogue for each user. Slates are drawn item by item without replacement from the softmax of
the scores (Plackett and Luce), so that the propensity of an item at its position is its probability among the items
that are left; a greedy policy is the limit of a small temperature, and has propensities of 1.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from mmei_jax.types import InputError

# Of the views, on which penalties of a factorisation are compared.
_HELD_OUT_SHARE = 0.2


@struct.dataclass
class SlateChoice:
    """Drawn slates.

    Attributes:
        items: ``[users, slate]`` int32 rows of the catalogue, the first at position 0.
        propensity: ``[users, slate]`` float32, of each item at its position, given the items before it.
    """

    items: Any
    propensity: Any


def next_probabilities(
    logits: Float[Array, "users items"], is_left: Bool[Array, "users items"], uniform_share: float | Float[Array, ""]
) -> Float[Array, "users items"]:
    """With which probability each item comes next.

    Args:
        logits: ``[users, items]``, -inf for what may not come.
        is_left: ``[users, items]``, what may.
        uniform_share: of uniform choice.
    """
    uniform = is_left / is_left.sum(axis=-1, keepdims=True)
    return (1.0 - uniform_share) * jax.nn.softmax(logits, axis=-1) + uniform_share * uniform


def without(
    item: Int[Array, "users"], logits: Float[Array, "users items"], is_left: Bool[Array, "users items"]
) -> tuple[Float[Array, "users items"], Bool[Array, "users items"]]:
    """Logits and what is left once each user's item is placed."""
    is_chosen = jax.nn.one_hot(item, logits.shape[1], dtype=bool)
    return jnp.where(is_chosen, -jnp.inf, logits), is_left & ~is_chosen


def draw_slates(
    key: Array,
    scores: Float[Array, "users items"],
    is_allowed: Bool[Array, "users items"],
    *,
    slate_size: int,
    temperature: float | Float[Array, ""],
    uniform_share: float | Float[Array, ""] = 0.0,
) -> SlateChoice:
    """Slates without replacement.

    Args:
        key: random key.
        scores: ``[users, items]``.
        is_allowed: ``[users, items]``, at least ``slate_size`` for each user.
        slate_size: items of a slate.
        temperature: that divides the scores; small ones are nearly greedy.
        uniform_share: in [0, 1], of each choice that is made uniformly among what is left: a lower bound of every
            propensity, so that other policies can be judged on the log.
    """
    logits = jnp.where(is_allowed, scores / temperature, -jnp.inf)

    def place(carry: tuple[Array, Array], key: Array) -> tuple[Any, Any]:
        probability = next_probabilities(*carry, uniform_share)
        item = jax.random.categorical(key, jnp.log(probability))
        return without(item, *carry), (item, jnp.take_along_axis(probability, item[:, None], axis=1)[:, 0])

    _, (items, propensity) = jax.lax.scan(place, (logits, is_allowed), jax.random.split(key, slate_size))
    return SlateChoice(items=items.T.astype(jnp.int32), propensity=propensity.T)


def uniform_slates(key: Array, num_users: int, num_items: int, *, slate_size: int) -> SlateChoice:
    """What :func:`draw_slates` draws where every item is allowed and the choice is uniform, without scores.

    Args:
        key: random key.
        num_users: slates.
        num_items: of the catalogue, at least ``slate_size``.
        slate_size: items of a slate.
    """
    num_left = num_items - jnp.arange(slate_size)
    chosen = jax.random.randint(key, (num_users, slate_size), 0, num_left[None])
    items: list[Array] = []
    # Rows that are taken, in rising order.
    taken: list[Array] = []
    for position in range(slate_size):
        item = chosen[:, position]
        # From the place among what is left to the row in the catalogue.
        for row in taken:
            item += item >= row
        items.append(item)
        largest, ordered = item, []
        for row in taken:
            ordered.append(jnp.minimum(row, largest))
            largest = jnp.maximum(row, largest)
        taken = [*ordered, largest]
    propensity = jnp.broadcast_to(1.0 / num_left[None], (num_users, slate_size))
    return SlateChoice(items=jnp.stack(items, axis=1).astype(jnp.int32), propensity=propensity)


def slate_propensities(
    scores: Float[Array, "users items"],
    is_allowed: Bool[Array, "users items"],
    items: Int[Array, "users slate"],
    *,
    temperature: float | Float[Array, ""],
    uniform_share: float | Float[Array, ""] = 0.0,
) -> Float[Array, "users slate"]:
    """What :func:`draw_slates` would have said of slates that another policy drew: the target of an evaluation."""

    def place(carry: tuple[Array, Array], item: Array) -> tuple[Any, Array]:
        probability = next_probabilities(*carry, uniform_share)
        return without(item, *carry), jnp.take_along_axis(probability, item[:, None], axis=1)[:, 0]

    logits = jnp.where(is_allowed, scores / temperature, -jnp.inf)
    _, propensity = jax.lax.scan(place, (logits, is_allowed), items.T)
    return propensity.T


def popularity_scores(clicks: Int[np.ndarray, "items"], views: Int[np.ndarray, "items"]) -> Float[np.ndarray, "items"]:
    """Log click rates with one click in ten views added to each item, so that rare items are not extreme.

    Args:
        clicks: ``[items]`` times each item was clicked (replayed or liked).
        views: ``[items]`` times it was shown.
    """
    return np.log((clicks + 1.0) / (views + 10.0)).astype(np.float32)


@dataclass(frozen=True)
class Factors:
    """Matrix factorisation of who clicked what.

    Attributes:
        user: ``[users, rank + 1]`` float32 with a last column of ones; item: ``[items, rank + 1]`` with the item's bias
            last. Scores are inner products. A user without clicks has factors 0: popularity alone.
    """

    user: Float[np.ndarray, "users rank"]
    item: Float[np.ndarray, "items rank"]


def factorise(
    user: Int[np.ndarray, "views"],
    item: Int[np.ndarray, "views"],
    is_click: Bool[np.ndarray, "views"],
    *,
    num_users: int,
    num_items: int,
    rank: int = 8,
    penalty: float = 1.0,
    num_sweeps: int = 10,
    seed: int = 0,
) -> Factors:
    """Alternating least squares on the residual of each item's click rate: what behaviour alone tells.

    Args:
        user: ``[views]`` who was shown an item.
        item: ``[views]`` which.
        is_click: ``[views]``.
        num_users: rows of the table of users.
        num_items: rows of the table of items.
        rank: factors.
        penalty: of squared factors, in views.
        num_sweeps: alternations.
        seed: of the first item factors.

    References:
        Hu, Koren and Volinsky, "Collaborative filtering for implicit feedback datasets", ICDM 2008; with views as the
        observed entries instead of a confidence for all.

    Raises:
        InputError: there are no views.
    """
    if not len(user):
        raise InputError("factorisation of 0 views: expected at least one")
    views = np.bincount(item, minlength=num_items)
    bias = (np.bincount(item, is_click, num_items) + is_click.mean() * 10.0) / (views + 10.0)
    target = (is_click - bias[item]).astype(np.float64)
    generator = np.random.default_rng(seed)
    items, users = 0.1 * generator.standard_normal((num_items, rank)), np.zeros((num_users, rank))
    for _ in range(num_sweeps):
        users = _least_squares(user, items[item], target, num_users, penalty)
        items = _least_squares(item, users[user], target, num_items, penalty)
    ones = np.ones((num_users, 1))
    return Factors(
        np.concatenate([users, ones], axis=1).astype(np.float32),
        np.concatenate([items, bias[:, None]], axis=1).astype(np.float32),
    )


def choose_penalty(
    user: Int[np.ndarray, "views"],
    item: Int[np.ndarray, "views"],
    is_click: Bool[np.ndarray, "views"],
    penalties: Sequence[float],
    *,
    num_users: int,
    num_items: int,
    rank: int,
    num_sweeps: int,
    seed: int = 0,
) -> float:
    """The penalty with which :func:`factorise` predicts a held-out fifth of the views best; of equal ones the largest.

    Args:
        user: ``[views]`` who was shown an item.
        item: ``[views]`` which.
        is_click: ``[views]``.
        penalties: to be tried; a single one is taken as it is.
        num_users: of :func:`factorise`, and
        num_items: likewise,
        rank: likewise,
        num_sweeps: likewise.
        seed: of what is held out, and of the factors.
    """
    if len(penalties) == 1:
        return penalties[0]
    is_held_out = np.random.default_rng(seed).random(len(user)) < _HELD_OUT_SHARE
    kept = [part[~is_held_out] for part in (user, item, is_click)]
    who, what, truth = (part[is_held_out] for part in (user, item, is_click))
    best, least = 0.0, float("inf")
    for penalty in sorted(penalties, reverse=True):
        found = factorise(
            *kept,
            num_users=num_users,
            num_items=num_items,
            rank=rank,
            penalty=penalty,
            num_sweeps=num_sweeps,
            seed=seed,
        )
        error = float(np.square((found.user[who] * found.item[what]).sum(axis=1) - truth).mean())
        # Penalties that leave no factors differ by rounding.
        if error < least * (1.0 - 1e-6):
            best, least = penalty, error
    return best


def _least_squares(
    owner: np.ndarray, factors: np.ndarray, target: np.ndarray, num_owners: int, penalty: float
) -> np.ndarray:
    """Ridge regression of each owner's targets on the factors of what it met."""
    rank = factors.shape[1]
    products = (factors[:, :, None] * factors[:, None, :]).reshape(len(factors), -1)
    sums = np.stack([np.bincount(owner, column, num_owners) for column in products.T], axis=1)
    gram = sums.reshape(num_owners, rank, rank) + penalty * np.eye(rank)
    right: Any = np.stack([np.bincount(owner, column * target, num_owners) for column in factors.T], axis=1)
    solved: np.ndarray = np.linalg.solve(gram, right[..., None])[..., 0]
    return solved


@struct.dataclass
class LinearBandit:
    """Ridge regression of rewards on features, with its uncertainty.

    Attributes:
        precision: ``[features, features]`` float32.
        target: ``[features]`` float32.
    """

    precision: Any
    target: Any

    @classmethod
    def fresh(cls, num_features: int, penalty: float = 1.0) -> "LinearBandit":
        """That has seen nothing."""
        return cls(precision=penalty * jnp.eye(num_features), target=jnp.zeros(num_features))

    def update(self, features: Float[Array, "rows features"], rewards: Float[Array, "rows"]) -> "LinearBandit":
        """With more rows."""
        seen: LinearBandit = dataclasses.replace(
            self, precision=self.precision + features.T @ features, target=self.target + features.T @ rewards
        )
        return seen

    def upper_bounds(
        self, features: Float[Array, "*rows features"], width: float | Float[Array, ""]
    ) -> Float[Array, "*rows"]:
        """LinUCB (Li et al., 2010): the mean and ``width`` deviations of it."""
        factor = jnp.linalg.cholesky(self.precision)
        mean = features @ jax.scipy.linalg.cho_solve((factor, True), self.target)
        whitened = jax.scipy.linalg.solve_triangular(factor, features.reshape(-1, features.shape[-1]).T, lower=True)
        deviation = jnp.sqrt((whitened**2).sum(axis=0)).reshape(features.shape[:-1])
        return mean + width * deviation

    def sample(self, key: Array, scale: float | Float[Array, ""]) -> Float[Array, "features"]:
        """Thompson sampling (Agrawal and Goyal, 2013): coefficients from the posterior, ``scale`` times as wide."""
        factor = jnp.linalg.cholesky(self.precision)
        noise = jax.random.normal(key, self.target.shape)
        spread = jax.scipy.linalg.solve_triangular(factor.T, noise, lower=False)
        drawn: Array = jax.scipy.linalg.cho_solve((factor, True), self.target) + scale * spread
        return drawn
