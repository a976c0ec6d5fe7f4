"""Ready-made features to shards: values, splits, labels, and one clear line for every wrong input."""

import csv
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mmei_jax.extraction import import_features, splitting
from mmei_jax.records import Dataset, Producer
from mmei_jax.types import InputError

REPOSITORY = Path(__file__).parents[1]
SHARED_DATA = REPOSITORY.parent / "shared" / "data"
NUM_RECORDS = 40
EMOTIONS = "neutral,joy,anger"
COMMON = ["--source=made here", "--licence=CC0"]
LABELS = ["--labels=emotion", f"--class_names={EMOTIONS}"]
BY_SPEAKER = ["--group_key=speaker", "--num_folds=4"]


def make_arrays() -> dict[str, np.ndarray]:
    """40 records of 8 speakers: vision one token each, text up to 5 tokens and absent in record 3."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 6, NUM_RECORDS)
    lengths[3] = 0
    return {
        "id": np.array([f"clip{index}" for index in range(NUM_RECORDS)]),
        "speaker": np.arange(NUM_RECORDS) % 8 + 1,
        "dialogue": np.array([f"d{index // 5}" for index in range(NUM_RECORDS)]),
        "turn": np.arange(NUM_RECORDS) % 5,
        "emotion": generator.integers(0, 3, NUM_RECORDS),
        "mood": np.where(np.arange(NUM_RECORDS) == 1, np.nan, np.linspace(-1, 1, NUM_RECORDS)),
        "part": np.array(["train", "test"])[np.arange(NUM_RECORDS) % 8 // 6],
        "vision": generator.normal(size=(NUM_RECORDS, 3)).astype(np.float32),
        "text": generator.normal(size=(NUM_RECORDS, 5, 2)),
        "text_lengths": lengths,
    }


def write_npz(folder: Path, **changes: np.ndarray | None) -> Path:
    """The arrays as a file; a change of None leaves the key out."""
    arrays = {name: array for name, array in {**make_arrays(), **changes}.items() if array is not None}
    path = folder / "features.npz"
    np.savez(path, **arrays)
    return path


def write_folder(folder: Path) -> Path:
    """The same records as .npy files and a CSV with class names; record 5 has no emotion."""
    arrays = make_arrays()
    path = folder / "features"
    (path / "npy").mkdir(parents=True)
    names = EMOTIONS.split(",")
    with (path / "labels.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["id", "vision", "text", "emotion", "feelings", "mood", "speaker", "dialogue", "turn", "note"])
        for index in range(NUM_RECORDS):
            size = arrays["text_lengths"][index]
            np.save(path / "npy" / f"v{index}.npy", arrays["vision"][index])
            if size:
                np.save(path / "npy" / f"t{index}.npy", arrays["text"][index, :size])
            emotion = "" if index == 5 else names[arrays["emotion"][index]]
            feelings = ["", "none", "glad", "sad|glad"][index % 4]
            mood = "" if index == 1 else repr(float(arrays["mood"][index]))
            text = f"npy/t{index}.npy" if size else ""
            scalars = [arrays["speaker"][index], arrays["dialogue"][index], arrays["turn"][index], f"nöte, {index}"]
            writer.writerow([f"clip{index}", f"npy/v{index}.npy", text, emotion, feelings, mood, *scalars])
    return path


def run(source: Path, output: Path, *flags: str) -> Dataset:
    """Imports through the command, and opens what it made."""
    assert import_features.main([f"--input={source}", f"--output={output}", *COMMON, *flags]) == 0
    return Dataset.open(output, verify=True)


def refuse(capsys: pytest.CaptureFixture[str], source: Path, output: Path, *flags: str) -> str:
    """Runs the command, which must fail with one line and leave nothing; gives the line."""
    before = sorted(output.parent.iterdir())
    assert import_features.main([f"--input={source}", f"--output={output}", *COMMON, *flags]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert sorted(output.parent.iterdir()) == before
    return captured.err


def read_records(dataset: Dataset) -> dict[str, dict[str, object]]:
    """Features and labels by id."""
    split = dataset.split(*dataset.split_names)
    indices = np.arange(split.num_records)
    found: dict[str, dict[str, object]] = {record_id: {} for record_id in split.ids(indices)}
    for modality in dataset.spec.modalities:
        tokens, kept = split.gather_tokens(modality, indices, 5)
        for record, array, size in zip(found.values(), tokens, kept, strict=True):
            record[modality] = array[:size].tolist()
    for name in dataset.spec.labels:
        values, is_labelled = split.gather_label(name, indices)
        for record, value, is_known in zip(found.values(), values, is_labelled, strict=True):
            record[name] = value.tolist() if is_known else None
    for name in ("user_id", "dialogue_id", "turn", *(f"extra_{name}" for name in dataset.spec.extras)):
        for record, value in zip(found.values(), split.column(name), strict=True):
            record[name] = value
    return found


def test_npz_records_are_read_back_as_they_are(tmp_path: Path) -> None:
    flags = ["--user_key=speaker", "--dialogue_key=dialogue", "--turn_key=turn"]
    labels = ["--labels=feeling=emotion:categorical,mood:real", f"--class_names=feeling={EMOTIONS}"]
    dataset = run(write_npz(tmp_path), tmp_path / "out", *flags, *labels, *BY_SPEAKER, "--extras=part:string")
    arrays = make_arrays()
    found = read_records(dataset)
    assert len(found) == NUM_RECORDS
    for index in range(NUM_RECORDS):
        record = found[f"clip{index}"]
        assert record["vision"] == [arrays["vision"][index].tolist()]
        size = arrays["text_lengths"][index]
        assert record["text"] == arrays["text"][index, :size].astype(np.float32).tolist()
        assert record["feeling"] == arrays["emotion"][index]
        assert record["mood"] == (None if index == 1 else np.float32(arrays["mood"][index]))
        assert record["user_id"] == str(arrays["speaker"][index])
        assert record["dialogue_id"] == arrays["dialogue"][index]
        assert record["turn"] == arrays["turn"][index]
        assert record["extra_part"] == arrays["part"][index]
    assert found["clip3"]["text"] == []


def test_a_folder_of_npy_files_gives_the_same_records(tmp_path: Path) -> None:
    flags = ["--user_key=speaker", "--turn_key=turn", *BY_SPEAKER, "--extras=note:string"]
    labels = ["--labels=emotion,feelings:multi_label,mood:real", f"--class_names=emotion={EMOTIONS}"]
    source = write_folder(tmp_path)
    dataset = run(source, tmp_path / "out", *flags, *labels, "--class_names=feelings=glad,sad")
    found = read_records(dataset)
    arrays = make_arrays()
    for index in range(NUM_RECORDS):
        record = found[f"clip{index}"]
        assert record["vision"] == [arrays["vision"][index].tolist()]
        size = arrays["text_lengths"][index]
        assert record["text"] == arrays["text"][index, :size].astype(np.float32).tolist()
        assert record["emotion"] == (None if index == 5 else arrays["emotion"][index])
        assert record["feelings"] == [None, [0, 0], [1, 0], [1, 1]][index % 4]
        assert record["extra_note"] == f"nöte, {index}"
    assert found["clip1"]["mood"] is None


def test_a_row_of_nan_in_a_multi_label_array_has_no_label(tmp_path: Path) -> None:
    feelings = np.tile([1.0, 0.0], (NUM_RECORDS, 1))
    feelings[2] = np.nan
    flags = [*BY_SPEAKER, "--labels=feelings:multi_label", "--class_names=feelings=glad,sad"]
    found = read_records(run(write_npz(tmp_path, feelings=feelings), tmp_path / "out", *flags))
    assert found["clip1"]["feelings"] == [1, 0]
    assert found["clip2"]["feelings"] is None


def test_the_manifest_says_what_made_the_features(tmp_path: Path) -> None:
    names = tmp_path / "classes.txt"
    names.write_text("neutral\njoy\nanger\n")
    producers = ["--producer=vision.encoder=openface", "--producer=vision.frames_per_second=30"]
    flags = ["--labels=emotion", f"--class_names={names}", "--name=clips", "--description=A test.", "--dtype=float16"]
    dataset = run(write_npz(tmp_path), tmp_path / "out", *flags, *producers, *BY_SPEAKER)
    assert dataset.spec.modalities["vision"].producer == Producer(encoder="openface", frames_per_second=30.0)
    assert dataset.spec.modalities["vision"].dtype == "float16"
    assert dataset.spec.labels["emotion"].class_names == ("neutral", "joy", "anger")
    assert (dataset.spec.name, dataset.spec.description) == ("clips", "A test.")
    assert (dataset.spec.source, dataset.spec.licence) == ("made here", "CC0")


def test_the_same_import_gives_the_same_bytes(tmp_path: Path) -> None:
    source = write_npz(tmp_path)
    for name in ("one", "two"):
        run(source, tmp_path / name, *LABELS, *BY_SPEAKER, "--name=same")
    files = sorted(file.name for file in (tmp_path / "one").iterdir())
    assert len(files) == 5
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_no_group_is_divided_and_fractions_and_seed_are_kept() -> None:
    groups = np.repeat([f"g{index}" for index in range(50)], np.arange(50) % 7 + 1)
    fractions = {"train": 0.7, "validation": 0.15, "test": 0.15}
    splits = splitting.split_by_fractions(groups, fractions, seed=1)
    splitting.check_groups_undivided(groups, splits)
    for name, fraction in fractions.items():
        assert abs(np.mean(splits == name) - fraction) < 0.02
    assert (splits == splitting.split_by_fractions(groups, fractions, seed=1)).all()
    assert (splits != splitting.split_by_fractions(groups, fractions, seed=2)).any()
    # The order of the records does not matter.
    order = np.random.default_rng(0).permutation(len(groups))
    assert (splitting.split_by_fractions(groups[order], fractions, seed=1) == splits[order]).all()


def test_folds_are_balanced_and_divide_no_group() -> None:
    groups = np.repeat([f"g{index}" for index in range(20)], np.arange(20) % 3 + 1)
    folds = splitting.split_into_folds(groups, 5, seed=0)
    splitting.check_groups_undivided(groups, folds)
    _, counts = np.unique(folds, return_counts=True)
    assert len(counts) == 5
    assert counts.max() - counts.min() <= 1


def test_a_column_of_split_names_is_followed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_npz(tmp_path)
    dataset = run(source, tmp_path / "out", *LABELS, "--split_key=part", "--group_key=speaker")
    assert dataset.split_names == ("test", "train")
    test = dataset.split("test")
    arrays = make_arrays()
    assert test.ids(np.arange(test.num_records)) == arrays["id"][arrays["part"] == "test"].tolist()
    capsys.readouterr()
    line = refuse(capsys, source, tmp_path / "other", *LABELS, "--split_key=part", "--group_key=dialogue")
    assert "group 'd1' is in the splits 'test' and 'train'" in line


def test_shuffled_labels_keep_each_groups_counts_and_say_so(tmp_path: Path) -> None:
    source = write_npz(tmp_path, emotion=np.arange(NUM_RECORDS) // 8 % 3)
    flags = [*LABELS, *BY_SPEAKER, "--user_key=speaker"]
    plain = read_records(run(source, tmp_path / "plain", *flags))
    control = run(source, tmp_path / "control", *flags, "--shuffle_labels_within=user", "--seed=3")
    shuffled = read_records(control)
    assert "labels shuffled within each speaker, seed 3" in control.spec.description
    changed = [record_id for record_id in plain if plain[record_id]["emotion"] != shuffled[record_id]["emotion"]]
    assert len(changed) > NUM_RECORDS // 4
    for user in {record["user_id"] for record in plain.values()}:
        emotions = [
            sorted(str(record["emotion"]) for record in records.values() if record["user_id"] == user)
            for records in (plain, shuffled)
        ]
        assert emotions[0] == emotions[1]
    for record_id, record in plain.items():
        assert record["vision"] == shuffled[record_id]["vision"]


def with_non_finite() -> dict[str, np.ndarray]:
    arrays = make_arrays()
    vision = arrays["vision"].copy()
    vision[2:14, 1] = np.nan
    vision[2, 0] = np.inf
    text = arrays["text"].copy()
    text[0, 0, 0] = -np.inf
    text[3] = np.nan  # absent: its padding is never read
    return {"vision": vision, "text": text}


def test_non_finite_values_are_refused_with_counts_and_ids(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_npz(tmp_path, **with_non_finite())
    line = refuse(capsys, source, tmp_path / "out", *LABELS, "--group_key=id", "--splits=train=1.0")
    shown = ", ".join(f"clip{index}" for index in range(2, 12))
    assert f"vision: 13 values in 12 records ({shown}, ...)" in line
    assert "text: 1 values in 1 records (clip0)" in line
    assert "--non_finite=zero" in line


def test_non_finite_values_are_zeroed_when_asked_and_counted(tmp_path: Path) -> None:
    arrays = with_non_finite()
    dataset = run(write_npz(tmp_path, **arrays), tmp_path / "out", *LABELS, *BY_SPEAKER, "--non_finite=zero")
    assert dataset.manifest["counts"]["non_finite_values_set_to_zero"] == {
        "vision": {"num_values": 13, "num_records": 12},
        "text": {"num_values": 1, "num_records": 1},
    }
    assert read_records(dataset)["clip2"]["vision"] == [[0.0, 0.0, float(arrays["vision"][2, 2])]]


@pytest.mark.parametrize(
    ("changes", "flags", "message"),
    [
        ({"vision": np.ones((39, 3))}, [], "features.npz: key 'vision' has 39 records, key 'id' has 40"),
        ({"emotion": np.ones(41, int)}, [], "features.npz: key 'emotion' has 41 records"),
        ({"id": None}, [], "features.npz: no key 'id'"),
        ({"emotion": None}, [], "features.npz: no key 'emotion'"),
        ({"speaker": None}, [], "features.npz: no key 'speaker'"),
        ({"text_lengths": None}, [], "features.npz: no key 'text_lengths'"),
        ({"text_lengths": np.full(40, 6)}, [], "key 'text_lengths', record 0 (id clip0): 6"),
        ({"vision": np.array([["a"] * 3] * 40)}, [], "key 'vision' is <U1[40, 3]"),
        ({"vision": np.array([{}] * 40)}, [], "key 'vision': expected plain numbers or strings"),
        (
            {"vision": np.full((40, 3), 1e6)},
            ["--dtype=float16"],
            ": vision holds values that are not finite",
        ),
        ({"id": np.array(["same"] * 40)}, [], "key 'id': 1 ids are not unique, such as 'same'"),
        ({"emotion": np.full(40, 3)}, [], "record 'clip0': emotion = '3': expected one of neutral, joy, anger"),
        ({"emotion": np.array(["joy"] * 39 + ["fear"])}, [], "record 'clip39': emotion = 'fear': expected one of"),
        ({"emotion": np.full(40, 0.5)}, [], "record 'clip0': emotion = '0.5': expected a whole number"),
        ({}, ["--modalities=vision,audio"], "no key 'audio'"),
        ({"vision": None, "text": None}, [], "features.npz: no features"),
        ({}, ["--num_folds=9"], "8 groups for 9 splits"),
        ({}, ["--num_folds=1"], "num_folds = 1"),
        ({}, ["--split_key=part"], "exactly one of --splits, --num_folds and --split_key"),
        ({}, ["--class_names=mood=a,b"], "--class_names 'mood=a,b'"),
        ({}, ["--producer=vision.colour=red"], "--producer 'vision.colour=red': expected MODALITY.FIELD=VALUE"),
        ({}, ["--producer=vision.sample_rate_hz=fast"], "expected int"),
        ({}, ["--shuffle_labels_within=user"], "needs its key"),
        ({}, ["--seed=-1"], "--seed=-1: expected at least 0"),
        ({}, ["--modalities=vision,vision"], "--modalities=vision,vision: expected each modality once"),
        ({}, ["--extras=speaker:text"], "--extras speaker:text: expected one of the types int32, float32, string"),
    ],
)
def test_wrong_input_is_refused_in_one_line(
    changes: dict[str, np.ndarray | None],
    flags: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = write_npz(tmp_path, **changes)
    assert message in refuse(capsys, source, tmp_path / "out", *LABELS, *BY_SPEAKER, *flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--splits=train=0.9,test=0.2"], "add up to 1"),
        (["--splits=train=all"], "--splits 'train=all'"),
        (["--splits=train=0.9,test=0.099,extra=0.001"], "split 'extra' would be empty"),
        (["--num_folds=3", "--group_key="], "no key ''"),
    ],
)
def test_impossible_splits_are_refused_in_one_line(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_npz(tmp_path)
    assert message in refuse(capsys, source, tmp_path / "out", *LABELS, "--group_key=speaker", *flags)


@pytest.mark.parametrize("is_compressed", [False, True])
def test_damaged_npz_with_every_flag_given_is_told_in_one_line(is_compressed, tmp_path, capsys):
    path, flags = write_npz(tmp_path), [*BY_SPEAKER, *LABELS]
    if is_compressed:
        np.savez_compressed(path, **make_arrays())
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert "features.npz: not a readable .npz file" in refuse(capsys, path, tmp_path / "out", *flags)
    # Whole in length, with some bytes of the features turned over.
    place = content.index(b"vision.npy") + 300
    path.write_bytes(
        content[:place] + bytes(255 - byte for byte in content[place : place + 40]) + content[place + 40 :]
    )
    assert "features.npz: key 'vision': the file is damaged" in refuse(capsys, path, tmp_path / "out", *flags)


def test_labels_that_are_no_class_names_are_told_the_names(tmp_path, capsys):
    path = write_npz(tmp_path, emotion=np.array(["bored"] * NUM_RECORDS))
    line = refuse(capsys, path, tmp_path / "out", *BY_SPEAKER, *LABELS)
    assert "emotion = 'bored': expected one of neutral, joy, anger (class ids 0 to 2)" in line


def test_a_missing_or_unreadable_file_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, flags = tmp_path / "out", [*LABELS, *BY_SPEAKER]
    assert "nowhere.npz: no such file" in refuse(capsys, tmp_path / "nowhere.npz", out, *flags)
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 and nothing more")
    assert "bad.npz: not a readable .npz file" in refuse(capsys, tmp_path / "bad.npz", out, *flags)
    (tmp_path / "text.npz").write_text("hello")
    assert "text.npz: not a readable .npz file" in refuse(capsys, tmp_path / "text.npz", out, *flags)
    np.save(tmp_path / "single.npy", np.ones(3))
    assert "single.npy: not a readable .npz file" in refuse(capsys, tmp_path / "single.npy", out, *flags)


def test_a_faulty_folder_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, flags = tmp_path / "out", [*LABELS, *BY_SPEAKER]
    source = write_folder(tmp_path)
    np.save(source / "npy" / "t7.npy", np.ones((2, 9)))
    assert "t7.npy: record 'clip7': text is [2, 9]: expected [tokens, 2]" in refuse(capsys, source, out, *flags)
    np.save(source / "npy" / "t7.npy", np.array([{"a": 1}]))
    assert "t7.npy: record 'clip7': not a readable .npy file" in refuse(capsys, source, out, *flags)
    (source / "npy" / "t7.npy").unlink()
    assert "t7.npy: record 'clip7': file missing" in refuse(capsys, source, out, *flags)
    lines = (source / "labels.csv").read_text(encoding="utf-8").splitlines()
    (source / "labels.csv").write_text("\n".join([*lines[:3], "clip2,x"]), encoding="utf-8")
    assert "labels.csv: line 4: 2 cells, the header has 10" in refuse(capsys, source, out, *flags)
    (source / "labels.csv").write_bytes(b"id\n\xff\xfe\n")
    assert "labels.csv: not a UTF-8 CSV file" in refuse(capsys, source, out, *flags)
    (source / "labels.csv").unlink()
    assert "labels.csv: no such file" in refuse(capsys, source, out, *flags)


def test_an_output_that_exists_is_kept_unless_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_npz(tmp_path)
    run(source, tmp_path / "out", *LABELS, *BY_SPEAKER)
    capsys.readouterr()
    assert "out: exists already" in refuse(capsys, source, tmp_path / "out", *LABELS, *BY_SPEAKER)
    dataset = run(source, tmp_path / "out", *LABELS, "--group_key=speaker", "--num_folds=2", "--overwrite")
    assert dataset.split_names == ("fold0", "fold1")


def test_an_unwritable_output_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_npz(tmp_path)
    (tmp_path / "file").write_text("not a folder")
    assert import_features.main([f"--input={source}", f"--output={tmp_path}/file/out", *COMMON, *BY_SPEAKER]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert "file" in captured.err
    assert captured.err.count("\n") == 1


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    source = write_npz(tmp_path, vision=np.ones((NUM_RECORDS, 20_000), np.float32))
    (tmp_path / "place").mkdir()
    arguments = [f"--input={source}", f"--output={tmp_path}/place/out", *COMMON, *BY_SPEAKER]
    # A file that may not grow beyond 100 KiB fails to be written as on a full disk: with OSError.
    command = shlex.join([sys.executable, "-m", "mmei_jax.extraction.import_features", *arguments])
    result = subprocess.run(
        ["bash", "-c", f"ulimit -f 100; exec {command}"],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        check=False,
    )
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert list((tmp_path / "place").iterdir()) == []


@pytest.mark.skipif(not (SHARED_DATA / "ravdess").is_dir(), reason="the RAVDESS features are not beside the checkout")
def test_ravdess_is_imported_by_actor(tmp_path: Path) -> None:
    source = SHARED_DATA / "ravdess" / "actors_01_18.npz"
    emotions = "neutral,calm,happy,sad,angry,fearful,disgust,surprised"
    flags = ["--id_key=clip_id", "--user_key=actor", "--group_key=actor", "--num_folds=6", "--labels=emotion"]
    dataset = run(source, tmp_path / "out", *flags, f"--class_names={emotions}")
    with np.load(source) as arrays:
        row_of = {record_id: row for row, record_id in enumerate(arrays["clip_id"].tolist())}
        actors = []
        for fold in range(6):
            split = dataset.split(f"fold{fold}")
            indices = np.arange(split.num_records)
            rows = [row_of.pop(record_id) for record_id in split.ids(indices)]
            assert len(rows) == 180
            actors.extend(set(split.column("user_id")))
            assert split.column("user_id") == arrays["actor"][rows].astype(str).tolist()
            assert split.gather_label("emotion", indices)[0].tolist() == arrays["emotion"][rows].tolist()
            for modality in ("vision", "audio", "text"):
                tokens, kept = split.gather_tokens(modality, indices, 1)
                assert (kept == 1).all()
                np.testing.assert_array_equal(tokens[:, 0], arrays[modality][rows])
    assert not row_of
    assert len(actors) == len(set(actors)) == 18


@pytest.mark.skipif(not (SHARED_DATA / "mosi").is_dir(), reason="the CMU-MOSI features are not beside the checkout")
def test_mosi_is_imported_by_video(tmp_path: Path) -> None:
    source = SHARED_DATA / "mosi" / "utterances.npz"
    flags = ["--id_key=segment_id", "--group_key=video_id", "--dialogue_key=video_id", "--extras=transcript:string"]
    labels = ["--labels=sentiment", "--class_names=negative,positive", "--splits=train=0.7,validation=0.15,test=0.15"]
    dataset = run(source, tmp_path / "out", *flags, *labels)
    videos = [set(dataset.split(name).column("dialogue_id")) for name in dataset.split_names]
    assert len(set.union(*videos)) == sum(len(names) for names in videos) == 23
    split = dataset.split("train", "validation", "test")
    assert split.num_records == 559
    with np.load(source) as arrays:
        order = {record_id: row for row, record_id in enumerate(arrays["segment_id"].tolist())}
        indices = np.arange(559)
        rows = [order[record_id] for record_id in split.ids(indices)]
        assert split.gather_label("sentiment", indices)[0].tolist() == arrays["sentiment"][rows].tolist()
        np.testing.assert_array_equal(split.gather_tokens("audio", indices, 1)[0][:, 0], arrays["audio"][rows])
        assert split.column("extra_transcript") == arrays["transcript"][rows].tolist()


def test_a_split_that_divides_a_group_is_found() -> None:
    with pytest.raises(InputError, match="group 'b'"):
        splitting.check_groups_undivided(np.array(["a", "b", "a", "b"]), np.array(["x", "x", "x", "y"]))
