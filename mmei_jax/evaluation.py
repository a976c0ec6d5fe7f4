"""Measuring a model on whole splits: during training, and once on the test split from a run's best checkpoint."""

import functools
import math
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float

from mmei_jax import input_pipeline
from mmei_jax.checkpointing import Checkpointer
from mmei_jax.config import Config, LossConfig
from mmei_jax.environment import versions
from mmei_jax.item_words import open_dataset
from mmei_jax.losses import RecordLosses, class_weights_by_name, task_losses, total_loss
from mmei_jax.metrics import Means, batch_metrics, compute_all, merge_all
from mmei_jax.models.baselines import Model
from mmei_jax.origin import check_origin, manifest_fingerprint
from mmei_jax.predictions import choices, cross_entropies, probabilities, write_predictions
from mmei_jax.pretraining_losses import objective_losses, objective_weights
from mmei_jax.record_metrics import modality_presence, record_ranking_values
from mmei_jax.records import Catalogue, Dataset
from mmei_jax.reports.tables import comparison_table
from mmei_jax.sharding import batch_sharding, make_evaluation_mesh, place_activations, replicated, spread_over
from mmei_jax.state import Variables, build_model, placed_variable_shapes
from mmei_jax.types import MODALITIES, Batch, InputError, Items, Outputs, Predictions
from mmei_jax.workdir import read_config, write_json

NUM_TOP_ITEMS = 10
# Items whose words are encoded at once.
_ITEMS_PER_BLOCK = 256

# Batches that may be under way on the devices before the host waits for the first of them.
MAX_BATCHES_IN_FLIGHT = 2


