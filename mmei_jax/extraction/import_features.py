r"""Turns ready-made features into shards, split by groups.

Command, for instance::

    python -m mmei_jax.extraction.import_features --input=features.npz --output=runs/data/mine --id_key=clip_id \
        --user_key=actor --group_key=actor --num_folds=6 --labels=emotion --class_names=neutral,joy,anger \
        --source="where the features come from" --licence="CC BY 4.0"
"""

import argparse
import dataclasses
import os
import sys
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mmei_jax.command import CommandParser, report_errors
from mmei_jax.extraction import feature_sources, label_columns, splitting
from mmei_jax.record_schema import EXTRA_TYPES
from mmei_jax.records import (
    DatasetSpec,
    DatasetWriter,
    LabelSpec,
    MaskedColumn,
    ModalitySpec,
    Producer,
    Ragged,
    RecordColumns,
)
from mmei_jax.types import MODALITIES, InputError

_RECORDS_PER_CHUNK = 512
_NUM_IDS_SHOWN = 10
_FORMATS = """\
.npz: one array per modality, [records, dim] (one token per record) or [records, tokens, dim] with
  <modality>_lengths (valid tokens per record, 0: absent); every other array is a column with one value per record.
folder: .npy files, [dim] or [tokens, dim] each, and a UTF-8 CSV with a header; its columns vision, audio and text hold
  paths relative to the folder, empty where a record lacks the modality.
labels: class names or class ids (categorical), [records, classes] or names joined by "|", none for no class
  (multi_label), or numbers (real); empty or NaN where a record has no label.
producer fields: encoder, revision, layer, pooling, frames_per_second, sample_rate_hz, padding_policy.
"""


@dataclass(frozen=True)
class ImportOptions:
    """What is imported, and how.

    Attributes:
        labels: per label's name, the source's key, and the label's kind and classes.
        extras: per key of a further column, its type (int32, float32 or string).
        fractions, num_folds, split_key: exactly one says how records are split.
        Every other one: as the command's flag of the same name.
    """

    input: Path
    output: Path
    id_key: str
    source: str
    licence: str
    name: str
    description: str = ""
    csv: Path | None = None
    modalities: tuple[str, ...] | None = None
    user_key: str | None = None
    dialogue_key: str | None = None
    turn_key: str | None = None
    labels: dict[str, tuple[str, LabelSpec]] = field(default_factory=dict)
    extras: dict[str, str] = field(default_factory=dict)
    group_key: str | None = None
    fractions: dict[str, float] | None = None
    num_folds: int | None = None
    split_key: str | None = None
    seed: int = 0
    shuffle_labels_within: Literal["user", "group"] | None = None
    dtype: Literal["float16", "float32"] = "float32"
    non_finite: Literal["refuse", "zero"] = "refuse"
    producers: dict[str, Producer] = field(default_factory=dict)
    records_per_shard: int = 4096
    overwrite: bool = False


class NonFiniteCounts:
    """Values that are not finite, per modality."""

    def __init__(self) -> None:
        self.values: dict[str, int] = {}
        self.ids: dict[str, list[str]] = {}

    def zero(self, modality: str, features: Ragged, ids: Sequence[str]) -> None:
        """Counts what is not finite, and sets it to 0 in place."""
        is_bad = ~np.isfinite(features.values)
        if not is_bad.any():
            return
        self.values[modality] = self.values.get(modality, 0) + int(is_bad.sum())
        owners = np.repeat(np.arange(len(ids)), np.maximum(features.lengths, 0))
        bad_records = np.unique(owners[is_bad.any(axis=1)])
        self.ids.setdefault(modality, []).extend(ids[record] for record in bad_records)
        np.asarray(features.values)[is_bad] = 0

    def describe(self) -> str:
        """One line: counts and the first ids, per modality."""
        parts = []
        for modality, count in self.values.items():
            ids = self.ids[modality]
            shown = ", ".join(ids[:_NUM_IDS_SHOWN]) + (", ..." if len(ids) > _NUM_IDS_SHOWN else "")
            parts.append(f"{modality}: {count} values in {len(ids)} records ({shown})")
        return "; ".join(parts)


