"""The claim ledger: every number that the paper gives, ours beside it, and one of four verdicts.

* *reproduced*: the paper's number lies in our interval, and a difference has its sign beyond doubt;
* *direction only*: the difference has its sign beyond doubt, and another size, or the paper gives no size;
* *not reproduced*: anything else that was measured;
* *cannot be tested*: it was not measured, and the reason says why.

The sign of a difference between rows is beyond doubt where two intervals lie on its side of 0: that of other records
with these trained models, in which the paper's number is looked for, and that of training again from other seeds.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmei_jax.reports.paired_resampling import Bounded, ResampledMeans
from mmei_jax.reports.paired_seeds import SeedDifference, difference_over_seeds
from mmei_jax.reports.paper_table import PAPER_METRICS, PAPER_TABLE, ROW_TITLES
from mmei_jax.reports.tables import markdown_table
from mmei_jax.types import InputError
from mmei_jax.workdir import read_json

# What the paper says of its online evaluation, by our metric: what it is of, and the relative uplift.
ONLINE_CLAIMS = {
    "dwell_seconds": ("engagement time in online evaluation", 0.152),
    "satisfaction": ("satisfaction in online evaluation", 0.118),
}

# Of the ledger's intervals, where a claim does not say otherwise.
_CONFIDENCE = 0.95

_REASONS = {
    "reproduced": "sign and size agree; the data are others",
    "direction only": "the sign is the paper's, the size is not",
    "not reproduced": "the interval does not lie on the paper's side of 0",
}

# What MMEI gains on the Multi-Modal Transformer, and whether the paper tells it as a share of what that has.
_GAINS = {
    "emotion/accuracy": (0.042, False),
    "emotion/macro_precision": (0.045, False),
    "emotion/macro_recall": (0.042, False),
    "emotion/f1_of_macro": (0.043, False),
    "ranking/map": (0.062, True),
    "ranking/ndcg@10": (0.048, False),
    "ranking/hr@10": (0.038, True),
    "emotion/cross_entropy": (-0.123, True),
}
GAINED_METRICS = tuple(_GAINS)

# The figures of a row: by metric those of each seed.
SeedFigures = Mapping[str, Mapping[int, float]]


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


def lead_verdict(paper: float, records: Bounded, seeds: SeedDifference) -> tuple[str, str]:
    """Verdict on a difference of two rows, and the reason.

    Args:
        paper: the paper's difference.
        records: ours, with the interval of other records.
        seeds: ours, with the interval of other seeds; two seeds are the fewest that give one.

    Example:
        >>> lead_verdict(0.04, (0.05, 0.03, 0.07), SeedDifference(0.05, 0.01, 0.09, 10))
        ('reproduced', 'sign and size agree; the data are others')
        >>> lead_verdict(0.04, (0.05, 0.03, 0.07), SeedDifference(0.05, -0.01, 0.11, 10))
        ('not reproduced', 'other seeds may show the other sign')
    """
    verdict = difference_verdict(paper, records)
    if verdict == "not reproduced":
        return verdict, _REASONS[verdict]
    if seeds.num_seeds < 2:
        return "not reproduced", "what other seeds would show is not known of fewer than two"
    if not (seeds.low > 0.0 if paper > 0.0 else seeds.high < 0.0):
        return "not reproduced", "other seeds may show the other sign"
    return verdict, _REASONS[verdict]


def seeds_interval(seeds: SeedDifference, scale: float = 100.0) -> str:
    """What stands behind the interval of other records: that of other seeds, where there is one."""
    return f"; other seeds [{scale * seeds.low:+.1f}, {scale * seeds.high:+.1f}]" if seeds.num_seeds > 1 else ""


def online_claims(ab: Mapping[str, Any] | None) -> list[Claim]:
    """The two claims on an online evaluation, of which ours is a simulated A/B.

    An uplift that a placebo keeps is not that of emotions, whatever its size.

    Args:
        ab: what ``ab.json`` of :mod:`mmei_jax.feedback.run` holds; None where there is none.
    """
    claims = []
    for metric, (name, paper) in ONLINE_CLAIMS.items():
        printed = f"{100 * paper:+.1f} %"
        if ab is None:
            later = "no feedback loop was given (eval.py --feedback)"
            claims.append(Claim(name, printed, "", "cannot be tested", later))
            continue
        found, placebo = ab["uplift"]["emotion_driven"][metric], ab["uplift"]["placebo"][metric]
        values = (found["value"], found["low"], found["high"])
        if ab["source"].get("ab_split", "test") != "test":
            chosen = f"the A/B met the {ab['source']['ab_split']} split, on which the model's checkpoint was chosen"
            claims.append(Claim(name, printed, "", "cannot be tested", f"{chosen}: ab.split = 'test' answers it"))
            continue
        if None in values:
            claims.append(Claim(name, printed, "", "cannot be tested", "the metric is undefined here"))
            continue
        told = f"simulated users, the model of {ab['source']['run']}"
        verdict, reason = difference_verdict(paper, values), told
        if verdict != "reproduced":
            reason += f": {_REASONS[verdict]}"
        if not ab["placebo_loses_uplift"][metric] and verdict != "not reproduced":
            verdict, reason = "not reproduced", f"{told}: a placebo does not lose the uplift"
        ours = "{:+.1f} [{:+.1f}, {:+.1f}] %, simulated".format(*(100 * value for value in values))
        if ab["confidence"] != _CONFIDENCE:
            ours += f" ({100 * ab['confidence']:g} % interval)"
        if placebo["value"] is not None:
            ours += f"; placebo {100 * placebo['value']:+.1f} %"
        claims.append(Claim(name, printed, ours, verdict, reason))
    return claims


def read_ab(folder: Path) -> dict[str, Any]:
    """The comparison that a feedback loop left.

    Args:
        folder: of the loop.

    Raises:
        InputError: there is none, or it is damaged.
    """
    path = folder / "ab.json"
    expected = "the comparison that mmei_jax.feedback.run leaves"
    ab = read_json(path, expected)
    try:
        online_claims(ab)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: expected {expected}: {error!r}") from error
    found: dict[str, Any] = ab
    return found


def table_claims(
    means: Mapping[str, ResampledMeans],
    seeds: Mapping[str, SeedFigures],
    final_loss: float | None,
    titles: Mapping[str, str] = ROW_TITLES,
) -> list[Claim]:
    """Every claim that a table of rows can answer.

    Args:
        means: by row; rows and metrics that are missing are said to be.
        seeds: by row, of :data:`GAINED_METRICS` those that it has.
        final_loss: MMEI's mean training loss of Eq. 6 in the last epoch; None where unknown.
        titles: of the rows.
    """
    claims = []
    for row, figures in PAPER_TABLE.items():
        for metric in PAPER_METRICS:
            name = f"{titles.get(row, ROW_TITLES[row])}: {metric}"
            claims.append(_level(name, f"{figures[metric]:.3f}", figures[metric], means.get(row), metric))
    claims += [_gain(means, seeds, metric, gain, is_relative=share) for metric, (gain, share) in _GAINS.items()]
    if final_loss is not None:
        reason = "one number without an interval: the paper says neither which weights nor which ranking loss"
        verdict = "reproduced" if abs(final_loss - 0.23) < 0.02 else "not reproduced"
        claims.append(Claim("training loss of MMEI in the last epoch", "0.23", f"{final_loss:.2f}", verdict, reason))
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
    verdict = level_verdict(paper, ours)
    reason = (
        "the level agrees; the data are others"
        if verdict == "reproduced"
        else "the paper's data set was not published: another one, simulated or not, has another level"
    )
    return Claim(name, printed, _print(ours), verdict, reason)


def _gain(
    means: Mapping[str, ResampledMeans],
    seeds: Mapping[str, SeedFigures],
    metric: str,
    paper: float,
    *,
    is_relative: bool,
) -> Claim:
    """MMEI against the Multi-Modal Transformer."""
    name = f"MMEI against the Multi-Modal Transformer: {metric}" + (", relative" if is_relative else "")
    printed = f"{100 * paper:+.1f} %" if is_relative else f"{100 * paper:+.1f} points"
    ours, other = means.get("mmei"), means.get("multimodal_transformer")
    if ours is None or other is None or metric not in ours.metrics:
        return Claim(name, printed, "", "cannot be tested", "this table lacks one of the two rows")
    found = ours.relative_change(other, metric) if is_relative else ours.difference(other, metric)
    if not np.isfinite(found[0]):
        return Claim(name, printed, "", "cannot be tested", "the metric is undefined here")
    pairs = difference_over_seeds(seeds["mmei"][metric], seeds["multimodal_transformer"][metric])
    verdict, reason = lead_verdict(paper, found, pairs)
    unit = " %" if is_relative else " points"
    shown = "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * part for part in found)) + unit
    scale = 100.0 / other.value(metric)[0] if is_relative else 100.0
    return Claim(name, printed, shown + seeds_interval(pairs, scale), verdict, reason)


def _print(ours: Bounded) -> str:
    return "{:.3f} [{:.3f}, {:.3f}]".format(*ours)
