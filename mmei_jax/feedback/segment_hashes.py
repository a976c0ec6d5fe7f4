"""The hashes of a round's log, in ``segments.json`` beside its segments: what was changed later teaches nothing.

Written when all segments are sealed, for a folder that nobody writes any more.
"""

from pathlib import Path

from mmei_jax.feedback.log import segments
from mmei_jax.fingerprints import check_hash, sha256_of
from mmei_jax.types import InputError
from mmei_jax.workdir import read_json, write_json

_NAME = "segments.json"


def write_hashes(folder: Path) -> None:
    """Notes the SHA-256 of every sealed segment.

    Args:
        folder: of the log.
    """
    write_json(folder / _NAME, {path.name: sha256_of(path) for path in segments(folder)})


def check_hashes(folder: Path) -> None:
    """Reads every segment and compares it with what :func:`write_hashes` noted.

    Args:
        folder: of the log.

    Raises:
        InputError: a segment was changed, is missing, or came later; names it.
    """
    path = folder / _NAME
    known = read_json(path, "the hashes of a round's segments")
    if not isinstance(known, dict):
        raise InputError(f"{path}: expected the hashes of a round's segments, by name")
    found = {segment.name for segment in segments(folder)}
    for name in sorted(known.keys() ^ found):
        wrong = "missing" if name in known else "not of this round"
        raise InputError(f"{folder / name}: {wrong}: expected the segments that {_NAME} lists")
    for name, sha256 in known.items():
        check_hash(folder / name, str(sha256), _NAME)
