"""Fusion of the modalities: common space (Eq. 1), Cross-Modal Transformer (Eq. 2), weighted sum (Eq. 3).

Dicts are keyed by modality and hold the modalities that the model was built for; one that a record lacks is there as
padding. They are read in the order of :data:`~mmei_jax.types.MODALITIES`, never in their own: JAX sorts dicts by key.
"""

from collections.abc import Iterable
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from mmei_jax.activations import placed
from mmei_jax.config import ModelConfig
from mmei_jax.encoders.transformer import (
    Dense,
    Dropout,
    FeedForward,
    LayerNorm,
    MultiHeadAttention,
    add_branch,
    attend,
    attendable,
    embedding_init,
    masked_softmax,
    placed_states,
    positions_in_segment,
    with_axes,
)
from mmei_jax.types import MODALITIES, TokenSequence

# "_": the modalities of one dict differ in their number of tokens.
States = dict[str, Float[Array, "rows _ dim"]]
SegmentIds = dict[str, Int[Array, "rows _"]]


def ordered(modalities: Iterable[str]) -> list[str]:
    """These modalities in the order of :data:`~mmei_jax.types.MODALITIES`."""
    return sorted(modalities, key=MODALITIES.index)


def record_membership(segment_ids: Int[Array, "rows tokens"], num_segments: int) -> Bool[Array, "rows segments tokens"]:
    """Which tokens belong to each record of a row.

    Args:
        segment_ids: ``[rows, tokens]`` int32, 0 for padding.
        num_segments: records per row.
    """
    return segment_ids[:, None, :] == jnp.arange(1, num_segments + 1, dtype=segment_ids.dtype)[None, :, None]


def hide_modalities(
    key: Array, segment_ids: SegmentIds, num_segments: int, rate: float | Float[Array, ""]
) -> SegmentIds:
    """Modality dropout: hides whole modalities of single records, by turning their tokens into padding.

    Each modality that a record has is hidden with probability ``rate``, independently; where that would hide all, one
    of them, drawn uniformly, stays. So one of ``n`` present modalities is hidden with probability
    ``rate - rate**n / n``, and the only one never.

    Args:
        key: random key; the same key hides the same.
        segment_ids: per modality ``[rows, tokens]`` int32.
        num_segments: records per row.
        rate: in [0, 1), may be traced.
    """
    names = ordered(segment_ids)
    membership = {name: record_membership(segment_ids[name], num_segments) for name in names}
    is_present = jnp.stack([membership[name].any(axis=-1) for name in names], axis=-1)
    draws = jnp.where(is_present, jax.random.uniform(key, is_present.shape), -1.0)
    is_kept = (draws >= rate) | (draws == draws.max(axis=-1, keepdims=True))
    hidden_ids = {}
    for index, name in enumerate(names):
        is_kept_token = (membership[name] & is_kept[:, :, index, None]).any(axis=1)
        hidden_ids[name] = jnp.where(is_kept_token, segment_ids[name], 0)
    return hidden_ids


def standardized(module: nn.Module, sequence: TokenSequence) -> Float[Array, "rows tokens dim"]:
    """Features centred and scaled by the constants ``mean`` and ``scale`` of the module's ``statistics``; 0 in padding.

    Args:
        module: gets the two variables, 0 and 1 unless training set them; in its compact ``__call__``.
        sequence: features ``[rows, tokens, dim]`` of any type; what padding holds, NaN included, has no effect.
    """
    size = (sequence.features.shape[-1],)
    mean = module.variable("statistics", "mean", jnp.zeros, size).value
    scale = module.variable("statistics", "scale", jnp.ones, size).value
    return standardize(sequence, mean, scale)


def standardize(
    sequence: TokenSequence, mean: Float[Array, "dim"], scale: Float[Array, "dim"]
) -> Float[Array, "rows tokens dim"]:
    """``(features - mean) * scale``, float32; 0 in padding, whatever it holds."""
    is_token = (sequence.segment_ids > 0)[..., None]
    return jnp.where(is_token, (sequence.features.astype(jnp.float32) - mean[None, None]) * scale[None, None], 0.0)


