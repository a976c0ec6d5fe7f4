"""A split whose groups are whole, of the sizes of another one."""

import csv
from pathlib import Path

import numpy as np
import pytest

from mmei_jax.extraction.splitting import check_groups_undivided, split_like
from mmei_jax.types import InputError

MELD = Path(__file__).parents[2] / "shared" / "data" / "meld"


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


@pytest.mark.skipif(not MELD.is_dir(), reason="MELD's CSVs are not in shared/data beside the checkout")
def test_whole_episodes_of_meld_are_dealt_to_splits_of_the_official_sizes():
    episodes, official = [], []
    for split in ("train", "dev", "test"):
        with (MELD / f"{split}_sent_emo.csv").open(newline="", encoding="utf-8") as stream:
            found = [f"s{row['Season']}e{row['Episode']}" for row in csv.DictReader(stream)]
        episodes += found
        official += [split] * len(found)
    new = split_like(np.array(episodes), np.array(official), seed=0)
    check_groups_undivided(np.array(episodes), new)
    assert [int((new == split).sum()) for split in ("train", "dev", "test")] == [9989, 1109, 2610]
    assert len(set(episodes)) == 190
