"""The configuration of a table: rows that differ from one base, a search that all share, and many seeds.

A table's configuration file is an ordinary one with one more group, ``table``. Its keys are explained in
``configs/table1.py``.
"""

import itertools
import typing
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mmei_jax.config import Config, parse
from mmei_jax.config_values import build, require
from mmei_jax.replicas import VARIED_KEYS
from mmei_jax.types import InputError


@dataclass(frozen=True)
class SearchConfig:
    """Which hyper-parameters are tried, on the validation splits alone; the same points for every row."""

    kind: Literal["random", "grid", "none"]
    num_points: int
    seed: int
    num_epochs: int
    ranges: tuple[tuple[str, Literal["log", "linear"], float, float], ...]
    grid: tuple[tuple[str, tuple[float, ...]], ...]


@dataclass(frozen=True)
class TableConfig:
    """A table of rows.

    Attributes:
        title: of the report.
        rows: by name, each row's whole configuration, in the order of the table.
        reference_row: the row with which all others are compared, record by record.
        num_seeds: replicas of each row; their seeds count up from the base's.
        updates_per_dispatch: updates that go to the devices at once.
        memory_limit_gib: memory on one device that replicas may take together, in GiB; 0 takes what the device says
            that it has.
        search: see :class:`SearchConfig`.
    """

    title: str
    rows: dict[str, Config]
    reference_row: str
    num_seeds: int
    updates_per_dispatch: int
    memory_limit_gib: float
    search: SearchConfig


@dataclass(frozen=True)
class _TableKeys:
    title: str
    order: tuple[str, ...]
    reference_row: str
    num_seeds: int
    updates_per_dispatch: int
    memory_limit_gib: float
    search: SearchConfig


def is_table(values: dict[str, Any]) -> bool:
    """Whether a ConfigDict's ``to_dict()`` describes a table, not one run."""
    return "table" in values


def parse_table(values: dict[str, Any]) -> TableConfig:
    """Turns a ConfigDict's ``to_dict()`` into a checked table.

    Raises:
        InputError: a key is unknown or missing, or a value is not accepted; names the key.
    """
    base = {key: value for key, value in values.items() if key != "table"}
    table = values["table"]
    if not isinstance(table, dict):
        raise InputError(f"config.table = {table!r}: expected a group of keys")
    changes = table.get("rows")
    keys = typing.cast(
        _TableKeys, build(_TableKeys, {key: value for key, value in table.items() if key != "rows"}, "config.table")
    )
    if not isinstance(changes, dict) or sorted(changes) != sorted(keys.order) or not changes:
        found = sorted(changes) if isinstance(changes, dict) else changes
        raise InputError(f"config.table.order = {keys.order}: expected each row of config.table.rows once: {found}")
    rows = {name: _parse_row(base, changes[name], name) for name in keys.order}
    table_config = TableConfig(
        title=keys.title,
        rows=rows,
        reference_row=keys.reference_row,
        num_seeds=keys.num_seeds,
        updates_per_dispatch=keys.updates_per_dispatch,
        memory_limit_gib=keys.memory_limit_gib,
        search=keys.search,
    )
    _check(table_config)
    return table_config


def search_points(search: SearchConfig) -> list[dict[str, float]]:
    """The points of a search, by key; the same for every row.

    Random points are drawn independently, uniformly on each range or on its logarithm (Bergstra and Bengio, "Random
    search for hyper-parameter optimization", JMLR 2012), rounded to three significant digits as a table shows them.
    """
    if search.kind == "none":
        return []
    if search.kind == "grid":
        keys = [key for key, _ in search.grid]
        return [dict(zip(keys, values, strict=True)) for values in itertools.product(*(v for _, v in search.grid))]
    generator = np.random.default_rng(search.seed)
    points = []
    for _ in range(search.num_points):
        point = {}
        for key, scale, low, high in search.ranges:
            share = generator.uniform()
            value = low * (high / low) ** share if scale == "log" else low + (high - low) * share
            point[key] = float(f"{value:.3g}")
        points.append(point)
    return points


def _parse_row(base: dict[str, Any], changes: Any, name: str) -> Config:
    try:
        config = parse(_merge(base, changes, f"table.rows.{name}"))
        given = config.train.initial_workdir
        require(not given, "train.initial_workdir", given, "'' in a table: every row trains from its seeds")
        for key in ("contrastive_weight", "masked_weight"):
            weight = getattr(config.pretraining, key)
            require(weight == 0.0, f"pretraining.{key}", weight, "0 in a table: its rows are compared on their tasks")
    except InputError as error:
        raise InputError(f"row {name!r}: {error}") from None
    return config


def _merge(base: dict[str, Any], changes: Any, key: str) -> dict[str, Any]:
    if not isinstance(changes, dict):
        raise InputError(f"config.{key} = {changes!r}: expected a group of keys")
    merged = dict(base)
    for name, value in changes.items():
        if name not in base:
            raise InputError(f"config.{key}.{name}: unknown key; expected some of {', '.join(base)}")
        merged[name] = _merge(base[name], value, f"{key}.{name}") if isinstance(base[name], dict) else value
    return merged


def _check(table: TableConfig) -> None:
    search = table.search
    require(
        table.reference_row in table.rows,
        "table.reference_row",
        table.reference_row,
        f"one of {', '.join(table.rows)}",
    )
    require(table.num_seeds >= 1, "table.num_seeds", table.num_seeds, "at least 1")
    require(table.updates_per_dispatch >= 1, "table.updates_per_dispatch", table.updates_per_dispatch, "at least 1")
    require(table.memory_limit_gib >= 0.0, "table.memory_limit_gib", table.memory_limit_gib, "at least 0")
    require(search.num_epochs >= 1, "table.search.num_epochs", search.num_epochs, "at least 1")
    require(search.seed >= 0, "table.search.seed", search.seed, "at least 0")
    is_random, is_grid = search.kind == "random", search.kind == "grid"
    require(
        is_random == bool(search.ranges),
        "table.search.ranges",
        search.ranges,
        "ranges for the kind 'random', and () for every other",
    )
    require(
        is_grid == bool(search.grid), "table.search.grid", search.grid, "values for the kind 'grid', and () for others"
    )
    require(
        (search.num_points >= 1) == is_random,
        "table.search.num_points",
        search.num_points,
        "at least 1 for the kind 'random', and 0 for every other",
    )
    for key, scale, low, high in search.ranges:
        is_good = low < high and (scale == "linear" or low > 0.0)
        require(is_good, f"table.search.ranges[{key!r}]", (low, high), "low < high, above 0 on the scale 'log'")
    for key in [*(key for key, *_ in search.ranges), *(key for key, _ in search.grid)]:
        accepted = [name for name in VARIED_KEYS if name != "seed"]
        require(key in accepted, "table.search", key, f"one of {', '.join(accepted)}")
    for point in search_points(search):
        for key, value in point.items():
            is_rate = key.endswith("_rate") and key.startswith("model.")
            is_good = 0.0 <= value < 1.0 if is_rate else value > 0.0 or key != "optimizer.learning_rate"
            require(is_good and value >= 0.0, f"table.search: {key}", value, "a rate in [0, 1), or a number from 0")
