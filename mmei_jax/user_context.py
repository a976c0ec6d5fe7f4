"""What batches tell of their users: rows of the table of users, and affect profiles that another run made.

NumPy and Arrow only: this runs in reader threads.
"""

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Bool, Float32, Int64

from mmei_jax.config import Config
from mmei_jax.padding import spread
from mmei_jax.records import Dataset, Split
from mmei_jax.types import InputError, UserContext

# The columns of a file of profiles: what is known before a record, null without an earlier one of its user, and what
# was read in the record itself, which files of earlier versions lack.
PROFILE_COLUMNS = ("split", "id", "profile", "affect")


def user_names(dataset: Dataset, config: Config) -> tuple[str, ...]:
    """The users of the training splits, whom the table of users has rows for; () without one.

    Raises:
        InputError: no training record names its user.
    """
    if not config.model.user_embedding:
        return ()
    split = dataset.split(*config.data.train_splits)
    found = sorted(_texts(dataset, split.names, "user_id").drop_null().unique().to_pylist())
    if not found:
        names = "+".join(split.names)
        raise InputError(f"{dataset.path}: no record of split {names} names a user: model.user_embedding expects some")
    return tuple(found)


def profile_dim(config: Config) -> int:
    """Features of an affect profile; 0 where the configuration reads none.

    Raises:
        InputError: the file cannot be read.
    """
    return _read_profiles(config.data.affect_profiles).dim if config.data.affect_profiles else 0


def profiles_fingerprint(config: Config) -> str:
    """SHA-256 of the file of profiles; "" without one.

    Raises:
        InputError: the file cannot be read.
    """
    return _read_profiles(config.data.affect_profiles).sha256 if config.data.affect_profiles else ""


def read_user(dataset: Dataset, config: Config, user: str) -> UserContext:
    """What is known of a user before a new record of theirs: a context of one record.

    Their profile is the mean of what was read in all of their records that the file of profiles covers, the latest
    among them, whatever their splits: a new record comes after them all. Of an unknown user nothing is known, and
    affect alone ranks.

    Args:
        dataset: that the run was trained on.
        config: of the run.
        user: as the records name them.

    Raises:
        InputError: the run reads nothing of users, or its file of profiles does not say what was read in each record.
    """
    path = config.data.affect_profiles
    if not config.model.user_embedding and not path:
        raise InputError(
            f"user {user!r}: the run has no user side (config.model.user_embedding = False, "
            "config.data.affect_profiles = ''): expected no user"
        )
    index: Any = None
    profile: Any = None
    has_profile: Any = None
    names = user_names(dataset, config)
    if names:
        index = np.array([names.index(user) if user in names else -1], np.int32)
    if path:
        mean = _read_profiles(path).after_records(dataset, user, path)
        has_profile = np.array([mean is not None])
        profile = np.zeros((1, profile_dim(config)), np.float32) if mean is None else mean[None]
    return UserContext(index=index, profile=profile, has_profile=has_profile)


class UserReader:
    """Reads what is known of the users of one split's records."""

    def __init__(self, split: Split, config: Config) -> None:
        """Looks everything up once.

        Args:
            split: where the records are.
            config: what is read.

        Raises:
            InputError: no training record names its user, or a record has no line in the file of profiles.
        """
        self._index: Int64[np.ndarray, records] | None = None
        names = user_names(split.dataset, config)
        if names:
            users = _texts(split.dataset, split.names, "user_id")
            rows = pc.index_in(users, value_set=pa.array(names, pa.large_string()))
            # A user who is not in the training splits, or not named, has no row.
            self._index = rows.fill_null(-1).to_numpy()
        self._profile: Float32[np.ndarray, records] | None = None
        if config.data.affect_profiles:
            profiles = _read_profiles(config.data.affect_profiles)
            self._profile, self._has_profile = profiles.of_records(split, config.data.affect_profiles)

    def read(self, records: Int64[np.ndarray, "records"], is_record: Bool[np.ndarray, "batch"]) -> UserContext | None:
        """Of a batch: users of filler are unknown. None where the configuration reads nothing of them.

        Args:
            records: positions in the split.
            is_record: places of the batch that they take, in order.
        """
        if self._index is None and self._profile is None:
            return None
        index: Any = None if self._index is None else spread(self._index[records], is_record, -1)
        profile: Any = None if self._profile is None else spread(self._profile[records], is_record)
        has_profile: Any = None if self._profile is None else spread(self._has_profile[records], is_record)
        return UserContext(index=index, profile=profile, has_profile=has_profile)


