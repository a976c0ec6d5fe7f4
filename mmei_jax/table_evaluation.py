"""Evaluates every replica of every row of a table on the test splits: the only place that reads them."""

import dataclasses
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from mmei_jax import input_pipeline
from mmei_jax.config import Config
from mmei_jax.environment import versions
from mmei_jax.evaluation import Evaluator
from mmei_jax.item_words import open_dataset
from mmei_jax.origin import check_origin
from mmei_jax.predictions import write_predictions
from mmei_jax.reports.calibration import best_temperature
from mmei_jax.reports.robustness_card import CardSubject
from mmei_jax.robustness import RobustnessEvaluator
from mmei_jax.robustness_files import write_robustness
from mmei_jax.sharding import batch_sharding, make_evaluation_mesh, mesh_over, replicated
from mmei_jax.state import Variables, build_model
from mmei_jax.table_config import TableConfig, is_table, parse_table
from mmei_jax.table_training import TrainedRow, read_row
from mmei_jax.types import MODALITIES, Batch, InputError, Outputs
from mmei_jax.workdir import read_json, write_json

CALIBRATED = "late_fusion_calibrated"


def read_table_config(workdir: Path) -> TableConfig:
    """The table that train.py was given.

    Raises:
        InputError: the file is damaged.
    """
    path = workdir / "table.json"
    values = read_json(path, "the table that train.py wrote")
    if not isinstance(values, dict) or not is_table(values):
        raise InputError(f"{path}: expected the table that train.py wrote, a JSON object with 'table'")
    return parse_table(values)


def evaluate_table(workdir: Path, split: str = "test") -> Path:
    """Evaluates all rows; late fusion a second time with temperatures that the validation splits chose.

    Writes ``eval/<split>/<row>/seed_<n>_predictions.parquet``, ``eval/<split>.json``, and the robustness card
    ``eval/<split>_robustness.*`` of the rows that read as many modalities as the reference row, first seed of each.

    Args:
        workdir: of the table.
        split: "validation" or "test": the splits that each row's configuration lists under that name.

    Returns:
        The JSON file: by row the metrics of every replica, and the data sets' reference figures.

    Raises:
        InputError: a row is not trained yet, or its data set cannot be read or is another one.
    """
    table = read_table_config(workdir)
    rows, trained = {}, []
    for name in table.rows:
        row = read_row(workdir, name)
        trained.append(row)
        rows[name] = _evaluate_row(row, workdir, split)
        if row.config.model.architecture == "late_fusion" and row.config.loss.emotion == "softmax":
            calibrated, temperatures = calibrate_late_fusion(row)
            trained.append(dataclasses.replace(row, name=CALIBRATED, variables=calibrated))
            rows[CALIBRATED] = {**_evaluate_row(trained[-1], workdir, split), "temperatures": temperatures}
    path = workdir / "eval" / f"{split}.json"
    write_json(path, {"split": split, "rows": rows, "versions": versions()})
    _measure_robustness(trained, table.reference_row, workdir / "eval", split)
    return path


def calibrate_late_fusion(row: TrainedRow) -> tuple[Variables, list[dict[str, list[float]]]]:
    """Late fusion with a temperature for each branch and task, which minimises the branch's validation cross-entropy.

    References:
        Guo et al., "On calibration of modern neural networks", ICML 2017.

    Args:
        row: of the architecture ``late_fusion``.

    Returns:
        Its variables with the temperatures set, and these by replica and task, in the order of MODALITIES.
    """
    dataset = open_dataset(row.config)
    model, mesh = build_model(row.config, dataset), make_evaluation_mesh()
    tasks = ["emotion"] + (["intent"] if row.config.loss.intent != "none" else [])

    @jax.jit
    def read(variables: Variables, batch: Batch) -> dict[str, Any]:
        outputs = cast(Outputs, model.apply(variables, batch, is_training=False))
        labels = {task: getattr(batch, task) for task in tasks}
        return {
            task: (getattr(outputs, f"{task}_branches"), label.value, label.is_labelled, outputs.modality_weights > 0)
            for task, label in labels.items()
        }

    splits, found = row.config.data.validation_splits, []
    for index in range(len(row.summary["seeds"])):
        variables = _replica(row.variables, index)
        with closing(input_pipeline.evaluation_batches(dataset, row.config, splits, batch_sharding(mesh))) as batches:
            parts = [jax.device_get(read(variables, batch)) for batch in batches]
        temperatures = {}
        for task in tasks:
            logits, label, is_labelled, is_present = (
                np.concatenate([part[task][place] for part in parts]) for place in range(4)
            )
            temperatures[task] = [
                best_temperature(logits[keep, place], label[keep]) if keep.any() else 1.0
                for place in range(len(MODALITIES))
                for keep in [is_labelled & is_present[:, place]]
            ]
        found.append(temperatures)
    statistics = dict(row.variables["statistics"])
    for task in tasks:
        statistics[f"{task}_temperature"] = np.array([one[task] for one in found], np.float32)
    return {**row.variables, "statistics": statistics}, found


