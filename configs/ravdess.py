"""Emotion from RAVDESS clips: one token per modality, split by actor, no intent and no ranking.

``python -m benchmarks.ravdess`` imports the folds (docs/results.md) with the options that it lists in its file.
"""

import ml_collections

from configs import default


def get_config() -> ml_collections.ConfigDict:
    """Actors of fold 0 are the test, of fold 1 the validation; the other four are trained on."""
    config = default.get_config()
    config.data.path = "runs/data/ravdess"
    config.data.train_splits = ("fold2", "fold3", "fold4", "fold5")
    config.data.validation_splits = ("fold1",)
    config.data.test_splits = ("fold0",)
    config.data.max_tokens = ml_collections.ConfigDict(dict(vision=(1,), audio=(1,), text=(1,)))
    config.data.standardize = True
    config.data.batch_size = 40
    config.data.evaluation_batch_size = 180

    config.model.dim = 64
    config.model.num_heads = 4
    config.model.num_layers = 1
    config.model.feedforward_dim = 128
    config.model.dropout_rate = 0.4
    config.model.position_embedding = False

    config.loss.intent = "none"
    config.loss.ranking = "none"

    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 0.1

    config.train.num_epochs = 20
    config.train.evaluate_every_epochs = 4
    config.train.best_metric = "validation/emotion/accuracy"
    return config
