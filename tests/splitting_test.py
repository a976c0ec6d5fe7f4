"""A split whose groups are whole, of the sizes of another one."""

import numpy as np
import pytest

from mmei_jax.extraction.splitting import check_groups_undivided, split_like
from mmei_jax.types import InputError


def draw(num_records=2000, num_groups=150):
    generator = np.random.default_rng(0)
    groups = np.char.add("e", generator.integers(0, num_groups, num_records).astype(str))
    return groups, generator.choice(["train", "dev", "test"], num_records, p=[0.7, 0.1, 0.2])


def test_groups_are_whole_and_sizes_are_those_of_the_present_splits():
    groups, splits = draw()
    new = split_like(groups, splits, seed=0)
    check_groups_undivided(groups, new)
    for name in ("train", "dev", "test"):
        assert abs(int((new == name).sum()) - int((splits == name).sum())) <= 5


def test_split_depends_on_the_seed_alone():
    groups, splits = draw()
    first = split_like(groups, splits, seed=0)
    np.testing.assert_array_equal(first, split_like(groups, splits, seed=0))
    assert (first != split_like(groups, splits, seed=1)).any()
    # The order of the rows decides nothing, nor does which group was in which split.
    order = np.random.default_rng(1).permutation(len(groups))
    np.testing.assert_array_equal(split_like(groups[order], np.sort(splits), seed=0), first[order])


def test_fewer_groups_than_splits_are_refused():
    with pytest.raises(InputError, match="1 groups for 2 splits"):
        split_like(np.array(["a", "a"]), np.array(["train", "test"]), seed=0)
