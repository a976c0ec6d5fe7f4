"""A whole split on the devices, and batches gathered from it there: the host sends positions, not features.

Tokens lie one after the other, without padding. A plan says which of them goes to which place of a batch; it follows
from the same order and the same layouts as the batches that :mod:`mmei_jax.input_pipeline` reads.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Int64, Integer

from mmei_jax.batching import BatchReader, place_tokens
from mmei_jax.config import Config
from mmei_jax.packing import Arranger, Layout, padded_layouts
from mmei_jax.padding import spread
from mmei_jax.ranking_targets import RankingStatistics
from mmei_jax.records import Split
from mmei_jax.types import MODALITIES, Batch, TokenSequence

# Records that are padded at once while a table is made.
_RECORDS_PER_CHUNK = 4_096


@struct.dataclass
class DeviceSplit:
    """All records of a split.

    Attributes:
        tokens: by modality, ``[total_tokens, dim]`` features as stored, record after record, cut at the last length
            bucket.
        records: everything else, as a batch of the whole split without token sequences.
    """

    # Any, here and below: NumPy arrays, arrays on devices, and their shapes.
    tokens: dict[str, Any]
    records: Batch


@struct.dataclass
class BatchPlan:
    """What goes where in a batch; may have leading axes (steps, replicas).

    Attributes:
        token_index: by modality, ``[rows, tokens]`` int32 into the table's tokens; 0 in padding.
        segment_ids: by modality, ``[rows, tokens]`` int32.
        record_index: ``[batch]`` int32 position in the split, -1 for filler.
    """

    token_index: dict[str, Any]
    segment_ids: dict[str, Any]
    record_index: Any


def read_device_split(split: Split, config: Config, statistics: RankingStatistics | None) -> DeviceSplit:
    """Reads a whole split into host memory (NumPy arrays).

    Args:
        split: the records.
        config: modalities, most tokens of a record, and tasks.
        statistics: of the training split; None when ``config.loss.ranking`` is "none".

    Raises:
        InputError: the data set lacks what the configuration reads, or holds a record that does not fit it.
    """
    reader = BatchReader(split, config, statistics)
    layout = padded_layouts(config.data, 1)[-1]
    tokens: dict[str, list[np.ndarray]] = {name: [] for name in MODALITIES if name in config.data.modalities}
    records: list[Batch] = []
    for start in range(0, split.num_records, _RECORDS_PER_CHUNK):
        chunk = reader.read(np.arange(start, min(start + _RECORDS_PER_CHUNK, split.num_records)), layout)
        for name, sequence in chunk.sequences().items():
            tokens[name].append(np.asarray(sequence.features)[np.asarray(sequence.segment_ids) > 0])
        absent: dict[str, Any] = dict.fromkeys(MODALITIES)
        records.append(dataclasses.replace(chunk, **absent))
    joined: Batch = jax.tree.map(lambda *leaves: np.concatenate(leaves), *records)
    # One row at least, so that an index is always valid.
    rows: dict[str, Any] = {name: np.concatenate(parts) for name, parts in tokens.items()}
    for name, part in rows.items():
        if not len(part):
            rows[name] = np.zeros((1, part.shape[1]), part.dtype)
    return DeviceSplit(tokens=rows, records=joined)


def gather_batch(table: DeviceSplit, plan: BatchPlan) -> Batch:
    """The batch that a plan describes, as :class:`~mmei_jax.batching.BatchReader` would have read it.

    Padding and filler hold other records' values here, and nothing may depend on those.

    Args:
        table: on the devices.
        plan: without leading axes.
    """
    is_record = plan.record_index >= 0
    taken: Batch = jax.tree.map(lambda leaf: leaf[jnp.maximum(plan.record_index, 0)], table.records)
    changes: dict[str, Any] = {
        name: TokenSequence(features=tokens[plan.token_index[name]], segment_ids=plan.segment_ids[name])
        for name, tokens in table.tokens.items()
    }
    for name in ("emotion", "intent"):
        label: Any = getattr(taken, name)
        if label is not None:
            changes[name] = label.replace(is_labelled=label.is_labelled & is_record)
    ranking: Any = taken.ranking
    if ranking is not None:
        slate = ranking.slate
        changes["ranking"] = ranking.replace(
            positive_index=jnp.where(is_record, ranking.positive_index, -1),
            has_positive=ranking.has_positive & is_record,
            relevant_index=jnp.where(is_record[:, None], ranking.relevant_index, -1),
            slate=None if slate is None else slate.replace(is_shown=slate.is_shown & is_record[:, None]),
        )
    gathered: Batch = dataclasses.replace(taken, **changes, is_record=is_record, record_index=plan.record_index)
    return gathered


class Planner:
    """Makes plans for one split."""

    def __init__(self, split: Split, config: Config) -> None:
        """Finds where each record's tokens begin in the table.

        Args:
            split: that of the table.
            config: that of the table.
        """
        data = config.data
        self._arranger = Arranger(split, data, data.batch_size)
        self._lengths: dict[str, Int64[np.ndarray, records]] = {}
        self._starts: dict[str, Int64[np.ndarray, records]] = {}
        for name in MODALITIES:
            if name in data.modalities:
                lengths = np.minimum(split.lengths(name), getattr(data.max_tokens, name)[-1]).astype(np.int64)
                self._lengths[name], self._starts[name] = lengths, lengths.cumsum() - lengths

    def plan(self, batches: Sequence[Integer[np.ndarray, "batch"]]) -> BatchPlan:
        """One plan for several batches, in the first layout into which all of them fit.

        Args:
            batches: records of each.

        Returns:
            A plan of NumPy arrays with a leading axis of batches.
        """
        layout, places = self._arranger.arrange_alike(batches)
        plans = [self._plan_one(indices, layout) for indices in places]
        stacked: BatchPlan = jax.tree.map(lambda *leaves: np.stack(leaves), *plans)
        return stacked

    def _plan_one(self, places: Int64[np.ndarray, "places"], layout: Layout) -> BatchPlan:
        is_record = places >= 0
        records = places[is_record]
        token_index, segment_ids = {}, {}
        for name, num_tokens in layout.num_tokens.items():
            lengths = np.minimum(self._lengths[name][records], num_tokens)
            _, ids = place_tokens(spread(lengths, is_record), layout.records_per_row, num_tokens)
            # Every token of a row in order: the table's position of the record's first, and its own place after it.
            index = np.zeros(ids.shape, np.int32)
            within = np.arange(lengths.sum()) - np.repeat(lengths.cumsum() - lengths, lengths)
            index[ids > 0] = np.repeat(self._starts[name][records], lengths) + within
            token_index[name], segment_ids[name] = index, ids
        return BatchPlan(token_index=token_index, segment_ids=segment_ids, record_index=places.astype(np.int32))
