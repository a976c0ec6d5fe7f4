"""Units of work of an extraction: one shard each, done by one process, finished for good once its note is there.

A folder of an extraction that goes on or was interrupted has ``extraction.json`` (what is extracted), finished shards,
and ``progress/`` with a note per finished shard. The last process that finishes turns it into a data set:
``manifest.json`` and ``quarantine.jsonl`` appear, ``progress/`` goes. A shard is renamed into place when it is whole,
and its note follows, so that whatever is killed when, at most the shard in work is done again.
"""

import contextlib
import json
import shutil
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mmei_jax import record_arrow
from mmei_jax.extraction.clips import Clip
from mmei_jax.extraction.media import REASONS, MediaError
from mmei_jax.record_files import MANIFEST_NAME
from mmei_jax.record_schema import shard_schema
from mmei_jax.record_writer import CATALOGUE_NAME, write_arrow_file, write_catalogue_file, write_manifest
from mmei_jax.records import Catalogue, DatasetSpec, Record
from mmei_jax.sharding import ProcessShare
from mmei_jax.types import InputError

EXTRACTION_NAME = "extraction.json"
QUARANTINE_NAME = "quarantine.jsonl"
_PROGRESS = "progress"


@dataclass(frozen=True)
class Unit:
    """Clips of one split that follow each other in the list: one shard.

    Attributes:
        name: of the shard, without ending.
        split: of its clips.
        clips: theirs.
    """

    name: str
    split: str
    clips: tuple[Clip, ...]


def make_units(clips: Sequence[Clip], records_per_shard: int) -> list[Unit]:
    """Cuts every split into units of ``records_per_shard`` clips, in the list's order; independent of processes."""
    by_split: dict[str, list[Clip]] = {}
    for clip in clips:
        by_split.setdefault(clip.split, []).append(clip)
    return [
        Unit(f"{split}-{start // records_per_shard:05d}", split, tuple(own[start : start + records_per_shard]))
        for split, own in by_split.items()
        for start in range(0, len(own), records_per_shard)
    ]


@dataclass(frozen=True)
class Quarantined:
    """A clip that is not used, and why; a line of ``quarantine.jsonl``."""

    id: str
    split: str
    path: str | None
    stage: str
    reason: str
    detail: str

    @classmethod
    def of(cls, clip: Clip, failure: MediaError) -> "Quarantined":
        """The line of a clip."""
        return cls(clip.id, clip.split, clip.path, failure.stage, failure.reason, failure.detail)


