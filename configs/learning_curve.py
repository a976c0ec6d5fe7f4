"""Learning curve on AIGC-INT-Sim (simulated): the quickstart's small MMEI on more and fewer records.

``python -m benchmarks.learning_curve`` makes the data, and sets the training splits and the epochs.
"""

import ml_collections

from configs import quickstart


def get_config() -> ml_collections.ConfigDict:
    """The configuration at 3,500 training records."""
    config = quickstart.get_config()
    config.data.path = "runs/learning_curve/data"
    config.data.train_splits = ("seed0_1k", "seed0_3.5k")
    # The quickstart's limits, with one step more between: less padding.
    config.data.max_tokens = ml_collections.ConfigDict(dict(vision=(16, 16, 16), audio=(20, 24, 50), text=(16, 20, 32)))

    config.loss.ranking = "none"
    return config
