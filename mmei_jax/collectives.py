"""The collectives of a compiled program, read from its text: kind, bytes, devices that take part, and how often.

The text is what ``compiled.as_text()`` gives for any platform: operations on one device's part of every array. Replica
groups are read in all three of XLA's notations, asynchronous operations once for start and end, and a collective in the
body of a loop as often as the loop runs, where the compiler knows that.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)

# Of types whose name does not tell their size.
_BITS = {"pred": 8, "token": 0, "opaque": 0}
_BITS_IN_NAME = re.compile(r"[a-z]+(\d+)")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\]")
_DEVICES = re.compile(r"\b(?:replica_count|num_partitions)=(\d+)")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+)(?: \(.*)? \{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.+)")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_OP_NAME = re.compile(r'\bop_name="([^"]*)"')


@dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
        name: of the operation in the text.
        kind: one of :data:`KINDS`.
        num_bytes: of what takes part, on one device: of the whole arrays that an all-gather puts together, that an
            all-reduce adds up, or that a reduce-scatter reads; else of what a device sends.
        group_size: devices that exchange with one another; of a permutation, 2.
        op_name: what of the model it comes from, as JAX names it; "" where the text does not say.
        num_calls: how often it runs when the program runs once; None in a loop of unknown length.
        is_in_loop: whether it stands in the body of a loop.
        is_async: whether other work may run while it does.
    """

    name: str
    kind: str
    num_bytes: int
    group_size: int
    op_name: str
    num_calls: int | None
    is_in_loop: bool
    is_async: bool

    @property
    def sent_bytes(self) -> int:
        """What one device sends in one call, where the group is a ring: the least that is possible."""
        others = (self.group_size - 1) / self.group_size
        if self.kind == "all-reduce":
            return round(2 * others * self.num_bytes)
        if self.kind in ("all-gather", "reduce-scatter", "all-to-all"):
            return round(others * self.num_bytes)
        return self.num_bytes


@dataclass(frozen=True)
class _Instruction:
    """A line of the text.

    Attributes:
        name: its own.
        shape: what stands before the opcode.
        opcode: such as ``all-reduce-start``.
        operands: what stands in its parentheses.
        rest: what follows them.
    """

    name: str
    shape: str
    opcode: str
    operands: str
    rest: str


@dataclass(frozen=True)
class _Visit:
    """A computation, as often as it is called from one place."""

    instructions: Sequence[_Instruction]
    num_calls: int | None
    is_in_loop: bool
    is_async: bool


def read_collectives(text: str) -> list[Collective]:
    """The collectives of a compiled program; those of one device alone are left out.

    A computation that is called from several places counts at each. All branches of a condition count.

    Args:
        text: of ``compiled.as_text()``.

    Raises:
        ValueError: the text holds no program.
    """
    computations, entry = _parse(text)
    num_devices = math.prod(int(count) for count in _DEVICES.findall(text.partition("\n")[0]))
    found: list[Collective] = []
    for visit in _reached(computations, _Visit(computations[entry], 1, is_in_loop=False, is_async=False)):
        shapes = {instruction.name: instruction.shape for instruction in visit.instructions}
        for instruction in visit.instructions:
            kind = instruction.opcode.removesuffix("-start")
            # Where a call wraps the operation, it stands in the computation that is called.
            if kind not in KINDS or "calls=" in instruction.rest:
                continue
            group_size = 2 if kind == "collective-permute" else _group_size(instruction.rest, num_devices)
            if group_size == 1:
                continue
            # Of the operands: what an asynchronous operation gives differs from kind to kind.
            num_bytes = _operand_bytes(instruction, shapes) * (group_size if kind == "all-gather" else 1)
            op_name = _OP_NAME.search(instruction.rest)
            found.append(
                Collective(
                    name=instruction.name,
                    kind=kind,
                    num_bytes=num_bytes,
                    group_size=group_size,
                    op_name=op_name.group(1) if op_name else "",
                    num_calls=visit.num_calls,
                    is_in_loop=visit.is_in_loop,
                    is_async=visit.is_async or instruction.opcode.endswith("-start"),
                )
            )
    return found


