"""The feedback log: impressions with their propensities and what followed, as Arrow IPC files.

A log is a folder. Every writer fills segments of its own, so that any number of processes may write at once. While a
segment grows it is a ``.partial`` file, which its writer holds a lock on and brings to the disk after every append;
sealed, it is ``<writer>-<number>.arrow``, an Arrow IPC file that appears whole, by a rename. Readers see sealed
segments only. What a writer that was killed had appended is in its partial: the next writer of the folder, or
:func:`recover`, seals it.

One row is one impression: a slate that a user was shown, with lists of equal length for its items.
"""

import fcntl
import json
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool

from mmei_jax.feedback.rows import refuse_rows
from mmei_jax.types import InputError

FORMAT = "mmei_jax feedback log 1"
_FORMAT_KEY = b"format"
_LISTS = {
    "item_ids": pa.string(),
    "positions": pa.int32(),
    "propensities": pa.float64(),
    "dwell_seconds": pa.float64(),
    "num_replays": pa.int32(),
    "is_liked": pa.bool_(),
}
# The columns of a log. ``positions`` are places on the screen from 0; ``propensities`` the probability that the policy
# put this item at this position; ``satisfaction`` a rating from 1 to 5, null where the user gave none.
SCHEMA = pa.schema(
    [
        pa.field("impression_id", pa.string(), nullable=False),
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("time_seconds", pa.float64(), nullable=False),
        pa.field("policy_version", pa.string(), nullable=False),
        pa.field("context", pa.list_(pa.float32()), nullable=False),
        *(pa.field(name, pa.list_(kind), nullable=False) for name, kind in _LISTS.items()),
        pa.field("satisfaction", pa.float64()),
    ],
    metadata={_FORMAT_KEY: FORMAT},
)
_PARTIAL = ".partial"


def check_impressions(table: pa.Table, known_items: Iterable[str] | None = None, *, where: str = "impressions") -> None:
    """Refuses a table that is no valid part of a log.

    Args:
        table: impressions.
        known_items: ids that may be shown; None takes any. Of many ids give a frozenset, which is used as it is.
        where: begins the message.

    Raises:
        InputError: another schema, or a value that is not allowed; names the column, the rows and what is accepted.
    """
    if not table.schema.equals(SCHEMA):
        differing = sorted({str(field) for field in table.schema} ^ {str(field) for field in SCHEMA})
        raise InputError(f"{where}: columns {'; '.join(differing)} differ from the schema of a feedback log")

    def refuse(is_good: Bool[np.ndarray, "rows"], name: str, accepted: str) -> None:
        refuse_rows(is_good, f"{where}: {name}", lambda row: table[name][row].as_py(), accepted)

    for name in ("impression_id", "user_id", "time_seconds", "policy_version", "context", *_LISTS):
        refuse(~_numpy(table[name].is_null()), name, "a value")
    for name in ("context", *_LISTS):
        refuse(_all(table, name, lambda values: ~_numpy(values.is_null())), name, "a value in every place")
    for name in ("time_seconds", "satisfaction"):
        refuse(np.isfinite(_numpy(table[name].fill_null(1.0))), name, "a finite number")
    sizes = _sizes(table, "item_ids")
    refuse(sizes > 0, "item_ids", "at least one item")
    for name in _LISTS:
        refuse(_sizes(table, name) == sizes, name, "one value for each item")
    refuse(_sizes(table, "context") == (_sizes(table, "context")[:1] if table.num_rows else 0), "context", "one length")
    refuse(_all(table, "context", lambda values: np.isfinite(_numpy(values))), "context", "finite numbers")
    probable = "probabilities above 0 and at most 1"
    refuse(
        _all(table, "propensities", lambda values: _between(values, 0.0, 1.0, is_open=True)), "propensities", probable
    )
    for name in ("dwell_seconds", "num_replays"):
        refuse(_all(table, name, lambda values: _between(values, 0.0, np.inf)), name, "finite numbers, at least 0")
    refuse(_all(table, "positions", lambda values: _numpy(values) >= 0), "positions", "places from 0")
    for name in ("positions", "item_ids"):
        refuse(_distinct(table, name), name, "each one once")
    rated = _numpy(table["satisfaction"].fill_null(1.0))
    refuse((rated >= 1.0) & (rated <= 5.0), "satisfaction", "a rating from 1 to 5, or null")
    if known_items is not None:
        known = frozenset(known_items)

        def is_known(values: Any) -> np.ndarray:
            # The catalogue is large, and a set of it is there already: only what was shown is looked up.
            unknown = [item for item in pc.unique(values).to_pylist() if item not in known]
            return ~_numpy(pc.is_in(values, value_set=pa.array(unknown, pa.string())))

        refuse(_all(table, "item_ids", is_known), "item_ids", "items of the catalogue")


