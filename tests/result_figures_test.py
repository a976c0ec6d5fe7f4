"""Pictures hold what they show, however many classes there are and whatever these are called (warnings are errors)."""

import numpy as np
import pytest

from mmei_jax.reports.calibration import reliability
from mmei_jax.reports.drawing import report_style, to_png
from mmei_jax.reports.result_figures import (
    alpha_figure,
    confusion_figure,
    headline_figure,
    multi_label_figure,
    reliability_figure,
)

NAMES = {
    "two": ["yes", "no"],
    "long": [f"a feeling that no single word describes, {place}" for place in range(9)],
    "many": [f"class {place}" for place in range(28)],
    "marked up": ["$x^2$", "a_b", "50 % <b>"],
}


@pytest.fixture(autouse=True)
def style():
    with report_style():
        yield


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_every_picture_has_room_for_its_classes(names):
    generator = np.random.default_rng(0)
    counts = generator.integers(0, 5_000, (len(names), len(names)))
    alpha = generator.dirichlet(np.ones(3), len(names))
    probability = generator.random(50)
    curves = {name: reliability(probability, probability > 0.5) for name in names}
    for figure in (
        confusion_figure(counts, names, "emotion"),
        multi_label_figure(generator.integers(0, 5_000, (len(names), 2, 2)), names),
        alpha_figure({"By true emotion": (names, counts.sum(axis=1), alpha)}, ("vision", "audio", "text")),
        reliability_figure(curves, event="share in which the class is present"),
    ):
        assert to_png(figure).startswith(b"\x89PNG")


def texts(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_confusion_shows_counts_and_shares_and_marks_an_empty_row():
    figure = confusion_figure(np.array([[999, 1, 0], [0, 0, 0], [1, 2, 1]]), ["a", "b", "c"], "emotion")
    assert texts(figure) == ["999\n100%", "1\n<1%", "0", "no records", "1\n25%", "2\n50%", "1\n25%"]
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a (1,000)", "b (0)", "c (4)"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b", "c"]


def test_headline_marks_intervals_beside_narrow_dots_and_says_where_there_is_none():
    figures, bounds = {"emotion/accuracy": 0.8, "ranking/map": 0.25}, {"emotion/accuracy": (0.79, 0.81)}
    figure = headline_figure(figures, bounds, {}, {"ranking/map": "too few users (2)"})
    axes = figure.axes[0]
    titles = [label.get_text() for label in axes.get_yticklabels()]
    assert titles == ["emotion/accuracy", "ranking/map\nno interval: too few users (2)"]
    marks = {line.get_marker(): line for line in axes.lines}
    assert list(marks["|"].get_xdata()) == [0.79, 0.81]
    assert marks["|"].get_markersize() > 2 * marks["o"].get_markersize()
    assert marks["|"].get_zorder() > marks["o"].get_zorder()


def test_stacked_weights_are_written_in_their_bars():
    weights = np.array([[0.25, 0.0, 0.75], [np.nan, np.nan, np.nan], [0.0, 0.0, 0.0]])
    groups = {"By true emotion": (["joy", "fear", "anger"], np.array([3, 0, 2]), weights)}
    figure = alpha_figure(groups, ("vision", "audio", "text"))
    assert texts(figure) == ["0.25", "0.75", "no records", "all weights 0"]
    bars = [(bar.get_x(), bar.get_width()) for bar in figure.axes[0].patches]
    assert bars[:3] == [(0.0, 0.25), (0.25, 0.0), (0.25, 0.75)]
