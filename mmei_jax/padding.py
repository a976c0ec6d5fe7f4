"""Completes the leading axis of host arrays with filler, so that every batch has the same number of rows."""

from typing import Any

import numpy as np
from jaxtyping import Shaped


def pad_rows(array: Shaped[np.ndarray, "records ..."], size: int, fill: int | float = 0) -> Any:
    """``array`` with rows of ``fill`` after its own, ``size`` in all; the array itself if it has them already.

    Args:
        array: at most ``size`` rows.
        size: rows of the result.
        fill: what the added rows hold.

    Returns:
        ``[size, ...]`` array of the same type.
    """
    if len(array) == size:
        return array
    padded = np.full((size, *array.shape[1:]), fill, array.dtype)
    padded[: len(array)] = array
    return padded
