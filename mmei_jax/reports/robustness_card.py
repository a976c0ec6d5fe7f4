"""A robustness card in words, tables and one picture, and its lines for the terminal."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mmei_jax.records import DatasetSpec
from mmei_jax.reports.drawing import report_style, to_png
from mmei_jax.reports.evaluated_run import is_simulated
from mmei_jax.reports.page import Picture, Section, to_markdown
from mmei_jax.reports.robustness_figure import by_name, drawn_scores, robustness_figure
from mmei_jax.reports.tables import escaped, markdown_table
from mmei_jax.robustness_metrics import ALL, AXES, CONFLICT, NO_CONFLICT, Robustness, effective_robustness, scores_of

# Of cross-entropies and the other F1 the JSON file and the table hold the same.
_TOLD = ("/accuracy", "/acc2_has0", "/macro_f1")
_EXPLANATION = (
    "A *token* is a frame, a stretch of sound or a word. At a missing rate each is lost with this probability, "
    "independently, and the rest moves together. Noise is Gaussian, its standard deviation given in units of each "
    "feature's own over the training splits. What is lost and added depends on the seed, the record and the token "
    "alone: all conditions share it.\n\n"
    "*Constant answer*: always the most frequent class. *Share kept*: (score − constant) / (clean score − constant), "
    "clean being all modalities, nothing lost, no noise. *Area* under the degradation curve: trapezoids over the "
    "levels, divided by their range, so that it is a mean score (the relative robustness of MultiBench, Liang et al. "
    "2021, before its rescaling over the methods compared); *both* is the same under the surface of both. *Relative "
    "robustness*: (area − constant) / (first score of the curve − constant), the mean share kept along it. No "
    "intervals: one draw of what is lost and added, and the records of one split."
)


@dataclass(frozen=True)
class CardSubject:
    """What a card is about.

    Attributes:
        spec: the data set's description.
        split: its name.
        reference: exact figures of the split by name (see :mod:`mmei_jax.simulation.aigc_int_report`); {} where none.
        seed: of what is lost and added.
    """

    spec: DatasetSpec
    split: str
    reference: Mapping[str, float]
    seed: int

    @property
    def name(self) -> str:
        """Of the data set; says that it is simulated where it is."""
        is_told = "simulat" in self.spec.name.lower() or not is_simulated(self.spec)
        return self.spec.name + ("" if is_told else " (simulated)")

    def ceilings(self, metric: str) -> dict[str, float]:
        """Exact score by subset of the modalities (``vision+text``), over every record."""
        found = {}
        for name, value in self.reference.items():
            told, _, bracket = name.removesuffix("]").partition("[")
            if told == metric and bracket.endswith(", every record"):
                found[bracket.removesuffix(", every record")] = value
            elif name == metric:
                found["vision+audio+text"] = value
        return found


def card_files(stem: str, rows: Sequence[Robustness], subject: CardSubject) -> dict[str, bytes]:
    """The card as ``<stem>.md``, with ``<stem>.png`` where a score can be drawn; the same rows give the same bytes.

    Args:
        stem: begins the files' names.
        rows: models on one grid; several may share a name.
        subject: what it is about.
    """
    section = robustness_section(rows, subject, picture_name=f"{stem}.png")
    title = f"{escaped(subject.name)}: robustness on the {subject.split} split"
    pictures = {block.name: block.png for block in section.blocks if isinstance(block, Picture)}
    return {f"{stem}.md": to_markdown(title, [section]).encode("utf-8"), **pictures}


def robustness_section(rows: Sequence[Robustness], subject: CardSubject, *, picture_name: str) -> Section:
    """The card as a section of a report, without a heading of its own."""
    blocks: list[str | Picture] = []
    if is_simulated(subject.spec):
        blocks.append("> **Simulated.** Nobody was recorded: every figure here is measured on simulated data.")
    blocks.append(_records_line(rows[0], subject))
    ceilings = {metric: subject.ceilings(metric) for metric in drawn_scores(rows[0])}
    if ceilings:
        with report_style():
            png = to_png(robustness_figure(rows, ceilings))
        blocks.append(Picture(picture_name, _caption(rows, subject, has_ceilings=any(ceilings.values())), png))
    blocks.append(_EXPLANATION)
    for metric in scores_of(rows[0]):
        if metric.endswith(_TOLD):
            able = _having(rows, metric)
            blocks += [f"### {escaped(metric)}", _subset_table(able, subject, metric), _area_table(able, metric)]
    if len(by_name(rows)) > 1:
        baseline = escaped(rows[0].name)
        blocks.append(
            f"*Effective robustness*: the mean of what a curve lies above {baseline}'s, once that is shifted to begin "
            "at the same score (Taori et al. 2020; MultiBench sums over the levels)."
        )
    return Section("", blocks)


def _records_line(found: Robustness, subject: CardSubject) -> str:
    line = f"{found.num_records[ALL]:,} records; {int(np.prod(found.grid.shape)):,} conditions; seed {subject.seed}."
    if CONFLICT not in found.figures:
        return f"{line} Which records are in conflict is not known for this data set."
    counts = found.num_records
    return (
        f"{line} In {counts[CONFLICT]:,} records one modality displays another emotion than the others (*in "
        f"conflict*), in {counts[NO_CONFLICT]:,} none does."
    )


def _caption(rows: Sequence[Robustness], subject: CardSubject, *, has_ceilings: bool) -> str:
    is_single = len(by_name(rows)) == 1
    what = "each subset of the modalities" if is_single else "each model, all modalities kept"
    dashes = "; dashed: all modalities, records in conflict" if is_single else "; dashed: records in conflict"
    caption = f"{escaped(subject.name)}, {subject.split} split. From the top: clean scores by modalities kept"
    caption += ", with the exact ceiling of each" if has_ceilings else ""
    caption += f"; scores over missing rate and over noise level, a line for {what}"
    caption += dashes if CONFLICT in rows[0].figures else ""
    last = "scores and shares kept under both" if is_single else "relative robustness"
    return f"{caption}; {last}. More is better."


def _subset_table(rows: Sequence[Robustness], subject: CardSubject, metric: str) -> str:
    """Clean scores by modalities kept."""
    parts = [part for part in (ALL, CONFLICT, NO_CONFLICT) if part in rows[0].figures]
    ceilings = subject.ceilings(metric)
    lines = []
    for name, runs in by_name(rows).items():
        for place, subset in enumerate(runs[0].grid.subsets):
            kept = "+".join(subset)
            scores = [_spread([run.figures[part][metric][place, 0, 0] for run in runs]) for part in parts]
            share = _spread([run.share_kept(metric)[place, 0, 0] for run in runs])
            ceiling = [f"{ceilings[kept]:.4f}" if kept in ceilings else ""] if ceilings else []
            lines.append([*_named(rows, name), kept, *scores, share, *ceiling])
        constant = [_spread([run.constant[part].get(metric, np.nan) for run in runs]) for part in parts]
        lines.append([*_named(rows, name), "*constant answer*", *constant, *_blank(1 + bool(ceilings))])
    if metric in subject.reference:
        named = {ALL: metric, CONFLICT: f"{metric}[conflict]", NO_CONFLICT: f"{metric}[no_conflict]"}
        exact = [f"{subject.reference[named[part]]:.4f}" if named[part] in subject.reference else "" for part in parts]
        lines.append([*_named(rows, ""), "*exact ceiling, all modalities*", *exact, *_blank(1 + bool(ceilings))])
    titles = ["all records", "in conflict", "not in conflict"][: len(parts)]
    header = [
        *_named(rows, "model"),
        "modalities kept",
        *titles,
        "share kept",
        *(["exact ceiling"] if ceilings else []),
    ]
    return markdown_table(header, lines, num_text_columns=len(_named(rows, "")) + 1)


def _area_table(rows: Sequence[Robustness], metric: str) -> str:
    """Areas and relative robustness along each axis; against the first model where there are several."""
    groups = by_name(rows)
    is_compared = len(groups) > 1
    baselines = groups[rows[0].name]
    lines = []
    for name, runs in groups.items():
        for subset in runs[0].grid.subsets:
            cells = []
            for axis in AXES:
                cells.append(_spread([run.area(metric, subset, axis) for run in runs]))
                cells.append(_spread([run.relative(metric, subset, axis) for run in runs]))
            for axis in AXES[:2] if is_compared else ():
                levels, _ = baselines[0].curve(metric, subset, axis)
                baseline = np.mean([run.curve(metric, subset, axis)[1] for run in baselines], axis=0)
                curves = [run.curve(metric, subset, axis)[1] for run in runs]
                cells.append(_spread([effective_robustness(levels, curve, baseline) for curve in curves]))
            lines.append([*_named(rows, name), "+".join(subset), *cells])
    titles = [f"{what}: {axis}" for axis in AXES for what in ("area", "relative robustness")]
    titles += [f"effective robustness: {axis}" for axis in AXES[:2]] if is_compared else []
    header = [*_named(rows, "model"), "modalities kept", *titles]
    return markdown_table(header, lines, num_text_columns=len(_named(rows, "")) + 1)


def _having(rows: Sequence[Robustness], metric: str) -> list[Robustness]:
    """Those of the models that have the metric's task: a row of a table may be without."""
    return [found for found in rows if found.has(metric)]


