"""Shards as the doctor sees them: features, labels, what splits share, damage."""

import numpy as np
import pyarrow as pa
import pytest

from mmei_jax.extraction.doctor import examine
from mmei_jax.extraction.doctor_findings import Finding
from mmei_jax.extraction.published_facts import read_published
from mmei_jax.records import DatasetSpec, DatasetWriter, LabelSpec, ModalitySpec, Record
from tests import made_up_lists

NUM_RECORDS = {"train": 30, "test": 10}


def records(split):
    generator = np.random.default_rng(len(split))
    for number in range(NUM_RECORDS[split]):
        features = {
            "text": generator.normal(size=(1 + number % 5, 4)).astype(np.float32),
            "audio": generator.normal(size=(3, 2)).astype(np.float32) if number % 4 else None,
        }
        labels = {"emotion": number % 7, "score": 0.5}
        extras = {"episode": f"{split}{number // 5}"}
        user = f"{split}-user{number % 3}"
        yield Record(f"{split}{number}", user, f"{split}{number // 5}", number % 5, features, labels, extras=extras)


def write(path, change=lambda split, found: None, class_names=made_up_lists.EMOTIONS):
    labels = {"emotion": LabelSpec("categorical", class_names), "score": LabelSpec("real")}
    modalities = {"text": ModalitySpec(4, "float32"), "audio": ModalitySpec(2, "float32")}
    spec = DatasetSpec("made", "", "", "", modalities, labels, extras={"episode": "string"})
    with DatasetWriter(path, spec, records_per_shard=12) as writer:
        for split in NUM_RECORDS:
            found = list(records(split))
            change(split, found)
            for record in found:
                writer.write(split, record)
    return path


def test_sound_shards_have_no_findings_and_are_measured(tmp_path):
    examination = examine(write(tmp_path / "data"))
    assert examination.findings == []
    assert examination.splits == {
        "test": {"num_records": 10, "num_audio": 7, "num_text": 10},
        "train": {"num_records": 30, "num_audio": 22, "num_text": 30},
    }
    assert examination.class_counts["emotion"]["train"] == dict(
        zip(made_up_lists.EMOTIONS, [5, 5] + [4] * 5, strict=True)
    )
    assert examination.histograms["text tokens"]["train"]["counts"] == [0, 6, 12, 12]


def test_constant_features_are_named(tmp_path):
    def change(split, found):
        for record in found:
            record.features["text"][:, [1, 3]] = 7

    findings = examine(write(tmp_path / "data", change)).findings
    assert findings == [Finding("constant_features", "text", [1, 3])]


def test_shared_users_dialogues_episodes_and_features_are_found(tmp_path):
    def change(split, found):
        if split == "test":
            twin = next(records("train"))
            found[0].user_id, found[0].dialogue_id, found[0].extras = twin.user_id, twin.dialogue_id, twin.extras
            found[0].features["text"] = twin.features["text"]
            found[3].features["text"] = found[2].features["text"]

    facts = read_published(made_up_lists.write_published(tmp_path / "p.json", made_up_lists.meld_rows()))
    findings = examine(write(tmp_path / "data", change), facts).findings
    assert {(finding.check, finding.where): finding.ids for finding in findings if "shared" in finding.check} == {
        ("shared_speakers", "train & test"): ("train-user0",),
        ("shared_episodes", "train & test"): ("train0",),
        ("shared_dialogues", "train & test"): ("train0",),
    }
    assert {(finding.check, finding.where): finding.ids for finding in findings if "identical" in finding.check} == {
        ("identical_features_within", "text: test"): ("test3",),
        ("identical_features_across", "text: test in train"): ("test0",),
    }


def test_label_order_is_compared_with_the_published_one(tmp_path):
    names = list(made_up_lists.EMOTIONS)
    names[1], names[2] = names[2], names[1]
    facts = read_published(made_up_lists.write_published(tmp_path / "p.json", made_up_lists.meld_rows()))
    findings = examine(write(tmp_path / "data", class_names=tuple(names)), facts).findings
    expected = list(made_up_lists.EMOTIONS)
    assert Finding("class_names", "emotion", names, expected=expected) in findings


def corrupt(path, poison):
    """Writes other features into a shard, and its new hash into nothing."""
    file = path / "train-00001.arrow"
    with pa.memory_map(str(file)) as source:
        table = pa.ipc.open_file(source).read_all()
    content = file.read_bytes()
    value = table.column("text").chunk(0).values.values.to_numpy()[5]
    position = content.index(np.float32(value).tobytes())
    file.write_bytes(content[:position] + np.float32(poison).tobytes() + content[position + 4 :])


@pytest.mark.parametrize("poison", [-np.inf, np.nan, 0.25])
def test_damaged_shards_and_values_that_are_not_finite_are_found(tmp_path, poison):
    path = write(tmp_path / "data")
    corrupt(path, poison)
    findings = examine(path).findings
    assert findings[0] == Finding("damaged_shard", "train-00001.arrow", 12)
    bad = [Finding("non_finite_features", "train/text", 1, ("train12",))]
    assert findings[1:] == ([] if np.isfinite(poison) else bad)
