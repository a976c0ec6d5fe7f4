"""The configuration is refused or understood, by key name, before any work is done."""

import importlib
import json
from pathlib import Path

import pytest

from configs import default
from mmei_jax.config import parse
from mmei_jax.extraction import extraction_config
from mmei_jax.feedback import loop_config
from mmei_jax.table_config import is_table, parse_table
from mmei_jax.types import InputError

CONFIGS = sorted(
    path.stem for path in Path(__file__).parents[1].joinpath("configs").glob("*.py") if path.stem != "__init__"
)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_shipped_config_is_accepted_and_survives_json(name):
    values = importlib.import_module(f"configs.{name}").get_config().to_dict()
    if is_table(values):
        table = parse_table(values)
        assert parse_table(json.loads(json.dumps(values))) == table
        assert len(set(table.rows.values())) == len(table.rows) > 5
        return
    if name == "feedback":
        loop = loop_config.parse(values)
        assert loop_config.parse(json.loads(json.dumps(values))) == loop
        return
    if not name.startswith("extraction"):
        config = parse(values)
        assert parse(config.to_json()) == config
        return
    # No run's: the checkpoints are the user's.
    for modality in values["modalities"]:
        values[modality]["checkpoint"] = "folder"
    extraction = extraction_config.parse(values)
    assert extraction_config.parse(json.loads(json.dumps(extraction.to_json()))) == extraction


def changed(**changes):
    config = default.get_config().to_dict()
    for dotted, value in changes.items():
        *groups, key = dotted.split("__")
        target = config
        for group in groups:
            target = target[group]
        target[key] = value
    return config


