"""Bad input to train.py and eval.py gives one clear line on standard error, no traceback, and exit code 2."""

import os
import shlex
import subprocess
import sys

import pytest

from benchmarks import utterance_lengths
from mmei_jax import command
from mmei_jax.simulation import aigc_int
from mmei_jax.types import InputError
from mmei_jax.workdir import read_config
from tests import processes


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
    "wrong type": (["--config.model.dim=wide"], ["--config.model.dim=wide: expected an integer;"]),
    "word for a rate": (["--config.model.dropout_rate=low"], ["--config.model.dropout_rate=low: expected a number;"]),
    "wrong value": (["--config.model.pooling=max"], ["config.model.pooling = 'max'", "'mean'"]),
    "impossible mesh": (["--config.mesh.data=3"], ["config.mesh.data = 3", "at most 1"]),
    "mesh of more devices": (["--config.mesh.fsdp=2"], ["config.mesh.fsdp * config.mesh.tensor = 2 * 1", "of 1"]),
    "missing data": (["--config.data.path=nowhere"], ["nowhere", "manifest.json"]),
    "head without labels": (["--config.loss.emotion_label=sentiment"], ["'sentiment'", "emotion, intent"]),
    "unknown split": (["--config.data.test_splits=('final',)"], ["'final'", "test, train, validation"]),
}


@pytest.fixture(scope="module")
def outcomes(data, tmp_path_factory):
    """Exit code and standard error of every wrong command, by name; and the folder of their runs."""
    folder = tmp_path_factory.mktemp("commands")
    (folder / "file").write_text("a file, where a folder is wanted")
    (folder / "broken.py").write_text("seed = 1\ndef get_config(:\n")
    train = ["train.py", "--config=tests/tiny_config.py"]
    on_data = [*train, f"--config.data.path={data}"]
    commands = {name: [*on_data, f"--workdir={folder / name}", *flags] for name, (flags, _) in CASES.items()}
    commands |= {
        "missing file": ["train.py", "--config=configs/nothing.py", f"--workdir={folder}"],
        "another command's file": ["train.py", "--config=configs/feedback.py", f"--workdir={folder / 'another'}"],
        "no Python": ["train.py", f"--config={folder / 'broken.py'}", f"--workdir={folder / 'broken'}"],
        "no configuration": ["train.py", "--config", "tests/tiny.py", f"--workdir={folder / 'none'}"],
        "not a table": ["eval.py", f"--workdir={folder}", "--feedback=runs/feedback"],
        "blocked": [*on_data, f"--workdir={folder / 'file' / 'run'}"],
        "no run": ["eval.py", f"--workdir={folder / 'no'}"],
        "wrong flag": ["eval.py", "--workdri=runs/it"],
    }
    printed = folder / "printed"
    printed.mkdir()
    done = processes.run_forked(list(commands.values()), printed, env=processes.environment())
    return {name: (code, error) for name, (code, _, error) in zip(commands, done, strict=True)}, folder


@pytest.mark.parametrize("name", CASES)
def test_train_refuses(name, outcomes):
    found, folder = outcomes
    assert_one_line(found[name], *CASES[name][1])
    assert not (folder / name).exists()


def test_command_that_is_no_fork_refuses_too(data, tmp_path):
    name = "unknown split"
    flags, parts = CASES[name]
    arguments = ["train.py", "--config=tests/tiny_config.py", f"--workdir={tmp_path / 'run'}"]
    assert_one_line(run(*arguments, f"--config.data.path={data}", *flags), *parts)
    assert not (tmp_path / "run").exists()


def test_wrong_config_files_are_told_in_one_line(outcomes):
    found, folder = outcomes
    assert_one_line(found["missing file"], "error: --config=configs/nothing.py: no such file")
    assert_one_line(found["another command's file"], "error: --config=configs/feedback.py: config.ab: unknown key")
    assert_one_line(found["no Python"], f"{folder / 'broken.py'}, line 2: invalid syntax")
    assert_one_line(found["no configuration"], "error: --config=tests/tiny.py: ", "get_config")


def test_flags_of_tables_are_refused_for_what_is_none(outcomes):
    found, folder = outcomes
    assert_one_line(found["not a table"], f"error: {folder}: --feedback and --unseen are for a table")


def test_unwritable_workdir_is_told_in_one_line(outcomes):
    found, folder = outcomes
    assert_one_line(found["blocked"], str(folder / "file" / "run"), "a folder that can be written")


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


def test_eval_of_a_folder_without_a_run_is_told_in_one_line(outcomes):
    assert_one_line(outcomes[0]["no run"], "config.json", "train.py")


@pytest.mark.parametrize("arguments", [["train.py"], ["eval.py", "--workdir"]])
def test_help_explains_the_flags(arguments, tmp_path):
    done = subprocess.run(
        [sys.executable, *arguments, "--help"],
        cwd=processes.ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0
    assert "--workdir" in done.stdout
    assert ("--coordinator_address" in done.stdout) == (arguments == ["train.py"])
    assert "Traceback" not in done.stderr


def test_wrong_flag_of_eval_names_the_help_and_no_configuration(outcomes):
    outcome = outcomes[0]["wrong flag"]
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


def test_interrupted_command_ends_in_one_line(capsys):
    def interrupted():
        raise KeyboardInterrupt

    assert command.report_errors(interrupted) == 130
    assert capsys.readouterr().err == "interrupted\n"
