"""MMSA's feature files to shards: values, lengths, folds, labels, and one clear line for every wrong file."""

import os
import pickle

import numpy as np
import pytest

from mmei_jax.extraction import import_mosei
from mmei_jax.extraction.doctor import examine
from mmei_jax.records import Dataset
from mmei_jax.types import InputError

NUM_RECORDS = {"train": 300, "valid": 7, "test": 9}
DIMS = {"text": 6, "audio": 4, "vision": 3}


def fold(split, is_aligned):
    """Records as MMSA stores them: padding behind, clips of videos, float64."""
    generator = np.random.default_rng(len(split))
    num_records = NUM_RECORDS[split]
    num_tokens = {"text": 8, "audio": 8 if is_aligned else 20, "vision": 8 if is_aligned else 15}
    values = {
        "raw_text": np.array([f"{split} says {number}" for number in range(num_records)], object),
        "id": [f"{split}{number // 4}$_${number % 4}" for number in range(num_records)],
        "regression_labels": np.round(generator.uniform(-3, 3, num_records), 3).astype(np.float32),
    }
    values["regression_labels"][0] = 0
    names = np.array(["Negative", "Neutral", "Positive"])
    values["classification_labels"] = np.sign(values["regression_labels"]) + 1
    values["annotations"] = names[values["classification_labels"].astype(int)]
    lengths = {name: generator.integers(2, size + 1, num_records) for name, size in num_tokens.items()}
    if is_aligned:
        lengths = dict.fromkeys(lengths, lengths["text"])
    else:
        values["audio_lengths"] = lengths["audio"].tolist()
        values["vision_lengths"] = lengths["vision"].tolist()
    for name, size in num_tokens.items():
        values[name] = generator.normal(size=(num_records, size, DIMS[name]))
        values[name][np.arange(size) >= lengths[name][:, None]] = 0
    values["text_bert"] = np.zeros((num_records, 3, 8), np.int64)
    values["text_bert"][:, 1] = np.arange(8) < lengths["text"][:, None]
    return values, lengths


def make(is_aligned=True):
    """The file's content, and the true lengths by split."""
    found = {split: fold(split, is_aligned) for split in NUM_RECORDS}
    return {split: values for split, (values, _) in found.items()}, {split: pair[1] for split, pair in found.items()}


def run(tmp_path, content, *flags):
    path = tmp_path / "aligned_50.pkl"
    path.write_bytes(pickle.dumps(content, 4))
    assert import_mosei.main([f"--input={path}", f"--output={tmp_path / 'out'}", *flags]) == 0
    return Dataset.open(tmp_path / "out", verify=True)


