"""The doctor on whole data sets: what is published is found, and a change is found as exactly that change."""

import copy
import csv
import dataclasses
import json
import shutil
from collections import Counter
from pathlib import Path

import pandas
import pytest

from mmei_jax.extraction import doctor
from mmei_jax.extraction.dataset_builders import builder_utterances, open_builder, split_names
from mmei_jax.extraction.doctor_lists import same_words
from mmei_jax.extraction.utterance_lists import read_meld, write_clip_list
from tests import made_up_lists, made_up_media

DATA = Path(__file__).parents[1] / "data"
SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_meld = pytest.mark.skipif(
    not (SHARED / "meld").is_dir(), reason="MELD's CSVs are not in shared/data beside the checkout"
)
needs_mintrec = pytest.mark.skipif(
    not (SHARED / "mintrec").is_dir(), reason="MIntRec's TSVs are not in shared/data beside the checkout"
)


def run(path, *flags, code):
    """The JSON of the command, which must end with the exit code."""
    report = path.parent / f"{path.name}.json"
    assert doctor.main([str(path), f"--json={report}", *map(str, flags)]) == code
    return json.loads(report.read_text(encoding="utf-8"))


def findings_of(report):
    return {(item["check"], item["where"]): item for item in report["findings"]}


def changes(before, after):
    """Findings that differ, as (check, where): (value before, value after); None where there is none."""
    old, new = findings_of(before), findings_of(after)
    values = {key: (old.get(key, {}).get("value"), new.get(key, {}).get("value")) for key in {**old, **new}}
    return {key: pair for key, pair in values.items() if pair[0] != pair[1]}


def difference(before, after, path=""):
    """Paths of the JSON values that differ, but for names of files and the findings."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = sorted({*before, *after} - {"input", "published", "findings"})
        return [found for key in keys for found in difference(before.get(key), after.get(key), f"{path}/{key}")]
    return [] if before == after else [path]


@pytest.fixture
def original(tmp_path):
    """Made-up rows, their figures as published, and the doctor's report on them."""
    rows = made_up_lists.meld_rows()
    folder = made_up_lists.write_meld(tmp_path / "original", rows)
    known = [
        {"check": "shared_speakers", "where": where, "value": 3}
        for where in ("train & dev", "train & test", "dev & test")
    ]
    table = made_up_lists.write_published(tmp_path / "published.json", rows, known_findings=known)
    report = run(folder, f"--published={table}", code=0)
    assert report["num_unexpected"] == 0
    return rows, table, report


def examine_changed(tmp_path, original, change, code=1):
    rows, table, _ = original
    changed = copy.deepcopy(rows)
    change(changed)
    return run(made_up_lists.write_meld(tmp_path / "changed", changed), f"--published={table}", code=code)


def test_duplicate_in_place_of_another_text_is_the_only_change(tmp_path, original):
    def change(rows):
        # Of the same speaker and as many words: nothing else that is measured changes.
        rows["train"][9].update({key: rows["train"][3][key] for key in ("Utterance", "Speaker")})
        rows["train"][9]["Utterance"] = "  " + rows["train"][9]["Utterance"].upper()

    report = examine_changed(tmp_path, original, change)
    assert changes(original[2], report) == {("duplicates_within", "train"): (None, 1)}
    assert findings_of(report)["duplicates_within", "train"]["ids"] == ["train_dia2_utt1"]
    assert difference(original[2], report) == ["/num_unexpected"]


def test_added_duplicate_changes_its_counts_and_nothing_else(tmp_path, original):
    emotion = original[0]["train"][3]["Emotion"]
    sentiment = original[0]["train"][3]["Sentiment"]

    def change(rows):
        rows["test"].append({**rows["test"][-1], "Utterance_ID": "4"})
        rows["test"][-1].update(
            {key: rows["train"][3][key] for key in ("Utterance", "Speaker", "Emotion", "Sentiment")}
        )

    report = examine_changed(tmp_path, original, change)
    counts = Counter(row["Emotion"] for row in original[0]["test"])
    moods = Counter(row["Sentiment"] for row in original[0]["test"])
    assert changes(original[2], report) == {
        ("duplicates_across", "test in train"): (None, 1),
        ("num_records", "test"): (None, 25),
        ("class_counts", f"test/emotion/{emotion}"): (None, counts[emotion] + 1),
        ("class_counts", f"test/sentiment/{sentiment}"): (None, moods[sentiment] + 1),
    }


def test_same_words_of_another_speaker_are_no_duplicate(tmp_path, original):
    def change(rows):
        assert rows["train"][4]["Speaker"] != rows["train"][3]["Speaker"]
        rows["train"][4]["Utterance"] = rows["train"][3]["Utterance"]

    assert changes(original[2], examine_changed(tmp_path, original, change, code=0)) == {}


