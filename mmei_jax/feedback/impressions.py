"""From simulated visits to impressions of a feedback log, and from a log back to arrays."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int

from mmei_jax.feedback.log import make_impressions, read_segments, segments
from mmei_jax.feedback.logged_visits import LoggedVisits
from mmei_jax.feedback.rows import refuse_rows
from mmei_jax.feedback.visits import Visits
from mmei_jax.types import InputError

# Simulated users come once a day.
_SECONDS_BETWEEN_VISITS = 86_400.0
_USER = "user-"


def visits_to_impressions(
    visits: Visits, item_ids: Sequence[str], *, round_number: int, policy_version: str
) -> list[pa.Table]:
    """Impressions of a round, a table for each visit.

    Args:
        visits: arrays on the host, ``[visits, users, ...]``.
        item_ids: names of the catalogue's rows.
        round_number: begins the ids, so that they are unique and sort by time.
        policy_version: that drew the slates.
    """
    names = np.asarray(item_ids)
    num_visits, num_users, slate_size = visits.items.shape
    tables = []
    for visit in range(num_visits):
        seconds = (round_number * num_visits + visit) * _SECONDS_BETWEEN_VISITS
        ratings = np.asarray(visits.rating[visit], np.float64)
        context = np.stack([visits.record[visit], visits.kind[visit]], axis=1).astype(np.float32)
        columns = {
            "impression_id": [f"r{round_number:04d}-v{visit:04d}-u{user:07d}" for user in range(num_users)],
            "user_id": [f"{_USER}{user:07d}" for user in range(num_users)],
            "time_seconds": [seconds] * num_users,
            "policy_version": [policy_version] * num_users,
            "context": list(context),
            "item_ids": names[visits.items[visit]].tolist(),
            "positions": [list(range(slate_size))] * num_users,
            # Of float32: a sum of probabilities may exceed 1 by its rounding.
            "propensities": list(np.minimum(np.asarray(visits.propensity[visit], np.float64), 1.0)),
            "dwell_seconds": list(np.asarray(visits.dwell_seconds[visit], np.float64)),
            "num_replays": list(np.asarray(visits.num_replays[visit], np.int32)),
            "is_liked": np.asarray(visits.is_liked[visit]).tolist(),
            "satisfaction": [None if np.isnan(rating) else rating for rating in ratings.tolist()],
        }
        tables.append(make_impressions(columns))
    return tables


def visits_to_log(visits: Visits) -> LoggedVisits:
    """What a log would give back of visits, without its files.

    Args:
        visits: arrays on the host, ``[visits, users, ...]``.
    """
    num_visits, num_users, slate_size = visits.items.shape

    def by_slate(values: np.ndarray, dtype: type) -> np.ndarray:
        return np.asarray(values, dtype).reshape(num_visits * num_users, slate_size)

    return LoggedVisits(
        user=np.tile(np.arange(num_users), num_visits),
        record=np.asarray(visits.record, np.int64).ravel(),
        kind=np.asarray(visits.kind, np.int64).ravel(),
        items=by_slate(visits.items, np.int64),
        propensities=np.minimum(by_slate(visits.propensity, np.float64), 1.0),
        dwell_seconds=by_slate(visits.dwell_seconds, np.float64),
        num_replays=by_slate(visits.num_replays, np.int64),
        is_liked=by_slate(visits.is_liked, np.bool_),
        rating=np.asarray(visits.rating, np.float64).ravel(),
    )


def read_visits(
    folder: Path, item_ids: Sequence[str], *, num_users: int | None = None, num_records: int | None = None
) -> LoggedVisits:
    """What a log holds, in an order that does not depend on who wrote which segment.

    Args:
        folder: of the log.
        item_ids: names of the catalogue's rows; others are refused.
        num_users: of the loop; None takes any.
        num_records: of its pool; None takes any.

    Raises:
        InputError: the log is missing or damaged, or is not of such a loop; names the segment and its rows.
    """
    tables: list[pa.Table] = []
    for path, table in zip(segments(folder), read_segments(folder, item_ids), strict=True):
        if table.num_rows:
            tables.append(table)
            slate_size = len(tables[0]["item_ids"][0])
            _check_visits(table, path, slate_size, num_users=num_users, num_records=num_records)
    if not tables:
        raise InputError(f"{folder}: expected impressions, found segments without any")
    table = pa.concat_tables(tables).sort_by("impression_id").combine_chunks()

    def by_position(name: str) -> np.ndarray:
        values = pc.list_flatten(table[name])
        if name == "item_ids":
            values = pc.index_in(values, value_set=pa.array(item_ids, pa.string()))
        return values.to_numpy().reshape(table.num_rows, -1)

    context = by_position("context").astype(np.int64)
    return LoggedVisits(
        user=_user_numbers(table),
        record=context[:, 0],
        kind=context[:, 1],
        items=by_position("item_ids").astype(np.int64),
        propensities=by_position("propensities"),
        dwell_seconds=by_position("dwell_seconds"),
        num_replays=by_position("num_replays").astype(np.int64),
        is_liked=by_position("is_liked").astype(bool),
        rating=pc.fill_null(table["satisfaction"], float("nan")).to_numpy(),
    )


def _check_visits(
    table: pa.Table, path: Path, slate_size: int, *, num_users: int | None, num_records: int | None
) -> None:
    """What a loop relies on beyond what every log holds.

    Raises:
        InputError: a row is not of a loop; names the segment and the rows.
    """

    def refuse(is_good: np.ndarray, name: str, accepted: str) -> None:
        refuse_rows(np.asarray(is_good, bool), f"{path}: {name}", lambda row: table[name][row].as_py(), accepted)

    sizes = pc.list_value_length(table["item_ids"]).to_numpy()
    refuse(sizes == slate_size, "item_ids", f"slates of one size, {slate_size}")
    places = pc.list_flatten(table["positions"]).to_numpy().reshape(-1, slate_size)
    refuse((places == np.arange(slate_size)).all(axis=1), "positions", "places that rise by 1 from 0")
    refuse(pc.list_value_length(table["context"]).to_numpy() == 2, "context", "a record and a kind of content")
    is_named = pc.match_substring_regex(table["user_id"], f"^{_USER}[0-9]{{1,18}}$").to_numpy()
    refuse(is_named, "user_id", f"{_USER} and a number")
    users, records = _user_numbers(table), pc.list_element(table["context"], 0).to_numpy()
    if num_users is not None:
        refuse(users < num_users, "user_id", f"one of the loop's {num_users} users")
    if num_records is not None:
        is_known = (records >= 0) & (records < num_records)
        refuse(is_known, "context", f"a record of the loop's {num_records} first, then the kind of content")


def _user_numbers(table: pa.Table) -> Int[np.ndarray, "visits"]:
    numbers: np.ndarray = pc.cast(pc.utf8_slice_codeunits(table["user_id"], len(_USER)), pa.int64()).to_numpy()
    return numbers
