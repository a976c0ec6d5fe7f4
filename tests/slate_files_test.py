"""Clips come with what their users were shown: the same from every kind of file, in every shard, or refused by row."""

import csv
import dataclasses

import numpy as np
import pandas
import pytest

from mmei_jax import input_pipeline
from mmei_jax.config import parse
from mmei_jax.extraction.clip_lists import fingerprint
from mmei_jax.extraction.clips import Clip
from mmei_jax.extraction.slate_files import OPTIONAL_FIELDS, SLATE_COLUMNS, read_recommendations
from mmei_jax.ranking_targets import RankingReader, RankingStatistics
from mmei_jax.records import Dataset
from mmei_jax.types import InputError
from tests import random_encoders, tiny, tiny_extraction, tiny_slates
from tests.tiny_slates import WITHOUT_SLATE, catalogue_rows, relevant_rows, slate_rows, write_json

SPLITS = (*["train"] * 9, "validation", "test")
CLIPS = [Clip(f"clip{index}", split, text="a") for index, split in enumerate(SPLITS)]
WORDS = {"modalities": ("text",)}


def write_csv(path, rows, *, booleans=("false", "true")):
    rows = [
        {name: booleans[value] if isinstance(value, bool) else value for name, value in row.items()} for row in rows
    ]
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def read(files, clips=CLIPS):
    lines = []
    return *read_recommendations(clips, *files, report=lines.append), lines


@pytest.fixture
def files(tmp_path):
    return tiny_slates.write(tmp_path)


def test_every_kind_of_file_says_the_same(files, tmp_path):
    clips, recommendations, lines = read(files)
    catalogue, slates, relevant = files
    for suffix, write in (
        (".csv", write_csv),
        (".parquet", lambda path, rows: [pandas.DataFrame(rows).to_parquet(path), path][1]),
    ):
        other = [
            catalogue,
            write(tmp_path / f"s{suffix}", slate_rows()),
            write(tmp_path / f"r{suffix}", relevant_rows()),
        ]
        found, _, _ = read(other)
        assert fingerprint(found) == fingerprint(clips)
    numbers = write_csv(tmp_path / "numbers.csv", slate_rows(), booleans=("0", "1"))
    assert fingerprint(read([catalogue, numbers, relevant])[0]) == fingerprint(clips)
    slate = clips[1].slate
    np.testing.assert_array_equal(slate.item_index, [1, 5, 9])
    np.testing.assert_array_equal(slate.satisfaction, np.array([2.5, 4.0, 1.0], np.float32))
    np.testing.assert_array_equal(slate.is_liked, [False, True, False])
    np.testing.assert_array_equal(slate.num_replays, [0, 1, 2])
    np.testing.assert_array_equal(clips[1].relevant_items, [5, 8])
    assert clips[4].slate is None
    assert recommendations.has_relevant_items
    assert recommendations.catalogue.kind_names == ("music", "video")
    np.testing.assert_array_equal(recommendations.catalogue.kind, 1 - np.arange(12) % 2)
    assert lines == [
        f"{slates}: slates of 10 of 11 clips",
        f"{relevant}: relevant items of 11 of 11 clips",
    ]


def test_what_a_log_does_not_tell_is_unknown(files, tmp_path):
    rows = [{name: row[name] for name in ("clip", "item", "satisfaction")} for row in slate_rows()]
    clips, recommendations, _ = read([files[0], write_json(tmp_path / "least.jsonl", rows), None])
    assert not recommendations.has_relevant_items
    assert clips[0].relevant_items is None
    assert [getattr(clips[0].slate, name) for name in OPTIONAL_FIELDS] == [None] * 4
    # The rest is as before, and a list without slates is the list that it was.
    full = read(files)[0]
    np.testing.assert_array_equal(clips[3].slate.item_index, full[3].slate.item_index)
    assert len({fingerprint(CLIPS), fingerprint(clips), fingerprint(full)}) == 3
    assert read([None, None, None])[:2] == (CLIPS, None)


