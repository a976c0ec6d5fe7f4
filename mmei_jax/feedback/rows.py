"""One line on the rows of a column that are not as they should be."""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Bool

from mmei_jax.types import InputError

# Most rows that a message names.
_ROWS_TOLD = 5


def refuse_rows(is_good: Bool[np.ndarray, "rows"], name: str, value_of: Callable[[int], Any], accepted: str) -> None:
    """Does nothing where all rows are good.

    Args:
        is_good: ``[rows]``.
        name: of the column.
        value_of: the value of a row.
        accepted: what would be accepted.

    Raises:
        InputError: some are not; names the first of them, the value of the very first, and what is accepted.
    """
    bad = np.flatnonzero(~is_good)
    if len(bad):
        told = ", ".join(str(row) for row in bad[:_ROWS_TOLD]) + (", ..." if len(bad) > _ROWS_TOLD else "")
        raise InputError(f"{name}, row {told}: {value_of(int(bad[0]))}: expected {accepted}")
