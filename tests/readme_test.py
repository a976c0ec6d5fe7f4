"""Runs what the documents show: their Python, their commands, and the names they give of targets and files."""

import contextlib
import doctest
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
import warnings
from pathlib import Path
from typing import get_args

import pytest

from configs import default, extraction, feedback
from mmei_jax.config import parse
from mmei_jax.extraction import faces
from mmei_jax.extraction.clip_lists import COLUMNS
from mmei_jax.extraction.media import REASONS
from mmei_jax.records import Dataset
from mmei_jax.simulation import aigc_int_dataset
from tests import architecture_test, markdown, processes, random_encoders

ROOT = markdown.ROOT
QUICKSTART = "runs/data/aigc_int_quickstart"
OWN_FEATURES = "docs/bring_your_own_features.md"
SHARDS = "docs/read_our_shards.md"
EXTRACTION = "docs/extraction.md"
RERANKING = "docs/reranking.md"
USERS = "docs/users.md"
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "data/aigc_int/README.md",
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")),
]
MODULE = "python -m mmei_jax."
# Its flags can be defined once in a process.
EXTRACT = "python -m mmei_jax.extraction.extract "
# Its workers import what they run by name.
RENDER = "python -m mmei_jax.simulation.render "
TRAINING = ("python train.py", "python eval.py")


def _commands(script: str) -> list[str]:
    """The commands of a block, continued lines joined; one that has a here-document is left whole."""
    if "<<" in script and not script.startswith(MODULE):
        before, _, after = script.partition("\nEND\n")
        return [f"{before}\nEND\n", *_commands(after)] if after else [script]
    return [line for line in script.replace("\\\n", " ").splitlines() if line and not line.startswith("#")]


def _run_module(command: str) -> None:
    """Runs ``python -m mmei_jax...`` in this process, which is seconds cheaper than in its own."""
    words = shlex.split(command)
    assert words[:2] == ["python", "-m"]
    before, code = sys.argv, 0
    sys.argv = words[2:]
    try:
        with warnings.catch_warnings():
            # The module was imported before, as a module; here it runs as a program.
            warnings.filterwarnings("ignore", message=".*found in sys.modules", category=RuntimeWarning)
            runpy.run_module(words[2], run_name="__main__")
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv = before
    assert not code, command


def _run_in_shell(command: str) -> None:
    """Runs one command with this interpreter as ``python``; prints what it printed."""
    binaries = str(Path(sys.executable).parent)
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([binaries, os.environ["PATH"]]),
        "PYTHONPATH": processes.PYTHONPATH,
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout, end="")


