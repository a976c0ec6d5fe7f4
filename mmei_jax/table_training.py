"""Trains every row of a table: a search on the validation splits, then many seeds with what it chose.

The test splits are not read here. A finished part of the work is a file; the same command goes on from there.
"""

import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from mmei_jax import environment
from mmei_jax.config import Config, parse
from mmei_jax.item_words import open_dataset
from mmei_jax.metrics import is_smaller_better
from mmei_jax.origin import describe_origin
from mmei_jax.part_times import PartTimes, by_part
from mmei_jax.records import Dataset
from mmei_jax.replica_training import Budget, ReplicaResult, train_replicas
from mmei_jax.replicas import replace_key
from mmei_jax.state import Variables
from mmei_jax.table_config import TableConfig, search_points
from mmei_jax.types import InputError
from mmei_jax.workdir import Stopped, StopRequest, locked, read_json, stop_on_signals, write_json


@dataclass(frozen=True)
class TableResult:
    """How the training of a table ended.

    Attributes:
        finished: rows whose replicas are trained.
        stopped_by: name of the signal that ended it early, or "".
    """

    finished: tuple[str, ...]
    stopped_by: str


@dataclass(frozen=True)
class TrainedRow:
    """A row after training.

    Attributes:
        name: of the row.
        config: with the hyper-parameters that the search chose.
        summary: what ``rows/<name>/replicas.json`` holds.
        search: what ``rows/<name>/search.json`` holds; None without a search.
        variables: every replica's best, each array with a leading axis of replicas, on the host.
    """

    name: str
    config: Config
    summary: dict[str, Any]
    search: dict[str, Any] | None
    variables: Variables


def train_table(table: TableConfig, values: dict[str, Any], workdir: Path, *, command: str | None) -> TableResult:
    """Trains what is not trained yet.

    Args:
        table: the rows.
        values: the configuration that ``table`` was parsed from, kept as ``table.json``.
        workdir: receives ``table.json``, ``environment.json`` and ``rows/<name>/``.
        command: the command line, for ``environment.json``; None when Python code called.

    Raises:
        InputError: configuration, data, devices or what ``workdir`` holds do not fit.
        OutOfMemoryError: a device's memory is too small for one replica, at compile or run time; with what needs how
            much.
    """
    if jax.process_count() > 1:
        raise InputError(f"{jax.process_count()} processes: a table trains in one process, on all its devices")
    with locked(workdir), stop_on_signals() as stop:
        values = json.loads(json.dumps(values))
        path = workdir / "table.json"
        if path.exists() and read_json(path) != values:
            raise InputError(f"{path}: begun with another configuration; expected the same, or another --workdir")
        for config in table.rows.values():
            Dataset.open(config.data.path)
        write_json(path, values)
        write_json(workdir / "environment.json", environment.describe(command))
        finished = []
        try:
            for name, config in table.rows.items():
                key_of = functools.partial(_key_of, values["table"]["rows"][name], name)
                _train_row(table, name, config, workdir / "rows" / name, stop, key_of)
                finished.append(name)
        except Stopped:
            return TableResult(tuple(finished), stop.signal_name)
    return TableResult(tuple(finished), "")


def is_table_workdir(workdir: Path) -> bool:
    """Whether a table was trained there."""
    return (workdir / "table.json").exists()


def read_row(workdir: Path, name: str) -> TrainedRow:
    """Reads a trained row.

    Raises:
        InputError: it is not trained, or a file is damaged.
    """
    folder = workdir / "rows" / name
    if not (folder / "replicas.json").exists():
        raise InputError(f"{folder}: not trained yet; expected train.py to have finished")
    summary = read_json(folder / "replicas.json")
    search_path = folder / "search.json"
    try:
        flat = load_file(folder / "replicas.safetensors")
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder / 'replicas.safetensors'}: expected what train.py wrote: {error}") from error
    variables: Variables = {}
    for key, value in flat.items():
        *groups, leaf = key.split("/")
        place: Any = variables
        for group in groups:
            place = place.setdefault(group, {})
        place[leaf] = value
    return TrainedRow(
        name, parse(summary["config"]), summary, read_json(search_path) if search_path.exists() else None, variables
    )