def _numpy(values: Any) -> np.ndarray:
    """Of an array or a chunked one."""
    return np.asarray(values.to_numpy() if isinstance(values, pa.ChunkedArray) else values.to_numpy(False))


def _between(values: Any, low: float, high: float, *, is_open: bool = False) -> np.ndarray:
    numbers = _numpy(values).astype(np.float64)
    above = numbers > low if is_open else numbers >= low
    result: np.ndarray = np.isfinite(numbers) & above & (numbers <= high)
    return result


def _sizes(table: pa.Table, name: str) -> np.ndarray:
    return _numpy(pc.list_value_length(table[name])).astype(np.int64)


def _all(table: pa.Table, name: str, is_good: Callable[[Any], np.ndarray]) -> np.ndarray:
    """By row, whether all values of its list are good."""
    sizes = _sizes(table, name)
    good = np.asarray(is_good(pc.list_flatten(table[name].combine_chunks())), bool)
    result: np.ndarray = np.bincount(np.repeat(np.arange(len(sizes)), sizes), ~good, minlength=len(sizes)) == 0
    return result


def _distinct(table: pa.Table, name: str) -> np.ndarray:
    """By row, whether no value of its list comes twice."""
    sizes = _sizes(table, name)
    values = pc.list_flatten(table[name].combine_chunks())
    codes = _numpy(values.dictionary_encode().indices).astype(np.int64)
    owner = np.repeat(np.arange(len(sizes)), sizes)
    pairs = np.stack([owner, codes], axis=1)
    _, first = np.unique(pairs, axis=0, return_index=True)
    result: np.ndarray = np.bincount(owner[first], minlength=len(sizes)) == sizes
    return result


class FeedbackWriter:
    """Appends impressions to a log; a context manager, which seals what was appended.

    Args:
        folder: of the log; made if need be. What killed writers left there is sealed first.
        known_items: ids that may be shown; None takes any.
        rows_per_segment: after which a segment is sealed.
    """

    def __init__(self, folder: Path, *, known_items: Iterable[str] | None = None, rows_per_segment: int = 65_536):
        folder.mkdir(parents=True, exist_ok=True)
        recover(folder)
        self._folder, self._rows_per_segment = folder, rows_per_segment
        self._known_items = None if known_items is None else frozenset(known_items)
        self._name, self._number, self._num_rows = uuid.uuid4().hex[:12], 0, 0
        self._stream: pa.RecordBatchStreamWriter | None = None
        self._file: Any = None

    def __enter__(self) -> "FeedbackWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seal()

    def append(self, impressions: pa.Table) -> None:
        """Adds impressions, on the disk when this returns.

        Args:
            impressions: of :data:`SCHEMA`.

        Raises:
            InputError: see :func:`check_impressions`; nothing is appended then.
        """
        check_impressions(impressions, self._known_items)
        if self._stream is None:
            self._begin()
        for batch in impressions.combine_chunks().to_batches():
            self._stream.write_batch(batch)  # type: ignore[union-attr]
        self._file.flush()
        os.fsync(self._file.fileno())
        self._num_rows += impressions.num_rows
        if self._num_rows >= self._rows_per_segment:
            self.seal()

    def seal(self) -> None:
        """Makes what was appended visible to readers; does nothing where there is nothing."""
        if self._stream is None:
            return
        self._stream.close()
        self._file.flush()
        _seal(self._partial)
        self._file.close()
        self._stream, self._num_rows, self._number = None, 0, self._number + 1

    @property
    def _partial(self) -> Path:
        return self._folder / f"{self._name}-{self._number:06d}.arrow{_PARTIAL}"

    def _begin(self) -> None:
        self._file = _open_locked(self._partial)
        self._stream = pa.ipc.new_stream(self._file, SCHEMA)


def _open_locked(partial: Path) -> Any:
    """A new partial, locked: the lock tells a writer that is alive from one that was killed, with whom it ends."""
    while True:
        file = partial.open("xb")
        fcntl.flock(file, fcntl.LOCK_EX)
        # Before it was locked, another writer may have taken it for a killed one's and removed it.
        if _is_at(file, partial):
            return file
        file.close()


