"""Starts the real train.py and eval.py in processes of their own."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Commands run as users run them, without torch.
PYTHONPATH = os.pathsep.join([str(ROOT / "tests" / "without_torch"), str(ROOT)])


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
        "PYTHONPATH": PYTHONPATH,
        **own,
    }


def start(script: str, *arguments: str, **options) -> subprocess.Popen:
    """Starts ``python script arguments`` in the project's folder; output is collected."""
    command = [sys.executable, script, *arguments]
    options.setdefault("env", {**os.environ, "PYTHONPATH": PYTHONPATH})
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


def run(script: str, *arguments: str, **options) -> tuple[int, str]:
    """Runs to the end; exit code and output."""
    process = start(script, *arguments, **options)
    output, _ = process.communicate(timeout=600)
    return process.returncode, output


# What the commands import takes seconds: here it is imported once, and every command begins in a fork.
_FORKED = """
import json, os, runpy, sys
import mmei_jax.reports.report, mmei_jax.reports.table_report, mmei_jax.table_training, mmei_jax.training
from ml_collections import config_flags
folder, commands = sys.argv[1], json.loads(sys.argv[2])
for number, arguments in enumerate(commands):
    child = os.fork()
    if child == 0:
        for descriptor, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(f"{folder}/{number}.{name}", os.O_WRONLY | os.O_CREAT), descriptor)
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")
        sys.exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with open(f"{folder}/{number}.code", "w") as stream:
        stream.write(str(code))
"""


def run_forked(commands: list[list[str]], folder: Path, **options) -> list[tuple[int, str, str]]:
    """Runs each ``python script arguments`` in a fork of one process; exit codes, standard outputs, standard errors.

    Args:
        commands: each a script, and its arguments.
        folder: what they print is kept there.
    """
    code, output = run("-c", _FORKED, str(folder), json.dumps(commands), **options)
    assert code == 0, output
    return [
        (
            int((folder / f"{number}.code").read_text()),
            *((folder / f"{number}.{name}").read_text() for name in ("stdout", "stderr")),
        )
        for number in range(len(commands))
    ]


def wait_for_step(workdir: Path, step: int, process: subprocess.Popen) -> None:
    """Returns once ``metrics.jsonl`` has a line of ``step`` or later."""
    while process.poll() is None:
        path = workdir / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        if any(f'"step": {number},' in lines[-1] for number in range(step, step + 1000) if lines):
            return
        time.sleep(0.01)
    raise AssertionError(f"the run ended before step {step}: {process.stdout.read()}")