def test_rows_about_other_clips_are_counted_and_a_split_tells_clips_of_one_id_apart(files, tmp_path):
    twice = [*CLIPS, dataclasses.replace(CLIPS[2], split="test")]
    told = "line 1: clip 'clip2': occurs in the splits train, test: expected a column split that says which"
    rows = [{**row, "split": "test"} for row in slate_rows() if row["clip"] in ("clip2", "clip3")]
    with pytest.raises(InputError, match=told):
        read([files[0], write_json(tmp_path / "a.jsonl", [slate_rows()[6]]), None], twice)
    found, _, lines = read([files[0], write_json(tmp_path / "b.jsonl", rows), None], twice)
    assert [clip.split for clip in found if clip.slate is not None] == ["test"]
    assert lines == [f"{tmp_path / 'b.jsonl'}: slates of 1 of 12 clips; 3 rows about clips that the list does not have"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"item": "item12"}, r"slates.jsonl, line 2: item 'item12': expected an id of .*catalogue.jsonl"),
        ({"item": None}, "line 2: clip 'clip0', item missing: expected both"),
        ({"satisfaction": None}, "line 2: satisfaction missing: expected a finite number"),
        ({"satisfaction": float("nan")}, "line 2: satisfaction nan: expected a finite number"),
        ({"satisfaction": True}, "line 2: satisfaction True: expected a finite number"),
        ({"dwell_seconds": -1.0}, "line 2: dwell_seconds -1.0: expected 0 or more seconds"),
        ({"num_replays": 1.5}, "line 2: num_replays 1.5: expected a whole number, 0 or more"),
        ({"is_liked": "yes"}, "line 2: is_liked 'yes': expected true or false"),
        ({"propensity": 0.0}, "line 2: propensity 0.0: expected a probability above 0, at most 1"),
        ({"propensity": None}, "line 2: propensity missing: expected it in every row, or in none"),
        ({"position": 1}, f"line 2: column 'position': expected some of {', '.join(SLATE_COLUMNS)}"),
    ],
)
def test_row_that_says_something_else_is_told(files, change, told):
    rows = slate_rows()
    rows[1] = rows[1] | change
    write_json(files[1], rows)
    with pytest.raises(InputError, match=told):
        read(files)


