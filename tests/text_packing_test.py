"""Texts packed into batches of one shape: each once, whole, back in order, and with what the encoder gives it alone."""

import csv
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.utterance_lengths import draw_lengths
from mmei_jax.encoders import Bert, in_corpus_order, mean_of_tokens, pack_texts, states_of_records
from mmei_jax.types import InputError
from tests import bert_test, hugging_face

MELD = Path(__file__).parents[2] / "shared" / "data" / "meld" / "train_sent_emo.csv"
SIZES = dict(tokens_per_row=10, rows_per_batch=2, texts_per_row=3)


def make_texts(lengths, seed=0, num_ids=97):
    generator = np.random.default_rng(seed)
    return [generator.integers(1, num_ids, length).tolist() for length in lengths]


def unpack(packed):
    """Text and token types found at each place that holds a text, as (index, ids, types)."""
    for batch in packed.batches:
        assert batch.token_ids.dtype == batch.segment_ids.dtype == np.int32
        assert batch.record_index.shape == (len(batch.token_ids) * packed.num_segments,)
        for place, index in enumerate(batch.record_index.tolist()):
            row, segment = divmod(place, packed.num_segments)
            (columns,) = np.nonzero(batch.segment_ids[row] == segment + 1)
            assert (index < 0) == (len(columns) == 0)
            if index >= 0:
                assert columns[-1] - columns[0] == len(columns) - 1
                types = None if batch.token_type_ids is None else batch.token_type_ids[row, columns].tolist()
                yield index, batch.token_ids[row, columns].tolist(), types
        is_padding = batch.segment_ids == 0
        assert not batch.token_ids[is_padding].any()
        assert batch.token_type_ids is None or not batch.token_type_ids[is_padding].any()


@settings(max_examples=150, deadline=None)
@given(
    texts=st.lists(st.lists(st.tuples(st.integers(0, 2**31 - 1), st.integers(0, 3)), min_size=1, max_size=9)),
    more_tokens=st.integers(0, 12),
    rows_per_batch=st.integers(1, 4),
    texts_per_row=st.integers(1, 5),
    has_types=st.booleans(),
)
def test_every_text_is_packed_once_and_whole(texts, more_tokens, rows_per_batch, texts_per_row, has_types):
    ids, types = ([[pair[part] for pair in text] for text in texts] for part in (0, 1))
    tokens_per_row = 9 + more_tokens
    packed = pack_texts(
        ids,
        types if has_types else None,
        tokens_per_row=tokens_per_row,
        rows_per_batch=rows_per_batch,
        texts_per_row=texts_per_row,
    )
    found = sorted(unpack(packed))
    assert found == [(index, ids[index], types[index] if has_types else None) for index in range(len(texts))]
    assert {batch.token_ids.shape for batch in packed.batches} <= {(rows_per_batch, tokens_per_row)}
    num_places = len(packed.batches) * rows_per_batch * tokens_per_row
    assert (packed.num_tokens, packed.num_places) == (sum(map(len, ids)), num_places)
    assert packed.useful_share == (packed.num_tokens / num_places if texts else 1.0)


def test_packing_depends_on_the_texts_alone():
    texts = make_texts(np.random.default_rng(1).integers(1, 11, 200))
    first = pack_texts(texts, **SIZES)
    second = pack_texts([np.array(text, np.int16) for text in texts], **SIZES)
    assert len(first.batches) == len(second.batches) > 10
    for mine, theirs in zip(first.batches, second.batches, strict=True):
        for name in ("token_ids", "segment_ids", "record_index"):
            np.testing.assert_array_equal(getattr(mine, name), getattr(theirs, name))


def test_last_batch_is_filled_up_with_empty_rows():
    packed = pack_texts(make_texts([10, 10, 4]), **SIZES)
    assert len(packed.batches) == 2
    last = packed.batches[1]
    assert last.segment_ids.tolist() == [[1, 1, 1, 1, 0, 0, 0, 0, 0, 0], [0] * 10]
    assert last.record_index.tolist() == [2, -1, -1, -1, -1, -1]
    assert packed.useful_share == 24 / 40


def test_without_texts_there_is_no_batch():
    packed = pack_texts([], **SIZES)
    assert packed.batches == ()
    assert packed.useful_share == 1.0


