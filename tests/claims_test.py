"""The claim ledger: which verdict follows from which figures."""

import numpy as np

from mmei_jax.reports.claims import claims_table, table_claims
from mmei_jax.reports.paired_resampling import ResampledMeans
from mmei_jax.reports.paper_table import PAPER_METRICS, PAPER_TABLE

METRICS = (*PAPER_METRICS, "emotion/cross_entropy")


def means(values, cross_entropy):
    """A row with these figures, and draws within 1 % of them that all metrics and rows share."""
    whole = np.array([*values, cross_entropy])
    draws = whole * (1.0 + 0.01 * np.linspace(-1.0, 1.0, 41)[:, None])
    return ResampledMeans(METRICS, whole, draws)


def by_name(claims):
    return {claim.name: claim for claim in claims}


def test_the_papers_own_figures_are_reproduced():
    rows = {name: means([figures[metric] for metric in PAPER_METRICS], 0.5) for name, figures in PAPER_TABLE.items()}
    found = table_claims(rows, 0.23)
    levels = [claim for claim in found if ": " in claim.name and "against" not in claim.name]
    assert len(levels) == 42
    assert {claim.verdict for claim in levels} == {"reproduced"}
    gains = by_name(found)
    accuracy = gains["MMEI against the Multi-Modal Transformer: emotion/accuracy"]
    assert (accuracy.paper, accuracy.ours, accuracy.verdict) == (
        "+4.2 points",
        "+4.2 [+4.2, +4.2] points",
        "reproduced",
    )
    assert gains["training loss of MMEI in the last epoch"].verdict == "reproduced"
    # Equal cross-entropies are no fall of 12.3 %.
    assert (
        gains["MMEI against the Multi-Modal Transformer: emotion/cross_entropy, relative"].verdict == "not reproduced"
    )


def test_a_smaller_gain_is_the_direction_and_a_loss_is_none():
    ours = means([0.90, 0.90, 0.90, 0.90, 0.25, 0.35, 0.92], 0.40)
    other = means([0.89, 0.89, 0.91, 0.90, 0.24, 0.36, 0.92], 0.50)
    found = by_name(table_claims({"mmei": ours, "multimodal_transformer": other}, None))
    verdicts = {name.rpartition("/")[2]: claim.verdict for name, claim in found.items() if "against" in name}
    assert verdicts["accuracy"] == "direction only"
    assert verdicts["macro_recall"] == "not reproduced"
    assert verdicts["f1_of_macro"] == "not reproduced"
    assert verdicts["map, relative"] == "direction only"
    assert verdicts["cross_entropy, relative"] == "direction only"
    assert found["MMEI: ranking/map"].verdict == "not reproduced"


def test_what_was_not_measured_says_why():
    found = table_claims({}, None)
    assert {claim.verdict for claim in found} == {"cannot be tested"}
    assert all(claim.reason for claim in found)
    text = claims_table(found)
    assert text.startswith(f"{len(found)} claims: {len(found)} cannot be tested.")
    assert len(text.splitlines()) == 4 + len(found)
