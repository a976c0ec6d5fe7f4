"""What an update would take on TPU chips: the compiler's figures, and the arithmetic on them.

Nothing here is measured. The compiler tells its optimal time, which leaves the interconnect out; what the program sends
between chips is given a time from published rates, once as badly as it can come (:func:`collective_seconds`) and once
as well.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmei_jax.collectives import Collective
from mmei_jax.profiling.candidates import MeshShape, best_of
from mmei_jax.profiling.programs import MemoryUse, ProgramFacts
from mmei_jax.profiling.topologies import Chip, Topology, parse_topology
from mmei_jax.profiling.tpu_times import TpuTimes

# What a hop over ICI takes whatever is sent: "typically around 1us" (Austin et al., "How To Scale Your Model", 2025,
# part 3, https://jax-ml.github.io/scaling-book/sharding).
HOP_SECONDS = 1e-6
_RING_TURNS = {"all-reduce": 2, "collective-permute": 0}


@dataclass(frozen=True)
class CollectiveUse:
    """The collectives of one kind in one update, on one chip.

    Attributes:
        kind: of :data:`mmei_jax.collectives.KINDS`.
        num_calls: of all of them.
        num_bytes: that take part.
        sent_bytes: that the chip sends, where groups are rings.
        seconds: one after the other, see :func:`collective_seconds`.
    """

    kind: str
    num_calls: int
    num_bytes: int
    sent_bytes: int
    seconds: float


@dataclass(frozen=True)
class Costs:
    """One update on one chip.

    Attributes:
        memory: bytes by kind.
        model_flops: those of the products that the model asks for, without what is computed again.
        product_flops: those of the products in the compiled program.
        flops: all operations that the compiler counts.
        bytes_accessed: that operations read and write, as the compiler counts.
        times: of the program, without collectives.
        collectives: by kind.
    """

    memory: Mapping[str, int]
    model_flops: float
    product_flops: float
    flops: float
    bytes_accessed: float
    times: TpuTimes
    collectives: tuple[CollectiveUse, ...]

    @property
    def memory_bytes(self) -> int:
        """All kinds together."""
        return sum(self.memory.values())

    @property
    def sent_bytes(self) -> int:
        """What the chip sends."""
        return sum(use.sent_bytes for use in self.collectives)

    @property
    def collective_seconds(self) -> float:
        """All collectives, one after the other, each at its worst."""
        return sum((use.seconds for use in self.collectives), 0.0)

    @property
    def seconds(self) -> float:
        """The update where no collective is hidden behind other work."""
        return self.times.optimal_seconds + self.collective_seconds

    def least_seconds(self, chip: Chip) -> float:
        """The update where all collectives are hidden as far as the links let them."""
        return max(self.times.optimal_seconds, self.sent_bytes / (chip.num_links * chip.link_bytes_per_second))


@dataclass(frozen=True)
class Prediction:
    """What the compiler makes of an update on one mesh.

    Attributes:
        topology: its name.
        mesh: of its chips.
        records_per_chip: records of an update, over the chips.
        compile_seconds: on the machine that compiled.
        costs: None where it cannot be.
        refusal: why not.
    """

    topology: str
    mesh: MeshShape
    records_per_chip: int
    compile_seconds: float
    costs: Costs | None
    refusal: str = ""

    @property
    def parsed_topology(self) -> Topology:
        """What the name means."""
        return parse_topology(self.topology)

    @property
    def chip(self) -> Chip:
        """Of the topology."""
        return self.parsed_topology.chip

    def to_json(self) -> dict[str, Any]:
        """For a file; :func:`prediction_from_json` reads it."""
        return dataclasses.asdict(self)


def prediction_from_json(values: Mapping[str, Any]) -> Prediction:
    """What :meth:`Prediction.to_json` gave, or what a JSON file made of it."""
    costs = values["costs"]
    if costs is not None:
        uses = tuple(CollectiveUse(**use) for use in costs["collectives"])
        costs = Costs(**{**costs, "times": TpuTimes(**costs["times"]), "collectives": uses})
    return Prediction(**{**values, "mesh": MeshShape(**values["mesh"]), "costs": costs})


def costs_of(facts: ProgramFacts, times: TpuTimes, chip: Chip, *, model_flops: float) -> Costs:
    """The figures of a compiled update.

    Args:
        facts: of one chip's program.
        times: of the same program.
        chip: that it is compiled for.
        model_flops: of the whole update, over all chips.
    """
    return Costs(
        memory=_memory_of(facts.memory),
        model_flops=model_flops / facts.num_devices,
        product_flops=facts.product_flops,
        flops=facts.flops,
        bytes_accessed=facts.bytes_accessed,
        times=times,
        collectives=collective_uses(facts.collectives, chip),
    )


def _memory_of(memory: MemoryUse) -> dict[str, int]:
    """By kind; of temporaries the sum, because texts of programs for TPUs do not tell what the forward pass keeps."""
    split = ("activations", "workspace")
    kinds = {kind: size for kind, size in memory.by_kind().items() if kind not in split}
    return {**kinds, "temporaries": memory.temporaries}


def collective_uses(collectives: Iterable[Collective], chip: Chip) -> tuple[CollectiveUse, ...]:
    """Collectives added up by kind; in a loop of unknown length each counts once."""
    found: dict[str, CollectiveUse] = {}
    for one in collectives:
        before = found.get(one.kind, CollectiveUse(one.kind, 0, 0, 0, 0.0))
        calls = 1 if one.num_calls is None else one.num_calls
        found[one.kind] = CollectiveUse(
            one.kind,
            before.num_calls + calls,
            before.num_bytes + calls * one.num_bytes,
            before.sent_bytes + calls * one.sent_bytes,
            before.seconds + calls * collective_seconds(one, chip),
        )
    return tuple(found[kind] for kind in sorted(found))


def collective_seconds(collective: Collective, chip: Chip) -> float:
    """One call at its worst: a ring in one direction, over one link of each chip, with a hop's delay at each step.

    Rings of both directions and of several axes at once, which the compiler uses where it can, are up to as many times
    faster as a chip has links. A line of chips whose ends are not joined holds such a ring too, there and back.
    """
    steps = _RING_TURNS.get(collective.kind, 1) * (collective.group_size - 1) or 1
    return collective.sent_bytes / chip.link_bytes_per_second + steps * HOP_SECONDS


def utilisation(costs: Costs, chip: Chip, seconds: float) -> float:
    """MFU: the model's FLOPs over what the chip could do in so many seconds at its published peak in bfloat16."""
    return costs.model_flops / (seconds * chip.flops_per_second)


