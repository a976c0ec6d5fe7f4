"""TFDS builders by path: clips as they were read, no TensorFlow, and one clear line for every wrong option."""

import dataclasses
import functools
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mmei_jax.extraction import dataset_builders
from mmei_jax.extraction.clip_builder import ClipBuilder
from mmei_jax.extraction.dataset_builders import builder_clips, label_specs, open_builder, split_names
from mmei_jax.extraction.utterance_lists import label_clips, read_clip_list, read_meld
from mmei_jax.records import LabelSpec
from mmei_jax.simulation import aigc_int
from mmei_jax.types import InputError
from tests import absent_modules, made_up_lists

ROOT = Path(__file__).parents[1]
MELD = ROOT / "data" / "meld"

BUILDER = '''
from pathlib import Path
from mmei_jax.extraction.clip_builder import BuilderOption, ClipBuilder
from mmei_jax.extraction.clips import Clip
from mmei_jax.records import LabelSpec
from mmei_jax.simulation import aigc_int
import numpy as np


class Made(ClipBuilder):
    """Two splits that hold all that a clip can have."""

    OPTIONS = {"word": BuilderOption("what is said"), "size": BuilderOption("how many", "2", ("2", "3"))}
    labels = {
        "mood": LabelSpec("categorical", ("calm", "glad")),
        "all": LabelSpec("multi_label", ("a", "b", "c")),
        "score": LabelSpec("real"),
    }

    @classmethod
    def list_files(cls, options):
        return [Path(options["word"])]

    @classmethod
    def read_clips(cls, options):
        full = {"mood": 1, "all": np.array([1, 0, 1], np.float32), "score": 0.1}
        yield Clip("z", "train", "v.mp4", audio_path="s.wav", start_seconds=0.1, end_seconds=9999 / 7,
                   text=options["word"], speaker="Bö", dialogue="d", turn=0, labels=full, optional=("vision", "text"))
        yield Clip("a", "test")
        for number in range(int(options["size"])):
            yield Clip(f"{9 - number}", "train", text="x", labels={"mood": 0})
'''


@pytest.fixture
def made(tmp_path):
    """A builder's folder."""
    folder = tmp_path / "made"
    folder.mkdir()
    (folder / "made_dataset_builder.py").write_text(BUILDER)
    return folder


def equal(clip, other):
    labels = [{name: np.asarray(value).tolist() for name, value in found.labels.items()} for found in (clip, other)]
    for found in labels:
        if "score" in found:
            found["score"] = np.float32(found["score"])
    return dataclasses.replace(clip, labels={}) == dataclasses.replace(other, labels={}) and labels[0] == labels[1]


def test_clips_are_those_that_were_read_in_their_order(made, tmp_path):
    builder = open_builder(made, {"word": "hello"}, tmp_path / "built")
    assert builder.name == "made"
    assert split_names(builder) == ("test", "train")
    read = list(type(builder).read_clips({"word": "hello", "size": "2"}))
    for split in split_names(builder):
        found = list(builder_clips(builder, split))
        expected = [clip for clip in read if clip.split == split]
        assert len(found) == len(expected)
        assert all(map(equal, found, expected))
    assert label_specs(builder)["all"] == LabelSpec("multi_label", ("a", "b", "c"))


def test_changed_options_and_lists_are_built_anew_and_the_same_ones_are_not(made, tmp_path):
    word = tmp_path / "word.txt"
    word.write_text("one")

    def build(**options):
        return open_builder(made, {"word": str(word), **options}, tmp_path / "built")

    first = build()
    written = Path(first.data_path, "dataset_info.json").stat().st_mtime_ns
    again = build()
    assert again.data_path == first.data_path
    assert Path(again.data_path, "dataset_info.json").stat().st_mtime_ns == written
    assert len(list(builder_clips(build(size="3"), "train"))) == 4
    assert len(list(builder_clips(build(), "train"))) == 3
    word.write_text("two")
    assert build().data_path != first.data_path


