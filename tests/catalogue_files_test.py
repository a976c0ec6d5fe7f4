"""A catalogue says the same as JSON lines, CSV and Parquet; what it must not say is told with file and row."""

import csv
import json

import numpy as np
import pandas
import pytest

from mmei_jax.recommendation import catalogue_files
from mmei_jax.recommendation.catalogue_files import (
    describe,
    read_catalogue,
    read_ids,
    read_seen,
    read_whole_catalogue,
    split_catalogue,
)
from mmei_jax.records import Catalogue
from mmei_jax.types import InputError

KINDS, DIM = ("music", "video"), 3
ROWS = [
    {"id": "a", "kind": "video", "features": [1, 2.5, -3], "title": "Räume", "tags": ["calm", "night"]},
    {"id": "b, the second", "kind": "music", "features": [0.0, 1e-3, 7.0], "creator": "ann", "origin": "human"},
    {"id": "c", "kind": "music", "features": [1.0, 1.0, 1.0], "description": "x\ny", "origin": "ai_generated"},
]


def write_json(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_csv(path, rows, join_tags=json.dumps):
    names = ["id", "kind", "features", "title", "tags", "creator", "origin", "description"]
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, names)
        writer.writeheader()
        for row in rows:
            lists = {"features": json.dumps(row["features"])}
            lists |= {"tags": join_tags(row["tags"])} if "tags" in row else {}
            writer.writerow(row | lists)
    return path


def read(path):
    return list(read_catalogue(path, KINDS, DIM))


def check(block, rows):
    assert block.ids == [row["id"] for row in rows]
    assert block.kind_names == KINDS
    assert [KINDS[kind] for kind in block.kind] == [row["kind"] for row in rows]
    np.testing.assert_array_equal(block.features, np.array([row["features"] for row in rows], np.float32))
    known = [{key: value for key, value in row.items() if key not in ("id", "kind", "features")} for row in rows]
    assert [json.loads(text) for text in block.texts] == known


def test_every_kind_of_file_says_the_same(tmp_path):
    files = [
        write_json(tmp_path / "a.jsonl", ROWS),
        write_csv(tmp_path / "b.csv", ROWS),
        write_csv(tmp_path / "c.csv", ROWS, join_tags="|".join),
        tmp_path / "d.parquet",
    ]
    pandas.DataFrame(ROWS).to_parquet(files[-1])
    for path in files:
        (block,) = read(path)
        check(block, ROWS)


def test_long_files_are_read_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(catalogue_files, "ROWS_PER_BLOCK", 2)
    rows = [{"id": str(index), "kind": "music", "features": [index] * DIM} for index in range(5)]
    blocks = read(write_json(tmp_path / "a.jsonl", rows))
    assert [len(block.ids) for block in blocks] == [2, 2, 1]
    for start, block in zip((0, 2, 4), blocks, strict=True):
        check(block, rows[start : start + 2])
    whole = Catalogue(list("abc"), np.array([0, 1, 0], np.int32), KINDS, np.eye(3, dtype=np.float32), ["{}"] * 3)
    parts = list(split_catalogue(whole))
    assert [part.ids for part in parts] == [["a", "b"], ["c"]]
    np.testing.assert_array_equal(np.concatenate([part.features for part in parts]), whole.features)
    np.testing.assert_array_equal(np.concatenate([part.kind for part in parts]), whole.kind)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"id": None}, "id missing: expected a text of one line"),
        ({"id": "two\nlines"}, "expected a text of one line"),
        ({"id": " a"}, "without spaces around it"),
        ({"id": 7}, "id 7: expected a text"),
        ({"id": "a"}, "id 'a': occurs twice; ids must be unique"),
        ({"kind": "movie"}, "kind 'movie': expected one of music, video"),
        ({"kind": None}, "kind missing: expected one of music, video"),
        ({"features": [1.0, 2.0]}, "features are a list of 2: expected a list of 3 numbers"),
        ({"features": None}, "features are missing: expected a list of 3 numbers"),
        ({"features": [1.0, "2", 3.0]}, "expected a list of 3 numbers"),
        ({"features": [1.0, True, 3.0]}, "expected a list of 3 numbers"),
        ({"features": [1.0, float("nan"), 3.0]}, "features[1] is nan: expected finite float32 numbers"),
        ({"features": [1.0, 2.0, 1e39]}, "features[2] is 1e+39: expected finite float32 numbers"),
        ({"features": [10**400, 2, 3]}, "features[0] is 1000"),
        ({"origin": "robot"}, "origin 'robot': expected one of human, ai_generated"),
        ({"title": ["x"]}, "title ['x']: expected a text"),
        ({"title": "\ud800"}, "expected a text"),
        ({"tags": "calm"}, "tags 'calm': expected a list of texts"),
        ({"tags": [None]}, "tags [None]: expected a list of texts"),
        ({"colour": "red"}, "column 'colour': expected some of id, kind, title"),
    ],
)
def test_what_no_item_can_be_is_told_with_file_and_line(tmp_path, changes, expected):
    path = write_json(tmp_path / "items.jsonl", [*ROWS, {"id": "d", "kind": "music", "features": [0] * DIM} | changes])
    with pytest.raises(InputError) as error:
        read(path)
    assert str(error.value).startswith(f"{path}, line 4: ")
    assert expected in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("features", ["[1, 2]", 3.5, {"a": 1}, ["x"], [True]])
