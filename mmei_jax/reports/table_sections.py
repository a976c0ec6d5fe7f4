"""The sections of a table's report: rows side by side, by class, against the reference, and what the paper claims."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmei_jax.records import Dataset
from mmei_jax.reports.claims import GAINED_METRICS, Claim, claims_table, table_claims
from mmei_jax.reports.drawing import to_png
from mmei_jax.reports.evaluated_table import METRIC_TITLES, EvaluatedTable, Row, mean_and_deviation
from mmei_jax.reports.page import Picture, Section
from mmei_jax.reports.paired_resampling import ResampledMeans
from mmei_jax.reports.paired_seeds import difference_over_seeds
from mmei_jax.reports.record_table import TaskRecords
from mmei_jax.reports.table_lines import absence_lines, row_ceiling, table_ceilings
from mmei_jax.reports.tables import escaped, markdown_table
from mmei_jax.reports.training_figures import loss_figure
from mmei_jax.types import MODALITIES

_TASK_METRICS = ("accuracy", "macro_precision", "macro_recall", "f1_of_macro", "macro_f1", "weighted_f1")
_AXES = ("missing", "noise", "both")
COMPARED = (
    "emotion/accuracy",
    "emotion/f1_of_macro",
    "emotion/cross_entropy",
    "intent/accuracy",
    "ranking/map",
    "ranking/ndcg@10",
)


def finding_section(rows: list[Row], reference: Row, note: str) -> Section:
    """What the paper claims first: does fusion within the model pass what fusion of answers can reach?"""
    known = reference.result["reference"]
    accuracy = reference.values("emotion/accuracy").mean()
    seeds = len(reference.result["seeds"])
    lines = [
        f"{reference.title} names the emotion of {accuracy:.1%} of the {reference.result['num_records']:,} records"
        f"{note}, the mean of {seeds} seeds."
    ]
    ceiling = known.get("emotion/accuracy[late_fusion]")
    if ceiling is not None:
        word = "above" if accuracy > ceiling else "below"
        lines.append(
            f"That is **{word} the late-fusion ceiling of {ceiling:.1%}**, what the product of the exact unimodal "
            f"posteriors reaches; the exact posterior of everything reaches {known['emotion/accuracy']:.1%}."
        )
    others = [row for row in rows if row is not reference]
    if others:
        best = max(others, key=lambda row: row.values("emotion/accuracy").mean())
        lines.append(f"The best other row is {best.title} with {best.values('emotion/accuracy').mean():.1%}.")
    return Section("Finding", [" ".join(lines)])


def task_section(rows: list[Row], task: str, note: str) -> Section:
    """All metrics of one task, with calibration, and the exact posteriors'."""
    metrics = [f"{task}/{name}" for name in (*_TASK_METRICS, "cross_entropy", "ece")]
    metrics = [name for name in metrics if any(np.isfinite(row.values(name)).any() for row in rows)]
    lines = []
    for row in rows:
        lines += [(row.title, [row.cell(name) for name in metrics]), *row_ceiling(row, metrics)]
    lines += table_ceilings(rows[0].result["reference"], metrics)
    titles = ["row", *(METRIC_TITLES[name.partition("/")[2]] for name in metrics)]
    table = markdown_table(titles, [[title, *cells] for title, cells in lines])
    return Section(f"{task.capitalize()}{note}", [table, *absence_lines(rows, metrics)])


