"""Feature shards: reads data sets of records through memory maps, and gathers whole batches.

A data set is a folder with ``manifest.json``, Arrow IPC files (uncompressed, 64-bit list offsets) per split, and an
optional catalogue. Any Arrow reader opens the files without this package::

    pyarrow.ipc.open_file(pyarrow.memory_map("train-00000.arrow")).read_all()
    pandas.read_feather("train-00000.arrow")

Command: ``python -m mmei_jax.records PATH [--verify]`` prints what a data set holds. Writing is in
:mod:`mmei_jax.record_writer`, the columns are in :mod:`mmei_jax.record_schema`; both are reached through this module.
"""

import functools
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int32, Int64, Integer, Shaped

from mmei_jax import fingerprints, record_files
from mmei_jax.record_gathering import RaggedColumn, aligned_empty
from mmei_jax.record_schema import (
    CATALOGUE_FORMAT,
    RECORDS_FORMAT,
    SCHEMA_VERSION,
    Catalogue,
    DatasetSpec,
    LabelSpec,
    MaskedColumn,
    ModalitySpec,
    Producer,
    Ragged,
    Record,
    RecordColumns,
    Slate,
    catalogue_schema,
    shard_schema,
)
from mmei_jax.record_writer import DatasetWriter
from mmei_jax.types import InputError

__all__ = [
    "SCHEMA_VERSION",
    "Catalogue",
    "Dataset",
    "DatasetSpec",
    "DatasetWriter",
    "LabelSpec",
    "MaskedColumn",
    "ModalitySpec",
    "Producer",
    "Ragged",
    "Record",
    "RecordColumns",
    "Slate",
    "Split",
]


