"""Counts the programs that are compiled, so that whoever measures time can leave the compilations out."""

from typing import Any

import jax

# JAX tells of every program that it compiles, or finds in its compilation cache, by the first event; of those that it
# finds there by the second one too.
_EVENT = "/jax/core/compile/backend_compile_duration"
_FOUND_EVENT = "/jax/compilation_cache/cache_hits"


class CompilationCounter:
    """How many programs this process has compiled since the counter was made; :meth:`close` ends the counting.

    Attributes:
        count: programs that were compiled, or found in the compilation cache.
        num_found: those of them that were found there.

    Example:
        >>> counter = CompilationCounter()
        >>> _ = jax.jit(lambda x: x + 17)(1.0)
        >>> counter.count > 0
        True
        >>> counter.close()
    """

    def __init__(self) -> None:
        self.count = self.num_found = 0
        jax.monitoring.register_event_duration_secs_listener(self._note)
        jax.monitoring.register_event_listener(self._note_found)

    def close(self) -> None:
        """Stops counting."""
        jax.monitoring.unregister_event_duration_listener(self._note)
        jax.monitoring.unregister_event_listener(self._note_found)

    def _note(self, event: str, duration_secs: float, **_: Any) -> None:
        self.count += event == _EVENT

    def _note_found(self, event: str, **_: Any) -> None:
        self.num_found += event == _FOUND_EVENT
