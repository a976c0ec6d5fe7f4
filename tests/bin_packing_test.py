"""Packing records of several lengths into rows: never overfull, few of them, as first-fit decreasing says."""

import math
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmei_jax import bin_packing
from mmei_jax.bin_packing import arrange_in_rows, pack

MAX_TOKENS = np.array([16, 24, 16])


def speech_lengths(generator, num_records):
    """Lengths like those of utterances: correlated, skewed, sometimes absent."""
    durations = generator.lognormal(0.0, 0.7, (num_records, 1)) * generator.lognormal(0.0, 0.3, (num_records, 3))
    lengths = np.clip(np.ceil(durations * MAX_TOKENS * 0.3), 1, MAX_TOKENS).astype(np.int64)
    return np.where(generator.random((num_records, 3)) < 0.06, 0, lengths)


def fewest_rows(lengths, capacity, records_per_row):
    """No packing takes fewer rows than all tokens of a modality, or all records, would fill to the brim."""
    return math.ceil(max((lengths.sum(axis=0) / capacity).max(), len(lengths) / records_per_row))


def best_packing(lengths, capacity, records_per_row):
    """The smallest number of rows of any packing, by trying all."""

    def places(rows, left):
        if not len(left):
            return len(rows)
        best = len(left) + len(rows)
        for index, row in enumerate([*rows, (np.zeros(3, np.int64), 0)]):
            tokens, count = row[0] + left[0], row[1] + 1
            if (tokens <= capacity).all() and count <= records_per_row:
                changed = [*rows, None]
                changed[index] = (tokens, count)
                best = min(best, places([each for each in changed if each is not None], left[1:]))
        return best

    return places([], lengths)


def first_fit_decreasing(lengths, capacity, records_per_row):
    """By the words of the definition, one record and one row after the other."""
    limits = np.append(capacity, records_per_row)
    sizes = [np.append(length, 1) for length in lengths]
    free, rows = [], [None] * len(sizes)
    for record in sorted(range(len(sizes)), key=lambda record: -max(sizes[record] / limits)):
        free.append(limits.copy())
        rows[record] = next(row for row in range(len(free)) if (free[row] >= sizes[record]).all())
        free[rows[record]] -= sizes[record]
        free = [each for each in free if (each != limits).any()]
    return rows


@pytest.mark.parametrize("seed", range(20))
def test_rows_are_never_overfull_and_none_is_left_empty(seed):
    generator = np.random.default_rng(seed)
    capacity = MAX_TOKENS * generator.integers(1, 5)
    records_per_row = int(generator.integers(1, 10))
    lengths = speech_lengths(generator, int(generator.integers(1, 200)))
    rows = pack(lengths, capacity, records_per_row)
    assert set(rows) == set(range(rows.max() + 1))
    for row in range(rows.max() + 1):
        assert (lengths[rows == row].sum(axis=0) <= capacity).all()
        assert (rows == row).sum() <= records_per_row
    np.testing.assert_array_equal(pack(lengths.copy(), capacity, records_per_row), rows)


@pytest.mark.parametrize("seed", range(12))
def test_small_batches_take_at_most_one_row_more_than_the_best_packing(seed):
    lengths = speech_lengths(np.random.default_rng(seed), 7)
    for capacity, records_per_row in ((MAX_TOKENS, 7), (MAX_TOKENS * 2, 3)):
        num_rows = pack(lengths, capacity, records_per_row).max() + 1
        assert num_rows <= best_packing(lengths, capacity, records_per_row) + 1


def test_batches_take_few_rows_more_than_no_packing_could_go_below():
    generator = np.random.default_rng(0)
    used = fewest = 0
    for _ in range(100):
        lengths = speech_lengths(generator, 32)
        used += pack(lengths, MAX_TOKENS * 2, 8).max() + 1
        fewest += fewest_rows(lengths, MAX_TOKENS * 2, 8)
    assert fewest <= used <= 1.06 * fewest


def test_record_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="longer than a row of \\[4\\] tokens"):
        pack(np.array([[5]]), np.array([4]), 2)


def test_no_records_need_no_row():
    assert pack(np.zeros((0, 3), np.int64), MAX_TOKENS, 4).shape == (0,)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_every_record_goes_to_the_first_row_that_has_room(data):
    num_modalities, num_records = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 40))
    capacity = np.array(data.draw(st.lists(st.integers(1, 30), min_size=num_modalities, max_size=num_modalities)))
    lengths = np.array(
        [[data.draw(st.integers(0, int(most))) for most in capacity] for _ in range(num_records)], np.int64
    ).reshape(num_records, num_modalities)
    records_per_row = data.draw(st.integers(1, 6))
    # Rows are looked at in blocks; small ones, so that few rows are several.
    with mock.patch.object(bin_packing, "_BLOCK", data.draw(st.integers(1, 4))):
        rows = pack(lengths, capacity, records_per_row)
    assert rows.tolist() == first_fit_decreasing(lengths, capacity, records_per_row)


def test_places_of_a_row_hold_its_records_in_their_order():
    rows = np.array([2, 0, 2, 1, 0, 2])
    assert arrange_in_rows(rows, 4, 3).tolist() == [1, 4, -1, 3, -1, -1, 0, 2, 5, -1, -1, -1]
    assert arrange_in_rows(np.zeros(0, np.int64), 1, 2).tolist() == [-1, -1]