def _key_of(changes: dict[str, Any], row: str, key: str) -> str:
    """The key that decides over a row's: that of its own changes, or the one that all rows share."""
    place: Any = changes
    for part in key.split("."):
        if not isinstance(place, dict) or part not in place:
            return key
        place = place[part]
    return f"table.rows.{row}.{key}"


def _train_row(
    table: TableConfig, name: str, config: Config, folder: Path, stop: StopRequest, key_of: Callable[[str], str]
) -> None:
    if (folder / "replicas.json").exists():
        print(f"{name}: trained before", flush=True)
        return
    # A signal may have come since the last row's last evaluation.
    stop.check()
    times = PartTimes(folder / "times.json")
    with times.stage("start"), times.part("data"):
        dataset = open_dataset(config)
    budget = Budget(table.updates_per_dispatch, int(table.memory_limit_gib * 2**30))
    chosen: dict[str, float] = {}
    points = search_points(table.search)
    if points:
        if not (folder / "search.json").exists():
            shorter = replace(config, train=replace(config.train, num_epochs=table.search.num_epochs))
            varied: dict[str, list[float]] = {key: [point[key] for point in points] for key in points[0]}
            varied["seed"] = [table.search.seed] * len(points)
            with times.stage("search"):
                title = f"{name}, search"
                found = train_replicas(
                    shorter, varied, dataset, folder / "search", budget, stop, times, title=title, key_of=key_of
                )
            write_json(folder / "search.json", _search_summary(shorter, table.search.seed, points, found))
            shutil.rmtree(folder / "search")
        chosen = read_json(folder / "search.json")["chosen"]
        stop.check()
    for key, value in chosen.items():
        config = replace_key(config, key, value)
    seeds = [config.seed + index for index in range(table.num_seeds)]
    with times.stage("seeds"):
        found = train_replicas(
            config, {"seed": seeds}, dataset, folder / "seeds", budget, stop, times, title=name, key_of=key_of
        )
    if any(value is None for value in found.progress.best_values):
        diverged = [seed for seed, value in zip(seeds, found.progress.best_values, strict=True) if value is None]
        raise InputError(f"row {name!r}: the loss of seeds {diverged} was not finite before their first evaluation")
    flat = {
        "/".join(str(getattr(entry, "key", entry)) for entry in path): np.ascontiguousarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(found.variables)
    }
    partial = folder / "replicas.safetensors.partial"
    save_file(flat, partial)
    partial.replace(folder / "replicas.safetensors")
    write_json(
        folder / "replicas.json",
        {
            "row": name,
            "config": config.to_json(),
            **describe_origin(config, dataset),
            "seeds": seeds,
            "num_parameters": int(sum(leaf[0].size for leaf in jax.tree.leaves(found.variables["params"]))),
            "best_metric": config.train.best_metric,
            "best_values": found.progress.best_values,
            "best_steps": found.progress.best_steps,
            "has_diverged": found.progress.has_diverged,
            "history": found.progress.history,
        },
    )
    shutil.rmtree(folder / "seeds")
    parts = by_part(times.seconds)
    told = ", ".join(f"{part} {seconds:.0f} s" for part, seconds in parts.items())
    print(f"{name}: trained in {sum(parts.values()):.0f} s: {told}", flush=True)


def _search_summary(config: Config, seed: int, points: list[dict[str, float]], found: ReplicaResult) -> dict[str, Any]:
    """The table of the search, and the point with the best value; points that diverged have none."""
    values = found.progress.best_values
    known = [index for index, value in enumerate(values) if value is not None]
    if not known:
        raise InputError(
            f"search on {config.data.path}: the loss of every point was not finite; expected smaller rates"
        )
    sign = 1.0 if is_smaller_better(config.train.best_metric) else -1.0
    best = min(known, key=lambda index: sign * float(values[index] or 0.0))
    return {
        "metric": config.train.best_metric,
        "num_epochs": config.train.num_epochs,
        "seed": seed,
        "points": [
            {**point, "value": value, "has_diverged": diverged}
            for point, value, diverged in zip(points, values, found.progress.has_diverged, strict=True)
        ],
        "chosen": points[best],
        "chosen_index": best,
    }
