"""Runs a training's updates on the devices that are there, and measures them: time, waiting, compilation, trace."""

import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from mmei_jax import input_pipeline
from mmei_jax.compilations import CompilationCounter
from mmei_jax.profiling import traces
from mmei_jax.profiling.ceilings import copy_rate, matmul_rate
from mmei_jax.profiling.programs import ProgramFacts, describe_program
from mmei_jax.sharding import batch_sharding
from mmei_jax.state import initial_state
from mmei_jax.training import MAX_UPDATES_IN_FLIGHT, next_batch
from mmei_jax.training_parts import TrainingParts
from mmei_jax.types import Batch, StepReport, TrainState

# Updates that are made before any is timed.
_NUM_WARM_UP_STEPS = 2
# Of a compiled step's name, as jax.jit gives it.
_MODULE_PREFIX = "HloModule "


@dataclass(frozen=True)
class CompiledStep:
    """The update of batches of one shape.

    Attributes:
        title: the shape, in words.
        run: makes an update.
        facts: what the program costs.
        module: its name in traces.
        lowering_seconds: of tracing the model and lowering it.
        compile_seconds: of the compiler, or of reading the compilation cache.
        was_cached: whether it came from the cache.
    """

    title: str
    run: jax.stages.Compiled
    facts: ProgramFacts
    module: str
    lowering_seconds: float
    compile_seconds: float
    was_cached: bool


@dataclass(frozen=True)
class Ceilings:
    """What all devices of the mesh do at most, together, measured in this process.

    Attributes:
        flops_per_second: in matrix products of the configuration's type.
        bytes_per_second: read and written in a copy.
    """

    flops_per_second: float
    bytes_per_second: float


@dataclass
class Timing:
    """What was measured over some updates.

    Attributes:
        num_steps: updates.
        seconds: from the first to the end of the last; compilation left out.
        blocked_seconds: of these, waited in ``next(iterator)``.
        idle_seconds: of these, waited there until no update was under way: what the devices lost, at most, since a
            wait counts whole if the update before ended within it.
        num_records: trained on.
        num_tokens, num_places: by modality, those in the batches' rows, and the token places of these.
        num_steps_of: by title of the compiled step, the updates that it made.
    """

    num_steps: int = 0
    seconds: float = 0.0
    blocked_seconds: float = 0.0
    idle_seconds: float = 0.0
    num_records: int = 0
    num_tokens: Counter[str] = field(default_factory=Counter)
    num_places: Counter[str] = field(default_factory=Counter)
    num_steps_of: Counter[str] = field(default_factory=Counter)

    @property
    def main_title(self) -> str:
        """Of the compiled step that made most updates; of several the one that came first."""
        return self.num_steps_of.most_common(1)[0][0]


@dataclass(frozen=True)
class Measurement:
    """Everything that was measured.

    Attributes:
        ceilings: of the devices.
        steps: by title, the compiled updates.
        timing: of the updates that were timed.
        traced: of those that were traced, which takes time of its own; all are the main step's.
        spans: what the devices ran of it while traced.
        num_fetches: how often the host fetched something from a device while traced.
        num_programs: that were compiled in all, the state's among them.
        peak_bytes: most that was in use on a device, as the device says; None where it does not.
    """

    ceilings: Ceilings
    steps: Mapping[str, CompiledStep]
    timing: Timing
    traced: Timing
    spans: tuple[traces.Span, ...]
    num_fetches: int
    num_programs: int
    peak_bytes: int | None

    @property
    def main_step(self) -> CompiledStep:
        """The update that was made most often."""
        return self.steps[self.timing.main_title]


