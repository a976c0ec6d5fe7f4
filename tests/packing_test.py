"""Packed batches: every record once, rows never overfull, few of them; and the same losses as padded batches."""

import itertools
import json

import jax
import ml_collections
import numpy as np
import optax
import pytest

from mmei_jax import input_pipeline
from mmei_jax.batching import BatchReader
from mmei_jax.bin_packing import pack
from mmei_jax.checkpointing import Checkpointer
from mmei_jax.config import parse
from mmei_jax.data_statistics import token_use
from mmei_jax.evaluation import Evaluator
from mmei_jax.packing import Arranger, packed_layouts, padded_layouts
from mmei_jax.record_gathering import RaggedColumn
from mmei_jax.records import Dataset
from mmei_jax.sharding import batch_sharding, make_mesh
from mmei_jax.state import build_model, initial_state, placed_variable_shapes, state_shapes
from mmei_jax.train_step import jit_train_step, make_train_step
from mmei_jax.training import train
from mmei_jax.types import MODALITIES, InputError
from tests import processes, tiny

MAX_TOKENS = np.array([16, 24, 16])
# Rows for the tiny configuration's batches of 16 and evaluation batches of 32.
PACKING = {"records_per_row": 6, "num_rows": (4, 6, 8), "tokens_per_row": {"vision": 32, "audio": 48, "text": 32}}
ONE_LAYOUT = {**PACKING, "num_rows": (6,)}
NO_DROPOUT = {"model__dropout_rate": 0.0, "model__modality_dropout_rate": 0.0}


def packed_config(data, packing=PACKING, **changes):
    config = tiny.config_dict(data, **changes)
    with config.data.ignore_type():
        config.data.packing = packing
    return parse(config.to_dict())


def config_max(config, name):
    return getattr(config.data.max_tokens, name)[-1]


class TestArrange:
    def test_smallest_layout_that_takes_the_batch(self, data):
        config = packed_config(data, {**PACKING, "num_rows": (3, 4, 5)})
        split = Dataset.open(data).split("train")
        arranger = Arranger(split, config.data, 16)
        taken = set()
        by_length = np.argsort(sum(split.lengths(name) for name in MODALITIES))
        for start in range(0, split.num_records - 16, 8):
            indices = by_length[start : start + 16]
            layout, places = arranger.arrange(indices)
            lengths = np.stack(
                [np.minimum(split.lengths(name)[indices], config_max(config, name)) for name in MODALITIES]
            )
            num_rows = pack(lengths.T, np.array([32, 48, 32]), 6).max() + 1
            expected = next((number for number in (3, 4, 5) if number >= num_rows), 16)
            assert layout.num_rows == expected
            np.testing.assert_array_equal(np.sort(places[places >= 0]), np.sort(indices))
            assert len(places) == layout.num_rows * layout.records_per_row
            taken.add(expected)
        assert len(taken) > 2, "hardly any choice was made: the test shows nothing"

    def test_batch_that_fits_nowhere_is_padded_as_without_packing(self, data):
        packing = {**PACKING, "records_per_row": 16, "num_rows": (1,)}
        config = packed_config(data, packing)
        indices = np.arange(16)
        layout, places = Arranger(Dataset.open(data).split("train"), config.data, 16).arrange(indices)
        assert layout == padded_layouts(config.data, 16)[-1]
        np.testing.assert_array_equal(places, indices)

    @pytest.mark.parametrize(
        ("batch_size", "num_shards", "expected"),
        [(16, 1, [4, 6, 8]), (16, 8, [8]), (32, 1, [8, 12, 16]), (8, 4, [4]), (33, 8, [16, 24])],
    )
    def test_evaluation_batches_have_rows_in_proportion_that_devices_can_share(
        self, data, batch_size, num_shards, expected
    ):
        layouts = packed_layouts(packed_config(data).data, batch_size, num_shards)
        assert [layout.num_rows for layout in layouts] == expected

    def test_last_batch_of_an_evaluation_may_be_nearly_empty(self, data):
        config = packed_config(data)
        indices = np.array([3, *[-1] * 31])
        layout, places = Arranger(Dataset.open(data).split("train"), config.data, 32).arrange(indices)
        assert layout.num_rows == 8
        assert places.tolist() == [3] + [-1] * 47

    def test_share_of_used_places_is_counted_exactly(self, data):
        padded, packed = tiny.config(data), packed_config(data)
        split = Dataset.open(data).split("train")
        lengths = np.stack(
            [np.minimum(split.lengths(name), most) for name, most in zip(MODALITIES, MAX_TOKENS, strict=True)]
        ).sum(axis=0)
        # 140 records in batches of 16: 9 batches, the last of which has 4 records of the second epoch.
        order = input_pipeline.ShuffledOrder(num_records=140, batch_size=16, num_batches=9, seed=0)
        num_tokens = sum(int(lengths[order[step]].sum()) for step in range(9))
        for config in (padded, packed):
            use = token_use(split, config)
            assert use.num_tokens == num_tokens
            assert sum(use.num_batches.values()) == 9
        assert token_use(split, padded).num_places == 9 * 16 * MAX_TOKENS.sum()
        line = input_pipeline.token_use_line(split, packed)
        share = use.num_tokens / use.num_places
        assert line.startswith(f"{share:.0%} of the token places are used")
        assert share > 1.3 * num_tokens / token_use(split, padded).num_places


