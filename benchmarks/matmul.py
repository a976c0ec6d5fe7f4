"""How many operations the matrix products of a program are."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr


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
