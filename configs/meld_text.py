"""Emotion of MELD's utterances from their words alone, each without what was said before.

Features: ``python -m mmei_jax.extraction.extract --builder=data/meld --option=folder=MELD/data/MELD
--config.modalities="('text',)" --config.text.checkpoint=... --output=runs/data/meld_text``, or
``python -m benchmarks.text_study``, which also compares and tests.
"""

import ml_collections

from configs import meld


def get_config() -> ml_collections.ConfigDict:
    """One layer is enough on the states of a text encoder; settings were compared on the dev split."""
    config = meld.get_config()
    config.data.path = "runs/data/meld_text"
    config.data.modalities = ("text",)
    # No utterance has more tokens of BERT's vocabulary; the mean is 14. Packed, rows are filled to nine tenths.
    config.data.max_tokens = ml_collections.ConfigDict(dict(vision=(1,), audio=(1,), text=(96,)))
    config.data.batch_size = 64
    config.data.packing.records_per_row = 8
    config.data.packing.num_rows = (10, 11, 12)
    config.data.packing.tokens_per_row.text = 96

    config.model.num_layers = 1
    config.model.feedforward_dim = 512
    config.model.dropout_rate = 0.4
    config.model.pooling = "attention"
    # Of a single modality, F is its vector: a head of more layers has nothing else to read.
    config.model.head_num_layers = 0

    config.optimizer.learning_rate = 1e-3

    config.train.num_epochs = 4
    config.train.patience_evaluations = 0
    return config
