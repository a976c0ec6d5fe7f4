"""What a folder of weights is read with: the parts that Hugging Face's architectures share with our own Audio-CNN."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from flax import linen as nn

from mmei_jax.encoders.audio_cnn import WINDOW_SAMPLES, AudioCnn, AudioCnnConfig


@dataclass(frozen=True)
class Architecture:
    """What there is to know about one ``model_type`` without its weights.

    Attributes:
        model_type: as in ``config.json``.
        pooler: beginning of Hugging Face's names of the pooler, whose presence the configuration does not tell; None
            where there is no such pooler.
        read_config: our configuration from what ``config.json`` holds.
        make_module: our module from our configuration.
        example: fixed inputs of the module, for shapes and comparisons.
    """

    model_type: str
    pooler: str | None
    read_config: Callable[..., Any]
    make_module: Callable[..., nn.Module]
    example: Callable[[Any], dict[str, np.ndarray]]


def _audio_cnn_example(config: AudioCnnConfig) -> dict[str, np.ndarray]:
    samples = np.random.default_rng(0).uniform(-1.0, 1.0, size=(2, 16 * WINDOW_SAMPLES))
    return {"samples": samples.astype(np.float32)}


# Ours alone: there is no checkpoint of it to convert.
AUDIO_CNN = Architecture(
    model_type="audio_cnn",
    pooler=None,
    read_config=AudioCnnConfig.read,
    make_module=AudioCnn,
    example=_audio_cnn_example,
)