def test_swapped_label_order_is_one_finding_of_the_label_order(tmp_path, original):
    swap = {"joy": "anger", "anger": "joy"}

    def change(rows):
        for row in rows["train"]:
            row["Emotion"] = swap.get(row["Emotion"], row["Emotion"])

    report = examine_changed(tmp_path, original, change)
    assert changes(original[2], report) == {("label_order", "train/emotion"): (None, ["joy", "anger"])}
    assert difference(original[2], report) == [
        "/class_counts/emotion/train/anger",
        "/class_counts/emotion/train/joy",
        "/num_unexpected",
    ]


def test_shared_episode_is_the_only_change(tmp_path, original):
    def change(rows):
        for row in rows["test"][:8]:
            row["Episode"] = "1"

    report = examine_changed(tmp_path, original, change)
    assert changes(original[2], report) == {("shared_episodes", "train & test"): (None, 1)}
    assert findings_of(report)["shared_episodes", "train & test"]["ids"] == ["s1e1"]
    assert difference(original[2], report) == ["/num_unexpected"]


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ({"Emotion": "happy"}, {"unknown_labels": ["train_dia0_utt0"], "class_counts": []}),
        ({"Utterance": " "}, {"empty_texts": ["train_dia0_utt0"]}),
        ({"EndTime": "00:04:00,000"}, {"long_clips": ["train_dia0_utt0"]}),
        ({"EndTime": "00:00:00,000"}, {"empty_clips": ["train_dia0_utt0"]}),
        ({"Utterance_ID": "1"}, {"repeated_ids": ["train_dia0_utt1"]}),
        ({"Dialogue_ID": "77", "Utterance_ID": "0"}, {}),
    ],
)
def test_a_wrong_cell_is_found(tmp_path, original, cells, expected):
    report = examine_changed(tmp_path, original, lambda rows: rows["train"][0].update(cells), code=1 if expected else 0)
    assert {item["check"]: item["ids"] for item in report["findings"] if not item["is_known"]} == expected


def test_missing_and_additional_records_are_found(tmp_path, original):
    report = examine_changed(tmp_path, original, lambda rows: rows["dev"].pop())
    assert changes(original[2], report)["num_records", "dev"] == (None, 15)


def test_missing_split_is_found(tmp_path):
    for split in ("train", "dev"):
        (tmp_path / f"{split}.tsv").write_text("season\tepisode\tclip\ttext\tlabel\nS1\tE1\t1\tso " + split + "\tjoy\n")
    table = made_up_lists.write_published(tmp_path / "p.json", made_up_lists.meld_rows())
    values = json.loads(table.read_text()) | {"format": "mintrec"}
    table.write_text(json.dumps(values))
    assert findings_of(run(tmp_path, f"--published={table}", code=1))["missing_split", "test"]["value"] == 24


def write_clips_folder(folder, rows, missing=()):
    """MELD.Raw of these rows: one small file, with the clip's name behind its end, for each clip."""
    template = made_up_media.write_media(folder / "template.mp4").read_bytes()
    for split, found in rows.items():
        (folder / made_up_lists.MELD_CLIPS[split]).mkdir()
        for row in found:
            name = f"dia{row['Dialogue_ID']}_utt{row['Utterance_ID']}"
            if f"{split}_{name}" not in missing:
                # A box of the kind "free": players pass over it.
                box = f"{split}_{name}".encode()
                padding = (8 + len(box)).to_bytes(4, "big") + b"free" + box
                (folder / made_up_lists.MELD_CLIPS[split] / f"{name}.mp4").write_bytes(template + padding)
    return folder


def test_known_bad_clips_are_named_and_other_bad_clips_are_not_excused(tmp_path, original):
    rows, _, before = original
    bad = {"dev_dia1_utt2": "missing", "train_dia3_utt1": "corrupt"}
    known = [
        {"check": "shared_speakers", "where": where, "value": 3}
        for where in ("train & dev", "train & test", "dev & test")
    ]
    table = made_up_lists.write_published(tmp_path / "p.json", rows, known_findings=known, known_bad_clips=bad)
    media = write_clips_folder(tmp_path / "raw", rows, missing=["dev_dia1_utt2"])
    (media / "train_splits" / "dia3_utt1.mp4").write_bytes(b"not a film")
    folder = tmp_path / "original"
    report = run(folder, f"--published={table}", f"--media={media}", code=0)
    assert changes(before, report) == {("missing_media", "dev"): (None, 1), ("corrupt_media", "train"): (None, 1)}
    assert findings_of(report)["missing_media", "dev"]["ids"] == ["dev_dia1_utt2"]
    (media / "train_splits" / "dia0_utt0.mp4").unlink()
    shutil.copy(media / "train_splits" / "dia0_utt1.mp4", media / "output_repeated_splits_test" / "dia0_utt0.mp4")
    again = run(folder, f"--published={table}", f"--media={media}", code=1)
    assert changes(report, again) == {
        ("missing_media", "train"): (None, 1),
        ("identical_media_across", "test in train"): (None, 1),
    }