class TestBatch:
    @pytest.mark.parametrize(
        ("modalities", "max_tokens"),
        [(MODALITIES, MAX_TOKENS), (("text", "audio"), MAX_TOKENS), (MODALITIES, (5, 9, 6))],
        ids=["all", "two modalities", "most records cut"],
    )
    def test_places_hold_the_tokens_and_labels_of_their_records(self, data, modalities, max_tokens):
        limits = ml_collections.ConfigDict(
            {name: (int(most),) for name, most in zip(MODALITIES, max_tokens, strict=True)}
        )
        config = packed_config(
            data,
            {**PACKING, "num_rows": (3, 8)},
            data__modalities=modalities,
            data__max_tokens=limits,
            loss__ranking="listnet",
        )
        split = Dataset.open(data).split("train")
        reader = BatchReader(split, config, input_pipeline.ranking_statistics(split.dataset, config))
        records = np.random.default_rng(0).permutation(140)[:16]
        layout, places = Arranger(split, config.data, 16).arrange(records)
        assert layout.num_rows == (8 if tuple(max_tokens) == tuple(MAX_TOKENS) else 3)
        batch = reader.read(places, layout)
        padded = reader.read(records, padded_layouts(config.data, 16)[0])
        assert list(batch.sequences()) == [name for name in MODALITIES if name in modalities]
        row_of = {int(record): row for row, record in enumerate(records)}
        for place, record in enumerate(places):
            row, segment = divmod(place, layout.records_per_row)
            for name, sequence in batch.sequences().items():
                is_mine = sequence.segment_ids[row] == segment + 1
                length = min(int(split.lengths(name)[record]), config_max(config, name)) if record >= 0 else 0
                where = np.flatnonzero(is_mine)
                assert len(where) == length
                assert not length or where[-1] - where[0] == length - 1
                if length:
                    expected = getattr(padded, name).features[row_of[int(record)], :length]
                    np.testing.assert_array_equal(sequence.features[row][is_mine], expected)
        for sequence in batch.sequences().values():
            assert not sequence.features[sequence.segment_ids == 0].any()
        rows = [row_of[int(record)] for record in places[places >= 0]]
        of_places = (batch.emotion, batch.intent, batch.ranking, batch.record_index)
        of_rows = (padded.emotion, padded.intent, padded.ranking, padded.record_index)
        for mine, theirs in zip(jax.tree.leaves(of_places), jax.tree.leaves(of_rows), strict=True):
            np.testing.assert_array_equal(mine[places >= 0], theirs[rows])
        assert not batch.emotion.is_labelled[places < 0].any()
        assert not batch.ranking.has_positive[places < 0].any()
        assert not batch.ranking.slate.is_shown[places < 0].any()
        np.testing.assert_array_equal(batch.is_record, places >= 0)

    def test_batch_does_not_depend_on_the_number_of_processes(self, data):
        config = packed_config(data, {**PACKING, "num_rows": (4, 8)})
        split = Dataset.open(data).split("train")
        statistics = input_pipeline.ranking_statistics(split.dataset, config)
        order = input_pipeline.ShuffledOrder(num_records=140, batch_size=16, num_batches=9, seed=0)
        arranger, reader = Arranger(split, config.data, 16), BatchReader(split, config, statistics)

        def source(process, num_processes):
            rows = {
                layout.num_rows: np.split(np.arange(layout.num_rows), num_processes)[process]
                for layout in arranger.layouts
            }
            return input_pipeline.BatchSource(order, arranger, reader, rows)

        for step in range(9):
            parts = [source(process, 4)[step] for process in range(4)]
            joined = jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)
            jax.tree.map(np.testing.assert_array_equal, joined, source(0, 1)[step])


