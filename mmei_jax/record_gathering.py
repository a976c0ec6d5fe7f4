"""Copies records' values out of memory-mapped list columns into the arrays of a batch."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32, Int64, Integer


@dataclass(frozen=True)
class RaggedColumn:
    """A list column over all shards: its memory-mapped values, and where each record's lie.

    Attributes:
        values: ``[total, ...]`` array of each shard.
        starts, lengths: ``[records]`` int64, a record's first value in its shard and its number of values.
    """

    values: Sequence[np.ndarray]
    starts: Int64[np.ndarray, "records"]
    lengths: Int64[np.ndarray, "records"]

    def fill(
        self,
        out: Iterable[np.ndarray],
        indices: Integer[np.ndarray, "batch"],
        shards: Integer[np.ndarray, "batch"],
    ) -> Int32[np.ndarray, "batch"]:
        """Copies each record's first values to an array of its own, and leaves the rest of that array as it is.

        Args:
            out: an array for each record (a row, or a part of one), which receives as many values as it has room for.
            indices: the records.
            shards: the shard of each.

        Returns:
            ``[batch]`` int32 numbers of values copied.
        """
        kept = []
        starts, lengths = self.starts[indices].tolist(), self.lengths[indices].tolist()
        for array, shard, start, length in zip(out, shards.tolist(), starts, lengths, strict=True):
            size = min(length, len(array))
            array[:size] = self.values[shard][start : start + size]
            kept.append(size)
        return np.asarray(kept, np.int32)
