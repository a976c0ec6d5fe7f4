"""MMEI at full size on AIGC-INT-Sim with 768 features per token, as ViT, Wav2Vec2 and BERT give; for an accelerator."""

import ml_collections

from configs import default


def get_config() -> ml_collections.ConfigDict:
    """D = 256, 4 layers, 8 heads; the paper's recipe with warm-up and cosine."""
    config = default.get_config()
    config.data.path = "runs/data/aigc_int"
    return config
