"""Differences seed by seed: Student's interval beside scipy's own test, and what stands in a table's cells."""

import dataclasses
import math

import numpy as np
import pytest
from scipy import stats

from mmei_jax.reports.paired_seeds import difference_over_seeds
from mmei_jax.reports.table_sections import seeds_table
from tests.made_up_rows import row


@pytest.mark.parametrize("num_seeds", [2, 3, 10])
def test_interval_is_that_of_a_paired_t_test(num_seeds):
    ours, other = np.random.default_rng(num_seeds).normal(size=(2, num_seeds))
    found = difference_over_seeds(dict(enumerate(ours)), dict(enumerate(other)))
    expected = stats.ttest_rel(ours, other).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.value == pytest.approx((ours - other).mean())
    assert found.num_seeds == num_seeds


def test_interval_by_hand():
    """Differences of 1, 2 and 3: mean 2, deviation 1; t of 2 degrees of freedom is 4.3027 at 97.5 %."""
    found = difference_over_seeds({7: 2.0, 8: 4.0, 9: 6.0}, {9: 3.0, 8: 2.0, 7: 1.0})
    half = 4.302653 / math.sqrt(3.0)
    assert dataclasses.astuple(found) == pytest.approx((2.0, 2.0 - half, 2.0 + half, 3), rel=1e-6)


def test_seeds_of_one_row_alone_and_values_that_are_not_finite_do_not_count():
    ours = {0: 0.5, 1: 0.7, 2: math.nan, 3: 0.9, 4: 0.1}
    other = {1: 0.6, 2: 0.5, 3: 0.5, 4: math.inf, 5: 0.0}
    assert difference_over_seeds(ours, other) == difference_over_seeds({1: 0.7, 3: 0.9}, {1: 0.6, 3: 0.5})


def test_one_seed_in_common_has_a_difference_without_an_interval_and_none_has_neither():
    alone = difference_over_seeds({0: 0.5, 1: 0.7}, {1: 0.4, 2: 0.1})
    assert alone.value == pytest.approx(0.3)
    assert (np.isnan([alone.low, alone.high]).all(), alone.num_seeds) == (True, 1)
    nothing = difference_over_seeds({0: 0.5}, {1: 0.4})
    assert (np.isnan([nothing.value, nothing.low, nothing.high]).all(), nothing.num_seeds) == (True, 0)


def cells(first, reference):
    """What the table says of a row."""
    titles, _, line = seeds_table([first, reference], reference, ["emotion/accuracy", "ranking/map"]).splitlines()
    assert titles == "| row | emotion/accuracy | ranking/map |"
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_cell_has_the_difference_and_its_interval_and_none_for_a_metric_that_the_row_lacks():
    reference = row(accuracies=(0.5, 0.5, 0.5))
    assert cells(row("text_only", accuracies=(0.3, 0.4, 0.5)), reference) == ["-0.100 [-0.348, +0.148]", ""]


def test_cell_says_how_many_seeds_are_in_common_where_these_are_not_all():
    reference = row(accuracies=(0.5, 0.5, 0.5, 0.6))
    accuracies = (0.3, 0.4, 0.5)
    for seeds, expected in (
        ([0, 1, 2], "-0.100 [-0.348, +0.148] (3 seeds)"),
        ([3, 4, 5], "-0.300 (1 seed)"),
        ([4, 5, 6], "no seed in common"),
    ):
        assert cells(row("text_only", accuracies=accuracies, seeds=seeds), reference)[0] == expected
    assert cells(row("text_only", accuracies=(0.3,)), row(accuracies=(0.5,)))[0] == "-0.200"
