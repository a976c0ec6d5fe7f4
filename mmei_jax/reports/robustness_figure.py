"""The picture of a robustness card: modalities left out, tokens lost, noise added, and what is kept of both together.

One model: a curve for each subset of the modalities. Several: a curve for each, with all modalities; models that share
a name are runs of one, drawn as their mean and their range.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mmei_jax.reports.drawing import (
    BLUE,
    GREEN,
    GREY,
    INK,
    MODALITY_COLOURS,
    ORANGE,
    PURPLE,
    RED,
    SKY,
    new_figure,
    shortened,
    text_colour,
    without_grid,
)
from mmei_jax.robustness_metrics import ALL, AXES, CONFLICT, NO_CONFLICT, Robustness, scores_of

# Of several models: as many colours as can be told apart at a glance; more models take tab20's, which comes in pairs.
_MODEL_COLOURS = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY)
_PAIR_COLOURS = (PURPLE, SKY, RED)
_MARKERS = {ALL: "o", CONFLICT: "v", NO_CONFLICT: "^"}
_AXIS_LABELS = {
    "missing": "missing rate: probability that a token is lost",
    "noise": "noise level: its standard deviation / the feature's own",
}
_SUMMARIES = {"missing": "tokens\nlost", "noise": "noise\nadded", "both": "both"}

Groups = Mapping[str, Sequence[Robustness]]


def robustness_figure(rows: Sequence[Robustness], ceilings: Mapping[str, Mapping[str, float]]) -> Figure:
    """The whole picture, one column of panels for each task with classes that the first model has.

    A model without the task is left out of its column.

    Args:
        rows: models on one grid, at least one, whose emotion task has a score in which more is better.
        ceilings: by metric and subset (``vision+text``), the exact score that is possible at best; {} where not known.
    """
    groups = by_name(rows)
    colours = _colours(groups)
    metrics = drawn_scores(rows[0])
    figure = new_figure(12.4)
    panels = figure.subplots(4, len(metrics), squeeze=False, height_ratios=(1.15, 1.0, 1.0, 1.0))
    for column, metric in enumerate(metrics):
        able = {name: runs for name, runs in groups.items() if runs[0].has(metric)}
        _draw_subsets(panels[0, column], able, colours, metric, ceilings.get(metric, {}))
        for place, axis in enumerate(("missing", "noise")):
            _draw_curves(panels[1 + place, column], able, colours, metric, axis)
        if len(groups) == 1:
            _draw_surface(panels[3, column], next(iter(groups.values())), metric)
        else:
            _draw_summaries(panels[3, column], able, colours, metric)
    lowest = min(axes.get_ylim()[0] for axes in panels[:3].flat)
    for axes in panels[:3].flat:
        axes.set_ylim(min(lowest, 0.0) if lowest < 0.1 else lowest, 1.0)
    figure.legend(handles=_marks(groups, ceilings), loc="outside upper left", ncols=4)
    return figure


def drawn_scores(found: Robustness) -> list[str]:
    """The first score of emotion and of intent, where they are shares of which more is better."""
    names = [name for name in scores_of(found) if name.endswith(("/accuracy", "/acc2_has0"))]
    return [name for name in names if not name.startswith("joint/")]


def by_name(rows: Sequence[Robustness]) -> dict[str, list[Robustness]]:
    """Rows by the name that they share, in the order of the first of each."""
    groups: dict[str, list[Robustness]] = {}
    for found in rows:
        groups.setdefault(found.name, []).append(found)
    return groups


def subset_colours(modalities: Sequence[str]) -> dict[str, str]:
    """A colour for each subset: a modality's own, ink for all of them."""
    found = {name: MODALITY_COLOURS[name] for name in modalities}
    if len(modalities) > 2:
        pairs = [f"{modalities[left]}+{modalities[right]}" for left, right in ((0, 1), (0, 2), (1, 2))]
        found |= dict(zip(pairs, _PAIR_COLOURS, strict=True))
    return found | {"+".join(modalities): INK}


