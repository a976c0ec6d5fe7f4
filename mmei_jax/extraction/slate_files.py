"""What the users of clips were shown and how they received it, from logs: tables in JSON lines, CSV or Parquet.

**Slates**: a row per shown item, those of one clip in the order in which they were shown. ``clip`` (its id), ``item``
(an id of the catalogue) and ``satisfaction`` (a number, larger is better) in every row; ``dwell_seconds``,
``num_replays``, ``is_liked`` and ``propensity`` (the probability with which the logging policy showed the item here) in
every row or in none.

**Relevant items**: a row per item that is truly relevant to a clip's user, whether it was shown or not; ``clip`` and
``item``. Ranking metrics count them.

In both, ``split`` where an id occurs in several splits. Clips that no row is about have no slate, no relevant items.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmei_jax.extraction.clips import Clip
from mmei_jax.fingerprints import canonical_json
from mmei_jax.recommendation.catalogue_files import read_whole_catalogue
from mmei_jax.records import Catalogue, Slate
from mmei_jax.row_files import Reading, read_rows, read_text, refuse_unknown_columns, shown
from mmei_jax.types import InputError

# What says which clip and item a row is about.
_ABOUT = ("clip", "split", "item")
# Fields of a slate that a log may lack, beside satisfaction.
OPTIONAL_FIELDS = ("dwell_seconds", "num_replays", "is_liked", "propensity")
SLATE_COLUMNS = (*_ABOUT, "satisfaction", *OPTIONAL_FIELDS)
RELEVANT_COLUMNS = _ABOUT
_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}
_LARGEST = {"int32": 2**31 - 1, "float32": float(np.finfo(np.float32).max)}

# Split and id of a clip.
_Key = tuple[str, str]


@dataclass(frozen=True)
class Recommendations:
    """What a data set of clips holds for recommending, beside what each clip carries.

    Attributes:
        catalogue: the items.
        has_relevant_items: whether it is known what is relevant to whom.
    """

    catalogue: Catalogue
    has_relevant_items: bool

    def sha256(self) -> str:
        """Of the catalogue; what clips carry is in their own fingerprint."""
        items = self.catalogue
        digest = hashlib.sha256(
            canonical_json([items.ids, items.kind.tolist(), list(items.kind_names), items.texts]).encode()
        )
        digest.update(np.ascontiguousarray(items.features).tobytes())
        return digest.hexdigest()


def read_recommendations(
    clips: Sequence[Clip],
    catalogue: Path | None,
    slates: Path | None,
    relevant_items: Path | None,
    *,
    report: Callable[[str], None] = print,
) -> tuple[list[Clip], Recommendations | None]:
    """The clips with their slates and relevant items, and the catalogue.

    Args:
        clips: of a list or a builder.
        catalogue: file of the items, see :mod:`mmei_jax.recommendation.catalogue_files`; None, with the other two,
            where nothing is recommended.
        slates: file of what was shown.
        relevant_items: file of what is relevant; None where that is not known.
        report: takes a line on each of the two tables.

    Raises:
        InputError: a file goes without another one or cannot be read, a cell does not hold what its column says, an
            item is not in the catalogue, or no row is about a clip of the list; names file and row.
    """
    if catalogue is None or slates is None:
        if catalogue is not None or slates is not None or relevant_items is not None:
            raise InputError(
                f"--catalogue={catalogue}, --slates={slates}, --relevant_items={relevant_items}: expected the first "
                "two together, the third with them or not, or none of them"
            )
        return list(clips), None
    items = read_whole_catalogue(catalogue)
    rows_of = _Places(clips, {name: row for row, name in enumerate(items.ids)}, catalogue)
    found = _read_slates(slates, rows_of)
    report(_told(slates, "slates", found, len(clips), rows_of))
    relevant: dict[_Key, np.ndarray] = {}
    if relevant_items is not None:
        relevant = _read_relevant_items(relevant_items, rows_of)
        report(_told(relevant_items, "relevant items", relevant, len(clips), rows_of))
    joined = [
        dataclasses.replace(
            clip, slate=found.get((clip.split, clip.id)), relevant_items=relevant.get((clip.split, clip.id))
        )
        for clip in clips
    ]
    return joined, Recommendations(items, relevant_items is not None)


class _Places:
    """Finds the clip and the item that a row is about, and counts rows about others' clips.

    Attributes:
        num_passed_over: rows of the last table that are about no clip of the list.
    """

    def __init__(self, clips: Sequence[Clip], row_of_item: Mapping[str, int], catalogue: Path) -> None:
        self._splits: dict[str, list[str]] = {}
        for clip in clips:
            self._splits.setdefault(clip.id, []).append(clip.split)
        self._row_of_item, self._catalogue = row_of_item, catalogue
        self.num_passed_over = 0

    def rows(
        self, path: Path, what: str, columns: tuple[str, ...], readings: Mapping[str, Reading]
    ) -> Iterator[tuple[str, dict[str, Any], _Key, int]]:
        """Where a row stands, its cells, its clip, and the catalogue row of its item."""
        self.num_passed_over = 0
        for where, cells in read_rows(path, what, readings):
            refuse_unknown_columns(cells, columns, where)
            clip, split, item = (read_text(cells, name, where) for name in _ABOUT)
            if clip is None or item is None:
                raise InputError(f"{where}: clip {shown(clip)}, item {shown(item)}: expected both")
            splits = self._splits.get(clip, [])
            if split is None and len(splits) > 1:
                told = f"occurs in the splits {', '.join(splits)}: expected a column split that says which"
                raise InputError(f"{where}: clip {clip!r}: {told}")
            if not splits or (split is not None and split not in splits):
                self.num_passed_over += 1
                continue
            if item not in self._row_of_item:
                raise InputError(f"{where}: item {item!r}: expected an id of {self._catalogue}")
            yield where, cells, (split or splits[0], clip), self._row_of_item[item]


def _read_slates(path: Path, places: _Places) -> dict[_Key, Slate]:
    """What each clip's user was shown."""
    columns: dict[_Key, dict[str, list[Any]]] = {}
    known: tuple[str, ...] | None = None
    # Booleans of CSV; whatever else its cells say is a number or is refused with the others.
    readings = dict.fromkeys(("satisfaction", *OPTIONAL_FIELDS), _read_number)
    readings["is_liked"] = lambda cell, where: _BOOLEANS.get(cell.lower(), cell)
    for where, cells, key, item in places.rows(path, "table of slates", SLATE_COLUMNS, readings):
        given = tuple(name for name in OPTIONAL_FIELDS if cells.get(name) is not None)
        known = given if known is None else known
        if given != known:
            name = min(set(given) ^ set(known))
            raise InputError(f"{where}: {name} {shown(cells.get(name))}: expected it in every row, or in none")
        slate = columns.setdefault(key, {name: [] for name in ("item_index", "satisfaction", *known)})
        slate["item_index"].append(item)
        for name in ("satisfaction", *known):
            slate[name].append(_CHECKS[name](cells.get(name), f"{where}: {name}"))
    dtypes = {"item_index": np.int32, "num_replays": np.int32, "is_liked": np.bool_}
    return {
        key: Slate(
            item_index=np.array(slate["item_index"], np.int32),
            satisfaction=np.array(slate["satisfaction"], np.float32),
            **{
                name: np.array(slate[name], dtypes.get(name, np.float32)) if name in slate else None
                for name in OPTIONAL_FIELDS
            },
        )
        for key, slate in columns.items()
    }


