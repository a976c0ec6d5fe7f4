"""Sums and counts that merge without losing precision: the arithmetic under every metric.

On devices sums are float32 and counts int32, small enough for one batch. Once ``jax.device_get`` has made NumPy arrays
of them, merging promotes to float64 and int64: a million batches add up exactly as well as two.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from clu import metrics as clu_metrics
from flax import struct
from jaxtyping import Array, Bool, Float


def promote(value: Any) -> Any:
    """NumPy values as float64 or int64; values on devices as they are.

    Args:
        value: array of any shape, NumPy or JAX, numbers.

    Example:
        >>> promote(np.float32([1.5])).dtype, promote(np.int32(2)).dtype, promote(jnp.ones(1)).dtype
        (dtype('float64'), dtype('int64'), dtype('float32'))
    """
    if not isinstance(value, np.ndarray | np.generic):
        return value
    return value.astype(np.int64 if np.issubdtype(value.dtype, np.integer) else np.float64)


def add_counts(left: Any, right: Any) -> Any:
    """The sum of two arrays of one shape, in float64 or int64 when they are NumPy arrays.

    Example:
        >>> int(add_counts(np.int32(2**31 - 1), np.int32(1)))
        2147483648
    """
    return promote(left) + promote(right)


def divide(total: Any, count: Any) -> float:
    """Total over count on the host, in float64; NaN when the count is 0.

    Args:
        total: scalar, on the host or on a device.
        count: scalar, on the host or on a device.

    Example:
        >>> divide(np.float32(3.0), np.int32(4)), divide(0.0, 0)
        (0.75, nan)
    """
    count = float(np.asarray(count, np.float64))
    return float(np.asarray(total, np.float64)) / count if count else float("nan")


@struct.dataclass
class Means(clu_metrics.Metric):
    """Means of per-record values that share one mask.

    Attributes:
        totals: sums of the counted records' values by name, float32 scalars (float64 on the host).
        count: counted records, int32 scalar (int64 on the host).

    Example:
        >>> means = Means.from_model_output({"loss": jnp.array([1.0, 3.0, 9.0])}, jnp.array([True, True, False]))
        >>> means.compute()
        {'loss': 2.0}
    """

    totals: dict[str, Any]
    count: Any

    @classmethod
    def from_model_output(
        cls, values: Mapping[str, Float[Array, "batch"]], is_counted: Bool[Array, "batch"]
    ) -> "Means":
        """Sums the counted records' values.

        Args:
            values: ``[batch]`` float by name; arbitrary, NaN included, where not counted.
            is_counted: ``[batch]`` bool.
        """
        totals = {name: jnp.sum(jnp.where(is_counted, value, 0.0)) for name, value in values.items()}
        return cls(totals=totals, count=jnp.sum(is_counted, dtype=jnp.int32))

    def merge(self, other: "Means") -> "Means":
        """Adds sums and counts."""
        totals = {name: add_counts(total, other.totals[name]) for name, total in self.totals.items()}
        return self.replace(totals=totals, count=add_counts(self.count, other.count))

    def compute(self) -> dict[str, float]:
        """Sum over count, by name."""
        return {name: divide(total, self.count) for name, total in self.totals.items()}
