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
    # Packed rows: the same losses with less padding (the first lines of a run say how much).
    config.data.packing.records_per_row = 8
    config.data.packing.num_rows = (12, 13, 14, 16)
    config.data.packing.tokens_per_row = ml_collections.ConfigDict(dict(vision=48, audio=72, text=52))

    config.loss.ranking = "none"
    return config
