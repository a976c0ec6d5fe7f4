"""The collectives of a compiled program, read from its text: kind, bytes, devices that take part, and how often.

The text is what ``compiled.as_text()`` gives for any platform: operations on one device's part of every array. Replica
groups are read in all three of XLA's notations, asynchronous operations once for start and end, and a collective in the
body of a loop as often as the loop runs, where the compiler knows that. TPU programs may send one collective step by
step in many other operations, each of which names it again: a chain, which counts once.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from mmei_jax.program_text import operand_bytes, parse_program, visits

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)

# A step of a collective that other operations take along, and which collective that is.
_CHAIN, _CHANNEL = re.compile(r'\bchain_id="(\d+)"'), re.compile(r"\bchannel_id=(\d+)")
_DEVICES = re.compile(r"\b(?:replica_count|num_partitions)=(\d+)")


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


def read_collectives(text: str) -> list[Collective]:
    """The collectives of a compiled program; those of one device alone are left out.

    A computation that is called from several places counts at each, a chain at its first step. All branches of a
    condition count.

    Args:
        text: of ``compiled.as_text()``.

    Raises:
        ValueError: the text holds no program.
    """
    program = parse_program(text)
    num_devices = math.prod(int(count) for count in _DEVICES.findall(text.partition("\n")[0]))
    found: list[Collective] = []
    chains: set[tuple[str, ...]] = set()
    for visit in visits(program):
        shapes = {instruction.name: instruction.shape for instruction in visit.instructions}
        for instruction in visit.instructions:
            kind = instruction.opcode.removesuffix("-start")
            # Where a call wraps the operation, it stands in the computation that is called.
            if kind not in KINDS or "calls=" in instruction.rest:
                continue
            chain = _chain(instruction.rest)
            if chain in chains:
                continue
            if chain:
                chains.add(chain)
            group_size = 2 if kind == "collective-permute" else _group_size(instruction.rest, num_devices)
            if group_size == 1:
                continue
            # Of the operands: what an asynchronous operation gives differs from kind to kind.
            num_bytes = operand_bytes(instruction, shapes) * (group_size if kind == "all-gather" else 1)
            found.append(
                Collective(
                    name=instruction.name,
                    kind=kind,
                    num_bytes=num_bytes,
                    group_size=group_size,
                    op_name=instruction.op_name,
                    num_calls=visit.num_calls,
                    is_in_loop=visit.is_in_loop,
                    is_async=visit.is_async or instruction.opcode.endswith("-start") or bool(chain),
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


def _chain(rest: str) -> tuple[str, ...]:
    """Which chain of steps an operation belongs to; empty for one that is a whole collective."""
    chain, channel = _CHAIN.search(rest), _CHANNEL.search(rest)
    return (chain[1], channel[1]) if chain and channel else ()


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
