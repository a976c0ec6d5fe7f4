"""Clips rendered from simulated records: bytes, latents, media as other programs decode them, refusals."""

import csv
import dataclasses
import hashlib
import re
import signal
import subprocess
import sys
import time
import wave
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from PIL import Image

from mmei_jax import records
from mmei_jax.extraction.clips import Clip
from mmei_jax.simulation import aigc_int, aigc_int_dataset, render, render_constants
from mmei_jax.simulation.render_drawing import draw_frames
from mmei_jax.simulation.render_face import animate, draw_identity
from mmei_jax.simulation.render_media import to_int16
from mmei_jax.simulation.render_plan import RecordPlan, plan_chunk, plan_records
from mmei_jax.simulation.render_text import (
    EMOTION_WORDS,
    INTENT_PHRASES,
    MANNER_PHRASES,
    MANNERS,
    NEUTRAL_PHRASES,
    write_text,
)
from mmei_jax.simulation.render_voice import draw_voice
from mmei_jax.types import MODALITIES

ROOT = Path(__file__).parents[1]
# Its first records lack vision, audio and text, one each.
SEED = 23
NUM_RECORDS = 8
LACKING = {"vision": 2, "audio": 4, "text": 5}
OPTIONS = render.RenderOptions(size=64)


def rows_of(folder: Path, name: str = "clips.csv") -> list[dict[str, str]]:
    with (folder / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def plans() -> list[RecordPlan]:
    return plan_chunk(SEED, 0)


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rendered") / "clips"
    render.write_dataset(path, NUM_RECORDS, SEED, OPTIONS)
    return path


def test_same_seed_gives_the_same_bytes_whatever_the_number_of_workers(rendered, tmp_path):
    render.write_dataset(tmp_path / "again", NUM_RECORDS, SEED, OPTIONS, num_workers=2)
    assert hashes(tmp_path / "again") == hashes(rendered)


def test_record_does_not_depend_on_how_many_there_are(rendered, tmp_path):
    render.write_dataset(tmp_path / "few", 2, SEED, OPTIONS)
    render.write_dataset(tmp_path / "other", 2, SEED + 1, OPTIONS)
    few, other = hashes(tmp_path / "few"), hashes(tmp_path / "other")
    media = {name: value for name, value in few.items() if name.startswith("media/")}
    assert len(media) == 4
    assert media.items() <= hashes(rendered).items()
    assert not set(media.values()) & set(other.values())


def test_latents_are_those_of_the_features(plans):
    chunk = next(aigc_int.stream(SEED, 1000, 16))
    latents = chunk.latents
    splits = aigc_int_dataset.split_membership(latents, "record")
    for row, plan in enumerate(plans):
        assert plan.number == row
        assert (plan.emotion, plan.intent, plan.manner) == (
            latents.emotion[row],
            latents.intent[row],
            latents.manner[row],
        )
        assert plan.user == latents.user[row]
        assert splits[plan.split][row]
        for column, name in enumerate(MODALITIES):
            assert len(plan.is_informative.get(name, ())) == max(0, latents.num_tokens[row, column])
            assert plan.is_present(name) == latents.is_present()[row, column]
            expected = aigc_int.DISPLAY_CLASS[name][plan.manner, latents.displayed_emotion[row, column]]
            assert plan.shown_class[name] == expected


def test_informative_parts_are_the_informative_tokens_of_the_features(plans):
    latents = aigc_int.draw_latents(SEED, 0)
    for name in MODALITIES:
        # So loud that the tokens' lengths tell which ones are informative.
        tokens = aigc_int.draw_tokens(SEED, 0, latents, name, 16, amplitude=1000.0)
        flags = np.concatenate([plan.is_informative[name] for plan in plans if plan.is_present(name)])
        np.testing.assert_array_equal(np.linalg.norm(tokens.values, axis=1) > 500.0, flags)


def test_ids_splits_and_speakers_are_those_of_the_features(rendered, tmp_path):
    arguments = [f"--output={tmp_path / 'features'}", f"--seed={SEED}", "--num_records=20", "--dim=14"]
    assert aigc_int_dataset.main(arguments) == 0
    dataset = records.Dataset.open(tmp_path / "features")
    found = set()
    for name in ("train", "validation", "test"):
        split = dataset.split(name)
        ids = split.ids(np.arange(split.num_records))
        found |= {(name, *pair) for pair in zip(ids, split.column("user_id"), strict=True)}
    assert {(row["split"], row["id"], row["speaker"]) for row in rows_of(rendered)} <= found


def test_list_has_the_fields_of_a_clip_and_names_files_that_are_there(rendered, plans):
    rows = rows_of(rendered)
    assert tuple(rows[0]) == render.COLUMNS
    fields = {field.name for field in dataclasses.fields(Clip)} - {"labels", "slate", "relevant_items"}
    assert set(render.COLUMNS) - fields == {"emotion", "intent"}
    listed = {"clips.csv", "latents.csv", "catalogue.jsonl", "slates.csv", "relevant_items.csv"}
    for row, plan in zip(rows, plans, strict=False):
        clip = Clip(id=row["id"], split=row["split"], optional=tuple(filter(None, row["optional"].split("|"))))
        assert set(clip.optional) == {name for name in MODALITIES if not plan.is_present(name)}
        assert (row["emotion"], row["intent"]) == (aigc_int.EMOTIONS[plan.emotion], aigc_int.INTENTS[plan.intent])
        assert row["path"].endswith(".mp4" if plan.is_present("vision") else ".wav")
        listed.add(row["path"])
        assert bool(row["text"]) == plan.is_present("text")
        if plan.is_present("text"):
            text = f"{row['path'].rpartition('.')[0]}.txt"
            assert (rendered / text).read_text(encoding="utf-8") == row["text"] + "\n"
            listed.add(text)
    assert set(hashes(rendered)) == listed


def test_latents_are_listed(rendered, plans):
    for row, plan in zip(rows_of(rendered, "latents.csv"), plans, strict=False):
        assert row["id"] == plan.id
        assert int(row["manner"]) == plan.manner
        assert [int(row[f"{name}_class"]) for name in MODALITIES] == list(plan.shown_class.values())


def test_record_without_any_modality_is_not_listed():
    (plan,) = [plan for plan in plan_chunk(13, 0) if not plan.is_informative]
    assert render.render_files(plan, OPTIONS) == {}
    assert render.list_row(plan)["path"] == ""


def test_video_decodes_to_the_frames_that_were_drawn(rendered, plans):
    plan = plans[0]
    num_frames = plan.num_frames(10)
    drawn = np.stack(list(draw_frames(plan, render.render_voice(plan, OPTIONS)[0], num_frames, 10, 64)))
    with av.open(str(rendered / render.list_row(plan)["path"])) as container:
        video = container.streams.video[0]
        assert (video.codec_context.name, video.average_rate) == ("h264", 10)
        assert not {"creation_time", "encoder"} & (container.metadata.keys() | video.metadata.keys())
        frames = [(frame.time, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    np.testing.assert_allclose([seconds for seconds, _ in frames], np.arange(num_frames) / 10, atol=1e-6)
    difference = np.abs(np.stack([pixels for _, pixels in frames]).astype(float) - drawn)
    assert difference.mean() < 6.0


def test_sound_of_a_video_is_the_voice_and_lasts_as_long_as_the_frames(rendered, plans):
    plan = plans[1]
    _, sound = render.render_voice(plan, OPTIONS)
    assert len(sound) == 1600 * plan.num_frames(10)
    with av.open(str(rendered / render.list_row(plan)["path"])) as container:
        audio, video = container.streams.audio[0], container.streams.video[0]
        assert (audio.codec_context.name, audio.rate, audio.channels) == ("aac", 16_000, 1)
        assert float(audio.duration * audio.time_base) == float(video.duration * video.time_base)
        frames = list(container.decode(audio=0))
    decoded = np.concatenate([frame.to_ndarray()[0] for frame in frames])
    assert frames[0].pts == 0
    # The codec fills its last frame of 1,024 samples.
    assert len(sound) <= len(decoded) < len(sound) + 1024
    assert np.corrcoef(decoded[: len(sound)], sound)[0, 1] > 0.98


def test_sound_without_video_is_a_wav_of_the_voice(rendered, plans):
    plan = plans[LACKING["vision"]]
    path = rendered / render.list_row(plan)["path"]
    _, sound = render.render_voice(plan, OPTIONS)
    read, rate = soundfile.read(path, dtype="int16")
    assert rate == 16_000
    np.testing.assert_array_equal(read, to_int16(sound))
    with wave.open(str(path)) as file:
        assert (file.getnchannels(), file.getnframes()) == (1, len(sound))


def test_video_without_audio_has_no_audio_stream(rendered, plans):
    with av.open(str(rendered / render.list_row(plans[LACKING["audio"]])["path"])) as container:
        assert not container.streams.audio
        assert len(container.streams.video) == 1


def test_absent_text_leaves_neither_a_file_nor_a_cell(rendered, plans):
    row = rows_of(rendered)[LACKING["text"]]
    assert row["text"] == ""
    assert row["optional"] == "text"
    assert not (rendered / row["path"]).with_suffix(".txt").exists()


@pytest.mark.parametrize(("frames_per_second", "sample_rate_hz"), [(30, 44_100), (7, 8000)])
def test_frames_and_sound_last_equally_long_at_any_rate(plans, tmp_path, frames_per_second, sample_rate_hz):
    options = render.RenderOptions(32, frames_per_second, sample_rate_hz)
    plan = plans[0]
    path = tmp_path / "clip.mp4"
    path.write_bytes(render.render_files(plan, options)[f"{plan.id}.mp4"])
    with av.open(str(path)) as container:
        audio, video = container.streams.audio[0], container.streams.video[0]
        assert video.frames == plan.num_frames(frames_per_second)
        seconds = [float(stream.duration * stream.time_base) for stream in (audio, video)]
    assert seconds[0] == pytest.approx(seconds[1], abs=0.5 / sample_rate_hz)
    assert seconds[1] == pytest.approx(plan.num_frames(1000) / 1000, abs=0.5 / frames_per_second)


def test_mouth_opens_with_the_voice(plans):
    plan = plans[0]
    num_frames = plan.num_frames(25)
    voice, _ = render.render_voice(plan, render.RenderOptions(frames_per_second=25))
    silent = dataclasses.replace(voice, level=np.zeros_like(voice.level))
    column = render_constants.FACE_PARAMETERS.index("mouth_open")
    opened = (animate(plan, voice, num_frames, 25) - animate(plan, silent, num_frames, 25))[:, column]
    loudness = voice.envelope((np.arange(num_frames) + 0.5) / 25)
    assert loudness.max() > 0.5
    np.testing.assert_allclose(opened, render_constants.SPEECH_MOUTH_OPEN * loudness, atol=1e-12)


def test_face_without_sound_shows_nothing_of_the_voice(plans):
    plan = plans[LACKING["audio"]]
    for shown in range(len(aigc_int.EMOTIONS)):
        changed = dataclasses.replace(plan, shown_class={**plan.shown_class, "audio": shown})
        np.testing.assert_array_equal(draw_voice(changed, 2.0).level, draw_voice(plan, 2.0).level)


def test_face_and_voice_show_their_own_class_alone(plans):
    plan = dataclasses.replace(
        plans[0],
        manner=0,
        is_informative={name: np.ones(6, bool) for name in MODALITIES},
        shown_class=dict.fromkeys(MODALITIES, 0),
    )
    voice = draw_voice(plan, 2.0)
    faces, pitches, levels = {}, {}, {}
    for shown, name in enumerate(aigc_int.EMOTIONS):
        face = dataclasses.replace(plan, shown_class={**plan.shown_class, "vision": shown})
        np.testing.assert_array_equal(draw_voice(face, 2.0).pitch_hz, voice.pitch_hz)
        faces[name] = dict(zip(render_constants.FACE_PARAMETERS, animate(face, voice, 20, 10).mean(0), strict=True))
        other = draw_voice(dataclasses.replace(plan, shown_class={**plan.shown_class, "audio": shown}), 2.0)
        pitches[name], levels[name] = other.pitch_hz.mean(), other.level.mean()
    assert faces["joy"]["mouth_curve"] > faces["neutral"]["mouth_curve"] > faces["sadness"]["mouth_curve"]
    assert faces["anger"]["brow_slant"] < faces["neutral"]["brow_slant"] < faces["sadness"]["brow_slant"]
    assert faces["surprise"]["eye_open"] > faces["neutral"]["eye_open"] > faces["disgust"]["eye_open"]
    assert pitches["surprise"] > pitches["neutral"] > pitches["sadness"]
    assert levels["anger"] > levels["neutral"] > levels["sadness"]


def test_uninformative_parts_show_no_class(plans):
    plan = dataclasses.replace(plans[0], is_informative={name: np.zeros(6, bool) for name in MODALITIES})
    voice = draw_voice(plan, 2.0)
    for shown in range(len(aigc_int.EMOTIONS)):
        other = dataclasses.replace(plan, shown_class=dict.fromkeys(MODALITIES, shown), manner=2, intent=3)
        np.testing.assert_array_equal(draw_voice(other, 2.0).pitch_hz, voice.pitch_hz)
        np.testing.assert_array_equal(animate(other, voice, 20, 10), animate(plan, voice, 20, 10))
        assert write_text(other) == write_text(plan)


def test_user_looks_the_same_in_every_clip(plans):
    by_user: dict[int, set[str]] = {}
    for plan in plans:
        by_user.setdefault(plan.user, set()).add(repr(draw_identity(plan.user_generator())))
    assert all(len(looks) == 1 for looks in by_user.values())
    assert len({next(iter(looks)) for looks in by_user.values()}) == len(by_user)


def test_text_says_the_class_the_manner_and_the_intent_as_often_as_the_constants_tell():
    counts = np.zeros((3, 2))
    num_neutral, num_informative, num_tokens = 0, 0, 0
    neutral = {phrase.lower() for phrase in NEUTRAL_PHRASES}
    for plan in (plan for chunk in plan_records(5, 2000) for plan in chunk if plan.is_present("text")):
        text = write_text(plan).lower()
        tables = (
            (list(EMOTION_WORDS.values()), plan.shown_class["text"]),
            ([MANNER_PHRASES[name] for name in MANNERS], plan.manner),
            ([INTENT_PHRASES[name] for name in aigc_int.INTENTS], plan.intent),
        )
        for row, (phrases, shown) in enumerate(tables):
            found = [sum(len(re.findall(rf"\b{phrase.lower()}\b", text)) for phrase in group) for group in phrases]
            counts[row] += found[shown], sum(found)
        num_neutral += sum(text.count(phrase) for phrase in neutral)
        num_informative += plan.is_informative["text"].sum()
        num_tokens += len(plan.is_informative["text"])
    num_cues = counts[:, 1].sum()
    assert num_cues == num_informative
    assert num_neutral == num_tokens - num_informative
    np.testing.assert_allclose(counts[:, 1] / num_cues, render_constants.CUE_PROBABILITY, atol=0.02)
    np.testing.assert_allclose(counts[:, 0] / counts[:, 1], 1.0 - render_constants.CUE_CONFUSION_RATE, atol=0.02)


def test_contact_sheet_in_the_documents_is_what_the_command_draws(tmp_path):
    arguments = [f"--contact_sheet={tmp_path / 'faces.png'}", "--seed=1", "--size=160"]
    assert render.main(arguments) == 0
    drawn = np.asarray(Image.open(tmp_path / "faces.png").convert("RGB"), float)
    shown = np.asarray(Image.open(ROOT / "docs/images/rendered_faces.png").convert("RGB"), float)
    assert drawn.shape == shown.shape
    # The palette may differ where another processor rounds another way.
    assert (np.abs(drawn - shown).max(axis=2) > 40.0).mean() < 0.002


def test_existing_output_is_left_alone(tmp_path, capsys):
    output = tmp_path / "clips"
    output.mkdir()
    (output / "mine.txt").write_text("mine")
    assert render.main([f"--output={output}", "--num_records=1", "--size=32"]) == 2
    assert capsys.readouterr().err == f"error: {output}: exists already; name a new folder\n"
    assert hashes(tmp_path) == {"clips/mine.txt": hashlib.sha256(b"mine").hexdigest()}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--num_records=0"], "num_records = 0"),
        (["--workers=0"], "workers = 0"),
        (["--size=65"], "size = 65"),
        (["--frames_per_second=0"], "frames_per_second = 0"),
        (["--sample_rate_hz=12345"], "sample_rate_hz = 12345"),
        (["--seed=-1"], "seed = -1"),
    ],
)
def test_flags_that_cannot_be_used_are_told_in_one_line(tmp_path, capsys, flags, said):
    assert render.main([f"--output={tmp_path / 'clips'}", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {said}: expected ")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_command_without_anything_to_make_is_refused(capsys):
    assert render.main([]) == 2
    assert "--output, --contact_sheet" in capsys.readouterr().err


def test_contact_sheet_is_a_png(tmp_path, capsys):
    assert render.main([f"--contact_sheet={tmp_path / 'faces.jpg'}"]) == 2
    assert "ends with .png" in capsys.readouterr().err


def test_failure_in_the_middle_leaves_nothing(tmp_path, monkeypatch):
    write = render.write_files

    def fail_late(plan: RecordPlan, options: render.RenderOptions, folder: Path) -> int:
        if plan.number == 2:
            raise OSError("disk is full")
        return write(plan, options, folder)

    monkeypatch.setattr(render, "write_files", fail_late)
    with pytest.raises(OSError, match="disk is full"):
        render.write_dataset(tmp_path / "clips", 4, SEED, OPTIONS)
    assert not list(tmp_path.iterdir())


def test_interrupted_command_leaves_nothing(tmp_path):
    command = [sys.executable, "-m", "mmei_jax.simulation.render", f"--output={tmp_path / 'clips'}"]
    process = subprocess.Popen(
        [*command, "--num_records=5000", "--workers=1"], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    end = time.monotonic() + 60
    while not list(tmp_path.glob(".clips.*/media/*/*.mp4")) and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 143
    assert error == "error: interrupted; nothing was written\n"
    assert not list(tmp_path.iterdir())
