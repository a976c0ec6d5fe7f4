"""The report on a table: rows with mean and deviation over seeds, the paper's figures beside them, what was searched.

Made from files alone: ``table.json``, ``rows/``, ``eval/<split>.json`` and the predictions. The same files give the
same bytes, and nothing is trained.
"""

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from mmei_jax.config import Config, parse
from mmei_jax.records import Dataset
from mmei_jax.reports.claims import claims_table, table_claims
from mmei_jax.reports.drawing import report_style, to_png
from mmei_jax.reports.evaluated_run import is_simulated
from mmei_jax.reports.page import Picture, Section, to_html, to_markdown
from mmei_jax.reports.paired_resampling import ResampledMeans, resample_rows
from mmei_jax.reports.paper_table import PAPER_METRICS, PAPER_TABLE, ROW_TITLES
from mmei_jax.reports.record_table import RecordTable, read_record_table
from mmei_jax.reports.report import replace_folder
from mmei_jax.reports.resampling import WeightedMetrics
from mmei_jax.reports.tables import escaped, markdown_table
from mmei_jax.reports.training_figures import loss_figure
from mmei_jax.types import MODALITIES
from mmei_jax.workdir import read_json

NUM_RESAMPLES = 500

_TITLES = {
    "accuracy": "Acc",
    "macro_precision": "P",
    "macro_recall": "R",
    "f1_of_macro": "F1",
    "macro_f1": "macro-F1",
    "weighted_f1": "weighted-F1",
    "cross_entropy": "cross-entropy",
    "ece": "ECE",
    "map": "MAP",
    "ndcg@10": "NDCG@10",
    "hr@10": "HR@10",
}
_TASK_METRICS = ("accuracy", "macro_precision", "macro_recall", "f1_of_macro", "macro_f1", "weighted_f1")
_COMPARED = ("emotion/accuracy", "emotion/f1_of_macro", "emotion/cross_entropy", "ranking/map", "ranking/ndcg@10")


@dataclass(frozen=True)
class Row:
    """One row after evaluation.

    Attributes:
        name: of the row.
        config: with what the search chose.
        result: what ``eval/<split>.json`` holds of it.
        records: each seed's predictions.
        search: what ``search.json`` holds; None without a search.
        training: what ``replicas.json`` holds.
    """

    name: str
    config: Config
    result: dict[str, Any]
    records: list[RecordTable]
    search: dict[str, Any] | None
    training: dict[str, Any]

    def values(self, metric: str) -> Float[np.ndarray, "seeds"]:
        """The metric of every seed, NaN where undefined; ECE from the predictions."""
        if metric.endswith("/ece"):
            ones = np.ones(len(self.records[0].user_ids))
            return np.array([WeightedMetrics(part)(ones).get(metric, np.nan) for part in self.records])
        return np.array([found.get(metric, np.nan) for found in self.result["metrics"]])


def write_table_report(workdir: Path, split: str, *, command: str, num_resamples: int = NUM_RESAMPLES) -> Path:
    """Writes ``eval/<split>_report/``: ``report.md``, ``report.html``, ``table.csv``, ``table.tex`` and pictures.

    Args:
        workdir: of a table that :func:`mmei_jax.table_evaluation.evaluate_table` evaluated on the split.
        split: "validation" or "test".
        command: the command line that writes the report.
        num_resamples: of the paired bootstrap.

    Returns:
        The folder, which replaces an earlier one.

    Raises:
        InputError: a file is missing or damaged.
    """
    table = read_json(workdir / "table.json")
    evaluation = read_json(workdir / "eval" / f"{split}.json", "what train.py or eval.py wrote")
    # A second evaluation of a row, with other temperatures, follows the row.
    found = sorted(
        evaluation["rows"].items(), key=lambda item: (table["table"]["order"].index(item[1]["trained_row"]), item[0])
    )
    rows = [_read_row(workdir, split, name, result) for name, result in found]
    reference = next(row for row in rows if row.name == table["table"]["reference_row"])
    dataset = Dataset.open(reference.config.data.path)
    note = " (simulated)" if is_simulated(dataset.spec) else ""
    metrics = sorted({*PAPER_METRICS, *_COMPARED})
    means = resample_rows({row.name: row.records for row in rows}, metrics, num_resamples=num_resamples)
    title = f"Table 1 on {escaped(dataset.spec.name)}, {split} split"
    with report_style():
        sections = [
            _finding_section(rows, reference, note),
            _main_section(rows, note),
            *(_task_section(rows, task, note) for task in ("emotion", "intent", "joint") if _has(reference, task)),
            _comparison_section(rows, reference, means, note, num_resamples),
            _alpha_section(reference, note),
            _loss_section(reference, note),
            _claims_section(reference, means, note),
            _search_section(rows),
            Section("How to make it again", ["```bash\n" + command + "\n```"]),
        ]
    pictures = {block.name: block.png for part in sections for block in part.blocks if isinstance(block, Picture)}
    markdown = to_markdown(title, sections)
    files = {
        "report.md": markdown.encode("utf-8"),
        "report.html": to_html(markdown, pictures).encode("utf-8"),
        "table.csv": _csv(rows).encode("utf-8"),
        "table.tex": _latex(rows, note).encode("utf-8"),
        **pictures,
    }
    folder = workdir / "eval" / f"{split}_report"
    replace_folder(folder, files)
    return folder


