"""How fast the devices multiply matrices and copy memory, measured: what a program's speed is held against."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

# Sides of the square matrices: large enough for the best rate.
_SIDE_ON_CPU, _SIDE = 2048, 8192
# Bytes that are copied on one accelerator, and on all devices that a processor is made to be: more than caches hold.
_BYTES_ON_CPU, _BYTES = 2**28, 2**30
_NUM_TIMES = 10


def matmul_rate(dtype: str, devices: Sequence[jax.Device] | None = None, *, side: int | None = None) -> float:
    """Operations per second of products of two square matrices, one on each device at once: the best of several.

    Args:
        dtype: of the matrices, and of the product.
        devices: all of them together; None takes the first alone.
        side: of the matrices; None takes one that is large enough for the kind of device.
    """
    devices = jax.devices()[:1] if devices is None else devices
    side = side or (_SIDE_ON_CPU if devices[0].platform == "cpu" else _SIDE)
    x = jnp.ones((side, side), dtype)
    product = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=dtype))
    return len(devices) * 2.0 * side**3 / _least_seconds(product, [(own, own) for own in _on_each(x, devices)])


def copy_rate(devices: Sequence[jax.Device] | None = None, *, num_bytes: int | None = None) -> float:
    """Bytes per second that are read and written together, on all devices at once: the best of several.

    Args:
        devices: all of them together; None takes the first alone.
        num_bytes: of the array on each; None takes one that no cache holds.
    """
    devices = jax.devices()[:1] if devices is None else devices
    if num_bytes is None:
        num_bytes = _BYTES_ON_CPU // len(devices) if devices[0].platform == "cpu" else _BYTES
    x = jnp.zeros(num_bytes // 4, jnp.float32)
    # A copy alone would be left out.
    add_one = jax.jit(lambda a: a + 1.0)
    return len(devices) * 2.0 * x.nbytes / _least_seconds(add_one, [(own,) for own in _on_each(x, devices)])


def _on_each(x: jax.Array, devices: Sequence[jax.Device]) -> list[jax.Array]:
    return [jax.device_put(x, device) for device in devices]


def _least_seconds(function: Callable[..., Any], arguments: Sequence[tuple[jax.Array, ...]]) -> float:
    """Seconds until all calls have ended, the least of several times."""
    jax.block_until_ready([function(*own) for own in arguments])
    best = math.inf
    for _ in range(_NUM_TIMES):
        started = time.perf_counter()
        jax.block_until_ready([function(*own) for own in arguments])
        best = min(best, time.perf_counter() - started)
    return best
