"""How fast this machine multiplies matrices, and how much of that a program does."""

import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr


def matmul_rate(dtype: str) -> float:
    """Operations per second of a product of two square matrices: the best of several."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    x = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=dtype))
    product(x, x).block_until_ready()
    best = math.inf
    for _ in range(10):
        started = time.perf_counter()
        product(x, x).block_until_ready()
        best = min(best, time.perf_counter() - started)
    return 2.0 * size**3 / best


def matmul_operations(function: Callable[..., Any], *arguments: Any) -> float:
    """Multiplications and additions in the matrix products and convolutions of one call."""
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, Jaxpr | ClosedJaxpr)


def _count(jaxpr: Any) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            lhs = equation.invars[0].aval.shape
            total += 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(lhs[axis] for axis in contracted)
        if equation.primitive.name == "conv_general_dilated":
            # Each output value reads a window of its group's channels.
            out_axis = equation.params["dimension_numbers"].rhs_spec[0]
            kernel = equation.invars[1].aval.shape
            window = math.prod(kernel) // kernel[out_axis]
            total += 2.0 * math.prod(equation.outvars[0].aval.shape) * window
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        inner = jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr)
        total += times * sum(_count(getattr(value, "jaxpr", value)) for value in inner if _is_jaxpr(value))
    return total
