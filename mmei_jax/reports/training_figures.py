"""Pictures of how a run went: losses and accuracy over epochs (the paper's Fig. 3), throughput and input wait."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mmei_jax.reports.drawing import BLUE, GREEN, GREY, PURPLE, RED, new_figure

# Epochs and values of one metric, in the order of the log.
Curve = tuple[Sequence[float], Sequence[float]]


def loss_figure(
    losses: Mapping[str, tuple[Curve, Curve]], accuracies: Mapping[str, Curve], *, best_epoch: float
) -> Figure:
    """Training and validation loss, and the validation metrics.

    Args:
        losses: by panel title, the training's and the validation's curve; the total first.
        accuracies: validation metrics by name.
        best_epoch: of the checkpoint that is evaluated.
    """
    (total_title, total), *tasks = losses.items()
    figure = new_figure(3.6 if len(tasks) < 2 else 6.2)
    grid = figure.add_gridspec(1 if len(tasks) < 2 else 2, 6)
    axes = figure.add_subplot(grid[0, :3])
    _draw_losses(axes, total_title, total, best_epoch)
    axes.set_ylabel("loss")
    axes.legend()
    axes = figure.add_subplot(grid[0, 3:])
    for (name, (epochs, values)), colour in zip(accuracies.items(), (BLUE, RED, PURPLE, GREEN), strict=False):
        axes.plot(epochs, values, "o-", color=colour, markersize=3.5, label=name)
    axes.set_title("Validation metrics")
    if all(0.0 <= value <= 1.0 for _, values in accuracies.values() for value in values):
        axes.set_ylim(0.0, 1.0)
    _mark_best(axes, best_epoch)
    axes.legend(loc="best")
    if len(tasks) >= 2:
        width = 6 // len(tasks)
        for place, (title, pair) in enumerate(tasks):
            axes = figure.add_subplot(grid[1, width * place : width * (place + 1)])
            _draw_losses(axes, title, pair, best_epoch)
            axes.set_ylabel("loss" if place == 0 else "")
    for axes in figure.axes:
        axes.set_xlabel("epoch")
        axes.set_xlim(left=0.0)
    return figure


def _draw_losses(axes: Axes, title: str, pair: tuple[Curve, Curve], best_epoch: float) -> None:
    (train_epochs, train_values), (validation_epochs, validation_values) = pair
    axes.plot(train_epochs, train_values, color=BLUE, linewidth=1.4, label="training")
    axes.plot(validation_epochs, validation_values, "o-", color=RED, markersize=3.5, label="validation")
    _mark_best(axes, best_epoch)
    axes.set_title(title)


def _mark_best(axes: Axes, epoch: float) -> None:
    axes.axvline(epoch, color=GREY, linestyle=":", linewidth=1.2, label="checkpoint evaluated")


def throughput_figure(rate: Curve, wait_share: Curve) -> Figure:
    """Records per second and the share of the time that the devices waited for input, both from 0."""
    figure = new_figure(2.9)
    left, right = figure.subplots(1, 2)
    left.plot(*rate, color=BLUE, linewidth=1.4)
    left.set_ylabel("training records per second")
    left.set_ylim(0.0, 1.08 * max(rate[1]))
    right.plot(wait_share[0], 100.0 * np.asarray(wait_share[1]), color=RED, linewidth=1.4)
    right.set_ylabel("input wait (% of the step time)")
    right.set_ylim(0.0, max(5.0, 108.0 * max(wait_share[1])))
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.set_xlim(left=0.0)
    return figure
