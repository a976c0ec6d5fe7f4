"""Ranks what a search found for a run's users again: by what the run read of them, calibrated, and by popularity."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float32

from mmei_jax.evaluation import BestRun, Evaluator
from mmei_jax.input_pipeline import ranking_statistics
from mmei_jax.recommendation.explanations import Recommendation, recommend
from mmei_jax.recommendation.index_files import CatalogueIndex
from mmei_jax.recommendation.reranking import AffectState, RerankConfig
from mmei_jax.recommendation.search import FoundItems
from mmei_jax.types import InputError, Predictions

# What commands take beside --rerank: fields of RerankConfig, of which the temperatures are fitted, and candidates.
RERANK_OPTIONS: dict[str, tuple[type, str]] = {
    "relevance_weight": (float, "weight against diversity, from 0 to 1 (0.7); 1 asks for no diversity"),
    "least_affect_weight": (float, "weight of affect that the model is not sure of, from 0 to 1 (0.2)"),
    "most_per_creator": (int, "items of one creator among the answers, at most (any number)"),
    "most_ai_generated_share": (float, "share of AI-generated items among the answers, at most (1)"),
    "most_human_share": (float, "share of items that people made, at most (1)"),
    "num_candidates": (int, "items that are ranked again (5 for each that is answered)"),
}
RERANK_HELP = (
    "rank the answers again, and say why each is there; what follows needs it. An item's score is the sum of affect "
    "(the fit to what was read, Eq. 7), affect_free (popularity, which knows nothing of what was read) and diversity. "
    "The first two are standardised over the candidates of each record, then weighed: 0 is what these have on average, "
    "and below 0 less. diversity is 0 for the first item, below 0 for an item like one before it, above 0 for one that "
    "points away from all before it"
)
CANDIDATES_PER_ITEM = 5


def given_config(given: Mapping[str, Any], *, k: int) -> tuple[RerankConfig | None, int]:
    """What the options of a command say: how to rank again, None without ``--rerank``, and of how many candidates.

    Args:
        given: values by name: ``rerank`` and :data:`RERANK_OPTIONS`, None where not given.
        k: items to answer.

    Raises:
        InputError: an option goes without ``--rerank``, or cannot be; candidates are fewer than the answers.
    """
    values = {name: given[name] for name in RERANK_OPTIONS if given[name] is not None}
    if not given["rerank"]:
        if values:
            name = next(iter(values))
            raise InputError(f"--{name}={values[name]}: expected --rerank too")
        return None, k
    num_candidates = values.pop("num_candidates", CANDIDATES_PER_ITEM * k)
    if num_candidates < k:
        raise InputError(f"--num_candidates={num_candidates}: expected at least as many as answers, {k}")
    return RerankConfig(**values), num_candidates


class RunReranker:
    """A run's calibrated reading of its users, and the popularity of an index's items.

    An item is as popular as log(1 + its positives among the training records); what the run's data set lacks has 0.

    Attributes:
        config: with the temperatures that suit the labelled records of the validation splits, 1 where none is.

    Args:
        run: trained to rank.
        evaluator: reads the run's records.
        index: that is searched.
        config: of which the temperatures are fitted.

    Raises:
        InputError: the run reads neither probabilities of emotions nor intents.
    """

    def __init__(self, run: BestRun, evaluator: Evaluator, index: CatalogueIndex, config: RerankConfig):
        self._emotion_kind = run.config.loss.emotion
        if self._emotion_kind == "regression" and run.config.loss.intent == "none":
            raise InputError(
                "--rerank: the run reads no probabilities of emotions or intents (config.loss.emotion = 'regression', "
                "config.loss.intent = 'none'); expected one of the two, which say how much affect weighs"
            )
        labels = run.dataset.spec.labels
        emotion_label = run.config.loss.emotion_label
        self._emotions = () if self._emotion_kind == "regression" else labels[emotion_label].class_names
        self._intents = () if run.config.loss.intent == "none" else labels["intent"].class_names
        self.config = self._calibrated(run, evaluator, config)
        self._popularity = item_popularity(run, index)

    def recommend(self, found: FoundItems, predictions: Predictions, k: int) -> list[Recommendation]:
        """The answer to each query.

        Args:
            found: candidates of the index.
            predictions: of the queries' records, on the host.
            k: items of an answer.

        Raises:
            InputError: an item's origin is unknown where a share of origins is limited.
        """
        return recommend(
            found,
            self._popularity[found.row],
            self._state(predictions),
            k=k,
            config=self.config,
            emotions=self._emotions,
            intents=self._intents,
            emotion_kind=self._emotion_kind,
        )

    def _state(self, predictions: Predictions) -> AffectState:
        emotion, intent = predictions.emotion if self._emotions else None, predictions.intent
        return AffectState(
            emotion=None if emotion is None else logits_of(np.asarray(emotion, np.float32), self._emotion_kind),
            intent=None if intent is None else logits_of(np.asarray(intent, np.float32), "softmax"),
            modality_weights=np.asarray(predictions.modality_weights, np.float32),
        )

    def _calibrated(self, run: BestRun, evaluator: Evaluator, config: RerankConfig) -> RerankConfig:
        names = run.config.data.validation_splits
        split = run.dataset.split(*names)
        emotion: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        intent: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        for part in evaluator.predict(run.variables, names):
            is_record = np.asarray(part.record_index) >= 0
            index, state = np.asarray(part.record_index)[is_record], self._state(part)
            if state.emotion is not None:
                labels = split.gather_label(run.config.loss.emotion_label, index)
                emotion.append((state.emotion[is_record], *labels))
            if state.intent is not None:
                intent.append((state.intent[is_record], *split.gather_label("intent", index)))
        return config.calibrated(_labelled(emotion), _labelled(intent), emotion_kind=self._emotion_kind)


def item_popularity(run: BestRun, index: CatalogueIndex) -> Float32[np.ndarray, "rows"]:
    """``[rows]`` float32 by row of an index: log(1 + training positives); 0 for what the data set lacks.

    Args:
        run: trained to rank.
        index: the items.
    """
    popularity = np.zeros(len(index.is_live), np.float32)
    catalogue = run.dataset.with_item_words(None).catalogue()
    statistics = ranking_statistics(run.dataset, run.config)
    if catalogue is not None and statistics is not None:
        rows = index.rows_of(catalogue.ids)
        popularity[rows[rows >= 0]] = np.log1p(statistics.counts[rows >= 0])
    return popularity


def logits_of(
    probabilities: Float32[np.ndarray, "records classes"], kind: str
) -> Float32[np.ndarray, "records classes"]:
    """Finite logits of probabilities: a softmax's up to a constant of each record, which changes nothing.

    Args:
        probabilities: ``[records, classes]`` float32.
        kind: "softmax" or "sigmoid".

    Example:
        >>> logits_of(np.array([[0.0, 0.5, 1.0]], np.float32), "sigmoid").round(1).tolist()
        [[-87.3, 0.0, 16.6]]
    """
    given = np.maximum(probabilities, np.finfo(np.float32).tiny)
    if kind == "sigmoid":
        given = np.minimum(given, np.float32(1.0) - np.finfo(np.float32).epsneg)
        return np.log(given) - np.log1p(-given)
    return np.log(given)


def _labelled(parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray] | None:
    """Logits and labels of the labelled records; None where there are none."""
    if not any(is_labelled.any() for _, _, is_labelled in parts):
        return None
    logits, labels = (np.concatenate([part[place][part[2]] for part in parts]) for place in (0, 1))
    return logits, labels
