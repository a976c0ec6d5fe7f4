"""Where the time of a long piece of work goes, by stage and part, over all the commands that it takes."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from mmei_jax.workdir import read_json, write_json

# JAX tells how long it traced, lowered, and compiled or looked up in its compilation cache.
_COMPILATION_EVENTS = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)
COMPILATION, OTHER = "compilation", "other"


class PartTimes:
    """Seconds of the host by stage and part, added to those that earlier commands left in a file.

    What JAX traces and compiles counts as "compilation", in whatever part it happens; what is in no part as "other".

    Args:
        path: of the JSON file ``{stage: {part: seconds}}``.

    Attributes:
        seconds: by stage and part, so far.

    Raises:
        InputError: the file is there and no JSON.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.seconds: dict[str, dict[str, float]] = read_json(path) if path.exists() else {}
        self._stage: dict[str, float] = {}
        # Of the part that is open: what parts within it took, and when which compilation began and how long it took.
        self._within = 0.0
        self._compilations: list[tuple[float, float]] = []
        self._thread = threading.get_ident()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A block whose parts are those of a stage; the file is written at its end, however that comes."""
        self._stage = self.seconds.setdefault(name, {})
        jax.monitoring.register_event_duration_secs_listener(self._note)
        try:
            with self.part(OTHER):
                yield
        finally:
            jax.monitoring.unregister_event_duration_listener(self._note)
            self.save()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A block within a stage; it may lie within another part, whose time it then is not."""
        started, outside = time.perf_counter(), self._within
        self._within = 0.0
        try:
            yield
        finally:
            elapsed = time.perf_counter() - started
            # Those of earlier blocks were taken when these ended.
            compiled = sum((seconds for began, seconds in self._compilations if began >= started), 0.0)
            self._compilations = [entry for entry in self._compilations if entry[0] < started]
            self._add(COMPILATION, compiled)
            self._add(name, elapsed - self._within - compiled)
            self._within = outside + elapsed

    def save(self) -> None:
        """Writes what has come to its end, so that a command that is killed leaves it."""
        write_json(self._path, self.seconds)

    def _add(self, name: str, seconds: float) -> None:
        self._stage[name] = self._stage.get(name, 0.0) + seconds

    def _note(self, event: str, duration_secs: float, **_: Any) -> None:
        # Another thread's compilation goes on beside the parts, not within them.
        if event in _COMPILATION_EVENTS and threading.get_ident() == self._thread:
            began = time.perf_counter() - duration_secs
            # One function is traced within another, which is told of later: its time holds that of the first.
            self._compilations = [entry for entry in self._compilations if entry[0] < began]
            self._compilations.append((began, duration_secs))


def by_part(seconds: dict[str, dict[str, float]]) -> dict[str, float]:
    """The seconds of all stages together, by part, the longest first.

    Example:
        >>> by_part({"search": {"updates": 1.0, "data": 2.0}, "seeds": {"updates": 3.0}})
        {'updates': 4.0, 'data': 2.0}
    """
    total: dict[str, float] = {}
    for parts in seconds.values():
        for name, value in parts.items():
            total[name] = total.get(name, 0.0) + value
    return dict(sorted(total.items(), key=lambda item: (-item[1], item[0])))
