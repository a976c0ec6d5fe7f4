"""Pictures of what a model answers: headline figures, confusion, modality weights, reliability, regression."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mmei_jax.reports.calibration import Reliability
from mmei_jax.reports.drawing import (
    BLUE,
    GREY,
    INK,
    LIGHT_GREY,
    MODALITY_COLOURS,
    RED,
    SKY,
    new_figure,
    shortened,
    text_colour,
    without_grid,
)

_REFERENCE_MARKS = {"exact ceiling": ("D", "#009E73"), "unimodal product": ("s", "#E69F00"), "best single": ("^", RED)}

# In a larger confusion matrix only the colours can be read.
_MAX_CLASSES_WITH_COUNTS = 14


def headline_figure(
    figures: Mapping[str, float],
    bounds: Mapping[str, tuple[float, float]],
    references: Mapping[str, Mapping[str, float]],
    without: Mapping[str, str],
) -> Figure:
    """One line per metric: the model with its interval, and what the data set knows.

    Args:
        figures: finite metrics in [-1, 1] by name, from the top down; at least one.
        bounds: intervals by metric name, where there are any.
        references: by column title and metric name.
        without: why a metric has no interval, where it might have one; written under its name.
    """
    figure = new_figure(1.1 + 0.42 * len(figures))
    axes = figure.add_subplot()
    for row, (name, value) in enumerate(figures.items()):
        if name in bounds:
            axes.plot(bounds[name], [row, row], color=BLUE, linewidth=5, alpha=0.35, solid_capstyle="butt")
            # Its ends stand out above and below the dot, which is wider than many an interval.
            axes.plot(bounds[name], [row, row], "|", color=BLUE, markersize=15, markeredgewidth=1.5, zorder=4)
        axes.plot(value, row, "o", color=BLUE, markersize=6, zorder=3)
        for title, column in references.items():
            if name in column:
                marker, colour = _REFERENCE_MARKS[title]
                axes.plot(column[name], row, marker, color=colour, markersize=7, fillstyle="none", markeredgewidth=1.8)
    titles = [f"{name}\nno interval: {without[name]}" if name in without else name for name in figures]
    axes.set_yticks(range(len(figures)), titles)
    axes.set_ylim(len(figures) - 0.5, -0.5)
    smallest = min([*figures.values(), *(low for name, (low, _) in bounds.items() if name in figures)])
    axes.set_xlim(min(0.0, smallest) - 0.01, 1.01)
    axes.set_xlabel("value of the metric")
    marks = [Line2D([], [], marker="o", color=BLUE, linestyle="none", markersize=6, label="model")]
    if bounds.keys() & figures.keys():
        marks[0] = Line2D([], [], marker="o", color=BLUE, linewidth=5, alpha=0.6, label="model, 95 % interval")
    for title in references:
        marker, colour = _REFERENCE_MARKS[title]
        marks.append(
            Line2D(
                [],
                [],
                marker=marker,
                color=colour,
                linestyle="none",
                fillstyle="none",
                markeredgewidth=1.8,
                label=title,
            )
        )
    figure.legend(handles=marks, loc="outside upper left", ncols=len(marks))
    return figure


def confusion_figure(counts: Int[np.ndarray, "classes classes"], names: Sequence[str], task: str) -> Figure:
    """Counts of (label, answer), coloured by their share of the label's records; a row without records is hatched."""
    num_classes, names = len(names), [shortened(name) for name in names]
    is_dense = num_classes > _MAX_CLASSES_WITH_COUNTS
    figure = new_figure(1.6 + (0.34 if is_dense else 0.62) * num_classes)
    axes = figure.add_subplot()
    totals = counts.sum(axis=1)
    shares = counts / np.maximum(totals, 1)[:, None]
    image = axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto")
    without_grid(axes)
    for row in range(num_classes):
        if totals[row] == 0:
            axes.axhspan(row - 0.5, row + 0.5, facecolor="white", hatch="///", edgecolor=LIGHT_GREY, linewidth=0)
            axes.text((num_classes - 1) / 2, row, "no records", ha="center", va="center", color=GREY, style="italic")
            continue
        for column in range(0 if is_dense else num_classes):
            share = shares[row, column]
            label = f"{counts[row, column]:,}\n{_percent(share)}" if counts[row, column] else "0"
            axes.text(
                column,
                row,
                label,
                ha="center",
                va="center",
                fontsize=8.5,
                color=text_colour(1.0 - share),
                linespacing=1.1,
            )
    axes.set_xticks(range(num_classes), names)
    if sum(len(name) + 2 for name in names) > 85:
        axes.set_xticks(range(num_classes), names, rotation=45, ha="right")
    axes.set_yticks(range(num_classes), [f"{name} ({total:,})" for name, total in zip(names, totals, strict=True)])
    axes.set_xlabel(f"{task} that the model names")
    axes.set_ylabel(f"true {task} (records)")
    figure.colorbar(image, ax=axes, label="share of the true class's records", fraction=0.05, pad=0.02)
    return figure


