"""The feedback loop on simulated users: log, learn, evaluate off-policy, gate, deploy, again.

A round's folder of the log, its state and its result are written in this order, the result last: a round without a
result is made again from the state before it, and comes out the same. So a loop that was killed goes on as if nothing
had happened.
"""

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jaxtyping import Array, Bool, Float

from mmei_jax.feedback.environment import Users, World, new_users
from mmei_jax.feedback.estimators import LoggedDecisions, estimate
from mmei_jax.feedback.gate import judge
from mmei_jax.feedback.impressions import read_visits, visits_to_impressions, visits_to_log
from mmei_jax.feedback.learning import PolicyParameters, item_rewards
from mmei_jax.feedback.log import FeedbackWriter
from mmei_jax.feedback.logged_visits import LoggedVisits, join_visits
from mmei_jax.feedback.loop_config import LoopConfig, check_slate_size
from mmei_jax.feedback.off_policy import LoggedRewards, visit_rewards
from mmei_jax.feedback.segment_hashes import check_hashes, write_hashes
from mmei_jax.feedback.slate_policies import NamedPolicy, PolicyMaker, Pool, SlatePolicy
from mmei_jax.feedback.visits import Visits, visit
from mmei_jax.fingerprints import check_hash
from mmei_jax.types import InputError
from mmei_jax.workdir import read_json, write_bytes, write_json

# The policy that writes the first log, and those that are learned from it.
FIRST, LEARNED = "mmei_softmax", "mmei_learned"
# What a round draws, each from a key of its own.
_LOG, _TRUTH = 0, 1


@dataclass(frozen=True)
class LoopState:
    """Where a loop stands between two rounds.

    Attributes:
        next_round: from 0.
        users: at their next visit.
        current: the deployed policy.
    """

    next_round: int
    users: Users
    current: NamedPolicy


