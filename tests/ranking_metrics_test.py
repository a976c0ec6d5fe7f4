import jax
import jax.numpy as jnp
import numpy as np
import pytest
import pytrec_eval

from mmei_jax.metrics import catalogue_metrics, compute_all, merge_all
from mmei_jax.ranking_metrics import ranking_values, relevant_ranks
from mmei_jax.types import Items, RankingTargets

NUM_RECORDS, NUM_ITEMS, NUM_RELEVANT = 24, 60, 7
CUTOFFS = (1, 5, 10, 60)
NAMES_OF_PEER = {"map": "map", "mrr": "recip_rank"} | {
    f"{ours}@{k}": f"{theirs}_{k}"
    for k in CUTOFFS
    for ours, theirs in (("ndcg", "ndcg_cut"), ("hr", "success"), ("recall", "recall"))
}


def make_relevant(random):
    """Up to NUM_RELEVANT items per record, in any order, filler anywhere between them; none in the first record."""
    relevant = np.full((NUM_RECORDS, NUM_RELEVANT), -1, np.int32)
    for row in relevant[1:]:
        count = random.integers(0, NUM_RELEVANT + 1)
        row[random.permutation(NUM_RELEVANT)[:count]] = random.permutation(NUM_ITEMS)[:count]
    return relevant


def evaluate_with_peer(scores, relevant):
    measures = {"map", "recip_rank"} | {
        f"{name}.{','.join(map(str, CUTOFFS))}" for name in ("ndcg_cut", "success", "recall")
    }
    judged = {f"r{row}": {f"{item:04d}": 1 for item in items if item >= 0} for row, items in enumerate(relevant)}
    judged = {name: items for name, items in judged.items() if items}
    run = {f"r{row}": {f"{item:04d}": float(s) for item, s in enumerate(values)} for row, values in enumerate(scores)}
    return pytrec_eval.RelevanceEvaluator(judged, measures).evaluate(run)


def make_scores(random, style):
    if style == "without ties":
        return random.normal(size=(NUM_RECORDS, NUM_ITEMS)).astype(np.float32)
    if style == "many ties":
        return random.integers(0, 4, (NUM_RECORDS, NUM_ITEMS)).astype(np.float32)
    if style == "all tied":
        return np.zeros((NUM_RECORDS, NUM_ITEMS), np.float32)
    # -inf is a score like any other: an item that a filter ruled out.
    scores = random.normal(size=(NUM_RECORDS, NUM_ITEMS)).astype(np.float32)
    return np.where(random.random(scores.shape) < 0.6, -np.inf, scores)


evaluate = jax.jit(ranking_values, static_argnames="cutoffs")


@pytest.mark.parametrize("style", ["without ties", "many ties", "all tied", "ruled out"])
@pytest.mark.parametrize("seed", range(4))
def test_every_record_equals_pytrec_eval(style, seed):
    random = np.random.default_rng(seed)
    scores, relevant = make_scores(random, style), make_relevant(random)

    values = evaluate(jnp.asarray(scores), jnp.asarray(relevant), cutoffs=CUTOFFS)

    peer = evaluate_with_peer(np.maximum(scores, -1e30), relevant)
    assert 0 < len(peer) < NUM_RECORDS
    assert set(values) == set(NAMES_OF_PEER)
    for name, value in values.items():
        for row in range(NUM_RECORDS):
            expected = peer[f"r{row}"][NAMES_OF_PEER[name]] if f"r{row}" in peer else 0.0
            np.testing.assert_allclose(value[row], expected, atol=1e-6, err_msg=f"{name} of record {row}")


def test_scores_that_differ_in_the_last_bit_are_no_tie():
    scores = jnp.array([[1.0, np.nextafter(np.float32(1.0), np.float32(2.0)), 1.0]], jnp.float32)

    assert relevant_ranks(scores, jnp.array([[0, 1, 2]])).tolist() == [[3.0, 1.0, 2.0]]


def test_the_largest_item_and_item_zero_are_ranked():
    scores = jnp.array([[3.0, 1.0, 2.0]])

    assert relevant_ranks(scores, jnp.array([[0, -1, 2]])).tolist() == [[1.0, np.inf, 2.0]]


def test_a_record_with_a_nan_score_has_nan_and_not_a_perfect_rank():
    scores = jnp.array([[3.0, jnp.nan, 2.0], [3.0, 1.0, 2.0]])

    ranks = relevant_ranks(scores, jnp.array([[0], [0]]))
    values = ranking_values(scores, jnp.array([[0], [0]]))

    assert np.isnan(ranks).tolist() == [[True], [False]]
    assert all(np.isnan(value).tolist() == [True, False] for value in values.values())


def make_targets(relevant):
    num_records = len(relevant)
    return RankingTargets(
        positive=Items(features=jnp.zeros((num_records, 2)), kind=jnp.zeros(num_records, jnp.int32)),
        positive_index=jnp.full(num_records, -1, jnp.int32),
        has_positive=jnp.zeros(num_records, bool),
        log_sampling_probability=jnp.zeros(num_records),
        relevant_index=jnp.asarray(relevant),
    )


@pytest.mark.parametrize("seed", range(3))
def test_catalogue_means_equal_pytrec_eval_over_the_records_with_relevant_items(seed):
    random = np.random.default_rng(seed)
    # Small integers: inner products are exact, and tie.
    users = random.integers(-2, 3, (NUM_RECORDS, 3)).astype(np.float32)
    items = random.integers(-2, 3, (NUM_ITEMS, 3)).astype(np.float32)
    relevant = make_relevant(random)
    is_record = np.arange(NUM_RECORDS) < NUM_RECORDS - 5

    metrics = catalogue_metrics(
        jnp.asarray(users), jnp.asarray(items), make_targets(relevant), jnp.asarray(is_record), cutoffs=CUTOFFS
    )

    peer = evaluate_with_peer((users @ items.T)[is_record], relevant[is_record])
    figures = compute_all(merge_all([jax.device_get(metrics)]))
    for name, theirs in NAMES_OF_PEER.items():
        expected = np.mean([record[theirs] for record in peer.values()])
        np.testing.assert_allclose(figures[f"ranking/{name}"], expected, rtol=1e-6, err_msg=name)
    assert metrics["ranking/catalogue"].count == len(peer)


def test_scores_are_full_float32_products_on_accelerators_too():
    program = jax.make_jaxpr(catalogue_metrics)(
        jnp.ones((2, 3)), jnp.ones((4, 3)), make_targets(np.zeros((2, 2), np.int32)), jnp.ones(2, bool)
    )

    assert str(program).count("dot_general") == 1
    assert "precision=(Precision.HIGHEST, Precision.HIGHEST)" in str(program)


def test_no_record_with_relevant_items_leaves_the_figures_undefined():
    metrics = catalogue_metrics(
        jnp.ones((2, 3)), jnp.ones((4, 3)), make_targets(np.full((2, 2), -1, np.int32)), jnp.ones(2, bool)
    )

    assert all(np.isnan(value) for value in compute_all(metrics).values())
