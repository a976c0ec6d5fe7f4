"""Every benchmark's ``--quick``, once, as a command: exit code, progress, the time it took, one JSON line last.

Those marked ``benchmark`` (``make test-benchmarks``) are left out of the slow tier: their sides have quick tests of
their own, and the rest of them is what a command here runs too.
"""

import importlib.util
import json
import re
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import mosi, ravdess, run, text_study
from mmei_jax.extraction.published_facts import read_published
from tests import made_up_lists, processes, random_encoders

SEPARATE = ("end_to_end", "matrix_products", "pmap", "replicas")
# The one of the others leaves out what has no peer here.
ROUNDS = tuple(
    pytest.param(name, marks=pytest.mark.benchmark if name in SEPARATE else pytest.mark.slow)
    for name in run.BENCHMARKS
    if name != "retrieval"
)


def _run(name, *arguments):
    """The command's summary and its progress. What it took is not asserted: it depends on who else is at work."""
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", "--quick", *arguments],
        cwd=processes.ROOT,
        capture_output=True,
        text=True,
        timeout=1100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    assert re.fullmatch(r"total: \d+ s", lines[-1])
    summary = json.loads(last)
    assert summary["benchmark"] == name
    for case in summary["cases"]:
        assert {"case", "peer", "ratio", "goal"} <= case.keys()
        assert (case["ratio"] is None) == case.get("has_only_disturbed_rounds", False)
    assert summary["cases"]
    return summary, done.stderr


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", ROUNDS)
def test_quick_run_measured_in_rounds(name):
    summary, progress = _run(name)
    num_rounds = summary["cases"][0]["num_rounds"]
    for index in range(num_rounds):
        tries = [line for line in progress.splitlines() if line.startswith(f"round {index + 1} of {num_rounds}: ")]
        # No round is made again. Several peers of one case are measured in the same rounds.
        assert 1 <= len(tries) <= len(summary["cases"])
    if name == "startup":
        warm, cold = summary["cases"][0]["our_settings"], summary["cases"][0]["peer_settings"]
        assert warm["num_compiled_and_kept"] == 0
        assert warm["num_found"] == cold["num_compiled_and_kept"] > 1


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_quick_retrieval_leaves_out_what_has_no_peer_here():
    summary, progress = _run("retrieval")
    names = list(dict.fromkeys(case["case"].partition(",")[0] for case in summary["cases"]))
    peers = {"search": "faiss", "simulator": "obp"}
    assert names == [
        name for name in ("search", "memory", "simulator") if name not in peers or importlib.util.find_spec(peers[name])
    ]
    assert progress.count("round 1 of 2: ") >= len(names) - 1


@pytest.mark.benchmark
@pytest.mark.timeout(1200)
def test_quick_learning_curve(tmp_path):
    _, progress = _run("learning_curve", f"--workdir={tmp_path}")
    assert "1000 records, seed 0" in progress


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_quick_pretraining_study(tmp_path):
    summary, progress = _run("pretraining_study", f"--workdir={tmp_path}")
    assert "seed 0 done" in progress
    names = [case["case"] for case in summary["cases"]]
    assert "linear probe, emotion accuracy, simulated" in names
    assert "10 % of labels, intent macro_f1, simulated" in names


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "study",
    [
        pytest.param(mosi.STUDY, id="mosi", marks=pytest.mark.slow),
        pytest.param(ravdess.STUDY, id="ravdess", marks=pytest.mark.benchmark),
    ],
)
def test_quick_fold_study_of_made_up_features(study, tmp_path):
    flags = dict(flag.removeprefix("--").split("=", 1) for flag in study.import_flags)
    num_classes, num_records = len(flags["class_names"].split(",")), 240
    generator = np.random.default_rng(0)
    label = np.arange(num_records) % num_classes
    arrays = {name: generator.normal(size=(num_records, 8)).astype(np.float32) for name in ("vision", "audio", "text")}
    arrays |= {
        flags["id_key"]: np.array([f"clip{index}" for index in range(num_records)]),
        flags["group_key"]: np.array([f"group{index // 12}" for index in range(num_records)]),
        flags["labels"]: generator.permutation(label).astype(np.int32),
    }
    np.savez(tmp_path / "it.npz", **arrays)
    summary, progress = _run(study.name, f"--input={tmp_path / 'it.npz'}", f"--workdir={tmp_path / 'runs'}")
    assert "fold 0, seed 0" in progress
    assert [len(case["scores"]) for case in summary["cases"]] == [1, 1]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_quick_text_study_of_made_up_lists(tmp_path):
    intents = read_published(processes.ROOT / "data" / "mintrec" / "published.json").labels["intent"].class_names
    flags = {
        "data": made_up_lists.write_meld(tmp_path / "meld", made_up_lists.meld_rows()),
        "mintrec": made_up_lists.write_mintrec(tmp_path / "mintrec", list(intents)),
        "checkpoint": random_encoders.make(tmp_path / "encoders").converted["text"],
        "workdir": tmp_path / "runs",
    }
    summary, progress = _run("text_study", *(f"--{name}={path}" for name, path in flags.items()))
    (name,) = [case["case"] for case in summary["cases"]]
    assert name == next(iter(text_study.CASES))
    assert f"{name}, seed 0" in progress
