"""Assembles batches of records in NumPy: padding, length buckets, masks, labels, ranking targets.

Nothing here touches a device, and every object can be pickled: it runs in reader threads or processes.
"""

from typing import Any

import numpy as np
from jaxtyping import Int64, Integer

from mmei_jax.config import Config
from mmei_jax.padding import pad_rows
from mmei_jax.ranking_targets import RankingReader, RankingStatistics
from mmei_jax.records import Split
from mmei_jax.types import MODALITIES, Batch, InputError, Label, TokenSequence


class BatchReader:
    """Reads records of one split as batches, as the configuration's tasks want them."""

    def __init__(self, split: Split, config: Config, statistics: RankingStatistics | None) -> None:
        """Prepares, without reading features.

        Args:
            split: where the records are.
            config: modalities, length buckets and tasks.
            statistics: of the training split; None when ``config.loss.ranking`` is "none".

        Raises:
            InputError: the data set lacks a modality or the catalogue.
        """
        self._split = split
        self._buckets = {
            name: getattr(config.data.max_tokens, name) for name in MODALITIES if name in config.data.modalities
        }
        self._num_buckets = len(config.data.max_tokens.vision)
        self._emotion_label = config.loss.emotion_label
        self._has_intent = config.loss.intent != "none"
        self._ranking: RankingReader | None = None
        if config.loss.ranking != "none":
            catalogue = split.dataset.catalogue()
            if catalogue is None or statistics is None:
                raise InputError(f"{split.dataset.path}: no catalogue; config.loss.ranking expects one, or 'none'")
            with_slates = config.loss.ranking == "listnet"
            self._ranking = RankingReader(split, catalogue, statistics, with_slates=with_slates)

    def bucket(self, indices: Integer[np.ndarray, "batch"]) -> int:
        """The first length bucket into which all records fit in all modalities; the last where none is large enough.

        Args:
            indices: records of a *global* batch, so that every process finds the same bucket; -1 is filler.
        """
        if self._num_buckets == 1:
            return 0
        records = indices[indices >= 0]
        bucket = 0
        for name, sizes in self._buckets.items():
            longest = int(self._split.lengths(name)[records].max(initial=0))
            bucket = max(bucket, int(np.searchsorted(sizes, longest)))
        return min(bucket, self._num_buckets - 1)

    def read(self, indices: Integer[np.ndarray, "batch"], bucket: int) -> Batch:
        """Reads records.

        Args:
            indices: ``[batch]`` positions in the split; -1, at the end only, makes filler.
            bucket: which of the configured numbers of tokens to pad to, or cut at.

        Returns:
            A batch of NumPy arrays; features are of the stored type, which the model converts on its device. Padding,
            filler and missing labels hold zeros.

        Raises:
            InputError: a record does not fit the data set's description; names it.
        """
        size = len(indices)
        is_record: Any = indices >= 0
        record_index: Any = indices.astype(np.int32)
        records = indices[indices >= 0].astype(np.int64)
        sequences = {name: self._sequence(name, records, sizes[bucket], size) for name, sizes in self._buckets.items()}
        return Batch(
            vision=sequences.get("vision"),
            audio=sequences.get("audio"),
            text=sequences.get("text"),
            is_record=is_record,
            record_index=record_index,
            emotion=self._label(self._emotion_label, records, size),
            intent=self._label("intent", records, size) if self._has_intent else None,
            ranking=None if self._ranking is None else self._ranking.read(records, size),
        )

    def _sequence(self, name: str, records: Int64[np.ndarray, "records"], num_tokens: int, size: int) -> TokenSequence:
        features, lengths = self._split.gather_tokens(name, records, num_tokens)
        segment_ids = (np.arange(num_tokens, dtype=np.int32) < lengths[:, None]).astype(np.int32)
        return TokenSequence(features=pad_rows(features, size), segment_ids=pad_rows(segment_ids, size))

    def _label(self, name: str, records: Int64[np.ndarray, "records"], size: int) -> Label:
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
        return Label(value=pad_rows(value, size), is_labelled=pad_rows(is_labelled, size))
