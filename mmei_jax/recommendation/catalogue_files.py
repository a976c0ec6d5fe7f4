"""Reads the items of a catalogue from JSON lines, CSV or Parquet, block by block, lists of ids, and what was seen.

Columns: ``id``, ``kind`` (one of the run's kinds) and ``features`` (as many numbers as the run reads of an item; may be
missing where it reads none) in every row; ``title``, ``description``, ``tags``, ``creator`` and ``origin`` (``human``
or ``ai_generated``) where known. In CSV, ``features`` is a JSON list, and ``tags`` a JSON list or words joined by "|";
an empty cell says nothing.
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from mmei_jax.fingerprints import canonical_json
from mmei_jax.records import Catalogue
from mmei_jax.row_files import Reading, Row, read_json, read_rows, read_text, refuse_unknown_columns, shown
from mmei_jax.types import InputError

COLUMNS = ("id", "kind", "title", "description", "tags", "creator", "origin", "features")
ORIGINS = ("human", "ai_generated")
# Items that are in memory at once, and that the tower embeds at once.
ROWS_PER_BLOCK = 4_096
_SEEN_COLUMNS = ("user", "item")
_TEXTS = ("title", "description", "creator", "origin")
# What a catalogue's cells of CSV hold beside texts.
_READINGS: dict[str, Reading] = {
    "tags": lambda cell, where: read_json(cell, where) if cell.startswith("[") else cell.split("|"),
    "features": read_json,
}


def read_catalogue(path: Path, kind_names: Sequence[str], item_dim: int) -> Iterator[Catalogue]:
    """The items of a file, in its order, :data:`ROWS_PER_BLOCK` at a time.

    Args:
        path: ``.jsonl``, ``.csv`` or ``.parquet``.
        kind_names: kinds that an item may be of, in the order of their numbers.
        item_dim: features of an item; 0 reads none.

    Yields:
        Blocks of at least one item. ``texts`` holds, as JSON, what is known of title, description, tags, creator and
        origin.

    Raises:
        InputError: the file cannot be read or holds no item, a column is unknown, a cell does not hold what its column
            says, or an id occurs twice; names file and row.
    """
    rows, seen = _rows(path), set[str]()
    while block := list(itertools.islice(rows, ROWS_PER_BLOCK)):
        yield _block(block, tuple(kind_names), item_dim, seen)
    if not seen:
        raise InputError(f"{path}: no item in it; expected at least one")


def read_whole_catalogue(path: Path) -> Catalogue:
    """All items of a file, for a data set that is to have them.

    Kinds are numbered in alphabetical order. Items have as many features as the first of them, or all have none.

    Args:
        path: ``.jsonl``, ``.csv`` or ``.parquet``.

    Raises:
        InputError: as :func:`read_catalogue`, or a row has no kind, or another number of features than others.
    """
    kinds, item_dim = set[str](), 0
    for where, cells in _rows(path):
        kind = read_text(cells, "kind", where)
        if kind is None:
            raise InputError(f"{where}: kind missing: expected a text, such as music")
        kinds.add(kind)
        features = cells.get("features")
        item_dim = item_dim or (len(features) if isinstance(features, list) else 0)
    blocks = list(read_catalogue(path, sorted(kinds), item_dim))
    return Catalogue(
        ids=[item for block in blocks for item in block.ids],
        kind=np.concatenate([block.kind for block in blocks]),
        kind_names=tuple(sorted(kinds)),
        features=np.concatenate([block.features for block in blocks]),
        texts=[text for block in blocks for text in block.texts],
    )


def split_catalogue(catalogue: Catalogue) -> Iterator[Catalogue]:
    """The same items, :data:`ROWS_PER_BLOCK` at a time."""
    for start in range(0, len(catalogue.ids), ROWS_PER_BLOCK):
        part = slice(start, start + ROWS_PER_BLOCK)
        yield Catalogue(
            ids=catalogue.ids[part],
            kind=catalogue.kind[part],
            kind_names=catalogue.kind_names,
            features=catalogue.features[part],
            texts=catalogue.texts[part],
            word_state=None if catalogue.word_state is None else catalogue.word_state[part],
            word_ids=None if catalogue.word_ids is None else catalogue.word_ids[part],
        )


def describe(text: str, item_id: str) -> dict[str, Any]:
    """What the text of an item says: title, description, tags, creator, origin, each where known.

    Args:
        text: of :class:`~mmei_jax.records.Catalogue`.
        item_id: of the item, for errors.

    Raises:
        InputError: it is no JSON object, or title, creator or origin is something else than it may be.
    """
    values = parse_metadata(text, item_id)
    for name in _TEXTS:
        _text(values, name, f"item {item_id!r}")
    return values


def parse_metadata(text: str, item: str) -> dict[str, Any]:
    """What an item's metadata say, by name.

    Args:
        text: JSON.
        item: the item's id, for the error.

    Raises:
        InputError: it is no JSON object.
    """
    try:
        values = json.loads(text)
    except ValueError as error:
        raise InputError(f"item {item!r}: text {text[:40]!r}: expected a JSON object: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"item {item!r}: text {text[:40]!r}: expected a JSON object")
    return values


def read_ids(path: Path) -> list[str]:
    """Ids of items, one a line; empty lines say nothing, and an id that comes twice counts once.

    Raises:
        InputError: the file cannot be read, or holds no id.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: expected a UTF-8 file with one id a line: {error}") from error
    ids = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not ids:
        raise InputError(f"{path}: no id in it; expected one a line")
    return ids


