"""The mesh, the one table from logical axis names to mesh axes, and the shardings made of the two.

The only file that names mesh axes. One code path serves 1 or N devices: arrays are placed with ``NamedSharding`` on a
mesh of ``Auto`` axes, and XLA inserts the collectives.
"""

import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mmei_jax.activations import AxisNames, placing
from mmei_jax.config import Config
from mmei_jax.types import InputError

MESH_AXES = ("data", "fsdp", "tensor")

# What the logical axes of parameters and activations are split over; None: not at all. Every name that one carries must
# stand here. An axis of the mesh splits an array once: the model dimension of parameters is split over fsdp, that of
# activations is not, because their rows are already.
LOGICAL_AXIS_RULES: Mapping[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "embed": "fsdp",
    "heads": "tensor",
    "mlp": "tensor",
    "vocabulary": "tensor",
    "features": "tensor",
    "channels": "tensor",
    "input_channels": None,
    "classes": None,
    "position": None,
    "kind": None,
    "user": None,
    "layers": None,
    "window": None,
}


@dataclass(frozen=True)
class ProcessShare:
    """Which of how many processes this one is.

    Attributes:
        index: from 0.
        count: how many there are.
    """

    index: int
    count: int

    def __post_init__(self) -> None:
        """Refuses what is no share."""
        if not 0 <= self.index < self.count:
            raise InputError(f"process {self.index} of {self.count}: expected an index in [0, {self.count})")


# Environment variables in which a launcher tells a process its index and the number of processes.
_LAUNCHERS: Mapping[str, tuple[str, str]] = {
    "SLURM": ("SLURM_PROCID", "SLURM_NTASKS"),
    # An Indexed Job; Kubernetes itself does not tell the number: the job's manifest has to set NUM_PROCESSES.
    "Kubernetes": ("JOB_COMPLETION_INDEX", "NUM_PROCESSES"),
}


def process_share(index: int | None = None, count: int | None = None) -> ProcessShare:
    """This process's share of work that needs no collectives.

    What is given counts first, then JAX's distributed runtime where it is initialised, then the variables of SLURM and
    of Kubernetes' Indexed Jobs (with NUM_PROCESSES set in the manifest); else the process is alone.

    Args:
        index: of this process, from 0; together with ``count``.
        count: number of processes.

    Raises:
        InputError: one of the two is given without the other, a launcher tells only one of them or no whole number, or
            the index is not below the count.
    """
    if (index is None) != (count is None):
        raise InputError(f"process_index = {index}, num_processes = {count}: expected both or neither")
    if index is not None and count is not None:
        return ProcessShare(index, count)
    if jax.distributed.is_initialized():
        return ProcessShare(jax.process_index(), jax.process_count())
    for launcher, names in _LAUNCHERS.items():
        values = [os.environ.get(name) for name in names]
        if values[0] is None:
            continue
        if not all(value is not None and value.isdecimal() for value in values):
            found = ", ".join(f"{name}={value}" for name, value in zip(names, values, strict=True))
            raise InputError(f"{launcher}: {found}: expected two whole numbers, or --process_index and --num_processes")
        return ProcessShare(*(int(value) for value in values if value is not None))
    return ProcessShare(0, 1)


def make_mesh(config: Config) -> Mesh:
    """The mesh that ``config.mesh`` asks for, over the visible devices: what a run is trained on.

    Raises:
        InputError: there are too few devices, or a batch cannot be split over the mesh.
    """
    mesh, num_devices = config.mesh, jax.device_count()
    inner = mesh.fsdp * mesh.tensor
    if num_devices < inner or (mesh.data == -1 and num_devices % inner):
        raise InputError(
            f"config.mesh.fsdp * config.mesh.tensor = {mesh.fsdp} * {mesh.tensor}: expected a divisor of "
            f"{num_devices}, the number of visible devices"
        )
    most = num_devices // inner
    data = most if mesh.data == -1 else mesh.data
    if data > most:
        times = f" / ({mesh.fsdp} * {mesh.tensor})" if inner > 1 else ""
        raise InputError(
            f"config.mesh.data = {mesh.data}: expected at most {most}, the number of visible devices{times}"
        )
    micro_batch_size = config.data.batch_size // config.train.gradient_accumulation_steps
    if micro_batch_size % (data * mesh.fsdp):
        key = "config.data.batch_size / config.train.gradient_accumulation_steps"
        raise InputError(
            f"{key} = {micro_batch_size}: expected a multiple of the {data * mesh.fsdp} devices of the mesh"
        )
    return mesh_over(jax.devices()[: data * inner], fsdp=mesh.fsdp, tensor=mesh.tensor)


