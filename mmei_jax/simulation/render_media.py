"""Writes frames and sound as mp4 (H.264, AAC) and wav: the same bytes for the same content on the same machine.

Every codec runs in one thread, and no file says when it was made.
"""

import io
import wave
from collections.abc import Iterable
from fractions import Fraction

import av
import numpy as np
from jaxtyping import Float, Int16, UInt8

# What the AAC encoder can write, in hertz.
SAMPLE_RATES_HZ = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
_AUDIO_BITS_PER_SECOND = 48_000
_VIDEO_OPTIONS = {"preset": "veryfast", "tune": "zerolatency", "crf": "23", "threads": "1"}


def to_int16(sound: Float[np.ndarray, "samples"]) -> Int16[np.ndarray, "samples"]:
    """Samples in [-1, 1] as 16-bit integers, rounded."""
    return np.round(np.clip(sound, -1.0, 1.0) * 32767.0).astype(np.int16)


def encode_wav(sound: Float[np.ndarray, "samples"], sample_rate_hz: int) -> bytes:
    """One channel of 16-bit PCM.

    Args:
        sound: in [-1, 1].
        sample_rate_hz: samples per second.
    """
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(sample_rate_hz)
        file.writeframes(to_int16(sound).astype("<i2").tobytes())
    return buffer.getvalue()


def encode_mp4(
    frames: Iterable[UInt8[np.ndarray, "height width channels"]],
    size: int,
    frames_per_second: int,
    sound: Float[np.ndarray, "samples"] | None = None,
    sample_rate_hz: int = 16_000,
) -> bytes:
    """A video, with sound or without.

    Args:
        frames: red, green and blue; each is encoded before the next one is asked for.
        size: height and width of every frame, even.
        frames_per_second: constant.
        sound: in [-1, 1], one channel; None for a file without an audio stream.
        sample_rate_hz: of the sound, one of :data:`SAMPLE_RATES_HZ`.
    """
    buffer = io.BytesIO()
    # The file notes durations in units of the timescale: a sample, for the sound to end with the last frame.
    options = {"fflags": "+bitexact", "movie_timescale": str(sample_rate_hz)}
    with av.open(buffer, "w", format="mp4", options=options) as container:
        video = container.add_stream("libx264", rate=frames_per_second, options=_VIDEO_OPTIONS)
        video.height = video.width = size
        video.pix_fmt = "yuv420p"
        video.thread_count = 1
        video.codec_context.flags |= av.codec.context.Flags.bitexact
        audio = None
        if sound is not None:
            audio = container.add_stream("aac", rate=sample_rate_hz, layout="mono")
            audio.bit_rate = _AUDIO_BITS_PER_SECOND
            audio.codec_context.flags |= av.codec.context.Flags.bitexact
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, frames_per_second)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        if audio is not None and sound is not None:
            samples = av.AudioFrame.from_ndarray(sound[None, :], format="fltp", layout="mono")
            samples.sample_rate, samples.pts, samples.time_base = sample_rate_hz, 0, Fraction(1, sample_rate_hz)
            container.mux(audio.encode(samples))
            container.mux(audio.encode(None))
    return buffer.getvalue()
