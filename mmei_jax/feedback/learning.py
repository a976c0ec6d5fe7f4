"""Off-policy learning: a slate policy that is improved on a log which another policy wrote.

Decisions are positions of slates: given the items before it, which item comes next. The policy's scores are inner
products of a state and items, ``(F_u + A F_u) . E_c + b_c``, of which ``A`` and ``b`` are learned: where they are 0,
the policy is the model's own. Its propensities are those of :func:`~mmei_jax.feedback.policies.draw_slates`.

The gradient is that of REINFORCE with clipped importance weights, or its doubly robust form, in which a reward model
takes the greater part. A penalty on the divergence from the logging policy keeps the new one where the log can tell
anything (a trust region).

References:
    Chen et al., "Top-K off-policy correction for a REINFORCE recommender system", WSDM 2019.
    Dudík et al., "Doubly robust policy evaluation and optimization", Statistical Science 2014.
    Swaminathan and Joachims, "Counterfactual risk minimization", ICML 2015.
"""

import functools
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from mmei_jax.config_values import require
from mmei_jax.feedback.policies import next_probabilities, without


@dataclass(frozen=True)
class RewardConfig:
    """What a shown item is worth: a mix of signals, each scaled to [0, 1].

    Attributes:
        dwell: weight of dwell over ``full_dwell_seconds``, at most 1.
        replays: weight of replays over ``full_replays``, at most 1.
        like: weight of a like.
        satisfaction: weight of ``(rating - 1) / 4`` of the slate, for each of its items; 0 where none was given.
        full_dwell_seconds: dwell that counts as 1.
        full_replays: replays that count as 1.
    """

    dwell: float = 0.4
    replays: float = 0.2
    like: float = 0.4
    satisfaction: float = 0.0
    full_dwell_seconds: float = 120.0
    full_replays: float = 3.0

    def __post_init__(self) -> None:
        for name in ("dwell", "replays", "like", "satisfaction"):
            value = getattr(self, name)
            require(value >= 0.0, f"reward.{name}", value, "at least 0")
        for name in ("full_dwell_seconds", "full_replays"):
            value = getattr(self, name)
            require(value > 0.0, f"reward.{name}", value, "above 0")


@functools.partial(jax.jit, static_argnames="config")
def item_rewards(
    dwell_seconds: Float[Array, "slates positions"],
    num_replays: Int[Array, "slates positions"],
    is_liked: Bool[Array, "slates positions"],
    rating: Float[Array, "slates"],
    config: RewardConfig,
) -> Float[Array, "slates positions"]:
    """The reward of every shown item.

    Args:
        dwell_seconds: ``[slates, positions]``.
        num_replays: ``[slates, positions]``.
        is_liked: ``[slates, positions]``.
        rating: ``[slates]`` from 1 to 5; NaN where none was given.
        config: the mix.
    """
    rated = jnp.where(jnp.isnan(rating), 0.0, (rating - 1.0) / 4.0)
    return (
        config.dwell * jnp.minimum(dwell_seconds / config.full_dwell_seconds, 1.0)
        + config.replays * jnp.minimum(num_replays / config.full_replays, 1.0)
        + config.like * is_liked
        + config.satisfaction * rated[:, None]
    )


@struct.dataclass
class PolicyParameters:
    """What is learned.

    Attributes:
        state_map: ``[dim, dim]`` float32, A.
        item_bias: ``[items]`` float32, b.
    """

    state_map: Any
    item_bias: Any

    @classmethod
    def zeros(cls, dim: int, num_items: int) -> "PolicyParameters":
        """The model's own ranking."""
        return cls(state_map=jnp.zeros((dim, dim)), item_bias=jnp.zeros(num_items))


def policy_scores(
    parameters: PolicyParameters, states: Float[Array, "slates dim"], items: Float[Array, "items dim"]
) -> Float[Array, "slates items"]:
    """Scores of the whole catalogue."""
    mapped = states + states @ parameters.state_map.T
    return mapped @ items.T + parameters.item_bias[None]


@struct.dataclass
class LoggedSlates:
    """Slates of a log, as arrays.

    Attributes:
        states: ``[slates, dim]`` float32, F_u when the slate was drawn.
        is_allowed: ``[slates, items]`` bool, what could be shown.
        items: ``[slates, positions]`` int32.
        propensities: ``[slates, positions]`` float32 of the logging policy.
        rewards: ``[slates, positions]`` float32.
        predicted: ``[slates, items]`` float32, a reward model's answer for each item at position 0, which the doubly
            robust gradient alone reads; None without one.
        position_factor: ``[slates, positions]`` float32 by which the model's answers are multiplied at each position;
            None multiplies nothing.
    """

    states: Any
    is_allowed: Any
    items: Any
    propensities: Any
    rewards: Any
    predicted: Any = None
    position_factor: Any = None


