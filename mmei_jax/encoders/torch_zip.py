"""Reads zip-form ``pytorch_model.bin`` files without torch, through an unpickler that finds a few names only.

A pickle is a program. All that this one may call is what :data:`_ALLOWED` lists: ordered dictionaries, and stand-ins of
ours for the two functions by which torch rebuilds tensors. A program that names anything else is refused. The numbers
themselves are separate files of the archive, which no program touches.
"""

import pickle
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from mmei_jax.types import InputError

_STORAGE_DTYPES: Mapping[str, np.dtype] = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": jnp.dtype("bfloat16"),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}

# What reading a damaged archive raises; torch neither compresses nor encrypts.
_DAMAGES = (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, OSError)


# The classes below have neither a __dict__ nor attributes that can be set: no program can change them afterwards.
class _StorageType(NamedTuple):
    dtype: np.dtype


class _Storage(NamedTuple):
    """A file of numbers in the archive."""

    key: str
    dtype: np.dtype
    num_values: int


class _Tensor(NamedTuple):
    """A view of a storage, as a program describes it; :func:`_is_sound` says whether it is one."""

    storage: Any
    offset: Any
    shape: Any
    strides: Any


class _RebuildTensor:
    """What stands for ``torch._utils._rebuild_tensor_v2``; gradients and hooks are left aside."""

    __slots__ = ()

    def __call__(self, storage: Any, offset: Any, shape: Any, strides: Any, *_unused: Any) -> _Tensor:
        return _Tensor(storage, offset, shape, strides)


class _RebuildParameter:
    """What stands for ``torch._utils._rebuild_parameter``."""

    __slots__ = ()

    def __call__(self, tensor: Any, *_unused: Any) -> Any:
        return tensor


_ALLOWED: Mapping[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _RebuildTensor(),
    ("torch._utils", "_rebuild_parameter"): _RebuildParameter(),
    **{("torch", name): _StorageType(dtype) for name, dtype in _STORAGE_DTYPES.items()},
}


class _Unpickler(pickle.Unpickler):
    """Finds what is in :data:`_ALLOWED` and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        found = _ALLOWED.get((module, name))
        if found is None:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not allowed")
        return found

    def persistent_load(self, pid: Any) -> _Storage:
        is_storage = isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage"
        if not (is_storage and isinstance(pid[1], _StorageType) and str(pid[2]).isdigit() and isinstance(pid[4], int)):
            raise pickle.UnpicklingError(f"a storage that torch does not write: {pid!r}")
        return _Storage(str(pid[2]), pid[1].dtype, pid[4])


def read_torch_zip(path: Path) -> dict[str, Callable[[], np.ndarray]]:
    """What reads each tensor of a state dict, by name.

    Args:
        path: file written by ``torch.save`` of version 1.6 or later.

    Raises:
        InputError: the file is not of that form, is damaged, or its pickle names a function that is not allowed.
    """
    if not zipfile.is_zipfile(path):
        raise InputError(f"{path}: not in torch's zip form (torch 1.6 and later); convert it to safetensors")
    try:
        state, folder = _read_program(path)
    except _DAMAGES as error:
        raise InputError(f"{path}: damaged: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise InputError(f"{path}: expected a state dict, tensors by name")
    wrong = sorted(name for name, tensor in state.items() if not _is_sound(tensor))
    if wrong:
        raise InputError(f"{path}: no tensors, or such as reach beyond their storage: {', '.join(wrong)}")
    return {name: _reader(path, folder, tensor) for name, tensor in state.items()}


def _read_program(path: Path) -> tuple[Any, str]:
    """What the archive's pickle makes, and the folder in which the archive has it."""
    with zipfile.ZipFile(path) as archive:
        programs = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(programs) != 1:
            raise InputError(f"{path}: expected one data.pkl in the archive, found {len(programs)}")
        folder = programs[0].removesuffix("data.pkl")
        if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
            raise InputError(f"{path}: not in little-endian byte order")
        with archive.open(programs[0]) as file:
            try:
                state = _Unpickler(file).load()
            # What a damaged or hostile program makes of the allowed functions.
            except (
                pickle.UnpicklingError,
                EOFError,
                IndexError,
                KeyError,
                TypeError,
                ValueError,
                AttributeError,
                OverflowError,
                MemoryError,
            ) as error:
                raise InputError(f"{path}: refused to unpickle: {error}") from error
    return state, folder


def _is_sound(tensor: Any) -> bool:
    """Whether it is a tensor within its storage."""
    if not (isinstance(tensor, _Tensor) and isinstance(tensor.storage, _Storage)):
        return False
    if not (isinstance(tensor.shape, tuple) and isinstance(tensor.strides, tuple)):
        return False
    numbers = (tensor.offset, *tensor.shape, *tensor.strides)
    if len(tensor.shape) != len(tensor.strides) or not all(type(number) is int and number >= 0 for number in numbers):
        return False
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True))
    return 0 in tensor.shape or tensor.offset + reach < tensor.storage.num_values


def _reader(path: Path, folder: str, tensor: _Tensor) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        storage: _Storage = tensor.storage
        name = f"{folder}data/{storage.key}"
        with zipfile.ZipFile(path) as archive:
            try:
                if archive.getinfo(name).file_size != storage.num_values * storage.dtype.itemsize:
                    raise InputError(f"{path}: {name} is not of the size that its tensors say")
                raw = archive.read(name)
            except (KeyError, *_DAMAGES) as error:
                raise InputError(f"{path}: {name}: {error}") from error
        values = np.frombuffer(raw, storage.dtype)
        if 0 in tensor.shape:
            return np.zeros(tensor.shape, storage.dtype)
        strides = tuple(stride * storage.dtype.itemsize for stride in tensor.strides)
        return np.lib.stride_tricks.as_strided(values[tensor.offset :], tensor.shape, strides, writeable=False)

    return read
