"""Shards: what is written is read back, by us and by others; what does not fit is refused by name."""

import hashlib
import json
import os
import pickle
import shutil
import tracemalloc
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from mmei_jax import records
from mmei_jax.record_arrow import records_to_columns
from mmei_jax.record_files import list_parts
from mmei_jax.records import (
    Catalogue,
    Dataset,
    DatasetSpec,
    DatasetWriter,
    LabelSpec,
    MaskedColumn,
    ModalitySpec,
    Producer,
    Ragged,
    Record,
    RecordColumns,
    Slate,
)
from mmei_jax.types import InputError

EMOTIONS = ("neutral", "joy", "anger")
SPEC = DatasetSpec(
    name="tiny",
    description="records of a test",
    source="made here",
    licence="CC0",
    modalities={
        "vision": ModalitySpec(3, "float16", Producer(encoder="vit", layer=-1, frames_per_second=4.0)),
        "text": ModalitySpec(2, "float32"),
    },
    labels={
        "emotion": LabelSpec("categorical", EMOTIONS),
        "feelings": LabelSpec("multi_label", ("glad", "sad")),
        "sentiment": LabelSpec("real"),
    },
    has_slates=True,
    has_relevant_items=True,
    extras={"year": "int32", "weight": "float32", "note": "string"},
)
CATALOGUE = Catalogue(
    ids=["song", "film", "poem"],
    kind=np.array([0, 1, 2], np.int32),
    kind_names=("music", "video", "text"),
    features=np.arange(12, dtype=np.float32).reshape(3, 4),
    texts=['{"title": "a"}', '{"title": "b"}', '{"title": "é"}'],
)


def make_record(index: int) -> Record:
    """Record ``index``, with something missing in every third."""
    generator = np.random.default_rng(index)
    size = 1 + index % 4
    is_lacking = index % 3 == 0
    return Record(
        id=f"r{index}",
        user_id=None if is_lacking else f"user{index % 2}",
        dialogue_id="d" if index % 2 else None,
        turn=None if is_lacking else index,
        features={
            "vision": None if is_lacking else generator.normal(size=(size, 3)).astype(np.float32),
            "text": generator.normal(size=(size + 1, 2)).astype(np.float32),
        },
        labels={
            "emotion": None if is_lacking else index % 3,
            "feelings": None if is_lacking else np.array([0.0, 1.0]),
            "sentiment": None if index % 5 == 0 else index / 2,
        },
        slate=None
        if is_lacking
        else Slate(
            item_index=np.arange(size, dtype=np.int32) % 3,
            propensity=np.full(size, 0.5, np.float32),
            dwell_seconds=np.arange(size, dtype=np.float32),
            num_replays=np.full(size, index, np.int32),
            is_liked=np.arange(size) % 2 == 0,
            satisfaction=np.full(size, 3.5, np.float32),
        ),
        relevant_items=None if index % 5 == 0 else np.array([2, 0], np.int32),
        extras={"year": None if is_lacking else 1990 + index, "weight": index / 4, "note": f"note {index}"},
    )


RECORDS = [make_record(index) for index in range(1, 12)]


ONE_ITEM = Catalogue(["song"], np.zeros(1, np.int32), ("music",), np.zeros((1, 4), np.float32), ["{}"])


def write_records(
    path: Path, given: Iterable[Record], records_per_shard: int = 4, catalogue: Catalogue = CATALOGUE
) -> None:
    """A data set with one split, record by record and without waiting for more."""
    with DatasetWriter(path, SPEC, records_per_shard=records_per_shard) as writer:
        writer.write_catalogue(catalogue)
        for record in given:
            writer.write_columns("train", records_to_columns([record], SPEC))


def write_tiny(path: Path, num_test: int = 4) -> Path:
    """A data set of 7 training records in 3 shards, and of ``num_test`` test records."""
    with DatasetWriter(path, SPEC, records_per_shard=3) as writer:
        writer.write_catalogue(CATALOGUE)
        for record in RECORDS[:7]:
            writer.write("train", record)
        for record in RECORDS[7 : 7 + num_test]:
            writer.write("test", record)
        writer.set_reference("test", {"emotion/accuracy": 0.9})
        writer.set_counts("sanitised", {"vision": 2})
    return path


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "tiny")


