"""Re-ranking: MMR and caps as loops do them, affect that weighs what it knows, answers that explain themselves."""

import dataclasses
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmei_jax.compilations import CompilationCounter
from mmei_jax.recommendation.catalogue_files import ORIGINS
from mmei_jax.recommendation.explanations import recommend
from mmei_jax.recommendation.reranking import (
    CAPS,
    AffectState,
    Candidates,
    RerankConfig,
    affect_certainty,
    rerank,
)
from mmei_jax.recommendation.search import FoundItems
from mmei_jax.reports.calibration import best_temperature
from mmei_jax.types import InputError

NUM_QUERIES, NUM_CANDIDATES, K, DIM = 8, 9, 5, 3
NUM_ITEMS, EMOTIONS, INTENTS = 50, ("joy", "fear", "anger"), ("learn", "relax")


def make_candidates(seed=0, num_candidates=NUM_CANDIDATES, num_creators=4):
    random = np.random.default_rng(seed)
    shape = (NUM_QUERIES, num_candidates)
    item = np.stack([random.permutation(NUM_ITEMS)[:num_candidates] for _ in range(NUM_QUERIES)]).astype(np.int32)
    # A query with filler, as a search gives where it found fewer.
    item[1, -2:] = -1
    affect = random.normal(2.0, 3.0, shape).astype(np.float32)
    affect[1, -2:] = -np.inf
    return Candidates(
        item=item,
        affect=affect,
        affect_free=random.exponential(50.0, shape).astype(np.float32),
        embedding=random.normal(size=(*shape, DIM)).astype(np.float32),
        creator=random.integers(-1, num_creators, shape).astype(np.int32),
        is_ai_generated=random.uniform(size=shape) < 0.6,
    )


def make_state(seed=0, scale=1.0):
    random = np.random.default_rng(seed + 1)
    return AffectState(
        emotion=(scale * random.normal(size=(NUM_QUERIES, len(EMOTIONS)))).astype(np.float32),
        intent=(scale * random.normal(size=(NUM_QUERIES, len(INTENTS)))).astype(np.float32),
        modality_weights=random.dirichlet(np.ones(3), NUM_QUERIES).astype(np.float32),
    )


def as_found(candidates):
    """Candidates as a search gives them: names where there are numbers."""
    creators = [None if creator < 0 else f"creator{creator}" for creator in candidates.creator.ravel()]
    return FoundItems(
        row=candidates.item,
        score=candidates.affect,
        embedding=candidates.embedding,
        id=np.char.add("item", candidates.item.astype(str)).astype(object),
        kind=np.full(candidates.item.shape, "music", object),
        title=np.char.add("Song ", candidates.item.astype(str)).astype(object),
        creator=np.array(creators, object).reshape(candidates.item.shape),
        origin=np.array(ORIGINS, object)[candidates.is_ai_generated.astype(int)],
    )


def answer(candidates, state, config, k=K, **options):
    names = {"emotions": EMOTIONS, "intents": INTENTS} | options
    return recommend(as_found(candidates), candidates.affect_free, state, k=k, config=config, **names)


def run(candidates, state, config, k=K, **options):
    device = jax.tree.map(jnp.asarray, (candidates, state))
    return jax.device_get(rerank(*device, config.limits(k), k=k, **options))


def standardise(scores):
    scores = scores.astype(np.float64)
    return (scores - scores.mean()) / scores.std() if scores.std() else np.zeros(len(scores))


def entropy(logits, temperature):
    exponentials = np.exp((logits - logits.max()) / temperature)
    probability = exponentials / exponentials.sum()
    return -(probability * np.log(probability)).sum()


def largest_answer(creator, is_ai, config, k, placed=()):
    """Every set of at most k candidates that has those placed; the size of the largest that the caps allow."""

    def is_allowed(chosen):
        known = [creator[place] for place in chosen if creator[place] >= 0]
        most = config.most_per_creator or len(creator)
        ai = sum(bool(is_ai[place]) for place in chosen)
        return (
            max((known.count(one) for one in known), default=0) <= most
            and ai <= math.floor(config.most_ai_generated_share * len(chosen) + 1e-9)
            and len(chosen) - ai <= math.floor(config.most_human_share * len(chosen) + 1e-9)
        )

    for size in range(min(k, len(creator)), 0, -1):
        for chosen in itertools.combinations(range(len(creator)), size):
            if set(placed) <= set(chosen) and is_allowed(chosen):
                return size
    return 0