def import_features(options: ImportOptions) -> dict[str, int]:
    """Writes the data set ``options.output``.

    Returns:
        Records per split.

    Raises:
        InputError: the input is missing, incomplete or inconsistent; names the file, key and record.
        OSError: the disk is full, or the output cannot be written.
    """
    source = feature_sources.open_source(options.input, options.csv, options.id_key, options.modalities)
    ids = source.column(options.id_key).astype(np.str_).tolist()
    splits, groups = _assign_splits(source, options)
    scalars = _read_scalars(source, options, ids)
    description = options.description
    if options.shuffle_labels_within is not None:
        key = options.user_key if options.shuffle_labels_within == "user" else options.group_key
        if key is None:
            raise InputError(f"shuffle_labels_within {options.shuffle_labels_within}: needs its key to be named")
        within = groups if key == options.group_key and groups is not None else source.column(key).astype(np.str_)
        _shuffle_labels(scalars, splitting.shuffle_within_groups(within, options.seed))
        description += f" CONTROL: labels shuffled within each {key}, seed {options.seed}."
    spec = DatasetSpec(
        name=options.name,
        description=description.strip(),
        source=options.source,
        licence=options.licence,
        modalities={
            name: ModalitySpec(dim, options.dtype, options.producers.get(name, Producer()))
            for name, dim in source.modalities.items()
        },
        labels={name: label for name, (_, label) in options.labels.items()},
        extras=options.extras,
    )
    return _write(source, options, spec, scalars, splits)


def _write(
    source: feature_sources.FeatureSource,
    options: ImportOptions,
    spec: DatasetSpec,
    scalars: RecordColumns,
    splits: np.ndarray,
) -> dict[str, int]:
    counts = NonFiniteCounts()
    num_records = {}
    with DatasetWriter(
        options.output, spec, records_per_shard=options.records_per_shard, overwrite=options.overwrite
    ) as writer:
        for split in np.unique(splits).tolist():
            rows = np.flatnonzero(splits == split)
            num_records[split] = len(rows)
            for start in range(0, len(rows), _RECORDS_PER_CHUNK):
                chunk = rows[start : start + _RECORDS_PER_CHUNK]
                columns = _take(scalars, chunk)
                for modality in source.modalities:
                    columns.features[modality] = source.features(modality, chunk)
                    counts.zero(modality, columns.features[modality], columns.ids)
                # Refused data are read to the end, to count them all, but no longer written.
                if not counts.values or options.non_finite == "zero":
                    writer.write_columns(split, columns)
        if counts.values and options.non_finite == "refuse":
            raise InputError(
                f"{source.path}: values that are not finite: {counts.describe()}; --non_finite=zero sets them to 0"
            )
        if options.non_finite == "zero":
            records = {modality: len(ids) for modality, ids in counts.ids.items()}
            zeroed = {
                name: {"num_values": counts.values.get(name, 0), "num_records": records.get(name, 0)}
                for name in source.modalities
            }
            writer.set_counts("non_finite_values_set_to_zero", zeroed)
    return num_records


def _assign_splits(
    source: feature_sources.FeatureSource, options: ImportOptions
) -> tuple[np.ndarray, np.ndarray | None]:
    """Split names per record, and groups per record if a group key is named."""
    ways = [options.fractions is not None, options.num_folds is not None, options.split_key is not None]
    if sum(ways) != 1:
        raise InputError("splits: expected exactly one of --splits, --num_folds and --split_key")
    groups = None
    if options.group_key is not None:
        groups = source.column(options.group_key).astype(np.str_)
        if (groups == "").any():
            record_id = source.column(options.id_key)[np.argmax(groups == "")]
            raise InputError(f"{source.path}: record '{record_id}': {options.group_key!r} is empty: expected a group")
    if options.split_key is not None:
        splits = source.column(options.split_key).astype(np.str_)
        if (splits == "").any():
            record_id = source.column(options.id_key)[np.argmax(splits == "")]
            raise InputError(f"{source.path}: record '{record_id}': {options.split_key!r} is empty: expected a split")
        if groups is not None:
            splitting.check_groups_undivided(groups, splits)
        return splits, groups
    if groups is None:
        raise InputError(f"--group_key: needed to split by groups; name {options.id_key!r} to split by record")
    if options.fractions is not None:
        return splitting.split_by_fractions(groups, options.fractions, options.seed), groups
    return splitting.split_into_folds(groups, typing.cast(int, options.num_folds), options.seed), groups


