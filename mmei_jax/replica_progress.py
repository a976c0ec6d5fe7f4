"""What is known of replicas while they train: their best values, their history, their rate."""

import time
from dataclasses import dataclass, field
from typing import Any


@dataclass
class ReplicaProgress:
    """What is known of each replica of a group; JSON values, saved with every checkpoint.

    Attributes:
        best_values: the best value of ``train.best_metric``; None before the first evaluation, and for a replica whose
            loss was not finite before it.
        best_steps: the updates after which it was reached; 0 before.
        best_metrics: all validation metrics of that moment.
        evaluations_since_best: for early stopping.
        has_diverged: whether a loss was not finite.
        history: of every evaluation the step, the value and the mean training loss since the one before, per replica.
        updates_per_second: of one replica's updates, all replicas together, without compilation; 0 before the second
            dispatch.
    """

    best_values: list[float | None]
    best_steps: list[int]
    best_metrics: list[dict[str, float]]
    evaluations_since_best: list[int]
    has_diverged: list[bool]
    history: list[dict[str, Any]] = field(default_factory=list)
    updates_per_second: float = 0.0

    @classmethod
    def fresh(cls, count: int) -> "ReplicaProgress":
        """Of ``count`` replicas that have done nothing."""
        return cls([None] * count, [0] * count, [{} for _ in range(count)], [0] * count, [False] * count)


class DispatchClock:
    """Time of dispatches whose program had run before."""

    def __init__(self) -> None:
        self._known: set[Any] = set()
        self._seconds, self._updates = 0.0, 0

    def dispatch(self, key: Any, num_updates: int) -> "_Dispatch":
        """A block whose time counts if its program, told by ``key``, ran before."""
        return _Dispatch(self, key, num_updates)

    def note(self, key: Any, seconds: float, num_updates: int) -> None:
        """Enters a dispatch."""
        if key in self._known:
            self._seconds += seconds
            self._updates += num_updates
        self._known.add(key)

    def rate(self, count: int) -> float:
        """Updates of single replicas per second; 0 before any program ran twice."""
        return count * self._updates / self._seconds if self._seconds else 0.0


@dataclass
class _Dispatch:
    clock: DispatchClock
    key: Any
    num_updates: int
    started: float = 0.0

    def __enter__(self) -> None:
        self.started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.clock.note(self.key, time.perf_counter() - self.started, self.num_updates)
