"""Rows of a table as an evaluation would leave them, without any."""

from mmei_jax.config import parse
from mmei_jax.reports.evaluated_table import Row
from tests import tiny


def row(name="mmei", *, accuracies=(0.5, 0.5), seeds=None, ceilings=None, history=(), records=(), search=None, **keys):
    """One with these emotion accuracies, by seed; ``keys`` are those of :func:`tests.tiny.config_dict`."""
    result = {
        "trained_row": name,
        "num_records": 1_000,
        "num_parameters": 12_345,
        "seeds": list(range(len(accuracies))) if seeds is None else seeds,
        "reference": ceilings or {},
        "metrics": [{"emotion/accuracy": accuracy} for accuracy in accuracies],
    }
    training = {"history": list(history), "best_steps": [20, 40, 40], "best_metric": "validation/emotion/accuracy"}
    config = parse(tiny.config_dict("nowhere", **keys).to_dict())
    return Row(name, config, result, list(records), search, training, "made up", {})
