"""What can be reached at best on AIGC-INT-Sim: figures of the exact posterior, of late fusion, and of ideal rankings.

Figures are named as metrics are (``emotion/accuracy``); who predicts, and on which records, follows in brackets:

* no bracket: the exact posterior given every modality that is present, on every record. The ceiling of any model.
* ``[text]``, ``[vision+text]`` ...: given those modalities alone, on records that have at least one of them;
  ``[text, every record]``: the same on every record; the prior decides where none is there.
* ``[late_fusion]``: product of the unimodal posteriors of each task (emotion and intent taken apart): the best that
  late fusion can do; ``[late_fusion_joint]``: product of the unimodal posteriors of (emotion, intent).
* ``[conflict]``, ``[no_conflict]``, ``[manner=0]`` ...: the exact posterior on those records.
* rankings: no bracket ranks by P(item is relevant | tokens), ``[expected_satisfaction]`` by expected satisfaction under
  the posterior, ``[true_latents]`` by what really makes items relevant, ``[prior]`` the same way for everyone.

``joint`` is the pair (emotion, intent), 28 classes. Precision and recall are macro averages over classes that occur as
truth or as prediction; one that is never predicted has precision 0, and recall 0 if it never occurs.
"""

import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from mmei_jax.command import CommandParser
from mmei_jax.simulation.aigc_int import EMOTION_PRIOR, INTENTS, NUM_MANNERS, Chunk, Latents, stream
from mmei_jax.simulation.aigc_int_feedback import (
    expected_satisfaction,
    posterior_scores,
    relevant_items,
    true_scores,
)
from mmei_jax.simulation.aigc_int_figures import (
    CalibrationTotals,
    ClassificationTotals,
    RankingTotals,
    relevant_ranks,
)
from mmei_jax.simulation.aigc_int_posterior import (
    SUBSETS,
    evidence,
    log_posterior,
    log_sum_exp,
    prior,
    product_of_unimodal,
)
from mmei_jax.types import MODALITIES

TASKS = ("emotion", "intent", "joint")
FULL = ""
LATE_FUSION = "late_fusion"
LATE_FUSION_JOINT = "late_fusion_joint"
RANKINGS = (FULL, "expected_satisfaction", "true_latents", "prior")
PROGRESS_SECONDS = 10.0
# How the report shows each metric: column title, factor, digits.
_METRICS = {
    "accuracy": ("accuracy %", 100.0, 2),
    "macro_precision": ("macro P %", 100.0, 2),
    "macro_recall": ("macro R %", 100.0, 2),
    "cross_entropy": ("cross-entropy", 1.0, 4),
}


@dataclass(frozen=True)
class Predictions:
    """Predictions for the records of one chunk.

    Attributes:
        latents: the truth.
        posteriors: by predictor and task, ``[batch, classes]`` log probabilities.
        is_counted: by predictor, ``[batch]`` bool, whether it had anything to read.
        ranks: by ranking, ``[batch, relevant]`` int64 ranks of the relevant items in rising order.
    """

    latents: Latents
    posteriors: Mapping[str, Mapping[str, Float[np.ndarray, "batch classes"]]]
    is_counted: Mapping[str, Bool[np.ndarray, "batch"]]
    ranks: Mapping[str, Int[np.ndarray, "batch relevant"]]


def true_classes(latents: Latents) -> dict[str, Int[np.ndarray, "batch"]]:
    """The right class of each task."""
    joint = latents.emotion * len(INTENTS) + latents.intent
    return {"emotion": latents.emotion, "intent": latents.intent, "joint": joint}


def by_task(joint: Float[np.ndarray, "batch emotions intents"]) -> dict[str, Float[np.ndarray, "batch classes"]]:
    """Log probabilities of each task's classes, from those of (emotion, intent)."""
    return {
        "emotion": log_sum_exp(joint, axis=2),
        "intent": log_sum_exp(joint, axis=1),
        "joint": joint.reshape(len(joint), -1),
    }


def subset_name(subset: Sequence[str]) -> str:
    """How a set of modalities is called in figures: ``vision+text``, and ``""`` for all of them."""
    return FULL if len(subset) == len(MODALITIES) else "+".join(subset)


