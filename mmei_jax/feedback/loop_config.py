"""The configuration of the feedback loop; ``configs/feedback.py`` explains every key and holds its value."""

import dataclasses
import typing
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Int

from mmei_jax.config_values import build, require
from mmei_jax.feedback.environment import EnvironmentConfig
from mmei_jax.feedback.gate import GateConfig
from mmei_jax.feedback.learning import LearningConfig, RewardConfig
from mmei_jax.simulation.aigc_int import KINDS


@dataclass(frozen=True)
class PoolConfig:
    """The trained run, and which of its records users show."""

    run: str
    data: str
    split: Literal["train", "validation"]
    num_records: int


@dataclass(frozen=True)
class VisitsConfig:
    """Who visits how often, and what they are shown."""

    num_users: int
    num_rounds: int
    visits_per_round: int
    slate_size: int
    truth_visits: int


@dataclass(frozen=True)
class PoliciesConfig:
    """Policies beside the learned one; each is a softmax of its scores at its temperature."""

    greedy_temperature: float
    popularity_temperature: float
    behaviour_temperature: float
    behaviour_rank: int
    behaviour_penalties: tuple[float, ...]
    behaviour_sweeps: int
    bandit_temperature: float
    bandit_penalty: float
    bandit_width: float
    thompson_scale: float


@dataclass(frozen=True)
class RewardModelConfig:
    """Cross-fitted reward models."""

    num_folds: int
    penalty: float


@dataclass(frozen=True)
class AbConfig:
    """The comparison at the end."""

    split: Literal["validation", "test"]
    num_visits: int
    num_seeds: int
    num_draws: int
    confidence: float


@dataclass(frozen=True)
class LoopConfig:
    """Everything that a loop depends on, besides the trained run."""

    seed: int
    pool: PoolConfig
    visits: VisitsConfig
    environment: EnvironmentConfig
    policies: PoliciesConfig
    reward: RewardConfig
    reward_model: RewardModelConfig
    learning_share: float
    learning: LearningConfig
    gate: GateConfig
    ab: AbConfig

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready nested dict from which :func:`parse` makes an equal configuration."""
        values = dataclasses.asdict(self)
        values["gate"]["mean_weight_range"] = list(self.gate.mean_weight_range)
        values["policies"]["behaviour_penalties"] = list(self.policies.behaviour_penalties)
        return values


def parse(values: dict[str, Any]) -> LoopConfig:
    """Turns a ConfigDict's ``to_dict()``, or what ``to_json`` gave, into a checked configuration.

    Raises:
        InputError: a key is unknown or missing, a value has the wrong type or is not accepted; names the key.
    """
    config = typing.cast(LoopConfig, build(LoopConfig, values, "config"))
    # Before what joins two keys, which would blame the other one.
    _check_positive(config)
    require(0 <= config.seed < 2**31, "seed", config.seed, "an integer in [0, 2**31)")
    require(0.0 < config.learning_share < 1.0, "learning_share", config.learning_share, "above 0 and below 1")
    require(
        config.learning.uniform_share > 0.0,
        "learning.uniform_share",
        config.learning.uniform_share,
        "above 0: the log of a policy that never tries an item tells nothing of policies that do",
    )
    folds, users = config.reward_model.num_folds, config.visits.num_users
    fewest = round(min(config.learning_share, 1.0 - config.learning_share) * users)
    accepted = f"so many that at least 2 learn and 2 judge (learning_share = {config.learning_share})"
    require(fewest >= 2, "visits.num_users", users, accepted)
    require(
        2 <= folds <= fewest,
        "reward_model.num_folds",
        folds,
        f"from 2 to the {fewest} users of the smaller part (visits.num_users, learning_share)",
    )
    delay, visits = config.environment.rating_delay_visits, config.visits.visits_per_round
    accepted = f"below visits.visits_per_round ({visits}): no rating would arrive for reward.satisfaction"
    is_read = config.reward.satisfaction > 0.0
    require(not is_read or delay < visits, "environment.rating_delay_visits", delay, accepted)
    truth = config.visits.truth_visits
    accepted = (
        f"visits.visits_per_round ({visits}), so that as many ratings arrive for reward.satisfaction as in a round"
    )
    require(not is_read or delay == 0 or truth == visits, "visits.truth_visits", truth, accepted)
    require(
        config.ab.split != config.pool.split,
        "ab.split",
        config.ab.split,
        "another split than pool.split, from whose records the policies learn",
    )
    require(0.5 <= config.ab.confidence < 1.0, "ab.confidence", config.ab.confidence, "at least 0.5 and below 1")
    penalties = config.policies.behaviour_penalties
    accepted = "at least one number above 0"
    require(min(penalties, default=0.0) > 0.0, "policies.behaviour_penalties", penalties, accepted)
    return config


def check_slate_size(config: LoopConfig, item_kind: Int[np.ndarray, "items"]) -> None:
    """Refuses slates that hold more than there is: a visit asks for one kind, and shows no item twice.

    Args:
        config: of the loop.
        item_kind: ``[items]`` kind of each item that may be shown.

    Raises:
        InputError: a kind has fewer items than a slate has places.
    """
    most = int(np.bincount(item_kind, minlength=len(KINDS)).min())
    size = config.visits.slate_size
    require(size <= most, "visits.slate_size", size, f"at most {most}, the items of the pool's smallest kind")


def _check_positive(config: LoopConfig) -> None:
    may_be_zero = {"bandit_width", "thompson_scale", "num_records"}
    for name in ("pool", "visits", "policies", "reward_model", "ab"):
        for key, value in vars(getattr(config, name)).items():
            if not isinstance(value, int | float):
                continue
            is_good = value >= 0 if key in may_be_zero else value > 0
            accepted = "at least 0" if key in may_be_zero else "above 0"
            require(is_good, f"{name}.{key}", value, accepted)
