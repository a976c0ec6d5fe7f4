"""What a run's update is made of: data, mesh, model, optimizer and losses; and the update itself, not yet run.

Training, profiling and what estimates a run's memory build the update here, so that all of them speak of one program.
"""

from dataclasses import dataclass
from typing import Any, cast

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from mmei_jax import input_pipeline
from mmei_jax.batching import BatchReader
from mmei_jax.config import Config
from mmei_jax.data_statistics import class_log_priors
from mmei_jax.evaluation import emotion_class_weights
from mmei_jax.item_words import open_dataset
from mmei_jax.models.baselines import Model
from mmei_jax.optimizer import make_optimizer, make_schedule
from mmei_jax.packing import Layout, packed_layouts, padded_layouts
from mmei_jax.records import Dataset, Split
from mmei_jax.sharding import batch_sharding, make_mesh
from mmei_jax.state import build_model, check_split, placed_variable_shapes, state_shapes, variable_shapes
from mmei_jax.train_step import TrainStep, jit_train_step, make_train_step
from mmei_jax.types import Batch, TrainState


@dataclass(frozen=True)
class TrainingParts:
    """What the updates of a run are made of.

    To see the same model at another batch size or on another mesh, ``dataclasses.replace`` config or mesh: model and
    optimizer depend on neither.

    Attributes:
        config: the run.
        dataset: its records.
        split: those that are trained on.
        mesh: where it runs, or would run.
        model: what is trained.
        num_steps: updates of the whole run.
        schedule: learning rate by update number.
        optimizer: how it is trained.
    """

    config: Config
    dataset: Dataset
    split: Split
    mesh: Mesh
    model: Model
    num_steps: int
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation

    def state_shapes(self) -> TrainState:
        """Shapes of the training state, with shardings on the mesh."""
        return state_shapes(self.model, self.optimizer, self.mesh)

    def layouts(self) -> tuple[Layout, ...]:
        """Shapes that the run's batches can have, smallest first; the last takes any batch."""
        data = self.config.data
        return (*packed_layouts(data, data.batch_size), *padded_layouts(data, data.batch_size))

    def largest_layout(self) -> Layout:
        """That of :meth:`layouts` with most token places: what a run must have memory and time for.

        Where rows are packed it is in general that of the longest length bucket, which a batch takes that fits no
        number of packed rows.
        """
        return max(self.layouts(), key=lambda layout: layout.num_rows * sum(layout.num_tokens.values()))

    def batch_shapes(self, layout: Layout | None = None) -> Batch:
        """Shapes of a training batch, with shardings on the mesh; no record but one is read.

        Args:
            layout: one of :meth:`layouts`; None takes :meth:`largest_layout`.
        """
        layout = layout or self.largest_layout()
        statistics = input_pipeline.ranking_statistics(self.dataset, self.config)
        row = np.full(layout.records_per_row, -1, np.int64)
        row[0] = 0
        one_row = BatchReader(self.split, self.config, statistics).read(row, layout)
        sharding = batch_sharding(self.mesh)

        def enlarge(leaf: np.ndarray) -> jax.ShapeDtypeStruct:
            # The leading axis counts rows, or records: as many in each row.
            shape = (len(leaf) * layout.num_rows, *leaf.shape[1:])
            return jax.ShapeDtypeStruct(shape, jax.dtypes.canonicalize_dtype(leaf.dtype), sharding=sharding)

        return cast(Batch, jax.tree.map(enlarge, one_row))

    def train_step(self) -> TrainStep:
        """The update, not yet jitted."""
        class_weights = emotion_class_weights(self.config.loss, self.dataset)
        log_priors = class_log_priors(self.split, self.config.loss)
        return make_train_step(self.model, self.optimizer, self.config, class_weights, log_priors)

    def jit_step(self) -> Any:
        """The jitted update that training calls: ``jit_step().lower(state_shapes, batch_shapes)`` compiles nothing."""
        return jit_train_step(self.train_step(), self.state_shapes())

    def lower(self, layout: Layout | None = None) -> jax.stages.Lowered:
        """The update of batches of a layout, to be compiled for the mesh's devices, which may be described only.

        Args:
            layout: see :meth:`batch_shapes`.
        """
        lowered: jax.stages.Lowered = self.jit_step().lower(self.state_shapes(), self.batch_shapes(layout))
        return lowered


def prepare(config: Config, mesh: Mesh | None = None) -> TrainingParts:
    """Opens the data and builds everything else; nothing is allocated on the devices.

    Args:
        config: the run.
        mesh: where to run; None makes that of ``config.mesh`` over the visible devices.

    Raises:
        InputError: configuration, data and devices do not fit.
    """
    dataset = open_dataset(config)
    input_pipeline.check(dataset, config)
    mesh = make_mesh(config) if mesh is None else mesh
    model = build_model(config, dataset)
    check_split(placed_variable_shapes(model, mesh)["params"], config.mesh)
    split = dataset.split(*config.data.train_splits)
    num_steps = input_pipeline.num_steps(split.num_records, config.data.batch_size, config.train.num_epochs)
    schedule = make_schedule(
        config.optimizer, num_steps=num_steps, steps_per_epoch=split.num_records / config.data.batch_size
    )
    optimizer = make_optimizer(config.optimizer, variable_shapes(model)["params"], schedule)
    return TrainingParts(config, dataset, split, mesh, model, num_steps, schedule, optimizer)
