"""Loads an exported folder and calls its programs: JAX and safetensors, no code of models.

    export = load(Path("runs/export"))
    export.programs["fusion"](text_features=..., text_lengths=..., ...)

Everything is checked first: versions, hashes, that the programs are those that the manifest describes.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import safetensors
from jax import export
from safetensors.numpy import load_file

from mmei_jax.fingerprints import check_hash, parameters_hash
from mmei_jax.serving.manifest import ITEM_IDS_NAME, MANIFEST_NAME, Group, Manifest, Program, Tensor, read_manifest
from mmei_jax.types import InputError


class LoadedProgram:
    """A program with its parameters on the default device; compiled once for each combination of sizes.

    Attributes:
        description: its entry in the manifest.

    Args:
        description: as the manifest has it.
        exported: the program.
        parameters: by group and name, on the device.
    """

    def __init__(self, description: Program, exported: export.Exported, parameters: dict[str, dict[str, Any]]) -> None:
        self.description = description
        self._parameters = parameters
        self._call = jax.jit(exported.call)

    def __call__(self, **inputs: Any) -> dict[str, jax.Array]:
        """The outputs by name, as arrays on the device.

        Args:
            inputs: NumPy's or JAX's arrays by name, all that the description lists.

        Raises:
            InputError: an input is missing or unknown, or is of another type, shape or size.
        """
        self.check(inputs)
        found: dict[str, jax.Array] = self._call(self._parameters, inputs)
        return found

    def check(self, inputs: Mapping[str, Any]) -> None:
        """Refuses inputs that the program does not take.

        Args:
            inputs: arrays by name.

        Raises:
            InputError: as for a call.
        """
        program = self.description
        names = [tensor.name for tensor in program.inputs]
        different = sorted(set(names) ^ set(inputs))
        if different:
            word = "missing" if different[0] in names else "unknown"
            raise InputError(f"{program.name}: input {different[0]!r} is {word}; expected {', '.join(names)}")
        sizes: dict[str, int] = {}
        for tensor in program.inputs:
            _check_input(program, tensor, inputs[tensor.name], sizes)
        for size in program.sizes:
            found = sizes.get(size.name, size.least)
            if found < size.least or (size.most and found > size.most):
                accepted = f"{size.least} to {size.most}" if size.most else f"at least {size.least}"
                raise InputError(f"{program.name}: {size.name} = {found}: expected {accepted}")


def _check_input(program: Program, tensor: Tensor, array: Any, sizes: dict[str, int]) -> None:
    """Compares one input with its description; notes the sizes that it has."""
    shape, dtype = getattr(array, "shape", None), getattr(array, "dtype", None)
    told = f"{program.name}: {tensor.name}"
    if shape is None or str(dtype) != tensor.dtype:
        found = type(array).__name__ if shape is None else dtype
        raise InputError(f"{told} is {found}: expected an array of {tensor.dtype}")
    expected = tensor.sizes
    is_fit = len(shape) == len(expected)
    for size, name in zip(shape, expected, strict=False):
        is_fit &= size == (int(name) if name.isdecimal() else sizes.setdefault(name, size))
    if not is_fit:
        known = ", ".join(f"{name} = {size}" for name, size in sizes.items() if name in expected)
        where = f" where {known}" if known else ""
        raise InputError(f"{told} has shape {tuple(shape)}: expected ({tensor.shape}){where}")


@dataclass(frozen=True)
class LoadedExport:
    """An exported folder, ready to be called.

    Attributes:
        manifest: what it is.
        programs: by name.
        item_ids: by row of ``top_k``, the item's id, None for rows without one; empty without that program.
    """

    manifest: Manifest
    programs: Mapping[str, LoadedProgram]
    item_ids: tuple[str | None, ...]


def load(folder: Path, *, model_sha256: str | None = None, data_sha256: str | None = None) -> LoadedExport:
    """Reads and checks an exported folder, and puts its parameters on the default device.

    A program may do whatever an XLA program can: load folders only that you trust.

    Args:
        folder: that ``python -m mmei_jax.serving export`` made.
        model_sha256: of the model that it must hold; None takes any.
        data_sha256: of the data set's manifest that it must have been trained on; None takes any.

    Raises:
        InputError: something is missing, damaged, of another version of JAX, for other platforms, or of another model
            or data set; names it.
    """
    manifest = read_manifest(folder)
    path = folder / MANIFEST_NAME
    _check_versions(path, manifest)
    for what, found, expected in (
        ("model", manifest.model_sha256, model_sha256),
        ("data set", manifest.data_sha256, data_sha256),
    ):
        if expected is not None and found != expected:
            raise InputError(f"{path}: {what} {found[:16]}...: expected {expected[:16]}...; export it again")
    for entry in manifest.files:
        file = folder / entry.file
        if not file.is_file():
            raise InputError(f"{file}: missing; the manifest lists it")
        if file.stat().st_size != entry.num_bytes:
            raise InputError(f"{file}: {file.stat().st_size} bytes, the manifest says {entry.num_bytes}")
        check_hash(file, entry.sha256)
    groups = {group.name: _read_group(folder, group) for group in manifest.groups}
    own = next((group.sha256 for group in manifest.groups if group.name == "fusion"), manifest.model_sha256)
    if own != manifest.model_sha256:
        raise InputError(f"{path}: model {manifest.model_sha256[:16]}..., its parameters are of {own[:16]}...")
    programs = {}
    for program in manifest.programs:
        exported = export.deserialize(bytearray((folder / program.file).read_bytes()))
        parameters = {name: groups[name] for name in program.groups}
        _check_signature(folder / program.file, program, exported, parameters)
        programs[program.name] = LoadedProgram(program, exported, parameters)
    has_ids = any(entry.file == ITEM_IDS_NAME for entry in manifest.files)
    ids = json.loads((folder / ITEM_IDS_NAME).read_text(encoding="utf-8")) if has_ids else ()
    return LoadedExport(manifest, programs, tuple(ids))


def _check_versions(path: Path, manifest: Manifest) -> None:
    for name in ("jax", "jaxlib"):
        exported, version = getattr(manifest, name), metadata.version(name)
        if exported != version:
            raise InputError(
                f"{path}: exported by {name} {exported}, {version} is installed: expected the same; "
                f"export it again, or install {name}=={exported}"
            )
    platform = export.default_export_platform()
    if platform not in manifest.platforms:
        raise InputError(f"{path}: exported for {', '.join(manifest.platforms)}: this process runs on {platform}")


def _read_group(folder: Path, group: Group) -> dict[str, Any]:
    """The parameters by name, on the device."""
    path = folder / group.file
    try:
        parameters = load_file(path)
    except safetensors.SafetensorError as error:
        raise InputError(f"{path}: {error}") from error
    found = parameters_hash(parameters, group.settings)
    if found != group.sha256:
        raise InputError(
            f"{path}: with the settings of {MANIFEST_NAME} these are parameters {found[:16]}..., "
            f"the manifest says {group.sha256[:16]}...: one of the two was changed"
        )
    placed: dict[str, Any] = jax.device_put(parameters)
    return placed


def _check_signature(
    path: Path, program: Program, exported: export.Exported, parameters: dict[str, dict[str, Any]]
) -> None:
    """Compares what a program takes and gives with its description and its parameters."""
    described = {tensor.name: tensor for tensor in program.inputs}
    given: Any = ((parameters, described), {})
    expected, tree = jax.tree.flatten(given, is_leaf=lambda leaf: isinstance(leaf, Tensor))
    leaves = [
        (leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else (shape_text(leaf.shape), str(leaf.dtype))
        for leaf in expected
    ]
    outputs = {tensor.name: (tensor.shape, tensor.dtype) for tensor in program.outputs}
    found = [(shape_text(aval.shape), str(aval.dtype)) for aval in exported.in_avals]
    gives = jax.tree.unflatten(exported.out_tree, [(shape_text(a.shape), str(a.dtype)) for a in exported.out_avals])
    if str(exported.in_tree) != str(tree) or found != leaves or gives != outputs:
        raise InputError(f"{path}: takes or gives something else than {MANIFEST_NAME} and its parameters say")


def shape_text(shape: tuple[Any, ...]) -> str:
    """Sizes, numbers or symbolic ones, as the manifest writes them."""
    return ", ".join(str(size) for size in shape)
