"""The part of extraction that workers do: from a clip to pixels, samples and words of the encoders' sizes.

NumPy only: a worker never touches a device. Clips leave in the order of the list, whatever decodes them.
"""

import contextlib
import functools
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import grain
import numpy as np
from jaxtyping import Bool, Float32, UInt8

from mmei_jax.command import mark_flags_parsed
from mmei_jax.encoders.preprocessing import ImagePreprocessing
from mmei_jax.extraction import faces
from mmei_jax.extraction.clip_lists import media_path
from mmei_jax.extraction.clips import Clip
from mmei_jax.extraction.media import MediaError, Span, decode_audio, decode_frames

WorkerKind = Literal["threads", "processes"]
# Reasons that say that a clip lacks a modality, not that it is damaged: no failure where the modality may be missing.
_LACKING = ("no_video", "no_audio", "no_text", "no_face", "too_short")
# Clips that both kinds of workers decode before one is chosen, and the fewest for which that pays.
_NUM_TRIAL_CLIPS = 24
_FEWEST_CLIPS_FOR_TRIAL = 400


@dataclass(frozen=True)
class VisionSettings:
    """How frames are taken; as :class:`mmei_jax.extraction.extraction_config.VisionExtraction` says."""

    frames_per_second: float
    max_frames: int
    faces: faces.Method
    face_margin: float
    preprocessing: ImagePreprocessing


@dataclass(frozen=True)
class AudioSettings:
    """How sound is taken: its rate, and the fewest samples that give a frame."""

    sample_rate_hz: int
    fewest_samples: int


@dataclass(frozen=True)
class DecodeSettings:
    """What is decoded of every clip. None: this modality is not wanted.

    Attributes:
        base: folder that paths are relative to.
        root: folder that paths must not lead out of; None: no limit.
        optional: modalities that any clip may lack.
    """

    base: Path
    root: Path | None
    optional: tuple[str, ...]
    max_clip_seconds: float
    vision: VisionSettings | None
    audio: AudioSettings | None
    has_text: bool


@dataclass(frozen=True)
class Frames:
    """Sampled frames.

    Attributes:
        pixels: ``[frames, height, width, 3]`` uint8, as resized for the encoder; zeros where there is no face.
        times_seconds: ``[frames]`` float32, from the clip's start.
        has_face: ``[frames]`` bool; all True where whole frames are taken.
    """

    pixels: UInt8[np.ndarray, "frames height width 3"]
    times_seconds: Float32[np.ndarray, "frames"]
    has_face: Bool[np.ndarray, "frames"]


@dataclass(frozen=True)
class DecodedClip:
    """A clip's media, or why it is not used; a modality that the clip lacks is None.

    Attributes:
        samples: ``[samples]`` float32 in [-1, 1], not yet normalised.
    """

    frames: Frames | None = None
    samples: Float32[np.ndarray, "samples"] | None = None
    text: str | None = None
    failure: MediaError | None = None


def decode_clip(clip: Clip, settings: DecodeSettings) -> DecodedClip:
    """Decodes what is wanted of a clip.

    Raises:
        InputError: the clip's file of face boxes is not one, or the detector is not installed. Media that cannot be
            used raise nothing: they are in the result's ``failure``.
    """
    span = Span(clip.start_seconds or 0.0, clip.end_seconds, settings.max_clip_seconds)
    optional = {*settings.optional, *clip.optional}
    try:
        frames = samples = text = None
        if settings.has_text:
            with _may_lack("text" in optional):
                text = _text(clip)
        if settings.audio is not None:
            with _may_lack("audio" in optional):
                samples = _samples(clip, span, settings, settings.audio)
        if settings.vision is not None:
            with _may_lack("vision" in optional):
                frames = _frames(clip, span, settings, settings.vision)
        if frames is None and samples is None and text is None:
            return DecodedClip(failure=MediaError("list", "empty", "every modality is missing"))
    except MediaError as error:
        return DecodedClip(failure=error)
    except OSError as error:
        # A name that is too long, a folder that may not be read, a disk that fails.
        return DecodedClip(failure=MediaError("open", "unreadable", " ".join(str(error).split())))
    return DecodedClip(frames, samples, text)


@contextlib.contextmanager
def _may_lack(is_optional: bool) -> Iterator[None]:
    """Lets a modality be missing where that is allowed; a damaged one stays a failure."""
    try:
        yield
    except MediaError as error:
        if not (is_optional and error.reason in _LACKING):
            raise


