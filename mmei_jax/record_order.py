"""Which records make up each batch, as a function of the step alone: no state, no stored permutation. NumPy only."""

import functools
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int64, UInt64

_NUM_ROUNDS = 8
# Bits of a smaller half would leave a handful of round functions, and too few permutations.
_MIN_HALF_BITS = 4
# A call costs as much for so many entries as for the few of one batch, so blocks are computed, and a few are kept.
_BLOCK_SIZE = 1024
_MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


@runtime_checkable
class RecordOrder(Protocol):
    """The records of each global batch."""

    def __len__(self) -> int:
        """The number of batches."""

    def __getitem__(self, step: int) -> Int64[np.ndarray, "batch"]:
        """Positions in the split of the records of batch ``step``; -1 is filler."""


class ShuffledOrder:
    """A new permutation of all records in each epoch, one epoch after the other; batches cross the borders.

    Within an epoch every record occurs exactly once. See :func:`permute`.

    Args:
        num_records: records per epoch.
        batch_size: records per batch.
        num_batches: length of this sequence.
        seed: the order depends on it and on the epoch, on nothing else.
    """

    def __init__(self, *, num_records: int, batch_size: int, num_batches: int, seed: int) -> None:
        self._num_records = num_records
        self._batch_size = batch_size
        self._num_batches = num_batches
        self._seed = seed

    def __len__(self) -> int:
        """The number of batches."""
        return self._num_batches

    def __getitem__(self, step: int) -> Int64[np.ndarray, "batch"]:
        """Positions in the split of the records of batch ``step``, counted from 0."""
        place, end = step * self._batch_size, (step + 1) * self._batch_size
        parts = []
        while place < end:
            epoch, start = divmod(place, self._num_records)
            stop = min(self._num_records, start + end - place)
            parts.append(_permuted(start, stop, self._num_records, self._seed, epoch))
            place += stop - start
        return np.concatenate(parts)


class SequentialOrder:
    """Every record once, in order; the last batch is completed with -1.

    Args:
        num_records: records of the split.
        batch_size: records per batch.
        num_filler: places at the end of every batch that hold -1 in any case.
    """

    def __init__(self, *, num_records: int, batch_size: int, num_filler: int = 0) -> None:
        self._num_records = num_records
        self._batch_size = batch_size
        self._num_filler = num_filler

    def __len__(self) -> int:
        """The number of batches."""
        return -(-self._num_records // self._batch_size)

    def __getitem__(self, step: int) -> Int64[np.ndarray, "batch"]:
        """Positions in the split of the records of batch ``step``; -1 is filler."""
        places = np.arange(step * self._batch_size, (step + 1) * self._batch_size, dtype=np.int64)
        records = np.where(places < self._num_records, places, -1)
        return np.pad(records, (0, self._num_filler), constant_values=-1)


def permute(places: Int64[np.ndarray, "batch"], num_records: int, seed: int, epoch: int) -> Int64[np.ndarray, "batch"]:
    """The entries at ``places`` of the permutation of ``range(num_records)`` that belongs to (seed, epoch).

    A Feistel network permutes the smallest sufficient range of 4**bits numbers; an entry that falls outside
    ``num_records`` is permuted again until it is inside (cycle walking: Black and Rogaway, "Ciphers with arbitrary
    finite domains", 2002). Takes no memory, whatever the number of records, and its only foreign random stream is that
    of ``numpy.random.SeedSequence``, which NumPy promises not to change.

    Args:
        places: positions in [0, num_records).
        num_records: at least 1.
        seed: at least 0.
        epoch: at least 0.
    """
    half_bits = max(_MIN_HALF_BITS, ((num_records - 1).bit_length() + 1) // 2)
    keys = np.random.SeedSequence((seed, epoch)).generate_state(_NUM_ROUNDS, np.uint64)
    entries = places.astype(np.uint64)
    outside = np.arange(len(entries))
    while outside.size:
        entries[outside] = _feistel(entries[outside], keys, half_bits)
        outside = outside[entries[outside] >= num_records]
    return entries.astype(np.int64)


def _permuted(start: int, stop: int, num_records: int, seed: int, epoch: int) -> Int64[np.ndarray, "batch"]:
    """The entries of ``permute`` at the places from ``start`` to ``stop``."""
    first, last = start // _BLOCK_SIZE, (stop - 1) // _BLOCK_SIZE
    blocks = [_permuted_block(number, num_records, seed, epoch) for number in range(first, last + 1)]
    return np.concatenate(blocks)[start - first * _BLOCK_SIZE : stop - first * _BLOCK_SIZE]


@functools.lru_cache(maxsize=16)
def _permuted_block(number: int, num_records: int, seed: int, epoch: int) -> Int64[np.ndarray, "block"]:
    places = np.arange(number * _BLOCK_SIZE, min((number + 1) * _BLOCK_SIZE, num_records))
    return permute(places, num_records, seed, epoch)


def _feistel(
    values: UInt64[np.ndarray, "batch"], keys: UInt64[np.ndarray, "rounds"], half_bits: int
) -> UInt64[np.ndarray, "batch"]:
    """A keyed permutation of the numbers of ``2 * half_bits`` bits."""
    shift, high = np.uint64(half_bits), np.uint64(64 - half_bits)
    left, right = values >> shift, values & np.uint64((1 << half_bits) - 1)
    for key in keys:
        mixed = (right + key) * _MULTIPLIERS[0]
        mixed = (mixed ^ (mixed >> np.uint64(29))) * _MULTIPLIERS[1]
        left, right = right, left ^ (mixed >> high)
    return (left << shift) | right
