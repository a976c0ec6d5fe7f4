"""Convolutions over time or over images, channels last, which XLA computes best."""

import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float

from mmei_jax.encoders.transformer import Initializer, with_axes

kernel_init = nn.initializers.variance_scaling(2.0, "fan_in", "truncated_normal")
_LAYOUTS = {1: ("NWC", "WIO", "NWC"), 2: ("NHWC", "HWIO", "NHWC")}


class Convolution(nn.Module):
    """A convolution, as torch understands it (no flipping), over one or two axes; returns float32.

    Of 16-bit operands the result has 16 bits too, before it becomes float32.

    Attributes:
        num_features: channels of the result.
        kernel_size: places that a window covers, along each axis.
        strides: step of the window along each axis.
        padding: zeros before and after, along each axis; none where empty.
        num_groups: groups of channels that do not mix.
        use_bias: whether there is a bias.
        compute_dtype: type in which the products read their operands.
        kernel_init: initializer of the kernel, ``[*kernel_size, channels / num_groups, num_features]``.
    """

    num_features: int
    kernel_size: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...] = ()
    num_groups: int = 1
    use_bias: bool = True
    compute_dtype: str = "float32"
    kernel_init: Initializer = kernel_init

    @nn.compact
    def __call__(self, x: Float[Array, "rows *places channels"]) -> Float[Array, "rows *windows features"]:
        """One value of ``num_features`` channels for each window that fits."""
        num_axes = len(self.kernel_size)
        axes = (*("window",) * num_axes, "input_channels", "channels")
        shape = (*self.kernel_size, x.shape[-1] // self.num_groups, self.num_features)
        kernel = self.param("kernel", with_axes(self.kernel_init, *axes), shape)
        # Operands and result of one type: the gradient of a convolution knows no other.
        y = lax.conv_general_dilated(
            x.astype(self.compute_dtype),
            kernel.astype(self.compute_dtype),
            self.strides,
            self.padding or ((0, 0),) * num_axes,
            dimension_numbers=_LAYOUTS[num_axes],
            feature_group_count=self.num_groups,
        ).astype(jnp.float32)
        if self.use_bias:
            bias = self.param("bias", with_axes(nn.initializers.zeros, "channels"), (self.num_features,))
            y = y + bias.reshape((1,) * (y.ndim - 1) + (-1,))
        return y
