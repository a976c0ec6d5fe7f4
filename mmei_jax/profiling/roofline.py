"""What bounds each operation: its FLOPs and bytes, held against what the devices were measured to do (the roofline).

Williams, Waterman and Patterson, "Roofline: an insightful visual performance model for multicore architectures", 2009.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mmei_jax.profiling.operations import Operation

Bound = Literal["compute", "memory", "exchange", "unknown"]


@dataclass(frozen=True)
class TimedOperation:
    """An operation, how long it took, and what bounds it.

    Attributes:
        operation: of the program.
        seconds: in one update, on one device; on a processor, of all its threads together.
        bound: "compute" or "memory", whichever would take longer at the measured rates; "exchange" of collectives;
            "unknown" where the program's text does not say what is computed.
        roof_seconds: the least time in one update at the measured rates; None where it is not known.
    """

    operation: Operation
    seconds: float
    bound: Bound
    roof_seconds: float | None

    @property
    def intensity(self) -> float | None:
        """FLOPs for each byte that is moved; None where either is not known or nothing is moved."""
        if self.bound in ("exchange", "unknown") or not self.operation.num_bytes:
            return None
        return self.operation.work.flops / self.operation.num_bytes


def time_operations(
    operations: Sequence[Operation],
    seconds: Mapping[str, float],
    *,
    flops_per_second: float,
    bytes_per_second: float,
) -> list[TimedOperation]:
    """Operations with their time, the longest first; those that the trace does not tell of took 0 seconds.

    Args:
        operations: of a program; of several that are called by one name, all times count for the first.
        seconds: by name, in one update and on one device.
        flops_per_second: one device's measured rate of matrix products.
        bytes_per_second: one device's measured rate of a copy.
    """
    left = dict(seconds)
    timed = []
    for operation in operations:
        bound = classify(operation, flops_per_second=flops_per_second, bytes_per_second=bytes_per_second)
        roof = None
        if bound in ("compute", "memory") and operation.num_calls is not None:
            longest = max(operation.work.flops / flops_per_second, operation.num_bytes / bytes_per_second)
            roof = operation.num_calls * longest
        timed.append(TimedOperation(operation, left.pop(operation.name, 0.0), bound, roof))
    return sorted(timed, key=lambda one: -one.seconds)


def classify(operation: Operation, *, flops_per_second: float, bytes_per_second: float) -> Bound:
    """What bounds an operation, see :class:`TimedOperation`.

    Args:
        operation: of a program.
        flops_per_second: one device's measured rate of matrix products.
        bytes_per_second: one device's measured rate of a copy.
    """
    if operation.is_collective:
        return "exchange"
    if not operation.work.is_known:
        return "unknown"
    is_compute = operation.work.flops / flops_per_second > operation.num_bytes / bytes_per_second
    return "compute" if is_compute else "memory"


def seconds_by_bound(timed: Sequence[TimedOperation]) -> dict[str, float]:
    """Seconds of one update by what bounds the operations, the most first."""
    seconds: dict[str, float] = {}
    for one in timed:
        seconds[one.bound] = seconds.get(one.bound, 0.0) + one.seconds
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))