def loop(candidates, state, config, query, k):
    """One query by plain loops in float64: places, scores and what was passed over."""
    keep = np.flatnonzero(candidates.item[query] >= 0)
    affect, free = standardise(candidates.affect[query, keep]), standardise(candidates.affect_free[query, keep])
    found = entropy(state.emotion[query].astype(np.float64), config.emotion_temperature)
    found += entropy(state.intent[query].astype(np.float64), config.intent_temperature)
    certainty = 1.0 - found / (math.log(len(EMOTIONS)) + math.log(len(INTENTS)))
    weight = max(config.least_affect_weight, certainty) if free.any() else 1.0
    relevance = weight * affect + (1.0 - weight) * free
    embedding = candidates.embedding[query, keep].astype(np.float64)
    direction = embedding / np.linalg.norm(embedding, axis=1, keepdims=True)
    creator, is_ai = candidates.creator[query, keep], candidates.is_ai_generated[query, keep]
    is_capped = config.most_per_creator or config.most_ai_generated_share < 1.0 or config.most_human_share < 1.0
    number = largest_answer(creator, is_ai, config, k) if is_capped else min(k, len(keep))
    placed, scores, passed = [], [], []
    for _ in range(number):
        own = {}
        for place in set(range(len(keep))) - set(placed):
            near = max((direction[place] @ direction[other] for other in placed), default=0.0)
            own[place] = config.relevance_weight * relevance[place] - (1.0 - config.relevance_weight) * near
        order = sorted(own, key=lambda place: -own[place])
        best = order[0]
        if is_capped:
            order = (one for one in order if largest_answer(creator, is_ai, config, number, [*placed, one]) == number)
        chosen = next(iter(order))
        placed.append(chosen)
        scores.append(own[chosen])
        passed.append(-1 if best == chosen else keep[best])
    return keep[placed], np.array(scores), np.array(passed), weight


CAPPED = (
    RerankConfig(most_per_creator=1),
    RerankConfig(most_per_creator=2, most_ai_generated_share=0.4),
    RerankConfig(relevance_weight=0.3, most_human_share=0.2),
    RerankConfig(most_per_creator=1, most_ai_generated_share=0.5, most_human_share=0.5),
    RerankConfig(most_ai_generated_share=0.0),
)


def check_against_loop(candidates, state, config, k):
    found = run(candidates, state, config, k)
    for query in range(NUM_QUERIES):
        places, scores, passed, weight = loop(candidates, state, config, query, k)
        number = len(places)
        assert found.num_answered[query] == number
        assert found.place[query, :number].tolist() == places.tolist()
        assert found.in_place_of[query, :number].tolist() == passed.tolist()
        np.testing.assert_allclose(found.score[query, :number], scores, atol=2e-5)
        np.testing.assert_allclose(found.affect_weight[query], weight, atol=1e-5)
        parts = found.affect[query] + found.affect_free[query] + found.diversity[query]
        np.testing.assert_allclose(parts, found.score[query], atol=1e-6)
        assert (found.place[query, number:] == -1).all()
        assert not found.score[query, number:].any()
        assert ((found.cap[query] > 0) == (found.in_place_of[query] >= 0)).all()
    return found


@pytest.mark.parametrize("relevance_weight", [0.0, 0.5, 0.8, 1.0])
def test_answers_are_those_of_a_loop_of_maximal_marginal_relevance(relevance_weight):
    config = RerankConfig(relevance_weight=relevance_weight, emotion_temperature=0.5, intent_temperature=2.0)
    found = check_against_loop(make_candidates(num_candidates=40), make_state(), config, 12)
    assert (found.cap == 0).all()
    # Diversity is the only thing that moves relevant items.
    is_sorted = (np.diff(found.affect + found.affect_free, axis=1) <= 1e-6).all()
    assert is_sorted == (relevance_weight in (0.0, 1.0))


