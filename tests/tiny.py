"""A tiny simulated data set and a tiny configuration on it, for tests of whole runs."""

import os
import signal
from pathlib import Path
from typing import Any

import ml_collections

from configs import default
from mmei_jax.config import Config, parse
from mmei_jax.simulation import aigc_int_dataset
from mmei_jax.training_log import TrainingLog

NUM_RECORDS = 200
# 70/15/15 by record.
DIM = 16


def make_dataset(folder: Path, *, num_records: int = NUM_RECORDS, seed: int = 0) -> Path:
    """Writes AIGC-INT-Sim records (simulated) into ``folder``, and gives it back."""
    arguments = [f"--output={folder}", f"--num_records={num_records}", f"--dim={DIM}", f"--seed={seed}"]
    assert aigc_int_dataset.main(arguments) == 0
    return folder


def config_dict(data_path: Path | str, **changes: Any) -> ml_collections.ConfigDict:
    """A configuration that compiles in seconds; ``group__key=value`` changes a key."""
    config = default.get_config()
    config.data.path = str(data_path)
    config.data.max_tokens = ml_collections.ConfigDict(dict(vision=(16,), audio=(24,), text=(16,)))
    config.data.batch_size = 16
    config.data.evaluation_batch_size = 32
    config.model.dim = 16
    config.model.num_heads = 2
    config.model.num_layers = 1
    config.model.feedforward_dim = 32
    # Every run is traced anew, and linear heads take a fifth less; layers of heads: mmei_test, quickstart_test.
    config.model.head_num_layers = 0
    config.model.embedding_dim = 8
    config.optimizer.learning_rate = 3e-3
    config.train.num_epochs = 2
    config.train.log_every_steps = 4
    config.train.save_every_steps = 5
    with config.unlocked():
        for dotted, value in changes.items():
            group, _, key = dotted.partition("__")
            if key:
                config[group][key] = value
            else:
                config[group] = value
    return config


def config(data_path: Path, **changes: Any) -> Config:
    """The same, checked."""
    return parse(config_dict(data_path, **changes).to_dict())


# For runs whose model does not matter: it compiles in a fifth of the time.
LEAST = {"model__architecture": "pooled_logistic"}


class StopAfter(TrainingLog):
    """Sends this process SIGTERM once update ``step`` is dispatched; 0 never does. Stands in for the training's log."""

    step = 0

    def add(self, step, report, wait_seconds):
        super().add(step, report, wait_seconds)
        if step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)