def prepare(config):
    """A jitted step, a fresh state and training batches on the mesh; plain gradient descent shows every gradient."""
    dataset = Dataset.open(config.data.path)
    mesh = make_mesh(config)
    model = build_model(config, dataset)
    optimizer = optax.sgd(1.0)
    state = initial_state(model, optimizer, mesh, seed=config.seed, statistics={})
    batches = input_pipeline.train_iterator(dataset, config, batch_sharding(mesh))
    step = jit_train_step(make_train_step(model, optimizer, config, None), state_shapes(model, optimizer, mesh))
    return step, state, batches


def test_each_layout_compiles_once(data):
    config = packed_config(data, {**PACKING, "num_rows": (4, 6)}, **tiny.LEAST)
    step, state, batches = prepare(config)
    compiled, shapes = [], set()

    def note(event, _seconds, **_):
        compiled.extend([event] if event == "/jax/core/compile/backend_compile_duration" else [])

    jax.monitoring.register_event_duration_secs_listener(note)
    counts = []
    with jax.transfer_guard("disallow"):
        for batch in batches:
            state, _ = step(state, batch)
            shapes.add(batch.audio.features.shape)
            counts.append((len(shapes), len(compiled)))
    batches.close()
    jax.monitoring.unregister_event_duration_listener(note)
    assert counts[-1][0] > 1
    assert all(num_shapes == num_compiled for num_shapes, num_compiled in counts)