def make_evaluation_mesh() -> Mesh:
    """A mesh over all visible devices, however many the run was trained on."""
    return mesh_over(jax.devices())


def mesh_over(devices: Sequence[jax.Device], *, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh of :data:`MESH_AXES` over some devices.

    Args:
        devices: their number is a multiple of ``fsdp * tensor``; ``data`` is what is left.
        fsdp: devices over which the batch is split, and with it the parameters' model dimension.
        tensor: devices over which heads, hidden features, channels and vocabulary are split.
    """
    return Mesh(np.asarray(devices).reshape(-1, fsdp, tensor), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Splits the leading axis of every array of a batch over the devices."""
    return NamedSharding(mesh, PartitionSpec(LOGICAL_AXIS_RULES["batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def parameter_shardings(boxed_parameters: Any, mesh: Mesh) -> Any:
    """Shardings of a tree of parameters that carry logical axis names, as Linen's ``init`` returns it.

    A dimension that the devices of its mesh axis do not divide is not split, nor is a second one over the same axis.

    Args:
        boxed_parameters: arrays or their shapes (``jax.eval_shape``), with axis names.
        mesh: has the axes :data:`MESH_AXES`.

    Raises:
        InputError: a parameter carries a name that the table lacks.
    """

    def place(path: Any, leaf: Any, names: PartitionSpec) -> NamedSharding:
        return _split(leaf.shape, tuple(names), mesh, f"parameter {jax.tree_util.keystr(path)}")

    names = nn.get_partition_spec(boxed_parameters)
    return jax.tree_util.tree_map_with_path(place, nn.unbox(boxed_parameters), names)


def place_activations(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, to be jitted, with the activations of the models in it split over the mesh by the table.

    On one device it is the function itself. Dimensions that cannot be split are whole, as those of parameters.

    Args:
        mesh: has the axes :data:`MESH_AXES`.
        function: of arrays that lie on the mesh.
    """
    if mesh.size == 1:
        return function

    def place(activation: Any, names: AxisNames) -> Any:
        sharding = _split(activation.shape, names, mesh, f"activation {activation.shape}")
        return jax.lax.with_sharding_constraint(activation, sharding)

    @functools.wraps(function)
    def with_placed_activations(*arguments: Any) -> Any:
        with placing(place):
            return function(*arguments)

    return with_placed_activations


def _split(shape: Sequence[int], names: AxisNames, mesh: Mesh, what: str) -> NamedSharding:
    """The sharding of an array whose dimensions carry these names.

    Raises:
        InputError: the table lacks a name; ``what`` carries it.
    """
    taken: set[str] = set()
    splits: list[str | tuple[str, ...] | None] = []
    for size, name in zip(shape, names, strict=False):
        if name is not None and name not in LOGICAL_AXIS_RULES:
            raise InputError(f"{what}: logical axis {name!r} is not in sharding.LOGICAL_AXIS_RULES")
        rule = None if name is None else LOGICAL_AXIS_RULES[name]
        axes = (rule,) if isinstance(rule, str) else rule or ()
        is_split = not taken & set(axes) and size % math.prod(mesh.shape[axis] for axis in axes) == 0
        taken |= set(axes) if is_split else set()
        splits.append(rule if is_split else None)
    return NamedSharding(mesh, PartitionSpec(*splits))


def spread_over(mesh: Mesh, function: Callable[..., Any], *, is_split: Sequence[bool]) -> Callable[..., Any]:
    """The function on each device's part of independent things (replicas, say), without communication.

    Args:
        mesh: the devices.
        function: of arrays, or trees of them, and returning such; what is split, and what is returned, has a leading
            axis of these things.
        is_split: for each argument whether it is split; the others go to every device whole.
    """
    split, whole = batch_sharding(mesh).spec, replicated(mesh).spec
    specs = tuple(split if splits else whole for splits in is_split)
    # Nothing is replicated by a collective here, so there is nothing for JAX to check.
    spread: Callable[..., Any] = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=split, check_vma=False)
    return spread
