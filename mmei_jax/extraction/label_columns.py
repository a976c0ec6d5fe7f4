"""Reads one value per record from a source: labels, ids and other scalars. A value that cannot be read is named."""

from typing import Any

import numpy as np

from mmei_jax.extraction.feature_sources import ColumnSource
from mmei_jax.records import LabelSpec, MaskedColumn
from mmei_jax.types import InputError


def read_strings(source: ColumnSource, key: str) -> list[str | None]:
    """Strings; None where a cell is empty."""
    return [value or None for value in source.column(key).astype(np.str_).tolist()]


def read_numbers(
    source: ColumnSource, key: str, ids: list[str], dtype: type, *, accepted: str = "a number"
) -> MaskedColumn:
    """Numbers of type ``dtype``; missing where a cell is empty or NaN. ``accepted``: what messages ask for.

    Raises:
        InputError: a value is no number, or not whole where ``dtype`` is; names the record.
    """
    values = source.column(key)
    if values.ndim != 1:
        raise InputError(f"{source.path}: key {key!r} has shape {list(values.shape)}: expected one number per record")
    if values.dtype.kind in "US":
        is_present = values != ""
    else:
        is_present = ~np.isnan(values) if values.dtype.kind == "f" else np.ones(len(values), bool)
    numbers: np.ndarray = np.zeros(len(values), dtype)
    for row in np.flatnonzero(is_present):
        try:
            number = float(values[row])
            numbers[row] = number
        except (ValueError, OverflowError) as error:
            raise InputError(_wrong(source, key, ids[row], values[row], accepted)) from error
        if numbers[row] != number:
            raise InputError(_wrong(source, key, ids[row], values[row], "a whole number"))
    return MaskedColumn(numbers, is_present)


def _wrong(source: ColumnSource, key: str, record_id: str, value: Any, accepted: str) -> str:
    return f"{source.path}: record {record_id!r}: {key} = {str(value)!r}: expected {accepted}"


def read_label(source: ColumnSource, key: str, label: LabelSpec, ids: list[str]) -> MaskedColumn:
    """A label, by class name or class id; missing where a cell is empty or NaN.

    A column with at least one class name in it is read as names, every other one as class ids.

    Raises:
        InputError: a value is not among the classes, or not a number; names the record.
    """
    if label.kind == "real":
        return read_numbers(source, key, ids, np.float64)
    values = source.column(key)
    position = {name: index for index, name in enumerate(label.class_names)}
    accepted = f"one of {', '.join(label.class_names)}"
    if label.kind == "multi_label":
        if values.dtype.kind in "US":
            return _read_class_lists(source, key, values, position, ids)
        if values.shape != (len(ids), len(position)):
            raise InputError(
                f"{source.path}: key {key!r} has shape {list(values.shape)}: expected [{len(ids)}, {len(position)}]"
            )
        # A row of nothing but NaN has no label; one with some is a mistake, which the writer refuses.
        is_labelled = ~np.isnan(values).all(axis=1)
        return MaskedColumn(np.where(is_labelled[:, None], values, 0.0).astype(np.float32), is_labelled)
    is_name = values.dtype.kind in "US" and any(value in position for value in values.tolist())
    if not is_name:
        limits = f"{accepted} (class ids 0 to {len(position) - 1})"
        column = read_numbers(source, key, ids, np.int64, accepted=limits)
        numbers = np.asarray(column.values)
        presence = np.asarray(column.is_present)
        bad = np.flatnonzero(presence & ((numbers < 0) | (numbers >= len(position))))
        if bad.size:
            raise InputError(_wrong(source, key, ids[bad[0]], values[bad[0]], limits))
        return column
    classes = np.zeros(len(values), np.int64)
    for row, value in enumerate(values.tolist()):
        if value and value not in position:
            raise InputError(_wrong(source, key, ids[row], value, accepted))
        classes[row] = position.get(value, 0)
    return MaskedColumn(classes, values != "")


def _read_class_lists(
    source: ColumnSource, key: str, values: np.ndarray, position: dict[str, int], ids: list[str]
) -> MaskedColumn:
    """Cells such as "joy|surprise"; "none" for no class, empty where not labelled."""
    rows = np.zeros((len(values), len(position)), np.float32)
    for row, cell in enumerate(values.tolist()):
        for name in cell.split("|") if cell not in ("", "none") else []:
            if name not in position:
                accepted = f"names among {', '.join(position)} joined by '|', or none"
                raise InputError(_wrong(source, key, ids[row], cell, accepted))
            rows[row, position[name]] = 1
    return MaskedColumn(rows, values != "")
