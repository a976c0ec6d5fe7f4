"""The rows of Table 1: MMEI and what it is compared with, on the same inputs, heads and losses.

The paper does not describe its baselines further than their names. A unimodal row is
:class:`~mmei_jax.models.mmei.Mmei` with one modality: projection, self-attention and heads of its own. The others are
here, by the names of ``config.model.architecture``.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from mmei_jax.config import ModelConfig
from mmei_jax.encoders.transformer import Dense, EncoderLayer, LayerNorm, attendable
from mmei_jax.models.fusion import (
    ModalityEmbedding,
    Pooling,
    SegmentIds,
    ordered,
    record_membership,
    standardized,
    weighted_sum,
)
from mmei_jax.models.heads import finish_embedding
from mmei_jax.models.mmei import (
    Fusion,
    Mmei,
    Tasks,
    declare_task_log_variances,
    embed_targets,
    in_order,
    make_content_tower,
    make_user_projection,
)
from mmei_jax.models.user_side import UserSide
from mmei_jax.types import MODALITIES, Batch, Dimension, Items, Outputs, TokenSequence


class MultiModalTransformer(Mmei):
    """Early concatenation: one pre-norm Transformer over the tokens of all modalities (Eq. 1 before it, no Eq. 2-3).

    F is the sum of the pooled modality vectors, each weighed by its share of the record's tokens: with mean pooling the
    mean over all tokens. These shares stand in for alpha.
    """

    def set_up_fusion(self) -> None:
        """Names the submodules of :meth:`fuse`."""
        config, inputs = self.config, self.tasks.inputs()
        self.embed = {name: ModalityEmbedding(config, spec.max_positions) for name, spec in inputs.items()}
        self.layers = [
            EncoderLayer(
                config.num_heads,
                config.feedforward_dim,
                config.dropout_rate,
                config.compute_dtype,
                name=f"layer_{index}",
            )
            for index in range(config.num_layers)
        ]
        self.norm = LayerNorm()
        self.pool = {name: Pooling(config.pooling) for name in inputs}

    def fuse(
        self, sequences: dict[str, TokenSequence], segment_ids: SegmentIds, num_records: Dimension, *, is_training: bool
    ) -> Fusion:
        """One sequence of all tokens through all layers; see :meth:`Mmei.fuse <mmei_jax.models.mmei.Mmei.fuse>`."""
        states = self.embed_tokens(sequences, segment_ids, is_training=is_training)
        names = ordered(states)
        joined = jnp.concatenate([states[name] for name in names], axis=1)
        ids = jnp.concatenate([segment_ids[name] for name in names], axis=1)
        mask = attendable(ids, ids)
        for layer in self.layers:
            joined = layer(joined, mask, is_training=is_training)
        ends = [sum(states[name].shape[1] for name in names[: index + 1]) for index in range(len(names) - 1)]
        parts = dict(zip(names, jnp.split(self.norm(joined), ends, axis=1), strict=True))
        vectors, present = self.pool_records(parts, segment_ids, num_records)
        num_tokens = {
            name: record_membership(ids, num_records // ids.shape[0]).sum(axis=-1).reshape(num_records)
            for name, ids in segment_ids.items()
        }
        counts = in_order(num_tokens).astype(jnp.float32)
        weights = counts / jnp.maximum(counts.sum(axis=1, keepdims=True), 1.0)
        stacked = in_order(vectors)
        return Fusion(stacked, in_order(present), weights, weighted_sum(weights, stacked))


class LateFusion(nn.Module):
    """One model per modality, with heads of its own; the probabilities of the present ones are averaged.

    What is trained is the mean of the present branches' own losses, so that each branch learns as if alone (see
    :func:`mmei_jax.losses.task_losses`). Scores of items are averaged too: every branch embeds the user, items have
    one tower. Each branch's logits are divided by a temperature of the ``statistics`` collection, 1 unless calibration
    set it (Guo et al., "On calibration of modern neural networks", ICML 2017). Modality dropout has nothing to hide
    here.

    Attributes:
        config: sizes and switches of each branch.
        tasks: inputs and tasks.
    """

    config: ModelConfig
    tasks: Tasks

    def setup(self) -> None:
        """Names the submodules; a branch's parameters are those of Mmei below ``branch_<modality>``."""
        config, tasks = self.config, self.tasks
        self.branch = {name: Mmei(config, self._branch_tasks(name)) for name in tasks.inputs()}
        if tasks.has_ranking:
            self.user_projection = {name: make_user_projection(config) for name in tasks.inputs()}
            self.user_side = UserSide(config, tasks.num_users, tasks.profile_dim)
            self.content_tower = make_content_tower(config, tasks)
        self.task_log_variances = declare_task_log_variances(self, tasks)
        one = partial(jnp.ones, (len(MODALITIES),))
        self.emotion_temperature = self.variable("statistics", "emotion_temperature", one)
        if tasks.num_intents is not None:
            self.intent_temperature = self.variable("statistics", "intent_temperature", one)

    def __call__(self, batch: Batch, *, is_training: bool) -> Outputs:
        """Everything the branches say about a batch, and their average; as :class:`~mmei_jax.models.mmei.Mmei`.

        A record without any modality is answered by all branches, each from F = 0.
        """
        given, outputs = batch.sequences(), {}
        for name in self.tasks.inputs():
            others: dict[str, Any] = {other: None for other in MODALITIES if other != name}
            alone = dataclasses.replace(batch, **others, ranking=None)
            if name not in given:
                # One padding token: the branch must know the number of rows.
                rows = next(iter(given.values())).segment_ids.shape[0]
                features = jnp.zeros((rows, 1, self.tasks.inputs()[name].dim))
                filler: dict[str, Any] = {name: TokenSequence(features, jnp.zeros((rows, 1), jnp.int32))}
                alone = dataclasses.replace(alone, **filler)
            outputs[name] = self.branch[name](alone, is_training=is_training)
        # The weight of a branch's only modality is 1 where it is present, and 0 where not.
        present = in_order({name: found.modality_weights[:, MODALITIES.index(name)] for name, found in outputs.items()})
        count = present.sum(axis=1, keepdims=True)
        weights = present / jnp.maximum(count, 1.0)
        is_read = jnp.array([name in outputs for name in MODALITIES], jnp.float32)
        shares = jnp.where(count > 0.0, weights, is_read / len(outputs))

        def collect(field: str) -> Array:
            return in_order({name: getattr(found, field) for name, found in outputs.items()})

        emotion_branches = collect("emotion")
        intent = intent_branches = None
        if self.tasks.num_intents is not None:
            intent_branches = collect("intent")
            intent = _average(intent_branches, shares, self.intent_temperature.value, "softmax")
        user = positive = slate = None
        if self.tasks.has_ranking:
            known = self.user_side(batch.user, batch.is_record.shape[0], is_training=is_training)
            user = self._embed_users(outputs, weights, known)
            positive, slate = embed_targets(self.content_tower, batch, self.tasks)
        vectors = collect("fused")
        return Outputs(
            emotion=_average(emotion_branches, shares, self.emotion_temperature.value, self.tasks.emotion),
            intent=intent,
            modality_weights=weights,
            modality_vectors=vectors,
            fused=weighted_sum(weights, vectors),
            emotion_state=weighted_sum(weights, collect("emotion_state")),
            intent_state=None if intent is None else weighted_sum(weights, collect("intent_state")),
            user_embedding=user,
            positive_embedding=positive,
            slate_embedding=slate,
            task_log_variances=self.task_log_variances,
            emotion_branches=emotion_branches,
            intent_branches=intent_branches,
        )

    def embed_items(self, items: Items) -> Float[Array, "*items embedding"]:
        """E_c of Eq. 7 for catalogue items: ``[..., embedding]`` float32. Needs a model with ranking."""
        return self.content_tower(items)

    def _branch_tasks(self, name: str) -> Tasks:
        others: dict[str, Any] = {other: None for other in MODALITIES if other != name}
        return dataclasses.replace(self.tasks, **others, has_ranking=False, learns_task_weights=False)

    def _embed_users(self, outputs: dict[str, Outputs], weights: Array, known: Array) -> Array:
        """The mean of the present branches' embeddings: its scores are the means of theirs (Eq. 7 is linear)."""
        users = {}
        for name, found in outputs.items():
            parts = [part for part in (found.fused, found.emotion_state, found.intent_state) if part is not None]
            embedding = self.user_projection[name](jnp.concatenate(parts, axis=-1)) + known
            users[name] = finish_embedding(embedding, self.config.normalize_embeddings)
        return weighted_sum(weights, in_order(users))


