"""Examines the media files that a list names: whether they are there, open, and are who else's."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from av.container.input import InputContainer

from mmei_jax.extraction.doctor_findings import Examination, Finding, find_repeats, histogram
from mmei_jax.extraction.utterance_lists import Utterance

# A container that stops before its own announced end by more than this is cut off.
_TOLERANCE_SECONDS = 1.0


@dataclass(frozen=True)
class MediaFile:
    """What a media file is, without decoding more than one frame of each stream.

    Attributes:
        fault: None, "missing", or why it cannot be used.
        seconds: where its last packet ends; None where it does not open.
        has_video, has_audio: whether it has such a stream.
    """

    fault: str | None = None
    seconds: float | None = None
    has_video: bool = False
    has_audio: bool = False


def probe(path: Path) -> MediaFile:
    """Opens a file, decodes the first frame of each stream, and reads every packet to the end.

    A packet in the middle that is there but does not decode is not noticed; extraction notices.
    """
    if not path.is_file():
        return MediaFile("missing")
    try:
        with av.open(str(path)) as container:
            return _read_through(container)
    except (av.FFmpegError, OSError, ValueError) as error:
        return MediaFile(" ".join(str(error).split()) or type(error).__name__)


def _read_through(container: InputContainer) -> MediaFile:
    streams = [*container.streams.video[:1], *container.streams.audio[:1]]
    if not streams:
        return MediaFile("neither a video nor an audio stream")
    waiting = {stream.index for stream in streams}
    end = 0.0
    for packet in container.demux(streams):
        # The last packet of a stream is empty: it flushes the decoder.
        if packet.stream.index in waiting and packet.decode():
            waiting.remove(packet.stream.index)
        if packet.pts is not None and packet.time_base is not None:
            end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
    if waiting:
        return MediaFile("a stream has no frame that decodes")
    announced = None if container.duration is None else container.duration / 1_000_000
    if announced is not None and end < announced - _TOLERANCE_SECONDS:
        return MediaFile(f"ends at {end:.2f} s, announces {announced:.2f} s", end)
    return MediaFile(None, end, bool(container.streams.video), bool(container.streams.audio))


def examine_media(
    groups: Mapping[str, Sequence[Utterance]], examination: Examination, max_seconds: float
) -> dict[str, str]:
    """Adds what the files say to an examination.

    Args:
        groups: utterances by split; those without a path are passed over.
        examination: takes findings and histograms.
        max_seconds: a longer file is a finding, unless the clip is cut out of it.

    Returns:
        By clip id, why its file cannot be used; missing files aside.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        paths = list(dict.fromkeys(path for found in groups.values() for item in found for path in _paths(item)))
        files = dict(zip(paths, pool.map(probe, map(Path, paths)), strict=True))
    faults = {}
    for split, found in groups.items():
        ids: dict[str, list[str]] = defaultdict(list)
        for item in found:
            for check in _faults(item, files, max_seconds):
                ids[check].append(item.clip.id)
            for path in _paths(item):
                fault = files[path].fault
                if fault not in (None, "missing"):
                    faults[item.clip.id] = str(fault)
        examination.findings += [Finding(check, split, len(names), tuple(names)) for check, names in ids.items()]
        seconds = [files[item.clip.path].seconds for item in found if item.clip.path is not None]
        known = [value for value in seconds if value is not None]
        if known:
            examination.histograms.setdefault("media seconds", {})[split] = histogram(np.array(known))
    examination.findings += _identical(groups, files)
    return faults


def _paths(utterance: Utterance) -> list[str]:
    return [path for path in (utterance.clip.path, utterance.clip.audio_path) if path is not None]


def _faults(utterance: Utterance, files: Mapping[str, MediaFile], max_seconds: float) -> list[str]:
    clip = utterance.clip
    found = [files[path] for path in _paths(utterance)]
    if any(file.fault for file in found):
        return ["missing_media" if any(file.fault == "missing" for file in found) else "corrupt_media"]
    checks = []
    is_whole = clip.start_seconds is None and clip.end_seconds is None
    if is_whole and any(file.seconds is not None and file.seconds > max_seconds for file in found):
        checks.append("long_media")
    if found and "vision" not in clip.optional and not any(file.has_video for file in found):
        checks.append("no_video")
    if found and "audio" not in clip.optional and not any(file.has_audio for file in found):
        checks.append("no_audio")
    return checks


def _identical(groups: Mapping[str, Sequence[Utterance]], files: Mapping[str, MediaFile]) -> list[Finding]:
    """Clips that are whole files with the same bytes. Only files of the same size are read."""
    by_size: dict[int, list[str]] = defaultdict(list)
    for path, file in files.items():
        if file.fault != "missing":
            by_size[Path(path).stat().st_size].append(path)
    digests = {path: _digest(path) for same in by_size.values() if len(same) > 1 for path in same}
    keys = {
        split: [
            (item.clip.id, digests[item.clip.path])
            for item in found
            if item.clip.path in digests and item.clip.start_seconds is None and item.clip.end_seconds is None
        ]
        for split, found in groups.items()
    }
    return find_repeats(keys, "identical_media_within", "identical_media_across")


def _digest(path: str) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
