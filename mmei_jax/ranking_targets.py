"""What the recommender learns from a record's slate: its positive, how often that is drawn, and what is relevant.

The *positive* of a record is the shown item with the best observed feedback: the highest satisfaction, among equals the
longest dwell time, among equals the first position. NumPy only: this runs in reader threads.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int32, Int64, Integer

from mmei_jax.padding import spread
from mmei_jax.records import Catalogue, Split
from mmei_jax.types import InputError, Items, RankingTargets, Slate

# Records whose slates are in memory at once while positives are counted.
_RECORDS_PER_CHUNK = 65_536


@dataclass(frozen=True)
class RankingStatistics:
    """How often each item is the positive of a training record: the sampling probability behind the logQ correction.

    Attributes:
        counts: ``[items]`` int64, training records whose positive is this item.
        num_positives: training records that have a positive.
    """

    counts: Int64[np.ndarray, "items"]
    num_positives: int

    @classmethod
    def from_split(cls, split: Split, num_items: int) -> "RankingStatistics":
        """Counts the positives of a (training) split, chunk by chunk.

        Raises:
            InputError: no record has a slate, or a slate shows an item that the catalogue of ``num_items`` lacks.
        """
        counts = positive_counts(split, num_items)
        if not counts.any():
            raise InputError(
                f"{split.dataset.path}: no record of split {'+'.join(split.names)} has a slate; "
                "config.loss.ranking expects some, or 'none'"
            )
        return cls(counts=counts, num_positives=int(counts.sum()))

    def log_probability(self, items: Integer[np.ndarray, "batch"]) -> Float[np.ndarray, "batch"]:
        """``[batch]`` float32 log share of the training positives that are each item.

        An item that is never a positive there (it can be one in validation) counts as drawn once, so that the logarithm
        is finite.
        """
        return np.log(np.maximum(self.counts[items], 1) / self.num_positives).astype(np.float32)


def positive_counts(split: Split, num_items: int) -> Int64[np.ndarray, "items"]:
    """``[num_items]`` int64: records of ``split`` whose positive is each item.

    Raises:
        InputError: a slate shows an item that the catalogue lacks; names the record.
    """
    counts = np.zeros(num_items, np.int64)
    width = _longest(split, "slate_item_index")
    for start in range(0, split.num_records, _RECORDS_PER_CHUNK):
        indices = np.arange(start, min(start + _RECORDS_PER_CHUNK, split.num_records))
        items, satisfaction, dwell_seconds = _gather_slates(split, indices, width, num_items)
        position = best_position(satisfaction, dwell_seconds, items >= 0)
        positives = np.take_along_axis(items, position[:, None], axis=1)[:, 0]
        counts += np.bincount(positives[positives >= 0], minlength=num_items)
    return counts


def best_position(
    satisfaction: Float[np.ndarray, "batch slate"],
    dwell_seconds: Float[np.ndarray, "batch slate"],
    is_shown: Bool[np.ndarray, "batch slate"],
) -> Int64[np.ndarray, "batch"]:
    """The position of the best received item in each slate; 0 where nothing was shown.

    Args:
        satisfaction: observed satisfaction; the highest wins.
        dwell_seconds: decides between equal satisfactions; then the first position does.
        is_shown: false for filler, whose feedback is arbitrary.
    """
    satisfaction = np.where(is_shown, satisfaction, -np.inf)
    is_best = is_shown & (satisfaction == satisfaction.max(axis=1, keepdims=True))
    return np.where(is_best, dwell_seconds, -np.inf).argmax(axis=1)


class RankingReader:
    """Reads the ranking targets of one split's records."""

    def __init__(self, split: Split, catalogue: Catalogue, statistics: RankingStatistics, *, with_slates: bool) -> None:
        """Looks up the sizes that all batches share.

        Args:
            split: where the records are.
            catalogue: the items.
            statistics: of the *training* split, whatever ``split`` is.
            with_slates: whether the targets carry whole slates (listwise loss).
        """
        self._split = split
        self._features = catalogue.features
        self._kind = catalogue.kind
        self._word_state, self._word_ids = catalogue.word_state, catalogue.word_ids
        self._statistics = statistics
        self._with_slates = with_slates
        self._slate_width = _longest(split, "slate_item_index")
        self._relevant_width = relevant_width(split)

    def read(self, indices: Integer[np.ndarray, "batch"]) -> RankingTargets:
        """Targets of a batch, on the host; relevant items and slates are as wide as the split's longest.

        Args:
            indices: positions of records in the split, -1 for filler.

        Raises:
            InputError: a slate or a list of relevant items names an item that the catalogue lacks; names the record.
        """
        is_record = indices >= 0
        records = indices[is_record]
        gathered = _gather_slates(self._split, records, self._slate_width, len(self._kind))
        items, satisfaction, dwell_seconds = (
            spread(column, is_record, fill) for column, fill in zip(gathered, (-1, 0.0, 0.0), strict=True)
        )
        is_shown = items >= 0
        position = best_position(satisfaction, dwell_seconds, is_shown)
        positive: Any = np.take_along_axis(items, position[:, None], axis=1)[:, 0]
        log_probability: Any = self._statistics.log_probability(np.maximum(positive, 0))
        slate = None
        if self._with_slates:
            feedback: Any = np.where(is_shown, satisfaction, np.float32(0.0))
            slate = Slate(items=self._items(items), item_index=items, feedback=feedback, is_shown=is_shown)
        log_probability = np.where(positive >= 0, log_probability, np.float32(0.0))
        return RankingTargets(
            positive=self._items(positive),
            positive_index=positive,
            has_positive=positive >= 0,
            log_sampling_probability=log_probability,
            relevant_index=spread(
                gather_relevant(self._split, records, self._relevant_width, len(self._kind)), is_record, -1
            ),
            slate=slate,
        )

    def _items(self, index: Int32[np.ndarray, "..."]) -> Items:
        """Catalogue rows; zeros, kind 0 and no words where the index is -1."""
        is_item = index >= 0
        rows = np.maximum(index, 0)

        def take(column: np.ndarray | None, filler: Any) -> Any:
            return None if column is None else np.where(is_item[..., None], column[rows], filler)

        kind: Any = np.where(is_item, self._kind[rows], np.int32(0))
        return Items(
            features=take(self._features, np.float32(0.0)),
            kind=kind,
            word_state=take(self._word_state, np.float32(0.0)),
            word_ids=take(self._word_ids, np.int32(-1)),
        )


