"""Published lists of utterances: what is read, and one clear line for every wrong input."""

import dataclasses
import os

import numpy as np
import pandas
import pytest

from mmei_jax.extraction import clip_lists
from mmei_jax.extraction.clips import Clip
from mmei_jax.extraction.utterance_lists import (
    Utterance,
    label_clips,
    read_clip_list,
    read_meld,
    read_mintrec,
    read_mosei,
    write_clip_list,
)
from mmei_jax.records import LabelSpec
from mmei_jax.types import InputError
from tests import made_up_lists

EMOTION = LabelSpec("categorical", made_up_lists.EMOTIONS)


def test_meld_rows_become_utterances_with_ids_that_are_unique_over_splits(tmp_path):
    rows = made_up_lists.meld_rows()
    utterances = read_meld(made_up_lists.write_meld(tmp_path, rows))
    assert len(utterances) == sum(map(len, rows.values())) == len({utterance.clip.id for utterance in utterances})
    row, utterance = rows["dev"][5], utterances[len(rows["train"]) + 5]
    assert utterance == Utterance(
        Clip(
            "dev_dia1_utt1",
            "dev",
            text=row["Utterance"],
            speaker=row["Speaker"],
            dialogue="dev_dia1",
            turn=1,
            path=None,
        ),
        {"emotion": row["Emotion"], "sentiment": row["Sentiment"]},
        "s1e11",
        1.5,
    )


def test_meld_clips_are_named_as_in_the_archive_whether_they_exist_or_not(tmp_path):
    utterances = read_meld(made_up_lists.write_meld(tmp_path, made_up_lists.meld_rows()), tmp_path / "raw")
    for utterance in utterances:
        folder = made_up_lists.MELD_CLIPS[utterance.clip.split]
        name = utterance.clip.id.partition("_")[2]
        assert utterance.clip.path == str(tmp_path / "raw" / folder / f"{name}.mp4")
        # The file is the clip: the times of the CSV are of the episode.
        assert utterance.clip.start_seconds is utterance.clip.end_seconds is None


@pytest.mark.parametrize(
    ("column", "cell", "message"),
    [
        ("Dialogue_ID", "x", r"train_sent_emo\.csv: line 3: Dialogue_ID = 'x': expected a whole number"),
        ("StartTime", "12", r"line 3: StartTime = '12': expected hours:minutes:seconds"),
        ("EndTime", "00:00:nan", r"line 3: EndTime = '00:00:nan'"),
    ],
)
def test_wrong_cells_of_meld_are_named_with_their_line(tmp_path, column, cell, message):
    rows = made_up_lists.meld_rows()
    rows["train"][1][column] = cell
    with pytest.raises(InputError, match=message):
        read_meld(made_up_lists.write_meld(tmp_path, rows))


def test_missing_files_columns_and_cells_are_named(tmp_path):
    with pytest.raises(InputError, match=r"train_sent_emo\.csv: no such file"):
        read_meld(tmp_path)
    path = tmp_path / "clips.csv"
    for content, message in [
        ("id,split,id\na,b,c\n", "expected each once"),
        ("id,split\na\n", "line 2: 1 cells, the header has 2"),
        ("id,split\n", "no rows"),
        ("id,split,turn\na,b,-1\n", "line 2: turn = '-1': expected a whole number"),
        ("id,split,end_seconds\na,b,inf\n", "line 2: 'inf': expected seconds"),
    ]:
        path.write_text(content, encoding="utf-8")
        with pytest.raises(InputError, match=message):
            read_clip_list(path)
    path.write_text("video_id,text\na,b\n", encoding="utf-8")
    with pytest.raises(InputError, match="expected each once, among them clip_id, label, mode"):
        read_mosei(path)
    path.write_bytes(b"id,split\n\xff,a\n")
    with pytest.raises(InputError, match="not a UTF-8 table"):
        read_clip_list(path)


def write_mintrec(folder, splits=("train", "dev")):
    for split in splits:
        lines = ["season\tepisode\tclip\ttext\tlabel", f'S05\tE16\t329\tsay "{split}" again\tInform']
        (folder / f"{split}.tsv").write_text("\n".join([*lines, 'S05\tE17\t1\t"quoted\tAsk for help']) + "\n")


def test_mintrec_is_read_with_its_quotes_and_with_a_test_split_where_there_is_one(tmp_path):
    write_mintrec(tmp_path)
    found = read_mintrec(tmp_path)
    assert [utterance.clip.split for utterance in found] == ["train", "train", "dev", "dev"]
    assert found[0] == Utterance(
        Clip("S05_E16_329", "train", text='say "train" again'), {"intent": "Inform"}, "S05E16", None
    )
    assert found[1].clip.text == '"quoted'
    write_mintrec(tmp_path, ["test"])
    assert read_mintrec(tmp_path)[4].clip.split == "test"


MOSEI = "video_id,clip_id,text,label,annotation,mode,start,end\nv1,2,hello,-1.5,Negative,train,3.5,5.25\n"


