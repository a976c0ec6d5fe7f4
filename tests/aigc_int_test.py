"""AIGC-INT-Sim: the causal model, its exact posterior, its feedback, and the data set that is written."""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest

from mmei_jax import records
from mmei_jax.simulation import (
    aigc_int,
    aigc_int_calibration,
    aigc_int_dataset,
    aigc_int_feedback,
    aigc_int_figures,
    aigc_int_posterior,
    aigc_int_report,
)
from mmei_jax.types import MODALITIES, InputError

QUICK_RECORDS = 40_000


@pytest.fixture(scope="module")
def latents() -> aigc_int.Latents:
    """The latents of 40,000 records, end to end."""
    parts = [aigc_int.draw_latents(7, chunk) for chunk in range(QUICK_RECORDS // aigc_int.CHUNK_RECORDS)]
    names = aigc_int.Latents.__dataclass_fields__
    return aigc_int.Latents(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


@pytest.fixture(scope="module")
def measured() -> tuple[aigc_int_report.ReferenceTotals, dict[str, aigc_int_figures.CalibrationTotals]]:
    return aigc_int_report.measure(seed=11, num_records=QUICK_RECORDS, dim=16)


def share(is_true: np.ndarray) -> float:
    return float(np.mean(is_true))


def allowed_error(probability: float, num: int) -> float:
    """Four standard errors of a share."""
    return 4.0 * math.sqrt(probability * (1.0 - probability) / num)


# --- The posterior -------------------------------------------------------------------------------------------------


def likelihood_tables(tokens: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """p(tokens | k, z, i) of one record over that of pure noise, in float64, from whole token vectors."""
    num_emotions, num_intents = len(aigc_int.EMOTIONS), len(aigc_int.INTENTS)
    likelihood = {}
    for name in MODALITIES:
        rows = aigc_int.basis(name, tokens[name].shape[1])
        table = np.ones((3, num_emotions, num_intents))
        for k in range(3):
            for z in range(num_emotions):
                shown = rows[aigc_int.DISPLAY_CLASS[name][k][z]]
                for i in range(num_intents):
                    mean = aigc_int.AMPLITUDE[name] * (shown + 0.5 * rows[7 + k] + 0.3 * rows[10 + i])
                    for token in tokens[name].astype(np.float64):
                        ratio = math.exp(0.5 * float(token @ token) - 0.5 * float((token - mean) @ (token - mean)))
                        table[k, z, i] *= 0.2 + 0.8 * ratio
        likelihood[name] = table
    return likelihood


def enumerate_joint(likelihood: dict[str, np.ndarray], subset: tuple[str, ...]) -> np.ndarray:
    """p(e, i | tokens) of one record by walking through the generative story, every latent explicit.

    Nothing is shared with the module under test but its constants.
    """
    num_emotions, num_intents = len(aigc_int.EMOTIONS), len(aigc_int.INTENTS)
    given_shown = np.zeros((num_emotions, num_intents))
    for s in range(num_emotions):
        for k, p_manner in enumerate((0.5, 0.3, 0.2)):
            for conflict in (None, *MODALITIES):
                for z in [z for z in range(num_emotions) if z != s] if conflict else [s]:
                    p_conflict = 0.2 / 3 / 6 if conflict else 0.8
                    for i in range(num_intents):
                        p_tokens = 1.0
                        for name in subset:
                            p_tokens *= likelihood[name][k, z if name == conflict else s, i]
                        given_shown[s, i] += p_manner * p_conflict * p_tokens
    joint = np.zeros((num_emotions, num_intents))
    for e, p_emotion in enumerate((0.24, 0.18, 0.16, 0.14, 0.11, 0.09, 0.08)):
        for i in range(num_intents):
            p_intent = 0.7 if i == aigc_int.FAVOURITE_INTENT[e] else 0.1
            for s in range(num_emotions):
                p_shown = 0.95 if s == e else 0.05 / 6
                joint[e, i] += p_emotion * p_intent * p_shown * given_shown[s, i]
    return joint / joint.sum()


def test_posterior_equals_enumeration_of_the_story_for_every_subset() -> None:
    chunk = next(aigc_int.stream(3, 100, 16))
    evidences = {name: aigc_int_posterior.evidence(chunk.tokens[name], name) for name in MODALITIES}
    ends = {name: np.cumsum(np.maximum(chunk.tokens[name].lengths, 0)) for name in MODALITIES}
    exact = {
        subset: np.exp(aigc_int_posterior.log_posterior(evidences, subset)) for subset in aigc_int_posterior.SUBSETS
    }
    assert len(exact) == 7
    assert not chunk.latents.is_present().all()
    for record in range(100):
        tokens = {}
        for name in MODALITIES:
            length = max(int(chunk.tokens[name].lengths[record]), 0)
            tokens[name] = chunk.tokens[name].values[ends[name][record] - length : ends[name][record]]
        likelihood = likelihood_tables(tokens)
        for subset, posterior in exact.items():
            np.testing.assert_allclose(posterior[record], enumerate_joint(likelihood, subset), rtol=1e-6, atol=0.0)


def test_posterior_of_a_record_without_any_modality_is_the_prior() -> None:
    tokens = aigc_int.Tokens(np.zeros((0, 20), np.float32), np.array([-1, -1]))
    evidences = {name: aigc_int_posterior.evidence(tokens, name) for name in MODALITIES}
    posterior = np.exp(aigc_int_posterior.log_posterior(evidences))
    np.testing.assert_allclose(posterior, np.broadcast_to(aigc_int_posterior.prior(), posterior.shape), atol=1e-12)


def test_posterior_stays_finite_for_tokens_far_outside_the_simulation() -> None:
    rows = aigc_int.basis("text", 20)
    values = np.stack([3000.0 * rows[0], -3000.0 * rows[1], 3000.0 * rows[2]]).astype(np.float32)
    evidences = {"text": aigc_int_posterior.evidence(aigc_int.Tokens(values, np.array([1, 2])), "text")}
    posterior = aigc_int_posterior.log_posterior(evidences, ("text",))
    assert np.isfinite(posterior).all()
    np.testing.assert_allclose(np.exp(posterior).sum(axis=(1, 2)), 1.0, atol=1e-9)


def test_product_of_unimodal_posteriors_counts_the_prior_once() -> None:
    log_prior = np.log(aigc_int.EMOTION_PRIOR)
    unread = np.broadcast_to(log_prior, (2, 7))
    read = np.log(np.full((2, 7), 0.05) + 0.65 * np.eye(7)[[1, 4]])
    fused = aigc_int_posterior.product_of_unimodal([unread, read, unread], log_prior)
    np.testing.assert_allclose(fused, read, atol=1e-12)


# --- The causal model ----------------------------------------------------------------------------------------------


def test_manners_are_derangements_and_disjoint() -> None:
    emotions = np.arange(7)
    deranged = [aigc_int.DISPLAY_CLASS[name][k] for name in MODALITIES for k in (1, 2)]
    for name in MODALITIES:
        np.testing.assert_array_equal(aigc_int.DISPLAY_CLASS[name][0], emotions)
    for index, mapping in enumerate(deranged):
        np.testing.assert_array_equal(np.sort(mapping), emotions)
        assert (mapping != emotions).all()
        for other in deranged[:index]:
            assert (mapping != other).all()


def test_basis_rows_are_orthonormal_and_differ_between_modalities() -> None:
    for name in MODALITIES:
        for dim in (14, 32, 768):
            rows = aigc_int.basis(name, dim)
            np.testing.assert_allclose(rows @ rows.T, np.eye(14), atol=1e-12)
    assert np.abs(aigc_int.basis("text", 32) - aigc_int.basis("vision", 32)).max() > 0.1
    with pytest.raises(InputError, match="dim = 13"):
        aigc_int.basis("text", 13)


def test_intent_table_is_a_distribution_whose_mean_is_the_favourite_table() -> None:
    table = aigc_int.intent_table()
    assert table.shape == (4, 4, 7, 4)
    assert table.min() > 0.0
    np.testing.assert_allclose(table.sum(axis=-1), 1.0, atol=1e-12)
    mean = np.einsum("t,c,tcei->ei", aigc_int.USER_TYPE_PRIOR, aigc_int.KIND_PRIOR, table)
    expected = np.full((7, 4), 0.1)
    expected[np.arange(7), aigc_int.FAVOURITE_INTENT] = 0.7
    np.testing.assert_allclose(mean, expected, atol=1e-12)
    np.testing.assert_allclose(aigc_int_posterior.prior(), aigc_int.EMOTION_PRIOR[:, None] * expected, atol=1e-12)
    # Kind and user type do matter.
    assert np.ptp(table, axis=0).max() > 0.15
    assert np.ptp(table, axis=1).max() > 0.05


def test_latents_follow_their_priors(latents: aigc_int.Latents) -> None:
    num = len(latents.emotion)
    shares = [
        *((share(latents.emotion == e), p) for e, p in enumerate((0.24, 0.18, 0.16, 0.14, 0.11, 0.09, 0.08))),
        *((share(latents.manner == k), p) for k, p in enumerate((0.5, 0.3, 0.2))),
        *((share(latents.kind == c), p) for c, p in enumerate((0.35, 0.35, 0.15, 0.15))),
        *((share(latents.conflict_modality == m), 0.2 / 3) for m in range(3)),
        (share(latents.shown_emotion != latents.emotion), 0.05),
        (share(latents.intent == aigc_int.FAVOURITE_INTENT[latents.emotion]), 0.7),
    ]
    for found, probability in shares:
        assert abs(found - probability) < allowed_error(probability, num), (found, probability)


def test_intents_follow_the_table_of_kind_and_user_type(latents: aigc_int.Latents) -> None:
    table = aigc_int.intent_table()[latents.user_type, latents.kind, latents.emotion]
    for intent in range(4):
        for user_type in range(4):
            rows = latents.user_type == user_type
            expected = table[rows, intent].mean()
            assert abs(share(latents.intent[rows] == intent) - expected) < allowed_error(expected, rows.sum())


def test_only_the_conflicting_modality_displays_another_emotion(latents: aigc_int.Latents) -> None:
    differs = latents.displayed_emotion != latents.shown_emotion[:, None]
    np.testing.assert_array_equal(differs, latents.conflict_modality[:, None] == np.arange(3))
    # Each of the six others equally often, for conflicts and for mislabelled records.
    shift = (latents.displayed_emotion.sum(axis=1) - 3 * latents.shown_emotion)[latents.conflict_modality >= 0] % 7
    for step in range(1, 7):
        assert abs(share(shift == step) - 1 / 6) < allowed_error(1 / 6, len(shift))
    moved = (latents.shown_emotion - latents.emotion)[latents.shown_emotion != latents.emotion] % 7
    for step in range(1, 7):
        assert abs(share(moved == step) - 1 / 6) < allowed_error(1 / 6, len(moved))


@pytest.mark.parametrize(("name", "rate", "mean", "longest"), [
    ("text", 0.02, 8, 32), ("vision", 0.08, 8, 16), ("audio", 0.05, 12, 50),
])  # fmt: skip
def test_absence_and_lengths(latents: aigc_int.Latents, name: str, rate: float, mean: int, longest: int) -> None:
    lengths = latents.num_tokens[:, MODALITIES.index(name)]
    is_present = latents.is_present()[:, MODALITIES.index(name)]
    assert abs(share(~is_present) - rate) < allowed_error(rate, len(lengths))
    assert set(lengths[~is_present]) == {-1}
    assert lengths[is_present].min() >= 1
    assert lengths[is_present].max() <= longest
    assert abs(lengths[is_present].mean() - mean) < 0.07
    probabilities = aigc_int.length_probabilities(name)
    assert len(probabilities) == longest
    assert abs(probabilities.sum() - 1.0) < 1e-12
    for length in (mean - 3, mean, mean + 3):
        poisson = math.exp(-mean) * mean**length / math.factorial(length)
        assert abs(share(lengths[is_present] == length) - poisson) < allowed_error(poisson, is_present.sum())


def test_absence_is_independent_of_what_is_shown(latents: aigc_int.Latents) -> None:
    is_present = latents.is_present()
    both = share(~is_present[:, 0] & ~is_present[:, 1])
    assert abs(both - 0.08 * 0.05) < allowed_error(0.08 * 0.05, len(is_present))
    for emotion in range(7):
        rows = latents.emotion == emotion
        assert abs(share(~is_present[rows, 0]) - 0.08) < allowed_error(0.08, rows.sum())


def test_tokens_have_the_stated_moments() -> None:
    """E[token] = 0.8 * mean of its class; and with everything else given, unit noise in every other direction."""
    latents = aigc_int.draw_latents(5, 0)
    tokens = aigc_int.draw_tokens(5, 0, latents, "audio", 20)
    record = np.repeat(np.arange(1000), np.maximum(tokens.lengths, 0))
    coordinates = tokens.values.astype(np.float64) @ aigc_int.basis("audio", 20).T
    column = MODALITIES.index("audio")
    shown = aigc_int.DISPLAY_CLASS["audio"][latents.manner, latents.displayed_emotion[:, column]][record]
    weights = {
        "shown": (shown, 1.0),
        "manner": (7 + latents.manner[record], 0.5),
        "intent": (10 + latents.intent[record], 0.3),
    }
    for direction, weight in weights.values():
        found = coordinates[np.arange(len(record)), direction].mean()
        assert abs(found - 0.8 * weight * aigc_int.AMPLITUDE["audio"]) < 0.05
    residual = tokens.values - coordinates @ aigc_int.basis("audio", 20)
    assert abs((residual**2).sum(axis=1).mean() - 6.0) < 0.12


# --- Streaming and seeds -------------------------------------------------------------------------------------------


def test_a_record_does_not_depend_on_how_many_are_made() -> None:
    few = list(aigc_int.stream(9, 1010, 14))
    many = list(aigc_int.stream(9, 2500, 14))
    assert [len(chunk.latents.emotion) for chunk in few] == [1000, 10]
    assert [len(chunk.latents.emotion) for chunk in many] == [1000, 1000, 500]
    np.testing.assert_array_equal(few[1].latents.emotion, many[1].latents.emotion[:10])
    np.testing.assert_array_equal(few[1].latents.user, many[1].latents.user[:10])
    for name in MODALITIES:
        part = few[1].tokens[name]
        np.testing.assert_array_equal(part.values, many[1].tokens[name].values[: len(part.values)])
        assert len(part.values) == np.maximum(part.lengths, 0).sum()


def test_streaming_in_parts_gives_the_same_totals() -> None:
    whole = aigc_int_report.ReferenceTotals()
    parts = aigc_int_report.ReferenceTotals()
    for chunk in aigc_int.stream(2, 3000, 14):
        whole.add(aigc_int_report.predict(chunk), np.ones(1000, bool))
    for first in (2, 0, 1):
        for chunk in aigc_int.stream(2, 1000, 14, first_chunk=first):
            predictions = aigc_int_report.predict(chunk)
            is_early = np.arange(1000) < 300
            parts.add(predictions, is_early)
            parts.add(predictions, ~is_early)
    expected, found = whole.named_figures(), parts.named_figures()
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-12), name


def test_seeds_differ_and_streams_are_independent() -> None:
    assert (aigc_int.draw_latents(0, 0).emotion != aigc_int.draw_latents(1, 0).emotion).any()
    assert (aigc_int.draw_latents(0, 0).emotion != aigc_int.draw_latents(0, 1).emotion).any()
    one = aigc_int.make_generator(0, "vision", 0).random(1000)
    other = aigc_int.make_generator(0, "audio", 0).random(1000)
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.15
    assert aigc_int.draw_latents(0, 0).user.max() < aigc_int.draw_latents(0, 1).user.min()


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(InputError, match="seed = "):
        next(aigc_int.stream(seed, 10, 14))


# --- Calibration and ceilings --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODALITIES)
def test_unimodal_accuracy_is_table_1_within_sampling_error(name: str) -> None:
    target = {"text": 0.812, "vision": 0.778, "audio": 0.743}[name]
    assert aigc_int_calibration.UNIMODAL_ACCURACY[name] == target
    found = aigc_int_calibration.measure_unimodal_accuracy(name, QUICK_RECORDS, seed=23)
    assert abs(found.measured - target) < allowed_error(target, QUICK_RECORDS)
    # The mean probability of the chosen emotion estimates the same, more sharply.
    assert abs(found.expected - target) < 0.5 * allowed_error(target, QUICK_RECORDS)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODALITIES)
def test_unimodal_accuracy_is_table_1_to_a_thousandth(name: str) -> None:
    found = aigc_int_calibration.measure_unimodal_accuracy(name, 1_000_000, seed=29)
    assert abs(found.expected - aigc_int_calibration.UNIMODAL_ACCURACY[name]) < 0.001
    assert abs(found.measured - aigc_int_calibration.UNIMODAL_ACCURACY[name]) < 0.0015


def test_accuracy_does_not_depend_on_the_dimension() -> None:
    found = [
        aigc_int_calibration.measure_unimodal_accuracy("text", 5000, seed=31, dim=dim).expected for dim in (14, 96)
    ]
    assert abs(found[0] - found[1]) < 0.015


def test_calibration_recovers_the_frozen_amplitude() -> None:
    found = aigc_int_calibration.calibrate("text", 20_000, seed=37)
    assert abs(found - aigc_int.AMPLITUDE["text"]) < 0.08


def test_bisection_finds_the_root_and_refuses_a_target_out_of_reach() -> None:
    assert aigc_int_calibration.bisect(lambda x: x**3, 8.0, 0.5, 4.0, 1e-6) == pytest.approx(2.0, abs=1e-6)
    with pytest.raises(InputError, match="target 100"):
        aigc_int_calibration.bisect(lambda x: x**3, 100.0, 0.5, 4.0, 1e-6)


# What a prototype of the same model measured on 40,000 records; accuracies in %.
PROTOTYPE = [
    ("emotion", "", "", 93.9),
    ("emotion", "late_fusion_joint", "", 92.4),
    ("emotion", "late_fusion", "", 92.0),
    ("emotion", "", "conflict", 90.6),
    ("intent", "", "", 89.5),
    ("intent", "text", "", 76.0),
    ("intent", "vision", "", 70.8),
    ("intent", "audio", "", 66.9),
    ("joint", "", "", 84.7),
]


@pytest.mark.parametrize(("task", "predictor", "part", "expected"), PROTOTYPE)
def test_ceilings_agree_with_the_prototype(
    measured: tuple, task: str, predictor: str, part: str, expected: float
) -> None:
    assert abs(100 * measured[0].figures(task, predictor, part)["accuracy"] - expected) < 1.2


def test_ceilings_are_in_the_order_that_information_gives(measured: tuple) -> None:
    totals = measured[0]
    for task in aigc_int_report.TASKS:
        exact = totals.figures(task)
        for predictor in ("late_fusion", "late_fusion_joint", "vision+text", "audio+text", "vision+audio"):
            assert totals.figures(task, predictor)["accuracy"] < exact["accuracy"]
            assert totals.figures(task, predictor)["cross_entropy"] > exact["cross_entropy"]
        for pair in ("vision+text", "audio+text", "vision+audio"):
            for single in pair.split("+"):
                assert totals.figures(task, single)["accuracy"] < totals.figures(task, pair)["accuracy"]
    conflict, clean = (totals.figures("emotion", "", part)["accuracy"] for part in ("conflict", "no_conflict"))
    assert conflict < totals.figures("emotion")["accuracy"] < clean


def test_posterior_is_calibrated(measured: tuple) -> None:
    for task in aigc_int_report.TASKS:
        assert measured[1][task].num_records.sum() == QUICK_RECORDS
        assert measured[1][task].expected_calibration_error() < 0.012, task


@pytest.mark.slow
def test_posterior_is_calibrated_on_a_million_records() -> None:
    calibration = {task: aigc_int_figures.CalibrationTotals() for task in aigc_int_report.TASKS}
    for chunk in aigc_int.stream(41, 1_000_000, 14):
        evidences = {name: aigc_int_posterior.evidence(chunk.tokens[name], name) for name in MODALITIES}
        joint = aigc_int_posterior.log_posterior(evidences)
        for task, right in aigc_int_report.true_classes(chunk.latents).items():
            calibration[task].add(aigc_int_report.by_task(joint)[task], right)
    for task in aigc_int_report.TASKS:
        assert calibration[task].num_records.sum() == 1_000_000
        assert calibration[task].expected_calibration_error() < 0.005, task


def test_figures_equal_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(0)
    probabilities = generator.dirichlet(np.ones(6), 300)
    # Class 5 is neither true nor predicted, class 4 is predicted but never true.
    probabilities[:, 5] = 1e-9
    truth = generator.integers(0, 4, 300)
    totals = aigc_int_figures.ClassificationTotals.empty(6)
    totals.add(np.log(probabilities[:100]), truth[:100])
    totals.add(np.log(probabilities[100:]), truth[100:])
    predicted = probabilities.argmax(axis=1)
    found = totals.figures()
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(truth, predicted), abs=1e-12)
    precision, recall, _, _ = metrics.precision_recall_fscore_support(
        truth, predicted, average="macro", zero_division=0
    )
    assert found["macro_precision"] == pytest.approx(precision, abs=1e-12)
    assert found["macro_recall"] == pytest.approx(recall, abs=1e-12)
    expected = -np.log(probabilities[np.arange(300), truth]).mean()
    assert found["cross_entropy"] == pytest.approx(expected, abs=1e-12)
    assert aigc_int_figures.ClassificationTotals.empty(6).figures() == {}


def test_ranking_figures_equal_pytrec_eval() -> None:
    pytrec_eval = pytest.importorskip("pytrec_eval")
    generator = np.random.default_rng(0)
    scores = generator.standard_normal((30, 200))
    relevant = np.stack([generator.permutation(200)[:20] for _ in range(30)])
    scores[np.arange(30)[:, None], relevant] += 0.7
    totals = aigc_int_figures.RankingTotals()
    totals.add(aigc_int_figures.relevant_ranks(scores, relevant))
    truth = {str(q): {str(item): 1 for item in items} for q, items in enumerate(relevant)}
    run = {str(q): {str(item): float(score) for item, score in enumerate(row)} for q, row in enumerate(scores)}
    judged = pytrec_eval.RelevanceEvaluator(truth, {"map", "ndcg_cut.10", "success.10"}).evaluate(run)
    found = totals.figures()
    for name, theirs in {"map": "map", "ndcg@10": "ndcg_cut_10", "hr@10": "success_10"}.items():
        assert found[name] == pytest.approx(np.mean([values[theirs] for values in judged.values()]), abs=1e-9)


# --- Catalogue and feedback ----------------------------------------------------------------------------------------


def test_relevant_items_are_the_twenty_of_highest_expected_satisfaction() -> None:
    latents = aigc_int.draw_latents(3, 0)
    relevant = aigc_int_feedback.relevant_items(latents)
    world = aigc_int_feedback.item_world()
    for record in range(0, 1000, 50):
        satisfaction = []
        for item in range(aigc_int_feedback.NUM_ITEMS):
            score = (
                world.emotion_fit[item, latents.emotion[record]]
                + world.intent_fit[item, latents.intent[record]]
                + 0.7 * sum(latents.taste[record, t] * world.style[item, t] for t in range(4))
                + 0.4 * world.quality[item]
            )
            satisfaction.append(1.0 + 4.0 / (1.0 + math.exp(-score)))
        expected = sorted(range(aigc_int_feedback.NUM_ITEMS), key=lambda item: -satisfaction[item])[:20]
        assert relevant[record].tolist() == expected


def test_item_features_carry_what_satisfaction_is_made_of() -> None:
    world = aigc_int_feedback.item_world()
    causes = np.column_stack([world.emotion_fit, world.intent_fit, world.style, world.quality])
    solution, *_ = np.linalg.lstsq(world.features.astype(np.float64), causes, rcond=None)
    np.testing.assert_allclose(world.features @ solution, causes, atol=1e-5)
    assert np.bincount(world.kind).tolist() == [700, 700, 300, 300]
    texts = [json.loads(text) for text in aigc_int_feedback.item_texts()]
    assert texts[0].keys() == {"title", "tags", "creator", "origin"}
    assert {text["origin"] for text in texts} == {"ai_generated", "human"}
    assert [text["tags"][0] for text in texts] == [aigc_int.KINDS[kind] for kind in world.kind]


def test_policy_is_a_distribution_over_the_kinds_items_with_full_support() -> None:
    policy = aigc_int_feedback.policy()
    kind = aigc_int_feedback.item_world().kind
    np.testing.assert_allclose(policy.sum(axis=-1), 1.0, atol=1e-12)
    for position in range(4):
        assert (policy[:, position, kind != position] == 0.0).all()
        least = 0.1 / np.sum(kind == position)
        assert policy[:, position, kind == position].min() >= least


def test_propensities_are_the_conditional_probabilities_of_the_slate() -> None:
    latents = aigc_int.draw_latents(3, 0)
    slates = aigc_int_feedback.draw_slates(3, 0, latents)
    policy = aigc_int_feedback.policy()
    for record in range(0, 1000, 25):
        probabilities = policy[latents.user_type[record], latents.kind[record]].copy()
        for item, propensity in zip(slates.item_index[record], slates.propensity[record], strict=True):
            assert propensity == pytest.approx(probabilities[item] / probabilities.sum(), rel=1e-5)
            probabilities[item] = 0.0


def test_items_are_shown_as_often_as_their_propensities_say() -> None:
    """Whatever the order in which they were drawn: first position against the policy, second against the mean."""
    fields = aigc_int.Latents.__dataclass_fields__
    one = aigc_int.draw_latents(3, 0)
    rows = np.zeros(40_000, int) + int(np.flatnonzero((one.user_type == 0) & (one.kind == 2))[0])
    latents = aigc_int.Latents(**{name: getattr(one, name)[rows] for name in fields})
    slates = aigc_int_feedback.draw_slates(3, 0, latents)
    probabilities = aigc_int_feedback.policy()[0, 2]
    # P(second = b) = sum over a != b of p(a) p(b) / (1 - p(a)).
    odds = probabilities / (1.0 - probabilities)
    second = probabilities * (odds.sum() - odds)
    for position, expected in enumerate((probabilities, second)):
        counts = np.bincount(slates.item_index[:, position], minlength=len(probabilities))
        assert counts[expected == 0.0].sum() == 0
        support = expected > 0.0
        chi_square = ((counts - 40_000 * expected)[support] ** 2 / (40_000 * expected[support])).sum()
        freedom = support.sum() - 1
        assert abs(chi_square - freedom) < 5.0 * math.sqrt(2.0 * freedom)
    assert (np.diff(np.sort(slates.item_index, axis=1), axis=1) > 0).all()


def test_feedback_follows_position_and_satisfaction() -> None:
    parts = [(aigc_int.draw_latents(3, chunk), chunk) for chunk in range(10)]
    slates = [aigc_int_feedback.draw_slates(3, chunk, latents) for latents, chunk in parts]
    is_examined = np.concatenate([part.is_examined for part in slates])
    satisfaction = np.concatenate([part.satisfaction for part in slates])
    dwell = np.concatenate([part.dwell_seconds for part in slates])
    liked = np.concatenate([part.is_liked for part in slates])
    replays = np.concatenate([part.num_replays for part in slates])
    for position in range(8):
        rate = (1 + position) ** -0.4
        assert abs(share(is_examined[:, position]) - rate) <= allowed_error(rate, len(is_examined))
    np.testing.assert_array_equal(dwell > 0.0, is_examined)
    assert (satisfaction[~is_examined] == 1.0).all()
    assert not liked[~is_examined].any()
    assert not replays[~is_examined].any()
    assert satisfaction.min() >= 1.0
    assert satisfaction.max() <= 5.0
    expected = np.concatenate([
        aigc_int_feedback.satisfaction_from_score(
            np.take_along_axis(aigc_int_feedback.true_scores(latents), part.item_index, axis=1)
        )
        for (latents, _), part in zip(parts, slates, strict=True)
    ])  # fmt: skip
    noise = (satisfaction - expected)[is_examined & (expected > 2.5) & (expected < 3.5)]
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 0.5) < 0.02
    happy, unhappy = is_examined & (satisfaction > 4.0), is_examined & (satisfaction < 2.5)
    assert share(liked[happy]) > share(liked[unhappy]) + 0.5
    assert replays[happy].mean() > replays[unhappy].mean()
    assert dwell[happy].mean() > dwell[unhappy].mean()


