"""The tiny configuration as a file, for tests that start train.py; --config.data.path names the data."""

import ml_collections

from tests import tiny


def get_config() -> ml_collections.ConfigDict:
    """60 epochs: seconds of training, enough to be interrupted."""
    return tiny.config_dict(
        "set --config.data.path",
        # Two modalities have all that three have, and compile in two thirds of the time.
        data__modalities=("vision", "text"),
        train__num_epochs=60,
        train__evaluate_every_epochs=20,
        train__save_every_steps=30,
        train__log_every_steps=10,
        train__write_record_ids=True,
    )
