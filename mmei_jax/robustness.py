"""A run's robustness card: what it still reads when modalities, tokens or signal are missing, and when they disagree.

Command, for instance::

    python -m mmei_jax.robustness --workdir=runs/quickstart --split=test

Every subset of the modalities x missing rate x noise level is a condition (:mod:`mmei_jax.corruptions` says what is
done to a batch, :mod:`mmei_jax.robustness_metrics` what is computed of the scores). One jitted function measures a
batch under all of them: its draws are made once, then the conditions are taken in chunks of a ``jax.lax.map``, each
chunk under ``jax.vmap``. A chunk has as many conditions as make :data:`RECORDS_AT_ONCE` records with the batch (one at
least), so that it takes the memory of an evaluation batch of so many records, however many conditions there are.

Records are told apart by conflict where the shards carry the extra column ``conflict_modality`` (as AIGC-INT-Sim's do):
0, 1 or 2 is the modality that displays another emotion than the rest, -1 none, missing: not known. A conflict is a
record's, whatever modalities a condition keeps. Of other data sets nobody knows, and the card says so.

This is a command of its own, not a flag of ``eval.py``, for it costs as much as a hundred evaluations.
"""

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from clu.metrics import Metric
from jax.sharding import Mesh
from jaxtyping import Array, Int

from mmei_jax import compilation_cache, input_pipeline
from mmei_jax.command import CommandParser, report_errors
from mmei_jax.config import Config
from mmei_jax.corruptions import Condition, corrupt, draw
from mmei_jax.data_statistics import feature_deviations
from mmei_jax.evaluation import open_best_run
from mmei_jax.metrics import batch_metrics, compute_all, merge_all
from mmei_jax.origin import manifest_fingerprint
from mmei_jax.records import Dataset, Split
from mmei_jax.reports.robustness_card import CardSubject, card_lines
from mmei_jax.robustness_files import write_robustness
from mmei_jax.robustness_metrics import ALL, CONFLICT, NO_CONFLICT, Grid, Robustness, constant_answer
from mmei_jax.sharding import batch_sharding, make_evaluation_mesh, replicated
from mmei_jax.state import Variables
from mmei_jax.types import MODALITIES, Batch, InputError, Label

MISSING_RATES = (0.0, 0.25, 0.5, 0.75)
NOISE_LEVELS = (0.0, 0.5, 1.0, 2.0)
# Records of one pass through the model: conditions of a chunk times records of a batch.
RECORDS_AT_ONCE = 1024
CONFLICT_COLUMN = "conflict_modality"
_PROGRESS_SECONDS = 10.0
_NOT_KNOWN = "not known"


@runtime_checkable
class Recogniser(Protocol):
    """Any model of emotion and intent."""

    def apply(self, variables: Variables, batch: Batch, *, is_training: bool) -> Any:
        """What it says about a batch, as :class:`~mmei_jax.types.Outputs`; without randomness unless training."""