class Evaluator:
    """Measures variables of one model on splits of one data set; compiled once per batch shape.

    Args:
        model: the model.
        config: tasks and batches.
        dataset: records and catalogue.
        mesh: devices over which each batch is split.
    """

    def __init__(self, model: Model, config: Config, dataset: Dataset, mesh: Mesh):
        self._model, self._config, self._dataset, self._mesh = model, config, dataset, mesh
        self._class_weights = emotion_class_weights(config.loss, dataset)
        self.ranking_statistics = input_pipeline.ranking_statistics(dataset, config)
        self._catalogue = None
        if config.loss.ranking != "none":
            catalogue = dataset.catalogue()
            if catalogue is None:
                raise InputError(f"{dataset.path}: no catalogue; config.loss.ranking expects one")
            self._catalogue = jax.device_put(catalogue_items(catalogue), replicated(mesh))
        embed = functools.partial(embed_catalogue, model)
        self._embed_catalogue = jax.jit(embed)
        placed = functools.partial(place_activations, mesh)
        # Sums, which every process reads.
        self._measure = jax.jit(placed(self._measure_batch), out_shardings=replicated(mesh))
        # Replicas are split over the devices, and every device reads the whole batch.
        over = functools.partial(spread_over, mesh)
        measure = self._measure_batch
        self._embed_catalogue_replicas = jax.jit(over(jax.vmap(embed, in_axes=(0, None)), is_split=(True, False)))
        self._measure_replicas = jax.jit(over(jax.vmap(measure, in_axes=(0, None, 0)), is_split=(True, False, True)))
        self._predict = jax.jit(placed(self._predict_batch))
        self._embed_users = jax.jit(placed(self._embed_batch))

    def measure(self, variables: Variables, splits: tuple[str, ...]) -> dict[str, float]:
        """Every metric, over every record of the splits exactly once.

        Args:
            variables: of the model; not donated.
            splits: names of manifest splits, joined.

        Returns:
            Floats by name: the names of ``metrics.py``, ``loss`` (Eq. 6) and ``loss/<task>``. The ranking loss of a
            record has the records of its evaluation batch as negatives: compare it between runs of one
            ``evaluation_batch_size`` only.
        """
        embedding = self._catalogue_embedding(variables)
        with closing(self._batches(splits)) as batches:
            parts = (self._measure(variables, batch, embedding) for batch in batches)
            figures = compute_all(merge_all(_fetch_late(parts)))
        return {"loss": self._total_loss(figures, variables["params"].get("task_log_variances")), **figures}

    def measure_replicas(self, variables: Variables, splits: tuple[str, ...]) -> list[dict[str, float]]:
        """What :meth:`measure` gives, for many sets of variables at once; ``loss`` has this configuration's weights.

        Args:
            variables: every array with a leading axis of replicas, which the devices of the mesh share equally.
            splits: names of manifest splits, joined.

        Returns:
            The figures of each replica.
        """
        embedding = None
        if self._catalogue is not None:
            embedding = self._embed_catalogue_replicas(variables, self._catalogue)
        with closing(self._batches(splits, replicated(self._mesh))) as batches:
            parts = (self._measure_replicas(variables, batch, embedding) for batch in batches)
            merged = merge_all(_fetch_late(parts))
        task_weights = jax.device_get(variables["params"].get("task_log_variances"))
        num_replicas = jax.tree.leaves(variables)[0].shape[0]
        figures = [compute_all(jax.tree.map(lambda leaf, n=n: leaf[n], merged)) for n in range(num_replicas)]
        return [
            {"loss": self._total_loss(found, None if task_weights is None else task_weights[n]), **found}
            for n, found in enumerate(figures)
        ]

    def metric_names(self, variables: Variables, splits: tuple[str, ...]) -> list[str]:
        """Names that :meth:`measure` will give; measures one batch."""
        embedding = self._catalogue_embedding(variables)
        with closing(self._batches(splits)) as batches:
            part = jax.device_get(self._measure(variables, next(batches), embedding))
        return ["loss", *compute_all(part)]

    def predict(self, variables: Variables, splits: tuple[str, ...]) -> Iterator[Predictions]:
        """Predictions batch by batch, on the host, in the order of the split; filler is still in, at the end."""
        embedding = self._catalogue_embedding(variables)
        with closing(self._batches(splits)) as batches:
            for part in _fetch_late(self._predict(variables, batch, embedding) for batch in batches):
                # Packed rows hold a batch's records in another order. As an unsigned number, filler's -1 comes last.
                order = np.argsort(part.record_index.astype(np.uint32), kind="stable")
                yield jax.tree.map(lambda leaf, order=order: leaf[order], part)

    def predict_batch(self, variables: Variables, batch: Batch) -> Predictions:
        """Predictions for records that no split holds, on the host; without ranking metrics where it has no targets."""
        placed = jax.device_put(batch, replicated(self._mesh))
        return cast(Predictions, jax.device_get(self._predict(variables, placed, self._catalogue_embedding(variables))))

    def embed(
        self, variables: Variables, splits: tuple[str, ...]
    ) -> tuple[Float[np.ndarray, "records dim"], Float[np.ndarray, "items dim"]]:
        """F_u of every record of the splits, in their order, and E_c of the catalogue (Eq. 7), on the host.

        Raises:
            InputError: the model has no ranking task.
        """
        items = self._catalogue_embedding(variables)
        if items is None:
            raise InputError("config.loss.ranking = 'none': expected a run with a ranking task, which has embeddings")
        with closing(self._batches(splits)) as batches:
            parts = list(_fetch_late(self._embed_users(variables, batch) for batch in batches))
        users, index = (np.concatenate(found) for found in zip(*parts, strict=True))
        # Packed rows hold a batch's records in another order; filler has index -1.
        users, index = users[index >= 0], index[index >= 0]
        return users[np.argsort(index, kind="stable")], np.asarray(items)

    def _batches(self, splits: tuple[str, ...], sharding: NamedSharding | None = None) -> grain.DatasetIterator[Batch]:
        return input_pipeline.evaluation_batches(
            self._dataset,
            self._config,
            splits,
            batch_sharding(self._mesh) if sharding is None else sharding,
            statistics=self.ranking_statistics,
        )

    def _catalogue_embedding(self, variables: Variables) -> Array | None:
        return None if self._catalogue is None else self._embed_catalogue(variables, self._catalogue)

    def _measure_batch(self, variables: Variables, batch: Batch, catalogue_embedding: Array | None) -> dict[str, Any]:
        outputs = cast(Outputs, self._model.apply(variables, batch, is_training=False))
        found = batch_metrics(
            outputs,
            batch,
            self._config.loss,
            catalogue_embedding=catalogue_embedding,
            emotion_names=self._emotion_names(),
        )
        losses = task_losses(outputs, batch, self._config.loss, self._class_weights)
        losses |= objective_losses(outputs.pretraining, batch, self._config.pretraining)
        sums = {
            f"loss/{task}": Means(totals={task: records.total()}, count=records.count())
            for task, records in losses.items()
        }
        return {**found, **sums}

    def _predict_batch(self, variables: Variables, batch: Batch, catalogue_embedding: Array | None) -> Predictions:
        outputs = cast(Outputs, self._model.apply(variables, batch, is_training=False))
        loss = self._config.loss
        emotion, intent = cast(Array, outputs.emotion), outputs.intent
        present = modality_presence(batch)
        absent = jnp.zeros_like(batch.is_record)
        ranking = has_relevant_items = scores = items = None
        if catalogue_embedding is not None and outputs.user_embedding is not None:
            if batch.ranking is not None:
                ranking, has_relevant_items = record_ranking_values(
                    outputs.user_embedding, catalogue_embedding, batch.ranking, batch.is_record
                )
            # The precision of the ranking metrics, so that the items listed are those that were judged.
            every_score = jnp.matmul(outputs.user_embedding, catalogue_embedding.T, precision=jax.lax.Precision.HIGHEST)
            scores, items = jax.lax.top_k(every_score, min(NUM_TOP_ITEMS, every_score.shape[-1]))
        return Predictions(
            emotion=probabilities(emotion, loss.emotion),
            emotion_choice=choices(emotion, loss.emotion),
            emotion_cross_entropy=cross_entropies(emotion, batch.emotion, loss.emotion),
            intent=None if intent is None else jax.nn.softmax(intent),
            intent_choice=None if intent is None else choices(intent, "softmax"),
            intent_cross_entropy=None if intent is None else cross_entropies(intent, batch.intent, "softmax"),
            modality_weights=outputs.modality_weights,
            has_modality=jnp.stack([present.get(name, absent) for name in MODALITIES], axis=-1),
            ranking=ranking,
            has_relevant_items=has_relevant_items,
            top_items=items,
            top_scores=scores,
            record_index=batch.record_index,
            user_embedding=outputs.user_embedding,
        )

    def _embed_batch(self, variables: Variables, batch: Batch) -> tuple[Array, Array]:
        outputs = cast(Outputs, self._model.apply(variables, batch, is_training=False))
        return cast(Array, outputs.user_embedding), batch.record_index

    def _emotion_names(self) -> tuple[str, ...]:
        loss = self._config.loss
        return () if loss.emotion == "none" else self._dataset.spec.labels[loss.emotion_label].class_names

    def _total_loss(self, figures: dict[str, float], task_log_variances: Array | None) -> float:
        """Eq. 6, with the objectives, from the means over the whole split."""
        one = jnp.ones((1,), jnp.float32)
        losses, objectives = {}, objective_weights(self._config.pretraining)
        for task in (*self._model.tasks.names(), *objectives):
            mean = figures[f"loss/{task}"]
            # Without any label of a task its mean is undefined; it adds nothing, as in training.
            is_counted = one * (not math.isnan(mean))
            value = jnp.asarray([0.0 if math.isnan(mean) else mean], jnp.float32)
            losses[task] = RecordLosses(value, is_counted.astype(bool), is_counted)
        loss, _ = total_loss(losses, self._config.loss, task_log_variances, objective_weights=objectives)
        return float(loss)


