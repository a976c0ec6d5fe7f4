"""What holds in every test: the CPU, no rank promotion, a compilation cache per session, checked shapes and types.

The package's functions are checked against their jaxtyping annotations by beartype. That happens here only; users of
the package pay nothing for it.
"""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

# Before jax is imported anywhere: the accelerator of a developer's machine must not change what a test sees. Processes
# that tests start inherit both.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the suite's time is compilation of programs that then run for milliseconds.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false")
# Runs of one configuration compile once, in whatever test and process they run: workers of pytest-xdist and commands
# that tests start inherit the folder, which is new for every session. What earlier sessions compiled reaches nobody.
if "PYTEST_XDIST_WORKER" not in os.environ:
    kept = tempfile.mkdtemp(prefix="mmei_jax-kept-")
    atexit.register(shutil.rmtree, kept, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{kept}/compiled"
    # The same holds for what commands keep in the user's cache folder; Matplotlib goes on with its list of fonts.
    fonts = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "matplotlib"
    os.environ.setdefault("MPLCONFIGDIR", str(fonts))
    os.environ["XDG_CACHE_HOME"] = f"{kept}/user"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"

import jax
import jaxtyping
import pytest

from tests import checked_calls

PACKAGE = Path(__file__).parents[1] / "mmei_jax"

# Importing it, as looking for examples in docstrings does, would hide torch from the tests themselves.
collect_ignore = ["without_torch"]

# Modules whose annotations cannot be checked, and why.
UNCHECKED = {
    "mmei_jax.config": "replicas put traced numbers into its dataclasses",
    "mmei_jax.config_values": "beartype cannot read annotations that name types.GenericAlias; no arrays here",
    "mmei_jax.record_schema": "its dataclasses hold what users give; the writer says in one line what is wrong with it",
    "mmei_jax.types": "jax.tree.map and jax.eval_shape put shapes, shardings and plain objects into its dataclasses",
}


def _checked_modules() -> list[str]:
    names = {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        for path in PACKAGE.rglob("*.py")
        if path.name != "__init__.py"
    }
    return sorted(names - set(UNCHECKED))


jax.config.update("jax_numpy_rank_promotion", "raise")
# What the slow tier calls, the quick one does too, and that one always checks.
if os.environ.get("MMEI_JAX_CHECK_TYPES", "1") == "1":
    checked_calls.install()
    jaxtyping.install_import_hook(_checked_modules(), "beartype.beartype")


def pytest_runtest_setup() -> None:
    """Every test checks every function that it calls."""
    checked_calls.begin_test()


# Files of minutes, longest first: begun last, one of them would keep one worker busy while the others are done.
_LONGEST_FILES = (
    "quickstart_test.py",
    "table_test.py",
    "table_raw_test.py",
    "quick_benchmarks_test.py",
    "multi_process_test.py",
    "recommendation_test.py",
    "feedback_run_test.py",
    "mesh_test.py",
    "training_test.py",
    "multi_device_test.py",
    "packing_test.py",
    "variants_test.py",
    "interruption_test.py",
    "reports_test.py",
    "wav2vec2_test.py",
    "extract_test.py",
    "train_step_test.py",
    "command_line_test.py",
    "fusion_step_test.py",
    "mmei_test.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest files first; the order within a file, and of all others, stays."""
    rank = {name: place for place, name in enumerate(_LONGEST_FILES)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny simulated data set, made once for all tests of a process: to be read only."""
    # Here, after the checks are installed.
    from tests import tiny

    return tiny.make_dataset(tmp_path_factory.mktemp("data") / "aigc_int")
