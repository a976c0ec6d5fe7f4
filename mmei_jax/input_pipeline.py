"""From records on disk to batches on devices: order, places, reading, placement, prefetch; all of it resumable.

A Grain pipeline whose source has *batches* as elements, so that one call gathers a whole batch from the memory maps:

    record order -> BatchSource (reader threads) -> PlaceOnDevices -> prefetched batches on the devices

The order of training records is a function of (seed, epoch) alone. Every process computes the order of the whole global
batch and which record goes to which row, and reads its own rows, so the global batch does not depend on how many
processes there are. An iterator's state
is the number of batches handed out, whatever was prefetched; Orbax saves it with
``grain.checkpoint.CheckpointSave(iterator)``.
"""

from collections.abc import Mapping

import grain
import jax
import numpy as np
from grain.experimental import ThreadPrefetchIterDataset
from jax.sharding import NamedSharding
from jaxtyping import Int64

from mmei_jax.batching import BatchReader
from mmei_jax.config import Config
from mmei_jax.data_statistics import (
    Truncation,
    feature_statistics,
    is_not_finite,
    token_use_line,
    truncation_lines,
    truncation_report,
)
from mmei_jax.packing import Arranger
from mmei_jax.ranking_targets import RankingStatistics, positive_counts
from mmei_jax.record_order import RecordOrder, SequentialOrder, ShuffledOrder
from mmei_jax.record_schema import FEATURE_DTYPES
from mmei_jax.records import Dataset, Split
from mmei_jax.types import Batch, InputError

__all__ = [
    "BatchSource",
    "PlaceOnDevices",
    "RankingStatistics",
    "SequentialOrder",
    "ShuffledOrder",
    "Truncation",
    "check",
    "evaluation_batches",
    "feature_statistics",
    "is_not_finite",
    "num_steps",
    "positive_counts",
    "process_rows",
    "ranking_statistics",
    "token_use_line",
    "train_iterator",
    "truncation_lines",
    "truncation_report",
]

# Which label kind each emotion task learns.
_LABEL_KINDS = {"softmax": "categorical", "sigmoid": "multi_label", "regression": "real"}
# Records whose labels are in memory at once while one that is labelled is looked for.
_RECORDS_PER_CHUNK = 65_536


class BatchSource:
    """Random access to batches: the Grain source. Reads this process's rows of each global batch."""

    def __init__(
        self,
        order: RecordOrder,
        arranger: Arranger,
        reader: BatchReader,
        rows: Mapping[int, Int64[np.ndarray, "rows"]],
    ) -> None:
        """Prepares.

        Args:
            order: records of each global batch.
            arranger: finds their places.
            reader: reads them.
            rows: by a layout's number of rows, those of the global batch that this process places, in rising order.
        """
        self._order = order
        self._arranger = arranger
        self._reader = reader
        self._rows = rows

    def __len__(self) -> int:
        """The number of batches."""
        return len(self._order)

    def __getitem__(self, step: int) -> Batch:
        """This process's rows of batch ``step``, as NumPy arrays; of one layout in all processes."""
        layout, places = self._arranger.arrange(self._order[step])
        ours = places.reshape(layout.num_rows, layout.records_per_row)[self._rows[layout.num_rows]]
        return self._reader.read(ours.reshape(-1), layout)

    def __repr__(self) -> str:
        """Short: Grain prints its sources."""
        return f"BatchSource(num_batches={len(self)})"


