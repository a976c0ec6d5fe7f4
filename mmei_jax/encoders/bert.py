"""BERT: token ids to states, several texts per row if packed.

Equal to Hugging Face's ``BertModel`` on every text alone (`tests/bert_test.py` measures how nearly), for any size,
vocabulary, number of token types, with and without pooler. A text's outputs do not depend on the padding or the texts
around it: positions count within each text, and attention stays within it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from mmei_jax.encoders.hugging_face_config import ConfigReader
from mmei_jax.encoders.outputs import (
    ArrayLike,
    EncoderOutputs,
    first_token,
    is_token_of_segment,
    nan_where_dropped,
)
from mmei_jax.encoders.stack import ComputeOptions, Stack, StackConfig
from mmei_jax.encoders.transformer import (
    Dense,
    LayerNorm,
    attendable,
    embedding_init,
    positions_in_segment,
    with_axes,
)
from mmei_jax.types import InputError


@dataclass(frozen=True)
class BertConfig:
    """Architecture of a BERT.

    Attributes:
        stack: shape of the layers.
        vocabulary_size: token ids are in ``[0, vocabulary_size)``.
        max_tokens: longest text, in tokens.
        num_token_types: token types are in ``[0, num_token_types)``.
        has_pooler: whether the first token's state goes through a further linear layer and tanh.
    """

    stack: StackConfig
    vocabulary_size: int
    max_tokens: int
    num_token_types: int
    has_pooler: bool = True

    def __post_init__(self) -> None:
        for name in ("vocabulary_size", "max_tokens", "num_token_types"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} = {getattr(self, name)}: expected at least 1")

    @classmethod
    def read(cls, reader: ConfigReader, *, has_pooler: bool = True) -> "BertConfig":
        """Reads the keys of a ``config.json``; see :meth:`from_hugging_face`."""
        reader.refuse("position_embedding_type", "absolute", None)
        reader.refuse("is_decoder", False)
        reader.refuse("add_cross_attention", False)
        reader.refuse("is_encoder_decoder", False)
        stack = StackConfig(
            num_layers=reader.get("num_hidden_layers", 12),
            dim=reader.get("hidden_size", 768),
            num_heads=reader.get("num_attention_heads", 12),
            feedforward_dim=reader.get("intermediate_size", 3072),
            activation=reader.get("hidden_act", "gelu"),
            layer_norm_epsilon=reader.get("layer_norm_eps", 1e-12),
            norm_comes_first=False,
        )
        return cls(
            stack=stack,
            vocabulary_size=reader.get("vocab_size", 30522),
            max_tokens=reader.get("max_position_embeddings", 512),
            num_token_types=reader.get("type_vocab_size", 2),
            has_pooler=has_pooler,
        )

    @classmethod
    def from_hugging_face(cls, config: Mapping[str, Any], *, has_pooler: bool = True) -> "BertConfig":
        """The architecture that a Hugging Face ``config.json`` of type ``bert`` describes.

        Args:
            config: what the file holds; missing keys have Hugging Face's defaults.
            has_pooler: the file does not say it: base models have one, those trained on masked tokens have none.

        Raises:
            InputError: another model type, a value of the wrong kind, or a feature that is not implemented.
        """
        return cls.read(ConfigReader(config, "bert"), has_pooler=has_pooler)


class Embedding(nn.Module):
    """A table of learned vectors.

    Attributes:
        num_entries: rows of the table.
        dim: features of a vector.
        axis: logical name of the table's first dimension.
    """

    num_entries: int
    dim: int
    axis: str

    @nn.compact
    def __call__(self, index: Int[Array, "rows tokens"]) -> Float[Array, "rows tokens dim"]:
        """Looks vectors up; an index outside the table gives NaN, never another entry."""
        table = self.param("embedding", with_axes(embedding_init, self.axis, "embed"), (self.num_entries, self.dim))
        # A negative index would count from the end.
        index = jnp.where(index < 0, self.num_entries, index)
        return table.at[index].get(mode="fill", fill_value=jnp.nan).astype(jnp.float32)


class Bert(nn.Module):
    """The encoder.

    Attributes:
        config: architecture.
        options: how it is computed.
    """

    config: BertConfig
    options: ComputeOptions = ComputeOptions()

    @nn.compact
    def __call__(
        self,
        token_ids: Int[ArrayLike, "rows tokens"],
        segment_ids: Int[ArrayLike, "rows tokens"] | Bool[ArrayLike, "rows tokens"],
        token_type_ids: Int[ArrayLike, "rows tokens"] | None = None,
        *,
        num_segments: int = 1,
        with_hidden_states: bool = False,
    ) -> EncoderOutputs:
        """Encodes rows of one or several texts.

        An id, type or position outside its table makes the row's outputs NaN: values cannot be checked inside a
        compiled program, and no other embedding takes their place. So does a text beyond ``num_segments`` with the
        row's pooled outputs.

        Args:
            token_ids: ``[rows, tokens]`` int32; padding may hold anything.
            segment_ids: ``[rows, tokens]`` int32: 0 is padding, ``s >= 1`` a token of the row's ``s``-th text. For one
                text per row this is the tokenizer's ``attention_mask``.
            token_type_ids: ``[rows, tokens]`` int32; all 0 where not given.
            num_segments: texts per row, at most; ``pooled`` has as many entries per row. Changes nothing else.
            with_hidden_states: whether the states around each layer are returned too.

        Raises:
            InputError: rows have no place for a token (a text without any is an index that ``segment_ids`` lacks; its
                ``pooled`` is zeros), or there is a pooler and ``segment_ids`` hold more than ``num_segments``, outside
                compiled programs, in which no value can be checked.
        """
        config = self.config
        dim = config.stack.dim
        given_segment_ids = segment_ids
        # A tokenizer's mask may be of bools.
        segment_ids = jnp.asarray(segment_ids, jnp.int32)
        if segment_ids.shape[1] == 0:
            raise InputError("rows of 0 tokens: expected at least 1")
        is_valid = segment_ids > 0
        token_ids = jnp.where(is_valid, token_ids, 0)
        token_type_ids = jnp.zeros_like(token_ids) if token_type_ids is None else jnp.where(is_valid, token_type_ids, 0)
        states = (
            Embedding(config.vocabulary_size, dim, "vocabulary", name="token_embedding")(token_ids)
            + Embedding(config.num_token_types, dim, "kind", name="token_type_embedding")(token_type_ids)
            + Embedding(config.max_tokens, dim, "position", name="position_embedding")(
                positions_in_segment(segment_ids)
            )
        )
        states = LayerNorm(epsilon=config.stack.layer_norm_epsilon, name="embedding_norm")(states)
        stack = Stack(config.stack, self.options, name="encoder")
        all_states = stack(states, attendable(segment_ids, segment_ids), keeps_all=with_hidden_states)
        all_states = tuple(jnp.where(is_valid[..., None], states, 0.0) for states in all_states)

        pooled = None
        if config.has_pooler:
            pooler = Dense(dim, ("embed", "features"), compute_dtype=self.options.compute_dtype, name="pooler")
            pooled = jnp.tanh(pooler(first_token(all_states[-1], given_segment_ids, num_segments)))
            has_tokens = is_token_of_segment(given_segment_ids, num_segments).any(axis=-1)
            pooled = jnp.where(has_tokens.reshape(-1, 1), pooled, 0.0)
            pooled = nan_where_dropped(pooled, segment_ids, num_segments)
        return EncoderOutputs(
            last_hidden_state=all_states[-1],
            is_valid=is_valid,
            pooled=pooled,
            hidden_states=all_states if with_hidden_states else None,
        )
