"""Extraction as a whole: killed in the middle of 200 clips, fed with anything, and on real clips at base size."""

import csv
import itertools
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from mmei_jax.extraction.media import Span, decode_audio, decode_frames
from mmei_jax.records import Dataset
from mmei_jax.simulation import render
from tests import made_media, processes, tiny_encoders, tiny_extraction

MEAD = Path(__file__).parents[2] / "shared" / "data" / "mead"
RATE = 16_000
NUM_CLIPS = 200
# Bytes above an idle process that has loaded the encoders.
MOST_MEMORY = 1.5 * 2**30


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    return tiny_encoders.make(tmp_path_factory.mktemp("encoders"))


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.slow
def test_run_of_200_clips_killed_twice_ends_bit_equal_and_loses_none(encoders, tmp_path):
    clips = tmp_path / "clips"
    flags = [f"--num_records={NUM_CLIPS}", "--size=64", "--frames_per_second=5"]
    assert render.main([f"--output={clips}", *flags]) == 0
    arguments = ["-m", "mmei_jax.extraction.extract", f"--input={clips / 'clips.csv'}"]
    arguments += [f"--config.{name}.checkpoint={folder}" for name, folder in encoders.converted.items()]
    arguments += ["--config.records_per_shard=10", "--config.text.max_tokens=64", "--config.text.tokens_per_row=64"]
    arguments += ["--config.optional=('vision', 'audio', 'text')"]
    environment = processes.environment(tmp_path / "compiled")
    code, output = processes.run(*arguments, f"--output={tmp_path / 'whole'}", env=environment)
    assert code == 0, output
    killed = tmp_path / "killed"
    done = 0
    for _ in range(2):
        process = processes.start(*arguments, f"--output={killed}", env=environment)
        wanted = done + random.randint(2, 6)
        while process.poll() is None and len(list(killed.glob("progress/*.json"))) < wanted:
            time.sleep(0.01)
        time.sleep(random.random() * 0.3)
        process.kill()
        process.communicate()
        assert process.returncode == -9, "the run ended before it was killed"
        done = len(list(killed.glob("progress/*.json")))
    code, output = processes.run(*arguments, f"--output={killed}", env=environment)
    assert code == 0, output
    num_units = len(list(tmp_path.glob("whole/*.arrow")))
    assert f"{num_units - done} of {num_units} shards to do" in output
    assert files(killed) == files(tmp_path / "whole")
    dataset = Dataset.open(killed, verify=True)
    found = [dataset.split(name).ids(np.arange(dataset.split(name).num_records)) for name in dataset.split_names]
    with (clips / "clips.csv").open(encoding="utf-8", newline="") as stream:
        expected = sorted(row["id"] for row in csv.DictReader(stream))
    assert sorted(itertools.chain(*found)) == expected


def make_odd_clips(folder):
    """Rows of a list, and what must become of each: the reason of its quarantine, or None."""
    tone = made_media.tone(2.0, RATE)
    big = made_media.write_video(
        folder / "big.mp4",
        num_frames=40,
        samples=made_media.tone(4.0, RATE),
        rate=RATE,
        size=(720, 1280),
        options={"movflags": "faststart"},
    )
    rows = [({"id": "big", "path": "big.mp4"}, {None})]
    content = big.read_bytes()
    for number, cut in enumerate(np.random.default_rng(1).uniform(0.0, 0.9, 20)):
        (folder / f"cut{number}.mp4").write_bytes(content[: int(cut * len(content))])
        reasons = {"unreadable", "ends_early", "no_audio", "no_video"}
        rows.append(({"id": f"cut{number}", "path": f"cut{number}.mp4"}, reasons))
    (folder / "zero.mp4").touch()
    (folder / "text.mp4").write_text("a text " * 1000)
    made_media.write_video(folder / "one.mp4", num_frames=1, samples=tone[:2000], rate=RATE)
    made_media.write_video(folder / "instant.mp4", samples=tone[:160], rate=RATE)
    made_media.write_video(folder / "variable.mp4", times_ms=[0, 40, 500, 510, 1900], samples=tone, rate=RATE)
    made_media.rotate(made_media.write_video(folder / "turned.mp4", samples=tone, rate=RATE, size=(64, 96)))
    made_media.write_video(folder / "silent.mp4", samples=0 * tone, rate=RATE)
    for rate, layout, channels in ((8_000, "mono", 1), (44_100, "stereo", 2), (48_000, "5.1", 6)):
        samples = np.stack([made_media.tone(2.0, rate)] * channels)
        made_media.write_video(folder / f"{layout}.mp4", samples=samples, rate=rate, layout=layout)
    rows += [
        ({"id": "zero", "path": "zero.mp4"}, {"unreadable"}),
        ({"id": "text", "path": "text.mp4"}, {"unreadable"}),
        ({"id": "one", "path": "one.mp4"}, {None}),
        ({"id": "instant", "path": "instant.mp4"}, {"too_short", "ends_early", None}),
        *(
            ({"id": name, "path": f"{name}.mp4"}, {None})
            for name in ("variable", "turned", "silent", "mono", "stereo", "5.1")
        ),
        ({"id": "emoji", "path": "one.mp4", "text": "😀🎉👩‍👩‍👧"}, {None}),
        ({"id": "long", "path": "one.mp4", "text": "word " * 10_000}, {None}),
    ]
    return rows


