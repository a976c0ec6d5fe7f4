"""Frames are those shown at their times, sound is at its place, and what cannot be used says why."""

import shutil
import subprocess
from pathlib import Path

import av
import cv2
import imageio_ffmpeg
import numpy as np
import pytest
import soundfile

from mmei_jax.extraction import media
from mmei_jax.extraction.media import REASONS, MediaError, Span, decode_audio, decode_frames, sample_times
from tests import made_media

RATE = 16_000
MEAD = sorted((Path(__file__).parents[2] / "shared" / "data" / "mead").glob("*.mp4"))


def numbers(path, span=None, frames_per_second=5.0, max_frames=64):
    """Which frames of a made video are taken."""
    return [
        made_media.number_of(frame) for _, frame in decode_frames(path, span or Span(), frames_per_second, max_frames)
    ]


def refusal(decode, *arguments):
    """Stage and reason."""
    with pytest.raises(MediaError) as caught:
        list(decode(*arguments))
    assert caught.value.reason in REASONS
    return caught.value.stage, caught.value.reason


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("media")


@pytest.fixture(scope="module")
def video(folder):
    """Two seconds of 10 frames a second; the left channel has a tone, the right one is silent."""
    tone = made_media.tone(2.0, RATE)
    return made_media.write_video(folder / "video.mp4", samples=np.stack([tone, 0 * tone]), rate=RATE, layout="stereo")


def test_frames_are_those_shown_in_the_middle_of_equal_parts(video):
    assert numbers(video) == [1, 3, 5, 7, 9, 11, 13, 15, 17, 19]
    assert numbers(video, max_frames=2) == [5, 15]
    times = [time for time, _ in decode_frames(video, Span(), 5.0, 64)]
    assert times == sample_times(2.0, 5.0, 64).tolist()


def test_denser_sampling_than_the_file_repeats_frames(video):
    assert numbers(video, frames_per_second=20.0)[:6] == [0, 0, 1, 1, 2, 2]


def test_frames_of_variable_rate_are_taken_by_their_times(folder):
    times_ms = [0, 100, 150, 700, 720, 1500, 1900]
    path = made_media.write_video(folder / "variable.mp4", times_ms=times_ms)
    for time, frame in decode_frames(path, Span(), 10.0, 64):
        assert made_media.number_of(frame) == np.searchsorted(times_ms, 1000 * time, side="right") - 1


def test_part_of_a_file_has_the_frames_and_samples_of_the_whole(video):
    span = Span(1.2, 1.8)
    assert numbers(video, span) == [13, 15, 17]
    whole, part = decode_audio(video, Span(), RATE), decode_audio(video, span, RATE)
    assert len(part) == 0.6 * RATE
    np.testing.assert_allclose(part, whole[int(1.2 * RATE) :][: len(part)], atol=1e-6)


