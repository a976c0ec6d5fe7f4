"""The picture of a profile: memory by kind, the longest operations, and the roofline."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mmei_jax.profiling.profile import Profile
from mmei_jax.profiling.roofline import TimedOperation
from mmei_jax.reports.drawing import BLUE, GREY, INK, ORANGE, PURPLE, new_figure, shortened

BOUND_COLOURS = {"compute": BLUE, "memory": ORANGE, "exchange": PURPLE, "unknown": GREY}
_NUM_BARS = 12
_MIB = 2.0**20


def profile_figure(profile: Profile) -> Figure:
    """The whole picture; without a trace there are no operations in it."""
    figure = new_figure(7.6)
    panels = figure.subplot_mosaic("AB;CC")
    _draw_memory(panels["A"], profile)
    timed = [one for one in profile.operations if one.seconds]
    _draw_roofline(panels["B"], profile, timed)
    _draw_operations(panels["C"], timed[:_NUM_BARS])
    return figure


def _draw_memory(axes: Axes, profile: Profile) -> None:
    kinds = {kind: size for kind, size in profile.memory.by_kind().items() if size}
    axes.barh(list(kinds), [size / _MIB for size in kinds.values()], color=BLUE)
    axes.invert_yaxis()
    axes.set(title="Memory of one device", xlabel="MiB")


def _draw_operations(axes: Axes, timed: Sequence[TimedOperation]) -> None:
    axes.set(title="Longest operations of an update", xlabel="ms on one device")
    if not timed:
        axes.text(0.5, 0.5, "the trace tells of none", ha="center", transform=axes.transAxes)
        return
    names = [f"{shortened(one.operation.name, max_characters=40)}" for one in timed]
    colours = [BOUND_COLOURS[one.bound] for one in timed]
    axes.barh(range(len(timed)), [1e3 * one.seconds for one in timed], color=colours)
    axes.set_yticks(range(len(timed)), names)
    axes.invert_yaxis()
    for bound in dict.fromkeys(one.bound for one in timed):
        axes.barh([0], [0.0], color=BOUND_COLOURS[bound], label=bound)
    axes.legend(title="bound by", loc="lower right")


def _draw_roofline(axes: Axes, profile: Profile, timed: Sequence[TimedOperation]) -> None:
    """Each operation's rate over its intensity, below what was measured; larger points took longer."""
    ceilings = profile.measurement.ceilings
    flops, moved = ceilings.flops_per_second / profile.num_devices, ceilings.bytes_per_second / profile.num_devices
    intensity = np.geomspace(1e-2, 1e4, 64)
    axes.plot(intensity, np.minimum(flops, intensity * moved) / 1e9, color=INK, linewidth=1.2)
    longest = max((one.seconds for one in timed), default=1.0)
    for one in timed:
        x, num_calls = one.intensity, one.operation.num_calls
        if not x or num_calls is None:
            continue
        rate = num_calls * one.operation.work.flops / one.seconds
        axes.scatter(x, rate / 1e9, s=4.0 + 80.0 * one.seconds / longest, color=BOUND_COLOURS[one.bound], alpha=0.6)
    axes.set(
        title="Roofline, measured", xlabel="FLOPs per byte", ylabel="GFLOP/s of one device", xscale="log", yscale="log"
    )
    # The report's style reads no mathematics, with which powers of ten would be written.
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
