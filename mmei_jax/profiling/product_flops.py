"""Floating-point operations of the matrix products and convolutions of a program, counted before any compiler sees it.

That is what "model FLOPs" means in a model FLOPs utilisation (MFU): what is asked for, each product once for every
time a loop runs it, and nothing that a compiler adds or computes again.
"""

import math
from collections.abc import Iterator
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr


def product_flops(program: Any) -> float:
    """Operations of all products of a traced function, two for each multiplication with its addition.

    Of a condition the branch with most counts; the body of a loop of unknown length counts once.

    Args:
        program: what ``jax.make_jaxpr(function)(*arguments)`` gives, or ``jax.jit(function).trace(*arguments).jaxpr``.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> loop = lambda x: jax.lax.fori_loop(0, 3, lambda _, y: y @ x, x)
        >>> product_flops(jax.make_jaxpr(loop)(jnp.zeros((4, 4)))) == 3 * 2 * 4**3
        True
    """
    jaxpr: Any = program.jaxpr if isinstance(program, ClosedJaxpr) else program
    return sum((_equation_flops(equation) for equation in jaxpr.eqns), 0.0)


def _equation_flops(equation: Any) -> float:
    name, parameters = equation.primitive.name, equation.params
    if name == "dot_general":
        return _dot_flops(equation)
    if name == "conv_general_dilated":
        return _convolution_flops(equation)
    inner = [product_flops(program) for program in _programs(list(parameters.values()))]
    if name == "cond":
        return max(inner, default=0.0)
    return sum(inner, 0.0) * (parameters["length"] if name == "scan" else 1)


def _dot_flops(equation: Any) -> float:
    left = equation.invars[0].aval.shape
    (contracted, _), _ = equation.params["dimension_numbers"]
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _convolution_flops(equation: Any) -> float:
    window = equation.invars[1].aval.shape
    numbers = equation.params["dimension_numbers"]
    # Of a window all but its output features; zeros that dilation puts between the inputs are no work.
    per_output = math.prod(window) // window[numbers.rhs_spec[0]]
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * per_output / math.prod(equation.params["lhs_dilation"])


def _programs(values: Any) -> Iterator[Any]:
    """The programs among the parameters of an operation."""
    for value in values:
        if isinstance(value, ClosedJaxpr | Jaxpr):
            yield value
        elif isinstance(value, list | tuple):
            yield from _programs(value)
