"""The policies of the loop, all of one form: whatever scores the catalogue, a softmax draws the slate.

A score is the sum of what the record that a user shows says of an item, and of what the user's past says of it. So one
compiled program draws and judges the slates of them all. A policy reads the record, the user's id and the log; what
:mod:`mmei_jax.feedback.environment` hides, it never sees.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from mmei_jax.feedback.learning import PolicyParameters, policy_scores
from mmei_jax.feedback.logged_visits import LoggedVisits
from mmei_jax.feedback.loop_config import PoliciesConfig
from mmei_jax.feedback.policies import LinearBandit, choose_penalty, factorise, popularity_scores

# Records whose upper bounds are computed at once.
_RECORDS_AT_ONCE = 16


@dataclass(frozen=True)
class Pool:
    """What a trained model says of the records that users may show, and of the catalogue.

    Attributes:
        user_embedding: ``[records, dim]`` float32 F_u (Eq. 7).
        item_embedding: ``[items, dim]`` float32 E_c.
        item_kind: ``[items]`` int32.
        item_ids: names of the items, for the log.
    """

    user_embedding: Float[np.ndarray, "records dim"]
    item_embedding: Float[np.ndarray, "items dim"]
    item_kind: Int[np.ndarray, "items"]
    item_ids: tuple[str, ...]


@struct.dataclass
class SlatePolicy:
    """Scores, and how slates are drawn from them (:func:`~mmei_jax.feedback.policies.draw_slates`).

    Attributes:
        record_scores: ``[records, items]`` float32.
        user_factors: ``[users, rank]`` float32.
        item_factors: ``[items, rank]`` float32.
        temperature: scalar float32.
        uniform_share: scalar float32.
    """

    record_scores: Any
    user_factors: Any
    item_factors: Any
    temperature: Any
    uniform_share: Any

    def scores(self, user: Int[Array, "visits"], record: Int[Array, "visits"]) -> Float[Array, "visits items"]:
        """Of the whole catalogue."""
        scores: Array = self.record_scores[record] + self.user_factors[user] @ self.item_factors.T
        return scores


@dataclass(frozen=True)
class NamedPolicy:
    """A policy as the log and the report call it.

    Attributes:
        name: what kind of policy.
        version: round after which it was made; 0 before all.
        policy: see :class:`SlatePolicy`.
        parameters: of a policy of the model; None for the others.
    """

    name: str
    version: int
    policy: SlatePolicy
    parameters: PolicyParameters | None = None

    @property
    def label(self) -> str:
        """Name and version in one, unique within a loop."""
        return f"{self.name}-{self.version}"


@dataclass(frozen=True)
class PolicyMaker:
    """Makes policies of one pool and one group of users.

    Attributes:
        pool: what policies may read.
        num_users: who visits.
        config: temperatures and penalties.
        uniform_share: of choices of every policy that explores.
    """

    pool: Pool
    num_users: int
    config: PoliciesConfig
    uniform_share: float

    def uniform(self) -> SlatePolicy:
        """Every item as often."""
        return self._make(1.0)

    def model(
        self, parameters: PolicyParameters, temperature: float, uniform_share: float | None = None
    ) -> SlatePolicy:
        """The softmax of a policy's inner products of F_u and E_c; with parameters of 0 the model's own."""
        scores = _model_scores(parameters, self.pool.user_embedding, self.pool.item_embedding)
        return self._make(temperature, uniform_share, record_scores=scores)

    def popularity(self, log: LoggedVisits) -> SlatePolicy:
        """By click rate, the same for everybody."""
        num_items = len(self.pool.item_ids)
        views = np.bincount(log.items.ravel(), minlength=num_items)
        clicks = np.bincount(log.items[log.is_click], minlength=num_items)
        scores = popularity_scores(clicks, views)
        ones = np.ones((self.num_users, 1), np.float32)
        return self._make(self.config.popularity_temperature, user_factors=ones, item_factors=scores[:, None])

    def behaviour_only(self, log: LoggedVisits, *, seed: int) -> SlatePolicy:
        """By who clicked what (matrix factorisation), without a look at what users show.

        The penalty is the one that tells held-out clicks best.
        """
        config = self.config
        user, item, is_click = np.repeat(log.user, log.items.shape[1]), log.items.ravel(), log.is_click.ravel()
        sizes = {"num_users": self.num_users, "num_items": len(self.pool.item_ids)}
        options = {**sizes, "rank": config.behaviour_rank, "num_sweeps": config.behaviour_sweeps, "seed": seed}
        penalty = choose_penalty(user, item, is_click, config.behaviour_penalties, **options)
        factors = factorise(user, item, is_click, penalty=penalty, **options)
        return self._make(config.behaviour_temperature, user_factors=factors.user, item_factors=factors.item)

    def without_records(self, policy: SlatePolicy) -> SlatePolicy:
        """A policy that reads users alone, for this pool's records.

        Args:
            policy: made for another pool.

        Raises:
            ValueError: it reads records.
        """
        if jnp.any(policy.record_scores != 0.0):
            raise ValueError("the policy reads records of another pool")
        shape = (len(self.pool.user_embedding), len(self.pool.item_ids))
        moved: SlatePolicy = dataclasses.replace(policy, record_scores=jnp.zeros(shape))
        return moved

    def bandits(
        self, log: LoggedVisits, rewards: Float[np.ndarray, "visits slate"], *, seed: int
    ) -> dict[str, SlatePolicy]:
        """LinUCB and Thompson sampling on the products of F_u and E_c, feature by feature, and a constant.

        Thompson sampling draws its coefficients once for each version, so that its propensities can be stated.
        """
        config = self.config
        upper, thompson = _bandit_scores(
            jax.random.key(seed),
            self.pool.user_embedding,
            self.pool.item_embedding,
            log.record.astype(np.int32),
            log.items.astype(np.int32),
            rewards.astype(np.float32),
            np.float32(config.bandit_penalty),
            np.float32(config.bandit_width),
            np.float32(config.thompson_scale),
        )
        return {
            "linucb": self._make(config.bandit_temperature, record_scores=upper),
            "thompson": self._make(config.bandit_temperature, record_scores=thompson),
        }

    def _make(
        self,
        temperature: float,
        uniform_share: float | None = None,
        *,
        record_scores: Any = None,
        user_factors: Any = None,
        item_factors: Any = None,
    ) -> SlatePolicy:
        """Arrays of one shape for all policies, so that they share compiled programs."""
        num_records, num_items = len(self.pool.user_embedding), len(self.pool.item_ids)
        rank = self.config.behaviour_rank + 1
        if record_scores is None:
            record_scores = jnp.asarray(np.zeros((num_records, num_items), np.float32))

        def padded(factors: Any, length: int) -> Array:
            found = np.zeros((length, rank), np.float32)
            if factors is not None:
                found[:, : factors.shape[1]] = factors
            return jnp.asarray(found)

        share = self.uniform_share if uniform_share is None else uniform_share
        return SlatePolicy(
            record_scores=record_scores,
            user_factors=padded(user_factors, self.num_users),
            item_factors=padded(item_factors, num_items),
            temperature=jnp.asarray(np.float32(temperature)),
            uniform_share=jnp.asarray(np.float32(share)),
        )


@jax.jit
def _model_scores(parameters: PolicyParameters, users: Array, items: Array) -> Array:
    return policy_scores(parameters, users, items)


@jax.jit
def _bandit_scores(
    key: Array,
    users: Array,
    items: Array,
    shown_record: Array,
    shown_items: Array,
    rewards: Array,
    penalty: Array,
    width: Array,
    thompson_scale: Array,
) -> tuple[Array, Array]:
    """``[records, items]`` upper bounds, and a draw of the posterior."""
    features = _bandit_features(users[shown_record][:, None], items[shown_items])
    num_features = features.shape[-1]
    bandit = LinearBandit.fresh(num_features)
    bandit = dataclasses.replace(bandit, precision=bandit.precision * penalty)
    bandit = bandit.update(features.reshape(-1, num_features), rewards.reshape(-1))

    def of_record(user: Array) -> Array:
        return bandit.upper_bounds(_bandit_features(user[None], items), width)

    upper = jax.lax.map(of_record, users, batch_size=_RECORDS_AT_ONCE)
    drawn = bandit.sample(key, thompson_scale)
    return upper, (users * drawn[None, :-1]) @ items.T + drawn[-1]


def _bandit_features(users: Array, items: Array) -> Array:
    products = users * items
    return jnp.concatenate([products, jnp.ones((*products.shape[:-1], 1))], axis=-1)
