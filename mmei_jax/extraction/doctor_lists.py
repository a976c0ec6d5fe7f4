"""Examines lists of utterances: counts, labels, repetitions, what splits share, lengths. No media are opened."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from mmei_jax.extraction.doctor_findings import Examination, Finding, find_repeats, find_shared, histogram
from mmei_jax.extraction.published_facts import PublishedFacts
from mmei_jax.extraction.utterance_lists import Utterance

BySplit = Mapping[str, Sequence[Utterance]]


def group_by_split(utterances: Sequence[Utterance], facts: PublishedFacts | None) -> dict[str, list[Utterance]]:
    """Utterances by split: the published splits in their order, or train, then the others in the list's."""
    groups: dict[str, list[Utterance]] = {split: [] for split in (facts.splits if facts else ["train"])}
    for utterance in utterances:
        groups.setdefault(utterance.clip.split, []).append(utterance)
    return {split: found for split, found in groups.items() if found}


def examine_list(
    utterances: Sequence[Utterance], facts: PublishedFacts | None, examination: Examination, max_seconds: float
) -> None:
    """Adds what a list says to an examination.

    Args:
        utterances: all of them.
        facts: published figures to compare with.
        examination: takes counts, histograms and findings.
        max_seconds: a longer clip is a finding.
    """
    groups = group_by_split(utterances, facts)
    for split, found in groups.items():
        examination.splits[split] = _count(found)
    examination.class_counts = count_labels(groups, facts)
    examination.findings += compare_splits({split: len(found) for split, found in groups.items()}, facts)
    examination.findings += compare_classes(examination.class_counts, facts)
    examination.findings += _unknown_labels(groups, facts)
    examination.findings += _repetitions(groups)
    examination.findings += _shared(groups)
    examination.findings += _texts_and_times(groups, max_seconds)
    _measure(groups, examination)


def same_words(text: str) -> str:
    """What of a text counts when two are compared: case folded, runs of spaces as one, none at the ends.

    Example:
        >>> same_words(" Oh  my GOD! ")
        'oh my god!'
    """
    return " ".join(text.casefold().split())


def count_labels(groups: BySplit, facts: PublishedFacts | None) -> dict[str, dict[str, dict[str, int]]]:
    """By label and split, records by class name: published names in label order, then others.

    Labels that are numbers are not counted; without published figures, those whose cells all are.
    """
    counts: dict[str, dict[str, dict[str, int]]] = {}
    names = dict.fromkeys(name for found in groups.values() for utterance in found for name in utterance.labels)
    for name in names:
        spec = facts.labels.get(name) if facts else None
        cells = {split: [utterance.labels.get(name, "") for utterance in found] for split, found in groups.items()}
        if spec.kind == "real" if spec else all(_is_number(cell) for found in cells.values() for cell in found if cell):
            continue
        order = spec.class_names if spec else sorted({cell for found in cells.values() for cell in found if cell})
        counts[name] = {}
        for split, found in cells.items():
            is_list = spec is not None and spec.kind == "multi_label"
            given = Counter(part for cell in found if cell for part in (cell.split("|") if is_list else [cell]))
            counts[name][split] = {part: given.pop(part, 0) for part in order} | dict(sorted(given.items()))
    return counts


def compare_splits(num_records: Mapping[str, int], facts: PublishedFacts | None) -> list[Finding]:
    """Splits that are missing, unknown, or of another size than published."""
    if facts is None:
        return []
    unknown = [split for split in num_records if split not in facts.splits]
    findings = [Finding("unknown_split", split, num_records[split]) for split in unknown]
    for split, published in facts.splits.items():
        if split not in num_records:
            findings.append(Finding("missing_split", split, published.num_records))
        elif num_records[split] != published.num_records:
            findings.append(Finding("num_records", split, num_records[split], expected=published.num_records))
    return findings