def predict(chunk: Chunk, *, with_rankings: bool = True) -> Predictions:
    """The best predictions for a chunk, by every predictor."""
    evidences = {name: evidence(chunk.tokens[name], name) for name in MODALITIES}
    joints = {subset: log_posterior(evidences, subset) for subset in SUBSETS}
    posteriors = {subset_name(subset): by_task(joint) for subset, joint in joints.items()}
    unimodal = [(name,) for name in MODALITIES]
    log_intent_prior = np.log(prior().sum(axis=0))
    per_task = {
        "emotion": product_of_unimodal([posteriors[name]["emotion"] for (name,) in unimodal], np.log(EMOTION_PRIOR)),
        "intent": product_of_unimodal([posteriors[name]["intent"] for (name,) in unimodal], log_intent_prior),
    }
    per_task["joint"] = (per_task["emotion"][:, :, None] + per_task["intent"][:, None]).reshape(
        len(per_task["emotion"]), -1
    )
    posteriors[LATE_FUSION] = per_task
    posteriors[LATE_FUSION_JOINT] = by_task(
        product_of_unimodal([joints[subset] for subset in unimodal], np.log(prior()))
    )
    is_present = chunk.latents.is_present()
    is_counted: dict[str, np.ndarray] = {name: np.ones(len(is_present), bool) for name in posteriors}
    for subset in SUBSETS[:-1]:
        columns = [MODALITIES.index(name) for name in subset]
        is_counted[subset_name(subset)] = np.any(is_present[:, columns], axis=1)
    ranks = _rank(chunk.latents, joints[SUBSETS[-1]]) if with_rankings else {}
    return Predictions(chunk.latents, posteriors, is_counted, ranks)


def _rank(latents: Latents, posterior: Float[np.ndarray, "batch emotions intents"]) -> dict[str, np.ndarray]:
    relevant = relevant_items(latents)
    for_everyone = posterior_scores(np.broadcast_to(np.log(prior()), posterior.shape))
    return {
        FULL: relevant_ranks(posterior_scores(posterior), relevant),
        "expected_satisfaction": relevant_ranks(expected_satisfaction(posterior), relevant),
        "true_latents": relevant_ranks(true_scores(latents), relevant),
        "prior": relevant_ranks(for_everyone, relevant),
    }


def slices(latents: Latents) -> dict[str, Bool[np.ndarray, "batch"]]:
    """Kinds of records that are reported apart, besides all of them (``""``)."""
    has_conflict = latents.conflict_modality >= 0
    found = {"": np.ones(len(has_conflict), bool), "conflict": has_conflict, "no_conflict": ~has_conflict}
    return found | {f"manner={manner}": latents.manner == manner for manner in range(NUM_MANNERS)}


class ReferenceTotals:
    """Sums of all predictors over some records, such as those of one split."""

    def __init__(self) -> None:
        """Of no records."""
        self._classification: dict[tuple[str, str, str], ClassificationTotals] = {}
        self._ranking: dict[str, RankingTotals] = {}

    def add(self, predictions: Predictions, is_member: Bool[np.ndarray, "batch"]) -> None:
        """Counts in those records of a chunk for which ``is_member`` holds."""
        truth, parts = true_classes(predictions.latents), slices(predictions.latents)
        partial = {subset_name(subset) for subset in SUBSETS[:-1]}
        for predictor, tasks in predictions.posteriors.items():
            is_counted = predictions.is_counted[predictor]
            chosen = {part: is_member & is_counted & is_here for part, is_here in parts.items()}
            if predictor in partial:
                chosen["every record"] = is_member
            for part, rows in chosen.items():
                for task in TASKS:
                    empty = ClassificationTotals.empty(tasks[task].shape[1])
                    totals = self._classification.setdefault((task, predictor, part), empty)
                    totals.add(tasks[task][rows], truth[task][rows])
        for name, ranks in predictions.ranks.items():
            self._ranking.setdefault(name, RankingTotals()).add(ranks[is_member])

    def figures(self, task: str, predictor: str = FULL, part: str = "") -> dict[str, float]:
        """Figures of one task, predictor and kind of record (see :func:`slices`), by metric name."""
        return self._classification[task, predictor, part].figures()

    def ranking_figures(self, ranking: str = FULL) -> dict[str, float]:
        """Figures of one ranking, by metric name."""
        return self._ranking[ranking].figures()

    def named_figures(self) -> dict[str, float]:
        """Everything that a manifest notes, named as this module's docstring says."""
        named = {}
        for (task, predictor, part), totals in self._classification.items():
            # Parts of the records are noted for the exact posterior alone; `report` prints the rest.
            if part in ("", "every record") or predictor == FULL:
                bracket = ", ".join(filter(None, (predictor, part)))
                for metric, value in totals.figures().items():
                    named[f"{task}/{metric}" + (f"[{bracket}]" if bracket else "")] = value
        for ranking, ranking_totals in self._ranking.items():
            for metric, value in ranking_totals.figures().items():
                named[f"ranking/{metric}" + (f"[{ranking}]" if ranking else "")] = value
        return named


