"""The benchmarks' harness: sides in their own processes, compared before they are measured."""

import json
import os
import time

import numpy as np
import pytest

from benchmarks import rounds

AGREE = "tests.rounds_test:quick_side"


def quick_side(case):
    """A side that takes ``case`` seconds, and says in which process."""
    return rounds.Ready(measure=lambda: case, evidence=np.arange(3.0), settings={"process": os.getpid()})


def other_side(case):
    """A side that is twice as slow and computes almost the same."""
    return rounds.Ready(measure=lambda: 2 * case, evidence=np.arange(3.0) + 1e-7)


def wrong_side(case):
    """A side that computes something else."""
    return rounds.Ready(measure=lambda: pytest.fail("measured"), evidence=np.arange(3.0) + 0.1)


def failing_side(case):
    """A side that cannot be built."""
    os._exit(3)


def agree(ours, theirs):
    return rounds.differ_by(ours, theirs, relative=1e-5)


def measure(peer, num_rounds=3):
    sides = {rounds.OURS: AGREE, "peer": f"tests.rounds_test:{peer}"}
    return rounds.measure_sides(sides, 0.25, num_rounds=num_rounds, agree=agree)


def test_ratio_is_the_peers_time_over_ours_and_each_side_has_its_own_process():
    timing = measure("other_side")
    assert timing.seconds == {rounds.OURS: [0.25] * 3, "peer": [0.5] * 3}
    assert timing.ratio("peer") == 2.0
    assert timing.ratio_range("peer") == (2.0, 2.0)
    assert timing.settings[rounds.OURS]["process"] != os.getpid()


def test_ratio_is_the_median_over_rounds_not_the_ratio_of_medians():
    timing = rounds.Timing({rounds.OURS: [1.0, 2.0, 4.0], "peer": [3.0, 2.0, 4.0]}, {}, 0)
    assert timing.ratio("peer") == 1.0


def test_sides_that_differ_are_never_measured():
    with pytest.raises(rounds.SidesDiffer, match=r"peer and ours differ.*largest absolute difference 0.1"):
        measure("wrong_side")


def test_nan_counts_as_a_difference():
    assert rounds.differ_by([1.0], [float("nan")], relative=1.0)
    assert rounds.differ_by([1.0], [1.0, 2.0], relative=1.0) == "shape (2,) against (1,)"
    assert not rounds.differ_by([1.0, 100.0], [1.0005, 100.0], relative=1e-5)


def test_a_side_that_fails_is_named():
    with pytest.raises(RuntimeError, match="peer: its process ended with code 3"):
        measure("failing_side")


def test_processor_time_of_this_process_is_counted():
    before, machine = rounds._cpu_seconds(os.getpid()), rounds._machine_cpu_seconds()
    end = time.process_time() + 0.3
    while time.process_time() < end:
        pass
    assert rounds._cpu_seconds(os.getpid()) - before >= 0.25
    assert rounds._machine_cpu_seconds() - machine >= 0.25


def test_busy_neighbours_void_a_round(monkeypatch):
    class Worker:
        calls = 0

        def measure(self):
            Worker.calls += 1
            return 1.0

        def cpu_seconds(self):
            return 0.0

    spent = iter([0.0, 100.0, 100.0, 100.0])
    monkeypatch.setattr(rounds, "_machine_cpu_seconds", lambda: next(spent))
    found, is_disturbed = rounds._one_round({"ours": Worker()}, ["ours"])
    assert (found, is_disturbed, Worker.calls) == ({"ours": 1.0}, False, 2)


def test_summary_prints_a_table_and_one_json_line_last(tmp_path, capsys):
    timing = measure("other_side", num_rounds=1)
    cases = [
        rounds.case_record("small", timing, "peer", goal=1.5),
        rounds.case_record("large", timing, "peer", goal=3.0),
        {"case": "gpu", "peer": "none", "ratio": None, "goal": 1.5},
    ]
    rounds.print_summary("rounds", cases, str(tmp_path / "results.json"), versions=rounds.versions("jax"))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines[1:3]] == ["met", "MISSED"]
    assert json.loads(lines[-1])["cases"][0]["ratio"] == 2.0
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["cases"] == json.loads(lines[-1])["cases"]
    assert {"date", "command", "machine", "versions"} <= written.keys()
