"""Whether an export gives what its run gives: the same hashes, and the same outputs on inputs of several sizes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mmei_jax.fingerprints import parameters_hash
from mmei_jax.serving.loading import LoadedExport, LoadedProgram
from mmei_jax.serving.manifest import Program
from mmei_jax.serving.signatures import Function
from mmei_jax.types import InputError

# Of the largest absolute value of an output; what rounding may change where a program is compiled anew.
TOLERANCE = 1e-6


def check_parameters(loaded: LoadedExport, functions: Mapping[str, Function]) -> None:
    """Compares every group of parameters with the run's own.

    Args:
        loaded: the export.
        functions: of the run, by name.

    Raises:
        InputError: a group is of other parameters or settings, or the run has no such program.
    """
    exported = {group.name: group.sha256 for group in loaded.manifest.groups}
    for name in loaded.programs:
        if name not in functions:
            raise InputError(f"program {name}: the run has none; expected one of {', '.join(functions)}")
        for group, parameters in functions[name].groups.items():
            own = parameters_hash(parameters.arrays, parameters.settings)
            if exported.get(group) != own:
                raise InputError(
                    f"parameters {group} of program {name}: {str(exported.get(group))[:16]}..., the run's are "
                    f"{own[:16]}...: expected an export of this run, with the same options; export it again"
                )


def synthetic_inputs(program: Program, number: int) -> dict[str, np.ndarray]:
    """Random inputs that a program takes, whose sizes differ from number to number.

    Args:
        program: as the manifest has it.
        number: of the example, from 0.
    """
    generator = np.random.default_rng(number)
    sizes = {}
    for place, size in enumerate(program.sizes):
        wanted = size.least + (2 + place + 3 * number) * (size.least if size.least > 1 else 1)
        sizes[size.name] = min(wanted, size.most) if size.most else wanted
    found = {}
    for tensor in program.inputs:
        shape = tuple(int(size) if size.isdecimal() else sizes[size] for size in tensor.sizes)
        if tensor.name.endswith("lengths"):
            units = (tensor.name.replace("lengths", unit) for unit in ("tokens", "frames", "samples"))
            longest = next(size for size in units if size in sizes)
            values: Any = generator.integers(0, sizes[longest] + 1, shape)
        elif tensor.dtype in ("float16", "float32"):
            values = generator.normal(size=shape)
        else:
            # Rows of tables, token ids, pixels, whether something is there: small numbers that all of them have.
            values = generator.integers(0, 2, shape)
        found[tensor.name] = np.asarray(values, tensor.dtype)
    return found


def read_inputs(path: Path, program: str) -> dict[str, np.ndarray]:
    """Inputs of one program in an ``.npz`` file, whose arrays are named ``<program>/<input>``.

    Args:
        path: the file.
        program: its name.

    Raises:
        InputError: there is no such file.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names = [name for name in arrays.files if name.startswith(f"{program}/")]
            return {name.partition("/")[2]: arrays[name] for name in names}
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: expected an .npz file of arrays named program/input: {error}") from error


def largest_difference(program: LoadedProgram, function: Function, inputs: Mapping[str, np.ndarray]) -> float:
    """How far an exported program is from the run's own function, jitted: of all outputs, relative to their largest.

    Args:
        program: loaded.
        function: of the run.
        inputs: of both.

    Raises:
        InputError: the program does not take these inputs, or differs by more than :data:`TOLERANCE`.
    """
    found = jax.device_get(program(**inputs))
    parameters = {name: dict(group.arrays) for name, group in function.groups.items()}
    expected = jax.device_get(jax.jit(function.function)(parameters, dict(inputs)))
    differences = {name: _difference(found[name], expected[name]) for name in expected}
    worst = max(differences, key=lambda name: differences[name])
    if not differences[worst] <= TOLERANCE:
        raise InputError(
            f"program {program.description.name}: {worst} differs from the run's by {differences[worst]:.1e} of its "
            f"largest value: expected at most {TOLERANCE:.0e}"
        )
    return differences[worst]


def _difference(found: np.ndarray, expected: np.ndarray) -> float:
    """0 where both are equal, also where they are not finite."""
    if np.array_equal(found, expected, equal_nan=found.dtype.kind == "f"):
        return 0.0
    finite = np.isfinite(expected.astype(np.float64))
    if not np.array_equal(finite, np.isfinite(found.astype(np.float64))):
        return float("inf")
    apart = np.abs(found[finite].astype(np.float64) - expected[finite].astype(np.float64)).max(initial=0.0)
    return float(apart / max(np.abs(expected[finite].astype(np.float64)).max(initial=0.0), 1e-30))