def test_rankings_are_bounded_by_the_oracles(measured: tuple) -> None:
    totals = measured[0]
    truth, posterior, prior = (totals.ranking_figures(name) for name in ("true_latents", "", "prior"))
    assert truth == pytest.approx({"map": 1.0, "ndcg@10": 1.0, "hr@10": 1.0}, abs=1e-12)
    satisfaction = totals.ranking_figures("expected_satisfaction")
    for name in ("map", "ndcg@10"):
        assert prior[name] < satisfaction[name] < posterior[name] < 1.0
    assert posterior["map"] > 3.0 * prior["map"]


def test_relevance_given_state_is_the_share_of_tastes() -> None:
    relevance = aigc_int_feedback.relevance_given_state()
    np.testing.assert_allclose(relevance.sum(axis=1), 20.0, atol=1e-3)
    latents = aigc_int.draw_latents(3, 0)
    state = latents.emotion * 4 + latents.intent
    relevant = aigc_int_feedback.relevant_items(latents)
    # Items called relevant in half of all cases are so in half of them.
    is_relevant = np.zeros((1000, aigc_int_feedback.NUM_ITEMS), bool)
    is_relevant[np.arange(1000)[:, None], relevant] = True
    near_half = np.abs(relevance[state] - 0.5) < 0.1
    assert abs(is_relevant[near_half].mean() - 0.5) < 0.05


