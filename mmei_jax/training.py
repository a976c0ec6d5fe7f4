"""Training: a loop that never waits for its step, and saves that resume to the bit.

Order after an update: log -> evaluate -> save. A save carries the metrics of its step, by which the best one is kept,
so evaluation comes before it. The last save follows the last update.
"""

import functools
import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from clu import parameter_overview

from mmei_jax import environment, input_pipeline, processes
from mmei_jax.checkpointing import Checkpointer
from mmei_jax.compilations import CompilationCounter
from mmei_jax.config import Config
from mmei_jax.evaluation import Evaluator
from mmei_jax.metrics import is_smaller_better
from mmei_jax.origin import check_origin, describe_origin
from mmei_jax.out_of_memory import explained
from mmei_jax.sharding import batch_sharding
from mmei_jax.state import initial_encoders, initial_state
from mmei_jax.training_log import TrainingLog
from mmei_jax.training_parts import prepare
from mmei_jax.types import Batch, InputError, StepReport, TrainState
from mmei_jax.warm_start import with_initial_parameters
from mmei_jax.workdir import StopRequest, locked, stop_on_signals, write_json, write_text

# Updates that may be under way on the devices before the host waits: enough to hide the host's own work, few enough to
# bound the memory that waiting batches hold.
MAX_UPDATES_IN_FLIGHT = 2