def rewrite_entry(path: Path, file: Path, **changes: int | str) -> None:
    """Changes what the manifest says of a file."""
    manifest = json.loads((path / "manifest.json").read_text())
    shards = [shard for split in manifest["splits"].values() for shard in split["shards"]]
    entry = next(shard for shard in [*shards, manifest["catalogue"]] if shard["file"] == file.name)
    entry.update(changes)
    (path / "manifest.json").write_text(json.dumps(manifest))


def accept_file(path: Path, file: Path) -> None:
    """Makes the manifest's size and hash of a file those that it has."""
    content = file.read_bytes()
    rewrite_entry(path, file, num_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def replace_column(path: Path, file: Path, name: str, column: pa.Array) -> None:
    """Rewrites a shard with another column of the same type, known to the manifest."""
    with pa.ipc.open_file(file) as reader:
        table = reader.read_all()
    table = table.set_column(table.schema.get_field_index(name), table.schema.field(name), column)
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    accept_file(path, file)


def test_every_value_is_read_back_over_shards_and_joined_splits(tiny: Path) -> None:
    split = Dataset.open(tiny, verify=True).split("train", "test")
    expected = RECORDS
    order = np.random.default_rng(0).permutation(11)
    shuffled = [expected[index] for index in order]
    assert split.num_records == 11
    assert split.ids(order) == [record.id for record in shuffled]
    for modality, dtype in (("vision", np.float16), ("text", np.float32)):
        features = [record.features[modality] for record in shuffled]
        sizes = [0 if array is None else len(array) for array in features]
        assert split.lengths(modality)[order].tolist() == sizes
        tokens, kept = split.gather_tokens(modality, order, 6)
        assert tokens.dtype == dtype
        assert kept.tolist() == sizes
        for row, array in enumerate(features):
            wanted = np.zeros((6, SPEC.modalities[modality].dim), np.float32)
            if array is not None:
                wanted[: len(array)] = array.astype(dtype)
            np.testing.assert_array_equal(tokens[row], wanted)
    for name, missing in (("emotion", 0), ("sentiment", 0.0), ("feelings", [0.0, 0.0])):
        values, is_labelled = split.gather_label(name, order)
        given = [record.labels[name] for record in shuffled]
        assert is_labelled.tolist() == [value is not None for value in given]
        np.testing.assert_array_equal(values, np.array([missing if value is None else value for value in given]))
    assert split.gather_label("emotion", order)[0].dtype == np.int32
    assert split.gather_label("feelings", order)[0].dtype == np.float32


def test_padding_is_zero_whatever_the_memory_held_before(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dirty(shape: tuple[int, ...], dtype: str) -> np.ndarray:
        return np.full(shape, 7, dtype)

    monkeypatch.setattr(records, "aligned_empty", dirty)
    split = Dataset.open(tiny).split("train")
    for modality in ("vision", "text"):
        tokens, kept = split.gather_tokens(modality, np.arange(split.num_records), 6)
        is_padding = np.arange(6) >= kept[:, None]
        assert is_padding.any()
        assert not tokens[is_padding].any()
        assert tokens[~is_padding].any()


def test_tokens_start_where_a_cpu_device_takes_them_without_a_copy(tiny: Path) -> None:
    split = Dataset.open(tiny).split("train")
    for num_records in range(1, 7):
        tokens, _ = split.gather_tokens("text", np.arange(num_records), 5)
        placed = jax.device_put(tokens)
        assert placed.unsafe_buffer_pointer() == tokens.ctypes.data


def test_slates_and_relevant_items_are_cut_and_filled(tiny: Path) -> None:
    split = Dataset.open(tiny).split("train")
    indices = np.array([5, 2, 0])  # r6 has no slate, r3 none either, r1 has two items
    slate = RECORDS[0].slate
    assert slate is not None
    assert split.gather_list("slate_item_index", indices, 3, -1).tolist() == [[-1] * 3, [-1] * 3, [0, 1, -1]]
    assert split.gather_list("slate_is_liked", np.array([0]), 3, False).tolist() == [[True, False, False]]
    assert split.gather_list("slate_satisfaction", np.array([0]), 1, 0).tolist() == [[3.5]]
    assert split.gather_list("relevant_items", np.array([4, 0]), 3, -1).tolist() == [[-1, -1, -1], [2, 0, -1]]


def test_tokens_beyond_the_maximum_are_cut_from_the_end(tiny: Path) -> None:
    split = Dataset.open(tiny).split("train")
    tokens, kept = split.gather_tokens("text", np.array([2]), 2)
    features = RECORDS[2].features["text"]
    assert features is not None
    assert len(features) == 5
    assert kept.tolist() == [2]
    np.testing.assert_array_equal(tokens[0], features[:2])


def test_scalar_columns_mark_what_is_missing(tiny: Path) -> None:
    split = Dataset.open(tiny).split("train")
    assert split.column("user_id") == [record.user_id for record in RECORDS[:7]]
    np.testing.assert_array_equal(split.column("turn"), [1, 2, np.nan, 4, 5, np.nan, 7])
    np.testing.assert_array_equal(split.column("extra_weight"), np.arange(1, 8, dtype=np.float32) / 4)
    with pytest.raises(InputError, match=r"'vision'.*turn"):
        split.column("vision")


def test_catalogue_manifest_and_reference_are_read_back(tiny: Path) -> None:
    dataset = Dataset.open(tiny, verify=True)
    catalogue = dataset.catalogue()
    assert catalogue is not None
    assert (catalogue.ids, catalogue.texts) == (CATALOGUE.ids, CATALOGUE.texts)
    assert catalogue.kind_names == CATALOGUE.kind_names
    np.testing.assert_array_equal(catalogue.kind, CATALOGUE.kind)
    np.testing.assert_array_equal(catalogue.features, CATALOGUE.features)
    assert dataset.spec == SPEC
    assert dataset.split_names == ("test", "train")
    assert dataset.reference("test") == {"emotion/accuracy": 0.9}
    assert dataset.reference("train") == {}
    assert dataset.manifest["counts"] == {"sanitised": {"vision": 2}}
    train = dataset.manifest["splits"]["train"]
    assert train["longest_tokens"] == {"text": 5, "vision": 4}
    assert [shard["num_records"] for shard in train["shards"]] == [3, 3, 1]


def test_pyarrow_and_pandas_read_a_shard_without_this_package(tiny: Path) -> None:
    with pa.memory_map(str(tiny / "train-00000.arrow")) as source:
        table = pa.ipc.open_file(source).read_all()
    assert table.column("id").to_pylist() == ["r1", "r2", "r3"]
    assert table.column("vision").to_pylist()[2] is None
    assert table.schema.field("vision").type == pa.large_list(pa.list_(pa.float16(), 3))
    frame = pd.read_feather(tiny / "train-00000.arrow")
    features = RECORDS[1].features["text"]
    assert features is not None
    np.testing.assert_array_equal(np.stack(frame["text"][1]), features)
    assert frame["label_emotion"][1] == 2


def test_shards_are_uncompressed_and_read_without_copying(tmp_path: Path) -> None:
    spec = DatasetSpec("large", "", "", "", {"text": ModalitySpec(64, "float32")})
    values = np.ones((20_000, 64), np.float32)
    with DatasetWriter(tmp_path / "large", spec) as writer:
        writer.write_columns("train", RecordColumns([str(i) for i in range(1000)], features={"text": ragged(values)}))
    (file,) = (tmp_path / "large").glob("*.arrow")
    assert file.stat().st_size > values.nbytes
    before = pa.total_allocated_bytes()
    dataset = Dataset.open(tmp_path / "large")
    (name, batch), *_ = dataset.shard_batches("train")
    flat, _, _ = list_parts(name, "text", batch)
    tokens, _ = dataset.split("train").gather_tokens("text", np.array([0, 999]), 20)
    assert (tokens == 1).all()
    assert pa.total_allocated_bytes() - before < 100_000
    assert not flat.flags.owndata
    assert not flat.flags.writeable
    address = flat.__array_interface__["data"][0]
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(file))]
    bounds = [tuple(int(part, 16) for part in entry[0].split("-")) for entry in maps]
    assert any(start <= address < end for start, end in bounds)