def comparison_section(
    rows: list[Row], reference: Row, means: Mapping[str, ResampledMeans], note: str, num_resamples: int
) -> Section:
    """Each row minus the reference, with an interval for other records and one for other seeds."""
    metrics = [name for name in COMPARED if np.isfinite(reference.values(name)).any()]
    cells = []
    for row in rows:
        if row is reference:
            continue
        found = {name: means[row.name].difference(means[reference.name], name) for name in metrics}
        # A row without the task has no difference, nor has a metric that some seed lacks.
        printed = {name: _with_interval(*part) if np.isfinite(part).all() else "" for name, part in found.items()}
        cells.append([row.title, *("–" if row.without(name) else cell for name, cell in printed.items())])
    text = (
        f"Each row minus {reference.title}{note}, with two 95 % intervals, each of one kind of chance and blind to the "
        "other. About one interval in twenty leaves out 0 by chance alone."
    )
    over_records = (
        f"**Other records, these trained models**: a paired bootstrap of {num_resamples} draws, the same records, or "
        "users, drawn anew for all seeds of both rows. An interval without 0 is a difference that other records would "
        "show too."
    )
    over_seeds = (
        "**Other seeds, these records**: Student's t of the differences seed by seed, over the seeds that both rows "
        "have; one alone gives no interval. An interval without 0 is a difference that training again from other seeds "
        "would show too."
    )
    titles = ["row", *metrics]
    tables = [over_records, markdown_table(titles, cells), over_seeds, seeds_table(rows, reference, metrics)]
    return Section(f"Against {reference.name}", [text, *tables, *absence_lines(rows, metrics)])


def seeds_table(rows: list[Row], reference: Row, metrics: Sequence[str]) -> str:
    """Each row minus the reference over the seeds of both; a cell says so where some seed of the reference is not."""
    cells = [
        [row.title, *(_seeds_cell(row, reference, name) for name in metrics)] for row in rows if row is not reference
    ]
    return markdown_table(["row", *metrics], cells)


def _seeds_cell(row: Row, reference: Row, metric: str) -> str:
    if row.without(metric):
        return "–"
    if not np.isfinite(row.values(metric)).any():
        return ""
    found = difference_over_seeds(row.by_seed(metric), reference.by_seed(metric))
    if not found.num_seeds:
        return "no seed in common"
    is_alone = found.num_seeds == 1
    text = f"{found.value:+.3f}" if is_alone else _with_interval(found.value, found.low, found.high)
    is_whole = found.num_seeds == len(reference.result["seeds"])
    return text if is_whole else f"{text} ({found.num_seeds} seed{'' if is_alone else 's'})"


def class_section(rows: list[Row], task: str, note: str) -> Section:
    """F1 of every class in every row."""
    parts = [_task_records(row, task) for row in rows]
    known = next(found[0] for found in parts if found)
    labels = known.label[known.is_labelled]
    if known.kind == "softmax":
        counts = np.bincount(labels.astype(np.int64), minlength=len(known.class_names))
    else:
        counts = (labels > 0.5).sum(axis=0)
    titles = ["row", *(f"{escaped(name)} ({count:,})" for name, count in zip(known.class_names, counts, strict=True))]
    cells = []
    for row, found in zip(rows, parts, strict=True):
        if found:
            scores = np.array([_f1_of_classes(part) for part in found])
            cells.append([row.title, *map(mean_and_deviation, scores.T)])
        else:
            cells.append([row.title, *["–"] * len(known.class_names)])
    text = f"F1 of each {task}{note}, mean ± standard deviation over seeds; in brackets the records that have it."
    return Section(f"{task.capitalize()} by class", [text, markdown_table(titles, cells), *absence_lines(rows, [task])])


def _task_records(row: Row, task: str) -> list[TaskRecords]:
    return [part for part in (getattr(table, task) for table in row.records) if part is not None]


def _f1_of_classes(part: TaskRecords) -> np.ndarray:
    """``[classes]`` F1; NaN for a class that no record has and none is given."""
    is_class = np.arange(len(part.class_names))
    label, choice = part.label[part.is_labelled], np.asarray(part.choice)[part.is_labelled]
    if part.kind == "softmax":
        present, named = label[:, None] == is_class, choice[:, None] == is_class
    else:
        present, named = label > 0.5, choice
    total = present.sum(axis=0) + named.sum(axis=0)
    return np.where(total > 0, 2.0 * (present & named).sum(axis=0) / np.maximum(total, 1), np.nan)


