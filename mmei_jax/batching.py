"""Assembles batches of records in NumPy: rows of tokens, masks, labels, ranking targets.

Nothing here touches a device, and every object can be pickled: it runs in reader threads or processes.
"""

from typing import Any

import numpy as np
from jaxtyping import Bool, Int64, Integer

from mmei_jax.config import Config
from mmei_jax.packing import Layout
from mmei_jax.padding import spread
from mmei_jax.ranking_targets import RankingReader, RankingStatistics
from mmei_jax.record_gathering import aligned_empty
from mmei_jax.records import Split
from mmei_jax.types import MODALITIES, Batch, InputError, Label, TokenSequence
from mmei_jax.user_context import UserReader


class BatchReader:
    """Reads records of one split as batches, as the configuration's tasks want them."""

    def __init__(self, split: Split, config: Config, statistics: RankingStatistics | None) -> None:
        """Prepares, without reading features.

        Args:
            split: where the records are.
            config: modalities, most tokens of a record, and tasks.
            statistics: of the training split; None when ``config.loss.ranking`` is "none".

        Raises:
            InputError: the data set lacks a modality, the catalogue, or what is to be read of the users.
        """
        self._split = split
        self._max_tokens = {
            name: getattr(config.data.max_tokens, name)[-1] for name in MODALITIES if name in config.data.modalities
        }
        self._emotion_label = config.loss.emotion_label if config.loss.emotion != "none" else None
        self._has_intent = config.loss.intent != "none"
        self._ranking: RankingReader | None = None
        if config.loss.ranking != "none":
            catalogue = split.dataset.catalogue()
            if catalogue is None or statistics is None:
                raise InputError(f"{split.dataset.path}: no catalogue; config.loss.ranking expects one, or 'none'")
            with_slates = config.loss.ranking == "listnet"
            self._ranking = RankingReader(split, catalogue, statistics, with_slates=with_slates)
        self._users = UserReader(split, config)

    def read(self, indices: Integer[np.ndarray, "batch"], layout: Layout) -> Batch:
        """Reads records to their places.

        Args:
            indices: ``[rows * layout.records_per_row]`` positions in the split of the records at these places; -1 makes
                filler. Whole rows, as many as are wanted.
            layout: records per row and tokens per row; its number of rows is not looked at.

        Returns:
            A batch of NumPy arrays; features are of the stored type, which the model converts on its device. Padding,
            filler and missing labels hold zeros.

        Raises:
            InputError: a record does not fit the data set's description; names it.
        """
        is_record: Any = indices >= 0
        record_index: Any = indices.astype(np.int32)
        records = indices[is_record].astype(np.int64)
        sequences = {name: self._sequence(name, records, is_record, layout) for name in self._max_tokens}
        return Batch(
            vision=sequences.get("vision"),
            audio=sequences.get("audio"),
            text=sequences.get("text"),
            is_record=is_record,
            record_index=record_index,
            emotion=None if self._emotion_label is None else self._label(self._emotion_label, records, is_record),
            intent=self._label("intent", records, is_record) if self._has_intent else None,
            ranking=None if self._ranking is None else self._ranking.read(indices),
            user=self._users.read(records, is_record),
        )

    def _sequence(
        self, name: str, records: Int64[np.ndarray, "records"], is_record: Bool[np.ndarray, "batch"], layout: Layout
    ) -> TokenSequence:
        """The records' tokens: in each row one record after the other, the padding at its end."""
        num_tokens, spec = layout.num_tokens[name], self._split.dataset.spec.modalities[name]
        lengths = np.minimum(self._split.lengths(name)[records], min(num_tokens, self._max_tokens[name]))
        ends, segment_ids = place_tokens(spread(lengths, is_record), layout.records_per_row, num_tokens)
        if layout.records_per_row == 1 and is_record.all():
            features: Any = self._split.gather_tokens(name, records, num_tokens)[0]
        else:
            features = aligned_empty((len(ends), num_tokens, spec.dim), spec.dtype)
            features[:] = 0
            rows = np.flatnonzero(is_record) // layout.records_per_row
            stops = ends.reshape(-1)[is_record]
            places = zip(rows.tolist(), (stops - lengths).tolist(), stops.tolist(), strict=True)
            self._split.copy_tokens(name, records, [features[row, start:stop] for row, start, stop in places])
        return TokenSequence(features=features, segment_ids=segment_ids)

    def _label(self, name: str, records: Int64[np.ndarray, "records"], is_record: Bool[np.ndarray, "batch"]) -> Label:
        value, is_labelled = self._split.gather_label(name, records)
        class_names = self._split.dataset.spec.labels[name].class_names
        if value.dtype == np.int32:
            # Shards of other writers reach this without --verify; a foreign class id would be counted as another class.
            is_foreign = is_labelled & ((value < 0) | (value >= len(class_names)))
            if is_foreign.any():
                place = int(np.flatnonzero(is_foreign)[0])
                raise InputError(
                    f"{self._split.dataset.path}: record {self._split.ids(records[[place]])[0]!r}: label {name!r} is "
                    f"{value[place]}: expected 0 to {len(class_names) - 1}"
                )
        return Label(value=spread(value, is_record), is_labelled=spread(is_labelled, is_record))


def place_tokens(
    lengths: Integer[np.ndarray, "places"], records_per_row: int, num_tokens: int
) -> tuple[Integer[np.ndarray, "rows segments"], Any]:
    """Where each record's tokens lie: in each row one record after the other, the padding at its end.

    Args:
        lengths: ``[rows * records_per_row]`` tokens of the record at each place, 0 for filler.
        records_per_row: places in a row.
        num_tokens: token places of a row.

    Returns:
        ``[rows, records_per_row]`` the token place behind each record's last, and ``[rows, num_tokens]`` int32 segment
        ids.
    """
    ends = lengths.reshape(-1, records_per_row).cumsum(axis=1)
    # A token belongs to the first record of its row that ends behind it; beyond the last one there is padding.
    position = np.arange(num_tokens)[None, :, None]
    segment_ids: Any = 1 + np.count_nonzero(ends[:, None, :] <= position, axis=2).astype(np.int32)
    segment_ids[segment_ids > records_per_row] = 0
    return ends, segment_ids
