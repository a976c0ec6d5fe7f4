"""Claims of the paper that its table cannot answer: the online evaluation, unseen users and kinds of content."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmei_jax.reports.claims import Claim, lead_verdict, online_claims, read_ab, seeds_interval
from mmei_jax.reports.evaluated_table import read_table
from mmei_jax.reports.paired_resampling import ResampledMeans, resample_rows
from mmei_jax.reports.paired_seeds import difference_over_seeds
from mmei_jax.reports.paper_table import PAPER_TABLE, ROW_TITLES
from mmei_jax.types import InputError

# By what a data set's generator split its records: what the claim calls it.
UNSEEN = {"user": "users", "content_kind": "kinds of content"}
_METRIC = "emotion/accuracy"
NUM_RESAMPLES = 500


@dataclass(frozen=True)
class UnseenTable:
    """A table whose test split shares no user, or no kind of content, with its training split.

    Attributes:
        split_by: "user" or "content_kind".
        means: by row.
        seeds: by row, the emotion accuracy of each seed.
    """

    split_by: str
    means: Mapping[str, ResampledMeans]
    seeds: Mapping[str, Mapping[int, float]]


def read_further_claims(
    feedback: str | None, unseen: Sequence[str], *, num_resamples: int = NUM_RESAMPLES
) -> list[Claim]:
    """What a feedback loop, and tables on data split otherwise, say of the paper's claims.

    Args:
        feedback: folder of the loop; None leaves its claims untested.
        unseen: folders of tables; the claims of which there is none are left untested.
        num_resamples: of the paired bootstrap.

    Raises:
        InputError: a folder holds something else.
    """
    ab = None if feedback is None else read_ab(Path(feedback))
    tables = [read_unseen(Path(folder), num_resamples) for folder in unseen]
    return [*online_claims(ab), *generalisation_claims(tables)]


def read_unseen(workdir: Path, num_resamples: int) -> UnseenTable:
    """Reads a table that was evaluated on its test split.

    Args:
        workdir: of the table.
        num_resamples: of the paired bootstrap.

    Raises:
        InputError: it was not evaluated, its data were split otherwise, or MMEI or every other row is missing.
    """
    table = read_table(workdir, "test")
    split_by = table.dataset.manifest["counts"].get("simulation", {}).get("split_by")
    if split_by not in UNSEEN:
        expected = " or ".join(f"--split_by={name}" for name in UNSEEN)
        raise InputError(f"{workdir}: its data are split by {split_by!r}: expected simulated data of {expected}")
    rows = {row.name: row for row in table.rows if row.name in PAPER_TABLE}
    if "mmei" not in rows or len(rows) < 2:
        raise InputError(f"{workdir}: rows {', '.join(rows)}: expected mmei and another row of the paper's table")
    records = {name: row.records for name, row in rows.items()}
    means = resample_rows(records, [_METRIC], num_resamples=num_resamples)
    return UnseenTable(split_by, means, {name: row.by_seed(_METRIC) for name, row in rows.items()})


def generalisation_claims(tables: Sequence[UnseenTable]) -> list[Claim]:
    """One claim for users and one for kinds of content.

    The paper gives no number. What can be tested is whether MMEI's lead holds: its emotion accuracy less that of the
    best other row, on whom or what it never saw; *direction only* is the most that this can show.

    Raises:
        InputError: two tables answer one claim.
    """
    claims = []
    for split_by, named in UNSEEN.items():
        name = f"generalisation to unseen {named}: MMEI's lead"
        found = [table for table in tables if table.split_by == split_by]
        if not found:
            missing = f"no table on data split by {split_by} was given (eval.py --unseen)"
            claims.append(Claim(name, "no number", "", "cannot be tested", missing))
            continue
        if len(found) > 1:
            raise InputError(f"--unseen: {len(found)} tables on data split by {split_by}: expected one at most")
        means, seeds = found[0].means, found[0].seeds
        others = {row: value for row, value in means.items() if row != "mmei"}
        best = max(others, key=lambda row: others[row].value(_METRIC)[0])
        lead = means["mmei"].difference(others[best], _METRIC)
        if not math.isfinite(lead[0]):
            claims.append(Claim(name, "no number", "", "cannot be tested", "the metric is undefined here"))
            continue
        pairs = difference_over_seeds(seeds["mmei"], seeds[best])
        points = "{:+.1f} [{:+.1f}, {:+.1f}] points".format(*(100 * part for part in lead)) + seeds_interval(pairs)
        level = means["mmei"].value(_METRIC)
        ours = f"{points}, over {ROW_TITLES[best]}, at an accuracy of {level[0]:.3f} [{level[1]:.3f}, {level[2]:.3f}]"
        # Without a number of the paper's there is nothing that could lie in our interval.
        verdict, reason = lead_verdict(math.inf, lead, pairs)
        if lead[1] <= 0.0:
            reason = "other records may show another lead"
        elif verdict == "direction only":
            reason = "MMEI leads, and the paper gives no size"
        reason = f"simulated; {reason}"
        claims.append(Claim(name, "no number", ours, verdict, reason))
    return claims
