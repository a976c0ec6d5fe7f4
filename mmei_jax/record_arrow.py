"""Turns records into Arrow tables, with every check that a single record can fail.

Values behind a null are always zero, so that equal records give equal bytes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from mmei_jax.record_schema import (
    FEATURE_DTYPES,
    SLATE_FIELDS,
    Catalogue,
    DatasetSpec,
    LabelSpec,
    MaskedColumn,
    Ragged,
    Record,
    RecordColumns,
    Slate,
    catalogue_schema,
)
from mmei_jax.types import InputError


def columns_to_table(columns: RecordColumns, spec: DatasetSpec, schema: pa.Schema) -> pa.Table:
    """Checks and converts records; the arrays are copied.

    Raises:
        InputError: a record does not fit ``spec``; names the record.
    """
    ids = columns.ids
    _refuse_unknown(columns.features, spec.modalities, "modality")
    _refuse_unknown(columns.labels, spec.labels, "label")
    _refuse_unknown(columns.extras, spec.extras, "extra column")
    arrays: dict[str, pa.Array] = {"id": _ids_to_arrow(ids)}
    for name, values in (("user_id", columns.user_ids), ("dialogue_id", columns.dialogue_ids)):
        if values is not None:
            arrays[name] = _scalar_to_arrow(name, MaskedColumn(values), pa.large_string(), ids)
    if columns.turns is not None:
        arrays["turn"] = _scalar_to_arrow("turn", columns.turns, pa.int32(), ids)
    for name, ragged in columns.features.items():
        arrays[name] = _features_to_arrow(name, ragged, spec, ids)
    for name, column in columns.labels.items():
        arrays[f"label_{name}"] = _label_to_arrow(name, column, spec.labels[name], ids)
    for name, column in columns.extras.items():
        arrays[f"extra_{name}"] = _scalar_to_arrow(name, column, schema.field(f"extra_{name}").type, ids)
    if columns.slate is not None:
        if not spec.has_slates or columns.slate_lengths is None:
            raise InputError(f"record {ids[0]!r}: slates need has_slates in the description, and slate_lengths")
        arrays.update(_slates_to_arrow(columns.slate, columns.slate_lengths, ids))
    if columns.relevant_items is not None:
        if not spec.has_relevant_items:
            raise InputError(f"record {ids[0]!r}: has relevant items, the description says has_relevant_items=False")
        _check_item_indices("relevant_items", columns.relevant_items, ids)
        arrays["relevant_items"] = _ragged_to_arrow("relevant_items", columns.relevant_items, pa.int32(), ids)
    ordered = [arrays.get(column.name) for column in schema]
    filled = [
        pa.nulls(len(ids), column.type) if array is None else array
        for array, column in zip(ordered, schema, strict=True)
    ]
    return pa.Table.from_arrays(filled, schema=schema)


def records_to_columns(records: Sequence[Record], spec: DatasetSpec) -> RecordColumns:
    """Joins single records.

    Raises:
        InputError: features, a multi-label row or a slate of a record has the wrong shape or type; names the record.
    """
    ids = [record.id for record in records]
    for record in records:
        _refuse_unknown(record.features, spec.modalities, f"record {record.id!r}: modality")
        _refuse_unknown(record.labels, spec.labels, f"record {record.id!r}: label")
        _refuse_unknown(record.extras, spec.extras, f"record {record.id!r}: extra column")
    features = {
        name: _join(ids, [record.features.get(name) for record in records], name, (modality.dim,), modality.dtype)
        for name, modality in spec.modalities.items()
    }
    labels = {name: _join_labels(records, name, label) for name, label in spec.labels.items()}
    extras = {
        name: _masked([record.extras.get(name) for record in records], kind) for name, kind in spec.extras.items()
    }
    columns = RecordColumns(
        ids=ids,
        user_ids=[record.user_id for record in records],
        dialogue_ids=[record.dialogue_id for record in records],
        turns=_masked([record.turn for record in records], "int32"),
        features=features,
        labels=labels,
        extras=extras,
    )
    if any(record.slate is not None for record in records):
        columns.slate, columns.slate_lengths = _join_slates(ids, [record.slate for record in records])
    if any(record.relevant_items is not None for record in records):
        relevant = [record.relevant_items for record in records]
        columns.relevant_items = _join(ids, relevant, "relevant_items", (), np.int32)
    return columns


def catalogue_to_table(catalogue: Catalogue) -> pa.Table:
    """Checks and converts a catalogue.

    Raises:
        InputError: its columns differ in length, ids repeat, a kind is unknown, features are not finite.
    """
    num_items = len(catalogue.ids)
    sizes = {len(catalogue.ids), len(catalogue.texts), len(catalogue.kind), len(catalogue.features)}
    if len(sizes) != 1 or num_items == 0 or catalogue.features.ndim != 2:
        raise InputError(f"catalogue: expected as many kinds, features and texts as ids ({num_items}), at least one")
    if len(set(catalogue.ids)) != num_items:
        raise InputError("catalogue: ids must be unique")
    bad = np.flatnonzero((catalogue.kind < 0) | (catalogue.kind >= len(catalogue.kind_names)))
    if bad.size:
        item = catalogue.ids[bad[0]]
        raise InputError(f"catalogue item {item!r}: kind {catalogue.kind[bad[0]]}: expected one of the kind_names")
    features = np.ascontiguousarray(catalogue.features, np.float32)
    bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if bad.size:
        raise InputError(f"catalogue item {catalogue.ids[bad[0]]!r}: features are not finite")
    schema = catalogue_schema(features.shape[1], catalogue.kind_names)
    arrays = [
        pa.array(catalogue.ids, pa.large_string()),
        pa.array(catalogue.kind.astype(np.int32)),
        pa.array(catalogue.texts, pa.large_string()),
        # Not from_arrays, which finds no number of items where they have no features.
        pa.Array.from_buffers(
            schema.field("features").type, num_items, [None], children=[pa.array(features.reshape(-1))]
        ),
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def largest_item(columns: RecordColumns) -> tuple[int, str]:
    """The largest catalogue row that these records name, and a record that names it; (-1, "") without any."""
    found = (-1, "")
    groups = []
    if columns.slate is not None and columns.slate_lengths is not None:
        groups.append(Ragged(np.asarray(columns.slate.item_index), columns.slate_lengths))
    if columns.relevant_items is not None:
        groups.append(columns.relevant_items)
    for group in groups:
        if len(group.values):
            position = int(np.argmax(group.values))
            found = max(found, (int(group.values[position]), columns.ids[_owner(group.lengths, position)]))
    return found


def _refuse_unknown(given: dict[str, Any], known: dict[str, Any], what: str) -> None:
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise InputError(f"{what} {unknown[0]!r}: the data set's description has {', '.join(known) or 'none'}")


def _owner(lengths: np.ndarray, position: int) -> int:
    """The record to which the value at ``position`` of a ragged column belongs."""
    ends = np.cumsum(np.maximum(lengths, 0))
    return int(np.searchsorted(ends, position, side="right"))


def _ids_to_arrow(ids: Sequence[str]) -> pa.Array:
    for record_id in ids:
        if not isinstance(record_id, str) or not record_id:
            raise InputError(f"record id {record_id!r}: expected a string that is not empty")
    return pa.array(ids, pa.large_string())


def _check_lengths(name: str, ragged: Ragged, ids: Sequence[str]) -> np.ndarray:
    lengths = np.asarray(ragged.lengths)
    if lengths.shape != (len(ids),) or lengths.dtype.kind not in "iu":
        raise InputError(f"{name}: lengths {lengths.dtype}{lengths.shape}: expected one integer for each of {len(ids)}")
    bad = np.flatnonzero(lengths < -1)
    if bad.size:
        raise InputError(f"record {ids[bad[0]]!r}: {name} has length {lengths[bad[0]]}: expected -1 (absent) or more")
    total = int(np.maximum(lengths, 0).sum())
    if total != len(ragged.values):
        raise InputError(f"{name}: {len(ragged.values)} values, but the lengths add up to {total}")
    return lengths.astype(np.int64)


def _ragged_to_arrow(
    name: str, ragged: Ragged, kind: pa.DataType, ids: Sequence[str], values: pa.Array | None = None
) -> pa.Array:
    lengths = _check_lengths(name, ragged, ids)
    if values is None:
        values = pa.array(_cast(name, np.asarray(ragged.values), kind))
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.maximum(lengths, 0))])
    mask = pa.array(lengths < 0) if (lengths < 0).any() else None
    return pa.LargeListArray.from_arrays(pa.array(offsets), values, mask=mask)


def _features_to_arrow(name: str, ragged: Ragged, spec: DatasetSpec, ids: Sequence[str]) -> pa.Array:
    modality = spec.modalities[name]
    values = np.asarray(ragged.values)
    is_feature = modality.dtype in FEATURE_DTYPES
    is_type = values.dtype.kind == "f" if is_feature else values.dtype == modality.dtype
    if values.ndim != 2 or values.shape[1] != modality.dim or not is_type:
        expected = f"{'floats' if is_feature else modality.dtype} [tokens, {modality.dim}]"
        raise InputError(f"record {ids[0]!r}: {name} is {values.dtype}{list(values.shape)}: expected {expected}")
    lengths = _check_lengths(name, ragged, ids)
    empty = np.flatnonzero(lengths == 0)
    if empty.size:
        raise InputError(f"record {ids[empty[0]]!r}: {name} has 0 tokens: give at least one, or none at all (absent)")
    # What is finite in float32 may overflow in float16: check what is stored. Overflow is reported, not warned about.
    with np.errstate(over="ignore"):
        stored = values.astype(modality.dtype, order="C", copy=True)
    bad = np.flatnonzero(~np.isfinite(stored).all(axis=1))
    if bad.size:
        record_id = ids[_owner(lengths, int(bad[0]))]
        raise InputError(f"record {record_id!r}: {name} holds values that are not finite as {modality.dtype}")
    tokens = pa.FixedSizeListArray.from_arrays(pa.array(stored.reshape(-1)), modality.dim)
    return _ragged_to_arrow(name, ragged, tokens.type, ids, tokens)


def _presence(name: str, column: MaskedColumn, ids: Sequence[str]) -> np.ndarray:
    if len(column.values) != len(ids):
        raise InputError(f"{name}: {len(column.values)} values for {len(ids)} records")
    if column.is_present is None:
        return np.ones(len(ids), bool)
    is_present = np.asarray(column.is_present, bool)
    if is_present.shape != (len(ids),):
        raise InputError(f"{name}: is_present has shape {is_present.shape}: expected ({len(ids)},)")
    return is_present


def _scalar_to_arrow(name: str, column: MaskedColumn, kind: pa.DataType, ids: Sequence[str]) -> pa.Array:
    is_present = _presence(name, column, ids)
    if pa.types.is_large_string(kind):
        values = [value if keep else None for value, keep in zip(column.values, is_present, strict=True)]
        bad = [index for index, value in enumerate(values) if value is not None and not isinstance(value, str)]
        if bad:
            raise InputError(f"record {ids[bad[0]]!r}: {name} = {values[bad[0]]!r}: expected a string or None")
        return pa.array(values, kind)
    given = np.asarray(column.values)
    numbers = _cast(name, np.where(is_present, given, given.dtype.type(0)), kind)
    bad_numbers = np.flatnonzero(~np.isfinite(numbers))
    if bad_numbers.size:
        raise InputError(f"record {ids[bad_numbers[0]]!r}: {name} is not finite")
    return pa.array(numbers, kind, mask=None if is_present.all() else ~is_present)


def _label_to_arrow(name: str, column: MaskedColumn, label: LabelSpec, ids: Sequence[str]) -> pa.Array:
    is_present = _presence(name, column, ids)
    num_classes = len(label.class_names)
    if label.kind == "real":
        return _scalar_to_arrow(f"label {name}", column, pa.float32(), ids)
    values = np.asarray(column.values)
    if label.kind == "categorical":
        is_bad = is_present & ((values < 0) | (values >= num_classes))
        accepted = f"a class id in [0, {num_classes}), the classes being {', '.join(label.class_names)}"
    else:
        if values.shape != (len(ids), num_classes):
            raise InputError(f"label {name}: shape {values.shape}: expected ({len(ids)}, {num_classes})")
        is_bad = is_present & ~((values >= 0) & (values <= 1)).all(axis=1)
        accepted = f"{num_classes} numbers in [0, 1], one for each of {', '.join(label.class_names)}"
    bad = np.flatnonzero(is_bad)
    if bad.size:
        raise InputError(f"record {ids[bad[0]]!r}: label {name} = {values[bad[0]]}: expected {accepted}")
    if label.kind == "categorical":
        return _scalar_to_arrow(f"label {name}", column, pa.int32(), ids)
    rows = np.where(is_present[:, None], values, 0).astype(np.float32)
    mask = None if is_present.all() else pa.array(~is_present)
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), num_classes, mask=mask)


def _cast(name: str, values: np.ndarray, kind: pa.DataType) -> np.ndarray:
    """A copy in the Arrow type's NumPy type; refuses what would lose a number's meaning."""
    # Not to_pandas_dtype: before pyarrow 26 it needs pandas.
    dtype = pa.array([], kind).to_numpy(zero_copy_only=False).dtype
    accepted = {"i": "iu", "f": "fiu", "b": "b"}[dtype.kind]
    if values.dtype.kind not in accepted:
        raise InputError(f"{name}: values of type {values.dtype}: expected {dtype}")
    if dtype.kind == "i" and values.size:
        limits = np.iinfo(dtype)
        if values.min() < limits.min or values.max() > limits.max:
            raise InputError(f"{name}: a value does not fit {dtype}")
    with np.errstate(over="ignore"):
        return values.astype(dtype, order="C", copy=True)


def _check_item_indices(name: str, ragged: Ragged, ids: Sequence[str]) -> None:
    values = np.asarray(ragged.values)
    bad = np.flatnonzero(values < 0)
    if bad.size:
        record_id = ids[_owner(ragged.lengths, int(bad[0]))]
        raise InputError(f"record {record_id!r}: {name} names item {values[bad[0]]}: expected a row of the catalogue")


def _slates_to_arrow(slate: Slate, lengths: np.ndarray, ids: Sequence[str]) -> dict[str, pa.Array]:
    given = {name: getattr(slate, name) for name in SLATE_FIELDS}
    columns = {name: np.asarray(values) for name, values in given.items() if values is not None}
    for name, values in columns.items():
        if len(values) != len(columns["item_index"]):
            raise InputError(f"slates: {len(values)} of {name} for {len(columns['item_index'])} of item_index")
        if values.dtype.kind == "f":
            is_bad = ~np.isfinite(values)
            if name == "propensity":
                is_bad |= (values <= 0) | (values > 1)
            bad = np.flatnonzero(is_bad)
            if bad.size:
                record_id = ids[_owner(lengths, int(bad[0]))]
                accepted = "a probability in (0, 1]" if name == "propensity" else "a finite number"
                raise InputError(f"record {record_id!r}: slate {name} = {values[bad[0]]}: expected {accepted}")
    _check_item_indices("slate", Ragged(columns["item_index"], lengths), ids)
    return {
        f"slate_{name}": _ragged_to_arrow(f"slate_{name}", Ragged(values, lengths), SLATE_FIELDS[name], ids)
        for name, values in columns.items()
    }


def _join(
    ids: list[str], arrays: Sequence[np.ndarray | None], name: str, trailing: tuple[int, ...], dtype: Any
) -> Ragged:
    """Ragged from one array (or None) per record, each checked to be ``[length, *trailing]``."""
    wanted_kind = np.dtype(dtype).kind
    kept = []
    for record_id, array in zip(ids, arrays, strict=True):
        if array is None:
            continue
        given = np.asarray(array)
        if given.ndim != 1 + len(trailing) or given.shape[1:] != trailing or given.dtype.kind not in {wanted_kind}:
            accepted = "".join(f", {size}" for size in trailing)
            raise InputError(
                f"record {record_id!r}: {name} is {given.dtype}{list(given.shape)}: "
                f"expected {np.dtype(dtype).name}[length{accepted}]"
            )
        kept.append(given)
    lengths = np.array([-1 if array is None else len(array) for array in arrays], np.int64)
    return Ragged(np.concatenate(kept) if kept else np.zeros((0, *trailing), dtype), lengths)


def _join_labels(records: Sequence[Record], name: str, label: LabelSpec) -> MaskedColumn:
    given = [record.labels.get(name) for record in records]
    if label.kind != "multi_label":
        for record, value in zip(records, given, strict=True):
            accepted = (int, np.integer) if label.kind == "categorical" else (int, float, np.integer, np.floating)
            if value is not None and not isinstance(value, accepted):
                raise InputError(f"record {record.id!r}: label {name} = {value!r}: expected a {label.kind} value")
        return _masked(given, "int32" if label.kind == "categorical" else "float32")
    rows = np.zeros((len(records), len(label.class_names)), np.float32)
    for index, value in enumerate(given):
        if value is None:
            continue
        if np.shape(value) != rows.shape[1:]:
            raise InputError(
                f"record {records[index].id!r}: label {name} has shape {np.shape(value)}: expected {rows.shape[1:]}"
            )
        rows[index] = value
    return MaskedColumn(rows, np.array([value is not None for value in given], bool))


def _masked(values: Sequence[Any], kind: str) -> MaskedColumn:
    if kind == "string":
        return MaskedColumn(values)
    is_present = np.array([value is not None for value in values], bool)
    return MaskedColumn(np.array([0 if value is None else value for value in values]), is_present)


def _join_slates(ids: list[str], slates: Sequence[Slate | None]) -> tuple[Slate, np.ndarray]:
    for record_id, slate in zip(ids, slates, strict=True):
        if slate is None:
            continue
        given = {name: getattr(slate, name) for name in SLATE_FIELDS}
        sizes = {name: len(values) for name, values in given.items() if values is not None}
        if len(set(sizes.values())) != 1:
            raise InputError(f"record {record_id!r}: slate fields differ in length: {sizes}")
    present = [(record_id, slate) for record_id, slate in zip(ids, slates, strict=True) if slate is not None]
    joined = Slate(**{name: _join_field(present, name) for name in SLATE_FIELDS})
    lengths = np.array([-1 if slate is None else len(slate.item_index) for slate in slates], np.int64)
    return joined, lengths


def _join_field(slates: Sequence[tuple[str, Slate]], name: str) -> Any:
    """One field of all slates end to end; None where all lack it."""
    values = [getattr(slate, name) for _, slate in slates]
    lacking = next((record_id for (record_id, _), value in zip(slates, values, strict=True) if value is None), None)
    if lacking is None:
        return np.concatenate([np.asarray(value) for value in values])
    if any(value is not None for value in values):
        raise InputError(f"record {lacking!r}: its slate has no {name}, others have: expected it of all, or of none")
    return None
