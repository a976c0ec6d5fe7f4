"""Pretraining as a run: without labels, evaluated by its objectives, refused where a task is needed, and begun with."""

import json
import shutil

import jax
import numpy as np
import optax
import pytest

from mmei_jax import input_pipeline
from mmei_jax.evaluation import open_best_run
from mmei_jax.optimizer import parameter_names
from mmei_jax.pretraining_losses import contrastive_alignment
from mmei_jax.records import Dataset, DatasetSpec, DatasetWriter, ModalitySpec, Record
from mmei_jax.sharding import batch_sharding, make_mesh
from mmei_jax.state import build_model, initial_state, state_shapes
from mmei_jax.table_config import parse_table
from mmei_jax.train_step import jit_train_step, make_train_step, split_batch
from mmei_jax.training import train
from mmei_jax.types import MODALITIES, InputError
from mmei_jax.warm_start import with_initial_parameters
from tests import processes, tiny, tiny_table_config

NO_TASK = {"loss__emotion": "none", "loss__intent": "none", "loss__ranking": "none"}
OBJECTIVES = {"pretraining__contrastive_weight": 0.5, "pretraining__masked_weight": 2.0, "data__standardize": True}
PRETRAINING = {
    **NO_TASK,
    **OBJECTIVES,
    "pretraining__contrastive_chunk_size": 8,
    "pretraining__projection_dim": 6,
    "train__best_metric": "validation/loss",
}


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory):
    """Records that carry no label, and are of no data set that has any."""
    path = tmp_path_factory.mktemp("unlabelled") / "data"
    random = np.random.default_rng(0)
    spec = DatasetSpec("made", "", "", "", {name: ModalitySpec(tiny.DIM, "float32") for name in MODALITIES}, {})
    with DatasetWriter(path, spec) as writer:
        for split, num_records in (("train", 48), ("validation", 20), ("test", 20)):
            for number in range(num_records):
                shared = random.normal(size=tiny.DIM)
                features = {
                    name: (shared + random.normal(size=(random.integers(1, 9), tiny.DIM))).astype(np.float32)
                    for name in MODALITIES
                    if random.uniform() > 0.1
                }
                features = features or {"text": np.ones((1, tiny.DIM), np.float32)}
                writer.write(split, Record(f"{split}{number}", features=features))
    return path


@pytest.fixture(scope="module")
def pretrained(unlabelled, tmp_path_factory):
    """Folder of a run on them."""
    folder = tmp_path_factory.mktemp("pretrained") / "run"
    train(tiny.config(unlabelled, train__num_epochs=4, **PRETRAINING), folder)
    return folder


def test_run_without_labels_learns_both_objectives_and_keeps_the_smallest_loss(pretrained):
    lines = [json.loads(line) for line in (pretrained / "metrics.jsonl").read_text().splitlines()]
    evaluations = [line for line in lines if "validation/loss" in line]
    assert len(evaluations) == 4
    for line in evaluations:
        weighed = 0.5 * line["validation/loss/contrastive"] + 2.0 * line["validation/loss/masked_prediction"]
        assert line["validation/loss"] == pytest.approx(weighed, rel=1e-5)
        assert not [name for name in line if "accuracy" in name or "alpha" in name]
    best = min(evaluations, key=lambda line: line["validation/loss"])
    assert open_best_run(pretrained, needs_task=False).step == best["step"]
    for name in ("contrastive", "masked_prediction"):
        first, last = (line[f"validation/loss/{name}"] for line in (evaluations[0], evaluations[-1]))
        assert last < first


def test_evaluation_command_tells_the_objectives_and_how_to_go_on(pretrained, tmp_path):
    shutil.copytree(pretrained, tmp_path / "run")
    code, output = processes.run("eval.py", f"--workdir={tmp_path / 'run'}", env=processes.environment())
    assert code == 0, output
    written = json.loads((tmp_path / "run" / "eval" / "test.json").read_text())
    assert written["metrics"].keys() == {"loss", "loss/contrastive", "loss/masked_prediction"}
    assert f"--config.train.initial_workdir={tmp_path / 'run'}" in output
    assert [path.name for path in (tmp_path / "run" / "eval").iterdir()] == ["test.json"]


def test_run_without_a_task_is_refused_where_one_is_needed(pretrained):
    with pytest.raises(InputError, match=r"a run of pretraining, without any task: expected a run that was trained on"):
        open_best_run(pretrained)


def states(config):
    """A fresh state, and the same begun with what the configuration names."""
    model, mesh = build_model(config, Dataset.open(config.data.path)), make_mesh(config)
    fresh = initial_state(model, optax.sgd(0.1), mesh, seed=config.seed, statistics={})
    return fresh, *with_initial_parameters(fresh, config.train)


def named(tree):
    return dict(zip(jax.tree.leaves(parameter_names(tree)), jax.device_get(jax.tree.leaves(tree)), strict=True))