def test_list_of_clips_is_examined_with_its_media_and_episodes(tmp_path, original):
    utterances = read_meld(tmp_path / "original", Path("raw"))
    write_clip_list(tmp_path / "clips.csv", utterances)
    write_clips_folder(tmp_path / "raw", original[0])
    speakers = {("shared_speakers", where) for where in ("train & dev", "train & test", "dev & test")}
    report = run(tmp_path / "clips.csv", f"--media={tmp_path}", code=1)
    assert set(findings_of(report)) == speakers
    report = run(tmp_path / "clips.csv", f"--media={tmp_path}", "--accept=long_clips,shared_speakers", code=0)
    assert set(findings_of(report)) == speakers
    assert report["splits"] == original[2]["splits"]
    assert report["class_counts"]["emotion"]["train"]["joy"] == sum(
        row["Emotion"] == "joy" for row in original[0]["train"]
    )


def test_text_that_the_list_says_is_optional_may_be_empty(tmp_path):
    path = tmp_path / "clips.csv"
    path.write_text("id,text,optional\na,hello,\nb,,audio|text\nc,,audio\n")
    (finding,) = run(path, code=1)["findings"]
    assert (finding["check"], finding["ids"]) == ("empty_texts", ["c"])


def test_list_of_another_form_has_the_same_findings(tmp_path, original):
    write_clip_list(tmp_path / "clips.csv", read_meld(tmp_path / "original"))
    frame = pandas.read_csv(tmp_path / "clips.csv", dtype=str)
    frame.to_csv(tmp_path / "clips.tsv", sep="\t", index=False, quoting=csv.QUOTE_ALL)
    frame.to_parquet(tmp_path / "clips.parquet")
    reports = [run(tmp_path / f"clips.{suffix}", code=1) for suffix in ("csv", "tsv", "parquet")]
    for report in reports[1:]:
        assert report["findings"] == reports[0]["findings"] != []
        assert difference(reports[0], report) == []