def _evaluate_row(row: TrainedRow, workdir: Path, split: str) -> dict[str, Any]:
    config, dataset = row.config, open_dataset(row.config)
    check_origin(row.summary, config, dataset, f"row {row.name!r} of {workdir}")
    names = _splits(config, split)
    seeds = row.summary["seeds"]
    # As many devices as share the replicas equally.
    num_devices = max(count for count in range(1, jax.device_count() + 1) if len(seeds) % count == 0)
    mesh = mesh_over(jax.devices()[:num_devices])
    evaluator = Evaluator(build_model(config, dataset), config, dataset, mesh)
    figures = evaluator.measure_replicas(jax.device_put(row.variables, batch_sharding(mesh)), names)
    folder = workdir / "eval" / split / row.name
    folder.mkdir(parents=True, exist_ok=True)
    joined = dataset.split(*names)
    for index, seed in enumerate(seeds):
        variables = jax.device_put(_replica(row.variables, index), replicated(mesh))
        path = folder / f"seed_{seed}_predictions.parquet"
        write_predictions(path, evaluator.predict(variables, names), joined, config, dataset)
    print(f"{row.name}: {len(seeds)} replicas on {joined.num_records:,} records of {'+'.join(names)}", flush=True)
    return {
        "trained_row": row.summary["row"],
        "seeds": seeds,
        "manifest_splits": list(names),
        "num_records": joined.num_records,
        "num_parameters": row.summary["num_parameters"],
        "metrics": [{name: value for name, value in found.items() if np.isfinite(value)} for found in figures],
        "reference": dataset.reference(names[0]) if len(names) == 1 else {},
    }


def _measure_robustness(rows: list[TrainedRow], reference_row: str, folder: Path, split: str) -> None:
    """One card for all rows that read what the reference row reads; the grid is that of a single run's card."""
    reference = next(row for row in rows if row.name == reference_row)
    dataset = open_dataset(reference.config)
    if len(reference.config.data.modalities) < 2 or reference.config.loss.emotion == "regression":
        return
    found = []
    for row in rows:
        data = row.config.data
        if data.modalities != reference.config.data.modalities or data.path != reference.config.data.path:
            continue
        evaluator = RobustnessEvaluator(build_model(row.config, dataset), row.config, dataset)
        variables = jax.device_put(_replica(row.variables, 0), replicated(make_evaluation_mesh()))
        found.append(evaluator.measure(variables, _splits(row.config, split), name=row.name))
        print(f"{row.name}: robustness under {np.prod(evaluator.grid.shape)} conditions", flush=True)
    names = _splits(reference.config, split)
    subject = CardSubject(dataset.spec, split, dataset.reference(names[0]) if len(names) == 1 else {}, 0)
    facts = {"split": split, "manifest_splits": list(names), "dataset": dataset.spec.name, "seed": 0}
    write_robustness(folder, split, found, subject, facts)


def _splits(config: Config, split: str) -> tuple[str, ...]:
    return config.data.validation_splits if split == "validation" else config.data.test_splits


def _replica(variables: Variables, index: int) -> Variables:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf[index]), variables)
