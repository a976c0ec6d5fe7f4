"""A corpus of texts in batches of one shape, several texts in each row.

All batches have the same shape, so that one program is compiled. Which text goes where follows from the lengths alone.
Nothing is cut: a text that is too long is refused, by its index in the corpus.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32, Int64

from mmei_jax.bin_packing import arrange_in_rows, pack
from mmei_jax.types import InputError

_LARGEST_ID = int(np.iinfo(np.int32).max)


@dataclass(frozen=True)
class TextBatch:
    """Rows of texts, as ``Bert`` takes them.

    Attributes:
        token_ids: ``[rows, tokens]`` int32, 0 at padding. The texts of a row follow each other from its start.
        segment_ids: ``[rows, tokens]`` int32: 0 is padding, ``s >= 1`` a token of the row's ``s``-th text.
        token_type_ids: ``[rows, tokens]`` int32, 0 at padding; None where none were given.
        record_index: ``[batch]`` int64 with ``batch = rows * num_segments``, the text at each place in the order of
            ``pooled``: its index in the corpus, -1 where there is none.
    """

    token_ids: Int32[np.ndarray, "rows tokens"]
    segment_ids: Int32[np.ndarray, "rows tokens"]
    token_type_ids: Int32[np.ndarray, "rows tokens"] | None
    record_index: Int64[np.ndarray, "batch"]


@dataclass(frozen=True)
class PackedTexts:
    """A corpus of texts in batches of one shape.

    Attributes:
        batches: every text is in one of them, once; the last is filled up with empty rows.
        num_segments: texts per row, at most; what ``Bert`` takes by that name.
        num_tokens: of all texts.
        num_places: for tokens, in all batches, empty rows included.
    """

    batches: tuple[TextBatch, ...]
    num_segments: int
    num_tokens: int
    num_places: int

    @property
    def useful_share(self) -> float:
        """Share of the places that hold a token, in [0, 1]; 1 without batches."""
        return self.num_tokens / self.num_places if self.batches else 1.0


def pack_texts(
    texts: Sequence[Sequence[int] | np.ndarray],
    token_type_ids: Sequence[Sequence[int] | np.ndarray] | None = None,
    *,
    tokens_per_row: int,
    rows_per_batch: int,
    texts_per_row: int,
    max_tokens: int | None = None,
) -> PackedTexts:
    """Packs texts into few rows, several in each, and the rows into batches of one shape.

    The longest texts come first, each in the first row that has room (:func:`mmei_jax.bin_packing.pack`), so that rows
    are full but for the last ones; texts keep their order within a row.

    Args:
        texts: token ids of each text, whole numbers of at least 0, with what the tokenizer puts around them.
        token_type_ids: as many for each text, of at least 0.
        tokens_per_row: places for tokens in a row.
        rows_per_batch: rows of every batch.
        texts_per_row: texts in a row, at most. Where too small, rows of short texts stay partly empty; a quarter of
            ``tokens_per_row`` suffices for utterances.
        max_tokens: longest text that the encoder takes (``BertConfig.max_tokens``), for rows that are longer than that.

    Raises:
        InputError: a text is empty, or longer than a row or ``max_tokens``; its ids or types are not one list of whole
            numbers of at least 0; it has more or fewer types than ids; a size is below 1.

    Example:
        >>> packed = pack_texts(
        ...     [[101, 102], [101, 7592, 102], [101, 2088, 102]], tokens_per_row=5, rows_per_batch=2, texts_per_row=2
        ... )
        >>> packed.batches[0].token_ids
        array([[ 101,  102,  101, 7592,  102],
               [ 101, 2088,  102,    0,    0]], dtype=int32)
        >>> packed.batches[0].segment_ids
        array([[1, 1, 2, 2, 2],
               [1, 1, 1, 0, 0]], dtype=int32)
        >>> packed.batches[0].record_index
        array([ 0,  1,  2, -1])
        >>> packed.useful_share
        0.8
    """
    longest = tokens_per_row if max_tokens is None else min(tokens_per_row, max_tokens)
    sizes = dict(tokens_per_row=tokens_per_row, rows_per_batch=rows_per_batch, texts_per_row=texts_per_row)
    for name, size in (*sizes.items(), ("max_tokens", longest)):
        if size < 1:
            raise InputError(f"{name} = {size}: expected at least 1")
    ids = _ids_of_texts(texts, longest)
    types = None if token_type_ids is None else _types_of_texts(token_type_ids, ids)

    lengths = np.array([len(text) for text in ids], np.int64)
    rows = pack(lengths[:, None], np.array([tokens_per_row]), texts_per_row)
    num_batches = -(-(int(rows.max(initial=-1)) + 1) // rows_per_batch)
    places = arrange_in_rows(rows, num_batches * rows_per_batch, texts_per_row)
    order, segments, spans = _spans(places, lengths, texts_per_row, tokens_per_row)
    shape = (num_batches, rows_per_batch, tokens_per_row)
    token_ids = _fill(shape, spans, [ids[index] for index in order])
    segment_ids = _fill(shape, spans, [np.repeat(segments, lengths[order])])
    type_ids = None if types is None else _fill(shape, spans, [types[index] for index in order])
    record_index = places.reshape(num_batches, rows_per_batch * texts_per_row)
    batches = tuple(
        TextBatch(token_ids[batch], segment_ids[batch], None if type_ids is None else type_ids[batch], index)
        for batch, index in enumerate(record_index)
    )
    return PackedTexts(
        batches, num_segments=texts_per_row, num_tokens=int(lengths.sum()), num_places=int(np.prod(shape))
    )


def _spans(
    places: Int64[np.ndarray, "places"], lengths: Int64[np.ndarray, "records"], texts_per_row: int, tokens_per_row: int
) -> tuple[Int64[np.ndarray, "records"], Int64[np.ndarray, "records"], Int64[np.ndarray, "total"]]:
    """Where the tokens of all texts go, text after text without gaps in each row.

    Returns:
        The texts row by row, the segment of each, and for all their tokens in that order the place among all rows'.
    """
    (used,) = np.nonzero(places >= 0)
    order, row = places[used], used // texts_per_row
    ends = np.cumsum(lengths[order])
    starts = ends - lengths[order]
    # Texts of a row stand together, so the row's first text is where its number would be inserted.
    first_columns = starts - starts[np.searchsorted(row, row)]
    spans = np.arange(lengths.sum()) + np.repeat(row * tokens_per_row + first_columns - starts, lengths[order])
    return order, used % texts_per_row + 1, spans


def _fill(
    shape: tuple[int, int, int], spans: Int64[np.ndarray, "total"], values: list[np.ndarray]
) -> Int32[np.ndarray, "batches rows tokens"]:
    """Puts values, one after the other, at their places; 0 elsewhere."""
    filled = np.zeros(np.prod(shape), np.int32)
    if values:
        filled[spans] = np.concatenate(values)
    return filled.reshape(shape)


def _ids_of_texts(texts: Sequence[Sequence[int] | np.ndarray], longest: int) -> list[np.ndarray]:
    """An array of each text's ids, all of 1 to ``longest`` tokens."""
    ids = [_whole_numbers(text, f"text {index}") for index, text in enumerate(texts)]
    for index, text in enumerate(ids):
        if not 1 <= len(text) <= longest:
            raise InputError(f"text {index} has {len(text)} tokens: expected 1 to {longest}; cut it or leave it out")
    return ids