def best_predictions(predictions: Iterable[Prediction]) -> dict[tuple[str, int], Prediction]:
    """By topology and records per chip the mesh of the fastest update, nothing hidden; none where none fits."""
    groups: dict[tuple[str, int], dict[MeshShape, Prediction]] = {}
    for one in predictions:
        groups.setdefault((one.topology, one.records_per_chip), {})[one.mesh] = one
    best = {}
    for key, own in groups.items():
        mesh = best_of((mesh, one.costs.seconds) for mesh, one in own.items() if one.costs is not None)
        if mesh is not None:
            best[key] = own[mesh]
    return best


@dataclass(frozen=True)
class Scaling:
    """One line of weak scaling: the same records per chip on more and more chips of a generation.

    Attributes:
        prediction: the best mesh of this many chips.
        seconds: of an update, nothing hidden.
        least_seconds: everything hidden that can be.
        efficiency: seconds on the fewest chips that are compared over these.
        least_efficiency: the fewest chips' seconds with everything hidden over these with nothing hidden.
    """

    prediction: Prediction
    seconds: float
    least_seconds: float
    efficiency: float
    least_efficiency: float


def weak_scaling(predictions: Sequence[Prediction], *, base_chips: int = 1) -> list[Scaling]:
    """Efficiency of the best mesh of each number of chips, fewest first: by how much less each chip gets done.

    Args:
        predictions: of topologies of one generation, with as many records per chip.
        base_chips: what others are compared with: so many chips, or the fewest above.

    Raises:
        ValueError: generations or records per chip differ.
    """
    if len({(one.chip.name, one.records_per_chip) for one in predictions}) > 1:
        raise ValueError("predictions of several generations or of different records per chip")
    best = sorted(best_predictions(predictions).values(), key=lambda one: one.mesh.num_devices)
    base = next((one for one in best if one.mesh.num_devices >= base_chips), None)
    if base is None or base.costs is None:
        return []
    lines = []
    for one in best:
        assert one.costs is not None
        least = one.costs.least_seconds(one.chip)
        lines.append(
            Scaling(
                one,
                one.costs.seconds,
                least,
                base.costs.seconds / one.costs.seconds,
                base.costs.least_seconds(one.chip) / one.costs.seconds,
            )
        )
    return lines