def measure(parts: TrainingParts, *, num_steps: int, num_traced_steps: int, trace_folder: Path) -> Measurement:
    """Makes updates from fresh parameters, on the run's own batches.

    Args:
        parts: of the run.
        num_steps: updates that are timed.
        num_traced_steps: further ones that are traced, all of the shape of batches that was most frequent.
        trace_folder: receives the trace, beside what else is there.
    """
    devices = list(parts.mesh.devices.flat)
    ceilings = Ceilings(matmul_rate(parts.config.model.compute_dtype, devices), copy_rate(devices))
    needed = (_NUM_WARM_UP_STEPS + num_steps + num_traced_steps) * parts.config.data.batch_size
    num_epochs = -(-needed // parts.split.num_records)
    iterator = input_pipeline.train_iterator(
        parts.dataset, parts.config, batch_sharding(parts.mesh), num_epochs=num_epochs
    )
    with closing(CompilationCounter()) as compilations, closing(iterator):
        loop = UpdateLoop(parts, iterator, compilations)
        loop.run(_NUM_WARM_UP_STEPS)
        timing = loop.run(num_steps)
        before = set(trace_folder.rglob("*.xplane.pb"))
        options = jax.profiler.ProfileOptions()
        # Python's own calls would be most of the trace.
        options.python_tracer_level = 0
        with jax.profiler.trace(str(trace_folder), profiler_options=options):
            traced = loop.run_main(num_traced_steps)
        (written,) = set(trace_folder.rglob("*.xplane.pb")) - before
        (main,) = traced.num_steps_of
        return Measurement(
            ceilings=ceilings,
            steps=dict(loop.steps),
            timing=timing,
            traced=traced,
            spans=tuple(traces.operation_spans(written.parent, loop.steps[main].module)),
            num_fetches=traces.num_fetches(written.parent),
            num_programs=compilations.count,
            peak_bytes=_peak_bytes(devices),
        )


class UpdateLoop:
    """Updates as training makes them: the host never waits for the one that it has just begun.

    Args:
        parts: of the run.
        iterator: its batches.
        compilations: counts what is compiled.
    """

    def __init__(self, parts: TrainingParts, iterator: Iterator[Batch], compilations: CompilationCounter):
        self._iterator, self._compilations = iterator, compilations
        self._shapes = parts.state_shapes()
        self._state: TrainState = initial_state(
            parts.model, parts.optimizer, parts.mesh, seed=parts.config.seed, statistics={}
        )
        self._jitted = parts.jit_step()
        self._count = jax.jit(_count_tokens)
        self._main: tuple[str, Batch] | None = None
        self.steps: dict[str, CompiledStep] = {}

    def run(self, num_steps: int) -> Timing:
        """Makes updates, waits for the last, and counts what the batches held."""
        timing, counts = self._run(num_steps, None)
        return self._with_counts(timing, counts)

    def run_main(self, num_steps: int) -> Timing:
        """Makes updates of the shape that was most frequent in the last :meth:`run`, whatever shapes come.

        In a trace, the programs of all shapes have one name, and so have many of their operations: what another shape
        ran would count as the main one's. Batches are read as ever; in the place of one of another shape stands the
        last one of the main shape. Records and tokens are not counted.
        """
        return self._run(num_steps, self._main)[0]

    def _run(self, num_steps: int, main: tuple[str, Batch] | None) -> tuple[Timing, list[Any]]:
        timing = Timing(num_steps=num_steps)
        in_flight: deque[StepReport] = deque()
        counts: list[Any] = []
        jax.block_until_ready(self._state)
        started = time.perf_counter()
        for _ in range(num_steps):
            batch, blocked_seconds, idle_seconds = next_batch(self._iterator, in_flight)
            timing.blocked_seconds += blocked_seconds
            timing.idle_seconds += idle_seconds
            title = describe_batch(batch)
            if main is not None and title != main[0]:
                title, batch = main
            if title not in self.steps:
                jax.block_until_ready(self._state)
                timing.seconds += time.perf_counter() - started
                self.steps[title] = self._compile(title, batch)
                started = time.perf_counter()
            with jax.transfer_guard("disallow"):
                self._state, report = self.steps[title].run(self._state, batch)
            timing.num_steps_of[title] += 1
            if timing.main_title == title:
                self._main = title, batch
            counts.append((batch.is_record, {name: one.segment_ids for name, one in batch.sequences().items()}))
            in_flight.append(report)
            if len(in_flight) > MAX_UPDATES_IN_FLIGHT:
                jax.block_until_ready(in_flight.popleft().loss)
        jax.block_until_ready(self._state)
        timing.seconds += time.perf_counter() - started
        return timing, counts

    def _compile(self, title: str, batch: Batch) -> CompiledStep:
        num_found, started = self._compilations.num_found, time.perf_counter()
        lowered = self._jitted.lower(self._shapes, batch)
        was_lowered = time.perf_counter()
        compiled = lowered.compile()
        ended = time.perf_counter()
        return CompiledStep(
            title=title,
            run=compiled,
            facts=describe_program(compiled, state=self._shapes),
            module=(compiled.as_text() or "").partition(",")[0].removeprefix(_MODULE_PREFIX),
            lowering_seconds=was_lowered - started,
            compile_seconds=ended - was_lowered,
            was_cached=self._compilations.num_found > num_found,
        )

    def _with_counts(self, timing: Timing, counts: list[Any]) -> Timing:
        """Counts what the batches held, after the clock has stopped."""
        for is_record, segment_ids in counts:
            num_records, num_tokens = jax.device_get(self._count(is_record, segment_ids))
            timing.num_records += int(num_records)
            timing.num_tokens.update({name: int(number) for name, number in num_tokens.items()})
            timing.num_places.update({name: one.size for name, one in segment_ids.items()})
        return timing


def describe_batch(batch: Batch) -> str:
    """The shape of a batch in words: records, and rows x (token places by modality)."""
    sequences = batch.sequences().values()
    rows = next(iter(sequences)).segment_ids.shape[0]
    places = " + ".join(str(one.segment_ids.shape[1]) for one in sequences)
    return f"{batch.is_record.shape[0]} places of records in {rows} x ({places})"


def _count_tokens(is_record: jax.Array, segment_ids: Mapping[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
    return jnp.sum(is_record), {name: jnp.count_nonzero(one) for name, one in segment_ids.items()}


def _peak_bytes(devices: list[Any]) -> int | None:
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in devices]
    known = [int(peak) for peak in peaks if peak is not None]
    return max(known) if known else None
