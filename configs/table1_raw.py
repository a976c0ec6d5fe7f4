r"""Table 1 at ``raw`` depth: rendered clips (simulated) through the encoders that the paper names; for an accelerator.

Text-BERT, Visual-ResNet50 and Audio-CNN are those encoders' features in MMEI with one modality. The rows of several
modalities read ViT, Wav2Vec2 and BERT. Weights are random, or a checkpoint's: the report says which of each row. From
nothing to the table::

    python -m mmei_jax.simulation.render --output=runs/rendered --num_records=5000 --seed=1

    python -m mmei_jax.encoders.random_weights vit-base runs/encoders/vit
    python -m mmei_jax.encoders.random_weights wav2vec2-base runs/encoders/wav2vec2
    python -m mmei_jax.encoders.random_weights bert-base runs/encoders/bert --texts=runs/rendered/clips.csv
    python -m mmei_jax.encoders.random_weights resnet-50 runs/encoders/resnet
    python -m mmei_jax.encoders.random_weights audio-cnn runs/encoders/audio_cnn

    python -m mmei_jax.extraction.extract --config=configs/extraction_rendered.py --input=runs/rendered/clips.csv \
        --output=runs/data/rendered_vit_wav2vec2_bert \
        --catalogue=runs/rendered/catalogue.jsonl --slates=runs/rendered/slates.csv \
        --relevant_items=runs/rendered/relevant_items.csv
    python -m mmei_jax.extraction.extract --config=configs/extraction_rendered.py --input=runs/rendered/clips.csv \
        --output=runs/data/rendered_resnet_audio_cnn_bert \
        --config.vision.checkpoint=runs/encoders/resnet --config.vision.token=pooled \
        --config.audio.checkpoint=runs/encoders/audio_cnn --config.audio.frames_per_token=1 \
        --catalogue=runs/rendered/catalogue.jsonl --slates=runs/rendered/slates.csv \
        --relevant_items=runs/rendered/relevant_items.csv

    python train.py --config=configs/table1_raw.py --workdir=runs/table1_raw
    python eval.py --workdir=runs/table1_raw

Given weights: ``python -m mmei_jax.encoders.pretrained google/vit-base-patch16-224-in21k runs/encoders/vit`` and so on,
in the place of a line of the second block. Words are extracted both times, so that a clip of words alone is in both
data sets: rows are compared record by record.
"""

import ml_collections

from configs import default, table1

_RESNET_AND_AUDIO_CNN = "runs/data/rendered_resnet_audio_cnn_bert"


def get_config() -> ml_collections.ConfigDict:
    """Table 1's sizes, search and seeds."""
    config = default.get_config()
    config.data.path = "runs/data/rendered_vit_wav2vec2_bert"
    # Room for clips of four seconds and 90 words; one bucket: no batch is compiled in two shapes.
    config.data.max_tokens = ml_collections.ConfigDict(dict(vision=(16,), audio=(40,), text=(96,)))
    # What random networks give is neither centred nor of one scale.
    config.data.standardize = True

    config.model.content_encoder = "runs/encoders/bert"

    # Parameters within 10 % of MMEI's: see table1.
    config.table = table1.make_table(
        "Table 1, raw media", transformer=dict(dim=448, feedforward_dim=1792), late_fusion={}
    )
    for row in ("vision_only", "audio_only"):
        config.table.rows[row].data.path = _RESNET_AND_AUDIO_CNN
    return config
