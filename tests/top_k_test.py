"""Exact search: the answers of a full sort, whatever is filtered, however the items are stored and spread."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmei_jax.recommendation.top_k import GROUP_SIZE, Filters, TopItems, make_table, top_items
from mmei_jax.sharding import make_evaluation_mesh
from mmei_jax.types import InputError
from tests import processes

NUM_ITEMS, DIM, NUM_KINDS = 1_000, 16, 3


def catalogue(num_items=NUM_ITEMS):
    generator = np.random.default_rng(0)
    embeddings = generator.normal(size=(num_items, DIM)).astype(np.float32)
    return embeddings, generator.integers(0, NUM_KINDS, num_items).astype(np.int32)


def queries(count=5):
    return np.random.default_rng(1).normal(size=(count, DIM)).astype(np.float32)


def search(k, filters=None, *, num_items=NUM_ITEMS, block_size=128, dtype="float32", **options) -> TopItems:
    mesh = make_evaluation_mesh()
    table = make_table(*catalogue(num_items), mesh, dtype=dtype, block_size=block_size)
    found = top_items(
        jnp.asarray(queries()), table, filters or Filters(), k=k, mesh=mesh, block_size=block_size, **options
    )
    return jax.device_get(found)


def expected_scores(is_allowed=True, num_items=NUM_ITEMS):
    scores = queries() @ catalogue(num_items)[0].T
    return np.where(is_allowed, scores, -np.inf)


def check(found, scores, k):
    best = -np.sort(-scores, axis=1)[:, :k]
    best = np.pad(best, ((0, 0), (0, k - best.shape[1])), constant_values=-np.inf)
    np.testing.assert_allclose(found.score, best, rtol=1e-5, atol=1e-5)
    is_answer = np.isfinite(best)
    np.testing.assert_array_equal(found.row == -1, ~is_answer)
    for row, score, theirs, answers in zip(found.row, found.score, scores, is_answer, strict=True):
        assert len(set(row[answers])) == answers.sum()
        np.testing.assert_allclose(theirs[row[answers]], score[answers], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block_size", [32, 128, 4_096])
@pytest.mark.parametrize("k", [1, 10, 100])
def test_answers_are_those_of_a_full_sort(k, block_size):
    check(search(k, block_size=block_size), expected_scores(), k)


@pytest.mark.parametrize("num_items", [1, 33, 127])
def test_small_catalogues_answer_all_that_they_have(num_items):
    check(search(40, num_items=num_items), expected_scores(num_items=num_items), 40)


def test_approximate_choice_of_groups_is_exact_where_the_processor_has_no_faster_one():
    check(search(10, is_approximate=True), expected_scores(), 10)


def test_filters_are_those_of_a_full_sort():
    kind = catalogue()[1]
    allows_kind = np.array([[True, False, True], [True] * 3, [False] * 3, [False, True, False], [True] * 3])
    excluded = np.random.default_rng(2).integers(-1, NUM_ITEMS, (5, 60)).astype(np.int32)
    excluded[:, 0] = expected_scores().argmax(axis=1)
    is_seen = np.zeros((5, NUM_ITEMS), bool)
    for row, items in zip(is_seen, excluded, strict=True):
        row[items[items >= 0]] = True
    listed = np.random.default_rng(3).uniform(size=NUM_ITEMS) < 0.5
    padded = np.pad(listed, (0, 1024 - NUM_ITEMS))
    check(search(20, Filters(allows_kind=allows_kind)), expected_scores(allows_kind[:, kind]), 20)
    check(search(20, Filters(excluded=excluded)), expected_scores(~is_seen), 20)
    check(search(20, Filters(is_allowed=padded)), expected_scores(listed[None]), 20)
    every = Filters(allows_kind=allows_kind, excluded=excluded, is_allowed=padded)
    check(search(20, every), expected_scores(allows_kind[:, kind] & ~is_seen & listed), 20)


def check_ties(block_size, k):
    """Small integers have exact inner products, and ties everywhere: of those the highest row comes first."""
    generator, mesh = np.random.default_rng(5), make_evaluation_mesh()
    items = generator.integers(-2, 3, (NUM_ITEMS, 3)).astype(np.float32)
    tied = generator.integers(-2, 3, (4, 3)).astype(np.float32)
    table = make_table(items, np.zeros(NUM_ITEMS, np.int32), mesh, block_size=block_size)
    found = top_items(jnp.asarray(tied), table, Filters(), k=k, mesh=mesh, block_size=block_size)
    expected = [np.lexsort((-np.arange(NUM_ITEMS), -scores))[:k] for scores in tied @ items.T]
    np.testing.assert_array_equal(found.row, expected)


@pytest.mark.parametrize(("block_size", "k"), [(96, 5), (96, 100), (4_096, 5)])
def test_of_equal_scores_the_highest_row_comes_first(block_size, k):
    check_ties(block_size, k)


@pytest.mark.parametrize("num_items", [1, 33, 1_000, 5_000])
def test_little_padding_completes_the_blocks(num_items):
    block_size = 480
    table = make_table(
        np.zeros((num_items, 2)), np.zeros(num_items, np.int32), make_evaluation_mesh(), block_size=block_size
    )
    num_blocks = -(-num_items // block_size)
    assert table.is_listed.sum() == num_items
    assert len(table.is_listed) - num_items < GROUP_SIZE * num_blocks
    assert len(table.is_listed) % (GROUP_SIZE * num_blocks) == 0


def test_smaller_storage_answers_nearly_the_same():
    exact = search(20).row
    for dtype, least in (("bfloat16", 0.9), ("int8", 0.85)):
        found = search(20, dtype=dtype).row
        recall = np.mean([len(set(ours) & set(theirs)) / 20 for ours, theirs in zip(found, exact, strict=True)])
        assert least <= recall <= 1.0, dtype


def test_what_is_no_catalogue_is_refused():
    mesh = make_evaluation_mesh()
    with pytest.raises(InputError, match="dtype 'int4': expected float32, bfloat16 or int8"):
        make_table(*catalogue(), mesh, dtype="int4")
    with pytest.raises(InputError, match="0 embeddings and 0 kinds"):
        make_table(np.zeros((0, 2)), np.zeros(0, np.int32), mesh)


def test_scores_of_the_whole_catalogue_are_never_there():
    mesh = make_evaluation_mesh()
    table = make_table(*catalogue(64_000), mesh, block_size=1_024)
    compiled = top_items.lower(jnp.asarray(queries()), table, Filters(), k=10, mesh=mesh, block_size=1_024).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 5 * 64_000 * 4 / 2


FOUR_DEVICES = """
import jax
from tests.top_k_test import check, check_ties, expected_scores, search
assert jax.device_count() == 4
for num_items in (3, 1_000):
    for k in (1, 50):
        check(search(k, num_items=num_items, block_size=64), expected_scores(num_items=num_items), k)
check_ties(64, 20)
"""


def test_four_devices_answer_what_one_does():
    done = subprocess.run(
        [sys.executable, "-c", FOUR_DEVICES],
        env=processes.environment(num_devices=4),
        cwd=processes.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
