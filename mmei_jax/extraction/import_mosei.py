r"""Turns MMSA's feature files of CMU-MOSEI (``aligned_50.pkl``, ``unaligned_50.pkl``) into shards, with their folds.

Command, for instance::

    python -m mmei_jax.extraction.import_mosei --input=unaligned_50.pkl --output=runs/data/mosei --non_finite=zero
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int64

from mmei_jax.command import CommandParser, report_errors
from mmei_jax.extraction.feature_pickles import read_feature_pickle
from mmei_jax.extraction.import_features import NonFiniteCounts
from mmei_jax.records import (
    DatasetSpec,
    DatasetWriter,
    LabelSpec,
    MaskedColumn,
    ModalitySpec,
    Producer,
    Ragged,
    RecordColumns,
)
from mmei_jax.types import MODALITIES, InputError

SPLITS = ("train", "valid", "test")
# Order of CMU-MultimodalSDK's labels behind the sentiment.
EMOTIONS = ("happiness", "sadness", "anger", "surprise", "disgust", "fear")
SENTIMENT_LIMIT = 3.0
_RECORDS_PER_CHUNK = 256
_SEPARATOR = "$_$"
_FORMAT = """\
The file is a pickle, {"train", "valid", "test": {key: array or list}}, of which nothing is run: arrays, texts and
numbers are read, anything else is refused by its name. Keys: id and regression_labels; any of text, audio and vision,
[records, tokens, dim]; text_bert, audio_lengths, vision_lengths, raw_text, annotations and the key of emotions where
they are there. Other keys are left aside.
Valid tokens: by <modality>_lengths; of modalities with as many tokens as text_bert, by its attention mask; else up to
the last token that is not all zeros. A modality without any is absent.
"""


@dataclass(frozen=True)
class MoseiOptions:
    """What is imported, and how; as the command's flags of the same names."""

    input: Path
    output: Path
    name: str = "cmu_mosei"
    source: str = "CMU-MOSEI (Zadeh et al. 2018), features of thuiar/MMSA"
    licence: str = "terms of CMU-MOSEI and of thuiar/MMSA"
    emotions_key: str = "emotion_labels"
    dtype: Literal["float16", "float32"] = "float32"
    non_finite: Literal["refuse", "zero"] = "refuse"
    records_per_shard: int = 4096
    overwrite: bool = False