def test_builder_crosses_to_another_process(made, tmp_path):
    builder = open_builder(made, {"word": "hello"}, tmp_path / "built")
    other = pickle.loads(pickle.dumps(builder))
    assert all(map(equal, builder_clips(other, "train"), builder_clips(builder, "train")))


def test_order_is_kept_over_several_files(tmp_path, monkeypatch):
    settings = functools.partial(dataset_builders.tfds.download.DownloadConfig, num_shards=3)
    monkeypatch.setattr(dataset_builders.tfds.download, "DownloadConfig", settings)
    folder = made_up_lists.write_meld(tmp_path / "meld", made_up_lists.meld_rows())
    builder = open_builder(MELD, {"folder": str(folder)}, tmp_path / "built")
    assert builder.info.splits["train"].num_shards == 3
    expected = [utterance.clip.id for utterance in read_meld(folder) if utterance.clip.split == "train"]
    assert [clip.id for clip in builder_clips(builder, "train")] == expected


def test_a_process_that_was_slower_takes_what_the_faster_one_built(made, tmp_path, monkeypatch):
    build = ClipBuilder.download_and_prepare

    def build_twice(self, **settings):
        build(self, **settings)
        raise OSError("Directory not empty")

    monkeypatch.setattr(ClipBuilder, "download_and_prepare", build_twice)
    assert len(list(builder_clips(open_builder(made, {"word": "w"}, tmp_path / "built"), "train"))) == 3

    def fail(self, **settings):
        raise OSError("No space left on device")

    monkeypatch.setattr(ClipBuilder, "download_and_prepare", fail)
    with pytest.raises(OSError, match="No space"):
        open_builder(made, {"word": "other"}, tmp_path / "built")


def test_two_builders_of_one_name_do_not_meet(made, tmp_path):
    other = tmp_path / "other" / "made_dataset_builder.py"
    other.parent.mkdir()
    other.write_text(BUILDER.replace('"x"', '"y"'))
    texts = [
        [clip.text for clip in builder_clips(open_builder(path, {"word": "w"}, tmp_path / path.name), "train")]
        for path in (made, other)
    ]
    assert texts == [["w", "x", "x"], ["w", "y", "y"]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "option 'word' is missing: what is said"),
        ({"word": "w", "wrod": "w"}, "option 'wrod': expected some of word, size, context_turns"),
        ({"word": "w", "size": "4"}, "option size = '4': expected one of 2, 3"),
        ({"word": "w", "context_turns": "few"}, "context_turns = 'few': expected a whole number"),
    ],
)
def test_wrong_options_are_told_in_one_line(made, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        open_builder(made, options, tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("x = 1\n", "0 classes derived from ClipBuilder"),
        (BUILDER.replace('"test"', '"te st"'), "split 'te st': expected letters"),
        (BUILDER.replace('f"{9 - number}"', '"9"'), "clip '9': occurs twice in split 'train'"),
    ],
)
def test_wrong_builders_are_told_in_one_line(made, tmp_path, content, message):
    (made / "made_dataset_builder.py").write_text(content)
    with pytest.raises(InputError, match=message):
        open_builder(made, {"word": "w"}, tmp_path / "built")


def test_wrong_paths_and_splits_are_told_in_one_line(made, tmp_path):
    with pytest.raises(InputError, match=r"nowhere: 0 files \*_dataset_builder\.py"):
        open_builder(tmp_path / "nowhere", {}, tmp_path)
    with pytest.raises(InputError, match="split 'dev': expected one of test, train"):
        builder_clips(open_builder(made, {"word": "w"}, tmp_path / "built"), "dev")


