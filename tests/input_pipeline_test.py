"""The input pipeline: which records, in which order, in which shapes; what is resumed, and what is refused."""

import dataclasses
import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from configs import default
from mmei_jax import config as config_lib
from mmei_jax import input_pipeline
from mmei_jax.batching import BatchReader
from mmei_jax.config import Config
from mmei_jax.input_pipeline import BatchSource, RankingStatistics, SequentialOrder, ShuffledOrder
from mmei_jax.packing import Arranger, padded_layouts
from mmei_jax.record_order import permute
from mmei_jax.records import (
    Catalogue,
    Dataset,
    DatasetSpec,
    DatasetWriter,
    LabelSpec,
    ModalitySpec,
    Record,
    Slate,
    Split,
)
from mmei_jax.types import Batch, InputError

DIMS = {"vision": 3, "audio": 4, "text": 2}
NUM_ITEMS = 6
SPEC = DatasetSpec(
    name="tiny",
    description="records of a test",
    source="made here",
    licence="CC0",
    modalities={name: ModalitySpec(dim, "float32") for name, dim in DIMS.items()},
    labels={
        "emotion": LabelSpec("categorical", ("neutral", "joy", "anger")),
        "intent": LabelSpec("categorical", ("relax", "learn")),
        "feelings": LabelSpec("multi_label", ("glad", "sad")),
        "sentiment": LabelSpec("real"),
        "unused": LabelSpec("categorical", ("a", "b")),
    },
    has_slates=True,
    has_relevant_items=True,
)
CATALOGUE = Catalogue(
    ids=[f"item{index}" for index in range(NUM_ITEMS)],
    kind=np.arange(NUM_ITEMS, dtype=np.int32) % 3,
    kind_names=("music", "video", "text"),
    features=np.arange(NUM_ITEMS * 5, dtype=np.float32).reshape(NUM_ITEMS, 5),
    texts=["{}"] * NUM_ITEMS,
)
# Slates as (item, satisfaction, dwell seconds), and the positive that follows.
SLATES: list[tuple[list[tuple[int, float, float]] | None, int]] = [
    ([(2, 3.0, 9.0), (1, 5.0, 1.0), (0, 4.0, 8.0)], 1),  # highest satisfaction
    ([(3, 4.0, 1.0), (1, 4.0, 2.0)], 1),  # equal satisfaction: longest dwell
    ([(4, 2.0, 3.0), (0, 2.0, 3.0), (1, 1.0, 9.0)], 4),  # equal in both: first position
    (None, -1),
    ([(3, -2.0, 1.0), (0, -1.0, 0.0)], 0),  # all worse than the 0 that filler holds
]


def make_record(index: int) -> Record:
    """Record ``index`` of any split: 1 to 6 tokens, audio missing in every 4th, emotion in every 5th."""
    generator = np.random.default_rng(index)
    sizes = {"vision": 1 + index % 6, "audio": 1 + index % 3, "text": 1 + index % 4}
    shown = SLATES[index % len(SLATES)][0]
    slate = None
    if shown is not None:
        items, satisfaction, dwell_seconds = (np.asarray(column) for column in zip(*shown, strict=True))
        slate = Slate(
            item_index=items.astype(np.int32),
            propensity=np.full(len(items), 0.5, np.float32),
            dwell_seconds=dwell_seconds.astype(np.float32),
            num_replays=np.zeros(len(items), np.int32),
            is_liked=np.zeros(len(items), bool),
            satisfaction=satisfaction.astype(np.float32),
        )
    return Record(
        id=f"r{index}",
        features={
            name: None
            if name == "audio" and index % 4 == 3
            else generator.normal(size=(size, DIMS[name])).astype(np.float32)
            for name, size in sizes.items()
        },
        labels={
            "emotion": None if index % 5 == 4 else index % 3,
            "intent": index % 2,
            "feelings": np.array([1.0, 0.0], np.float32),
            "sentiment": index / 2,
        },
        slate=slate,
        relevant_items=None if index % 3 == 2 else np.arange(1 + index % 2, dtype=np.int32),
    )


