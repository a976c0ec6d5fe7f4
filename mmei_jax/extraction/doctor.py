r"""Examines a data set before anyone trains on it: counts, labels, duplicates, leaks between splits, media, features.

Command, for instance::

    python -m mmei_jax.extraction.doctor MELD --published=data/meld --media=MELD.Raw --json=report.json

Exit code 0: nothing was found that is not known; 1: something was; 2: the input cannot be read.
"""

import argparse
import csv
import json
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmei_jax.command import CommandParser, report_errors
from mmei_jax.extraction import utterance_lists
from mmei_jax.extraction.doctor_findings import CHECKS, Examination, describe, judge, list_not_found
from mmei_jax.extraction.doctor_lists import examine_list, group_by_split
from mmei_jax.extraction.doctor_media import examine_media
from mmei_jax.extraction.doctor_shards import examine_shards
from mmei_jax.extraction.published_facts import FILE_NAME, PublishedFacts, read_published
from mmei_jax.extraction.utterance_lists import Utterance
from mmei_jax.record_files import MANIFEST_NAME
from mmei_jax.types import InputError

EXIT_FINDINGS = 1
SHARDS = "shards"
# Where the project's tables are, seen from its folder.
_TABLES = {"meld": "meld", "mintrec": "mintrec", "mosei": "cmu_mosei"}
_ACCEPTED = (
    "a folder with MELD's three CSVs, MIntRec's TSVs or manifest.json (feature shards), MMSA's label.csv, "
    "or a list of clips (.csv, .tsv or .parquet with some of the columns path, audio_path and text)"
)


def examine(
    path: Path,
    facts: PublishedFacts | None = None,
    media_folder: Path | None = None,
    max_seconds: float = 60.0,
    accepted: Collection[str] = (),
) -> Examination:
    """Examines a data set.

    Args:
        path: a folder or list, see the command's help.
        facts: published figures and known findings to compare with.
        media_folder: where media are: MELD.Raw, MMSA's Raw, or the folder that a list's paths are relative to. None: no
            media are opened.
        max_seconds: a longer clip is a finding.
        accepted: checks of which every finding counts as known.

    Raises:
        InputError: ``path`` is none of the accepted inputs or cannot be read, or the facts are of another format.
    """
    found = detect_format(path)
    if facts is not None and found in _TABLES and facts.format != found:
        raise InputError(f"{facts.path}: is of format {facts.format}, {path} is of format {found}")
    examination = Examination(str(path), found, None if facts is None else str(facts.path))
    if found == SHARDS:
        examine_shards(path, facts, examination)
        examination.not_checked.append("media and texts: shards hold features")
    else:
        utterances = _READERS[found](path, media_folder)
        examine_list(utterances, facts, examination, max_seconds)
        if media_folder is None:
            examination.not_checked.append("media: --media says where they are")
        else:
            faults = examine_media(group_by_split(utterances, facts), examination, max_seconds)
            examination.not_checked += [f"what is in {name}: {fault}" for name, fault in sorted(faults.items())]
    examination.not_found = list_not_found(examination.findings, facts)
    examination.findings = judge(examination.findings, facts, accepted)
    return examination


def detect_format(path: Path) -> str:
    """How a folder or list is read: meld, mintrec, mosei, clips or shards.

    Raises:
        InputError: it is none of these; says what is accepted.
    """
    if path.is_dir():
        for name, format_name in ((MANIFEST_NAME, SHARDS), ("train_sent_emo.csv", "meld"), ("train.tsv", "mintrec")):
            if (path / name).is_file():
                return format_name
    elif path.is_file() and path.suffix == ".parquet":
        return "clips"
    elif path.is_file() and path.suffix in (".csv", ".tsv"):
        try:
            with path.open(newline="", encoding="utf-8-sig") as stream:
                columns = set(next(csv.reader(stream, delimiter="\t" if path.suffix == ".tsv" else ","), []))
        except (UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"{path}: not a UTF-8 table: {error}") from error
        if {"video_id", "clip_id", "mode"} <= columns:
            return "mosei"
        if {"path", "audio_path", "text"} & columns:
            return "clips"
    raise InputError(f"{path}: expected {_ACCEPTED}")


def _read_clips(path: Path, media_folder: Path | None) -> list[Utterance]:
    return utterance_lists.read_clip_list(path, media_folder)


_READERS: Mapping[str, Callable[[Path, Path | None], list[Utterance]]] = {
    "meld": utterance_lists.read_meld,
    "mintrec": lambda path, _: utterance_lists.read_mintrec(path),
    "mosei": utterance_lists.read_mosei,
    "clips": _read_clips,
}


def _find_table(path: Path, given: Path | None) -> PublishedFacts | None:
    """The published figures that were named, or those of the project where it is the current folder."""
    if given is not None:
        return read_published(given)
    format_name = detect_format(path)
    table = Path("data", _TABLES.get(format_name, format_name), FILE_NAME)
    return read_published(table) if format_name in _TABLES and table.is_file() else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Examines a data set; gives the exit status: 0, 1 for findings that are not known, 2 after one line."""
    parser = CommandParser(
        prog="python -m mmei_jax.extraction.doctor",
        description=f"Examine a data set: {_ACCEPTED}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="checks:\n" + "\n".join(f"  {name}: {meaning}" for name, meaning in CHECKS.items()),
    )
    parser.add_argument("input", type=Path, help="folder or list")
    parser.add_argument("--published", type=Path, help=f"{FILE_NAME} with counts and known findings, or its folder")
    parser.add_argument("--media", type=Path, metavar="FOLDER", help="open the media in it")
    parser.add_argument("--max_seconds", type=float, default=60.0, help="longer clips are told (default: %(default)s)")
    parser.add_argument(
        "--accept", default="", metavar="CHECK,...", help="checks whose findings are no reason for code 1"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything as JSON")
    flags = parser.parse_args(arguments)

    def run() -> int:
        if flags.media is not None and not flags.media.is_dir():
            raise InputError(f"{flags.media}: no such folder of media")
        accepted = [name for name in flags.accept.split(",") if name]
        unknown = sorted(set(accepted) - set(CHECKS))
        if unknown:
            raise InputError(f"--accept={flags.accept}: {unknown[0]!r} is no check; --help lists them")
        facts = _find_table(flags.input, flags.published)
        examination = examine(flags.input, facts, flags.media, flags.max_seconds, accepted)
        print(describe(examination))
        if flags.json is not None:
            _write_json(flags.json, examination.to_json())
        return EXIT_FINDINGS if examination.num_unexpected else 0

    return report_errors(run)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    text = json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
