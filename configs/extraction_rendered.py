"""Extraction of rendered clips (simulated), for configs/table1_raw.py, which lists the commands.

As it is: ViT, Wav2Vec2 and BERT. ResNet-50 and the Audio-CNN are named on the command line.
"""

import ml_collections

from configs import extraction
from mmei_jax.simulation.aigc_int import EMOTIONS, INTENTS


def get_config() -> ml_collections.ConfigDict:
    """The defaults, with the labels of rendered clips and ten tokens of sound a second."""
    config = extraction.get_config()
    config.name = "AIGC-INT-Sim, rendered clips (simulated)"
    config.source = "mmei_jax.simulation.render"
    config.licence = "Apache-2.0"
    config.labels = (("emotion", "categorical", EMOTIONS), ("intent", "categorical", INTENTS))
    config.vision.checkpoint = "runs/encoders/vit"
    config.audio.checkpoint = "runs/encoders/wav2vec2"
    config.text.checkpoint = "runs/encoders/bert"
    config.audio.frames_per_token = 5
    return config
