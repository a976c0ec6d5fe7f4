"""A device that runs out of memory, told in words: what needs how much, and which settings would need less."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import jax

from mmei_jax.config import Config
from mmei_jax.memory_estimates import Saving, estimate, largest_savings
from mmei_jax.training_parts import TrainingParts, prepare
from mmei_jax.types import InputError, OutOfMemoryError

_STATUS = "RESOURCE_EXHAUSTED"
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device's memory was too small, while compiling or while running."""
    return isinstance(error, jax.errors.JaxRuntimeError) and _STATUS in str(error)


def explained(config: Config, parts: TrainingParts | None = None) -> AbstractContextManager[None]:
    """Tells what a run needs of a device's memory, where that is too small within the block.

    Args:
        config: of the run.
        parts: of the run; None builds them where they are needed.

    Raises:
        OutOfMemoryError: with the table of what the run needs, and the three settings that would reduce it most.
    """
    return explained_by(lambda: _details(config, parts), what="this run")


@contextmanager
def explained_by(details: Callable[[], list[str]], *, what: str) -> Iterator[None]:
    """Tells what is needed of a device's memory, where that is too small within the block.

    Args:
        details: gives the lines below the error's own; called only then.
        what: a device's memory does not hold.

    Raises:
        OutOfMemoryError: with these lines.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(_headline(error, what), details_or_why_not(details)) from error


def details_or_why_not(details: Callable[[], list[str]]) -> list[str]:
    """The lines, or the one that says why there are none.

    Args:
        details: gives the lines.
    """
    try:
        return details()
    except (InputError, jax.errors.JaxRuntimeError) as error:
        return [f"what it needs could not be estimated: {' '.join(str(error).split())}"]


def memory_lines(by_kind: Mapping[str, int], title: str) -> list[str]:
    """A table of bytes by kind, with their sum.

    Args:
        by_kind: bytes of each kind.
        title: what they are.
    """
    total = sum(by_kind.values())
    rows = [*by_kind.items(), ("together", total)]
    return [title, *(f"  {kind:<16}{shown_bytes(size):>12}{size / max(1, total):>7.0%}" for kind, size in rows)]


def saving_lines(savings: Sequence[Saving]) -> list[str]:
    """Settings that need less, one a line, the largest saving first."""
    if not savings:
        return ["no setting would need less; a larger device, or more of them"]
    lines = [
        f"  {saving.setting}: about {shown_bytes(saving.num_bytes)} less" + (f" ({saving.note})" if saving.note else "")
        for saving in savings
    ]
    return ["settings that would reduce it most, each by itself (estimated):", *lines]


def shown_bytes(num_bytes: int) -> str:
    """Bytes for people.

    Example:
        >>> shown_bytes(3 * 2**30), shown_bytes(100)
        ('3.0 GiB', '100 B')
    """
    size = float(num_bytes)
    for unit in _UNITS[:-1]:
        if size < 1024.0:
            return f"{num_bytes} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024.0
    return f"{size:.1f} {_UNITS[-1]}"


def _headline(error: jax.errors.JaxRuntimeError, what: str) -> str:
    reason = " ".join(str(error).partition(_STATUS)[2].lstrip(": ").split("\n")[0].split())
    device = jax.local_devices()[0]
    # What a platform does not tell.
    limit = (device.memory_stats() or {}).get("bytes_limit")
    size = f" of {shown_bytes(limit)}" if limit else ""
    return f"out of memory: the memory{size} of a device ({device.device_kind}) does not hold {what}: {reason}"


def _details(config: Config, parts: TrainingParts | None) -> list[str]:
    parts = prepare(config) if parts is None else parts
    now = estimate(parts)
    title = "what this run needs on each device, estimated from its shapes before any compiler's savings:"
    return [*memory_lines(now.by_kind(), title), *saving_lines(largest_savings(parts, now))]
