"""The claim ledger: which verdict follows from which figures."""

import numpy as np
import pytest

from mmei_jax.reports.claims import claims_table, online_claims, read_ab, table_claims
from mmei_jax.reports.paired_resampling import ResampledMeans
from mmei_jax.reports.paper_table import PAPER_METRICS, PAPER_TABLE
from mmei_jax.types import InputError

METRICS = (*PAPER_METRICS, "emotion/cross_entropy")


def means(values, cross_entropy):
    """A row with these figures, and draws within 1 % of them that all metrics and rows share."""
    whole = np.array([*values, cross_entropy])
    draws = whole * (1.0 + 0.01 * np.linspace(-1.0, 1.0, 41)[:, None])
    return ResampledMeans(METRICS, whole, draws)


def seeds(rows, *, spread=0.0):
    """Figures of three seeds of each row around its means, whose differences from row to row vary by a share."""
    return {
        name: {
            metric: {seed: row.whole[place] * (1 + spread * (seed - 1) * side) for seed in range(3)}
            for place, metric in enumerate(METRICS)
        }
        for side, (name, row) in zip((1, -1, *[0] * len(rows)), rows.items(), strict=False)
    }


def by_name(claims):
    return {claim.name: claim for claim in claims}


def test_the_papers_own_figures_are_reproduced():
    rows = {name: means([figures[metric] for metric in PAPER_METRICS], 0.5) for name, figures in PAPER_TABLE.items()}
    found = table_claims(rows, seeds(rows), 0.23)
    levels = [claim for claim in found if ": " in claim.name and "against" not in claim.name]
    assert len(levels) == 42
    assert {(claim.verdict, claim.reason) for claim in levels} == {
        ("reproduced", "the level agrees; the data are others")
    }
    gains = by_name(found)
    accuracy = gains["MMEI against the Multi-Modal Transformer: emotion/accuracy"]
    assert (accuracy.paper, accuracy.ours, accuracy.verdict) == (
        "+4.2 points",
        "+4.2 [+4.2, +4.2] points; other seeds [+4.2, +4.2]",
        "reproduced",
    )
    assert accuracy.reason == "sign and size agree; the data are others"
    assert gains["training loss of MMEI in the last epoch"].verdict == "reproduced"
    # Equal cross-entropies are no fall of 12.3 %.
    assert (
        gains["MMEI against the Multi-Modal Transformer: emotion/cross_entropy, relative"].verdict == "not reproduced"
    )


def test_a_smaller_gain_is_the_direction_and_a_loss_is_none():
    ours = means([0.90, 0.90, 0.90, 0.90, 0.25, 0.35, 0.92], 0.40)
    other = means([0.89, 0.89, 0.91, 0.90, 0.24, 0.36, 0.92], 0.50)
    rows = {"mmei": ours, "multimodal_transformer": other}
    found = by_name(table_claims(rows, seeds(rows), None))
    verdicts = {name.rpartition("/")[2]: claim.verdict for name, claim in found.items() if "against" in name}
    assert verdicts["accuracy"] == "direction only"
    assert verdicts["macro_recall"] == "not reproduced"
    assert verdicts["f1_of_macro"] == "not reproduced"
    assert verdicts["map, relative"] == "direction only"
    assert verdicts["cross_entropy, relative"] == "direction only"
    assert found["MMEI: ranking/map"].verdict == "not reproduced"


def test_a_gain_that_other_seeds_may_not_show_is_not_reproduced():
    rows = {
        "mmei": means([0.90, 0.90, 0.90, 0.90, 0.25, 0.35, 0.92], 0.40),
        "multimodal_transformer": means([0.86, 0.89, 0.91, 0.90, 0.24, 0.36, 0.92], 0.50),
    }
    name = "MMEI against the Multi-Modal Transformer: emotion/accuracy"
    # Differences of the seeds: 4 points and 1.76 % of both rows to either side, which is a deviation of 3.1 points.
    found = by_name(table_claims(rows, seeds(rows, spread=0.0176), None))[name]
    assert (found.verdict, found.reason) == ("not reproduced", "other seeds may show the other sign")
    assert found.ours.startswith("+4.0 [+4.0, +4.0] points; other seeds [-3.7, +11.7]")
    alone = {row: {metric: {0: values[0]} for metric, values in found.items()} for row, found in seeds(rows).items()}
    found = by_name(table_claims(rows, alone, None))[name]
    assert (found.verdict, found.ours) == ("not reproduced", "+4.0 [+4.0, +4.0] points")
    assert "fewer than two" in found.reason


def test_what_was_not_measured_says_why():
    found = table_claims({}, {}, None)
    assert {claim.verdict for claim in found} == {"cannot be tested"}
    assert all(claim.reason for claim in found)
    text = claims_table(found)
    assert text.startswith(f"{len(found)} claims: {len(found)} cannot be tested.")
    assert len(text.splitlines()) == 4 + len(found)


def ab(treatment, placebo, *, is_lost=True):
    def bounded(value, low, high):
        return {"value": value, "low": low, "high": high}

    arms = {"emotion_driven": bounded(*treatment), "placebo": bounded(*placebo)}
    metrics = ("dwell_seconds", "satisfaction")
    return {
        "confidence": 0.95,
        "uplift": {arm: dict.fromkeys(metrics, found) for arm, found in arms.items()},
        "placebo_loses_uplift": dict.fromkeys(metrics, is_lost),
        "source": {"run": "runs/some"},
    }


def test_online_claims_are_those_of_the_simulated_comparison():
    engagement, satisfaction = online_claims(ab((0.15, 0.13, 0.17), (-0.05, -0.07, -0.03)))
    assert (engagement.paper, engagement.verdict) == ("+15.2 %", "reproduced")
    assert engagement.ours == "+15.0 [+13.0, +17.0] %, simulated; placebo -5.0 %"
    assert engagement.reason == "simulated users, the model of runs/some"
    wider, _ = online_claims({**ab((0.15, 0.13, 0.17), (-0.05, -0.07, -0.03)), "confidence": 0.99})
    assert wider.ours == "+15.0 [+13.0, +17.0] %, simulated (99 % interval); placebo -5.0 %"
    assert (satisfaction.paper, satisfaction.verdict) == ("+11.8 %", "direction only")
    assert {claim.verdict for claim in online_claims(ab((0.01, -0.01, 0.03), (0.0, 0.0, 0.0)))} == {"not reproduced"}


def test_uplift_that_a_placebo_keeps_is_not_reproduced():
    for claim in online_claims(ab((0.15, 0.10, 0.17), (0.14, 0.10, 0.17), is_lost=False)):
        assert claim.verdict == "not reproduced"
        assert claim.reason.endswith("a placebo does not lose the uplift")


def test_uplift_on_the_records_that_chose_the_checkpoint_answers_no_claim():
    found = ab((0.15, 0.13, 0.17), (-0.05, -0.07, -0.03))
    for split, verdict in (("test", "reproduced"), ("validation", "cannot be tested")):
        claim = online_claims({**found, "source": {"run": "runs/some", "ab_split": split}})[0]
        assert claim.verdict == verdict
    assert claim.reason.startswith("the A/B met the validation split, on which the model's checkpoint was chosen")


def test_comparison_that_is_missing_or_damaged_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"ab.json: expected the comparison that mmei_jax.feedback.run leaves"):
        read_ab(tmp_path)
    (tmp_path / "ab.json").write_text('{"uplift": {}}')
    with pytest.raises(InputError, match=r"ab.json: expected the comparison .*emotion_driven"):
        read_ab(tmp_path)