@pytest.mark.parametrize("config", CAPPED, ids=range(len(CAPPED)))
@pytest.mark.parametrize("seed", range(3))
def test_caps_hold_and_as_many_items_are_answered_as_they_allow(config, seed):
    candidates = make_candidates(seed)
    found = check_against_loop(candidates, make_state(seed), config, K)
    for query, number in enumerate(found.num_answered):
        chosen = found.place[query, :number]
        ai = candidates.is_ai_generated[query, chosen].sum()
        creators = candidates.creator[query, chosen]
        counts = np.bincount(creators[creators >= 0], minlength=1)
        assert counts.max() <= (config.most_per_creator or K)
        assert ai <= config.most_ai_generated_share * number + 1e-6
        assert number - ai <= config.most_human_share * number + 1e-6


def single(**changes):
    """The same for every query: a creator's AI item is the best, her human one and another's AI item follow."""
    values = {
        "item": [7, 8, 9],
        "affect": [3.0, 2.0, 1.0],
        "affect_free": [0.0, 0.0, 0.0],
        "embedding": np.eye(3),
        "creator": [5, 5, 6],
        "is_ai_generated": [True, False, True],
    } | changes
    dtypes = {"item": np.int32, "creator": np.int32, "is_ai_generated": bool}
    return Candidates(
        **{
            name: np.repeat(np.asarray(value, dtypes.get(name, np.float32))[None], NUM_QUERIES, axis=0)
            for name, value in values.items()
        }
    )


def test_an_item_that_would_leave_places_empty_is_passed_over():
    config = RerankConfig(relevance_weight=1.0, most_per_creator=1, most_ai_generated_share=0.5)
    found = run(single(), make_state(), config, 2)
    # Not the best one, of AI, after which neither its creator's other item nor another of AI could follow.
    assert found.place[0].tolist() == [1, 2]
    assert found.in_place_of[0].tolist() == [0, 0]
    assert [CAPS[cap] for cap in found.cap[0]] == ["later_places", "creator"]


def test_what_no_cap_allows_is_answered_with_fewer_items_and_says_so():
    config = RerankConfig(relevance_weight=1.0, most_human_share=0.5)
    two_human, uncapped = single(is_ai_generated=[False, False, True]), RerankConfig(relevance_weight=1.0)
    everything = answer(two_human, make_state(), uncapped, k=3)[0]
    assert [item.id for item in everything.items] == ["item7", "item8", "item9"]
    assert everything.shortfall is None
    some = answer(two_human, make_state(), config, k=3)[0]
    # One of two, and no third: of three items two would be human.
    assert [item.id for item in some.items] == ["item7", "item9"]
    assert [(item.cap, item.in_place_of) for item in some.items] == [(None, None), ("human", "item8")]
    assert some.shortfall == "caps"
    none = answer(single(is_ai_generated=[False] * 3), make_state(), config, k=3)[0]
    assert none.items == ()
    assert none.shortfall == "caps"
    few = answer(single(item=[7, -1, 9]), make_state(), uncapped, k=3)[0]
    assert [item.id for item in few.items] == ["item7", "item9"]
    assert few.shortfall == "candidates"


def test_affect_weighs_all_where_it_is_sure_and_the_least_where_it_knows_nothing():
    candidates, config = make_candidates(), RerankConfig(relevance_weight=1.0, least_affect_weight=0.25)
    sure = dataclasses.replace(make_state(), emotion=1e4 * np.eye(3, dtype=np.float32)[[0] * NUM_QUERIES])
    sure = dataclasses.replace(sure, intent=1e4 * np.eye(2, dtype=np.float32)[[1] * NUM_QUERIES])
    found = run(candidates, sure, config)
    assert (found.affect_weight == 1.0).all()
    assert not found.affect_free.any()
    by_affect = np.argsort(-candidates.affect, axis=1)[:, :K]
    np.testing.assert_array_equal(found.place, by_affect)
    blind = dataclasses.replace(make_state(), emotion=np.zeros((NUM_QUERIES, 3), np.float32))
    blind = dataclasses.replace(blind, intent=np.full((NUM_QUERIES, 2), 3.0, np.float32))
    np.testing.assert_allclose(run(candidates, blind, config).affect_weight, 0.25)
    nothing = run(candidates, blind, dataclasses.replace(config, least_affect_weight=0.0))
    np.testing.assert_allclose(nothing.affect_weight, 0.0, atol=1e-6)
    by_popularity = np.argsort(np.where(candidates.item >= 0, -candidates.affect_free, np.inf), axis=1)[:, :K]
    np.testing.assert_array_equal(nothing.place, by_popularity)


