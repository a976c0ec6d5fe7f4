"""Decodes media files: the frames that are shown at given times, and sound as one channel at one rate.

Time 0 of a file is where its container starts; frames and sound are placed by their own time stamps, so that they line
up. What cannot be used raises :class:`MediaError` with a reason out of :data:`REASONS`, never gives something else in
its place.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import soundfile
import soxr
from av.audio.frame import AudioFrame
from av.audio.resampler import AudioResampler
from av.audio.stream import AudioStream
from av.container.input import InputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from jaxtyping import Float32, Float64, UInt8

from mmei_jax.types import InputError

# Why a clip is not used, and what the word means; the quarantine counts by these.
REASONS = {
    "missing": "there is no such file",
    "outside_root": "the path leads out of the folder that the list is held to",
    "unreadable": "the file does not decode: damaged, truncated or of another kind",
    "no_video": "the file has no video stream",
    "no_audio": "the file has no audio stream",
    "no_text": "there is no transcript, or an empty one",
    "no_face": "no sampled frame shows a face",
    "empty": "there is nothing between the clip's start and end",
    "too_short": "the sound is shorter than the encoder's receptive field",
    "too_long": "the clip is longer than the limit",
    "ends_early": "the media stop before the clip's end or before their own announced end",
}
# Sound by these endings is read by libsndfile, everything else by FFmpeg.
_SOUND_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg")
# Less than this is missing at the end of many good files: streams of a file rarely end together.
_TOLERANCE_SECONDS = 0.5
# What a container says of a stream, and the stream's own packets, agree to that, and to a frame.
_ROUNDING_SECONDS = 0.05
# Time stamps that lie further from the end of the sound so far are a gap or an overlap, not rounding.
_GAP_SECONDS = 0.05
_BLOCK_SAMPLES = 1 << 18
# Parts that start later are sought, not decoded from the start of the file.
_SOUGHT_SECONDS = 1.0
# Decoders are given so much before the part: the first sound after a seek lacks what overlaps it.
_RUN_UP_SECONDS = 0.1
# Packets that were read to find a stream's end are kept to be decoded, up to so many bytes; more are read again.
_KEPT_BYTES = 1 << 24


class MediaError(InputError):
    """A clip that cannot be used.

    Attributes:
        stage: what was being done: list, open, video, audio, text or face.
        reason: a key of :data:`REASONS`.
        detail: what was found.
    """

    def __init__(self, stage: str, reason: str, detail: str) -> None:
        """Names the stage, the reason and what was found."""
        super().__init__(f"{stage}: {reason}: {detail}")
        self.stage, self.reason, self.detail = stage, reason, detail

    def __reduce__(self) -> tuple[type["MediaError"], tuple[str, str, str]]:
        """Crosses from a worker process as it is."""
        return MediaError, (self.stage, self.reason, self.detail)


@dataclass(frozen=True)
class Span:
    """Part of a file.

    Attributes:
        start_seconds: from the start of the container.
        end_seconds: None: to the end.
        max_seconds: a longer part is refused.
    """

    start_seconds: float = 0.0
    end_seconds: float | None = None
    max_seconds: float = 600.0

    def seconds(self, stage: str, path: Path, media_seconds: float) -> float:
        """Length of the part, in media of ``media_seconds`` (infinite where that is not known beforehand).

        Raises:
            MediaError: there is nothing in it, it is too long, or the media end before it does.
        """
        end = media_seconds if self.end_seconds is None else self.end_seconds
        seconds = end - self.start_seconds
        if seconds <= 0 or self.start_seconds >= media_seconds:
            found = f"from {self.start_seconds:g} to {end:g} s of {media_seconds:.2f} s"
            raise MediaError(stage, "empty", f"{path}: {found}")
        if seconds > self.max_seconds:
            raise MediaError(stage, "too_long", f"{path}: {seconds:.1f} s: expected at most {self.max_seconds:g}")
        if end > media_seconds + _TOLERANCE_SECONDS:
            raise MediaError(stage, "ends_early", f"{path}: ends at {media_seconds:.2f} s, the clip at {end:.2f} s")
        return min(seconds, media_seconds - self.start_seconds)


def sample_times(seconds: float, frames_per_second: float, max_frames: int) -> Float64[np.ndarray, "frames"]:
    """Times of the frames to take: the middles of equal parts of the clip, from its start.

    Args:
        seconds: length of the clip.
        frames_per_second: how densely, at most.
        max_frames: how many, at most: longer clips are sampled less densely.

    Returns:
        ``[frames]`` seconds, rising; at least one.

    Example:
        >>> sample_times(2.0, frames_per_second=2.0, max_frames=16)
        array([0.25, 0.75, 1.25, 1.75])
        >>> sample_times(100.0, frames_per_second=2.0, max_frames=2)
        array([25., 75.])
    """
    num_frames = min(max_frames, max(1, round(seconds * frames_per_second)))
    return (np.arange(num_frames) + 0.5) * (seconds / num_frames)


def decode_frames(
    path: Path, span: Span, frames_per_second: float, max_frames: int
) -> Iterator[tuple[float, UInt8[np.ndarray, "height width 3"]]]:
    """Decodes the frames that are shown at :func:`sample_times`, upright, whatever the file's own frame rate.

    Yields:
        Seconds from the clip's start, and the frame ``[height, width, 3]`` uint8 RGB.

    Raises:
        MediaError: the file does not decode, has no video, or not enough of it.
    """
    with _open(path, "video") as container:
        if not container.streams.video:
            raise MediaError("video", "no_video", str(path))
        stream = container.streams.video[0]
        _check_codec("video", path, stream)
        # Files are decoded side by side; threads within a file would only add waiting.
        stream.codec_context.thread_count = 1
        interval = 1.0 / float(stream.average_rate or 25)
        part = _find_part("video", path, span, container, stream, interval)
        times = sample_times(part.seconds, frames_per_second, max_frames)
        frames = _timed_frames(part.decode(container, stream), part.start, interval)
        yield from _shown_at(path, frames, times, interval)


def decode_audio(path: Path, span: Span, sample_rate_hz: int) -> Float32[np.ndarray, "samples"]:
    """Decodes sound: the mean of all channels, resampled (soxr, high quality).

    Args:
        path: a file with sound, or with video and sound.
        span: the part to decode.
        sample_rate_hz: of the result.

    Returns:
        ``[samples]`` float32 in [-1, 1] but for overshoot; sample 0 is at the clip's start. Where the sound starts
        after that, and where it has gaps, there are zeros.

    Raises:
        MediaError: the file does not decode, has no sound, or not enough of it.
    """
    read = _read_sound_file if path.suffix.lower() in _SOUND_SUFFIXES else _read_sound_of_container
    samples, rate = read(path, span)
    if not len(samples):
        raise MediaError("audio", "empty", f"{path}: no sample")
    resampled: np.ndarray = soxr.resample(samples, rate, sample_rate_hz)
    return resampled.astype(np.float32, copy=False)


@contextmanager
def _open(path: Path, stage: str) -> Iterator[InputContainer]:
    """The container; what FFmpeg finds wrong with it, at any time, becomes a MediaError."""
    if not path.is_file():
        raise MediaError(stage, "missing", str(path))
    try:
        with av.open(str(path)) as container:
            yield container
    except MediaError:
        raise
    except (av.FFmpegError, ValueError) as error:
        raise MediaError(stage, "unreadable", f"{path}: {' '.join(str(error).split())}") from error


def _check_codec(stage: str, path: Path, stream: VideoStream | AudioStream) -> None:
    """Raises MediaError for a stream of a kind that nothing here decodes, as in a file cut within its header."""
    if stream.codec_context is None:
        raise MediaError(stage, "unreadable", f"{path}: a stream of no known codec")


def _origin(container: InputContainer) -> float:
    return (container.start_time or 0) / av.time_base


@dataclass(frozen=True)
class _Part:
    """What is to be decoded of a stream.

    Attributes:
        start: its first second, by the container's clock.
        seconds: its length.
        packets: of the whole stream, the empty one at its end included; None: to be read.
    """

    start: float
    seconds: float
    packets: list[Any] | None

    def decode(self, container: InputContainer, stream: VideoStream | AudioStream) -> Iterator[Any]:
        """Frames in order, from a little before the part or from the start of the stream."""
        if self.packets is not None:
            return (frame for packet in self.packets for frame in packet.decode())
        if self.start > _SOUGHT_SECONDS:
            container.seek(int((self.start - _RUN_UP_SECONDS) * av.time_base))
        return container.decode(stream)


def _find_part(
    stage: str, path: Path, span: Span, container: InputContainer, stream: VideoStream | AudioStream, interval: float
) -> _Part:
    """The part of the stream; where it goes to the stream's end, the packets say where that is.

    What the container announces can be wrong in good files of variable rate; in damaged ones it is more than there is.
    """
    origin = _origin(container)
    start = origin + span.start_seconds
    if span.end_seconds is not None:
        return _Part(start, span.seconds(stage, path, np.inf), None)
    announced = None
    if stream.duration is not None and stream.time_base is not None:
        announced = float(((stream.start_time or 0) + stream.duration) * stream.time_base) - origin
    # A cheap way to refuse hours.
    span.seconds(stage, path, max(announced or 0.0, span.start_seconds + interval))
    first, last, kept = _read_packets(container, stream, can_keep=start <= _SOUGHT_SECONDS)
    if first is None or last is None or stream.time_base is None:
        raise MediaError(stage, "empty", f"{path}: no packet")
    if kept is None:
        # Not to time 0: sound begins with a packet before it, without which what follows decodes to something else.
        container.seek(first, stream=stream)
    found = max(float(last * stream.time_base) - origin, 0.0)
    if announced is not None and announced > found + 1.5 * interval + _ROUNDING_SECONDS:
        raise MediaError(stage, "ends_early", f"{path}: ends at {found:.2f} s, announced are {announced:.2f} s")
    if announced is not None and found - _TOLERANCE_SECONDS <= announced <= found:
        # Exact where a codec's last packet is filled up.
        found = announced
    return _Part(start, span.seconds(stage, path, max(found, interval)), kept)


def _read_packets(
    container: InputContainer, stream: VideoStream | AudioStream, *, can_keep: bool
) -> tuple[int | None, int | None, list[Any] | None]:
    """Where the stream's first packet starts and its last one ends, in its clock's ticks, and the packets, if kept."""
    first: int | None = None
    last: int | None = None
    kept: list[Any] = []
    num_bytes = 0
    for packet in container.demux(stream):
        if packet.pts is not None:
            end = packet.pts + (packet.duration or 0)
            last = end if last is None else max(last, end)
        if first is None:
            first = packet.pts if packet.dts is None else packet.dts
        num_bytes += packet.size
        can_keep = can_keep and num_bytes <= _KEPT_BYTES
        if can_keep:
            kept.append(packet)
        else:
            kept.clear()
    return first, last, kept if can_keep else None


def _timed_frames(decoded: Iterator[VideoFrame], start: float, interval: float) -> Iterator[tuple[float, VideoFrame]]:
    """Frames in order with their times in seconds after ``start``, which never fall."""
    time = -np.inf
    for frame in decoded:
        own = time + interval if frame.time is None else frame.time - start
        time = max(time, own if np.isfinite(own) else 0.0)
        yield time, frame


def _shown_at(
    path: Path, frames: Iterator[tuple[float, VideoFrame]], times: np.ndarray, interval: float
) -> Iterator[tuple[float, np.ndarray]]:
    """For each time the last frame that starts at or before it; the first frame for times before that one."""
    reformatter = VideoReformatter()
    shown: VideoFrame | None = None
    pixels: np.ndarray | None = None
    next_time, last_start = 0, 0.0
    for start, frame in frames:
        # Half a microsecond: time stamps are rounded to the container's clock.
        while shown is not None and next_time < len(times) and times[next_time] < start - 5e-7:
            pixels = _to_pixels(shown, reformatter) if pixels is None else pixels
            yield float(times[next_time]), pixels
            next_time += 1
        if next_time == len(times):
            return
        shown, pixels = frame, None
        interval, last_start = max(interval, start - last_start) if last_start > 0 else interval, start
    if shown is None:
        raise MediaError("video", "empty", f"{path}: no frame")
    if times[-1] > last_start + interval + _TOLERANCE_SECONDS:
        found = f"the last frame is at {last_start:.2f} s, one was wanted at {times[-1]:.2f} s"
        raise MediaError("video", "ends_early", f"{path}: {found}")
    pixels = _to_pixels(shown, reformatter)
    for time in times[next_time:]:
        yield float(time), pixels


def _to_pixels(frame: VideoFrame, reformatter: VideoReformatter) -> np.ndarray:
    """``[height, width, 3]`` uint8, turned as the file says."""
    pixels = reformatter.reformat(frame, format="rgb24").to_ndarray()
    # The container's rotation is counter-clockwise, as np.rot90's.
    return np.ascontiguousarray(np.rot90(pixels, frame.rotation // 90 % 4))


def _read_sound_file(path: Path, span: Span) -> tuple[np.ndarray, int]:
    if not path.is_file():
        raise MediaError("audio", "missing", str(path))
    try:
        with soundfile.SoundFile(path) as file:
            rate = int(file.samplerate)
            seconds = span.seconds("audio", path, file.frames / rate)
            file.seek(round(span.start_seconds * rate))
            left, blocks = round(seconds * rate), [np.zeros(0, np.float32)]
            while left > 0:
                block = file.read(min(left, _BLOCK_SAMPLES), dtype="float32", always_2d=True)
                if not len(block):
                    break
                blocks.append(block.mean(axis=1))
                left -= len(block)
    except soundfile.SoundFileError as error:
        raise MediaError("audio", "unreadable", f"{path}: {' '.join(str(error).split())}") from error
    if left > _TOLERANCE_SECONDS * rate:
        raise MediaError("audio", "ends_early", f"{path}: {left / rate:.2f} s before its end")
    return np.concatenate(blocks), rate


def _read_sound_of_container(path: Path, span: Span) -> tuple[np.ndarray, int]:
    with _open(path, "audio") as container:
        if not container.streams.audio:
            raise MediaError("audio", "no_audio", str(path))
        stream = container.streams.audio[0]
        _check_codec("audio", path, stream)
        rate = int(stream.rate)
        part = _find_part("audio", path, span, container, stream, 1.0 / rate)
        seconds = part.seconds
        samples = _placed(
            _sound_frames(part.decode(container, stream), stream), part.start, rate, round(seconds * rate)
        )
    missing_seconds = seconds - len(samples) / rate
    if missing_seconds > _TOLERANCE_SECONDS:
        raise MediaError("audio", "ends_early", f"{path}: {missing_seconds:.2f} s before its end")
    return samples, rate


def _sound_frames(decoded: Iterator[AudioFrame], stream: AudioStream) -> Iterator[tuple[float | None, np.ndarray]]:
    """Times in seconds and the mean of all channels, frame by frame."""
    to_planar = AudioResampler(format="fltp", layout=stream.layout.name, rate=stream.rate)
    for frame in itertools.chain(decoded, [None]):
        for own in to_planar.resample(frame):
            channels = own.to_ndarray()
            yield own.time, channels[0] if len(channels) == 1 else channels.mean(axis=0)


def _placed(frames: Iterator[tuple[float | None, np.ndarray]], start: float, rate: int, length: int) -> np.ndarray:
    """At most ``length`` samples from ``start`` seconds on; gaps hold zeros."""
    placed: list[np.ndarray] = [np.zeros(0, np.float32)]
    end = 0
    is_first = True
    for time, samples in frames:
        position = end if time is None else round((time - start) * rate)
        if is_first or abs(position - end) > _GAP_SECONDS * rate:
            if position > end:
                silence = min(position, length) - end
                placed.append(np.zeros(max(silence, 0), np.float32))
                end += max(silence, 0)
            samples = samples[max(end - position, 0) :]
            is_first = is_first and not len(samples)
        samples = samples[: length - end]
        placed.append(samples.astype(np.float32, copy=False))
        end += len(samples)
        if end >= length:
            break
    return np.concatenate(placed)
