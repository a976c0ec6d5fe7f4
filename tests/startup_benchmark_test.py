"""The benchmark of starts: what it reports, and a real run."""

import json
import subprocess
import sys

import pytest

from benchmarks import startup
from tests import processes


def test_first_losses_must_be_the_same_to_the_bit():
    assert startup.agree((5.5).hex(), (5.5).hex()) == ""
    assert startup.agree((5.5).hex(), (5.5000000001).hex()) == "the first loss is 5.5000000001 against 5.5"


def test_phases_are_medians_over_starts():
    notes = [
        {"phases": dict.fromkeys(startup.PHASES, seconds), "total": seconds * len(startup.PHASES)}
        for seconds in (1.0, 5.0, 2.0)
    ]
    medians = startup.median_phases(notes)
    assert medians == {**dict.fromkeys(startup.PHASES, 2.0), "total": 14.0}


def test_import_times_are_summed_by_package(monkeypatch):
    lines = [
        "import time: self [us] | cumulative | imported package",
        "import time:      1000 |       1000 |   jax._src.core",
        "import time:   2000000 |    2001000 | jax",
        "import time:    500000 |    9000000 | mmei_jax.training",
        "a warning of another library",
    ]
    done = subprocess.CompletedProcess([], 0, stderr="\n".join(lines))
    monkeypatch.setattr(startup.subprocess, "run", lambda *arguments, **options: done)
    assert startup.import_seconds() == {"jax": 2.001, "mmei_jax": 0.5}


@pytest.mark.slow
@pytest.mark.timeout(1200)  # rounds that other processes disturb are made again
def test_quick_run_ends_with_one_json_line_and_a_warm_cache_compiles_nothing():
    command = [sys.executable, "-m", "benchmarks.startup", "--quick"]
    done = subprocess.run(command, cwd=processes.ROOT, capture_output=True, text=True, timeout=1100, check=False)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["benchmark"] == "startup"
    assert [entry["peer"] for entry in summary["cases"]] == ["cold cache"]
    warm, cold = summary["cases"][0]["our_settings"], summary["cases"][0]["peer_settings"]
    assert warm["num_compiled_and_kept"] == 0
    assert warm["num_found"] == cold["num_compiled_and_kept"] > 1
