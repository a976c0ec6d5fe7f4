"""Extraction: features are Hugging Face's, batches and interruptions change nothing, bad clips are told apart."""

import json

import numpy as np
import pytest
import soundfile
import torch
import transformers

from configs import default
from mmei_jax.config import parse
from mmei_jax.extraction.clip_lists import read_clips
from mmei_jax.extraction.media import Span, decode_audio, decode_frames
from mmei_jax.input_pipeline import check
from mmei_jax.records import Dataset
from mmei_jax.sharding import ProcessShare
from mmei_jax.types import InputError
from tests import made_media, tiny_encoders, tiny_extraction
from tests.tiny_extraction import RATE, SPECS, TEXTS, features, read_rows, run, write_list


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    return tiny_encoders.make(tmp_path_factory.mktemp("encoders"))


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return tiny_extraction.make_clips(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="module")
def extracted(encoders, clips, tmp_path_factory):
    output = tmp_path_factory.mktemp("extracted") / "data"
    return run(encoders, clips, output), output


def files(output):
    """Content of every file by name."""
    return {str(path.relative_to(output)): path.read_bytes() for path in sorted(output.rglob("*")) if path.is_file()}


def test_records_carry_what_the_list_says(extracted):
    counts, output = extracted
    dataset = Dataset.open(output, verify=True)
    assert counts["clips"] == 11
    assert counts["quarantined"] == {}
    assert counts["texts_cut"] == 2
    train = dataset.split("train")
    rows = np.arange(9)
    assert train.ids(rows) == [f"clip{index}" for index in range(9)]
    assert [shard["file"] for shard in dataset.manifest["splits"]["train"]["shards"]] == [
        f"train-{index:05d}.arrow" for index in range(3)
    ]
    assert train.column("user_id")[:4] == ["speaker0", "speaker1", "speaker2", "speaker0"]
    assert train.column("turn").tolist() == list(range(9))
    assert train.column("label_emotion").tolist() == [0, 1, 2] * 3
    assert train.column("extra_text")[:2] == list(TEXTS[:2])
    assert not (output / "progress").exists()
    assert (output / "quarantine.jsonl").read_text() == ""
    producer = dataset.spec.modalities["audio"].producer
    assert producer.sample_rate_hz == RATE
    assert producer.revision.startswith("sha256:")


