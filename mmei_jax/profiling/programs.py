"""The facts of a compiled program, one device's part: FLOPs, bytes, memory by kind, collectives, operations."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from mmei_jax.collectives import Collective, read_collectives
from mmei_jax.profiling.liveness import forward_share
from mmei_jax.profiling.operations import Operation, read_operations, total_bytes, total_work
from mmei_jax.program_text import ProgramText, parse_program
from mmei_jax.types import TrainState


@dataclass(frozen=True)
class MemoryUse:
    """Bytes on one device while a program runs.

    The compiler says how much it needs for temporaries all together. Of these, ``activations`` are what the forward
    pass made and the backward pass is still to read, at the moment when most is in use; see
    :func:`~mmei_jax.profiling.liveness.forward_share`. The rest is ``workspace``: gradients among it, what the backward
    pass computes again, and what is lost between buffers.

    Attributes:
        parameters: of the model.
        optimizer_state: moments of the trained parameters.
        other_state: constants that standardise the inputs, and counts.
        batch: all other arguments.
        outputs: what is given back and does not lie where an argument lay.
        activations: see above.
        workspace: see above.
        generated_code: the program itself.
    """

    parameters: int
    optimizer_state: int
    other_state: int
    batch: int
    outputs: int
    activations: int
    workspace: int
    generated_code: int

    @property
    def temporaries(self) -> int:
        """What is needed while the program runs, and free before and after."""
        return self.activations + self.workspace

    @property
    def total(self) -> int:
        """All kinds together: what a device must have."""
        return sum(self.by_kind().values())

    def by_kind(self) -> dict[str, int]:
        """Bytes by kind, in words, in the order of the attributes."""
        return {
            "parameters": self.parameters,
            "optimizer state": self.optimizer_state,
            "other state": self.other_state,
            "batch": self.batch,
            "outputs": self.outputs,
            "activations": self.activations,
            "workspace": self.workspace,
            "program": self.generated_code,
        }


@dataclass(frozen=True)
class ProgramFacts:
    """What a compiled program costs one device each time that it runs, as compiler and text say.

    Attributes:
        num_devices: that run it together.
        flops: what the compiler counts, and the loops as often as they run: it counts their bodies once. Where
            libraries compute products, of which it counts nothing, and where it says nothing at all, the text's.
        product_flops: those of matrix products and convolutions, from the text.
        compiler_flops: what the compiler counts; None where ``flops`` are the text's.
        bytes_accessed: what the compiler counts that operations read and write, loops as often as they run; the text's
            where ``flops`` are.
        optimal_seconds: the least time that the compiler thinks possible, loops once; None where it says nothing.
        memory: by kind.
        collectives: those between devices.
        operations: everything that runs.
        is_work_known: False where libraries or kernels run of which neither says what they compute.
        num_unknown_loops: loops whose length the compiler does not know; their bodies count once.
    """

    num_devices: int
    flops: float
    product_flops: float
    compiler_flops: float | None
    bytes_accessed: float
    optimal_seconds: float | None
    memory: MemoryUse
    collectives: tuple[Collective, ...]
    operations: tuple[Operation, ...]
    is_work_known: bool
    num_unknown_loops: int

    @property
    def flops_source(self) -> str:
        """Who counted ``flops``, in words."""
        return "the program's text" if self.compiler_flops is None else "XLA's cost analysis"

    @property
    def unknown_calls(self) -> tuple[str, ...]:
        """What is called of which nobody says what it computes, each once."""
        return tuple(sorted({one.opcode for one in self.operations if not one.work.is_known}))


def describe_program(compiled: jax.stages.Compiled, *, state: TrainState | None = None) -> ProgramFacts:
    """Reads what a compiled program says of itself; nothing runs.

    Args:
        compiled: for any platform, devices that are only described among them.
        state: shapes, with shardings, of the training state that it takes; None counts all arguments as the batch.
    """
    text = compiled.as_text() or ""
    program = parse_program(text)
    operations = tuple(read_operations(program))
    work, once = total_work(operations), total_work(operations, counts_loops_once=True)
    costs = _costs(compiled)
    # To XLA's cost analysis, a call of cuBLAS or cuDNN is -1 FLOPs and -1 bytes.
    flops, bytes_accessed = (None if work.is_library else costs.get(name) for name in ("flops", "bytes accessed"))
    text_bytes = total_bytes(operations)
    loop_bytes = text_bytes - total_bytes(operations, counts_loops_once=True)
    return ProgramFacts(
        num_devices=_num_devices(compiled),
        flops=work.flops if flops is None else flops + work.flops - once.flops,
        product_flops=work.product_flops,
        compiler_flops=flops,
        bytes_accessed=text_bytes if bytes_accessed is None else bytes_accessed + loop_bytes,
        optimal_seconds=costs.get("optimal_seconds"),
        memory=_memory(compiled, program, state),
        collectives=tuple(read_collectives(text)),
        operations=operations,
        is_work_known=work.is_known,
        num_unknown_loops=_num_unknown_loops(program),
    )


def bytes_per_device(shapes: Any) -> int:
    """Bytes of a tree on one device.

    Args:
        shapes: arrays, or shapes with shardings; without one they lie there whole.
    """
    return sum(_own_bytes(leaf) for leaf in jax.tree.leaves(shapes))


def _own_bytes(leaf: Any) -> int:
    sharding = getattr(leaf, "sharding", None)
    shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize


def _costs(compiled: jax.stages.Compiled) -> Mapping[str, float]:
    """What the compiler counts; negative numbers stand for what it does not know."""
    found: Any = compiled.cost_analysis()
    found = found[0] if isinstance(found, list) and found else found
    return {name: float(value) for name, value in (found or {}).items() if value > 0.0}


def _memory(compiled: jax.stages.Compiled, program: ProgramText, state: TrainState | None) -> MemoryUse:
    sizes: Any = compiled.memory_analysis()
    parameters = optimizer_state = other = 0
    if state is not None:
        parameters = bytes_per_device(state.parameters)
        optimizer_state = bytes_per_device(state.optimizer_state)
        other = bytes_per_device((state.step, state.statistics))
    temporaries = int(sizes.temp_size_in_bytes)
    activations = round(forward_share(program) * temporaries)
    return MemoryUse(
        parameters=parameters,
        optimizer_state=optimizer_state,
        other_state=other,
        # Arguments may be padded, and those that nothing reads are dropped.
        batch=max(0, int(sizes.argument_size_in_bytes) - parameters - optimizer_state - other),
        outputs=max(0, int(sizes.output_size_in_bytes) - int(sizes.alias_size_in_bytes)),
        activations=activations,
        workspace=temporaries - activations,
        generated_code=int(sizes.generated_code_size_in_bytes),
    )


def _num_devices(compiled: jax.stages.Compiled) -> int:
    shardings = jax.tree.leaves((compiled.input_shardings, compiled.output_shardings))
    return max((sharding.num_devices for sharding in shardings), default=1)


def _num_unknown_loops(program: ProgramText) -> int:
    return sum(
        instruction.opcode == "while" and instruction.trip_count is None
        for instructions in program.computations.values()
        for instruction in instructions
    )
