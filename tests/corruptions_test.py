"""Corrupted batches: what is lost and added, what it depends on, and what stays to the bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmei_jax.corruptions import Condition, corrupt, draw
from mmei_jax.types import MODALITIES, Batch, TokenSequence

DIM = 6
LENGTHS = {"vision": (3, 0, 5, 1), "audio": (4, 2, 0, 7), "text": (2, 6, 1, 3)}
RECORDS = (11, 4, 7, 90)
DEVIATIONS = {name: jnp.asarray(np.linspace(0.0, 2.0, DIM), jnp.float32) for name in MODALITIES}


def tokens_of(name, record, length):
    return np.random.default_rng([MODALITIES.index(name), record]).normal(size=(length, DIM)).astype(np.float32)


def make_batch(places=(0, 1, 2, 3), num_tokens=8, records_per_row=1, padding=0.0, dtype=np.float32):
    """A batch of the records at these places, -1 for filler; packed if several go into a row."""
    sequences = {}
    num_rows = len(places) // records_per_row
    for name in MODALITIES:
        features = np.full((num_rows, num_tokens, DIM), padding, dtype)
        ids = np.zeros((num_rows, num_tokens), np.int32)
        for row in range(num_rows):
            start = 0
            for segment, place in enumerate(places[row * records_per_row : (row + 1) * records_per_row]):
                length = LENGTHS[name][place] if place >= 0 else 0
                if length:
                    features[row, start : start + length] = tokens_of(name, RECORDS[place], length)
                    ids[row, start : start + length] = segment + 1
                start += length
        sequences[name] = TokenSequence(jnp.asarray(features), jnp.asarray(ids))
    index = np.array([RECORDS[place] if place >= 0 else -1 for place in places], np.int32)
    return Batch(**sequences, is_record=jnp.asarray(index >= 0), record_index=jnp.asarray(index))


def condition(missing_rate=0.0, noise_level=0.0, kept=MODALITIES):
    return Condition(
        is_kept=jnp.array([name in kept for name in MODALITIES]),
        missing_rate=jnp.float32(missing_rate),
        noise_level=jnp.float32(noise_level),
    )


@jax.jit
def corrupt_with_seed_0(batch, given):
    return corrupt(batch, draw(0, batch), given, DEVIATIONS)


def corrupted(batch, **changes):
    return corrupt_with_seed_0(batch, condition(**changes))


def tokens(batch):
    """By modality and record, its tokens in order."""
    found = {}
    for name, sequence in batch.sequences().items():
        ids, features = np.asarray(sequence.segment_ids), np.asarray(sequence.features)
        index = np.asarray(batch.record_index).reshape(len(ids), -1)
        for row in range(len(ids)):
            for segment, record in enumerate(index[row]):
                if record >= 0:
                    found[name, int(record)] = features[row][ids[row] == segment + 1]
    return found


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key in ours:
        np.testing.assert_array_equal(ours[key], theirs[key], err_msg=str(key))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_clean_condition_leaves_every_token_as_it_was(dtype):
    batch = make_batch(dtype=dtype)
    left = corrupted(batch)
    for name, sequence in batch.sequences().items():
        same = getattr(left, name)
        np.testing.assert_array_equal(same.segment_ids, sequence.segment_ids)
        np.testing.assert_array_equal(same.features, np.asarray(sequence.features, np.float32))


@pytest.mark.parametrize(
    "other",
    [
        {"places": (3, 0, 2, 1)},
        {"places": (1, 0, -1, 2, 3, -1)},
        {"num_tokens": 20},
        {"num_tokens": 20, "records_per_row": 2},
        {"num_tokens": 20, "records_per_row": 2, "places": (2, 3, 0, -1, -1, 1)},
        {"padding": np.nan},
    ],
)
def test_what_is_lost_and_added_depends_neither_on_the_batch_nor_on_packing(other):
    changes = {"missing_rate": 0.4, "noise_level": 1.5}
    expected = tokens(corrupted(make_batch(), **changes))
    assert any(len(kept) for kept in expected.values())
    found = tokens(corrupted(make_batch(**other), **changes))
    assert_same(found, expected)


def test_seeds_modalities_records_and_positions_differ():
    batch = make_batch(num_tokens=8)
    draws = draw(0, batch)
    values = np.concatenate(
        [
            np.asarray(part.noise)[:, :, 0][np.asarray(getattr(batch, name).segment_ids) > 0]
            for name, part in draws.items()
        ]
    )
    assert len(np.unique(values)) == len(values) == sum(map(sum, LENGTHS.values()))
    assert not np.any(np.asarray(draw(1, batch)["text"].noise) == np.asarray(draws["text"].noise))


def test_tokens_left_stay_in_order_and_together():
    batch = make_batch(num_tokens=20, records_per_row=2)
    originals, left = tokens(batch), corrupted(batch, missing_rate=0.5)
    for key, kept in tokens(left).items():
        places = [np.flatnonzero((originals[key] == token).all(axis=1))[0] for token in kept]
        assert places == sorted(places)
    for sequence in left.sequences().values():
        for ids in np.asarray(sequence.segment_ids):
            used = np.count_nonzero(ids)
            assert (ids[:used] > 0).all()
            assert (np.diff(ids[:used]) >= 0).all()


def test_tokens_lost_at_a_rate_are_lost_at_every_higher_rate():
    batch = make_batch()
    kept = [tokens(corrupted(batch, missing_rate=rate)) for rate in (0.0, 0.3, 0.6, 1.0)]
    for fewer, more in zip(kept[1:], kept, strict=False):
        for key, values in fewer.items():
            assert {token.tobytes() for token in values} <= {token.tobytes() for token in more[key]}
    assert not any(len(values) for values in kept[-1].values())


def test_share_lost_and_size_of_the_noise_are_those_asked_for():
    ids = jnp.ones((200, 50), jnp.int32)
    sequence = TokenSequence(jnp.ones((200, 50, DIM)), ids)
    index = jnp.arange(200, dtype=jnp.int32)
    batch = Batch(vision=None, audio=sequence, text=None, is_record=jnp.ones(200, bool), record_index=index)
    left = corrupted(batch, missing_rate=0.3, noise_level=2.0).audio
    is_token = np.asarray(left.segment_ids) > 0
    # Four standard errors of 10,000 tokens.
    assert is_token.mean() == pytest.approx(0.7, abs=4 * np.sqrt(0.21 / 10_000))
    noise = np.asarray(left.features)[is_token] - 1.0
    expected = 2.0 * np.linspace(0.0, 2.0, DIM)
    np.testing.assert_allclose(noise.std(axis=0), expected, rtol=4 / np.sqrt(2 * 7000))
    np.testing.assert_allclose(noise.mean(axis=0), 0.0, atol=4 * expected.max() / np.sqrt(7000))
    assert (noise[:, 0] == 0.0).all()


def test_modality_that_is_left_out_has_no_token_left():
    left = corrupted(make_batch(), kept=("audio",))
    assert not left.vision.segment_ids.any()
    assert not left.text.segment_ids.any()
    np.testing.assert_array_equal(left.audio.segment_ids, make_batch().audio.segment_ids)


def test_padding_that_is_not_finite_reaches_no_token():
    left = corrupted(make_batch(padding=np.nan), missing_rate=0.5, noise_level=1.0)
    assert all(np.isfinite(values).all() for values in tokens(left).values())
