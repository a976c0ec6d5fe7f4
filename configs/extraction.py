"""Extraction: what is taken from clips, and how it is encoded. Every key, with its default and its unit.

For ``python -m mmei_jax.extraction.extract``; checkpoints are folders that ``python -m mmei_jax.encoders.pretrained``
has written, or ``python -m mmei_jax.encoders.random_weights``. Types, choices and the checks that join two keys:
mmei_jax/extraction/extraction_config.py.
"""

import ml_collections
from ml_collections.config_dict import ConfigDict


def get_config() -> ml_collections.ConfigDict:
    """The defaults: ViT or ResNet, Wav2Vec2 or Audio-CNN, and BERT, of any size, on whole frames."""
    config = ml_collections.ConfigDict()
    # What the data set is called, where it comes from, and under which licence; stands in its manifest.
    config.name = "clips"
    config.source = "clips of my own"
    config.licence = "unknown"
    # Which of vision, audio and text are extracted.
    config.modalities = ("vision", "audio", "text")
    # Which of them any clip may lack (a list says it clip by clip in its column "optional"). A clip that lacks another
    # one goes into quarantine.
    config.optional = ()
    # Columns of the list that are labels: (name, kind, class names), such as
    # ("emotion", "categorical", ("sad", "glad")), ("moods", "multi_label", ("sad", "glad")), ("valence", "real", ()).
    # A builder's own labels need no entry.
    config.labels = ()
    config.vision = ConfigDict(
        dict(
            # Folder of a converted ViT or ResNet, with its preprocessor_config.json.
            checkpoint="",
            # State that stands for a frame: of a ViT "first" (the [CLS] token), "mean_of_patches", or "pooled" if it
            # has a pooler; of a ResNet "pooled" (the mean over places).
            token="first",
            # Frames taken per second, at most max_frames per clip: longer clips are sampled less densely.
            frames_per_second=5.0,
            max_frames=16,
            # Part of a frame: "none" (all of it), "given" (boxes of the list's boxes_path), "opencv" (a detector).
            faces="none",
            # Space around a face, as a share of its size, on each side.
            face_margin=0.25,
            # Frames encoded at once.
            frames_per_batch=32,
        )
    )
    config.audio = ConfigDict(
        dict(
            # Folder of a converted Wav2Vec2, or of an Audio-CNN, with its preprocessor_config.json.
            checkpoint="",
            # "last" hidden state, or "sum_of_last_four" layers (of Wav2Vec2 alone).
            layers="last",
            # Frames (20 ms each; an Audio-CNN's 160 ms) that are averaged to a token.
            frames_per_token=1,
            # Lengths that clips are padded to, in seconds; two compiled programs each.
            bucket_seconds=(1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 15.0, 20.0, 30.0, 60.0),
            # Seconds of sound encoded at once, padding included.
            seconds_per_batch=60.0,
        )
    )
    config.text = ConfigDict(
        dict(
            # Folder of a converted BERT, with its tokenizer's files.
            checkpoint="",
            # Longest text in tokens, [CLS] and [SEP] included; the rest is cut off and counted.
            max_tokens=128,
            # Tokens whose states are stored: "all", or "after_context": those behind the last separator within the
            # text, such as the [SEP] between previous turns and the utterance. The encoder reads the context all the
            # same, and what is too long loses the start of its context instead of its own end.
            stored="all",
            # Tokens of a row, into which several texts are packed, and rows encoded at once.
            tokens_per_row=128,
            rows_per_batch=16,
        )
    )
    # Longer clips go into quarantine, in seconds.
    config.max_clip_seconds = 60.0
    # Clips per shard: what is done again, at most, after a crash.
    config.records_per_shard = 64
    # How features are stored: "float16" or "float32".
    config.dtype = "float32"
    # In what the encoders multiply: "float32", or "bfloat16" (twice as fast on accelerators).
    config.compute_dtype = "float32"
    return config