def test_a_higher_temperature_makes_affect_weigh_less():
    config = RerankConfig(least_affect_weight=0.0)
    weights = [
        run(make_candidates(), make_state(), dataclasses.replace(config, emotion_temperature=each)).affect_weight
        for each in (0.5, 1.0, 2.0)
    ]
    assert (np.diff(weights, axis=0) < 0.0).all()


def test_users_of_whom_nothing_else_is_known_have_affect_alone():
    candidates = make_candidates()
    candidates.affect_free[2] = 0.1
    found = run(candidates, make_state(), RerankConfig(least_affect_weight=0.0))
    assert found.affect_weight[2] == 1.0
    assert (np.delete(found.affect_weight, 2) < 1.0).all()


def test_certainty_of_several_emotions_at_once_is_that_of_their_binary_entropies():
    probability = np.array([[0.5, 0.5], [1.0, 0.0], [0.9, 0.5]], np.float32)
    found = affect_certainty(jnp.asarray(probability), None, emotion_kind="sigmoid")
    expected = 1.0 - (-(0.9 * np.log(0.9) + 0.1 * np.log(0.1)) + np.log(2.0)) / (2.0 * np.log(2.0))
    np.testing.assert_allclose(found, [0.0, 1.0, expected], atol=1e-6)
    with pytest.raises(InputError, match="without probabilities of emotions or intents"):
        affect_certainty(None, None)


def test_one_program_serves_all_values():
    run(make_candidates(), make_state(), RerankConfig())
    counter = CompilationCounter()
    for seed, config in enumerate(CAPPED):
        run(make_candidates(seed), make_state(seed), config)
    counter.close()
    assert counter.count == 0


def test_temperatures_are_fitted_to_validation_records():
    random = np.random.default_rng(0)
    emotion, intent = random.integers(0, 3, 200), random.integers(0, 2, 200)
    emotion_logits = 4.0 * (np.eye(3)[emotion] + random.normal(size=(200, 3)))
    intent_logits = 0.3 * (np.eye(2)[intent] + 0.3 * random.normal(size=(200, 2)))
    config = RerankConfig(relevance_weight=0.4).calibrated((emotion_logits, emotion), (intent_logits, intent))
    assert config.relevance_weight == 0.4
    assert config.emotion_temperature == best_temperature(emotion_logits, emotion) > 1.0
    assert config.intent_temperature == best_temperature(intent_logits, intent) < 1.0
    # Logarithms of probabilities do as well, and what is not there stays as it was.
    log_probability = emotion_logits - np.log(np.exp(emotion_logits).sum(axis=1, keepdims=True))
    alone = RerankConfig(intent_temperature=3.0).calibrated((log_probability, emotion), None)
    assert (alone.emotion_temperature, alone.intent_temperature) == (config.emotion_temperature, 3.0)


def test_one_temperature_is_fitted_to_several_emotions_at_once():
    """Logits that are twice those of the classes, which happen independently."""
    random = np.random.default_rng(0)
    logits = 2.0 * random.normal(size=(4_000, 3))
    is_there = random.uniform(size=logits.shape) < 1.0 / (1.0 + np.exp(-logits))
    config = RerankConfig().calibrated((2.0 * logits, is_there.astype(np.float32)), None, emotion_kind="sigmoid")
    assert config.emotion_temperature == pytest.approx(2.0, rel=0.06)
    assert config.intent_temperature == 1.0


