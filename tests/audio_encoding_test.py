"""Sound of a shard in batches: each clip once, in a row that holds it, few rows empty."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mmei_jax.encoders.preprocessing import AudioPreprocessing
from mmei_jax.extraction.audio_encoding import AudioEncoder, _AudioShard


class Recorder(AudioEncoder):
    """Stands for the encoder: notes what it is given, and gives each sample back as a token."""

    widths = (10, 20, 40)
    rows = {10: 8, 20: 4, 40: 2}  # noqa: RUF012 - read only
    rows_at_end = {10: 2, 20: 2, 40: 2}  # noqa: RUF012 - read only
    preprocessing = AudioPreprocessing(16_000, is_normalised=False)

    def __init__(self):  # loads nothing
        self.batches = []

    def dispatch(self, width, waveforms, num_rows):
        assert len(waveforms) <= num_rows
        states = np.zeros((num_rows, width, 1), np.float32)
        is_valid = np.zeros((num_rows, width), bool)
        for row, waveform in enumerate(waveforms):
            states[row, : len(waveform), 0] = waveform
            is_valid[row, : len(waveform)] = True
        self.batches.append((width, num_rows, len(waveforms)))
        return states, is_valid


def encode(lengths):
    encoder = Recorder()
    shard = _AudioShard(encoder)
    for record, length in enumerate(lengths):
        shard.add(record, np.full(length, record + 1, np.float32))
    return encoder.batches, shard.finish()()


@given(lengths=st.lists(st.integers(1, 40), max_size=40))
def test_each_clip_comes_back_whole_under_its_record_in_batches_of_two_sizes(lengths):
    batches, found = encode(lengths)
    assert sorted(found) == list(range(len(lengths)))
    for record, states in found.items():
        assert states.tolist() == [[record + 1]] * lengths[record]
    for width, num_rows, num_clips in batches:
        assert num_rows in (Recorder.rows[width], Recorder.rows_at_end[width])
        # Only the last batch of all may have empty rows.
        assert num_clips == num_rows or (width, num_rows, num_clips) == batches[-1]


def test_rows_that_would_be_empty_take_the_longest_clips_of_narrower_batches():
    batches, _ = encode([5, 35, 15, 7, 6, 5])
    # With the clip of 35 goes that of 15; four of at most 10 are left.
    assert batches == [(40, 2, 2), (10, 2, 2), (10, 2, 2)]