PROGRAM = """
import json, resource, sys
from pathlib import Path
from tests import tiny_encoders, tiny_extraction

folder = Path(sys.argv[1])
source = {name: folder / "hugging_face" / name for name in ("vision", "audio", "text")}
encoders = tiny_encoders.TinyEncoders(source, {name: folder / name for name in source})
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
changes = {"max_clip_seconds": 10.0, "audio__bucket_seconds": (3.0, 10.0), "audio__seconds_per_batch": 20.0}
found = {}
for number, clips in enumerate(sorted(Path(sys.argv[2]).glob("list*.csv"))):
    output = Path(sys.argv[2]) / f"data{number}"
    tiny_extraction.run(encoders, clips, output, max_bad_fraction=1.0, changes=changes)
    found[clips.name] = (output / "quarantine.jsonl").read_text()
    if not number:
        idle = peak()
print(json.dumps({"quarantine": found, "above_idle": peak() - idle}))
"""


@pytest.mark.slow
def test_any_input_ends_as_documented_in_bounded_memory(encoders, tmp_path):
    """Each odd clip in a list of its own, beside a good one, since a split without clips is an error of its own."""
    made_media.write_video(tmp_path / "good.mp4", samples=made_media.tone(2.0, RATE), rate=RATE)
    good = {"id": "good", "path": "good.mp4", "text": "a word", "emotion": ""}
    rows = [(good, {None}), *make_odd_clips(tmp_path)]
    for number, (row, _) in enumerate(rows):
        own = [good] if row is good else [good, {"text": "a word", "emotion": "", **row}]
        tiny_extraction.write_list(tmp_path / f"list{number:03d}.csv", own)
    folder = encoders.converted["text"].parent
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, folder, tmp_path],
        cwd=processes.ROOT,
        # What makes the encoders needs torch.
        env={**processes.environment(), "PYTHONPATH": str(processes.ROOT)},
        capture_output=True,
        text=True,
        # A hang ends here: a minute for each.
        timeout=60 * len(rows),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for number, (row, reasons) in enumerate(rows):
        lines = [json.loads(line) for line in found["quarantine"][f"list{number:03d}.csv"].splitlines()]
        assert [line["id"] for line in lines] in ([], [row["id"]])
        assert (lines[0]["reason"] if lines else None) in reasons, row["id"]
    assert found["above_idle"] < MOST_MEMORY


@pytest.fixture(scope="module")
def base_encoders(tmp_path_factory):
    """ViT-B/16, Wav2Vec2-base and BERT-base, random, with a small vocabulary for the tokenizer."""
    return tiny_encoders.make(tmp_path_factory.mktemp("base"), is_base_size=True)


@pytest.mark.slow
@pytest.mark.skipif(not MEAD.is_dir(), reason="the MEAD clips are not beside the checkout")
def test_real_clips_at_base_size_have_hugging_faces_features_whatever_their_batch(base_encoders, tmp_path):
    with (MEAD / "labels.tsv").open(encoding="utf-8", newline="") as stream:
        given = list(csv.DictReader(stream, delimiter="\t"))
    rows = [
        {"id": row["clip"], "path": str(MEAD / row["clip"]), "text": row["transcript"], "emotion": ""} for row in given
    ]
    changes = {"max_clip_seconds": 4.0, "audio__bucket_seconds": (4.0,), "audio__seconds_per_batch": 8.0}
    outputs = [tmp_path / "one", tmp_path / "other"]
    for output, own, frames_per_batch in zip(outputs, (rows, rows[::-1]), (8, 5), strict=True):
        clips = tiny_extraction.write_list(tmp_path / "clips.csv", own)
        tiny_extraction.run(
            base_encoders, clips, output, changes={**changes, "vision__frames_per_batch": frames_per_batch}
        )
    one, other = (tiny_extraction.features(output, "all") for output in outputs)
    split = Dataset.open(outputs[0]).split("all")
    assert split.column("extra_text") == [row["transcript"] for row in given]
    source = base_encoders.source
    images = transformers.ViTImageProcessorPil.from_pretrained(source["vision"])
    sounds = transformers.Wav2Vec2FeatureExtractor.from_pretrained(source["audio"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(source["text"])
    models = {
        "vision": transformers.ViTModel.from_pretrained(source["vision"]).eval(),
        "audio": transformers.Wav2Vec2Model.from_pretrained(source["audio"]).eval(),
        "text": transformers.BertModel.from_pretrained(source["text"]).eval(),
    }
    for row in given:
        path, key = MEAD / row["clip"], row["clip"]
        frames = [frame for _, frame in decode_frames(path, Span(), 5.0, 16)]
        samples = decode_audio(path, Span(), RATE)
        # Frames and sound are of the same three seconds.
        assert abs(len(one["audio"][key]) / 50 - len(frames) / 5) < 0.25
        inputs = {
            "vision": images(frames, return_tensors="pt"),
            "audio": sounds(samples, sampling_rate=RATE, return_tensors="pt"),
            "text": tokenizer(row["transcript"], return_tensors="pt"),
        }
        for name, model in models.items():
            with torch.no_grad():
                states = model(**inputs[name]).last_hidden_state
            expected = states[:, 0] if name == "vision" else states[0]
            np.testing.assert_allclose(one[name][key], expected.numpy(), atol=1e-4)
            np.testing.assert_allclose(other[name][key], one[name][key], atol=1e-5)
    assert load_file(base_encoders.converted["text"] / "parameters.safetensors")
