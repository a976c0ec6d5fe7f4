"""Copies records' values out of memory-mapped list columns into the arrays of a batch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64, Integer, Shaped

# XLA takes over a host array that starts at a multiple of this many bytes; any other it copies to a CPU device.
ALIGNMENT_BYTES = 64


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
        out: Shaped[np.ndarray, "batch length ..."],
        indices: Integer[np.ndarray, "batch"],
        shards: Integer[np.ndarray, "batch"],
    ) -> Int32[np.ndarray, "batch"]:
        """Copies each record's values to the start of its row of ``out``, and leaves the rest of the row as it is.

        Args:
            out: receives the values.
            indices: the records.
            shards: the shard of each.

        Returns:
            ``[batch]`` int32 numbers of values copied, at most ``length``.
        """
        kept = np.minimum(self.lengths[indices], out.shape[1])
        starts = self.starts[indices]
        rows = zip(shards.tolist(), starts.tolist(), (starts + kept).tolist(), kept.tolist(), strict=True)
        for row, (shard, start, end, size) in enumerate(rows):
            out[row, :size] = self.values[shard][start:end]
        return kept.astype(np.int32)


def aligned_empty(shape: tuple[int, ...], dtype: str) -> Shaped[np.ndarray, "..."]:
    """An array that holds anything, and starts at a multiple of :data:`ALIGNMENT_BYTES`."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory: Any = np.empty(size + ALIGNMENT_BYTES, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT_BYTES
    return memory[start : start + size].view(dtype).reshape(shape)