class PooledLogistic(nn.Module):
    """Linear layers on the concatenated means of each modality's tokens: logistic regression, and a linear F_u.

    Means are 0 where a modality is absent, and whether it is present is a feature too. ``fused`` is these features; the
    model weighs no modalities, so ``modality_weights`` and ``modality_vectors`` are 0. There is nothing between input
    and output: of the sizes it reads ``embedding_dim`` alone, and no rate.

    Attributes:
        config: the embedding's size.
        tasks: inputs and tasks.
    """

    config: ModelConfig
    tasks: Tasks

    def setup(self) -> None:
        """Names the submodules."""
        config, tasks = self.config, self.tasks
        self.embed = {name: PooledFeatures() for name in tasks.inputs()}
        self.emotion_logits = Dense(tasks.num_emotions, ("features", "classes"))
        if tasks.num_intents is not None:
            self.intent_logits = Dense(tasks.num_intents, ("features", "classes"))
        if tasks.has_ranking:
            self.user_projection = Dense(config.embedding_dim, ("features", "embed"))
            self.user_side = UserSide(config, tasks.num_users, tasks.profile_dim)
            self.content_tower = make_content_tower(config, tasks)
        self.task_log_variances = declare_task_log_variances(self, tasks)

    def __call__(self, batch: Batch, *, is_training: bool) -> Outputs:
        """Everything the model says about a batch; the same whether training or not, but for users left out."""
        num_records = batch.is_record.shape[0]
        given, parts = batch.sequences(), []
        for name, spec in self.tasks.inputs().items():
            sequence = given.get(name)
            if sequence is None:
                sequence = TokenSequence(jnp.zeros((num_records, 1, spec.dim)), jnp.zeros((num_records, 1), jnp.int32))
            parts.append(self.embed[name](sequence, num_records))
        features = jnp.concatenate(parts, axis=-1)
        emotion = self.emotion_logits(features)
        user = positive = slate = None
        if self.tasks.has_ranking:
            known = self.user_side(batch.user, num_records, is_training=is_training)
            user = finish_embedding(self.user_projection(features) + known, self.config.normalize_embeddings)
            positive, slate = embed_targets(self.content_tower, batch, self.tasks)
        return Outputs(
            emotion=emotion[:, 0] if self.tasks.emotion == "regression" else emotion,
            intent=None if self.tasks.num_intents is None else self.intent_logits(features),
            modality_weights=jnp.zeros((num_records, len(MODALITIES))),
            modality_vectors=jnp.zeros((num_records, len(MODALITIES), features.shape[-1])),
            fused=features,
            emotion_state=features,
            intent_state=None if self.tasks.num_intents is None else features,
            user_embedding=user,
            positive_embedding=positive,
            slate_embedding=slate,
            task_log_variances=self.task_log_variances,
        )

    def embed_items(self, items: Items) -> Float[Array, "*items embedding"]:
        """E_c of Eq. 7 for catalogue items: ``[..., embedding]`` float32. Needs a model with ranking."""
        return self.content_tower(items)