class TestTraining:
    @pytest.mark.parametrize(
        "changes",
        [
            {"loss__ranking": "in_batch_softmax"},
            {"loss__ranking": "listnet", "model__pooling": "attention"},
            {"loss__ranking": "none", "data__modalities": ("vision", "text"), "loss__task_weighting": "uncertainty"},
        ],
        ids=lambda changes: changes["loss__ranking"],
    )
    def test_losses_and_gradients_are_those_of_padded_batches(self, data, changes):
        results = []
        for config in (tiny.config(data, **NO_DROPOUT, **changes), packed_config(data, **NO_DROPOUT, **changes)):
            step, state, batches = prepare(config)
            before = jax.device_get(state.parameters)
            batch = next(batches)
            batches.close()
            state, report = jax.device_get(step(state, batch))
            gradients = jax.tree.map(np.subtract, before, state.parameters)
            results.append((batch, report, gradients))
        (padded_batch, expected, expected_gradients), (batch, report, gradients) = results
        sequence = next(iter(batch.sequences().values()))
        assert sequence.segment_ids.shape[0] < len(padded_batch.is_record) < len(batch.is_record)
        np.testing.assert_allclose(report.loss, expected.loss, rtol=1e-6)
        assert report.task_counts == expected.task_counts
        for task, total in expected.task_totals.items():
            np.testing.assert_allclose(report.task_totals[task], total, rtol=2e-6)
        np.testing.assert_allclose(report.modality_weights, expected.modality_weights, atol=1e-6)
        np.testing.assert_allclose(report.gradient_norm, expected.gradient_norm, rtol=1e-5)
        jax.tree.map(
            lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=2e-6), gradients, expected_gradients
        )
        index = report.record_index
        assert sorted(index[index >= 0]) == sorted(expected.record_index)

    def test_records_of_every_update_are_those_without_packing(self, data):
        streams = []
        for config in (tiny.config(data), packed_config(data)):
            batches = input_pipeline.train_iterator(Dataset.open(data), config, batch_sharding(make_mesh(config)))
            streams.append([np.asarray(batch.record_index) for batch in batches])
        for padded, packed in zip(*streams, strict=True):
            np.testing.assert_array_equal(np.sort(packed[packed >= 0]), np.sort(padded))

    def test_run_logs_ids_of_records_alone(self, data, tmp_path, capsys):
        config = packed_config(data, ONE_LAYOUT, train__num_epochs=1, train__write_record_ids=True, **tiny.LEAST)
        train(config, tmp_path)
        lines = (tmp_path / "record_ids.jsonl").read_text().splitlines()
        ids = list(itertools.chain.from_iterable(json.loads(line)["ids"] for line in lines))
        assert len(ids) == len(set(ids)) == 8 * 16
        assert "of the token places are used" in capsys.readouterr().out

    def test_record_that_is_not_finite_is_named_without_those_that_share_its_row(self, data, tmp_path, monkeypatch):
        bad = 17
        fill = RaggedColumn.fill

        def poisoned(self, out, indices, shards):
            kept = fill(self, out, indices, shards)
            for array, index in zip(out, indices, strict=True):
                if index == bad and array.dtype == np.float32 and array.ndim == 2:
                    array[...] = np.nan
            return kept

        # Two modalities have the attention within and across that would spread it.
        config = packed_config(data, ONE_LAYOUT, train__num_epochs=1, data__modalities=("vision", "text"))
        name = Dataset.open(data).split("train").ids(np.array([bad]))[0]
        monkeypatch.setattr(RaggedColumn, "fill", poisoned)
        with pytest.raises(InputError, match=rf"the emotion loss is not finite for records {name};"):
            train(config, tmp_path)

    @pytest.mark.slow
    def test_interrupted_run_ends_as_an_uninterrupted_one(self, data, tmp_path, monkeypatch):
        config = packed_config(data, ONE_LAYOUT, train__num_epochs=1)
        train(config, tmp_path / "whole")
        monkeypatch.setattr("mmei_jax.training.TrainingLog", tiny.StopAfter)
        monkeypatch.setattr(tiny.StopAfter, "step", 3)
        assert train(config, tmp_path / "parts").stopped_by == "SIGTERM"
        monkeypatch.setattr(tiny.StopAfter, "step", 0)
        train(config, tmp_path / "parts")
        whole, parts = (restored(config, tmp_path / name) for name in ("whole", "parts"))
        jax.tree.map(np.testing.assert_array_equal, parts, whole)


def restored(config, workdir):
    dataset = Dataset.open(config.data.path)
    checkpointer = Checkpointer(workdir, best_metric=config.train.best_metric)
    shapes = placed_variable_shapes(build_model(config, dataset), make_mesh(config))
    variables = checkpointer.restore_model(checkpointer.latest_step, shapes)
    checkpointer.close()
    return jax.device_get(variables)


