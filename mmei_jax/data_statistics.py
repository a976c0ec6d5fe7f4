"""What is measured before training: feature means and scales, what the token limits cut, how full the batches are."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Float64, Integer

from mmei_jax.config import Config, LossConfig
from mmei_jax.packing import Arranger
from mmei_jax.record_order import ShuffledOrder
from mmei_jax.records import Split
from mmei_jax.types import MODALITIES, InputError

# Padded features that are in memory at once while a split is read through.
_BYTES_PER_CHUNK = 16 * 2**20
# A feature whose deviation is below this share of its root mean square is constant: what is left is rounding of the
# stored float32 or float16 values.
_CONSTANT_SHARE = 1e-6
# Batches in which tokens are counted: enough to tell layouts apart, few enough not to delay the first update.
_BATCHES_COUNTED = 100


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


@dataclass(frozen=True)
class TokenUse:
    """How much of a run's first batches is tokens; the rest is padding, computed for nothing.

    Attributes:
        num_tokens: tokens of the batches' records, cut at ``config.data.max_tokens``.
        num_places: token places of the batches' rows.
        num_batches: by layout, in words, the batches that took it, the most frequent first.
    """

    num_tokens: int
    num_places: int
    num_batches: Mapping[str, int]


def token_use(split: Split, config: Config) -> TokenUse:
    """Counts tokens and places in the first training batches of a split, a hundred at most; no features are read."""
    size = config.data.batch_size
    num_batches = min(_BATCHES_COUNTED, -(-split.num_records // size))
    order = ShuffledOrder(num_records=split.num_records, batch_size=size, num_batches=num_batches, seed=config.seed)
    arranger = Arranger(split, config.data, size)
    num_tokens = num_places = 0
    layouts: Counter[str] = Counter()
    for step in range(num_batches):
        layout, _ = arranger.arrange(order[step])
        num_tokens += int(arranger.lengths(order[step]).sum())
        num_places += layout.num_rows * sum(layout.num_tokens.values())
        layouts[str(layout)] += 1
    return TokenUse(num_tokens, num_places, dict(layouts.most_common()))


def token_use_line(split: Split, config: Config) -> str:
    """What share of the token places is used, and which layouts are, in words."""
    use = token_use(split, config)
    names = [name for name in MODALITIES if name in config.data.modalities]
    layouts = "; ".join(f"{layout}: {count}" for layout, count in use.num_batches.items())
    return (
        f"{use.num_tokens / max(1, use.num_places):.0%} of the token places are used, the rest is padding "
        f"(first {sum(use.num_batches.values())} batches, by rows x ({' + '.join(names)}): {layouts})"
    )


def is_not_finite(split: Split, config: Config, records: Integer[np.ndarray, "records"]) -> Bool[np.ndarray, "records"]:
    """Which of these records hold features that are not finite, in the modalities and tokens that a run reads."""
    is_bad = np.zeros(len(records), bool)
    for name in config.data.modalities:
        features, _ = split.gather_tokens(name, records, getattr(config.data.max_tokens, name)[-1])
        is_bad |= ~np.isfinite(features).all(axis=(1, 2))
    return is_bad


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
    mean, deviation = _moments(split, modality, max_tokens)
    scale = 1.0 / np.where(deviation == 0.0, 1.0, deviation)
    return mean.astype(np.float32), scale.astype(np.float32)


def feature_deviations(split: Split, modality: str, *, max_tokens: int | None = None) -> Float32[np.ndarray, "dim"]:
    """``[dim]`` float32 (population) deviation of each feature over all valid tokens; exactly 0 for a constant feature.

    Args:
        split: a training split, normally.
        modality: its name.
        max_tokens: tokens counted of each record, from its start; None counts all.

    Raises:
        InputError: the data set lacks the modality, or no record of the split has it.
    """
    return _moments(split, modality, max_tokens)[1].astype(np.float32)


def _moments(
    split: Split, modality: str, max_tokens: int | None
) -> tuple[Float64[np.ndarray, "dim"], Float64[np.ndarray, "dim"]]:
    """Mean and deviation of each feature; the deviation of a constant one is 0."""
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
    return mean, np.where(is_constant, 0.0, deviation)


def class_log_priors(split: Split, config: LossConfig) -> dict[str, Float32[np.ndarray, "_"]]:
    """What ``config.logit_adjustment`` multiplies: the log share of each class among a split's labelled records.

    Args:
        split: the training split, normally.
        config: names the tasks, and the emotion task's label.

    Returns:
        By task with a softmax loss, ``[classes]`` float32 in label order; {} when the logits are not adjusted.

    Raises:
        InputError: a class has no record: the logarithm of its share is not finite.
    """
    if not config.logit_adjustment:
        return {}
    labels = {"emotion": config.emotion_label} if config.emotion == "softmax" else {}
    labels |= {"intent": "intent"} if config.intent == "softmax" else {}
    log_priors = {}
    for task, name in labels.items():
        class_names = split.dataset.spec.labels[name].class_names
        value, is_labelled = split.gather_label(name, np.arange(split.num_records))
        counts = np.array([np.count_nonzero(is_labelled & (value == index)) for index in range(len(class_names))])
        if not counts.all():
            raise InputError(
                f"config.loss.logit_adjustment = {config.logit_adjustment}: no record of split {'+'.join(split.names)} "
                f"of {split.dataset.path} has {name} {class_names[int(np.argmin(counts))]!r}: expected 0, or records "
                "of every class"
            )
        log_priors[task] = np.log(counts / counts.sum()).astype(np.float32)
    return log_priors


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