def test_command_needs_no_tensorflow_prints_class_weights_and_writes_the_list(tmp_path):
    folder = made_up_lists.write_meld(tmp_path / "meld", made_up_lists.meld_rows())
    program = absent_modules.hide({"tensorflow", "torch"}) + (
        "from mmei_jax.extraction.dataset_builders import main\nsys.exit(main(sys.argv[1:]))\n"
    )
    flags = [f"--option=folder={folder}", f"--data_dir={tmp_path / 'built'}", f"--clips={tmp_path / 'clips.csv'}"]
    command = [sys.executable, "-c", program, str(MELD), *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "meld: dev 16, test 24, train 80 clips" in done.stdout
    rows = made_up_lists.meld_rows()["train"]
    num_joyful = sum(row["Emotion"] == "joy" for row in rows)
    assert f"{num_joyful:>12}{80 / 7 / num_joyful:>9.4f}" in next(
        line for line in done.stdout.splitlines() if line.startswith("joy")
    )
    listed = read_clip_list(tmp_path / "clips.csv")
    assert sorted(utterance.clip.id for utterance in listed) == sorted(
        utterance.clip.id for utterance in read_meld(folder)
    )
    assert {utterance.labels["emotion"] for utterance in listed} == {row["Emotion"] for row in rows}


def test_command_tells_a_wrong_option_in_one_line(made, tmp_path, capsys):
    assert dataset_builders.main([str(made), "--option=word", f"--data_dir={tmp_path}"]) == 2
    assert capsys.readouterr().err == "error: --option 'word': expected NAME=VALUE\n"


def test_meld_is_built_with_its_official_splits(tmp_path):
    folder = made_up_lists.write_meld(tmp_path / "meld", made_up_lists.meld_rows())
    builder = open_builder(MELD, {"folder": str(folder)}, tmp_path / "built")
    assert label_specs(builder)["emotion"].class_names == made_up_lists.EMOTIONS
    expected = label_clips(read_meld(folder), label_specs(builder))
    for split in ("train", "dev", "test"):
        found = list(builder_clips(builder, split))
        assert found == [clip for clip in expected if clip.split == split]


def test_meld_keeps_bad_clips_in_the_list_with_their_paths(tmp_path):
    rows = made_up_lists.meld_rows()
    folder = made_up_lists.write_meld(tmp_path / "meld", rows)
    options = {"folder": str(folder), "clips_folder": str(tmp_path / "raw")}
    found = list(builder_clips(open_builder(MELD, options, tmp_path / "built"), "dev"))
    assert found[0].path == str(tmp_path / "raw" / "dev_splits_complete" / "dia0_utt0.mp4")
    assert len(found) == len(rows["dev"])


def test_meld_split_by_episode_divides_no_episode_and_loses_no_utterance(tmp_path):
    rows = made_up_lists.meld_rows()
    for row in rows["test"]:
        # Officially divided: these episodes are train's too.
        row["Episode"] = str(int(row["Episode"]) - 8)
    folder = made_up_lists.write_meld(tmp_path / "meld", rows)
    options = {"folder": str(folder), "splits": "episode"}
    builder = open_builder(MELD, options, tmp_path / "built")
    episode = {utterance.clip.id: utterance.episode for utterance in read_meld(folder)}
    clips = [clip for split in split_names(builder) for clip in builder_clips(builder, split)]
    assert sorted(clip.id for clip in clips) == sorted(episode)
    assert len({(episode[clip.id], clip.split) for clip in clips}) == len(set(episode.values()))
    sizes = {split: len(list(builder_clips(builder, split))) for split in split_names(builder)}
    assert sizes == {"train": 80, "dev": 16, "test": 24}


def test_meld_split_by_speaker_divides_no_speaker_and_context_does_not_cross_splits(tmp_path):
    rows = made_up_lists.meld_rows()
    for split, number in (("dev", 0), ("test", 1), ("train", 2)):
        for row in rows[split]:
            row["Speaker"] += str(number)
    # A guest in a dialogue of train.
    rows["train"][1]["Speaker"] = rows["dev"][0]["Speaker"]
    folder = made_up_lists.write_meld(tmp_path / "meld", rows)
    options = {"folder": str(folder), "splits": "speaker", "context_turns": "1"}
    builder = open_builder(MELD, options, tmp_path / "built")
    clips = {clip.id: clip for split in split_names(builder) for clip in builder_clips(builder, split)}
    assert len(clips) == 120
    pairs = {(clip.speaker, clip.split) for clip in clips.values()}
    assert len(pairs) == len({speaker for speaker, _ in pairs}) == 9
    for before, clip in (
        (clips[f"train_dia{number}_utt{turn}"], clips[f"train_dia{number}_utt{turn + 1}"])
        for number in range(20)
        for turn in range(3)
    ):
        assert ("</s></s>" in clip.text) >= (before.split == clip.split)
        assert before.split == clip.split or before.text.rpartition("</s></s>")[2] not in clip.text


def test_meld_context_comes_from_the_same_dialogue(tmp_path):
    rows = made_up_lists.meld_rows()
    folder = made_up_lists.write_meld(tmp_path / "meld", rows)
    options = {"folder": str(folder), "context_turns": "1", "context_separator": "[SEP]"}
    found = list(builder_clips(open_builder(MELD, options, tmp_path / "built"), "test"))
    first, second = rows["test"][4:6]
    assert found[5].text == "[SEP]".join(f"{row['Speaker'].upper()}: {row['Utterance']}" for row in (first, second))
    assert found[4].text == f"{first['Speaker'].upper()}: {first['Utterance']}"


def test_mintrec_is_built_with_its_intents_in_the_documented_order(tmp_path):
    for split, intent in (("train", "Ask for help"), ("dev", "Praise")):
        lines = ["season\tepisode\tclip\ttext\tlabel", f'S05\tE16\t329\tsay "it"\t{intent}']
        (tmp_path / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    builder = open_builder(ROOT / "data" / "mintrec", {"folder": str(tmp_path)}, tmp_path / "built")
    assert split_names(builder) == ("dev", "train")
    (clip,) = builder_clips(builder, "train")
    assert (clip.id, clip.text, clip.labels) == ("S05_E16_329", 'say "it"', {"intent": 19})
    (utterance,) = dataset_builders.builder_utterances(builder, "dev")
    assert (utterance.clip.labels, utterance.labels, utterance.episode) == (
        {"intent": 1},
        {"intent": "Praise"},
        "S05E16",
    )


RENDERED = """\
id,split,path,audio_path,start_seconds,end_seconds,text,speaker,dialogue,turn,emotion,intent,optional
sim-1-0,train,media/00000/sim-1-0.mp4,,,,"well, that is it",user-0,,,fear,create,
sim-1-1,test,,,,,words alone,user-0,,,joy,relax,vision|audio
"""


def test_rendered_clips_are_built_with_the_label_order_of_the_simulator(tmp_path):
    path = tmp_path / "clips.csv"
    path.write_text(RENDERED)
    builder = open_builder(ROOT / "data" / "aigc_int", {"list": str(path)}, tmp_path / "built")
    (shown,) = builder_clips(builder, "train")
    # The simulator has fear before disgust, MELD after it.
    assert shown.labels == {"emotion": aigc_int.EMOTIONS.index("fear"), "intent": 2} == {"emotion": 5, "intent": 2}
    assert (shown.path, shown.text) == (str(tmp_path / "media/00000/sim-1-0.mp4"), "well, that is it")
    (said,) = builder_clips(builder, "test")
    assert (said.path, said.optional, said.speaker) == (None, ("vision", "audio"), "user-0")
    path.write_text(RENDERED.replace("fear", "angst"))
    with pytest.raises(InputError, match="clip 'sim-1-0': emotion = 'angst': expected one of neutral, joy"):
        open_builder(ROOT / "data" / "aigc_int", {"list": str(path)}, tmp_path / "built")


def test_mosei_is_built_from_segments_and_from_whole_videos(tmp_path):
    path = tmp_path / "label.csv"
    path.write_text("video_id,clip_id,text,label,mode,start,end\nv1,2,hello,-1.5,train,3.5,5.25\n")
    options = {"labels": str(path), "media_folder": "Raw"}
    mosei = ROOT / "data" / "cmu_mosei"
    (segment,) = builder_clips(open_builder(mosei, options, tmp_path / "built"), "train")
    assert (segment.path, segment.start_seconds, segment.labels) == ("Raw/v1/2.mp4", None, {"sentiment": -1.5})
    (part,) = builder_clips(open_builder(mosei, {**options, "media": "videos"}, tmp_path / "built"), "train")
    assert (part.path, part.start_seconds, part.end_seconds) == ("Raw/v1.mp4", 3.5, 5.25)
