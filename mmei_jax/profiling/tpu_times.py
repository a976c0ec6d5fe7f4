"""Two times that XLA's TPU compiler gives a program: its optimal one, and the cycles that it expects of each operation.

Neither knows of the interconnect: a collective is no more to them than the memory that it reads and writes.
"""

import re
from dataclasses import dataclass

from mmei_jax.profiling.operations import Operation
from mmei_jax.profiling.programs import ProgramFacts
from mmei_jax.profiling.topologies import Chip
from mmei_jax.program_text import ProgramText, visits

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
# Custom calls that move nothing.
_STILL = ("AllocateBuffer", "ConcatBitcast")


@dataclass(frozen=True)
class TpuTimes:
    """Seconds of one chip's program, without collectives.

    Attributes:
        optimal_seconds: the least: of each operation its FLOPs at the peak or its bytes at the memory's rate, whichever
            takes longer.
        is_compilers: whether the compiler said so. Of a program with loops it says nothing that could be used; then it
            is the same calculation on the program's text, loops as often as they run.
        expected_seconds: the cycles that the compiler expects of each operation as it has tiled it, one after the
            other.
    """

    optimal_seconds: float
    is_compilers: bool
    expected_seconds: float


def tpu_times(facts: ProgramFacts, program: ProgramText, chip: Chip) -> TpuTimes:
    """What the compiler thinks of a program.

    Args:
        facts: of the program.
        program: its text.
        chip: that it is compiled for.
    """
    has_loops = any(one.opcode == "while" for own in program.computations.values() for one in own)
    told = None if has_loops else facts.optimal_seconds
    return TpuTimes(
        optimal_seconds=roofline_seconds(facts.operations, chip) if told is None else told,
        is_compilers=told is not None,
        expected_seconds=expected_cycles(program) * chip.flops_per_cycle / chip.flops_per_second,
    )


def roofline_seconds(operations: tuple[Operation, ...], chip: Chip) -> float:
    """FLOPs at the peak or bytes at the memory's rate, whichever takes longer, of all operations one after the other.

    Args:
        operations: of a program; those in a loop of unknown length count once.
        chip: that it is compiled for.
    """
    seconds = (
        (1 if one.num_calls is None else one.num_calls)
        * max(one.work.flops / chip.flops_per_second, one.num_bytes / chip.memory_bytes_per_second)
        for one in operations
        if one.opcode not in _STILL
    )
    return sum(seconds, 0.0)


def expected_cycles(program: ProgramText) -> int:
    """Cycles of the operations of which the compiler tells them: fusions, products and copies, not collectives."""
    return sum(
        (1 if visit.num_calls is None else visit.num_calls) * int(cycles)
        for visit in visits(program)
        if not visit.is_fused
        for instruction in visit.instructions
        for cycles in _CYCLES.findall(instruction.rest)
    )