def write(path: Path, num_train: int = 45, num_test: int = 10, spec: DatasetSpec = SPEC) -> Dataset:
    """Training records in several shards; every split starts anew with record 0."""
    with DatasetWriter(path, spec, records_per_shard=16) as writer:
        if spec.has_slates:
            writer.write_catalogue(CATALOGUE)
        for split, count in (("train", num_train), ("validation", 5), ("test", num_test)):
            for index in range(count):
                record = make_record(index)
                record.features = {name: record.features[name] for name in spec.modalities}
                record.labels = {name: record.labels[name] for name in spec.labels if name in record.labels}
                record.slate = record.slate if spec.has_slates else None
                record.relevant_items = record.relevant_items if spec.has_relevant_items else None
                writer.write(split, record)
    return Dataset.open(path)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write(tmp_path_factory.mktemp("data") / "tiny")


def make_config(**changes: Any) -> Config:
    """The default configuration with small batches; keys such as ``data__batch_size`` change it."""
    source = default.get_config()
    source.data.batch_size = 8
    source.data.evaluation_batch_size = 4
    source.data.max_tokens = {"vision": (6,), "audio": (3,), "text": (4,)}
    for key, value in changes.items():
        group, _, name = key.rpartition("__")
        target = source[group] if group else source
        with target.ignore_type():
            target[name] = value
    return config_lib.parse(source.to_dict())


