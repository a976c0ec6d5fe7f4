"""The feedback loop on simulated users, from a trained run to an A/B with a report.

Command, after ``make train``::

    python -m mmei_jax.feedback.run --config=configs/feedback.py --workdir=runs/feedback

A policy of the trained model fills slates and logs them; a better one is learned from the log, judged on the visits of
other users, and deployed where a gate lets it. After the last round it is compared with a policy of behaviour alone,
and with a placebo of itself. Users, their moods and their reactions are simulated
(:mod:`mmei_jax.feedback.environment`). The same command goes on where a loop was stopped, by SIGTERM or Ctrl-C too.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mmei_jax.feedback.environment import new_visit
from mmei_jax.feedback.loop import FeedbackLoop
from mmei_jax.feedback.loop_config import LoopConfig, parse
from mmei_jax.feedback.online import compare
from mmei_jax.feedback.pools import Pools, has_pools, load_pools, read_pools, write_pools
from mmei_jax.feedback.slate_policies import PolicyMaker, SlatePolicy
from mmei_jax.reports.feedback_report import uplift_lines, write_feedback_report
from mmei_jax.types import InputError
from mmei_jax.workdir import StopRequest, locked, read_json, write_json

ROUNDS_NAME, AB_NAME = "rounds.json", "ab.json"
_CONFIG_NAME = "config.json"
# Of the A/B's visits, apart from the rounds'.
_AB_KEY = 2**31 - 1


def read_loop_config(values: dict[str, Any], workdir: Path) -> LoopConfig:
    """The checked configuration of a loop that begins in a folder, or goes on there.

    Args:
        values: of the configuration file and the flags.
        workdir: of the loop.

    Raises:
        InputError: see :func:`~mmei_jax.feedback.loop_config.parse`.
    """
    try:
        return parse(values)
    except InputError as error:
        if not (workdir / _CONFIG_NAME).exists():
            raise
        # Else who mends the value is told next that it is not the loop's.
        said = (
            f"the loop in {workdir} goes on with its own configuration alone, so that another needs another --workdir"
        )
        raise InputError(f"{error}; {said}") from error


def run_loop(
    config: LoopConfig,
    workdir: Path,
    *,
    command: str,
    tell: Callable[[str], None] = lambda line: None,
    stop: StopRequest | None = None,
) -> Path:
    """Makes the rounds and the comparison that are missing, and the report.

    Writes ``log/`` (:mod:`mmei_jax.feedback.log`), ``rounds/`` (state and result of each), ``rounds.json``,
    ``ab.json`` and ``report/``. The same configuration and run give the same files, but for the names of the log's.

    Args:
        config: of the loop.
        workdir: of the loop.
        command: the command line, to be shown in the report.
        tell: is told a line about each step.
        stop: becomes true when the loop shall end; asked between steps, which take seconds. A round that is not whole
            then is made again by the next call.

    Returns:
        The report's folder.

    Raises:
        InputError: the run, its data, or an earlier loop in the folder cannot be used.
        Stopped: ``stop`` became true.
    """
    # Not `or`: a request is false until a signal comes.
    stop = StopRequest() if stop is None else stop
    with locked(workdir):
        _check_config(config, workdir)
        if not has_pools(workdir):
            tell(
                f"reading {config.pool.run}: the users' side of its {config.pool.split} splits for the rounds and of "
                f"its {config.ab.split} splits for the A/B, and the catalogue"
            )
            read = read_pools(config)
            stop.check()
            # Before the pools: they are of no other configuration's run.
            write_json(workdir / _CONFIG_NAME, config.to_json())
            if write_pools(workdir, *read):
                tell("pool: its file was missing and is made again, the same as pool.json notes")
        pools = load_pools(workdir)
        source = pools.source
        tell(
            f"pool: {source['num_records']:,} records for the rounds and {source['ab_num_records']:,} for the A/B, "
            f"{len(pools.rounds.item_ids):,} items, as the model of step {source['checkpoint_step']} reads them"
        )
        loop = FeedbackLoop(config, pools.rounds, pools.rounds_world, workdir, tell=tell, check=stop.check)
        if loop.results:
            tell(f"going on after round {len(loop.results)}")
        loop.run()
        write_json(
            workdir / ROUNDS_NAME,
            {"is_simulated": True, "source": source, "config": config.to_json(), "rounds": loop.results},
        )
        if not (workdir / AB_NAME).exists():
            found = _compare(loop, pools, tell=tell, check=stop.check)
            write_json(workdir / AB_NAME, {**found, "source": source})
        ab = read_json(workdir / AB_NAME, "the comparison of an earlier loop")
        for line in uplift_lines(ab):
            tell(f"simulated: {line}")
        return write_feedback_report(workdir, read_json(workdir / ROUNDS_NAME), ab, command=command)


def _compare(
    loop: FeedbackLoop,
    pools: Pools,
    *,
    tell: Callable[[str], None] = lambda line: None,
    check: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """The A/B, on records of its own."""
    config, current = loop.config, loop.state.current
    num_visits = config.visits.num_rounds * config.visits.visits_per_round
    tell(f"A/B: behaviour_only fills {num_visits} slates of each simulated user, and learns from their clicks")
    behaviour = loop.behaviour_history()
    tell(f"A/B: 3 arms, {config.ab.num_seeds} seeds of {config.ab.num_visits} visits of each user")
    if current.parameters is None:
        raise ValueError(f"policy {current.label} has no parameters")
    maker = PolicyMaker(pools.ab, config.visits.num_users, config.policies, config.learning.uniform_share)
    key = jax.random.fold_in(jax.random.key(config.seed), _AB_KEY)
    found = compare(
        key,
        pools.ab_world,
        # The same people; what they were about to show is of the other records.
        new_visit(jax.random.fold_in(key, _AB_KEY), pools.ab_world, loop.state.users),
        replace(behaviour, policy=maker.without_records(behaviour.policy)),
        replace(current, policy=maker.model(current.parameters, config.learning.temperature)),
        slate_size=config.visits.slate_size,
        environment=config.environment,
        config=config.ab,
        tell=tell,
        check=check,
    )
    return {**found, "control_knows": _deviations(behaviour.policy)}


def _deviations(policy: SlatePolicy) -> dict[str, float]:
    """Of predicted click rates: how far items differ, and, root mean square, how far users differ from their mean."""
    # The last factor is the item's rate, the same for all users.
    users, items = (np.asarray(part, np.float64) for part in (policy.user_factors, policy.item_factors))
    products = (users[:, :-1].T @ users[:, :-1]) * (items[:, :-1].T @ items[:, :-1])
    personal = float(np.sqrt(max(products.sum(), 0.0) / (len(users) * len(items))))
    return {"items": float(items[:, -1].std()), "users": personal}


def _check_config(config: LoopConfig, workdir: Path) -> None:
    """Compares the configuration with the one that is there.

    Raises:
        InputError: it is another one; names the first key that differs, and both values.
    """
    path, values = workdir / _CONFIG_NAME, _by_key(config.to_json())
    if path.exists():
        known = _by_key(read_json(path, "the configuration of a loop"))
        differing = [key for key, value in values.items() if known.get(key) != value]
        if differing:
            key = differing[0]
            raise InputError(
                f"{path}: of a loop with another config.{key}, {known.get(key)!r} instead of {values[key]!r}; expected "
                "the same configuration, or another --workdir"
            )


def _by_key(values: Any, group: str = "") -> dict[str, Any]:
    """Nested groups as one, by the full names of the keys."""
    if not isinstance(values, dict):
        return {group: values}
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _by_key(value, f"{group}.{name}" if group else name)
    return found


def main() -> None:
    """The command: parses flags, runs the loop, and says where the report is."""
    import shlex
    import sys

    from absl import flags
    from ml_collections import config_flags

    from mmei_jax import command, compilation_cache
    from mmei_jax.host_memory import keep_freed_memory
    from mmei_jax.workdir import Stopped, stop_on_signals

    values: Any = None

    def define() -> None:
        nonlocal values
        values = config_flags.DEFINE_config_file(
            "config", "configs/feedback.py", "Users, policies, gate; --config.group.key=value changes a key."
        )
        flags.DEFINE_string(
            "workdir", None, "Folder for log, rounds, comparison and report. The same command goes on.", required=True
        )

    def run() -> int:
        workdir = Path(flags.FLAGS.workdir)
        config = read_loop_config(values.value.to_dict(), workdir)
        compilation_cache.enable()
        keep_freed_memory()
        called_by = shlex.join(["python", "-m", "mmei_jax.feedback.run", *sys.argv[1:]])
        try:
            with stop_on_signals() as stop:
                folder = run_loop(
                    config, workdir, command=called_by, tell=lambda line: print(line, flush=True), stop=stop
                )
        except (Stopped, KeyboardInterrupt):
            # The second of two Ctrl-C does not wait for the end of a step.
            name = stop.signal_name
            print(f"stopped by {name}, whole rounds are saved; the same command goes on from there", flush=True)
            return command.EXIT_TERMINATED
        print(f"report: {folder / 'report.html'}, {folder / 'report.md'}")
        return 0

    command.run(run, define=define, keys_file="configs/feedback.py")


if __name__ == "__main__":
    main()
