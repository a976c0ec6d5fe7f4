"""Examines a data set of feature shards: hashes, counts, labels, what splits share, and the features themselves."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mmei_jax.extraction.doctor_findings import Examination, Finding, find_repeats, find_shared, histogram
from mmei_jax.extraction.doctor_lists import compare_classes, compare_splits, same_words
from mmei_jax.extraction.published_facts import PublishedFacts
from mmei_jax.records import Dataset, Split

# Padded features that are in memory at once.
_BYTES_PER_CHUNK = 16 * 2**20


class _FeatureRange:
    """Smallest and largest finite value of each feature, over all tokens seen; NaN where none was."""

    def __init__(self, dim: int) -> None:
        self.low = np.full(dim, np.nan, np.float32)
        self.high = np.full(dim, np.nan, np.float32)

    def add(self, tokens: np.ndarray) -> None:
        if len(tokens):
            finite = np.where(np.isfinite(tokens), tokens, np.nan)
            self.low = np.fmin(self.low, np.fmin.reduce(finite, axis=0))
            self.high = np.fmax(self.high, np.fmax.reduce(finite, axis=0))

    def constant(self) -> list[int]:
        return np.flatnonzero(self.low == self.high).tolist()


def examine_shards(folder: Path, facts: PublishedFacts | None, examination: Examination) -> None:
    """Adds what a data set of shards holds to an examination.

    Args:
        folder: with ``manifest.json``.
        facts: published figures to compare with.
        examination: takes counts, histograms and findings.

    Raises:
        InputError: the data set cannot be opened.
    """
    dataset = Dataset.open(folder)
    order = [name for name in (facts.splits if facts else ["train"]) if name in dataset.split_names]
    splits = {name: dataset.split(name) for name in dict.fromkeys([*order, *dataset.split_names])}
    examination.splits = {name: {"num_records": split.num_records} for name, split in splits.items()}
    examination.findings += _damaged(dataset)
    examination.findings += compare_splits({name: split.num_records for name, split in splits.items()}, facts)
    examination.findings += _examine_labels(dataset, splits, facts, examination)
    columns = [("shared_speakers", "user_id"), ("shared_dialogues", "dialogue_id")]
    if dataset.spec.extras.get("episode") == "string":
        columns.append(("shared_episodes", "extra_episode"))
    for check, column in columns:
        values = {name: list(split.column(column)) for name, split in splits.items()}
        examination.findings += find_shared(values, check)
    if dataset.spec.extras.get("transcript") == "string":
        examination.findings += _repeated_texts(splits)
    for modality in sorted(dataset.spec.modalities):
        examination.findings += _examine_features(splits, modality, dataset.spec.modalities[modality].dim, examination)


def _repeated_texts(splits: dict[str, Split]) -> list[Finding]:
    keys = {
        name: [
            (record_id, (same_words(text), same_words(user or "")))
            for record_id, text, user in zip(
                split.ids(np.arange(split.num_records)),
                split.column("extra_transcript"),
                split.column("user_id"),
                strict=True,
            )
            if text is not None
        ]
        for name, split in splits.items()
    }
    return find_repeats(keys, "duplicates_within", "duplicates_across")


def _damaged(dataset: Dataset) -> list[Finding]:
    findings = []
    for split in dataset.split_names:
        for shard in dataset.manifest["splits"][split]["shards"]:
            with (dataset.path / shard["file"]).open("rb") as stream:
                if hashlib.file_digest(stream, "sha256").hexdigest() != shard["sha256"]:
                    findings.append(Finding("damaged_shard", shard["file"], shard["num_records"]))
    return findings


def _examine_labels(
    dataset: Dataset, splits: dict[str, Split], facts: PublishedFacts | None, examination: Examination
) -> list[Finding]:
    findings = []
    for label, spec in dataset.spec.labels.items():
        if spec.kind == "real":
            continue
        published = facts.labels.get(label) if facts else None
        if published is not None and published.class_names != spec.class_names:
            expected = list(published.class_names)
            findings.append(Finding("class_names", label, list(spec.class_names), expected=expected))
        for name, split in splits.items():
            values, is_labelled = split.gather_label(label, np.arange(split.num_records))
            given = values[is_labelled]
            if spec.kind == "multi_label":
                counts = (given > 0).sum(axis=0)
            else:
                counts = np.bincount(given, minlength=len(spec.class_names))
            by_class = dict(zip(spec.class_names, counts.tolist(), strict=True))
            examination.class_counts.setdefault(label, {})[name] = by_class
    return findings + compare_classes(examination.class_counts, facts)


def _chunks(split: Split, modality: str, dim: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Record indices, padded ``[records, tokens, dim]`` float32 features and lengths, in pieces of bounded size."""
    longest = max(1, int(split.lengths(modality).max(initial=0)))
    num_records = max(1, _BYTES_PER_CHUNK // (4 * longest * dim))
    for start in range(0, split.num_records, num_records):
        indices = np.arange(start, min(start + num_records, split.num_records))
        features, lengths = split.gather_tokens(modality, indices, longest)
        yield indices, features, lengths


def _examine_features(splits: dict[str, Split], modality: str, dim: int, examination: Examination) -> list[Finding]:
    findings = []
    feature_range = _FeatureRange(dim)
    keys: dict[str, list[tuple[str, bytes]]] = {}
    for name, split in splits.items():
        keys[name] = []
        num_bad, bad_ids = 0, []
        for indices, features, lengths in _chunks(split, modality, dim):
            for record_id, tokens, length in zip(split.ids(indices), features, lengths.tolist(), strict=True):
                valid = np.ascontiguousarray(tokens[:length])
                feature_range.add(valid)
                bad = int((~np.isfinite(valid)).sum())
                num_bad += bad
                if bad:
                    bad_ids.append(record_id)
                if length:
                    keys[name].append((record_id, hashlib.sha256(valid.tobytes()).digest()))
        if num_bad:
            findings.append(Finding("non_finite_features", f"{name}/{modality}", num_bad, tuple(bad_ids)))
        lengths = split.lengths(modality)
        if (lengths > 0).any():
            examination.histograms.setdefault(f"{modality} tokens", {})[name] = histogram(lengths[lengths > 0])
        examination.splits[name][f"num_{modality}"] = int((lengths > 0).sum())
    constant = feature_range.constant()
    if constant:
        findings.append(Finding("constant_features", modality, constant))
    checks = ("identical_features_within", "identical_features_across")
    return findings + find_repeats(keys, *checks, prefix=f"{modality}: ")
