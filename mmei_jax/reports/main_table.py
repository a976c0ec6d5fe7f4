"""The first table of a report, the place of the paper's Table 1: our figures, the paper's and the exact ones."""

import re
from collections.abc import Mapping, Sequence

import numpy as np

from mmei_jax.record_schema import RANDOM_WEIGHTS, Producer
from mmei_jax.reports.evaluated_table import METRIC_TITLES, Row, encoder_kind
from mmei_jax.reports.page import Section
from mmei_jax.reports.paper_table import PAPER_METRICS, PAPER_TABLE
from mmei_jax.reports.table_lines import Line, absence_lines, row_ceiling, table_ceilings
from mmei_jax.reports.tables import escaped, markdown_table

# Networks that extraction runs, by the names that manifests have for them.
ENCODER_TITLES: Mapping[str, str] = {
    "bert": "BERT",
    "vit": "ViT",
    "wav2vec2": "Wav2Vec2",
    "resnet": "ResNet",
    "audio_cnn": "Audio-CNN",
}
_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\\": r"\textbackslash{}",
    "±": r"$\pm$",
    "–": "--",
}


def main_section(rows: list[Row], title: str, note: str) -> Section:
    """Ours and the paper's figures in columns of their own, exact ceilings below.

    Args:
        rows: of the table.
        title: of the table, as its configuration has it.
        note: " (simulated)" where the data are.
    """
    metrics = _measured(rows)
    table = markdown_table(_titles(metrics), _lines(rows, metrics))
    return Section(escaped(title), [*_texts(rows, metrics, note), table, *absence_lines(rows, metrics)])


def main_latex(rows: list[Row], title: str, data: str, note: str) -> str:
    """The same table with a caption, for a paper.

    Args:
        rows: of the table.
        title: of the table, as its configuration has it.
        data: which data set and split, in Markdown.
        note: " (simulated)" where the data are.
    """
    metrics = _measured(rows)
    caption = " ".join([f"{escaped(title)}: {data}.", *_texts(rows, metrics, note), *absence_lines(rows, metrics)])
    titles = _titles(metrics)
    lines = [
        r"% Needs \usepackage{graphicx}.",
        r"\begin{table*}",
        r"\centering",
        rf"\caption{{{_to_latex(caption)}}}",
        r"\resizebox{\textwidth}{!}{%",
        r"\begin{tabular}{l" + "r" * (len(titles) - 1) + "}",
        r"\hline",
        _latex_line(titles),
        r"\hline",
        *(_latex_line(line) for line in _lines(rows, metrics)),
        r"\hline",
        r"\end{tabular}}",
        r"\end{table*}",
    ]
    return "\n".join([*lines, ""])


def _measured(rows: list[Row]) -> list[str]:
    return [metric for metric in PAPER_METRICS if any(np.isfinite(row.values(metric)).any() for row in rows)]


def _titles(metrics: Sequence[str]) -> list[str]:
    short = [METRIC_TITLES[metric.partition("/")[2]] for metric in metrics]
    return ["row", "parameters", *(column for title in short for column in (title, f"{title}, paper"))]


def _lines(rows: list[Row], metrics: Sequence[str]) -> list[list[str]]:
    """The cells of all rows and ceilings, in Markdown."""
    lines = []
    for row in rows:
        paper = PAPER_TABLE.get(row.name, {})
        line = [row.title, f"{row.result['num_parameters']:,}"]
        for metric in metrics:
            line += [row.cell(metric), f"{paper[metric]:.3f}" if metric in paper else ""]
        lines += [line, *map(_spread, row_ceiling(row, metrics))]
    return [*lines, *map(_spread, table_ceilings(rows[0].result["reference"], metrics))]


def _spread(ceiling: Line) -> list[str]:
    """A ceiling in the columns of :func:`_titles`: it has no parameters, and the paper has none of it."""
    title, cells = ceiling
    return [title, "", *(column for cell in cells for column in (cell, ""))]


def _texts(rows: list[Row], metrics: Sequence[str], note: str) -> list[str]:
    has_ranking = any(metric.startswith("ranking/") for metric in metrics)
    what, catalogue = ("Emotion and ranking", "; ranking is of the whole catalogue") if has_ranking else ("Emotion", "")
    text = (
        f"{what}{note}, mean ± standard deviation over seeds. P and R are macro averages, F1 is their harmonic mean, "
        f"as in the paper's table{catalogue}. The paper's figures are of a data set that was not published: they stand "
        "beside ours for the order and the gaps, not for the level."
    )
    if table_ceilings(rows[0].result["reference"], metrics):
        text += " Lines without parameters are what exact posteriors reach on the same records"
        below = any(row_ceiling(row, metrics) for row in rows)
        text += ": of all modalities at the end, below a row of those that it reads." if below else "."
    told = encoders_text(rows)
    return [text, *([told] if told else [])]


def encoders_text(rows: list[Row]) -> str:
    """Which encoders made what the rows read, and whether their weights are random; "" where no manifest names any."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        told = [
            f"{modality} by {_encoder(producer)}" for modality, producer in row.producers.items() if _encoder(producer)
        ]
        if told:
            groups.setdefault((row.config.data.path, row.dataset_name, *told), []).append(row.title)
    parts = [
        f"{', '.join(titles)}: {', '.join(told)}; data set {escaped(name)} in `{path}`"
        for (path, name, *told), titles in groups.items()
    ]
    return f"Encoders of the features, by row. {'. '.join(parts)}." if parts else ""


def _encoder(producer: Producer) -> str:
    """An encoder and its weights, in words; "" where they are not known to be a network's."""
    kind = encoder_kind(producer)
    if kind not in ENCODER_TITLES:
        return ""
    source = (producer.encoder or "").partition(" ")[2]
    weights = source if source.startswith(RANDOM_WEIGHTS) else f"given weights: {escaped(source)}"
    return f"{ENCODER_TITLES[kind]} ({weights})"


def _latex_line(cells: Sequence[str]) -> str:
    return " & ".join(map(_to_latex, cells)) + r" \\"


def _to_latex(markdown: str) -> str:
    """Markdown of one line as LaTeX: emphasis stays, code loses its marks, what LaTeX would read as markup does not."""

    def convert(found: re.Match[str]) -> str:
        plain, emphasis = found.groups()
        if emphasis is not None:
            return rf"\textit{{{_to_latex(emphasis)}}}"
        character = plain or found.group()
        return "" if found.group() == "`" else _LATEX.get(character, character)

    return re.sub(r"\\(.)|\*([^*]*)\*|.", convert, markdown)