def catalogue_items(catalogue: Catalogue) -> Items:
    """All items of a catalogue, as the content tower reads them."""
    words = {"word_state": catalogue.word_state, "word_ids": catalogue.word_ids}
    placed = {name: None if value is None else jnp.asarray(value) for name, value in words.items()}
    return Items(jnp.asarray(catalogue.features, jnp.float32), jnp.asarray(catalogue.kind, jnp.int32), **placed)


def embed_catalogue(model: Model, variables: Variables, items: Items) -> Float[Array, "items embedding"]:
    """E_c of Eq. 7 of many items: in blocks where their words are encoded, whose states would not fit otherwise.

    Args:
        model: with ranking.
        variables: of the model.
        items: with one leading axis.
    """
    if items.word_ids is None:
        return cast(Array, model.apply(variables, items, method="embed_items"))
    return jax.lax.map(
        lambda item: cast(Array, model.apply(variables, item, method="embed_items")), items, batch_size=_ITEMS_PER_BLOCK
    )


def emotion_class_weights(config: LossConfig, dataset: Dataset) -> Float[Array, "emotions"] | None:
    """``[emotions]`` float32 weights in label order; None when the configuration names none."""
    if not config.emotion_class_weights:
        return None
    return class_weights_by_name(config.emotion_class_weights, dataset.spec.labels[config.emotion_label].class_names)


def is_pretraining(config: Config) -> bool:
    """Whether a run has no task, but objectives without labels alone: there is nothing to predict with."""
    return config.loss.emotion == "none"


@dataclass(frozen=True)
class BestRun:
    """A run's best checkpoint, with what it takes to use it.

    Attributes:
        config, dataset: of the run.
        model: as they describe it.
        variables: the checkpoint's, on ``mesh``.
        mesh: all visible devices.
        step: of the checkpoint.
    """

    config: Config
    dataset: Dataset
    model: Model
    variables: Variables
    mesh: Mesh
    step: int


