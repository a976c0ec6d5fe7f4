"""What crosses module borders: the batch, the outputs, and the words used for their dimensions.

Dimension glossary, used in every public signature:

* ``batch``: records. ``rows``: token rows; ``batch == rows * segments`` where ``segments`` is the number of records
  packed in one row (1 unless rows are packed).
* ``tokens``: positions along one modality of one row. ``dim``: features of one token.
* ``modalities``: always in the order of :data:`MODALITIES`.
* ``emotions``, ``intents``: classes in label order. ``items``: catalogue entries. ``slate``: positions of one slate.
* ``heads``: attention heads.

Logical axis names carried by parameters and activations (``sharding.py`` maps them to mesh axes): ``batch`` (rows and
records), ``embed`` (model dimension), ``heads`` (attention heads, also times head dimension), ``mlp`` (feed-forward
dimension), ``features`` (of inputs, and of what is no model dimension), ``classes``, ``position``, ``kind``, ``user``,
``vocabulary`` (token ids), ``layers`` (stacked layers), ``window`` (places of a convolution's window),
``input_channels`` and ``channels`` (features that a convolution reads and makes).
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

from flax import struct
from jaxtyping import Array, Bool, Float, Int, Shaped

MODALITIES = ("vision", "audio", "text")

# A size within a model: a number, or a symbolic one while a program for any size is exported.
Dimension: TypeAlias = Any


class InputError(ValueError):
    """Something a user gave is wrong: one line that names the file, key or record, the value, and what is accepted.

    Entry points print it without a traceback and exit with a non-zero code.
    """


class OutOfMemoryError(InputError):
    """A device's memory does not hold what a configuration asks for.

    Attributes:
        details: lines that stand below the error's own: what needs how much, and what would need less.
    """

    def __init__(self, message: str, details: Sequence[str]) -> None:
        super().__init__(message)
        self.details = tuple(details)


@struct.dataclass
class TokenSequence:
    """One modality of a batch: token features and the record each token belongs to.

    Attributes:
        features: ``[rows, tokens, dim]`` float; of raw media uint8 pixels, int16 samples or int32 token ids, which an
            encoder inside the model reads. What padding holds is arbitrary: nothing may depend on it.
        segment_ids: ``[rows, tokens]`` int32. 0 is padding; ``s >= 1`` marks a token of the row's ``s``-th record. The
            tokens of one record are contiguous. A record without any token in this modality lacks the modality.
    """

    features: Shaped[Array, "rows tokens dim"]
    segment_ids: Int[Array, "rows tokens"]


@struct.dataclass
class Label:
    """Targets of one task.

    Attributes:
        value: ``[batch]`` int32 class id (softmax), ``[batch, classes]`` float32 in [0, 1] (sigmoid), or ``[batch]``
            float32 (regression). Arbitrary, but finite, where not labelled.
        is_labelled: ``[batch]`` bool. False for records without this label and for filler records.
    """

    value: Array
    is_labelled: Bool[Array, "batch"]


@struct.dataclass
class Items:
    """Catalogue entries as the content tower reads them.

    Attributes:
        features: ``[..., dim]`` float32 item features.
        kind: ``[...]`` int32 index into the catalogue's kinds (music, video ...).
        word_state: ``[..., words]`` float32, what a frozen encoder made of the item's words; None without one.
        word_ids: ``[..., tokens]`` int32 token ids of the item's words, -1 for padding, for an encoder that is trained
            with the tower; None without one.
    """

    features: Float[Array, "*items dim"]
    kind: Int[Array, "*items"]
    word_state: Float[Array, "*items words"] | None = None
    word_ids: Int[Array, "*items tokens"] | None = None


@struct.dataclass
class Slate:
    """The items a record's user was shown, and how well each was received.

    Attributes:
        items: :class:`Items` with leading shape ``[batch, slate]``.
        item_index: ``[batch, slate]`` int32 catalogue row, -1 where the slate is shorter.
        feedback: ``[batch, slate]`` float32 observed satisfaction, 0 where not shown.
        is_shown: ``[batch, slate]`` bool.
    """

    items: Items
    item_index: Int[Array, "batch slate"]
    feedback: Float[Array, "batch slate"]
    is_shown: Bool[Array, "batch slate"]


@struct.dataclass
class RankingTargets:
    """What the ranking loss and the ranking metrics need of a record.

    Attributes:
        positive: :class:`Items` with leading shape ``[batch]``: the shown item with the best observed feedback.
        positive_index: ``[batch]`` int32 catalogue row of the positive, -1 where there is none.
        has_positive: ``[batch]`` bool. False for filler records.
        log_sampling_probability: ``[batch]`` float32, log of the share of training records whose positive is this item
            (the logQ correction); 0 where there is no positive.
        relevant_index: ``[batch, relevant]`` int32 catalogue rows of the truly relevant items, -1 as filler.
        slate: present only when the ranking loss is listwise.
    """

    positive: Items
    positive_index: Int[Array, "batch"]
    has_positive: Bool[Array, "batch"]
    log_sampling_probability: Float[Array, "batch"]
    relevant_index: Int[Array, "batch relevant"]
    slate: Slate | None = None


@struct.dataclass
class UserContext:
    """What is known of a record's user before the record; None where the model does not read it.

    Attributes:
        index: ``[batch]`` int32 row of the table of users, -1 for a user who is not in it.
        profile: ``[batch, profile]`` float32, the mean affect of the user's records before this one.
        has_profile: ``[batch]`` bool, whether there was one.
    """

    index: Int[Array, "batch"] | None = None
    profile: Float[Array, "batch profile"] | None = None
    has_profile: Bool[Array, "batch"] | None = None


@struct.dataclass
class Batch:
    """A batch of records, on the host (NumPy) or on devices.

    A modality that the data set or the configuration lacks is None; a task that is switched off is None.

    Attributes:
        vision, audio, text: token sequences; all have the same number of rows.
        is_record: ``[batch]`` bool. False for filler: what completes the last batch of an evaluation, and places of
            packed rows that no record takes.
        record_index: ``[batch]`` int32 position in the split, -1 for filler.
        emotion, intent: targets.
        ranking: targets of the recommender.
        user: what is known of the users; None where nothing is, as for a clip of nobody in particular.
    """

    vision: TokenSequence | None
    audio: TokenSequence | None
    text: TokenSequence | None
    is_record: Bool[Array, "batch"]
    record_index: Int[Array, "batch"]
    emotion: Label | None = None
    intent: Label | None = None
    ranking: RankingTargets | None = None
    user: UserContext | None = None

    def sequences(self) -> dict[str, TokenSequence]:
        """The modalities that exist in this batch, by name, in the order of :data:`MODALITIES`."""
        found = {name: getattr(self, name) for name in MODALITIES}
        return {name: sequence for name, sequence in found.items() if sequence is not None}


@struct.dataclass
class MaskedTokens:
    """What a model says about the tokens of one modality that it was not shown.

    Attributes:
        predicted: ``[rows, tokens, dim]`` float32 features; arbitrary where not masked.
        target: ``[rows, tokens, dim]`` float32, the same features as they are, of about unit variance.
        segment_ids: ``[rows, tokens]`` int32, the record of a masked token as in :class:`TokenSequence`; 0 for every
            other token.
    """

    predicted: Float[Array, "rows tokens dim"]
    target: Float[Array, "rows tokens dim"]
    segment_ids: Int[Array, "rows tokens"]


@struct.dataclass
class PretrainingOutputs:
    """What a model says for objectives without labels; dicts are keyed by the modalities that the model reads.

    Attributes:
        projections: ``[batch, projection]`` float32 of each modality alone, of unit length; 0 where absent. Empty
            without the contrastive objective.
        is_present: ``[batch]`` bool of each modality, False for filler.
        scale: factor on inner products of projections, 1 over the temperature; None without the contrastive objective.
        masked: of each modality. Empty without masked prediction.
    """

    projections: dict[str, Float[Array, "batch projection"]]
    is_present: dict[str, Bool[Array, "batch"]]
    scale: Float[Array, ""] | None
    masked: dict[str, MaskedTokens]


@struct.dataclass
class Outputs:
    """What the model says about a batch.

    Attributes:
        emotion: ``[batch, emotions]`` float32 logits (softmax, sigmoid) or ``[batch]`` values (regression); None when
            the task is off.
        intent: ``[batch, intents]`` float32 logits; None when the task is off.
        modality_weights: ``[batch, modalities]`` float32, alpha of Eq. 3 in the order of :data:`MODALITIES`; exactly 0
            for an absent modality, sums to 1 unless all are absent. Baselines: see :mod:`mmei_jax.models.baselines`.
        modality_vectors: ``[batch, modalities, dim]`` float32, pooled modality vectors; exactly 0 when absent.
        fused: ``[batch, dim]`` float32, F of Eq. 3, or what a baseline's heads read in its place.
        emotion_state, intent_state: ``[batch, dim]`` float32, what the heads' linear layers read; None when off.
        user_embedding: ``[batch, embedding]`` float32, F_u of Eq. 7; None when ranking is off.
        positive_embedding: ``[batch, embedding]`` float32, E_c of the batch's positives; None when ranking is off.
        slate_embedding: ``[batch, slate, embedding]`` float32; None unless the batch carries slates.
        task_log_variances: ``[tasks]`` float32 in the order of the tasks that are on (emotion, intent, ranking); None
            unless task weights are learned (Kendall et al., 2018).
        emotion_branches, intent_branches: ``[batch, modalities, ...]`` float32, what each modality's own model says,
            as ``emotion`` and ``intent``; arbitrary for an absent modality. None but for late fusion, whose branches
            are trained, not their average.
        pretraining: for objectives without labels; None where none is on.
    """

    emotion: Array | None
    intent: Float[Array, "batch intents"] | None
    modality_weights: Float[Array, "batch modalities"]
    modality_vectors: Float[Array, "batch modalities dim"]
    fused: Float[Array, "batch dim"]
    emotion_state: Float[Array, "batch dim"] | None
    intent_state: Float[Array, "batch dim"] | None
    user_embedding: Float[Array, "batch embedding"] | None
    positive_embedding: Float[Array, "batch embedding"] | None
    slate_embedding: Float[Array, "batch slate embedding"] | None
    task_log_variances: Float[Array, "tasks"] | None
    emotion_branches: Array | None = None
    intent_branches: Float[Array, "batch modalities intents"] | None = None
    pretraining: PretrainingOutputs | None = None


@struct.dataclass
class TrainState:
    """Everything that an update changes.

    Attributes:
        step: scalar int32, completed updates.
        parameters: trained variables.
        statistics: constants that standardise the inputs; never trained.
        optimizer_state: moments of the trained parameters, and the schedule's count.
    """

    step: Int[Array, ""]
    parameters: Any
    statistics: Any
    optimizer_state: Any

    @property
    def variables(self) -> dict[str, Any]:
        """What ``Mmei.apply`` takes."""
        return {"params": self.parameters, "statistics": self.statistics}


@struct.dataclass
class StepReport:
    """What one update tells the host, which fetches it late.

    Attributes:
        loss: the loss of Eq. 6, with the objectives that need no label.
        task_totals, task_counts: by task, the sum of the record losses and what to divide it by.
        gradient_norm: global norm of the trained parameters' gradients, before clipping.
        modality_weights: ``[modalities]`` mean of alpha over the batch's records.
        is_finite: by task, ``[batch]`` bool: False for a record whose loss is not finite.
        record_index: ``[batch]`` int32 positions in the training split, in the order of ``is_finite``.
    """

    loss: Float[Array, ""]
    task_totals: dict[str, Float[Array, ""]]
    task_counts: dict[str, Float[Array, ""]]
    gradient_norm: Float[Array, ""]
    modality_weights: Float[Array, "modalities"]
    is_finite: dict[str, Bool[Array, "batch"]]
    record_index: Int[Array, "batch"]


@struct.dataclass
class Predictions:
    """What is written about each record. What filler holds is arbitrary.

    Attributes:
        emotion: ``[batch, emotions]`` probabilities (softmax, sigmoid) or ``[batch]`` values (regression), float32.
        emotion_choice: ``[batch]`` int32 class id (softmax) or ``[batch, emotions]`` bool (sigmoid), what the metrics
            judge; None for a regression.
        emotion_cross_entropy: ``[batch]`` float32 nats, arbitrary where not labelled; None for a regression.
        intent: ``[batch, intents]`` float32 probabilities; None when the task is off.
        intent_choice, intent_cross_entropy: as for emotion; None when the task is off.
        modality_weights: ``[batch, modalities]`` float32 alpha.
        has_modality: ``[batch, modalities]`` bool, whether the model was given a token of it.
        ranking: by name, the ``[batch]`` float32 ranking metrics of each record; None when ranking is off.
        has_relevant_items: ``[batch]`` bool, whether the record's ranking metrics count; None when ranking is off.
        top_items: ``[batch, k]`` int32 catalogue rows, best first; None when ranking is off.
        top_scores: ``[batch, k]`` float32, Eq. 7.
        record_index: ``[batch]`` int32 position in the split, -1 for filler.
        user_embedding: ``[batch, embedding]`` float32, F_u of Eq. 7; None when ranking is off.
    """

    emotion: Float[Array, "batch *emotions"]
    emotion_choice: Array | None
    emotion_cross_entropy: Float[Array, "batch"] | None
    intent: Float[Array, "batch intents"] | None
    intent_choice: Int[Array, "batch"] | None
    intent_cross_entropy: Float[Array, "batch"] | None
    modality_weights: Float[Array, "batch modalities"]
    has_modality: Bool[Array, "batch modalities"]
    ranking: dict[str, Float[Array, "batch"]] | None
    has_relevant_items: Bool[Array, "batch"] | None
    top_items: Int[Array, "batch k"] | None
    top_scores: Float[Array, "batch k"] | None
    record_index: Int[Array, "batch"]
    user_embedding: Float[Array, "batch embedding"] | None = None
