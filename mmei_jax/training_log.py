"""What a run tells while it trains: reports are fetched late, checked, averaged, written and printed."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import optax

from mmei_jax.metric_writer import MetricWriter, keep_lines_through
from mmei_jax.pretraining_losses import CONTRASTIVE, MASKED_PREDICTION
from mmei_jax.types import MODALITIES, InputError, StepReport

_MAX_IDS_NAMED = 10


class NonFiniteLossError(InputError):
    """A loss or gradient became NaN or infinite."""


class TrainingLog:
    """Collects the reports of updates; :meth:`flush` brings them to the host in one go.

    Args:
        workdir: where ``metrics.jsonl``, ``tensorboard/`` and ``record_ids.jsonl`` go; None writes nothing.
        record_ids: gives the ids of records from their positions in the training split.
        is_not_finite: says of records, given likewise, which hold features that are not finite.
        num_steps, batch_size, num_records: of the run, the update and the training split.
        writes_record_ids: whether the ids of every update's records are written.
        resumed_step: completed updates when the run (re)starts.
        latest_saved_step: gives the step of the last checkpoint, None where there is none.
    """

    def __init__(
        self,
        workdir: Path | None,
        record_ids: Callable[[np.ndarray], list[str]],
        is_not_finite: Callable[[np.ndarray], np.ndarray],
        *,
        num_steps: int,
        batch_size: int,
        num_records: int,
        writes_record_ids: bool,
        resumed_step: int,
        latest_saved_step: Callable[[], int | None],
    ):
        self._writer = None if workdir is None else MetricWriter(workdir, resumed_step=resumed_step)
        self._record_ids, self._is_not_finite = record_ids, is_not_finite
        self._latest_saved_step = latest_saved_step
        self._num_steps, self._batch_size, self._num_records = num_steps, batch_size, num_records
        self._ids_file = None
        if writes_record_ids and workdir is not None:
            keep_lines_through(workdir / "record_ids.jsonl", resumed_step)
            self._ids_file = (workdir / "record_ids.jsonl").open("a", encoding="utf-8")
        self._pending: list[tuple[int, StepReport]] = []
        self._wait_seconds = 0.0
        self._num_untimed_steps = 0
        self._started = time.perf_counter()
        self._total_wait_seconds = self._total_seconds = 0.0
        self._num_steps_made = self._num_timed_steps = 0

    def add(self, step: int, report: StepReport, wait_seconds: float) -> None:
        """Keeps the report of an update that may still be under way, and how long the devices lacked its batch."""
        self._pending.append((step, report))
        self._num_steps_made += 1
        self._wait_seconds += wait_seconds

    def restart_clock(self) -> None:
        """Starts a new interval: what was done since the last (compiling, evaluating, saving) is not training."""
        self._started = time.perf_counter()
        self._wait_seconds = 0.0
        self._num_untimed_steps = len(self._pending)

    def flush(self, schedule: optax.Schedule) -> None:
        """Waits for the updates since the last call, checks them, writes and prints their means.

        Args:
            schedule: learning rate by update number.

        Raises:
            NonFiniteLossError: names step, task and records.
        """
        if not self._pending:
            return
        steps = [step for step, _ in self._pending]
        reports = jax.device_get([report for _, report in self._pending])
        self._pending.clear()
        seconds = time.perf_counter() - self._started
        for step, report in zip(steps, reports, strict=True):
            if self._ids_file is not None:
                # Packed rows have places without a record.
                index = np.asarray(report.record_index)
                ids = self._record_ids(index[index >= 0])
                self._ids_file.write(json.dumps({"step": step, "ids": ids}) + "\n")
            self._check(step, report)
        scalars = _means(reports)
        scalars["train/learning_rate"] = float(schedule(steps[-1] - 1))
        num_timed_steps = len(reports) - self._num_untimed_steps
        if num_timed_steps:
            scalars["throughput/records_per_second"] = num_timed_steps * self._batch_size / seconds
            scalars["throughput/input_wait_share"] = self._wait_seconds / seconds
            self._total_wait_seconds += self._wait_seconds
            self._total_seconds += seconds
            self._num_timed_steps += num_timed_steps
        self._write(steps[-1], scalars)
        if self._ids_file is not None:
            self._ids_file.flush()
        self._print_progress(steps[-1], scalars)
        self.restart_clock()

    def write_evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Writes and prints the metrics of an evaluation."""
        self._write(step, metrics)
        endings = ("accuracy", "/map", "/loss", "/mae", f"loss/{CONTRASTIVE}", f"loss/{MASKED_PREDICTION}")
        shown = {name: value for name, value in metrics.items() if name.endswith(endings) and math.isfinite(value)}
        print("  " + "  ".join(f"{name} {value:.4f}" for name, value in shown.items()), flush=True)

    def summary(self) -> str:
        """One line on throughput over the whole run; compilation, evaluation and saving left out."""
        if not self._num_steps_made:
            return "no update was made"
        if not self._num_timed_steps:
            return f"updates made: {self._num_steps_made}, too few to tell how fast: compilation is part of each"
        rate = self._num_timed_steps * self._batch_size / self._total_seconds
        share = self._total_wait_seconds / self._total_seconds
        return f"{rate:,.0f} records/s while training; input wait {share:.2%} of the step time"

    def close(self) -> None:
        """Closes the files."""
        if self._writer is not None:
            self._writer.close()
        if self._ids_file is not None:
            self._ids_file.close()

    def _write(self, step: int, scalars: dict[str, float]) -> None:
        if self._writer is not None:
            self._writer.write_scalars(step, scalars)
            self._writer.flush()

    def _check(self, step: int, report: StepReport) -> None:
        guilty = {f"{task} loss": ~is_finite for task, is_finite in report.is_finite.items() if not is_finite.all()}
        if not guilty and np.isfinite(report.loss) and np.isfinite(report.gradient_norm):
            return
        task, is_bad = next(iter(guilty.items()), ("gradient", np.ones_like(report.record_index, dtype=bool)))
        index = np.asarray(report.record_index)
        records = index[is_bad & (index >= 0)]
        # One such record spoils those that share its row, and every gradient.
        is_cause = self._is_not_finite(records)
        ids = self._record_ids(records[is_cause] if is_cause.any() else records)
        named = ", ".join(ids[:_MAX_IDS_NAMED]) + (f" and {len(ids) - _MAX_IDS_NAMED} more" if len(ids) > 10 else "")
        saved = self._latest_saved_step()
        kept = "no checkpoint was saved yet" if saved is None else f"the checkpoint of step {saved} is kept"
        raise NonFiniteLossError(
            f"step {step}: the {task} is not finite for records {named}; {kept}. "
            "Check these records' features, or lower config.optimizer.learning_rate"
        )

    def _print_progress(self, step: int, scalars: dict[str, float]) -> None:
        line = (
            f"step {step}/{self._num_steps}  epoch {step * self._batch_size / self._num_records:.2f}"
            f"  loss {scalars['train/loss']:.4f}"
        )
        if "throughput/records_per_second" in scalars:
            rate = scalars["throughput/records_per_second"]
            minutes, seconds = divmod(round((self._num_steps - step) * self._batch_size / rate), 60)
            wait = scalars["throughput/input_wait_share"]
            line += f"  {rate:,.0f} records/s  input wait {wait:.1%}  left {minutes}:{seconds:02d}"
        print(line, flush=True)


def _means(reports: list[StepReport]) -> dict[str, float]:
    """Means over updates; a task's mean over its records."""
    scalars = {
        "train/loss": float(np.mean([report.loss for report in reports])),
        "train/gradient_norm": float(np.mean([report.gradient_norm for report in reports])),
    }
    for task in reports[0].task_totals:
        count = sum(float(report.task_counts[task]) for report in reports)
        total = sum(float(report.task_totals[task]) for report in reports)
        scalars[f"train/loss/{task}"] = total / count if count else 0.0
    weights = np.mean([report.modality_weights for report in reports], axis=0)
    scalars |= {f"train/alpha/{name}": float(weight) for name, weight in zip(MODALITIES, weights, strict=True)}
    return scalars