class ExtractionFolder:
    """The folder that an extraction writes.

    Attributes:
        path: the folder.
        is_finished: whether the data set is complete.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        """Makes the folder, or goes on with one of the same extraction.

        Args:
            path: the folder.
            identity: everything that the result depends on, JSON values only.

        Raises:
            InputError: the folder holds something else, or an extraction of other clips or another configuration.
        """
        self.path = path
        self._notes = path / _PROGRESS
        file = path / EXTRACTION_NAME
        text = json.dumps(identity, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        # Processes that share the work begin at the same time.
        if not file.is_file() and not _is_free(path) and not file.is_file():
            raise InputError(f"{path}: exists already, and is no folder of an extraction; name a new one")
        if not file.is_file():
            path.mkdir(parents=True, exist_ok=True)
            _write_whole(file, text)
        if (found := file.read_text(encoding="utf-8")) != text:
            key = _first_difference(_parse(file, found), json.loads(text))
            raise InputError(f"{path}: holds an extraction that differs in {key}; name a new folder")
        self.is_finished = (path / MANIFEST_NAME).is_file()
        if not self.is_finished:
            self._notes.mkdir(exist_ok=True)
            # Another process may have completed the data set in between.
            self.is_finished = (path / MANIFEST_NAME).is_file()
            if self.is_finished:
                shutil.rmtree(self._notes, ignore_errors=True)

    def unfinished(self, units: Sequence[Unit], share: ProcessShare) -> list[Unit]:
        """A process's units that are still to be done, in order."""
        return [unit for unit in units[share.index :: share.count] if not self.has(unit)]

    def has(self, unit: Unit) -> bool:
        """Whether a unit is finished."""
        return self.is_finished or self._note(unit).is_file()

    def write(
        self,
        unit: Unit,
        spec: DatasetSpec,
        records: Sequence[Record],
        quarantined: Sequence[Quarantined],
        counts: dict[str, int],
    ) -> None:
        """Writes a finished unit: its shard, unless all of its clips are quarantined, and its note.

        Raises:
            InputError: a record does not fit the description; names it.
        """
        entry = None
        longest = dict.fromkeys(sorted(spec.modalities), 0)
        if records:
            columns = record_arrow.records_to_columns(records, spec)
            longest |= {name: int(np.max(ragged.lengths, initial=0)) for name, ragged in columns.features.items()}
            schema = shard_schema(spec, unit.split)
            name = f"{unit.name}.arrow"
            # A runner may give a unit to two workers, and takes what is there first.
            unfinished = f".{name}.{uuid.uuid4().hex}.partial"
            table: pa.Table = record_arrow.columns_to_table(columns, spec, schema)
            entry = {**write_arrow_file(self.path, unfinished, schema, table), "file": name}
            (self.path / unfinished).rename(self.path / name)
        note = {
            "shard": entry,
            "longest_tokens": longest,
            "counts": counts,
            "quarantined": [asdict(line) for line in quarantined],
        }
        _write_whole(self._note(unit), json.dumps(note, sort_keys=True, ensure_ascii=False, allow_nan=False))

    def quarantined(self, units: Sequence[Unit]) -> list[dict[str, Any]]:
        """Lines of the clips of finished units that are not used."""
        lines: list[dict[str, Any]] = []
        for unit in units:
            # Not finished, or completed by another process in this moment.
            with contextlib.suppress(FileNotFoundError):
                lines += _read(self._note(unit))["quarantined"]
        return lines

    def check_bad_fraction(self, units: Sequence[Unit], max_bad_fraction: float) -> None:
        """Gives up when too many clips of finished units are not used.

        Raises:
            InputError: they are more than ``max_bad_fraction`` of all clips. What is known of them is in
                ``quarantine.jsonl`` then.
        """
        lines = self.quarantined(units)
        if len(lines) > max_bad_fraction * _num_clips(units):
            self._write_quarantine(lines)
            reasons = Counter(line["reason"] for line in lines)
            told = "; ".join(f"{reason} {count} ({REASONS[reason]})" for reason, count in sorted(reasons.items()))
            raise InputError(
                f"{self.path}: {len(lines)} of {_num_clips(units)} clips are quarantined, more than --max_bad_fraction="
                f"{max_bad_fraction:g}: {told}. {QUARANTINE_NAME} names them. What is finished stays; the same command "
                "with a larger fraction goes on"
            )

    def complete(
        self,
        units: Sequence[Unit],
        spec: DatasetSpec,
        max_bad_fraction: float,
        catalogue: Catalogue | None = None,
    ) -> dict[str, Any] | None:
        """Turns the folder into a data set, if every unit of every process is finished.

        Args:
            units: all of them.
            spec: what the records carry.
            max_bad_fraction: most clips that may be quarantined, as a share of all.
            catalogue: what the records' slates show; None where they have none.

        Returns:
            Counts of the whole extraction; None if other processes are not finished yet.

        Raises:
            InputError: more clips are quarantined than ``max_bad_fraction`` of all, or a split has none left. The lines
                of all of them are in ``quarantine.jsonl``.
        """
        try:
            notes = [_read(self._note(unit)) for unit in units]
        except FileNotFoundError:
            # Another process was the last, or is not finished.
            self.is_finished = (self.path / MANIFEST_NAME).is_file()
            return self.summary() if self.is_finished else None
        self.check_bad_fraction(units, max_bad_fraction)
        quarantined = [line for note in notes for line in note["quarantined"]]
        self._write_quarantine(quarantined)
        reasons = Counter(line["reason"] for line in quarantined)
        splits: dict[str, dict[str, Any]] = {}
        counts: Counter[str] = Counter()
        for unit, note in zip(units, notes, strict=True):
            split = splits.setdefault(
                unit.split,
                {
                    "num_records": 0,
                    "shards": [],
                    "longest_tokens": dict.fromkeys(sorted(spec.modalities), 0),
                    "reference": {},
                },
            )
            counts.update(note["counts"])
            for name, longest in note["longest_tokens"].items():
                split["longest_tokens"][name] = max(split["longest_tokens"][name], longest)
            if note["shard"] is not None:
                split["num_records"] += note["shard"]["num_records"]
                split["shards"].append(note["shard"])
        empty = sorted(name for name, split in splits.items() if not split["shards"])
        if empty:
            raise InputError(f"{self.path}: every clip of split {empty[0]!r} is quarantined ({QUARANTINE_NAME})")
        totals = {
            "clips": _num_clips(units),
            "quarantined": dict(sorted(reasons.items())),
            **dict(sorted(counts.items())),
        }
        # Of workers that were killed.
        for left in [*self.path.glob(".*.arrow.*.partial"), *self.path.glob(f".{EXTRACTION_NAME}.*.partial")]:
            left.unlink(missing_ok=True)
        entry = None if catalogue is None else self._write_catalogue(catalogue)
        write_manifest(self.path, spec, splits, entry, {"extraction": totals})
        self.is_finished = True
        shutil.rmtree(self._notes, ignore_errors=True)
        return totals

    def summary(self) -> dict[str, Any]:
        """Counts of a finished extraction."""
        return read_summary(self.path) or {}

    def _write_quarantine(self, quarantined: Sequence[dict[str, Any]]) -> None:
        lines = (json.dumps(line, sort_keys=True, ensure_ascii=False) + "\n" for line in quarantined)
        _write_whole(self.path / QUARANTINE_NAME, "".join(lines))

    def _write_catalogue(self, catalogue: Catalogue) -> dict[str, Any]:
        """Gives its entry in the manifest; another process may write the same beside this one."""
        # Not named as what killed workers left, which the other process takes away.
        unfinished = f".catalogue.{uuid.uuid4().hex}.partial"
        entry = write_catalogue_file(self.path, unfinished, catalogue)
        (self.path / unfinished).rename(self.path / CATALOGUE_NAME)
        return {**entry, "file": CATALOGUE_NAME}

    def _note(self, unit: Unit) -> Path:
        return self._notes / f"{unit.name}.json"


def read_summary(path: Path) -> dict[str, Any] | None:
    """Counts of the extraction in a folder; None where none is finished."""
    manifest = path / MANIFEST_NAME
    if not manifest.is_file():
        return None
    counts: dict[str, Any] = _read(manifest)["counts"]["extraction"]
    return counts


def _num_clips(units: Sequence[Unit]) -> int:
    return sum(len(unit.clips) for unit in units)


def _is_free(path: Path) -> bool:
    """Whether an extraction can begin there: there is nothing, or what another process that begins it writes first."""
    if not path.is_dir():
        return not path.exists()
    return all(entry.name.startswith(f".{EXTRACTION_NAME}.") for entry in path.iterdir())


def _parse(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(f"{path}: not a description of an extraction: {error}") from error


def _write_whole(path: Path, text: str) -> None:
    """The file is there as a whole or not at all, whoever writes it beside this process."""
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.rename(path)


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _first_difference(found: Any, wanted: Any, key: str = "") -> str:
    """The key of the first value that differs, and both values."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for name in sorted({*found, *wanted}):
            if found.get(name) != wanted.get(name):
                return _first_difference(found.get(name), wanted.get(name), f"{key}.{name}" if key else name)
    return f"{key} ({found!r} there, {wanted!r} now)"