def _is_at(file: Any, path: Path) -> bool:
    """Whether the open file is the one that the path names."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def recover(folder: Path) -> list[Path]:
    """Seals what writers that are no longer alive had appended.

    Returns:
        The sealed segments. A partial without a whole append is removed.

    Raises:
        OSError: a partial cannot be read, or a segment cannot be written; the partial stays as it is.
    """
    sealed = []
    for partial in sorted(folder.glob(f"*.arrow{_PARTIAL}")):
        try:
            file = partial.open("rb")
        except FileNotFoundError:
            continue
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            # Its writer, or another that recovers, may have sealed it in between.
            if _is_at(file, partial):
                found = _seal(partial)
                sealed += [found] if found is not None else []
    return sealed


def _seal(partial: Path) -> Path | None:
    """The whole batches of a partial as a sealed segment; None where there is none."""
    batches = []
    # Read before it is parsed: of bytes in memory, an error says that they end too early, and nothing else. What was
    # cut off within a batch, or within the schema, was never confirmed to anybody.
    content = pa.py_buffer(partial.read_bytes())
    with suppress(pa.ArrowInvalid, OSError), pa.ipc.open_stream(content) as reader:
        while True:
            try:
                batches.append(reader.read_next_batch())
            except StopIteration:
                break
    path = partial.with_name(partial.name.removesuffix(_PARTIAL))
    if not batches:
        partial.unlink()
        return None
    whole = path.with_name(f"{path.name}.sealing")
    with whole.open("wb") as file:
        with pa.ipc.new_file(file, SCHEMA) as writer:
            for batch in batches:
                writer.write_batch(batch)
        file.flush()
        os.fsync(file.fileno())
    whole.replace(path)
    partial.unlink()
    return path


def segments(folder: Path) -> list[Path]:
    """The sealed segments of a log, in the order of their names."""
    return sorted(folder.glob("*.arrow"))


def read_log(folder: Path, known_items: Iterable[str] | None = None) -> pa.Table:
    """Every impression of the sealed segments.

    Args:
        folder: of the log.
        known_items: ids that may have been shown; None takes any.

    Raises:
        InputError: there is no log, a segment is damaged or of another schema, or a row is not valid.
    """
    return pa.concat_tables(list(read_segments(folder, known_items)))


def read_segments(folder: Path, known_items: Iterable[str] | None = None) -> Iterator[pa.Table]:
    """The same, segment by segment.

    Args:
        folder: of the log.
        known_items: ids that may have been shown; None takes any.

    Raises:
        InputError: see :func:`read_log`.
    """
    paths = segments(folder)
    if not paths:
        raise InputError(f"{folder}: expected a feedback log, with segments *.arrow")
    known = None if known_items is None else frozenset(known_items)
    for path in paths:
        try:
            with pa.memory_map(str(path)) as source:
                table = pa.ipc.open_file(source).read_all()
        except (pa.ArrowInvalid, OSError) as error:
            raise InputError(f"{path}: expected a sealed segment of a feedback log: {error}") from error
        found = (table.schema.metadata or {}).get(_FORMAT_KEY, b"").decode("utf-8", "replace")
        if found != FORMAT:
            raise InputError(f"{path}: format {found!r}: expected {FORMAT!r}")
        check_impressions(table, known, where=str(path))
        yield table


def make_impressions(columns: dict[str, Sequence[Any]]) -> pa.Table:
    """A table of :data:`SCHEMA` from columns by name.

    Raises:
        InputError: a column is missing, unknown, or does not convert; names it.
    """
    if columns.keys() != set(SCHEMA.names):
        differing = json.dumps(sorted(columns.keys() ^ set(SCHEMA.names)))
        raise InputError(f"impressions: columns {differing} are missing or unknown; expected {', '.join(SCHEMA.names)}")
    arrays = []
    for field in SCHEMA:
        try:
            arrays.append(pa.array(list(columns[field.name]), field.type))
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
            raise InputError(f"impressions: {field.name}: expected {field.type}: {error}") from error
    lengths = {field.name: len(array) for field, array in zip(SCHEMA, arrays, strict=True)}
    if len(set(lengths.values())) != 1:
        raise InputError(f"impressions: columns of lengths {lengths}: expected the same for all")
    return pa.table(arrays, schema=SCHEMA)