def _colours(groups: Groups) -> dict[str, str]:
    if len(groups) == 1:
        return dict.fromkeys(groups, INK)
    many = [to_hex(colormaps["tab20"](place)) for place in range(20)]
    colours = _MODEL_COLOURS if len(groups) <= len(_MODEL_COLOURS) else many
    return {name: colours[place % len(colours)] for place, name in enumerate(groups)}


def _draw_subsets(
    axes: Axes, groups: Groups, colours: Mapping[str, str], metric: str, ceilings: Mapping[str, float]
) -> None:
    """Clean scores by what is kept: all records as a dot, conflict and no conflict below and above."""
    grid = next(iter(groups.values()))[0].grid
    names = ["+".join(subset) for subset in grid.subsets]
    offsets = np.linspace(-0.27, 0.27, len(groups)) if len(groups) > 1 else [0.0]
    by_subset = subset_colours(grid.modalities)
    for (name, runs), offset in zip(groups.items(), offsets, strict=True):
        mean = {part: _clean(runs, metric, part) for part in (ALL, CONFLICT, NO_CONFLICT) if part in runs[0].figures}
        for place, kept in enumerate(names):
            colour = by_subset[kept] if len(colours) == 1 else colours[name]
            spread = [scores[place] for scores in mean.values()]
            axes.plot([place + offset] * 2, [min(spread), max(spread)], color=colour, linewidth=1, alpha=0.6)
            for part, scores in mean.items():
                fill: Literal["full", "none"] = "full" if part == ALL else "none"
                size = 6 if part == ALL else 5
                axes.plot(place + offset, scores[place], _MARKERS[part], color=colour, markersize=size, fillstyle=fill)
    for place, name in enumerate(names):
        if name in ceilings:
            axes.plot([place - 0.38, place + 0.38], [ceilings[name]] * 2, color=GREY, linewidth=2)
    _draw_constant(axes, groups, metric)
    axes.set_xticks(range(len(names)), [name.replace("+", "\n+ ") for name in names], fontsize=8)
    axes.grid(visible=False, axis="x")
    axes.set_title(metric)
    axes.set_xlabel("modalities kept; nothing lost, no noise")


def _clean(runs: Sequence[Robustness], metric: str, part: str) -> np.ndarray:
    return np.mean([found.figures[part][metric][:, 0, 0] for found in runs], axis=0)


def _draw_constant(axes: Axes, groups: Groups, metric: str) -> None:
    constant = next(iter(groups.values()))[0].constant[ALL].get(metric)
    if constant is not None:
        axes.axhline(constant, color=GREY, linestyle=":", linewidth=1.2)


def _draw_curves(axes: Axes, groups: Groups, colours: Mapping[str, str], metric: str, axis: str) -> None:
    first = next(iter(groups.values()))[0]
    every = first.grid.subsets[-1]
    if len(colours) == 1:
        (runs,) = groups.values()
        for subset in first.grid.subsets:
            colour = subset_colours(first.grid.modalities)["+".join(subset)]
            _draw_curve(axes, runs, metric, subset, axis, colour=colour, linewidth=2.2 if subset == every else 1.4)
    for name, runs in groups.items():
        colour = colours[name]
        if len(colours) > 1:
            _draw_curve(axes, runs, metric, every, axis, colour=colour, linewidth=1.8)
        if CONFLICT in first.figures:
            _draw_curve(axes, runs, metric, every, axis, colour=colour, linewidth=1.3, linestyle="--", part=CONFLICT)
    _draw_constant(axes, groups, metric)
    axes.set_xlabel(_AXIS_LABELS[axis])
    axes.set_ylabel(metric)
    axes.set_xticks(first.curve(metric, every, axis)[0])


