"""Hugging Face checkpoints -> our encoders: reads, checks, converts, compares, writes.

``python -m mmei_jax.encoders.pretrained SOURCE DESTINATION`` makes a folder of a checkpoint; :func:`load` reads it, and
those that :mod:`mmei_jax.encoders.random_weights` makes of no checkpoint at all.
No torch is needed. Everything fits or nothing is written: a missing or unexpected weight, a wrong shape and a feature
that is not implemented are errors that name all of what is wrong.

A converted folder holds ``parameters.safetensors`` (our names), ``config.json`` and the files of the preprocessing and
the tokenizer where there are any (Hugging Face's, as they were), and ``certificate.json``: where the weights come from,
their hashes, what was left out, how many there are, the hash of what was written, and, where torch is installed, the
largest absolute difference from Hugging Face's outputs at each stage on fixed inputs.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import safetensors
from flax import linen as nn
from safetensors.numpy import load_file, save_file

from mmei_jax.encoders.architectures import Architecture
from mmei_jax.encoders.hugging_face_config import ConfigReader
from mmei_jax.encoders.pretrained_comparison import largest_differences
from mmei_jax.encoders.pretrained_files import Source, find_source, read_json
from mmei_jax.encoders.pretrained_tables import ARCHITECTURES, FAMILIES
from mmei_jax.encoders.pretrained_weights import (
    Converted,
    as_type,
    convert_weights,
    flatten,
    parameter_shapes,
    unflatten,
)
from mmei_jax.encoders.stack import ComputeOptions, stack_layers
from mmei_jax.fingerprints import sha256_of
from mmei_jax.types import InputError
from mmei_jax.workdir import new_folder

PARAMETERS_NAME = "parameters.safetensors"
CONFIG_NAME = "config.json"
CERTIFICATE_NAME = "certificate.json"
CERTIFICATE_VERSION = 2
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Pretrained:
    """An encoder with its weights.

    Attributes:
        module: the encoder; ``module.apply({"params": parameters}, ...)`` runs it.
        parameters: nested dicts of arrays.
        config: the architecture, ``module.config``.
        certificate: what is known about the weights, as plain JSON values.
    """

    module: nn.Module
    parameters: dict[str, Any]
    config: Any
    certificate: dict[str, Any]


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    revision: str | None = None,
    dtype: str = "float32",
    compare: bool | None = None,
) -> dict[str, Any]:
    """Converts a checkpoint and writes it with its certificate.

    Args:
        source: folder with ``config.json`` and weights, or the id of a repository of the hub.
        destination: folder to make; it must not exist.
        revision: branch, tag or commit of the repository.
        dtype: type of the parameters; one of :data:`DTYPES`.
        compare: whether the outputs are compared with Hugging Face's; by default where torch is installed.

    Returns:
        The certificate.

    Raises:
        InputError: the source cannot be read or does not fit, a weight is too large for the type, the destination
            exists, or a comparison was asked for and torch is not installed.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype = {dtype!r}: expected {', '.join(DTYPES)}")
    destination = Path(destination)
    if destination.exists():
        raise InputError(f"{destination}: exists already")
    is_torch_installed = importlib.util.find_spec("torch") is not None
    if compare and not is_torch_installed:
        raise InputError("a comparison with Hugging Face needs torch, which is not installed")
    files = find_source(os.fspath(source), revision)
    hugging_face_config = files.read_config()
    converted = convert_weights(hugging_face_config, files.tensors(), dtype)
    certificate = _certify(files, converted, dtype)
    if compare or (compare is None and is_torch_installed):
        certificate["comparison"] = largest_differences(converted, files.config_path.parent)
    else:
        certificate["comparison"] = "not made: torch is not installed" if compare is None else "not asked for"
    return write_folder(destination, hugging_face_config, converted.parameters, certificate, files.preprocessing_paths)


