"""The paper to the letter, and the recipe of its section 4.2.

Its data (simulated) and the BERT of its content tower::

    python -m mmei_jax.simulation.aigc_int generate --output=runs/data/aigc_int --num_records=5000 --dim=768
    python -m mmei_jax.encoders.pretrained google-bert/bert-base-uncased runs/encoders/bert

Eq. 1 without bias or embeddings, heads that are one linear layer (Eq. 4-5), a raw dot product (Eq. 7).
"""

import ml_collections

from configs import default


def get_config() -> ml_collections.ConfigDict:
    """Batch 32, AdamW at 1e-4, 100 epochs, dropout 0.2; learning rate steps at epochs 60 and 80 (Fig. 3)."""
    config = default.get_config()

    config.model.projection_bias = False
    config.model.modality_embedding = False
    config.model.position_embedding = False
    config.model.modality_dropout_rate = 0.0
    config.model.head_num_layers = 0
    config.model.normalize_embeddings = False
    config.model.content_encoder = "runs/encoders/bert"

    config.loss.temperature = 1.0

    config.optimizer.schedule = "step"
    config.optimizer.step_epochs = (60, 80)
    return config
