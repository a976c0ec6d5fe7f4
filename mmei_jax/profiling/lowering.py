"""A run's update on other meshes and with other batches than it was configured for; no device need be there."""

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh

from mmei_jax.config import Config
from mmei_jax.profiling.candidates import MeshShape
from mmei_jax.profiling.product_flops import product_flops
from mmei_jax.sharding import mesh_over
from mmei_jax.state import check_split
from mmei_jax.training_parts import TrainingParts, prepare
from mmei_jax.types import InputError


class UpdateLowering:
    """A configuration's update, for any mesh and number of records.

    Args:
        config: of the run. Of ``config.mesh`` only ``replicated`` is read; a few records in ``config.data.path`` are
            enough.

    Raises:
        InputError: configuration and data set do not fit.
    """

    def __init__(self, config: Config) -> None:
        # A single record is in every data set: how many there are changes no more than the schedule's constants.
        self._parts = prepare(_resized(config, 1, MeshShape(1, 1, 1)), mesh_over(jax.devices()[:1]))
        self._config = config
        self._model_flops: dict[int, float] = {}

    def head_counts(self) -> tuple[int, ...]:
        """Attention heads of the fusion and of each encoder inside the model."""
        encodings: list[Any] = [given.encoder for given in self._parts.model.tasks.inputs().values()]
        own = [encoding.architecture.stack.num_heads for encoding in encodings if encoding is not None]
        return (self._config.model.num_heads, *own)

    def on(self, mesh: Mesh, shape: MeshShape, num_records: int) -> TrainingParts:
        """The run's parts on a mesh, with batches of so many records.

        Args:
            mesh: of the devices.
            shape: of the mesh.
            num_records: of an update.

        Raises:
            InputError: the mesh leaves a large parameter whole on every device (:func:`mmei_jax.state.check_split`), or
                its devices cannot share the rows of a micro-batch.
        """
        parts = dataclasses.replace(self._parts, config=_resized(self._config, num_records, shape), mesh=mesh)
        check_split(parts.state_shapes().parameters, parts.config.mesh)
        num_micro_batches, num_shards = self._config.train.gradient_accumulation_steps, shape.data * shape.fsdp
        for num_rows in sorted({layout.num_rows for layout in parts.layouts()}):
            if num_rows % (num_micro_batches * num_shards):
                raise InputError(
                    f"rows of a batch / config.train.gradient_accumulation_steps = {num_rows} / {num_micro_batches}: "
                    f"expected a multiple of the {num_shards} devices that share them"
                )
        return parts

    def model_flops(self, num_records: int) -> float:
        """Operations of all products that an update of the largest batches asks for: without what remat computes again.

        Args:
            num_records: of an update.
        """
        if num_records not in self._model_flops:
            encoders = dataclasses.replace(self._config.model.encoders, remat="none")
            config = dataclasses.replace(self._config, model=dataclasses.replace(self._config.model, encoders=encoders))
            # Shapes alone count, wherever they lie.
            shape = MeshShape(1, 1, 1)
            plain = UpdateLowering(config).on(self._parts.mesh, shape, num_records)
            update = jax.make_jaxpr(plain.train_step())(plain.state_shapes(), plain.batch_shapes())
            self._model_flops[num_records] = product_flops(update)
        return self._model_flops[num_records]


def _resized(config: Config, num_records: int, shape: MeshShape) -> Config:
    """The configuration for another number of records, and packed rows in proportion, on a mesh."""
    data = config.data
    num_rows = tuple(-(-number * num_records // data.batch_size) for number in data.packing.num_rows)
    packing = dataclasses.replace(data.packing, num_rows=num_rows)
    mesh = dataclasses.replace(config.mesh, data=shape.data, fsdp=shape.fsdp, tensor=shape.tensor)
    return dataclasses.replace(
        config, data=dataclasses.replace(data, batch_size=num_records, packing=packing), mesh=mesh
    )
