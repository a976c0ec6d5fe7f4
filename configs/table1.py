"""Table 1 at the paper's size: six rows, a search of 12 points and ten seeds for each; for an accelerator.

Its data (simulated), the BERT of its content tower, and the table::

    python -m mmei_jax.simulation.aigc_int generate --output=runs/data/aigc_int_5000_768 --num_records=5000 --dim=768
    python -m mmei_jax.encoders.pretrained google-bert/bert-base-uncased runs/encoders/bert
    python train.py --config=configs/table1.py --workdir=runs/table1
    python eval.py --workdir=runs/table1
"""

from typing import Any

import ml_collections

from configs import default


def get_config() -> ml_collections.ConfigDict:
    """The paper's sizes, batch, rate and epochs, on 5,000 simulated records of 768 features a token."""
    config = default.get_config()
    config.data.path = "runs/data/aigc_int_5000_768"
    config.model.content_encoder = "runs/encoders/bert"
    config.table = make_table("Table 1", transformer=dict(dim=448, feedforward_dim=1792), late_fusion={})
    return config


def make_table(title: str, *, transformer: dict[str, Any], late_fusion: dict[str, Any]) -> ml_collections.ConfigDict:
    """The group ``table``: the paper's six rows and one unnumbered.

    Args:
        title: of the report.
        transformer: sizes of the Multi-Modal Transformer, and
        late_fusion: of each branch of the Late Fusion, so that both have as many parameters as MMEI, within 10 %.
    """
    table = ml_collections.ConfigDict()
    # What the report is called.
    table.title = title
    # Rows in the order of the table.
    table.order = (
        "text_only",
        "vision_only",
        "audio_only",
        "late_fusion",
        "multimodal_transformer",
        "mmei",
        "pooled_logistic",
    )
    # By row, what differs from the rest of this configuration.
    table.rows = ml_collections.ConfigDict(
        dict(
            text_only=dict(data=dict(modalities=("text",))),
            vision_only=dict(data=dict(modalities=("vision",))),
            audio_only=dict(data=dict(modalities=("audio",))),
            late_fusion=dict(model=dict(architecture="late_fusion", **late_fusion)),
            multimodal_transformer=dict(model=dict(architecture="multimodal_transformer", **transformer)),
            mmei={},
            pooled_logistic=dict(model=dict(architecture="pooled_logistic")),
        )
    )
    # The row with which the others are compared, record by record.
    table.reference_row = "mmei"
    # Replicas of each row; seeds count up from config.seed.
    table.num_seeds = 10
    # Updates of every replica that one program makes before the host hears of them.
    table.updates_per_dispatch = 16
    # Memory of one device that replicas may take together, in GiB; 0 takes what the device has.
    table.memory_limit_gib = 0.0

    table.search = search = ml_collections.ConfigDict()
    # "random" points, a "grid", or "none"; judged by train.best_metric on the validation splits alone.
    search.kind = "random"
    # Random points, the same for every row.
    search.num_points = 12
    # Seed of the points, and of the replicas that try them.
    search.seed = 1000
    # Passes over the training splits for each point.
    search.num_epochs = 20
    # For "random": (key, "log" or "linear", lowest, highest).
    search.ranges = (
        ("optimizer.learning_rate", "log", 1e-4, 3e-3),
        ("optimizer.weight_decay", "log", 1e-3, 1e-1),
        ("model.dropout_rate", "linear", 0.0, 0.3),
        ("model.modality_dropout_rate", "linear", 0.0, 0.3),
        ("loss.ranking_weight", "log", 0.1, 1.0),
    )
    # For "grid": (key, values).
    search.grid = ()
    return table
