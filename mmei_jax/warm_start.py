"""Training that begins with the parameters of another run instead of random ones."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from mmei_jax.config import TrainConfig
from mmei_jax.config_values import compiled_pattern
from mmei_jax.evaluation import is_pretraining, open_best_run
from mmei_jax.optimizer import parameter_names
from mmei_jax.types import InputError, TrainState

# Names of what pretraining without tasks leaves random, or lacks: heads, user side, content tower, and the weights of
# Eq. 3, which only the heads train.
LEFT_BY_PRETRAINING = (
    r"(emotion_head|intent_head|user_projection|user_side|content_tower|weighting|task_log_variances)(/|$)"
)


def with_initial_parameters(state: TrainState, config: TrainConfig) -> tuple[TrainState, int]:
    """A fresh state with the best parameters of the run that the configuration names.

    The constants that standardise the features come along: the parameters were trained on features so standardised.

    Args:
        state: fresh, on its mesh; its optimizer's state does not depend on values.
        config: ``initial_workdir``, and ``initial_parameters``: what the names of the parameters that are taken match;
            where it is empty and the run is one of pretraining alone, all but :data:`LEFT_BY_PRETRAINING` are taken.

    Returns:
        The state, and how many parameter arrays were taken; the same state and 0 where no run is named.

    Raises:
        InputError: the run cannot be used, nothing matches, or a parameter that matches is missing there or has another
            shape.
    """
    if not config.initial_workdir:
        return state, 0
    run = open_best_run(Path(config.initial_workdir), needs_task=False)
    chosen = config.initial_parameters
    if not chosen and is_pretraining(run.config):
        chosen = f"^(?!{LEFT_BY_PRETRAINING})"
    pattern = compiled_pattern(chosen, "train.initial_parameters")
    theirs = _by_name(run.variables["params"])
    names = parameter_names(state.parameters)
    taken = [name for name in jax.tree.leaves(names) if pattern.search(name)]
    key = f"config.train.initial_parameters = {config.initial_parameters!r}"
    if not taken:
        raise InputError(f"{key}: matches no parameter of the model")

    def choose(own: Any, name: str) -> Any:
        if not pattern.search(name):
            return own
        if name not in theirs:
            raise InputError(f"{key}: the run in {config.initial_workdir} has no parameter {name!r}")
        return _placed(theirs[name], own, f"{key}: {name}")

    statistics = _by_name(run.variables["statistics"])

    def replace_statistic(own: Any, name: str) -> Any:
        where = f"config.train.initial_workdir = {config.initial_workdir!r}: {name}"
        if name not in statistics:
            raise InputError(f"{where}: missing there")
        return _placed(statistics[name], own, where)

    changed = dataclasses.replace(
        state,
        parameters=jax.tree.map(choose, state.parameters, names),
        statistics=jax.tree.map(replace_statistic, state.statistics, parameter_names(state.statistics)),
    )
    return changed, len(taken)


def _by_name(tree: Any) -> dict[str, Any]:
    return dict(zip(jax.tree.leaves(parameter_names(tree)), jax.tree.leaves(tree), strict=True))


def _placed(theirs: Any, own: Any, where: str) -> Any:
    if theirs.shape != own.shape:
        raise InputError(f"{where}: of shape {theirs.shape} there: expected {own.shape}")
    return jax.device_put(jax.device_get(theirs), own.sharding)
