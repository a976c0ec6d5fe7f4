"""The benchmark of the input pipeline compares what it claims to compare."""

import contextlib
import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
from torch.utils.data import DataLoader, default_collate

from benchmarks import input_pipeline, input_pipeline_torch

NUM_RECORDS = 48
NUM_BATCHES = input_pipeline.NUM_EPOCHS * NUM_RECORDS // input_pipeline.BATCH_SIZE


@pytest.fixture(scope="module", params=["fixed", "ragged"])
def case(request, tmp_path_factory):
    made = input_pipeline.Case(tmp_path_factory.mktemp(request.param), request.param, NUM_RECORDS)
    input_pipeline.make_data(made)
    return made


def our_batches(case, is_placed) -> Iterator[input_pipeline.HostBatch]:
    with contextlib.closing(input_pipeline._open_iterator(case, 1, is_placed)) as iterator:
        for _ in range(NUM_BATCHES):
            yield input_pipeline._to_host(next(iterator))


def torch_batches(case, kind) -> Iterator[input_pipeline.HostBatch]:
    collate = input_pipeline_torch.collate_padded if case.lengths == "ragged" else default_collate
    if kind is input_pipeline_torch.Batched:
        collate = input_pipeline_torch._as_it_is
    loader = DataLoader(kind(case), input_pipeline.BATCH_SIZE, shuffle=True, collate_fn=collate)
    for batch in input_pipeline_torch._epochs(loader):
        yield input_pipeline_torch._to_host(batch)


@pytest.mark.parametrize("kind", ["MemoryMapped", "Pickled", "Batched"])
def test_torch_and_ours_hand_out_the_same_records_to_the_bit(case, kind):
    ours = input_pipeline.summarize(case, our_batches(case, is_placed=True))
    theirs = input_pipeline.summarize(case, torch_batches(case, getattr(input_pipeline_torch, kind)))
    assert input_pipeline.agree(ours, theirs) == ""
    assert len(ours["contents"]) == NUM_RECORDS
    assert all(len(content) == 1 for content in ours["contents"].values())


def test_our_batches_are_the_same_before_and_after_they_are_placed(case):
    placed = input_pipeline.summarize(case, our_batches(case, is_placed=True))
    assert input_pipeline.agree(placed, input_pipeline.summarize(case, our_batches(case, is_placed=False))) == ""


def test_one_changed_value_is_a_difference(case):
    def changed() -> Iterator[input_pipeline.HostBatch]:
        for batch in our_batches(case, is_placed=True):
            features = {name: np.array(values) for name, values in batch.features.items()}
            features["audio"][batch.record_index == 5, 0, 700] += 1
            yield dataclasses.replace(batch, features=features)

    ours = input_pipeline.summarize(case, our_batches(case, is_placed=True))
    assert input_pipeline.agree(ours, input_pipeline.summarize(case, changed())).startswith("record 5 is ")


def test_a_record_that_is_read_twice_is_a_difference(case):
    def repeated() -> Iterator[input_pipeline.HostBatch]:
        for batch in our_batches(case, is_placed=True):
            index = np.where(batch.record_index == 5, 6, batch.record_index)
            yield dataclasses.replace(batch, record_index=index)

    ours = input_pipeline.summarize(case, our_batches(case, is_placed=True))
    assert input_pipeline.agree(ours, input_pipeline.summarize(case, repeated())) == "the epochs hold different records"


@pytest.mark.parametrize("kind", ["order of the file", "same order twice"])
def test_a_side_that_does_not_shuffle_is_refused(case, kind):
    order = np.random.default_rng(0).permutation(NUM_RECORDS) if kind == "same order twice" else np.arange(NUM_RECORDS)
    batch = input_pipeline.HostBatch(order, order, {}, {})
    with pytest.raises(ValueError, match="not shuffled anew"):
        input_pipeline.summarize(case, [batch, batch])
