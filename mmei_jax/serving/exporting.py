"""Lowers functions for all platforms at once, with sizes that differ from call to call, and writes them to a folder."""

import dataclasses
import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from jax import export
from safetensors.numpy import save_file

from mmei_jax.evaluation import BestRun
from mmei_jax.fingerprints import parameters_hash, sha256_of
from mmei_jax.origin import manifest_fingerprint
from mmei_jax.serving.functions import fusion_function
from mmei_jax.serving.loading import shape_text
from mmei_jax.serving.manifest import (
    FORMAT,
    ITEM_IDS_NAME,
    MANIFEST_NAME,
    VERSION,
    Group,
    Manifest,
    Program,
    StoredFile,
    Tensor,
)
from mmei_jax.serving.signatures import Function
from mmei_jax.types import InputError
from mmei_jax.workdir import new_folder, write_bytes, write_json, write_text


def model_hash(run: BestRun) -> str:
    """SHA-256 of the parameters and the configuration of a run's fusion model, as manifests have it.

    Args:
        run: any.
    """
    parameters = fusion_function(run).groups["fusion"]
    return parameters_hash(parameters.arrays, parameters.settings)


def lower(function: Function, platforms: tuple[str, ...]) -> export.Exported:
    """The function as StableHLO, parameters as its inputs.

    Args:
        function: what to export.
        platforms: that it shall run on, of those of ``jax.export``.
    """
    constraints = [f"{size.name} >= {size.least}" for size in function.sizes if size.least > 1]
    constraints += [f"{size.name} <= {size.most}" for size in function.sizes if size.most]
    scope = export.SymbolicScope(constraints)
    inputs = {
        tensor.name: jax.ShapeDtypeStruct(export.symbolic_shape(tensor.shape, scope=scope), tensor.dtype)
        for tensor in function.inputs
    }
    parameters = {
        name: {key: jax.ShapeDtypeStruct(array.shape, array.dtype) for key, array in group.arrays.items()}
        for name, group in function.groups.items()
    }
    return export.export(jax.jit(function.function), platforms=platforms)(parameters, inputs)


def write_export(folder: Path, run: BestRun, functions: Mapping[str, Function], platforms: tuple[str, ...]) -> Manifest:
    """Writes a folder of programs, whole or not at all.

    Args:
        folder: to be made.
        run: that the functions are of.
        functions: by name.
        platforms: that the programs shall run on.

    Raises:
        InputError: the folder holds something already.
    """
    check_is_free(folder)
    groups = {name: group for function in functions.values() for name, group in function.groups.items()}
    programs = []
    with new_folder(folder) as unfinished:
        for name, function in functions.items():
            exported = lower(function, platforms)
            programs.append(describe(name, function, exported))
            write_bytes(unfinished / programs[-1].file, bytes(exported.serialize()))
            convention = exported.calling_convention_version
            if function.item_ids is not None:
                write_text(unfinished / ITEM_IDS_NAME, json.dumps(function.item_ids, ensure_ascii=False) + "\n")
        for name, group in groups.items():
            save_file(dict(group.arrays), unfinished / f"{name}.safetensors", metadata={"format": FORMAT})
        manifest = Manifest(
            format=FORMAT,
            version=VERSION,
            jax=metadata.version("jax"),
            jaxlib=metadata.version("jaxlib"),
            calling_convention_version=convention,
            platforms=platforms,
            model_sha256=model_hash(run),
            data_sha256=manifest_fingerprint(run.dataset),
            data=run.dataset.spec.name,
            checkpoint_step=run.step,
            labels=_labels(run),
            programs=tuple(programs),
            groups=tuple(
                Group(name, f"{name}.safetensors", parameters_hash(group.arrays, group.settings), group.settings)
                for name, group in groups.items()
            ),
            files=tuple(
                StoredFile(path.name, path.stat().st_size, sha256_of(path)) for path in sorted(unfinished.iterdir())
            ),
        )
        write_json(unfinished / MANIFEST_NAME, dataclasses.asdict(manifest))
    return manifest


def check_is_free(folder: Path) -> None:
    """Refuses a folder that could not be made.

    Args:
        folder: to be made.

    Raises:
        InputError: it is there and not empty.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"--output={folder}: is there already; expected a new or an empty folder")


def describe(name: str, function: Function, exported: export.Exported) -> Program:
    """An exported function as manifests describe it.

    Args:
        name: of the program.
        function: that was exported.
        exported: of it.
    """
    given: dict[str, Any] = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    outputs = (
        Tensor(key, shape_text(aval.shape), str(aval.dtype), function.meanings[key]) for key, aval in given.items()
    )
    return Program(name, f"{name}.bin", tuple(function.groups), function.sizes, function.inputs, tuple(outputs))


def _labels(run: BestRun) -> dict[str, Any]:
    """What the outputs of the tasks mean."""
    labels, loss = run.dataset.spec.labels, run.config.loss
    found = {"emotion": {"kind": loss.emotion, "classes": list(labels[loss.emotion_label].class_names)}}
    if loss.intent != "none":
        found["intent"] = {"kind": loss.intent, "classes": list(labels["intent"].class_names)}
    return found
