"""The content tower: E_c of Eq. 7, an item's embedding from its words, features and kind."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from mmei_jax.config import ModelConfig
from mmei_jax.encoders.bert import Bert, BertConfig
from mmei_jax.encoders.outputs import mean_of_tokens
from mmei_jax.encoders.stack import ComputeOptions
from mmei_jax.encoders.transformer import Dense, LayerNorm, embedding_init, with_axes
from mmei_jax.models.heads import finish_embedding
from mmei_jax.types import Items


class ContentTower(nn.Module):
    """E_c of Eq. 7: an embedding of the item's kind, plus projections of its features and of BERT's state of its words.

    The words' state is the mean over their tokens, normalised. Each source has a projection of its own: in one of both,
    the few features would begin at a fraction of the weight of the many of the words. A frozen BERT is no part of the
    tower: its states come with the items. A BERT that is trained is; it has no dropout, as everywhere in this package.

    Attributes:
        config: sizes and switches.
        num_kinds: kinds of content (music, video ...).
        reads_features: whether the item features take part.
        word_encoder: the BERT that is trained with the tower; None without one.
        reads_word_states: whether a frozen BERT's states of the words take part.
    """

    config: ModelConfig
    num_kinds: int
    reads_features: bool = True
    word_encoder: BertConfig | None = None
    reads_word_states: bool = False

    @nn.compact
    def __call__(self, items: Items) -> Float[Array, "*items embedding"]:
        """``[..., embedding]`` float32, of unit length if the configuration says so; features must be finite.

        Raises:
            ValueError: the tower reads words, and the items have no token ids or no states of them.
        """
        size = self.config.embedding_dim
        project = partial(Dense, size, ("features", "embed"), compute_dtype=self.config.compute_dtype)
        table = self.param("kind_embedding", with_axes(embedding_init, "kind", "embed"), (self.num_kinds, size))
        one_hot = jax.nn.one_hot(items.kind, self.num_kinds, dtype=jnp.float32)
        embedding = jnp.matmul(one_hot, table, precision=jax.lax.Precision.HIGHEST)
        if self.reads_features:
            embedding += project(name="projection")(items.features)
        words = items.word_state if self.reads_word_states else None
        if self.reads_word_states and words is None:
            raise ValueError("items.word_state: expected an encoder's states of the items' words")
        if self.word_encoder is not None:
            if items.word_ids is None:
                raise ValueError("items.word_ids: expected token ids for the content tower's encoder")
            words = self._encode(self.word_encoder, items.word_ids)
        if words is not None:
            # The kind's embedding is its bias.
            embedding += project(name="word_projection", use_bias=False)(LayerNorm(name="word_norm")(words))
        return finish_embedding(embedding, self.config.normalize_embeddings)

    def _encode(self, encoder: BertConfig, word_ids: Int[Array, "*items tokens"]) -> Float[Array, "*items words"]:
        rows = word_ids.reshape(-1, word_ids.shape[-1])
        is_token = rows >= 0
        bert = Bert(encoder, ComputeOptions(compute_dtype=self.config.compute_dtype), name="encoder")
        states = bert(rows, is_token).last_hidden_state
        return mean_of_tokens(states, is_token).reshape(*word_ids.shape[:-1], -1)
