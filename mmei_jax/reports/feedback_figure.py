"""The picture of a feedback loop: rounds, estimates beside the truth of the simulation, and the A/B."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mmei_jax.reports.claims import ONLINE_CLAIMS
from mmei_jax.reports.drawing import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, RED, SKY, new_figure

_COLOURS = (BLUE, GREEN, RED, ORANGE, PURPLE, SKY, GREY, INK)


def feedback_figure(rounds: Sequence[Mapping[str, Any]], ab: Mapping[str, Any], estimator: str) -> Figure:
    """The whole picture.

    Args:
        rounds: results of the rounds, at least one.
        ab: of the comparison.
        estimator: the gate's.
    """
    figure = new_figure(7.6)
    panels = figure.subplot_mosaic("AA;BC")
    _draw_rounds(panels["A"], rounds, estimator)
    _draw_candidates(panels["B"], rounds[-1], estimator)
    _draw_uplift(panels["C"], ab)
    return figure


def _draw_rounds(axes: Axes, rounds: Sequence[Mapping[str, Any]], estimator: str) -> None:
    """What logs said of the deployed policy and of its candidate, and what is true of both."""
    numbers = [result["round"] + 1 for result in rounds]
    shift = 0.12
    _bars(axes, [n - shift for n in numbers], [result["current"]["logged"] for result in rounds], BLUE, "o")
    candidates = [result["candidates"][0] for result in rounds]
    for number, found in zip(numbers, candidates, strict=True):
        face = ORANGE if found["gate"]["is_promoted"] else "white"
        _bars(axes, [number + shift], [found["estimates"][estimator]], ORANGE, "s", face=face)
    axes.scatter(
        [n - shift for n in numbers],
        [result["current"]["truth"]["value"] for result in rounds],
        marker="_",
        s=260,
        color=INK,
        zorder=4,
    )
    axes.scatter(
        [n + shift for n in numbers],
        [found["truth"]["value"] for found in candidates],
        marker="_",
        s=260,
        color=INK,
        zorder=4,
    )
    axes.plot([], [], "o", color=BLUE, label="deployed policy, on its own log")
    axes.plot([], [], "s", color=ORANGE, label=f"candidate, off-policy ({estimator}), promoted")
    axes.plot([], [], "s", markeredgecolor=ORANGE, markerfacecolor="white", label="candidate, refused")
    axes.plot([], [], "_", color=INK, markersize=14, label="true value in the simulator")
    axes.set(title="Rounds (simulated)", xlabel="round", ylabel="reward per shown item", xticks=numbers)
    axes.legend(loc="best")


def _draw_candidates(axes: Axes, result: Mapping[str, Any], estimator: str) -> None:
    """Every policy's estimate from the last round's log against its true value."""
    ends = []
    for found, colour in zip(result["candidates"], _COLOURS, strict=False):
        one, truth = found["estimates"][estimator], found["truth"]["value"]
        if None in one.values():
            continue
        ends += [truth, one["value"]]
        low, high = one["value"] - one["low"], one["high"] - one["value"]
        axes.errorbar([truth], [one["value"]], yerr=[[low], [high]], fmt="o", color=colour, label=found["name"])
    axes.axline((min(ends), min(ends)), slope=1.0, color=GREY, linewidth=1.0, zorder=0)
    axes.set(
        title="All policies, last round (simulated)",
        xlabel="true value in the simulator",
        ylabel=f"estimate from the log ({estimator})",
    )
    axes.locator_params(axis="x", nbins=5)
    axes.legend(loc="best")


def _draw_uplift(axes: Axes, ab: Mapping[str, Any]) -> None:
    """Uplifts with intervals, and the paper's."""
    for place, (metric, (_, paper)) in enumerate(ONLINE_CLAIMS.items()):
        for shift, arm, colour in ((-0.12, "emotion_driven", GREEN), (0.12, "placebo", GREY)):
            one = {name: 100.0 * ab["uplift"][arm][metric][name] for name in ("value", "low", "high")}
            _bars(axes, [place + shift], [one], colour, "o", label=arm.replace("_", "-") if not place else None)
        axes.hlines(100.0 * paper, place - 0.3, place + 0.3, color=INK, linestyle=":", label="" if place else "paper")
    axes.axhline(0.0, color=GREY, linewidth=1.0)
    axes.set(title="A/B: uplift over behaviour only (simulated)", ylabel="uplift, %", xlim=(-0.5, 1.5))
    axes.set_xticks([0, 1], ["engagement time", "satisfaction"])
    axes.margins(y=0.2)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 0.4), ncols=3)


def _bars(
    axes: Axes,
    places: Sequence[float],
    found: Sequence[Mapping[str, float]],
    colour: str,
    marker: str,
    *,
    face: str | None = None,
    label: str | None = None,
) -> None:
    values = [one["value"] for one in found]
    errors = [[one["value"] - one["low"] for one in found], [one["high"] - one["value"] for one in found]]
    axes.errorbar(
        places, values, yerr=errors, fmt=marker, color=colour, markerfacecolor=face or colour, capsize=3, label=label
    )
