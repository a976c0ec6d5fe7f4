"""The operations of a compiled program, one device's part: what each computes and moves, from the program's text.

Counted as XLA's own cost analysis does: a multiplication and an addition are two, an elementwise operation is one for
each number that it gives, ``exp`` and its like are not counted; of a convolution the padding is not. Other than there,
the body of a loop counts as often as the loop runs.
"""

import functools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from mmei_jax.collectives import KINDS
from mmei_jax.profiling.product_flops import WindowAxis, convolution_flops
from mmei_jax.program_text import (
    Instruction,
    ProgramText,
    array_bytes,
    arrays_of,
    main_memory_bytes,
    typed_arrays,
    visits,
)

_ELEMENTWISE = {
    "abs",
    "add",
    "and",
    "ceil",
    "clamp",
    "compare",
    "divide",
    "floor",
    "maximum",
    "minimum",
    "multiply",
    "negate",
    "not",
    "or",
    "remainder",
    "round-nearest-afz",
    "round-nearest-even",
    "select",
    "shift-left",
    "shift-right-arithmetic",
    "shift-right-logical",
    "sign",
    "subtract",
    "xor",
}
# Compute and move nothing, or only call what does.
_FREE = {
    "add-dependency",
    "after-all",
    "async-done",
    "async-start",
    "async-update",
    "bitcast",
    "call",
    "conditional",
    "constant",
    "get-tuple-element",
    "opt-barrier",
    "optimization-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
    "while",
}
_SLICES = ("dynamic-slice", "slice", "gather")
_WINDOW = re.compile(r"\bwindow=\{([^}]*)\}")
_DIM_LABELS = re.compile(r"\bdim_labels=(\w+)_(\w+)->(\w+)")
_CONTRACTED = re.compile(r"\blhs_contracting_dims=\{([\d,]*)\}")
_LIBRARY_CONTRACTED = re.compile(r'"lhs_contracting_dimensions":\[([^\]]*)\]')
_TARGET = re.compile(r'\bcustom_call_target="([^"]*)"')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
# Custom calls of which the text says what they compute, by what their target contains.
_LIBRARY_PRODUCTS = ("cublas", "matmul", "gemm")
_LIBRARY_CONVOLUTION = "__cudnn$conv"
# Custom calls that only mark or place what they are given.
_MARKERS = ("Sharding", "annotate_device_placement", "MoveToHost", "MoveToDevice", "AllocateBuffer", "SliceToDynamic")


@dataclass(frozen=True)
class Work:
    """What something computes when it runs once.

    Attributes:
        flops: all operations.
        product_flops: those of matrix products and convolutions.
        is_known: whether nothing in it is a library's or a kernel's, of which the text does not say what it computes.
        is_library: whether a library computes some of the products, of which XLA's cost analysis counts nothing.
    """

    flops: float = 0.0
    product_flops: float = 0.0
    is_known: bool = True
    is_library: bool = False

    def __add__(self, other: "Work") -> "Work":
        """Both, one after the other."""
        return Work(
            self.flops + other.flops,
            self.product_flops + other.product_flops,
            is_known=self.is_known and other.is_known,
            is_library=self.is_library or other.is_library,
        )

    def times(self, number: int) -> "Work":
        """What it computes when it runs so often."""
        return replace(self, flops=number * self.flops, product_flops=number * self.product_flops)


@dataclass(frozen=True)
class Operation:
    """What a device runs as one piece: a fusion, a product, a copy, a call of a library, a collective.

    Attributes:
        name: in the program's text, and in traces.
        opcode: such as ``fusion``; of a custom call its target.
        op_name: what of the model it comes from; "" where the text does not say.
        work: of one call.
        num_bytes: that one call reads and writes, where everything is read once.
        num_calls: when the program runs once; None in a loop of unknown length.
        expected_cycles: of one call, where the compiler tells them (that for TPUs does, but of collectives); else 0.
    """

    name: str
    opcode: str
    op_name: str
    work: Work
    num_bytes: int
    num_calls: int | None
    expected_cycles: int = 0

    @property
    def is_collective(self) -> bool:
        """Whether it exchanges with other devices, or waits for an exchange."""
        return self.opcode.removesuffix("-start").removesuffix("-done") in KINDS


def read_operations(program: ProgramText) -> list[Operation]:
    """Everything that runs when the program runs; what a fusion contains is one operation."""
    work_of = _WorkReader(program)
    found = []
    for visit in visits(program):
        if visit.is_fused:
            continue
        shapes = {instruction.name: instruction.shape for instruction in visit.instructions}
        for instruction in visit.instructions:
            if instruction.opcode in _FREE:
                continue
            target = _TARGET.search(instruction.rest) if instruction.opcode == "custom-call" else None
            found.append(
                Operation(
                    name=instruction.name,
                    opcode=target.group(1) if target else instruction.opcode,
                    op_name=instruction.op_name,
                    work=work_of.instruction(instruction, shapes),
                    num_bytes=_moved_bytes(instruction, shapes, program),
                    num_calls=visit.num_calls,
                    expected_cycles=sum(int(cycles) for cycles in _CYCLES.findall(instruction.rest)),
                )
            )
    return found