def _text(clip: Clip) -> str:
    if clip.text is None or not clip.text.strip():
        raise MediaError("text", "no_text", "the transcript is empty")
    return clip.text


def _samples(clip: Clip, span: Span, settings: DecodeSettings, audio: AudioSettings) -> np.ndarray:
    given = clip.audio_path or clip.path
    if given is None:
        raise MediaError("audio", "no_audio", "the list names no file")
    path = media_path(given, settings.base, settings.root)
    samples = decode_audio(path, span, audio.sample_rate_hz)
    if len(samples) < audio.fewest_samples:
        found = f"{len(samples)} samples at {audio.sample_rate_hz} Hz: expected at least {audio.fewest_samples}"
        raise MediaError("audio", "too_short", f"{path}: {found}")
    if not np.isfinite(samples).all():
        raise MediaError("audio", "unreadable", f"{path}: samples that are not finite")
    return samples


def _frames(clip: Clip, span: Span, settings: DecodeSettings, vision: VisionSettings) -> Frames:
    if clip.path is None:
        raise MediaError("video", "no_video", "the list names no file")
    path = media_path(clip.path, settings.base, settings.root)
    boxes = None if clip.boxes_path is None else media_path(clip.boxes_path, settings.base, settings.root)
    finder = faces.make_finder(vision.faces, boxes)
    tracker = faces.Tracker()
    preprocessing = vision.preprocessing
    nothing = np.zeros((preprocessing.height, preprocessing.width, 3), np.uint8)
    pixels, times, has_face = [], [], []
    # One frame at a time: sixteen frames of 1080p are 100 MB, and clips are decoded side by side.
    for time_seconds, frame in decode_frames(path, span, vision.frames_per_second, vision.max_frames):
        part: np.ndarray | None = frame
        if finder is not None:
            box = tracker.follow(finder.find(time_seconds, frame))
            part = None if box is None else faces.crop(frame, box, vision.face_margin)
        pixels.append(nothing if part is None else preprocessing.resize(part))
        times.append(time_seconds)
        has_face.append(part is not None)
    if not any(has_face):
        raise MediaError("face", "no_face", f"{path}: in none of {len(has_face)} frames")
    return Frames(np.stack(pixels), np.array(times, np.float32), np.array(has_face))


def decode_clips(
    clips: Sequence[Clip], settings: DecodeSettings, num_workers: int, kind: WorkerKind
) -> Iterator[DecodedClip]:
    """Decodes clips in workers that run ahead; gives them in order.

    Args:
        clips: which.
        settings: what of them.
        num_workers: threads or processes, at least 1.
        kind: which of the two.

    Raises:
        InputError: as :func:`decode_clip`.
    """
    dataset = grain.MapDataset.source(list(clips)).map(functools.partial(decode_clip, settings=settings))
    if kind == "threads":
        options = grain.ReadOptions(num_threads=num_workers, prefetch_buffer_size=2 * num_workers)
        yield from dataset.to_iter_dataset(options)
        return
    # Grain's processes read flags.
    mark_flags_parsed()
    one_by_one = dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1))
    yield from one_by_one.mp_prefetch(grain.MultiprocessingOptions(num_workers, per_worker_buffer_size=2))


def choose_workers(clips: Sequence[Clip], settings: DecodeSettings, num_workers: int | None) -> tuple[int, WorkerKind]:
    """How many workers, and of which kind: the one that decodes the first clips faster.

    Args:
        clips: what is to be decoded.
        settings: what of them.
        num_workers: as many, in threads; None: one per processor, and of the faster kind.

    Returns:
        Number and kind. Short lists are decoded in threads, without a trial.
    """
    if num_workers is not None:
        return num_workers, "threads"
    num_workers = len(os.sched_getaffinity(0))
    if len(clips) < _FEWEST_CLIPS_FOR_TRIAL:
        return num_workers, "threads"
    seconds = {kind: _trial_seconds(clips[:_NUM_TRIAL_CLIPS], settings, num_workers, kind) for kind in WORKER_KINDS}
    return num_workers, min(WORKER_KINDS, key=seconds.__getitem__)


WORKER_KINDS: tuple[WorkerKind, ...] = ("threads", "processes")


def _trial_seconds(clips: Sequence[Clip], settings: DecodeSettings, num_workers: int, kind: WorkerKind) -> float:
    """Seconds for all clips but the first of each worker, which waits for the worker's start."""
    decoded = decode_clips(clips, settings, num_workers, kind)
    for _ in range(num_workers):
        next(decoded, None)
    start = time.perf_counter()
    for _ in decoded:
        pass
    return time.perf_counter() - start