class TestEvaluation:
    def test_metrics_and_predictions_are_those_of_padded_batches_in_the_order_of_the_split(self, data):
        results = []
        # bpr: its loss, too, is one of the whole evaluation batch.
        changes = {"loss__ranking": "bpr", "data__modalities": ("vision", "text")}
        for config in (tiny.config(data, **changes), packed_config(data, **changes)):
            dataset = Dataset.open(data)
            mesh, model = make_mesh(config), build_model(config, dataset)
            state = initial_state(model, optax.sgd(0.1), mesh, seed=0, statistics={})
            evaluator = Evaluator(model, config, dataset, mesh)
            parts = list(evaluator.predict(state.variables, ("test", "validation")))
            joined = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
            results.append((evaluator.measure(state.variables, ("test", "validation")), joined))
        (expected, padded), (found, packed) = results
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)
        is_record = packed.record_index >= 0
        assert len(is_record) > len(padded.record_index)
        packed = jax.tree.map(lambda leaf: leaf[is_record], packed)
        padded = jax.tree.map(lambda leaf: leaf[padded.record_index >= 0], padded)
        np.testing.assert_array_equal(packed.record_index, np.arange(60))
        jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=1e-5), packed, padded)


class TestChecks:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"records_per_row": 0}, r"packing\.records_per_row = 0: expected at least 1"),
            ({"records_per_row": 1}, r"packing\.num_rows = \(4, 6, 8\): expected \(\) when"),
            ({"num_rows": ()}, r"packing\.num_rows = \(\): expected rising numbers of rows"),
            ({"num_rows": (6, 4)}, r"packing\.num_rows = \(6, 4\): expected rising"),
            ({"num_rows": (0, 4)}, r"packing\.num_rows = \(0, 4\): expected rising"),
            ({"num_rows": (2, 4)}, r"rows that hold data\.batch_size \(16\) records; 2 x 6 is 12"),
            (
                {"tokens_per_row": {"vision": 32, "audio": 23, "text": 32}},
                r"tokens_per_row\.audio = 23: expected at least data\.max_tokens\.audio\[-1\] \(24\)",
            ),
        ],
    )
    def test_impossible_packing_is_refused(self, data, changes, message):
        with pytest.raises(InputError, match=message):
            packed_config(data, {**PACKING, **changes})

    def test_rows_are_not_dealt_into_micro_batches(self, data):
        with pytest.raises(InputError, match=r"gradient_accumulation_steps = 2: expected 1 when data\.packing"):
            packed_config(data, train__gradient_accumulation_steps=2)


@pytest.mark.slow
def test_eight_devices_train_on_packed_rows_as_one_and_rows_they_cannot_share_are_refused(data, tmp_path):
    flags = [
        "train.py",
        "--config=tests/tiny_config.py",
        f"--config.data.path={data}",
        "--config.data.modalities=('vision', 'audio', 'text')",
        "--config.train.num_epochs=1",
        "--config.train.log_every_steps=1",
        "--config.data.packing.records_per_row=4",
        "--config.data.packing.tokens_per_row.audio=48",
    ]
    losses = {}
    for number in (1, 8):
        workdir = tmp_path / str(number)
        environment = processes.environment(num_devices=number)
        code, output = processes.run(
            *flags, "--config.data.packing.num_rows=(8,)", f"--workdir={workdir}", env=environment
        )
        assert code == 0, output
        assert "8 x (28 + 48 + 60)" in output
        losses[number] = (workdir / "metrics.jsonl").read_text()
    rows = [[line for line in text.splitlines() if "train/loss" in line] for text in losses.values()]
    assert len(rows[0]) == len(rows[1]) == 8
    for one, eight in zip(*rows, strict=True):
        one, eight = json.loads(one), json.loads(eight)
        for name in one:
            if name.startswith("train/"):
                np.testing.assert_allclose(eight[name], one[name], rtol=1e-5, atol=1e-5, err_msg=name)
    code, output = processes.run(
        *flags, "--config.data.packing.num_rows=(6, 8)", f"--workdir={tmp_path / 'refused'}", env=environment
    )
    assert code == 2
    assert "config.data.packing.num_rows = 6: expected a multiple of the 8 devices" in output
    assert "Traceback" not in output
    assert not (tmp_path / "refused" / "config.json").exists()
