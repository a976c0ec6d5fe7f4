"""Workers give clips in order, whatever they are, and the faster kind is chosen."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from mmei_jax.encoders.preprocessing import ImagePreprocessing
from mmei_jax.extraction import decoding
from mmei_jax.extraction.clips import Clip
from mmei_jax.extraction.decoding import AudioSettings, DecodeSettings, VisionSettings, choose_workers, decode_clips
from mmei_jax.types import InputError
from tests import made_media

RATE = 16_000
IMAGE = ImagePreprocessing(16, 16, 2, 1 / 255, (0.5,) * 3, (0.5,) * 3)


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoding")
    for index in range(4):
        tone = made_media.tone(0.5 + 0.1 * index, RATE)
        made_media.write_video(folder / f"{index}.mp4", num_frames=5 + index, samples=tone, rate=RATE)
    vision = VisionSettings(5.0, 16, "none", 0.0, IMAGE)
    return DecodeSettings(folder, None, (), 10.0, vision, AudioSettings(RATE, 400), has_text=True)


def clips(number):
    paths = [f"{index % 4}.mp4" if index % 5 else "none.mp4" for index in range(number)]
    return [Clip(str(index), "all", path=path, text=f"text {index}") for index, path in enumerate(paths)]


def as_plain(decoded):
    return [
        (clip.text, None if clip.failure is None else str(clip.failure))
        if clip.frames is None
        else (clip.text, clip.frames.pixels.tobytes(), clip.samples.tobytes())
        for clip in decoded
    ]


def test_threads_and_processes_give_the_same_clips_in_order(settings):
    given = clips(9)
    alone = as_plain(decoding.decode_clip(clip, settings) for clip in given)
    assert as_plain(decode_clips(given, settings, 3, "threads")) == alone
    assert as_plain(decode_clips(given, settings, 2, "processes")) == alone
    assert [row[1] is not None and "missing" in row[1] for row in alone if isinstance(row[1], str)] == [True, True]


def test_mistake_in_the_list_ends_the_run_from_any_worker(settings, tmp_path):
    (tmp_path / "boxes.csv").write_text("no boxes\n")
    vision = dataclasses.replace(settings.vision, faces="given")
    wrong = [Clip("a", "all", path="0.mp4", text="a", boxes_path=str(tmp_path / "boxes.csv"))]
    with pytest.raises(InputError, match="column 'time_seconds' is missing"):
        list(decode_clips(wrong, dataclasses.replace(settings, vision=vision), 2, "threads"))


def test_faster_kind_of_worker_is_chosen_by_a_trial_of_the_first_clips(settings, monkeypatch):
    tried = []

    def seconds(given, settings, num_workers, kind):
        tried.append((len(given), kind))
        return {"threads": 2.0, "processes": 1.0}[kind]

    monkeypatch.setattr(decoding, "_trial_seconds", seconds)
    assert choose_workers(clips(1000), settings, None)[1] == "processes"
    assert tried == [(24, "threads"), (24, "processes")]
    assert choose_workers(clips(20), settings, None)[1] == "threads"
    assert choose_workers(clips(1000), settings, 5) == (5, "threads")
    assert len(tried) == 2


def test_trial_decodes_clips_and_takes_time(settings):
    assert decoding._trial_seconds(clips(6), settings, 2, "threads") > 0


def test_samples_that_are_not_finite_are_refused(settings, tmp_path):
    import soundfile

    samples = np.zeros(RATE, np.float32)
    samples[7] = np.nan
    soundfile.write(tmp_path / "nan.wav", samples, RATE, subtype="FLOAT")
    own = dataclasses.replace(settings, base=Path(tmp_path), vision=None)
    decoded = decoding.decode_clip(Clip("a", "all", path="nan.wav", text="a"), own)
    assert (decoded.failure.stage, decoded.failure.reason) == ("audio", "unreadable")
