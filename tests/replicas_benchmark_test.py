"""The benchmark of replicas: the loop over seeds in torch makes the updates that our one program makes."""

import dataclasses

import numpy as np
import pytest

from benchmarks import agreement, replicas, rounds, torch_mmei
from benchmarks.random_records import write_records
from configs import default
from mmei_jax import input_pipeline
from mmei_jax.batching import BatchReader
from mmei_jax.packing import padded_layouts
from mmei_jax.records import Dataset

LENGTHS = (3, 5, 4)
CASE = replicas.Case("tiny", "", num_layers=1, num_seeds=2, num_updates=3, batch_size=4)


@pytest.fixture
def case(tmp_path, monkeypatch):
    """Of a size that compiles in a second."""
    full = default.get_config

    def tiny():
        config = full()
        config.model.update(dim=16, num_heads=2, feedforward_dim=24, embedding_dim=8)
        config.data.max_tokens.update(vision=LENGTHS[:1], audio=LENGTHS[1:2], text=LENGTHS[2:])
        return config

    monkeypatch.setattr(default, "get_config", tiny)
    write_records(tmp_path / "records", np.tile(LENGTHS, (12, 1)), dim=12)
    return dataclasses.replace(CASE, path=str(tmp_path / "records"))


def peer_losses(case, changed=None, num_seeds=2):
    config = case.config(is_measured=False)
    dataset = Dataset.open(config.data.path)
    split = dataset.split("train")
    reader = BatchReader(split, config, input_pipeline.ranking_statistics(dataset, config))
    everything = reader.read(np.arange(split.num_records), padded_layouts(config.data, split.num_records)[-1])
    records = torch_mmei.to_torch(everything, "cpu")
    losses = []
    for seed in range(num_seeds):
        run = replicas.TorchRun(dataclasses.replace(config, seed=seed), records, case.num_updates, None)
        if changed is not None:
            changed(run)
        losses.append(run.update(agreement.NUM_UPDATES))
    return np.stack(losses)


def test_torch_makes_our_updates_and_others_are_refused(case):
    ours = replicas.OurRun(case, case.config(is_measured=False)).update(agreement.NUM_UPDATES)
    assert ours.shape == (2, agreement.NUM_UPDATES)
    assert rounds.differ_by(ours, peer_losses(case), relative=case.tolerance) == ""
    assert np.abs(ours[0] - ours[1]).max() > 1e-3

    def at_another_rate(run):
        run._rates = 2.0 * run._rates

    assert "largest absolute difference" in rounds.differ_by(
        ours[:1], peer_losses(case, at_another_rate, num_seeds=1), relative=case.tolerance
    )


def test_measured_run_trains_with_dropout_but_in_quick_runs(case):
    """A quick run measures what it compared, so that one program serves both."""
    assert case.config(is_measured=True).model.dropout_rate > 0.0
    assert case.config(is_measured=False).model.dropout_rate == 0.0
    quick = dataclasses.replace(case, has_dropout=replicas.QUICK_CASES[0].has_dropout)
    assert quick.config(is_measured=True) == quick.config(is_measured=False)


def test_two_epochs_read_every_record_twice_and_compare_in_float32():
    case = next(each for each in replicas.CASES if each.platform == "gpu")
    assert case.num_records * case.num_epochs == case.num_updates * case.batch_size
    assert case.num_records % case.batch_size == 0
    made = dataclasses.replace(case, path="records")
    assert made.config(is_measured=True).model.compute_dtype == "bfloat16"
    assert made.config(is_measured=False).model.compute_dtype == "float32"