def ragged(values: np.ndarray) -> Ragged:
    """1,000 records of 20 tokens."""
    return Ragged(values, np.full(1000, 20))


def test_open_shards_hold_no_file_descriptor(tiny: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    split = Dataset.open(tiny).split("train", "test")
    split.lengths("text")
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_pickled_split_reads_the_same(tiny: Path) -> None:
    split = Dataset.open(tiny).split("train", "test")
    indices = np.arange(11)
    tokens, _ = split.gather_tokens("vision", indices, 4)
    content = pickle.dumps(split)
    assert len(content) < 20_000
    np.testing.assert_array_equal(pickle.loads(content).gather_tokens("vision", indices, 4)[0], tokens)


def test_equal_records_give_equal_bytes_however_they_are_handed_over(tiny: Path, tmp_path: Path) -> None:
    again = write_tiny(tmp_path / "again")
    parts = tmp_path / "parts"
    with DatasetWriter(parts, SPEC, records_per_shard=3) as writer:
        for start, end in ((0, 2), (2, 7)):
            writer.write_columns("train", records_to_columns(RECORDS[start:end], SPEC))
        writer.write_columns("test", records_to_columns(RECORDS[7:], SPEC))
        writer.write_catalogue(CATALOGUE)
        writer.set_counts("sanitised", {"vision": 2})
        writer.set_reference("test", {"emotion/accuracy": 0.9})
    names = sorted(file.name for file in tiny.iterdir())
    assert "train-00002.arrow" in names
    for other in (again, parts):
        assert sorted(file.name for file in other.iterdir()) == names
        for name in names:
            assert (other / name).read_bytes() == (tiny / name).read_bytes(), name


def test_written_arrays_may_be_reused_by_the_caller(tmp_path: Path) -> None:
    text_spec = {"text": ModalitySpec(1, "float32")}
    spec = DatasetSpec("reuse", "", "", "", text_spec, {"score": LabelSpec("real")}, has_relevant_items=True)
    values, scores = np.ones((2, 1), np.float32), np.ones(2, np.float32)
    items = np.ones(2, np.int32)
    with DatasetWriter(tmp_path / "reuse", spec) as writer:
        writer.write_catalogue(CATALOGUE)
        for start in (0, 2):
            text = Ragged(values, np.ones(2, np.int64))
            labels = {"score": MaskedColumn(scores)}
            columns = RecordColumns([str(start), str(start + 1)], features={"text": text}, labels=labels)
            columns.relevant_items = Ragged(items, np.ones(2, np.int64))
            writer.write_columns("train", columns)
            items += 1
            values += 1
            scores += 1
    split = Dataset.open(tmp_path / "reuse").split("train")
    assert split.gather_tokens("text", np.arange(4), 1)[0].ravel().tolist() == [1, 1, 2, 2]
    assert split.gather_label("score", np.arange(4))[0].tolist() == [1, 1, 2, 2]
    assert split.gather_list("relevant_items", np.arange(4), 1, -1).ravel().tolist() == [1, 1, 2, 2]


def test_an_exception_leaves_nothing_behind(tmp_path: Path) -> None:
    def records_then_failure() -> Iterator[Record]:
        yield from RECORDS
        assert len(list(tmp_path.glob(".*/train-*.arrow"))) == 5
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_records(tmp_path / "new", records_then_failure(), records_per_shard=2)
    with pytest.raises(InputError, match="catalogue has 1 items"):
        write_records(tmp_path / "new", RECORDS, catalogue=ONE_ITEM)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_replaced_unless_asked_and_only_by_a_complete_data_set(tiny: Path) -> None:
    before = (tiny / "manifest.json").read_bytes()
    with pytest.raises(InputError, match="tiny: exists already"):
        DatasetWriter(tiny, SPEC)
    with pytest.raises(RuntimeError), DatasetWriter(tiny, SPEC, overwrite=True):
        raise RuntimeError
    assert (tiny / "manifest.json").read_bytes() == before
    spec = DatasetSpec("other", "", "", "", {"text": ModalitySpec(2, "float32")})
    with DatasetWriter(tiny, spec, overwrite=True) as writer:
        writer.write("train", Record("a", features={"text": np.ones((1, 2))}))
    assert Dataset.open(tiny, verify=True).spec == spec
    assert [entry.name for entry in tiny.parent.iterdir()] == ["tiny"]
    (tiny.parent / "mine").mkdir()
    (tiny.parent / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match="not a data set"):
        DatasetWriter(tiny.parent / "mine", SPEC, overwrite=True)


def bad_slate(**changes: np.ndarray) -> Slate:
    good = dict(
        item_index=np.array([0, 1], np.int32),
        propensity=np.full(2, 0.5, np.float32),
        dwell_seconds=np.zeros(2, np.float32),
        num_replays=np.zeros(2, np.int32),
        is_liked=np.zeros(2, bool),
        satisfaction=np.ones(2, np.float32),
    )
    return Slate(**{**good, **changes})


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (Record("bad", features={"text": np.array([[0, np.nan]])}), r"'bad': text .*not finite"),
        (Record("bad", features={"vision": np.full((1, 3), 1e6)}), r"'bad': vision .*not finite as float16"),
        (Record("bad", features={"text": np.ones((1, 3))}), r"'bad': text .*\[1, 3\].*expected"),
        (Record("bad", features={"text": np.ones((1, 2), np.int32)}), r"'bad': text is int32"),
        (Record("bad", features={"text": np.ones((0, 2))}), r"'bad': text has 0 tokens"),
        (Record("bad", features={"audio": np.ones((1, 2))}), r"'bad': modality 'audio'.*vision, text"),
        (Record("bad", labels={"emotion": 3}), r"'bad': label emotion = 3.*neutral, joy, anger"),
        (Record("bad", labels={"emotion": -1}), r"'bad': label emotion = -1"),
        (Record("bad", labels={"emotion": "joy"}), r"'bad': label emotion = 'joy'"),
        (Record("bad", labels={"mood": 0}), r"'bad': label 'mood'"),
        (Record("bad", labels={"feelings": np.array([0, 1.5])}), r"'bad': label feelings.*\[0, 1\]"),
        (Record("bad", labels={"feelings": np.array([1.0])}), r"'bad': label feelings has shape \(1,\)"),
        (Record("bad", labels={"sentiment": np.inf}), r"'bad': label sentiment is not finite"),
        (Record("bad", slate=bad_slate(propensity=np.array([0.5, 0.0]))), r"'bad': slate propensity = 0.0"),
        (Record("bad", slate=bad_slate(is_liked=np.array([True]))), r"'bad': slate fields differ in length"),
        (Record("bad", slate=bad_slate(item_index=np.array([0, -1]))), r"'bad': slate names item -1"),
        (
            Record("bad", slate=bad_slate(item_index=np.array([3, 0]))),
            r"'bad': item index 3: the catalogue has 3 items",
        ),
        (Record("bad", relevant_items=np.array([0, 9])), r"'bad': item index 9"),
        (Record("bad", turn=2**40), r"turn: a value does not fit int32"),
        (Record("r1"), r"'r1': occurs twice in split 'train'"),
        (Record(""), r"record id ''"),
    ],
)
def test_a_record_that_does_not_fit_is_refused_by_name(record: Record, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        write_records(tmp_path / "new", [*RECORDS[:6], record])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modalities": {"smell": ModalitySpec(1, "float32")}}, "modality 'smell'"),
        ({"modalities": {"text": ModalitySpec(0, "float32")}}, "dim >= 1"),
        ({"labels": {"emotion": LabelSpec("categorical", ("a", "a"))}}, "each name once"),
        ({"labels": {"emotion": LabelSpec("categorical")}}, "do not fit its kind"),
        ({"labels": {"a/b": LabelSpec("real")}}, "label 'a/b'"),
        ({"extras": {"year": "int64"}}, "'int64'.*int32"),
    ],
)
def test_a_description_that_no_shard_can_hold_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DatasetSpec(**{"name": "n", "description": "", "source": "", "licence": "", "modalities": {}, **changes})  # type: ignore[arg-type]


