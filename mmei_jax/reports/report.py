"""A run's report on one split: Markdown with pictures, and the same as one self-contained HTML page.

Made from files alone (``eval/<split>.json``, the predictions, the training log, the configuration, the manifest), so
that it is rebuilt without training, and the same files give the same bytes.
"""

import shutil
from pathlib import Path

from mmei_jax.reports.drawing import report_style
from mmei_jax.reports.evaluated_run import EvaluatedRun, read_run
from mmei_jax.reports.page import Picture, Section, to_html, to_markdown
from mmei_jax.reports.result_sections import (
    alpha_section,
    calibration_section,
    confusion_sections,
    metrics_section,
)
from mmei_jax.reports.run_sections import (
    commands_section,
    configuration_section,
    data_section,
    loss_section,
    summary_section,
    throughput_section,
    truncation_section,
    versions_section,
)
from mmei_jax.reports.tables import escaped


def write_report(workdir: Path, split: str, data_path: str | None = None, *, command: str | None = None) -> Path:
    """Writes ``eval/<split>_report/`` with ``report.md``, its pictures and ``report.html``, whole or not at all.

    Args:
        workdir: of a run that :func:`mmei_jax.evaluation.evaluate_workdir` has evaluated on the split.
        split: "train", "validation" or "test".
        data_path: folder of the data set, where it moved since training.
        command: the command line that writes the report, to be shown in it; None where Python code does.

    Returns:
        The folder, which replaces an earlier one.

    Raises:
        InputError: the evaluation is missing or damaged.
    """
    run = read_run(workdir, split, data_path, command)
    simulated = "" if "simulat" in run.dataset.spec.name.lower() or not run.is_simulated else " (simulated)"
    title = f"{escaped(run.dataset.spec.name)}{simulated}: report on the {split} split"
    sections = _sections(run)
    pictures = {block.name: block.png for part in sections for block in part.blocks if isinstance(block, Picture)}
    markdown = to_markdown(title, sections)
    files = {
        "report.md": markdown.encode("utf-8"),
        "report.html": to_html(markdown, pictures).encode("utf-8"),
        **pictures,
    }
    folder = workdir / "eval" / f"{split}_report"
    replace_folder(folder, files)
    return folder


def _sections(run: EvaluatedRun) -> list[Section]:
    with report_style():
        return [
            summary_section(run),
            metrics_section(run),
            loss_section(run),
            *confusion_sections(run),
            alpha_section(run),
            calibration_section(run),
            throughput_section(run),
            truncation_section(run),
            data_section(run),
            versions_section(run),
            commands_section(run),
            configuration_section(run),
        ]


def replace_folder(folder: Path, files: dict[str, bytes]) -> None:
    """Writes files into a neighbour that then takes the folder's place."""
    partial, replaced = folder.with_name(folder.name + ".partial"), folder.with_name(folder.name + ".replaced")
    for leftover in (partial, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        partial.mkdir()
        for name, content in files.items():
            (partial / name).write_bytes(content)
        if folder.exists():
            folder.rename(replaced)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)