def _run_document(document: str, *, trains: bool) -> dict[str, object]:
    """Runs the blocks of a document in order; a ``text`` block is what the block before it prints.

    Gives the names that its Python defined. Without ``trains``, commands that train are left out.
    """
    names: dict[str, object] = {}
    printed = ""
    for language, content in markdown.blocks(markdown.read(document)):
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            if language == "python":
                exec(compile(content, document, "exec"), names)
            for command in _commands(content) if language == "bash" else []:
                if command.startswith(MODULE) and not command.startswith((EXTRACT, RENDER)) and "||" not in command:
                    _run_module(command)
                elif trains or not command.startswith(TRAINING):
                    _run_in_shell(command)
        if language == "text":
            is_same = doctest.OutputChecker().check_output(content, printed, doctest.ELLIPSIS)
            assert is_same, f"{document} shows\n{content}\nbut its block prints\n{printed}"
        printed = output.getvalue()
    return names


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder that looks like the project's, as the current one."""
    for name in ("train.py", "eval.py", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_shards_are_read_without_the_package_as_shown(project):
    arguments = [f"--output={project / QUICKSTART}", "--num_records=60", "--dim=32", "--seed=0"]
    assert aigc_int_dataset.main(arguments) == 0
    python = "\n".join(code for language, code in markdown.blocks(markdown.read(SHARDS)) if language == "python")
    assert "mmei_jax" not in python
    names = _run_document(SHARDS, trains=False)
    assert names["table"].num_rows == len(names["frame"]) == 42
    assert names["tokens_of_one"].shape[1] == names["tokens"].shape[1] == 32
    assert len(names["shown"]) == 42 * 8


def test_shard_columns_are_those_that_the_page_lists(project):
    assert aigc_int_dataset.main([f"--output={project / QUICKSTART}", "--num_records=60", "--dim=14"]) == 0
    names = _run_document(SHARDS, trains=False)
    rows = markdown.tables(markdown.read(SHARDS))["column | Arrow type | content"][1:]
    listed = {name for row in rows for name in re.findall(r"`([\w<>]+)`", row[0])}
    found = {re.sub(r"^(label|extra)_.*", r"\1_<name>", name) for name in names["table"].schema.names}
    assert found == listed


def test_own_features_are_imported_and_written_as_shown(project):
    names = _run_document(OWN_FEATURES, trains=False)
    config = parse(names["get_config"]().to_dict())
    assert (project / config.data.path / "manifest.json").exists()


def test_recommendations_explain_themselves_as_shown():
    names = _run_document(RERANKING, trains=False)
    assert [(item.title, item.cap) for item in names["answer"].items] == [
        ("Calm II", None),
        ("Dawn", "ai_generated"),
    ]


@pytest.mark.slow
def test_own_features_are_trained_on_as_shown(project):
    _run_document(OWN_FEATURES, trains=True)
    for name in ("config.json", "parameters.txt", "metrics.jsonl", "tensorboard", "checkpoints", "eval/test.json"):
        assert (project / "runs/mine" / name).exists(), name
    assert (project / "runs/sentiment/checkpoints").exists()


@pytest.mark.slow
def test_clips_are_extracted_trained_on_and_read_as_shown(project):
    converted = random_encoders.make(project / "encoders").converted
    (project / "runs/encoders").mkdir(parents=True)
    for modality, name in (("vision", "vit"), ("audio", "wav2vec2"), ("text", "bert")):
        converted[modality].rename(project / "runs/encoders" / name)
    _run_document(EXTRACTION, trains=True)
    for name in ("mine/manifest.json", "mine/extraction.json", "mine/quarantine.jsonl", "raw/manifest.json"):
        assert (project / "runs/data" / name).exists(), name


# Ten commands, each with its own imports and programs.
@pytest.mark.timeout(1800)
@pytest.mark.slow
def test_users_are_recommended_to_as_shown(project):
    encoder = random_encoders.make(project / "encoders").converted["text"]
    (project / "runs/encoders").mkdir(parents=True)
    encoder.rename(project / "runs/encoders/bert")
    _run_document(USERS, trains=True)
    assert Dataset.open(project / "runs/data/users").spec.has_slates


def _first_cells(document: str, column: str) -> dict[str, str]:
    """The second cells of a table by the first ones, which stand between backticks."""
    return {cells[0].strip("`"): cells[1] for cells in markdown.tables(markdown.read(document))[column][1:]}


def test_page_of_extraction_explains_every_column_reason_and_way_to_faces():
    assert tuple(_first_cells(EXTRACTION, "column")) == COLUMNS
    assert _first_cells(EXTRACTION, "reason") == REASONS
    assert tuple(_first_cells(EXTRACTION, "`vision.faces`")) == get_args(faces.Method)


def test_page_of_extraction_names_flags_and_keys_that_exist():
    text = markdown.read(EXTRACTION)
    program = "from mmei_jax.extraction import extract_beam; extract_beam.main()"
    done = subprocess.run([sys.executable, "-c", program, "--help"], cwd=ROOT, capture_output=True, text=True)
    known = set(re.findall(r"^  --(\w+):", done.stdout, flags=re.MULTILINE)) | {"process_index", "num_processes"}
    commands = re.findall(r"(?:extract(?:_beam)?|\.\.\.) (--(?:[^\n]|\\\n)*)", text)
    named = {name for command in commands for name in re.findall(r"--(\w+)=", command)}
    named |= set(re.findall(r"`--(\w+)=", text)) - {"media"}
    assert {"config", "input", "output", "depth", "beam", "process_index"} <= named <= known
    config = extraction.get_config()
    keys = re.findall(r"`(?:config\.)?((?:vision|audio|text)\.\w+)`|config\.([a-z_.]+) =|`config\.(\w+)`", text)
    assert len(keys) > 10
    for key in filter(None, (name for match in keys for name in match)):
        group, _, name = key.rpartition(".")
        assert name in (config[group] if group else config), key


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documents_name_configuration_keys_that_exist(document):
    known = [config.get_config().to_dict() for config in (default, extraction, feedback)]
    for key in re.findall(r"--config\.([a-z_.]+)=", markdown.read(document)):
        assert any(_has_key(config, key) for config in known), key


def _has_key(config, key):
    for name in key.split("."):
        if not isinstance(config, dict) or name not in config:
            return False
        config = config[name]
    return True


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_documents_name_targets_that_the_makefile_has(document):
    text = markdown.read(document)
    named = set(re.findall(r"^make ([a-z0-9-]+)", text, flags=re.MULTILINE)) | set(
        re.findall(r"`make ([a-z0-9-]+)", text)
    )
    targets = set(re.findall(r"^([a-z0-9-]+):", markdown.read("Makefile"), flags=re.MULTILINE))
    assert named
    assert named <= targets


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "docs/architecture.md"])
def test_documents_name_files_that_are_there(document):
    text = markdown.read(document)
    folders = "|".join(("benchmarks", "configs", "constraints", "data", "docs", "mmei_jax", "tests", r"\.ci"))
    # What goes on with < or * stands for several files.
    named = set(re.findall(rf"(?<![\w/])(?:{folders})/[\w./]*+(?![<*])", text))
    assert named
    assert not {name for name in named if not (ROOT / name.rstrip(".")).exists()}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_between_documents_lead_somewhere(document):
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", markdown.read(document))
    folder = (ROOT / document).parent
    assert not [target for target in targets if not (folder / target).exists()]


def test_architecture_page_gives_modules_the_levels_that_are_held():
    rows = markdown.tables(markdown.read("docs/architecture.md"))["level | modules"][1:]
    shown = {name: int(level) for level, modules in rows for name in re.findall(r"`([\w.]+)`", modules)}
    assert shown
    assert shown == {name: architecture_test.LEVEL_OF.get(name) for name in shown}


def test_readme_lists_every_benchmark():
    text = markdown.read("README.md")
    programs = [path for path in (ROOT / "benchmarks").glob("*.py") if "__main__" in path.read_text(encoding="utf-8")]
    assert programs
    assert not [path.stem for path in programs if f"| `{path.stem}` |" not in text]
