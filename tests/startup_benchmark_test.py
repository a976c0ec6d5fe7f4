"""The benchmark of starts: what it reports."""

import subprocess

from benchmarks import startup


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
