"""Sentiment (negative, positive) of CMU-MOSI utterances: one token per modality, split by video.

The folds come from ``python -m mmei_jax.extraction.import_features ... --num_folds=5`` (see docs/results.md).
"""

import ml_collections

from configs import default


def get_config() -> ml_collections.ConfigDict:
    """Videos of fold 0 are the test, of fold 1 the validation; the other three are trained on."""
    config = default.get_config()
    config.data.path = "runs/data/mosi"
    config.data.train_splits = ("fold2", "fold3", "fold4")
    config.data.validation_splits = ("fold1",)
    config.data.test_splits = ("fold0",)
    config.data.max_tokens = ml_collections.ConfigDict(dict(vision=(1,), audio=(1,), text=(1,)))
    config.data.standardize = True
    config.data.batch_size = 32
    config.data.evaluation_batch_size = 128

    config.model.dim = 32
    config.model.num_heads = 4
    config.model.num_layers = 1
    config.model.feedforward_dim = 64
    config.model.dropout_rate = 0.5
    config.model.position_embedding = False

    config.loss.emotion_label = "sentiment"
    config.loss.intent = "none"
    config.loss.ranking = "none"

    config.optimizer.learning_rate = 5e-4
    config.optimizer.weight_decay = 0.1

    config.train.num_epochs = 20
    config.train.evaluate_every_epochs = 4
    config.train.best_metric = "validation/emotion/accuracy"
    return config