class RobustnessEvaluator:
    """Measures variables of one model under every condition of a grid; compiled once per batch shape.

    Args:
        model: of its methods, ``apply`` is used alone.
        config: tasks and batches; ranking is not measured.
        dataset: records; the training splits give the deviations of the features.
        mesh: devices over which each batch is split; None takes all.
        grid: conditions; None takes :data:`MISSING_RATES` and :data:`NOISE_LEVELS`.
        seed: of what is lost and added; the scores of another seed differ by chance.
        records_at_once: see the module's docstring.

    Raises:
        InputError: no training record has one of the modalities, or encoders inside the model read raw media.
    """

    def __init__(
        self,
        model: Recogniser,
        config: Config,
        dataset: Dataset,
        mesh: Mesh | None = None,
        grid: Grid | None = None,
        *,
        seed: int = 0,
        records_at_once: int = RECORDS_AT_ONCE,
    ):
        if folders := config.model.encoders.folders():
            inside = ", ".join(folders)
            raise InputError(f"config.model.encoders: {inside}: expected a run on features; noise is added to these")
        self._model, self._dataset, self._seed = model, dataset, seed
        self._config = dataclasses.replace(config, loss=dataclasses.replace(config.loss, ranking="none"))
        self._mesh = make_evaluation_mesh() if mesh is None else mesh
        modalities = tuple(name for name in MODALITIES if name in config.data.modalities)
        self.grid = Grid(modalities, MISSING_RATES, NOISE_LEVELS) if grid is None else grid
        self._records_at_once = records_at_once
        train = dataset.split(*config.data.train_splits)
        self.deviations = {
            name: feature_deviations(train, name, max_tokens=getattr(config.data.max_tokens, name)[-1])
            for name in modalities
        }
        self._measure = jax.jit(self._measure_batch, static_argnames="num_parts")

    def measure(
        self,
        variables: Variables,
        splits: tuple[str, ...],
        *,
        name: str = "model",
        tell: Callable[[int, int], None] = lambda done, total: None,
    ) -> Robustness:
        """Every metric but those of ranking under every condition, over every record of the splits exactly once.

        Args:
            variables: of the model; not donated.
            splits: names of manifest splits, joined.
            name: of the model, in the card.
            tell: called after each batch with the number of records done, and of all.
        """
        split = self._dataset.split(*splits)
        parts, part_of_record = record_parts(split)
        on_devices = jax.device_put((self.deviations, part_of_record), replicated(self._mesh))
        merged: list[list[dict[str, Metric]]] = []
        num_done = 0
        with closing(
            input_pipeline.evaluation_batches(self._dataset, self._config, splits, batch_sharding(self._mesh))
        ) as batches:
            for batch in batches:
                found = jax.device_get(self._measure(variables, batch, *on_devices, num_parts=len(parts)))
                apart = [[_at(part, place) for part in found] for place in range(math.prod(self.grid.shape))]
                merged = _merge(merged, apart) if merged else apart
                num_done += int(np.count_nonzero(batch.is_record))
                tell(num_done, split.num_records)
        return self._robustness(name, parts, part_of_record, merged)

    def _measure_batch(
        self,
        variables: Variables,
        batch: Batch,
        deviations: dict[str, Array],
        part_of_record: Int[Array, "records"],
        *,
        num_parts: int,
    ) -> list[dict[str, Metric]]:
        """Metrics of each part of the records, with a leading axis of conditions."""
        draws = draw(self._seed, batch)
        part = part_of_record[jnp.maximum(batch.record_index, 0)]
        emotion_names = self._dataset.spec.labels[self._config.loss.emotion_label].class_names

        def under(condition: Condition) -> list[dict[str, Metric]]:
            corrupted = corrupt(batch, draws, condition, deviations)
            outputs: Any = self._model.apply(variables, corrupted, is_training=False)
            return [
                batch_metrics(outputs, _only(corrupted, part == number), self._config.loss, emotion_names=emotion_names)
                for number in range(num_parts)
            ]

        conditions = grid_conditions(self.grid)
        return jax.lax.map(
            under, conditions, batch_size=_chunk(math.prod(self.grid.shape), batch, self._records_at_once)
        )

    def _robustness(
        self, name: str, parts: Sequence[str], part_of_record: np.ndarray, merged: list[list[dict[str, Metric]]]
    ) -> Robustness:
        """Divides once; ``all`` is the sum of the parts."""
        by_part = {ALL: [merge_all(apart) for apart in merged]}
        if len(parts) > 1:
            by_part |= {part: [apart[number] for apart in merged] for number, part in enumerate(parts)}
        counts = np.bincount(part_of_record, minlength=len(parts))
        figures, shape = {}, self.grid.shape
        for part, conditions in by_part.items():
            computed = [compute_all(metrics) for metrics in conditions]
            figures[part] = {
                metric: np.array([values[metric] for values in computed]).reshape(shape) for metric in computed[0]
            }
        clean = int(np.ravel_multi_index(self.grid.clean, shape))
        return Robustness(
            name=name,
            grid=self.grid,
            figures=figures,
            constant={part: constant_answer(conditions[clean]) for part, conditions in by_part.items()},
            num_records={
                ALL: len(part_of_record),
                **{part: int(count) for part, count in zip(parts, counts, strict=True) if part != ALL},
            },
        )


