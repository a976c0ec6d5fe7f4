"""Where activations lie on the devices: a model names their dimensions, and whoever traces it says what a name means.

Models know no mesh. While a function is traced within :func:`placing`, every array that passes through :func:`placed`
is placed by its names; else the array passes as it is and leaves nothing in the program. ``sharding.place_activations``
places them by the table that places parameters.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from jaxtyping import Array, Shaped

# Logical axis names of an array's dimensions; None: never split.
AxisNames = tuple[str | None, ...]
Placement = Callable[[Array, AxisNames], Array]

_PLACEMENT: ContextVar[Placement | None] = ContextVar("placement of activations", default=None)


def placed(activation: Shaped[Array, "*shape"], *names: str | None) -> Shaped[Array, "*shape"]:
    """The activation, and its gradient, where its names say; as it is outside of :func:`placing`.

    Args:
        activation: any array of a traced function.
        names: a logical axis name for each of its dimensions ("batch", "heads", "mlp" ...), or None.
    """
    placement = _PLACEMENT.get()
    return activation if placement is None else placement(activation, names)


@contextmanager
def placing(placement: Placement) -> Iterator[None]:
    """What is traced meanwhile has its activations placed.

    Args:
        placement: gives back the array that it is given with its names, placed.
    """
    token = _PLACEMENT.set(placement)
    try:
        yield
    finally:
        _PLACEMENT.reset(token)
