"""MIntRec's 20 real intents from words alone; accuracy is the authors' first figure.

The data set has no emotions: the emotion head learns the label "intent", and metrics of it are called emotion/....
Features: ``python -m mmei_jax.extraction.extract --builder=data/mintrec --option=folder=MIntRec
--config.modalities="('text',)" --config.text.checkpoint=... --output=runs/data/mintrec``. Where test.tsv is missing,
name splits of your own: ``python -m benchmarks.text_study`` holds out a part of train, and tests on dev.
"""

import ml_collections

from configs import default


def get_config() -> ml_collections.ConfigDict:
    """A thousand records: one layer, and much dropout."""
    config = default.get_config()
    config.data.path = "runs/data/mintrec"
    config.data.validation_splits = ("dev",)
    config.data.modalities = ("text",)
    # No utterance has more tokens of BERT's vocabulary.
    config.data.max_tokens = ml_collections.ConfigDict(dict(vision=(1,), audio=(1,), text=(40,)))
    config.data.standardize = True

    config.model.num_layers = 1
    config.model.feedforward_dim = 512
    config.model.dropout_rate = 0.5
    config.model.pooling = "attention"
    # Of a single modality, F is its vector: a head of more layers has nothing else to read.
    config.model.head_num_layers = 0

    config.loss.emotion_label = "intent"
    config.loss.intent = "none"
    config.loss.ranking = "none"

    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 0.05

    config.train.num_epochs = 12
    config.train.best_metric = "validation/emotion/accuracy"
    return config
