"""Recommendations that say why: each item's score in parts, what moved it, and what was read of the user."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from mmei_jax.recommendation.catalogue_files import ORIGINS
from mmei_jax.recommendation.reranking import CAPS, AffectState, Candidates, RerankConfig, Reranked, rerank
from mmei_jax.recommendation.search import FoundItems, answer_lines
from mmei_jax.types import MODALITIES, InputError


@dataclass(frozen=True)
class RecommendedItem:
    """One item of an answer.

    Attributes:
        id, title, creator, origin, kind: of the item, as the search gave them; None where unknown.
        rank: from 1.
        search_rank: that it had among the candidates, from 1.
        score: by which it got its rank: the sum of the parts.
        parts: ``affect`` (of S(u, c), which reads emotion and intent) and ``affect_free`` (of popularity, say, which
            knows nothing of them), each standardised over the query's candidates and weighed, so that 0 is their mean;
            and ``diversity``, 0 for the first item, below 0 for one like an item before it, above 0 only for one whose
            embedding points away from those of all items before it.
        affect_score: S(u, c) of Eq. 7, as the search gave it.
        cap: of :data:`~mmei_jax.recommendation.reranking.CAPS`, what ruled out a candidate with a better score; None
            where nothing did.
        in_place_of: id of that candidate.
    """

    id: str
    title: str | None
    creator: str | None
    origin: str | None
    kind: str
    rank: int
    search_rank: int
    score: float
    parts: dict[str, float]
    affect_score: float
    cap: str | None
    in_place_of: str | None


@dataclass(frozen=True)
class Recommendation:
    """The answer to one query.

    Attributes:
        items: best first.
        shortfall: None where all places are filled; ``candidates`` where the search found too few, ``caps`` where
            nothing else could be answered without exceeding a cap.
        affect_weight: share of affect in the relevance of the items, in [0, 1].
        modality_weights: alpha of Eq. 3 by modality.
        emotion, intent: ``choice`` (of several emotions at once a list) and calibrated ``probabilities`` by class; None
            where the model has none.
    """

    items: tuple[RecommendedItem, ...]
    shortfall: str | None
    affect_weight: float
    modality_weights: dict[str, float]
    emotion: dict[str, Any] | None
    intent: dict[str, Any] | None

    def to_json(self) -> dict[str, Any]:
        """JSON values, named as those of :mod:`mmei_jax.predict`."""
        return {
            "emotion": self.emotion,
            "intent": self.intent,
            "modality_weights": dict(self.modality_weights),
            "affect_weight": self.affect_weight,
            "recommended": [asdict(item) for item in self.items],
            "shortfall": self.shortfall,
        }


def recommend(
    found: FoundItems,
    affect_free: Float[np.ndarray, "queries candidates"],
    state: AffectState,
    *,
    k: int,
    config: RerankConfig,
    emotions: Sequence[str] = (),
    intents: Sequence[str] = (),
    emotion_kind: str = "softmax",
) -> list[Recommendation]:
    """Ranks what a search found again, and explains every answer: all that a search has to call.

    Args:
        found: candidates, five times as many as ``k``, say; what filler (row -1) holds is arbitrary.
        affect_free: ``[queries, candidates]`` float on any scale: popularity, or the fit to a long-term profile; equal
            numbers for a user of whom nothing is known; arbitrary at filler.
        state: of the queries' users; NumPy arrays, or arrays on devices.
        k: items to answer.
        config: see :class:`~mmei_jax.recommendation.reranking.RerankConfig`.
        emotions: classes in label order, where the state has emotions.
        intents: the same.
        emotion_kind: "softmax", or "sigmoid" where several emotions are possible at once.

    Returns:
        One answer for each query, of fewer than k items where candidates or caps allow no more.

    Raises:
        InputError: ``k`` is not positive, the affect-free scores or the state have other shapes than the candidates and
            the classes say, a score is not finite, an item's origin is unknown where a share of origins is limited, or
            what :func:`~mmei_jax.recommendation.reranking.rerank` refuses.
    """
    if k < 1:
        raise InputError(f"k = {k}: expected at least 1")
    if affect_free.shape != found.row.shape:
        raise InputError(f"affect_free of shape {affect_free.shape}: expected {found.row.shape}")
    num_queries = len(found.row)
    shapes = {"modality_weights": (num_queries, len(MODALITIES))}
    shapes |= {"emotion": (num_queries, len(emotions)), "intent": (num_queries, len(intents))}
    for name, expected in shapes.items():
        shape = np.shape(getattr(state, name))
        if getattr(state, name) is not None and shape != expected:
            raise InputError(f"state.{name} of shape {shape}: expected {expected}")
    device = jax.tree.map(jnp.asarray, (_candidates(found, affect_free, config), state))
    reranked = jax.device_get(rerank(*device, config.limits(k), k=k, emotion_kind=emotion_kind))
    alpha = np.asarray(state.modality_weights)
    return [
        Recommendation(
            items=tuple(_item(found, reranked, query, rank) for rank in range(count)),
            shortfall=None if count == k else "candidates" if count == reranked.num_candidates[query] else "caps",
            affect_weight=float(reranked.affect_weight[query]),
            modality_weights=_by_name(MODALITIES, alpha[query]),
            emotion=_told(emotions, reranked.emotion, query, is_one=emotion_kind != "sigmoid"),
            intent=_told(intents, reranked.intent, query, is_one=True),
        )
        for query, count in enumerate(reranked.num_answered.tolist())
    ]


def recommendation_lines(told: dict[str, Any]) -> list[str]:
    """Lines for a reader: what was read of the user and how much it weighs, then the items with the parts of scores.

    Args:
        told: of :meth:`Recommendation.to_json`.
    """
    read = [f"{task} {_chosen(told[task])}" for task in ("emotion", "intent") if told[task] is not None]
    alpha = ", ".join(f"{name} {weight:.2f}" for name, weight in told["modality_weights"].items())
    lines = [f"  {', '.join(read)}; affect weighs {told['affect_weight']:.2f}; alpha: {alpha}"]
    for item, line in zip(told["recommended"], answer_lines(told["recommended"]), strict=True):
        parts = ", ".join(f"{name} {value:+.3f}" for name, value in item["parts"].items())
        moved = "" if item["cap"] is None else f"; in place of {item['in_place_of']} ({item['cap']})"
        lines.append(f"{line}  [{parts}; {item['search_rank']} in the search{moved}]")
    if told["shortfall"] is not None:
        lines.append(f"  fewer than asked for: the {told['shortfall']} allow no more")
    return lines


def _chosen(told: dict[str, Any]) -> str:
    """The choice with its probability; of several emotions at once each with its own."""
    names = told["choice"] if isinstance(told["choice"], list) else [told["choice"]]
    return " + ".join(f"{name} ({told['probabilities'][name]:.0%})" for name in names) or "none"


def _candidates(found: FoundItems, affect_free: np.ndarray, config: RerankConfig) -> Candidates:
    """The same as numbers, of which those of items are finite."""
    is_item = found.row >= 0
    for name, values in (("score", found.score), ("affect_free", affect_free)):
        wrong = np.argwhere(is_item & ~np.isfinite(values))
        if len(wrong):
            at = tuple(wrong[0])
            raise InputError(f"{name} of query {at[0]}, item {found.id[at]}: {values[at]}: expected a finite number")
    if config.most_ai_generated_share < 1.0 or config.most_human_share < 1.0:
        wrong = np.argwhere(is_item & ~np.isin(found.origin.astype(str), ORIGINS))
        if len(wrong):
            at = tuple(wrong[0])
            raise InputError(
                f"origin of item {found.id[at]}: {found.origin[at]!r}: expected one of {', '.join(ORIGINS)}, "
                "because their shares are limited"
            )
    # An unknown creator is one of its own.
    is_known = np.array([name is not None for name in found.creator.ravel()]).reshape(found.row.shape)
    creator = np.full(found.row.shape, -1, np.int32)
    creator[is_known] = np.unique(found.creator[is_known].astype(str), return_inverse=True)[1]
    return Candidates(
        item=found.row,
        affect=found.score,
        affect_free=affect_free.astype(np.float32),
        embedding=found.embedding,
        creator=creator,
        is_ai_generated=found.origin.astype(str) == "ai_generated",
    )


def _item(found: FoundItems, reranked: Reranked, query: int, rank: int) -> RecommendedItem:
    place, passed = int(reranked.place[query, rank]), int(reranked.in_place_of[query, rank])
    parts = ("affect", "affect_free", "diversity")
    return RecommendedItem(
        **{name: getattr(found, name)[query, place] for name in ("id", "title", "creator", "origin", "kind")},
        rank=rank + 1,
        search_rank=place + 1,
        score=float(reranked.score[query, rank]),
        parts={name: float(getattr(reranked, name)[query, rank]) for name in parts},
        affect_score=float(found.score[query, place]),
        cap=None if passed < 0 else CAPS[int(reranked.cap[query, rank])],
        in_place_of=None if passed < 0 else str(found.id[query, passed]),
    )


def _told(classes: Sequence[str], found: np.ndarray | None, query: int, *, is_one: bool) -> dict[str, Any] | None:
    if found is None:
        return None
    own = found[query]
    choice: Any = classes[int(np.argmax(own))]
    if not is_one:
        choice = [name for name, value in zip(classes, own, strict=True) if value > 0.5]
    return {"choice": choice, "probabilities": _by_name(classes, own)}


def _by_name(names: Sequence[str], values: np.ndarray) -> dict[str, float]:
    return {name: float(value) for name, value in zip(names, values, strict=True)}
