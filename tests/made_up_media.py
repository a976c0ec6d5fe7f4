"""Small media files for tests: video, sound, or both, each with its own content."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

RATE_HZ = 16_000
FRAMES_PER_SECOND = 10


def write_media(
    path: Path,
    *,
    seed: int = 0,
    seconds: float = 0.6,
    has_video: bool = True,
    has_sound: bool = True,
    is_index_first: bool = False,
    num_frames: int | None = None,
) -> Path:
    """An mp4 of ``seconds`` whose pixels and samples depend on ``seed``; gives its path.

    With the index first, a file that is cut off still opens.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    with av.open(str(path), "w", options={"movflags": "faststart"} if is_index_first else {}) as container:
        streams = []
        if has_video:
            video = container.add_stream("mpeg4", rate=FRAMES_PER_SECOND)
            video.width, video.height, video.pix_fmt = 32, 32, "yuv420p"
            size = round(seconds * FRAMES_PER_SECOND) if num_frames is None else num_frames
            pictures = generator.integers(0, 256, (size, 32, 32, 3), dtype=np.uint8)
            streams.append((video, [av.VideoFrame.from_ndarray(picture, "rgb24") for picture in pictures]))
        if has_sound:
            sound = container.add_stream("aac", rate=RATE_HZ, layout="mono")
            samples = generator.normal(size=(1, round(seconds * RATE_HZ))).astype(np.float32) * 0.1
            frame = av.AudioFrame.from_ndarray(samples, "fltp", "mono")
            frame.sample_rate, frame.pts, frame.time_base = RATE_HZ, 0, Fraction(1, RATE_HZ)
            streams.append((sound, [frame]))
        for stream, frames in streams:
            for frame in [*frames, None]:
                container.mux(stream.encode(frame))
    return path