def load(
    folder: str | os.PathLike[str], *, options: ComputeOptions | None = None, dtype: str | None = None
) -> Pretrained:
    """Reads a folder that :func:`convert` or :mod:`mmei_jax.encoders.random_weights` has written.

    Args:
        folder: the folder.
        options: how the encoder is computed; with ``scan_layers`` the parameters are stacked accordingly.
        dtype: type of the parameters, one of :data:`DTYPES`; as they are stored if not given.

    Returns:
        The encoder, its parameters on JAX's default device.

    Raises:
        InputError: the folder is not such a one, its files do not fit each other, there is no such type, or it cannot
            hold a parameter.
    """
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"dtype = {dtype!r}: expected {', '.join(DTYPES)}")
    folder = Path(folder)
    options = options or ComputeOptions()
    architecture, ours, certificate = _read_description(folder)
    try:
        flat = load_file(folder / PARAMETERS_NAME)
    except safetensors.SafetensorError as error:
        raise InputError(f"{folder / PARAMETERS_NAME}: {error}") from error
    found = {name: array.shape for name, array in flat.items()}
    expected = parameter_shapes(architecture, ours)
    if found != expected:
        wrong = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
        raise InputError(f"{folder / PARAMETERS_NAME}: does not fit {CONFIG_NAME}: {', '.join(wrong)}")
    if sha256_of(folder / PARAMETERS_NAME) != certificate["parameters_sha256"]:
        raise InputError(f"{folder / PARAMETERS_NAME}: is not the file that {CERTIFICATE_NAME} is about (SHA-256)")
    if dtype is not None:
        flat = {name: as_type(name, array, dtype) for name, array in flat.items()}
    # Arrays on the host would be copied to the device at every call.
    parameters = jax.device_put(unflatten(flat))
    if options.scan_layers:
        parameters = stack_layers(parameters)
    return Pretrained(architecture.make_module(ours, options), parameters, ours, certificate)


def read_architecture(folder: str | os.PathLike[str]) -> tuple[Any, dict[str, Any]]:
    """The ``config`` and ``certificate`` of what :func:`load` gives, without reading the weights.

    Args:
        folder: as for :func:`load`.

    Raises:
        InputError: the folder is not such a one.
    """
    _, ours, certificate = _read_description(Path(folder))
    return ours, certificate


def _read_description(folder: Path) -> tuple[Architecture, Any, dict[str, Any]]:
    config = _read_config(folder)
    certificate = read_json(folder / CERTIFICATE_NAME)
    if certificate.get("version") != CERTIFICATE_VERSION:
        raise InputError(
            f"{folder / CERTIFICATE_NAME}: version = {certificate.get('version')!r}: expected {CERTIFICATE_VERSION}; "
            "convert the checkpoint again"
        )
    model_type = str(config.get("model_type"))
    if model_type not in ARCHITECTURES:
        raise InputError(f"{folder / CONFIG_NAME}: model_type = {model_type!r}: expected {', '.join(ARCHITECTURES)}")
    architecture = ARCHITECTURES[model_type]
    has_pooler = {"has_pooler": certificate["architecture"]["has_pooler"]} if architecture.pooler else {}
    ours = architecture.read_config(ConfigReader(config, model_type), **has_pooler)
    return architecture, ours, certificate


def _read_config(folder: Path) -> dict[str, Any]:
    missing = [name for name in (CONFIG_NAME, CERTIFICATE_NAME, PARAMETERS_NAME) if not (folder / name).is_file()]
    if missing:
        raise InputError(f"{folder}: has no {', '.join(missing)}; make it with python -m mmei_jax.encoders.pretrained")
    return read_json(folder / CONFIG_NAME)


def _certify(files: Source, converted: Converted, dtype: str) -> dict[str, Any]:
    source = {
        "name": files.name,
        "revision": files.revision,
        "sha256": files.sha256(),
        "dtypes": list(converted.source_dtypes),
    }
    return {
        **describe_encoder(source, converted.family, converted.config, converted.parameters, dtype),
        "heads_left_out": list(converted.left_out),
        "weights_ignored": list(converted.ignored),
        "config_keys_without_effect": list(converted.unread_keys),
        "versions": library_versions(),
    }