class ModalityEmbedding(nn.Module):
    """Eq. 1: token features of one modality, in the common space.

    Features are standardised with the constants ``mean`` and ``scale`` of the ``statistics`` collection (0 and 1
    unless training set them): ``(x - mean) * scale``. What padding holds, NaN included, has no effect. Beyond Eq. 1,
    and unless switched off: a bias, a learned modality-type embedding, and a learned embedding of the position within
    the token's own record.

    Attributes:
        config: sizes and switches.
        max_positions: length of the position table. A token beyond it gets NaN, which stops a run, never a wrong row.
    """

    config: ModelConfig
    max_positions: int

    @nn.compact
    def __call__(
        self, sequence: TokenSequence, is_masked: Bool[Array, "rows tokens"] | None = None, *, is_training: bool
    ) -> Float[Array, "rows tokens dim"]:
        """Maps features ``[rows, tokens, input_dim]`` to float32 ``[rows, tokens, dim]``; finite where padded.

        Args:
            sequence: features and segment ids.
            is_masked: tokens of which nothing but modality and position is shown: a learned vector stands for their
                projection. The vector is there only if this is given; None masks nothing.
            is_training: whether dropout is on.
        """
        config = self.config
        features = standardized(self, sequence)
        states = Dense(
            config.dim,
            ("features", "embed"),
            use_bias=config.projection_bias,
            compute_dtype=config.compute_dtype,
            name="projection",
        )(features)
        if is_masked is not None:
            vector = self.param("mask_embedding", with_axes(embedding_init, "embed"), (config.dim,))
            states = jnp.where(is_masked[..., None], vector[None, None], states)
        if config.modality_embedding:
            type_embedding = self.param("type_embedding", with_axes(embedding_init, "embed"), (config.dim,))
            states = states + type_embedding[None, None]
        if config.position_embedding:
            shape = (self.max_positions, config.dim)
            table = self.param("position_embedding", with_axes(embedding_init, "position", "embed"), shape)
            positions = positions_in_segment(sequence.segment_ids)
            # A product with one-hot rows: its gradient is a product too, where a gather's is a slow scatter.
            one_hot = jax.nn.one_hot(positions, self.max_positions, dtype=jnp.float32)
            rows = jnp.matmul(one_hot, table, precision=jax.lax.Precision.HIGHEST)
            states = states + jnp.where(positions[..., None] < self.max_positions, rows, jnp.nan)
        return Dropout(config.dropout_rate)(placed_states(states), is_training=is_training)

    def standardized_features(self, sequence: TokenSequence) -> Float[Array, "rows tokens input_dim"]:
        """What is projected: standardised features, 0 in padding. For a module that has been called."""
        return standardize(sequence, *(self.get_variable("statistics", name) for name in ("mean", "scale")))


class CrossModalLayer(nn.Module):
    """Self-attention, cross-attention to all other modalities, feed-forward; pre-norm, parameters per modality.

    All modalities read one another as they are after self-attention, so their order does not matter.

    Attributes:
        config: sizes and rates.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        states: States,
        self_masks: dict[str, Bool[Array, "rows _ _"]],
        cross_masks: dict[str, Bool[Array, "rows _ _"]],
        *,
        is_training: bool,
    ) -> States:
        """The states after the layer.

        Args:
            states: per modality ``[rows, tokens, dim]`` float32.
            self_masks: per modality, which of its tokens each of its tokens may attend to.
            cross_masks: per modality, which tokens of the others, concatenated in order, each may attend to; empty
                where there is no cross-attention: with one modality, or when it is switched off.
            is_training: whether dropout is on.
        """
        config = self.config
        drop = partial(Dropout(config.dropout_rate), is_training=is_training)
        attention = partial(MultiHeadAttention, config.num_heads, config.compute_dtype)
        after_self = {}
        for name, state in states.items():
            normed = LayerNorm(name=f"{name}_self_norm")(state)
            read = attention(name=f"{name}_self_attention")(normed, normed, self_masks[name])
            after_self[name] = add_branch(state, drop(read))
        after_cross = dict(after_self)
        if cross_masks:
            normed_states = {name: LayerNorm(name=f"{name}_cross_norm")(state) for name, state in after_self.items()}
            for name, state in after_self.items():
                others = jnp.concatenate([normed_states[other] for other in ordered(states) if other != name], axis=1)
                read = attention(name=f"{name}_cross_attention")(normed_states[name], others, cross_masks[name])
                after_cross[name] = add_branch(state, drop(read))
        after = {}
        for name, state in after_cross.items():
            feed_forward = FeedForward(config.feedforward_dim, config.compute_dtype, name=f"{name}_feed_forward")
            hidden = feed_forward(LayerNorm(name=f"{name}_feed_forward_norm")(state))
            after[name] = add_branch(state, drop(hidden))
        return after


class CrossModalTransformer(nn.Module):
    """The paper's Cross-Modal Transformer (section 4.2): layers, then a norm per modality.

    Attributes:
        config: sizes and rates.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self, states: States, segment_ids: SegmentIds, *, is_training: bool, reads_others: bool = True
    ) -> States:
        """Contextual states of every token; a token reads tokens of its own record only.

        Args:
            states: per modality ``[rows, tokens, dim]`` float32.
            segment_ids: per modality ``[rows, tokens]`` int32, 0 for padding.
            is_training: whether dropout is on.
            reads_others: False leaves cross-attention out: every modality as if the record had no other, whose
                cross-attention gives zero.

        Returns:
            Per modality ``[rows, tokens, dim]`` float32; arbitrary but finite where padded.
        """
        self_masks = {name: attendable(ids, ids) for name, ids in segment_ids.items()}
        cross_masks = {}
        if reads_others and len(states) > 1 and self.config.cross_attention:
            for name, ids in segment_ids.items():
                others = jnp.concatenate(
                    [segment_ids[other] for other in ordered(segment_ids) if other != name], axis=1
                )
                cross_masks[name] = attendable(ids, others)
        for index in range(self.config.num_layers):
            layer = CrossModalLayer(self.config, name=f"layer_{index}")
            states = layer(states, self_masks, cross_masks, is_training=is_training)
        return {name: LayerNorm(name=f"{name}_norm")(state) for name, state in states.items()}


