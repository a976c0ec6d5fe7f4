"""Checkpoints: model, optimizer, reader position, progress and configuration, saved and restored together by Orbax.

Each step holds five items: ``model`` (parameters and statistics: all that inference needs), ``optimizer``, ``data``
(position of the Grain iterator), ``progress`` and ``config``. The last three are JSON: Grain's own handler names its
file by process, and would not restore on another number of processes. The latest and the best step are kept. Saves are
asynchronous and become visible by rename; :meth:`Checkpointer.close` waits for the last one.
"""

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from mmei_jax.metrics import is_smaller_better
from mmei_jax.types import InputError, TrainState

# Metadata, JSON and directories of one checkpoint.
_BYTES_BESIDE_ARRAYS = 1 << 20


class _WithoutExpectedWarnings(logging.Filter):
    """Drops Orbax's warning about a save without metrics: between evaluations there are none to give."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "tracked_metric" not in record.getMessage()


logging.getLogger("absl").addFilter(_WithoutExpectedWarnings())


class Checkpointer:
    """The checkpoints of one working directory.

    Args:
        workdir: holds the folder ``checkpoints``.
        best_metric: name of the metric that picks the best step, by its smallest or largest value
            (:func:`~mmei_jax.metrics.is_smaller_better`).
    """

    def __init__(self, workdir: Path, *, best_metric: str):
        self._folder = (workdir / "checkpoints").absolute()
        self._best_metric = best_metric
        # Orbax keeps the largest.
        self._sign = -1.0 if is_smaller_better(best_metric) else 1.0
        policy = checkpoint_managers.AnyPreservationPolicy(
            [
                checkpoint_managers.LatestN(1),
                checkpoint_managers.BestN(get_metric_fn=self._rank, n=1, keep_checkpoints_without_metrics=False),
            ]
        )
        options = ocp.CheckpointManagerOptions(preservation_policy=policy, best_fn=self._rank, create=True)
        self._last_saved_step: int | None = None
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def _rank(self, metrics: dict[str, float]) -> float:
        return self._sign * metrics[self._best_metric]

    @property
    def latest_step(self) -> int | None:
        """The last saved step; None before the first save."""
        return self._manager.latest_step()

    @property
    def best_step(self) -> int | None:
        """The saved step with the best metric; None before the first evaluation."""
        return self._manager.best_step()

    def save(
        self,
        step: int,
        state: TrainState,
        iterator: Any,
        *,
        progress: dict[str, Any],
        config: dict[str, Any],
        metrics: dict[str, float] | None,
    ) -> None:
        """Starts saving a step; what is saved is copied before this returns, so that the caller may donate it.

        Args:
            step: completed updates.
            state: on devices.
            iterator: Grain iterator, at the position after the step's batch.
            progress: JSON values.
            config: JSON values.
            metrics: of an evaluation at this step; None where there was none, and the step can't be the best.

        Raises:
            InputError: this save or the one before it could not be written (a full disk, say).
        """
        self._check_free_space(step, state)
        items = ocp.args.Composite(
            model=ocp.args.StandardSave(state.variables),
            optimizer=ocp.args.StandardSave({"step": state.step, "state": state.optimizer_state}),
            data=ocp.args.JsonSave(iterator.get_state()),
            progress=ocp.args.JsonSave(progress),
            config=ocp.args.JsonSave(config),
        )
        with self._told_in_one_line(self._last_saved_step, "written"):
            # A failure of the save before this one is raised here.
            self._manager.wait_until_finished()
        self._last_saved_step = step
        with self._told_in_one_line(step, "written"):
            self._manager.save(step, args=items, metrics=metrics, force=True)

    def restore(self, shapes: TrainState, iterator: Any) -> tuple[TrainState, dict[str, Any]]:
        """The latest step.

        Args:
            shapes: the state's shapes, with shardings of the *current* mesh.
            iterator: moved to its saved position.

        Returns:
            State and progress.
        """
        items = ocp.args.Composite(
            model=ocp.args.StandardRestore(shapes.variables),
            optimizer=ocp.args.StandardRestore({"step": shapes.step, "state": shapes.optimizer_state}),
            data=ocp.args.JsonRestore(),
            progress=ocp.args.JsonRestore(),
        )
        step = self.latest_step
        with self._told_in_one_line(step, "read"):
            restored = self._manager.restore(step, args=items)
        iterator.set_state(restored["data"])
        state = TrainState(
            step=restored["optimizer"]["step"],
            parameters=restored["model"]["params"],
            statistics=restored["model"]["statistics"],
            optimizer_state=restored["optimizer"]["state"],
        )
        return state, restored["progress"]

    def restore_model(self, step: int, model: Any) -> Any:
        """The variables of one step, placed as the tree of shapes says; nothing else is read."""
        items = ocp.args.Composite(model=ocp.args.StandardRestore(model))
        with self._told_in_one_line(step, "read"):
            restored = self._manager.restore(step, args=items)
        return restored["model"]

    def read_config(self, step: int) -> dict[str, Any]:
        """The configuration saved with a step."""
        items = ocp.args.Composite(config=ocp.args.JsonRestore())
        with self._told_in_one_line(step, "read"):
            restored = self._manager.restore(step, args=items)
        return dict(restored["config"])

    def wait(self) -> None:
        """Returns when the last save is complete.

        Raises:
            InputError: it could not be written.
        """
        with self._told_in_one_line(self._last_saved_step, "written"):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the last save, then lets go.

        Raises:
            InputError: it could not be written.
        """
        with self._told_in_one_line(self._last_saved_step, "written"):
            self._manager.close()

    def _check_free_space(self, step: int, state: TrainState) -> None:
        """Refuses before Orbax begins: its threads would tell of a full disk in a hundred lines."""
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + _BYTES_BESIDE_ARRAYS
        free = shutil.disk_usage(self._folder).free
        if free < needed:
            raise InputError(
                f"{self._folder}: disk full: the checkpoint of step {step} needs {needed:,} bytes, {free:,} are free"
            )
        # Free space says nothing of quotas and limits: a small reservation meets those that are used up.
        with self._told_in_one_line(step, "written"), tempfile.TemporaryFile(dir=self._folder) as file:
            os.posix_fallocate(file.fileno(), 0, _BYTES_BESIDE_ARRAYS)

    def _told_in_one_line(self, step: int | None, action: str) -> AbstractContextManager[None]:
        return _told_in_one_line(self._folder, step, action)


