"""Configurations of real data sets train on data as the builders and the importer give them, by the named metric."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest

from configs import meld_text, mosei
from mmei_jax.config import parse
from mmei_jax.evaluation import evaluate_workdir
from mmei_jax.extraction.dataset_builders import builder_clips, label_specs, open_builder, split_names
from mmei_jax.extraction.published_facts import read_published
from mmei_jax.metrics import is_smaller_better
from mmei_jax.records import Dataset, DatasetSpec, DatasetWriter, ModalitySpec, Record
from mmei_jax.training import train
from tests import import_mosei_test, made_up_lists

ROOT = Path(__file__).parents[1]
DIMS = {"vision": 3, "audio": 4, "text": 5}
SMALL = {"dim": 16, "num_heads": 2, "num_layers": 1, "feedforward_dim": 32}
BUILDERS = {"meld": "meld", "meld_text": "meld", "meld_dialogue": "meld", "mintrec": "mintrec"}


@pytest.fixture(scope="module")
def lists(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lists")
    made_up_lists.write_meld(folder / "meld", made_up_lists.meld_rows())
    intents = read_published(ROOT / "data" / "mintrec" / "published.json").labels["intent"].class_names
    made_up_lists.write_mintrec(folder / "mintrec", list(intents))
    (folder / "mintrec" / "test.tsv").write_text((folder / "mintrec" / "dev.tsv").read_text())
    return folder


def write_features(builder, output):
    """Random tokens in the place of what encoders give; labels, splits and ids are the builder's."""
    generator = np.random.default_rng(0)
    spec = DatasetSpec(
        name=builder.name,
        description="made up",
        source="tests",
        licence="none",
        modalities={name: ModalitySpec(dim, "float32") for name, dim in DIMS.items()},
        labels=label_specs(builder),
    )
    with DatasetWriter(output, spec) as writer:
        for split in split_names(builder):
            for clip in builder_clips(builder, split):
                features = {
                    name: generator.normal(size=(generator.integers(1, 30), dim)).astype(np.float32)
                    for name, dim in DIMS.items()
                }
                writer.write(split, Record(clip.id, features=features, labels=clip.labels))
    return output


def shrink(values, data, **changes):
    """A run of a few updates by the same configuration: its data, losses and metric, a small model."""
    values.data.path = str(data)
    values.model.update(SMALL)
    values.train.num_epochs = 1
    for key, value in changes.items():
        group, _, name = key.partition("__")
        values[group][name] = value
    return parse(values.to_dict())


def check_run(config, folder):
    """Trains and evaluates; gives the test split's metrics."""
    result = train(config, folder)
    assert result.step >= 2
    assert result.best_step == result.step
    evaluate_workdir(folder, "test")
    return json.loads((folder / "eval" / "test.json").read_text())["metrics"]


@pytest.mark.parametrize("name", BUILDERS)
def test_configuration_trains_on_what_the_builder_gives(name, lists, tmp_path):
    builder_name = BUILDERS[name]
    builder = open_builder(ROOT / "data" / builder_name, {"folder": str(lists / builder_name)}, tmp_path / "built")
    data = write_features(builder, tmp_path / "data")
    config = shrink(importlib.import_module(f"configs.{name}").get_config(), data, data__batch_size=32)
    metrics = check_run(config, tmp_path / "run")
    assert config.train.best_metric.removeprefix("validation/") in metrics
    assert not is_smaller_better(config.train.best_metric)
    label = Dataset.open(data).spec.labels[config.loss.emotion_label]
    assert len(label.class_names) == {"meld": 7, "mintrec": 20}[builder_name]


@pytest.fixture(scope="module")
def mosei_data(tmp_path_factory):
    content, _ = import_mosei_test.make()
    generator = np.random.default_rng(0)
    for split, values in content.items():
        size = (import_mosei_test.NUM_RECORDS[split], 6)
        values["emotion_labels"] = generator.uniform(size=size) * (generator.uniform(size=size) < 0.4)
    return import_mosei_test.run(tmp_path_factory.mktemp("mosei"), content).path


def test_mosei_trains_on_imported_shards_and_gives_every_figure_of_the_convention(mosei_data, tmp_path):
    config = shrink(mosei.get_config(), mosei_data)
    metrics = check_run(config, tmp_path / "run")
    names = ("mae", "pearson", "acc7", "acc2_has0", "acc2_non0", "f1_has0", "f1_non0")
    assert {f"emotion/{name}" for name in names} <= metrics.keys()
    assert is_smaller_better(config.train.best_metric)


@pytest.mark.slow
def test_moseis_six_emotions_train_with_the_flags_that_its_configuration_names(mosei_data, tmp_path):
    values = mosei.get_config()
    values.train.best_metric = "validation/emotion/weighted_f1"
    changes = {"loss__emotion": "sigmoid", "loss__emotion_label": "emotions", "loss__focal_gamma": 2.0}
    metrics = check_run(shrink(values, mosei_data, **changes), tmp_path / "run")
    assert {"emotion/weighted_f1", "emotion/weighted_accuracy/happiness"} <= metrics.keys()


@pytest.mark.slow
def test_balanced_losses_train_on_melds_emotions(lists, tmp_path):
    builder = open_builder(ROOT / "data" / "meld", {"folder": str(lists / "meld")}, tmp_path / "built")
    data = write_features(builder, tmp_path / "data")
    balanced = {"loss__logit_adjustment": 1.0, "loss__focal_gamma": 2.0}
    config = shrink(meld_text.get_config(), data, data__batch_size=32, **balanced)
    assert np.isfinite(check_run(config, tmp_path / "run")["emotion/weighted_f1"])
