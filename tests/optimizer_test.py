"""AdamW against torch, masks by name, schedules by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from configs import default
from mmei_jax.config import parse
from mmei_jax.optimizer import decay_mask, make_optimizer, make_schedule, trained_mask
from mmei_jax.types import InputError

BASE = parse(default.get_config().to_dict()).optimizer


def options(**changes):
    return dataclasses.replace(BASE, **changes)


def parameters():
    generator = np.random.default_rng(0)
    return {
        "heads": {
            "output": {
                "kernel": generator.normal(size=(4, 3)).astype(np.float32),
                "bias": generator.normal(size=3).astype(np.float32),
            },
            "norm": {"scale": generator.normal(size=4).astype(np.float32)},
        }
    }


def update(config, tree, gradients, num_updates=1):
    optimizer = make_optimizer(config, tree, optax.constant_schedule(config.learning_rate))
    state = optimizer.init(tree)
    for _ in range(num_updates):
        updates, state = optimizer.update(gradients, state, tree)
        tree = optax.apply_updates(tree, updates)
    return tree


def test_adamw_with_clipping_and_decay_mask_equals_torch():
    config = options(learning_rate=1e-2, weight_decay=0.1, clip_norm=0.5)
    tree = parameters()
    leaves = {"/".join(str(key.key) for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    generator = np.random.default_rng(1)
    gradients = jax.tree.map(lambda leaf: generator.normal(size=leaf.shape).astype(np.float32), tree)
    ours = update(config, tree, gradients, num_updates=5)

    tensors = {name: torch.nn.Parameter(torch.tensor(leaf)) for name, leaf in leaves.items()}
    is_decayed = {name: name.endswith("kernel") for name in tensors}
    peer = torch.optim.AdamW(
        [
            {"params": [tensors[name] for name in tensors if is_decayed[name]], "weight_decay": 0.1},
            {"params": [tensors[name] for name in tensors if not is_decayed[name]], "weight_decay": 0.0},
        ],
        lr=1e-2,
        betas=(config.beta1, config.beta2),
    )
    for _ in range(5):
        for (_, gradient), tensor in zip(jax.tree_util.tree_leaves_with_path(gradients), tensors.values(), strict=True):
            tensor.grad = torch.tensor(gradient)
        torch.nn.utils.clip_grad_norm_(tensors.values(), 0.5)
        peer.step()
    for leaf, tensor in zip(jax.tree.leaves(ours), tensors.values(), strict=True):
        np.testing.assert_allclose(leaf, tensor.detach().numpy(), atol=2e-6)


def test_only_kernels_decay():
    mask = decay_mask(parameters())
    assert mask == {"heads": {"output": {"kernel": True, "bias": False}, "norm": {"scale": False}}}


def test_frozen_parameters_stay_bit_equal_and_do_not_count_in_the_clipped_norm():
    tree = parameters()
    gradients = jax.tree.map(jnp.ones_like, tree)
    huge = {
        "heads": {"output": gradients["heads"]["output"], "norm": {"scale": 1e6 * gradients["heads"]["norm"]["scale"]}}
    }
    config = options(rate_multipliers=(("norm", 0.0),), clip_norm=0.1)
    ours, with_huge = update(config, tree, gradients), update(config, tree, huge)
    assert np.array_equal(ours["heads"]["norm"]["scale"], tree["heads"]["norm"]["scale"])
    np.testing.assert_array_equal(ours["heads"]["output"]["kernel"], with_huge["heads"]["output"]["kernel"])
    assert not np.array_equal(ours["heads"]["output"]["kernel"], tree["heads"]["output"]["kernel"])
    optimizer = make_optimizer(config, tree, optax.constant_schedule(1.0))
    assert sum(leaf.size for leaf in jax.tree.leaves(optimizer.init(tree)) if leaf.ndim) == 2 * (12 + 3)


def test_first_matching_pattern_scales_the_update():
    tree = parameters()
    gradients = jax.tree.map(jnp.ones_like, tree)
    config = options(weight_decay=0.0, rate_multipliers=(("output/kernel", 0.5), ("output", 0.1)))
    plain, scaled = update(options(weight_decay=0.0), tree, gradients), update(config, tree, gradients)
    moved = jax.tree.map(lambda new, old: np.abs(new - old).max(), plain, tree)
    moved_less = jax.tree.map(lambda new, old: np.abs(new - old).max(), scaled, tree)
    ratios = jax.tree.map(lambda less, more: less / more, moved_less, moved)["heads"]
    np.testing.assert_allclose([ratios["output"]["kernel"], ratios["output"]["bias"]], [0.5, 0.1], rtol=1e-2)
    np.testing.assert_allclose(ratios["norm"]["scale"], 1.0, rtol=1e-6)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ((("encoder", 0.1),), r"'encoder' matches no parameter"),
        ((("(", 0.1),), r"'\(' is no regular expression"),
        (((".*", 0.0),), r"freezes every parameter"),
    ],
)
def test_bad_patterns_are_refused(patterns, message):
    with pytest.raises(InputError, match=message):
        trained_mask(options(rate_multipliers=patterns), parameters())


def test_step_schedule_falls_after_the_named_epochs():
    schedule = make_schedule(
        options(schedule="step", step_epochs=(60, 80), learning_rate=1.0), num_steps=1000, steps_per_epoch=10.0
    )
    values = [float(schedule(step)) for step in (0, 599, 600, 799, 800, 999)]
    np.testing.assert_allclose(values, [1.0, 1.0, 0.1, 0.1, 0.01, 0.01], rtol=1e-6)


def test_warmup_cosine_rises_to_the_peak_and_falls_to_zero():
    config = options(schedule="warmup_cosine", warmup_fraction=0.1, learning_rate=2.0)
    schedule = make_schedule(config, num_steps=100, steps_per_epoch=10.0)
    rates = np.array([float(schedule(step)) for step in range(101)])
    assert 0.0 < rates[0] < rates[5] < rates[10] == 2.0
    assert (np.diff(rates[10:]) < 0).all()
    np.testing.assert_allclose(rates[55], 1.0, rtol=1e-6)
    assert rates[100] < 1e-6
