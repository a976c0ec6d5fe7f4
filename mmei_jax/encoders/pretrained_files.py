"""Finds and reads the files of a Hugging Face checkpoint: a local folder, or a repository of the hub."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import safetensors
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

from mmei_jax.encoders.preprocessing import FILE_NAME as PREPROCESSING_NAME
from mmei_jax.encoders.torch_zip import read_torch_zip
from mmei_jax.fingerprints import sha256_of
from mmei_jax.types import InputError

# In the order of preference. An index lists the files that hold the parts.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# What says how inputs are made: kept beside the weights where the source has it.
PREPROCESSING_FILES = (
    PREPROCESSING_NAME,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
)


@dataclass(frozen=True)
class Source:
    """Files of one checkpoint on this machine.

    Attributes:
        name: what the user gave.
        revision: commit of the hub's repository; None for a local folder.
        config_path: ``config.json``.
        weight_paths: files that hold the weights.
        preprocessing_paths: those of :data:`PREPROCESSING_FILES` that there are.
    """

    name: str
    revision: str | None
    config_path: Path
    weight_paths: tuple[Path, ...]
    preprocessing_paths: tuple[Path, ...]

    def read_config(self) -> dict[str, Any]:
        """What ``config.json`` holds.

        Raises:
            InputError: it is no JSON object.
        """
        return read_json(self.config_path)

    def sha256(self) -> dict[str, str]:
        """The hash of each file by its name."""
        paths = (self.config_path, *self.weight_paths, *self.preprocessing_paths)
        return {path.name: sha256_of(path) for path in paths}

    def tensors(self) -> dict[str, Callable[[], np.ndarray]]:
        """What reads each weight, by name.

        Raises:
            InputError: a file is damaged or holds what must not be read, or two files hold the same name.
        """
        tensors: dict[str, Callable[[], np.ndarray]] = {}
        for path in self.weight_paths:
            found = _read_safetensors(path) if path.suffix == ".safetensors" else read_torch_zip(path)
            twice = sorted(set(found) & set(tensors))
            if twice:
                raise InputError(f"{path}: {', '.join(twice)} stand in another file too")
            tensors |= found
        return tensors


def find_source(source: str, revision: str | None = None) -> Source:
    """The files of a checkpoint; those of the hub are downloaded into its cache.

    Args:
        source: a folder, or the id of a repository of the hub.
        revision: branch, tag or commit of the repository.

    Raises:
        InputError: there is no such folder or repository, or it lacks a file.
    """
    folder = Path(source)
    if folder.is_dir():
        if revision is not None:
            raise InputError(f"{source}: a local folder has no revision {revision!r}")

        def fetch(name: str) -> Path | None:
            return folder / name if (folder / name).is_file() else None

    elif re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) and not source.startswith("."):

        def fetch(name: str) -> Path | None:
            return _download(source, name, revision)

    else:
        raise InputError(
            f"{source}: neither a folder nor the id of a repository, such as google-bert/bert-base-uncased"
        )

    config_path = _required(fetch, "config.json", source)
    # The hub's cache has one folder per commit. All files are of the same one, whatever the branch does meanwhile.
    commit = None if folder.is_dir() else config_path.parent.name
    revision = commit
    for name in WEIGHT_FILES:
        path = fetch(name)
        if path is not None:
            parts = _parts(path) if path.suffix == ".json" else (name,)
            paths = tuple(path if part == name else _required(fetch, part, source) for part in parts)
            found = (fetch(name) for name in PREPROCESSING_FILES)
            return Source(source, commit, config_path, paths, tuple(path for path in found if path is not None))
    raise InputError(f"{source}: has no weights; expected {' or '.join(WEIGHT_FILES)}")


def _required(fetch: Callable[[str], Path | None], name: str, source: str) -> Path:
    path = fetch(name)
    if path is None:
        raise InputError(f"{source}: has no {name}")
    return path


def _download(repository: str, name: str, revision: str | None) -> Path | None:
    try:
        return Path(huggingface_hub.hf_hub_download(repository, name, revision=revision))
    except LocalEntryNotFoundError as error:
        # Out of reach: what the cache lacks may not exist. Without config.json nothing of the repository is there.
        if name == "config.json":
            raise InputError(f"{repository}: no folder, not in the hub's cache, and the hub is out of reach") from error
        return None
    except EntryNotFoundError:
        return None
    except (HfHubHTTPError, huggingface_hub.errors.HFValidationError) as error:
        raise InputError(f"{repository}: not a folder, and the hub says: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
        InputError: it holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: no JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object")
    return content


def read_preprocessing(folder: Path) -> dict[str, Any]:
    """The checkpoint's ``preprocessor_config.json``.

    Raises:
        InputError: it is missing or no JSON object.
    """
    path = folder / PREPROCESSING_NAME
    if not path.is_file():
        wanted = "put the checkpoint's own there, or convert it again with it"
        raise InputError(f"{folder}: has no {PREPROCESSING_NAME}: {wanted}")
    return read_json(path)


def _parts(index: Path) -> tuple[str, ...]:
    """Names of the files that an index lists."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: expected a weight_map from weights to files")
    names = sorted({str(name) for name in weight_map.values()})
    outside = [name for name in names if not re.fullmatch(r"[\w.-]+\.(safetensors|bin)", name)]
    if outside:
        raise InputError(f"{index}: {outside[0]!r} is not the name of a file beside it")
    return tuple(names)


def _read_safetensors(path: Path) -> dict[str, Callable[[], np.ndarray]]:
    def reader(name: str) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            with safetensors.safe_open(path, framework="numpy") as file:
                return np.asarray(file.get_tensor(name))

        return read

    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            names = file.keys()
    except safetensors.SafetensorError as error:
        raise InputError(f"{path}: {error}") from error
    return {name: reader(name) for name in names}