def test_a_truncated_shard_is_refused_by_name(tiny: Path) -> None:
    file = tiny / "train-00001.arrow"
    content = file.read_bytes()
    for size in (0, 5, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:size])
        with pytest.raises(InputError, match=rf"train-00001\.arrow.*{size} bytes"):
            Dataset.open(tiny)
    # Nor does a manifest that agrees about the size make it whole.
    for size in (0, 5, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:size])
        rewrite_entry(tiny, file, num_bytes=size)
        with pytest.raises(InputError, match=r"train-00001\.arrow"):
            Dataset.open(tiny)


def test_any_flipped_byte_is_found_by_verification(tiny: Path) -> None:
    file = tiny / "train-00000.arrow"
    content = file.read_bytes()
    for position in range(0, len(content), 97):
        flipped = bytearray(content)
        flipped[position] ^= 0x10
        file.write_bytes(flipped)
        with pytest.raises(InputError, match=r"train-00000\.arrow"):
            Dataset.open(tiny, verify=True)
    file.write_bytes(content)
    Dataset.open(tiny, verify=True)


def test_a_flipped_byte_in_the_catalogue_is_found(tiny: Path) -> None:
    file = tiny / "catalogue.arrow"
    content = bytearray(file.read_bytes())
    position = content.index(CATALOGUE.features.tobytes())
    content[position] ^= 1
    file.write_bytes(content)
    Dataset.open(tiny)
    with pytest.raises(InputError, match=r"catalogue\.arrow: SHA-256"):
        Dataset.open(tiny, verify=True)