class _Profiles:
    """The content of a file of profiles."""

    def __init__(self, table: pa.Table, sha256: str, path: Path) -> None:
        self.sha256 = sha256
        self._splits, self._ids = (table[name].cast(pa.large_string()).combine_chunks() for name in ("split", "id"))
        self.dim: int = table["profile"].type.list_size
        self._values, self._has_profile = self._numbers(table, "profile", path)
        has_affect = "affect" in table.schema.names
        self._affect = self._numbers(table, "affect", path)[0] if has_affect else None

    def _numbers(self, table: pa.Table, name: str, path: Path) -> tuple[np.ndarray, np.ndarray]:
        """``[rows, dim]``, 0 where there are none, and ``[rows]`` whether there are."""
        column = table[name].combine_chunks()
        is_given = np.asarray(column.is_valid())
        values = np.zeros((table.num_rows, self.dim), np.float32)
        # Flattening leaves nulls out.
        values[is_given] = column.flatten().to_numpy().astype(np.float32).reshape(-1, self.dim)
        bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
        if bad.size:
            raise InputError(f"{path}: row {bad[0]}: {name} {values[bad[0]].tolist()}: expected finite numbers")
        return values, is_given

    def _lines(self, split: str, records: pa.ChunkedArray) -> np.ndarray:
        """``[records]`` the row of each record of a split; -1 where there is none."""
        own = np.flatnonzero(pc.equal(self._splits, split).to_numpy(zero_copy_only=False))
        found = pc.index_in(records, value_set=self._ids.take(pa.array(own)))
        # One more, for -1.
        return np.append(own, -1)[found.fill_null(-1).to_numpy()]

    def of_records(self, split: Split, path: str) -> tuple[np.ndarray, np.ndarray]:
        rows = np.concatenate([self._lines(name, _texts(split.dataset, [name], "id")) for name in split.names])
        missing = split.ids(np.flatnonzero(rows < 0))
        if missing:
            raise InputError(
                f"{path}: no line for record {missing[0]!r} of split {'+'.join(split.names)} ({len(missing)} missing); "
                "make it anew with python -m mmei_jax.affect_profiles"
            )
        return self._values[rows], self._has_profile[rows]

    def after_records(self, dataset: Dataset, user: str, path: str) -> np.ndarray | None:
        if self._affect is None:
            raise InputError(
                f"{path}: no column affect, which a new record's profile is made of: expected a file that "
                "python -m mmei_jax.affect_profiles makes now, and a run that is trained with it"
            )
        parts = []
        for name in dataset.split_names:
            is_own = pc.equal(_texts(dataset, [name], "user_id"), user)
            parts.append(self._lines(name, _texts(dataset, [name], "id").filter(is_own)))
        rows = np.concatenate(parts)
        rows = rows[rows >= 0]
        if not rows.size:
            return None
        return np.asarray(self._affect[rows].mean(axis=0, dtype=np.float64), np.float32)


def _texts(dataset: Dataset, splits: Sequence[str], column: str) -> pa.ChunkedArray:
    """A column of text over joined splits, which no loop of Python goes through."""
    batches = [batch.column(column) for name in splits for _, batch in dataset.shard_batches(name)]
    return pa.chunked_array(batches, pa.large_string())


# Every reader of a run asks for the same file.
@functools.lru_cache(maxsize=2)
def _read_profiles(path: str) -> _Profiles:
    try:
        table = pq.read_table(path)
        sha256 = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(f"config.data.affect_profiles = {path!r}: expected a Parquet file: {error}") from error
    names = tuple(table.schema.names)
    types = {table.schema.field(name).type for name in names if name in ("profile", "affect")}
    is_fit = names in (PROFILE_COLUMNS, PROFILE_COLUMNS[:-1]) and all(map(pa.types.is_fixed_size_list, types))
    # Equal types are of one size.
    if not is_fit or len(types) != 1 or ("affect" in names and table["affect"].null_count):
        raise InputError(
            f"{path}: columns {', '.join(names)}: expected {', '.join(PROFILE_COLUMNS)}, as affect_profiles makes them"
        )
    return _Profiles(table, sha256, Path(path))
