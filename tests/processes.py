"""Starts the real train.py and eval.py in processes of their own."""

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def environment(cache: Path | None = None, *, num_devices: int = 1) -> dict[str, str]:
    """What a test's processes see.

    Args:
        cache: folder of compiled programs, for tests that kill a process, which may leave half a file in it; by default
            the session's.
        num_devices: fake CPU devices.
    """
    own = {} if cache is None else {"JAX_COMPILATION_CACHE_DIR": str(cache)}
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(num_devices),
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(ROOT),
        **own,
    }


def start(script: str, *arguments: str, **options) -> subprocess.Popen:
    """Starts ``python script arguments`` in the project's folder; output is collected."""
    command = [sys.executable, script, *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


def run(script: str, *arguments: str, **options) -> tuple[int, str]:
    """Runs to the end; exit code and output."""
    process = start(script, *arguments, **options)
    output, _ = process.communicate(timeout=600)
    return process.returncode, output


def wait_for_step(workdir: Path, step: int, process: subprocess.Popen) -> None:
    """Returns once ``metrics.jsonl`` has a line of ``step`` or later."""
    while process.poll() is None:
        path = workdir / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        if any(f'"step": {number},' in lines[-1] for number in range(step, step + 1000) if lines):
            return
        time.sleep(0.01)
    raise AssertionError(f"the run ended before step {step}: {process.stdout.read()}")
