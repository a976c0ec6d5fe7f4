"""Operations of products, against counts by hand and XLA's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmei_jax.profiling.operations import read_operations, total_work
from mmei_jax.profiling.product_flops import product_flops
from mmei_jax.program_text import parse_program


def counted(function, *arguments):
    return product_flops(jax.make_jaxpr(function)(*arguments))


def test_gradient_of_a_product_costs_two_more_of_them():
    x, w = jnp.ones((8, 16)), jnp.ones((16, 32))

    def loss(x, w):
        return jnp.sum((x @ w) ** 2)

    assert counted(loss, x, w) == 2 * 8 * 16 * 32
    assert counted(jax.grad(loss, argnums=(0, 1)), x, w) == 3 * 2 * 8 * 16 * 32


def test_frozen_parameters_cost_no_gradient():
    x, w = jnp.ones((8, 16)), jnp.ones((16, 32))

    def loss(x, w):
        return jnp.sum((x @ jax.lax.stop_gradient(w)) ** 2)

    assert counted(jax.grad(loss), x, w) == 2 * 2 * 8 * 16 * 32


def test_scan_counts_each_turn_and_a_condition_its_dearest_branch():
    x = jnp.ones((4, 4))
    one = 2 * 4**3
    assert counted(lambda x: jax.lax.scan(lambda y, _: (jax.jit(jnp.matmul)(y, x), None), x, length=5)[0], x) == 5 * one
    branches = (lambda y: y @ y, lambda y: y @ y @ y, lambda y: y)
    assert counted(lambda y: jax.lax.switch(jnp.int32(0), branches, y), x) == 2 * one


def test_what_is_computed_again_is_counted_as_it_is_traced():
    x, w = jnp.ones((8, 16)), jnp.ones((16, 16))

    def layer(x, w):
        return jnp.sin(jnp.sin(x @ w) @ w)

    def loss(x, w, apply):
        return jnp.sum(apply(x, w))

    kept = counted(jax.grad(lambda x, w: loss(x, w, layer)), x, w)
    again = counted(jax.grad(lambda x, w: loss(x, w, jax.checkpoint(layer))), x, w)
    assert again > kept


@pytest.mark.parametrize("padding", [(0, 0), (5, 0), (-3, 2)], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"rhs_dilation": (3,)}, {"lhs_dilation": (2,)}, {"batch_group_count": 2}], ids=str
)
def test_convolution_counts_neither_padding_nor_holes(padding, options):
    """As XLA does, and as the text of the compiled program is counted; its two gradients likewise."""
    x, w = jnp.ones((2, 33, 8)), jnp.ones((3, 8, 6))

    def function(x, w):
        numbers = {"dimension_numbers": ("NWC", "WIO", "NWC")}
        return jax.lax.conv_general_dilated(x, w, (2,), [padding], **numbers, **options)

    compiled = jax.jit(function).lower(x, w).compile()
    assert counted(function, x, w) == compiled.cost_analysis()["flops"]
    assert counted(function, x, w) == total_work(read_operations(parse_program(compiled.as_text()))).product_flops
    # Each gradient multiplies the pairs that met.
    both = jax.grad(lambda x, w: jnp.sum(function(x, w) ** 2), argnums=(0, 1))
    assert counted(both, x, w) == 3 * counted(function, x, w)


@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 1), (1, 2)])
def test_convolution_costs_what_xla_says_without_padding(stride, groups):
    x, w = jnp.ones((2, 33, 8)), jnp.ones((3, 8 // groups, 6))

    def function(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (stride,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=groups
        )

    compiled = jax.jit(function).lower(x, w).compile().cost_analysis()
    num_outputs = (33 - 3) // stride + 1
    assert counted(function, x, w) == 2 * 2 * num_outputs * 3 * (8 // groups) * 6
    assert counted(function, x, w) == pytest.approx(compiled["flops"], rel=0.01)
    # Each of the two gradients costs as much.
    both = counted(jax.grad(lambda x, w: jnp.sum(function(x, w) ** 2), argnums=(0, 1)), x, w)
    assert both == 3 * counted(function, x, w)
    assert np.isfinite(both)