def _types_of_texts(token_type_ids: Sequence[Sequence[int] | np.ndarray], ids: list[np.ndarray]) -> list[np.ndarray]:
    """An array of each text's token types, as many as ids."""
    if len(token_type_ids) != len(ids):
        raise InputError(f"token_type_ids of {len(token_type_ids)} texts: expected those of {len(ids)}")
    types = [_whole_numbers(own, f"token_type_ids of text {index}") for index, own in enumerate(token_type_ids)]
    for index, (own, text) in enumerate(zip(types, ids, strict=True)):
        if len(own) != len(text):
            raise InputError(f"text {index} has {len(own)} token types: expected {len(text)}, one for each token")
    return types


def _whole_numbers(values: Sequence[int] | np.ndarray, what: str) -> np.ndarray:
    """One list of ids; fractions are refused, not rounded."""
    array = np.asarray(values)
    if array.ndim != 1:
        raise InputError(f"{what} has shape {list(array.shape)}: expected one list of whole numbers")
    if len(array) and array.dtype.kind not in "iu":
        raise InputError(f"{what} has values of type {array.dtype}: expected whole numbers")
    if len(array) and not 0 <= array.min() <= array.max() <= _LARGEST_ID:
        raise InputError(f"{what} has values from {array.min()} to {array.max()}: expected 0 to {_LARGEST_ID}")
    return array