def _read_row(workdir: Path, split: str, name: str, result: dict[str, Any]) -> Row:
    folder = workdir / "rows" / result["trained_row"]
    training = read_json(folder / "replicas.json")
    config = parse(training["config"])
    names = {label: spec.class_names for label, spec in Dataset.open(config.data.path).spec.labels.items()}
    records = [
        read_record_table(
            workdir / "eval" / split / name / f"seed_{seed}_predictions.parquet",
            config.loss.emotion,
            names[config.loss.emotion_label],
            names.get("intent", ()),
        )
        for seed in result["seeds"]
    ]
    search = folder / "search.json"
    return Row(name, config, result, records, read_json(search) if search.exists() else None, training)


def _has(row: Row, task: str) -> bool:
    return f"{task}/accuracy" in row.result["metrics"][0]


def _title(row: Row) -> str:
    return ROW_TITLES.get(row.name, escaped(row.name))


def _cell(values: np.ndarray, digits: int = 3) -> str:
    known = values[np.isfinite(values)]
    if not len(known):
        return ""
    deviation = f" ± {known.std(ddof=1):.{digits}f}" if len(known) > 1 else ""
    return f"{known.mean():.{digits}f}{deviation}"


def _finding_section(rows: list[Row], reference: Row, note: str) -> Section:
    """What the paper claims first: does fusion within the model pass what fusion of answers can reach?"""
    known = reference.result["reference"]
    accuracy = reference.values("emotion/accuracy").mean()
    seeds = len(reference.result["seeds"])
    lines = [
        f"{_title(reference)} names the emotion of {accuracy:.1%} of the {reference.result['num_records']:,} records"
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
        lines.append(f"The best other row is {_title(best)} with {best.values('emotion/accuracy').mean():.1%}.")
    return Section("Finding", [" ".join(lines)])


def _main_section(rows: list[Row], note: str) -> Section:
    titles = ["row", "parameters"]
    for metric in PAPER_METRICS:
        short = _TITLES[metric.partition("/")[2]]
        titles += [short, f"{short}, paper"]
    cells = []
    for row in rows:
        line = [_title(row), f"{row.result['num_parameters']:,}"]
        paper = PAPER_TABLE.get(row.name, {})
        for metric in PAPER_METRICS:
            line += [_cell(row.values(metric)), f"{paper[metric]:.3f}" if metric in paper else ""]
        cells.append(line)
    for title, suffix in (("exact posterior", ""), ("product of the unimodal posteriors", "[late_fusion]")):
        known = rows[0].result["reference"]
        if f"emotion/accuracy{suffix}" in known:
            line = [f"*{title}*", ""]
            for metric in PAPER_METRICS:
                line += [f"{known[metric + suffix]:.3f}" if metric + suffix in known else "", ""]
            cells.append(line)
    text = (
        f"Emotion and ranking{note}, mean ± standard deviation over seeds. P and R are macro averages, F1 is their "
        "harmonic mean, as in the paper's table; ranking is of the whole catalogue. The paper's figures are of a data "
        "set that was not published: they stand beside ours for the order and the gaps, not for the level."
    )
    return Section("Table 1", [text, markdown_table(titles, cells)])


def _task_section(rows: list[Row], task: str, note: str) -> Section:
    metrics = [f"{task}/{name}" for name in (*_TASK_METRICS, "cross_entropy", "ece")]
    metrics = [name for name in metrics if any(np.isfinite(row.values(name)).any() for row in rows)]
    titles = ["row", *(_TITLES[name.partition("/")[2]] for name in metrics)]
    cells = [[_title(row), *(_cell(row.values(name)) for name in metrics)] for row in rows]
    known = rows[0].result["reference"]
    if f"{task}/accuracy" in known:
        cells.append(["*exact posterior*", *(f"{known[name]:.3f}" if name in known else "" for name in metrics)])
    return Section(f"{task.capitalize()}{note}", [markdown_table(titles, cells)])


def _comparison_section(
    rows: list[Row], reference: Row, means: Mapping[str, ResampledMeans], note: str, num_resamples: int
) -> Section:
    metrics = [name for name in _COMPARED if np.isfinite(reference.values(name)).all()]
    titles = ["row", *metrics]
    cells = []
    for row in rows:
        if row is reference:
            continue
        found = [means[row.name].difference(means[reference.name], name) for name in metrics]
        cells.append([_title(row), *("{:+.3f} [{:+.3f}, {:+.3f}]".format(*part) for part in found)])
    text = (
        f"Each row minus {_title(reference)}{note}, with the 95 % interval of a paired bootstrap of {num_resamples} "
        "draws: the same records, or users, drawn anew for all seeds of both rows. An interval without 0 is a "
        "difference that other records would show too."
    )
    return Section(f"Against {reference.name}", [text, markdown_table(titles, cells)])


def _alpha_section(reference: Row, note: str) -> Section:
    names = reference.records[0].emotion.class_names
    cells = []
    for place, name in enumerate(names):
        means = []
        for part in reference.records:
            chosen = part.emotion.is_labelled & (part.emotion.label == place) & part.has_modality.all(axis=1)
            means.append(part.alpha[chosen].mean(axis=0) if chosen.any() else np.full(len(MODALITIES), np.nan))
        cells.append([escaped(name), *(_cell(np.array(means)[:, column]) for column in range(len(MODALITIES)))])
    text = f"Mean weight of each modality (Eq. 3){note} in records that have all three, by true emotion."
    return Section("α by emotion", [text, markdown_table(["emotion", *MODALITIES], cells)])


def _loss_section(reference: Row, note: str) -> Section:
    """Fig. 3: training and validation over epochs, the mean of the seeds."""
    groups = reference.training["history"]
    evaluations = groups[0]["evaluations"]
    splits = Dataset.open(reference.config.data.path).manifest["splits"]
    num_records = sum(splits[name]["num_records"] for name in reference.config.data.train_splits)
    epochs = [part["step"] * reference.config.data.batch_size / num_records for part in evaluations]

    def mean(key: str) -> list[float]:
        found = []
        for place in range(len(epochs)):
            parts = [np.array(group["evaluations"][place][key], float) for group in groups]
            found.append(float(np.nanmean(np.concatenate(parts))))
        return found

    best = np.mean(reference.training["best_steps"]) * reference.config.data.batch_size / num_records
    figure = loss_figure(
        {"Total loss": ((epochs, mean("loss")), (epochs, mean("validation_loss")))},
        {reference.training["best_metric"]: (epochs, mean("value"))},
        best_epoch=float(best),
    )
    caption = (
        f"Losses of {reference.name}{note} over epochs, mean of {len(reference.result['seeds'])} seeds; the dotted "
        "line is the mean epoch of the checkpoints that were evaluated. The place of the paper's Fig. 3."
    )
    return Section("Training", [Picture("loss.png", caption, to_png(figure))])


def _claims_section(reference: Row, means: Mapping[str, ResampledMeans], note: str) -> Section:
    last = [np.array(group["evaluations"][-1]["loss"], float) for group in reference.training["history"]]
    claims = table_claims(means, float(np.nanmean(np.concatenate(last))))
    text = (
        f"Every number that the paper gives, beside ours{note}. *Reproduced*: the paper's number lies in our interval, "
        "and a difference has its sign beyond doubt. *Direction only*: the sign, not the size."
    )
    return Section("The paper's claims", [text, claims_table(claims)])


def _search_section(rows: list[Row]) -> Section:
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
        blocks.append(f"### {_title(row)}")
        blocks.append(markdown_table(["point", *keys, row.search["metric"]], cells))
        blocks.append(f"{row.search['num_epochs']} epochs each, seed {row.search['seed']}; chosen in bold.")
    return Section("Search on the validation splits", blocks or ["No search: the configuration names none."])


def _flat(rows: list[Row]) -> list[tuple[str, int, Mapping[str, float]]]:
    return [
        (row.name, seed, found)
        for row in rows
        for seed, found in zip(row.result["seeds"], row.result["metrics"], strict=True)
    ]


def _csv(rows: list[Row]) -> str:
    """One line for each row and seed, every metric a column."""
    lines = _flat(rows)
    names = sorted({name for _, _, found in lines for name in found})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["row", "seed", *names])
    for row, seed, found in lines:
        writer.writerow([row, seed, *(repr(found[name]) if name in found else "" for name in names)])
    return text.getvalue()


def _latex(rows: list[Row], note: str) -> str:
    """The main table, for a paper."""
    titles = " & ".join(_TITLES[metric.partition("/")[2]] for metric in PAPER_METRICS)
    lines = [
        f"% Mean and standard deviation over seeds{note}.",
        r"\begin{tabular}{l" + "r" * len(PAPER_METRICS) + "}",
        r"\hline",
        f"Model & {titles} " + r"\\",
        r"\hline",
    ]
    for row in rows:
        cells = " & ".join(_cell(row.values(metric)).replace("±", r"$\pm$") for metric in PAPER_METRICS)
        lines.append(f"{_title(row).strip('*').replace('_', chr(92) + '_')} & {cells} " + r"\\")
    return "\n".join([*lines, r"\hline", r"\end{tabular}", ""])
