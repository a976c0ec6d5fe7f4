"""Who is recommended to: records of a run's data set as its model reads them, or embeddings from a file."""

from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float32

from mmei_jax.evaluation import BestRun, Evaluator
from mmei_jax.types import InputError, Predictions


@dataclass(frozen=True)
class ReadRecords:
    """Records of a split, from its start.

    Attributes:
        ids: of the records.
        predictions: what the model says of each, on the host; ``user_embedding`` is what items are compared with.
        seen: ids of the items of each record's slate; none where it has no slate.
    """

    ids: list[str]
    predictions: Predictions
    seen: list[list[str]]


def user_evaluator(run: BestRun) -> Evaluator:
    """Reads a run's records as the evaluation does, without ranking the data set's own catalogue for each of them.

    Args:
        run: trained to rank.
    """
    config = replace(run.config, loss=replace(run.config.loss, ranking="none"))
    return Evaluator(run.model, config, run.dataset, run.mesh)


def read_records(run: BestRun, evaluator: Evaluator, split: str, num_records: int) -> ReadRecords:
    """The first records of a split, as the evaluation reads them.

    Args:
        run: trained to rank.
        evaluator: reads the run's records.
        split: "train", "validation" or "test": the splits that the configuration lists under that name.
        num_records: at least 1; all where there are fewer.
    """
    names = getattr(run.config.data, f"{split}_splits")
    records = run.dataset.split(*names)
    num_records = min(num_records, records.num_records)
    parts: list[Predictions] = []
    predictions: Any = evaluator.predict(run.variables, names)
    # Records behind those wanted are not read.
    with closing(predictions):
        while sum(len(part.record_index) for part in parts) < num_records:
            parts.append(next(predictions))
    indices = np.arange(num_records)
    joined: Predictions = jax.tree.map(lambda *leaves: np.concatenate(leaves)[:num_records], *parts)
    return ReadRecords(records.ids(indices), joined, _slates(run, names, indices))


def read_queries(path: Path, embedding_dim: int) -> Float32[np.ndarray, "queries embedding"]:
    """User embeddings of a file: ``[queries, embedding]`` float32.

    Args:
        path: ``.npy``.
        embedding_dim: numbers of an embedding.

    Raises:
        InputError: the file cannot be read, or holds something else.
    """
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"--queries={path}: not a readable .npy file: {error}") from error
    if not isinstance(found, np.ndarray) or found.ndim != 2 or found.dtype.kind != "f" or not len(found):
        described = f"{found.dtype} {found.shape}" if isinstance(found, np.ndarray) else "several arrays"
        raise InputError(f"--queries={path}: {described}: expected floats [queries, {embedding_dim}]")
    if found.shape[1] != embedding_dim:
        raise InputError(f"--queries={path}: {found.shape[1]} numbers a row: the index has {embedding_dim}")
    bad = np.flatnonzero(~np.isfinite(found).all(axis=1))
    if bad.size:
        raise InputError(f"--queries={path}, row {bad[0]}: not finite; expected finite numbers")
    return found.astype(np.float32)


def _slates(run: BestRun, names: tuple[str, ...], indices: np.ndarray) -> list[list[str]]:
    catalogue = run.dataset.with_item_words(None).catalogue()
    if catalogue is None or not run.dataset.spec.has_slates:
        return [[] for _ in indices]
    records = run.dataset.split(*names)
    width = int(records.lengths("slate_item_index")[indices].max(initial=0))
    shown = records.gather_list("slate_item_index", indices, width, -1)
    return [[catalogue.ids[item] for item in slate if item >= 0] for slate in shown.tolist()]
