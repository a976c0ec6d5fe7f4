"""Frozen dataclasses from nested dicts of values, with every value's type and choice checked."""

import dataclasses
import math
import re
import types
import typing
from typing import Any, Literal

from mmei_jax.types import InputError


def build(cls: type, values: Any, key: str) -> Any:
    """Makes the dataclass ``cls`` of nested dicts, as :func:`parse` does; ``key`` is the name that messages start with.

    Raises:
        InputError: a key is unknown or missing, or a value has the wrong type or is not among the choices; names it.
    """
    if not isinstance(values, dict):
        raise InputError(f"{key} = {values!r}: expected a group of keys")
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise InputError(f"{key}.{unknown[0]}: unknown key; {key} accepts {', '.join(hints)}")
    missing = [name for name in hints if name not in values]
    if missing:
        raise InputError(f"{key}.{missing[0]}: missing key")
    return cls(**{name: _convert(hint, values[name], f"{key}.{name}") for name, hint in hints.items()})


def _convert(hint: Any, value: Any, key: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, key)
    origin = typing.get_origin(hint)
    if origin is Literal:
        if value not in typing.get_args(hint):
            choices = ", ".join(repr(choice) for choice in typing.get_args(hint))
            raise InputError(f"{key} = {value!r}: expected one of {choices}")
        return value
    if origin is tuple:
        return _convert_tuple(hint, value, key)
    if origin is dict:
        # Of plain JSON values, which nothing is asked of.
        hint = dict
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{key} = {value!r}: expected a finite number")
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise InputError(f"{key} = {value!r}: expected {hint.__name__}, got {type(value).__name__}")
    return value


def _convert_tuple(hint: types.GenericAlias, value: Any, key: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise InputError(f"{key} = {value!r}: expected a tuple")
    arguments = typing.get_args(hint)
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(_convert(arguments[0], item, f"{key}[{index}]") for index, item in enumerate(value))
    if len(value) != len(arguments):
        raise InputError(f"{key} = {value!r}: expected {len(arguments)} values")
    pairs = zip(arguments, value, strict=True)
    return tuple(_convert(kind, item, f"{key}[{index}]") for index, (kind, item) in enumerate(pairs))


def require(is_good: bool, key: str, value: Any, accepted: str) -> None:
    """Raises InputError that names ``config.<key>``, its value and what is accepted, unless ``is_good``."""
    if not is_good:
        raise InputError(f"config.{key} = {value!r}: expected {accepted}")


def compiled_pattern(pattern: str, key: str) -> re.Pattern[str]:
    """The regular expression that ``config.<key>`` holds.

    Raises:
        InputError: it is none; names the key.
    """
    try:
        return re.compile(pattern)
    except re.error as error:
        raise InputError(f"config.{key}: {pattern!r} is no regular expression: {error}") from None
