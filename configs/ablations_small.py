"""Ablations of MMEI, small: one switch each, trained like the rows of ``table1_small``, without a search."""

import ml_collections

from configs import table1_small


def get_config() -> ml_collections.ConfigDict:
    """MMEI and eleven variants of it, on the 5,000 simulated records of ``table1_small``."""
    config = table1_small.get_config()
    rows = dict(
        mmei={},
        alpha_uniform=dict(model=dict(modality_weighting="uniform")),
        no_cross_attention=dict(model=dict(cross_attention=False)),
        no_intent_head=dict(loss=dict(intent="none")),
        no_ranking_loss=dict(loss=dict(ranking="none"), model=dict(content_encoder="")),
        no_item_words=dict(model=dict(content_encoder="")),
        no_modality_dropout=dict(model=dict(modality_dropout_rate=0.0)),
        pooling_attention=dict(model=dict(pooling="attention")),
        pooling_first=dict(model=dict(pooling="first")),
        head_layers_0=dict(model=dict(head_num_layers=0)),
        head_layers_2=dict(model=dict(head_num_layers=2)),
        learned_loss_weights=dict(loss=dict(task_weighting="uncertainty")),
    )
    config.table.title = "Ablations, small"
    config.table.order = tuple(rows)
    config.table.rows = ml_collections.ConfigDict(rows)
    # A search would give no_modality_dropout its dropout back: all rows train with the base's hyper-parameters.
    config.table.search.kind = "none"
    config.table.search.num_points = 0
    config.table.search.ranges = ()
    config.table.num_seeds = 4
    return config