def test_input_that_is_no_data_set_is_told_in_one_line(tmp_path, capsys, original):
    (tmp_path / "empty").mkdir()
    (tmp_path / "latin.csv").write_bytes(b"path,\xff\n")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.json").write_text("{}")
    capsys.readouterr()
    for arguments, message in [
        ([tmp_path / "latin.csv"], "latin.csv: not a UTF-8 table"),
        ([tmp_path / "data"], "manifest.json"),
        ([tmp_path / "empty"], "empty: expected a folder with MELD's three CSVs"),
        ([tmp_path / "nowhere.csv"], "nowhere.csv: expected"),
        ([tmp_path / "original", f"--published={tmp_path / 'empty'}"], "published.json: no such file"),
        ([tmp_path / "original", f"--published={DATA / 'mintrec'}"], "is of format mintrec"),
        ([tmp_path / "original", f"--media={tmp_path / 'nowhere'}"], "no such folder of media"),
        ([tmp_path / "original", "--accept=shared_voices"], "'shared_voices' is no check"),
    ]:
        assert doctor.main([str(argument) for argument in arguments]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert message in captured.err
        assert captured.err.count("\n") == 1


@needs_meld
def test_meld_has_what_is_published_and_known_and_nothing_else(tmp_path):
    report = run_shared(tmp_path, "meld", "--media", str(tmp_path))
    splits = {name: counts["num_records"] for name, counts in report["splits"].items()}
    assert splits == {"train": 9989, "dev": 1109, "test": 2610}
    # Written out here, and not read from the table that the doctor compares with.
    emotions = report["class_counts"]["emotion"]
    assert list(emotions["train"]) == list(made_up_lists.EMOTIONS)
    assert list(emotions["train"].values()) == [4710, 1743, 1205, 1109, 683, 271, 268]
    assert list(emotions["test"].values()) == [1256, 402, 281, 345, 208, 68, 50]
    findings = findings_of(report)
    assert findings["duplicates_across", "test in train"]["value"] == 205
    assert findings["shared_episodes", "train & test"]["value"] == 142
    assert report["splits"]["test"]["num_episodes"] == 143
    assert findings["long_clips", "test"]["ids"] == ["test_dia38_utt4", "test_dia220_utt0"]
    # No clip is in the empty folder: the known bad ones are named apart from the others.
    missing = [item for item in report["findings"] if item["check"] == "missing_media"]
    named = {name for item in missing if item["is_known"] for name in item["ids"]}
    assert named >= {"train_dia125_utt3", "dev_dia110_utt7", "test_dia38_utt4", "test_dia220_utt0"}
    assert [item["value"] for item in missing if not item["is_known"]] == [9988, 1108, 2608]
    assert report["num_unexpected"] == 3
    assert not report["not_found"]


@needs_mintrec
def test_mintrec_has_what_is_published_and_known_and_nothing_else(tmp_path):
    report = run_shared(tmp_path, "mintrec")
    assert [counts["num_records"] for counts in report["splits"].values()] == [1334, 445]
    assert report["class_counts"]["intent"]["train"]["Ask for help"] == 31
    assert report["num_unexpected"] == 0
    assert not report["not_found"]


def run_shared(tmp_path, name, *flags):
    report = tmp_path / "report.json"
    doctor.main([str(SHARED / name), f"--published={DATA / name}", f"--json={report}", *flags])
    return json.loads(report.read_text(encoding="utf-8"))


def test_texts_are_the_same_when_case_and_spaces_differ_and_not_otherwise():
    assert same_words("  What?\tNO way ") == same_words("what? no WAY")
    assert same_words("What?") != same_words("What")


@needs_meld
@pytest.mark.slow
def test_changes_of_meld_are_found_as_exactly_those_changes(tmp_path):
    rows = {}
    for split, file_name in made_up_lists.MELD_FILES.items():
        with (SHARED / "meld" / file_name).open(newline="", encoding="utf-8") as stream:
            rows[split] = list(csv.DictReader(stream))
    flags = [f"--published={DATA / 'meld'}"]
    before = run(made_up_lists.write_meld(tmp_path / "original", rows), *flags, code=0)

    def examine_with(change):
        changed = copy.deepcopy(rows)
        change(changed)
        return run(made_up_lists.write_meld(tmp_path / "changed", changed), *flags, code=1)

    def repeat(changed):
        taken = changed["train"][0]
        changed["train"][2].update({key: taken[key] for key in ("Utterance", "Speaker")})

    assert rows["train"][0]["Speaker"] == rows["train"][2]["Speaker"] == "Chandler"
    assert changes(before, examine_with(repeat)) == {("duplicates_within", "train"): (615, 616)}

    def exchange(changed):
        for row in changed["test"]:
            row["Emotion"] = {"joy": "fear", "fear": "joy"}.get(row["Emotion"], row["Emotion"])

    report = examine_with(exchange)
    assert changes(before, report) == {("label_order", "test/emotion"): (None, ["joy", "fear"])}

    # The one test episode that is not in train becomes one that is in train and test already, and not in dev.
    episodes = {split: {(row["Season"], row["Episode"]) for row in found} for split, found in rows.items()}
    (alone,) = episodes["test"] - episodes["train"]
    other = min(episodes["train"] - episodes["test"] - episodes["dev"])

    def share(changed):
        for row in changed["test"]:
            if (row["Season"], row["Episode"]) == alone:
                row["Season"], row["Episode"] = other

    assert alone not in episodes["dev"]
    assert changes(before, examine_with(share)) == {("shared_episodes", "train & test"): (142, 143)}


@needs_meld
@pytest.mark.slow
def test_episode_disjoint_split_of_meld_is_the_documented_one_and_a_shared_episode_is_the_only_change(tmp_path):
    options = {"folder": str(SHARED / "meld"), "splits": "episode"}
    builder = open_builder(DATA / "meld", options, tmp_path / "built")
    utterances = [item for split in split_names(builder) for item in builder_utterances(builder, split)]
    flags = [f"--published={DATA / 'meld' / 'episode_split.json'}"]
    write_clip_list(tmp_path / "clips.csv", utterances)
    before = run(tmp_path / "clips.csv", *flags, code=0)
    assert not [item for item in before["findings"] if item["check"] in ("shared_episodes", "shared_dialogues")]
    position = next(index for index, item in enumerate(utterances) if item.clip.split == "test")
    episode = next(item.episode for item in utterances if item.clip.split == "train")
    utterances[position] = dataclasses.replace(utterances[position], episode=episode)
    write_clip_list(tmp_path / "changed.csv", utterances)
    after = run(tmp_path / "changed.csv", *flags, code=1)
    assert changes(before, after) == {("shared_episodes", "train & test"): (None, 1)}
    assert difference(before, after) == ["/num_unexpected", "/splits/test/num_episodes"]
