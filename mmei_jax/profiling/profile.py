"""The figures of a profile, made of what was measured and of what the compiled program says; JSON-ready."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmei_jax import environment
from mmei_jax.collectives import Collective
from mmei_jax.profiling.measurement import CompiledStep, Measurement, Timing
from mmei_jax.profiling.programs import MemoryUse
from mmei_jax.profiling.roofline import TimedOperation, seconds_by_bound, time_operations
from mmei_jax.profiling.traces import busy_seconds, seconds_by_operation


@dataclass(frozen=True)
class Profile:
    """What a run costs where it was measured.

    Attributes:
        measurement: what it was made of.
        num_devices: of the mesh.
        flops_per_step: of all devices, mean over the updates that were timed.
        utilization: FLOPs per second over the measured rate of matrix products (MFU).
        memory: of the update that needs most.
        operations: of the update that was made most often, in one update on one device, the longest first.
        is_traced: whether the trace tells of any of them.
    """

    measurement: Measurement
    num_devices: int
    flops_per_step: float
    utilization: float
    memory: MemoryUse
    operations: tuple[TimedOperation, ...]
    is_traced: bool

    def to_json(self, *, command: str | None, config: Mapping[str, Any]) -> dict[str, Any]:
        """Everything, with what it was measured on.

        Args:
            command: the command line; None when Python code measured.
            config: of the run.
        """
        found, timing = self.measurement, self.measurement.timing
        facts = found.main_step.facts
        return {
            **environment.describe(command),
            "config": config,
            "num_mesh_devices": self.num_devices,
            "ceilings": {
                "matmul_flops_per_second": found.ceilings.flops_per_second,
                "copy_bytes_per_second": found.ceilings.bytes_per_second,
            },
            "compilation": {
                "num_step_programs": len(found.steps),
                "num_programs": found.num_programs,
                "steps": [_compilation(step) for step in found.steps.values()],
            },
            "throughput": {
                "num_steps": timing.num_steps,
                "steps_per_second": timing.num_steps / timing.seconds,
                "records_per_second": timing.num_records / timing.seconds,
                "seconds_per_step": timing.seconds / timing.num_steps,
                "useful_token_share": useful_share(timing),
                "useful_token_share_by_modality": {
                    name: timing.num_tokens[name] / places for name, places in timing.num_places.items()
                },
                "input_wait_seconds_per_step": timing.blocked_seconds / timing.num_steps,
                "input_wait_share": timing.idle_seconds / timing.seconds,
                "host_fetches_per_step": found.num_fetches / found.traced.num_steps,
            },
            "flops": {
                "per_step": self.flops_per_step,
                "per_step_and_device": facts.flops,
                "products_per_step_and_device": facts.product_flops,
                "per_second": self.flops_per_step * timing.num_steps / timing.seconds,
                "utilization": self.utilization,
                "source": facts.flops_source,
                "is_work_known": facts.is_work_known,
                "unknown_calls": list(facts.unknown_calls),
                "num_unknown_loops": facts.num_unknown_loops,
                "bytes_accessed_per_step_and_device": facts.bytes_accessed,
            },
            "memory_bytes_per_device": {
                **self.memory.by_kind(),
                "together": self.memory.total,
                "peak_in_use": found.peak_bytes,
            },
            "operations": [_operation(one) for one in self.operations if one.seconds],
            "seconds_by_bound": seconds_by_bound(self.operations),
            "traced": {
                "num_steps": found.traced.num_steps,
                "seconds_per_step": found.traced.seconds / found.traced.num_steps,
                "device_busy_share": busy_seconds(found.spans) / found.traced.seconds,
            },
            "collectives": [
                _collective(one, seconds) for one, seconds in timed_collectives(facts.collectives, self.operations)
            ],
        }


def make_profile(measurement: Measurement, num_devices: int) -> Profile:
    """The figures of what was measured.

    Args:
        measurement: see :func:`~mmei_jax.profiling.measurement.measure`.
        num_devices: of the mesh.
    """
    timing, ceilings = measurement.timing, measurement.ceilings
    flops = sum(
        number * num_devices * measurement.steps[title].facts.flops for title, number in timing.num_steps_of.items()
    )
    by_name = {
        name: seconds / (measurement.traced.num_steps * num_devices)
        for name, seconds in seconds_by_operation(measurement.spans).items()
    }
    operations = time_operations(
        measurement.main_step.facts.operations,
        by_name,
        flops_per_second=ceilings.flops_per_second / num_devices,
        bytes_per_second=ceilings.bytes_per_second / num_devices,
    )
    return Profile(
        measurement=measurement,
        num_devices=num_devices,
        flops_per_step=flops / timing.num_steps,
        utilization=flops / timing.seconds / ceilings.flops_per_second,
        memory=max((step.facts.memory for step in measurement.steps.values()), key=lambda memory: memory.total),
        operations=tuple(operations),
        is_traced=any(one.seconds for one in operations),
    )


def useful_share(timing: Timing) -> float:
    """Tokens over token places, of all modalities together; the rest is padding."""
    return sum(timing.num_tokens.values()) / max(1, sum(timing.num_places.values()))


def timed_collectives(
    collectives: Sequence[Collective], operations: Sequence[TimedOperation]
) -> list[tuple[Collective, float]]:
    """Collectives with their seconds in one update on one device, the longest first; start and end count together.

    Args:
        collectives: of a program.
        operations: of the same.
    """
    seconds = {one.operation.name: one.seconds for one in operations}

    def of(one: Collective) -> float:
        end = one.name.replace("-start", "-done")
        return seconds.get(one.name, 0.0) + (seconds.get(end, 0.0) if end != one.name else 0.0)

    return sorted(((one, of(one)) for one in collectives), key=lambda pair: -pair[1])


def _compilation(step: CompiledStep) -> dict[str, Any]:
    return {
        "batch": step.title,
        "lowering_seconds": step.lowering_seconds,
        "compile_seconds": step.compile_seconds,
        "was_cached": step.was_cached,
    }


def _operation(one: TimedOperation) -> dict[str, Any]:
    work = one.operation.work
    return {
        "name": one.operation.name,
        "opcode": one.operation.opcode,
        "op_name": one.operation.op_name,
        "seconds": one.seconds,
        "bound": one.bound,
        "roof_seconds": one.roof_seconds,
        "flops_per_call": work.flops if work.is_known else None,
        "bytes_per_call": one.operation.num_bytes,
        "num_calls": one.operation.num_calls,
    }


def _collective(one: Collective, seconds: float) -> dict[str, Any]:
    return {
        "name": one.name,
        "kind": one.kind,
        "op_name": one.op_name,
        "num_bytes": one.num_bytes,
        "sent_bytes": one.sent_bytes,
        "num_calls": one.num_calls,
        "group_size": one.group_size,
        "seconds": seconds,
    }
