"""Encoders inside the model: frames, samples and token ids of a batch to the token features that Eq. 1 projects.

Each does on the device what :mod:`mmei_jax.extraction` does before training, so that a model whose encoders are frozen
equals the one that reads their features. A token of padding, and a row that lacks the modality, have segment id 0
before and after; what the encoder makes of them has no effect.
"""

import abc
import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Shaped

from mmei_jax.encoders.bert import Bert, BertConfig
from mmei_jax.encoders.outputs import mean_of_frames, sum_of_last_layers
from mmei_jax.encoders.preprocessing import VARIANCE_EPSILON, AudioPreprocessing, ImagePreprocessing
from mmei_jax.encoders.stack import ComputeOptions
from mmei_jax.encoders.vit import Vit, VitConfig, mean_of_patches
from mmei_jax.encoders.wav2vec2 import Wav2Vec2, Wav2Vec2Config
from mmei_jax.types import TokenSequence

# int16 samples stand for [-1, 1].
LARGEST_SAMPLE = 32767


@dataclass(frozen=True)
class RawEncoding(abc.ABC):
    """What the model makes of a modality's raw tokens.

    Attributes:
        options: how the encoder is computed.
    """

    options: ComputeOptions

    @property
    @abc.abstractmethod
    def dim(self) -> int:
        """Features of a token that it gives."""

    def num_tokens(self, num_given: int) -> int:
        """Tokens that it makes of so many raw ones."""
        return num_given

    @abc.abstractmethod
    def make(self) -> nn.Module:
        """The module from a :class:`TokenSequence` of raw tokens to one of features, not yet applied."""

    @abc.abstractmethod
    def example(self, num_given: int) -> Shaped[np.ndarray, "1 tokens dim"]:
        """Zeros of the type and shape of one record's raw tokens, so many of them."""


@dataclass(frozen=True)
class FrameEncoding(RawEncoding):
    """Frames through a ViT.

    Attributes:
        architecture: of the ViT, without its pooler.
        image: how pixels are scaled, and the size of a frame.
        token: which state stands for a frame, "first" or "mean_of_patches".
    """

    architecture: VitConfig
    image: ImagePreprocessing
    token: Literal["first", "mean_of_patches"]

    @property
    def dim(self) -> int:
        """Features of a token that it gives."""
        return self.architecture.stack.dim

    def make(self) -> nn.Module:
        """See :meth:`RawEncoding.make`."""
        return FrameEncoder(self)

    def example(self, num_given: int) -> Shaped[np.ndarray, "1 tokens dim"]:
        """See :meth:`RawEncoding.example`."""
        return np.zeros((1, num_given, self.image.height * self.image.width * 3), np.uint8)