def test_an_answer_explains_itself():
    config = RerankConfig(most_per_creator=1, emotion_temperature=2.0)
    candidates, state = make_candidates(), make_state()
    answers, found = answer(candidates, state, config), run(candidates, state, config)
    assert len(answers) == NUM_QUERIES
    for query, own in enumerate(answers):
        told = json.loads(json.dumps(own.to_json(), allow_nan=False))
        assert [item["rank"] for item in told["recommended"]] == list(range(1, found.num_answered[query] + 1))
        for item, place in zip(told["recommended"], found.place[query], strict=False):
            assert item["id"] == f"item{candidates.item[query, place]}"
            assert item["title"] == f"Song {candidates.item[query, place]}"
            assert item["kind"] == "music"
            assert item["search_rank"] == place + 1
            assert item["affect_score"] == pytest.approx(candidates.affect[query, place])
            assert sum(item["parts"].values()) == pytest.approx(item["score"], abs=1e-5)
            assert (item["cap"] is None) == (item["in_place_of"] is None)
        logits = state.emotion[query] / 2.0
        expected = np.exp(logits) / np.exp(logits).sum()
        np.testing.assert_allclose(list(told["emotion"]["probabilities"].values()), expected, rtol=1e-5)
        assert told["emotion"]["choice"] == EMOTIONS[int(np.argmax(logits))]
        assert tuple(told["intent"]["probabilities"]) == INTENTS
        np.testing.assert_allclose(list(told["modality_weights"].values()), state.modality_weights[query], rtol=1e-6)
        assert told["affect_weight"] == pytest.approx(float(found.affect_weight[query]))
    assert {item.cap for own in answers for item in own.items} > {None}
    several = answer(candidates, state, config, emotion_kind="sigmoid")[0]
    likely = [name for name, logit in zip(EMOTIONS, state.emotion[0], strict=True) if logit > 0]
    assert several.emotion["choice"] == likely
    without = answer(candidates, dataclasses.replace(state, emotion=None), config, emotions=())[0]
    assert without.emotion is None
    assert without.intent is not None


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"relevance_weight": 1.5}, "rerank.relevance_weight = 1.5: expected from 0 to 1"),
        ({"least_affect_weight": math.nan}, "rerank.least_affect_weight = nan"),
        ({"most_per_creator": 0}, "rerank.most_per_creator = 0: expected a whole number"),
        ({"most_per_creator": True}, "rerank.most_per_creator = True"),
        ({"intent_temperature": 0.0}, "rerank.intent_temperature = 0.0: expected a positive number"),
        ({"most_ai_generated_share": 0.5, "most_human_share": 0.4}, "most_human_share = 0.9: expected at least 1"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(changes, told):
    with pytest.raises(InputError, match=told):
        RerankConfig(**changes)


def test_what_does_not_fit_together_is_refused():
    candidates, state, config = make_candidates(), make_state(), RerankConfig()
    unknown = dataclasses.replace(candidates, affect_free=candidates.affect_free.copy())
    unknown.affect_free[2, 3] = np.nan
    row = candidates.item[2, 3]
    with pytest.raises(InputError, match=f"affect_free of query 2, item item{row}: nan: expected a finite number"):
        answer(unknown, state, config)
    with pytest.raises(InputError, match=r"affect_free of shape \(8, 8\): expected \(8, 9\)"):
        recommend(as_found(candidates), candidates.affect_free[:, 1:], state, k=K, config=config)
    with pytest.raises(InputError, match=r"state.emotion of shape \(8, 3\): expected \(8, 2\)"):
        answer(candidates, state, config, emotions=("joy", "fear"))
    with pytest.raises(InputError, match="k = 0: expected at least 1"):
        answer(candidates, state, config, k=0)
    nameless = dataclasses.replace(as_found(candidates), origin=np.full(candidates.item.shape, None, object))
    options = {"k": K, "emotions": EMOTIONS, "intents": INTENTS}
    with pytest.raises(InputError, match="None: expected one of human, ai_generated, because their shares are limited"):
        recommend(nameless, candidates.affect_free, state, config=RerankConfig(most_human_share=0.5), **options)
    assert len(recommend(nameless, candidates.affect_free, state, config=config, **options)) == NUM_QUERIES
