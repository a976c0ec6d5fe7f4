"""Emotion of MELD's utterances from face, voice and words: official split, weighted F1 (the data set's convention).

Features: ``python -m mmei_jax.extraction.extract --builder=data/meld --option=folder=MELD/data/MELD
--option=clips_folder=MELD.Raw --output=runs/data/meld --config.audio.frames_per_token=5 ...`` (docs/extraction.md).
Rare emotions: ``--config.loss.logit_adjustment=1``, ``--config.loss.focal_gamma=2`` or ``loss.emotion_class_weights``.
"""

import ml_collections

from configs import default


def get_config() -> ml_collections.ConfigDict:
    """The model at its default size; the test split is read by eval.py alone."""
    config = default.get_config()
    config.data.path = "runs/data/meld"
    config.data.validation_splits = ("dev",)
    # Ten tokens of sound a second: most utterances are shorter than 6.4 s and 32 words.
    config.data.max_tokens = ml_collections.ConfigDict(dict(vision=(16, 16), audio=(64, 128), text=(32, 96)))
    config.data.standardize = True

    config.model.dropout_rate = 0.3

    config.loss.intent = "none"
    config.loss.ranking = "none"

    config.optimizer.weight_decay = 0.05

    config.train.num_epochs = 15
    config.train.patience_evaluations = 4
    config.train.best_metric = "validation/emotion/weighted_f1"
    return config
