"""What encoders gave batch by batch, back in the order of the corpus."""

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int, Int64, Shaped

from mmei_jax.encoders.audio_buckets import AudioBatch
from mmei_jax.encoders.outputs import ArrayLike
from mmei_jax.encoders.text_packing import TextBatch
from mmei_jax.types import InputError


def in_corpus_order(
    outputs: Sequence[Shaped[ArrayLike, "_ ..."]], batches: Sequence[TextBatch | AudioBatch]
) -> Shaped[np.ndarray, "records ..."]:
    """Puts one output per record into the order of the corpus.

    Args:
        outputs: for each batch ``[batch, ...]``, an entry for each place of its ``record_index``: ``pooled``, or what
            ``mean_of_tokens`` and ``first_token`` give.
        batches: all batches of the corpus.

    Returns:
        ``[records, ...]`` array of the outputs' type, on the host.

    Raises:
        InputError: there is no batch, there are more or fewer outputs than batches, one has more or fewer entries than
            its batch has places, or the batches do not hold each record once.

    Example:
        >>> from mmei_jax.encoders import bucket_by_length
        >>> batches = bucket_by_length([900, 100, 200], widths=[200, 900], rows_per_batch=3).batches
        >>> in_corpus_order([np.array([9.0, 0.0, 0.0]), np.array([1.0, 2.0, 0.0])], batches)
        array([9., 1., 2.])
    """
    if not batches or len(outputs) != len(batches):
        raise InputError(f"outputs of {len(outputs)} batches: expected those of {len(batches)}, at least one")
    arrays = [np.asarray(output) for output in outputs]
    for number, (array, batch) in enumerate(zip(arrays, batches, strict=True)):
        num_places = len(batch.record_index)
        if len(array) != num_places:
            raise InputError(f"outputs of batch {number}: {len(array)} entries, expected {num_places}, one per place")
    index = np.concatenate([batch.record_index for batch in batches])
    order = np.argsort(index, kind="stable")[np.count_nonzero(index < 0) :]
    if (index[order] != np.arange(len(order))).any():
        raise InputError(f"{len(batches)} batches do not hold each record once: expected all batches of a corpus")
    return np.concatenate(arrays)[order]


def states_of_records(
    states: Float[ArrayLike, "rows tokens dim"],
    segment_ids: Int[ArrayLike, "rows tokens"] | Bool[ArrayLike, "rows tokens"],
    record_index: Int64[np.ndarray, "batch"],
) -> Iterator[tuple[int, Float[np.ndarray, "_ dim"]]]:
    """The token states of each record of a batch, without padding.

    Args:
        states: ``[rows, tokens, dim]``, such as ``last_hidden_state``.
        segment_ids: ``[rows, tokens]``: 0 is padding, ``s >= 1`` the row's ``s``-th record. Of texts, the batch's own;
            of audio, a record per row, the encoder's ``is_valid``.
        record_index: ``[batch]`` with ``batch = rows * segments``, of the batch.

    Yields:
        The record's index in the corpus, and its states ``[tokens, dim]`` on the host.

    Example:
        >>> states, segment_ids = np.arange(4.0).reshape(1, 4, 1), np.array([[1, 2, 2, 0]])
        >>> [(index, own.ravel().tolist()) for index, own in states_of_records(states, segment_ids, np.array([7, 3]))]
        [(7, [0.0]), (3, [1.0, 2.0])]
    """
    states, segment_ids = np.asarray(states), np.asarray(segment_ids)
    num_segments = len(record_index) // len(segment_ids)
    for place, record in enumerate(record_index.tolist()):
        if record >= 0:
            row, segment = divmod(place, num_segments)
            yield record, states[row, segment_ids[row] == segment + 1]
