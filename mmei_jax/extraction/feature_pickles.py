"""Reads pickled feature files without running them: arrays, texts, numbers, and plain containers of these.

A pickle is a program. All that this one may call is what :data:`_ALLOWED` lists: stand-ins of ours for the functions by
which NumPy rebuilds arrays, dtypes and scalars. They only note what they are given; arrays are made, and checked, when
the program has ended. A program that names anything else is refused, by that name.
"""

import math
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmei_jax.types import InputError

# Floats, whole numbers, booleans, texts, bytes; "O" holds texts and numbers, each pickled by itself.
_DTYPE = re.compile(r"[fiubUS][1-9]\d{0,5}|O8?")
_MAX_DEPTH = 8
_DAMAGES = (
    pickle.UnpicklingError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    ValueError,
    AttributeError,
    OverflowError,
    MemoryError,
    RecursionError,
)


# A program gets instances of the classes below and never a class, and an instance has no attribute that it could set
# but through the instance's own __setstate__: nothing of this module is changed by what it reads.
class _Dtype:
    """What stands for a ``numpy.dtype``: its code, and its byte order from its state."""

    __slots__ = ("_code", "_order")

    def __init__(self, code: Any) -> None:
        if not isinstance(code, str) or not _DTYPE.fullmatch(code):
            raise pickle.UnpicklingError(f"an array of type {code!r}, which is not allowed")
        self._code = code
        self._order = "="

    def __setstate__(self, state: Any) -> None:
        # (version, byte order, subarray, names, fields, size, ...): names and fields would make it a record.
        if not isinstance(state, tuple) or len(state) < 5 or state[1] not in ("<", ">", "|", "="):
            raise pickle.UnpicklingError(f"an array type in a state that NumPy does not write: {state!r}")
        if any(part is not None for part in state[2:5]):
            raise pickle.UnpicklingError("an array of records, which is not allowed")
        self._order = state[1]

    def resolve(self) -> np.dtype[Any]:
        return np.dtype(self._code if self._order == "|" else self._order + self._code)


class _Array:
    """What stands for an array: the parts from which :meth:`resolve` makes it."""

    __slots__ = ("_parts",)

    def __init__(self, *parts: Any) -> None:
        # Shape, dtype, whether columns come first, and the content.
        self._parts = parts

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise pickle.UnpicklingError("an array in a state that NumPy does not write")
        self._parts = state[1:]

    def resolve(self, memo: dict[int, Any], depth: int) -> np.ndarray:
        if len(self._parts) != 4:
            raise pickle.UnpicklingError("an array without content")
        shape, dtype, is_fortran, content = self._parts
        is_shape = isinstance(shape, tuple) and all(type(size) is int and size >= 0 for size in shape)
        if not is_shape or not isinstance(dtype, _Dtype):
            raise pickle.UnpicklingError("an array whose shape or type is none")
        order: Any = "F" if is_fortran else "C"
        kind = dtype.resolve()
        if kind.kind == "O":
            return _object_array(shape, content, order, memo, depth)
        if not isinstance(content, bytes | bytearray) or len(content) != math.prod(shape) * kind.itemsize:
            raise pickle.UnpicklingError(f"an array of shape {shape} whose content has another size")
        return np.frombuffer(content, kind).reshape(shape, order=order) if content else np.zeros(shape, kind)


def _object_array(shape: tuple[int, ...], content: Any, order: Any, memo: dict[int, Any], depth: int) -> np.ndarray:
    if not isinstance(content, list) or len(content) != math.prod(shape):
        raise pickle.UnpicklingError(f"an array of shape {shape} whose content has another size")
    array = np.empty(len(content), object)
    for index, item in enumerate(content):
        array[index] = _resolve(item, memo, depth + 1)
    return array.reshape(shape, order=order)


class _Scalar(NamedTuple):
    """What stands for a NumPy number or text."""

    dtype: Any
    content: Any

    def resolve(self) -> Any:
        if not isinstance(self.dtype, _Dtype) or not isinstance(self.content, bytes | bytearray):
            raise pickle.UnpicklingError("a number without type or content")
        kind = self.dtype.resolve()
        if kind.kind == "O" or len(self.content) != kind.itemsize:
            raise pickle.UnpicklingError("a number whose content has another size")
        return np.frombuffer(self.content, kind)[0].item()


