r"""ViT-B, Wav2Vec2-B and BERT-B trained with fusion, heads and content tower, from frames, samples and token ids.

For an accelerator. The content tower reads the items' words through a BERT-B of its own, which is trained too.

On *simulated* clips, from nothing to a trained model::

    python -m mmei_jax.simulation.render --output=runs/rendered --num_records=5000 --seed=1

    python -m mmei_jax.encoders.random_weights vit-base runs/encoders/vit
    python -m mmei_jax.encoders.random_weights wav2vec2-base runs/encoders/wav2vec2
    python -m mmei_jax.encoders.random_weights bert-base runs/encoders/bert --texts=runs/rendered/clips.csv

    python -m mmei_jax.extraction.extract --config=configs/extraction_rendered.py --input=runs/rendered/clips.csv \
        --output=runs/data/rendered_raw --depth=raw --config.vision.max_frames=8 --config.text.max_tokens=64 \
        --catalogue=runs/rendered/catalogue.jsonl --slates=runs/rendered/slates.csv \
        --relevant_items=runs/rendered/relevant_items.csv

    python train.py --config=configs/end_to_end.py --workdir=runs/end_to_end
    python eval.py --workdir=runs/end_to_end

Given weights, for clips of your own too: ``python -m mmei_jax.encoders.pretrained google/vit-base-patch16-224-in21k
runs/encoders/vit`` and so on, in the place of a line of the second block; catalogue and slates come from your logs
(docs/extraction.md). Without them: ``--config.loss.ranking=none --config.model.content_encoder=""``.
"""

import ml_collections

from configs import default


def get_config() -> ml_collections.ConfigDict:
    """The model at its default size behind three base encoders: 8 frames, 4 seconds of sound and 64 tokens a clip."""
    config = default.get_config()
    config.data.path = "runs/data/rendered_raw"
    # Frames, samples (at 16,000 Hz) and token ids.
    config.data.max_tokens = ml_collections.ConfigDict(dict(vision=(8,), audio=(64_000,), text=(64,)))
    config.data.evaluation_batch_size = 32

    config.model.encoders.vision = "runs/encoders/vit"
    config.model.encoders.audio = "runs/encoders/wav2vec2"
    config.model.encoders.text = "runs/encoders/bert"
    # Ten tokens of sound a second.
    config.model.encoders.audio_frames_per_token = 5
    config.model.encoders.remat = "layer"
    config.model.compute_dtype = "bfloat16"

    # A second copy of the BERT, over the items' title, tags and creator.
    config.model.content_encoder = "runs/encoders/bert"
    config.model.content_encoder_training = "trained"

    # Wav2Vec2's front end stays as it is, as is usual; the rest of the encoders learns at a tenth of the rate.
    config.optimizer.rate_multipliers = (("^encoder_audio/front_", 0.0), ("^(encoder_|content_tower/encoder/)", 0.1))

    config.train.num_epochs = 20
    config.train.gradient_accumulation_steps = 2
    return config
