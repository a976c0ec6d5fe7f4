"""The report on a feedback loop: rounds, off-policy estimates beside the truth of the simulation, the A/B, the claims.

Made from ``rounds.json`` and ``ab.json`` alone; the same files give the same bytes.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmei_jax.reports.claims import ONLINE_CLAIMS, claims_table, online_claims
from mmei_jax.reports.drawing import report_style, to_png
from mmei_jax.reports.feedback_figure import feedback_figure
from mmei_jax.reports.page import Picture, Section, to_html, to_markdown
from mmei_jax.reports.report import replace_folder
from mmei_jax.reports.tables import escaped, markdown_table

_ARMS = {
    "behaviour_only": "behaviour only",
    "emotion_driven": "emotion-driven",
    "placebo": "placebo (another user's record)",
}
# In the order of mmei_jax.feedback.estimators, which JSON does not keep.
_ESTIMATORS = ("dm", "ips", "clipped_ips", "snips", "dr", "sndr", "switch_dr")
_METRICS = {"dwell_seconds": "seconds per visit", "satisfaction": "satisfaction (1 to 5)", "rating": "rating (1 to 5)"}


def write_feedback_report(workdir: Path, rounds: Mapping[str, Any], ab: Mapping[str, Any], *, command: str) -> Path:
    """Writes ``report/``: ``report.md``, ``report.html`` and the picture.

    Args:
        workdir: of the loop.
        rounds: what ``rounds.json`` holds.
        ab: what ``ab.json`` holds.
        command: the command line that writes the report.

    Returns:
        The folder, which replaces an earlier one.
    """
    estimator = rounds["config"]["gate"]["estimator"]
    results = rounds["rounds"]
    with report_style():
        png = to_png(feedback_figure(results, ab, estimator))
    caption = (
        "Top: what the log says of the deployed policy and of its candidate, with intervals, and their true simulated "
        "values. Left: all policies, judged on the last round's log. Right: the A/B. Simulated throughout."
    )
    picture = Picture("feedback.png", caption, png)
    parts = [
        _finding(rounds, ab),
        Section("Rounds", [picture, _rounds_table(results, estimator), _ROUNDS_TEXT]),
        Section("Every policy on the last round's log", [_policies_table(results[-1]), _POLICIES_TEXT]),
        Section("A/B", [_ab_text(rounds, ab), _ab_table(ab)]),
        Section("The paper's claims", [claims_table(online_claims(ab))]),
        Section("How to make it again", ["```bash\n" + command + "\n```"]),
    ]
    markdown = to_markdown("Feedback loop (simulated users)", parts)
    files = {
        "report.md": markdown.encode("utf-8"),
        "report.html": to_html(markdown, {picture.name: png}).encode("utf-8"),
        picture.name: png,
    }
    folder = workdir / "report"
    replace_folder(folder, files)
    return folder


_ROUNDS_TEXT = (
    "Values are rewards per shown item. *Log*: the mean of the deployed policy's own impressions. *Estimate*: what the "
    "gate's estimator makes of the candidate from them; a decision is the choice of all items up to its position, so "
    "that its weight is the product of the ratios up to there. *True*: the simulator's answer, which neither learning "
    "nor the gate sees. The visits that judge are of users none of whose visits taught anything."
)
_POLICIES_TEXT = (
    "ESS: effective sample size over decisions. *No support*: share of logged decisions that the policy would never "
    "make. Matrix factorisation (`behaviour_only`) learned from other users than those who judge, and ranks by click "
    "rate for them. Only the learned policy may be deployed; the others show what the log can tell of policies far "
    "from the one that wrote it, and the gate's answer to each."
)


def _finding(rounds: Mapping[str, Any], ab: Mapping[str, Any]) -> Section:
    results, source = rounds["rounds"], rounds["source"]
    lines = [
        "> Simulated: users, moods and reactions are AIGC-INT-Sim's. Users show records of the "
        f"{source['split']} split of {escaped(source['dataset'])}, which the model of {escaped(source['run'])} "
        f"(step {source['checkpoint_step']}) reads, and in the A/B those of the {source['ab_split']} split; nothing "
        "that learns or judges reads their labels.",
        _deployments(results),
        *(f"{line[0].upper()}{line[1:]}." for line in uplift_lines(ab)),
    ]
    if source["ab_split"] != "test":
        lines.append(
            "The model's checkpoint was chosen on the A/B's records (`ab.split`): this tries settings, and answers no "
            "claim."
        )
    return Section("What was found", lines)


def _deployments(results: Sequence[Mapping[str, Any]]) -> str:
    """What the gate let through, and what that earned in the simulator."""
    first, last = results[0]["current"], results[-1]
    number = len([result for result in results if result["candidates"][0]["gate"]["is_promoted"]])
    candidates = f"{len(results)} candidate{'s' if len(results) > 1 else ''}"
    if not number:
        value = f"`{last['deployed']}` still fills the slates. Its reward per shown item is {_truth(first['truth'])}"
        later = f", and {_truth(last['current']['truth'])} at the last one's" if len(results) > 1 else ""
        return f"The gate refused {candidates}, and nothing was deployed: {value} at the first round's visits{later}."
    is_last = last["candidates"][0]["gate"]["is_promoted"]
    final = last["candidates"][0] if is_last else last["current"]
    return (
        f"Of {candidates} the gate promoted {number}. Reward per shown item in the simulator: {_truth(first['truth'])} "
        f"of the first policy at the first round's visits, {_truth(final['truth'])} of `{last['deployed']}`, the last "
        "one deployed, at the last round's."
    )


def uplift_lines(ab: Mapping[str, Any]) -> list[str]:
    """A line on each uplift of an A/B: its interval, and what its placebo says of it.

    Args:
        ab: what ``ab.json`` holds.
    """
    lines = []
    for metric, (title, paper) in ONLINE_CLAIMS.items():
        found, placebo = ab["uplift"]["emotion_driven"][metric], ab["uplift"]["placebo"][metric]
        lines.append(
            f"{title}, emotion-driven over behaviour only: {_percent(found)} (paper: {100 * paper:+.1f} %), "
            f"{_direction(found)}; placebo: {_percent(placebo)}, "
            f"{_placebo(found, placebo, is_lost=ab['placebo_loses_uplift'][metric])}"
        )
    return lines


def _direction(found: Mapping[str, Any]) -> str:
    if _is_undefined(found):
        return "no answer"
    if found["low"] > 0.0:
        return "an uplift"
    return "a loss" if found["high"] < 0.0 else "neither an uplift nor a loss beyond doubt"


def _placebo(found: Mapping[str, Any], placebo: Mapping[str, Any], *, is_lost: bool) -> str:
    """What a placebo says: of an uplift whether it loses it, else only where it lies."""
    if _is_undefined(found) or _is_undefined(placebo):
        return "no answer"
    if found["low"] > 0.0 and is_lost:
        return "which loses the uplift"
    if placebo["high"] < found["low"]:
        place = "which is below emotion-driven"
    elif placebo["low"] > found["high"]:
        place = "which is above emotion-driven"
    else:
        place = "which cannot be told from emotion-driven"
    if not found["low"] > 0.0:
        return f"{place}; there is no uplift to lose"
    if placebo["low"] > 0.0:
        return f"{place} and has an uplift too: it does not lose the uplift"
    return f"{place}: it is not shown to lose the uplift"


def _rounds_table(results: Sequence[Mapping[str, Any]], estimator: str) -> str:
    rows = []
    for result in results:
        found = result["candidates"][0]
        rows.append(
            [
                str(result["round"] + 1),
                f"`{result['policy']}`",
                _bounded(result["current"]["logged"]),
                _truth(result["current"]["truth"]),
                f"`{found['policy']}`",
                _bounded(found["estimates"][estimator]),
                _truth(found["truth"]),
                f"{_share(found['overlap'])}",
                escaped(found["gate"]["reason"]),
            ]
        )
    titles = ["round", "deployed", "log [95 %]", "true", "candidate", f"{estimator} [95 %]", "true", "ESS", "gate"]
    return markdown_table(titles, rows, num_text_columns=9)


def _policies_table(result: Mapping[str, Any]) -> str:
    estimates = result["candidates"][0]["estimates"]
    names = [name for name in _ESTIMATORS if name in estimates]
    rows = []
    for found in result["candidates"]:
        overlap = found["overlap"]
        rows.append(
            [
                f"`{found['name']}`",
                _truth(found["truth"]),
                *(_bounded(found["estimates"][name]) for name in names),
                _share(overlap),
                f"{overlap['mean_weight']:.2f}",
                f"{overlap['largest_weight']:.3g}",
                f"{overlap['share_without_support']:.1%}",
                escaped(found["gate"]["reason"]),
            ]
        )
    titles = ["policy", "true", *names, "ESS", "mean weight", "largest", "no support", "gate"]
    return markdown_table(titles, rows, num_text_columns=len(titles))


def _ab_text(rounds: Mapping[str, Any], ab: Mapping[str, Any]) -> str:
    known = ab["control_knows"]
    return (
        f"{ab['num_users']:,} users, {ab['num_visits']} visits each, {ab['num_seeds']} seeds; the arms share users, "
        "moods, records and chances. Behaviour only: matrix factorisation of the clicks of as many visits of these "
        "users, whose slates it filled itself, uniformly at first; the click rates that it predicts deviate by "
        f"{known['items']:.3f} between items, and by {known['users']:.3f} for what it knows of users; emotion-driven: "
        f"`{ab['policies']['emotion_driven']}`, whose choices are uniform at a rate of "
        f"{rounds['config']['learning']['uniform_share']:g}, as those of behaviour only; placebo: the same, shown the "
        "record of another user of the same visit. Satisfaction is the hidden mean expected satisfaction with what was "
        "shown, as it was examined; ratings are what users gave. Intervals of a bootstrap over users and seeds."
    )


def _ab_table(ab: Mapping[str, Any]) -> str:
    rows = []
    for arm, title in _ARMS.items():
        cells = [title]
        for metric in _METRICS:
            cells.append(_bounded(ab["arms"][arm][metric], digits=2))
            cells.append(_percent(ab["uplift"][arm][metric]) if arm in ab["uplift"] else "")
        rows.append(cells)
    uplift = f"uplift [{100 * ab['confidence']:g} %]"
    titles = ["arm", *(name for title in _METRICS.values() for name in (title, uplift))]
    return markdown_table(titles, rows)


def _share(overlap: Mapping[str, Any]) -> str:
    return f"{overlap['effective_sample_size'] / overlap['num_decisions']:.1%}"


def _truth(truth: Mapping[str, float]) -> str:
    return f"{truth['value']:.4f} ± {truth['standard_error']:.4f}"


def _is_undefined(one: Mapping[str, Any]) -> bool:
    return None in (one["value"], one["low"], one["high"])


def _bounded(one: Mapping[str, float | None], digits: int = 4) -> str:
    if _is_undefined(one):
        return "undefined"
    return f"{one['value']:.{digits}f} [{one['low']:.{digits}f}, {one['high']:.{digits}f}]"


def _percent(one: Mapping[str, Any]) -> str:
    if _is_undefined(one):
        return "undefined"
    return f"{100 * one['value']:+.1f} % [{100 * one['low']:+.1f}, {100 * one['high']:+.1f}]"