def describe_encoder(
    source: dict[str, Any], architecture: Architecture, config: Any, parameters: dict[str, Any], dtype: str
) -> dict[str, Any]:
    """The first part of every certificate: where the weights come from, and what they are.

    Args:
        source: ``name``, ``revision``, ``sha256`` by file and ``dtypes``, as far as there are any.
        architecture: of the encoder.
        config: its own configuration.
        parameters: nested dicts of arrays.
        dtype: their type.
    """
    return {
        "format": "mmei_jax encoder",
        "version": CERTIFICATE_VERSION,
        "source": source,
        "model_type": architecture.model_type,
        "architecture": asdict(config),
        "num_parameters": sum(leaf.size for leaf in jax.tree.leaves(parameters)),
        "dtype": dtype,
    }


def library_versions() -> dict[str, str]:
    """Versions of what makes and writes parameters."""
    return {name: importlib.metadata.version(name) for name in ("jax", "flax", "numpy", "safetensors")}


def write_folder(
    destination: Path,
    config: dict[str, Any],
    parameters: dict[str, Any],
    certificate: dict[str, Any],
    copied: Sequence[Path],
) -> dict[str, Any]:
    """Builds a folder for :func:`load` beside its place, and renames it when it is complete.

    Args:
        destination: folder to make.
        config: what its ``config.json`` will hold.
        parameters: nested dicts of arrays.
        certificate: without the hash of the parameters' file.
        copied: files of the preprocessing and the tokenizer.

    Returns:
        The certificate as written.
    """
    with new_folder(destination) as unfinished:
        save_file(flatten(parameters), unfinished / PARAMETERS_NAME, metadata={"format": "mmei_jax encoder"})
        for path in copied:
            shutil.copyfile(path, unfinished / path.name)
        certificate = {**certificate, "parameters_sha256": sha256_of(unfinished / PARAMETERS_NAME)}
        for name, content in ((CONFIG_NAME, config), (CERTIFICATE_NAME, certificate)):
            (unfinished / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return certificate


def main(arguments: Sequence[str] | None = None) -> int:
    """Converts a checkpoint; gives the exit status: 0, or 2 after one line on what is wrong."""
    from mmei_jax.command import report_errors

    parser = argparse.ArgumentParser(
        prog="python -m mmei_jax.encoders.pretrained",
        description="Convert a Hugging Face checkpoint to an encoder of mmei_jax, with a certificate. "
        "Reads safetensors and zip-form pytorch_model.bin, whole or sharded.",
        epilog=f"Model types: {', '.join(FAMILIES)}.",
    )
    parser.add_argument("source", help="folder with config.json and weights, or the id of a repository of the hub")
    parser.add_argument("destination", help="folder to make: parameters, config and certificate")
    parser.add_argument("--revision", help="branch, tag or commit of the repository")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="type of the parameters (float32)")
    parser.add_argument(
        "--compare",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="compare the outputs with Hugging Face's (default: where torch is installed)",
    )
    given = parser.parse_args(arguments)

    def run() -> int:
        certificate = convert(
            given.source, given.destination, revision=given.revision, dtype=given.dtype, compare=given.compare
        )
        print(_describe(certificate, given.destination))
        return 0

    return report_errors(run)


def _describe(certificate: dict[str, Any], destination: str) -> str:
    lines = [f"{destination}: {certificate['model_type']}, {certificate['num_parameters']:,} parameters"]
    if certificate["heads_left_out"]:
        lines.append(f"heads left out: {', '.join(certificate['heads_left_out'])}")
    comparison = certificate["comparison"]
    if isinstance(comparison, str):
        lines.append(f"comparison with Hugging Face: {comparison}")
    else:
        lines.append("largest absolute difference from Hugging Face:")
        lines += [f"  {stage:24} {value:.1e}" for stage, value in comparison["largest_absolute_difference"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
