"""Waveforms in buckets of like lengths: each once, few shapes, little padding, and what the encoder gives it alone."""

import itertools
import math

import jax
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import utterance_lengths
from mmei_jax.encoders import (
    Wav2Vec2,
    bucket_by_length,
    choose_widths,
    in_corpus_order,
    mean_of_tokens,
    pad_waveforms,
    states_of_records,
)
from mmei_jax.types import InputError
from tests import hugging_face, wav2vec2_test


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60)),
    widths=st.lists(st.integers(1, 60), max_size=4),
    rows_per_batch=st.integers(1, 4),
    samples_per_batch=st.integers(60, 200),
    is_fixed=st.booleans(),
)
def test_every_waveform_is_once_in_the_narrowest_bucket_that_holds_it(
    lengths, widths, rows_per_batch, samples_per_batch, is_fixed
):
    widths = [*widths, 60]
    size = dict(rows_per_batch=rows_per_batch) if is_fixed else dict(samples_per_batch=samples_per_batch)
    audio = bucket_by_length(lengths, widths, **size)
    assert sorted(index for batch in audio.batches for index in batch.records) == list(range(len(lengths)))
    for batch in audio.batches:
        for index in batch.records:
            assert batch.width == min(width for width in widths if width >= lengths[index])
        own_lengths = [lengths[index] if index >= 0 else 0 for index in batch.record_index]
        assert batch.num_samples.tolist() == own_lengths
        # Filler comes last.
        assert batch.record_index.tolist() == batch.records + [-1] * (len(batch.record_index) - len(batch.records))
    assert len({(batch.width, len(batch.record_index)) for batch in audio.batches}) <= len(set(widths))
    for width, batches in itertools.groupby(audio.batches, lambda batch: batch.width):
        *full, last = batches
        assert all(-1 not in batch.record_index for batch in full)
        assert last.records
        num_rows, num_records = len(last.record_index), len(full) * len(last.record_index) + len(last.records)
        if is_fixed:
            assert num_rows == rows_per_batch
        else:
            # As few batches as the budget allows, with as few rows as those need.
            assert num_rows * width <= samples_per_batch
            assert len(full) + 1 == math.ceil(num_records / (samples_per_batch // width))
            assert num_rows == math.ceil(num_records / (len(full) + 1))
    assert [batch.width for batch in audio.batches] == sorted((batch.width for batch in audio.batches), reverse=True)
    places = sum(len(batch.record_index) * batch.width for batch in audio.batches)
    assert (audio.num_samples, audio.num_places) == (sum(lengths), places)
    assert audio.useful_share == (sum(lengths) / places if lengths else 1.0)


def test_batches_depend_on_the_lengths_alone():
    lengths = np.random.default_rng(0).integers(1, 100, 300)
    first, second = (
        bucket_by_length(each, choose_widths(each, 4), rows_per_batch=8) for each in (lengths, lengths.tolist())
    )
    assert len(first.batches) == len(second.batches)
    for mine, theirs in zip(first.batches, second.batches, strict=True):
        assert mine.width == theirs.width
        np.testing.assert_array_equal(mine.record_index, theirs.record_index)


@pytest.mark.parametrize(
    ("lengths", "changes", "message"),
    [
        ([400, 399], {}, r"waveform 1 has 399 samples: expected 400 to 1000; split it or leave it out"),
        ([400, 400, 1001], {}, r"waveform 2 has 1001 samples: expected 400 to 1000; split it or leave it out"),
        ([0], {"shortest": 1}, r"waveform 0 has 0 samples: expected 1 to 1000"),
        ([400], {"widths": []}, r"widths = \[\]: expected at least one, of at least 1 sample"),
        ([400], {"widths": [0, 500]}, r"widths = \[0, 500\]: expected at least one, of at least 1 sample"),
        ([400], {"rows_per_batch": 0}, r"rows_per_batch = 0: expected at least 1"),
        ([400], {"samples_per_batch": 5000}, r"rows_per_batch, samples_per_batch: expected exactly one of them"),
        ([400], {"rows_per_batch": None}, r"rows_per_batch, samples_per_batch: expected exactly one of them"),
        (
            [400],
            {"rows_per_batch": None, "samples_per_batch": 999},
            r"samples_per_batch = 999: expected at least 1000, the widest bucket",
        ),
    ],
)
def test_what_no_bucket_holds_is_refused_in_one_line(lengths, changes, message):
    options = dict(widths=[500, 1000], rows_per_batch=2, shortest=400)
    with pytest.raises(InputError, match=f"^{message}.*$"):
        bucket_by_length(lengths, **{**options, **changes})


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30), num_buckets=st.integers(1, 3))
def test_no_other_widths_leave_fewer_places_empty(lengths, num_buckets):
    def num_places(widths):
        return bucket_by_length(lengths, widths, rows_per_batch=1).num_places

    widths = choose_widths(lengths, num_buckets)
    assert 1 <= len(widths) <= num_buckets
    assert (np.diff(widths) > 0).all()
    choices = itertools.combinations_with_replacement(sorted(set(lengths)), num_buckets)
    assert num_places(widths) == min(num_places(choice) for choice in choices if choice[-1] == max(lengths))


