"""Pretraining without labels: the quickstart's small MMEI learns from its records alone; minutes on 2 CPU cores.

Fine-tuning begins with what it learned by one flag::

    python train.py --config=configs/pretrain.py --workdir=runs/pretrain
    python train.py --config=configs/quickstart.py --workdir=runs/tuned --config.train.initial_workdir=runs/pretrain

For other data and sizes: name the data (``--config.data.path``; labels are not read, and need not be there) and the
sizes that fine-tuning has. Raw shards are read through ``--config.model.encoders...`` (see ``end_to_end.py``).
"""

import ml_collections

from configs import quickstart


def get_config() -> ml_collections.ConfigDict:
    """Both objectives, no task."""
    config = quickstart.get_config()
    # Negatives are the other records of a batch: more of them ask for more.
    config.data.batch_size = 256
    # The features that are predicted have mean 0 and variance 1.
    config.data.standardize = True

    config.loss.emotion = "none"
    config.loss.intent = "none"
    config.loss.ranking = "none"
    config.pretraining.contrastive_weight = 1.0
    config.pretraining.masked_weight = 1.0
    config.pretraining.projection_dim = 64

    config.train.num_epochs = 20
    # No label is read: the objectives' own loss on other records picks the checkpoint.
    config.train.best_metric = "validation/loss"
    return config