CONTRASTIVE = {"pretraining__contrastive_weight": 1.0}
REFUSED = [
    ({"model__nope": 1}, r"config\.model\.nope: unknown key"),
    ({"model__dim": "64"}, r"config\.model\.dim = '64': expected int, got str"),
    ({"model__dim": True}, r"config\.model\.dim = True: expected int, got bool"),
    ({"model__dim": 30}, r"config\.model\.num_heads = 8: expected a divisor of model\.dim \(30\)"),
    ({"model__pooling": "max"}, r"config\.model\.pooling = 'max': expected one of 'mean', 'attention', 'first'"),
    ({"model__dropout_rate": 1.0}, r"config\.model\.dropout_rate = 1\.0: expected a rate in \[0, 1\)"),
    ({"data": 3}, r"config\.data = 3: expected a group of keys"),
    ({"data__modalities": ("vision", "smell")}, r"config\.data\.modalities"),
    ({"data__modalities": ("text", "text")}, r"config\.data\.modalities .* each modality once"),
    ({"data__train_splits": "train"}, r"config\.data\.train_splits = 'train': expected a tuple"),
    ({"data__test_splits": ("train",)}, r"splits that are used once"),
    (
        {"data__validation_splits": ("test",), "data__test_splits": ("validation",)},
        r"config\.data\.validation_splits = \('test',\): expected no 'test': it is for testing",
    ),
    (
        {"data__train_splits": ("train", "test"), "data__test_splits": ("validation2",)},
        r"config\.data\.train_splits = \('train', 'test'\): expected no 'test': it is for testing",
    ),
    ({"data__max_tokens__audio": (50, 24)}, r"config\.data\.max_tokens\.audio"),
    ({"data__max_tokens__audio": (24, 50)}, r"as many buckets as data\.max_tokens\.vision \(1\)"),
    ({"data__batch_size": 0}, r"config\.data\.batch_size = 0: expected at least 1"),
    ({"loss__temperature": 0.0}, r"config\.loss\.temperature = 0\.0: expected a positive number"),
    ({"loss__emotion_class_weights": (("joy", -1.0),)}, r"config\.loss\.emotion_class_weights\['joy'\] = -1\.0"),
    (
        {"loss__emotion_class_weights": (("joy", 1.0),), "loss__emotion": "sigmoid"},
        r"class weights go with 'softmax'",
    ),
    ({"loss__focal_gamma": -1.0}, r"config\.loss\.focal_gamma = -1\.0: expected at least 0"),
    ({"loss__logit_adjustment": -0.5}, r"config\.loss\.logit_adjustment = -0\.5: expected at least 0"),
    (
        {"loss__focal_gamma": 2.0, "loss__emotion": "regression", "loss__intent": "none"},
        r"config\.loss\.focal_gamma = 2\.0: expected 0 without a task of sigmoid or softmax",
    ),
    (
        {"loss__logit_adjustment": 1.0, "loss__emotion": "sigmoid", "loss__intent": "none"},
        r"config\.loss\.logit_adjustment = 1\.0: expected 0 without a task of softmax",
    ),
    ({"seed": 2**32}, r"config\.seed = 4294967296: expected an integer in \[0, 2\*\*32\)"),
    ({"optimizer__clip_norm": float("inf")}, r"config\.optimizer\.clip_norm = inf: expected a finite number"),
    ({"loss__temperature": float("nan")}, r"config\.loss\.temperature = nan: expected a finite number"),
    ({"optimizer__step_factor": -1.0}, r"config\.optimizer\.step_factor = -1\.0: expected a positive number"),
    (
        {"optimizer__schedule": "step", "optimizer__step_epochs": (0, 3)},
        r"config\.optimizer\.step_epochs = \(0, 3\): expected epochs from 1, rising",
    ),
    ({"optimizer__schedule": "step"}, r"config\.optimizer\.step_epochs = \(\)"),
    ({"optimizer__step_epochs": (60,)}, r"config\.optimizer\.step_epochs = \(60,\)"),
    ({"optimizer__rate_multipliers": (("x",),)}, r"config\.optimizer\.rate_multipliers\[0\] .* expected 2 values"),
    ({"train__best_metric": "test/emotion/accuracy"}, r"must not be selected on test data"),
    ({"train__gradient_accumulation_steps": 3}, r"a divisor of data\.batch_size \(32\)"),
    ({"mesh__data": 0}, r"config\.mesh\.data = 0"),
    ({"mesh__fsdp": 0}, r"config\.mesh\.fsdp = 0: expected a number of devices"),
    ({"mesh__tensor": -1}, r"config\.mesh\.tensor = -1: expected a number of devices"),
    ({"seed": -1}, r"config\.seed = -1: expected an integer in \[0, 2\*\*32\)"),
    ({"pretraining__masked_weight": -1.0}, r"config\.pretraining\.masked_weight = -1\.0: expected at least 0"),
    (
        {"pretraining__contrastive_chunk_size": 0},
        r"config\.pretraining\.contrastive_chunk_size = 0: expected at least 1",
    ),
    (
        {"pretraining__initial_temperature": 1.0},
        r"initial_temperature = 1\.0: expected a temperature between 0\.01 and 1",
    ),
    ({"pretraining__mask_rate": 0.0}, r"config\.pretraining\.mask_rate = 0\.0: expected a share above 0, at most 1"),
    ({"pretraining__mask_span": 2}, r"config\.pretraining\.mask_span = 2: expected 1 when pretraining\.mask_rate is 1"),
    ({"loss__emotion": "none"}, r"config\.loss\.emotion = 'none': expected a task, or an objective"),
    (
        {"loss__emotion": "none", **CONTRASTIVE},
        r"config\.loss\.intent = 'softmax': expected 'none' when loss\.emotion is",
    ),
    (
        {"loss__emotion": "none", "loss__intent": "none", **CONTRASTIVE},
        r"config\.loss\.ranking = 'in_batch_softmax': expected 'none' when loss\.emotion is",
    ),
    (
        {"model__architecture": "late_fusion", **CONTRASTIVE},
        r"config\.model\.architecture = 'late_fusion': expected 'mmei' with an objective of pretraining",
    ),
    ({"data__modalities": ("text",), **CONTRASTIVE}, r"config\.data\.modalities = \('text',\): expected two or all of"),
    (
        {"loss__task_weighting": "uncertainty", **CONTRASTIVE},
        r"config\.loss\.task_weighting = 'uncertainty': expected 'fixed'",
    ),
    (
        {"pretraining__masked_weight": 1.0},
        r"config\.data\.standardize = False: expected True with pretraining\.masked_weight",
    ),
    (
        {"pretraining__masked_weight": 1.0, "data__standardize": True, "model__cross_attention": False},
        r"config\.model\.cross_attention = False: expected True with pretraining\.masked_weight",
    ),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_bad_value_is_refused_by_key(changes, message):
    with pytest.raises(InputError, match=message) as error:
        parse(changed(**changes))
    assert "\n" not in str(error.value)


def test_missing_key_is_refused():
    config = default.get_config().to_dict()
    del config["optimizer"]["beta1"]
    with pytest.raises(InputError, match=r"config\.optimizer\.beta1: missing key"):
        parse(config)


def test_integer_is_accepted_where_a_float_is_expected():
    assert parse(changed(loss__ranking_weight=1)).loss.ranking_weight == 1.0
