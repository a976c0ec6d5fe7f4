"""AdamW with a decay mask, clipping, schedules, and rates per group of parameters."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import optax

from mmei_jax.config import OptimizerConfig
from mmei_jax.config_values import compiled_pattern
from mmei_jax.types import InputError


def parameter_names(parameters: Any) -> Any:
    """The tree of parameters with each leaf replaced by its name, such as ``"heads/emotion/output/kernel"``."""

    def join(path: tuple[Any, ...], _: Any) -> str:
        return "/".join(str(getattr(entry, "key", entry)) for entry in path)

    return jax.tree_util.tree_map_with_path(join, parameters)


def make_schedule(config: OptimizerConfig, *, num_steps: int, steps_per_epoch: float) -> optax.Schedule:
    """Learning rate by update number (0 for the first): constant, steps, or linear warm-up and cosine to zero.

    Args:
        config: schedule and peak rate.
        num_steps: updates of the whole run.
        steps_per_epoch: updates of one epoch, the unit of ``config.step_epochs``; batches cross epoch borders, so not
            a whole number.
    """
    shape = _unit_schedule(config, num_steps, steps_per_epoch)
    # The peak rate may be traced, which optax's schedules do not take.
    return lambda count: config.learning_rate * shape(count)


def _unit_schedule(config: OptimizerConfig, num_steps: int, steps_per_epoch: float) -> optax.Schedule:
    """The schedule for a peak rate of 1."""
    if config.schedule == "constant":
        return optax.constant_schedule(1.0)
    if config.schedule == "step":
        boundaries = {round(epoch * steps_per_epoch): config.step_factor for epoch in config.step_epochs}
        return optax.piecewise_constant_schedule(1.0, boundaries)
    num_warmup_steps = round(config.warmup_fraction * num_steps)
    return optax.warmup_cosine_decay_schedule(
        # A first rate of exactly zero would make the first update do nothing.
        init_value=1.0 / max(num_warmup_steps, 1),
        peak_value=1.0,
        warmup_steps=num_warmup_steps,
        decay_steps=max(num_steps, num_warmup_steps + 1),
    )


def rate_multipliers(config: OptimizerConfig, parameters: Any) -> Any:
    """The factor on the learning rate of every parameter: that of the first pattern found in its name, else 1.

    Raises:
        InputError: a pattern is no regular expression, or matches no parameter.
    """
    names = parameter_names(parameters)
    patterns = matching_patterns(
        [pattern for pattern, _ in config.rate_multipliers], "optimizer.rate_multipliers", jax.tree.leaves(names)
    )
    multipliers = [multiplier for _, multiplier in config.rate_multipliers]

    def choose(name: str) -> float:
        found = (value for pattern, value in zip(patterns, multipliers, strict=True) if pattern.search(name))
        return next(found, 1.0)

    return jax.tree.map(choose, names)


def matching_patterns(patterns: Sequence[str], key: str, names: Sequence[str]) -> list[re.Pattern[str]]:
    """The regular expressions that ``config.<key>`` holds, each of which is found in some name.

    Args:
        patterns: of the configuration.
        key: its name.
        names: of all parameters (:func:`parameter_names`).

    Raises:
        InputError: a pattern is no regular expression, or matches no parameter.
    """
    compiled = [compiled_pattern(pattern, key) for pattern in patterns]
    for pattern in compiled:
        if not any(pattern.search(name) for name in names):
            raise InputError(f"config.{key}: {pattern.pattern!r} matches no parameter")
    return compiled


def trained_mask(config: OptimizerConfig, parameters: Any) -> Any:
    """True for every parameter that is not frozen by a multiplier of 0.

    Raises:
        InputError: see :func:`rate_multipliers`; or every parameter is frozen.
    """
    is_trained = jax.tree.map(lambda multiplier: multiplier > 0.0, rate_multipliers(config, parameters))
    if not any(jax.tree.leaves(is_trained)):
        raise InputError(f"config.optimizer.rate_multipliers = {config.rate_multipliers}: freezes every parameter")
    return is_trained


def decay_mask(parameters: Any) -> Any:
    """True for the weights that decay: matrices named ``kernel``; not biases, norms, embeddings or score vectors."""
    return jax.tree.map(lambda name: name.rsplit("/", 1)[-1] == "kernel", parameter_names(parameters))


def make_optimizer(config: OptimizerConfig, parameters: Any, schedule: optax.Schedule) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter, 2019) for this tree of parameters (arrays or shapes).

    Frozen parameters (multiplier 0) have no moments, and their gradients are not in the clipped norm.

    Raises:
        InputError: see :func:`trained_mask`.
    """
    multipliers = rate_multipliers(config, parameters)
    is_trained = trained_mask(config, parameters)
    is_frozen = jax.tree.map(lambda trained: not trained, is_trained)
    decays = jax.tree.map(lambda decays, trained: decays and trained, decay_mask(parameters), is_trained)
    adamw = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(config.beta1, config.beta2),
        optax.add_decayed_weights(config.weight_decay, mask=decays),
        optax.scale_by_learning_rate(schedule),
    )
    steps = [optax.masked(adamw, is_trained)]
    for multiplier in sorted(set(jax.tree.leaves(multipliers)) - {0.0, 1.0}):
        group = jax.tree.map(lambda value, chosen=multiplier: value == chosen, multipliers)
        steps.append(optax.masked(optax.scale(multiplier), group))
    # optax.masked passes what it leaves out through unchanged, so frozen gradients would be applied as updates.
    steps.append(optax.masked(optax.set_to_zero(), is_frozen))
    return optax.chain(*steps)
