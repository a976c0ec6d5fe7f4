"""The claim on unseen users and kinds of content follows from tables on data that were split by them."""

import numpy as np
import pytest

from mmei_jax.reports import further_claims
from mmei_jax.reports.evaluated_table import EvaluatedTable
from mmei_jax.reports.further_claims import UnseenTable, generalisation_claims, read_further_claims, read_unseen
from mmei_jax.reports.paired_resampling import ResampledMeans
from mmei_jax.types import InputError

METRIC = "emotion/accuracy"


def means(whole, draws):
    return ResampledMeans((METRIC,), np.array([whole]), np.array(draws)[:, None])


def table(split_by, lead, *, seed_leads=(0.02, 0.021, 0.019)):
    """MMEI leads early concatenation by ``lead`` in every draw, and so by seed; late fusion is behind both."""
    draws = np.linspace(0.6, 0.8, 101)
    others = {"multimodal_transformer": means(0.7, draws), "late_fusion": means(0.5, draws - 0.2)}
    seeds = {"mmei": {seed: 0.7 + each for seed, each in enumerate(seed_leads)}}
    seeds |= {"multimodal_transformer": dict.fromkeys(range(3), 0.7), "late_fusion": dict.fromkeys(range(3), 0.5)}
    return UnseenTable(split_by, {"mmei": means(0.7 + np.mean(lead), draws + lead), **others}, seeds)


def test_lead_over_the_best_other_row_decides():
    users, kinds = generalisation_claims([table("user", 0.02), table("content_kind", np.linspace(-0.03, 0.05, 101))])
    assert (users.verdict, kinds.verdict) == ("direction only", "not reproduced")
    assert users.ours.startswith(
        "+2.0 [+2.0, +2.0] points; other seeds [+1.8, +2.2], over Multi-Modal Transformer, at an accuracy of 0.720 ["
    )
    assert "users" in users.name
    assert "kinds of content" in kinds.name
    assert kinds.ours.startswith("+1.0 [-2.")
    assert users.reason == "simulated; MMEI leads, and the paper gives no size"
    assert kinds.reason == "simulated; other records may show another lead"


def test_lead_that_other_seeds_may_not_show_is_not_reproduced():
    users, _ = generalisation_claims([table("user", 0.02, seed_leads=(0.06, -0.02, 0.02))])
    assert (users.verdict, users.reason) == ("not reproduced", "simulated; other seeds may show the other sign")


def test_table_that_is_not_given_leaves_the_claim_untested():
    users, kinds = generalisation_claims([table("content_kind", 0.02)])
    assert (users.verdict, users.ours) == ("cannot be tested", "")
    assert "split by user" in users.reason
    assert kinds.verdict == "direction only"


class _Dataset:
    def __init__(self, split_by):
        self.manifest = {"counts": {"simulation": {"split_by": split_by}} if split_by else {}}


def test_two_tables_for_one_claim_are_refused():
    with pytest.raises(InputError, match="2 tables on data split by user: expected one at most"):
        generalisation_claims([table("user", 0.02), table("user", 0.03)])


def test_nothing_given_leaves_every_further_claim_untested():
    found = read_further_claims(None, [])
    assert len(found) == 4
    assert {claim.verdict for claim in found} == {"cannot be tested"}


@pytest.mark.parametrize(
    ("split_by", "message"),
    [
        ("record", "its data are split by 'record': expected simulated data of --split_by=user or --split_by=content"),
        (None, "its data are split by None"),
        ("user", "rows : expected mmei and another row of the paper's table"),
    ],
)
def test_unfit_table_is_refused(monkeypatch, tmp_path, split_by, message):
    found = EvaluatedTable.__new__(EvaluatedTable)
    object.__setattr__(found, "dataset", _Dataset(split_by))
    object.__setattr__(found, "rows", [])
    monkeypatch.setattr(further_claims, "read_table", lambda workdir, split: found)
    with pytest.raises(InputError, match=message):
        read_unseen(tmp_path, 10)
