"""Reads ready-made features: one ``.npz`` file, or a folder of ``.npy`` files with a CSV of labels.

Both give named columns (one value per record) and, per modality, ``[tokens, dim]`` float32 arrays. Nothing is
unpickled.
"""

import csv
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Integer, Shaped

from mmei_jax.records import Ragged
from mmei_jax.types import MODALITIES, InputError


@runtime_checkable
class ColumnSource(Protocol):
    """Named columns of many records.

    Attributes:
        path: what is named in messages.
    """

    path: Path

    def column(self, key: str) -> Shaped[np.ndarray, "records ..."]:
        """One value per record: numbers or strings; a CSV gives strings only, "" where a cell is empty.

        Raises:
            InputError: there is no such column, or it has another number of records than the ids.
        """
        ...


@runtime_checkable
class FeatureSource(ColumnSource, Protocol):
    """Ready-made features of many records.

    Attributes:
        modalities: names that the source has features of, with features per token.
    """

    modalities: dict[str, int]

    def features(self, modality: str, rows: Integer[np.ndarray, "batch"]) -> Ragged:
        """Features of some records, float32, as they are: finite or not.

        Raises:
            InputError: a file is missing or has the wrong shape; names it and the record.
        """
        ...


class NpzSource:
    """One ``.npz``: per modality ``[records, dim]`` (one token per record) or ``[records, tokens, dim]``.

    ``<modality>_lengths`` (``[records]`` integers, needed for three axes) counts valid tokens; 0: absent. Every other
    array is a column.
    """

    def __init__(self, path: Path, id_key: str, modalities: Sequence[str] | None) -> None:
        """Opens the file; ``modalities`` None takes all that it has.

        Raises:
            InputError: the file or a key is missing, holds objects, or has another number of records than the ids.
        """
        self.path = path
        if not zipfile.is_zipfile(path):
            raise InputError(f"{path}: not a readable .npz file: expected a zip archive of named arrays")
        # allow_pickle=False: an object array is refused when it is read.
        self._arrays = np.load(path, allow_pickle=False)
        self._id_key = id_key
        self._num_records = len(self._read(id_key))
        self._features: dict[str, np.ndarray] = {}
        self._lengths: dict[str, np.ndarray] = {}
        names = [name for name in MODALITIES if name in self._arrays] if modalities is None else modalities
        for name in names:
            self._read_modality(name)
        self.modalities = {name: array.shape[-1] for name, array in self._features.items()}

    def column(self, key: str) -> Shaped[np.ndarray, "records ..."]:
        """See :class:`FeatureSource`."""
        return self._read_records(key)

    def features(self, modality: str, rows: Integer[np.ndarray, "batch"]) -> Ragged:
        """See :class:`FeatureSource`."""
        lengths = self._lengths[modality][rows]
        features = self._features[modality][rows]
        is_token = np.arange(features.shape[1]) < lengths[:, None]
        return Ragged(features[is_token], np.where(lengths == 0, -1, lengths))

    def _read(self, key: str) -> np.ndarray:
        if key not in self._arrays:
            raise InputError(f"{self.path}: no key {key!r}: it has {', '.join(self._arrays.files)}")
        try:
            array = np.asarray(self._arrays[key])
        except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise InputError(
                f"{self.path}: key {key!r}: the file is damaged; copy or make it again: {error}"
            ) from error
        except ValueError as error:
            raise InputError(f"{self.path}: key {key!r}: expected plain numbers or strings: {error}") from error
        if array.ndim == 0:
            raise InputError(f"{self.path}: key {key!r}: a single value: expected one per record")
        return array

    def _read_records(self, key: str) -> np.ndarray:
        array = self._read(key)
        if len(array) != self._num_records:
            raise InputError(
                f"{self.path}: key {key!r} has {len(array)} records, key {self._id_key!r} has {self._num_records}"
            )
        return array

    def _read_modality(self, name: str) -> None:
        array = self._read_records(name)
        if array.ndim not in (2, 3) or array.shape[-1] < 1 or array.dtype.kind not in "fiub":
            raise InputError(
                f"{self.path}: key {name!r} is {array.dtype}{list(array.shape)}: "
                "expected numbers [records, dim] or [records, tokens, dim]"
            )
        if array.ndim == 2:
            array = array[:, None, :]
            most = np.ones(self._num_records, np.int64)
        else:
            most = np.full(self._num_records, array.shape[1], np.int64)
        key = f"{name}_lengths"
        if key not in self._arrays and array.shape[1] > 1:
            raise InputError(
                f"{self.path}: no key {key!r}: [records, tokens, dim] needs the number of valid tokens; "
                f"it has {', '.join(self._arrays.files)}"
            )
        lengths = self._read_records(key) if key in self._arrays else most
        if lengths.ndim != 1 or lengths.dtype.kind not in "iu":
            raise InputError(f"{self.path}: key {key!r} is {lengths.dtype}{list(lengths.shape)}: expected integers")
        bad = np.flatnonzero((lengths < 0) | (lengths > most))
        if bad.size:
            raise InputError(
                f"{self.path}: key {key!r}, record {bad[0]} (id {self._read(self._id_key)[bad[0]]!s}): "
                f"{lengths[bad[0]]}: expected a number of tokens in [0, {array.shape[1]}]"
            )
        self._features[name] = array.astype(np.float32)
        self._lengths[name] = lengths.astype(np.int64)


