"""The pretraining study: which records are read with labels, what both sides share, and its scores and intervals."""

import dataclasses

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score

from benchmarks import pretraining_study
from benchmarks.pretraining_study import FULL, PRETRAINED, QUICK, SCRATCH
from mmei_jax.records import Dataset
from mmei_jax.types import InputError


def _ids(data, splits):
    split = Dataset.open(data).split(*splits)
    return set(split.ids(np.arange(split.num_records)))


def test_labelled_records_are_the_share_nested_and_those_of_two_seeds_disjoint(tmp_path):
    study = dataclasses.replace(QUICK, num_seeds=2, epochs={0.02: 1, 0.1: 1})
    data = pretraining_study.make_data(study, tmp_path / "data")
    everything, held_out = _ids(data, study.train_splits()), _ids(data, ("validation", "test"))
    assert len(everything) == study.num_train
    assert len(held_out) == study.num_validation + study.num_test
    assert not everything & held_out
    labelled = [[_ids(data, study.labelled_splits(seed, share)) for share in study.epochs] for seed in (0, 1)]
    for few, more in labelled:
        assert (len(few), len(more)) == (6, 30)
        assert few < more < everything
    assert not labelled[0][1] & labelled[1][1]
    with pytest.raises(InputError, match="has other splits than this benchmark makes"):
        pretraining_study.make_data(QUICK, data)


@pytest.mark.parametrize("study", [FULL, QUICK])
def test_both_sides_differ_in_where_they_begin_alone_and_pretraining_reads_no_label(study, tmp_path):
    for share in study.epochs:
        ours, theirs = (study.tuning_config(tmp_path, 1, share, initial) for initial in (tmp_path / "run", None))
        assert ours.train.initial_workdir == str(tmp_path / "run")
        train = dataclasses.replace(ours.train, initial_workdir="")
        assert dataclasses.replace(ours, train=train) == theirs
        assert theirs.data.batch_size <= study.num_labelled(share)
        assert theirs.data.validation_splits == ("validation",)
        assert theirs.data.test_splits == ("test",)
    config = study.pretraining_config(tmp_path, 1)
    assert (config.loss.emotion, config.loss.intent, config.loss.ranking) == ("none",) * 3
    assert config.data.train_splits == study.train_splits()
    assert config.model == theirs.model


def test_scores_are_those_of_scikit_learn_with_weights():
    random = np.random.default_rng(0)
    labels, predictions = random.integers(0, 4, (2, 2, 50))
    weights = random.integers(0, 3, 50).astype(float)
    found = pretraining_study.scores(predictions, labels, weights)
    for task in range(2):
        options = {"sample_weight": weights}
        expected = (
            accuracy_score(labels[task], predictions[task], **options),
            f1_score(labels[task], predictions[task], average="macro", **options),
        )
        np.testing.assert_allclose(found[task], expected)


def test_comparison_is_paired_over_seeds_and_records():
    random = np.random.default_rng(1)
    labels = random.integers(0, 3, (2, 200))
    worse = np.stack([np.where(random.uniform(size=(2, 200)) < 0.5, labels, 0) for _ in range(3)])
    # Right wherever the other is, and on one record in ten besides.
    better = np.where(np.arange(200) % 10 == 0, labels, worse)
    cases = pretraining_study.compare("q", {PRETRAINED: better, SCRATCH: worse}, labels)
    assert [case["case"] for case in cases][:2] == ["q, emotion accuracy, simulated", "q, emotion macro_f1, simulated"]
    accuracy = cases[0]
    assert accuracy["difference"] == pytest.approx(
        np.mean(better[:, 0] == labels[0]) - np.mean(worse[:, 0] == labels[0])
    )
    low, high = accuracy["interval"]
    assert 0.0 < low < accuracy["difference"] < high < 0.1
    same = pretraining_study.compare("q", {PRETRAINED: worse, SCRATCH: worse}, labels)[0]
    assert same["difference"] == 0.0
    assert same["interval"] == [0.0, 0.0]
    lines = pretraining_study.table(cases, {"emotion accuracy": 0.5})
    assert len(lines) == 2 + len(cases) + 1