def _read_relevant_items(path: Path, places: _Places) -> dict[_Key, np.ndarray]:
    """Catalogue rows of what is relevant to each clip's user, in the order of the file."""
    found: dict[_Key, dict[int, None]] = {}
    for where, cells, key, item in places.rows(path, "table of relevant items", RELEVANT_COLUMNS, {}):
        own = found.setdefault(key, {})
        if item in own:
            raise InputError(f"{where}: item {cells['item']!r}: stands there for clip {key[1]!r} already")
        own[item] = None
    return {key: np.array(list(own), np.int32) for key, own in found.items()}


def _told(path: Path, what: str, found: Mapping[_Key, Any], num_clips: int, places: _Places) -> str:
    if not found:
        raise InputError(
            f"{path}: no row is about a clip of the list ({places.num_passed_over} are about others): expected ids of "
            "clips in its column clip"
        )
    others = f"; {places.num_passed_over:,} rows about clips that the list does not have" * (places.num_passed_over > 0)
    return f"{path}: {what} of {len(found):,} of {num_clips:,} clips{others}"


def _read_number(cell: str, where: str) -> Any:
    """The number that a cell of CSV holds; its text, which is refused later, where it holds none."""
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            continue
    return cell


def _finite(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _LARGEST["float32"]:
        raise InputError(f"{where} {shown(value)}: expected a finite number")
    return float(value)


def _seconds(value: Any, where: str) -> float:
    if _finite(value, where) < 0.0:
        raise InputError(f"{where} {shown(value)}: expected 0 or more seconds")
    return float(value)


def _count(value: Any, where: str) -> int:
    # Tables with missing cells turn whole numbers into floats.
    if not _finite(value, where).is_integer() or not 0 <= value <= _LARGEST["int32"]:
        raise InputError(f"{where} {shown(value)}: expected a whole number, 0 or more")
    return int(value)


def _boolean(value: Any, where: str) -> bool:
    if not isinstance(value, bool) and (value not in (0, 1) or isinstance(value, float)):
        raise InputError(f"{where} {shown(value)}: expected true or false")
    return bool(value)


def _probability(value: Any, where: str) -> float:
    # Also what is rounded to 0 where it is stored.
    if not 0.0 < np.float32(_finite(value, where)) <= 1.0:
        raise InputError(f"{where} {shown(value)}: expected a probability above 0, at most 1")
    return float(value)


_CHECKS: dict[str, Callable[[Any, str], Any]] = {
    "satisfaction": _finite,
    "dwell_seconds": _seconds,
    "num_replays": _count,
    "is_liked": _boolean,
    "propensity": _probability,
}