def test_a_missing_file_is_refused_by_name(tiny: Path) -> None:
    (tiny / "test-00000.arrow").unlink()
    with pytest.raises(InputError, match=r"test-00000\.arrow: missing"):
        Dataset.open(tiny)
    shutil.rmtree(tiny)
    with pytest.raises(InputError, match=r"tiny: not a data set"):
        Dataset.open(tiny)


def test_a_foreign_arrow_file_is_refused_by_name(tiny: Path) -> None:
    file = tiny / "train-00000.arrow"
    table = pa.table({"x": [1, 2, 3]})
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    accept_file(tiny, file)
    with pytest.raises(InputError, match=r"train-00000\.arrow: a foreign Arrow file"):
        Dataset.open(tiny)
    file.write_text("id,emotion\n")
    accept_file(tiny, file)
    with pytest.raises(InputError, match=r"train-00000\.arrow: not a readable Arrow IPC file"):
        Dataset.open(tiny)


def test_another_version_is_refused_by_name(tiny: Path) -> None:
    file = tiny / "train-00000.arrow"
    with pa.ipc.open_file(file) as reader:
        table = reader.read_all()
    table = table.replace_schema_metadata({**table.schema.metadata, b"mmei_jax.schema_version": b"2"})
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    accept_file(tiny, file)
    with pytest.raises(InputError, match=r"train-00000\.arrow: schema version 2.*version 1"):
        Dataset.open(tiny)
    manifest = json.loads((tiny / "manifest.json").read_text())
    (tiny / "manifest.json").write_text(json.dumps({**manifest, "schema_version": 0}))
    with pytest.raises(InputError, match=r"manifest\.json: schema version 0"):
        Dataset.open(tiny)


