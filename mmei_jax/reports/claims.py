"""The claim ledger: every number that the paper gives, ours beside it, and one of four verdicts.

* *reproduced*: the paper's number lies in our interval, and a difference has its sign beyond doubt;
* *direction only*: the difference has its sign beyond doubt, and another size;
* *not reproduced*: anything else that was measured;
* *cannot be tested*: it was not measured, and the reason says why.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mmei_jax.reports.paired_resampling import Bounded, ResampledMeans
from mmei_jax.reports.paper_table import PAPER_METRICS, PAPER_TABLE, ROW_TITLES
from mmei_jax.reports.tables import markdown_table


@dataclass(frozen=True)
class Claim:
    """One number of the paper.

    Attributes:
        name: what it is of.
        paper: as the paper prints it.
        ours: as we print it, with its interval; "" where it was not measured.
        verdict: one of the four.
        reason: why, in a few words.
    """

    name: str
    paper: str
    ours: str
    verdict: str
    reason: str


def level_verdict(paper: float, ours: Bounded) -> str:
    """Whether the paper's number lies in our interval.

    Example:
        >>> level_verdict(0.9, (0.88, 0.86, 0.91)), level_verdict(0.9, (0.85, 0.84, 0.86))
        ('reproduced', 'not reproduced')
    """
    return "reproduced" if ours[1] <= paper <= ours[2] else "not reproduced"


def difference_verdict(paper: float, ours: Bounded) -> str:
    """Whether a difference has the paper's sign beyond doubt, and its size.

    Example:
        >>> difference_verdict(0.04, (0.05, 0.03, 0.07)), difference_verdict(0.04, (0.01, 0.005, 0.02))
        ('reproduced', 'direction only')
        >>> difference_verdict(0.04, (0.01, -0.01, 0.05)), difference_verdict(-0.1, (0.2, 0.1, 0.3))
        ('not reproduced', 'not reproduced')
    """
    low, high = ours[1:]
    has_sign = low > 0.0 if paper > 0.0 else high < 0.0
    if not has_sign:
        return "not reproduced"
    return "reproduced" if low <= paper <= high else "direction only"


def table_claims(
    means: Mapping[str, ResampledMeans], final_loss: float | None, titles: Mapping[str, str] = ROW_TITLES
) -> list[Claim]:
    """Every claim that a table of rows can answer, and those that it cannot.

    Args:
        means: by row; rows and metrics that are missing are said to be.
        final_loss: MMEI's mean training loss of Eq. 6 in the last epoch; None where unknown.
        titles: of the rows.
    """
    claims = []
    for row, figures in PAPER_TABLE.items():
        for metric in PAPER_METRICS:
            name = f"{titles.get(row, ROW_TITLES[row])}: {metric}"
            claims.append(_level(name, f"{figures[metric]:.3f}", figures[metric], means.get(row), metric))
    gains = {"accuracy": 0.042, "macro_precision": 0.045, "macro_recall": 0.042, "f1_of_macro": 0.043}
    for metric, gain in gains.items():
        claims.append(_gain(means, f"emotion/{metric}", gain, is_relative=False))
    claims.append(_gain(means, "ranking/map", 0.062, is_relative=True))
    claims.append(_gain(means, "ranking/ndcg@10", 0.048, is_relative=False))
    claims.append(_gain(means, "ranking/hr@10", 0.038, is_relative=True))
    claims.append(_gain(means, "emotion/cross_entropy", -0.123, is_relative=True))
    if final_loss is not None:
        reason = "one number without an interval: the paper says neither which weights nor which ranking loss"
        verdict = "reproduced" if abs(final_loss - 0.23) < 0.02 else "not reproduced"
        claims.append(Claim("training loss of MMEI in the last epoch", "0.23", f"{final_loss:.2f}", verdict, reason))
    later = "the feedback loop is not part of this table"
    claims.append(Claim("engagement time in online evaluation", "+15.2 %", "", "cannot be tested", later))
    claims.append(Claim("satisfaction in online evaluation", "+11.8 %", "", "cannot be tested", later))
    unseen = "a table on data that were split by user, or by content kind, answers it: this one has its own split"
    claims.append(
        Claim("generalisation to unseen users and content types", "no number", "", "cannot be tested", unseen)
    )
    return claims


def claims_table(claims: list[Claim]) -> str:
    """The ledger as a Markdown table, with how many claims have each verdict above it."""
    counts: dict[str, int] = {}
    for claim in claims:
        counts[claim.verdict] = counts.get(claim.verdict, 0) + 1
    said = ", ".join(f"{number} {verdict}" for verdict, number in sorted(counts.items()))
    cells = [[claim.name, claim.paper, claim.ours, f"*{claim.verdict}*", claim.reason] for claim in claims]
    table = markdown_table(["claim", "paper", "ours [95 %]", "verdict", "reason"], cells, num_text_columns=5)
    return f"{len(claims)} claims: {said}.\n\n{table}"


def _level(name: str, printed: str, paper: float, found: ResampledMeans | None, metric: str) -> Claim:
    if found is None or metric not in found.metrics or not np.isfinite(found.value(metric)[0]):
        return Claim(name, printed, "", "cannot be tested", "not measured here")
    ours = found.value(metric)
    reason = "the paper's data set was not published: another one, simulated or not, has another level"
    verdict = level_verdict(paper, ours)
    return Claim(name, printed, _print(ours), verdict, "" if verdict == "reproduced" else reason)


def _gain(means: Mapping[str, ResampledMeans], metric: str, paper: float, *, is_relative: bool) -> Claim:
    """MMEI against the Multi-Modal Transformer."""
    name = f"MMEI against the Multi-Modal Transformer: {metric}" + (", relative" if is_relative else "")
    printed = f"{100 * paper:+.1f} %" if is_relative else f"{100 * paper:+.1f} points"
    ours, other = means.get("mmei"), means.get("multimodal_transformer")
    if ours is None or other is None or metric not in ours.metrics:
        return Claim(name, printed, "", "cannot be tested", "this table lacks one of the two rows")
    found = ours.relative_change(other, metric) if is_relative else ours.difference(other, metric)
    if not np.isfinite(found[0]):
        return Claim(name, printed, "", "cannot be tested", "the metric is undefined here")
    scaled = tuple(100 * part for part in found)
    unit = " %" if is_relative else " points"
    verdict = difference_verdict(paper, found)
    reasons = {
        "reproduced": "",
        "direction only": "the sign is the paper's, the size is not",
        "not reproduced": "the interval does not lie on the paper's side of 0",
    }
    return Claim(name, printed, "{:+.1f} [{:+.1f}, {:+.1f}]".format(*scaled) + unit, verdict, reasons[verdict])


def _print(ours: Bounded) -> str:
    return "{:.3f} [{:.3f}, {:.3f}]".format(*ours)