class Pooling(nn.Module):
    """From the token states of one modality to one vector for each record.

    Attributes:
        kind: "mean" over the record's tokens, "attention" (a learned query reads them), or its "first" token.
    """

    kind: str

    @nn.compact
    def __call__(
        self, states: Float[Array, "rows tokens dim"], segment_ids: Int[Array, "rows tokens"], num_segments: int
    ) -> Float[Array, "rows segments dim"]:
        """``[rows, segments, dim]`` float32; exactly 0, with zero gradient, for a record without tokens."""
        membership = record_membership(segment_ids, num_segments)
        if self.kind == "attention":
            rows, tokens, dim = states.shape
            query = self.param("query", with_axes(nn.initializers.normal(stddev=1.0), "embed"), (dim,))
            queries = jnp.broadcast_to(query, (rows, num_segments, 1, dim))
            keys = states.reshape(rows, tokens, 1, dim)
            return attend(queries, keys, keys, membership)[:, :, 0]
        if self.kind == "first":
            weights = (membership & (jnp.cumsum(membership, axis=-1) == 1)).astype(jnp.float32)
        else:
            weights = membership / jnp.maximum(membership.sum(axis=-1, keepdims=True), 1).astype(jnp.float32)
        return jnp.einsum("rst,rtd->rsd", weights, states, precision=jax.lax.Precision.HIGHEST)


class ModalityWeighting(nn.Module):
    """Eq. 3's alpha: a softmax, over the modalities that a record has, of learned scores.

    Departs from the paper, which leaves the score open and does not treat absent modalities.

    Attributes:
        kind: "additive": ``w_m . tanh(W_m v_m + b_m)`` for each modality; "concatenation": one such scorer for all, on
            the concatenated vectors; "scalars": one learned number for each modality; "uniform": the same for all that
            are present, nothing learned (an ablation).
    """

    kind: str

    @nn.compact
    def __call__(
        self, vectors: dict[str, Float[Array, "batch dim"]], is_present: Bool[Array, "batch modalities"]
    ) -> Float[Array, "batch modalities"]:
        """Alpha, float32, one column for each entry of ``vectors``, in the order of MODALITIES.

        Exactly 0, and with exactly zero gradient, for an absent modality; all 0 for a record that has none.

        Args:
            vectors: per modality ``[batch, dim]`` float32, 0 where absent.
            is_present: ``[batch, modalities]`` bool, one column for each entry of ``vectors``.
        """
        names = ordered(vectors)
        if self.kind == "uniform":
            scores = jnp.zeros((1, len(names)), jnp.float32)
        elif self.kind == "scalars":
            init = with_axes(nn.initializers.zeros)
            scores = jnp.stack([self.param(f"{name}_score", init, ()) for name in names])[None]
        elif self.kind == "concatenation":
            joined = jnp.concatenate([vectors[name] for name in names], axis=-1)
            scores = self._score("scorer", joined, joined.shape[-1] // len(names), len(names))
        else:
            each = [self._score(f"{name}_scorer", vectors[name], vectors[name].shape[-1], 1) for name in names]
            scores = jnp.concatenate(each, axis=-1)
        return masked_softmax(jnp.broadcast_to(scores, is_present.shape), is_present)

    def _score(self, name: str, x: Array, hidden_dim: int, num_scores: int) -> Array:
        hidden = placed(jnp.tanh(Dense(hidden_dim, ("embed", "mlp"), name=f"{name}_hidden")(x)), "batch", "mlp")
        return Dense(num_scores, ("mlp", "classes"), use_bias=num_scores > 1, name=f"{name}_output")(hidden)


def weighted_sum(
    weights: Float[Array, "batch modalities"], vectors: Float[Array, "batch modalities dim"]
) -> Float[Array, "batch dim"]:
    """Eq. 3: F, the sum of the modality vectors weighed by alpha.

    Args:
        weights: ``[batch, modalities]`` float32, 0 where absent.
        vectors: ``[batch, modalities, dim]`` float32, 0 where absent.
    """
    return placed_states((weights[..., None] * vectors).sum(axis=1))