@pytest.mark.parametrize(
    ("texts", "types", "changes", "message"),
    [
        ([[1], []], None, {}, r"text 1 has 0 tokens: expected 1 to 10; cut it"),
        ([[1], [1], [1] * 11], None, {}, r"text 2 has 11 tokens: expected 1 to 10; cut it"),
        ([[1] * 9], None, {"max_tokens": 8}, r"text 0 has 9 tokens: expected 1 to 8; cut it"),
        ([[1] * 11], None, {"max_tokens": 20}, r"text 0 has 11 tokens: expected 1 to 10; cut it"),
        ([np.array([[1, 2]])], None, {}, r"text 0 has shape \[1, 2\]: expected one list of whole numbers"),
        ([np.array([1.5])], None, {}, r"text 0 has values of type float64: expected whole numbers"),
        ([[4], [3, -1]], None, {}, r"text 1 has values from -1 to 3: expected 0 to 2147483647"),
        ([[2**31]], None, {}, r"text 0 has values from 2147483648 to 2147483648: expected 0 to 2147483647"),
        ([[1], [2, 3]], [[0], [0]], {}, r"text 1 has 1 token types: expected 2, one for each token"),
        ([[1], [2]], [[0]], {}, r"token_type_ids of 1 texts: expected those of 2"),
        ([[1]], [[-1]], {}, r"token_type_ids of text 0 has values from -1 to -1"),
        ([[1]], None, {"tokens_per_row": 0}, r"tokens_per_row = 0: expected at least 1"),
        ([[1]], None, {"rows_per_batch": 0}, r"rows_per_batch = 0: expected at least 1"),
        ([[1]], None, {"texts_per_row": -1}, r"texts_per_row = -1: expected at least 1"),
        ([[1]], None, {"max_tokens": 0}, r"max_tokens = 0: expected at least 1"),
    ],
)
def test_what_cannot_be_packed_is_refused_in_one_line(texts, types, changes, message):
    with pytest.raises(InputError, match=f"^{message}.*$"):
        pack_texts(texts, types, **{**SIZES, **changes})


def share_of(lengths):
    packed = pack_texts(make_texts(lengths), tokens_per_row=64, rows_per_batch=32, texts_per_row=16)
    return packed.useful_share


def test_utterances_like_melds_fill_97_percent_of_the_places():
    lengths = draw_lengths(10_000, seed=0, max_tokens=(1000, 1000, 64))[:, 2]
    assert 0.97 <= share_of(lengths) <= 1.0


@pytest.mark.skipif(not MELD.exists(), reason="MELD's utterances are not beside the checkout")
def test_melds_utterances_fill_97_percent_of_the_places():
    with MELD.open(encoding="utf-8", newline="") as file:
        texts = [re.findall(r"\w+|[^\w\s]", row["Utterance"]) for row in csv.DictReader(file)]
    # A start, words and punctuation marks, an end; one utterance is longer than a row and is cut, as tokenizers do.
    lengths = np.array([len(text) + 2 for text in texts])
    assert np.count_nonzero(lengths > 64) == 1
    assert 0.97 <= share_of(np.minimum(lengths, 64)) <= 1.0


def test_packed_corpus_gives_what_hugging_face_gives_each_text_alone():
    config, parameters = bert_test.make_ours("two_layers")
    lengths = draw_lengths(60, seed=3, max_tokens=(1000, 1000, 16))[:, 2]
    texts = make_texts(lengths, num_ids=config.vocabulary_size)
    types = make_texts(lengths, seed=1, num_ids=config.num_token_types)
    packed = pack_texts(texts, types, tokens_per_row=24, rows_per_batch=8, texts_per_row=6)
    assert len(packed.batches) > 3
    assert not packed.batches[-1].segment_ids[-1].any()  # there is a filler row
    traced = []

    @jax.jit
    def encode(parameters, token_ids, segment_ids, token_type_ids):
        traced.append(token_ids.shape)
        outputs = Bert(config).apply(
            {"params": parameters}, token_ids, segment_ids, token_type_ids, num_segments=packed.num_segments
        )
        mean = mean_of_tokens(outputs.last_hidden_state, segment_ids, packed.num_segments)
        return outputs.pooled, mean, outputs.last_hidden_state

    results = [encode(parameters, batch.token_ids, batch.segment_ids, batch.token_type_ids) for batch in packed.batches]
    assert traced == [(8, 24)]
    pooled, means = (in_corpus_order([result[part] for result in results], packed.batches) for part in (0, 1))
    states = {}
    for batch, (_, _, last) in zip(packed.batches, results, strict=True):
        states |= states_of_records(last, batch.segment_ids, batch.record_index)
    assert len(pooled) == len(means) == len(states) == len(texts)
    model = bert_test.make_reference("two_layers")
    for index, (text, own_types) in enumerate(zip(texts, types, strict=True)):
        with torch.no_grad():
            alone = bert_test.run_reference(model, [text], [[1] * len(text)], [own_types])
        hugging_face.assert_close(pooled[index], alone.pooler_output[0], 1e-5)
        hugging_face.assert_close(means[index], alone.last_hidden_state[0].mean(0), 1e-5)
        hugging_face.assert_close(states[index], alone.last_hidden_state[0], 1e-5)
