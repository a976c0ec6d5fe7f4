"""The benchmarks' harness: sides in their own processes, compared before they are measured."""

import argparse
import dataclasses
import itertools
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
    timing = rounds.Timing({rounds.OURS: [1.0, 2.0, 4.0], "peer": [3.0, 2.0, 4.0]}, {}, [False] * 3)
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


class _Worker:
    """Stands in for a side's process that takes one second a call and no processor time."""

    num_calls = 0

    def measure(self):
        self.num_calls += 1
        return 1.0

    def cpu_seconds(self):
        return 0.0


def _round_on_a_machine(monkeypatch, spent, *, max_tries):
    """One round; ``spent`` are the machine's processor seconds before and after each try."""
    worker, spent = _Worker(), iter(spent)
    monkeypatch.setattr(rounds, "_machine_cpu_seconds", lambda: next(spent))
    return *rounds._one_round({"ours": worker}, ["ours"], "round 1 of 1", max_tries), worker.num_calls


def test_busy_neighbours_void_a_round(monkeypatch, capsys):
    found = _round_on_a_machine(monkeypatch, [0.0, 100.0, 100.0, 100.0], max_tries=5)
    assert found == ({"ours": 1.0}, False, 2)
    first, second = capsys.readouterr().err.splitlines()
    assert "void, " in first
    assert first.endswith("made again")
    assert second == "round 1 of 1: ours 1 s"


def test_round_whose_tries_run_out_is_kept_as_disturbed(monkeypatch, capsys):
    found = _round_on_a_machine(monkeypatch, range(0, 400, 100), max_tries=2)
    assert found == ({"ours": 1.0}, True, 2)
    assert "kept as disturbed" in capsys.readouterr().err.splitlines()[1]