def test_features_are_those_of_hugging_faces_processors_and_models(encoders, clips, extracted):
    states = features(extracted[1])
    source = encoders.source
    images = transformers.ViTImageProcessorPil.from_pretrained(source["vision"])
    sounds = transformers.Wav2Vec2FeatureExtractor.from_pretrained(source["audio"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(source["text"])
    vit = transformers.ViTModel.from_pretrained(source["vision"]).eval()
    wav2vec2 = transformers.Wav2Vec2Model.from_pretrained(source["audio"]).eval()
    bert = transformers.BertModel.from_pretrained(source["text"]).eval()
    with torch.no_grad():
        for index in range(5):
            path, key = clips.parent / f"{index}.mp4", f"clip{index}"
            frames = [frame for _, frame in decode_frames(path, Span(), 5.0, 16)]
            pixels = images(frames, return_tensors="pt", input_data_format="channels_last")
            expected = vit(**pixels).last_hidden_state[:, 0].numpy()
            np.testing.assert_allclose(states["vision"][key], expected, atol=1e-4)
            samples = sounds(decode_audio(path, Span(), RATE), sampling_rate=RATE, return_tensors="pt")
            expected = wav2vec2(samples["input_values"]).last_hidden_state[0].numpy()
            np.testing.assert_allclose(states["audio"][key], expected, atol=1e-4)
            text = tokenizer(TEXTS[index % 4], truncation=True, max_length=32, return_tensors="pt")
            np.testing.assert_allclose(states["text"][key], bert(**text).last_hidden_state[0].numpy(), atol=1e-4)


def test_a_clip_has_the_same_features_in_any_batch(encoders, clips, extracted, tmp_path):
    rows = read_rows(clips)
    shuffled = [{**row, "split": "train"} for row in reversed(rows)]
    other = write_list(clips.parent / "shuffled.csv", shuffled)
    run(encoders, other, tmp_path / "data", changes={"records_per_shard": 7})
    found, expected = features(tmp_path / "data"), features(extracted[1])
    for modality, states in expected.items():
        for key, tokens in states.items():
            np.testing.assert_allclose(found[modality][key], tokens, atol=1e-5)


def test_sum_of_four_layers_and_mean_of_frames_and_of_patches(encoders, clips, extracted, tmp_path):
    changes = {
        "audio__layers": "sum_of_last_four",
        "audio__frames_per_token": 5,
        "vision__token": "mean_of_patches",
        "dtype": "float16",
    }
    run(encoders, clips, tmp_path / "data", changes=changes)
    found, plain = features(tmp_path / "data"), features(extracted[1])
    wav2vec2 = transformers.Wav2Vec2Model.from_pretrained(encoders.source["audio"]).eval()
    vit = transformers.ViTModel.from_pretrained(encoders.source["vision"]).eval()
    sounds = transformers.Wav2Vec2FeatureExtractor.from_pretrained(encoders.source["audio"])
    images = transformers.ViTImageProcessorPil.from_pretrained(encoders.source["vision"])
    path = clips.parent / "3.mp4"
    with torch.no_grad():
        samples = sounds(decode_audio(path, Span(), RATE), sampling_rate=RATE, return_tensors="pt")["input_values"]
        layers = wav2vec2(samples, output_hidden_states=True).hidden_states
        frames = torch.stack(layers[-4:]).sum(dim=0)[0].numpy()
        pixels = images([frame for _, frame in decode_frames(path, Span(), 5.0, 16)], return_tensors="pt")
        patches = vit(**pixels).last_hidden_state[:, 1:].mean(dim=1).numpy()
    expected = np.stack([frames[start : start + 5].mean(axis=0) for start in range(0, len(frames), 5)])
    np.testing.assert_allclose(found["audio"]["clip3"], expected, atol=4e-3)
    np.testing.assert_allclose(found["vision"]["clip3"], patches, atol=2e-3)
    np.testing.assert_allclose(found["text"]["clip3"], plain["text"]["clip3"], atol=2e-3)


class _Killed(Exception):
    """Stands for kill -9: nothing is tidied up."""


def test_interrupted_run_redoes_at_most_a_shard_and_ends_bit_equal(encoders, clips, extracted, tmp_path):
    output = tmp_path / "data"
    written = []

    def kill_after_two(line):
        if "clips," in line:
            written.append(line.split(":")[0])
            if len(written) == 2:
                raise _Killed

    with pytest.raises(_Killed):
        run(encoders, clips, output, report=kill_after_two)
    with pytest.raises(InputError, match="not a data set"):
        Dataset.open(output)
    lines = []
    run(encoders, clips, output, report=lines.append)
    assert lines[0].startswith("process 0 of 1: 3 of 5 shards to do")
    assert files(output) == files(extracted[1])


def test_two_processes_make_the_same_files_and_the_last_completes_them(encoders, clips, extracted, tmp_path):
    output = tmp_path / "data"
    assert run(encoders, clips, output, share=ProcessShare(1, 2)) is None
    assert not (output / "manifest.json").exists()
    counts = run(encoders, clips, output, share=ProcessShare(0, 2))
    assert counts == extracted[0]
    assert files(output) == files(extracted[1])
    assert run(encoders, clips, output) == counts


def test_folder_of_another_extraction_is_refused_by_the_key_that_differs(encoders, clips, extracted, tmp_path):
    with pytest.raises(InputError, match=r"config\.vision\.max_frames \(16 there, 4 now\)"):
        run(encoders, clips, extracted[1], changes={"vision__max_frames": 4})
    rows = read_rows(clips)
    with pytest.raises(InputError, match="clips_sha256"):
        run(encoders, write_list(clips.parent / "fewer.csv", rows[:-1]), extracted[1])
    other = tmp_path / "other"
    other.mkdir()
    (other / "file").touch()
    with pytest.raises(InputError, match="is no folder of an extraction"):
        run(encoders, clips, other)


@pytest.fixture(scope="module")
def odd_clips(clips):
    """One good clip, and one of each kind of trouble."""
    folder = clips.parent
    (folder / "text.mp4").write_text("no video")
    (folder / "nothing.mp4").touch()
    whole = (folder / "5.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    soundfile.write(folder / "short.wav", np.zeros(160), RATE)
    soundfile.write(folder / "sound.wav", made_media.tone(1.0, RATE), RATE)
    made_media.write_video(folder / "silent.mp4")
    outside = folder.parent / "outside.mp4"
    outside.write_bytes(whole)
    (folder / "link.mp4").symlink_to(outside)
    word = {"text": "a word"}
    rows = [
        {"id": "good", "path": "0.mp4", **word},
        {"id": "missing", "path": "none.mp4", **word},
        {"id": "text", "path": "text.mp4", **word},
        {"id": "nothing", "path": "nothing.mp4", **word},
        {"id": "cut", "path": "cut.mp4", **word},
        {"id": "no_audio", "path": "silent.mp4", **word},
        {"id": "no_video", "path": "sound.wav", **word},
        {"id": "too_short", "path": "0.mp4", "audio_path": "short.wav", **word},
        {"id": "ends_early", "path": "0.mp4", "start_seconds": 0.1, "end_seconds": 2.9, **word},
        {"id": "too_long", "path": "0.mp4", "end_seconds": 100, **word},
        {"id": "empty", "path": "0.mp4", "start_seconds": 50, **word},
        {"id": "no_text", "path": "0.mp4", "text": "  "},
        {"id": "link", "path": "link.mp4", **word},
        {"id": "climbs", "path": "../outside.mp4", **word},
        {"id": "optional", "path": "silent.mp4", "optional": "audio|text"},
    ]
    return write_list(folder / "odd.csv", [{"emotion": "", **row} for row in rows])


def test_bad_clips_go_into_quarantine_with_stage_and_reason_and_the_run_goes_on(encoders, odd_clips, tmp_path):
    output = tmp_path / "data"
    options = {"root": odd_clips.parent, "max_bad_fraction": 1.0}
    counts = run(encoders, odd_clips, output, **options)
    lines = [json.loads(line) for line in (output / "quarantine.jsonl").read_text().splitlines()]
    assert {line["id"]: (line["stage"], line["reason"]) for line in lines} == {
        "missing": ("audio", "missing"),
        "text": ("audio", "unreadable"),
        "nothing": ("audio", "unreadable"),
        "cut": ("audio", "unreadable"),
        "no_audio": ("audio", "no_audio"),
        "no_video": ("video", "no_video"),
        "too_short": ("audio", "too_short"),
        "ends_early": ("audio", "ends_early"),
        "too_long": ("audio", "too_long"),
        "empty": ("audio", "empty"),
        "no_text": ("text", "no_text"),
        "link": ("list", "outside_root"),
        "climbs": ("list", "outside_root"),
    }
    assert counts["quarantined"]["outside_root"] == 2
    assert counts["audio_absent"] == counts["text_absent"] == 1
    found = Dataset.open(output, verify=True).split("all")
    assert found.ids(np.arange(2)) == ["good", "optional"]
    assert found.lengths("audio")[1] == found.lengths("text")[1] == 0 < found.lengths("vision")[1]


def test_too_many_bad_clips_fail_without_a_data_set_and_nothing_is_lost(encoders, odd_clips, tmp_path):
    output = tmp_path / "data"
    with pytest.raises(InputError, match=r"clips are quarantined, more than --max_bad_fraction=0\.1: missing 1 \("):
        run(encoders, odd_clips, output, root=odd_clips.parent, max_bad_fraction=0.1)
    with pytest.raises(InputError, match="not a data set"):
        Dataset.open(output)
    # Which they are is known before the run goes on.
    assert "missing" in {json.loads(line)["id"] for line in (output / "quarantine.jsonl").read_text().splitlines()}
    assert run(encoders, odd_clips, output, root=odd_clips.parent, max_bad_fraction=1.0)["clips"] == 15


def test_modalities_that_the_configuration_calls_optional_may_be_missing(encoders, odd_clips, tmp_path):
    changes = {"optional": ("vision", "audio", "text")}
    counts = run(encoders, odd_clips, tmp_path / "data", max_bad_fraction=1.0, changes=changes)
    assert set(counts["quarantined"]) == {"missing", "unreadable", "ends_early", "too_long", "empty"}


def test_frames_without_the_given_face_are_masked_marked_and_counted(encoders, clips, tmp_path):
    folder = clips.parent
    (folder / "boxes.csv").write_text(
        "time_seconds,left,top,width,height\n0.1,4,4,20,20\n0.1,30,30,8,8\n0.3,6,4,20,20\n0.7,8,4,20,20\n0.7,2,40,22,22\n"
    )
    rows = [{"id": "a", "path": "2.mp4", "boxes_path": "boxes.csv", "text": "a word", "emotion": "joy"}]
    changes = {"vision__faces": "given", "vision__face_margin": 0.0}
    counts = run(encoders, write_list(folder / "faces.csv", rows), tmp_path / "data", changes=changes)
    found = Dataset.open(tmp_path / "data").split("all")
    times = [time for time, _ in decode_frames(folder / "2.mp4", Span(), 5.0, 16)]
    assert np.round(times, 2).tolist() == [0.09, 0.28, 0.46, 0.64, 0.82, 1.01]
    # Known at .1, .3 and .7: half of the usual .3 seconds around each.
    assert found.column("extra_frames_without_face") == ["2 5"]
    assert counts["frames_without_face"] == 2
    assert found.lengths("vision").tolist() == [4]
    vit = transformers.ViTModel.from_pretrained(encoders.source["vision"]).eval()
    images = transformers.ViTImageProcessorPil.from_pretrained(encoders.source["vision"])
    frames = [frame for _, frame in decode_frames(folder / "2.mp4", Span(), 5.0, 16)]
    parts = [frames[0][4:24, 4:24], frames[3][4:24, 8:28]]
    with torch.no_grad():
        expected = vit(**images(parts, return_tensors="pt")).last_hidden_state[:, 0].numpy()
    tokens, _ = found.gather_tokens("vision", np.arange(1), 4)
    np.testing.assert_allclose(tokens[0][[0, 2]], expected, atol=1e-4)


def test_lists_in_tsv_and_parquet_are_read_as_csv(clips, tmp_path):
    import pandas

    table = pandas.read_csv(clips)
    table.to_csv(tmp_path / "clips.tsv", sep="\t", index=False)
    table.to_parquet(tmp_path / "clips.parquet")
    expected = read_clips(clips, SPECS)
    assert read_clips(tmp_path / "clips.tsv", SPECS) == read_clips(tmp_path / "clips.parquet", SPECS) == expected


CONTEXT_TEXTS = ("a happy word[SEP]the sad voice", "a happy word", "the voice and " * 9 + "[SEP]a sad word")


def test_states_behind_the_context_are_those_of_a_model_that_has_read_it(encoders, tmp_path):
    """Against Hugging Face's model on the whole text; the last one is too long, and loses the start of its context."""
    rows = [
        {"id": f"text{index}", "split": "train", "text": text, "emotion": "joy"}
        for index, text in enumerate(CONTEXT_TEXTS)
    ]
    clips = write_list(tmp_path / "clips.csv", rows)
    changes = {"modalities": ("text",), "text__stored": "after_context", "text__max_tokens": 20}
    counts = run(encoders, clips, tmp_path / "data", changes=changes)
    assert counts["texts_cut"] == 1
    found = features(tmp_path / "data")["text"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoders.source["text"], truncation_side="left")
    model = transformers.AutoModel.from_pretrained(encoders.source["text"]).eval()
    for index, (text, num_kept) in enumerate(zip(CONTEXT_TEXTS, (4, 5, 4), strict=True)):
        tokens = tokenizer(text, truncation=True, max_length=20, return_tensors="pt")
        with torch.no_grad():
            states = model(**tokens).last_hidden_state[0].numpy()
        assert len(found[f"text{index}"]) == num_kept
        np.testing.assert_allclose(found[f"text{index}"], states[-num_kept:], atol=1e-4)
    layer = Dataset.open(tmp_path / "data").spec.modalities["text"].producer.layer
    assert layer == "last, tokens behind the context"


def test_raw_media_without_context_are_refused(encoders, clips, tmp_path):
    with pytest.raises(InputError, match=r"config\.text\.stored = 'after_context': expected 'all' for raw media"):
        run(encoders, clips, tmp_path / "data", changes={"text__stored": "after_context"}, depth="raw")


def test_raw_depth_keeps_what_the_encoders_would_be_given(encoders, clips, tmp_path):
    output = tmp_path / "data"
    run(encoders, clips, output, depth="raw")
    states = features(output)
    modalities = Dataset.open(output).spec.modalities
    assert {name: (own.dtype, own.token_shape) for name, own in modalities.items()} == {
        "vision": ("uint8", (32, 32, 3)),
        "audio": ("int16", ()),
        "text": ("int32", ()),
    }
    images = transformers.ViTImageProcessorPil.from_pretrained(encoders.source["vision"], do_normalize=False)
    frames = [frame for _, frame in decode_frames(clips.parent / "4.mp4", Span(), 5.0, 16)]
    pixels = images(frames, return_tensors="np", do_rescale=False)["pixel_values"].transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(states["vision"]["clip4"].reshape(-1, 32, 32, 3), pixels)
    samples = decode_audio(clips.parent / "4.mp4", Span(), RATE)
    np.testing.assert_allclose(states["audio"]["clip4"][:, 0] / 32767, samples, atol=0.5 / 32767 + 1e-7)
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoders.source["text"])
    assert states["text"]["clip4"][:, 0].tolist() == tokenizer(TEXTS[0])["input_ids"]
    with pytest.raises(InputError, match=r"vision holds raw media \(uint8\)"):
        check(Dataset.open(output), parse(default.get_config().to_dict() | {"data": _splits(output)}))


def _splits(output):
    values = default.get_config().data
    values.path = str(output)
    return values.to_dict()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"id": "a", "emotion": "joy"}], "clip 'a': path, audio_path and text are empty"),
        ([{"path": "a.mp4", "emotion": "glad"}], "record 'a.mp4': emotion = 'glad': expected"),
        ([{"path": "a.mp4", "start_seconds": "2", "end_seconds": "1", "emotion": ""}], "from 2.0 to 1.0 s"),
        ([{"path": "a.mp4", "start_seconds": "soon", "emotion": ""}], "start_seconds = 'soon': expected a number"),
        ([{"path": "a.mp4", "optional": "smell", "emotion": ""}], "optional 'smell': expected some of"),
        ([{"path": "a.mp4", "emotion": ""}, {"path": "a.mp4", "emotion": ""}], "occurs twice in split 'all'"),
        ([{"path": "a.mp4"}], "no column 'emotion' for the label"),
    ],
)
def test_list_that_does_not_say_what_it_must_is_refused_by_clip(tmp_path, rows, message):
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        read_clips(write_list(tmp_path / "clips.csv", rows), SPECS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "a/b"}, r"clips\.csv: split 'a/b': expected letters, digits"),
        ({"split": "../up"}, r"clips\.csv: split '\.\./up': expected letters, digits"),
        ({"turn": 2**31}, "clip 'a': turn = 2147483648: expected 0 or more"),
        ({"turn": -1}, "clip 'a': turn = -1: expected 0 or more"),
    ],
)
def test_list_of_what_no_shard_can_hold_is_refused_before_anything_is_decoded(tmp_path, changes, message):
    rows = [{"id": "a", "path": "a.mp4", "emotion": "", **changes}]
    with pytest.raises(InputError, match=message):
        read_clips(write_list(tmp_path / "clips.csv", rows), SPECS)


def test_path_that_the_system_refuses_is_that_clips_fault_alone(encoders, clips, tmp_path):
    rows = [{"id": "long", "path": "a" * 5000, "text": "a"}, {"id": "good", "path": "0.mp4", "text": "a"}]
    given = write_list(clips.parent / "refused.csv", [{"emotion": "", **row} for row in rows])
    counts = run(encoders, given, tmp_path / "data", depth="raw", max_bad_fraction=0.5)
    assert counts["quarantined"] == {"unreadable": 1}
    (line,) = (tmp_path / "data" / "quarantine.jsonl").read_text().splitlines()
    assert (json.loads(line)["stage"], json.loads(line)["id"]) == ("open", "long")
