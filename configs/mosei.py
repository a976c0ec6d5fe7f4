"""Sentiment of CMU-MOSEI in [-3, 3] by regression: the standard folds, chosen by the mean absolute error.

Features: ``python -m mmei_jax.extraction.import_mosei --input=aligned_50.pkl --output=runs/data/mosei
--non_finite=zero``. Metrics: emotion/mae, emotion/pearson, emotion/acc7, emotion/acc2_has0, emotion/acc2_non0 and F1 of
each. The six emotions instead: ``--config.loss.emotion=sigmoid --config.loss.emotion_label=emotions
--config.train.best_metric=validation/emotion/weighted_f1``, with ``--config.loss.focal_gamma=2`` for the rare ones.
"""

import ml_collections

from configs import default


def get_config() -> ml_collections.ConfigDict:
    """The model at its default size on the 50 tokens a modality of the aligned file."""
    config = default.get_config()
    config.data.path = "runs/data/mosei"
    config.data.validation_splits = ("valid",)
    config.data.max_tokens = ml_collections.ConfigDict(dict(vision=(50,), audio=(50,), text=(50,)))
    # COVAREP's features differ in scale by orders of magnitude.
    config.data.standardize = True
    config.data.batch_size = 64

    config.loss.emotion = "regression"
    config.loss.emotion_label = "sentiment"
    config.loss.intent = "none"
    config.loss.ranking = "none"

    config.train.num_epochs = 20
    config.train.patience_evaluations = 5
    config.train.best_metric = "validation/emotion/mae"
    return config
