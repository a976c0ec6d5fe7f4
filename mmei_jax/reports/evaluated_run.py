"""Everything that a report is made of, read from a run's folder and from the manifest of its data."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmei_jax.config import Config
from mmei_jax.records import Dataset, DatasetSpec
from mmei_jax.reports.record_table import RecordTable, read_record_table
from mmei_jax.reports.resampling import Intervals, bootstrap_intervals
from mmei_jax.types import InputError
from mmei_jax.workdir import read_config, read_json


@dataclass(frozen=True)
class EvaluatedRun:
    """A run after its evaluation on one split.

    Attributes:
        command: the command line that evaluates; None where Python code does.
        config: as the run wrote it.
        summary: what ``eval/<split>.json`` holds.
        dataset: whose manifest is told of.
        records: what the model said about each record of the split.
        intervals: of the metrics.
        log: lines of ``metrics.jsonl``, in which an undefined metric is None; [] where there is none.
        environment: what ``environment.json`` holds; None where there is none.
    """

    command: str | None
    config: Config
    summary: dict[str, Any]
    dataset: Dataset
    records: RecordTable
    intervals: Intervals
    log: list[dict[str, Any]]
    environment: dict[str, Any] | None

    @property
    def metrics(self) -> dict[str, float]:
        """Finite metrics of the split by name."""
        return self.summary["metrics"]

    @property
    def is_simulated(self) -> bool:
        """Whether the manifest says that nobody was recorded."""
        return is_simulated(self.dataset.spec)

    def epoch(self, step: float | int) -> float:
        """Passes over the training records after ``step`` updates."""
        splits = self.dataset.manifest["splits"]
        num_records = sum(splits[name]["num_records"] for name in self.config.data.train_splits)
        return step * self.config.data.batch_size / num_records


def is_simulated(spec: DatasetSpec) -> bool:
    """Whether a data set says of itself that nobody was recorded."""
    return "simulat" in f"{spec.name} {spec.description} {spec.source}".lower()


def read_run(workdir: Path, split: str, data_path: str | None, command: str | None) -> EvaluatedRun:
    """Reads a run and the evaluation that it holds.

    Args:
        workdir: of the run.
        split: "train", "validation" or "test".
        data_path: folder of the data set, where it moved since training; else None.
        command: the command line that evaluates; None where Python code does.

    Raises:
        InputError: something is missing or damaged; names the file. Or the run has no task.
    """
    config = read_config(workdir, data_path)
    if config.loss.emotion == "none":
        raise InputError(
            f"{workdir}: a run of pretraining, without any task: expected one with predictions to report on"
        )
    dataset = Dataset.open(config.data.path)
    summary = read_json(workdir / "eval" / f"{split}.json", "what train.py or eval.py wrote")
    names = {name: label.class_names for name, label in dataset.spec.labels.items()}
    records = read_record_table(
        workdir / "eval" / f"{split}_predictions.parquet",
        config.loss.emotion,
        names[config.loss.emotion_label],
        names.get("intent", ()),
    )
    has_environment = (workdir / "environment.json").exists()
    return EvaluatedRun(
        command=command,
        # The run's own, wherever its data lie now.
        config=read_config(workdir),
        summary=summary,
        dataset=dataset,
        records=records,
        intervals=bootstrap_intervals(records),
        log=_read_log(workdir / "metrics.jsonl"),
        environment=read_json(workdir / "environment.json", "what train.py or eval.py wrote")
        if has_environment
        else None,
    )


def _read_log(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: expected the JSON lines that train.py wrote: {error}") from error
