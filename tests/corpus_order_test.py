"""Outputs of batches, back in the order of the corpus."""

import numpy as np
import pytest

from mmei_jax.encoders import bucket_by_length, in_corpus_order, pack_texts, states_of_records
from mmei_jax.types import InputError

TEXTS = [[1], [2, 3], [4, 5, 6], [7, 8]]
PACKED = pack_texts(TEXTS, tokens_per_row=4, rows_per_batch=2, texts_per_row=2)
AUDIO = bucket_by_length([30, 10, 20, 11], widths=[15, 30], rows_per_batch=3)


def test_outputs_of_places_come_back_in_the_order_of_the_corpus():
    # What each place gives is the number of its record, as a vector; filler gives what must not come back.
    for batches in (PACKED.batches, AUDIO.batches):
        outputs = [np.repeat(batch.record_index[:, None], 2, axis=1).astype(np.float32) for batch in batches]
        restored = in_corpus_order(outputs, batches)
        assert restored.tolist() == [[0, 0], [1, 1], [2, 2], [3, 3]]
        assert restored.dtype == np.float32
        # The order of the batches does not matter, as long as it is the outputs' too.
        np.testing.assert_array_equal(in_corpus_order(outputs[::-1], batches[::-1]), restored)


def test_states_of_each_text_are_those_of_its_tokens():
    found = {}
    for batch in PACKED.batches:
        found |= states_of_records(batch.token_ids[..., None].astype(np.float32), batch.segment_ids, batch.record_index)
    assert {index: states[:, 0].tolist() for index, states in found.items()} == dict(enumerate(TEXTS))


def test_states_of_each_waveform_are_those_of_its_valid_frames():
    is_valid = np.array([[True, True, False], [True, False, False], [False] * 3])
    states = np.arange(9.0).reshape(3, 3, 1)
    found = dict(states_of_records(states, is_valid, np.array([5, 2, -1])))
    assert {index: own.ravel().tolist() for index, own in found.items()} == {5: [0.0, 1.0], 2: [3.0]}


@pytest.mark.parametrize(
    ("outputs", "batches", "message"),
    [
        ([], (), "outputs of 0 batches: expected those of 0, at least one"),
        ([np.zeros(3)], AUDIO.batches, "outputs of 1 batches: expected those of 2"),
        ([np.zeros(3), np.zeros(2)], AUDIO.batches, "outputs of batch 1: 2 entries, expected 3, one per place"),
        ([np.zeros(3)], AUDIO.batches[1:], "1 batches do not hold each record once: expected all batches of a corpus"),
        ([np.zeros(3)] * 4, AUDIO.batches * 2, "4 batches do not hold each record once"),
    ],
)
def test_outputs_that_do_not_belong_to_the_batches_are_refused_in_one_line(outputs, batches, message):
    with pytest.raises(InputError, match=f"^{message}.*$"):
        in_corpus_order(outputs, batches)