class NpyFolderSource:
    """A folder of ``.npy`` files (``[dim]`` or ``[tokens, dim]`` each) and a CSV that names them.

    The CSV has a header; the columns vision, audio and text hold paths relative to the folder, empty where a record
    lacks the modality.
    """

    def __init__(self, folder: Path, csv_path: Path, id_key: str, modalities: Sequence[str] | None) -> None:
        """Reads the CSV; feature files are read as they are asked for.

        Raises:
            InputError: the CSV is missing or malformed, a column is missing, or a modality has no file at all.
        """
        self.path = csv_path
        self._folder = folder
        self._id_key = id_key
        self._columns = _read_csv(csv_path)
        self.column(id_key)
        names = [name for name in MODALITIES if name in self._columns] if modalities is None else modalities
        self.modalities = {name: self._find_dim(name) for name in names}

    def column(self, key: str) -> Shaped[np.ndarray, "records ..."]:
        """See :class:`FeatureSource`."""
        if key not in self._columns:
            raise InputError(f"{self.path}: no column {key!r}: it has {', '.join(self._columns)}")
        return np.array(self._columns[key], dtype=np.str_)

    def features(self, modality: str, rows: Integer[np.ndarray, "batch"]) -> Ragged:
        """See :class:`FeatureSource`."""
        dim = self.modalities[modality]
        arrays: list[Float32[np.ndarray, "tokens dim"]] = []
        lengths = np.full(len(rows), -1, np.int64)
        for position, row in enumerate(rows.tolist()):
            if not self._columns[modality][row]:
                continue
            array = self._load(modality, row)
            if array.shape[1] != dim or not len(array):
                record_id = self._columns[self._id_key][row]
                raise InputError(
                    f"{self._folder / self._columns[modality][row]}: record {record_id!r}: {modality} is "
                    f"{list(array.shape)}: expected [tokens, {dim}] with at least one token"
                )
            arrays.append(array)
            lengths[position] = len(array)
        return Ragged(np.concatenate([np.zeros((0, dim), np.float32), *arrays]), lengths)

    def _find_dim(self, modality: str) -> int:
        self.column(modality)
        for row, cell in enumerate(self._columns[modality]):
            if cell:
                return int(self._load(modality, row).shape[1])
        raise InputError(f"{self.path}: column {modality!r}: no record has a file; leave the modality out")

    def _load(self, modality: str, row: int) -> Float32[np.ndarray, "tokens dim"]:
        path = self._folder / self._columns[modality][row]
        name = f"{path}: record {self._columns[self._id_key][row]!r}"
        if not path.is_file():
            raise InputError(f"{name}: file missing; the column {modality!r} of {self.path} lists it")
        try:
            array = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise InputError(f"{name}: not a readable .npy file: {error}") from error
        if not isinstance(array, np.ndarray) or array.ndim not in (1, 2) or array.dtype.kind not in "fiub":
            raise InputError(f"{name}: expected numbers [dim] or [tokens, dim]")
        return np.atleast_2d(array).astype(np.float32)


def open_source(
    path: Path, csv_path: Path | None, id_key: str, modalities: Sequence[str] | None
) -> NpzSource | NpyFolderSource:
    """Opens a ``.npz`` file, or a folder whose CSV is ``csv_path`` (None: ``labels.csv`` in it).

    Raises:
        InputError: the input is missing, unreadable, or lacks a key; ids are not unique; there is no modality.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    source: NpzSource | NpyFolderSource
    if path.is_dir():
        source = NpyFolderSource(path, csv_path or path / "labels.csv", id_key, modalities)
    else:
        source = NpzSource(path, id_key, modalities)
    if not source.modalities:
        raise InputError(f"{source.path}: no features: expected some of {', '.join(MODALITIES)}")
    ids, counts = np.unique(source.column(id_key).astype(np.str_), return_counts=True)
    if (counts > 1).any():
        raise InputError(
            f"{source.path}: key {id_key!r}: {int((counts > 1).sum())} ids are not unique, such as "
            f"{str(ids[counts > 1][0])!r}"
        )
    return source


def _read_csv(path: Path) -> dict[str, list[str]]:
    """Columns of a UTF-8 CSV with a header."""
    if not path.is_file():
        raise InputError(f"{path}: no such file: a folder of .npy files needs a CSV that lists them")
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.reader(stream, strict=True)
            header = next(reader, [])
            rows = []
            for row in reader:
                if len(row) != len(header):
                    raise InputError(f"{path}: line {reader.line_num}: {len(row)} cells, the header has {len(header)}")
                rows.append(row)
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a UTF-8 CSV file: {error}") from error
    if len(set(header)) != len(header):
        raise InputError(f"{path}: a column name occurs twice in the header {', '.join(header)}")
    if not rows:
        raise InputError(f"{path}: no records")
    return {name: [row[index] for row in rows] for index, name in enumerate(header)}
