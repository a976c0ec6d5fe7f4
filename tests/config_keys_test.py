"""No configuration key that nothing reads."""

import dataclasses
import sys

import jax.numpy as jnp
import pytest

from mmei_jax import config as config_module
from mmei_jax import data_config, pretraining_config
from mmei_jax.data_config import MaxTokens
from mmei_jax.item_words import read_words
from mmei_jax.optimizer import make_schedule
from mmei_jax.raw_inputs import raw_encoding
from mmei_jax.records import Dataset
from mmei_jax.state import build_model
from mmei_jax.training import train
from mmei_jax.types import InputError, TrainState
from mmei_jax.warm_start import with_initial_parameters
from tests import random_encoders, tiny

MODULES = (config_module, data_config, pretraining_config)
# Each once, in the order of the modules: a set has another order in each process.
GROUPS = dict.fromkeys(
    value for module in MODULES for value in vars(module).values() if dataclasses.is_dataclass(value)
)
# Converting a configuration, comparing and hashing it read every key without using any.
NOT_A_USE = (*(module.__file__ for module in MODULES), dataclasses.__file__, "<string>")


def test_every_key_is_read_outside_the_configuration_itself(data, tmp_path, monkeypatch):
    objectives = {"contrastive_weight": 1.0, "masked_weight": 1.0, "mask_rate": 0.5}
    changes = {f"pretraining__{key}": value for key, value in objectives.items()}
    config = tiny.config(data, train__num_epochs=1, data__standardize=True, **changes)
    read = set()

    def watch(group):
        names = {field.name for field in dataclasses.fields(group)}

        def note(self, name):
            if name in names and sys._getframe(1).f_code.co_filename not in NOT_A_USE:
                read.add((group.__name__, name))
            return object.__getattribute__(self, name)

        return note

    for group in GROUPS:
        monkeypatch.setattr(group, "__getattribute__", watch(group), raising=False)
    train(config, tmp_path / "run")
    # A model with objectives is of one architecture.
    build_model(tiny.config(data), Dataset.open(data))
    stepped = dataclasses.replace(config.optimizer, schedule="step", step_epochs=(1,))
    make_schedule(stepped, num_steps=10, steps_per_epoch=5.0)
    folders = {name: str(folder) for name, folder in random_encoders.make(tmp_path / "encoders").converted.items()}
    encoder = folders["text"]
    encoders = dataclasses.replace(config.model.encoders, **folders)
    raw = dataclasses.replace(config, model=dataclasses.replace(config.model, encoders=encoders))
    raw = dataclasses.replace(raw, data=dataclasses.replace(raw.data, max_tokens=MaxTokens((4,), (800,), (8,))))
    for name, spec in random_encoders.raw_specs(folders["text"]).items():
        raw_encoding(raw, name, spec)
    read_words(["a word"], dataclasses.replace(config.model, content_encoder=encoder, content_max_tokens=8))
    begun = dataclasses.replace(config.train, initial_workdir=str(tmp_path / "run"), initial_parameters="^$")
    with pytest.raises(InputError, match="matches no parameter"):
        with_initial_parameters(TrainState(jnp.zeros((), jnp.int32), {}, {}, ()), begun)
    monkeypatch.undo()
    declared = {(group.__name__, field.name) for group in GROUPS for field in dataclasses.fields(group)}
    assert len(declared) > 50
    assert declared - read == set()


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.__name__)
def test_defaults_stand_in_configs_alone(group):
    assert all(field.default is dataclasses.MISSING for field in dataclasses.fields(group))
