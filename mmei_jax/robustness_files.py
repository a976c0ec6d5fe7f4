"""What a robustness card leaves on disk: a summary, a table of everything, and the card itself."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmei_jax.reports.robustness_card import CardSubject, card_files
from mmei_jax.robustness_metrics import AXES, Robustness, scores_of
from mmei_jax.types import MODALITIES, InputError
from mmei_jax.workdir import write_bytes, write_json


def summary(found: Robustness) -> dict[str, Any]:
    """One model in JSON values: scores, shares kept, areas and relative robustness; None where undefined."""
    parts: dict[str, Any] = {}
    for part, figures in found.figures.items():
        scores: dict[str, Any] = {}
        for metric in scores_of(found):
            subsets = {}
            for place, subset in enumerate(found.grid.subsets):
                subsets["+".join(subset)] = {
                    "score": _finite(figures[metric][place, 0, 0]),
                    "share_kept": _finite(found.share_kept(metric, part)[place, 0, 0]),
                    "area": {axis: _finite(found.area(metric, subset, axis, part)) for axis in AXES},
                    "relative_robustness": {axis: _finite(found.relative(metric, subset, axis, part)) for axis in AXES},
                }
            constant = found.constant[part].get(metric)
            scores[metric] = {"constant_answer": constant, "subsets": subsets}
        parts[part] = {"num_records": found.num_records[part], "scores": scores}
    return {"name": found.name, "records": parts}


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def table(rows: Sequence[Robustness]) -> pa.Table:
    """One row for each model, kind of records and condition: every metric, and the share kept of the scores.

    Columns: ``model``, ``records``, ``num_records``, ``keeps_<modality>``, ``missing_rate``, ``noise_level``, the
    metrics by name, and ``share_kept/<score>``; null where undefined.
    """
    tables = []
    for found in rows:
        grid, num_conditions = found.grid, math.prod(found.grid.shape)
        places = np.indices(grid.shape).reshape(3, -1)
        for part, figures in found.figures.items():
            columns: dict[str, Any] = {
                "model": [found.name] * num_conditions,
                "records": [part] * num_conditions,
                "num_records": [found.num_records[part]] * num_conditions,
            }
            columns |= {f"keeps_{name}": [name in grid.subsets[place] for place in places[0]] for name in MODALITIES}
            columns |= {
                "missing_rate": np.array(grid.missing_rates)[places[1]],
                "noise_level": np.array(grid.noise_levels)[places[2]],
            }
            shares = {f"share_kept/{metric}": found.share_kept(metric, part) for metric in scores_of(found)}
            for metric, values in {**figures, **shares}.items():
                columns[metric] = pa.array(values.ravel(), pa.float64(), from_pandas=True)
            tables.append(pa.table(columns))
    return pa.concat_tables(tables, promote_options="default")


def write_robustness(
    folder: Path, split: str, rows: Sequence[Robustness], subject: CardSubject, facts: Mapping[str, Any]
) -> list[Path]:
    """Writes the card of one or several models, each file whole or not at all; the same rows give the same bytes.

    Args:
        folder: where to; made if need be.
        split: begins the files' names: ``<split>_robustness.json`` (summary), ``.parquet`` (:func:`table`), ``.md`` and
            ``.png`` (the card and its picture).
        rows: on one grid; the first is the baseline of effective robustness.
        subject: what the card is about.
        facts: written into the JSON file beside the summary.

    Returns:
        The files written.

    Raises:
        InputError: the rows are on several grids.
    """
    grid = rows[0].grid
    if any(found.grid != grid for found in rows):
        raise InputError("robustness of several models: expected one grid of conditions for all")
    stem, parquet = folder / f"{split}_robustness", pa.BufferOutputStream()
    described = {"missing_rates": list(grid.missing_rates), "noise_levels": list(grid.noise_levels)}
    write_json(
        stem.with_suffix(".json"),
        {**facts, **described, "modalities": list(grid.modalities), "models": [summary(found) for found in rows]},
    )
    pq.write_table(table(rows), parquet)
    files = {f"{stem.name}.parquet": parquet.getvalue().to_pybytes(), **card_files(stem.name, rows, subject)}
    for name, content in files.items():
        write_bytes(folder / name, content)
    return [stem.with_suffix(".json"), *(folder / name for name in files)]
