"""What is installed: the wheel's contents, and pinned versions that fit the declared ranges."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CONSTRAINTS = sorted((ROOT / "constraints").glob("python*.txt"))
# Apache Beam and the test extra exclude each other, so what is installed with it is pinned apart.
BEAM_CONSTRAINTS = sorted((ROOT / "constraints").glob("beam_python*.txt"))


def _pins(path: Path) -> dict[str, str]:
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    # One exact public version a line: no index, no path, no local version such as +cpu.
    wrong = [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line)]
    assert not wrong, f"{path.name}: {wrong}"
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


def _requirements(extras: Collection[str]) -> list[Requirement]:
    lines = [line for name in extras for line in PROJECT["optional-dependencies"][name]]
    return [Requirement(line) for line in [*PROJECT["dependencies"], *lines]]


def test_versions_are_pinned_for_every_supported_python():
    named = {line.rpartition(" ")[2] for line in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", line)}
    assert {path.stem.removeprefix("python") for path in CONSTRAINTS} == named


@pytest.mark.parametrize("path", [*CONSTRAINTS, *BEAM_CONSTRAINTS], ids=lambda path: path.name)
def test_pinned_versions_lie_in_the_declared_ranges(path):
    pins = _pins(path)
    beside_beam = set(PROJECT["optional-dependencies"]) - {"beam"}
    for requirement in _requirements({"beam"} if path in BEAM_CONSTRAINTS else beside_beam):
        version = pins.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} is not pinned"
        assert requirement.specifier.contains(version), f"{requirement} does not allow the pinned {version}"


def test_run_time_needs_neither_torch_nor_tensorflow():
    names = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    # tensorflow-datasets is one of them: it does not ask for TensorFlow.
    assert not {"torch", "tensorflow"} & names


def _imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0]


# A peer that is installed by hand is asked for by importorskip, which is no import statement.
@pytest.mark.parametrize(
    ("folders", "extras"),
    [(("mmei_jax", "configs", "data"), ("faces", "beam")), (("tests", "benchmarks"), ("faces", "test"))],
    ids=["run_time", "tests"],
)
def test_every_imported_package_is_declared(folders, extras):
    declared = {canonicalize_name(requirement.name) for requirement in _requirements(extras)}
    distributions = importlib.metadata.packages_distributions()
    own = {path.name.removesuffix(".py") for path in ROOT.iterdir()} | {
        path.stem for folder in folders for path in (ROOT / folder).iterdir()
    }
    # Beam is not installed beside the tests' packages; jax asks for its own jaxlib.
    known = distributions | {"apache_beam": ["apache-beam"], "jaxlib": ["jax"]}
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(paths) > 20
    undeclared = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in paths
        for name in _imported(path)
        if name not in sys.stdlib_module_names | own
        and not declared & {canonicalize_name(distribution) for distribution in known.get(name, [])}
    }
    assert not undeclared


def test_wheel_holds_the_package_and_nothing_else(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "mmei_jax", "configs", "data", "tests", "train.py"):
        (source / name).symlink_to(ROOT / name)
    program = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    files = zipfile.ZipFile(wheel).namelist()
    folders = {name.split("/")[0] for name in files}
    assert {name for name in folders if not name.endswith(".dist-info")} == {"mmei_jax"}
    packaged = {name for name in files if name.startswith("mmei_jax/") and name.endswith(".py")}
    assert packaged == {str(path.relative_to(ROOT)) for path in (ROOT / "mmei_jax").rglob("*.py")}
    assert "mmei_jax/py.typed" in files
