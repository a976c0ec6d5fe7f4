"""Reads the text of a compiled program, as ``compiled.as_text()`` gives it on any platform: what calls what how often.

A loop's body runs as often as the loop does, where the compiler says that, or where the loop counts up to a number
that stands in the text (XLA's TPU compiler leaves it at that).
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

# Of types whose name does not tell their size.
_BITS = {"pred": 8, "token": 0, "opaque": 0}
_BITS_IN_NAME = re.compile(r"[a-z]+(\d+)")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\]")
_ARRAY_AND_LAYOUT = re.compile(r"\b[a-z]\w*\[[\d,<=]*\](?:\{[^}]*\})?")
# Tiles, and the memory of a TPU's vector unit. (On GPUs, whose arrays have no tiles, the same S(1) is main memory.)
_ON_CHIP = re.compile(r"\{[^}]*T\([^}]*S\(1\)[^}]*\}")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+)(?: \(.*)? \{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.+)")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_OP_NAME = re.compile(r'\bop_name="([^"]*)"')
_INDEX = re.compile(r"\bindex=(\d+)")
_ROLE = {role: re.compile(rf"\b{role}=%?([\w.\-]+)") for role in ("condition", "body")}


@dataclass(frozen=True)
class Instruction:
    """A line of the text.

    Attributes:
        name: its own.
        shape: what stands before the opcode: the type of what it gives.
        opcode: such as ``all-reduce-start``.
        operands: what stands in its parentheses.
        rest: what follows them.
        is_root: whether it gives what its computation gives.
        trip_count: how often the body of a loop runs; None where the text does not tell, and of what is no loop.
    """

    name: str
    shape: str
    opcode: str
    operands: str
    rest: str
    is_root: bool = False
    trip_count: int | None = None

    @property
    def op_name(self) -> str:
        """What of the model it comes from, as JAX names it; "" where the text does not say."""
        found = _OP_NAME.search(self.rest)
        return found.group(1) if found else ""

    @functools.cached_property
    def operand_names(self) -> list[str]:
        """The instructions that it reads."""
        return _NAME.findall(self.operands)

    @functools.cached_property
    def called(self) -> list[str]:
        """Names of the computations that it calls, of a condition all branches."""
        # These name the computation of what began the operation.
        if self.opcode in ("async-update", "async-done"):
            return []
        names = [name for _, name in _CALLED.findall(self.rest)]
        for branches in _BRANCHES.findall(self.rest):
            names += [name.strip().removeprefix("%") for name in branches.split(",")]
        return names


@dataclass(frozen=True)
class ProgramText:
    """The computations of a program, in the order of the text.

    Attributes:
        computations: the instructions of each by its name; of a scheduled program in the order in which they run.
        entry: the one with which the program begins.
    """

    computations: Mapping[str, Sequence[Instruction]]
    entry: str


@dataclass(frozen=True)
class Visit:
    """A computation, as often as it is called from one place.

    Attributes:
        instructions: of the computation.
        num_calls: how often it runs when the program runs once; None in a loop of unknown length.
        is_in_loop: whether it is the body of a loop, or called from one.
        is_async: whether other work may run while it does.
        is_fused: whether it is the inside of one operation.
    """

    instructions: Sequence[Instruction]
    num_calls: int | None
    is_in_loop: bool
    is_async: bool
    is_fused: bool = False


def parse_program(text: str) -> ProgramText:
    """The computations of ``compiled.as_text()``.

    Raises:
        ValueError: the text holds no program.
    """
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if begin := _COMPUTATION.match(line):
            current = computations.setdefault(begin.group(2), [])
            entry = begin.group(2) if begin.group(1) else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            root, name, value = found.groups()
            shape, _, value = value.partition(" ") if value[0] != "(" else _balanced(value)
            opcode, _, value = value.strip().partition("(")
            operands, _, rest = _balanced("(" + value)
            current.append(Instruction(name, shape, opcode, operands, rest, is_root=root is not None))
    if not entry:
        raise ValueError("no ENTRY computation: expected the text of a compiled program")
    counted = {name: _with_trip_counts(own, computations) for name, own in computations.items()}
    return ProgramText(counted, entry)


def _with_trip_counts(
    instructions: Sequence[Instruction], computations: Mapping[str, Sequence[Instruction]]
) -> list[Instruction]:
    """The instructions, those that are loops with the number of their turns."""
    found = []
    for one in instructions:
        if one.opcode == "while":
            told = _TRIP_COUNT.search(one.rest)
            turns = int(told.group(1)) if told else _counted_turns(one, instructions, computations)
            found.append(dataclasses.replace(one, trip_count=turns))
        else:
            found.append(one)
    return found


def _counted_turns(
    loop: Instruction, around: Sequence[Instruction], computations: Mapping[str, Sequence[Instruction]]
) -> int | None:
    """The turns of a loop that goes on while a number, 0 at first and 1 more after each turn, is below a constant."""
    condition, body = (_ROLE[role].search(loop.rest) for role in ("condition", "body"))
    if condition is None or body is None:
        return None
    test, turn = computations.get(condition.group(1), ()), computations.get(body.group(1), ())
    compared = next((one for one in test if one.is_root), None)
    if compared is None or compared.opcode != "compare" or "direction=LT" not in compared.rest:
        return None
    place, limit = (_defined(test, name) for name in compared.operand_names)
    index = _INDEX.search(place.rest) if place and place.opcode == "get-tuple-element" else None
    if index is None or limit is None or limit.opcode != "constant":
        return None
    number = int(index.group(1))
    first = _element(around, _defined(around, loop.operand_names[0]), number)
    after = _element(turn, next((one for one in turn if one.is_root), None), number)
    if first is None or _constant(first) != 0 or after is None or after.opcode != "add":
        return None
    before, step = (_defined(turn, name) for name in after.operand_names)
    own = _INDEX.search(before.rest) if before is not None and before.opcode == "get-tuple-element" else None
    is_counted = own is not None and int(own.group(1)) == number and step is not None and _constant(step) == 1
    return _constant(limit) if is_counted else None


def _defined(instructions: Sequence[Instruction], name: str) -> Instruction | None:
    """The instruction of a name; of a copy what is copied."""
    found = next((one for one in instructions if one.name == name), None)
    is_copy = found is not None and found.opcode in ("copy", "bitcast")
    return _defined(instructions, found.operand_names[0]) if found is not None and is_copy else found


def _element(instructions: Sequence[Instruction], made: Instruction | None, index: int) -> Instruction | None:
    """What a tuple holds at a place."""
    if made is None or made.opcode != "tuple" or index >= len(made.operand_names):
        return None
    return _defined(instructions, made.operand_names[index])


def _constant(instruction: Instruction) -> int | None:
    digits = re.fullmatch(r"\(?(-?\d+)\)?", instruction.operands) if instruction.opcode == "constant" else None
    return int(digits.group(1)) if digits else None


def visits(program: ProgramText) -> Iterator[Visit]:
    """The entry computation, and all that it calls, each as often as it is called from different places."""
    first = Visit(program.computations[program.entry], 1, is_in_loop=False, is_async=False)
    yield from _reached(program.computations, first)


def _reached(computations: Mapping[str, Sequence[Instruction]], visit: Visit) -> Iterator[Visit]:
    """The visit, and those of all that it calls."""
    yield visit
    for instruction in visit.instructions:
        is_loop = instruction.opcode == "while"
        num_calls = visit.num_calls
        if is_loop and num_calls is not None:
            trips = instruction.trip_count
            num_calls = None if trips is None else num_calls * trips
        is_control = instruction.opcode in ("while", "call", "conditional") or instruction.opcode.startswith("async-")
        for name in instruction.called:
            yield from _reached(
                computations,
                Visit(
                    computations[name],
                    num_calls,
                    is_in_loop=visit.is_in_loop or is_loop,
                    is_async=visit.is_async or instruction.opcode == "async-start",
                    is_fused=visit.is_fused or not is_control,
                ),
            )


def array_bytes(shape: str) -> int:
    """Bytes of the arrays that a type of the text names, such as ``(f32[16,32]{1,0}, bf16[8])``.

    Args:
        shape: of the text; a tuple counts with all that it holds.

    Raises:
        ValueError: a type's size is not known.
    """
    return sum(-(-math.prod(sizes) * _bits(dtype) // 8) for dtype, sizes in arrays_of(shape))


def main_memory_bytes(shape: str) -> int:
    """Bytes of those arrays that lie in a device's main memory; see :func:`array_bytes`.

    Args:
        shape: of the text, with layouts. A TPU's compiler marks what it keeps in the memory on the chip with ``S(1)``.

    Example:
        >>> main_memory_bytes("(f32[8,128]{1,0:T(8,128)S(1)}, f32[8]{0:T(128)})")
        32
    """
    return sum(array_bytes(one) for one in typed_arrays(shape) if not _ON_CHIP.search(one))


def typed_arrays(shape: str) -> list[str]:
    """The arrays that a type of the text names, each with its layout.

    Example:
        >>> typed_arrays("((f32[8]{0:T(128)}), f32[4]{0:T(128)S(1)}, u32[])")
        ['f32[8]{0:T(128)}', 'f32[4]{0:T(128)S(1)}', 'u32[]']
    """
    return _ARRAY_AND_LAYOUT.findall(shape)


def arrays_of(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    """Types and sizes of the arrays that a type of the text names.

    Example:
        >>> arrays_of("(f32[16,32]{1,0}, bf16[])")
        [('f32', (16, 32)), ('bf16', ())]
    """
    return [
        (dtype, tuple(int(size.removeprefix("<=")) for size in sizes.split(",") if size))
        for dtype, sizes in _ARRAY.findall(shape)
    ]


def operand_bytes(instruction: Instruction, shapes: Mapping[str, str]) -> int:
    """Bytes of what the instruction reads; its text names operands with their types or without.

    Args:
        instruction: of a computation.
        shapes: types of that computation's instructions, by name.
    """
    if _ARRAY.search(instruction.operands):
        return array_bytes(instruction.operands)
    return sum(array_bytes(shapes[name]) for name in instruction.operand_names)


def _bits(dtype: str) -> int:
    """Bits of a number of the type."""
    if dtype in _BITS:
        return _BITS[dtype]
    found = _BITS_IN_NAME.match(dtype)
    if found is None:
        raise ValueError(f"type {dtype!r}: expected one whose name tells its bits, such as f32")
    return int(found[1])


def _balanced(text: str) -> tuple[str, str, str]:
    """The parenthesis that the text begins with, nothing, and the rest."""
    depth = 0
    for place, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if not depth:
            return text[: place + 1], "", text[place + 1 :]
    return text, "", ""