def _read_scalars(source: feature_sources.FeatureSource, options: ImportOptions, ids: list[str]) -> RecordColumns:
    columns = RecordColumns(ids=ids)
    if options.user_key is not None:
        columns.user_ids = label_columns.read_strings(source, options.user_key)
    if options.dialogue_key is not None:
        columns.dialogue_ids = label_columns.read_strings(source, options.dialogue_key)
    if options.turn_key is not None:
        columns.turns = label_columns.read_numbers(source, options.turn_key, ids, np.int64)
    for name, (key, label) in options.labels.items():
        columns.labels[name] = label_columns.read_label(source, key, label, ids)
    for name, kind in options.extras.items():
        if kind == "string":
            columns.extras[name] = MaskedColumn(label_columns.read_strings(source, name))
        else:
            columns.extras[name] = label_columns.read_numbers(
                source, name, ids, np.int64 if kind == "int32" else np.float64
            )
    return columns


def _shuffle_labels(columns: RecordColumns, taken_from: np.ndarray) -> None:
    columns.labels = {name: _take_masked(column, taken_from) for name, column in columns.labels.items()}


def _take_masked(column: MaskedColumn, rows: np.ndarray) -> MaskedColumn:
    is_present = None if column.is_present is None else column.is_present[rows]
    if isinstance(column.values, np.ndarray):
        return MaskedColumn(column.values[rows], is_present)
    return MaskedColumn([column.values[row] for row in rows.tolist()], is_present)


def _take(columns: RecordColumns, rows: np.ndarray) -> RecordColumns:
    """Some records of columns that have neither features nor lists."""
    users, dialogues, picked = columns.user_ids, columns.dialogue_ids, rows.tolist()
    return RecordColumns(
        ids=[columns.ids[row] for row in picked],
        user_ids=None if users is None else [users[row] for row in picked],
        dialogue_ids=None if dialogues is None else [dialogues[row] for row in picked],
        turns=None if columns.turns is None else _take_masked(columns.turns, rows),
        labels={name: _take_masked(column, rows) for name, column in columns.labels.items()},
        extras={name: _take_masked(column, rows) for name, column in columns.extras.items()},
    )


def _parse(arguments: Sequence[str] | None) -> ImportOptions:
    parser = CommandParser(
        prog="python -m mmei_jax.extraction.import_features",
        description="Ready-made features (.npz, or a folder of .npy files with a CSV) to feature shards.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_FORMATS,
    )
    add = parser.add_argument
    add("--input", required=True, type=Path, help="a .npz file, or a folder of .npy files")
    add("--csv", type=Path, help="CSV that lists the .npy files (default: labels.csv in the folder)")
    add("--output", required=True, type=Path, help="folder to make")
    add("--overwrite", action="store_true", help="replace a data set that is already there")
    add("--name", help="name of the data set (default: the output folder's)")
    add("--description", default="", help="what the data set is")
    add("--source", required=True, help="where the features come from")
    add("--licence", required=True, help="licence of the features")
    add("--modalities", help="comma list (default: all of vision, audio, text that the input has)")
    add("--id_key", default="id", help="key or column of the record ids (default: %(default)s)")
    add("--user_key", help="key or column of the user or speaker")
    add("--dialogue_key", help="key or column of the dialogue")
    add("--turn_key", help="key or column of the position in the dialogue")
    add("--labels", default="", metavar="NAME[=KEY][:KIND],...", help="kinds: categorical (default), multi_label, real")
    add("--class_names", action="append", default=[], metavar="[NAME=]A,B,C|FILE", help="in label order; repeatable")
    add("--extras", default="", metavar="KEY:TYPE,...", help="further columns to keep: int32, float32 or string")
    add("--group_key", help="key or column whose groups are never divided between splits")
    add("--splits", metavar="NAME=FRACTION,...", help="such as train=0.7,validation=0.15,test=0.15, by groups")
    add("--num_folds", type=int, metavar="K", help="splits fold0 ... fold<K-1> of about equal size, by groups")
    add("--split_key", help="key or column that holds split names")
    add("--seed", type=int, default=0, help="of the splits and of shuffled labels (default: %(default)s)")
    add(
        "--shuffle_labels_within",
        choices=("user", "group"),
        help="make a control: labels permuted",
    )
    add("--dtype", choices=("float16", "float32"), default="float32", help="stored features (default: %(default)s)")
    add("--non_finite", choices=("refuse", "zero"), default="refuse", help="NaN and infinity (default: %(default)s)")
    add("--producer", action="append", default=[], metavar="MODALITY.FIELD=VALUE", help="repeatable; see below")
    add("--records_per_shard", type=int, default=4096, help="(default: %(default)s)")
    flags = vars(parser.parse_args(arguments))
    flags["name"] = flags["name"] or flags["output"].name
    if flags["seed"] < 0:
        raise InputError(f"--seed={flags['seed']}: expected at least 0")
    flags["modalities"] = tuple(flags["modalities"].split(",")) if flags["modalities"] is not None else None
    if flags["modalities"] is not None and len(set(flags["modalities"])) < len(flags["modalities"]):
        raise InputError(f"--modalities={','.join(flags['modalities'])}: expected each modality once")
    flags["labels"] = _parse_labels(flags.pop("labels"), flags.pop("class_names"))
    flags["fractions"] = _parse_fractions(flags.pop("splits"))
    flags["producers"] = _parse_producers(flags.pop("producer"))
    flags["extras"] = dict(_pair("--extras", item, ":") for item in flags["extras"].split(",") if item)
    for key, kind in flags["extras"].items():
        if kind not in EXTRA_TYPES:
            raise InputError(f"--extras {key}:{kind}: expected one of the types {', '.join(EXTRA_TYPES)}")
    return ImportOptions(**flags)


