"""What the doctor reports: findings, whether they are known, measurements, and how all of it is written."""

import dataclasses
import math
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Shaped

from mmei_jax.extraction.published_facts import PublishedFacts

# What a finding of each check says; its value is a number of records where nothing else is said.
CHECKS: Mapping[str, str] = {
    "missing_split": "a published split is not there; the value is its published number of records",
    "unknown_split": "a split that is not published",
    "num_records": "records in the split; expected: the published number",
    "class_counts": "records of the class; expected: the published number",
    "label_order": "the published counts, but of other classes: the value names the classes that are exchanged",
    "class_names": "class names of the data set in label order; expected: the published ones",
    "unknown_labels": "a label that is none of the published classes",
    "repeated_ids": "an id that an earlier record of the split has",
    "duplicates_within": "same text and speaker as an earlier record of the split",
    "duplicates_across": "same text and speaker as a record of the other split",
    "shared_speakers": "speakers in both splits; the value is a number of speakers",
    "shared_episodes": "episodes (or videos) in both splits; the value is a number of episodes",
    "shared_dialogues": "dialogues in both splits; the value is a number of dialogues",
    "empty_texts": "no text, where other records have one",
    "long_clips": "longer than the limit, by the list's times",
    "empty_clips": "not longer than 0 seconds, by the list's times",
    "missing_media": "the media file is not there",
    "corrupt_media": "the media file does not open, or breaks off",
    "long_media": "the media file is longer than the limit",
    "no_video": "the media file has no video stream, and no other clip without one is marked as optional",
    "no_audio": "neither the media file nor a file of its own has sound",
    "identical_media_within": "the same bytes as an earlier file of the split",
    "identical_media_across": "the same bytes as a file of the other split",
    "damaged_shard": "a file whose SHA-256 is not the manifest's",
    "non_finite_features": "values that are NaN or infinite; the value is a number of values",
    "constant_features": "features that have one value in all tokens; the value lists them",
    "identical_features_within": "the same features as an earlier record of the split",
    "identical_features_across": "the same features as a record of the other split",
}
# Findings of which each clip may be known by itself.
_BY_CLIP = frozenset({"missing_media", "corrupt_media", "long_media", "long_clips", "empty_clips"})
_NUM_IDS_SHOWN = 8


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be, or not as it is published.

    Attributes:
        check: a key of :data:`CHECKS`.
        where: split, pair of splits, label or feature that it is about.
        value: a number as a rule, see :data:`CHECKS`.
        ids: records (speakers, episodes) that it is about, all of them.
        expected: what is published or known; None where nothing is.
        is_known: whether it was found in the data as they were published.
    """

    check: str
    where: str
    value: Any
    ids: tuple[str, ...] = ()
    expected: Any = None
    is_known: bool = False


@dataclass
class Examination:
    """All that an examination of a data set gave.

    Attributes:
        input: what was examined.
        format: how it was read.
        published: the file it was compared with; None for none.
        splits: by name, counts: num_records, and what else the data have.
        class_counts: by label and split, records by class name.
        histograms: by what is measured and split, see :func:`histogram`.
        findings: known and unknown.
        not_found: known findings that the data do not have, as "check, where".
        not_checked: what could not be examined, and why.
    """

    input: str
    format: str
    published: str | None = None
    splits: dict[str, dict[str, int]] = field(default_factory=dict)
    class_counts: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    histograms: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    not_found: list[str] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)

    @property
    def num_unexpected(self) -> int:
        """Findings that are not known."""
        return sum(not finding.is_known for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """JSON values; the same for the same data."""
        return {**dataclasses.asdict(self), "num_unexpected": self.num_unexpected}


def judge(findings: Iterable[Finding], facts: PublishedFacts | None, accepted: Collection[str] = ()) -> list[Finding]:
    """The findings with what is known of them.

    A finding is known when the published file lists its check, place and value; one that is about single clips also
    when it lists the clips: if only some of them, it becomes two findings.

    Args:
        findings: as the examinations gave them.
        facts: what is published, None for nothing.
        accepted: checks of which every finding counts as known.
    """
    judged: list[Finding] = []
    for finding in findings:
        key = (finding.check, finding.where)
        if finding.check in accepted:
            judged.append(dataclasses.replace(finding, is_known=True))
        elif facts is None:
            judged.append(finding)
        elif key in facts.known_findings:
            known = facts.known_findings[key]
            judged.append(dataclasses.replace(finding, expected=known, is_known=finding.value == known))
        elif finding.check in _BY_CLIP:
            known_ids = tuple(name for name in finding.ids if name in facts.known_bad_clips)
            other_ids = tuple(name for name in finding.ids if name not in facts.known_bad_clips)
            for ids, is_known in ((known_ids, True), (other_ids, False)):
                if ids:
                    judged.append(dataclasses.replace(finding, value=len(ids), ids=ids, is_known=is_known))
        else:
            judged.append(finding)
    return judged


def list_not_found(findings: Iterable[Finding], facts: PublishedFacts | None) -> list[str]:
    """Known findings of places that were examined, and are not there."""
    found = {(finding.check, finding.where) for finding in findings}
    return (
        []
        if facts is None
        else [f"{check}, {where}" for check, where in facts.known_findings if (check, where) not in found]
    )


def find_repeats(
    keys_by_split: Mapping[str, Sequence[tuple[str, Hashable]]], within: str, across: str | None, prefix: str = ""
) -> list[Finding]:
    """Records that have the key of another record.

    Args:
        keys_by_split: by split, (record's id, key) of every record that has a key.
        within: name of the check within a split.
        across: name of the check between splits; None: splits are not compared.
        prefix: before the place.

    Returns:
        Per split the records whose key an earlier record of the split has, and per pair of splits those of the later
        split whose key the earlier one has.
    """
    findings = []
    seen: dict[str, set[Hashable]] = {}
    for split, pairs in keys_by_split.items():
        keys: set[Hashable] = set()
        repeated = []
        for record_id, key in pairs:
            if key in keys:
                repeated.append(record_id)
            keys.add(key)
        if repeated:
            findings.append(Finding(within, f"{prefix}{split}", len(repeated), tuple(repeated)))
        for other, other_keys in seen.items() if across else ():
            shared = tuple(record_id for record_id, key in pairs if key in other_keys)
            if shared and across:
                findings.append(Finding(across, f"{prefix}{split} in {other}", len(shared), shared))
        seen[split] = keys
    return findings


def find_shared(values_by_split: Mapping[str, Iterable[str | None]], check: str) -> list[Finding]:
    """Values, such as speakers, that two splits have in common; None is no value."""
    findings = []
    seen: dict[str, set[str]] = {}
    for split, values in values_by_split.items():
        present = {value for value in values if value is not None}
        for other, others in seen.items():
            shared = tuple(sorted(present & others))
            if shared:
                findings.append(Finding(check, f"{other} & {split}", len(shared), shared))
        seen[split] = present
    return findings


def histogram(values: Shaped[np.ndarray, "records"]) -> dict[str, Any]:
    """Counts of values between 0, 1, 2, 4, 8 ..., each bin with its lower edge, the last one open.

    Args:
        values: ``[records]`` lengths, not negative; at least one.

    Returns:
        JSON values: count, min, mean, max, edges (lower ones) and counts.

    Example:
        >>> histogram(np.array([1, 3, 3, 9]))["counts"]
        [0, 1, 2, 0, 1]
    """
    top = float(values.max())
    edges = [0.0, *(2.0**power for power in range(max(1, math.floor(math.log2(max(top, 1))) + 1)))]
    counts, _ = np.histogram(values, [*edges, math.inf])
    return {
        "count": len(values),
        "min": float(values.min()),
        "mean": round(float(values.mean()), 6),
        "max": top,
        "edges": edges,
        "counts": counts.tolist(),
    }


def describe(examination: Examination) -> str:
    """The examination for people."""
    lines = [f"{examination.input} ({examination.format}); published: {examination.published or 'nothing given'}", ""]
    columns = list(dict.fromkeys(name for counts in examination.splits.values() for name in counts))
    lines.append(f"{'split':<14}" + "".join(f"{name.removeprefix('num_'):>12}" for name in columns))
    for split, counts in examination.splits.items():
        lines.append(f"{split:<14}" + "".join(f"{counts.get(name, 0):>12,}" for name in columns))
    for label, by_split in examination.class_counts.items():
        lines += ["", f"{label:<22}" + "".join(f"{split:>12}" for split in by_split)]
        for name in dict.fromkeys(name for counts in by_split.values() for name in counts):
            lines.append(f"{name:<22}" + "".join(f"{counts.get(name, 0):>12,}" for counts in by_split.values()))
    for measured, histograms in examination.histograms.items():
        lines += ["", f"{measured:<14}{'count':>9}{'min':>9}{'mean':>9}{'max':>9}   from lower edge: number"]
        for split, figures in histograms.items():
            bins = zip(figures["edges"], figures["counts"], strict=True)
            shown = ", ".join(f"{edge:g}: {count:,}" for edge, count in bins if count)
            numbers = "".join(f"{figures[name]:>9,.4g}" for name in ("min", "mean", "max"))
            lines.append(f"{split:<14}{figures['count']:>9,}{numbers}   {shown}")
    for title, is_known in (("known", True), ("NOT KNOWN", False)):
        findings = [finding for finding in examination.findings if finding.is_known == is_known]
        lines += ["", f"{title}: {len(findings)} findings"]
        for check in dict.fromkeys(finding.check for finding in findings):
            lines.append(f"  {check} ({CHECKS[check]})")
            lines += [_describe_finding(finding) for finding in findings if finding.check == check]
    lines += ["", *(f"known, but not found here: {name}" for name in examination.not_found)]
    lines += [f"not checked: {reason}" for reason in examination.not_checked]
    return "\n".join(lines)


def _describe_finding(finding: Finding) -> str:
    shown = ", ".join(finding.ids[:_NUM_IDS_SHOWN]) + (", ..." if len(finding.ids) > _NUM_IDS_SHOWN else "")
    expected = "" if finding.expected is None or finding.is_known else f" (expected {finding.expected})"
    return f"    {finding.where}: {finding.value}{expected}" + (f": {shown}" if shown else "")