class _Fold:
    """One split of the file, checked.

    Attributes:
        where: file and split, for messages.
        ids: ``<video>$_$<clip>``.
        lengths: by modality, ``[records]`` valid tokens.
        lengths_from: by modality, what says so.
    """

    def __init__(self, path: Path, split: str, values: Mapping[str, Any]) -> None:
        self.where = f"{path}: split {split!r}"
        self._values = values
        self.ids = self.texts("id")
        self.lengths: dict[str, np.ndarray] = {}
        self.lengths_from: dict[str, str] = {}
        for modality in MODALITIES:
            if modality in values:
                self.lengths[modality], self.lengths_from[modality] = self._read_lengths(modality)
        if not self.lengths:
            raise InputError(f"{self.where}: no features: expected some of {', '.join(MODALITIES)}")

    def has(self, key: str) -> bool:
        return key in self._values

    def dims(self) -> dict[str, int]:
        """Features per token, by modality."""
        return {modality: self.features(modality).shape[2] for modality in self.lengths}

    def texts(self, key: str) -> list[str]:
        """One text per record."""
        array = self._column(key)
        if array.ndim != 1 or any(not isinstance(item, str) for item in array.tolist()):
            raise InputError(f"{self.where}: key {key!r}: expected one text per record")
        return [str(item) for item in array.tolist()]

    def numbers(self, key: str, shape: tuple[int, ...] = ()) -> np.ndarray:
        """Numbers of the shape per record, float64."""
        array = self._column(key)
        if array.dtype.kind == "O" or array.dtype.kind not in "fiub" or array.shape[1:] != shape:
            found = f"{array.dtype}{list(array.shape)}"
            raise InputError(f"{self.where}: key {key!r} is {found}: expected numbers [records{', 6' * len(shape)}]")
        return array.astype(np.float64)

    def features(self, modality: str) -> np.ndarray:
        """``[records, tokens, dim]`` numbers as they are in the file."""
        array = self._column(modality)
        if array.ndim != 3 or array.shape[2] < 1 or array.dtype.kind not in "fiu":
            found = f"{array.dtype}{list(array.shape)}"
            raise InputError(f"{self.where}: key {modality!r} is {found}: expected numbers [records, tokens, dim]")
        return array

    def take(self, modality: str, rows: np.ndarray) -> Ragged:
        """Valid tokens of some records, float32."""
        features = self.features(modality)[rows]
        lengths = self.lengths[modality][rows]
        is_token = np.arange(features.shape[1]) < lengths[:, None]
        return Ragged(features[is_token].astype(np.float32), np.where(lengths == 0, -1, lengths))

    def _column(self, key: str) -> np.ndarray:
        if key not in self._values:
            raise InputError(f"{self.where}: no key {key!r}: it has {', '.join(map(str, self._values))}")
        try:
            array = np.asarray(self._values[key])
        except ValueError as error:
            raise InputError(f"{self.where}: key {key!r}: {error}") from error
        num_records = len(self.ids) if hasattr(self, "ids") else len(array) if array.ndim else 0
        if array.ndim == 0 or len(array) != num_records or not num_records:
            found = len(array) if array.ndim else "no"
            raise InputError(f"{self.where}: key {key!r} has {found} records: expected {num_records or 'some'}")
        return array

    def _read_lengths(self, modality: str) -> tuple[Int64[np.ndarray, "records"], str]:
        features = self.features(modality)
        num_tokens = features.shape[1]
        key = f"{modality}_lengths"
        if self.has(key):
            lengths = self.numbers(key)
            bad = np.flatnonzero((lengths < 0) | (lengths > num_tokens) | (lengths % 1 != 0))
            if bad.size:
                found = f"{self.where}: record {self.ids[bad[0]]!r}: {key} = {lengths[bad[0]]:g}"
                raise InputError(f"{found}: expected a number of tokens in [0, {num_tokens}]")
            return lengths.astype(np.int64), key
        if self.has("text_bert"):
            mask = self._column("text_bert")
            if mask.ndim != 3 or mask.shape[1] != 3 or mask.dtype.kind not in "fiu":
                raise InputError(f"{self.where}: key 'text_bert' is {list(mask.shape)}: expected [records, 3, tokens]")
            is_token = mask[:, 1] > 0
            if (is_token[:, 1:] & ~is_token[:, :-1]).any():
                raise InputError(f"{self.where}: key 'text_bert': a mask with padding before tokens is not accepted")
            if mask.shape[2] == num_tokens:
                return is_token.sum(axis=1, dtype=np.int64), "attention mask of text_bert"
        used = [np.flatnonzero(record.any(axis=1)) for record in features]
        ends = [int(tokens[-1]) + 1 if tokens.size else 0 for tokens in used]
        return np.array(ends, np.int64), "last token that is not all zeros"


