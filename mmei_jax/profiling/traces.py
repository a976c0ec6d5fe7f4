"""What devices were at work on, of a profile that ``jax.profiler.trace`` wrote."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What JAX writes down where the host fetches what is on a device, and what a GPU's stream does for it.
_FETCH, _COPIES = "np.asarray(jax.Array)", ("MemcpyD2H", "MemcpyDtoH")
_DEVICE_PLANE = "/device:"
# Of TPUs' lines the one whose events are the operations of the program; "Steps" and "XLA Modules" hold them as wholes.
_TPU_LINE = "XLA Ops"


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


def device_spans(folder: Path, plane: str = _DEVICE_PLANE, line: str = "Stream") -> list[Span]:
    """What ran on the streams of all accelerators; nothing where there are none.

    Args:
        folder: of the profile.
        plane: how the names of devices begin.
        line: how the names of their streams begin.
    """
    return [
        Span(event.name, event.start_ns, event.start_ns + event.duration_ns)
        for each in _planes(folder)
        if each.name.startswith(plane)
        for stream in each.lines
        if stream.name.startswith(line)
        for event in stream.events
    ]


def operation_spans(folder: Path, module: str) -> list[Span]:
    """The operations of a compiled program that devices ran, of any kind, named as in the program's text.

    A processor's threads are its device: an operation that several threads share stands there for each.

    Args:
        folder: of the profile.
        module: name of the program, which its text begins with.
    """
    found = []
    for plane in _planes(folder):
        for line in plane.lines:
            for event in line.events:
                name = _operation_name(event, module, is_named=line.name == _TPU_LINE)
                if name:
                    found.append(Span(name, event.start_ns, event.start_ns + event.duration_ns))
    return found


def num_fetches(folder: Path) -> int:
    """How often the host fetched something from a device while the profile was made.

    On GPUs a fetch stands there twice, as JAX's call on the host and as the copy on a stream of the device; a copy that
    no call asked for, such as that of a loop's condition, stands there once. So the larger of the two numbers counts.

    Args:
        folder: of the profile.
    """
    num_calls = num_copies = 0
    for plane in _planes(folder):
        is_device = plane.name.startswith(_DEVICE_PLANE)
        names = [event.name for line in plane.lines for event in line.events]
        num_calls += 0 if is_device else sum(name.startswith(_FETCH) for name in names)
        num_copies += sum(name.startswith(_COPIES) for name in names) if is_device else 0
    return max(num_calls, num_copies)


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


def _planes(folder: Path) -> Iterator[Any]:
    # Not above: benchmarks import this where no side of theirs wants JAX.
    from jax.profiler import ProfileData

    for path in sorted(folder.rglob("*.xplane.pb")):
        yield from ProfileData.from_file(str(path)).planes


def _operation_name(event: Any, module: str, *, is_named: bool) -> str:
    """The name in the program's text of what an event ran; "" for all that is not of the program."""
    stats = dict(event.stats)
    if str(stats.get("hlo_module", module if is_named else "")) != module:
        return ""
    if "hlo_op" in stats:
        return str(stats["hlo_op"])
    # A TPU's events are called by the line of the text.
    return str(event.name).partition(" = ")[0].removeprefix("%") if is_named else ""