@dataclass(frozen=True)
class LearningConfig:
    """How a policy is learned.

    Attributes:
        gradient: "doubly_robust", or "reinforce" without a reward model; weights are clipped in both.
        learning_rate: of Adam.
        num_steps: gradients.
        batch_size: slates of one gradient, drawn anew for each; 0 takes the whole log for all of them.
        largest_weight: at which importance weights are clipped.
        divergence_weight: of the divergence from the logging policy, in rewards per nat.
        temperature: of the policy's softmax.
        uniform_share: of choices that stay uniform.
    """

    gradient: Literal["doubly_robust", "reinforce"] = "doubly_robust"
    learning_rate: float = 0.02
    num_steps: int = 200
    batch_size: int = 0
    largest_weight: float = 5.0
    divergence_weight: float = 0.01
    temperature: float = 0.2
    uniform_share: float = 0.1

    def __post_init__(self) -> None:
        for key, is_good, accepted in (
            ("learning_rate", self.learning_rate > 0.0, "above 0"),
            ("largest_weight", self.largest_weight > 0.0, "above 0"),
            ("temperature", self.temperature > 0.0, "above 0"),
            ("num_steps", self.num_steps >= 1, "at least 1"),
            ("batch_size", self.batch_size >= 0, "at least 0"),
            ("divergence_weight", self.divergence_weight >= 0.0, "at least 0"),
            ("uniform_share", 0.0 <= self.uniform_share <= 1.0, "from 0 to 1"),
        ):
            require(is_good, f"learning.{key}", getattr(self, key), accepted)


def learn_policy(
    parameters: PolicyParameters,
    items: Float[Array, "items dim"],
    logged: LoggedSlates,
    config: LearningConfig,
    *,
    seed: int = 0,
) -> tuple[PolicyParameters, Float[Array, "steps"]]:
    """Improves a policy on a log.

    Args:
        parameters: to begin with.
        items: ``[items, dim]`` E_c.
        logged: the log.
        config: see :class:`LearningConfig`.
        seed: of the slates that are drawn for each gradient.

    Returns:
        The parameters, and the objective before each step.

    Raises:
        InputError: see :func:`objective`.
    """
    found: tuple[PolicyParameters, Array] = _learn(jax.random.key(seed), parameters, items, logged, config)
    return found


@functools.partial(jax.jit, static_argnames="config")
def _learn(
    key: Array, parameters: PolicyParameters, items: Array, logged: LoggedSlates, config: LearningConfig
) -> tuple[PolicyParameters, Array]:
    optimizer = optax.adam(config.learning_rate)
    num_slates = logged.items.shape[0]
    logged = jax.tree.map(jnp.asarray, logged)

    def step(carry: tuple[Any, Any], key: Array) -> tuple[Any, Array]:
        parameters, state = carry
        drawn = logged
        if config.batch_size:
            rows = jax.random.randint(key, (config.batch_size,), 0, num_slates)
            drawn = jax.tree.map(lambda leaf: leaf[rows], logged)
        loss, gradient = jax.value_and_grad(lambda each: -objective(each, items, drawn, config))(parameters)
        updates, state = optimizer.update(gradient, state, parameters)
        return (optax.apply_updates(parameters, updates), state), -loss

    start = (parameters, optimizer.init(parameters))
    (learned, _), objectives = lax.scan(step, start, jax.random.split(key, config.num_steps))
    return learned, objectives


def objective(
    parameters: PolicyParameters, items: Float[Array, "items dim"], logged: LoggedSlates, config: LearningConfig
) -> Float[Array, ""]:
    """A surrogate whose gradient is that of the policy's mean reward per item, less the penalty on its divergence.

    Of the importance-weighted part, the weights are constants and the logarithm of the policy has the gradient, so that
    a clipped weight still pulls.

    Raises:
        InputError: the gradient reads a reward model that is not there.
    """
    has_model = config.gradient == "doubly_robust"
    has_rewards = not has_model or logged.predicted is not None
    require(has_rewards, "learning.gradient", config.gradient, "predicted rewards of the reward model that it reads")
    logged = jax.tree.map(jnp.asarray, logged)
    scores = policy_scores(parameters, logged.states, items) / config.temperature
    logits = jnp.where(logged.is_allowed, scores, -jnp.inf)
    num_slates, num_positions = logged.items.shape
    factors = jnp.ones((num_slates, num_positions)) if logged.position_factor is None else logged.position_factor

    def place(carry: tuple[Array, Array], position: Array) -> tuple[Any, tuple[Array, Array, Array]]:
        item = logged.items[:, position]
        probability = next_probabilities(*carry, config.uniform_share)
        chosen = jnp.take_along_axis(probability, item[:, None], axis=1)[:, 0]
        if not has_model:
            model_value = model_reward = jnp.zeros(num_slates)
        else:
            factor = factors[:, position]
            model_value = (probability * logged.predicted).sum(axis=-1) * factor
            model_reward = jnp.take_along_axis(logged.predicted, item[:, None], axis=1)[:, 0] * factor
        return without(item, *carry), (jnp.log(chosen), model_value, logged.rewards[:, position] - model_reward)

    _, (log_chosen, values, rest) = lax.scan(place, (logits, logged.is_allowed), jnp.arange(num_positions))
    log_logging = jnp.log(logged.propensities).T
    weights = lax.stop_gradient(jnp.minimum(jnp.exp(log_chosen - log_logging), config.largest_weight))
    divergence = (log_logging - log_chosen).mean()
    gained: Array = (values + weights * rest * log_chosen).mean() - config.divergence_weight * divergence
    return gained
