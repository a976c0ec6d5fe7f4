"""A loss as one value per record and a mask of the records that count: summed and counted, divided once."""

from typing import Any

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float


@struct.dataclass
class RecordLosses:
    """The loss of every record of a batch, as a sum and a count that are divided once.

    Attributes:
        values: ``[batch]`` float32, the loss times the record's weight; exactly 0 where not counted. Not finite where a
            counted record's loss is not.
        is_counted: ``[batch]`` bool.
        weights: ``[batch]`` float32, what each record adds to the count: 1 (or its class weight) where counted, else 0.

    Example:
        >>> losses = RecordLosses(
        ...     values=jnp.array([3.0, 0.0, 1.0]),
        ...     is_counted=jnp.array([True, False, True]),
        ...     weights=jnp.array([1.0, 0.0, 1.0]),
        ... )
        >>> float(losses.total()), float(losses.count()), float(losses.mean())
        (4.0, 2.0, 2.0)
    """

    # Any: jax.eval_shape, jax.lax.scan and jax.device_get also put shapes, stacked and NumPy arrays here.
    values: Any
    is_counted: Any
    weights: Any

    def total(self) -> Float[Array, ""]:
        """Sum of the values, float32."""
        return jnp.sum(self.values)

    def count(self) -> Float[Array, ""]:
        """Sum of the weights, float32: the number of counted records unless classes are weighted."""
        return jnp.sum(self.weights)

    def mean(self) -> Float[Array, ""]:
        """Total over count, float32; 0 with zero gradient when nothing is counted."""
        return self.total() / one_if_zero(self.count())


def make_losses(
    values: Float[Array, "batch"], is_counted: Bool[Array, "batch"], weights: Float[Array, "batch"] | None
) -> RecordLosses:
    """Masks and weighs the losses of a batch.

    Args:
        values: ``[batch]`` float32, anything where not counted.
        is_counted: ``[batch]`` bool.
        weights: ``[batch]`` float32, anything where not counted; None weighs all 1.

    Returns:
        RecordLosses.

    Example:
        >>> losses = make_losses(jnp.array([3.0, jnp.nan]), jnp.array([True, False]), jnp.array([0.5, 2.0]))
        >>> losses.values.tolist(), losses.weights.tolist(), float(losses.mean())
        ([1.5, 0.0], [0.5, 0.0], 3.0)
    """
    weights = is_counted.astype(jnp.float32) if weights is None else jnp.where(is_counted, weights, 0.0)
    return RecordLosses(
        values=jnp.where(is_counted, values * weights, 0.0),
        is_counted=is_counted,
        weights=weights,
    )


def one_if_zero(count: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The count, or 1 where it is 0: a denominator that keeps an empty sum, and its gradient, at exactly 0.

    Args:
        count: float32 of any shape, at least 0.

    Example:
        >>> one_if_zero(jnp.array([3.0, 0.0])).tolist()
        [3.0, 1.0]
    """
    return jnp.where(count > 0.0, count, 1.0)
