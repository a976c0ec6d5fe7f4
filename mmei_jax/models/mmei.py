"""MMEI, assembled: Eq. 1-5, and the embeddings of Eq. 7."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from mmei_jax.config import ModelConfig
from mmei_jax.encoders.bert import BertConfig
from mmei_jax.encoders.transformer import Dense, placed_states, with_axes
from mmei_jax.models.content_tower import ContentTower
from mmei_jax.models.fusion import (
    CrossModalTransformer,
    ModalityEmbedding,
    ModalityWeighting,
    Pooling,
    SegmentIds,
    States,
    hide_modalities,
    ordered,
    record_membership,
    weighted_sum,
)
from mmei_jax.models.heads import TaskHead, finish_embedding
from mmei_jax.models.raw_encoders import RawEncoding
from mmei_jax.models.user_side import UserSide
from mmei_jax.types import MODALITIES, Batch, Dimension, Items, Outputs, TokenSequence


@dataclass(frozen=True)
class ModalityInput:
    """What the model must know of one modality's input.

    Attributes:
        dim: features per token.
        max_tokens: the most tokens of one record.
        encoder: what makes features of raw tokens (frames, samples, token ids); None where they are features.
    """

    dim: int
    max_tokens: int
    encoder: RawEncoding | None = None

    @property
    def feature_dim(self) -> int:
        """Features per token that Eq. 1 projects."""
        return self.dim if self.encoder is None else self.encoder.dim

    @property
    def max_positions(self) -> int:
        """The most tokens of one record that Eq. 1 projects."""
        return self.max_tokens if self.encoder is None else self.encoder.num_tokens(self.max_tokens)


@dataclass(frozen=True)
class Tasks:
    """What the model reads and what it is asked for; follows from the data set and the configuration.

    Attributes:
        vision, audio, text: the modalities that the model reads; None for one that it does not.
        emotion: "softmax" (one class), "sigmoid" (several), "regression" (a number), or "none" where the model has no
            task at all, but objectives (:mod:`mmei_jax.models.pretraining`).
        num_emotions: emotion classes; 1 for a regression and without the task.
        num_intents: intent classes; None when there is no intent task.
        has_ranking: whether users and items are embedded (Eq. 7).
        item_dim: features of an item that the content tower reads; 0 without ranking, or if it reads words alone.
        num_kinds: kinds of catalogue items; 0 without ranking.
        learns_task_weights: whether each task has a learned log variance (Kendall et al., 2018).
        word_dim: features of what a frozen encoder made of an item's words; 0 without one.
        word_encoder: the BERT over an item's words that is trained with the content tower; None without one.
        num_users: users with an embedding of their own; 0 without.
        profile_dim: features of a user's affect profile; 0 without.
    """

    vision: ModalityInput | None
    audio: ModalityInput | None
    text: ModalityInput | None
    emotion: Literal["softmax", "sigmoid", "regression", "none"]
    num_emotions: int
    num_intents: int | None
    has_ranking: bool
    item_dim: int
    num_kinds: int
    learns_task_weights: bool
    word_dim: int = 0
    word_encoder: BertConfig | None = None
    num_users: int = 0
    profile_dim: int = 0

    def inputs(self) -> dict[str, ModalityInput]:
        """The modalities that the model reads, in the order of :data:`~mmei_jax.types.MODALITIES`."""
        found = {name: getattr(self, name) for name in MODALITIES}
        return {name: spec for name, spec in found.items() if spec is not None}

    def names(self) -> tuple[str, ...]:
        """The tasks that are on, in the order of :attr:`~mmei_jax.types.Outputs.task_log_variances`."""
        is_on = {"emotion": self.emotion != "none", "intent": self.num_intents is not None, "ranking": self.has_ranking}
        return tuple(name for name, on in is_on.items() if on)


class Fusion(NamedTuple):
    """What the heads read.

    Attributes:
        vectors: ``[batch, modalities, dim]`` float32; 0 where absent.
        is_present: ``[batch, modalities]`` bool, in the order of :data:`~mmei_jax.types.MODALITIES`.
        weights: ``[batch, modalities]`` float32; 0 where absent.
        fused: ``[batch, dim]`` float32, F of Eq. 3 or what stands for it.
    """

    vectors: Float[Array, "batch modalities dim"]
    is_present: Bool[Array, "batch modalities"]
    weights: Float[Array, "batch modalities"]
    fused: Float[Array, "batch dim"]


class Mmei(nn.Module):
    """Multi-modal emotion and intent recognition, with embeddings for recommendation.

    The other architectures of :mod:`mmei_jax.models.baselines` replace :meth:`set_up_fusion` and :meth:`fuse`, and keep
    inputs, heads and towers.

    Raw tokens of a modality go through an encoder first (:mod:`~mmei_jax.models.raw_encoders`), whose parameters are
    those of ``encoder_<modality>``.

    Variables: ``params``, and ``statistics`` (per modality ``mean`` and ``scale``, constants that standardise the
    features). Generators when training: ``dropout`` and ``modality_dropout``.

    Attributes:
        config: sizes and switches.
        tasks: inputs and tasks.
    """

    config: ModelConfig
    tasks: Tasks

    def setup(self) -> None:
        """Names the submodules; parameter paths follow (``embed_vision/projection/kernel``)."""
        self.set_up_fusion()
        config, tasks = self.config, self.tasks
        encodings = {name: spec.encoder for name, spec in tasks.inputs().items()}
        self.encoder = {name: own.make() for name, own in encodings.items() if own is not None}
        if tasks.emotion != "none":
            self.emotion_head = TaskHead(config, tasks.num_emotions)
        if tasks.num_intents is not None:
            self.intent_head = TaskHead(config, tasks.num_intents)
        if tasks.has_ranking:
            self.user_projection = make_user_projection(config)
            self.user_side = UserSide(config, tasks.num_users, tasks.profile_dim)
            self.content_tower = make_content_tower(config, tasks)
        self.task_log_variances = declare_task_log_variances(self, tasks)

    def set_up_fusion(self) -> None:
        """Names the submodules of :meth:`fuse`."""
        config, inputs = self.config, self.tasks.inputs()
        self.embed = {name: ModalityEmbedding(config, spec.max_positions) for name, spec in inputs.items()}
        self.cross_modal = CrossModalTransformer(config)
        self.pool = {name: Pooling(config.pooling) for name in inputs}
        self.weighting = ModalityWeighting(config.modality_weighting)

    def __call__(self, batch: Batch, *, is_training: bool) -> Outputs:
        """Everything the model says about a batch; float32 throughout.

        A modality that the batch or a record lacks gets weight 0, vector 0 and gradient 0. A record without any is
        answered too: from F = 0.

        Args:
            batch: records; several may share a row (see :class:`~mmei_jax.types.TokenSequence`).
            is_training: whether dropout and modality dropout are on.

        Raises:
            ValueError: the batch has a modality that the model was not built for, other feature sizes, more tokens
                than the position table, or rows that do not divide its records.
        """
        return self.answer(batch, self.encode(batch), is_training=is_training)

    def answer(self, batch: Batch, sequences: dict[str, TokenSequence], *, is_training: bool) -> Outputs:
        """What the model says about a batch whose tokens are encoded: :meth:`__call__` after :meth:`encode`.

        Args:
            batch: records.
            sequences: per modality that the model reads.
            is_training: whether dropout and modality dropout are on.
        """
        num_records = batch.is_record.shape[0]
        num_segments = num_records // next(iter(sequences.values())).segment_ids.shape[0]
        segment_ids = {name: sequence.segment_ids for name, sequence in sequences.items()}
        rate = self.config.modality_dropout_rate
        if is_training and len(segment_ids) > 1 and not (isinstance(rate, int | float) and rate == 0.0):
            segment_ids = hide_modalities(self.make_rng("modality_dropout"), segment_ids, num_segments, rate)
        fusion = self.fuse(sequences, segment_ids, num_records, is_training=is_training)
        read = (fusion.fused, fusion.vectors, fusion.is_present)
        emotion = emotion_state = intent = intent_state = None
        if self.tasks.emotion != "none":
            emotion, emotion_state = self.emotion_head(*read, is_training=is_training)
        if self.tasks.num_intents is not None:
            intent, intent_state = self.intent_head(*read, is_training=is_training)
        user = positive = slate = None
        if self.tasks.has_ranking:
            known = self.user_side(batch.user, num_records, is_training=is_training)
            user = self._embed_users(fusion.fused, emotion_state, intent_state, known)
            positive, slate = embed_targets(self.content_tower, batch, self.tasks)
        return Outputs(
            emotion=emotion[:, 0] if emotion is not None and self.tasks.emotion == "regression" else emotion,
            intent=intent,
            modality_weights=fusion.weights,
            modality_vectors=fusion.vectors,
            fused=fusion.fused,
            emotion_state=emotion_state,
            intent_state=intent_state,
            user_embedding=user,
            positive_embedding=positive,
            slate_embedding=slate,
            task_log_variances=self.task_log_variances,
        )

    def embed_items(self, items: Items) -> Float[Array, "*items embedding"]:
        """E_c of Eq. 7 for catalogue items: ``[..., embedding]`` float32. Needs a model with ranking."""
        return self.content_tower(items)

    def fuse(
        self, sequences: dict[str, TokenSequence], segment_ids: SegmentIds, num_records: Dimension, *, is_training: bool
    ) -> Fusion:
        """Eq. 1 to 3: from tokens to what the heads read.

        Args:
            sequences: per modality that the model reads.
            segment_ids: of the same modalities, those of hidden ones turned into padding.
            num_records: of the batch.
            is_training: whether dropout is on.
        """
        states = self.embed_tokens(sequences, segment_ids, is_training=is_training)
        states = self.cross_modal(states, segment_ids, is_training=is_training)
        vectors, present = self.pool_records(states, segment_ids, num_records)
        alpha = self.weighting(vectors, jnp.stack([present[name] for name in ordered(present)], axis=-1))
        weights = in_order({name: alpha[:, index] for index, name in enumerate(ordered(vectors))})
        stacked = in_order(vectors)
        return Fusion(stacked, in_order(present), weights, weighted_sum(weights, stacked))

    def embed_tokens(
        self,
        sequences: dict[str, TokenSequence],
        segment_ids: SegmentIds,
        is_masked: dict[str, Bool[Array, "rows _"]] | None = None,
        *,
        is_training: bool,
    ) -> States:
        """Eq. 1 per modality: ``[rows, tokens, dim]`` float32.

        Args:
            sequences: per modality that the model reads.
            segment_ids: of the same modalities.
            is_masked: of the same modalities, tokens that are not shown; None masks nothing.
            is_training: whether dropout is on.
        """
        masks = is_masked or dict.fromkeys(sequences)
        return {
            name: self.embed[name](
                TokenSequence(sequence.features, segment_ids[name]), masks[name], is_training=is_training
            )
            for name, sequence in sequences.items()
        }

    def pool_records(
        self, states: States, segment_ids: SegmentIds, num_records: Dimension
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """Per modality that the model reads, pooled vectors ``[batch, dim]`` and ``[batch]`` whether it is present."""
        vectors, present = {}, {}
        for name, ids in segment_ids.items():
            num_segments = num_records // ids.shape[0]
            pooled = self.pool[name](states[name], ids, num_segments)
            vectors[name] = placed_states(pooled.reshape(num_records, self.config.dim))
            present[name] = record_membership(ids, num_segments).any(axis=-1).reshape(num_records)
        return vectors, present

    def encode(self, batch: Batch) -> dict[str, TokenSequence]:
        """The batch's features, encoded and checked; one padding token a row for a modality that the batch lacks.

        Args:
            batch: records.

        Raises:
            ValueError: see :meth:`__call__`.
        """
        given, inputs = batch.sequences(), self.tasks.inputs()
        unknown = sorted(set(given) - set(inputs))
        if unknown:
            raise ValueError(f"batch.{unknown[0]}: the model reads {', '.join(inputs)} only")
        num_records = batch.is_record.shape[0]
        num_rows = next(iter(given.values())).segment_ids.shape[0] if given else num_records
        if num_records % num_rows:
            raise ValueError(f"batch of {num_records} records: expected a multiple of its {num_rows} rows")
        sequences = {}
        for name, spec in inputs.items():
            if name not in given:
                features = jnp.zeros((num_rows, 1, spec.feature_dim))
                sequences[name] = TokenSequence(features, jnp.zeros((num_rows, 1), jnp.int32))
                continue
            rows, tokens, dim = given[name].features.shape
            if rows != num_rows or dim != spec.dim:
                shape = given[name].features.shape
                raise ValueError(f"batch.{name}.features {shape}: expected ({num_rows}, tokens, {spec.dim})")
            if num_rows == num_records and self.config.position_embedding and tokens > spec.max_tokens:
                raise ValueError(f"batch.{name}: {tokens} tokens, the position table has {spec.max_tokens}")
            sequences[name] = self.encoder[name](given[name]) if name in self.encoder else given[name]
        return sequences

    def _embed_users(
        self, fused: Array, emotion_state: Array | None, intent_state: Array | None, known: Array
    ) -> Array:
        """F_u of Eq. 7: projection of [F; emotion-head state; intent-head state], and what is known of the user."""
        parts = [part for part in (fused, emotion_state, intent_state) if part is not None]
        embedding = self.user_projection(placed_states(jnp.concatenate(parts, axis=-1))) + known
        return finish_embedding(embedding, self.config.normalize_embeddings)


def make_user_projection(config: ModelConfig, name: str | None = None) -> Dense:
    """The projection of Eq. 7's F_u, not yet applied."""
    return Dense(config.embedding_dim, ("embed", "features"), compute_dtype=config.compute_dtype, name=name)