def test_widths_need_waveforms_and_a_bucket():
    with pytest.raises(InputError, match=r"^num_buckets = 0: expected at least 1$"):
        choose_widths([5], 0)
    with pytest.raises(InputError, match=r"none; expected some, of at least 1 sample each$"):
        choose_widths([], 2)
    with pytest.raises(InputError, match="one of 0 samples; expected some"):
        choose_widths([5, 0], 2)


def utterance_samples(num_records):
    """Samples of utterances as long as MELD's, at 16 kHz."""
    quantiles = np.linspace(0.0, 1.0, len(utterance_lengths.DURATION_SECONDS))
    seconds = np.interp(np.random.default_rng(0).random(num_records), quantiles, utterance_lengths.DURATION_SECONDS)
    return np.maximum(seconds * 16_000, 400).astype(np.int64)


def test_eight_buckets_leave_less_than_a_quarter_empty_for_utterances_like_melds():
    lengths = utterance_samples(10_000)
    widths = choose_widths(lengths, 8)
    share = bucket_by_length(lengths, widths, samples_per_batch=2_000_000).useful_share
    assert 0.75 <= share <= 1.0
    # Padded to the longest they would leave nine tenths empty, and in buckets of equally many more than half.
    assert bucket_by_length(lengths, widths[-1:], rows_per_batch=32).useful_share < 0.1
    equal = np.quantile(lengths, np.linspace(0.0, 1.0, 9)[1:], method="higher")
    assert bucket_by_length(lengths, equal, samples_per_batch=2_000_000).useful_share < 0.5


def test_waveforms_are_padded_with_zeros_and_filler_has_no_samples():
    batch = bucket_by_length([3, 5, 2], widths=[5], rows_per_batch=4).batches[0]
    waveforms = [np.ones(3, np.float32), np.full(5, 2.0), np.full(2, 3.0, np.float16)]
    samples = pad_waveforms(waveforms, batch)
    assert samples.tolist() == [[1, 1, 1, 0, 0], [2] * 5, [3, 3, 0, 0, 0], [0] * 5]
    assert samples.dtype == np.float32
    assert batch.num_samples.tolist() == [3, 5, 2, 0]
    assert batch.num_samples.dtype == np.int32


@pytest.mark.parametrize(
    ("waveforms", "message"),
    [
        ([np.zeros(4)], "1 waveforms: expected the 2 of the batch"),
        ([np.zeros(4), np.zeros(7)], r"waveform 2 has 7 samples: expected 6, as when the batches were made"),
        ([np.zeros(3), np.zeros(6)], r"waveform 0 has 3 samples: expected 4, as when the batches were made"),
        (
            [np.zeros(4), np.zeros((2, 6))],
            r"waveform 2 has shape \[2, 6\] and type float64: expected one channel of floating samples",
        ),
        ([np.zeros(4, np.int16), np.zeros(6)], r"waveform 0 has shape \[4\] and type int16: expected one channel"),
    ],
)
def test_waveforms_that_do_not_fit_the_batch_are_refused_in_one_line(waveforms, message):
    batch = bucket_by_length([4, 3, 6], widths=[3, 6], rows_per_batch=3).batches[0]
    assert batch.records == [0, 2]
    with pytest.raises(InputError, match=f"^{message}.*$"):
        pad_waveforms(waveforms, batch)


def test_bucketed_corpus_gives_what_hugging_face_gives_each_waveform_alone():
    config, parameters = wav2vec2_test.make_ours("group_norm")
    assert config.front_norm == "group"
    generator = np.random.default_rng(5)
    lengths = generator.integers(config.receptive_field, 900, 25)
    corpus = [generator.normal(size=length).astype(np.float32) for length in lengths]
    widths = choose_widths(lengths, 3)
    audio = bucket_by_length(lengths, widths, rows_per_batch=6, shortest=config.receptive_field)
    assert len(audio.batches) > len(widths)
    assert any(-1 in batch.record_index for batch in audio.batches)
    traced = []

    @jax.jit
    def encode(parameters, samples, num_samples):
        traced.append(samples.shape)
        outputs = Wav2Vec2(config).apply({"params": parameters}, samples, num_samples)
        mean = mean_of_tokens(outputs.last_hidden_state, outputs.is_valid.astype(np.int32))
        return mean, outputs.last_hidden_state, outputs.is_valid

    means, states = [], {}
    for batch in audio.batches:
        samples = pad_waveforms([corpus[index] for index in batch.records], batch)
        mean, last, is_valid = encode(parameters, samples, batch.num_samples)
        means.append(mean)
        states |= states_of_records(last, is_valid, batch.record_index)
    assert len(traced) == len(set(traced)) == len(widths)
    assert {width for _, width in traced} == set(widths.tolist())
    means = in_corpus_order(means, audio.batches)
    assert len(means) == len(states) == len(corpus)
    model = wav2vec2_test.make_reference("group_norm")
    for index, samples in enumerate(corpus):
        with torch.no_grad():
            alone = wav2vec2_test.run_reference(model, samples[None]).last_hidden_state[0]
        hugging_face.assert_close(states[index], alone, 1e-5)
        hugging_face.assert_close(means[index], alone.mean(0), 1e-5)