# Keys that may differ between the run that saved and the run that resumes: none of them changes what is computed. What
# paths lead to is told by its hash.
RESUMABLE_KEYS = (
    "data.path",
    "data.affect_profiles",
    "model.content_encoder",
    "model.encoders.vision",
    "model.encoders.audio",
    "model.encoders.text",
    "model.encoders.remat",
    "data.num_reader_threads",
    "data.num_prefetch_batches",
    "train.log_every_steps",
    "train.save_every_steps",
    "train.write_record_ids",
    "mesh.data",
    "mesh.fsdp",
    "mesh.tensor",
    "mesh.replicated",
)


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        step: completed updates.
        best_step: the step whose checkpoint has the best metric; None before the first evaluation.
        stopped_by: name of the signal that ended it early, or "".
    """

    step: int
    best_step: int | None
    stopped_by: str


@dataclass
class Progress:
    """What decides over early stopping; saved with every checkpoint."""

    best_value: float | None = None
    evaluations_since_best: int = 0
    has_stopped_early: bool = False

    def note(self, value: float, *, is_smaller_better: bool) -> None:
        """Counts an evaluation whose metric is ``value``."""
        best = self.best_value
        is_better = best is None or (value < best if is_smaller_better else value > best)
        self.evaluations_since_best = 0 if is_better else self.evaluations_since_best + 1
        self.best_value = value if is_better else self.best_value


def train(config: Config, workdir: Path, *, command: str | None = None) -> TrainResult:
    """Trains until the end, an early stop, or a signal; goes on from the last checkpoint where there is one.

    Args:
        config: the run.
        workdir: receives ``config.json``, ``environment.json``, ``parameters.txt``, ``metrics.jsonl``, ``tensorboard/``
            and ``checkpoints/``.
        command: the command line that started the run, for ``environment.json``; None when Python code did.

    Raises:
        InputError: configuration, data, devices or an earlier run in ``workdir`` do not fit; or a loss is not finite.
        OutOfMemoryError: a device's memory is too small, at compile or run time; with what needs how much.
    """
    # Of several processes the first one holds the folder, and JAX's runtime hears the signals of all of them.
    is_alone = jax.process_count() == 1
    lock = locked(workdir) if processes.is_first() else nullcontext()
    signals = stop_on_signals() if is_alone else nullcontext(StopRequest())
    with lock, signals as stop, explained(config), closing(_Run(config, workdir, command)) as run:
        return run.loop(stop)


def next_batch(iterator: Iterator[Batch], in_flight: Sequence[StepReport]) -> tuple[Batch, float, float]:
    """A batch, the seconds that it took to come, and those of them that the devices had nothing to do, at most.

    A wait counts whole if the last update had ended by its end; while one is under way the devices do not wait.

    Args:
        iterator: of the run's batches.
        in_flight: reports of the updates before, the last one last.
    """
    started = time.perf_counter()
    batch = next(iterator)
    seconds = time.perf_counter() - started
    # (jax's stub of Array lacks is_ready.)
    is_busy = bool(in_flight) and not in_flight[-1].loss.is_ready()  # type: ignore[attr-defined]
    return batch, seconds, 0.0 if is_busy else seconds


class _Run:
    """One process's part of a run: everything that the loop needs, built once."""

    def __init__(self, config: Config, workdir: Path, command: str | None):
        self.config, self.workdir, self.command = config, workdir, command
        self.parts = parts = prepare(config)
        self.dataset, self.split, self.mesh = parts.dataset, parts.split, parts.mesh
        self.model, self.optimizer = parts.model, parts.optimizer
        self.num_steps, self.schedule = parts.num_steps, parts.schedule
        self.evaluator = Evaluator(self.model, config, self.dataset, self.mesh)
        self.checkpointer = Checkpointer(workdir, best_metric=config.train.best_metric)

    def loop(self, stop: StopRequest) -> TrainResult:
        """All updates that are left."""
        state, iterator, progress = self._start()
        self._check_best_metric(state)
        step = int(state.step)
        train_step = self.parts.jit_step()
        in_flight: deque[StepReport] = deque()
        with closing(iterator), closing(self._open_log(step)) as log, closing(CompilationCounter()) as compilations:
            while step < self.num_steps and not progress.has_stopped_early and not stop:
                started = time.perf_counter()
                batch, _, idle_seconds = next_batch(iterator, in_flight)
                num_compiled = compilations.count
                with jax.transfer_guard("disallow"):
                    state, report = train_step(state, batch)
                step += 1
                log.add(step, report, idle_seconds)
                if not in_flight or compilations.count > num_compiled:
                    # The first update, and the first of every shape of batches: compiling is not part of any rate, nor
                    # of the time left. No other update is waited for.
                    jax.block_until_ready(report)
                    title = f"step {step}, batches of another shape" if in_flight else "first update"
                    print(f"{title}, compilation included: {time.perf_counter() - started:.1f} s", flush=True)
                    log.restart_clock()
                if processes.agree_to_stop(step):
                    stop.signal_name = "SIGTERM"
                in_flight.append(report)
                if len(in_flight) > MAX_UPDATES_IN_FLIGHT:
                    jax.block_until_ready(in_flight.popleft().loss)
                evaluates = self._evaluates_after(step)
                saves = evaluates or step % self.config.train.save_every_steps == 0
                if saves or step % self.config.train.log_every_steps == 0:
                    log.flush(self.schedule)
                metrics = self._evaluate(state, step, log, progress) if evaluates else None
                if saves:
                    self._save(step, state, iterator, progress, metrics)
                    log.restart_clock()
            if stop and step > (self.checkpointer.latest_step or 0):
                log.flush(self.schedule)
                self._save(step, state, iterator, progress, None)
            self.checkpointer.wait()
            print(log.summary(), flush=True)
        return TrainResult(step=step, best_step=self.checkpointer.best_step, stopped_by=stop.signal_name)

    def close(self) -> None:
        """Lets go of the checkpoints, after the last save."""
        self.checkpointer.close()

    def _start(self) -> tuple[TrainState, Any, Progress]:
        """State, reader and progress: of the last checkpoint, or fresh."""
        config = self.config
        iterator = input_pipeline.train_iterator(
            self.dataset, config, batch_sharding(self.mesh), statistics=self.evaluator.ranking_statistics
        )
        if self.checkpointer.latest_step is not None:
            self._check_resumable(self.checkpointer.read_config(self.checkpointer.latest_step))
            shapes = self.parts.state_shapes()
            state, progress = self.checkpointer.restore(shapes, iterator)
            self._write_conditions()
            print(f"going on from the checkpoint of step {int(state.step)}", flush=True)
            return state, iterator, Progress(**progress)
        statistics = {}
        if config.data.standardize:
            # What encoders inside the model give has a scale of its own.
            names = [name for name in config.data.modalities if name not in config.model.encoders.folders()]
            statistics = {name: self._feature_statistics(name) for name in names}
        encoders = initial_encoders(config.model)
        state = initial_state(
            self.model, self.optimizer, self.mesh, seed=config.seed, statistics=statistics, encoders=encoders
        )
        state, num_taken = with_initial_parameters(state, config.train)
        if num_taken:
            print(f"{num_taken} parameter arrays are those of {config.train.initial_workdir}", flush=True)
        self._write_conditions()
        self._write_description(state)
        return state, iterator, Progress()

    def _feature_statistics(self, modality: str) -> tuple[np.ndarray, np.ndarray]:
        max_tokens = getattr(self.config.data.max_tokens, modality)[-1]
        return input_pipeline.feature_statistics(self.split, modality, max_tokens=max_tokens)

    def _open_log(self, step: int) -> TrainingLog:
        return TrainingLog(
            self.workdir if processes.is_first() else None,
            self.split.ids,
            functools.partial(input_pipeline.is_not_finite, self.split, self.config),
            num_steps=self.num_steps,
            batch_size=self.config.data.batch_size,
            num_records=self.split.num_records,
            writes_record_ids=self.config.train.write_record_ids,
            resumed_step=step,
            latest_saved_step=lambda: self.checkpointer.latest_step,
        )

    def _evaluates_after(self, step: int) -> bool:
        """Whether the update ends the run or completes another ``evaluate_every_epochs`` passes over the records."""
        records = self.config.train.evaluate_every_epochs * self.split.num_records
        size = self.config.data.batch_size
        return step == self.num_steps or step * size // records > (step - 1) * size // records

    def _evaluate(self, state: TrainState, step: int, log: TrainingLog, progress: Progress) -> dict[str, float]:
        """Measures on the validation splits; keeps account of the best value and of patience."""
        train = self.config.train
        figures = self.evaluator.measure(state.variables, self.config.data.validation_splits)
        metrics = {f"validation/{name}": value for name, value in figures.items()}
        log.write_evaluation(step, metrics)
        value = metrics[train.best_metric]
        if not math.isfinite(value):
            raise InputError(
                f"step {step}: {train.best_metric} = {value}: no checkpoint can be chosen by it; does split "
                f"{'+'.join(self.config.data.validation_splits)} carry its labels?"
            )
        progress.note(value, is_smaller_better=is_smaller_better(train.best_metric))
        progress.has_stopped_early = 0 < train.patience_evaluations <= progress.evaluations_since_best
        return metrics

    def _check_best_metric(self, state: TrainState) -> None:
        """Refuses a metric that no evaluation will give, before anything is trained."""
        names = self.evaluator.metric_names(state.variables, self.config.data.validation_splits)
        known = sorted(f"validation/{name}" for name in names)
        chosen = self.config.train.best_metric
        if chosen not in known:
            raise InputError(f"config.train.best_metric = {chosen!r}: expected one of {', '.join(known)}")

    def _save(
        self, step: int, state: TrainState, iterator: Any, progress: Progress, metrics: dict[str, float] | None
    ) -> None:
        self.checkpointer.save(
            step, state, iterator, progress=asdict(progress), config=self._saved_config(), metrics=metrics
        )

    def _saved_config(self) -> dict[str, Any]:
        return {"config": self.config.to_json(), **describe_origin(self.config, self.dataset)}

    def _check_resumable(self, saved: dict[str, Any]) -> None:
        """Refuses to go on with another data set, or with a key that would change what is computed."""
        check_origin(saved, self.config, self.dataset, f"the run in {self.workdir}")
        before, now = _flatten(saved["config"]), _flatten(self.config.to_json())
        for key, value in now.items():
            if key not in RESUMABLE_KEYS and before.get(key) != value:
                raise InputError(
                    f"config.{key} = {value!r}: expected {before.get(key)!r}, with which {self.workdir} was begun"
                )

    def _write_conditions(self) -> None:
        if not processes.is_first():
            return
        write_json(self.workdir / "config.json", self.config.to_json())
        write_json(self.workdir / "environment.json", environment.describe(self.command))

    def _write_description(self, state: TrainState) -> None:
        if not processes.is_first():
            return
        table = parameter_overview.get_parameter_overview(state.parameters)
        write_text(self.workdir / "parameters.txt", table + "\n")
        num_parameters = sum(leaf.size for leaf in jax.tree.leaves(state.parameters))
        print(
            f"{num_parameters:,} parameters (table: {self.workdir / 'parameters.txt'}); "
            f"{self.split.num_records:,} training records; {self.num_steps:,} updates of {self.config.data.batch_size} "
            f"on {self.mesh.size} device(s)"
            + (f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""),
            flush=True,
        )
        for line in input_pipeline.truncation_lines(self.split, self.config):
            print(line, flush=True)
        print(input_pipeline.token_use_line(self.split, self.config), flush=True)


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