def import_mosei(options: MoseiOptions) -> dict[str, int]:
    """Writes the data set ``options.output``.

    Every record has its ``sentiment``, a number in [-3, 3]; where the file has them, ``emotions``: the six of
    :data:`EMOTIONS`, each present where its intensity is above 0. Video and clip become user, dialogue and turn, the
    transcript an extra column.

    Returns:
        Records per split.

    Raises:
        InputError: the file is missing, not of the form expected, or holds values that are not finite and are not to
            be zeroed; names split, key and record.
        OSError: the disk is full, or the output cannot be written.
    """
    folds = _read_folds(options.input)
    first = next(iter(folds.values()))
    has_emotions, has_texts = first.has(options.emotions_key), first.has("raw_text")
    labels = {"sentiment": LabelSpec("real")}
    if has_emotions:
        labels["emotions"] = LabelSpec("multi_label", EMOTIONS)
    spec = DatasetSpec(
        name=options.name,
        description="CMU-MOSEI: opinion videos by segment, standard folds.",
        source=options.source,
        licence=options.licence,
        modalities={
            modality: ModalitySpec(
                dim, options.dtype, Producer(padding_policy=f"cut off by {first.lengths_from[modality]}")
            )
            for modality, dim in first.dims().items()
        },
        labels=labels,
        extras={"transcript": "string"} if has_texts else {},
    )
    non_finite = NonFiniteCounts()
    with DatasetWriter(
        options.output, spec, records_per_shard=options.records_per_shard, overwrite=options.overwrite
    ) as writer:
        for split, fold in folds.items():
            columns = _read_columns(fold, options.emotions_key if has_emotions else None, has_texts)
            for start in range(0, len(fold.ids), _RECORDS_PER_CHUNK):
                chunk = _take(columns, fold, np.arange(start, min(start + _RECORDS_PER_CHUNK, len(fold.ids))))
                for modality, ragged in chunk.features.items():
                    non_finite.zero(modality, ragged, chunk.ids)
                # Refused data are read to the end, to count them all, but no longer written.
                if not non_finite.values or options.non_finite == "zero":
                    writer.write_columns(split, chunk)
        _note(writer, folds, non_finite, options)
    return {split: len(fold.ids) for split, fold in folds.items()}


def _read_folds(path: Path) -> dict[str, _Fold]:
    """The splits, all with the same features."""
    values = read_feature_pickle(path)
    found = list(values) if isinstance(values, dict) else type(values).__name__
    if not isinstance(values, dict) or not all(isinstance(values.get(split), dict) for split in SPLITS):
        raise InputError(f"{path}: holds {found}: expected a dict of dicts, {', '.join(SPLITS)}")
    folds = {split: _Fold(path, split, values[split]) for split in SPLITS}
    shapes = {
        split: {modality: fold.features(modality).shape[2] for modality in fold.lengths}
        for split, fold in folds.items()
    }
    for split, shape in shapes.items():
        if shape != shapes["train"]:
            raise InputError(f"{path}: features per token are {shape} in {split!r}, {shapes['train']} in 'train'")
    return folds


def _read_columns(fold: _Fold, emotions_key: str | None, has_texts: bool) -> RecordColumns:
    """Ids, labels and the like of all records of a split; no features."""
    sentiment = fold.numbers("regression_labels")
    bad = np.flatnonzero(~(np.abs(sentiment) <= SENTIMENT_LIMIT))
    if bad.size:
        found = f"{fold.where}: record {fold.ids[bad[0]]!r}: regression_labels = {sentiment[bad[0]]:g}"
        raise InputError(f"{found}: expected a sentiment in [-3, 3]")
    labels = {"sentiment": MaskedColumn(sentiment.astype(np.float32))}
    if emotions_key is not None:
        intensity = fold.numbers(emotions_key, (len(EMOTIONS),))
        is_labelled = ~np.isnan(intensity).any(axis=1)
        labels["emotions"] = MaskedColumn((intensity > 0).astype(np.float32), is_labelled)
    parts = [record_id.rpartition(_SEPARATOR) for record_id in fold.ids]
    videos = [video or None for video, _, _ in parts]
    numbers = [clip if video and clip.isdecimal() else "" for video, _, clip in parts]
    is_numbered = np.array([number != "" for number in numbers])
    turns = MaskedColumn(np.array([int(number or 0) for number in numbers], np.int64), is_numbered)
    extras = {"transcript": MaskedColumn(list[str | None](fold.texts("raw_text")))} if has_texts else {}
    return RecordColumns(fold.ids, videos, videos, turns, labels=labels, extras=extras)


