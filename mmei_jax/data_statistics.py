"""What is measured on a whole split before training: feature means and scales, and how much the token limits cut."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32

from mmei_jax.config import Config
from mmei_jax.records import Split
from mmei_jax.types import MODALITIES, InputError

# Padded features that are in memory at once while a split is read through.
_BYTES_PER_CHUNK = 16 * 2**20
# A feature whose deviation is below this share of its root mean square is constant: what is left is rounding of the
# stored float32 or float16 values.
_CONSTANT_SHARE = 1e-6


@dataclass(frozen=True)
class Truncation:
    """What ``config.data.max_tokens`` cuts off one modality of a split.

    Attributes:
        num_records: records that have the modality.
        num_truncated_records: those of them that are longer than the maximum.
        num_tokens: their tokens, all together, before any cut.
        num_dropped_tokens: tokens beyond the maximum.
    """

    num_records: int
    num_truncated_records: int
    num_tokens: int
    num_dropped_tokens: int


def truncation_report(split: Split, config: Config) -> dict[str, Truncation]:
    """Exact counts of what is cut, by modality, from the stored lengths; no features are read.

    Raises:
        InputError: the data set lacks a modality of ``config.data.modalities``.
    """
    report = {}
    for name in MODALITIES:
        if name in config.data.modalities:
            lengths = split.lengths(name)
            dropped = np.maximum(lengths - getattr(config.data.max_tokens, name)[-1], 0)
            report[name] = Truncation(
                num_records=int(np.count_nonzero(lengths)),
                num_truncated_records=int(np.count_nonzero(dropped)),
                num_tokens=int(lengths.sum()),
                num_dropped_tokens=int(dropped.sum()),
            )
    return report


def truncation_lines(split: Split, config: Config) -> list[str]:
    """What is cut, in words: one line for each modality of which anything is."""
    return [
        f"{name}: {cut.num_truncated_records:,} of {cut.num_records:,} records of {'+'.join(split.names)} are cut to "
        f"{getattr(config.data.max_tokens, name)[-1]} tokens, {cut.num_dropped_tokens:,} of {cut.num_tokens:,} tokens "
        f"are lost (config.data.max_tokens.{name})"
        for name, cut in truncation_report(split, config).items()
        if cut.num_truncated_records
    ]


def feature_statistics(
    split: Split, modality: str, *, max_tokens: int | None = None
) -> tuple[Float32[np.ndarray, "dim"], Float32[np.ndarray, "dim"]]:
    """Mean and scale of each feature over all valid tokens: ``(x - mean) * scale`` has mean 0 and deviation 1.

    Accumulated in float64, chunk by chunk, as counts, means and sums of squared deviations that merge without
    cancellation (Chan, Golub and LeVeque, 1979).

    Args:
        split: a training split, normally.
        modality: its name.
        max_tokens: tokens counted of each record, from its start; None counts all.

    Returns:
        ``[dim]`` float32 mean, and ``[dim]`` float32 inverse of the (population) deviation; 1 for a constant feature.

    Raises:
        InputError: the data set lacks the modality, or no record of the split has it.
    """
    count = 0
    # Broadcast against the first chunk, which brings the features' number.
    mean = squares = np.zeros(1)
    for tokens in _token_chunks(split, modality, max_tokens):
        added = len(tokens)
        if added:
            chunk_mean = tokens.mean(axis=0)
            delta = chunk_mean - mean
            total = count + added
            squares = squares + np.square(tokens - chunk_mean).sum(axis=0) + np.square(delta) * (count * added / total)
            mean = mean + delta * (added / total)
            count = total
    if not count:
        raise InputError(f"{split.dataset.path}: no record of split {'+'.join(split.names)} has {modality}")
    variance = squares / count
    deviation = np.sqrt(variance)
    is_constant = deviation <= _CONSTANT_SHARE * np.sqrt(np.square(mean) + variance)
    scale = 1.0 / np.where(is_constant, 1.0, deviation)
    return mean.astype(np.float32), scale.astype(np.float32)


def _token_chunks(split: Split, modality: str, max_tokens: int | None) -> Iterator[np.ndarray]:
    """All valid tokens of a split, in order, as ``[tokens, dim]`` float64 pieces of bounded size."""
    longest = int(split.lengths(modality).max(initial=0))
    num_tokens = max(1, longest if max_tokens is None else min(longest, max_tokens))
    record_bytes = 4 * num_tokens * split.dataset.spec.modalities[modality].dim
    num_records = max(1, _BYTES_PER_CHUNK // record_bytes)
    for start in range(0, split.num_records, num_records):
        indices = np.arange(start, min(start + num_records, split.num_records))
        features, lengths = split.gather_tokens(modality, indices, num_tokens)
        yield features[np.arange(num_tokens) < lengths[:, None]].astype(np.float64)