def make_content_tower(config: ModelConfig, tasks: Tasks) -> ContentTower:
    """The tower of Eq. 7's E_c, not yet applied."""
    return ContentTower(config, tasks.num_kinds, tasks.item_dim > 0, tasks.word_encoder, tasks.word_dim > 0)


def declare_task_log_variances(module: nn.Module, tasks: Tasks) -> Array | None:
    """The parameter behind learned task weights (Kendall et al., 2018), in a module's ``setup``; None without them."""
    if not tasks.learns_task_weights:
        return None
    init = with_axes(nn.initializers.zeros, "classes")
    variances: Array = module.param("task_log_variances", init, (len(tasks.names()),))
    return variances


def embed_targets(tower: ContentTower, batch: Batch, tasks: Tasks) -> tuple[Array | None, Array | None]:
    """E_c of the batch's positives and of its slates, each None where the batch has none.

    A tower that is being initialised makes its parameters in any case.
    """
    if batch.ranking is not None:
        slate = batch.ranking.slate
        return tower(batch.ranking.positive), None if slate is None else tower(slate.items)
    if tower.is_initializing():
        states = jnp.zeros((1, tasks.word_dim)) if tasks.word_dim else None
        ids = None if tasks.word_encoder is None else jnp.zeros((1, 1), jnp.int32)
        tower(Items(jnp.zeros((1, tasks.item_dim)), jnp.zeros(1, jnp.int32), states, ids))
    return None, None


def in_order(parts: dict[str, Array]) -> Array:
    """Stacks ``[batch, ...]`` arrays on axis 1 in the order of MODALITIES; zeros for a modality that is not read."""
    absent = jnp.zeros_like(next(iter(parts.values())))
    return jnp.stack([parts.get(name, absent) for name in MODALITIES], axis=1)