class ReplicaCheckpointer:
    """The latest checkpoint of replicas that train together: their states, the best variables of each, and progress.

    Args:
        folder: holds the folder ``checkpoints``.
    """

    def __init__(self, folder: Path):
        self._folder = (folder / "checkpoints").absolute()
        self._manager = ocp.CheckpointManager(
            self._folder, options=ocp.CheckpointManagerOptions(max_to_keep=1, create=True)
        )

    @property
    def latest_step(self) -> int | None:
        """The last saved step; None before the first save."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, best: Any, progress: dict[str, Any]) -> None:
        """Starts saving; the arrays may be donated as soon as this returns.

        Args:
            step: completed updates.
            state: tree of arrays on devices.
            best: tree of arrays on devices, what :meth:`restore_best` gives.
            progress: JSON values.

        Raises:
            InputError: this save or the one before it could not be written.
        """
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            best=ocp.args.StandardSave(best),
            progress=ocp.args.JsonSave(progress),
        )
        with _told_in_one_line(self._folder, step, "written"):
            self._manager.wait_until_finished()
            self._manager.save(step, args=items, force=True)

    def restore(self, state: Any, best: Any) -> tuple[Any, Any, dict[str, Any]]:
        """State, best variables and progress of the latest step, placed as the two trees of shapes say."""
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(state),
            best=ocp.args.StandardRestore(best),
            progress=ocp.args.JsonRestore(),
        )
        with _told_in_one_line(self._folder, self.latest_step, "read"):
            restored = self._manager.restore(self.latest_step, args=items)
        return restored["state"], restored["best"], restored["progress"]

    def restore_best(self, best: Any) -> Any:
        """The best variables alone."""
        items = ocp.args.Composite(best=ocp.args.StandardRestore(best))
        with _told_in_one_line(self._folder, self.latest_step, "read"):
            restored = self._manager.restore(self.latest_step, args=items)
        return restored["best"]

    def close(self) -> None:
        """Waits for the last save, then lets go."""
        with _told_in_one_line(self._folder, self.latest_step, "written"):
            self._manager.close()


@contextmanager
def _told_in_one_line(folder: Path, step: int | None, action: str) -> Iterator[None]:
    """Orbax raises what its threads met at any later call, as whichever of these the file system's layer chose."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{folder}: the checkpoint of step {step} could not be {action}: {reason}") from error