def total_work(operations: Iterable[Operation], *, counts_loops_once: bool = False) -> Work:
    """What a program computes; in a loop of unknown length each operation counts once.

    Args:
        operations: of the program.
        counts_loops_once: as XLA's cost analysis does.
    """
    works = (one.work.times(num_runs(one, counts_loops_once=counts_loops_once)) for one in operations)
    return sum(works, Work())


def total_bytes(operations: Iterable[Operation], *, counts_loops_once: bool = False) -> float:
    """Bytes that a program's operations read and write; see :func:`total_work`."""
    return float(
        sum(num_runs(operation, counts_loops_once=counts_loops_once) * operation.num_bytes for operation in operations)
    )


def num_runs(operation: Operation, *, counts_loops_once: bool = False) -> int:
    """How often an operation counts: as often as it runs; in a loop of unknown length, once.

    Args:
        operation: of a program.
        counts_loops_once: as XLA's cost analysis does.
    """
    return 1 if counts_loops_once or operation.num_calls is None else operation.num_calls


class _WorkReader:
    """Work of instructions, that of called computations read once."""

    def __init__(self, program: ProgramText) -> None:
        self._program = program
        self._of_computation = functools.lru_cache(maxsize=None)(self._computation)

    def instruction(self, instruction: Instruction, shapes: Mapping[str, str]) -> Work:
        """What one call computes, with what it calls."""
        opcode = instruction.opcode
        if opcode == "dot":
            return _product(2.0 * _elements(instruction.shape) * _contracted(instruction, shapes, _CONTRACTED))
        if opcode == "convolution":
            return _product(_convolution_flops(instruction, shapes))
        if opcode == "custom-call":
            return self._custom_call(instruction, shapes)
        if opcode == "reduce":
            # One operation for every number that is read but those that are given.
            return Work(float(max(0, _elements(shapes[instruction.operand_names[0]]) - _elements(instruction.shape))))
        if opcode == "reduce-window":
            sizes = _window(instruction).get("size", [1])
            return Work(float(_elements(instruction.shape) * (math.prod(sizes) - 1)))
        if opcode in _ELEMENTWISE:
            return Work(float(_elements(instruction.shape)))
        if opcode in ("fusion", "call", "conditional") or opcode == "async-start":
            parts = [self._of_computation(name) for name in instruction.called]
            if opcode == "conditional":
                return max(parts, key=lambda part: part.flops, default=Work())
            return sum(parts, Work())
        return Work()

    def _computation(self, name: str) -> Work:
        instructions = self._program.computations[name]
        shapes = {instruction.name: instruction.shape for instruction in instructions}
        return sum((self.instruction(instruction, shapes) for instruction in instructions), Work())

    def _custom_call(self, instruction: Instruction, shapes: Mapping[str, str]) -> Work:
        target = _TARGET.search(instruction.rest)
        name = target.group(1) if target else ""
        if any(marker in name for marker in _MARKERS):
            return Work()
        if name.startswith(_LIBRARY_CONVOLUTION) and _DIM_LABELS.search(instruction.rest):
            return replace(_product(_convolution_flops(instruction, shapes, name)), is_library=True)
        if any(part in name for part in _LIBRARY_PRODUCTS) and _LIBRARY_CONTRACTED.search(instruction.rest):
            # What it gives may come with a workspace.
            first = arrays_of(instruction.shape)[0][1]
            flops = 2.0 * math.prod(first) * _contracted(instruction, shapes, _LIBRARY_CONTRACTED)
            return replace(_product(flops), is_library=True)
        return Work(is_known=False)


def _product(flops: float) -> Work:
    return Work(flops, flops)


def _elements(shape: str) -> int:
    """Numbers of an array; of a tuple those of its first array."""
    found = arrays_of(shape)
    return math.prod(found[0][1]) if found else 0


def _contracted(instruction: Instruction, shapes: Mapping[str, str], pattern: re.Pattern[str]) -> int:
    """Numbers that are added up for each that a product gives."""
    found = pattern.search(instruction.rest)
    sizes = arrays_of(shapes[instruction.operand_names[0]])[0][1]
    axes = [int(axis) for axis in found.group(1).replace('"', "").split(",") if axis] if found else []
    return math.prod(sizes[axis] for axis in axes)


def _window(instruction: Instruction) -> dict[str, list[int]]:
    """Sizes, strides, paddings (low and high in turns) and dilations of a window, by XLA's names."""
    found = _WINDOW.search(instruction.rest)
    parts = [part.partition("=") for part in found.group(1).split()] if found else []
    return {name: [int(number) for number in re.findall(r"-?\d+", value)] for name, _, value in parts}


