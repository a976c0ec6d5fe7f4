"""Encoders: what turns one modality into token states, and the Transformer blocks that they share.

``from mmei_jax.encoders import Bert, load, ...`` is for everybody, also without the rest of the package;
docs/encoders.md shows how. Names are imported when they are first used, so that a model that wants a Transformer block
does not load the tools that read checkpoints.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmei_jax.encoders.audio_buckets import (
        AudioBatch,
        BucketedAudio,
        bucket_by_length,
        choose_widths,
        pad_waveforms,
    )
    from mmei_jax.encoders.audio_cnn import AudioCnn, AudioCnnConfig
    from mmei_jax.encoders.bert import Bert, BertConfig
    from mmei_jax.encoders.corpus_order import in_corpus_order, states_of_records
    from mmei_jax.encoders.freezing import trainable_parameters
    from mmei_jax.encoders.outputs import EncoderOutputs, first_token, mean_of_tokens
    from mmei_jax.encoders.pretrained import Pretrained, convert, load
    from mmei_jax.encoders.resnet import ResNet, ResNetConfig
    from mmei_jax.encoders.stack import ComputeOptions, StackConfig, stack_layers, unstack_layers
    from mmei_jax.encoders.text_packing import PackedTexts, TextBatch, pack_texts
    from mmei_jax.encoders.vit import Vit, VitConfig, mean_of_patches
    from mmei_jax.encoders.wav2vec2 import Wav2Vec2, Wav2Vec2Config, check_waveform
    from mmei_jax.types import InputError

__all__ = [
    "AudioBatch",
    "AudioCnn",
    "AudioCnnConfig",
    "Bert",
    "BertConfig",
    "BucketedAudio",
    "ComputeOptions",
    "EncoderOutputs",
    "InputError",
    "PackedTexts",
    "Pretrained",
    "ResNet",
    "ResNetConfig",
    "StackConfig",
    "TextBatch",
    "Vit",
    "VitConfig",
    "Wav2Vec2",
    "Wav2Vec2Config",
    "bucket_by_length",
    "check_waveform",
    "choose_widths",
    "convert",
    "first_token",
    "in_corpus_order",
    "load",
    "mean_of_patches",
    "mean_of_tokens",
    "pack_texts",
    "pad_waveforms",
    "stack_layers",
    "states_of_records",
    "trainable_parameters",
    "unstack_layers",
]

_MODULES = (
    "mmei_jax.types",
    "mmei_jax.encoders.bert",
    "mmei_jax.encoders.outputs",
    "mmei_jax.encoders.stack",
    "mmei_jax.encoders.vit",
    "mmei_jax.encoders.wav2vec2",
    "mmei_jax.encoders.resnet",
    "mmei_jax.encoders.audio_cnn",
    "mmei_jax.encoders.freezing",
    "mmei_jax.encoders.text_packing",
    "mmei_jax.encoders.audio_buckets",
    "mmei_jax.encoders.corpus_order",
    "mmei_jax.encoders.pretrained",
)


def __getattr__(name: str) -> Any:
    """Finds a public name in the module that defines it."""
    if name in __all__:
        for module_name in _MODULES:
            module = importlib.import_module(module_name)
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