def measure_robustness(
    model: Recogniser, config: Config, dataset: Dataset, variables: Variables, splits: tuple[str, ...], **options: Any
) -> Robustness:
    """One model's scores; of several variables of one model, one :class:`RobustnessEvaluator` compiles once.

    Args:
        model: see :class:`RobustnessEvaluator`.
        config: tasks and batches.
        dataset: records.
        variables: of the model; not donated.
        splits: names of manifest splits, joined.
        **options: further arguments of :class:`RobustnessEvaluator`.
    """
    return RobustnessEvaluator(model, config, dataset, **options).measure(variables, splits)


def record_parts(split: Split) -> tuple[tuple[str, ...], Int[np.ndarray, "records"]]:
    """Kinds of records by conflict, and the kind of each record as a position among them; one kind where nobody knows.

    Args:
        split: its shards may have the extra column :data:`CONFLICT_COLUMN`.
    """
    nobody_knows = (ALL,), np.zeros(split.num_records, np.int32)
    if CONFLICT_COLUMN not in split.dataset.spec.extras:
        return nobody_knows
    column = np.asarray(split.column(f"extra_{CONFLICT_COLUMN}"))
    if not np.issubdtype(column.dtype, np.number) or np.isnan(column).all():
        return nobody_knows
    is_known = ~np.isnan(column)
    parts = (CONFLICT, NO_CONFLICT, *(() if is_known.all() else (_NOT_KNOWN,)))
    return parts, np.where(is_known, np.where(column >= 0, 0, 1), 2).astype(np.int32)


def grid_conditions(grid: Grid) -> Condition:
    """All conditions of a grid, the noise levels changing fastest; every field has a leading axis."""
    kept = np.array([[name in subset for name in MODALITIES] for subset in grid.subsets])
    places = np.indices(grid.shape).reshape(3, -1)
    return Condition(
        is_kept=jnp.asarray(kept[places[0]]),
        missing_rate=jnp.asarray(np.array(grid.missing_rates, np.float32)[places[1]]),
        noise_level=jnp.asarray(np.array(grid.noise_levels, np.float32)[places[2]]),
    )


