"""Reads a Hugging Face ``config.json``: its defaults, and the features that are refused by name."""

from collections.abc import Mapping
from typing import Any

from mmei_jax.types import InputError


class ConfigReader:
    """Looks up keys of a configuration, and remembers which."""

    def __init__(self, config: Mapping[str, Any], model_type: str) -> None:
        """Takes a configuration of the given ``model_type``.

        Raises:
            InputError: it is of another type, brings code of its own, or is that of a quantised checkpoint.
        """
        self._config = config
        self._asked = {"model_type"}
        found = config.get("model_type")
        if found != model_type:
            raise InputError(f"config.json: model_type = {found!r}: expected {model_type!r}")
        self.refuse("auto_map", None)
        self.refuse("quantization_config", None)

    def get(self, key: str, default: Any) -> Any:
        """The value of a key, of the default's kind; the default where the key is missing.

        Raises:
            InputError: the value is of another kind.
        """
        self._asked.add(key)
        value = self._config.get(key, default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        fits = isinstance(value, type(default)) and isinstance(value, bool) == isinstance(default, bool)
        if isinstance(default, float):
            fits = is_number
            value = float(value) if is_number else value
        if not fits:
            raise InputError(f"config.json: {key} = {value!r}: expected a {type(default).__name__}")
        return value

    def get_or_none(self, key: str, kind: type) -> Any:
        """The value of a key that may be null or missing.

        Raises:
            InputError: the value is neither null nor of the kind.
        """
        self._asked.add(key)
        value = self._config.get(key)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise InputError(f"config.json: {key} = {value!r}: expected null or a value of type {kind.__name__}")
        return value

    def get_pair(self, key: str, default: int) -> tuple[int, int]:
        """The value of a key that holds one whole number for both directions, or two (height, width).

        Raises:
            InputError: the value is something else.
        """
        if isinstance(self._config.get(key), list | tuple):
            values = self.get_list(key, (default, default))
            if len(values) != 2:
                raise InputError(f"config.json: {key} = {list(values)}: expected one or two whole numbers")
            return values[0], values[1]
        value = self.get(key, default)
        return value, value

    def get_list(self, key: str, default: tuple[int, ...]) -> tuple[int, ...]:
        """The value of a key that holds whole numbers.

        Raises:
            InputError: the value is something else.
        """
        self._asked.add(key)
        value = self._config.get(key, default)
        if not isinstance(value, list | tuple) or not all(type(item) is int for item in value):
            raise InputError(f"config.json: {key} = {value!r}: expected whole numbers")
        return tuple(value)

    def refuse(self, key: str, *accepted: Any) -> None:
        """Refuses a configuration that sets ``key`` to something else than the accepted values.

        Raises:
            InputError: names the key and its value.
        """
        self._asked.add(key)
        value = self._config.get(key, accepted[0])
        if value not in accepted:
            wanted = " or ".join(repr(item) for item in accepted)
            raise InputError(f"config.json: {key} = {value!r} is not implemented; expected {wanted}, or no such key")

    @property
    def unread(self) -> list[str]:
        """Keys of the configuration that no call has asked for, sorted."""
        return sorted(set(self._config) - self._asked)