class PooledFeatures(nn.Module):
    """The mean of a record's standardised token features, and 1 where there is a token at all."""

    @nn.compact
    def __call__(self, sequence: TokenSequence, num_records: Dimension) -> Float[Array, "batch features"]:
        """``[batch, input_dim + 1]`` float32; 0 for a record without tokens."""
        features = standardized(self, sequence)
        num_segments = num_records // sequence.segment_ids.shape[0]
        means = Pooling("mean", name="pool")(features, sequence.segment_ids, num_segments)
        is_present = record_membership(sequence.segment_ids, num_segments).any(axis=-1, keepdims=True)
        joined = jnp.concatenate([means, is_present.astype(jnp.float32)], axis=-1)
        return joined.reshape(num_records, -1)


Model = Mmei | LateFusion | PooledLogistic

ARCHITECTURES: Mapping[str, type[Mmei] | type[LateFusion] | type[PooledLogistic]] = {
    "mmei": Mmei,
    "multimodal_transformer": MultiModalTransformer,
    "late_fusion": LateFusion,
    "pooled_logistic": PooledLogistic,
}


def _average(branches: Array, shares: Array, temperature: Array, kind: str) -> Array:
    """Logits of the branches' averaged probabilities (softmax, sigmoid), or their averaged values (regression).

    Args:
        branches: ``[batch, modalities, ...]`` what each branch says.
        shares: ``[batch, modalities]``, summing to 1.
        temperature: ``[modalities]``, divides logits.
        kind: of the task.
    """
    if kind == "regression":
        return (branches * shares).sum(axis=1)
    logits, weights = branches / temperature[None, :, None], shares[:, :, None]
    if kind == "softmax":
        return jax.nn.logsumexp(jax.nn.log_softmax(logits), axis=1, b=weights)
    positive = jax.nn.logsumexp(jax.nn.log_sigmoid(logits), axis=1, b=weights)
    return positive - jax.nn.logsumexp(jax.nn.log_sigmoid(-logits), axis=1, b=weights)