def _take(columns: RecordColumns, fold: _Fold, rows: np.ndarray) -> RecordColumns:
    def take(column: MaskedColumn) -> MaskedColumn:
        is_present = None if column.is_present is None else column.is_present[rows]
        if isinstance(column.values, np.ndarray):
            return MaskedColumn(column.values[rows], is_present)
        return MaskedColumn([column.values[row] for row in rows.tolist()], is_present)

    videos = [None if columns.user_ids is None else columns.user_ids[row] for row in rows.tolist()]
    return RecordColumns(
        ids=[columns.ids[row] for row in rows.tolist()],
        user_ids=videos,
        dialogue_ids=videos,
        turns=None if columns.turns is None else take(columns.turns),
        features={modality: fold.take(modality, rows) for modality in fold.lengths},
        labels={name: take(column) for name, column in columns.labels.items()},
        extras={name: take(column) for name, column in columns.extras.items()},
    )


def _note(
    writer: DatasetWriter, folds: Mapping[str, _Fold], non_finite: NonFiniteCounts, options: MoseiOptions
) -> None:
    """Counts in the manifest: what was zeroed, where lengths come from, annotations that contradict the sentiment."""
    if non_finite.values and options.non_finite == "refuse":
        raise InputError(
            f"{options.input}: values that are not finite: {non_finite.describe()}; --non_finite=zero sets them to 0"
        )
    if options.non_finite == "zero":
        zeroed = {
            modality: {
                "num_values": non_finite.values.get(modality, 0),
                "num_records": len(non_finite.ids.get(modality, [])),
            }
            for modality in writer.spec.modalities
        }
        writer.set_counts("non_finite_values_set_to_zero", zeroed)
    writer.set_counts("lengths_from", {split: fold.lengths_from for split, fold in folds.items()})
    differing = {split: _count_differing(fold) for split, fold in folds.items() if fold.has("annotations")}
    if differing:
        writer.set_counts("annotations_that_differ_from_the_sign_of_the_sentiment", differing)


def _count_differing(fold: _Fold) -> int:
    names = np.array(["negative", "neutral", "positive"])
    expected = names[np.sign(fold.numbers("regression_labels")).astype(int) + 1]
    return int((np.array([text.lower() for text in fold.texts("annotations")]) != expected).sum())


def main(arguments: Sequence[str] | None = None) -> int:
    """Imports a feature file; gives the exit status: 0, or 2 after one line on what is wrong."""
    parser = CommandParser(
        prog="python -m mmei_jax.extraction.import_mosei",
        description="MMSA's feature files of CMU-MOSEI (or CMU-MOSI) to feature shards.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_FORMAT,
    )
    default = MoseiOptions(Path(), Path())
    add = parser.add_argument
    add("--input", required=True, type=Path, help="aligned_50.pkl or unaligned_50.pkl")
    add("--output", required=True, type=Path, help="folder to make")
    add("--overwrite", action="store_true", help="replace a data set that is already there")
    add("--name", default=default.name, help="name of the data set (default: %(default)s)")
    add("--source", default=default.source, help="where the features come from (default: %(default)s)")
    add("--licence", default=default.licence, help="(default: %(default)s)")
    add("--emotions_key", default=default.emotions_key, help="[records, 6] intensities (default: %(default)s)")
    add("--dtype", choices=("float16", "float32"), default="float32", help="stored features (default: %(default)s)")
    add("--non_finite", choices=("refuse", "zero"), default="refuse", help="NaN and infinity (default: %(default)s)")
    add("--records_per_shard", type=int, default=4096, help="(default: %(default)s)")
    flags = parser.parse_args(arguments)

    def run() -> int:
        num_records = import_mosei(MoseiOptions(**vars(flags)))
        counts = ", ".join(f"{split} {count:,}" for split, count in num_records.items())
        print(f"{flags.output}: {counts} records")
        return 0

    return report_errors(run)


if __name__ == "__main__":
    sys.exit(main())
