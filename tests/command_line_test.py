"""Bad input to train.py and eval.py gives one clear line on standard error, no traceback, and exit code 2."""

import os
import shlex
import subprocess
import sys

import pytest

from benchmarks import utterance_lengths
from mmei_jax.simulation import aigc_int
from mmei_jax.types import InputError
from mmei_jax.workdir import read_config
from tests import processes, tiny


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.make_dataset(tmp_path_factory.mktemp("data") / "aigc_int")


def run(*arguments):
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=processes.ROOT,
        env=processes.environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return done.returncode, done.stderr


def assert_one_line(outcome, *parts):
    code, stderr = outcome
    assert code == 2, stderr
    assert "Traceback" not in stderr
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, stderr
    for part in parts:
        assert part in lines[0], lines[0]


CASES = {
    "unknown key": (["--config.model.dimm=8"], ["--config.model.dimm=8", "unknown configuration key"]),
    "key below a value": (["--config.model.dim.wide=8"], ["--config.model.dim.wide=8", "unknown configuration key"]),
    "wrong type": (["--config.model.dim=wide"], ["config.model.dim", "wide"]),
    "wrong value": (["--config.model.pooling=max"], ["config.model.pooling = 'max'", "'mean'"]),
    "impossible mesh": (["--config.mesh.data=3"], ["config.mesh.data = 3", "at most 1"]),
    "mesh of more devices": (["--config.mesh.fsdp=2"], ["config.mesh.fsdp * config.mesh.tensor = 2 * 1", "of 1"]),
    "missing data": (["--config.data.path=nowhere"], ["nowhere", "manifest.json"]),
    "head without labels": (["--config.loss.emotion_label=sentiment"], ["'sentiment'", "emotion, intent"]),
    "unknown split": (["--config.data.test_splits=('final',)"], ["'final'", "test, train, validation"]),
}


@pytest.mark.parametrize("name", CASES)
def test_train_refuses(name, data, tmp_path):
    flags, parts = CASES[name]
    arguments = ["train.py", "--config=tests/tiny_config.py", f"--workdir={tmp_path / 'run'}"]
    outcome = run(*arguments, f"--config.data.path={data}", *flags)
    assert_one_line(outcome, *parts)
    assert not (tmp_path / "run").exists()


def test_missing_config_file_is_told_in_one_line(tmp_path):
    outcome = run("train.py", "--config=configs/nothing.py", f"--workdir={tmp_path}")
    assert_one_line(outcome, "configs/nothing.py")


def test_unwritable_workdir_is_told_in_one_line(data, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("a file, where a folder is wanted")
    outcome = run(
        "train.py",
        "--config=tests/tiny_config.py",
        f"--config.data.path={data}",
        f"--workdir={blocked / 'run'}",
    )
    assert_one_line(outcome, str(blocked / "run"), "a folder that can be written")


@pytest.mark.slow
def test_used_up_quota_ends_the_run_with_one_line_and_no_half_written_checkpoint(data, tmp_path):
    arguments = ["train.py", "--config=tests/tiny_config.py", f"--config.data.path={data}"]
    arguments += [f"--workdir={tmp_path / 'run'}", "--config.train.num_epochs=4"]

    environment = processes.environment(tmp_path)
    environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    # A file that may not grow past 20 KiB stands for a quota: both fail in write().
    command = f"ulimit -f 20; exec {shlex.join([sys.executable, *arguments])}"
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=processes.ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    code, stderr = done.returncode, done.stderr
    place = f"{tmp_path / 'run' / 'checkpoints'}: the checkpoint of step"
    assert_one_line((code, stderr), place, "could not be written", "File too large")
    complete = [path for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdigit()]
    assert complete == []


@pytest.mark.parametrize("text", ["{}", "[]", "{", "\udcff"])
def test_eval_of_a_damaged_configuration_is_told_in_one_line(text, tmp_path):
    (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=r"config\.json: expected the configuration that train\.py wrote"):
        read_config(tmp_path, "elsewhere")


@pytest.mark.parametrize("module", ["mmei_jax.extraction.import_features", "mmei_jax.records"])
def test_an_option_that_argparse_refuses_is_told_in_one_line(module, tmp_path):
    code, stderr = run("-m", module, "--nonsense")
    assert code == 2
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1


def test_eval_of_a_folder_without_a_run_is_told_in_one_line(tmp_path):
    assert_one_line(run("eval.py", f"--workdir={tmp_path / 'no'}"), "config.json", "train.py")


@pytest.mark.parametrize("script", ["train.py", "eval.py"])
def test_help_explains_the_flags(script, tmp_path):
    done = subprocess.run(
        [sys.executable, script, "--help"],
        cwd=processes.ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0
    assert "--workdir" in done.stdout
    assert "Traceback" not in done.stderr


def test_wrong_flag_of_eval_names_the_help_and_no_configuration():
    outcome = run("eval.py", "--workdri=runs/it")
    assert_one_line(outcome, "workdri", "--help lists the flags")
    assert "configs/default.py" not in outcome[1]


def test_simulators_help_goes_to_standard_output(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["aigc_int", "--help"])
    assert aigc_int.main() == 0
    found = capsys.readouterr()
    assert "generate,calibrate,report" in found.out
    assert found.err == ""
    monkeypatch.setattr(sys, "argv", ["aigc_int"])
    assert aigc_int.main() == 2
    assert "generate,calibrate,report" in capsys.readouterr().err


def test_missing_list_of_utterances_is_told_in_one_line(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["utterance_lengths", "nowhere.csv"])
    assert utterance_lengths.main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "nowhere.csv" in line
