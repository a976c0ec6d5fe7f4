"""Data sets of random records with the lengths that a benchmark wants."""

from pathlib import Path

import numpy as np

from benchmarks import fusion_cases
from mmei_jax.records import (
    Catalogue,
    DatasetSpec,
    DatasetWriter,
    LabelSpec,
    MaskedColumn,
    ModalitySpec,
    Ragged,
    RecordColumns,
    Slate,
)
from mmei_jax.types import MODALITIES

NUM_ITEMS = 200


def write_records(path: Path, lengths: np.ndarray, dim: int = 768) -> None:
    """Random records, all labelled, each with a slate of one item.

    Args:
        path: folder to make.
        lengths: ``[records, modalities]`` tokens.
        dim: features of a token, and of an item.
    """
    generator, num_records = np.random.default_rng(1), len(lengths)
    classes = {"emotion": fusion_cases.NUM_EMOTIONS, "intent": fusion_cases.NUM_INTENTS}
    spec = DatasetSpec(
        name="random",
        description="random features",
        source="benchmarks/random_records.py",
        licence="CC0",
        modalities={name: ModalitySpec(dim, "float32") for name in MODALITIES},
        labels={
            name: LabelSpec("categorical", tuple(f"{name}{index}" for index in range(count)))
            for name, count in classes.items()
        },
        has_slates=True,
    )
    ones = np.ones(num_records)
    slate = Slate(
        item_index=generator.integers(0, NUM_ITEMS, num_records).astype(np.int32),
        propensity=ones.astype(np.float32),
        dwell_seconds=ones.astype(np.float32),
        num_replays=ones.astype(np.int32),
        is_liked=ones.astype(bool),
        satisfaction=ones.astype(np.float32),
    )
    columns = RecordColumns(
        ids=[f"r{index}" for index in range(num_records)],
        features={
            name: Ragged(generator.normal(size=(count.sum(), dim)).astype(np.float32), count)
            for name, count in zip(MODALITIES, lengths.T, strict=True)
        },
        labels={
            name: MaskedColumn(generator.integers(0, count, num_records).astype(np.int32))
            for name, count in classes.items()
        },
        slate=slate,
        slate_lengths=ones.astype(np.int64),
    )
    catalogue = Catalogue(
        ids=[f"item{index}" for index in range(NUM_ITEMS)],
        kind=(np.arange(NUM_ITEMS) % fusion_cases.NUM_KINDS).astype(np.int32),
        kind_names=tuple(f"kind{index}" for index in range(fusion_cases.NUM_KINDS)),
        features=generator.normal(size=(NUM_ITEMS, dim)).astype(np.float32),
        texts=["{}"] * NUM_ITEMS,
    )
    with DatasetWriter(path, spec) as writer:
        writer.write_catalogue(catalogue)
        writer.write_columns("train", columns)
