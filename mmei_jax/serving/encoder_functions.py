"""Encoders as functions that are exported: those that made a run's features, and those that were trained inside it."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from mmei_jax.encoders.audio_cnn import SAMPLING_RATE
from mmei_jax.encoders.pretrained_weights import flatten, unflatten
from mmei_jax.encoders.wav2vec2 import LONGEST_SECONDS
from mmei_jax.evaluation import BestRun
from mmei_jax.extraction.audio_encoding import AudioEncoder
from mmei_jax.extraction.encoding import ClipEncoder
from mmei_jax.extraction.extraction_config import ExtractionConfig
from mmei_jax.extraction.text_encoding import TextEncoder
from mmei_jax.extraction.vision_encoding import VisionEncoder
from mmei_jax.models.mmei import ModalityInput
from mmei_jax.models.raw_encoders import FrameEncoding, RawEncoding, SampleEncoding
from mmei_jax.serving.manifest import Size, Tensor
from mmei_jax.serving.signatures import BATCH, Function, Parameters, segment_ids
from mmei_jax.types import TokenSequence

# What the outputs "features" of encoders inside a model are.
_FEATURES = {
    "vision": "a token for each frame; behind a record's last one anything",
    "audio": "tokens; zeros behind a record's last one",
    "text": "a state for each token; zeros behind a text's last one",
}


def encoder_functions(clips: ClipEncoder, config: ExtractionConfig) -> dict[str, Function]:
    """The encoders of an extraction, by name: what they give is what a fusion model on its features reads.

    Args:
        clips: the encoders.
        config: of the extraction.
    """
    found = {}
    for name, encoder in clips.encoders.items():
        if isinstance(encoder, VisionEncoder):
            function = _vision_function(encoder)
        elif isinstance(encoder, AudioEncoder):
            function = _audio_function(encoder)
        else:
            function = _text_function(encoder, config.text.max_tokens)
        found[f"{name}_encoder"] = function
    return found


def _encoder_parameters(encoder: VisionEncoder | AudioEncoder | TextEncoder, **more: Any) -> Parameters:
    settings = {"producer": dataclasses.asdict(encoder.producer), "dtype": encoder.dtype, **more}
    return Parameters(jax.device_get(flatten(encoder.parameters)), settings)


def _vision_function(encoder: VisionEncoder) -> Function:
    preprocessing = encoder.preprocessing

    def function(parameters: dict[str, dict[str, Any]], given: dict[str, Any]) -> dict[str, Any]:
        states = encoder.encode(unflatten(parameters["vision_encoder"]), given["pixels"])
        return {"features": states.astype(encoder.dtype)}

    shape = f"frames, {preprocessing.height}, {preprocessing.width}, 3"
    return Function(
        function,
        {"vision_encoder": _encoder_parameters(encoder, preprocessing=dataclasses.asdict(preprocessing))},
        (Size("frames", 1, 0),),
        (Tensor("pixels", shape, "uint8", "frames, resized as settings.preprocessing says"),),
        {"features": "a token for each frame"},
    )


def _audio_function(encoder: AudioEncoder) -> Function:
    def function(parameters: dict[str, dict[str, Any]], given: dict[str, Any]) -> dict[str, Any]:
        states, is_valid = encoder.encode(unflatten(parameters["audio_encoder"]), given["samples"], given["lengths"])
        return {"features": states.astype(encoder.dtype), "lengths": is_valid.sum(axis=1, dtype=jnp.int32)}

    preprocessing = encoder.preprocessing
    most = int(LONGEST_SECONDS * SAMPLING_RATE)
    return Function(
        function,
        {"audio_encoder": _encoder_parameters(encoder, preprocessing=dataclasses.asdict(preprocessing))},
        (BATCH, Size("samples", encoder.settings.fewest_samples, most)),
        (
            Tensor("samples", "batch, samples", "float32", "one channel, normalised as settings.preprocessing says"),
            Tensor("lengths", "batch", "int32", "samples of each row; 0 for a row of padding"),
        ),
        {"features": "tokens; zeros behind a row's last one", "lengths": "tokens of each row"},
    )


def _text_function(encoder: TextEncoder, max_tokens: int) -> Function:
    def function(parameters: dict[str, dict[str, Any]], given: dict[str, Any]) -> dict[str, Any]:
        ids = given["token_ids"]
        states = encoder.encode(unflatten(parameters["text_encoder"]), ids, segment_ids(ids, given["lengths"]))
        return {"features": states.astype(encoder.dtype)}

    return Function(
        function,
        {"text_encoder": _encoder_parameters(encoder, max_tokens=max_tokens)},
        (BATCH, Size("tokens", 1, max_tokens)),
        (
            Tensor("token_ids", "batch, tokens", "int32", "of the checkpoint's tokenizer, one text a row"),
            Tensor("lengths", "batch", "int32", "tokens of each text; 0 for a row of padding"),
        ),
        {"features": "a state for each token; zeros behind a text's last one"},
    )


@dataclass(frozen=True)
class ModalityReading:
    """How a program reads one modality of its records.

    Attributes:
        inputs: as the manifest describes them.
        size: of the rows.
        sequence: what the model takes, of the program's inputs.
    """

    inputs: tuple[Tensor, ...]
    size: Size
    sequence: Callable[[Mapping[str, Any]], TokenSequence]


def read_features(name: str, given: ModalityInput, dtype: str) -> ModalityReading:
    """A modality that comes as features.

    Args:
        name: of the modality.
        given: what the model reads of it.
        dtype: of the features.
    """
    size = Size(f"{name}_tokens", 1, given.max_tokens)
    features = Tensor(
        f"{name}_features",
        f"batch, {size.name}, {given.dim}",
        dtype,
        "tokens; behind a record's last one anything",
    )
    lengths = Tensor(f"{name}_lengths", "batch", "int32", "tokens of each record; 0 where it is absent")

    def sequence(inputs: Mapping[str, Any]) -> TokenSequence:
        tokens = inputs[features.name]
        return TokenSequence(tokens, segment_ids(tokens, inputs[lengths.name]))

    return ModalityReading((features, lengths), size, sequence)


def read_raw(name: str, encoding: RawEncoding, max_tokens: int) -> ModalityReading:
    """A modality that comes as frames, samples or token ids.

    Args:
        name: of the modality, "" for a program that reads one alone.
        encoding: of its encoder.
        max_tokens: the most frames, samples or token ids of a record.
    """
    prefix = f"{name}_" if name else ""
    if isinstance(encoding, FrameEncoding):
        height, width = encoding.image.height, encoding.image.width
        size, end = Size(f"{prefix}frames", 1, max_tokens), f", {height}, {width}, 3"
        own, dtype, told = "pixels", "uint8", "frames, resized as settings.preprocessing says"
    elif isinstance(encoding, SampleEncoding):
        size, end = Size(f"{prefix}samples", encoding.architecture.receptive_field, max_tokens), ""
        own, dtype, told = "samples", "int16", "one channel at the rate of settings.preprocessing, not normalised"
    else:
        size, end = Size(f"{prefix}tokens", 1, max_tokens), ""
        own, dtype, told = "token_ids", "int32", "of the checkpoint's tokenizer, one text a row"
    raw = Tensor(f"{prefix}{own}", f"batch, {size.name}{end}", dtype, f"{told}; behind a record's last one anything")
    unit = size.name.removeprefix(prefix)
    lengths = Tensor(f"{prefix}lengths", "batch", "int32", f"{unit} of each record; 0 where it is absent")

    def sequence(inputs: Mapping[str, Any]) -> TokenSequence:
        tokens = inputs[raw.name]
        ids = segment_ids(tokens, inputs[lengths.name])
        return TokenSequence(tokens.reshape(*ids.shape, math.prod(tokens.shape[2:])), ids)

    return ModalityReading((raw, lengths), size, sequence)


def inner_parameters(run: BestRun) -> dict[str, Parameters]:
    """Parameters of the encoders inside a run's model, by modality.

    Args:
        run: any.
    """
    spec, found = run.dataset.spec, {}
    for name, given in run.model.tasks.inputs().items():
        if given.encoder is None:
            continue
        settings = {"producer": dataclasses.asdict(spec.modalities[name].producer), "dtype": "float32"}
        encoding = given.encoder
        if isinstance(encoding, FrameEncoding):
            settings["preprocessing"] = dataclasses.asdict(encoding.image)
        elif isinstance(encoding, SampleEncoding):
            settings["preprocessing"] = dataclasses.asdict(encoding.audio)
        arrays = jax.device_get(flatten(run.variables["params"][f"encoder_{name}"]))
        found[name] = Parameters(arrays, {**settings, "max_tokens": given.max_tokens})
    return found


def inner_encoder_functions(run: BestRun) -> dict[str, Function]:
    """The encoders inside a run's model, by name: from frames, samples and token ids to what its fusion reads.

    Args:
        run: any.
    """
    groups, inputs = inner_parameters(run), run.model.tasks.inputs()
    return {f"{name}_encoder": _inner_function(name, inputs[name], group) for name, group in groups.items()}


def _inner_function(name: str, given: ModalityInput, parameters: Parameters) -> Function:
    encoding: Any = given.encoder
    reading = read_raw("", encoding, given.max_tokens)

    def function(parameters: dict[str, dict[str, Any]], inputs: dict[str, Any]) -> dict[str, Array]:
        own = {"params": unflatten(parameters[f"{name}_encoder"])}
        encoded = encoding.make().apply(own, reading.sequence(inputs))
        # Tokens of a record come first.
        lengths = (encoded.segment_ids > 0).sum(axis=1, dtype=jnp.int32)
        return {"features": encoded.features, "lengths": lengths}

    return Function(
        function,
        {f"{name}_encoder": parameters},
        (BATCH, reading.size),
        reading.inputs,
        {"features": _FEATURES[name], "lengths": "tokens of each record"},
    )