def test_mosei_segments_and_whole_videos_are_read(tmp_path):
    path = tmp_path / "label.csv"
    path.write_text(MOSEI)
    (segment,) = read_mosei(path, tmp_path / "Raw")
    assert segment.clip.path == str(tmp_path / "Raw" / "v1" / "2.mp4")
    assert (segment.clip.start_seconds, segment.seconds, segment.labels) == (None, 1.75, {"sentiment": "-1.5"})
    (part,) = read_mosei(path, tmp_path / "Raw", has_whole_videos=True)
    assert part.clip.path == str(tmp_path / "Raw" / "v1.mp4")
    assert (part.clip.id, part.clip.start_seconds, part.clip.end_seconds) == ("v1$_$2", 3.5, 5.25)
    assert label_clips([part], {"sentiment": LabelSpec("real")})[0].labels == {"sentiment": -1.5}
    path.write_text(MOSEI.replace("3.5", ""))
    with pytest.raises(InputError, match="line 2: start or end is empty"):
        read_mosei(path, tmp_path, has_whole_videos=True)


def test_clip_list_is_read_back_as_it_was_written(tmp_path):
    clip = Clip(
        "a, b", "train", path="v.mp4", start_seconds=0.5, end_seconds=2.0, text="x\ny", dialogue="d", turn=3,
        optional=("audio", "vision"),
    )  # fmt: skip
    plain = Utterance(Clip("c", "test", audio_path="sub/s.wav", speaker="Bö"), {"emotion": "", "score": "1.5"}, "e1")
    written = [Utterance(clip, {"emotion": "joy", "score": ""}, None, 1.5), plain]
    write_clip_list(tmp_path / "clips.csv", written)
    first, second = read_clip_list(tmp_path / "clips.csv")
    assert first == dataclasses.replace(
        written[0], clip=dataclasses.replace(clip, path=os.path.join(tmp_path, "v.mp4"))
    )
    assert second == dataclasses.replace(
        plain, clip=dataclasses.replace(plain.clip, audio_path=os.path.join(tmp_path, "sub/s.wav"))
    )


def test_lists_are_read_as_extraction_reads_them_whatever_their_form(tmp_path):
    table = {
        "path": ["a b.mp4", "c.mp4", None],
        "start_seconds": [None, 0.5, None],
        "end_seconds": [None, 2.0, None],
        "text": ['so "it" is', None, "alone"],
        "turn": [0, None, 7],
        "optional": ["audio|text", None, None],
        "emotion": ["joy", None, "fear"],
    }
    frame = pandas.DataFrame(table).astype({"turn": "Int64"})
    frame.to_csv(tmp_path / "clips.csv", index=False)
    frame.to_csv(tmp_path / "clips.tsv", index=False, sep="\t")
    frame.to_parquet(tmp_path / "clips.parquet")
    for suffix in ("csv", "tsv", "parquet"):
        path = tmp_path / f"clips.{suffix}"
        expected, _ = clip_lists.read_clips(path, {"emotion": EMOTION})
        found = label_clips(read_clip_list(path), {"emotion": EMOTION})
        joined = [
            dataclasses.replace(clip, path=None if clip.path is None else str(tmp_path / clip.path))
            for clip in expected
        ]
        assert found == joined
    (tmp_path / "clips.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="not a readable Parquet file"):
        read_clip_list(tmp_path / "clips.parquet")


def test_byte_order_mark_of_spreadsheets_is_no_part_of_the_first_column(tmp_path):
    path = tmp_path / "clips.csv"
    path.write_text("id,split,text\na,train,hello\n", encoding="utf-8-sig")
    assert read_clip_list(path)[0].clip == Clip("a", "train", text="hello")


def test_labels_become_ids_numbers_and_rows():
    utterance = Utterance(Clip("a", "train"), {"emotion": "surprise", "all": "b|c", "score": "0.5", "other": "?"})
    specs = {"emotion": EMOTION, "all": LabelSpec("multi_label", ("a", "b", "c")), "score": LabelSpec("real")}
    (clip,) = label_clips([utterance], specs)
    assert clip.labels["emotion"] == 2
    assert clip.labels["score"] == 0.5
    np.testing.assert_array_equal(clip.labels["all"], [0, 1, 1])
    none = dataclasses.replace(utterance, labels={"emotion": "", "all": "none"})
    (clip,) = label_clips([none], specs)
    assert list(clip.labels) == ["all"]
    np.testing.assert_array_equal(clip.labels["all"], [0, 0, 0])


@pytest.mark.parametrize(
    ("labels", "message"),
    [({"emotion": "happy"}, "clip 'a': emotion = 'happy': expected one of"), ({"score": "x"}, "expected a number")],
)
def test_cells_that_are_no_label_are_refused(labels, message):
    with pytest.raises(InputError, match=message):
        label_clips([Utterance(Clip("a", "train"), labels)], {"emotion": EMOTION, "score": LabelSpec("real")})