@pytest.mark.parametrize(
    ("place", "rows", "told"),
    [
        (0, None, "--catalogue=None, --slates=.*: expected the first two together"),
        (1, None, "--slates=None, --relevant_items=.*: expected the first two together"),
        (1, [{**slate_rows()[0], "clip": "other"}], r"slates.jsonl: no row is about a clip of the list \(1 are about"),
        (2, [relevant_rows()[0]] * 2, "items.jsonl, line 2: item 'item4': stands there for clip 'clip0' already"),
        (
            0,
            [{"id": "item0", "kind": "music"}, catalogue_rows()[1]],
            "line 1: features are missing: expected a list of 3",
        ),
        (0, [{"id": "item0"}], "line 1: kind missing: expected a text"),
        (0, [], "catalogue.jsonl: no item in it"),
    ],
)
def test_files_that_do_not_fit_are_told(files, place, rows, told):
    given = list(files)
    if rows is None:
        given[place] = None
    else:
        write_json(given[place], rows)
    with pytest.raises(InputError, match=told):
        read(given)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with encoders, clips of words, the three files, and a data set of raw media made of them."""
    folder = tmp_path_factory.mktemp("slates")
    encoders = random_encoders.make(folder / "encoders")
    rows = [
        {"id": clip.id, "split": clip.split, "text": tiny_extraction.TEXTS[index % 4], "emotion": "joy"}
        for index, clip in enumerate(CLIPS)
    ]
    clips = tiny_extraction.write_list(folder / "clips.csv", rows)
    files = tiny_slates.write(folder)
    counts = tiny_slates.extract(encoders, clips, folder / "data", files, changes=WORDS, depth="raw")
    return encoders, clips, files, counts


def test_shards_hold_slates_and_the_catalogue(made):
    _, clips, files, counts = made
    dataset = Dataset.open(clips.parent / "data", verify=True)
    assert counts["clips_without_slate"] == 1
    assert dataset.spec.has_slates
    assert dataset.spec.has_relevant_items
    expected, recommendations, _ = read(files)
    found = dataset.catalogue()
    assert found.ids == recommendations.catalogue.ids
    assert found.texts == recommendations.catalogue.texts
    np.testing.assert_array_equal(found.features, recommendations.catalogue.features)
    train = dataset.split("train")
    rows = np.arange(9)
    lengths = train.lengths("slate_item_index")
    assert dict(zip(train.ids(rows), lengths.tolist(), strict=True)) == {
        f"clip{index}": 0 if f"clip{index}" == WITHOUT_SLATE else 3 for index in range(9)
    }
    for field in dataclasses.fields(expected[0].slate):
        values = train.gather_list(f"slate_{field.name}", rows, 3, -1)
        for row in np.flatnonzero(lengths):
            np.testing.assert_array_equal(values[row], getattr(expected[row].slate, field.name))
    np.testing.assert_array_equal(train.gather_list("relevant_items", rows, 2, -1)[5], [9, 0])


def test_clip_without_slate_has_no_positive(made):
    dataset = Dataset.open(made[1].parent / "data")
    split = dataset.split("train")
    statistics = RankingStatistics.from_split(split, tiny_slates.ITEMS)
    assert statistics.num_positives == 8
    targets = RankingReader(split, dataset.catalogue(), statistics, with_slates=False).read(np.arange(9))
    assert targets.has_positive.tolist() == [index != 4 for index in range(9)]
    # The second item was received best.
    assert targets.positive_index.tolist() == [-1 if index == 4 else (index + 4) % 12 for index in range(9)]


def test_extraction_goes_on_with_the_same_catalogue_and_slates_alone(made):
    encoders, clips, files, counts = made
    options = {"changes": WORDS, "depth": "raw"}
    assert tiny_slates.extract(encoders, clips, clips.parent / "data", files, **options) == counts
    with pytest.raises(InputError, match=r"holds an extraction that differs in catalogue_sha256 \("):
        tiny_extraction.run(encoders, clips, clips.parent / "data", **options)
    other = write_json(clips.parent / "other.jsonl", [row | {"satisfaction": 1.0} for row in slate_rows()])
    with pytest.raises(InputError, match="holds an extraction that differs in clips_sha256"):
        tiny_slates.extract(encoders, clips, clips.parent / "data", (files[0], other, files[2]), **options)


def test_catalogue_without_features_is_for_a_tower_that_reads_words(made, tmp_path):
    encoders, clips, _, _ = made
    least = [{name: row[name] for name in ("clip", "item", "satisfaction")} for row in slate_rows()]
    words = (
        write_json(tmp_path / "words.jsonl", catalogue_rows(item_dim=0)),
        write_json(tmp_path / "least.jsonl", least),
        None,
    )
    tiny_slates.extract(encoders, clips, tmp_path / "data", words, changes=WORDS, depth="raw")
    dataset = Dataset.open(tmp_path / "data", verify=True)
    assert dataset.catalogue().features.shape == (12, 0)
    assert not dataset.split("train").lengths("slate_dwell_seconds").any()
    assert RankingStatistics.from_split(dataset.split("train"), 12).num_positives == 8
    config = tiny.config_dict(tmp_path / "data", data__modalities=("text",), data__batch_size=4, loss__intent="none")
    config.model.encoders.text = str(encoders.converted["text"])
    config.train.best_metric = "validation/emotion/accuracy"
    with pytest.raises(InputError, match=r"content_features = True: the catalogue of .* has no features: expected Fal"):
        input_pipeline.check(dataset, parse(config.to_dict()))
