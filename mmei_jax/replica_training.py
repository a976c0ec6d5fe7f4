"""Trains replicas to their end: evaluation, best variables and early stopping of each, memory, checkpoints.

Everything is done for all replicas of a group at once. A group is as many replicas as the memory of the devices takes;
what is left follows in further groups.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mmei_jax import input_pipeline
from mmei_jax.checkpointing import ReplicaCheckpointer
from mmei_jax.config import Config
from mmei_jax.device_split import DeviceSplit, read_device_split
from mmei_jax.evaluation import Evaluator, emotion_class_weights
from mmei_jax.metrics import is_smaller_better
from mmei_jax.origin import describe_origin
from mmei_jax.out_of_memory import details_or_why_not, explained_by, is_out_of_memory
from mmei_jax.part_times import PartTimes
from mmei_jax.records import Dataset
from mmei_jax.replica_memory import memory_of_a_device, replica_memory_lines, table_shapes
from mmei_jax.replica_progress import DispatchClock, ReplicaProgress
from mmei_jax.replicas import Replicas, ReplicaState
from mmei_jax.sharding import batch_sharding, make_evaluation_mesh, mesh_over, replicated
from mmei_jax.state import Variables, build_model_for, initial_encoders, tasks_of
from mmei_jax.types import InputError, OutOfMemoryError
from mmei_jax.workdir import StopRequest, read_json, write_json

# Share of a device's memory that replicas may take: the rest is for evaluation and for what the prediction leaves out.
_USABLE_MEMORY = 0.8
# A checkpoint holds the states of all replicas, gigabytes at the paper's size: not every evaluation is worth one.
_SAVE_EVERY_SECONDS = 60.0


@dataclass(frozen=True)
class Budget:
    """How replicas are sent to the devices.

    Attributes:
        updates_per_dispatch: updates of one program.
        memory_limit_bytes: of one device; 0 takes what there is.
    """

    updates_per_dispatch: int
    memory_limit_bytes: int


@dataclass(frozen=True)
class ReplicaResult:
    """Trained replicas.

    Attributes:
        varied: by key, each replica's value.
        progress: of all groups, joined.
        variables: each replica's best, every array with a leading axis of replicas, on the host.
    """

    varied: dict[str, list[int | float]]
    progress: ReplicaProgress
    variables: Variables


def train_replicas(
    config: Config,
    varied: Mapping[str, Sequence[int | float]],
    dataset: Dataset,
    folder: Path,
    budget: Budget,
    stop: StopRequest,
    times: PartTimes,
    *,
    title: str,
    key_of: Callable[[str], str] = lambda key: key,
) -> ReplicaResult:
    """Trains replicas, or goes on where an earlier call in ``folder`` stopped.

    Args:
        config: what they share; its splits, evaluation and patience hold for each.
        varied: by key of :data:`mmei_jax.replicas.VARIED_KEYS`, one value for each replica, "seed" among them.
        dataset: that of ``config``.
        folder: receives checkpoints and ``group_<n>.json``.
        budget: memory and dispatches.
        stop: becomes true when training shall end.
        times: of the stage that this is; receives the parts data, updates, evaluation and checkpoints.
        title: begins every line of progress.
        key_of: by a key of ``config``, that by which the user sets it; for settings that would need less memory.

    Raises:
        InputError: configuration and data do not fit; or ``folder`` holds another training.
        OutOfMemoryError: one replica alone does not fit the memory, by the prediction or in fact; with what needs how
            much.
        Stopped: a signal came; everything done is saved.
    """
    with times.part("data"):
        input_pipeline.check(dataset, config)
        trainer = _Trainer(config, dataset, budget, stop, times, key_of)
    count = len(varied["seed"])
    with explained_by(trainer.memory_details, what=f"the replicas of {title!r}"):
        sizes = trainer.group_sizes(varied, folder)
        results, start = [], 0
        for index, size in enumerate(sizes):
            part = {key: list(values[start : start + size]) for key, values in varied.items()}
            label = title if len(sizes) == 1 else f"{title}, replicas {start + 1} to {start + size} of {count}"
            results.append(trainer.train(part, folder / f"group_{index}", label))
            start += size
    progress = ReplicaProgress.fresh(0)
    for _, found in results:
        for name in ("best_values", "best_steps", "best_metrics", "evaluations_since_best", "has_diverged"):
            getattr(progress, name).extend(getattr(found, name))
        progress.history.append({"evaluations": found.history, "updates_per_second": found.updates_per_second})
    variables: Variables = jax.tree.map(lambda *leaves: np.concatenate(leaves), *(found for found, _ in results))
    return ReplicaResult({key: list(values) for key, values in varied.items()}, progress, variables)


class _Trainer:
    """What all groups share: the data on the devices, the evaluator."""

    def __init__(
        self,
        config: Config,
        dataset: Dataset,
        budget: Budget,
        stop: StopRequest,
        times: PartTimes,
        key_of: Callable[[str], str],
    ) -> None:
        self._config, self._dataset, self._budget, self._stop, self._times = config, dataset, budget, stop, times
        self._key_of = key_of
        self._split = dataset.split(*config.data.train_splits)
        self._tasks = tasks_of(config, dataset)
        self._class_weights = emotion_class_weights(config.loss, dataset)
        self._host_table = read_device_split(self._split, config, input_pipeline.ranking_statistics(dataset, config))
        self._statistics = {}
        if config.data.standardize:
            self._statistics = {
                name: input_pipeline.feature_statistics(
                    self._split, name, max_tokens=getattr(config.data.max_tokens, name)[-1]
                )
                for name in config.data.modalities
            }
        self._is_smaller_better = is_smaller_better(config.train.best_metric)
        self._last: tuple[dict[str, list[int | float]], Replicas] | None = None
        self._predicted_bytes: int | None = None

    def group_sizes(self, varied: Mapping[str, Sequence[int | float]], folder: Path) -> list[int]:
        """How many replicas train together; as the folder says where training has begun.

        Raises:
            InputError: the folder belongs to another training.
            OutOfMemoryError: one replica does not fit the memory.
        """
        path, count = folder / "groups.json", len(varied["seed"])
        identity = {
            "config": self._config.to_json(),
            "varied": {key: list(values) for key, values in varied.items()},
            **describe_origin(self._config, self._dataset),
        }
        identity = json.loads(json.dumps(identity))
        if path.exists():
            saved = read_json(path)
            if saved["identity"] != identity:
                raise InputError(
                    f"{path}: begun with another configuration or data set; expected the same, or another --workdir"
                )
            self._predicted_bytes = saved["predicted_bytes"]
            return list(saved["sizes"])
        limit = self._budget.memory_limit_bytes or memory_of_a_device()
        size = count
        while True:
            replicas = self._replicas(_padded(varied, slice(0, size), _mesh_for(size).size), _mesh_for(size))
            fewest = replicas.mesh.size  # One on each device.
            told = f"{folder}: {size} replicas on {fewest} device(s)"
            try:
                self._predicted_bytes = bytes_needed = self._peak_bytes(replicas)
            except jax.errors.JaxRuntimeError as error:
                if not is_out_of_memory(error) or size <= fewest:
                    raise
                print(f"{told}: more than the compiler accepts", flush=True)
                size = max(fewest, size // 2)
                continue
            needed = f"{bytes_needed / 2**30:.2f} GiB"
            print(f"{told}: {needed} predicted for each, which has {limit / 2**30:.2f} GiB", flush=True)
            if bytes_needed <= _USABLE_MEMORY * limit:
                break
            if size <= fewest:
                raise OutOfMemoryError(
                    f"{size} replicas need {needed} on a device: expected at most "
                    f"{_USABLE_MEMORY * limit / 2**30:.2f} GiB"
                    + (", of config.table.memory_limit_gib" if self._budget.memory_limit_bytes else ""),
                    details_or_why_not(self.memory_details),
                )
            size = max(fewest, min(size - 1, int(size * _USABLE_MEMORY * limit / bytes_needed)))
        sizes = [len(part) for part in np.array_split(np.arange(count), -(-count // size))]
        # Of the largest group, which may be smaller than what was predicted for.
        self._predicted_bytes = bytes_needed * max(sizes) // size
        write_json(path, {"sizes": sizes, "identity": identity, "predicted_bytes": self._predicted_bytes})
        return sizes

    def train(
        self, varied: dict[str, list[int | float]], folder: Path, title: str
    ) -> tuple[Variables, ReplicaProgress]:
        """One group; returns its best variables on the host."""
        count, mesh = len(varied["seed"]), _mesh_for(len(varied["seed"]))
        replicas = self._replicas(_padded(varied, slice(None), mesh.size), mesh)
        evaluator = Evaluator(build_model_for(self._config, self._tasks), self._config, self._dataset, mesh)
        times = self._times
        with times.part("data"):
            table: DeviceSplit = jax.device_put(self._host_table, replicated(mesh))
        checkpointer = ReplicaCheckpointer(folder)
        try:
            state = replicas.initial_state(self._statistics, initial_encoders(self._config.model))
            best = jax.tree.map(jnp.copy, state.train.variables)
            progress, step = ReplicaProgress.fresh(count), 0
            if checkpointer.latest_step is not None:
                with times.part("checkpoints"):
                    state, best, saved = checkpointer.restore(*(_shapes(tree) for tree in (state, best)))
                progress, step = ReplicaProgress(**saved), checkpointer.latest_step
            if step < replicas.num_steps:
                print(f"{title}: from update {step} of {replicas.num_steps}", flush=True)
            clock, saved_at = DispatchClock(), time.monotonic()
            while step < replicas.num_steps and bool(jax.device_get(state.is_active)[:count].any()):
                stop_step = self._next_evaluation(step, replicas.num_steps)
                with times.part("updates"):
                    state, loss = self._advance(replicas, state, table, step, stop_step, clock)
                step = stop_step
                with times.part("evaluation"):
                    splits = self._config.data.validation_splits
                    figures = evaluator.measure_replicas(state.train.variables, splits)[:count]
                is_active = jax.device_get(state.is_active)[:count]
                is_better, goes_on = self._note(progress, step, figures, loss[:count], is_active)
                best = _keep_best(best, state.train.variables, _on_replicas(is_better, mesh))
                state = ReplicaState(train=state.train, is_active=_on_replicas(goes_on, mesh))
                progress.updates_per_second = clock.rate(count)
                # Asked once: a signal that comes later ends the training only after the next evaluation.
                is_stopped, is_last = bool(self._stop), step == replicas.num_steps or not any(goes_on)
                if is_stopped or is_last or time.monotonic() - saved_at >= _SAVE_EVERY_SECONDS:
                    with times.part("checkpoints"):
                        checkpointer.save(step, state, best, asdict(progress))
                    saved_at = time.monotonic()
                times.save()
                self._tell(title, progress, step, replicas.num_steps, clock)
                if is_stopped:
                    self._stop.check()
            variables: Variables = jax.tree.map(lambda leaf: np.asarray(leaf)[:count], jax.device_get(best))
        finally:
            with times.part("checkpoints"):
                checkpointer.close()
        return variables, progress

    def memory_details(self) -> list[str]:
        """What the replicas of the last program need of each device, and which settings would need less."""
        if self._last is None:
            raise InputError("no replicas were made yet")
        varied, last = self._last

        def build(config: Config, count: int) -> tuple[Replicas, DeviceSplit]:
            # As many replicas as before or fewer, still a multiple of the devices.
            mesh, part = last.mesh, {key: values[:count] for key, values in varied.items()}
            tasks = tasks_of(config, self._dataset)
            replicas = Replicas(config, part, tasks, self._split, mesh, self._class_weights)
            return replicas, table_shapes(self._host_table, self._split, config, mesh)

        return replica_memory_lines(
            self._config,
            len(varied["seed"]),
            self._budget.updates_per_dispatch,
            build,
            predicted_bytes=self._predicted_bytes,
            usable_share=_USABLE_MEMORY,
            key_of=self._key_of,
        )

    def _peak_bytes(self, replicas: Replicas) -> int:
        table = table_shapes(self._host_table, self._split, self._config, replicas.mesh)
        return replicas.peak_bytes(table, self._budget.updates_per_dispatch)

    def _replicas(self, varied: dict[str, list[int | float]], mesh: Mesh) -> Replicas:
        """Replicas with their programs: those of the last call, if they are the same."""
        if self._last is None or self._last[0] != varied:
            self._last = varied, Replicas(self._config, varied, self._tasks, self._split, mesh, self._class_weights)
        return self._last[1]

    def _next_evaluation(self, step: int, num_steps: int) -> int:
        """The update after which ``evaluate_every_epochs`` more passes are complete, as in ``training.py``."""
        records = self._config.train.evaluate_every_epochs * self._split.num_records
        size = self._config.data.batch_size
        passes = step * size // records + 1
        return min(num_steps, -(-passes * records // size))

    def _advance(
        self, replicas: Replicas, state: ReplicaState, table: DeviceSplit, start: int, stop: int, clock: DispatchClock
    ) -> tuple[ReplicaState, np.ndarray]:
        """The updates from ``start`` to ``stop``; returns the mean loss of each replica over them."""
        losses: list[tuple[jax.Array, int]] = []
        most = self._budget.updates_per_dispatch
        plan = replicas.plan(start, min(start + most, stop), most)
        for begin in range(start, stop, most):
            end = min(begin + most, stop)
            with clock.dispatch(tuple(leaf.shape for leaf in jax.tree.leaves(plan)), end - begin):
                state, report = replicas.update(state, table, plan, end - begin)
                losses.append((report.loss, end - begin))
                if end < stop:
                    # While the devices are at work, the host plans what comes next.
                    plan = replicas.plan(end, min(end + most, stop), most)
                jax.block_until_ready(report.loss)
        found = [jax.device_get(loss)[:, :count] for loss, count in losses]
        return state, np.concatenate(found, axis=1).mean(axis=1)

    def _note(
        self,
        progress: ReplicaProgress,
        step: int,
        figures: list[dict[str, float]],
        loss: np.ndarray,
        is_active: np.ndarray,
    ) -> tuple[list[bool], list[bool]]:
        """Enters an evaluation; returns which replicas are better than ever, and which go on."""
        name = self._config.train.best_metric.removeprefix("validation/")
        if name not in figures[0]:
            known = ", ".join(sorted(f"validation/{key}" for key in figures[0]))
            raise InputError(f"config.train.best_metric = 'validation/{name}': expected one of {known}")
        is_better, goes_on = [], []
        for index, found in enumerate(figures):
            value, best = found[name], progress.best_values[index]
            progress.has_diverged[index] |= not (math.isfinite(loss[index]) and math.isfinite(found["loss"]))
            # Numbers that overflowed in the last update show in the validation loss: classes are chosen all the same.
            counts = bool(is_active[index]) and math.isfinite(value) and math.isfinite(found["loss"])
            better = counts and (best is None or (value < best if self._is_smaller_better else value > best))
            if better:
                progress.best_values[index], progress.best_steps[index] = value, step
                progress.best_metrics[index] = {key: number for key, number in found.items() if math.isfinite(number)}
            since = 0 if better else progress.evaluations_since_best[index] + 1
            progress.evaluations_since_best[index] = since
            patience = self._config.train.patience_evaluations
            is_better.append(better)
            goes_on.append(bool(is_active[index]) and not 0 < patience <= since)
        progress.history.append(
            {
                "step": step,
                "value": [found[name] for found in figures],
                "validation_loss": [found["loss"] for found in figures],
                "loss": [float(value) if math.isfinite(value) else None for value in loss],
                "is_active": goes_on,
            }
        )
        return is_better, goes_on

    def _tell(self, title: str, progress: ReplicaProgress, step: int, num_steps: int, clock: DispatchClock) -> None:
        last = progress.history[-1]
        values = np.array(last["value"])
        rate = progress.updates_per_second
        left = f", {(num_steps - step) * len(values) / rate:.0f} s left" if rate else ""
        diverged = sum(progress.has_diverged)
        print(
            f"{title}: update {step} of {num_steps}: {self._config.train.best_metric} {values.mean():.4f} "
            f"({values.min():.4f} to {values.max():.4f}), {sum(last['is_active'])} of {len(values)} replicas go on, "
            + (f"{diverged} diverged, " if diverged else "")
            + f"{rate * self._config.data.batch_size:,.0f} records/s{left}",
            flush=True,
        )


@jax.jit
def _keep_best(best: Variables, now: Variables, is_better: jax.Array) -> Variables:
    def choose(old: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.where(is_better.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    return jax.tree.map(choose, best, now)


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree)


def _on_replicas(values: list[bool], mesh: Mesh) -> jax.Array:
    """One flag for each replica, False for those that only complete a multiple of the devices."""
    padded = np.zeros(-(-len(values) // mesh.size) * mesh.size, bool)
    padded[: len(values)] = values
    return jax.device_put(padded, batch_sharding(mesh))


def _mesh_for(count: int) -> Mesh:
    """All devices, or as many as there are replicas."""
    return mesh_over(jax.devices()[:count]) if count < jax.device_count() else make_evaluation_mesh()


def _padded(varied: Mapping[str, Sequence[int | float]], part: slice, multiple: int) -> dict[str, list[int | float]]:
    """The replicas of a part; the last one again, up to a multiple of the devices."""
    chosen = {key: list(values[part]) for key, values in varied.items()}
    missing = -len(chosen["seed"]) % multiple
    return {key: values + values[-1:] * missing for key, values in chosen.items()}