def compare_classes(
    class_counts: Mapping[str, Mapping[str, Mapping[str, int]]], facts: PublishedFacts | None
) -> list[Finding]:
    """Class counts that are not the published ones.

    Where the counts of a label in a split are those published but belong to other classes, that is one finding, of the
    label order: the classes are exchanged.
    """
    findings: list[Finding] = []
    for label, by_split in class_counts.items():
        for split, counts in by_split.items():
            published = facts.splits[split].class_counts.get(label) if facts and split in facts.splits else None
            if facts is None or published is None:
                continue
            names = facts.labels[label].class_names
            found = [counts.get(name, 0) for name in names]
            wrong = [index for index, count in enumerate(found) if count != published[index]]
            if wrong and sorted(found) == sorted(published):
                exchanged = [names[index] for index in wrong]
                findings.append(Finding("label_order", f"{split}/{label}", exchanged))
                continue
            findings += [
                Finding("class_counts", f"{split}/{label}/{names[index]}", found[index], expected=published[index])
                for index in wrong
            ]
    return findings


def _count(utterances: Sequence[Utterance]) -> dict[str, int]:
    values = {
        "num_speakers": {utterance.clip.speaker for utterance in utterances},
        "num_episodes": {utterance.episode for utterance in utterances},
        "num_dialogues": {utterance.clip.dialogue for utterance in utterances},
    }
    return {"num_records": len(utterances)} | {name: len(found - {None}) for name, found in values.items()}


def _unknown_labels(groups: BySplit, facts: PublishedFacts | None) -> list[Finding]:
    findings = []
    for name, spec in facts.labels.items() if facts else ():
        for split, found in groups.items():
            ids = tuple(
                utterance.clip.id
                for utterance in found
                for cell in [utterance.labels.get(name, "")]
                if cell and not _is_accepted(cell, spec.kind, spec.class_names)
            )
            if ids:
                findings.append(Finding("unknown_labels", f"{split}/{name}", len(ids), ids))
    return findings


def _is_accepted(cell: str, kind: str, class_names: tuple[str, ...]) -> bool:
    if kind == "real":
        return _is_number(cell)
    parts = [part for part in cell.split("|") if part != "none"] if kind == "multi_label" else [cell]
    return set(parts) <= set(class_names)


def _is_number(cell: str) -> bool:
    try:
        return bool(np.isfinite(float(cell)))
    except ValueError:
        return False


def _repetitions(groups: BySplit) -> list[Finding]:
    ids = {split: [(utterance.clip.id, utterance.clip.id) for utterance in found] for split, found in groups.items()}
    findings = find_repeats(ids, "repeated_ids", None)
    said = {
        split: [
            (utterance.clip.id, (same_words(utterance.clip.text), same_words(utterance.clip.speaker or "")))
            for utterance in found
            if utterance.clip.text is not None
        ]
        for split, found in groups.items()
    }
    return findings + find_repeats(said, "duplicates_within", "duplicates_across")


def _shared(groups: BySplit) -> list[Finding]:
    findings = []
    for check, values in (
        ("shared_speakers", {split: [item.clip.speaker for item in found] for split, found in groups.items()}),
        ("shared_episodes", {split: [item.episode for item in found] for split, found in groups.items()}),
        ("shared_dialogues", {split: [item.clip.dialogue for item in found] for split, found in groups.items()}),
    ):
        findings += find_shared(values, check)
    return findings


def _texts_and_times(groups: BySplit, max_seconds: float) -> list[Finding]:
    has_texts = any(utterance.clip.text for found in groups.values() for utterance in found)
    findings = []
    for split, found in groups.items():
        ids = {
            "empty_texts": [item.clip.id for item in found if has_texts and _lacks_text(item)],
            "long_clips": [item.clip.id for item in found if item.seconds is not None and item.seconds > max_seconds],
            "empty_clips": [item.clip.id for item in found if item.seconds is not None and item.seconds <= 0],
        }
        findings += [Finding(check, split, len(names), tuple(names)) for check, names in ids.items() if names]
    return findings


def _lacks_text(utterance: Utterance) -> bool:
    return "text" not in utterance.clip.optional and not (utterance.clip.text or "").strip()


def _measure(groups: BySplit, examination: Examination) -> None:
    for split, found in groups.items():
        lengths = [len(utterance.clip.text.split()) for utterance in found if utterance.clip.text]
        seconds = [max(0.0, utterance.seconds) for utterance in found if utterance.seconds is not None]
        for name, values in (("text words", lengths), ("seconds", seconds)):
            if values:
                examination.histograms.setdefault(name, {})[split] = histogram(np.array(values))
