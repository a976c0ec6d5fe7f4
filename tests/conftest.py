"""What holds in every test: the CPU, no rank promotion, no compilation cache, and checked shapes and types.

The package's functions are checked against their jaxtyping annotations by beartype. That happens here only; users of
the package pay nothing for it.
"""

import os
from pathlib import Path

# Before jax is imported anywhere: the accelerator of a developer's machine must not change what a test sees. Processes
# that tests start inherit both.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the suite's time is compilation of programs that then run for milliseconds.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false")
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
# For the commands that tests start: what earlier runs compiled must not reach them.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"

import jax
import jaxtyping
import pytest

PACKAGE = Path(__file__).parents[1] / "mmei_jax"

# Modules whose annotations cannot be checked, and why.
UNCHECKED = {
    "mmei_jax.config": "beartype cannot read annotations that name types.GenericAlias; no arrays here",
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
jax.config.update("jax_enable_compilation_cache", True)
jaxtyping.install_import_hook(_checked_modules(), "beartype.beartype")


@pytest.fixture(scope="module")
def compilation_cache(tmp_path_factory):
    """For tests of whole runs: runs of one configuration compile once, though each jits functions of its own."""
    keys = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {key: getattr(jax.config, key) for key in keys}
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    yield
    for key, value in before.items():
        jax.config.update(key, value)
