"""The regression guard over all benchmarks: bands, verdicts, runs made again, exit codes."""

import json
import subprocess
import sys

import pytest

from benchmarks import rounds, run
from tests import processes

CASE = "cpu, against torch"


def scripted(*ratios):
    """A quick run that gives these ratios one after the other."""
    left = list(ratios)
    return lambda name: {CASE: left.pop(0)}


def committed(*ratios):
    return {"date": "2026-01-02", "machine": rounds.describe_machine(), "ratios": {"fusion_step": {CASE: list(ratios)}}}


def check(recorded, *ratios):
    return run.check(committed(*recorded), ["fusion_step"], scripted(*ratios))


@pytest.mark.parametrize(
    ("ratio", "word", "code"), [(0.95, "as before", 0), (0.89, "REGRESSION", 1), (1.2, "faster", 0)]
)
def test_ratio_is_judged_by_its_band(ratio, word, code, capsys):
    assert check([1.0], ratio, ratio, ratio) == code
    assert f"{word:<12}  " in capsys.readouterr().out


def test_recorded_ratios_that_differ_widen_the_band():
    assert check([1.0, 1.4], 0.75) == 0
    assert check([1.0], 0.75, 0.75, 0.75) == 1


def test_ratio_below_its_band_is_made_again_and_the_best_run_counts(capsys):
    assert check([1.0], 0.5, 0.98) == 0
    assert check([1.0], 0.5, 0.6, 0.55) == 1
    assert " 0.60 " in capsys.readouterr().out


def test_disturbed_run_is_made_again_and_nothing_measured_is_no_success(capsys):
    assert check([1.0], None, 1.0) == 0
    assert check([1.0], None, None, None) == 1
    assert "0 of 1 ratios measured" in capsys.readouterr().out


def test_case_without_a_record_is_named(capsys):
    assert run.check({**committed(), "ratios": {}}, ["fusion_step"], scripted(3.0)) == 0
    assert "not recorded" in capsys.readouterr().out


def test_recorded_case_that_is_no_longer_made_is_no_success(capsys):
    recorded = committed(1.0)
    recorded["ratios"]["fusion_step"]["gone, against torch"] = [2.0]
    assert run.check(recorded, ["fusion_step"], scripted(1.0)) == 1
    assert "GONE " in capsys.readouterr().out


def test_benchmark_that_fails_is_told_and_the_others_go_on(capsys):
    def one_fails(name):
        if name == "startup":
            raise run.BenchmarkFailed("startup ended with code 1")
        return {CASE: 1.0}

    assert run.check(committed(1.0), ["startup", "fusion_step"], one_fails) == 1
    printed = capsys.readouterr().out
    assert "startup ended with code 1" in printed
    assert "as before" in printed


def test_noise_hides_no_more_than_two_fifths():
    assert run.make_band([0.5, 1.0, 1.6]).low == pytest.approx(0.3)


def test_another_machine_is_told(capsys):
    assert run.check({**committed(1.0), "machine": "64 cores"}, ["fusion_step"], scripted(1.0)) == 0
    assert "this machine is another" in capsys.readouterr().out


def test_record_keeps_every_run_and_reads_back(tmp_path):
    made = run.record(["fusion_step"], 3, scripted(1.0, None, 1.2))
    assert made["ratios"] == {"fusion_step": {CASE: [1.0, 1.2]}}
    assert made["machine"] == rounds.describe_machine()
    for name in ("2026-01-02_quick.json", "2026-03-01_quick.json", "2026-04-01_startup.json"):
        (tmp_path / name).write_text(json.dumps(made))
    newest = run.newest_record(tmp_path)
    assert newest is not None
    assert newest.name == "2026-03-01_quick.json"
    assert run.check(json.loads(newest.read_text()), ["fusion_step"], scripted(1.1)) == 0


def test_every_benchmark_with_a_ratio_is_guarded():
    modules = {path.stem: path.read_text() for path in run.RESULTS.parent.glob("*.py")}
    with_ratios = {name for name, text in modules.items() if "print_summary(" in text} - {"rounds"}
    assert with_ratios <= set(run.BENCHMARKS) <= modules.keys()


def test_unknown_benchmark_is_refused_in_one_line():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.run", "--check", "--only=fusion"],
        cwd=processes.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "--only=fusion: no benchmark 'fusion'; there are: fusion_step, " in done.stderr


def test_record_that_no_check_would_find_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run", "--record=results.json"])
    with pytest.raises(SystemExit):
        run.main()
    assert "--record=results.json: expected a name that ends with _quick.json" in capsys.readouterr().err
