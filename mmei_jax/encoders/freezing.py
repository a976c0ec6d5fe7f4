"""Which parameters of an encoder are trained: all, those of the last layers, or none."""

import re
from collections.abc import Mapping
from typing import Any

from mmei_jax.encoders.audio_cnn import AudioCnnConfig
from mmei_jax.encoders.bert import BertConfig
from mmei_jax.encoders.resnet import ResNetConfig
from mmei_jax.encoders.vit import VitConfig
from mmei_jax.encoders.wav2vec2 import Wav2Vec2Config
from mmei_jax.types import InputError

EncoderConfig = BertConfig | VitConfig | Wav2Vec2Config | ResNetConfig | AudioCnnConfig

_LAYER = re.compile(r"encoder/layer_(\d+)/|stage_(\d+)_block_(\d+)/")
_STATISTIC = re.compile(r"_norm/(mean|variance)$")


def trainable_parameters(
    parameters: Mapping[str, Any], config: EncoderConfig, num_layers: int | None = None
) -> dict[str, Any]:
    """Says of each parameter whether it is trained.

    Updates of the others are to be set to zero by the optimizer (``optax.masked`` with ``optax.set_to_zero``): masking
    an update rule alone lets their gradients through as they are.

    Args:
        parameters: nested mappings, one entry per layer.
        config: the encoder's.
        num_layers: Transformer layers (ResNet: blocks), counted from the end, that are trained with all that stands
            behind them; 0 trains nothing at all, None everything. An Audio-CNN is trained as a whole or not at all.
            ResNet's stored statistics are never trained.

    Returns:
        The same tree with a Python bool for each parameter.

    Raises:
        InputError: the encoder has fewer layers, or none that can be trained alone, or they are stacked for
            ``scan_layers``.
    """
    names = list(_names(parameters))
    if num_layers is not None and any(name.startswith("encoder/layers/") for name in names):
        raise InputError("parameters stacked for scan_layers have one entry for all layers; unstack_layers first")
    layers = sorted({layer for name in names if (layer := _layer(name)) is not None})
    if num_layers and not layers:
        raise InputError(
            f"num_layers = {num_layers}: expected None or 0; this encoder is trained as a whole or not at all"
        )
    if num_layers is not None and not 0 <= num_layers <= len(layers):
        raise InputError(f"num_layers = {num_layers}: expected 0 to {len(layers)}, what the encoder has")
    trained = layers if num_layers is None else layers[len(layers) - num_layers :]

    def is_trained(name: str) -> bool:
        if _STATISTIC.search(name) or num_layers == 0:
            return False
        layer = _layer(name)
        if layer is not None:
            return layer in trained
        return num_layers is None or _stands_behind_layers(name, config)

    def mark(tree: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        return {
            name: mark(value, f"{prefix}{name}/") if isinstance(value, Mapping) else is_trained(prefix + name)
            for name, value in tree.items()
        }

    return mark(parameters, "")


def _names(tree: Mapping[str, Any], prefix: str = "") -> list[str]:
    found = []
    for name, value in tree.items():
        found += _names(value, f"{prefix}{name}/") if isinstance(value, Mapping) else [prefix + name]
    return found


def _layer(name: str) -> tuple[int, ...] | None:
    match = _LAYER.match(name)
    return match and tuple(int(number) for number in match.groups() if number is not None)


def _stands_behind_layers(name: str, config: EncoderConfig) -> bool:
    first = name.split("/")[0]
    if first == "encoder_norm":
        return isinstance(config, Wav2Vec2Config) and config.stack.norm_comes_first
    return first in ("last_norm", "pooler") or first.startswith("adapter")