class _MakeDtype:
    """Stands for ``numpy.dtype``."""

    __slots__ = ()

    def __call__(self, code: Any, *_unused: Any) -> _Dtype:
        return _Dtype(code)


class _MakeScalar:
    """Stands for ``scalar``."""

    __slots__ = ()

    def __call__(self, dtype: Any, content: Any) -> _Scalar:
        return _Scalar(dtype, content)


class _Reconstruct:
    """Stands for ``_reconstruct``, which makes an empty array that its state fills."""

    __slots__ = ()

    def __call__(self, *_unused: Any) -> _Array:
        return _Array()


class _FromBuffer:
    """Stands for ``_frombuffer``, by which protocol 5 makes arrays."""

    __slots__ = ()

    def __call__(self, content: Any, dtype: Any, shape: Any, order: Any) -> _Array:
        return _Array(shape, dtype, order == "F", content)


class _Encode:
    """Stands for ``_codecs.encode``, by which old protocols write bytes."""

    __slots__ = ()

    def __call__(self, text: Any, encoding: Any = "latin1") -> bytes:
        if not isinstance(text, str) or encoding != "latin1":
            raise pickle.UnpicklingError("bytes in an encoding that pickle does not write")
        return text.encode("latin1")


class _NoBytes:
    """Stands for ``bytes``, by which old protocols write none of them."""

    __slots__ = ()

    def __call__(self) -> bytes:
        return b""


class _ArrayType(NamedTuple):
    """Stands for ``numpy.ndarray``, which is only named."""


_CORES = ("numpy.core", "numpy._core")
_ALLOWED: Mapping[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _ArrayType(),
    ("numpy", "dtype"): _MakeDtype(),
    ("_codecs", "encode"): _Encode(),
    ("builtins", "bytes"): _NoBytes(),
    ("__builtin__", "bytes"): _NoBytes(),
    **{(f"{core}.multiarray", "_reconstruct"): _Reconstruct() for core in _CORES},
    **{(f"{core}.multiarray", "scalar"): _MakeScalar() for core in _CORES},
    **{(f"{core}.numeric", "_frombuffer"): _FromBuffer() for core in _CORES},
}


class _Unpickler(pickle.Unpickler):
    """Finds what is in :data:`_ALLOWED` and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        found = _ALLOWED.get((module, name))
        if found is None:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not allowed")
        return found


def read_feature_pickle(path: Path) -> Any:
    """What a pickle of arrays, texts, numbers and plain containers holds.

    Args:
        path: file written by ``pickle.dump``, any protocol. Its arrays are read as they lie in memory: a file needs its
            own size once.

    Returns:
        Dicts, lists and tuples of texts, numbers, booleans, bytes, None, and arrays, which are read-only; NumPy's
        numbers as Python's.

    Raises:
        InputError: the file is missing or damaged, or its program names something that is not allowed; names it.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    with path.open("rb") as stream:
        try:
            return _resolve(_Unpickler(stream).load(), {}, 0)
        except _DAMAGES as error:
            raise InputError(f"{path}: refused to unpickle: {error or type(error).__name__}") from error


def _resolve(value: Any, memo: dict[int, Any], depth: int) -> Any:
    """The value with arrays and numbers in place of what stands for them; shared parts are made once."""
    if value is None or isinstance(value, str | int | float | bytes | bytearray):
        return value
    if id(value) in memo:
        return memo[id(value)]
    if depth > _MAX_DEPTH:
        raise pickle.UnpicklingError(f"containers within containers, more than {_MAX_DEPTH} deep")
    found: Any
    if isinstance(value, _Array):
        found = value.resolve(memo, depth)
    elif isinstance(value, _Scalar):
        found = value.resolve()
    elif isinstance(value, dict):
        found = {_resolve(key, memo, depth + 1): _resolve(item, memo, depth + 1) for key, item in value.items()}
    elif isinstance(value, list | tuple):
        found = type(value)(_resolve(item, memo, depth + 1) for item in value)
    else:
        raise pickle.UnpicklingError(f"a {type(value).__name__}, which is not allowed")
    memo[id(value)] = found
    return found