def _percent(share: float) -> str:
    return f"{share:.0%}" if share == 0 or share >= 0.005 else "<1%"


def multi_label_figure(counts: Int[np.ndarray, "classes 2 2"], names: Sequence[str]) -> Figure:
    """One 2 x 2 matrix per class: present or not, named or not."""
    num_columns = min(4, len(names))
    num_rows = -(-len(names) // num_columns)
    figure = new_figure(0.4 + 2.3 * num_rows)
    for place, name in enumerate(names):
        axes = figure.add_subplot(num_rows, num_columns, place + 1)
        totals = counts[place].sum(axis=1)
        shares = counts[place] / np.maximum(totals, 1)[:, None]
        axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0)
        without_grid(axes)
        for row in range(2):
            for column in range(2):
                share = shares[row, column]
                label = f"{counts[place, row, column]:,}\n{_percent(share)}" if totals[row] else "no\nrecords"
                axes.text(column, row, label, ha="center", va="center", fontsize=9, color=text_colour(1.0 - share))
        axes.set_title(shortened(name))
        axes.set_xticks([0, 1], ["not named", "named"])
        axes.set_yticks([0, 1], ["absent", "present"])
    return figure


def alpha_figure(
    groups: Mapping[str, tuple[Sequence[str], Int[np.ndarray, "rows"], Float[np.ndarray, "rows modalities"]]],
    modalities: Sequence[str],
) -> Figure:
    """Mean weight of each modality as stacked bars.

    Args:
        groups: by panel title: row names, records of each row, and mean weights (arbitrary for a row without records).
        modalities: names in the order of the weights.
    """
    num_rows = [len(names) for names, _, _ in groups.values()]
    figure = new_figure(1.3 + 0.42 * sum(num_rows) + 0.5 * len(num_rows))
    panels = figure.subplots(len(groups), 1, height_ratios=num_rows, sharex=True, squeeze=False)[:, 0]
    for axes, (title, (names, counts, weights)) in zip(panels, groups.items(), strict=True):
        _stacked_bars(axes, counts, weights, modalities)
        axes.set_title(title)
        ticks = [f"{shortened(name)} ({count:,})" for name, count in zip(names, counts, strict=True)]
        axes.set_yticks(range(len(names)), ticks)
        axes.set_ylim(len(names) - 0.5, -0.5)
    panels[-1].set_xlabel("mean weight α (the weights of a record sum to 1)")
    bars = [Line2D([], [], color=MODALITY_COLOURS[name], linewidth=8, label=name) for name in modalities]
    figure.legend(handles=bars, loc="outside upper left", ncols=len(bars))
    return figure


def _stacked_bars(axes: Axes, counts: np.ndarray, weights: np.ndarray, modalities: Sequence[str]) -> None:
    without_grid(axes)
    axes.set_xlim(0.0, 1.0)
    for row, count in enumerate(counts):
        if count == 0:
            axes.text(0.01, row, "no records", va="center", color=GREY, style="italic")
            continue
        start = 0.0
        for place, name in enumerate(modalities):
            width = float(weights[row, place])
            axes.barh(row, width, left=start, height=0.76, color=MODALITY_COLOURS[name], edgecolor="white")
            if width > 0.04:
                colour = INK if name == "audio" else "white"
                axes.text(start + width / 2, row, f"{width:.2f}", ha="center", va="center", color=colour, fontsize=9)
            start += width
        if start == 0.0:
            axes.text(0.01, row, "all weights 0", va="center", color=GREY, style="italic")