@dataclass(frozen=True)
class SampleEncoding(RawEncoding):
    """Samples through a Wav2Vec2.

    Attributes:
        architecture: of the Wav2Vec2.
        audio: whether each record's samples get mean 0 and variance 1.
        layers: "last", or "sum_of_last_four".
        frames_per_token: frames that follow each other, whose mean is a token.
    """

    architecture: Wav2Vec2Config
    audio: AudioPreprocessing
    layers: Literal["last", "sum_of_last_four"]
    frames_per_token: int

    @property
    def dim(self) -> int:
        """Features of a token that it gives."""
        architecture = self.architecture
        return architecture.adapter_dim if architecture.num_adapter_layers else architecture.stack.dim

    def num_tokens(self, num_given: int) -> int:
        """Tokens that it makes of so many samples."""
        return -(-int(self.architecture.num_frames(num_given)) // self.frames_per_token)

    def make(self) -> nn.Module:
        """See :meth:`RawEncoding.make`."""
        return SampleEncoder(self)

    def example(self, num_given: int) -> Shaped[np.ndarray, "1 tokens dim"]:
        """See :meth:`RawEncoding.example`."""
        return np.zeros((1, num_given, 1), np.int16)


@dataclass(frozen=True)
class WordEncoding(RawEncoding):
    """Token ids through a BERT.

    Attributes:
        architecture: of the BERT, without its pooler.
    """

    architecture: BertConfig

    @property
    def dim(self) -> int:
        """Features of a token that it gives."""
        return self.architecture.stack.dim

    def make(self) -> nn.Module:
        """See :meth:`RawEncoding.make`."""
        return WordEncoder(self)

    def example(self, num_given: int) -> Shaped[np.ndarray, "1 tokens dim"]:
        """See :meth:`RawEncoding.example`."""
        return np.zeros((1, num_given, 1), np.int32)


class FrameEncoder(nn.Module):
    """Frames to one token each; its parameters are those of :class:`~mmei_jax.encoders.vit.Vit`.

    Attributes:
        encoding: which encoder, and how.
    """

    encoding: FrameEncoding

    @nn.compact
    def __call__(self, sequence: TokenSequence) -> TokenSequence:
        """Features ``[rows, frames, height * width * 3]`` uint8 to ``[rows, frames, dim]`` float32."""
        encoding = self.encoding
        vit = Vit(encoding.architecture, encoding.options)
        nn.share_scope(self, vit)
        rows, frames, _ = sequence.features.shape
        pixels = sequence.features.reshape(rows * frames, encoding.image.height, encoding.image.width, 3)
        outputs = vit(encoding.image.normalise(pixels))
        states = mean_of_patches(outputs) if encoding.token == "mean_of_patches" else outputs.last_hidden_state[:, 0]
        return TokenSequence(states.reshape(rows, frames, -1), sequence.segment_ids)


class SampleEncoder(nn.Module):
    """Samples to tokens; its parameters are those of :class:`~mmei_jax.encoders.wav2vec2.Wav2Vec2`.

    Attributes:
        encoding: which encoder, and how.
    """

    encoding: SampleEncoding

    @nn.compact
    def __call__(self, sequence: TokenSequence) -> TokenSequence:
        """Features ``[rows, samples, 1]`` int16, one record a row, to ``[rows, tokens, dim]`` float32.

        A row of fewer samples than the encoder's receptive field gives no token.
        """
        encoding = self.encoding
        is_sample = sequence.segment_ids > 0
        samples = sequence.features[..., 0].astype(jnp.float32) / LARGEST_SAMPLE
        if encoding.audio.is_normalised:
            samples = normalised_samples(samples, is_sample)
        sums = encoding.layers == "sum_of_last_four"
        wav2vec2 = Wav2Vec2(encoding.architecture, encoding.options)
        nn.share_scope(self, wav2vec2)
        outputs = wav2vec2(samples, is_sample.sum(axis=1), with_hidden_states=sums)
        states = sum_of_last_layers(outputs) if sums else outputs.last_hidden_state
        states, is_token = mean_of_frames(states, outputs.is_valid, encoding.frames_per_token)
        return TokenSequence(states, is_token.astype(jnp.int32))


class WordEncoder(nn.Module):
    """Token ids to states; its parameters are those of :class:`~mmei_jax.encoders.bert.Bert`.

    Attributes:
        encoding: which encoder, and how.
    """

    encoding: WordEncoding

    @nn.compact
    def __call__(self, sequence: TokenSequence) -> TokenSequence:
        """Features ``[rows, tokens, 1]`` int32, several records a row if packed, to ``[rows, tokens, dim]`` float32."""
        bert = Bert(self.encoding.architecture, self.encoding.options)
        nn.share_scope(self, bert)
        outputs = bert(sequence.features[..., 0], sequence.segment_ids)
        return TokenSequence(outputs.last_hidden_state, sequence.segment_ids)


def normalised_samples(
    samples: Float[Array, "rows samples"], is_sample: Bool[Array, "rows samples"]
) -> Float[Array, "rows samples"]:
    """Each row's samples with mean 0 and variance 1, padding 0, as :meth:`AudioPreprocessing.normalise` gives a clip's.

    Args:
        samples: ``[rows, samples]`` float32.
        is_sample: False for padding, which takes no part. A row of padding alone gives zeros.
    """
    count = jnp.maximum(is_sample.sum(axis=1, keepdims=True), 1)
    centred = jnp.where(is_sample, samples - jnp.where(is_sample, samples, 0.0).sum(axis=1, keepdims=True) / count, 0.0)
    variance = jnp.square(centred).sum(axis=1, keepdims=True) / count
    return centred / jnp.sqrt(variance + VARIANCE_EPSILON)


def without_pooler(architecture: Any) -> Any:
    """The same BERT or ViT without its pooler, which nothing here reads and which would be trained on nothing."""
    return dataclasses.replace(architecture, has_pooler=False)
