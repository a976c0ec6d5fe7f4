"""The mesh, the one table from logical axis names to mesh axes, and the shardings made of the two.

The only file that names mesh axes. One code path serves 1 or N devices: arrays are placed with ``NamedSharding`` on a
mesh of ``Auto`` axes, and XLA inserts the collectives.
"""

from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mmei_jax.config import Config
from mmei_jax.types import InputError

DATA_AXIS = "data"

# Parameters are replicated: only the batch is split. A name that a parameter carries must stand here.
LOGICAL_AXIS_RULES: tuple[tuple[str, str | None], ...] = (
    ("batch", DATA_AXIS),
    ("embed", None),
    ("heads", None),
    ("mlp", None),
    ("features", None),
    ("classes", None),
    ("position", None),
    ("kind", None),
    ("vocabulary", None),
    ("layers", None),
    ("window", None),
    ("channels", None),
)


def make_mesh(config: Config) -> Mesh:
    """The mesh that ``config.mesh`` asks for, over the visible devices: what a run is trained on.

    Raises:
        InputError: there are too few devices, or a batch cannot be split over the mesh.
    """
    devices = jax.devices()
    size = len(devices) if config.mesh.data == -1 else config.mesh.data
    if size > len(devices):
        raise InputError(f"config.mesh.data = {size}: expected at most {len(devices)}, the number of visible devices")
    micro_batch_size = config.data.batch_size // config.train.gradient_accumulation_steps
    if micro_batch_size % size:
        key = "config.data.batch_size / config.train.gradient_accumulation_steps"
        raise InputError(f"{key} = {micro_batch_size}: expected a multiple of the {size} devices of the mesh")
    return _mesh_over(devices[:size])


def make_evaluation_mesh() -> Mesh:
    """A mesh over all visible devices, however many the run was trained on."""
    return _mesh_over(jax.devices())


def _mesh_over(devices: list[jax.Device]) -> Mesh:
    return Mesh(np.asarray(devices), (DATA_AXIS,), axis_types=(AxisType.Auto,))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Splits the leading axis of every array of a batch over the devices."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def parameter_shardings(boxed_parameters: Any, mesh: Mesh) -> Any:
    """Shardings of a tree of parameters that carry logical axis names, as Linen's ``init`` returns it.

    Raises:
        InputError: a parameter carries a name that the table lacks.
    """
    specs = nn.get_partition_spec(boxed_parameters)
    known = {name for name, _ in LOGICAL_AXIS_RULES}
    for path, spec in jax.tree_util.tree_leaves_with_path(specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec)):
        unknown = [name for name in spec if name is not None and name not in known]
        if unknown:
            name = jax.tree_util.keystr(path)
            raise InputError(f"parameter {name}: logical axis {unknown[0]!r} is not in sharding.LOGICAL_AXIS_RULES")
    return nn.logical_to_mesh_sharding(specs, mesh, LOGICAL_AXIS_RULES)
