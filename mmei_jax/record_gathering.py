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
        length = out.shape[1]
        kept = np.minimum(self.lengths[indices], length)
        starts = self.starts[indices]
        if len(indices) and (kept == length).all() and (shards == shards[0]).all():
            # One call that copies without the interpreter's lock: other reader threads copy at the same time. ("raise",
            # the default mode, would copy twice; all positions were checked when the column was opened.)
            np.take(self.values[shards[0]], starts[:, None] + np.arange(length), axis=0, out=out, mode="clip")
            return kept.astype(np.int32)
        rows = zip(shards.tolist(), starts.tolist(), (starts + kept).tolist(), kept.tolist(), strict=True)
        for row, (shard, start, end, size) in enumerate(rows):
            out[row, :size] = self.values[shard][start:end]
        return kept.astype(np.int32)


def aligned_empty(shape: tuple[int, ...], dtype: str) -> Shaped[np.ndarray, "..."]:
    """An array that holds anything, and starts where a CPU device can use it in place.

    XLA takes over a host array that starts at a multiple of 64 bytes, and copies any other. Arrow's memory does, and
    its pool keeps what is let go for the next batch; NumPy's goes back to the system, which clears every page again.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    return np.ndarray(shape, dtype, buffer=pa.allocate_buffer(size))
