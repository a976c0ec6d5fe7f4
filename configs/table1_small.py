"""Table 1, small: the paper's six rows at quickstart size on 5,000 simulated records, for 2 CPU cores."""

import ml_collections

from configs import quickstart, table1


def get_config() -> ml_collections.ConfigDict:
    """The quickstart's sizes, 20 epochs, ten seeds of seven rows."""
    config = quickstart.get_config()
    config.data.path = "runs/data/aigc_int_5000"
    # Room for the longest record of the set, one bucket: no batch is compiled in two shapes.
    config.data.max_tokens = ml_collections.ConfigDict(dict(vision=(18,), audio=(28,), text=(24,)))
    # Longer rows would have less padding, but attention then costs more than padding does.
    config.data.packing.records_per_row = 3
    config.data.packing.num_rows = (25,)
    config.data.packing.tokens_per_row = ml_collections.ConfigDict(dict(vision=28, audio=40, text=28))

    # Two heads of 32 features: the number of scores is what attention costs here.
    config.model.num_heads = 2
    config.model.feedforward_dim = 128

    # The content tower reads the items' words through MiniLM, whose states are made once.
    config.model.content_encoder = "runs/encoders/minilm"

    config.train.num_epochs = 20
    config.train.evaluate_every_epochs = 2
    # A row ends when its last replica has been without a better value for two evaluations, 4 epochs.
    config.train.patience_evaluations = 2
    config.train.save_every_steps = 1000
    # Parameters within 10 % of MMEI's: see table1.
    config.table = table1.make_table(
        "Table 1, small", transformer=dict(dim=88, feedforward_dim=352), late_fusion=dict(feedforward_dim=88)
    )
    config.table.search.num_epochs = 2
    config.table.updates_per_dispatch = 18
    return config