class PlaceOnDevices(grain.transforms.Map):
    """Makes global arrays of every process's rows."""

    def __init__(self, sharding: NamedSharding) -> None:
        """Prepares to place batches as ``sharding`` says, which splits the leading axis of every array."""
        self._sharding = sharding
        num_shards = _num_shards(sharding)
        self._num_shards, self._num_own_shards = num_shards, len(process_rows(sharding, num_shards))
        # Naming the only device takes a third of the time that naming a mesh of one takes, and means the same.
        self._placement = sharding if sharding.num_devices > 1 else sharding.mesh.devices.item()

    def map(self, element: Batch) -> Batch:
        """The same batch as ``jax.Array``s whose leading axes are those of the global batch."""
        if jax.process_count() == 1:
            # These rows are the global batch. The same arrays at a quarter of the time that the general call takes.
            alone: Batch = jax.device_put(element, self._placement)
            return alone
        shapes = jax.tree.map(self._global_shape, element)
        placed: Batch = jax.make_array_from_process_local_data(self._sharding, element, shapes)
        return placed

    def _global_shape(self, array: np.ndarray) -> tuple[int, ...]:
        return (len(array) * self._num_shards // self._num_own_shards, *array.shape[1:])


def train_iterator(
    dataset: Dataset,
    config: Config,
    sharding: NamedSharding,
    *,
    statistics: RankingStatistics | None = None,
    num_epochs: int | None = None,
) -> grain.DatasetIterator[Batch]:
    """Shuffled training batches, :func:`num_steps` of them, on the devices.

    Args:
        dataset: has the configuration's training splits.
        config: what to read, in which batches; ``config.seed`` decides the order.
        sharding: splits the leading axis of every array.
        statistics: what :func:`ranking_statistics` gives; computed here if None.
        num_epochs: passes over the data; None takes ``config.train.num_epochs``.

    Returns:
        A Grain iterator: ``get_state()`` is that of the batch handed out last. Close it when done. ``next()`` waits
        only when no batch is ready, and raises what a reader thread raised.

    Raises:
        InputError: data and configuration do not fit (see :func:`check`), or a batch cannot be split over the devices.
    """
    split = dataset.split(*config.data.train_splits)
    num_epochs = config.train.num_epochs if num_epochs is None else num_epochs
    order = ShuffledOrder(
        num_records=split.num_records,
        batch_size=config.data.batch_size,
        num_batches=num_steps(split.num_records, config.data.batch_size, num_epochs),
        seed=config.seed,
    )
    return _iterate(split, order, Arranger(split, config.data, config.data.batch_size), config, sharding, statistics)


def evaluation_batches(
    dataset: Dataset,
    config: Config,
    splits: tuple[str, ...],
    sharding: NamedSharding,
    *,
    statistics: RankingStatistics | None = None,
) -> grain.DatasetIterator[Batch]:
    """Every record of the joined splits exactly once, in order, on the devices; filler completes the last batch.

    Args:
        dataset: has the splits, and the training splits whose statistics the ranking targets carry.
        config: what to read; batches have ``config.data.evaluation_batch_size`` records on any number of devices (the
            ranking loss compares the records of a batch), and filler up to a multiple of the devices.
        splits: names of manifest splits.
        sharding: splits the leading axis of every array.
        statistics: what :func:`ranking_statistics` gives; computed here if None.

    Raises:
        InputError: data and configuration do not fit.
    """
    split = dataset.split(*splits)
    batch_size = config.data.evaluation_batch_size
    num_filler = -batch_size % _num_shards(sharding)
    order = SequentialOrder(num_records=split.num_records, batch_size=batch_size, num_filler=num_filler)
    arranger = Arranger(split, config.data, batch_size + num_filler, _num_shards(sharding))
    return _iterate(split, order, arranger, config, sharding, statistics)


def ranking_statistics(dataset: Dataset, config: Config) -> RankingStatistics | None:
    """Positive counts of the training splits; None when ``config.loss.ranking`` is "none".

    Raises:
        InputError: the data set lacks slates or a catalogue, or a slate shows an unknown item.
    """
    if config.loss.ranking == "none":
        return None
    catalogue = dataset.manifest["catalogue"]
    if catalogue is None or not dataset.spec.has_slates:
        missing = "catalogue" if catalogue is None else "slates"
        raise InputError(
            f"{dataset.path}: no {missing}; config.loss.ranking = {config.loss.ranking!r} expects them, "
            "or set it to 'none'"
        )
    return RankingStatistics.from_split(dataset.split(*config.data.train_splits), catalogue["num_records"])


def num_steps(num_records: int, batch_size: int, num_epochs: int) -> int:
    """Updates of a whole run: ``floor(num_epochs * num_records / batch_size)``, at least 1.

    Batches cross the borders of epochs, so this is not the number of epochs times the batches in one.

    Args:
        num_records: of the training splits.
        batch_size: records per update.
        num_epochs: passes over the data.

    Raises:
        InputError: there are fewer records than one batch takes.
    """
    if batch_size > num_records:
        raise InputError(
            f"config.data.batch_size = {batch_size}: expected at most {num_records}, the number of training records"
        )
    return num_epochs * num_records // batch_size


def check(dataset: Dataset, config: Config) -> None:
    """Refuses a configuration that asks for what the data set does not hold.

    Raises:
        InputError: a split, modality or label is missing; a label is of another kind than its task, or no training
            record carries it, or no validation record where ``config.train.best_metric`` needs it; slates or the
            catalogue are missing; a split is empty, or smaller than a batch.
    """
    for name in (*config.data.train_splits, *config.data.validation_splits, *config.data.test_splits):
        if dataset.split(name).num_records == 0:
            raise InputError(f"{dataset.path}: split {name!r} has no records; expected at least one")
    for name in config.data.modalities:
        if name not in dataset.spec.modalities:
            known = ", ".join(dataset.spec.modalities)
            raise InputError(f"config.data.modalities: {dataset.path} lacks {name!r}; it has {known}")
        has_features = (dtype := dataset.spec.modalities[name].dtype) in FEATURE_DTYPES
        encoder = getattr(config.model.encoders, name)
        if not has_features and not encoder:
            raise InputError(
                f"{dataset.path}: {name} holds raw media ({dtype}): expected features (python -m "
                f"mmei_jax.extraction.extract without --depth=raw), or an encoder in config.model.encoders.{name}"
            )
        if has_features and encoder:
            raise InputError(
                f"config.model.encoders.{name} = {encoder!r}: {dataset.path} holds features ({dtype}) of {name}: "
                "expected '', or raw media (python -m mmei_jax.extraction.extract with --depth=raw)"
            )
    train = dataset.split(*config.data.train_splits)
    num_steps(train.num_records, config.data.batch_size, config.train.num_epochs)
    if config.loss.emotion != "none":
        _check_label(train, "emotion_label", config.loss.emotion_label, _LABEL_KINDS[config.loss.emotion])
    if config.loss.intent != "none":
        _check_label(train, "intent", "intent", _LABEL_KINDS[config.loss.intent])
    _check_validation_labels(dataset, config)
    if config.loss.ranking != "none":
        _check_catalogue(dataset, config)


def _check_catalogue(dataset: Dataset, config: Config) -> None:
    """Refuses ranking without catalogue or slates, and a content tower that would read features which are not there."""
    catalogue = dataset.manifest["catalogue"]
    if catalogue is None or not dataset.spec.has_slates:
        ranking_statistics(dataset, config)
    elif config.model.content_features and not catalogue["dim"]:
        raise InputError(
            f"config.model.content_features = True: the catalogue of {dataset.path} has no features: expected False, "
            "with an encoder of the items' words in config.model.content_encoder"
        )


def process_rows(
    sharding: NamedSharding, num_rows: int, key: str = "config.data.batch_size"
) -> Int64[np.ndarray, "rows"]:
    """Rows of a global batch that this process's devices hold, in rising order.

    Args:
        sharding: splits the leading axis.
        num_rows: of the global batch.
        key: which configuration key says so, for the error.

    Raises:
        InputError: the devices cannot share the rows equally.
    """
    num_shards = _num_shards(sharding)
    if num_rows % num_shards:
        raise InputError(f"{key} = {num_rows}: expected a multiple of the {num_shards} devices")
    slices = sharding.addressable_devices_indices_map((num_rows,)).values()
    pieces = [np.arange(num_rows, dtype=np.int64)[index] for index in slices if index is not None]
    return np.unique(np.concatenate(pieces))


def _num_shards(sharding: NamedSharding) -> int:
    """Into how many parts the leading axis is split."""
    return sharding.num_devices // sharding.shard_shape((sharding.num_devices,))[0]


def _iterate(
    split: Split,
    order: RecordOrder,
    arranger: Arranger,
    config: Config,
    sharding: NamedSharding,
    statistics: RankingStatistics | None,
) -> grain.DatasetIterator[Batch]:
    """Builds the pipeline: reads in threads, places in another one, ahead of the caller."""
    rows = {
        layout.num_rows: process_rows(
            sharding,
            layout.num_rows,
            "config.data.packing.num_rows" if layout.records_per_row > 1 else "config.data.batch_size",
        )
        for layout in arranger.layouts
    }
    if statistics is None:
        statistics = ranking_statistics(split.dataset, config)
    source = BatchSource(order, arranger, BatchReader(split, config, statistics), rows)
    num_threads = config.data.num_reader_threads
    batches = grain.MapDataset.source(source).to_iter_dataset(
        grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=num_threads)
    )
    placed = batches.map(PlaceOnDevices(sharding))
    iterator: grain.DatasetIterator[Batch] = iter(
        ThreadPrefetchIterDataset(placed, prefetch_buffer_size=config.data.num_prefetch_batches)
    )
    return iterator


