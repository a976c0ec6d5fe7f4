"""Scalars to JSON lines and to TensorBoard event files, without TensorFlow (clu's writers need it)."""

import json
import math
from collections.abc import Mapping
from pathlib import Path


class MetricWriter:
    """Writes scalars by step; the method names are those of ``clu.metric_writers``.

    ``metrics.jsonl`` holds one object a line, ``{"step": 7, "train/loss": 1.25, ...}``; ``tensorboard/`` the event
    files. A metric that is not finite, because nothing was counted, is null there (JSON knows no NaN) and absent here.
    A resumed run drops the lines after the step it resumes from, so that no step stands there twice.
    """

    def __init__(self, workdir: Path, *, resumed_step: int = 0):
        # It imports torch where that is installed, which takes seconds: only what writes events waits for it.
        import tensorboardX

        self._path = workdir / "metrics.jsonl"
        keep_lines_through(self._path, resumed_step)
        self._file = self._path.open("a", encoding="utf-8")
        self._events = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=resumed_step + 1)

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes one line, and one event per finite scalar."""
        written = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
        self._file.write(json.dumps({"step": step, **written}, allow_nan=False) + "\n")
        for name, value in written.items():
            if value is not None:
                self._events.add_scalar(name, value, step)

    def flush(self) -> None:
        """Hands what was written to the operating system."""
        self._file.flush()
        self._events.flush()

    def close(self) -> None:
        """Flushes and closes both files."""
        self._file.close()
        self._events.close()


def keep_lines_through(path: Path, step: int) -> None:
    """Cuts a file of JSON lines after the last line whose ``step`` is at most ``step``; a torn last line goes too."""
    if not path.exists():
        return
    kept_bytes = 0
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                break
            kept_bytes += len(line)
    with path.open("rb+") as file:
        file.truncate(kept_bytes)