def test_what_others_may_take_is_a_share_of_the_round_however_short(monkeypatch):
    """A twentieth of a second once passed as nothing, whatever the round's length."""
    clock = iter(0.25 * index for index in range(100))
    monkeypatch.setattr(rounds.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(rounds.os, "cpu_count", lambda: 1)
    # Two readings a round and two a measurement: 0.75 s, of which 5 % are 0.0375 s.
    assert _round_on_a_machine(monkeypatch, [0.0, 0.03], max_tries=1)[1] is False
    assert _round_on_a_machine(monkeypatch, [0.0, 0.045], max_tries=1)[1] is True


def test_short_work_is_repeated_until_a_round_is_long_enough_to_be_judged():
    class Worker:
        seconds = iter([0.125, 0.25, 0.375, 1.0])

        def measure(self):
            return next(self.seconds)

    worker = Worker()
    assert rounds._measure_long_enough(worker) == 0.25
    assert next(worker.seconds) == 1.0


def test_disturbed_rounds_count_for_nothing_beside_others():
    seconds = {rounds.OURS: [1.0, 1.0, 1.0], "peer": [1.0, 50.0, 1.5]}
    timing = rounds.Timing(seconds, {rounds.OURS: {}, "peer": {}}, [False, True, False])
    entry = rounds.case_record("x", timing, "peer", goal=1.0)
    assert (entry["ratio"], entry["ratio_range"]) == (1.25, [1.0, 1.5])
    assert (entry["num_rounds"], entry["num_disturbed_rounds"], entry["has_only_disturbed_rounds"]) == (3, 1, False)


def test_only_disturbed_rounds_give_neither_ratio_nor_verdict(capsys):
    timing = rounds.Timing({rounds.OURS: [1.0] * 2, "peer": [10.0] * 2}, {rounds.OURS: {}, "peer": {}}, [True, True])
    rounds.print_summary("rounds", [rounds.case_record("x", timing, "peer", goal=1.0)], None)
    _, row, total, last = capsys.readouterr().out.splitlines()
    assert row.split() == ["x", "peer", "1.00", *["disturbed", "2", "of", "2,", "no", "ratio"]]
    assert total.startswith("total: ")
    (case,) = json.loads(last)["cases"]
    assert (case["ratio"], case["has_only_disturbed_rounds"], case["num_disturbed_rounds"]) == (None, True, 2)
    assert "disturbed" in rounds.spread(case)


def test_case_that_is_not_there_is_refused_with_the_names(capsys):
    cases = [_Case("cpu, small"), _Case("gpu, large")]
    parser = argparse.ArgumentParser()
    assert rounds.chosen_cases(parser, cases, "small") == cases[:1]
    assert rounds.chosen_cases(parser, cases, "cold", ["cold start"]) == []
    with pytest.raises(SystemExit):
        rounds.chosen_cases(parser, cases, "nonsense", ["cold start"])
    assert "--case=nonsense: expected a part of one of: cpu, small; gpu, large; cold start" in capsys.readouterr().err


@dataclasses.dataclass
class _Case:
    name: str


def test_summary_prints_a_table_and_one_json_line_last(tmp_path, capsys):
    timing = rounds.Timing({rounds.OURS: [1.0], "peer": [2.0]}, {rounds.OURS: {}, "peer": {}}, [False])
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


@pytest.mark.parametrize(("machine_seconds", "is_disturbed"), [(1, False), (2, True)])
def test_sides_of_one_process_take_turns_and_its_time_counts_once(machine_seconds, is_disturbed, monkeypatch):
    """Of each round, this process takes one second."""
    own, machine = itertools.count(), itertools.count(step=machine_seconds)
    monkeypatch.setattr(rounds, "MIN_SIDE_SECONDS", 0.1)
    monkeypatch.setattr(rounds, "_cpu_seconds", lambda process: next(own))
    monkeypatch.setattr(rounds, "_machine_cpu_seconds", lambda: next(machine))
    calls = []
    measures = {name: lambda name=name: calls.append(name) or float(len(calls)) for name in (rounds.OURS, "copy")}
    timing = rounds.measure_here(measures, {rounds.OURS: {"a": 1}, "copy": {}}, num_rounds=3, is_quick=True)
    assert calls == [rounds.OURS, "copy", "copy", rounds.OURS, rounds.OURS, "copy"]
    assert timing.seconds == {rounds.OURS: [1.0, 4.0, 5.0], "copy": [2.0, 3.0, 6.0]}
    assert timing.is_disturbed == [is_disturbed] * 3
    assert timing.settings[rounds.OURS] == {"a": 1}


def test_work_is_done_once_before_it_is_timed():
    calls = []
    measure = rounds.timed(lambda: calls.append(len(calls)))
    assert calls == [0]
    assert measure() >= 0.0
    assert calls == [0, 1]


def test_a_new_process_has_more_variables_and_this_one_keeps_its_own(monkeypatch):
    # With this one's, JAX would fail there.
    monkeypatch.setenv("JAX_PLATFORMS", "nowhere")
    environment = {"JAX_PLATFORMS": "cpu", "VARIABLE_OF_ANOTHER_PROCESS": "1"}
    assert rounds.in_new_process(rounds._default_backend, environment=environment) == "cpu"
    assert os.environ["JAX_PLATFORMS"] == "nowhere"
    assert "VARIABLE_OF_ANOTHER_PROCESS" not in os.environ


@pytest.fixture
def ask_again():
    rounds.missing_gpu.cache_clear()
    yield
    rounds.missing_gpu.cache_clear()


@pytest.mark.parametrize(
    ("backend", "files", "reason"),
    [("gpu", ["nvidia3"], ""), ("cpu", ["nvidia3"], "JAX does not see the GPU"), ("cpu", ["nvidiactl"], "no GPU")],
)
def test_a_gpu_is_what_jax_sees_whatever_its_number(backend, files, reason, ask_again, monkeypatch, tmp_path):
    for name in files:
        (tmp_path / name).touch()
    monkeypatch.setattr(rounds, "Path", lambda _: tmp_path)
    asked = []
    monkeypatch.setattr(rounds, "in_new_process", lambda function: asked.append(function) or backend)
    assert rounds.missing_gpu() == rounds.missing_gpu() == reason
    assert asked == [rounds._default_backend]


def test_a_case_that_is_not_measured_says_why():
    assert rounds.unmeasured("x", "y", "no GPU", goal=2.0) == {
        "case": "x: not measured (no GPU)",
        "peer": "y",
        "ratio": None,
        "goal": 2.0,
    }
