"""AIGC-INT-Sim as a data set on disk: bytes, splits, reference figures, refusals."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from mmei_jax import records
from mmei_jax.simulation import (
    aigc_int,
    aigc_int_dataset,
    aigc_int_report,
)
from mmei_jax.types import InputError


def share(is_true: np.ndarray) -> float:
    return float(np.mean(is_true))


def generate(output: Path, *flags: str) -> int:
    return aigc_int_dataset.main([f"--output={output}", "--num_records=1500", "--dim=16", "--seed=4", *flags])


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def by_record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("simulated") / "by_record"
    assert generate(path) == 0
    return path


def test_same_seed_gives_the_same_bytes(by_record: Path, tmp_path: Path) -> None:
    assert generate(tmp_path / "again") == 0
    assert hashes(tmp_path / "again") == hashes(by_record)
    assert generate(tmp_path / "other", "--seed=5") == 0
    assert hashes(tmp_path / "other")["train-00000.arrow"] != hashes(by_record)["train-00000.arrow"]


def test_data_set_holds_what_was_drawn(by_record: Path) -> None:
    dataset = records.Dataset.open(by_record, verify=True)
    assert "simulated" in dataset.spec.name.lower()
    assert "simulated" in dataset.spec.description.lower()
    assert dataset.spec.labels["emotion"].class_names == aigc_int.EMOTIONS
    assert dataset.spec.labels["intent"].class_names == aigc_int.INTENTS
    drawn = list(aigc_int.stream(4, 1500, 16))
    seen = []
    for name in ("train", "validation", "test"):
        split = dataset.split(name)
        rows = np.arange(split.num_records)
        numbers = np.array([int(identifier.rsplit("-", 1)[1]) for identifier in split.ids(rows)])
        seen.append(numbers)
        chunk_of, row_of = numbers // 1000, numbers % 1000
        emotion, is_labelled = split.gather_label("emotion", rows)
        assert is_labelled.all()
        np.testing.assert_array_equal(
            emotion, [drawn[c].latents.emotion[r] for c, r in zip(chunk_of, row_of, strict=True)]
        )
        np.testing.assert_array_equal(
            split.column("extra_manner"), [drawn[c].latents.manner[r] for c, r in zip(chunk_of, row_of, strict=True)]
        )
        values, lengths = split.gather_tokens("audio", rows, 50)
        for row in range(0, split.num_records, 20):
            tokens = drawn[chunk_of[row]].tokens["audio"]
            length = max(int(tokens.lengths[row_of[row]]), 0)
            start = int(np.maximum(tokens.lengths[: row_of[row]], 0).sum())
            assert lengths[row] == length
            np.testing.assert_array_equal(values[row, :length], tokens.values[start : start + length])
        assert (split.gather_list("slate_item_index", rows, 8, -1) >= 0).all()
        assert (split.gather_list("relevant_items", rows, 20, -1) >= 0).all()
    np.testing.assert_array_equal(np.sort(np.concatenate(seen)), np.arange(1500))
    assert [len(numbers) for numbers in seen] == [1050, 225, 225]
    catalogue = dataset.catalogue()
    assert catalogue is not None
    assert len(catalogue.ids) == 2000
    assert catalogue.kind_names == aigc_int.KINDS


def test_reference_figures_are_those_of_the_splits_records(by_record: Path) -> None:
    dataset = records.Dataset.open(by_record)
    totals = {name: aigc_int_report.ReferenceTotals() for name in ("train", "validation", "test")}
    for chunk in aigc_int.stream(4, 1500, 16):
        predictions = aigc_int_report.predict(chunk)
        for name, is_member in aigc_int_dataset.split_membership(chunk.latents, "record").items():
            totals[name].add(predictions, is_member)
    for name, expected in totals.items():
        found = dataset.reference(name)
        assert found == pytest.approx(expected.named_figures(), abs=1e-12)
        for task in ("emotion", "intent", "joint"):
            for metric in ("accuracy", "macro_precision", "macro_recall", "cross_entropy"):
                for suffix in ("", "[text]", "[vision]", "[audio]", "[vision+text]", "[late_fusion]", "[conflict]"):
                    assert f"{task}/{metric}{suffix}" in found
        for metric in ("map", "ndcg@10", "hr@10"):
            assert {f"ranking/{metric}", f"ranking/{metric}[true_latents]"} <= found.keys()
        # A single modality is judged where it is present; the same on every record is worse.
        assert found["emotion/accuracy[vision, every record]"] < found["emotion/accuracy[vision]"]


def test_no_user_is_in_two_splits(tmp_path: Path) -> None:
    assert generate(tmp_path / "by_user", "--split_by=user") == 0
    dataset = records.Dataset.open(tmp_path / "by_user")
    users = {name: set(dataset.split(name).column("user_id")) for name in ("train", "validation", "test")}
    assert all(users.values())
    assert not users["train"] & users["validation"]
    assert not users["train"] & users["test"]
    assert not users["validation"] & users["test"]
    sizes = [dataset.split(name).num_records / 1500 for name in users]
    np.testing.assert_allclose(sizes, [0.7, 0.15, 0.15], atol=0.05)


def test_content_kinds_of_test_are_unseen_in_training(tmp_path: Path) -> None:
    assert generate(tmp_path / "by_kind", "--split_by=content_kind", "--dtype=float16") == 0
    dataset = records.Dataset.open(tmp_path / "by_kind")
    assert dataset.spec.modalities["text"].dtype == "float16"
    kind_of_item = dataset.catalogue().kind
    expected = {"train": {0, 1}, "validation": {2}, "test": {3}}
    for name, kinds in expected.items():
        split = dataset.split(name)
        assert set(np.asarray(split.column("extra_content_kind"))) == kinds
        shown = split.gather_list("slate_item_index", np.arange(split.num_records), 8, -1)
        assert set(kind_of_item[shown].ravel()) == kinds
    sizes = [dataset.split(name).num_records / 1500 for name in expected]
    np.testing.assert_allclose(sizes, [0.7, 0.15, 0.15], atol=0.05)


def test_splits_of_exact_sizes_follow_one_another_and_keep_their_records(tmp_path: Path) -> None:
    def numbers(folder: Path, split: str) -> list[int]:
        opened = records.Dataset.open(folder).split(split)
        return [int(name.rsplit("-", 1)[1]) for name in opened.ids(np.arange(opened.num_records))]

    arguments = ["--dim=16", "--seed=4"]
    few, more = tmp_path / "few", tmp_path / "more"
    assert aigc_int_dataset.main([f"--output={few}", *arguments, "--split_sizes=test=5,train_a=998"]) == 0
    assert aigc_int_dataset.main([f"--output={more}", *arguments, "--split_sizes=test=5,train_a=998,train_b=40"]) == 0
    assert numbers(more, "test") == list(range(5))
    assert numbers(more, "train_a") == list(range(5, 1003))
    assert numbers(more, "train_b") == list(range(1003, 1043))
    before, after = records.Dataset.open(few), records.Dataset.open(more)
    for split in ("test", "train_a"):
        assert before.manifest["splits"][split] == after.manifest["splits"][split]
        totals = aigc_int_report.ReferenceTotals()
        for chunk in aigc_int.stream(4, 1003, 16):
            is_member = np.isin(chunk.first_record + np.arange(len(chunk.latents.emotion)), numbers(more, split))
            totals.add(aigc_int_report.predict(chunk), is_member)
        assert after.reference(split) == pytest.approx(totals.named_figures(), abs=1e-12)
    joined = after.split("train_a", "train_b")
    assert joined.num_records == 1038
    assert after.manifest["counts"]["simulation"]["num_records"] == 1043


def test_splits_by_user_and_record_are_even() -> None:
    by_user = []
    for chunk in range(20):
        latents = aigc_int.draw_latents(7, chunk)
        sizes = [share(rows) for rows in aigc_int_dataset.split_membership(latents, "record").values()]
        np.testing.assert_allclose(sizes, [0.7, 0.15, 0.15], atol=1e-12)
        for start in range(0, 200, 20):
            assert sorted(latents.split_draw[start : start + 20]) == list(range(20))
        by_user.append([share(rows) for rows in aigc_int_dataset.split_membership(latents, "user").values()])
    np.testing.assert_allclose(np.mean(by_user, axis=0), [0.7, 0.15, 0.15], atol=0.015)
    with pytest.raises(InputError, match="split_by = 'week'"):
        aigc_int_dataset.split_membership(latents, "week")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_records=0"], "num_records = 0: expected at least 1"),
        (["--num_records=3"], "leaves split"),
        (["--dim=8"], "dim = 8: expected at least 14"),
        (["--seed=-2"], "seed = -2"),
        (["--split_sizes=test=5"], "--split_sizes: expected without --num_records and --split_by"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(tmp_path / "bad", *flags) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("sizes", ["train", "train=", "train=0", "train=-5", "train=2.5", "train=5,train=6", "a b=3"])
def test_bad_split_sizes_are_one_line_and_leave_nothing(
    sizes: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert aigc_int_dataset.main([f"--output={tmp_path / 'bad'}", "--dim=16", f"--split_sizes={sizes}"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert repr(sizes.split("=")[0]) in captured.err or repr(sizes.rsplit(",", 1)[-1]) in captured.err
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_existing_output_is_refused_unless_asked(
    by_record: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = hashes(by_record)
    assert generate(by_record, "--seed=6") == 2
    assert str(by_record) in capsys.readouterr().err
    assert hashes(by_record) == before
    assert generate(tmp_path / "mine") == 0
    assert generate(tmp_path / "mine", "--seed=6", "--overwrite") == 0
    assert hashes(tmp_path / "mine") != before


def test_unwritable_output_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("not a folder")
    assert generate(tmp_path / "file" / "data") == 2
    assert capsys.readouterr().err.startswith("error: ")
