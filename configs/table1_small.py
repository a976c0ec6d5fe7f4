"""Table 1, small: the paper's six rows at quickstart size on 5,000 simulated records, for 2 CPU cores."""

import ml_collections

from configs import quickstart, table1


def get_config() -> ml_collections.ConfigDict:
    """The quickstart's sizes, 20 epochs, ten seeds of seven rows."""
    config = quickstart.get_config()
    config.data.path = "runs/data/aigc_int_5000"
    # Room for a quarter more tokens than 64 records have on average.
    config.data.packing.records_per_row = 5
    config.data.packing.num_rows = (14,)
    config.data.packing.tokens_per_row = ml_collections.ConfigDict(dict(vision=44, audio=66, text=44))
    config.train.num_epochs = 20
    config.train.save_every_steps = 1000
    # Parameters within 10 % of MMEI's: see table1.
    config.table = table1.make_table(
        transformer=dict(dim=104, feedforward_dim=416), late_fusion=dict(feedforward_dim=192)
    )
    config.table.search.num_epochs = 5
    config.table.updates_per_dispatch = 18
    return config