class FeedbackLoop:
    """The rounds of one loop.

    Args:
        config: of the loop.
        pool: what policies may read.
        world: of the simulation, whose users show the pool's records.
        workdir: where log, states and results go; rounds that are there already are not made again.
        tell: is told a line about what comes next, and what came of it.
        check: is called between steps; what it raises ends the loop there, which goes on from its last whole round.

    Raises:
        InputError: slates are larger than a kind of the pool, or a file of an earlier round is missing, damaged or
            changed since.
    """

    def __init__(
        self,
        config: LoopConfig,
        pool: Pool,
        world: World,
        workdir: Path,
        *,
        tell: Callable[[str], None] = lambda line: None,
        check: Callable[[], None] = lambda: None,
    ):
        check_slate_size(config, pool.item_kind)
        self.config, self.pool, self.world, self.workdir = config, pool, world, workdir
        self.maker = PolicyMaker(pool, config.visits.num_users, config.policies, config.learning.uniform_share)
        self._tell, self._check = tell, check
        self._key = jax.random.key(config.seed)
        self.results: list[dict[str, Any]] = []
        while self._result_path(len(self.results)).exists():
            self.results.append(read_json(self._result_path(len(self.results)), "the result of a round"))
        for number in range(len(self.results)):
            check_hashes(self._log_folder(number))
        self.state = self._restore() if self.results else self._begin()

    def run(self) -> None:
        """Makes the rounds that are missing."""
        while self.state.next_round < self.config.visits.num_rounds:
            result = self._round()
            self.results.append(result)
            self._tell_of_round(result["round"], describe(result))

    def _tell_of_round(self, number: int, said: str) -> None:
        self._check()
        self._tell(f"round {number + 1} of {self.config.visits.num_rounds}: {said}")

    def logged(self, round_number: int) -> LoggedVisits:
        """What the log holds of a round.

        Raises:
            InputError: it is missing, damaged, or changed since.
        """
        check_hashes(self._log_folder(round_number))
        return read_visits(
            self._log_folder(round_number),
            self.pool.item_ids,
            num_users=self.config.visits.num_users,
            num_records=len(self.pool.user_embedding),
        )

    def true_reward(
        self, key: Array, users: Users, policy: SlatePolicy, is_counted: Bool[np.ndarray, "users"] | None = None
    ) -> tuple[float, float]:
        """What a policy earns per shown item in the simulator, and the standard error of that.

        Args:
            key: of the visits; the same one for policies that are compared.
            users: at their next visit.
            policy: any.
            is_counted: whose visits count; None counts all.
        """
        config = self.config
        _, visits = self._visit(key, users, policy, config.visits.truth_visits)
        by_user = _rewards(visits, config).mean(axis=(0, 2))
        by_user = by_user if is_counted is None else by_user[is_counted]
        return float(by_user.mean()), float(by_user.std(ddof=1) / len(by_user) ** 0.5)

    def behaviour_history(self) -> NamedPolicy:
        """What a system that reads behaviour alone knows after as many visits of the same users.

        It fills their slates itself, uniformly at first, and factorises its own clicks after each round. Clicks of this
        loop's log would mislead it: there an item was shown to those whom it suits.
        """
        config, users, logs = self.config, self._new_users(), []
        policy = self.maker.uniform()
        for number in range(config.visits.num_rounds):
            self._check()
            key = jax.random.fold_in(jax.random.fold_in(self._key, 1 + number), _LOG)
            users, visits = self._visit(key, users, policy, config.visits.visits_per_round)
            logs.append(visits_to_log(jax.device_get(visits)))
            policy = self.maker.behaviour_only(join_visits(logs), seed=config.seed)
        return NamedPolicy("behaviour_only", config.visits.num_rounds, policy)

    def _new_users(self) -> Users:
        config = self.config
        return new_users(jax.random.fold_in(self._key, 0), self.world, config.visits.num_users, config.environment)

    def _visit(self, key: Array, users: Users, policy: SlatePolicy, num_visits: int) -> tuple[Users, Visits]:
        config = self.config
        return visit(
            key,
            self.world,
            users,
            policy,
            num_visits=num_visits,
            slate_size=config.visits.slate_size,
            config=config.environment,
        )

    def _begin(self) -> LoopState:
        config, users = self.config, self._new_users()
        parameters = PolicyParameters.zeros(self.pool.user_embedding.shape[1], len(self.pool.item_ids))
        policy = self.maker.model(parameters, config.learning.temperature)
        return LoopState(0, users, NamedPolicy(FIRST, 0, policy, parameters))

    def learning_visits(self, number: int) -> list[LoggedVisits]:
        """The visits that may teach a candidate of a round: those of the learners, of this and each earlier round."""
        logs = [self.logged(round_number) for round_number in range(number + 1)]
        return [log.where(self._is_learner()[log.user]) for log in logs]

    def judging_visits(self, number: int) -> LoggedVisits:
        """The visits that judge a round's candidates: of users none of whose visits ever taught one."""
        log = self.logged(number)
        return log.where(~self._is_learner()[log.user])

    def _is_learner(self) -> np.ndarray:
        """``[users]`` bool, the same in every round: tastes persist, so that a learner's later visits are not new."""
        num_users = self.config.visits.num_users
        return np.random.default_rng(self.config.seed).permutation(num_users) < round(
            self.config.learning_share * num_users
        )

    def _round(self) -> dict[str, Any]:
        config, number, current = self.config, self.state.next_round, self.state.current
        key = jax.random.fold_in(self._key, 1 + number)
        shown = f"{config.visits.visits_per_round} visits of {config.visits.num_users:,} simulated users"
        self._tell_of_round(number, f"{current.label} fills the slates of {shown}")
        later = self._write_log(jax.random.fold_in(key, _LOG))
        judging, (*earlier, this) = self.judging_visits(number), self.learning_visits(number)
        of_current = [
            log for log, result in zip(earlier, self.results, strict=True) if result["policy"] == current.label
        ]
        learning = join_visits([*of_current, this])
        self._tell_of_round(number, f"learning from {len(learning):,} visits")
        seed = _seed(config.seed, number)
        log = LoggedRewards(self.pool, learning, visit_rewards(learning, config.reward), config.reward_model, seed=seed)
        candidates, objectives = self._candidates(log, [*earlier, this], seed)
        self._tell_of_round(number, f"judging {len(candidates)} policies on {len(judging):,} visits of other users")
        judged = LoggedRewards(
            self.pool, judging, visit_rewards(judging, config.reward), config.reward_model, seed=seed
        )
        truth_key = jax.random.fold_in(key, _TRUTH)

        def truth(policy: SlatePolicy) -> dict[str, float]:
            value, error = self.true_reward(truth_key, self.state.users, policy, ~self._is_learner())
            return {"value": value, "standard_error": error}

        findings = []
        for candidate in candidates:
            self._check()
            decisions = judged.decisions(candidate.policy, seed=seed)
            findings.append(self._finding(candidate, decisions, truth(candidate.policy)))
        learned = candidates[0]
        is_promoted = findings[0]["gate"]["is_promoted"]
        deployed = learned if is_promoted else current
        ones, units = np.ones(judged.rewards.size), np.repeat(judging.user, judging.items.shape[1])
        on_policy = LoggedDecisions(judged.rewards.ravel(), ones, ones, units)
        value = estimate(on_policy, ["ips"], num_draws=config.gate.num_draws, seed=config.gate.seed)["ips"]
        result = {
            "round": number,
            "policy": current.label,
            "num_impressions": len(this) + len(judging),
            "num_learning_visits": len(learning),
            "num_judging_visits": len(judging),
            "current": {
                "logged": {"value": value.value, "low": value.low, "high": value.high},
                "truth": truth(current.policy),
            },
            "objective": {"first": float(objectives[0]), "last": float(objectives[-1])},
            "candidates": findings,
            "deployed": deployed.label,
        }
        self.state = LoopState(number + 1, later, deployed)
        self._save(result)
        return result

    def _write_log(self, key: Array) -> Users:
        """The round's visits, logged; gives the users after them."""
        config, number, current = self.config, self.state.next_round, self.state.current
        folder = self._log_folder(number)
        # Of a round that was killed before its result.
        shutil.rmtree(folder, ignore_errors=True)
        later, visits = self._visit(key, self.state.users, current.policy, config.visits.visits_per_round)
        tables = visits_to_impressions(
            jax.device_get(visits), self.pool.item_ids, round_number=number, policy_version=current.label
        )
        with FeedbackWriter(folder, known_items=self.pool.item_ids) as writer:
            for table in tables:
                writer.append(table)
        write_hashes(folder)
        return later

    def _candidates(
        self, log: LoggedRewards, behaviour: list[LoggedVisits], seed: int
    ) -> tuple[list[NamedPolicy], Float[np.ndarray, "steps"]]:
        """The learned policy first, which alone may be deployed; the others stand beside it."""
        config, current, maker = self.config, self.state.current, self.maker
        if current.parameters is None:
            raise ValueError(f"policy {current.label} has no parameters to learn")
        version = self.state.next_round + 1
        parameters, objectives = log.learn(current.parameters, config.learning, seed=seed)
        zeros = PolicyParameters.zeros(self.pool.user_embedding.shape[1], len(self.pool.item_ids))
        past = join_visits(behaviour)
        others = {
            FIRST: maker.model(zeros, config.learning.temperature),
            "mmei_greedy": maker.model(zeros, config.policies.greedy_temperature, 0.0),
            **maker.bandits(log.log, log.rewards, seed=seed),
            "behaviour_only": maker.behaviour_only(past, seed=seed),
            "popularity": maker.popularity(past),
            "uniform": maker.uniform(),
        }
        learned = NamedPolicy(LEARNED, version, maker.model(parameters, config.learning.temperature), parameters)
        return [learned, *(NamedPolicy(name, version, policy) for name, policy in others.items())], objectives

    def _finding(self, candidate: NamedPolicy, decisions: LoggedDecisions, truth: dict[str, float]) -> dict[str, Any]:
        gate = self.config.gate
        verdict = judge(decisions, gate)
        found = estimate(decisions, largest_weight=gate.largest_weight, num_draws=gate.num_draws, seed=gate.seed)
        return {
            "name": candidate.name,
            "policy": candidate.label,
            "may_be_deployed": candidate.parameters is not None,
            "estimates": {
                name: {"value": _finite(one.value), "low": _finite(one.low), "high": _finite(one.high)}
                for name, one in found.items()
            },
            "overlap": asdict(verdict.overlap),
            "gate": {
                "is_promoted": verdict.is_promoted,
                "reason": verdict.reason,
                "gain": _finite(verdict.gain),
                "low": _finite(verdict.low),
            },
            "truth": truth,
        }

    def _save(self, result: dict[str, Any]) -> None:
        """State first; last the result, with the hash of the state."""
        state, parameters = self.state, self.state.current.parameters
        arrays = {f"users.{name}": np.asarray(value) for name, value in vars(state.users).items()}
        arrays |= {f"policy.{name}": np.asarray(value) for name, value in vars(parameters).items()}
        number = result["round"]
        content = safetensors.numpy.save(arrays)
        result["state_sha256"] = hashlib.sha256(content).hexdigest()
        write_bytes(self._state_path(number), content)
        write_json(self._result_path(number), result)

    def _restore(self) -> LoopState:
        number = len(self.results) - 1
        path = self._state_path(number)
        name, version = self._deployed()
        begun = self._begin()
        try:
            check_hash(path, self.results[-1]["state_sha256"], self._result_path(number).name)
            arrays = safetensors.numpy.load(path.read_bytes())
            users = Users(**_like(begun.users, arrays, "users"))
            parameters = PolicyParameters(**_like(begun.current.parameters, arrays, "policy"))
        except InputError:
            raise
        except (OSError, KeyError, ValueError, safetensors.SafetensorError) as error:
            raise InputError(f"{path}: expected the state after a round: {error}") from error
        policy = self.maker.model(parameters, self.config.learning.temperature)
        return LoopState(number + 1, users, NamedPolicy(name, version, policy, parameters))

    def _deployed(self) -> tuple[str, int]:
        """Name and version of what the last round deployed.

        Raises:
            InputError: a round's result is damaged.
        """
        for number, result in enumerate(self.results):
            is_result = isinstance(result, dict) and result.get("round") == number and "state_sha256" in result
            name, _, version = str(result.get("deployed", "")).rpartition("-") if is_result else ("", "", "")
            if name not in (FIRST, LEARNED) or not version.isdigit():
                raise InputError(f"{self._result_path(number)}: expected the result of round {number}")
        return name, int(version)

    def _log_folder(self, number: int) -> Path:
        return self.workdir / "log" / f"round_{number:04d}"

    def _state_path(self, number: int) -> Path:
        return self.workdir / "rounds" / f"round_{number:04d}.safetensors"

    def _result_path(self, number: int) -> Path:
        return self.workdir / "rounds" / f"round_{number:04d}.json"