def reliability_figure(curves: Mapping[str, Reliability], *, event: str) -> Figure:
    """One panel per curve: how often the event happened against the probability given to it.

    Args:
        curves: by panel title; at least one, each with a record.
        event: what the height of a point is the share of.
    """
    num_columns = min(3, max(2, len(curves)))
    num_rows = -(-len(curves) // num_columns)
    figure = new_figure((4.2 if num_columns == 2 else 3.3) * num_rows)
    for place, (title, curve) in enumerate(curves.items()):
        axes = figure.add_subplot(num_rows, num_columns, place + 1)
        _draw_reliability(axes, curve, shows_records=len(curves) > 1)
        axes.set_title(f"{shortened(title)}: ECE {curve.ece:.3f}")
        axes.set_xlabel("probability the model gives")
        axes.set_ylabel(event if place % num_columns == 0 else "")
    if len(curves) == 1:
        figure.axes[0].legend(loc="lower right")
        _draw_spread(figure.add_subplot(1, 2, 2), next(iter(curves.values())))
    else:
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=len(labels))
    return figure


def _draw_spread(axes: Axes, curve: Reliability) -> None:
    """How the records spread over the bins, and the two means whose difference is the model's over-confidence."""
    num_bins, total = len(curve.count), curve.count.sum()
    axes.bar(
        np.arange(num_bins) / num_bins, curve.count, width=1 / num_bins, align="edge", color=SKY, edgecolor="white"
    )
    promised, kept = curve.probability_sum.sum() / total, curve.hit_sum.sum() / total
    axes.axvline(promised, color=GREY, linestyle="--", label=f"mean probability {promised:.3f}")
    axes.axvline(kept, color=BLUE, label=f"share that is right {kept:.3f}")
    axes.set_xlim(0.0, 1.0)
    axes.set_ylim(bottom=0.0)
    axes.set_xlabel("probability the model gives")
    axes.set_ylabel("records")
    axes.legend(loc="upper left")


def _draw_reliability(axes: Axes, curve: Reliability, *, shows_records: bool) -> None:
    occupied = curve.count > 0
    num_bins = len(curve.count)
    if shows_records:
        left, height = np.arange(num_bins) / num_bins, 0.2 * curve.count / curve.count.max()
        axes.bar(left, height, width=1 / num_bins, align="edge", color=LIGHT_GREY, label="records")
    axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1, label="as promised")
    share, confidence = curve.hit_share[occupied], curve.mean_probability[occupied]
    low, high = curve.hit_interval()[:, occupied]
    errors = np.maximum([share - low, high - share], 0.0)
    axes.errorbar(
        confidence, share, yerr=errors, fmt="o-", color=BLUE, markersize=4.5, linewidth=1.2, elinewidth=1, label="model"
    )
    # A little more than [0, 1], so that marks on the border are whole.
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.set_aspect("equal")


def regression_figure(
    labels: Float[np.ndarray, "records"], answers: Float[np.ndarray, "records"], *, mae: float, pearson: float | None
) -> Figure:
    """Answer against label, and the distribution of the residuals (answer minus label)."""
    figure = new_figure(4.4)
    scatter, residuals = figure.subplots(1, 2)
    both = np.concatenate([labels, answers])
    margin = 0.05 * (np.ptp(both) or 1.0)
    limits = (both.min() - margin, both.max() + margin)
    scatter.plot(limits, limits, color=GREY, linestyle="--", linewidth=1, label="answer = label")
    opacity = float(np.clip(60 / len(labels), 0.08, 0.8))
    scatter.plot(labels, answers, "o", color=BLUE, markersize=4, alpha=opacity, markeredgewidth=0)
    scatter.set_xlim(limits)
    scatter.set_ylim(limits)
    scatter.set_aspect("equal")
    scatter.set_xlabel("label")
    scatter.set_ylabel("answer")
    scatter.set_title(f"MAE {mae:.3f}, Pearson {'undefined' if pearson is None else f'{pearson:.3f}'}")
    scatter.legend(loc="upper left")
    difference = answers - labels
    num_bins = int(np.clip(np.sqrt(len(labels)), 5, 40))
    residuals.hist(difference, bins=num_bins, color=BLUE, edgecolor="white")
    residuals.axvline(0.0, color=GREY, linestyle="--", linewidth=1)
    residuals.axvline(float(difference.mean()), color=RED, linewidth=1.5, label=f"mean {difference.mean():+.3f}")
    residuals.set_xlabel("answer − label")
    residuals.set_ylabel("records")
    residuals.legend(loc="upper right")
    return figure
