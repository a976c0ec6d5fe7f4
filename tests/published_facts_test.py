"""Published figures: those of the project are sound, and wrong files are told in one line."""

import json
from pathlib import Path

import pytest

from mmei_jax.extraction.published_facts import read_published
from mmei_jax.types import InputError
from tests import made_up_lists

DATA = Path(__file__).parents[1] / "data"
TABLES = sorted([*DATA.glob("*/published.json"), *DATA.glob("*/episode_split.json")])


def test_the_project_has_tables():
    assert {path.parent.name for path in TABLES} >= {"meld"}


@pytest.mark.parametrize("path", TABLES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_tables_of_the_project_add_up(path):
    facts = read_published(path)
    for split in facts.splits.values():
        for label, counts in split.class_counts.items():
            assert len(counts) == len(facts.labels[label].class_names)
            assert sum(counts) == split.num_records or facts.labels[label].kind == "multi_label"


def test_meld_has_the_published_figures():
    facts = read_published(DATA / "meld")
    assert {name: split.num_records for name, split in facts.splits.items()} == {
        "train": 9989,
        "dev": 1109,
        "test": 2610,
    }
    assert facts.labels["emotion"].class_names == made_up_lists.EMOTIONS
    assert facts.splits["train"].class_counts["emotion"] == (4710, 1743, 1205, 1109, 683, 271, 268)
    assert facts.splits["test"].class_counts["emotion"] == (1256, 402, 281, 345, 208, 68, 50)
    assert facts.known_findings["duplicates_across", "test in train"] == 205
    assert facts.known_findings["shared_episodes", "train & test"] == 142
    assert {"train_dia125_utt3", "dev_dia110_utt7", "test_dia38_utt4", "test_dia220_utt0"} <= set(facts.known_bad_clips)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values.pop("splits"), "keys name, source, format, labels: expected format, labels"),
        (lambda values: values.update(more=1), "keys .*more: expected"),
        (lambda values: values["splits"]["dev"]["class_counts"]["emotion"].pop(), "split 'dev': class_counts of 'emot"),
        (lambda values: values["splits"]["dev"].pop("num_records"), "KeyError: 'num_records'"),
        (lambda values: values["labels"]["emotion"].update(kind="vague"), "label 'emotion': kind 'vague'"),
        (lambda values: values.update(splits=[1]), "not of the form expected"),
    ],
)
def test_wrong_tables_are_told_in_one_line(tmp_path, change, message):
    path = made_up_lists.write_published(tmp_path / "published.json", made_up_lists.meld_rows())
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(InputError, match=message):
        read_published(path)


def test_missing_and_unreadable_tables_are_told_in_one_line(tmp_path):
    with pytest.raises(InputError, match=r"published\.json: no such file"):
        read_published(tmp_path)
    path = tmp_path / "published.json"
    path.write_text("{")
    with pytest.raises(InputError, match="not a JSON file"):
        read_published(tmp_path)
    path.write_text("[1]")
    with pytest.raises(InputError, match="keys list"):
        read_published(tmp_path)
