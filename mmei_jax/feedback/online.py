"""An A/B of policies on the same simulated users: engagement, satisfaction, and whether a placebo keeps the uplift."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from mmei_jax.feedback.environment import EnvironmentConfig, Users, World
from mmei_jax.feedback.loop_config import AbConfig
from mmei_jax.feedback.slate_policies import NamedPolicy
from mmei_jax.feedback.visits import Visits, visit

# The arm that the others are compared with, the one that is compared, and its placebo: the same policy, which reads the
# record of another user of the same visit.
CONTROL, TREATMENT, PLACEBO = "behaviour_only", "emotion_driven", "placebo"
# Seconds that a visit holds a user, the hidden mean expected satisfaction with what was shown (1 to 5), and the mean of
# the ratings that were given (1 to 5).
METRICS = ("dwell_seconds", "satisfaction", "rating")


@dataclass(frozen=True)
class ArmTotals:
    """What an arm's users did, by metric.

    Attributes:
        totals: by metric, ``[seeds, users]`` sums over visits.
        counts: by metric, ``[seeds, users]`` visits that they are of.
    """

    totals: dict[str, Float[np.ndarray, "seeds users"]]
    counts: dict[str, Float[np.ndarray, "seeds users"]]


def compare(
    key: jax.Array,
    world: World,
    users: Users,
    behaviour: NamedPolicy,
    emotion: NamedPolicy,
    *,
    slate_size: int,
    environment: EnvironmentConfig,
    config: AbConfig,
    tell: Callable[[str], None] = lambda line: None,
    check: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Runs the arms, and says how they differ.

    Arms share users, and within a seed also moods, records and chances. Intervals are of a bootstrap that draws users
    and seeds anew, the same for all arms.

    Args:
        key: of the visits.
        world: of the simulation.
        users: at their next visit, the same for every arm and seed.
        behaviour: the policy of the control arm.
        emotion: of the treatment and its placebo.
        slate_size: items of a slate.
        environment: of the users.
        config: visits, seeds, draws.
        tell: is told a line about each arm.
        check: is called between visits of two seeds; what it raises ends the comparison.

    Returns:
        JSON values: ``arms`` (each metric with its interval), ``uplift`` over the control (relative, with intervals,
        and by seed), and ``placebo_loses_uplift`` by metric.
    """
    policies = {CONTROL: behaviour, TREATMENT: emotion, PLACEBO: emotion}
    arms: dict[str, ArmTotals] = {}
    for name, named in policies.items():
        parts = []
        for seed in range(config.num_seeds):
            check()
            _, visits = visit(
                jax.random.fold_in(key, seed),
                world,
                users,
                named.policy,
                num_visits=config.num_visits,
                slate_size=slate_size,
                config=environment,
                is_placebo=name == PLACEBO,
            )
            parts.append(_totals(jax.device_get(visits)))
        arms[name] = _stack(parts)
        levels = {metric: arms[name].totals[metric].sum() / arms[name].counts[metric].sum() for metric in METRICS[:2]}
        tell(
            f"A/B, {name} ({named.label}): {levels['dwell_seconds']:.1f} s per visit, satisfaction "
            f"{levels['satisfaction']:.3f} (simulated)"
        )
    return {
        "is_simulated": True,
        "control": CONTROL,
        "policies": {name: named.label for name, named in policies.items()},
        "num_users": int(users.record.shape[0]),
        "num_visits": config.num_visits,
        "num_seeds": config.num_seeds,
        "confidence": config.confidence,
        **summarise(arms, config),
    }


def summarise(arms: Mapping[str, ArmTotals], config: AbConfig, *, seed: int = 0) -> dict[str, Any]:
    """Levels and uplifts with intervals.

    Args:
        arms: by name, with the control among them.
        config: draws and confidence.
        seed: of the draws.
    """
    generator = np.random.default_rng(seed)
    num_seeds, num_users = arms[CONTROL].totals[METRICS[0]].shape

    def times(size: int) -> np.ndarray:
        """How often each is drawn: first as it is, then anew."""
        drawn = generator.multinomial(size, np.full(size, 1.0 / size), size=config.num_draws)
        return np.concatenate([np.ones((1, size)), drawn])

    users, seeds = times(num_users), times(num_seeds)
    tail = (1.0 - config.confidence) / 2.0

    def bounded(draws: np.ndarray) -> dict[str, float | None]:
        known = draws[1:][np.isfinite(draws[1:])]
        low, high = np.quantile(known, [tail, 1.0 - tail]) if len(known) else (np.nan, np.nan)
        named = {"value": draws[0], "low": low, "high": high}
        return {name: float(value) if np.isfinite(value) else None for name, value in named.items()}

    def drawn_mean(arm: ArmTotals, metric: str) -> np.ndarray:
        sums = ((users @ arm.totals[metric].T) * seeds).sum(axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            found: np.ndarray = sums / ((users @ arm.counts[metric].T) * seeds).sum(axis=1)
        return found

    means = {name: {metric: drawn_mean(arm, metric) for metric in METRICS} for name, arm in arms.items()}
    uplift: dict[str, Any] = {}
    for name, found in means.items():
        if name != CONTROL:
            uplift[name] = {
                metric: {
                    **bounded(found[metric] / means[CONTROL][metric] - 1.0),
                    "by_seed": _by_seed(arms[name], arms[CONTROL], metric),
                }
                for metric in METRICS
            }
    return {
        "arms": {name: {metric: bounded(draws) for metric, draws in found.items()} for name, found in means.items()},
        "uplift": uplift,
        "placebo_loses_uplift": {
            metric: _is_lost(uplift[TREATMENT][metric], uplift[PLACEBO][metric]) for metric in METRICS
        },
    }


def _is_lost(treatment: Mapping[str, Any], placebo: Mapping[str, Any]) -> bool:
    """Whether the treatment has an uplift beyond doubt, and its placebo none, nor one near it."""
    if None in (treatment["low"], placebo["low"], placebo["high"]):
        return False
    return bool(treatment["low"] > 0.0 >= placebo["low"] and placebo["high"] < treatment["low"])


def _by_seed(arm: ArmTotals, control: ArmTotals, metric: str) -> list[float | None]:
    with np.errstate(divide="ignore", invalid="ignore"):
        ours, theirs = (each.totals[metric].sum(axis=1) / each.counts[metric].sum(axis=1) for each in (arm, control))
        found = ours / theirs - 1.0
    return [float(value) if np.isfinite(value) else None for value in found]


def _totals(visits: Visits) -> ArmTotals:
    """Of one seed: ``[users]`` sums over visits."""
    has_rating = np.isfinite(visits.rating)
    values = {
        "dwell_seconds": visits.dwell_seconds.sum(axis=2, dtype=np.float64),
        "satisfaction": np.asarray(visits.satisfaction, np.float64),
        "rating": np.where(has_rating, visits.rating, 0.0).astype(np.float64),
    }
    ones = np.ones(has_rating.shape)
    counts = {"dwell_seconds": ones, "satisfaction": ones, "rating": has_rating.astype(np.float64)}
    return ArmTotals(
        {name: value.sum(axis=0)[None] for name, value in values.items()},
        {name: count.sum(axis=0)[None] for name, count in counts.items()},
    )


def _stack(parts: list[ArmTotals]) -> ArmTotals:
    return ArmTotals(
        {name: np.concatenate([part.totals[name] for part in parts]) for name in METRICS},
        {name: np.concatenate([part.counts[name] for part in parts]) for name in METRICS},
    )