def progress(chunks: Iterable[Chunk], num_records: int) -> Iterator[Chunk]:
    """The same chunks, with a line on standard error about every ten seconds."""
    started = told = time.monotonic()
    for chunk in chunks:
        yield chunk
        if time.monotonic() - told > PROGRESS_SECONDS:
            told = time.monotonic()
            num_done = chunk.first_record + len(chunk.latents.emotion)
            seconds_left = (told - started) / num_done * (num_records - num_done)
            print(f"{num_done}/{num_records} simulated records, {seconds_left:.0f} s left", file=sys.stderr, flush=True)


def measure(seed: int, num_records: int, dim: int) -> tuple[ReferenceTotals, dict[str, CalibrationTotals]]:
    """Totals over records ``0 .. num_records - 1`` of a seed, streamed; and the exact posterior's calibration."""
    totals = ReferenceTotals()
    calibration = {task: CalibrationTotals() for task in TASKS}
    for chunk in progress(stream(seed, num_records, dim), num_records):
        predictions = predict(chunk)
        totals.add(predictions, np.ones(len(chunk.latents.emotion), bool))
        for task, right in true_classes(chunk.latents).items():
            calibration[task].add(predictions.posteriors[FULL][task], right)
    return totals, calibration


def report_lines(totals: ReferenceTotals) -> Iterator[str]:
    """The Markdown tables of the card; one string may hold two lines."""
    predictors = [subset_name(subset) for subset in SUBSETS] + [LATE_FUSION, LATE_FUSION_JOINT]
    for task in TASKS:
        yield f"\n| {task}, simulated | " + " | ".join(title for title, _, _ in _METRICS.values()) + " |"
        yield "|---" * (len(_METRICS) + 1) + "|"
        for name in predictors:
            figures = totals.figures(task, name)
            values = (f"{factor * figures[key]:.{digits}f}" for key, (_, factor, digits) in _METRICS.items())
            yield f"| {name or 'exact posterior'} | " + " | ".join(values) + " |"
    parts = ("", "conflict", "no_conflict", *(f"manner={manner}" for manner in range(NUM_MANNERS)))
    for metric, (title, factor, digits) in _METRICS.items():
        for task in TASKS:
            yield f"\n| {task} {title}, simulated | " + " | ".join(part or "all" for part in parts) + " |"
            yield "|---" * (len(parts) + 1) + "|"
            for name in predictors:
                values = (f"{factor * totals.figures(task, name, part)[metric]:.{digits}f}" for part in parts)
                yield f"| {name or 'exact posterior'} | " + " | ".join(values) + " |"
    yield "\n| ranking, simulated | MAP | NDCG@10 | HR@10 |\n|---|---|---|---|"
    for name in RANKINGS:
        values = (f"{value:.4f}" for value in totals.ranking_figures(name).values())
        yield f"| {name or 'posterior'} | " + " | ".join(values) + " |"


def main(arguments: Sequence[str]) -> int:
    """The command ``report``: prints the tables of the data set card, as Markdown."""
    parser = CommandParser(
        prog="python -m mmei_jax.simulation.aigc_int report",
        description="Prints what can be reached at best on simulated records: the tables of the data set card.",
    )
    parser.add_argument("--num_records", type=int, default=1_000_000, help="default: %(default)s")
    parser.add_argument("--dim", type=int, default=32, help="features per token; no figure depends on it")
    parser.add_argument("--seed", type=int, default=1_000_133, help="default: %(default)s")
    options = parser.parse_args(arguments)
    totals, calibration = measure(options.seed, options.num_records, options.dim)
    print(f"{options.num_records} simulated records, seed {options.seed}, dim {options.dim}")
    for line in report_lines(totals):
        print(line)
    print()
    for task in TASKS:
        error = calibration[task].expected_calibration_error()
        print(f"expected calibration error of the exact posterior, {task}: {100 * error:.3f} %")
    return 0
