"""Two times that XLA's TPU compiler gives a program: its optimal one, and the cycles that it expects of each operation.

Neither knows of the interconnect: a collective is no more to them than the memory that it reads and writes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mmei_jax.profiling.operations import Operation, num_runs
from mmei_jax.profiling.programs import ProgramFacts
from mmei_jax.profiling.topologies import Chip

# Custom calls that move nothing.
_STILL = ("AllocateBuffer", "ConcatBitcast")
# The share of a program's time that may lie in loops, which the compiler counts once, for its figure to be taken.
_LOOP_SHARE = 0.01


@dataclass(frozen=True)
class TpuTimes:
    """Seconds of one chip's program, without collectives.

    Attributes:
        optimal_seconds: the least: of each operation its FLOPs at the peak or its bytes at the memory's rate, whichever
            takes longer.
        is_compilers: whether the compiler said so. It counts the body of a loop once; where loops are more than a
            hundredth of a program it is our calculation of that kind from the program's text, loops as often as they
            run; what lies in the memory on the chip moves nothing.
        expected_seconds: the cycles that the compiler expects of each operation as it has tiled it, one after the
            other.
    """

    optimal_seconds: float
    is_compilers: bool
    expected_seconds: float


def tpu_times(facts: ProgramFacts, compiler_seconds: float | None, chip: Chip) -> TpuTimes:
    """What the compiler thinks of a program.

    Args:
        facts: of the program.
        compiler_seconds: ``optimal_seconds`` of its cost analysis, as it is. A second is taken from it for each
            operation of which the compiler does not know the time; what is left below a second is the others'.
        chip: that it is compiled for.
    """
    roof = roofline_seconds(facts.operations, chip)
    once = roofline_seconds(facts.operations, chip, counts_loops_once=True)
    told = None
    if compiler_seconds is not None and roof < 1.0 and roof - once <= _LOOP_SHARE * roof:
        told = compiler_seconds - math.floor(compiler_seconds)
    cycles = sum(num_runs(one) * one.expected_cycles for one in facts.operations)
    return TpuTimes(
        optimal_seconds=roof if told is None else told,
        is_compilers=told is not None,
        expected_seconds=cycles * chip.flops_per_cycle / chip.flops_per_second,
    )


def roofline_seconds(operations: Sequence[Operation], chip: Chip, *, counts_loops_once: bool = False) -> float:
    """FLOPs at the peak or bytes at the memory's rate, whichever takes longer, of all operations one after the other.

    Args:
        operations: of a program; those in a loop of unknown length count once.
        chip: that it is compiled for.
        counts_loops_once: as the compiler does.
    """
    seconds = (
        num_runs(one, counts_loops_once=counts_loops_once)
        * max(one.work.flops / chip.flops_per_second, one.num_bytes / chip.memory_bytes_per_second)
        for one in operations
        if one.opcode not in _STILL
    )
    return sum(seconds, 0.0)
