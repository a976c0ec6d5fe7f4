"""Copies records' values out of memory-mapped list columns into the arrays of a batch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import Int32, Int64, Integer, Shaped


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
        out: Sequence[np.ndarray] | Shaped[np.ndarray, "batch length ..."],
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
        if isinstance(out, np.ndarray) and len(indices) and self._fill_whole_rows(out, indices, shards):
            return np.full(len(indices), out.shape[1], np.int32)
        kept = []
        starts, lengths = self.starts[indices].tolist(), self.lengths[indices].tolist()
        for array, shard, start, length in zip(out, shards.tolist(), starts, lengths, strict=True):
            size = min(length, len(array))
            array[:size] = self.values[shard][start : start + size]
            kept.append(size)
        return np.asarray(kept, np.int32)

    def _fill_whole_rows(self, out: np.ndarray, indices: np.ndarray, shards: np.ndarray) -> bool:
        """Whether every row could be filled to its end, from one shard; then that is done.

        One call that copies without the interpreter's lock: other reader threads copy at the same time. ("raise", the
        default mode, would copy twice; all positions were checked when the column was opened.)
        """
        length = out.shape[1]
        if (self.lengths[indices] < length).any() or (shards != shards[0]).any():
            return False
        positions = self.starts[indices][:, None] + np.arange(length)
        np.take(self.values[shards[0]], positions, axis=0, out=out, mode="clip")
        return True


def aligned_empty(shape: tuple[int, ...], dtype: str) -> Shaped[np.ndarray, "..."]:
    """An array that holds anything, and starts where a CPU device can use it in place.

    XLA takes over a host array that starts at a multiple of 64 bytes, and copies any other. Arrow's memory does, and
    its pool keeps what is let go for the next batch; NumPy's goes back to the system, which clears every page again.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    return np.ndarray(shape, dtype, buffer=pa.allocate_buffer(size))
