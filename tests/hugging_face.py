"""Random Hugging Face models as references, and what every comparison with them shares."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from mmei_jax.encoders import pretrained_weights
from mmei_jax.encoders.stack import ComputeOptions

# One stage alone, and the end of a whole encoder: absolute, on outputs of order 1.
STAGE_TOLERANCE = 1e-5
END_TOLERANCE = 1e-4

PLAIN = ComputeOptions()
# Ways to compute layers; what is slow here differs from a quick one in one thing only.
SCAN_AND_REMAT = [
    ComputeOptions(remat="layer"),
    ComputeOptions(scan_layers=True, remat="products"),
    pytest.param(ComputeOptions(scan_layers=True), marks=pytest.mark.slow),
    pytest.param(ComputeOptions(remat="products"), marks=pytest.mark.slow),
    pytest.param(ComputeOptions(scan_layers=True, remat="layer"), marks=pytest.mark.slow),
]


def randomised(model, seed=0):
    """The model with random weights: norms off 1, biases off 0, outputs of order 1; float32, evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = "norm" in name.lower() and name.endswith("weight") and parameter.ndim == 1
            if is_norm:
                parameter.copy_(1.0 + 0.2 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(0.2 * noise)
            elif "embedding" in name and "projection" not in name:
                parameter.copy_(noise)
            else:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))
            elif name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    return model.eval()


def arrays_of(tensors):
    """Named torch tensors as what conversion reads."""
    return {name: lambda tensor=tensor: tensor.detach().numpy() for name, tensor in tensors.items()}


def converted(model):
    """The model's configuration and weights as ours."""
    return pretrained_weights.convert_weights(model.config.to_dict(), arrays_of(model.state_dict()))


def assert_close(actual, expected, tolerance):
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected.detach()), rtol=0, atol=tolerance)


def assert_gradients_agree(ours, model):
    """Our gradients, a tree of arrays, equal those of the reference after ``backward``."""
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
    }
    # Stored statistics are no parameters there; here they get no gradient.
    gradients |= {name: torch.zeros_like(buffer) for name, buffer in model.named_buffers()}
    theirs = pretrained_weights.convert_weights(model.config.to_dict(), arrays_of(gradients)).parameters
    assert_trees_of_gradients_agree(ours, theirs)


def assert_trees_of_gradients_agree(ours, theirs):
    """Each parameter's gradient within 1e-3 of its norm + 1e-6 of the global norm."""
    global_norm = np.sqrt(sum(float(np.sum(np.square(leaf))) for leaf in jax.tree.leaves(theirs)))
    assert global_norm > 0.0
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for (path, actual), expected in zip(
        jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True
    ):
        allowed = 1e-3 * np.linalg.norm(expected) + 1e-6 * global_norm
        assert np.linalg.norm(actual - expected) <= allowed, jax.tree_util.keystr(path)


def relative_error(actual, expected):
    actual, expected = (jnp.asarray(array, jnp.float32) for array in (actual, expected))
    return float(jnp.linalg.norm(actual - expected) / jnp.linalg.norm(expected))


# transformers warns about its own options when torch is older or newer than it likes; our checks are of numbers.
warnings.filterwarnings("ignore", module="transformers")
