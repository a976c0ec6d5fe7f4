"""Grouped convolutions on CPUs, where each group is computed alone."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mmei_jax.encoders.convolution import Convolution

NUM_GROUPS = 4
CONVOLUTION = Convolution(24, (6,), (1,), padding=((3, 2),), num_groups=NUM_GROUPS, use_bias=False)


def test_a_grouped_convolution_and_its_gradients_equal_those_of_one_operation_of_xla():
    x = jax.random.normal(jax.random.key(0), (2, 19, 24))
    kernel = jax.random.normal(jax.random.key(1), (6, 6, 24))

    def ours(x, kernel):
        return CONVOLUTION.apply({"params": {"kernel": kernel}}, x)

    def in_one_operation(x, kernel):
        layout = ("NWC", "WIO", "NWC")
        return lax.conv_general_dilated(x, kernel, (1,), ((3, 2),), None, None, layout, NUM_GROUPS)

    def squares(convolve):
        return lambda x, kernel: (convolve(x, kernel) ** 2).sum()

    np.testing.assert_allclose(ours(x, kernel), in_one_operation(x, kernel), rtol=1e-5, atol=1e-5)
    found = jax.grad(squares(ours), argnums=(0, 1))(x, kernel)
    expected = jax.grad(squares(in_one_operation), argnums=(0, 1))(x, kernel)
    for each, other in zip(found, expected, strict=True):
        assert jnp.linalg.norm(each - other) <= 1e-6 * jnp.linalg.norm(other)


def test_on_cpus_neither_it_nor_its_gradient_is_a_grouped_operation():
    # XLA has no fast kernel there for the kernel's gradient, an operation with groups of rows.
    x, kernel = jnp.ones((2, 19, 24)), jnp.ones((6, 6, 24))
    gradient = jax.grad(lambda x, kernel: CONVOLUTION.apply({"params": {"kernel": kernel}}, x).sum(), argnums=(0, 1))
    text = jax.jit(gradient).lower(x, kernel).compile().as_text()

    assert "convolution(" in text
    assert "group_count" not in text