# --- The data set --------------------------------------------------------------------------------------------------


def generate(output: Path, *flags: str) -> int:
    return aigc_int_dataset.main([f"--output={output}", "--num_records=1500", "--dim=16", "--seed=4", *flags])


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def by_record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("simulated") / "by_record"
    assert generate(path) == 0
    return path


def test_same_seed_gives_the_same_bytes(by_record: Path, tmp_path: Path) -> None:
    assert generate(tmp_path / "again") == 0
    assert hashes(tmp_path / "again") == hashes(by_record)
    assert generate(tmp_path / "other", "--seed=5") == 0
    assert hashes(tmp_path / "other")["train-00000.arrow"] != hashes(by_record)["train-00000.arrow"]


def test_data_set_holds_what_was_drawn(by_record: Path) -> None:
    dataset = records.Dataset.open(by_record, verify=True)
    assert "simulated" in dataset.spec.name.lower()
    assert "simulated" in dataset.spec.description.lower()
    assert dataset.spec.labels["emotion"].class_names == aigc_int.EMOTIONS
    assert dataset.spec.labels["intent"].class_names == aigc_int.INTENTS
    drawn = list(aigc_int.stream(4, 1500, 16))
    seen = []
    for name in ("train", "validation", "test"):
        split = dataset.split(name)
        rows = np.arange(split.num_records)
        numbers = np.array([int(identifier.rsplit("-", 1)[1]) for identifier in split.ids(rows)])
        seen.append(numbers)
        chunk_of, row_of = numbers // 1000, numbers % 1000
        emotion, is_labelled = split.gather_label("emotion", rows)
        assert is_labelled.all()
        np.testing.assert_array_equal(
            emotion, [drawn[c].latents.emotion[r] for c, r in zip(chunk_of, row_of, strict=True)]
        )
        np.testing.assert_array_equal(
            split.column("extra_manner"), [drawn[c].latents.manner[r] for c, r in zip(chunk_of, row_of, strict=True)]
        )
        values, lengths = split.gather_tokens("audio", rows, 50)
        for row in range(0, split.num_records, 20):
            tokens = drawn[chunk_of[row]].tokens["audio"]
            length = max(int(tokens.lengths[row_of[row]]), 0)
            start = int(np.maximum(tokens.lengths[: row_of[row]], 0).sum())
            assert lengths[row] == length
            np.testing.assert_array_equal(values[row, :length], tokens.values[start : start + length])
        assert (split.gather_list("slate_item_index", rows, 8, -1) >= 0).all()
        assert (split.gather_list("relevant_items", rows, 20, -1) >= 0).all()
    np.testing.assert_array_equal(np.sort(np.concatenate(seen)), np.arange(1500))
    assert [len(numbers) for numbers in seen] == [1050, 225, 225]
    catalogue = dataset.catalogue()
    assert catalogue is not None
    assert len(catalogue.ids) == 2000
    assert catalogue.kind_names == aigc_int.KINDS