def test_features_that_are_no_list_of_numbers_are_told_where_no_row_has_one(tmp_path, features):
    rows = [{"id": "a", "kind": "music"}, {"id": "b", "kind": "music", "features": features}]
    path = write_json(tmp_path / "items.jsonl", rows)
    # A whole catalogue has as many features as the first list of them, whatever is in it.
    readers = [lambda: list(read_catalogue(path, KINDS, 0))]
    readers += [] if isinstance(features, list) else [lambda: read_whole_catalogue(path)]
    for read_it in readers:
        with pytest.raises(InputError) as error:
            read_it()
        assert str(error.value) == f"{path}, line 2: features are {features!r}: expected a list of numbers, or none"


def test_catalogue_without_features_is_read(tmp_path):
    rows = [{"id": "a", "kind": "music"}, {"id": "b", "kind": "music", "features": None}]
    assert read_whole_catalogue(write_json(tmp_path / "items.jsonl", rows)).features.shape == (2, 0)
    # A tower that reads words alone passes over the features that others read.
    (block,) = read_catalogue(write_json(tmp_path / "more.jsonl", ROWS), KINDS, 0)
    assert block.features.shape == (3, 0)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("none.jsonl", None, "no such file: expected a catalogue (.jsonl, .csv, .parquet)"),
        ("a.txt", "", "expected a name that ends in .jsonl, .csv, .parquet"),
        ("a.jsonl", "", "no item in it"),
        ("a.csv", "id,kind,features\n", "no item in it"),
        ("a.jsonl", "{", "a.jsonl, line 1: not JSON"),
        ("a.jsonl", "[]", "a.jsonl, line 1: []: expected a JSON object"),
        ("a.jsonl", b"\xff\xfe", "not a readable catalogue"),
        ("a.csv", "id,id\n", "columns id, id: each name once"),
        ("a.csv", "id,kind\na\n", "a.csv, line 2: 1 cells: expected 2, as the header has"),
        ("a.csv", 'id,kind,features\na,music,"[1,2,3]"\nb,music,[1,2,3]\n', "line 3: 5 cells: expected 3, as"),
        ("a.csv", "id,title,kind\na,,music,,\n", "a.csv, line 2: 5 cells: expected 3"),
        ("a.csv", 'id,kind,features\na,music,"1,2,3"\n', "a.csv, line 2: features '1,2,3': expected a JSON list"),
        ("a.parquet", b"PAR1", "not a readable catalogue (.parquet)"),
    ],
)
def test_files_that_are_no_catalogue_are_told(tmp_path, name, content, expected):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as error:
        read(path)
    assert str(path) in str(error.value)
    assert expected in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_row_of_a_parquet_file_is_told(tmp_path):
    pandas.DataFrame([*ROWS[:2], ROWS[2] | {"kind": "book"}]).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a\.parquet, row 3: kind 'book'"):
        read(tmp_path / "a.parquet")


def test_text_of_an_item_is_a_json_object():
    assert describe('{"title": "x", "tags": ["y"]}', "a") == {"title": "x", "tags": ["y"]}
    for text, expected in (("no JSON", "a JSON object"), ("[]", "a JSON object"), ('{"origin": "x"}', "origin 'x'")):
        with pytest.raises(InputError, match=f"item 'a': .*{expected}"):
            describe(text, "a")


def test_lists_of_ids_are_read_and_refused(tmp_path):
    path = tmp_path / "ids.txt"
    path.write_text("\ufeffa\n\n b, the second \na\n", encoding="utf-8")
    assert read_ids(path) == ["a", "b, the second"]
    path.write_text("\n")
    with pytest.raises(InputError, match="no id in it"):
        read_ids(path)
    with pytest.raises(InputError, match="expected a UTF-8 file with one id a line"):
        read_ids(tmp_path / "none.txt")


def test_what_users_have_seen_is_read_by_user(tmp_path):
    rows = [{"user": "0", "item": "a"}, {"user": "ann", "item": "b"}, {"user": "0", "item": "c"}]
    write_json(tmp_path / "seen.jsonl", rows)
    (tmp_path / "seen.csv").write_text("item,user\na,0\nb,ann\nc,0\n")
    pandas.DataFrame(rows).to_parquet(tmp_path / "seen.parquet")
    for suffix in ("jsonl", "csv", "parquet"):
        assert read_seen(tmp_path / f"seen.{suffix}", ["0", "1"]) == [["a", "c"], []]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"user": "0", "item": "a"}, {"user": 0, "item": "a"}], "line 2: user 0: expected a text"),
        ([{"user": "0"}], "line 1: columns user: expected user, item"),
        ([{"user": "0", "item": ""}], "line 1: user '0', item missing: expected both"),
    ],
)
def test_rows_that_do_not_say_who_has_seen_what_are_refused(tmp_path, rows, message):
    with pytest.raises(InputError, match=message):
        read_seen(write_json(tmp_path / "seen.jsonl", rows), ["0"])
    with pytest.raises(InputError, match=r"none\.csv: no such file: expected a list of what users have seen"):
        read_seen(tmp_path / "none.csv", ["0"])
