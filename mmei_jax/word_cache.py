"""Keeps what a frozen encoder made of a catalogue's words from one command to the next, in the user's cache folder.

A file is ``$XDG_CACHE_HOME/mmei_jax/item_words/<key>.npy``, with a hash of all that decides over its content as the
key, and ends with the SHA-256 of its numbers, which is compared whenever it is read. A damaged file is not refused but
told and made anew: it is a copy of what the encoder gives again. It appears whole, whoever else writes it. Nothing is
ever removed: delete the folder to get rid of its size.
"""

import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from mmei_jax.compilation_cache import user_folder
from mmei_jax.fingerprints import canonical_json


def kept_states(
    source: dict[str, Any], shape: tuple[int, int], make: Callable[[], Float32[np.ndarray, "items words"]]
) -> Float32[np.ndarray, "items words"]:
    """What was made of a source before; else made now, and kept.

    Says in one line on standard error that a file is damaged, or that the folder cannot be used.

    Args:
        source: JSON values that decide over the states.
        shape: of the states.
        make: gives them.

    Returns:
        ``shape`` float32.
    """
    key = hashlib.sha256(canonical_json(source).encode()).hexdigest()
    path = user_folder(os.environ) / "item_words" / f"{key}.npy"
    found = _read(path, shape)
    if found is None:
        found = make()
        _write(path, found)
    return found


def _read(path: Path, shape: tuple[int, int]) -> np.ndarray | None:
    try:
        # A file of the disk, of which NumPy reads the array and no more.
        with path.open("rb") as file:
            found = np.load(file, allow_pickle=False)
            digest = file.read()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, EOFError) as error:
        reason = " ".join(str(error).split())
    else:
        if not isinstance(found, np.ndarray) or (found.shape, found.dtype) != (shape, np.float32):
            reason = f"expected float32 {shape}"
        elif digest != _digest(found):
            reason = "other numbers than its SHA-256 is of" if digest else "no SHA-256, as earlier versions left it"
        else:
            return found
    print(f"warning: {path}: damaged ({reason}): items are encoded anew", file=sys.stderr, flush=True)
    return None


def _digest(states: np.ndarray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(states).data).digest()


def _write(path: Path, states: np.ndarray) -> None:
    # Of its own, for two commands may write the same.
    partial = path.with_name(f"{path.stem}-{os.getpid()}.partial")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                np.save(file, states)
                file.write(_digest(states))
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or str(error)
        told = f"warning: {path.parent}: {reason}: what was made of items' words is not kept"
        print(f"{told}; XDG_CACHE_HOME names another folder", file=sys.stderr, flush=True)