def describe(result: dict[str, Any]) -> str:
    """One line on a round."""
    learned = result["candidates"][0]
    truth = learned["truth"]["value"] - result["current"]["truth"]["value"]
    said = f"{learned['policy']} {learned['gate']['reason']} (true simulated gain {truth:+.4f})"
    return f"{said}; deployed: {result['deployed']}"


def _rewards(visits: Visits, config: LoopConfig) -> Float[np.ndarray, "visits users slate"]:
    shape = visits.items.shape
    flat = [part.reshape(-1, shape[-1]) for part in (visits.dwell_seconds, visits.num_replays, visits.is_liked)]
    return np.asarray(item_rewards(*flat, visits.rating.reshape(-1), config.reward), np.float64).reshape(shape)


def _seed(seed: int, number: int) -> int:
    """Of a round's host draws, apart from those of the rounds of other seeds."""
    return int(np.random.SeedSequence((seed, number)).generate_state(1)[0]) % 2**31


def _like(known: Any, arrays: dict[str, np.ndarray], group: str) -> dict[str, Array]:
    """The arrays of a group, on the device, by the fields of a dataclass with such arrays.

    Raises:
        KeyError: one is missing.
        ValueError: one has another shape.
    """
    found = {}
    for name, like in vars(known).items():
        values = arrays[f"{group}.{name}"]
        if values.shape != like.shape:
            raise ValueError(f"{group}.{name} of shape {values.shape}, expected {like.shape}")
        found[name] = jnp.asarray(values)
    return found


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