def test_a_shard_of_another_split_encoder_or_type_is_refused_by_name(tiny: Path, tmp_path: Path) -> None:
    shutil.copy(tiny / "test-00000.arrow", tiny / "train-00000.arrow")
    accept_file(tiny, tiny / "train-00000.arrow")
    with pytest.raises(InputError, match=r"train-00000\.arrow: holds records of split 'test'"):
        Dataset.open(tiny)
    for number, (spec, message) in enumerate(
        [
            (ModalitySpec(3, "float16", Producer(encoder="other")), r"another description"),
            (ModalitySpec(3, "float32"), r"column 'vision' is .*float.*the manifest says .*halffloat"),
        ]
    ):
        path = write_tiny(tmp_path / f"mixed{number}")
        changed = DatasetSpec.from_json({**SPEC.to_json(), "modalities": {}})
        changed.modalities.update({**SPEC.modalities, "vision": spec})
        with DatasetWriter(tmp_path / f"other{number}", changed, records_per_shard=3) as writer:
            writer.write_catalogue(CATALOGUE)
            for record in RECORDS[:3]:
                writer.write("train", record)
        shutil.copy(tmp_path / f"other{number}" / "train-00000.arrow", path / "train-00000.arrow")
        accept_file(path, path / "train-00000.arrow")
        with pytest.raises(InputError, match=rf"train-00000\.arrow: .*{message}"):
            Dataset.open(path)


