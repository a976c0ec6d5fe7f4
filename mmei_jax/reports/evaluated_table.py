"""A table after evaluation, row by row, read from the files that train.py and eval.py wrote."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from jaxtyping import Float

from mmei_jax.config import Config, parse
from mmei_jax.record_schema import Producer
from mmei_jax.records import Dataset
from mmei_jax.reports.paper_table import ROW_TITLES, TITLES_BY_ENCODER
from mmei_jax.reports.record_table import RecordTable, TaskKind, read_record_table
from mmei_jax.reports.resampling import WeightedMetrics
from mmei_jax.reports.tables import escaped
from mmei_jax.workdir import read_json

# Metrics as the tables call them.
METRIC_TITLES: Mapping[str, str] = {
    "accuracy": "Acc",
    "macro_precision": "P",
    "macro_recall": "R",
    "f1_of_macro": "F1",
    "macro_f1": "macro-F1",
    "weighted_f1": "weighted-F1",
    "cross_entropy": "cross-entropy",
    "ece": "ECE",
    "map": "MAP",
    "ndcg@10": "NDCG@10",
    "hr@10": "HR@10",
}


@dataclass(frozen=True)
class Row:
    """One row after evaluation.

    Attributes:
        name: of the row.
        config: with what the search chose.
        result: what ``eval/<split>.json`` holds of it.
        records: each seed's predictions.
        search: what ``search.json`` holds; None without a search.
        training: what ``replicas.json`` holds.
        dataset_name: of the data set that it reads.
        producers: by modality that it reads, what the data set's manifest says of the features.
    """

    name: str
    config: Config
    result: dict[str, Any]
    records: list[RecordTable]
    search: dict[str, Any] | None
    training: dict[str, Any]
    dataset_name: str
    producers: Mapping[str, Producer]

    def values(self, metric: str) -> Float[np.ndarray, "seeds"]:
        """The metric of every seed, NaN where undefined; ECE from the predictions."""
        if metric.endswith("/ece"):
            ones = np.ones(len(self.records[0].user_ids))
            return np.array([WeightedMetrics(part)(ones).get(metric, np.nan) for part in self.records])
        return np.array([found.get(metric, np.nan) for found in self.result["metrics"]])

    def by_seed(self, metric: str) -> dict[int, float]:
        """The metric of each seed, NaN where undefined."""
        return dict(zip(self.result["seeds"], self.values(metric).tolist(), strict=True))

    @property
    def title(self) -> str:
        """As the report calls it, in Markdown."""
        kinds = [encoder_kind(producer) for producer in self.producers.values()]
        own = TITLES_BY_ENCODER.get((self.name, kinds[0])) if len(kinds) == 1 else None
        return own or ROW_TITLES.get(self.name, escaped(self.name))

    def has(self, task: str) -> bool:
        """Whether it answers a task that has classes."""
        return f"{task}/accuracy" in self.result["metrics"][0]

    def without(self, name: str) -> str:
        """The key of ``config.loss`` that leaves a task out of its training, such as "intent"; "" where none does.

        Args:
            name: of the task, or of a metric of it.
        """
        task = name.partition("/")[0]
        key = "intent" if task == "joint" else task
        return key if getattr(self.config.loss, key) == "none" else ""

    def cell(self, metric: str) -> str:
        """The metric as :func:`mean_and_deviation`; a dash where the row is trained without the task."""
        return "–" if self.without(metric) else mean_and_deviation(self.values(metric))


@dataclass(frozen=True)
class EvaluatedTable:
    """All rows.

    Attributes:
        title: as the configuration names it.
        rows: in the order of the table; a second evaluation of a row, with other temperatures, follows the row.
        reference: the row with which the others are compared.
        dataset: that of the reference.
        split: "validation" or "test".
        robustness: what the robustness card's JSON file holds; None where the card was not made.
        robustness_png: its picture; None where there is none.
    """

    title: str
    rows: list[Row]
    reference: Row
    dataset: Dataset
    split: str
    robustness: dict[str, Any] | None
    robustness_png: bytes | None


def read_table(workdir: Path, split: str) -> EvaluatedTable:
    """Reads everything that :func:`mmei_jax.table_evaluation.evaluate_table` wrote on a split.

    Raises:
        InputError: a file is missing or damaged.
    """
    table = read_json(workdir / "table.json")
    folder = workdir / "eval"
    evaluation = read_json(folder / f"{split}.json", "what train.py or eval.py wrote")
    order = table["table"]["order"]
    found = sorted(evaluation["rows"].items(), key=lambda item: (order.index(item[1]["trained_row"]), item[0]))
    rows = [_read_row(workdir, split, name, result) for name, result in found]
    reference = next(row for row in rows if row.name == table["table"]["reference_row"])
    card, picture = folder / f"{split}_robustness.json", folder / f"{split}_robustness.png"
    return EvaluatedTable(
        table["table"]["title"],
        rows,
        reference,
        Dataset.open(reference.config.data.path),
        split,
        read_json(card, "what eval.py wrote") if card.exists() else None,
        picture.read_bytes() if picture.exists() else None,
    )


def encoder_kind(producer: Producer) -> str:
    """The kind of a producer's encoder, such as ``bert``; "" where none is named."""
    return (producer.encoder or "").partition(" ")[0]


def mean_and_deviation(values: Float[np.ndarray, "seeds"], digits: int = 3) -> str:
    """A cell: the finite values' mean ± standard deviation; "" where there are none."""
    known = values[np.isfinite(values)]
    if not len(known):
        return ""
    deviation = f" ± {known.std(ddof=1):.{digits}f}" if len(known) > 1 else ""
    return f"{known.mean():.{digits}f}{deviation}"


def _read_row(workdir: Path, split: str, name: str, result: dict[str, Any]) -> Row:
    folder = workdir / "rows" / result["trained_row"]
    training = read_json(folder / "replicas.json")
    config = parse(training["config"])
    spec = Dataset.open(config.data.path).spec
    names = {label: found.class_names for label, found in spec.labels.items()}
    records = [
        read_record_table(
            workdir / "eval" / split / name / f"seed_{seed}_predictions.parquet",
            # Tables have tasks.
            cast(TaskKind, config.loss.emotion),
            names[config.loss.emotion_label],
            names.get("intent", ()),
        )
        for seed in result["seeds"]
    ]
    search = folder / "search.json"
    producers = {modality: spec.modalities[modality].producer for modality in config.data.modalities}
    searched = read_json(search) if search.exists() else None
    return Row(name, config, result, records, searched, training, spec.name, producers)
