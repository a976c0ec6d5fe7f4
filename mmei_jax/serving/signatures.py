"""What a function that is exported takes: parameters by group, inputs by name, sizes that differ from call to call."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from mmei_jax.serving.manifest import Size, Tensor

BATCH = Size("batch", 1, 0)


@dataclass(frozen=True)
class Parameters:
    """A group of parameters, on the host.

    Attributes:
        arrays: by name.
        settings: JSON values that they were trained or made with.
    """

    arrays: Mapping[str, np.ndarray]
    settings: dict[str, Any]


@dataclass(frozen=True)
class Function:
    """A function to be exported.

    Attributes:
        function: ``(parameters by group and name, inputs by name) -> outputs by name``.
        groups: its parameters.
        sizes: that differ from call to call.
        inputs: as the manifest describes them.
        meanings: of outputs.
        item_ids: of rows that it gives; None where it gives none.
    """

    function: Callable[[dict[str, dict[str, Any]], dict[str, Any]], dict[str, Any]]
    groups: Mapping[str, Parameters]
    sizes: tuple[Size, ...]
    inputs: tuple[Tensor, ...]
    meanings: Mapping[str, str]
    item_ids: tuple[str | None, ...] | None = None


def segment_ids(tokens: Array, lengths: Int[Array, "rows"]) -> Int[Array, "rows tokens"]:
    """1 for a row's first tokens, 0 for what follows them.

    Args:
        tokens: ``[rows, tokens, ...]``.
        lengths: tokens of each row that count.
    """
    return (jnp.arange(tokens.shape[1])[None] < lengths[:, None]).astype(jnp.int32)
