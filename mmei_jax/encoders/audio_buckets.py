"""A corpus of audio in batches of few shapes: each waveform in the narrowest bucket that holds it.

All batches of a bucket have one shape, so that as many programs are compiled as there are buckets. Which waveform goes
where follows from the lengths alone. Nothing is cut: what is too long is refused, by its index in the corpus.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int32, Int64, Integer

from mmei_jax.types import InputError

# Lengths that are tried as widths of buckets.
_NUM_QUANTILES = 256


@dataclass(frozen=True)
class AudioBatch:
    """Which waveforms make up a batch; :func:`pad_waveforms` puts them into rows.

    Attributes:
        record_index: ``[batch]`` int64, the waveform of each row: its index in the corpus; behind them -1 for filler.
        num_samples: ``[batch]`` int32, as ``Wav2Vec2`` takes it: length of each waveform, 0 for filler.
        width: samples of a row.
    """

    record_index: Int64[np.ndarray, "batch"]
    num_samples: Int32[np.ndarray, "batch"]
    width: int

    @property
    def records(self) -> list[int]:
        """The waveforms, without filler."""
        return self.record_index[self.record_index >= 0].tolist()


@dataclass(frozen=True)
class BucketedAudio:
    """A corpus of waveforms in batches of few shapes.

    Attributes:
        batches: every waveform is in one of them, once; widest first, so that a lack of memory shows at once. Those of
            one width have the same number of rows.
        num_samples: of all waveforms.
        num_places: for samples, in all batches, filler included.
    """

    batches: tuple[AudioBatch, ...]
    num_samples: int
    num_places: int

    @property
    def useful_share(self) -> float:
        """Share of the places that hold a sample, in [0, 1]; 1 without batches."""
        return self.num_samples / self.num_places if self.batches else 1.0


def bucket_by_length(
    num_samples: Sequence[int] | Integer[np.ndarray, "records"],
    widths: Sequence[int] | Integer[np.ndarray, "buckets"],
    *,
    rows_per_batch: int | None = None,
    samples_per_batch: int | None = None,
    shortest: int = 1,
) -> BucketedAudio:
    """Puts each waveform into the narrowest bucket that holds it, and those of a bucket into batches of one shape.

    Args:
        num_samples: ``[records]`` length of each waveform.
        widths: of the buckets, in samples, in any order; :func:`choose_widths` finds good ones.
        rows_per_batch: rows of every batch. Either this or ``samples_per_batch``.
        samples_per_batch: rows times samples of a batch, at most: narrow buckets get more rows, but only as many as it
            takes to spread their waveforms evenly over as few batches.
        shortest: samples that the encoder needs (``Wav2Vec2Config.receptive_field``).

    Returns:
        Batches by falling width; waveforms keep the order of the corpus within a bucket.

    Raises:
        InputError: a waveform is shorter than ``shortest`` or longer than the widest bucket; there is no bucket, or one
            of no samples; both or neither of the batch's sizes are given, or a batch has no row.

    Example:
        >>> audio = bucket_by_length([400, 1200, 500, 450], widths=[500, 1500], rows_per_batch=2)
        >>> [(batch.width, batch.record_index.tolist()) for batch in audio.batches]
        [(1500, [1, -1]), (500, [0, 2]), (500, [3, -1])]
        >>> audio.useful_share
        0.51
    """
    lengths, widths = np.asarray(num_samples, np.int64), np.unique(np.asarray(widths, np.int64))
    if not len(widths) or widths[0] < 1:
        raise InputError(f"widths = {widths.tolist()}: expected at least one, of at least 1 sample")
    if (rows_per_batch is None) == (samples_per_batch is None):
        raise InputError("rows_per_batch, samples_per_batch: expected exactly one of them")
    widest = int(widths[-1])
    if rows_per_batch is not None and rows_per_batch < 1:
        raise InputError(f"rows_per_batch = {rows_per_batch}: expected at least 1")
    if samples_per_batch is not None and samples_per_batch < widest:
        raise InputError(f"samples_per_batch = {samples_per_batch}: expected at least {widest}, the widest bucket")
    is_wrong = (lengths < shortest) | (lengths > widest)
    if is_wrong.any():
        index = int(is_wrong.argmax())
        raise InputError(
            f"waveform {index} has {lengths[index]} samples: expected {shortest} to {widest}; split it or leave it out"
        )
    bucket_of = np.searchsorted(widths, lengths)
    batches = []
    for bucket in np.unique(bucket_of)[::-1]:
        width = int(widths[bucket])
        (records,) = np.nonzero(bucket_of == bucket)
        num_rows = rows_per_batch or _even_rows(len(records), (samples_per_batch or 0) // width)
        for start in range(0, len(records), num_rows):
            own = records[start : start + num_rows]
            filler = (0, num_rows - len(own))
            batches.append(
                AudioBatch(
                    record_index=np.pad(own, filler, constant_values=-1),
                    num_samples=np.pad(lengths[own].astype(np.int32), filler),
                    width=width,
                )
            )
    num_places = sum(len(batch.record_index) * batch.width for batch in batches)
    return BucketedAudio(tuple(batches), num_samples=int(lengths.sum()), num_places=num_places)


def _even_rows(num_records: int, most_rows: int) -> int:
    """Rows of a batch when the records are spread evenly over as few batches as can be."""
    num_batches = -(-num_records // most_rows)
    return -(-num_records // num_batches)


def choose_widths(
    num_samples: Sequence[int] | Integer[np.ndarray, "records"], num_buckets: int
) -> Int64[np.ndarray, "buckets"]:
    """Widths of buckets that leave the fewest places empty, chosen among the quantiles of the lengths.

    Every choice is weighed, by dynamic programming; filler rows are not counted. Buckets of equally many waveforms
    would leave far more empty, since lengths of utterances are skewed: the last would be as wide as the longest of all.

    Args:
        num_samples: ``[records]`` length of each waveform, at least 1.
        num_buckets: most buckets.

    Returns:
        ``[buckets]`` samples, growing, the last that of the longest waveform.

    Raises:
        InputError: there is no waveform, one has no samples, or ``num_buckets`` is below 1.

    Example:
        >>> choose_widths([100, 110, 120, 480, 500, 3000], num_buckets=3)
        array([ 120,  500, 3000])
    """
    if num_buckets < 1:
        raise InputError(f"num_buckets = {num_buckets}: expected at least 1")
    lengths = np.sort(np.asarray(num_samples, np.int64))
    if not len(lengths) or lengths[0] < 1:
        found = f"one of {lengths[0]} samples" if len(lengths) else "none"
        raise InputError(f"waveforms to choose widths for: {found}; expected some, of at least 1 sample each")
    quantiles = np.quantile(lengths, np.linspace(0.0, 1.0, _NUM_QUANTILES + 1), method="higher")
    # A bucket goes from one end to another, holds what lies between, and is as wide as the latter.
    ends = np.concatenate([[0], np.unique(quantiles)])
    count = np.searchsorted(lengths, ends, side="right")
    places = (count[None, :] - count[:, None]) * ends[None, :].astype(np.float64)
    places[np.tril_indices(len(ends), -1)] = np.inf
    # fewest[end]: places of the buckets so far, which hold everything up to that end.
    fewest = np.where(ends == 0, 0.0, np.inf)
    choices = []
    for _ in range(num_buckets):
        totals = fewest[:, None] + places
        choices.append(totals.argmin(axis=0))
        fewest = totals.min(axis=0)
    chosen, end = [], len(ends) - 1
    for start_of in reversed(choices):
        chosen.append(end)
        end = start_of[end]
    # A bucket that begins where it ends holds nothing.
    widths = np.unique(ends[chosen])
    return widths[widths > 0]


def pad_waveforms(waveforms: Sequence[np.ndarray], batch: AudioBatch) -> Float32[np.ndarray, "batch samples"]:
    """Puts the waveforms of a batch into rows of one width.

    Args:
        waveforms: those of ``batch.records``, in that order: one channel each, floating, at the encoder's sampling rate
            and normalised as it wants.
        batch: one of :func:`bucket_by_length`.

    Returns:
        ``[batch, samples]`` float32, what ``Wav2Vec2`` and ``AudioCnn`` take together with ``batch.num_samples``: zeros
        behind the end of a waveform and in filler rows.

    Raises:
        InputError: there are more or fewer waveforms than the batch has, or one has several channels, is not floating,
            or is not as long as was said when the batches were made.

    Example:
        >>> batch = bucket_by_length([2, 3], widths=[4], rows_per_batch=3).batches[0]
        >>> pad_waveforms([np.array([0.5, 1.0]), np.array([0.1, 0.2, 0.3])], batch)
        array([[0.5, 1. , 0. , 0. ],
               [0.1, 0.2, 0.3, 0. ],
               [0. , 0. , 0. , 0. ]], dtype=float32)
        >>> batch.num_samples
        array([2, 3, 0], dtype=int32)
    """
    records = batch.records
    if len(waveforms) != len(records):
        raise InputError(f"{len(waveforms)} waveforms: expected the {len(records)} of the batch")
    samples = np.zeros((len(batch.record_index), batch.width), np.float32)
    for row, (record, waveform) in enumerate(zip(records, waveforms, strict=True)):
        if waveform.ndim != 1 or waveform.dtype.kind != "f":
            found = f"shape {list(waveform.shape)} and type {waveform.dtype}"
            raise InputError(f"waveform {record} has {found}: expected one channel of floating samples")
        if len(waveform) != batch.num_samples[row]:
            expected = f"expected {batch.num_samples[row]}, as when the batches were made"
            raise InputError(f"waveform {record} has {len(waveform)} samples: {expected}")
        samples[row, : len(waveform)] = waveform
    return samples
