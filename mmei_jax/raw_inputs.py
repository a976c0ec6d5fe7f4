"""Encoders inside the model: read from their folders, and held against the raw media that the data set has.

A run begins with the folders' weights; after that its checkpoints have them, and of a folder only the architecture and
the preprocessing are read.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import jax

from mmei_jax.config import Config, EncodersConfig, ModelConfig
from mmei_jax.encoders.bert import BertConfig
from mmei_jax.encoders.outputs import NUM_LAYERS_SUMMED
from mmei_jax.encoders.preprocessing import AudioPreprocessing, ImagePreprocessing
from mmei_jax.encoders.pretrained import load, read_architecture
from mmei_jax.encoders.pretrained_files import read_preprocessing
from mmei_jax.encoders.stack import ComputeOptions
from mmei_jax.encoders.tokenizer import vocabulary_fingerprint
from mmei_jax.encoders.vit import VitConfig
from mmei_jax.encoders.wav2vec2 import LONGEST_SECONDS, Wav2Vec2Config
from mmei_jax.item_words import folder_fingerprint
from mmei_jax.models.raw_encoders import FrameEncoding, RawEncoding, SampleEncoding, WordEncoding, without_pooler
from mmei_jax.record_schema import ModalitySpec
from mmei_jax.types import InputError

_ARCHITECTURES = {"vision": VitConfig, "audio": Wav2Vec2Config, "text": BertConfig}
_NAMES = {"vision": "ViT", "audio": "Wav2Vec2", "text": "BERT"}


def raw_encoding(config: Config, modality: str, spec: ModalitySpec) -> RawEncoding | None:
    """How the model encodes a modality's raw tokens; None where the data set holds features.

    Args:
        config: names the encoder's folder.
        modality: its name.
        spec: what the data set has of it.

    Raises:
        InputError: the folder cannot be used, or the data set's tokens are not what its encoder takes.
    """
    encoders = config.model.encoders
    folder = encoders.folders().get(modality)
    if folder is None:
        return None
    architecture = _architecture(encoders, modality)
    options = ComputeOptions(compute_dtype=config.model.compute_dtype, remat=encoders.remat)
    longest = getattr(config.data.max_tokens, modality)[-1]
    where = f"config.model.encoders.{modality} = {folder!r}"
    if isinstance(architecture, VitConfig):
        image = ImagePreprocessing.read(read_preprocessing(Path(folder)))
        if spec.token_shape != (image.height, image.width, 3):
            raise InputError(
                f"{where}: reads frames of {image.height} x {image.width} pixels: expected those of the data set, "
                f"{' x '.join(map(str, spec.token_shape[:2]))}"
            )
        return FrameEncoding(options, without_pooler(architecture), image, encoders.vision_token)
    if isinstance(architecture, Wav2Vec2Config):
        audio = AudioPreprocessing.read(read_preprocessing(Path(folder)))
        rate = spec.producer.sample_rate_hz
        if audio.sample_rate_hz != rate:
            raise InputError(f"{where}: hears {audio.sample_rate_hz} samples a second: expected the data set's {rate}")
        _check_samples(architecture, encoders, longest, audio.sample_rate_hz)
        return SampleEncoding(options, architecture, audio, encoders.audio_layers, encoders.audio_frames_per_token)
    if spec.producer.revision != (found := vocabulary_fingerprint(folder)):
        raise InputError(
            f"{where}: its vocabulary is {found}, that of the data set's token ids {spec.producer.revision}: expected "
            "the tokenizer that they were made with"
        )
    if longest > architecture.max_tokens:
        raise InputError(f"config.data.max_tokens.text: {longest}: expected at most {architecture.max_tokens}, {where}")
    return WordEncoding(options, without_pooler(architecture))


def encoder_parameters(config: ModelConfig) -> dict[str, dict[str, Any]]:
    """What the encoders begin with: by the name of their parameters' group, nested dicts of arrays on the host.

    Raises:
        InputError: a folder cannot be used.
    """
    found = {}
    for modality, folder in config.encoders.folders().items():
        parameters = jax.device_get(load(folder, dtype="float32").parameters)
        # See without_pooler.
        found[f"encoder_{modality}"] = {name: value for name, value in parameters.items() if name != "pooler"}
    return found


def encoders_fingerprint(config: ModelConfig) -> str:
    """What identifies the folders of all encoders; "" without any.

    Raises:
        InputError: a folder cannot be used.
    """
    folders = config.encoders.folders()
    if not folders:
        return ""
    each = {modality: folder_fingerprint(folder) for modality, folder in folders.items()}
    return f"sha256:{hashlib.sha256(json.dumps(each, sort_keys=True).encode()).hexdigest()}"


def _architecture(encoders: EncodersConfig, modality: str) -> VitConfig | Wav2Vec2Config | BertConfig:
    folder, expected = encoders.folders()[modality], _ARCHITECTURES[modality]
    found, certificate = read_architecture(folder)
    if not isinstance(found, VitConfig | Wav2Vec2Config | BertConfig) or not isinstance(found, expected):
        kind = certificate["model_type"]
        raise InputError(
            f"config.model.encoders.{modality} = {folder!r}: holds a {kind!r}: expected a {_NAMES[modality]}"
        )
    return found


def _check_samples(architecture: Wav2Vec2Config, encoders: EncodersConfig, longest: int, rate: int) -> None:
    fewest, most = architecture.receptive_field, round(LONGEST_SECONDS * rate)
    if not fewest <= longest <= most:
        raise InputError(
            f"config.data.max_tokens.audio: {longest} samples: expected {fewest} to {most}, which the encoder takes"
        )
    lacks_layers = architecture.num_adapter_layers > 0 or architecture.stack.num_layers < NUM_LAYERS_SUMMED
    if encoders.audio_layers != "last" and lacks_layers:
        wanted = f"'last' for an encoder with an adapter, or with fewer than {NUM_LAYERS_SUMMED} layers"
        raise InputError(f"config.model.encoders.audio_layers = {encoders.audio_layers!r}: expected {wanted}")
