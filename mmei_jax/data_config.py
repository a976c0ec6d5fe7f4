"""The configuration's group ``data``: what is read, and in which batches."""

from dataclasses import dataclass

from mmei_jax.config_values import require
from mmei_jax.types import MODALITIES


@dataclass(frozen=True)
class MaxTokens:
    """Allowed numbers of tokens per record, per modality: length buckets, smallest first; the last is the maximum."""

    vision: tuple[int, ...]
    audio: tuple[int, ...]
    text: tuple[int, ...]


@dataclass(frozen=True)
class TokensPerRow:
    """Token places of one packed row, per modality."""

    vision: int
    audio: int
    text: int


@dataclass(frozen=True)
class PackingConfig:
    """Whether, and into which shapes, several records are packed into one row of tokens."""

    records_per_row: int
    num_rows: tuple[int, ...]
    tokens_per_row: TokensPerRow


@dataclass(frozen=True)
class DataConfig:
    """What is read, and in which batches."""

    path: str
    affect_profiles: str
    train_splits: tuple[str, ...]
    validation_splits: tuple[str, ...]
    test_splits: tuple[str, ...]
    modalities: tuple[str, ...]
    max_tokens: MaxTokens
    packing: PackingConfig
    standardize: bool
    batch_size: int
    evaluation_batch_size: int
    num_reader_threads: int
    num_prefetch_batches: int


def check_data(data: DataConfig) -> None:
    """Checks the group by itself.

    Raises:
        InputError: a value is not accepted; names the key.
    """
    require(bool(data.modalities), "data.modalities", data.modalities, f"some of {', '.join(MODALITIES)}")
    for name in data.modalities:
        require(name in MODALITIES, "data.modalities", data.modalities, f"some of {', '.join(MODALITIES)}")
    require(len(set(data.modalities)) == len(data.modalities), "data.modalities", data.modalities, "each modality once")
    for name in MODALITIES:
        buckets = getattr(data.max_tokens, name)
        is_rising = bool(buckets) and buckets[0] > 0 and list(buckets) == sorted(buckets)
        require(
            is_rising, f"data.max_tokens.{name}", buckets, "positive token counts, none smaller than the one before"
        )
        require(
            len(buckets) == len(data.max_tokens.vision),
            f"data.max_tokens.{name}",
            buckets,
            f"as many buckets as data.max_tokens.vision ({len(data.max_tokens.vision)})",
        )
    for key in ("train_splits", "validation_splits", "test_splits"):
        require(bool(getattr(data, key)), f"data.{key}", getattr(data, key), "at least one split")
    seen = [*data.train_splits, *data.validation_splits, *data.test_splits]
    shared = sorted({name for name in seen if seen.count(name) > 1})
    require(not shared, "data.*_splits", shared, "splits that are used once: training data must not be tested on")
    for key in ("train_splits", "validation_splits"):
        require("test" not in getattr(data, key), f"data.{key}", getattr(data, key), "no 'test': it is for testing")
    for key in ("batch_size", "evaluation_batch_size", "num_reader_threads", "num_prefetch_batches"):
        require(getattr(data, key) >= 1, f"data.{key}", getattr(data, key), "at least 1")
    _check_packing(data)


def _check_packing(data: DataConfig) -> None:
    key, packing = "data.packing", data.packing
    records, num_rows = packing.records_per_row, packing.num_rows
    require(records >= 1, f"{key}.records_per_row", records, "at least 1")
    if records == 1:
        require(not num_rows, f"{key}.num_rows", num_rows, f"() when {key}.records_per_row is 1: nothing is packed")
        return
    is_rising = bool(num_rows) and num_rows[0] > 0 and list(num_rows) == sorted(set(num_rows))
    require(is_rising, f"{key}.num_rows", num_rows, f"rising numbers of rows when {key}.records_per_row is above 1")
    places = num_rows[0] * records
    require(
        places >= data.batch_size,
        f"{key}.num_rows",
        num_rows,
        f"rows that hold data.batch_size ({data.batch_size}) records; {num_rows[0]} x {records} is {places}",
    )
    for name in data.modalities:
        longest, tokens = getattr(data.max_tokens, name)[-1], getattr(packing.tokens_per_row, name)
        accepted = f"at least data.max_tokens.{name}[-1] ({longest}), so that every record fits into a row"
        require(tokens >= longest, f"{key}.tokens_per_row.{name}", tokens, accepted)
