"""Which record goes to which place of a batch: padded, one record in each row, or packed, several records in a row.

A packed batch holds the same records as a padded one, in fewer and fuller rows; only their order differs. Everything
here follows from the records' lengths alone, so that every process, and a run that resumes, finds the same.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64, Integer

from mmei_jax.bin_packing import arrange_in_rows, pack
from mmei_jax.data_config import DataConfig
from mmei_jax.records import Split
from mmei_jax.types import MODALITIES


@dataclass(frozen=True)
class Layout:
    """The shape of a batch: static, so that each layout is compiled once.

    Attributes:
        num_rows: token rows, over all devices.
        records_per_row: places for records in each row (``segments`` in the glossary of :mod:`mmei_jax.types`). Place
            ``p`` of the batch lies in row ``p // records_per_row``.
        num_tokens: by modality, token places of each row.
    """

    num_rows: int
    records_per_row: int
    num_tokens: Mapping[str, int]

    def __str__(self) -> str:
        """In words, for the log."""
        return f"{self.num_rows} x ({' + '.join(str(count) for count in self.num_tokens.values())})"


def packed_layouts(data: DataConfig, batch_size: int, num_shards: int = 1) -> tuple[Layout, ...]:
    """The layouts of ``data.packing``, fewest rows first; none when packing is off.

    Args:
        data: gives the rows of a training batch; a batch of another size has rows in proportion.
        batch_size: records of a batch.
        num_shards: rows are rounded up to a multiple of this.
    """
    records_per_row = data.packing.records_per_row
    numbers = {
        -(-number * batch_size // (data.batch_size * num_shards)) * num_shards for number in data.packing.num_rows
    }
    num_tokens = {name: getattr(data.packing.tokens_per_row, name) for name in MODALITIES if name in data.modalities}
    return tuple(Layout(number, records_per_row, num_tokens) for number in sorted(numbers))


def padded_layouts(data: DataConfig, batch_size: int) -> tuple[Layout, ...]:
    """One layout for each length bucket of ``data.max_tokens``, smallest first: a row for each record."""
    buckets = {name: getattr(data.max_tokens, name) for name in MODALITIES if name in data.modalities}
    return tuple(
        Layout(batch_size, 1, {name: sizes[index] for name, sizes in buckets.items()})
        for index in range(len(data.max_tokens.vision))
    )


class Arranger:
    """Finds the layout and the places of a batch of one split."""

    def __init__(self, split: Split, data: DataConfig, batch_size: int, num_shards: int = 1) -> None:
        """Lists the layouts.

        Args:
            split: has the records' lengths.
            data: modalities, length buckets and packing.
            batch_size: records of a batch, filler included.
            num_shards: packed rows are rounded up to a multiple of this.
        """
        self._split = split
        self._max_tokens = {name: getattr(data.max_tokens, name)[-1] for name in MODALITIES if name in data.modalities}
        self._packed = packed_layouts(data, batch_size, num_shards)
        self._padded = padded_layouts(data, batch_size)
        self.layouts = (*self._packed, *self._padded)

    def arrange(self, indices: Integer[np.ndarray, "batch"]) -> tuple[Layout, Int64[np.ndarray, "places"]]:
        """The first layout into which a batch fits, and what goes where.

        Packed layouts come before padded ones. Records beyond the last length bucket are cut at it, so every batch fits
        into the last layout.

        Args:
            indices: ``[batch]`` records of a *global* batch, so that every process finds the same; -1 is filler.

        Returns:
            The layout, and for each of its ``num_rows * records_per_row`` places the record, -1 for filler. Places of a
            padded layout are the batch as it is; in a packed row, records keep their order.
        """
        lengths = self.lengths(indices)
        if self._packed:
            arranged = self._pack(indices[indices >= 0], lengths)
            if arranged is not None:
                return arranged
        longest = lengths.max(axis=0, initial=0)
        for layout in self._padded:
            if (longest <= list(layout.num_tokens.values())).all():
                break
        return layout, indices.astype(np.int64)

    def arrange_alike(
        self, batches: Sequence[Integer[np.ndarray, "batch"]]
    ) -> tuple[Layout, list[Int64[np.ndarray, "places"]]]:
        """The places of several batches in one layout, the first into which all of them fit.

        Args:
            batches: each ``[batch]`` records of a global batch; -1 is filler.

        Returns:
            The layout, and each batch's places as :meth:`arrange` gives them, filler added in rows at the end.
        """
        arranged = [self.arrange(indices) for indices in batches]
        common = max((layout for layout, _ in arranged), key=self.layouts.index)
        if common in self._padded:
            return common, [indices.astype(np.int64) for indices in batches]
        size = common.num_rows * common.records_per_row
        return common, [np.pad(places, (0, size - len(places)), constant_values=-1) for _, places in arranged]

    def lengths(self, indices: Integer[np.ndarray, "batch"]) -> Int64[np.ndarray, "records modalities"]:
        """Tokens of each record of a batch, cut at the last length bucket; filler (-1) is left out."""
        records = indices[indices >= 0]
        kept = [np.minimum(self._split.lengths(name)[records], most) for name, most in self._max_tokens.items()]
        return np.stack(kept, axis=1)

    def _pack(
        self, records: Integer[np.ndarray, "records"], lengths: Integer[np.ndarray, "records modalities"]
    ) -> tuple[Layout, Int64[np.ndarray, "places"]] | None:
        """None where the batch needs more rows than any layout has."""
        largest = self._packed[-1]
        size = largest.records_per_row
        rows = pack(lengths, np.array(list(largest.num_tokens.values())), size)
        num_rows = int(rows.max(initial=-1)) + 1
        for layout in self._packed:
            if num_rows <= layout.num_rows:
                places = arrange_in_rows(rows, layout.num_rows, size)
                return layout, np.where(places >= 0, records[places], -1)
        return None