def test_reference_figures_are_those_of_the_splits_records(by_record: Path) -> None:
    dataset = records.Dataset.open(by_record)
    totals = {name: aigc_int_report.ReferenceTotals() for name in ("train", "validation", "test")}
    for chunk in aigc_int.stream(4, 1500, 16):
        predictions = aigc_int_report.predict(chunk)
        for name, is_member in aigc_int_dataset.split_membership(chunk.latents, "record").items():
            totals[name].add(predictions, is_member)
    for name, expected in totals.items():
        found = dataset.reference(name)
        assert found == pytest.approx(expected.named_figures(), abs=1e-12)
        for task in ("emotion", "intent", "joint"):
            for metric in ("accuracy", "macro_precision", "macro_recall", "cross_entropy"):
                for suffix in ("", "[text]", "[vision]", "[audio]", "[vision+text]", "[late_fusion]", "[conflict]"):
                    assert f"{task}/{metric}{suffix}" in found
        for metric in ("map", "ndcg@10", "hr@10"):
            assert {f"ranking/{metric}", f"ranking/{metric}[true_latents]"} <= found.keys()
        # A single modality is judged where it is present; the same on every record is worse.
        assert found["emotion/accuracy[vision, every record]"] < found["emotion/accuracy[vision]"]


def test_no_user_is_in_two_splits(tmp_path: Path) -> None:
    assert generate(tmp_path / "by_user", "--split_by=user") == 0
    dataset = records.Dataset.open(tmp_path / "by_user")
    users = {name: set(dataset.split(name).column("user_id")) for name in ("train", "validation", "test")}
    assert all(users.values())
    assert not users["train"] & users["validation"]
    assert not users["train"] & users["test"]
    assert not users["validation"] & users["test"]
    sizes = [dataset.split(name).num_records / 1500 for name in users]
    np.testing.assert_allclose(sizes, [0.7, 0.15, 0.15], atol=0.05)


