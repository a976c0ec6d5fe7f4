"""MMEI with objectives that need no label: each modality alone, to be aligned with the others, and masked ones.

Two passes through the model's own layers, beside the one that its tasks read:

* every modality alone, without cross-attention: exactly what the model makes of a record that has no other. Its pooled
  vectors, projected, are compared by the contrastive objective; nothing of another modality leaks into them.
* with one modality of each record masked, whose tokens are then predicted from the states after fusion.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from mmei_jax.encoders.preprocessing import VARIANCE_EPSILON
from mmei_jax.encoders.transformer import Dense, gelu, positions_in_segment, with_axes
from mmei_jax.models.fusion import SegmentIds, ordered, record_membership
from mmei_jax.models.heads import finish_embedding
from mmei_jax.models.mmei import Mmei
from mmei_jax.pretraining_config import PretrainingConfig
from mmei_jax.pretraining_losses import (
    CONTRASTIVE,
    MASKED_PREDICTION,
    bounded_scale,
    objective_weights,
    scale_parameter,
)
from mmei_jax.types import Batch, Dimension, MaskedTokens, Outputs, PretrainingOutputs, TokenSequence

Sequences = dict[str, TokenSequence]


class PretrainingMmei(Mmei):
    """Mmei whose outputs also hold what its objectives compare, in :attr:`~mmei_jax.types.Outputs.pretraining`.

    What the tasks read is as in Mmei, with the same parameters and names. Without any task the weights of Eq. 3, which
    nothing then trains, are told as 0.

    Attributes:
        objectives: which are on, and how.
    """

    objectives: PretrainingConfig

    def setup(self) -> None:
        """Names the submodules; those of the objectives are ``project_<modality>`` and ``predict_<modality>``."""
        super().setup()
        inputs, own, compute_dtype = self.tasks.inputs(), self.objectives, self.config.compute_dtype
        if CONTRASTIVE in objective_weights(own):
            self.project = {name: ProjectionHead(own.projection_dim, compute_dtype) for name in inputs}
            init = with_axes(lambda _key, _shape: scale_parameter(own.initial_temperature))
            self.contrastive_scale = self.param("contrastive_scale", init, ())
        if MASKED_PREDICTION in objective_weights(own):
            self.predict = {
                name: Dense(spec.feature_dim, ("embed", "features"), compute_dtype=compute_dtype)
                for name, spec in inputs.items()
            }

    def __call__(self, batch: Batch, *, is_training: bool) -> Outputs:
        """As :meth:`Mmei.__call__ <mmei_jax.models.mmei.Mmei.__call__>`.

        While training, the generator ``modality_dropout`` also draws what is masked; else it is the same for a record
        at every call.
        """
        sequences = self.encode(batch)
        outputs = self.answer(batch, sequences, is_training=is_training)
        if not self.tasks.names():
            outputs = dataclasses.replace(outputs, modality_weights=jnp.zeros_like(outputs.modality_weights))
        num_records, is_on = batch.is_record.shape[0], objective_weights(self.objectives)
        segment_ids = {name: sequence.segment_ids for name, sequence in sequences.items()}
        present = {
            name: record_membership(ids, num_records // ids.shape[0]).any(axis=-1).reshape(num_records)
            for name, ids in segment_ids.items()
        }
        found = PretrainingOutputs(
            projections=self._projections(sequences, segment_ids, num_records, is_training=is_training)
            if CONTRASTIVE in is_on
            else {},
            is_present={name: own & batch.is_record for name, own in present.items()},
            scale=bounded_scale(self.contrastive_scale) if CONTRASTIVE in is_on else None,
            masked=self._masked_tokens(batch, sequences, segment_ids, is_training=is_training)
            if MASKED_PREDICTION in is_on
            else {},
        )
        answered: Outputs = dataclasses.replace(outputs, pretraining=found)
        return answered

    def _projections(
        self, sequences: Sequences, segment_ids: SegmentIds, num_records: Dimension, *, is_training: bool
    ) -> dict[str, Array]:
        states = self.embed_tokens(sequences, segment_ids, is_training=is_training)
        states = self.cross_modal(states, segment_ids, is_training=is_training, reads_others=False)
        vectors, present = self.pool_records(states, segment_ids, num_records)
        return {
            name: jnp.where(present[name][:, None], self.project[name](vector), 0.0) for name, vector in vectors.items()
        }

    def _masked_tokens(
        self, batch: Batch, sequences: Sequences, segment_ids: SegmentIds, *, is_training: bool
    ) -> dict[str, MaskedTokens]:
        own = self.objectives
        key = self.make_rng("modality_dropout") if is_training else jax.random.key(0)
        is_masked = draw_masks(key, segment_ids, batch.record_index, rate=own.mask_rate, span=own.mask_span)
        states = self.embed_tokens(sequences, segment_ids, is_masked, is_training=is_training)
        states = self.cross_modal(states, segment_ids, is_training=is_training)
        return {
            name: MaskedTokens(
                predicted=self.predict[name](states[name]),
                target=jax.lax.stop_gradient(self._features(name, sequence)),
                segment_ids=jnp.where(is_masked[name], segment_ids[name], 0),
            )
            for name, sequence in sequences.items()
        }

    def _features(self, name: str, sequence: TokenSequence) -> Float[Array, "rows tokens dim"]:
        """What is predicted: standardised features; of an encoder's states each with mean 0 and variance 1."""
        if name not in self.encoder:
            return self.embed[name].standardized_features(sequence)
        states = sequence.features.astype(jnp.float32)
        centred = states - states.mean(axis=-1, keepdims=True)
        return centred * jax.lax.rsqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + VARIANCE_EPSILON)


