"""Rows of a table as an evaluation would leave them, without any."""

import numpy as np

from mmei_jax.config import parse
from mmei_jax.reports.evaluated_table import Row
from mmei_jax.reports.record_table import RecordTable, TaskRecords
from tests import tiny


def row(
    name="mmei",
    *,
    accuracies=(0.5, 0.5),
    seeds=None,
    more=None,
    ceilings=None,
    history=(),
    records=(),
    search=None,
    **keys,
):
    """One with these emotion accuracies, and ``more`` metrics, by seed; ``keys`` are those of tiny.config_dict."""
    metrics = {"emotion/accuracy": accuracies, **(more or {})}
    result = {
        "trained_row": name,
        "num_records": 1_000,
        "num_parameters": 12_345,
        "seeds": list(range(len(accuracies))) if seeds is None else seeds,
        "reference": ceilings or {},
        "metrics": [dict(zip(metrics, values, strict=True)) for values in zip(*metrics.values(), strict=True)],
    }
    training = {"history": list(history), "best_steps": [20, 40, 40], "best_metric": "validation/emotion/accuracy"}
    config = parse(tiny.config_dict("nowhere", **keys).to_dict())
    return Row(name, config, result, list(records), search, training, "made up", {})


def answers(labels, choices, class_names, is_labelled=None):
    """One class of several, chosen with certainty."""
    labels, choices = np.array(labels), np.array(choices)
    known = np.ones(len(labels), bool) if is_labelled is None else np.array(is_labelled)
    answer = np.eye(len(class_names), dtype=np.float32)[choices]
    return TaskRecords("softmax", tuple(class_names), labels, known, answer, choices, np.zeros(len(labels)))


def record_table(emotion, *, intent=None, alpha=None, has_modality=None):
    """A seed's answers; by default all modalities are there and weigh the same."""
    count = len(emotion.label)
    return RecordTable(
        ids=[f"record{place}" for place in range(count)],
        user_ids=[None] * count,
        has_modality=np.ones((count, 3), bool) if has_modality is None else np.array(has_modality),
        alpha=np.full((count, 3), 1 / 3) if alpha is None else np.array(alpha),
        emotion=emotion,
        intent=intent,
        ranking={},
        is_judged=np.zeros(count, bool),
    )