def _pair(flag: str, text: str, separator: str) -> tuple[str, str]:
    left, found, right = text.partition(separator)
    if not (left and found and right):
        raise InputError(f"{flag} {text!r}: expected two parts joined by {separator!r}")
    return left, right


def _parse_labels(text: str, class_names: list[str]) -> dict[str, tuple[str, LabelSpec]]:
    """Labels by name, from ``emotion=emotion_id:categorical,...`` and their class names."""
    kinds = {}
    for item in text.split(",") if text else []:
        left, _, kind = item.partition(":")
        name, _, key = left.partition("=")
        kinds[name] = (key or name, kind or "categorical")
    with_classes = [name for name, (_, kind) in kinds.items() if kind != "real"]
    classes: dict[str, tuple[str, ...]] = {}
    for item in class_names:
        name, found, names = item.partition("=")
        if not found and len(with_classes) == 1:
            name, names = with_classes[0], item
        if name not in with_classes:
            raise InputError(f"--class_names {item!r}: expected NAME=A,B,C with NAME among {with_classes}")
        listed = Path(names).read_text(encoding="utf-8").splitlines() if os.path.isfile(names) else names.split(",")
        classes[name] = tuple(listed)
    for name in with_classes:
        if name not in classes:
            raise InputError(f"--labels {name}: needs --class_names {name}=A,B,C in label order")
    return {
        name: (key, LabelSpec(typing.cast(Any, kind), classes.get(name, ()))) for name, (key, kind) in kinds.items()
    }


def _parse_fractions(text: str | None) -> dict[str, float] | None:
    if text is None:
        return None
    fractions: dict[str, float] = {}
    for item in text.split(","):
        name, number = _pair("--splits", item, "=")
        try:
            fractions[name] = float(number)
        except ValueError as error:
            raise InputError(f"--splits {item!r}: expected NAME=FRACTION") from error
    return fractions


def _parse_producers(items: list[str]) -> dict[str, Producer]:
    """Producers by modality, from ``vision.frames_per_second=30`` and the like."""
    types: dict[str, type] = {field.name: str for field in dataclasses.fields(Producer)}
    types.update(frames_per_second=float, sample_rate_hz=int)
    producers: dict[str, Producer] = {}
    for item in items:
        key, value = _pair("--producer", item, "=")
        modality, name = _pair("--producer", key, ".")
        if modality not in MODALITIES or name not in types:
            raise InputError(f"--producer {item!r}: expected MODALITY.FIELD=VALUE, fields {', '.join(types)}")
        try:
            converted = types[name](value)
        except ValueError as error:
            raise InputError(f"--producer {item!r}: expected {types[name].__name__}") from error
        producers[modality] = dataclasses.replace(producers.get(modality, Producer()), **{name: converted})
    return producers


def main(arguments: Sequence[str] | None = None) -> int:
    """Imports features; gives the exit status: 0, or 2 after one line on what is wrong."""

    def run() -> int:
        options = _parse(arguments)
        num_records = import_features(options)
        counts = ", ".join(f"{split} {count:,}" for split, count in num_records.items())
        print(f"{options.output}: {counts} records")
        return 0

    return report_errors(run)


if __name__ == "__main__":
    sys.exit(main())
