"""Counts the programs that are compiled, so that whoever measures time can leave the compilations out."""

from typing import Any

import jax

# JAX tells of every program that it compiles, or finds in its compilation cache, by this event.
_EVENT = "/jax/core/compile/backend_compile_duration"


class CompilationCounter:
    """How many programs this process has compiled since the counter was made; :meth:`close` ends the counting.

    Example:
        >>> counter = CompilationCounter()
        >>> _ = jax.jit(lambda x: x + 17)(1.0)
        >>> counter.count > 0
        True
        >>> counter.close()
    """

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._note)

    def close(self) -> None:
        """Stops counting."""
        jax.monitoring.unregister_event_duration_listener(self._note)

    def _note(self, event: str, duration_secs: float, **_: Any) -> None:
        self.count += event == _EVENT
