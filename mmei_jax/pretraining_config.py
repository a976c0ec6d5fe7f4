"""The configuration's group ``pretraining``: objectives that need no label, and what goes with them."""

from dataclasses import dataclass
from typing import Any

from mmei_jax.config_values import require
from mmei_jax.types import MODALITIES


@dataclass(frozen=True)
class PretrainingConfig:
    """Self-supervised objectives, each off at weight 0."""

    contrastive_weight: float
    contrastive_chunk_size: int
    projection_dim: int
    initial_temperature: float
    masked_weight: float
    mask_rate: float
    mask_span: int


def check_pretraining(config: Any) -> None:
    """Checks the group, and what it asks of the other groups.

    Args:
        config: the whole :class:`~mmei_jax.config.Config`, which is made of this module's.

    Raises:
        InputError: a value is not accepted; names the key.
    """
    key, own, loss, data = "pretraining", config.pretraining, config.loss, config.data
    for name in ("contrastive_weight", "masked_weight"):
        require(getattr(own, name) >= 0.0, f"{key}.{name}", getattr(own, name), "at least 0")
    for name in ("contrastive_chunk_size", "projection_dim", "mask_span"):
        require(getattr(own, name) >= 1, f"{key}.{name}", getattr(own, name), "at least 1")
    temperature = own.initial_temperature
    require(0.01 < temperature < 1.0, f"{key}.initial_temperature", temperature, "a temperature between 0.01 and 1")
    require(0.0 < own.mask_rate <= 1.0, f"{key}.mask_rate", own.mask_rate, "a share above 0, at most 1")
    has_span = own.mask_span > 1
    require(own.mask_rate < 1.0 or not has_span, f"{key}.mask_span", own.mask_span, f"1 when {key}.mask_rate is 1")
    is_on = own.contrastive_weight > 0.0 or own.masked_weight > 0.0
    if loss.emotion == "none":
        require(is_on, "loss.emotion", loss.emotion, f"a task, or an objective: {key}.contrastive_weight above 0, say")
        for name in ("intent", "ranking"):
            require(getattr(loss, name) == "none", f"loss.{name}", getattr(loss, name), "'none' when loss.emotion is")
    if not is_on:
        return
    architecture = config.model.architecture
    require(architecture == "mmei", "model.architecture", architecture, f"'mmei' with an objective of {key}")
    names = data.modalities
    require(len(names) > 1, "data.modalities", names, f"two or all of {', '.join(MODALITIES)} for {key}")
    weighting = loss.task_weighting
    require(weighting == "fixed", "loss.task_weighting", weighting, f"'fixed' with an objective of {key}")
    if own.masked_weight > 0.0:
        reads_features = len(config.model.encoders.folders()) < len(names)
        accepted = f"True with {key}.masked_weight: what is predicted are standardised features"
        require(data.standardize or not reads_features, "data.standardize", data.standardize, accepted)
        crosses = config.model.cross_attention
        require(crosses, "model.cross_attention", crosses, f"True with {key}.masked_weight: others are predicted from")
