"""Spreads values of records over the places of a batch; filler takes the places that no record has."""

from typing import Any

import numpy as np
from jaxtyping import Bool, Shaped


def spread(
    values: Shaped[np.ndarray, "records ..."], is_record: Bool[np.ndarray, "batch"], fill: int | float = 0
) -> Any:
    """The values of records at the places of a batch that hold records, in order; ``fill`` everywhere else.

    Args:
        values: one entry for each record.
        is_record: as many True as there are records.
        fill: what the other places hold.

    Returns:
        ``[batch, ...]`` array of the values' type; the values themselves if every place holds a record.

    Example:
        >>> spread(np.array([7, 8]), np.array([True, False, True]), fill=-1)
        array([ 7, -1,  8])
    """
    if len(values) == len(is_record):
        return values
    placed = np.full((len(is_record), *values.shape[1:]), fill, values.dtype)
    placed[is_record] = values
    return placed
