"""Deals records of several lengths to rows of one size, so that few rows are needed.

Everything follows from the lengths alone: the same lengths are dealt in the same way in every process and every run.
"""

import numpy as np
from jaxtyping import Int64, Integer

# Rows looked at together.
_BLOCK = 512


def pack(
    lengths: Integer[np.ndarray, "records modalities"],
    capacity: Integer[np.ndarray, "modalities"],
    records_per_row: int,
) -> Int64[np.ndarray, "records"]:
    """Deals records to rows so that few rows are needed: first-fit decreasing, in all modalities at once.

    The records that take the largest share of a row, in the modality in which they take most, come first, and each goes
    to the first row that has room for it (Panigrahy, Talwar, Uyeda and Wieder, "Heuristics for vector bin packing",
    2011). On lengths of utterances, best fit needs as many rows.

    The time grows with the records times the different lengths among them: linear in one modality, quadratic at worst
    in several.

    Args:
        lengths: ``[records, modalities]`` tokens of each record, none above the capacity.
        capacity: ``[modalities]`` tokens that fit into a row.
        records_per_row: most records in a row.

    Returns:
        ``[records]`` the row of each record, counted from 0, none left empty.

    Raises:
        ValueError: a record is longer than a row.

    Example:
        >>> pack(np.array([[3], [1], [2], [2]]), capacity=np.array([4]), records_per_row=2)
        array([0, 0, 1, 1])
    """
    num_records = len(lengths)
    sizes = np.concatenate([lengths, np.ones((num_records, 1), lengths.dtype)], axis=1)
    limits = np.append(capacity, records_per_row)
    if (sizes > limits).any():
        raise ValueError(f"a record is longer than a row of {capacity.tolist()} tokens")
    free = np.repeat(limits[:, None], num_records, axis=1)
    rows = np.zeros(num_records, np.int64)
    # Rows only fill up: where a record did not fit, none of the same lengths does later.
    first_rows: dict[bytes, int] = {}
    for record in np.argsort(-(sizes / limits).max(axis=1), kind="stable"):
        size = sizes[record]
        key = size.tobytes()
        row = _first_with_room(free, size, first_rows.get(key, 0))
        first_rows[key] = row
        free[:, row] -= size
        rows[record] = row
    return rows


def _first_with_room(free: Integer[np.ndarray, "sizes rows"], size: Integer[np.ndarray, "sizes"], start: int) -> int:
    """The first row from ``start`` on that has room; there is one, since there are as many rows as records."""
    while True:
        has_room = np.all(free[:, start : start + _BLOCK] >= size[:, None], axis=0)
        index = int(has_room.argmax())
        if has_room[index]:
            return start + index
        start += _BLOCK


def arrange_in_rows(
    rows: Integer[np.ndarray, "records"], num_rows: int, records_per_row: int
) -> Int64[np.ndarray, "places"]:
    """Gives each record a place in its row, in the order of the records.

    Args:
        rows: ``[records]`` the row of each record, as :func:`pack` gives it.
        num_rows: rows, at least as many as are used.
        records_per_row: places in each row.

    Returns:
        ``[num_rows * records_per_row]`` the record at each place, row by row; -1 where there is none.

    Example:
        >>> arrange_in_rows(np.array([0, 1, 0]), num_rows=3, records_per_row=2)
        array([ 0,  2,  1, -1, -1, -1])
    """
    places = np.full(num_rows * records_per_row, -1, np.int64)
    order = np.argsort(rows, kind="stable")
    sorted_rows = rows[order]
    # The place within the row: how far a record is behind the first of its row.
    segment = np.arange(len(order)) - np.searchsorted(sorted_rows, sorted_rows)
    places[sorted_rows * records_per_row + segment] = order
    return places
