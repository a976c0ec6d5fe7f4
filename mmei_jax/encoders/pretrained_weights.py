"""From a checkpoint's weights to our parameters, strict both ways."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from mmei_jax.encoders.architectures import Architecture
from mmei_jax.encoders.hugging_face_config import ConfigReader
from mmei_jax.encoders.pretrained_tables import FAMILIES, Family, Weight
from mmei_jax.types import InputError

# Reads one weight when it is needed, so that a checkpoint is never in memory twice.
Tensors = Mapping[str, Callable[[], np.ndarray]]


@dataclass(frozen=True)
class Converted:
    """A checkpoint in our names.

    Attributes:
        family: its kind.
        config: our configuration.
        parameters: nested dicts of arrays, one entry per layer.
        left_out: names of the weights of heads.
        ignored: names of the weights that hold nothing learned or that encoding does not use.
        unread_keys: keys of ``config.json`` that change nothing about encoding.
        source_dtypes: types of the weights as stored.
    """

    family: Family
    config: Any
    parameters: dict[str, Any]
    left_out: tuple[str, ...]
    ignored: tuple[str, ...]
    unread_keys: tuple[str, ...]
    source_dtypes: tuple[str, ...]


def convert_weights(config: Mapping[str, Any], tensors: Tensors, dtype: str = "float32") -> Converted:
    """Our parameters from a configuration and weights of Hugging Face's.

    Args:
        config: what ``config.json`` holds.
        tensors: weights by name, as stored: of a base model, or of a task model, whose heads are left out.
        dtype: type of the parameters.

    Raises:
        InputError: the architecture is not implemented, or weights are missing, unexpected or of another shape; lists
            all of them.
    """
    family = FAMILIES.get(config.get("model_type", ""))
    if family is None:
        known = ", ".join(FAMILIES)
        raise InputError(
            f"config.json: model_type = {config.get('model_type')!r} is not implemented; there are {known}"
        )
    base, left_out, ignored, unexpected = _sort_names(family, tensors)
    reader = ConfigReader(config, family.model_type)
    has_pooler = family.pooler is not None and any(name.startswith(family.pooler) for name in base)
    ours = family.read_config(reader, **({"has_pooler": has_pooler} if family.pooler else {}))
    table = family.table(ours)
    parameters, dtypes = _fill(
        family, ours, table, {name: tensors[theirs] for name, theirs in base.items()}, unexpected, dtype
    )
    return Converted(
        family, ours, parameters, tuple(left_out), tuple(ignored), tuple(reader.unread), tuple(sorted(dtypes))
    )


def _sort_names(family: Family, tensors: Tensors) -> tuple[dict[str, str], list[str], list[str], list[str]]:
    """Names of the base model, by the table's spelling; those of heads; those that are ignored; all others."""
    is_task_checkpoint = any(name.startswith(family.prefix) for name in tensors)
    base: dict[str, str] = {}
    left_out, ignored, unexpected = [], [], []
    for theirs in sorted(tensors):
        name = theirs.removeprefix(family.prefix)
        for pattern, replacement in family.renamings:
            name = re.sub(pattern, replacement, name)
        is_base = theirs.startswith(family.prefix) or not is_task_checkpoint
        if any(re.fullmatch(pattern, name) for pattern in family.ignored):
            ignored.append(theirs)
        elif is_base and name not in base:
            base[name] = theirs
        elif not is_base and theirs.split(".")[0] in family.heads:
            left_out.append(theirs)
        else:
            unexpected.append(theirs)
    return base, left_out, ignored, unexpected


def _fill(
    family: Family,
    config: Any,
    table: Mapping[str, Weight],
    tensors: Tensors,
    unexpected: Sequence[str],
    dtype: str,
) -> tuple[dict[str, Any], set[str]]:
    """Our parameters as nested dicts, and the types of what they were made of; a mismatch raises with the full list."""
    shapes = parameter_shapes(family, config)
    if set(table) != set(shapes):
        raise AssertionError(f"the table of {family.model_type} and its module differ: {set(table) ^ set(shapes)}")
    table = {
        ours: weight.instead if weight.instead and set(weight.instead.names) <= set(tensors) else weight
        for ours, weight in table.items()
    }
    wanted = {name for weight in table.values() for name in weight.names}
    problems = [f"missing {name}" for name in sorted(wanted - set(tensors))]
    problems += [f"unexpected {name}" for name in sorted({*unexpected, *(set(tensors) - wanted)})]
    parameters: dict[str, np.ndarray] = {}
    dtypes: set[str] = set()
    for ours, weight in table.items():
        if not set(weight.names) <= set(tensors):
            continue
        arrays = [tensors[name]() for name in weight.names]
        dtypes |= {str(array.dtype) for array in arrays}
        try:
            array = weight.combine(*arrays)
        except ValueError as error:
            problems.append(f"{' and '.join(weight.names)}: {error}")
            continue
        if array.shape != shapes[ours]:
            theirs = " and ".join(
                f"{name} {list(array.shape)}" for name, array in zip(weight.names, arrays, strict=True)
            )
            problems.append(f"{theirs} gives {ours} {list(array.shape)}, expected {list(shapes[ours])}")
            continue
        try:
            parameters[ours] = as_type(ours, array, dtype)
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise InputError(f"the weights do not fit config.json: {'; '.join(problems)}")
    return unflatten(parameters), dtypes


def as_type(name: str, array: np.ndarray, dtype: str) -> np.ndarray:
    """A parameter in another type, rounded to the nearest number.

    Args:
        name: the parameter's, for the error.
        array: its values.
        dtype: the type.

    Raises:
        InputError: a finite value is beyond what the type holds.
    """
    with np.errstate(over="ignore"):
        cast = np.ascontiguousarray(array, dtype=jnp.dtype(dtype))
    is_lost = ~np.isfinite(cast) & np.isfinite(array)
    if is_lost.any():
        largest = float(np.abs(array[is_lost].astype(np.float32)).max())
        raise InputError(f"{name} holds {largest:g}, too large for {dtype}; expected dtype bfloat16 or float32")
    return cast


def parameter_shapes(architecture: Architecture, config: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of the module's parameters by name, with slashes."""
    module = architecture.make_module(config)
    inputs: dict[str, Any] = dict(architecture.example(config))
    variables = jax.eval_shape(lambda: module.init(jax.random.key(0), **inputs))
    return {name: leaf.shape for name, leaf in flatten(nn.meta.unbox(variables["params"])).items()}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of nested mappings by their names, joined with slashes."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}/") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`flatten`."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *folders, last = name.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = value
    return tree
