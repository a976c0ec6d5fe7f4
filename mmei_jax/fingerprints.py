"""Hashes that tell files, JSON values and parameters apart."""

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mmei_jax.types import InputError


def canonical_json(values: Any) -> str:
    """The same text for equal values: sorted keys, no spaces, no NaN."""
    return json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def sha256_of(path: Path) -> str:
    """The hash of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_hash(path: Path, sha256: str, noted_in: str = "the manifest") -> None:
    """Raises InputError unless the file's SHA-256 is ``sha256``, which stands in ``noted_in``."""
    found = sha256_of(path)
    if found != sha256:
        raise InputError(f"{path}: SHA-256 {found[:16]}..., {noted_in} says {sha256[:16]}...: the file was changed")


def parameters_hash(parameters: Any, settings: dict[str, Any]) -> str:
    """SHA-256 over names, types, shapes and bytes of parameters, and over settings.

    Args:
        parameters: tree of arrays.
        settings: JSON values that change what the parameters give.
    """
    digest = hashlib.sha256(canonical_json(settings).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(parameters):
        values = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {values.dtype} {values.shape}".encode())
        digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()
