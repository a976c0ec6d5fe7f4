"""The peers' decoding: PyAV as its documentation shows it. What the header of a file says is believed."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import av
import numpy as np

from benchmarks import rounds
from benchmarks.extraction import decoding_side
from benchmarks.extraction_cases import FRAMES_PER_SECOND, MAX_FRAMES, Case

SAMPLE_RATE_HZ = 16_000


@dataclass(frozen=True)
class Media:
    """Frames ``[height, width, 3]`` uint8 and samples ``[samples]`` float32 of a file; None where it has none."""

    frames: list[np.ndarray] | None
    samples: np.ndarray | None


def decode(path: str) -> Media:
    """One pass through a file: the frames that are shown at evenly spaced times, and the sound."""
    frames: list[np.ndarray] = []
    blocks: list[np.ndarray] = []
    times: np.ndarray = np.zeros(0)
    interval = 0.0
    num_samples: int | None = None
    with av.open(path) as container:
        # PyAV's annotations leave much open that these files fill in.
        video: Any = container.streams.video[0] if container.streams.video else None
        audio: Any = container.streams.audio[0] if container.streams.audio else None
        if video is not None:
            video.thread_count = 1
            seconds = float(video.duration * video.time_base)
            num_frames = min(MAX_FRAMES, max(1, round(seconds * FRAMES_PER_SECOND)))
            times = (np.arange(num_frames) + 0.5) * (seconds / num_frames)
            interval = 1 / float(video.average_rate)
        if audio is not None:
            resampler = av.AudioResampler(format="fltp", layout="mono", rate=SAMPLE_RATE_HZ)
            if audio.duration is not None:
                num_samples = round(float(audio.duration * audio.time_base) * SAMPLE_RATE_HZ)
        frame: Any
        for packet in container.demux([stream for stream in (video, audio) if stream is not None]):
            for frame in packet.decode():
                if isinstance(frame, av.AudioFrame):
                    blocks += [block.to_ndarray()[0] for block in resampler.resample(frame)]
                    continue
                pixels = None
                # Frames of these clips follow each other evenly.
                while len(frames) < len(times) and times[len(frames)] < frame.time + interval - 5e-7:
                    pixels = frame.to_ndarray(format="rgb24") if pixels is None else pixels
                    frames.append(pixels)
        if audio is not None:
            blocks += [block.to_ndarray()[0] for block in resampler.resample(None)]
    return Media(frames or None, np.concatenate(blocks)[:num_samples] if blocks else None)


def bare_loop(case: Case) -> rounds.Ready:
    """Nothing but PyAV's calls, on as many threads as ours."""
    paths = [str(case.clips / row["path"]) for row in case.rows() if row["path"]]

    def media() -> Iterator[tuple[Any, Any]]:
        with ThreadPoolExecutor(case.num_threads) as pool:
            for one in pool.map(decode, paths):
                yield None if one.frames is None else np.stack(one.frames), one.samples

    return decoding_side(media, {"threads": case.num_threads, **rounds.versions("av")})
