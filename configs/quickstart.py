"""Quickstart: a small MMEI on 20,000 simulated records (AIGC-INT-Sim), minutes on 2 CPU cores."""

import ml_collections

from configs import default


def get_config() -> ml_collections.ConfigDict:
    """The configuration of ``make train``."""
    config = default.get_config()
    config.data.path = "runs/data/aigc_int_quickstart"
    config.data.max_tokens = ml_collections.ConfigDict(dict(vision=(16, 16), audio=(24, 50), text=(16, 32)))
    config.data.batch_size = 64
    config.data.evaluation_batch_size = 256

    config.model.dim = 64
    config.model.num_heads = 4
    config.model.num_layers = 2
    config.model.feedforward_dim = 256
    config.model.dropout_rate = 0.1
    config.model.embedding_dim = 64

    config.optimizer.learning_rate = 1e-3

    config.train.num_epochs = 8
    config.train.log_every_steps = 50
    config.train.save_every_steps = 500
    return config