def _check_label(train: Split, key: str, name: str, kind: str) -> None:
    """Refuses a task whose label the data set lacks, holds as another kind, or never gives."""
    path, labels = train.dataset.path, train.dataset.spec.labels
    if name not in labels:
        raise InputError(f"config.loss.{key}: {path} has no label {name!r}; it has {', '.join(labels) or 'no labels'}")
    if labels[name].kind != kind:
        raise InputError(f"config.loss.{key}: label {name!r} of {path} is {labels[name].kind}; the task expects {kind}")
    if not _has_label(train, name):
        raise InputError(f"config.loss.{key}: no record of split {'+'.join(train.names)} of {path} has label {name!r}")


def _check_validation_labels(dataset: Dataset, config: Config) -> None:
    """Refuses a best metric that would be undefined, after the first epochs, for want of labels."""
    metric, validation = config.train.best_metric, dataset.split(*config.data.validation_splits)
    labels = {"emotion": config.loss.emotion_label} if config.loss.emotion != "none" else {}
    labels |= {"intent": "intent"} if config.loss.intent != "none" else {}
    needs_all = metric in ("validation/mean_accuracy", "validation/loss") or metric.startswith("validation/joint/")
    for task, name in labels.items():
        if (needs_all or task in metric.split("/")) and not _has_label(validation, name):
            raise InputError(
                f"config.train.best_metric = {metric!r}: no record of split {'+'.join(validation.names)} of "
                f"{dataset.path} has label {name!r}; expected a metric of another task, or another validation split"
            )


def _has_label(split: Split, name: str) -> bool:
    """Whether any record carries the label."""
    for start in range(0, split.num_records, _RECORDS_PER_CHUNK):
        indices = np.arange(start, min(start + _RECORDS_PER_CHUNK, split.num_records))
        if split.gather_label(name, indices)[1].any():
            return True
    return False