def read_seen(path: Path, users: Sequence[str]) -> list[list[str]]:
    """Ids of the items that each user has seen, in the order of the file.

    Args:
        path: ``.jsonl``, ``.csv`` or ``.parquet`` with the columns ``user`` and ``item``, both text; one item a row.
        users: whose items are wanted; rows of others are passed over.

    Raises:
        InputError: the file cannot be read, or a row holds something else; names it.
    """
    seen: dict[str, list[str]] = {name: [] for name in users}
    for where, cells in read_rows(path, "list of what users have seen", {}):
        if set(cells) != set(_SEEN_COLUMNS):
            raise InputError(f"{where}: columns {', '.join(cells)}: expected {', '.join(_SEEN_COLUMNS)}")
        user, item = (_text(cells, name, where) for name in _SEEN_COLUMNS)
        if user is None or item is None:
            raise InputError(f"{where}: user {shown(user)}, item {shown(item)}: expected both")
        if user in seen:
            seen[user].append(item)
    return [seen[name] for name in users]


def _rows(path: Path) -> Iterator[Row]:
    return read_rows(path, "catalogue", _READINGS)


def _block(rows: list[Row], kind_names: tuple[str, ...], item_dim: int, seen: set[str]) -> Catalogue:
    """Checked items; their ids are added to ``seen``."""
    ids, kinds, texts = [], [], []
    features = np.zeros((len(rows), item_dim), np.float32)
    numbers = {name: number for number, name in enumerate(kind_names)}
    for row, (where, cells) in enumerate(rows):
        refuse_unknown_columns(cells, COLUMNS, where)
        item_id = _text(cells, "id", where)
        if item_id is None or item_id != item_id.strip() or len(item_id.splitlines()) != 1:
            raise InputError(f"{where}: id {shown(item_id)}: expected a text of one line, without spaces around it")
        if item_id in seen:
            raise InputError(f"{where}: id {item_id!r}: occurs twice; ids must be unique")
        kind = _text(cells, "kind", where)
        if kind not in numbers:
            raise InputError(f"{where}: kind {shown(kind)}: expected one of {', '.join(kind_names)}")
        known = {name: _text(cells, name, where) for name in _TEXTS} | {"tags": _tags(cells, where)}
        seen.add(item_id)
        ids.append(item_id)
        kinds.append(numbers[kind])
        texts.append(canonical_json({name: value for name, value in known.items() if value is not None}))
        features[row] = _features(cells.get("features"), item_dim, where)
    return Catalogue(ids, np.array(kinds, np.int32), kind_names, features, texts)


def _text(cells: dict[str, Any], name: str, where: str) -> str | None:
    """A cell that holds a text; None where it says nothing."""
    value = read_text(cells, name, where)
    if name == "origin" and value is not None and value not in ORIGINS:
        raise InputError(f"{where}: origin {shown(value)}: expected one of {', '.join(ORIGINS)}")
    return value


def _tags(cells: dict[str, Any], where: str) -> list[str] | None:
    value = cells.get("tags")
    if value is None:
        return None
    if not isinstance(value, list):
        raise InputError(f"{where}: tags {shown(value)}: expected a list of texts")
    tags = [_text({"tags": tag}, "tags", where) for tag in value]
    if None in tags:
        raise InputError(f"{where}: tags {shown(value)}: expected a list of texts")
    return [tag for tag in tags if tag is not None]


def _features(value: Any, item_dim: int, where: str) -> Float32[np.ndarray, "dim"]:
    if not item_dim:
        # Nothing reads them, but what is no list of numbers was meant as something else.
        is_list = isinstance(value, list) and set(map(type, value)) <= {int, float}
        if value is not None and not is_list:
            raise InputError(f"{where}: features are {shown(value)}: expected a list of numbers, or none")
        return np.zeros(0, np.float32)
    is_list = isinstance(value, list) and len(value) == item_dim and set(map(type, value)) <= {int, float}
    if not is_list:
        found = f"a list of {len(value)}" if isinstance(value, list) and len(value) != item_dim else shown(value)
        raise InputError(f"{where}: features are {found}: expected a list of {item_dim} numbers")
    try:
        with np.errstate(over="ignore"):
            numbers = np.array(value, np.float64).astype(np.float32)
    except OverflowError:
        numbers = np.full(item_dim, np.inf, np.float32)
    bad = np.flatnonzero(~np.isfinite(numbers))
    if bad.size:
        raise InputError(f"{where}: features[{bad[0]}] is {shown(value[bad[0]])}: expected finite float32 numbers")
    return numbers