def _chunk(num_conditions: int, batch: Batch, records_at_once: int) -> int:
    """Conditions of one pass: a divisor of their number, so that the model is compiled for one shape."""
    most = max(1, records_at_once // batch.is_record.shape[0])
    return max(size for size in range(1, num_conditions + 1) if num_conditions % size == 0 and size <= most)


def _only(batch: Batch, is_chosen: Array) -> Batch:
    """Counts the chosen records alone."""

    def chosen(label: Label | None) -> Label | None:
        return None if label is None else Label(value=label.value, is_labelled=label.is_labelled & is_chosen)

    return dataclasses.replace(
        batch, is_record=batch.is_record & is_chosen, emotion=chosen(batch.emotion), intent=chosen(batch.intent)
    )


def _at(metrics: Mapping[str, Metric], place: int) -> dict[str, Metric]:
    return {key: jax.tree.map(lambda leaf: leaf[place], metric) for key, metric in metrics.items()}


def _merge(left: list[list[dict[str, Metric]]], right: list[list[dict[str, Metric]]]) -> list[list[dict[str, Metric]]]:
    return [
        [merge_all([ours, theirs]) for ours, theirs in zip(mine, other, strict=True)]
        for mine, other in zip(left, right, strict=True)
    ]


def evaluate_workdir(
    workdir: Path, split: str, data_path: str | None, grid: tuple[Sequence[float], Sequence[float]], seed: int
) -> str:
    """Measures the best checkpoint of a run, and writes its card into ``eval/``.

    Args:
        workdir: of the run.
        split: "train", "validation" or "test": the splits that the configuration lists under that name.
        data_path: folder of the data set, where it moved since training; else None.
        grid: missing rates and noise levels.
        seed: of what is lost and added.

    Returns:
        Lines to print: scores, and the files written.

    Raises:
        InputError: the run, its data or the grid cannot be used.
    """
    run = open_best_run(workdir, data_path)
    data = run.config.data
    modalities = tuple(name for name in MODALITIES if name in data.modalities)
    conditions = Grid(modalities, tuple(grid[0]), tuple(grid[1]))
    splits = {"train": data.train_splits, "validation": data.validation_splits, "test": data.test_splits}[split]
    evaluator = RobustnessEvaluator(run.model, run.config, run.dataset, run.mesh, conditions, seed=seed)
    found = evaluator.measure(run.variables, splits, name=workdir.resolve().name, tell=_progress())
    reference = run.dataset.reference(splits[0]) if len(splits) == 1 else {}
    subject = CardSubject(run.dataset.spec, split, reference, seed)
    facts = {
        "split": split,
        "manifest_splits": list(splits),
        "manifest_sha256": manifest_fingerprint(run.dataset),
        "dataset": run.dataset.spec.name,
        "checkpoint_step": run.step,
        "seed": seed,
    }
    paths = write_robustness(workdir / "eval", split, [found], subject, facts)
    return "\n".join([*card_lines([found], subject), "", f"written: {', '.join(map(str, paths))}"])


def _progress() -> Callable[[int, int], None]:
    """Tells on standard error, about every ten seconds, how far the measuring is."""
    started = told = time.monotonic()

    def tell(num_done: int, num_records: int) -> None:
        nonlocal told
        if time.monotonic() - told > _PROGRESS_SECONDS:
            told = time.monotonic()
            seconds_left = (told - started) / num_done * (num_records - num_done)
            print(f"{num_done:,}/{num_records:,} records, {seconds_left:.0f} s left", file=sys.stderr, flush=True)

    return tell


def _levels(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(level) for level in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: expected numbers with commas between them") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures a run and writes its card; gives the exit status: 0, or 2 after one line on what is wrong."""
    parser = CommandParser(
        prog="python -m mmei_jax.robustness",
        description="Measure a trained run with modalities left out, tokens lost and noise added, all combined, and on "
        "records whose modalities are in conflict where the data set tells. Writes eval/<split>_robustness.json, "
        ".parquet, .md and .png into the run's folder.",
    )
    parser.add_argument("--workdir", type=Path, required=True, help="folder of a run that train.py made")
    parser.add_argument(
        "--split", choices=("train", "validation", "test"), default="test", help="of the configuration (%(default)s)"
    )
    parser.add_argument("--data", help="folder of the data set, if it is not where the run found it")
    parser.add_argument("--seed", type=int, default=0, help="of what is lost and added (%(default)s)")
    parser.add_argument(
        "--missing_rates",
        type=_levels,
        default=MISSING_RATES,
        metavar="RATE,...",
        help=f"probabilities that a token is lost, from 0 to at most 1 ({','.join(map(str, MISSING_RATES))})",
    )
    parser.add_argument(
        "--noise_levels",
        type=_levels,
        default=NOISE_LEVELS,
        metavar="LEVEL,...",
        help="standard deviations of the noise, in units of each feature's standard deviation over the training "
        f"splits, from 0 ({','.join(map(str, NOISE_LEVELS))})",
    )
    given = parser.parse_args(arguments)

    def run() -> int:
        compilation_cache.enable()
        levels = given.missing_rates, given.noise_levels
        print(evaluate_workdir(given.workdir, given.split, given.data, levels, given.seed))
        return 0

    return report_errors(run)


if __name__ == "__main__":
    sys.exit(main())
