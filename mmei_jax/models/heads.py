"""Task heads (Eq. 4-5), and the embeddings that Eq. 7 compares."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from mmei_jax.activations import placed
from mmei_jax.config import ModelConfig
from mmei_jax.encoders.transformer import Dense, EncoderLayer, LayerNorm, embedding_init, placed_states, with_axes

# Shorter vectors have no direction worth keeping.
_SMALLEST_NORM = 1e-6


class TaskHead(nn.Module):
    """One of the paper's parallel heads: a Transformer encoder over [F, v, a, t], read at F, then a linear layer.

    With ``head_num_layers`` 0 it is Eq. 4-5 to the letter: the linear layer on F.

    Attributes:
        config: sizes and rates.
        num_outputs: classes, or 1 for a regression.
    """

    config: ModelConfig
    num_outputs: int

    @nn.compact
    def __call__(
        self,
        fused: Float[Array, "batch dim"],
        vectors: Float[Array, "batch modalities dim"],
        is_present: Bool[Array, "batch modalities"],
        *,
        is_training: bool,
    ) -> tuple[Float[Array, "batch outputs"], Float[Array, "batch dim"]]:
        """Logits ``[batch, num_outputs]`` and the state ``[batch, dim]`` that they are read from, float32.

        Args:
            fused: ``[batch, dim]`` float32, F of Eq. 3.
            vectors: ``[batch, modalities, dim]`` float32 modality vectors.
            is_present: ``[batch, modalities]`` bool; an absent modality is not attended to.
            is_training: whether dropout is on.
        """
        config, state = self.config, fused
        if config.head_num_layers > 0:
            tokens = jnp.concatenate([fused[:, None], vectors], axis=1)
            init = with_axes(embedding_init, "position", "embed")
            tokens = tokens + self.param("token_embedding", init, tokens.shape[1:])[None]
            is_token = jnp.pad(is_present, ((0, 0), (1, 0)), constant_values=True)
            mask = jnp.broadcast_to(is_token[:, None, :], (*tokens.shape[:2], tokens.shape[1]))
            for index in range(config.head_num_layers):
                tokens = EncoderLayer(
                    config.num_heads,
                    config.feedforward_dim,
                    config.dropout_rate,
                    config.compute_dtype,
                    name=f"layer_{index}",
                )(tokens, mask, is_training=is_training)
            state = LayerNorm(name="norm")(tokens[:, 0])
        state = placed_states(state)
        logits = Dense(self.num_outputs, ("embed", "classes"), name="logits")(state)
        return placed(logits, "batch", "classes"), state


def finish_embedding(embedding: Float[Array, "*batch embedding"], normalize: bool) -> Float[Array, "*batch embedding"]:
    """The embedding as Eq. 7 uses it: scaled to unit length, or as it is.

    A vector shorter than 1e-6 becomes 0 with zero gradient, so that both are finite everywhere.

    Args:
        embedding: ``[..., embedding]`` float32.
        normalize: whether to scale to unit length.
    """
    embedding = placed_states(embedding)
    if not normalize:
        return embedding
    squared = jnp.square(embedding).sum(axis=-1, keepdims=True)
    has_direction = squared > _SMALLEST_NORM**2
    return jnp.where(has_direction, embedding * jax.lax.rsqrt(jnp.where(has_direction, squared, 1.0)), 0.0)