def test_counts_that_differ_from_the_manifest_are_refused(tiny: Path) -> None:
    original = (tiny / "manifest.json").read_text()
    rewrite_entry(tiny, tiny / "train-00001.arrow", num_bytes=99)
    with pytest.raises(InputError, match=r"train-00001\.arrow: \d+ bytes, the manifest says 99"):
        Dataset.open(tiny)
    (tiny / "manifest.json").write_text(original)
    rewrite_entry(tiny, tiny / "train-00002.arrow", num_records=2)
    with pytest.raises(InputError, match=r"train-00002\.arrow: 1 records, the manifest says 2"):
        Dataset.open(tiny)
    manifest = json.loads(original)
    manifest["splits"]["train"]["num_records"] = 8
    (tiny / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"manifest\.json: split 'train' has 8 records, its shards hold 7"):
        Dataset.open(tiny)


def test_a_manifest_that_is_broken_foreign_or_incomplete_is_refused(tiny: Path) -> None:
    original = json.loads((tiny / "manifest.json").read_text())
    broken = [("{", "not JSON"), ("[]", "foreign"), ('{"format": "other"}', "foreign")]
    lacking = [{key: value for key, value in original.items() if key != name} for name in ("spec", "splits", "counts")]
    for text, message in broken + [(json.dumps(manifest), "not a complete manifest") for manifest in lacking]:
        (tiny / "manifest.json").write_text(text)
        with pytest.raises(InputError, match=rf"manifest\.json: .*{message}"):
            Dataset.open(tiny)


def test_offsets_outside_the_values_name_file_and_record(tiny: Path) -> None:
    file = tiny / "train-00001.arrow"
    content = file.read_bytes()
    features = [record.features["text"] for record in RECORDS[3:6]]
    offsets = np.cumsum([0, *(len(array) for array in features if array is not None)])
    position = content.index(offsets.astype(np.int64).tobytes())
    offsets[2] = 10**6
    file.write_bytes(content[:position] + offsets.tobytes() + content[position + offsets.nbytes :])
    accept_file(tiny, file)
    message = r"train-00001\.arrow: record 1 \(id 'r5'\): the offsets of text run outside its values"
    with pytest.raises(InputError, match=message):
        Dataset.open(tiny, verify=True)
    with pytest.raises(InputError, match=message):
        Dataset.open(tiny).split("train").gather_tokens("text", np.array([0]), 1)


def test_values_that_no_writer_of_ours_would_write_name_file_and_record(tiny: Path) -> None:
    file = tiny / "test-00000.arrow"
    replace_column(tiny, file, "label_emotion", pa.array([0, 7, 1], pa.int32()))
    with pytest.raises(InputError, match=r"test-00000\.arrow: record 1 \(id 'r9'\): label emotion = 7"):
        Dataset.open(tiny, verify=True)
    shutil.rmtree(tiny)
    write_tiny(tiny)
    text = pa.array([[[0, 0]], [[0, 0], [0, np.nan]], None], pa.large_list(pa.list_(pa.float32(), 2)))
    replace_column(tiny, file, "text", text)
    with pytest.raises(InputError, match=r"test-00000\.arrow: record 1 \(id 'r9'\): text is not finite"):
        Dataset.open(tiny, verify=True)
    shutil.rmtree(tiny)
    write_tiny(tiny)
    replace_column(tiny, file, "relevant_items", pa.array([None, [], [0, 3]], pa.large_list(pa.int32())))
    with pytest.raises(InputError, match=r"test-00000\.arrow: record 2 \(id 'r10'\): relevant_items holds 3"):
        Dataset.open(tiny, verify=True)


