"""Runs what the README shows: its Python, its commands, and the names it gives of targets and files."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mmei_jax.simulation import aigc_int_dataset

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DATASET = "runs/data/aigc_int_quickstart"


def _blocks(language: str, section: str) -> list[str]:
    """The fenced blocks of one language in the section under a heading."""
    (text,) = re.findall(rf"^## {re.escape(section)}\n(.*?)(?=^## |\Z)", README, flags=re.MULTILINE | re.DOTALL)
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def _run(commands: list[str], folder: Path) -> str:
    """Runs commands in a folder that looks like the project's, with this interpreter as ``python``."""
    for name in ("train.py", "eval.py", "configs"):
        (folder / name).symlink_to(ROOT / name)
    binaries = str(Path(sys.executable).parent)
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([binaries, os.environ["PATH"]]),
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(commands)],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_shards_are_read_without_the_package_as_the_readme_shows(tmp_path, monkeypatch, capsys):
    arguments = [f"--output={tmp_path / DATASET}", "--num_records=60", "--dim=32", "--seed=0"]
    assert aigc_int_dataset.main(arguments) == 0
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    code = "\n".join(_blocks("python", "Read the shards without this package"))
    assert "mmei_jax" not in code
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert "label_emotion" in capsys.readouterr().out
    assert names["table"].num_rows == len(names["frame"])
    assert names["tokens"].shape[1] == 32


def test_own_features_are_imported_as_the_readme_shows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = _blocks("python", "Bring your own features")
    exec(compile(code, "README.md", "exec"), {})
    importing, _ = _blocks("bash", "Bring your own features")
    _run([importing], tmp_path)
    assert (tmp_path / "runs/data/mine/manifest.json").exists()


@pytest.mark.slow
def test_own_features_are_trained_on_as_the_readme_shows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = _blocks("python", "Bring your own features")
    exec(compile(code, "README.md", "exec"), {})
    _run(_blocks("bash", "Bring your own features"), tmp_path)
    for name in ("config.json", "parameters.txt", "metrics.jsonl", "tensorboard", "checkpoints", "eval/test.json"):
        assert (tmp_path / "runs/mine" / name).exists(), name


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_documents_name_targets_that_the_makefile_has(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    named = set(re.findall(r"^make ([a-z-]+)", text, flags=re.MULTILINE)) | set(re.findall(r"`make ([a-z-]+)", text))
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert named
    assert named <= targets


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_documents_name_files_that_are_there(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    folders = "|".join(("configs", "constraints", "data", "docs", "mmei_jax", "tests", r"\.ci"))
    # What goes on with < or * stands for several files.
    named = set(re.findall(rf"(?<![\w/])(?:{folders})/[\w./]*+(?![<*])", text))
    assert named
    assert not {name for name in named if not (ROOT / name.rstrip(".")).exists()}