def test_frame_is_turned_as_the_file_says_and_as_opencv_turns_it(folder):
    path = made_media.rotate(made_media.write_video(folder / "turned.mp4", size=(64, 96)))
    _, frame = next(decode_frames(path, Span(), 5.0, 1))
    capture = cv2.VideoCapture(str(path))
    capture.set(cv2.CAP_PROP_POS_MSEC, 1000.0)
    _, expected = capture.read()
    assert frame.shape == expected.shape == (96, 64, 3)
    corners = [(slice(8), slice(8)), (slice(8), slice(-8, None)), (slice(-8, None), slice(8))]
    assert [frame[corner].mean() > 200 for corner in corners] == [expected[corner].mean() > 200 for corner in corners]
    assert sum(frame[corner].mean() > 200 for corner in corners) == 1


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".mp3", ".mkv"])
@pytest.mark.parametrize(("rate", "layout"), [(8_000, "mono"), (44_100, "stereo"), (48_000, "5.1")])
def test_sound_of_any_rate_and_channels_becomes_their_mean_at_one_rate(folder, suffix, rate, layout):
    channels = {"mono": 1, "stereo": 2, "5.1": 6}[layout]
    if suffix == ".mp3" and channels > 2:
        pytest.skip("the format has at most two channels")
    tone = made_media.tone(1.0, rate)
    samples = np.stack([tone] + [0 * tone] * (channels - 1))
    path = folder / f"tone_{rate}_{channels}{suffix}"
    if suffix == ".mkv":
        made_media.write_video(path, num_frames=10, samples=samples, rate=rate, layout=layout)
    else:
        soundfile.write(path, samples.T, rate)
    found = decode_audio(path, Span(), RATE)
    # What lossy formats fill their last packet up with is not always cut off.
    assert abs(len(found) - RATE) <= (0.08 if suffix in (".mp3", ".mkv") else 1e-3) * RATE
    middle = np.arange(RATE // 4, 3 * RATE // 4)
    wave = 2.0 * np.mean(found[middle] * np.exp(-2j * np.pi * 440.0 * middle / RATE))
    assert abs(wave) == pytest.approx(0.5 / channels, rel=0.05)
    # A tenth of a radian: 36 microseconds.
    assert np.angle(wave * 1j) == pytest.approx(0.0, abs=0.1)
    if suffix in (".wav", ".flac"):
        np.testing.assert_allclose(found[middle], made_media.tone(1.0, RATE)[middle] / channels, atol=1e-3)


def test_sound_that_starts_late_or_has_a_gap_keeps_its_place(folder):
    """Silence stands where there is no sound: later samples are not moved forward."""
    path = folder / "gap.mkv"
    tone = made_media.tone(0.5, RATE)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=RATE, layout="mono")
        for start in (0.25, 1.25):
            frame = av.AudioFrame.from_ndarray((tone * 32767).astype(np.int16)[None], format="s16", layout="mono")
            frame.sample_rate, frame.pts = RATE, round(start * RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    # The container starts where its first stream does.
    found = decode_audio(path, Span(), RATE)
    loud = np.abs(found).reshape(-1, RATE // 20).max(axis=1) > 0.1
    assert loud.tolist() == [True] * 10 + [False] * 10 + [True] * 10


@pytest.mark.parametrize("kept_bytes", [0, 1 << 24])
def test_sound_is_that_of_a_file_decoded_from_its_first_packet(folder, monkeypatch, kept_bytes):
    """AAC has a packet before time 0, without which noise that it draws comes out otherwise for half a second."""
    noise = np.random.default_rng(0).normal(size=(1, 2 * RATE)).astype(np.float32) / 8
    path = made_media.write_video(folder / f"noise_{kept_bytes}.mp4", samples=noise, rate=RATE)
    with av.open(str(path)) as container:
        expected = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
    monkeypatch.setattr(media, "_KEPT_BYTES", kept_bytes)
    found = decode_audio(path, Span(), RATE)
    np.testing.assert_array_equal(found, expected[: len(found)])
    assert numbers(path) == [1, 3, 5, 7, 9, 11, 13, 15, 17, 19]


def test_silence_and_one_frame_are_media_too(folder):
    path = made_media.write_video(folder / "one.mp4", num_frames=1, samples=np.zeros((1, RATE)), rate=RATE)
    assert numbers(path) == [0]
    assert not decode_audio(path, Span(), RATE).any()


def test_what_cannot_be_used_says_at_which_stage_and_why(folder, video):
    def frames(path, span=Span()):  # noqa: B008 - frozen
        return decode_frames(path, span, 5.0, 16)

    def sound(path, span=Span()):  # noqa: B008 - frozen
        return decode_audio(path, span, RATE)

    text, nothing, silent = folder / "text.mp4", folder / "nothing.mp4", folder / "silent.mp4"
    text.write_text("this is no video")
    nothing.touch()
    made_media.write_video(silent)
    wav = folder / "alone.wav"
    soundfile.write(wav, made_media.tone(1.0, RATE), RATE)
    broken = folder / "broken.wav"
    broken.write_bytes(wav.read_bytes()[:20])
    assert refusal(frames, folder / "none.mp4") == ("video", "missing")
    assert refusal(sound, folder / "none.wav") == ("audio", "missing")
    assert refusal(sound, folder / "none.mp4") == ("audio", "missing")
    assert refusal(frames, text) == refusal(frames, nothing) == ("video", "unreadable")
    assert refusal(sound, text) == refusal(sound, broken) == ("audio", "unreadable")
    assert refusal(frames, wav) == ("video", "no_video")
    assert refusal(sound, silent) == ("audio", "no_audio")
    for decode in (frames, sound):
        stage = "video" if decode is frames else "audio"
        assert refusal(decode, video, Span(max_seconds=1.0)) == (stage, "too_long")
        assert refusal(decode, video, Span(0.5, 3.5)) == (stage, "ends_early")
        assert refusal(decode, video, Span(2.5)) == (stage, "empty")
    assert refusal(sound, video, Span(2.5, 3.0))[1] in ("empty", "ends_early")
    assert refusal(sound, wav, Span(1.5, 2.0)) == ("audio", "empty")


def test_truncated_file_is_refused_unless_it_lacks_less_than_half_a_second(folder):
    """Cut anywhere: the index comes first, so that most of what is left decodes."""
    tone = made_media.tone(4.0, RATE)
    path = made_media.write_video(
        folder / "whole.mp4", num_frames=40, samples=tone, rate=RATE, options={"movflags": "faststart"}
    )
    content = path.read_bytes()
    reasons = set()
    for cut in np.random.default_rng(0).uniform(0.0, 0.9, 20):
        part = folder / "part.mp4"
        part.write_bytes(content[: int(cut * len(content))])
        assert refusal(decode_audio, part, Span(), RATE)[1] in ("unreadable", "ends_early", "no_audio")
        try:
            frames = list(decode_frames(part, Span(), 5.0, 64))
        except MediaError as error:
            reasons.add(error.reason)
        else:
            # Of 20 frames a fifth of a second apart.
            assert len(frames) >= 18
            assert all(made_media.number_of(frame) == int(10 * time) for time, frame in frames)
    assert reasons <= {"unreadable", "ends_early", "no_video"}
    assert len(reasons) > 1


def test_error_of_a_worker_process_arrives_as_it_was():
    error = MediaError("video", "missing", "a.mp4")
    remade, arguments = error.__reduce__()
    assert str(remade(*arguments)) == "video: missing: a.mp4"


@pytest.mark.skipif(not MEAD, reason="the MEAD clips are not beside the checkout")
@pytest.mark.parametrize("path", MEAD, ids=lambda path: path.stem)
def test_frames_and_sound_of_real_clips_are_those_of_opencv_and_the_ffmpeg_program(path, tmp_path):
    """Decoders of other libraries, asked for the same times; frames and sound keep in step."""
    capture = cv2.VideoCapture(str(path))
    rate = capture.get(cv2.CAP_PROP_FPS)
    taken = list(decode_frames(path, Span(), 5.0, 16))
    frames = []
    while (read := capture.read())[0]:
        frames.append(read[1][..., ::-1])
    for time, frame in taken[::5]:
        expected = frames[int(time * rate + 1e-6)].astype(np.int16)
        assert np.abs(frame.astype(np.int16) - expected).mean() < 1.0
    other = tmp_path / "other.wav"
    program = imageio_ffmpeg.get_ffmpeg_exe()
    subprocess.run([program, "-v", "error", "-i", path, "-ac", "2", "-c:a", "pcm_f32le", other], check=True)
    samples, sound_rate = soundfile.read(other)
    found = decode_audio(path, Span(), int(sound_rate))
    expected = samples.mean(axis=1)
    assert abs(len(found) - len(expected)) <= 1024
    shortest = min(len(found), len(expected))
    np.testing.assert_allclose(found[:shortest], expected[:shortest], atol=1e-4)
    shutil.rmtree(tmp_path)
