"""The table of rendered clips at tiny size, for tests that start train.py; flags name the data sets."""

import ml_collections

from configs import table1_raw
from tests import tiny


def get_config() -> ml_collections.ConfigDict:
    """One epoch, two seeds, a search of two points."""
    config = tiny.config_dict("set --config.data.path", train__num_epochs=1)
    raw = table1_raw.get_config()
    config.data.batch_size = 8
    config.data.max_tokens = raw.data.max_tokens
    config.data.standardize = raw.data.standardize
    table = raw.table
    table.rows.multimodal_transformer.model = ml_collections.ConfigDict(dict(architecture="multimodal_transformer"))
    table.rows.late_fusion.model = ml_collections.ConfigDict(dict(architecture="late_fusion"))
    table.num_seeds = 2
    table.search.num_points = 2
    table.search.num_epochs = 1
    config.table = table
    return config
