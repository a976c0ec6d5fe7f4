"""What of a program's temporaries is kept from the forward for the backward pass: its text, walked in order.

JAX names every operation by where it comes from: the forward pass of a gradient is ``jvp(...)``, its backward pass
``transpose(jvp(...))``. The text of a compiled program is in the order in which it runs, and an array takes memory from
the operation that makes it to the last that reads it. The compiler's own plan of buffers is tighter in places (results
that overwrite operands) and looser in others, so it is the *share* of the peak that is taken from here, and applied to
the bytes that the compiler says.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mmei_jax.program_text import Instruction, ProgramText, main_memory_bytes

# Give what they are given, or a part of it, in its place.
_VIEWS = {
    "add-dependency",
    "after-all",
    "bitcast",
    "get-tuple-element",
    "opt-barrier",
    "optimization-barrier",
    "tuple",
    "while",
    "dynamic-update-slice",
    "async-done",
    "async-update",
    "copy-done",
    "all-gather-done",
    "all-reduce-done",
    "collective-permute-done",
}
# Lie elsewhere: arguments and constants are no temporaries.
_OUTSIDE = ("parameter", "constant", "partition-id", "replica-id", "iota")


@dataclass(frozen=True)
class Peak:
    """The moment when most is in use.

    Attributes:
        num_bytes: all temporaries that are alive.
        kept_bytes: those that the forward pass made and the backward pass reads last.
    """

    num_bytes: int = 0
    kept_bytes: int = 0


def forward_share(program: ProgramText) -> float:
    """The share of the temporaries, at the peak, that the forward pass made for the backward pass; 0 to 1.

    Args:
        program: scheduled, as compilers give it.
    """
    peak = _peak(program, program.entry, {})
    return peak.kept_bytes / peak.num_bytes if peak.num_bytes else 0.0


def is_backward(op_name: str) -> bool:
    """Whether an operation belongs to a backward pass, what it computes again included."""
    return "transpose(" in op_name or "rematted_computation" in op_name


def is_forward(op_name: str) -> bool:
    """Whether an operation belongs to the forward pass of a gradient."""
    return "jvp(" in op_name and not is_backward(op_name)


def _peak(program: ProgramText, name: str, known: dict[str, Peak]) -> Peak:
    """The peak of one run of a computation, with those that it calls; what it is given is not counted."""
    if name in known:
        return known[name]
    instructions = program.computations[name]
    owners = _owners(instructions)
    last_read = _last_reads(instructions, owners)
    # What a computation gives back is no temporary of its own: it lies in the outputs, or where the caller says.
    given_back = set().union(*(owners[one.name] for one in instructions if one.is_root))
    sizes = {
        one.name: 0
        if one.opcode in _OUTSIDE or one.opcode in _VIEWS or one.name in given_back
        else main_memory_bytes(one.shape)
        for one in instructions
    }
    ends: dict[int, list[str]] = {}
    for name_of_one, size in sizes.items():
        if size:
            ends.setdefault(last_read[name_of_one], []).append(name_of_one)
    kept = _kept_for_backward(instructions, last_read)
    alive = alive_kept = 0
    best = Peak()
    for place, one in enumerate(instructions):
        alive += sizes[one.name]
        alive_kept += sizes[one.name] if one.name in kept else 0
        inner = Peak()
        if one.opcode in ("while", "call", "conditional"):
            parts = [_peak(program, called, known) for called in one.called]
            inner = max(parts, key=lambda part: part.num_bytes, default=Peak())
        if alive + inner.num_bytes > best.num_bytes:
            best = Peak(alive + inner.num_bytes, alive_kept + inner.kept_bytes)
        for gone in ends.get(place, ()):
            alive -= sizes[gone]
            alive_kept -= sizes[gone] if gone in kept else 0
    known[name] = best
    return best


def _kept_for_backward(instructions: Sequence[Instruction], last_read: Mapping[str, int]) -> set[str]:
    """What the forward pass makes and the backward pass reads last."""
    return {
        one.name
        for one in instructions
        if is_forward(one.op_name)
        and last_read[one.name] < len(instructions)
        and is_backward(instructions[last_read[one.name]].op_name)
    }


def _owners(instructions: Sequence[Instruction]) -> dict[str, set[str]]:
    """By instruction, those whose memory holds what it gives: its own, or that of what it is a view of."""
    owners: dict[str, set[str]] = {}
    for one in instructions:
        if one.opcode in _VIEWS:
            # An update of a slice lies where the whole did.
            held = one.operand_names[:1] if one.opcode == "dynamic-update-slice" else one.operand_names
            owners[one.name] = set().union(*(owners.get(name, set()) for name in held))
        else:
            owners[one.name] = {one.name}
    return owners


def _last_reads(instructions: Sequence[Instruction], owners: Mapping[str, set[str]]) -> dict[str, int]:
    """The place of the last instruction that reads the memory of each; what is given back is read at the end."""
    last = {one.name: place for place, one in enumerate(instructions)}
    for place, one in enumerate(instructions):
        for name in one.operand_names:
            for owner in owners.get(name, ()):
                last[owner] = max(last[owner], place)
        if one.is_root:
            for owner in owners[one.name]:
                last[owner] = len(instructions)
    return last
