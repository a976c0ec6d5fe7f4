"""Floating-point operations of the matrix products and convolutions of a program, counted before any compiler sees it.

That is what "model FLOPs" means in a model FLOPs utilisation (MFU): what is asked for, each product once for every
time a loop runs it, and nothing that a compiler adds or computes again.

Of a convolution, padding and the holes of a dilation are not counted: nothing has to be multiplied there. XLA's cost
analysis counts so, and so does :mod:`mmei_jax.profiling.operations` in compiled programs.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr


@dataclass(frozen=True)
class WindowAxis:
    """One of the axes along which a convolution moves its kernel.

    Attributes:
        num_inputs: numbers of the input.
        num_kernel: of the kernel.
        num_outputs: of the output.
        stride: from one output to the next.
        low_padding: zeros before the input; negative where so many of its numbers are left out.
        input_dilation: from one number of the input to the next, zeros between.
        kernel_dilation: from one number of the kernel to the next.
    """

    num_inputs: int
    num_kernel: int
    num_outputs: int
    stride: int = 1
    low_padding: int = 0
    input_dilation: int = 1
    kernel_dilation: int = 1

    def num_meetings(self) -> int:
        """Pairs of a number of the input and one of the kernel that are multiplied: neither padding nor holes.

        Example:
            >>> WindowAxis(num_inputs=5, num_kernel=3, num_outputs=5, low_padding=1).num_meetings()
            13
        """
        place = np.arange(self.num_outputs)[:, None] * self.stride - self.low_padding
        position = place + np.arange(self.num_kernel) * self.kernel_dilation
        meets = (position % self.input_dilation == 0) & (position >= 0)
        return int(np.count_nonzero(meets & (position < self.num_inputs * self.input_dilation)))


def convolution_flops(batch: int, in_features: int, out_features: int, axes: Iterable[WindowAxis]) -> float:
    """Operations of a convolution, two for each multiplication with its addition.

    Args:
        batch: of the input; where the batch is in groups, of one of them.
        in_features: of the kernel, which are those of one group of the input's.
        out_features: of all groups.
        axes: of the window.
    """
    return 2.0 * batch * in_features * out_features * math.prod(axis.num_meetings() for axis in axes)


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
    given = equation.params
    inputs, kernel = (variable.aval.shape for variable in equation.invars)
    outputs, numbers = equation.outvars[0].aval.shape, given["dimension_numbers"]
    axes = [
        WindowAxis(
            # Batch and features come first in these, then the axes of the window.
            inputs[numbers.lhs_spec[2 + axis]],
            kernel[numbers.rhs_spec[2 + axis]],
            outputs[numbers.out_spec[2 + axis]],
            given["window_strides"][axis],
            given["padding"][axis][0],
            given["lhs_dilation"][axis],
            given["rhs_dilation"][axis],
        )
        for axis in range(len(outputs) - 2)
    ]
    batch = inputs[numbers.lhs_spec[0]] // given["batch_group_count"]
    return convolution_flops(batch, kernel[numbers.rhs_spec[1]], kernel[numbers.rhs_spec[0]], axes)


def _programs(values: Any) -> Iterator[Any]:
    """The programs among the parameters of an operation."""
    for value in values:
        if isinstance(value, ClosedJaxpr | Jaxpr):
            yield value
        elif isinstance(value, list | tuple):
            yield from _programs(value)
