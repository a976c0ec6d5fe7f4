"""Calibration and ceilings of AIGC-INT-Sim, and the sums from which they follow."""

import math

import numpy as np
import pytest
import pytrec_eval
from sklearn import metrics

from mmei_jax.simulation import (
    aigc_int,
    aigc_int_calibration,
    aigc_int_figures,
    aigc_int_posterior,
    aigc_int_report,
)
from mmei_jax.types import MODALITIES, InputError
from tests import markdown

QUICK_RECORDS = 40_000


@pytest.fixture(scope="module")
def measured() -> tuple[aigc_int_report.ReferenceTotals, dict[str, aigc_int_figures.CalibrationTotals]]:
    return aigc_int_report.measure(seed=11, num_records=QUICK_RECORDS, dim=16)


def allowed_error(probability: float, num: int) -> float:
    """Four standard errors of a share."""
    return 4.0 * math.sqrt(probability * (1.0 - probability) / num)


@pytest.mark.parametrize("name", MODALITIES)
def test_unimodal_accuracy_is_table_1_within_sampling_error(name: str) -> None:
    target = {"text": 0.812, "vision": 0.778, "audio": 0.743}[name]
    assert aigc_int_calibration.UNIMODAL_ACCURACY[name] == target
    found = aigc_int_calibration.measure_unimodal_accuracy(name, QUICK_RECORDS, seed=23)
    assert abs(found.measured - target) < allowed_error(target, QUICK_RECORDS)
    # The mean probability of the chosen emotion estimates the same, more sharply.
    assert abs(found.expected - target) < 0.5 * allowed_error(target, QUICK_RECORDS)


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
def test_posterior_is_calibrated_and_unimodal_accuracy_table_1_to_a_thousandth_on_a_million_records() -> None:
    calibration = {task: aigc_int_figures.CalibrationTotals() for task in aigc_int_report.TASKS}
    num_present, num_correct, probability = (dict.fromkeys(MODALITIES, 0.0) for _ in range(3))
    for chunk in aigc_int.stream(41, 1_000_000, 14):
        evidences = {name: aigc_int_posterior.evidence(chunk.tokens[name], name) for name in MODALITIES}
        joint = aigc_int_posterior.log_posterior(evidences)
        for task, right in aigc_int_report.true_classes(chunk.latents).items():
            calibration[task].add(aigc_int_report.by_task(joint)[task], right)
        for name in MODALITIES:
            is_present = chunk.tokens[name].lengths > 0
            alone = aigc_int_report.by_task(aigc_int_posterior.log_posterior(evidences, (name,)))["emotion"][is_present]
            num_present[name] += len(alone)
            num_correct[name] += np.sum(alone.argmax(axis=1) == chunk.latents.emotion[is_present])
            probability[name] += np.exp(alone.max(axis=1)).sum()
    for task in aigc_int_report.TASKS:
        assert calibration[task].num_records.sum() == 1_000_000
        assert calibration[task].expected_calibration_error() < 0.005, task
    for name, target in aigc_int_calibration.UNIMODAL_ACCURACY.items():
        assert abs(probability[name] / num_present[name] - target) < 0.001
        assert abs(num_correct[name] / num_present[name] - target) < 0.0015


def test_figures_equal_scikit_learn() -> None:
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


def test_rankings_are_bounded_by_the_oracles(measured: tuple) -> None:
    totals = measured[0]
    truth, posterior, prior = (totals.ranking_figures(name) for name in ("true_latents", "", "prior"))
    assert truth == pytest.approx({"map": 1.0, "ndcg@10": 1.0, "hr@10": 1.0}, abs=1e-12)
    satisfaction = totals.ranking_figures("expected_satisfaction")
    for name in ("map", "ndcg@10"):
        assert prior[name] < satisfaction[name] < posterior[name] < 1.0
    assert posterior["map"] > 3.0 * prior["map"]


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


def test_tables_of_the_card_agree_with_fresh_records(measured: tuple) -> None:
    card = markdown.tables(markdown.read("data/aigc_int/README.md"))
    fresh = markdown.tables("\n".join(aigc_int_report.report_lines(measured[0])) + "\n")
    # Four standard errors of a share on the 8,000 records of the smallest slice, and what macro averages and nats need.
    allowed = {"accuracy %": 2.3, "macro P %": 3.5, "macro R %": 3.5, "cross-entropy": 0.06}
    num_compared = 0
    for header, rows in fresh.items():
        if "simulated |" not in header:
            continue
        columns = header.split(" | ")[1:]
        title = header.split(",")[0].partition(" ")[2]
        assert [row[0] for row in card[header]] == [row[0] for row in rows]
        for shown, found in zip(card[header][1:], rows[1:], strict=True):
            for column, left, right in zip(columns, shown[1:], found[1:], strict=True):
                limit = allowed.get(title) or allowed.get(column) or 0.02
                assert abs(float(left) - float(right)) < limit, (header, shown[0], column)
                num_compared += 1
    assert num_compared == 3 * 9 * 4 + 12 * 9 * 6 + 4 * 3