@pytest.fixture(scope="module")
def sharding() -> NamedSharding:
    mesh = Mesh(np.asarray(jax.devices()[:1]), ("data",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec("data"))


def make_source(dataset: Dataset, config: Config, rows: np.ndarray | None = None, num_batches: int = 11) -> BatchSource:
    """Training batches on the host."""
    split = dataset.split("train")
    statistics = input_pipeline.ranking_statistics(dataset, config)
    size = config.data.batch_size
    order = ShuffledOrder(num_records=split.num_records, batch_size=size, num_batches=num_batches, seed=config.seed)
    arranger = Arranger(split, config.data, size)
    shares = {layout.num_rows: np.arange(layout.num_rows) if rows is None else rows for layout in arranger.layouts}
    return BatchSource(order, arranger, BatchReader(split, config, statistics), shares)


def read_padded(dataset: Dataset, config: Config, indices: list[int]) -> Batch:
    """These training records, one a row."""
    reader = BatchReader(dataset.split("train"), config, input_pipeline.ranking_statistics(dataset, config))
    return reader.read(np.asarray(indices), padded_layouts(config.data, len(indices))[-1])


def assert_batches_equal(first: Batch, second: Batch) -> None:
    assert jax.tree.structure(first) == jax.tree.structure(second)
    jax.tree.map(np.testing.assert_array_equal, first, second)


class TestOrder:
    @pytest.mark.parametrize(("num_records", "batch_size"), [(45, 8), (8, 8), (9, 8), (1080, 64), (2, 1)])
    def test_each_epoch_has_every_record_once_though_batches_cross_its_border(
        self, num_records: int, batch_size: int
    ) -> None:
        num_epochs = 3
        order = ShuffledOrder(num_records=num_records, batch_size=batch_size, num_batches=10**6, seed=3)
        steps = range(-(-num_epochs * num_records // batch_size))
        stream = np.concatenate([order[step] for step in steps])
        for epoch in range(num_epochs):
            records = stream[epoch * num_records : (epoch + 1) * num_records]
            np.testing.assert_array_equal(np.sort(records), np.arange(num_records))

    def test_no_two_epochs_and_no_two_seeds_have_the_same_order(self) -> None:
        # Among them epoch 1 of seed 0 and epoch 0 of seed 1, which a seed of seed + epoch would make equal.
        orders = {
            tuple(ShuffledOrder(num_records=60, batch_size=60, num_batches=5, seed=seed)[epoch].tolist())
            for seed in range(5)
            for epoch in range(5)
        }
        assert len(orders) == 25
        assert tuple(range(60)) not in orders

    def test_order_depends_on_seed_and_epoch_only(self) -> None:
        small = ShuffledOrder(num_records=48, batch_size=4, num_batches=24, seed=7)
        large = ShuffledOrder(num_records=48, batch_size=16, num_batches=6, seed=7)
        np.testing.assert_array_equal(
            np.concatenate([small[step] for step in reversed(range(24))][::-1]),
            np.concatenate([large[step] for step in range(6)]),
        )

    def test_every_place_is_equally_likely(self) -> None:
        num_records, num_seeds = 60, 1000
        orders = [permute(np.arange(num_records), num_records, seed, epoch=0) for seed in range(num_seeds)]
        counts = np.zeros((num_records, num_records))
        np.add.at(counts, (np.arange(num_records)[None], np.asarray(orders)), 1)
        expected = num_seeds / num_records
        chi_squared = np.square(counts - expected).sum() / expected
        # 59 x 59 degrees of freedom: 3481 +- 83; the seeds are fixed, so this does not flicker.
        assert 3481 - 4 * 83 < chi_squared < 3481 + 4 * 83

    @pytest.mark.parametrize(("num_records", "num_batches"), [(10, 3), (8, 2), (1, 1), (3, 1)])
    def test_sequential_order_has_every_record_once_then_filler(self, num_records: int, num_batches: int) -> None:
        order = SequentialOrder(num_records=num_records, batch_size=4)
        assert len(order) == num_batches
        stream = np.concatenate([order[step] for step in range(len(order))])
        np.testing.assert_array_equal(stream[:num_records], np.arange(num_records))
        assert (stream[num_records:] == -1).all()

    @pytest.mark.parametrize(
        ("num_records", "num_epochs", "expected"), [(45, 3, 16), (8, 1, 1), (15, 1, 1), (1080, 2, 270)]
    )
    def test_number_of_steps_counts_whole_batches_over_all_epochs(
        self, num_records: int, num_epochs: int, expected: int
    ) -> None:
        assert input_pipeline.num_steps(num_records, 8, num_epochs) == expected

    def test_batch_larger_than_the_data_is_refused(self) -> None:
        with pytest.raises(InputError, match=r"config\.data\.batch_size = 8: expected at most 7"):
            input_pipeline.num_steps(7, 8, 10)


class TestBatch:
    def test_rows_hold_the_records_named_by_record_index(self, dataset: Dataset) -> None:
        batch = make_source(dataset, make_config())[5]
        assert batch.is_record.all()
        assert batch.record_index.dtype == np.int32
        for row, index in enumerate(batch.record_index):
            record = make_record(int(index))
            for name, sequence in batch.sequences().items():
                features = record.features[name]
                size = 0 if features is None else len(features)
                assert sequence.features.dtype == SPEC.modalities[name].dtype
                assert sequence.segment_ids.dtype == np.int32
                assert sequence.segment_ids[row].tolist() == [1] * size + [0] * (sequence.segment_ids.shape[1] - size)
                if features is not None:
                    np.testing.assert_array_equal(sequence.features[row, :size], features)
            emotion = record.labels["emotion"]
            assert batch.emotion.is_labelled[row] == (emotion is not None)
            assert batch.emotion.value[row] == (emotion or 0)
            assert batch.intent.value[row] == record.labels["intent"]
        assert batch.intent.is_labelled.all()

    def test_class_id_that_the_manifest_lacks_is_refused_by_record(
        self, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        gather = Split.gather_label

        def foreign(self: Split, name: str, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            values, is_labelled = gather(self, name, indices)
            return np.where(indices == 7, 99, values).astype(np.int32), is_labelled | (indices == 7)

        monkeypatch.setattr(Split, "gather_label", foreign)
        source = make_source(dataset, make_config())
        with pytest.raises(InputError, match=r"label 'emotion' is 99: expected 0 to"):
            [source[step] for step in range(len(source))]

    def test_full_row_is_valid_throughout_and_longer_records_are_cut(self, dataset: Dataset) -> None:
        config = make_config(data__max_tokens={"vision": (4,), "audio": (3,), "text": (4,)})
        batch = read_padded(dataset, config, [3, 5, 0])  # 4, 6 and 1 tokens of vision
        np.testing.assert_array_equal(batch.vision.segment_ids.sum(axis=1), [4, 4, 1])
        np.testing.assert_array_equal(batch.vision.features[1], make_record(5).features["vision"][:4])

    def test_modalities_and_tasks_that_are_switched_off_are_none(self, dataset: Dataset) -> None:
        config = make_config(data__modalities=("text",), loss__intent="none", loss__ranking="none")
        batch = make_source(dataset, config)[0]
        assert list(batch.sequences()) == ["text"]
        assert batch.intent is None
        assert batch.ranking is None

    @pytest.mark.parametrize(
        ("task", "label", "dtype", "shape"),
        [("sigmoid", "feelings", np.float32, (8, 2)), ("regression", "sentiment", np.float32, (8,))],
    )
    def test_label_has_the_form_of_its_task(
        self, dataset: Dataset, task: str, label: str, dtype: type, shape: tuple[int, ...]
    ) -> None:
        config = make_config(loss__emotion=task, loss__emotion_label=label)
        input_pipeline.check(dataset, config)
        value = make_source(dataset, config)[0].emotion.value
        assert value.dtype == dtype
        assert value.shape == shape

    @pytest.mark.parametrize(
        ("indices", "bucket"),
        [
            ([0, 12, 24], 0),  # 1 token of each
            ([1, 0], 0),  # 2 vision, 2 audio, 2 text: all fit
            ([2], 1),  # 3 tokens of each
            ([0, 12, 6], 1),  # 3 of text in the last
            ([4], 2),  # 5 of vision, 2 of audio, 1 of text: one modality decides
            ([0, -1, -1], 0),  # filler needs nothing
            ([], 0),
        ],
    )
    def test_smallest_bucket_into_which_all_records_and_modalities_fit(
        self, dataset: Dataset, indices: list[int], bucket: int
    ) -> None:
        buckets = {"vision": (2, 4, 5), "audio": (2, 3, 4), "text": (2, 4, 5)}
        arranger = Arranger(dataset.split("train"), make_config(data__max_tokens=buckets).data, 3)
        layout, places = arranger.arrange(np.asarray(indices, np.int64))
        assert layout == arranger.layouts[bucket]
        assert layout.num_tokens == {name: sizes[bucket] for name, sizes in buckets.items()}
        assert places.tolist() == indices

    def test_record_beyond_the_last_bucket_takes_the_last(self, dataset: Dataset) -> None:
        config = make_config(data__max_tokens={"vision": (2, 4), "audio": (2, 3), "text": (2, 4)})
        layout, _ = Arranger(dataset.split("train"), config.data, 1).arrange(np.array([5]))
        assert layout.num_tokens == {"vision": 4, "audio": 3, "text": 4}
        assert read_padded(dataset, config, [5]).vision.segment_ids.shape == (1, 4)

    @pytest.mark.parametrize("num_processes", [2, 4])
    def test_global_batch_does_not_depend_on_the_number_of_processes(
        self, dataset: Dataset, num_processes: int
    ) -> None:
        buckets = {"vision": (4, 6), "audio": (3, 4), "text": (4, 5)}
        config = make_config(data__batch_size=4, data__max_tokens=buckets, loss__ranking="listnet")
        whole = make_source(dataset, config)
        rows = np.split(np.arange(4), num_processes)
        parts = [make_source(dataset, config, part) for part in rows]
        widths = set()
        for step in range(len(whole)):
            joined = jax.tree.map(lambda *arrays: np.concatenate(arrays), *[part[step] for part in parts])
            assert_batches_equal(joined, whole[step])
            widths.add(whole[step].vision.segment_ids.shape[1])
        assert len(widths) > 1, "all batches took the same bucket: the test shows nothing"

    def test_source_can_be_pickled(self, dataset: Dataset) -> None:
        source = make_source(dataset, make_config())
        assert_batches_equal(pickle.loads(pickle.dumps(source))[3], source[3])


class TestRanking:
    def test_positive_is_the_best_received_item_of_the_slate(self, dataset: Dataset) -> None:
        config = make_config()
        ranking = read_padded(dataset, config, [0, 1, 2, 3, 4]).ranking
        expected = np.array([positive for _, positive in SLATES])
        np.testing.assert_array_equal(ranking.positive_index, expected)
        np.testing.assert_array_equal(ranking.has_positive, expected >= 0)
        for row, item in enumerate(expected):
            features = CATALOGUE.features[item] if item >= 0 else np.zeros(5, np.float32)
            np.testing.assert_array_equal(ranking.positive.features[row], features)
            assert ranking.positive.kind[row] == (CATALOGUE.kind[item] if item >= 0 else 0)
        assert ranking.slate is None
        np.testing.assert_array_equal(ranking.relevant_index, [[0, -1], [0, 1], [-1, -1], [0, 1], [0, -1]])

    def test_sampling_probability_is_the_share_of_training_positives(self, dataset: Dataset) -> None:
        # 45 records: 9 of each slate; positives 1, 1, 4, none, 0.
        counts = input_pipeline.positive_counts(dataset.split("train"), NUM_ITEMS)
        np.testing.assert_array_equal(counts, [9, 18, 0, 0, 9, 0])
        statistics = input_pipeline.ranking_statistics(dataset, make_config())
        expected = np.log(np.array([9 / 36, 18 / 36, 1 / 36, 1 / 36, 9 / 36, 1 / 36], np.float64)).astype(np.float32)
        np.testing.assert_array_equal(statistics.log_probability(np.arange(NUM_ITEMS)), expected)

    def test_evaluation_carries_the_training_statistics(self, dataset: Dataset, sharding: NamedSharding) -> None:
        batch = next(input_pipeline.evaluation_batches(dataset, make_config(), ("validation",), sharding))
        expected = np.log(np.array([0.5, 0.5, 0.25, 1.0])).astype(np.float32)
        np.testing.assert_allclose(batch.ranking.log_sampling_probability, expected, rtol=1e-6)

    def test_listwise_loss_gets_whole_slates(self, dataset: Dataset) -> None:
        config = make_config(loss__ranking="listnet")
        slate = read_padded(dataset, config, [1, 3, 4, -1]).ranking.slate
        np.testing.assert_array_equal(slate.item_index, [[3, 1, -1], [-1] * 3, [3, 0, -1], [-1] * 3])
        np.testing.assert_array_equal(slate.is_shown, slate.item_index >= 0)
        np.testing.assert_array_equal(slate.feedback, [[4, 4, 0], [0] * 3, [-2, -1, 0], [0] * 3])
        np.testing.assert_array_equal(slate.items.features[0, :2], CATALOGUE.features[[3, 1]])
        np.testing.assert_array_equal(slate.items.kind, [[0, 1, 0], [0] * 3, [0] * 3, [0] * 3])

    def test_item_outside_the_catalogue_is_refused_by_record(self, dataset: Dataset) -> None:
        with pytest.raises(InputError, match="record 'r0': slate_item_index holds 2: the catalogue has 2 items"):
            input_pipeline.positive_counts(dataset.split("train"), 2)

    def test_data_without_relevant_items_gives_filler(self, tmp_path: Path) -> None:
        bare = write(tmp_path / "bare", spec=dataclasses.replace(SPEC, has_relevant_items=False))
        ranking = make_source(bare, make_config())[0].ranking
        np.testing.assert_array_equal(ranking.relevant_index, np.full((8, 1), -1))


class TestTraining:
    def test_batches_on_devices_are_those_of_the_source(self, dataset: Dataset, sharding: NamedSharding) -> None:
        config = make_config(data__num_reader_threads=3, data__num_prefetch_batches=3)
        source = make_source(dataset, config)
        iterator = input_pipeline.train_iterator(dataset, config, sharding, num_epochs=2)
        batches = list(iterator)
        assert len(batches) == 45 * 2 // 8 == len(source)
        for step, batch in enumerate(batches):
            assert all(leaf.sharding.is_equivalent_to(sharding, leaf.ndim) for leaf in jax.tree.leaves(batch))
            assert_batches_equal(jax.device_get(batch), source[step])

    @pytest.mark.parametrize("num_ahead", [1, 4])
    def test_saved_state_gives_the_identical_rest(
        self, dataset: Dataset, sharding: NamedSharding, num_ahead: int
    ) -> None:
        config = make_config(data__num_reader_threads=num_ahead, data__num_prefetch_batches=num_ahead)
        whole = [
            jax.device_get(batch) for batch in input_pipeline.train_iterator(dataset, config, sharding, num_epochs=2)
        ]
        for taken in np.random.default_rng(0).choice(len(whole), size=4, replace=False):
            iterator = input_pipeline.train_iterator(dataset, config, sharding, num_epochs=2)
            for _ in range(taken):
                next(iterator)
            # Time to prefetch: what lies ready must not count as handed out.
            time.sleep(0.05)
            state = iterator.get_state()
            resumed = input_pipeline.train_iterator(dataset, config, sharding, num_epochs=2)
            resumed.set_state(state)
            for expected, found in zip(whole[taken:], resumed, strict=True):
                assert_batches_equal(jax.device_get(found), expected)
            iterator.close()

    def test_orbax_saves_and_restores_the_position(
        self, dataset: Dataset, sharding: NamedSharding, tmp_path: Path
    ) -> None:
        config = make_config(data__num_prefetch_batches=3)
        iterator = input_pipeline.train_iterator(dataset, config, sharding, num_epochs=2)
        with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
            for _ in range(7):
                next(iterator)
            manager.save(
                7,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave({"step": np.int32(7)}), data=grain.checkpoint.CheckpointSave(iterator)
                ),
            )
            rest = [jax.device_get(batch) for batch in iterator]
            manager.wait_until_finished()
            fresh = input_pipeline.train_iterator(dataset, config, sharding, num_epochs=2)
            next(fresh)
            manager.restore(7, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(fresh)))
            resumed = [jax.device_get(batch) for batch in fresh]
        assert len(rest) == 4
        for expected, found in zip(rest, resumed, strict=True):
            assert_batches_equal(found, expected)

    def test_errors_of_reader_threads_surface_in_next(
        self, dataset: Dataset, sharding: NamedSharding, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        iterator = input_pipeline.train_iterator(dataset, make_config(), sharding)
        next(iterator)

        def fail(*_: object) -> Batch:
            raise InputError("record 'r1': broken")

        monkeypatch.setattr(BatchReader, "read", fail)
        with pytest.raises(InputError, match="record 'r1': broken"):
            list(iterator)

    def test_closing_ends_every_thread(self, dataset: Dataset, sharding: NamedSharding) -> None:
        before = set(threading.enumerate())
        iterator = input_pipeline.train_iterator(dataset, make_config(data__num_reader_threads=4), sharding)
        next(iterator)
        started = set(threading.enumerate()) - before
        assert started
        iterator.close()
        for thread in started:
            thread.join(timeout=10)
        assert not any(thread.is_alive() for thread in started)


class TestEvaluation:
    @pytest.mark.parametrize(("num_test", "batch_size"), [(10, 4), (8, 4), (3, 4), (1, 8)])
    def test_every_record_exactly_once_in_batches_of_one_shape(
        self, tmp_path: Path, sharding: NamedSharding, num_test: int, batch_size: int
    ) -> None:
        found = write(tmp_path / "data", num_train=9, num_test=num_test)
        config = make_config(data__evaluation_batch_size=batch_size, loss__ranking="listnet")
        batches = [jax.device_get(b) for b in input_pipeline.evaluation_batches(found, config, ("test",), sharding)]
        assert len({str(jax.tree.map(np.shape, batch)) for batch in batches}) == 1
        joined = jax.tree.map(lambda *arrays: np.concatenate(arrays), *batches)
        np.testing.assert_array_equal(joined.record_index[joined.is_record], np.arange(num_test))
        assert joined.is_record.sum() == num_test
        filler = jax.tree.map(lambda array: array[~joined.is_record], joined)
        assert len(filler.is_record) == -num_test % batch_size
        assert (filler.record_index == -1).all()
        for sequence in filler.sequences().values():
            assert not sequence.segment_ids.any()
        assert not filler.emotion.is_labelled.any()
        assert not filler.intent.is_labelled.any()
        assert not filler.ranking.has_positive.any()
        assert not filler.ranking.slate.is_shown.any()
        assert (filler.ranking.relevant_index == -1).all()
        assert (filler.ranking.positive_index == -1).all()

    def test_joined_splits_are_read_one_after_the_other(self, dataset: Dataset, sharding: NamedSharding) -> None:
        batches = list(input_pipeline.evaluation_batches(dataset, make_config(), ("test", "validation"), sharding))
        intent = np.concatenate([batch.intent.value for batch in batches])[:15]
        np.testing.assert_array_equal(intent, [index % 2 for index in [*range(10), *range(5)]])


class TestStatistics:
    def test_truncation_is_counted_exactly(self, dataset: Dataset) -> None:
        config = make_config(data__max_tokens={"vision": (2, 4), "audio": (3, 9), "text": (1, 2)})
        report = input_pipeline.truncation_report(dataset.split("test"), config)
        # Vision: 1..6, 1..4; audio: 1, 2, 3, -, 2, 3, 1, -, 3, 1; text: 1..4, 1..4, 1, 2.
        assert dataclasses.astuple(report["vision"]) == (10, 2, 31, 3)
        assert dataclasses.astuple(report["audio"]) == (8, 0, 16, 0)
        assert dataclasses.astuple(report["text"]) == (10, 4, 23, 6)

    @pytest.mark.parametrize("max_tokens", [None, 2])
    def test_mean_and_scale_are_those_of_all_valid_tokens(
        self, dataset: Dataset, max_tokens: int | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("mmei_jax.data_statistics._BYTES_PER_CHUNK", 500)
        tokens = np.concatenate(
            [
                features[:max_tokens]
                for index in range(45)
                if (features := make_record(index).features["audio"]) is not None
            ]
        ).astype(np.float64)
        mean, scale = input_pipeline.feature_statistics(dataset.split("train"), "audio", max_tokens=max_tokens)
        assert mean.dtype == scale.dtype == np.float32
        np.testing.assert_allclose(mean, tokens.mean(axis=0), rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(scale, 1 / tokens.std(axis=0), rtol=1e-6)

    def test_constant_features_keep_scale_one_and_large_means_lose_no_digits(self, tmp_path: Path) -> None:
        spec = DatasetSpec("t", "d", "s", "l", modalities={"text": ModalitySpec(3, "float32")})
        values = np.zeros((200, 3), np.float32)
        values[:, 1] = 0.1
        values[:, 2] = 1e4 + np.random.default_rng(0).normal(size=200)
        with DatasetWriter(tmp_path / "data", spec) as writer:
            for index, row in enumerate(values):
                writer.write("train", Record(str(index), features={"text": row[None]}))
        mean, scale = input_pipeline.feature_statistics(Dataset.open(tmp_path / "data").split("train"), "text")
        np.testing.assert_array_equal(scale[:2], [1.0, 1.0])
        np.testing.assert_allclose(mean, values.astype(np.float64).mean(axis=0), rtol=1e-6)
        np.testing.assert_allclose(scale[2], 1 / values[:, 2].astype(np.float64).std(), rtol=1e-6)


class TestChecks:
    def test_fitting_data_is_accepted(self, dataset: Dataset) -> None:
        input_pipeline.check(dataset, make_config())

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"data__train_splits": ("training",)}, r"split 'training': expected some of test, train, validation"),
            ({"data__test_splits": ("fold9",)}, r"split 'fold9'"),
            ({"loss__emotion_label": "mood"}, r"config\.loss\.emotion_label: .* has no label 'mood'; it has emotion"),
            (
                {"loss__emotion_label": "feelings"},
                r"label 'feelings' .* is multi_label; the task expects categorical",
            ),
            ({"loss__emotion": "regression"}, r"label 'emotion' of .* is categorical; the task expects real"),
            ({"loss__emotion": "sigmoid"}, r"label 'emotion' of .* is categorical; the task expects multi_label"),
            ({"loss__emotion_label": "unused"}, r"no record of split train of .* has label 'unused'"),
            ({"data__batch_size": 46}, r"config\.data\.batch_size = 46: expected at most 45"),
        ],
    )
    def test_what_the_data_lacks_is_refused_by_name(
        self, dataset: Dataset, changes: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(InputError, match=message):
            input_pipeline.check(dataset, make_config(**changes))

    def test_missing_modality_intent_slates_and_catalogue_are_refused(self, tmp_path: Path) -> None:
        bare = DatasetSpec(
            "bare",
            "d",
            "s",
            "l",
            modalities={"text": ModalitySpec(2, "float32")},
            labels={"emotion": SPEC.labels["emotion"]},
        )
        found = write(tmp_path / "bare", spec=bare)
        with pytest.raises(InputError, match=r"config\.data\.modalities: .* lacks 'vision'; it has text"):
            input_pipeline.check(found, make_config())
        text = {"data__modalities": ("text",)}
        with pytest.raises(InputError, match=r"config\.loss\.intent: .* has no label 'intent'; it has emotion"):
            input_pipeline.check(found, make_config(**text))
        text["loss__intent"] = "none"
        with pytest.raises(InputError, match=r"no catalogue; config\.loss\.ranking = 'in_batch_softmax'"):
            input_pipeline.check(found, make_config(**text))
        input_pipeline.check(found, make_config(**text, loss__ranking="none"))

    def test_training_records_without_any_slate_are_refused(self, tmp_path: Path) -> None:
        with DatasetWriter(tmp_path / "data", SPEC) as writer:
            writer.write_catalogue(CATALOGUE)
            for split in ("train", "validation", "test"):
                writer.write(split, dataclasses.replace(make_record(0), slate=None))
        with pytest.raises(InputError, match="no record of split train has a slate"):
            RankingStatistics.from_split(Dataset.open(tmp_path / "data").split("train"), NUM_ITEMS)


PROCESS = """
import sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
port, index, path, out = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=index)
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from mmei_jax import input_pipeline
from mmei_jax.records import Dataset
from tests.input_pipeline_test import make_config, make_source
dataset = Dataset.open(path)
# Devices in another order than their ids: the rows of a process are then not contiguous.
devices = np.asarray(jax.devices())[[0, 2, 1, 3]]
sharding = NamedSharding(Mesh(devices, ("data",), axis_types=(AxisType.Auto,)), PartitionSpec("data"))
config = make_config()
try:
    input_pipeline.process_rows(sharding, 6)
    raise AssertionError("6 rows on 4 devices")
except input_pipeline.InputError as error:
    assert "config.data.batch_size = 6: expected a multiple of the 4" in str(error), error
iterator = input_pipeline.train_iterator(dataset, config, sharding, num_epochs=2)
expected = make_source(dataset, config)
num_compared = 0
for step, batch in enumerate(iterator):
    for found, wanted in zip(jax.tree.leaves(batch), jax.tree.leaves(expected[step]), strict=True):
        assert found.shape == wanted.shape
        for shard in found.addressable_shards:
            np.testing.assert_array_equal(shard.data, wanted[shard.index])
            num_compared += 1
assert step == 10
with open(out, "w") as file:
    file.write(str(num_compared))
"""


def test_two_processes_place_the_global_batch_of_one(dataset: Dataset, tmp_path: Path) -> None:
    import socket

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    root = Path(__file__).parents[1]
    outs = [tmp_path / f"out{index}" for index in range(2)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(port), str(index), str(dataset.path), str(out)],
            cwd=root,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index, out in enumerate(outs)
    ]
    logs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(logs)
    assert all(int(out.read_text()) > 100 for out in outs)
