"""What is known of findings, repetitions, what splits share, histograms, and the report."""

import json

import numpy as np
import pytest

from mmei_jax.extraction.doctor_findings import (
    CHECKS,
    Examination,
    Finding,
    describe,
    find_repeats,
    find_shared,
    histogram,
    judge,
    list_not_found,
)
from mmei_jax.extraction.published_facts import read_published
from tests import made_up_lists


@pytest.fixture
def facts(tmp_path):
    known = [
        {"check": "duplicates_within", "where": "train", "value": 3, "note": "so it is"},
        {"check": "shared_episodes", "where": "train & test", "value": 1},
    ]
    bad = {"train_dia0_utt0": "corrupt"}
    rows = made_up_lists.meld_rows()
    path = made_up_lists.write_published(tmp_path / "p.json", rows, known_findings=known, known_bad_clips=bad)
    return read_published(path)


def test_a_finding_is_known_by_check_place_and_value(facts):
    same, other_value, other_place = judge(
        [
            Finding("duplicates_within", "train", 3),
            Finding("duplicates_within", "train", 4),
            Finding("duplicates_within", "test", 3),
        ],
        facts,
    )
    assert same.is_known
    assert not other_value.is_known
    assert other_value.expected == 3
    assert not other_place.is_known
    assert other_place.expected is None


def test_known_bad_clips_are_told_apart_from_others(facts):
    finding = Finding("corrupt_media", "train", 2, ("train_dia0_utt0", "train_dia0_utt1"))
    assert judge([finding], facts) == [
        Finding("corrupt_media", "train", 1, ("train_dia0_utt0",), is_known=True),
        Finding("corrupt_media", "train", 1, ("train_dia0_utt1",)),
    ]
    # Being bad media excuses nothing else.
    assert not judge([Finding("repeated_ids", "train", 1, ("train_dia0_utt0",))], facts)[0].is_known


def test_nothing_is_known_without_published_figures():
    finding = Finding("duplicates_within", "train", 3)
    assert judge([finding], None) == [finding]
    assert list_not_found([finding], None) == []


def test_known_findings_that_are_not_there_are_told(facts):
    assert list_not_found([Finding("duplicates_within", "train", 9)], facts) == ["shared_episodes, train & test"]


def test_repeats_are_counted_within_a_split_and_of_the_later_split_in_the_earlier():
    keys = {
        "train": [("a", 1), ("b", 2), ("c", 1), ("d", 1)],
        "dev": [("e", 2), ("f", 2), ("g", 9)],
        "test": [("h", 9), ("i", 1)],
    }
    assert find_repeats(keys, "within", "across", prefix="x: ") == [
        Finding("within", "x: train", 2, ("c", "d")),
        Finding("within", "x: dev", 1, ("f",)),
        Finding("across", "x: dev in train", 2, ("e", "f")),
        Finding("across", "x: test in train", 1, ("i",)),
        Finding("across", "x: test in dev", 1, ("h",)),
    ]
    assert [finding.check for finding in find_repeats(keys, "within", None)] == ["within", "within"]


def test_what_is_unknown_is_not_shared():
    values = {"train": ["a", None, "b"], "test": [None, "b", "c"]}
    assert find_shared(values, "shared_speakers") == [Finding("shared_speakers", "train & test", 1, ("b",))]


@pytest.mark.parametrize("values", [[0], [0.5], [1], [1, 2, 2.5, 4, 300], [0, 0, 1024, 1023.9]])
def test_histogram_counts_every_value_in_the_bin_of_its_lower_edge(values):
    found = histogram(np.array(values))
    assert sum(found["counts"]) == len(values)
    for low, high, count in zip(found["edges"], [*found["edges"][1:], np.inf], found["counts"], strict=True):
        assert count == sum(low <= value < high for value in values)
    assert found["counts"][-1] or max(values) < 1
    assert (found["min"], found["max"]) == (min(values), max(values))


def test_report_names_every_finding_and_json_holds_everything():
    examination = Examination("made/up", "meld", splits={"train": {"num_records": 1234}})
    examination.class_counts = {"emotion": {"train": {"joy": 7}}}
    examination.histograms = {"seconds": {"train": histogram(np.array([1.0, 3.0]))}}
    ids = tuple(f"id{number}" for number in range(20))
    examination.findings = [
        Finding("num_records", "train", 1234, expected=1230),
        Finding("duplicates_within", "train", 20, ids, expected=20, is_known=True),
    ]
    examination.not_checked = ["media: nobody asked"]
    text = describe(examination)
    for part in ("1,234", "joy", "train: 1234 (expected 1230)", "train: 20: id0,", "NOT KNOWN: 1", "media: nobody"):
        assert part in text
    assert "id19" not in text
    values = json.loads(json.dumps(examination.to_json(), allow_nan=False))
    assert values["num_unexpected"] == 1
    assert values["findings"][1]["ids"] == list(ids)


def test_every_check_is_explained():
    assert all(meaning and not meaning.endswith(".") for meaning in CHECKS.values())
