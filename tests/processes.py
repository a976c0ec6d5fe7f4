"""Starts the real train.py and eval.py in processes of their own."""

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def environment(cache: Path, *, num_devices: int = 1) -> dict[str, str]:
    """One folder of compiled programs for the processes of a test, and a number of fake CPU devices."""
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(num_devices),
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(ROOT),
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