def relevant_width(split: Split) -> int:
    """Relevant items of the record that has the most, at least 1."""
    return _longest(split, "relevant_items") if split.dataset.spec.has_relevant_items else 1


def gather_relevant(
    split: Split, indices: Integer[np.ndarray, "batch"], width: int, num_items: int
) -> Int32[np.ndarray, "batch relevant"]:
    """The relevant items of records: ``[batch, width]`` int32 catalogue rows, -1 as filler.

    Args:
        split: where the records are.
        indices: their positions.
        width: of :func:`relevant_width`.
        num_items: of the catalogue.

    Raises:
        InputError: a record names an item that the catalogue lacks; names the record.
    """
    if not split.dataset.spec.has_relevant_items:
        # Filler, so that no array is empty.
        return np.full((len(indices), width), -1, np.int32)
    found = split.gather_list("relevant_items", indices, width, -1)
    _check_items(split, "relevant_items", indices, found, num_items)
    return found


def _longest(split: Split, column: str) -> int:
    """Entries of the longest list, at least 1."""
    return max(1, int(split.lengths(column).max(initial=0)))


def _gather_slates(
    split: Split, indices: Integer[np.ndarray, "batch"], width: int, num_items: int
) -> tuple[Int32[np.ndarray, "batch slate"], Float[np.ndarray, "batch slate"], Float[np.ndarray, "batch slate"]]:
    """Item indices (-1 as filler), satisfaction and dwell seconds (0 as filler)."""
    items = split.gather_list("slate_item_index", indices, width, -1)
    _check_items(split, "slate_item_index", indices, items, num_items)
    satisfaction = split.gather_list("slate_satisfaction", indices, width, 0.0)
    return items, satisfaction, split.gather_list("slate_dwell_seconds", indices, width, 0.0)


def _check_items(
    split: Split,
    column: str,
    indices: Integer[np.ndarray, "batch"],
    items: Int32[np.ndarray, "batch entries"],
    num_items: int,
) -> None:
    bad = np.argwhere((items >= num_items) | (items < -1))
    if bad.size:
        row, entry = bad[0]
        name = split.ids(indices[row : row + 1])[0]
        raise InputError(
            f"{split.dataset.path}: record {name!r}: {column} holds {items[row, entry]}: "
            f"the catalogue has {num_items} items"
        )