def _convolution_flops(instruction: Instruction, shapes: Mapping[str, str], target: str = "") -> float:
    """Two for each pair of an input and a kernel number that meet; padding and holes meet nothing."""
    labels = _DIM_LABELS.search(instruction.rest)
    if labels is None:
        return 0.0
    first, second = (arrays_of(shapes[name])[0][1] for name in instruction.operand_names[:2])
    # What it gives may come with a workspace.
    result = arrays_of(instruction.shape)[0][1]
    # cuDNN's gradients are told as of the convolution whose gradient they are.
    if "convBackwardInput" in target:
        inputs, kernel, outputs = result, second, first
    elif "convBackwardFilter" in target:
        inputs, kernel, outputs = first, result, second
    else:
        inputs, kernel, outputs = first, second, result
    window = _window(instruction)
    num_axes = len(outputs) - 2
    ones, zeros = [1] * num_axes, [0] * (2 * num_axes)
    axes = [
        WindowAxis(
            inputs[labels.group(1).index(str(axis))],
            kernel[labels.group(2).index(str(axis))],
            outputs[labels.group(3).index(str(axis))],
            window.get("stride", ones)[axis],
            window.get("pad", zeros)[2 * axis],
            window.get("lhs_dilate", ones)[axis],
            window.get("rhs_dilate", ones)[axis],
        )
        for axis in range(num_axes)
    ]
    groups = re.search(r"\bbatch_group_count=(\d+)", instruction.rest)
    batch = inputs[labels.group(1).index("b")] // (int(groups.group(1)) if groups else 1)
    return convolution_flops(batch, kernel[labels.group(2).index("i")], kernel[labels.group(2).index("o")], axes)


def _moved_bytes(instruction: Instruction, shapes: Mapping[str, str], program: ProgramText) -> int:
    """Bytes that are read of and written to the main memory; of an array that a fusion only takes slices of, these.

    What a TPU's compiler placed in the memory on the chip is neither.
    """
    if instruction.opcode.endswith("-done"):
        return 0
    read = [shapes[name] for name in instruction.operand_names]
    written = main_memory_bytes(instruction.shape)
    if instruction.opcode in _SLICES:
        return _moved_part(read[0], instruction.shape) + written
    if instruction.opcode == "dynamic-update-slice":
        return main_memory_bytes(read[1]) + _moved_part(instruction.shape, read[1])
    if instruction.opcode == "copy-start":
        # What it gives names the copy, what is copied, and a semaphore.
        return main_memory_bytes(read[0]) + main_memory_bytes(typed_arrays(instruction.shape)[0])
    if instruction.opcode == "slice-start":
        # What it gives names what is cut, the slice, and a semaphore.
        part = typed_arrays(instruction.shape)[1]
        return _moved_part(read[0], part) + main_memory_bytes(part)
    if instruction.opcode != "fusion" or not instruction.called:
        return sum(main_memory_bytes(one) for one in read) + written
    inside = program.computations[instruction.called[0]]
    found = sum(
        _read_bytes(one.name, main_memory_bytes(read[_number(one)]), inside, program)
        for one in inside
        if one.opcode == "parameter"
    )
    return found + _result_bytes(inside, instruction.shape)


def _moved_part(whole: str, part: str) -> int:
    """Bytes of a part of an array, which lies where the array does."""
    return array_bytes(part) if main_memory_bytes(whole) else 0


def _read_bytes(name: str, whole: int, inside: Sequence[Instruction], program: ProgramText) -> int:
    """Bytes that a fusion reads of an array of so many; of one that it only takes slices of, these."""
    readers = [one for one in inside if name in one.operand_names]
    found = 0 if readers else whole
    for one in readers:
        is_cut = one.operand_names[0] == name
        if one.opcode in _SLICES and is_cut:
            found += array_bytes(one.shape)
        elif one.opcode == "fusion":
            nested = program.computations[one.called[0]]
            found += sum(
                _read_bytes(parameter.name, whole, nested, program)
                for parameter in nested
                if parameter.opcode == "parameter" and one.operand_names[_number(parameter)] == name
            )
        elif one.opcode != "dynamic-update-slice" or not is_cut:
            found += whole
        # (What is updated is overwritten in its place.)
    return min(whole, found)


def _number(parameter: Instruction) -> int:
    """Which of its computation's parameters it is."""
    return int(parameter.operands.strip("()"))


def _result_bytes(inside: Sequence[Instruction], given: str) -> int:
    """Bytes that a fusion writes, which gives what is of the type that is given."""
    root = next(one for one in inside if one.is_root)
    if root.opcode == "dynamic-update-slice":
        update = next(one for one in inside if one.name == root.operand_names[1])
        return _moved_part(given, update.shape)
    return main_memory_bytes(given)