def test_what_lies_behind_a_null_is_never_read(tiny: Path) -> None:
    hidden = pa.array(np.ones(6, np.float32))
    mask = pa.array([False, True, True])
    replace_column(
        tiny, tiny / "test-00000.arrow", "label_feelings", pa.FixedSizeListArray.from_arrays(hidden, 2, mask=mask)
    )
    tokens = pa.FixedSizeListArray.from_arrays(hidden, 2)
    text = pa.LargeListArray.from_arrays(pa.array([0, 1, 2, 3], pa.int64()), tokens, mask=mask)
    replace_column(tiny, tiny / "test-00000.arrow", "text", text)
    split = Dataset.open(tiny, verify=True).split("test")
    values, is_labelled = split.gather_label("feelings", np.arange(3))
    assert values.tolist() == [[1, 1], [0, 0], [0, 0]]
    assert is_labelled.tolist() == [True, False, False]
    assert split.lengths("text")[:3].tolist() == [1, 0, 0]
    assert split.gather_tokens("text", np.arange(3), 1)[0].tolist() == [[[1, 1]], [[0, 0]], [[0, 0]]]


def test_the_longest_length_is_over_all_records(tmp_path: Path) -> None:
    write_records(tmp_path / "new", [RECORDS[6], RECORDS[0]])
    entry = Dataset.open(tmp_path / "new").manifest["splits"]["train"]
    assert entry["longest_tokens"] == {"text": 5, "vision": 4}


def test_unknown_names_and_indices_are_refused(tiny: Path) -> None:
    dataset = Dataset.open(tiny)
    for names in ((), ("valid",), ("train", "train")):
        with pytest.raises(InputError, match="split"):
            dataset.split(*names)
    split = dataset.split("train")
    with pytest.raises(InputError, match="modality 'audio'"):
        split.gather_tokens("audio", np.array([0]), 1)
    with pytest.raises(InputError, match="label 'mood'"):
        split.gather_label("mood", np.array([0]))
    with pytest.raises(InputError, match="list column 'turn'"):
        split.gather_list("turn", np.array([0]), 1, 0)
    for index in (-1, 7):
        outside = np.array([index])
        with pytest.raises(IndexError):
            split.gather_tokens("text", outside, 1)
        with pytest.raises(IndexError):
            split.gather_label("emotion", outside)
        with pytest.raises(IndexError):
            split.ids(outside)


def test_the_command_shows_a_data_set_or_one_line(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert records.main([str(tiny), "--verify"]) == 0
    shown = capsys.readouterr().out
    assert "train" in shown
    assert "SHA-256" in shown
    (tiny / "train-00000.arrow").write_bytes(b"")
    assert records.main([str(tiny)]) == 2
    assert records.main([str(tiny / "nowhere")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert [line.split(":")[0] for line in captured.err.splitlines()] == ["error", "error"]


def test_memory_stays_bounded_while_a_split_grows(tmp_path: Path) -> None:
    spec = DatasetSpec("many", "", "", "", {"text": ModalitySpec(64, "float32")})
    used = []
    tracemalloc.start()
    try:
        with DatasetWriter(tmp_path / "many", spec, records_per_shard=700) as writer:
            for chunk in range(12):
                features = {"text": ragged(np.ones((20_000, 64), np.float32))}
                writer.write_columns("train", RecordColumns([f"{chunk}/{i}" for i in range(1000)], features=features))
                used.append(tracemalloc.get_traced_memory()[0] + pa.total_allocated_bytes())
    finally:
        tracemalloc.stop()
    # A chunk is 5 MB. What waits for its shard to be full is at most a shard, and views of two chunks.
    assert max(used) < 25_000_000
    assert max(used[-3:]) < max(used[:6]) + 1_000_000
    assert Dataset.open(tmp_path / "many").split("train").num_records == 12_000
