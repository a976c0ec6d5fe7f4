"""A loop's log as decisions: what a policy is judged by, and what it learns from.

**What is estimated.** The decision at a position is the choice of all items up to it: its propensity is the product of
the propensities up to it, and its reward that of the item there. So the mean over decisions is what the new policy
would earn per shown item, *with its own slates*. Weights of one position alone would ask something else: what the new
policy's next item would earn after the logging policy's items before it. A policy that is surer than the logging one
looks too good then, since the logging policy leaves it the best item at every position. Products cost variance, which
grows with the slate, and the effective sample size says so.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mmei_jax.feedback.estimators import LoggedDecisions
from mmei_jax.feedback.learning import (
    LearningConfig,
    LoggedSlates,
    PolicyParameters,
    RewardConfig,
    item_rewards,
    learn_policy,
)
from mmei_jax.feedback.logged_visits import LoggedVisits
from mmei_jax.feedback.loop_config import RewardModelConfig
from mmei_jax.feedback.policies import next_probabilities, slate_propensities, without
from mmei_jax.feedback.reward_models import CrossFitted, cross_fit
from mmei_jax.feedback.slate_policies import Pool, SlatePolicy

# Visits whose scores of the whole catalogue are in memory at once.
_VISITS_AT_ONCE = 1024


def visit_rewards(log: LoggedVisits, config: RewardConfig) -> Float[np.ndarray, "visits slate"]:
    """The reward of every shown item; a rating that did not arrive within the round counts as none; float64."""
    rewards = item_rewards(
        jnp.asarray(log.dwell_seconds, jnp.float32),
        jnp.asarray(log.num_replays, jnp.int32),
        jnp.asarray(log.is_liked),
        jnp.asarray(log.rating, jnp.float32),
        config,
    )
    return np.asarray(rewards, np.float64)


class LoggedRewards:
    """Visits with their rewards, and what models that had not seen their users predict of the whole catalogue.

    Args:
        pool: of the loop.
        log: some of its visits.
        rewards: ``[visits, slate]`` of :func:`visit_rewards`.
        config: of the reward models.
        seed: of their folds.

    Attributes:
        log, rewards: as given.
        fitted: the predictions.

    Raises:
        InputError: there are fewer users than folds.
    """

    def __init__(
        self,
        pool: Pool,
        log: LoggedVisits,
        rewards: Float[np.ndarray, "visits slate"],
        config: RewardModelConfig,
        *,
        seed: int,
    ):
        self._pool, self.log, self.rewards = pool, log, rewards
        scores = pool.user_embedding[log.record] @ pool.item_embedding.T
        self.fitted: CrossFitted = cross_fit(
            scores, log.items, rewards, log.user, num_folds=config.num_folds, penalty=config.penalty, seed=seed
        )

    def decisions(self, policy: SlatePolicy, *, seed: int) -> LoggedDecisions:
        """The log with a policy's probabilities as the target; units are users.

        The reward model's value of the policy is that of slates that the policy draws itself, one for each visit.

        Args:
            policy: to be judged.
            seed: of those slates.
        """
        log, fitted = self.log, self.fitted
        arrays = (log.user, log.record, log.kind, log.items, fitted.predicted, fitted.position_factor)
        kinds, key = jnp.asarray(self._pool.item_kind), jax.random.key(seed)
        parts, size = [], min(_VISITS_AT_ONCE, len(log))
        for start in range(0, len(log), size):
            # The last part is filled up with its own rows again: one shape, one program.
            rows = np.resize(np.arange(start, min(start + size, len(log))), size)
            chunk = [_on_device(array[rows]) for array in arrays]
            parts.append(jax.device_get(_target(jax.random.fold_in(key, start), policy, kinds, *chunk)))
        target, values = (np.concatenate(found)[: len(log)].astype(np.float64) for found in zip(*parts, strict=True))
        shown = np.take_along_axis(fitted.predicted, log.items, axis=1) * fitted.position_factor
        return LoggedDecisions(
            rewards=self.rewards.ravel(),
            propensities=np.cumprod(log.propensities, axis=1).ravel(),
            # Of float32: a sum of probabilities may exceed 1 by its rounding.
            target_probabilities=np.cumprod(np.minimum(target, 1.0), axis=1).ravel(),
            units=np.repeat(log.user, log.items.shape[1]),
            predicted_rewards=shown.astype(np.float64).ravel(),
            predicted_values=values.ravel(),
        )

    def learn(
        self, parameters: PolicyParameters, config: LearningConfig, *, seed: int
    ) -> tuple[PolicyParameters, Float[np.ndarray, "steps"]]:
        """A policy learned from these visits, by the gradient that the configuration names.

        Args:
            parameters: to begin with, those of the policy that wrote the log.
            config: see :class:`~mmei_jax.feedback.learning.LearningConfig`.
            seed: of the batches.

        Returns:
            The parameters, and the objective before each step.
        """
        log = self.log
        slates = LoggedSlates(
            states=jnp.asarray(self._pool.user_embedding[log.record]),
            is_allowed=jnp.asarray(self._pool.item_kind[None] == log.kind[:, None]),
            items=jnp.asarray(log.items, jnp.int32),
            propensities=jnp.asarray(log.propensities, jnp.float32),
            rewards=jnp.asarray(self.rewards, jnp.float32),
            predicted=jnp.asarray(self.fitted.predicted),
            position_factor=jnp.asarray(self.fitted.position_factor),
        )
        items = jnp.asarray(self._pool.item_embedding)
        learned, objectives = learn_policy(parameters, items, slates, config, seed=seed)
        return learned, np.asarray(objectives)


def _on_device(array: np.ndarray) -> Array:
    return jnp.asarray(array, jnp.float32 if array.dtype.kind == "f" else jnp.int32)


@jax.jit
def _target(
    key: Array,
    policy: SlatePolicy,
    item_kind: Array,
    user: Array,
    record: Array,
    kind: Array,
    items: Array,
    predicted: Array,
    position_factor: Array,
) -> tuple[Array, Array]:
    """Probabilities of the logged items, and what the model expects at each position of slates of the policy's own."""
    scores, allowed = policy.scores(user, record), item_kind[None] == kind[:, None]
    options = {"temperature": policy.temperature, "uniform_share": policy.uniform_share}
    logits = jnp.where(allowed, scores / policy.temperature, -jnp.inf)

    def place(carry: tuple[Array, Array], inputs: tuple[Array, Array]) -> tuple[tuple[Array, Array], Array]:
        key, factor = inputs
        probability = next_probabilities(*carry, policy.uniform_share)
        item = jax.random.categorical(key, jnp.log(probability))
        return without(item, *carry), (probability * predicted).sum(axis=-1) * factor

    keys = jax.random.split(key, items.shape[1])
    _, values = jax.lax.scan(place, (logits, allowed), (keys, position_factor.T))
    return slate_propensities(scores, allowed, items, **options), values.T