def test_fine_tuning_begins_with_everything_but_heads_and_weights_by_one_flag(pretrained, data):
    config = tiny.config(data, train__initial_workdir=str(pretrained), model__head_num_layers=1)
    fresh, begun, num_taken = states(config)
    run = open_best_run(pretrained, needs_task=False)
    theirs, before, after = named(run.variables["params"]), named(fresh.parameters), named(begun.parameters)
    left = {"emotion_head", "intent_head", "user_projection", "content_tower", "weighting"}
    for name, own in after.items():
        expected = before[name] if name.partition("/")[0] in left else theirs[name]
        np.testing.assert_array_equal(own, expected)
    assert {name.partition("/")[0] for name in after} - left == {f"embed_{name}" for name in MODALITIES} | {
        "cross_modal"
    }
    assert num_taken == sum(name.partition("/")[0] not in left for name in after)
    assert before["cross_modal/layer_0/text_feed_forward/hidden/kernel"].std() > 0
    # Features are standardised as they were there, though this configuration does not ask for it.
    jax.tree.map(np.testing.assert_array_equal, begun.statistics, jax.device_get(run.variables["statistics"]))
    assert np.any(named(begun.statistics)["embed_text/mean"])


def test_pattern_still_chooses_and_other_sizes_are_refused(pretrained, data):
    options = {"train__initial_workdir": str(pretrained)}
    _, _, num_taken = states(tiny.config(data, train__initial_parameters="^embed_text/", **options))
    assert num_taken == 4
    with pytest.raises(InputError, match=r"the run in .* has no parameter 'emotion_head/"):
        states(tiny.config(data, train__initial_parameters="^emotion_head", **options))
    with pytest.raises(InputError, match=r"of shape \(.*\) there: expected \("):
        states(tiny.config(data, model__dim=24, **options))


def test_labels_and_objectives_can_be_learned_together(data, pretrained, tmp_path):
    changes = {**OBJECTIVES, "loss__ranking": "none", "data__modalities": ("audio", "text"), "train__num_epochs": 1}
    train(tiny.config(data, **changes), tmp_path / "run")
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (line,) = [line for line in metrics if "validation/loss" in line]
    names = {"emotion": 1.0, "intent": 1.0, "contrastive": 0.5, "masked_prediction": 2.0}
    weighed = sum(weight * line[f"validation/loss/{name}"] for name, weight in names.items())
    assert line["validation/loss"] == pytest.approx(weighed, rel=1e-5)
    assert "validation/emotion/accuracy" in line
    # A run with tasks is taken as a whole, as ever.
    assert open_best_run(tmp_path / "run").config.pretraining.contrastive_weight == 0.5


def test_negatives_of_accumulated_gradients_are_those_of_the_micro_batch(unlabelled):
    changes = {**PRETRAINING, "pretraining__masked_weight": 0.0, "model__dropout_rate": 0.0}
    config = tiny.config(unlabelled, train__gradient_accumulation_steps=2, **changes)
    dataset, mesh = Dataset.open(unlabelled), make_mesh(config)
    model, optimizer = build_model(config, dataset), optax.sgd(0.1)
    state = initial_state(model, optimizer, mesh, seed=0, statistics={})
    batches = input_pipeline.train_iterator(dataset, config, batch_sharding(mesh))
    batch = next(batches)
    batches.close()
    apply = jax.jit(lambda variables, own: model.apply(variables, own, is_training=False).pretraining)
    totals = []
    for index in range(2):
        found = apply(state.variables, jax.tree.map(lambda leaf, index=index: leaf[index], split_batch(batch, 2)))
        losses = contrastive_alignment(found.projections, found.is_present, found.scale, chunk_size=3)
        totals.append((float(losses.total()), float(losses.count())))
    step = jit_train_step(make_train_step(model, optimizer, config, None), state_shapes(model, optimizer, mesh))
    _, report = step(state, batch)
    expected, count = np.sum(totals, axis=0)
    assert float(report.task_counts["contrastive"]) == count
    assert float(report.task_totals["contrastive"]) == pytest.approx(expected, rel=1e-5)
    assert float(report.loss) == pytest.approx(0.5 * expected / count, rel=1e-5)
    # Of the whole batch there are more.
    whole = apply(open_state(config, model, mesh).variables, batch)
    all_losses = contrastive_alignment(whole.projections, whole.is_present, whole.scale, chunk_size=3)
    assert float(all_losses.mean()) > expected / count


def open_state(config, model, mesh):
    """The fresh state again: an update overwrites the one that it is given."""
    return initial_state(model, optax.sgd(0.1), mesh, seed=config.seed, statistics={})


def test_tables_are_of_tasks_alone():
    values = tiny_table_config.get_config().to_dict()
    values["table"]["rows"]["mmei"]["pretraining"] = {"contrastive_weight": 1.0}
    with pytest.raises(
        InputError, match=r"row .mmei.: config\.pretraining\.contrastive_weight = 1\.0: expected 0 in a table"
    ):
        parse_table(values)


@pytest.mark.slow
def test_resumed_run_equals_one_that_was_never_stopped(unlabelled, pretrained, tmp_path, monkeypatch):
    config = tiny.config(unlabelled, train__num_epochs=4, **PRETRAINING)
    monkeypatch.setattr("mmei_jax.training.TrainingLog", tiny.StopAfter)
    monkeypatch.setattr(tiny.StopAfter, "step", 5)
    assert train(config, tmp_path / "run").stopped_by == "SIGTERM"
    monkeypatch.setattr(tiny.StopAfter, "step", 0)
    train(config, tmp_path / "run")
    ours, theirs = (open_best_run(folder, needs_task=False) for folder in (tmp_path / "run", pretrained))
    assert ours.step == theirs.step
    jax.tree.map(np.testing.assert_array_equal, ours.variables, theirs.variables)