def open_best_run(workdir: Path, data_path: str | None = None, *, needs_task: bool = True) -> BestRun:
    """Restores a run's best checkpoint, on any number of devices.

    Args:
        workdir: of the run.
        data_path: folder of the data set, where it moved since training; else that of the configuration.
        needs_task: whether a run of pretraining alone is refused, which has nothing to predict with.

    Raises:
        InputError: the run or its data cannot be read, or the data are others than it was trained on; or see
            ``needs_task``.
    """
    config = read_config(workdir, data_path)
    if needs_task and is_pretraining(config):
        raise InputError(
            f"{workdir}: a run of pretraining, without any task: expected a run that was trained on labels, such as "
            f"one that began with it (--config.train.initial_workdir={workdir})"
        )
    dataset = open_dataset(config)
    input_pipeline.check(dataset, config)
    mesh = make_evaluation_mesh()
    model = build_model(config, dataset)
    checkpointer = Checkpointer(workdir, best_metric=config.train.best_metric)
    step = checkpointer.best_step
    if step is None:
        raise InputError(f"{workdir}: no evaluated checkpoint; expected a folder in which train.py has run")
    check_origin(checkpointer.read_config(step), config, dataset, f"the run in {workdir}")
    variables = checkpointer.restore_model(step, placed_variable_shapes(model, mesh))
    checkpointer.close()
    return BestRun(config, dataset, model, variables, mesh, step)


def evaluate_workdir(workdir: Path, split: str, data_path: str | None = None) -> str:
    """Evaluates the best checkpoint of a run on one of its splits, on any number of devices.

    Writes ``eval/<split>.json`` (metrics, reference figures, versions) and, unless the run is one of pretraining alone,
    ``eval/<split>_predictions.parquet``.

    Args:
        workdir: of the run.
        split: "train", "validation" or "test": the splits that the configuration lists under that name.
        data_path: folder of the data set, where it moved since training; else that of the configuration.

    Returns:
        A table of the metrics beside the data set's reference figures, and the paths written.

    Raises:
        InputError: the run or its data cannot be read.
    """
    run = open_best_run(workdir, data_path, needs_task=False)
    config, dataset = run.config, run.dataset
    names = {
        "train": config.data.train_splits,
        "validation": config.data.validation_splits,
        "test": config.data.test_splits,
    }[split]
    evaluator = Evaluator(run.model, config, dataset, run.mesh)
    figures = evaluator.measure(run.variables, names)
    reference = dataset.reference(names[0]) if len(names) == 1 else {}
    joined = dataset.split(*names)
    folder = workdir / "eval"
    folder.mkdir(exist_ok=True)
    written = [folder / f"{split}.json"]
    if not is_pretraining(config):
        written.append(folder / f"{split}_predictions.parquet")
        write_predictions(written[-1], evaluator.predict(run.variables, names), joined, config, dataset)
    summary = {
        "split": split,
        "manifest_splits": list(names),
        "num_records": joined.num_records,
        "dataset": dataset.spec.name,
        "manifest_sha256": manifest_fingerprint(dataset),
        "truncation": {name: asdict(cut) for name, cut in input_pipeline.truncation_report(joined, config).items()},
        "checkpoint_step": run.step,
        "metrics": {name: value for name, value in figures.items() if np.isfinite(value)},
        "undefined_metrics": sorted(name for name, value in figures.items() if not np.isfinite(value)),
        "reference": reference,
        "versions": versions(),
    }
    write_json(written[0], summary)
    table = comparison_table(figures, reference)
    title = (
        f"{dataset.spec.name}, split {'+'.join(names)}: {joined.num_records:,} records, checkpoint of step {run.step}"
    )
    lines = [title, *input_pipeline.truncation_lines(joined, config), "", table, ""]
    if is_pretraining(config):
        lines += [
            f"no task to report on; training on labels begins with it by --config.train.initial_workdir={workdir}"
        ]
    return "\n".join([*lines, f"written: {', '.join(map(str, written))}"])


def _fetch_late(results: Iterator[Any]) -> Iterator[Any]:
    """Results on the host, a few behind what is dispatched: the devices never wait, and few batches are held."""
    in_flight: deque[Any] = deque()
    for result in results:
        in_flight.append(result)
        if len(in_flight) > MAX_BATCHES_IN_FLIGHT:
            yield jax.device_get(in_flight.popleft())
    for result in in_flight:
        yield jax.device_get(result)