def test_content_kinds_of_test_are_unseen_in_training(tmp_path: Path) -> None:
    assert generate(tmp_path / "by_kind", "--split_by=content_kind", "--dtype=float16") == 0
    dataset = records.Dataset.open(tmp_path / "by_kind")
    assert dataset.spec.modalities["text"].dtype == "float16"
    kind_of_item = dataset.catalogue().kind
    expected = {"train": {0, 1}, "validation": {2}, "test": {3}}
    for name, kinds in expected.items():
        split = dataset.split(name)
        assert set(np.asarray(split.column("extra_content_kind"))) == kinds
        shown = split.gather_list("slate_item_index", np.arange(split.num_records), 8, -1)
        assert set(kind_of_item[shown].ravel()) == kinds
    sizes = [dataset.split(name).num_records / 1500 for name in expected]
    np.testing.assert_allclose(sizes, [0.7, 0.15, 0.15], atol=0.05)


def test_splits_by_user_and_record_are_even(latents: aigc_int.Latents) -> None:
    sizes = [share(rows) for rows in aigc_int_dataset.split_membership(latents, "record").values()]
    np.testing.assert_allclose(sizes, [0.7, 0.15, 0.15], atol=1e-12)
    for start in range(0, 200, 20):
        assert sorted(latents.split_draw[start : start + 20]) == list(range(20))
    sizes = [share(rows) for rows in aigc_int_dataset.split_membership(latents, "user").values()]
    np.testing.assert_allclose(sizes, [0.7, 0.15, 0.15], atol=0.01)
    with pytest.raises(InputError, match="split_by = 'week'"):
        aigc_int_dataset.split_membership(latents, "week")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_records=0"], "num_records = 0: expected at least 1"),
        (["--num_records=3"], "leaves split"),
        (["--dim=8"], "dim = 8: expected at least 14"),
        (["--seed=-2"], "seed = -2"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(tmp_path / "bad", *flags) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_existing_output_is_refused_unless_asked(
    by_record: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = hashes(by_record)
    assert generate(by_record, "--seed=6") == 2
    assert str(by_record) in capsys.readouterr().err
    assert hashes(by_record) == before
    assert generate(tmp_path / "mine") == 0
    assert generate(tmp_path / "mine", "--seed=6", "--overwrite") == 0
    assert hashes(tmp_path / "mine") != before


def test_unwritable_output_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("not a folder")
    assert generate(tmp_path / "file" / "data") == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_report_prints_simulated_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert aigc_int_report.main(["--num_records=1000", "--dim=14"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("1000 simulated records")
    for row in ("| exact posterior |", "| late_fusion |", "| vision+text |", "| true_latents |"):
        assert row in printed


def test_progress_of_a_long_run_goes_to_standard_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(aigc_int_report, "PROGRESS_SECONDS", -1.0)
    list(aigc_int_report.progress(aigc_int.stream(0, 2000, 14, ("text",)), 2000))
    captured = capsys.readouterr()
    assert "1000/2000 simulated records" in captured.err
    assert captured.out == ""