class Dataset:
    """A data set on disk. Made by :meth:`open`.

    Attributes:
        path: its folder.
        spec: what the records carry.
        manifest: the whole manifest, as JSON values.
        split_names: names of the splits, in alphabetical order.
        read_item_words: gives what ``catalogue`` adds to its items; None where that is nothing.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], spec: DatasetSpec) -> None:
        self.path = path
        self.manifest = manifest
        self.spec = spec
        self.split_names: tuple[str, ...] = tuple(manifest["splits"])
        self.read_item_words: Callable[[], dict[str, Any]] | None = None

    @classmethod
    def open(cls, path: str | os.PathLike[str], verify: bool = False) -> "Dataset":
        """Opens a data set; every file's size, version, schema and record count is checked against the manifest.

        Args:
            path: folder with ``manifest.json``.
            verify: whether every file is also read in full: SHA-256, list offsets, finite features, ranges of class ids
                and item indices.

        Raises:
            InputError: a file is missing, truncated, corrupt, foreign or of another version; names the file, and the
                record where one is at fault.
        """
        folder = Path(path)
        dataset = cls(folder, *record_files.read_manifest(folder))
        for name in dataset.split_names:
            dataset._check_split(name, verify)
        dataset._check_catalogue(verify)
        return dataset

    def split(self, *names: str) -> "Split":
        """Joins splits, in the order given.

        Raises:
            InputError: a name is unknown or occurs twice, or there is none.
        """
        unknown = sorted(set(names) - set(self.split_names))
        if unknown or not names:
            wanted = repr(unknown[0]) if unknown else "no name"
            raise InputError(f"{self.path}: split {wanted}: expected some of {', '.join(self.split_names)}")
        if len(set(names)) != len(names):
            raise InputError(f"{self.path}: splits {', '.join(names)}: each split once")
        return Split(self, names)

    def reference(self, split: str) -> dict[str, float]:
        """Known figures by metric name, such as exact ceilings; {} where none. InputError if there is no such split."""
        if split not in self.split_names:
            raise InputError(f"{self.path}: split {split!r}: expected one of {', '.join(self.split_names)}")
        return dict(self.manifest["splits"][split]["reference"])

    def catalogue(self) -> Catalogue | None:
        """The catalogue; its features are a read-only view of the file. None if the data set has none.

        Raises:
            InputError: the file does not fit the manifest.
        """
        entry = self.manifest["catalogue"]
        if entry is None:
            return None
        batch = self._catalogue_batches()[0]
        return Catalogue(
            ids=batch.column("id").to_pylist(),
            kind=batch.column("kind").to_numpy(),
            kind_names=tuple(entry["kind_names"]),
            features=batch.column("features").values.to_numpy().reshape(batch.num_rows, entry["dim"]),
            texts=batch.column("text").to_pylist(),
            **(self.read_item_words() if self.read_item_words else {}),
        )

    def with_item_words(self, read: Callable[[], dict[str, Any]] | None) -> "Dataset":
        """The same data set, whose catalogue comes with ``word_state`` or ``word_ids``, read when it is asked for."""
        found = Dataset(self.path, self.manifest, self.spec)
        found.read_item_words = read
        return found

    def shard_batches(self, split: str) -> list[tuple[str, pa.RecordBatch]]:
        """Memory-mapped record batches of a split with their file names.

        Raises:
            InputError: a file does not fit the manifest; names it.
        """
        schema = shard_schema(self.spec, split)
        found: list[tuple[str, pa.RecordBatch]] = []
        for shard in self.manifest["splits"][split]["shards"]:
            batches = record_files.open_batches(self.path / shard["file"], RECORDS_FORMAT, schema, shard)
            found.extend((str(self.path / shard["file"]), batch) for batch in batches)
        return found

    def _catalogue_batches(self) -> list[pa.RecordBatch]:
        entry = self.manifest["catalogue"]
        schema = catalogue_schema(entry["dim"], entry["kind_names"])
        return record_files.open_batches(self.path / entry["file"], CATALOGUE_FORMAT, schema, entry)

    def _check_split(self, name: str, verify: bool) -> None:
        entry = self.manifest["splits"][name]
        batches = self.shard_batches(name)
        num_records = sum(batch.num_rows for _, batch in batches)
        if num_records != entry["num_records"]:
            raise InputError(
                f"{self.path / record_files.MANIFEST_NAME}: split {name!r} has {entry['num_records']} records, "
                f"its shards hold {num_records}"
            )
        if verify:
            for shard in entry["shards"]:
                fingerprints.check_hash(self.path / shard["file"], shard["sha256"])
            catalogue = self.manifest["catalogue"]
            for file, batch in batches:
                record_files.check_contents(file, batch, self.spec, catalogue["num_records"] if catalogue else 0)

    def _check_catalogue(self, verify: bool) -> None:
        entry = self.manifest["catalogue"]
        if entry is not None:
            batches = self._catalogue_batches()
            if len(batches) != 1:
                raise InputError(f"{self.path / entry['file']}: {len(batches)} record batches: expected one")
            if verify:
                fingerprints.check_hash(self.path / entry["file"], entry["sha256"])


class Split:
    """Records of one or several splits, memory-mapped. Indices count through the splits in the order they were joined.

    Can be pickled: the files are mapped (and checked) again where it is unpickled.
    """

    def __init__(self, dataset: Dataset, names: Sequence[str]) -> None:
        self.dataset = dataset
        self.names = tuple(names)
        self.num_records = sum(dataset.manifest["splits"][name]["num_records"] for name in names)

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: no memory map, nothing that was cached."""
        return {key: self.__dict__[key] for key in ("dataset", "names", "num_records")}

    def lengths(self, column: str) -> Int64[np.ndarray, "records"]:
        """Entries of each record in a list column, 0 where absent; read-only.

        Args:
            column: a modality (its entries are tokens), ``slate_<field>`` or ``relevant_items``.

        Raises:
            InputError: the data set has no such list column, or a shard's offsets are corrupt.
        """
        return self._ragged(column).lengths

    def gather_tokens(
        self, modality: str, indices: Integer[np.ndarray, "batch"], max_tokens: int
    ) -> tuple[Shaped[np.ndarray, "batch tokens dim"], Int32[np.ndarray, "batch"]]:
        """Tokens of a batch of records, copied once: as they are stored, to where a CPU device uses them in place.

        Args:
            modality: its name.
            indices: ``[batch]`` positions in this split, in any order, repeats allowed.
            max_tokens: tokens kept of each record, from its start.

        Returns:
            ``[batch, max_tokens, dim]`` array of the stored type (``ModalitySpec.dtype``) whose padding is 0, and
            ``[batch]`` int32 numbers of tokens kept (0 where the modality is absent).

        Raises:
            InputError: the data set lacks the modality, or a shard's offsets are corrupt.
            IndexError: an index is out of range.
        """
        spec = self._modality(modality)
        tokens = aligned_empty((len(indices), max_tokens, spec.dim), spec.dtype)
        kept = self._ragged(modality).fill(tokens, indices, self._locate(indices)[0])
        for row in np.flatnonzero(kept < max_tokens).tolist():
            tokens[row, kept[row] :] = 0
        return tokens, kept

    def copy_tokens(
        self, modality: str, indices: Integer[np.ndarray, "batch"], out: Sequence[Shaped[np.ndarray, "_ dim"]]
    ) -> None:
        """Copies the first tokens of each record to its array of ``out``, as many as it has room for.

        Raises:
            InputError, IndexError: as :meth:`gather_tokens`.
        """
        self._ragged(modality).fill(out, indices, self._locate(indices)[0])

    def gather_list(
        self, column: str, indices: Integer[np.ndarray, "batch"], length: int, fill: float | int
    ) -> Shaped[np.ndarray, "batch length"]:
        """Rows of ``slate_<field>`` or ``relevant_items``, cut at ``length`` and completed with ``fill``.

        Raises:
            InputError: the data set has no such list column, or a shard's offsets are corrupt.
            IndexError: an index is out of range.
        """
        ragged = self._ragged(column)
        rows = np.full((len(indices), length), fill, ragged.values[0].dtype)
        ragged.fill(rows, indices, self._locate(indices)[0])
        return rows

    def gather_label(
        self, name: str, indices: Integer[np.ndarray, "batch"]
    ) -> tuple[Shaped[np.ndarray, "batch ..."], Bool[np.ndarray, "batch"]]:
        """A label of a batch of records.

        Returns:
            int32 class ids ``[batch]`` (categorical), float32 ``[batch, classes]`` (multi_label) or float32 ``[batch]``
            (real), 0 where missing; and whether each record is labelled.

        Raises:
            InputError: the data set has no such label.
            IndexError: an index is out of range.
        """
        if name not in self.dataset.spec.labels:
            known = ", ".join(self.dataset.spec.labels) or "none"
            raise InputError(f"{self.dataset.path}: label {name!r}: the data set has {known}")
        self._locate(indices)
        values, is_present = self._scalars(f"label_{name}")
        return values[indices], is_present[indices]

    def ids(self, indices: Integer[np.ndarray, "batch"]) -> list[str]:
        """Ids of records; IndexError where an index is out of range."""
        shards, local = self._locate(indices)
        columns = [batch.column("id") for _, batch in self._batches]
        return [columns[shard][int(row)].as_py() for shard, row in zip(shards, local, strict=True)]

    def column(self, name: str) -> Shaped[np.ndarray, "records"] | list[str | None]:
        """A whole scalar column, such as ``user_id``, ``turn``, ``label_emotion`` or ``extra_year``.

        Returns:
            Strings as a list with None where missing; numbers as an array, which is float64 with NaN where missing if
            any value of an integer column is missing, and float32 with NaN for a float column.

        Raises:
            InputError: there is no such scalar column.
        """
        schema = self._batches[0][1].schema
        if name not in schema.names or pa.types.is_nested(schema.field(name).type):
            scalars = ", ".join(field.name for field in schema if not pa.types.is_nested(field.type))
            raise InputError(f"{self.dataset.path}: column {name!r}: expected one of {scalars}")
        joined = pa.chunked_array([batch.column(name) for _, batch in self._batches])
        if pa.types.is_large_string(joined.type):
            return cast(list[str | None], joined.to_pylist())
        return cast(np.ndarray, joined.to_numpy())

    @functools.cached_property
    def _batches(self) -> list[tuple[str, pa.RecordBatch]]:
        return [pair for name in self.names for pair in self.dataset.shard_batches(name)]

    @functools.cached_property
    def _batch_starts(self) -> np.ndarray:
        """``[batches + 1]`` int64: the first record of each record batch, and the number of records."""
        return np.concatenate([[0], np.cumsum([batch.num_rows for _, batch in self._batches])]).astype(np.int64)

    @functools.cached_property
    def _cache(self) -> dict[str, Any]:
        return {}

    def _modality(self, name: str) -> ModalitySpec:
        modalities = self.dataset.spec.modalities
        if name not in modalities:
            raise InputError(f"{self.dataset.path}: modality {name!r}: the data set has {', '.join(modalities)}")
        return modalities[name]

    def _locate(self, indices: Integer[np.ndarray, "batch"]) -> tuple[np.ndarray, np.ndarray]:
        positions = np.asarray(indices)
        if positions.size and (positions.min() < 0 or positions.max() >= self.num_records):
            raise IndexError(f"record indices must lie in [0, {self.num_records})")
        shards = np.searchsorted(self._batch_starts, positions, side="right") - 1
        return shards, positions - self._batch_starts[shards]

    def _ragged(self, name: str) -> RaggedColumn:
        if name not in self._cache:
            schema = self._batches[0][1].schema
            if name not in schema.names or not pa.types.is_large_list(schema.field(name).type):
                lists = ", ".join(field.name for field in schema if pa.types.is_large_list(field.type))
                raise InputError(f"{self.dataset.path}: list column {name!r}: expected one of {lists or 'none'}")
            parts = [record_files.list_parts(file, name, batch) for file, batch in self._batches]
            lengths = np.concatenate([part[2] for part in parts])
            lengths.flags.writeable = False
            self._cache[name] = RaggedColumn(
                values=[part[0] for part in parts], starts=np.concatenate([part[1] for part in parts]), lengths=lengths
            )
        return cast(RaggedColumn, self._cache[name])

    def _scalars(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Values (0 where missing) and presence of a label column, for all records."""
        if name not in self._cache:
            parts = [record_files.scalar_parts(name, batch) for _, batch in self._batches]
            self._cache[name] = tuple(np.concatenate(part) for part in zip(*parts, strict=True))
        return cast(tuple[np.ndarray, np.ndarray], self._cache[name])


def _describe(dataset: Dataset) -> str:
    """A table of what the data set holds."""
    spec, manifest = dataset.spec, dataset.manifest
    lines = [f"{spec.name}: {spec.description}", f"source: {spec.source}; licence: {spec.licence}", ""]
    lines.append(f"{'split':<20}{'records':>12}{'shards':>8}{'MB':>10}   longest (tokens)")
    for name in dataset.split_names:
        entry = manifest["splits"][name]
        megabytes = sum(shard["num_bytes"] for shard in entry["shards"]) / 1e6
        longest = ", ".join(f"{modality} {count}" for modality, count in entry["longest_tokens"].items())
        lines.append(f"{name:<20}{entry['num_records']:>12,}{len(entry['shards']):>8}{megabytes:>10.1f}   {longest}")
    lines.append("")
    for name, modality in spec.modalities.items():
        lines.append(f"{name}: {modality.dim} x {modality.dtype}, {modality.producer.encoder or 'encoder unknown'}")
    for name, label in spec.labels.items():
        lines.append(f"label {name} ({label.kind}): {', '.join(label.class_names) or 'a number'}")
    if manifest["catalogue"]:
        lines.append(f"catalogue: {manifest['catalogue']['num_records']:,} items")
    lines.extend(f"{name}: {json.dumps(counts)}" for name, counts in manifest["counts"].items())
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints what a data set holds; gives the exit status: 0, or 2 after one line on what is wrong."""
    from mmei_jax.command import CommandParser, report_errors

    parser = CommandParser(prog="python -m mmei_jax.records", description="Show and check a data set.")
    parser.add_argument("path", help="folder with manifest.json")
    parser.add_argument("--verify", action="store_true", help="also read every file in full and compare its SHA-256")
    options = parser.parse_args(arguments)

    def run() -> int:
        description = _describe(Dataset.open(options.path, verify=options.verify))
        checked = "schema, sizes, counts and SHA-256" if options.verify else "schema, sizes and counts"
        print(f"{description}\n\n{checked} are as the manifest says")
        return 0

    return report_errors(run)


if __name__ == "__main__":
    sys.exit(main())