def _draw_curve(
    axes: Axes,
    runs: Sequence[Robustness],
    metric: str,
    subset: tuple[str, ...],
    axis: str,
    *,
    colour: str,
    linewidth: float,
    linestyle: str = "-",
    part: str = ALL,
) -> None:
    levels = runs[0].curve(metric, subset, axis, part)[0]
    scores = np.array([found.curve(metric, subset, axis, part)[1] for found in runs])
    axes.plot(
        levels, scores.mean(axis=0), color=colour, linestyle=linestyle, linewidth=linewidth, marker="o", markersize=3
    )
    if len(runs) > 1 and part == ALL:
        axes.fill_between(levels, scores.min(axis=0), scores.max(axis=0), color=colour, alpha=0.15, linewidth=0)


def _draw_surface(axes: Axes, runs: Sequence[Robustness], metric: str) -> None:
    """All modalities, tokens lost and noise at once: the score as number, the share kept as colour."""
    grid = runs[0].grid
    scores = np.mean([found.figures[ALL][metric][-1] for found in runs], axis=0)
    shares = np.mean([found.share_kept(metric)[-1] for found in runs], axis=0)
    shown = np.clip(np.nan_to_num(shares), 0.0, 1.0)
    axes.imshow(shown, cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto")
    without_grid(axes)
    for row, column in np.ndindex(scores.shape):
        share = f"\n{shares[row, column]:.0%}" if np.isfinite(shares[row, column]) else ""
        label, colour = f"{scores[row, column]:.3f}{share}", text_colour(1.0 - shown[row, column])
        axes.text(column, row, label, ha="center", va="center", fontsize=8, color=colour, linespacing=1.05)
    axes.set_xticks(range(len(grid.noise_levels)), [f"{level:g}" for level in grid.noise_levels])
    axes.set_yticks(range(len(grid.missing_rates)), [f"{rate:g}" for rate in grid.missing_rates])
    axes.set_xlabel("noise level")
    axes.set_ylabel("missing rate")
    axes.set_title("score and share kept, all modalities", fontsize=9.5)


def _draw_summaries(axes: Axes, groups: Groups, colours: Mapping[str, str], metric: str) -> None:
    """Relative robustness of each model with all modalities; runs of one as their mean with their range."""
    offsets = np.linspace(-0.27, 0.27, len(groups))
    for (name, runs), offset in zip(groups.items(), offsets, strict=True):
        every = runs[0].grid.subsets[-1]
        for place, axis in enumerate(AXES):
            values = [found.relative(metric, every, axis) for found in runs]
            axes.bar(place + offset, float(np.mean(values)), width=0.54 / len(groups), color=colours[name], alpha=0.85)
            axes.plot([place + offset] * 2, [min(values), max(values)], color=INK, linewidth=1.2)
    axes.set_xticks(range(len(AXES)), [_SUMMARIES[axis] for axis in AXES])
    axes.grid(visible=False, axis="x")
    axes.set_ylim(0.0, 1.0)
    axes.set_ylabel("relative robustness")


def _marks(groups: Groups, ceilings: Mapping[str, Mapping[str, float]]) -> list[Line2D]:
    first = next(iter(groups.values()))[0]
    if len(groups) == 1:
        lines = subset_colours(first.grid.modalities)
    else:
        lines = {shortened(name): colour for name, colour in _colours(groups).items()}
    marks = [Line2D([], [], color=colour, linewidth=2, label=name) for name, colour in lines.items()]
    if CONFLICT in first.figures:
        marks += [
            Line2D([], [], color=INK, linestyle="--", marker="v", fillstyle="none", label="records in conflict"),
            Line2D([], [], color=INK, linestyle="none", marker="^", fillstyle="none", label="records not in conflict"),
        ]
    if any(ceilings.values()):
        marks.append(Line2D([], [], color=GREY, linewidth=2, label="exact ceiling"))
    marks.append(Line2D([], [], color=GREY, linestyle=":", label="constant answer"))
    return marks
