"""What an accelerator was at work on, of a profile that ``jax.profiler.trace`` wrote."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Span:
    """One operation.

    Attributes:
        name: of the kernel or copy.
        start_ns: on the profile's clock.
        end_ns: on the same.
    """

    name: str
    start_ns: float
    end_ns: float


def device_spans(folder: Path, plane: str = "/device:", line: str = "Stream") -> list[Span]:
    """What ran on the streams of all accelerators; nothing where there are none.

    Args:
        folder: of the profile.
        plane: how the names of devices begin.
        line: how the names of their streams begin.
    """
    # Not above: benchmarks import this where no side of theirs wants JAX.
    from jax.profiler import ProfileData

    return [
        Span(event.name, event.start_ns, event.start_ns + event.duration_ns)
        for path in folder.rglob("*.xplane.pb")
        for each in ProfileData.from_file(str(path)).planes
        if each.name.startswith(plane)
        for stream in each.lines
        if stream.name.startswith(line)
        for event in stream.events
    ]


def busy_seconds(spans: Sequence[Span]) -> float:
    """Seconds in which anything ran; what overlaps counts once.

    Example:
        >>> busy_seconds([Span("a", 0e9, 2e9), Span("b", 1e9, 3e9), Span("c", 5e9, 6e9)])
        4.0
    """
    total, end = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.start_ns):
        total += max(0.0, span.end_ns - max(span.start_ns, end))
        end = max(end, span.end_ns)
    return total / 1e9


def seconds_by_operation(spans: Sequence[Span]) -> dict[str, float]:
    """Seconds by name, the most first.

    Example:
        >>> seconds_by_operation([Span("a", 0e9, 1e9), Span("b", 1e9, 4e9), Span("a", 4e9, 5e9)])
        {'b': 3.0, 'a': 2.0}
    """
    seconds: dict[str, float] = defaultdict(float)
    for span in spans:
        seconds[span.name] += (span.end_ns - span.start_ns) / 1e9
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))
