"""The report on a table: rows with mean and deviation over seeds, the paper's figures beside them, what was searched.

Made from files alone: ``table.json``, ``rows/``, ``eval/<split>.json`` and the predictions. The same files give the
same bytes, and nothing is trained.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from mmei_jax.reports import table_sections as sections
from mmei_jax.reports.claims import Claim
from mmei_jax.reports.drawing import report_style
from mmei_jax.reports.evaluated_run import is_simulated
from mmei_jax.reports.evaluated_table import Row, read_table
from mmei_jax.reports.further_claims import NUM_RESAMPLES
from mmei_jax.reports.main_table import main_latex, main_section
from mmei_jax.reports.page import Picture, Section, to_html, to_markdown
from mmei_jax.reports.paired_resampling import resample_rows
from mmei_jax.reports.paper_table import PAPER_METRICS, PAPER_TABLE
from mmei_jax.reports.report import replace_folder
from mmei_jax.reports.tables import escaped
from mmei_jax.reports.training_times import times_sections


def write_table_report(
    workdir: Path, split: str, *, command: str, num_resamples: int = NUM_RESAMPLES, further: Sequence[Claim] = ()
) -> Path:
    """Writes ``eval/<split>_report/``: ``report.md``, ``report.html``, ``table.csv``, ``table.tex`` and pictures.

    Where the rows are those of the paper, ``claims.md`` holds the ledger of its claims once more.

    Args:
        workdir: of a table that :func:`mmei_jax.table_evaluation.evaluate_table` evaluated on the split.
        split: "validation" or "test".
        command: the command line that writes the report.
        num_resamples: of the paired bootstrap.
        further: claims for the ledger, of :func:`mmei_jax.reports.further_claims.read_further_claims`.

    Returns:
        The folder, which replaces an earlier one.

    Raises:
        InputError: a file is missing or damaged.
    """
    table = read_table(workdir, split)
    rows, reference = table.rows, table.reference
    note = " (simulated)" if is_simulated(table.dataset.spec) else ""
    metrics = sorted({*PAPER_METRICS, *sections.COMPARED})
    means = resample_rows({row.name: row.records for row in rows}, metrics, num_resamples=num_resamples)
    data = f"{escaped(table.dataset.spec.name)}, {split} split"
    tasks = [task for task in ("emotion", "intent", "joint") if reference.has(task)]
    # The ledger is of the paper's table: ablations have other rows.
    ledger = [sections.claims_section(rows, reference, means, note, further)] if set(PAPER_TABLE) <= set(means) else []
    with report_style():
        parts = [
            sections.finding_section(rows, reference, note),
            main_section(rows, table.title, note),
            *(sections.task_section(rows, task, note) for task in tasks),
            sections.comparison_section(rows, reference, means, note, num_resamples),
            *(sections.class_section(rows, task, note) for task in ("emotion", "intent") if task in tasks),
            sections.alpha_section(reference, note),
            *sections.robustness_sections(table, note),
            sections.loss_section(reference, note),
            *times_sections(workdir, rows),
            *ledger,
            sections.search_section(rows),
            Section("How to make it again", ["```bash\n" + command + "\n```"]),
        ]
    pictures = {block.name: block.png for part in parts for block in part.blocks if isinstance(block, Picture)}
    title = f"{escaped(table.title)}: {data}"
    markdown = to_markdown(title, parts)
    files = {
        "report.md": markdown.encode("utf-8"),
        "report.html": to_html(markdown, pictures).encode("utf-8"),
        "table.csv": _csv(rows).encode("utf-8"),
        "table.tex": main_latex(rows, table.title, data, note).encode("utf-8"),
        **pictures,
    }
    if ledger:
        files["claims.md"] = to_markdown(f"The paper's claims: {title}", ledger).encode("utf-8")
    folder = workdir / "eval" / f"{split}_report"
    replace_folder(folder, files)
    return folder


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
