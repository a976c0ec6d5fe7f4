"""How the pictures of a report look, and how they become PNG files whose bytes depend on what they show alone."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart by colour-blind readers too (https://jfly.uni-koeln.de/color/).
BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
GREY, LIGHT_GREY, INK = "#6b6b6b", "#e3e3e3", "#222222"
MODALITY_COLOURS = {"vision": BLUE, "audio": ORANGE, "text": GREEN}
TASK_COLOURS = {"emotion": BLUE, "intent": RED, "joint": PURPLE, "ranking": GREEN}
WIDTH_INCHES = 9.0

_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same on every machine
    "font.size": 10.0,
    "text.color": INK,
    "text.parse_math": False,  # a dollar sign in a class name is a dollar sign
    "axes.titlesize": 11.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LIGHT_GREY,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 9.0,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.dpi": 110.0,
    "savefig.dpi": 110.0,
}


@contextmanager
def report_style() -> Iterator[None]:
    """The defaults of matplotlib and the report's style, whatever the user's own settings are; draw and save within."""
    with matplotlib.style.context(["default", _STYLE]):
        yield


def new_figure(height_inches: float) -> Figure:
    """A figure of the report's width, laid out when it is saved. Never registered anywhere: no pyplot."""
    return Figure(figsize=(WIDTH_INCHES, height_inches), layout="constrained")


def to_png(figure: Figure) -> bytes:
    """The figure as PNG, without the metadata that matplotlib would add (its version)."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def without_grid(axes: Axes) -> None:
    """For pictures whose marks carry their numbers."""
    axes.grid(visible=False)
    axes.tick_params(length=0)


def shortened(name: str, *, max_characters: int = 24) -> str:
    """A name that leaves room for the picture beside it.

    Example:
        >>> shortened("a feeling that no single word describes")
        'a feeling that no singl…'
    """
    return name if len(name) <= max_characters else name[: max_characters - 1] + "…"


def text_colour(lightness: float) -> str:
    """Ink or white, whichever reads better on a background of this lightness in [0, 1]."""
    return INK if lightness > 0.55 else "white"