def refuse(tmp_path, capsys, content, *flags):
    path = tmp_path / "aligned_50.pkl"
    path.write_bytes(pickle.dumps(content, 4))
    capsys.readouterr()
    assert import_mosei.main([f"--input={path}", f"--output={tmp_path / 'out'}", *flags]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == [path]
    return captured.err


@pytest.mark.parametrize("is_aligned", [True, False])
def test_records_are_read_back_with_the_tokens_that_the_file_says_are_valid(tmp_path, is_aligned):
    content, lengths = make(is_aligned)
    dataset = run(tmp_path, content)
    assert set(dataset.split_names) == set(NUM_RECORDS)
    for name, num_records in NUM_RECORDS.items():
        split, values = dataset.split(name), content[name]
        indices = np.arange(num_records)
        assert split.ids(indices) == values["id"]
        for modality, dim in DIMS.items():
            np.testing.assert_array_equal(split.lengths(modality), lengths[name][modality])
            tokens, _ = split.gather_tokens(modality, indices, values[modality].shape[1])
            assert tokens.shape[2] == dim
            np.testing.assert_array_equal(tokens, values[modality].astype(np.float32))
        sentiment, is_labelled = split.gather_label("sentiment", indices)
        assert is_labelled.all()
        np.testing.assert_array_equal(sentiment, values["regression_labels"])
        assert split.column("extra_transcript") == values["raw_text"].tolist()
        assert split.column("user_id") == [record_id.split("$_$")[0] for record_id in values["id"]]
        np.testing.assert_array_equal(split.column("turn"), indices % 4)
    source = "attention mask of text_bert"
    expected = {"vision": source, "audio": source, "text": source}
    if not is_aligned:
        expected |= {"vision": "vision_lengths", "audio": "audio_lengths"}
    assert dataset.manifest["counts"]["lengths_from"]["train"] == expected
    assert "emotions" not in dataset.spec.labels


def test_lengths_without_any_word_of_the_file_end_at_the_last_token_that_is_not_zero(tmp_path):
    content, lengths = make()
    for values in content.values():
        del values["text_bert"]
    # A zero token inside stays; a modality of nothing but zeros is absent.
    content["test"]["audio"][2, 0] = 0
    content["test"]["vision"][3] = 0
    split = run(tmp_path, content).split("test")
    np.testing.assert_array_equal(split.lengths("audio"), lengths["test"]["audio"])
    expected = np.where(np.arange(9) == 3, 0, lengths["test"]["vision"])
    np.testing.assert_array_equal(split.lengths("vision"), expected)


def test_emotions_are_present_where_their_intensity_is_above_zero(tmp_path):
    content, _ = make()
    for values in content.values():
        values["emotion_labels"] = np.tile([0, 1 / 3, 3, 0, 0, 2 / 3], (len(values["id"]), 1))
    content["test"]["emotion_labels"][1] = np.nan
    dataset = run(tmp_path, content)
    assert dataset.spec.labels["emotions"].class_names == (
        "happiness",
        "sadness",
        "anger",
        "surprise",
        "disgust",
        "fear",
    )
    rows, is_labelled = dataset.split("test").gather_label("emotions", np.arange(9))
    np.testing.assert_array_equal(is_labelled, np.arange(9) != 1)
    np.testing.assert_array_equal(rows[0], [0, 1, 1, 0, 0, 1])


def test_infinite_audio_is_refused_and_counted_or_zeroed_and_counted(tmp_path, capsys):
    content, lengths = make()
    content["train"]["audio"][5, 1, 2] = -np.inf
    content["train"]["audio"][280, 0, :2] = np.nan
    # What padding holds is not read.
    content["valid"]["audio"][0, lengths["valid"]["audio"][0] :] = np.inf
    error = refuse(tmp_path, capsys, content)
    assert "audio: 3 values in 2 records (train1$_$1, train70$_$0); --non_finite=zero" in error
    dataset = run(tmp_path, content, "--non_finite=zero")
    assert dataset.manifest["counts"]["non_finite_values_set_to_zero"] == {
        "vision": {"num_values": 0, "num_records": 0},
        "audio": {"num_values": 3, "num_records": 2},
        "text": {"num_values": 0, "num_records": 0},
    }
    tokens, _ = dataset.split("train").gather_tokens("audio", np.array([5, 280]), 8)
    assert tokens[0, 1, 2] == 0
    np.testing.assert_array_equal(tokens[1, 0, :2], 0)
    assert tokens[0, 1, 1] == np.float32(content["train"]["audio"][5, 1, 1])


def test_annotations_that_contradict_the_sentiment_are_counted(tmp_path):
    content, _ = make()
    content["valid"]["annotations"][0] = "Positive"
    counts = run(tmp_path, content).manifest["counts"]["annotations_that_differ_from_the_sign_of_the_sentiment"]
    assert counts == {"train": 0, "valid": 1, "test": 0}


class Evil:
    def __reduce__(self):
        return os.system, ("true",)


def change(content, split, key, value):
    if value is None:
        del content[split][key]
    else:
        content[split][key] = value
    return content


@pytest.mark.parametrize(
    ("split", "key", "value", "message"),
    [
        ("train", "note", Evil(), "it names .*system, which is not allowed"),
        ("test", "regression_labels", None, "split 'test': no key 'regression_labels'"),
        ("test", "regression_labels", np.full(9, 3.5), "record 'test0$_$0': regression_labels = 3.5: expected"),
        ("test", "regression_labels", np.full(9, np.nan), "regression_labels = nan"),
        ("test", "regression_labels", np.zeros(8), "has 8 records: expected 9"),
        ("test", "audio", np.zeros((9, 8, 5)), "features per token are .*'audio': 5.* in 'test'"),
        ("test", "audio", None, "features per token are"),
        ("test", "audio", np.zeros((9, 8)), "expected numbers .records, tokens, dim"),
        (
            "test",
            "audio_lengths",
            [9] * 9,
            "record 'test0$_$0': audio_lengths = 9: expected a number of tokens in .0, 8",
        ),
        ("test", "audio_lengths", [0.5] * 9, "audio_lengths = 0.5"),
        ("test", "text_bert", np.eye(9)[:, None, :8].repeat(3, 1).astype(int), "padding before tokens"),
        ("test", "id", list(range(9)), "key 'id': expected one text per record"),
        ("test", "id", ["a$_$1"] * 9, "occurs twice"),
        ("test", "raw_text", [["a"], ["b", "c"]], "key 'raw_text'"),
        ("train", "emotion_labels", np.zeros((300, 6)), "split 'valid': no key 'emotion_labels'"),
    ],
)
def test_wrong_files_are_told_in_one_line(tmp_path, capsys, split, key, value, message):
    content, _ = make()
    error = refuse(tmp_path, capsys, change(content, split, key, value))
    with pytest.raises(InputError, match=message.replace("$", r"\$")):
        raise InputError(error)


def test_what_is_no_dict_of_splits_is_told_in_one_line(tmp_path, capsys):
    assert "expected a dict of dicts, train, valid, test" in refuse(tmp_path, capsys, [1, 2])
    assert "holds ['train']" in refuse(tmp_path, capsys, {"train": {}})
    content, _ = make()
    for name in DIMS:
        del content["train"][name]
    assert "split 'train': no features" in refuse(tmp_path, capsys, content)


def test_doctor_finds_nothing_in_clean_shards_but_shared_videos_and_texts(tmp_path):
    content, _ = make()
    content["test"]["id"][0] = "train3$_$9"
    content["test"]["raw_text"][0] = content["train"]["raw_text"][12].upper()
    run(tmp_path, content)
    findings = examine(tmp_path / "out").findings
    assert {(finding.check, finding.where) for finding in findings} == {
        ("shared_speakers", "train & test"),
        ("shared_dialogues", "train & test"),
        ("duplicates_across", "test in train"),
    }