def _named(rows: Sequence[Robustness], name: str) -> list[str]:
    """A cell for the model's name, where there are several."""
    return [escaped(name)] if len(by_name(rows)) > 1 else []


def _blank(number: int) -> list[str]:
    return [""] * number


def _spread(values: Sequence[float]) -> str:
    """Mean over the runs, with their range where there are several; a dash where undefined."""
    if not np.isfinite(values).all():
        return "–"
    if len(values) == 1:
        return f"{values[0]:.4f}"
    return f"{np.mean(values):.4f} ({min(values):.4f} to {max(values):.4f})"


def card_lines(rows: Sequence[Robustness], subject: CardSubject) -> list[str]:
    """The card for the terminal: by model and subset, the first score of each task, and its relative robustness."""
    grid = rows[0].grid
    kinds = ", ".join(f"{count:,} {part}" for part, count in rows[0].num_records.items() if part != ALL)
    told = f" ({kinds})" if kinds else ""
    lines = [
        f"{subject.name}, split {subject.split}: {rows[0].num_records[ALL]:,} records{told}, "
        f"{int(np.prod(grid.shape)):,} conditions, seed {subject.seed}"
    ]
    parts = [part for part in (ALL, CONFLICT, NO_CONFLICT) if part in rows[0].figures]
    titles = ["clean", *parts[1:], "share kept", *(f"robust:{axis}" for axis in AXES)]
    for metric in scores_of(rows[0]):
        if not metric.endswith(("/accuracy", "/acc2_has0", "/mae")):
            continue
        lines += ["", f"{metric:<18}" + "".join(f"{title:>15}" for title in titles)]
        lines.append("-" * len(lines[-1]))
        for name, runs in by_name(_having(rows, metric)).items():
            lines += [f"{name}:"] if len(by_name(rows)) > 1 else []
            for place, subset in enumerate(grid.subsets):
                numbers = [
                    [run.figures[part][metric][place, 0, 0] for part in parts]
                    + [run.share_kept(metric)[place, 0, 0], *(run.relative(metric, subset, axis) for axis in AXES)]
                    for run in runs
                ]
                cells = (f"{'' if np.isnan(mean) else f'{mean:.4f}':>15}" for mean in np.mean(numbers, axis=0))
                lines.append(f"{'+'.join(subset):<18}{''.join(cells)}".rstrip())
    return lines