def alpha_section(reference: Row, note: str) -> Section:
    """Mean weight of each modality by emotion."""
    names = reference.records[0].emotion.class_names
    cells = []
    for place, name in enumerate(names):
        means = []
        for part in reference.records:
            chosen = part.emotion.is_labelled & (part.emotion.label == place) & part.has_modality.all(axis=1)
            means.append(part.alpha[chosen].mean(axis=0) if chosen.any() else np.full(len(MODALITIES), np.nan))
        cells.append(
            [escaped(name), *(mean_and_deviation(np.array(means)[:, column]) for column in range(len(MODALITIES)))]
        )
    text = f"Mean weight of each modality (Eq. 3){note} in records that have all three, by true emotion."
    return Section("α by emotion", [text, markdown_table(["emotion", *MODALITIES], cells)])


def robustness_sections(table: EvaluatedTable, note: str) -> list[Section]:
    """Each row with modalities left out, tokens lost and noise added; nothing where the card was not made."""
    card = table.robustness
    if card is None:
        return []
    groups: dict[str, list[Any]] = {}
    for model in card["models"]:
        groups.setdefault(model["name"], []).append(model["records"])
    metric = next(iter(card["models"][0]["records"]["all"]["scores"]))
    found = card["models"][0]["records"]["all"]["scores"][metric]["subsets"]
    subsets = sorted(found, key=lambda subset: (subset.count("+"), *map(MODALITIES.index, subset.split("+"))))
    everything = "+".join(card["modalities"])

    def cell(runs: list[Any], part: str, subset: str, *keys: str) -> str:
        found = []
        for run in runs:
            value = run[part]["scores"][metric]["subsets"][subset]
            for key in keys:
                value = value[key]
            found.append(np.nan if value is None else value)
        return mean_and_deviation(np.array(found))

    has_conflict = "conflict" in card["models"][0]["records"]
    kept, axes = [], []
    for name, runs in groups.items():
        title = next((row.title for row in table.rows if row.name == name), escaped(name))
        scores = [cell(runs, "all", subset, "score") for subset in subsets]
        if has_conflict:
            scores += [cell(runs, part, everything, "score") for part in ("conflict", "no conflict")]
        kept.append([title, *scores])
        pairs = [(what, axis) for axis in _AXES for what in ("area", "relative_robustness")]
        axes.append([title, *(cell(runs, "all", everything, what, axis) for what, axis in pairs)])
    text = f"`{metric}`{note} of the rows that read all modalities, each row's first seed, by the modalities kept" + (
        ", then, with all of them, in records that are in conflict and that are not." if has_conflict else "."
    )
    blocks: list[str | Picture] = [
        text,
        markdown_table(["row", *subsets, *(("in conflict", "not in conflict") if has_conflict else ())], kept),
        f"All modalities kept, tokens missing at rates {_listed(card['missing_rates'])} and noise of "
        f"{_listed(card['noise_levels'])} deviations. Area: mean score along the curve; relative robustness: the mean "
        "share kept of what the row has above a constant answer.",
        markdown_table(["row", *(f"{what}: {axis}" for axis in _AXES for what in ("area", "relative"))], axes),
    ]
    if table.robustness_png is not None:
        caption = f"Robustness of the rows{note}: modalities kept, missing rate, noise level, both. More is better."
        blocks.insert(0, Picture("robustness.png", caption, table.robustness_png))
    return [Section("Robustness", blocks)]


def _listed(numbers: list[float]) -> str:
    return ", ".join(f"{number:g}" for number in numbers)