def bytes_by_kind(collectives: Iterable[Collective]) -> dict[str, int]:
    """Bytes that take part when the program runs once, by kind; in a loop of unknown length each counts once."""
    totals: dict[str, int] = {}
    for collective in collectives:
        num_calls = 1 if collective.num_calls is None else collective.num_calls
        totals[collective.kind] = totals.get(collective.kind, 0) + num_calls * collective.num_bytes
    return totals


def array_bytes(shape: str) -> int:
    """Bytes of the arrays that a type of the text names, such as ``(f32[16,32]{1,0}, bf16[8])``.

    Args:
        shape: of the text; a tuple counts with all that it holds.

    Raises:
        ValueError: a type's size is not known.
    """
    total = 0
    for dtype, sizes in _ARRAY.findall(shape):
        count = math.prod(int(size.removeprefix("<=")) for size in sizes.split(",") if size)
        total += -(-count * _bits(dtype) // 8)
    return total


def _bits(dtype: str) -> int:
    """Bits of a number of the type."""
    if dtype in _BITS:
        return _BITS[dtype]
    found = _BITS_IN_NAME.match(dtype)
    if found is None:
        raise ValueError(f"type {dtype!r}: expected one whose name tells its bits, such as f32")
    return int(found[1])


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    """The instructions of each computation by its name, and the name of the one with which the program begins."""
    computations: dict[str, list[_Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if begin := _COMPUTATION.match(line):
            current = computations.setdefault(begin.group(2), [])
            entry = begin.group(2) if begin.group(1) else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            name, value = found.groups()
            shape, _, value = value.partition(" ") if value[0] != "(" else _balanced(value)
            opcode, _, value = value.strip().partition("(")
            operands, _, rest = _balanced("(" + value)
            current.append(_Instruction(name, shape, opcode, operands, rest))
    if not entry:
        raise ValueError("no ENTRY computation: expected the text of a compiled program")
    return computations, entry


def _balanced(text: str) -> tuple[str, str, str]:
    """The parenthesis that the text begins with, nothing, and the rest."""
    depth = 0
    for place, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if not depth:
            return text[: place + 1], "", text[place + 1 :]
    return text, "", ""


def _reached(computations: Mapping[str, Sequence[_Instruction]], visit: _Visit) -> Iterator[_Visit]:
    """The visit, and those of all that it calls."""
    yield visit
    for instruction in visit.instructions:
        # These name the computation of what began the operation.
        if instruction.opcode in ("async-update", "async-done"):
            continue
        called = [name for _, name in _CALLED.findall(instruction.rest)]
        for names in _BRANCHES.findall(instruction.rest):
            called += [name.strip().removeprefix("%") for name in names.split(",")]
        is_loop = instruction.opcode == "while"
        num_calls = visit.num_calls
        if is_loop and num_calls is not None:
            trips = _TRIP_COUNT.search(instruction.rest)
            num_calls = num_calls * int(trips.group(1)) if trips else None
        for name in called:
            yield from _reached(
                computations,
                _Visit(
                    computations[name],
                    num_calls,
                    is_in_loop=visit.is_in_loop or is_loop,
                    is_async=visit.is_async or instruction.opcode == "async-start",
                ),
            )


def _operand_bytes(instruction: _Instruction, shapes: Mapping[str, str]) -> int:
    """Bytes of what the instruction reads; its text names operands with their types or without."""
    if _ARRAY.search(instruction.operands):
        return array_bytes(instruction.operands)
    return sum(array_bytes(shapes[name]) for name in _NAME.findall(instruction.operands))


def _group_size(rest: str, num_devices: int) -> int:
    """Devices of a replica group, in whichever notation: lists, the shape of an iota, or axes of a mesh."""
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh.group(1))}
        # An axis may be a part of one of the mesh: 'name':(what is before it)its size.
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh.group(2))
        return math.prod(int(part) if part else sizes[name] for name, part in axes)
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=", rest):
        return int(iota.group(1))
    if group := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(group.group(1).split(","))
    return num_devices
