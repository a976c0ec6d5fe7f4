"""What an evaluation wrote about each record, as arrays: the one source of everything in a report but its log."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Float, Shaped

from mmei_jax.ranking_metrics import RECORD_NAMES
from mmei_jax.types import MODALITIES, InputError

TaskKind = Literal["softmax", "sigmoid", "regression"]


@dataclass(frozen=True)
class TaskRecords:
    """One task's labels and answers.

    Attributes:
        kind: one class of several, several at once, or a number.
        class_names: in label order; () for a regression.
        label: ``[records]`` int class ids, ``[records, classes]`` in [0, 1], or ``[records]`` numbers; 0 where missing.
        is_labelled: ``[records]``.
        answer: ``[records, classes]`` probabilities, or ``[records]`` numbers.
        choice: ``[records]`` int class ids or ``[records, classes]`` bool; None for a regression.
        cross_entropy: ``[records]`` nats, 0 where not labelled; None for a regression.
    """

    kind: TaskKind
    class_names: tuple[str, ...]
    label: Shaped[np.ndarray, "records ..."]
    is_labelled: Bool[np.ndarray, "records"]
    answer: Float[np.ndarray, "records ..."]
    choice: Shaped[np.ndarray, "records ..."] | None
    cross_entropy: Float[np.ndarray, "records"] | None


@dataclass(frozen=True)
class RecordTable:
    """A whole split.

    Attributes:
        ids: of the records, in the order of the split.
        user_ids: one per record, None where unknown.
        has_modality: ``[records, modalities]``, whether the model was given any token of it.
        alpha: ``[records, modalities]`` weights of Eq. 3.
        emotion: its labels and answers.
        intent: the same; None when the task is off.
        ranking: ``[records]`` by metric name (``map``, ``ndcg@10`` ...); {} when the task is off.
        is_judged: ``[records]``, whether a record has relevant items, so that its ranking metrics count.
    """

    ids: list[str]
    user_ids: list[str | None]
    has_modality: Bool[np.ndarray, "records modalities"]
    alpha: Float[np.ndarray, "records modalities"]
    emotion: TaskRecords
    intent: TaskRecords | None
    ranking: dict[str, Float[np.ndarray, "records"]]
    is_judged: Bool[np.ndarray, "records"]

    @property
    def num_records(self) -> int:
        """Records of the split."""
        return len(self.user_ids)


def read_record_table(
    path: Path, emotion_kind: TaskKind, emotion_names: tuple[str, ...], intent_names: tuple[str, ...]
) -> RecordTable:
    """Reads the predictions that an evaluation wrote.

    Args:
        path: Parquet file.
        emotion_kind: of the emotion task.
        emotion_names: emotions in label order; () for a regression.
        intent_names: intents in label order; () without intents.

    Raises:
        InputError: the file is missing, damaged, or lacks a column.
    """
    try:
        table = pq.read_table(path)
        columns = {name: table.column(name).combine_chunks() for name in table.column_names}
        return _record_table(columns, emotion_kind, emotion_names, intent_names)
    except (OSError, pa.ArrowException, KeyError) as error:
        raise InputError(f"{path}: expected the predictions that eval.py writes: {error}") from error


def _record_table(
    columns: dict[str, Any], kind: TaskKind, emotion_names: tuple[str, ...], intent_names: tuple[str, ...]
) -> RecordTable:
    ids = columns["id"]
    means = {RECORD_NAMES.get(name, name): name for name in ("map", "mrr", "ndcg@10", "hr@10", "recall@10")}
    ranking = {name: _numbers(columns[column]) for column, name in means.items() if column in columns}
    judged = next((columns[column] for column in means if column in columns), None)
    return RecordTable(
        ids=ids.to_pylist(),
        user_ids=columns["user_id"].to_pylist(),
        has_modality=np.stack([_numbers(columns[f"has_{name}"]) for name in MODALITIES], axis=1),
        alpha=np.stack([_numbers(columns[f"alpha_{name}"]) for name in MODALITIES], axis=1),
        emotion=_task_records(columns, "emotion", kind, emotion_names),
        intent=_task_records(columns, "intent", "softmax", intent_names) if "intent_choice" in columns else None,
        ranking=ranking,
        is_judged=np.zeros(len(ids), bool) if judged is None else _is_known(judged),
    )


def _task_records(columns: dict[str, Any], task: str, kind: TaskKind, class_names: tuple[str, ...]) -> TaskRecords:
    label = columns[f"{task}_label"]
    is_regression = kind == "regression"
    answer = _numbers(columns[f"{task}_{'value' if is_regression else 'probabilities'}"])
    return TaskRecords(
        kind=kind,
        class_names=class_names,
        label=_numbers(label),
        is_labelled=_is_known(label),
        answer=answer,
        choice=None if is_regression else _numbers(columns[f"{task}_choice"]),
        cross_entropy=None if is_regression else _numbers(columns[f"{task}_cross_entropy"]),
    )


def _is_known(column: Any) -> np.ndarray:
    return np.asarray(column.is_valid().to_numpy(zero_copy_only=False))


def _numbers(column: Any) -> np.ndarray:
    """Values or rows of lists; 0 where null."""
    if pa.types.is_fixed_size_list(column.type):
        # flatten() leaves out what null lists hold.
        values = column.flatten().to_numpy(zero_copy_only=False)
        rows = np.zeros((len(column), column.type.list_size), values.dtype)
        rows[_is_known(column)] = values.reshape(-1, column.type.list_size)
        return rows
    zero = False if pa.types.is_boolean(column.type) else 0
    return np.asarray(column.fill_null(zero).to_numpy(zero_copy_only=False))
