"""Media whose contents are known: each frame shows its number, sound is a tone, in files that FFmpeg itself writes."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

SIZE = 64
# Grey levels from one frame to the next: far enough apart for a lossy codec.
LEVELS_PER_FRAME = 6


def frame(number: int, height: int = SIZE, width: int = SIZE) -> np.ndarray:
    """``[height, width, 3]`` uint8: grey, the lighter the later; a white corner at the upper left."""
    pixels = np.full((height, width, 3), min(LEVELS_PER_FRAME * number, 240), np.uint8)
    pixels[: height // 4, : width // 4] = 255
    return pixels


def number_of(pixels: np.ndarray) -> int:
    """The number that a decoded frame shows."""
    height, width = pixels.shape[:2]
    return round(float(pixels[height // 2 :, width // 2 :].mean()) / LEVELS_PER_FRAME)


def tone(seconds: float, rate: int, frequency_hz: float = 440.0) -> np.ndarray:
    """``[samples]`` float32."""
    times = np.arange(round(seconds * rate)) / rate
    return (0.5 * np.sin(2 * np.pi * frequency_hz * times)).astype(np.float32)


def write_video(
    path: Path,
    *,
    times_ms: Sequence[int] | None = None,
    num_frames: int = 20,
    frames_per_second: int = 10,
    samples: np.ndarray | None = None,
    rate: int = 16_000,
    layout: str = "mono",
    size: tuple[int, int] = (SIZE, SIZE),
    options: dict[str, str] | None = None,
) -> Path:
    """Writes a video of numbered frames, with sound where samples ``[channels, samples]`` are given.

    Args:
        path: .mp4 or .mkv.
        times_ms: when each frame is shown; evenly by default.
        num_frames, frames_per_second: of an even one.
        samples, rate, layout: of the sound.
        size: height and width in pixels.
        options: of the container.
    """
    if times_ms is None:
        times_ms = [round(1000 * number / frames_per_second) for number in range(num_frames)]
    with av.open(str(path), "w", options=options or {}) as container:
        video = container.add_stream("libx264", rate=frames_per_second, options={"crf": "10", "threads": "1"})
        video.height, video.width, video.pix_fmt = *size, "yuv420p"
        video.codec_context.time_base = Fraction(1, 1000)
        audio = None if samples is None else container.add_stream("aac", rate=rate, layout=layout)
        for number, time_ms in enumerate(times_ms):
            picture = av.VideoFrame.from_ndarray(frame(number, *size), format="rgb24")
            picture.pts, picture.time_base = time_ms, Fraction(1, 1000)
            container.mux(video.encode(picture))
        container.mux(video.encode())
        if audio is not None and samples is not None:
            planar = np.ascontiguousarray(np.atleast_2d(samples), np.float32)
            sound = av.AudioFrame.from_ndarray(planar, format="fltp", layout=layout)
            sound.sample_rate, sound.pts, sound.time_base = rate, 0, Fraction(1, rate)
            container.mux(audio.encode(sound))
            container.mux(audio.encode())
    return path


def rotate(path: Path) -> Path:
    """Makes the file say that its frames are to be turned by a quarter, as phones do."""
    content = bytearray(path.read_bytes())
    start = content.index(b"tkhd") + 4 + 4 + 4 + 4 + 4 + 4 + 4 + 8 + 2 + 2 + 2 + 2
    matrix = (0, 1 << 16, 0, -(1 << 16), 0, 0, SIZE << 16, 0, 1 << 30)
    content[start : start + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in matrix)
    path.write_bytes(content)
    return path
