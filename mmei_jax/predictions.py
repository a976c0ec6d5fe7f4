"""What an evaluation writes about each record: one row of a Parquet file."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Array

from mmei_jax.config import Config
from mmei_jax.ranking_metrics import RECORD_NAMES
from mmei_jax.record_metrics import record_binary_cross_entropy, record_cross_entropy
from mmei_jax.records import Dataset, Split
from mmei_jax.types import MODALITIES, Label, Predictions


def write_predictions(
    path: Path, predictions: Iterator[Predictions], split: Split, config: Config, dataset: Dataset
) -> None:
    """Writes one row per record of the split, in its order, batch by batch; whole or not at all.

    Columns, null where a record lacks what they tell of:

    * ``id``, ``user_id``;
    * ``has_vision|audio|text``: whether the model was given any token of the modality;
    * ``emotion_label``; ``emotion_probabilities``, ``emotion_choice`` (what the metrics judge) and
      ``emotion_cross_entropy``, or ``emotion_value`` of a regression;
    * ``intent_label``, ``intent_probabilities``, ``intent_choice``, ``intent_cross_entropy``;
    * ``alpha_vision|audio|text``: weights of Eq. 3;
    * ``average_precision``, ``reciprocal_rank``, ``ndcg@10``, ``hr@10``, ``recall@10`` over the whole catalogue;
    * ``top_item_index``, ``top_item_score``.

    Metadata: ``emotion_classes`` and ``intent_classes``, JSON lists in label order.
    """
    labels = {"emotion": config.loss.emotion_label, "intent": "intent"}
    names = {
        f"{task}_classes": json.dumps(dataset.spec.labels[label].class_names)
        for task, label in labels.items()
        if label in dataset.spec.labels
    }
    user_ids = split.column("user_id")
    partial = path.with_name(path.name + ".partial")
    try:
        tables = (pa.table(_columns(part, split, user_ids, config)) for part in predictions)
        first = next(tables)
        with pq.ParquetWriter(partial, first.schema.with_metadata(names)) as writer:
            writer.write_table(first)
            for table in tables:
                writer.write_table(table)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _columns(part: Predictions, split: Split, user_ids: Any, config: Config) -> dict[str, Any]:
    record_index, emotion = np.asarray(part.record_index), np.asarray(part.emotion)
    is_record = record_index >= 0
    index = record_index[is_record]

    def column(values: Any, is_known: np.ndarray | None = None) -> pa.Array:
        """Values or lists of the records, null where not known."""
        mask = None if is_known is None else ~is_known
        if values.ndim == 2:
            lists = pa.array(values.reshape(-1))
            return pa.FixedSizeListArray.from_arrays(
                lists, values.shape[1], mask=None if mask is None else pa.array(mask)
            )
        return pa.array(values, mask=mask)

    def kept(values: Any) -> np.ndarray:
        return np.asarray(values)[is_record]

    def task(name: str, label: str, answers: dict[str, Any], cross_entropy: Any) -> dict[str, Any]:
        values, is_labelled = split.gather_label(label, index)
        found = {f"{name}_label": column(values, is_labelled)}
        found |= {f"{name}_{answer}": column(kept(given)) for answer, given in answers.items()}
        if cross_entropy is not None:
            found[f"{name}_cross_entropy"] = column(kept(cross_entropy), is_labelled)
        return found

    columns: dict[str, Any] = {
        "id": split.ids(index),
        "user_id": pa.array([user_ids[position] for position in index], pa.string()),
    }
    has_modality, alpha = kept(part.has_modality), kept(part.modality_weights)
    columns |= {f"has_{name}": column(has_modality[:, place]) for place, name in enumerate(MODALITIES)}
    answers: dict[str, Any]
    answers = {"value": emotion} if emotion.ndim == 1 else {"probabilities": emotion, "choice": part.emotion_choice}
    columns |= task("emotion", config.loss.emotion_label, answers, part.emotion_cross_entropy)
    if part.intent is not None:
        answers = {"probabilities": part.intent, "choice": part.intent_choice}
        columns |= task("intent", "intent", answers, part.intent_cross_entropy)
    columns |= {f"alpha_{name}": column(alpha[:, place]) for place, name in enumerate(MODALITIES)}
    if part.ranking is not None:
        is_judged = kept(part.has_relevant_items)
        columns |= {
            RECORD_NAMES.get(name, name): column(kept(given), is_judged) for name, given in part.ranking.items()
        }
    if part.top_items is not None and part.top_scores is not None:
        columns |= {"top_item_index": column(kept(part.top_items)), "top_item_score": column(kept(part.top_scores))}
    return columns


def probabilities(emotion: Array, kind: str) -> Array:
    """Of the emotion task's logits; the values themselves of a regression.

    Args:
        emotion: ``[batch, emotions]`` logits, or ``[batch]`` values.
        kind: "softmax", "sigmoid" or "regression".
    """
    if kind == "softmax":
        return jax.nn.softmax(emotion)
    return jax.nn.sigmoid(emotion) if kind == "sigmoid" else emotion


def choices(logits: Array, kind: str) -> Array | None:
    """What the metrics judge: the class of the largest logit, or the classes of positive logits; None in a regression.

    Args:
        logits: ``[batch, classes]``, or ``[batch]`` values.
        kind: "softmax", "sigmoid" or "regression".
    """
    if kind == "softmax":
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return logits > 0.0 if kind == "sigmoid" else None


def cross_entropies(logits: Array, label: Label | None, kind: str) -> Array | None:
    """``[batch]`` nats, arbitrary where not labelled; None in a regression and without labels.

    Args:
        logits: ``[batch, classes]``.
        label: of the batch.
        kind: "softmax", "sigmoid" or "regression".
    """
    if kind == "regression" or label is None:
        return None
    return record_cross_entropy(logits, label) if kind == "softmax" else record_binary_cross_entropy(logits, label)
