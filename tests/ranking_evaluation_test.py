"""Ranking over a whole catalogue in blocks: pytrec_eval's figures, and those of the full score matrix."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmei_jax.metrics import catalogue_metrics, compute_all
from mmei_jax.ranking_metrics import relevant_ranks
from mmei_jax.recommendation.ranking_evaluation import (
    Queries,
    RankedCatalogue,
    evaluate_ranking,
    rank_queries,
    ranking_figures,
    streamed_ranks,
)
from mmei_jax.recommendation.top_k import Filters
from mmei_jax.sharding import make_evaluation_mesh
from mmei_jax.types import InputError
from tests import processes, ranking_metrics_test

NUM_QUERIES, NUM_ITEMS, NUM_RELEVANT, DIM = 24, 300, 7, 3
KINDS = ("music", "video", "text")
CUTOFFS = ranking_metrics_test.CUTOFFS
BLOCK_SIZE = 64


def embeddings(seed, style):
    """Of users and of items; small integers have exact inner products, and many ties."""
    random = np.random.default_rng(seed)
    if style == "ties":
        users, items = random.integers(-2, 3, (NUM_QUERIES, DIM)), random.integers(-2, 3, (NUM_ITEMS, DIM))
    else:
        users, items = random.normal(size=(NUM_QUERIES, DIM)), random.normal(size=(NUM_ITEMS, DIM))
    return users.astype(np.float32), items.astype(np.float32)


def make_relevant(seed):
    """None in the first query, and any number up to NUM_RELEVANT in the others, filler anywhere between them."""
    random = np.random.default_rng(seed)
    relevant = np.full((NUM_QUERIES, NUM_RELEVANT), -1, np.int32)
    for row in relevant[1:]:
        count = random.integers(0, NUM_RELEVANT + 1)
        row[random.permutation(NUM_RELEVANT)[:count]] = random.permutation(NUM_ITEMS)[:count]
    return relevant


def make_catalogue(items):
    random = np.random.default_rng(9)
    return RankedCatalogue.place(
        items,
        random.integers(0, len(KINDS), NUM_ITEMS),
        KINDS,
        random.integers(0, 40, NUM_ITEMS),
        make_evaluation_mesh(),
        block_size=BLOCK_SIZE,
    )


def make_queries(users, relevant, seed=0):
    random = np.random.default_rng(seed)
    return Queries(
        embedding=users,
        relevant=relevant,
        is_query=np.arange(NUM_QUERIES) != 5,
        is_warm=random.uniform(size=NUM_QUERIES) < 0.6,
    )


def batches(queries, size=8):
    return [jax.tree.map(lambda leaf, at=at: leaf[at : at + size], queries) for at in range(0, NUM_QUERIES, size)]


def peer_figures(scores, relevant, keep):
    """Means of pytrec_eval over the kept queries that have relevant items."""
    found = ranking_metrics_test.evaluate_with_peer(scores[keep], relevant[keep])
    return {
        ours: np.mean([record[theirs] for record in found.values()])
        for ours, theirs in ranking_metrics_test.NAMES_OF_PEER.items()
    }


def ranks(users, items, relevant, filters=None):
    catalogue = make_catalogue(items)
    return streamed_ranks(
        jnp.asarray(users),
        jnp.asarray(relevant),
        catalogue.table,
        filters or Filters(),
        mesh=catalogue.mesh,
        block_size=BLOCK_SIZE,
    )


@pytest.mark.parametrize("style", ["ties", "no ties"])
@pytest.mark.parametrize("seed", range(3))
def test_ranks_are_those_of_the_full_matrix(style, seed):
    (users, items), relevant = embeddings(seed, style), make_relevant(seed)
    expected = relevant_ranks(jnp.asarray(users @ items.T), jnp.asarray(relevant))
    np.testing.assert_array_equal(ranks(users, items, relevant), expected)
    assert np.isfinite(expected).any()


@pytest.mark.parametrize("style", ["ties", "no ties"])
@pytest.mark.parametrize("seed", range(3))
def test_figures_equal_pytrec_eval_in_every_group(style, seed):
    (users, items), relevant = embeddings(seed, style), make_relevant(seed)
    catalogue, queries = make_catalogue(items), make_queries(users, relevant, seed)
    figures = evaluate_ranking(batches(queries), catalogue, cutoffs=CUTOFFS)
    scores, is_query, is_warm = users @ items.T, queries.is_query, queries.is_warm
    expected = {
        "all": peer_figures(scores, relevant, is_query),
        "warm": peer_figures(scores, relevant, is_query & is_warm),
        "cold": peer_figures(scores, relevant, is_query & ~is_warm),
    }
    for place, kind in enumerate(KINDS):
        of_kind = np.where((relevant >= 0) & (catalogue.kind[relevant] == place), relevant, -1)
        expected[f"kind/{kind}"] = peer_figures(scores, of_kind, is_query)
    for group, named in expected.items():
        for name, value in named.items():
            np.testing.assert_allclose(figures[f"{group}/{name}"], value, rtol=1e-5, err_msg=f"{group}/{name}")


def test_figures_are_those_of_the_existing_metrics():
    (users, items), relevant = embeddings(4, "ties"), make_relevant(4)
    catalogue, queries = make_catalogue(items), make_queries(users, relevant)
    figures = evaluate_ranking(batches(queries), catalogue, cutoffs=CUTOFFS)
    metrics = catalogue_metrics(
        jnp.asarray(users),
        jnp.asarray(items),
        ranking_metrics_test.make_targets(relevant),
        jnp.asarray(queries.is_query),
        cutoffs=CUTOFFS,
    )
    for name, value in compute_all(jax.device_get(metrics)).items():
        assert figures[name.replace("ranking/", "all/")] == pytest.approx(value, rel=1e-6), name


def plain_place_figures(shown, popularity):
    """By pairs of items and by places, one after the other."""
    differences = np.abs(shown[:, None] - shown[None, :]).mean()
    places = np.repeat(popularity, shown)
    positives = np.repeat(popularity, popularity)
    return {
        "coverage": np.mean(shown > 0),
        "gini": differences / 2 / shown.mean(),
        "mean_popularity": places.mean(),
        "popularity_ratio": places.mean() / positives.mean(),
    }


@pytest.mark.parametrize("style", ["ties", "no ties"])
def test_coverage_and_popularity_are_those_of_the_sorted_catalogue(style):
    users, items = embeddings(2, style)
    catalogue, queries = make_catalogue(items), make_queries(users, make_relevant(2))
    figures = evaluate_ranking(batches(queries), catalogue, cutoffs=(5, 20))
    scores = users @ items.T
    # Of equal scores the highest row first.
    order = np.stack([np.lexsort((-np.arange(NUM_ITEMS), -row)) for row in scores])
    groups = {"all": queries.is_query, "warm": queries.is_query & queries.is_warm}
    for k in (5, 20):
        shown = {name: np.bincount(order[keep, :k].ravel(), minlength=NUM_ITEMS) for name, keep in groups.items()}
        expected = {name: plain_place_figures(counts, catalogue.popularity) for name, counts in shown.items()}
        for place, kind in enumerate(KINDS):
            own = catalogue.kind == place
            expected[f"kind/{kind}"] = plain_place_figures(shown["all"][own], catalogue.popularity[own])
        for group, named in expected.items():
            for name, value in named.items():
                assert figures[f"{group}/{name}@{k}"] == pytest.approx(value, rel=1e-9), f"{group}/{name}@{k}"


def test_sums_of_batches_are_those_of_all_queries_at_once():
    (users, items), relevant = embeddings(1, "no ties"), make_relevant(1)
    catalogue, queries = make_catalogue(items), make_queries(users, relevant)
    at_once = ranking_figures(rank_queries(queries, catalogue), catalogue)
    in_batches = evaluate_ranking(batches(queries), catalogue)
    assert at_once.keys() == in_batches.keys()
    for name, value in at_once.items():
        np.testing.assert_allclose(in_batches[name], value, rtol=1e-6, err_msg=name)


def test_what_is_filtered_is_neither_ranked_nor_shown():
    (users, items), relevant = embeddings(3, "ties"), make_relevant(3)
    random = np.random.default_rng(0)
    excluded = np.stack([random.permutation(NUM_ITEMS)[:30] for _ in range(NUM_QUERIES)]).astype(np.int32)
    # A relevant item that a user has seen is never found, and stays relevant.
    excluded[:, 0] = relevant.max(axis=1)
    queries, catalogue = make_queries(users, relevant), make_catalogue(items)
    sums = rank_queries(queries, catalogue, cutoffs=CUTOFFS, filters=Filters(excluded=jnp.asarray(excluded)))
    figures = ranking_figures(sums, catalogue, cutoffs=CUTOFFS)
    scores = users @ items.T
    run, judged = {}, {}
    for query in np.flatnonzero(queries.is_query):
        left = sorted(set(range(NUM_ITEMS)) - set(excluded[query].tolist()))
        run[f"q{query}"] = {f"{item:04d}": float(scores[query, item]) for item in left}
        judged[f"q{query}"] = {f"{item:04d}": 1 for item in relevant[query] if item >= 0}
    judged = {name: items for name, items in judged.items() if items}
    peer = ranking_metrics_test.pytrec_eval.RelevanceEvaluator(judged, {"map", "recip_rank", "recall.10"}).evaluate(run)
    for ours, theirs in (("map", "map"), ("mrr", "recip_rank"), ("recall@10", "recall_10")):
        expected = np.mean([record[theirs] for record in peer.values()])
        assert figures[f"all/{ours}"] == pytest.approx(expected, rel=1e-5)
    assert figures["all/recall@60"] < 1.0
    assert sums.exposure["all"].sum(axis=1).tolist() == [k * queries.is_query.sum() for k in CUTOFFS]


def test_a_query_with_a_nan_score_has_no_figures():
    (users, items), relevant = embeddings(1, "no ties"), make_relevant(1)
    users[3, 0] = np.nan
    found = np.asarray(ranks(users, items, relevant))
    assert np.isnan(found[3]).all()
    assert not np.isnan(np.delete(found, 3, axis=0)).any()


def test_the_score_matrix_is_never_there():
    users, items = (np.ones((count, DIM), np.float32) for count in (NUM_QUERIES, 64_000))
    kind = np.zeros(len(items), np.int64)
    catalogue = RankedCatalogue.place(items, kind, ("any",), kind, make_evaluation_mesh(), block_size=1_024)
    compiled = streamed_ranks.lower(
        jnp.asarray(users),
        jnp.asarray(make_relevant(0)),
        catalogue.table,
        Filters(),
        mesh=catalogue.mesh,
        block_size=1_024,
    ).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < NUM_QUERIES * len(items) * 4 / 4


def test_what_is_no_catalogue_and_no_query_is_refused():
    _, items = embeddings(0, "ties")
    numbers, mesh = np.zeros(NUM_ITEMS, np.int64), make_evaluation_mesh()
    with pytest.raises(InputError, match="300 embeddings and 299 numbers of positives"):
        RankedCatalogue.place(items, numbers, KINDS, numbers[1:], mesh)
    with pytest.raises(InputError, match="kinds of items from 0 to 3: expected from 0 to 2"):
        RankedCatalogue.place(items, np.arange(NUM_ITEMS) % 4, KINDS, numbers, mesh)
    with pytest.raises(InputError, match="0 batches of queries"):
        evaluate_ranking([], make_catalogue(items))


SEVERAL_DEVICES = """
import jax
from tests import ranking_evaluation_test as tests
assert jax.device_count() == 3
tests.test_ranks_are_those_of_the_full_matrix("ties", 0)
tests.test_coverage_and_popularity_are_those_of_the_sorted_catalogue("ties")
"""


def test_several_devices_rank_as_one_does():
    done = subprocess.run(
        [sys.executable, "-c", SEVERAL_DEVICES],
        env=processes.environment(num_devices=3),
        cwd=processes.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