class ProjectionHead(nn.Module):
    """Two layers from a modality's vector to the direction that is compared (Chen et al., SimCLR, ICML 2020).

    Attributes:
        num_features: of the projection.
        compute_dtype: type in which matrix products read their operands.
    """

    num_features: int
    compute_dtype: str

    @nn.compact
    def __call__(self, vectors: Float[Array, "batch dim"]) -> Float[Array, "batch projection"]:
        """``[batch, num_features]`` float32 of unit length."""
        hidden = Dense(vectors.shape[-1], ("embed", "mlp"), compute_dtype=self.compute_dtype, name="hidden")(vectors)
        output = Dense(self.num_features, ("mlp", "features"), compute_dtype=self.compute_dtype, name="output")
        return finish_embedding(output(gelu(hidden)), normalize=True)


def draw_masks(
    key: Array, segment_ids: SegmentIds, record_index: Int[Array, "batch"], *, rate: float, span: int
) -> dict[str, Bool[Array, "rows _"]]:
    """Which tokens are masked: of every record with two modalities or more, those of one, drawn uniformly.

    Args:
        key: random key. What is drawn for a record depends on it and the record's index, not on its place.
        segment_ids: per modality ``[rows, tokens]`` int32.
        record_index: ``[batch]`` int32.
        rate: share of the modality's tokens that are masked; 1 masks all. At least one token is in any case.
        span: tokens that are masked together, from starts that are drawn independently; spans may overlap.
    """
    names, num_records = ordered(segment_ids), record_index.shape[0]
    membership = {name: record_membership(ids, num_records // ids.shape[0]) for name, ids in segment_ids.items()}
    is_present = jnp.stack([membership[name].any(axis=-1).reshape(num_records) for name in names], axis=-1)
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, record_index.astype(jnp.uint32))
    draws = jax.vmap(lambda own: jax.random.uniform(own, (len(names),)))(keys)
    drawn = jnp.argmax(jnp.where(is_present, draws, -1.0), axis=-1)
    drawn = jnp.where(is_present.sum(axis=-1) > 1, drawn, -1)
    masks = {}
    for place, name in enumerate(names):
        own = membership[name]
        is_chosen = own & (drawn == place).reshape(own.shape[:2])[..., None]
        if rate < 1.0:
            own_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, place)
            by_position = _draw_tokens(own_keys, own.sum(axis=-1).reshape(num_records), own.shape[-1], rate, span)
            positions = jnp.broadcast_to(positions_in_segment(segment_ids[name])[:, None], own.shape)
            is_chosen = is_chosen & jnp.take_along_axis(by_position.reshape(own.shape), positions, axis=-1)
        masks[name] = is_chosen.any(axis=1)
    return masks


def _draw_tokens(
    keys: Array, lengths: Int[Array, "batch"], num_positions: int, rate: float, span: int
) -> Bool[Array, "batch positions"]:
    """By position within the record; a span may begin before the record's first token, so that all are as likely."""
    draws = jax.vmap(lambda own: jax.random.uniform(own, (num_positions + span,)))(keys)
    smallest = jnp.stack([draws[:, 1 + first : 1 + first + num_positions] for first in range(span)]).min(axis=0)
    # The chance that one of ``span`` starts is drawn is then ``rate``.
    is_drawn = smallest < 1.0 - (1.0 - rate) ** (1.0 / span)
    # The first draw: how many follow depends on the row, and must not change it.
    sure = jnp.floor(draws[:, 0] * lengths).astype(jnp.int32)
    return is_drawn | (jnp.arange(num_positions)[None] == sure[:, None])
