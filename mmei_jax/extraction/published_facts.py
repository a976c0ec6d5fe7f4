"""What is published of a data set: label order, counts, known faults. One JSON file beside the data set's card.

The file has these keys; those with a star may be left out::

    name, source       strings
    format             how its lists are read: meld, mintrec, mosei or clips
    labels             by name: {"kind": "categorical" | "multi_label" | "real", "class_names": [in label order]}
    splits             by name: {"num_records": number, "class_counts"*: {label: [numbers in label order]}}
    known_findings*    [{"check", "where", "value", "note"*}]: what the doctor finds in the data as they were published
    known_bad_clips*   by clip id, what is wrong with it
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from mmei_jax.record_schema import LabelSpec
from mmei_jax.types import InputError

FILE_NAME = "published.json"
_REQUIRED = {"name", "source", "format", "labels", "splits"}
_OPTIONAL = {"known_findings", "known_bad_clips"}


@dataclass(frozen=True)
class SplitFacts:
    """Published counts of one split.

    Attributes:
        num_records: records.
        class_counts: by label, records of each class in label order; no entry where none are published.
    """

    num_records: int
    class_counts: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class PublishedFacts:
    """What is published of a data set.

    Attributes:
        path: the file that says so.
        name: of the data set.
        source: where the figures come from.
        format: how its lists are read.
        labels: by name, in label order.
        splits: by name, in the order of the file.
        known_findings: value by (check, where), as :class:`~mmei_jax.extraction.doctor_findings.Finding` names them.
        known_bad_clips: by clip id, what is wrong with it.
    """

    path: Path
    name: str
    source: str
    format: str
    labels: dict[str, LabelSpec]
    splits: dict[str, SplitFacts]
    known_findings: dict[tuple[str, str], Any]
    known_bad_clips: dict[str, str]


def read_published(path: Path) -> PublishedFacts:
    """Reads the file, or ``published.json`` in the folder ``path``.

    Raises:
        InputError: there is no such file, or it is not of the form above; names the key.
    """
    file = path / FILE_NAME if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"{file}: no such file: expected the published figures of a data set")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: not a JSON file: {error}") from error
    if not isinstance(values, dict) or not set(values) >= _REQUIRED or set(values) - _REQUIRED - _OPTIONAL:
        found = ", ".join(values) if isinstance(values, dict) else type(values).__name__
        raise InputError(
            f"{file}: keys {found}: expected {', '.join(sorted(_REQUIRED))}, and maybe {sorted(_OPTIONAL)}"
        )
    try:
        return _build(file, values)
    except InputError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file}: not of the form expected: {type(error).__name__}: {error}") from error


def _build(file: Path, values: dict[str, Any]) -> PublishedFacts:
    labels = {name: LabelSpec(label["kind"], tuple(label["class_names"])) for name, label in values["labels"].items()}
    splits = {
        name: SplitFacts(
            int(split["num_records"]),
            {label: tuple(map(int, counts)) for label, counts in split.get("class_counts", {}).items()},
        )
        for name, split in values["splits"].items()
    }
    for name, spec in labels.items():
        if spec.kind not in ("categorical", "multi_label", "real"):
            raise InputError(f"{file}: label {name!r}: kind {spec.kind!r}: expected categorical, multi_label or real")
    for name, split in splits.items():
        for label, counts in split.class_counts.items():
            if label not in labels or len(counts) != len(labels[label].class_names):
                raise InputError(f"{file}: split {name!r}: class_counts of {label!r}: expected one number per class")
    known = {(entry["check"], entry["where"]): entry["value"] for entry in values.get("known_findings", [])}
    bad_clips = cast(dict[str, str], dict(values.get("known_bad_clips", {})))
    return PublishedFacts(
        file, str(values["name"]), str(values["source"]), str(values["format"]), labels, splits, known, bad_clips
    )