def loss_section(reference: Row, note: str) -> Section:
    """Fig. 3: training and validation over epochs, the mean of the seeds that have not stopped."""
    groups = [group["evaluations"] for group in reference.training["history"]]
    splits = Dataset.open(reference.config.data.path).manifest["splits"]
    num_records = sum(splits[name]["num_records"] for name in reference.config.data.train_splits)
    epochs = [part["step"] * reference.config.data.batch_size / num_records for part in max(groups, key=len)]
    best = np.mean(reference.training["best_steps"]) * reference.config.data.batch_size / num_records
    figure = loss_figure(
        {
            "Total loss": (
                (epochs, _training_curve(groups, "loss")),
                (epochs, _training_curve(groups, "validation_loss")),
            )
        },
        {reference.training["best_metric"]: (epochs, _training_curve(groups, "value"))},
        best_epoch=float(best),
    )
    caption = (
        f"Losses of {reference.name}{note} over epochs, mean of {len(reference.result['seeds'])} seeds, each until it "
        "stopped; the dotted line is the mean epoch of the checkpoints that were evaluated. The place of the paper's "
        "Fig. 3."
    )
    return Section("Training", [Picture("loss.png", caption, to_png(figure))])


def _training_curve(groups: list[list[dict[str, Any]]], key: str) -> list[float]:
    """By place of an evaluation, the mean over the replicas of all groups that were at work until then.

    A replica that has stopped goes on logging, but what it logs is of updates that were discarded. NaN where no
    replica has a finite number.
    """
    curve = []
    for place in range(max(map(len, groups))):
        # Groups that did not fit into memory together end at different evaluations: those that have this one count.
        known = [group for group in groups if place < len(group)]
        values = np.concatenate([np.array(group[place][key], float) for group in known])
        was_active = [group[place - 1]["is_active"] if place else [True] * len(group[0][key]) for group in known]
        counts = np.concatenate(was_active).astype(bool) & np.isfinite(values)
        curve.append(float(values[counts].mean()) if counts.any() else float("nan"))
    return curve


def claims_section(
    rows: list[Row],
    reference: Row,
    means: Mapping[str, ResampledMeans],
    note: str,
    further: Sequence[Claim],
) -> Section:
    """Every number of the paper beside ours, with a verdict; ``further`` claims are those that no table answers."""
    last = [loss for group in reference.training["history"] for loss in _last_losses(group["evaluations"])]
    titles = {row.name: row.title for row in rows}
    seeds = {row.name: {metric: row.by_seed(metric) for metric in GAINED_METRICS} for row in rows}
    claims = [*table_claims(means, seeds, float(np.nanmean(last)), titles), *further]
    text = (
        f"Every number that the paper gives, beside ours{note}. *Reproduced*: the paper's number lies in our interval, "
        "and a difference has its sign beyond doubt. *Direction only*: the sign, not the size, or the paper gives no "
        "size. A difference of rows is beyond doubt where both intervals say so: that of other records, with these "
        "trained models, and that of other seeds, on these records. A level has the former alone."
    )
    return Section("The paper's claims", [text, claims_table(claims)])


def _last_losses(evaluations: list[dict[str, Any]]) -> list[float]:
    """Each replica's mean training loss before its last evaluation; stopped ones have no later one of their own."""
    last = np.array(evaluations[0]["loss"], float)
    for before, evaluation in itertools.pairwise(evaluations):
        last = np.where(before["is_active"], np.array(evaluation["loss"], float), last)
    return [float(loss) for loss in last]


def search_section(rows: list[Row]) -> Section:
    """What was tried on the validation splits, and what was chosen."""
    blocks: list[str | Picture] = []
    for row in rows:
        if row.search is None or row.name != row.result["trained_row"]:
            continue
        keys = list(row.search["chosen"])
        cells = [
            [
                f"**{number + 1}**" if number == row.search["chosen_index"] else f"{number + 1}",
                *(f"{point[key]:g}" for key in keys),
                "diverged" if point["value"] is None else f"{point['value']:.4f}",
            ]
            for number, point in enumerate(row.search["points"])
        ]
        blocks.append(f"### {row.title}")
        blocks.append(markdown_table(["point", *keys, row.search["metric"]], cells))
        blocks.append(f"{row.search['num_epochs']} epochs each, seed {row.search['seed']}; chosen in bold.")
    return Section("Search on the validation splits", blocks or ["No search: the configuration names none."])


def _with_interval(value: float, low: float, high: float) -> str:
    return f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"
