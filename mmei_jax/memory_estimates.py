"""What an update needs of a device's memory, estimated without compiling it, and which settings would reduce it most.

The update is traced, as for compiling, and its arrays are followed from the operation that makes them to the last that
reads them: the most that is alive at once is what it needs beside its arguments. Arrays of a parameter's shape are
split over the devices as that parameter is, all others over the devices that split the batch. A compiler fuses
operations and so does not make every array; it also needs room of its own. The estimate is therefore there to compare
settings, and for programs that could not be compiled: after compiling, the compiler's own figures are better.
"""

import dataclasses
import math
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from mmei_jax.config import Config, parse
from mmei_jax.optimizer import trained_mask
from mmei_jax.profiling.programs import bytes_per_device
from mmei_jax.sharding import MESH_AXES, make_mesh
from mmei_jax.state import build_model, check_split, placed_variable_shapes
from mmei_jax.training_parts import TrainingParts
from mmei_jax.types import InputError

# Fractions of a length at which a shorter one is tried.
_SHORTER = 2


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device while a run trains.

    Attributes:
        parameters: of the model.
        optimizer_state: moments of the trained parameters.
        gradients: of the trained parameters; twice where they are added up over micro-batches.
        batches: the one that is read, and those kept ready.
        activations: whatever else is alive at once: above all what the backward pass reads of the forward pass.
    """

    parameters: int
    optimizer_state: int
    gradients: int
    batches: int
    activations: int

    @property
    def total(self) -> int:
        """All together."""
        return sum(self.by_kind().values())

    def by_kind(self) -> dict[str, int]:
        """Bytes by kind, in words."""
        return {
            "parameters": self.parameters,
            "optimizer state": self.optimizer_state,
            "gradients": self.gradients,
            "batches": self.batches,
            "activations": self.activations,
        }


@dataclass(frozen=True)
class Saving:
    """A setting that would reduce what a run needs.

    Attributes:
        setting: keys and values, as a shell takes them.
        note: what it changes besides; "" where the run stays the same.
        num_bytes: estimated, on one device.
    """

    setting: str
    note: str
    num_bytes: int


def estimate(parts: TrainingParts) -> MemoryEstimate:
    """What a run's largest batches need; nothing is compiled or allocated."""
    state = parts.state_shapes()
    gradients = gradient_bytes(parts.config, state.parameters)
    batch = parts.batch_shapes()
    jaxpr = jax.make_jaxpr(parts.train_step())(state, batch).jaxpr
    alive = most_alive(jaxpr, _share_of(state.parameters, parts.mesh))
    return MemoryEstimate(
        parameters=bytes_per_device(state.parameters),
        optimizer_state=bytes_per_device(state.optimizer_state),
        gradients=gradients,
        batches=bytes_per_device(batch) * (1 + parts.config.data.num_prefetch_batches),
        # Gradients are alive at the end of the backward pass, when the activations are not; where there are more of
        # them, they are the peak.
        activations=max(0, alive - gradients),
    )


def gradient_bytes(config: Config, parameters: Any) -> int:
    """Bytes on one device of the trained parameters' gradients, twice where they are added up over micro-batches.

    Args:
        config: says which parameters are trained, and how many micro-batches there are.
        parameters: shapes, with shardings.
    """
    is_trained = jax.tree.leaves(trained_mask(config.optimizer, parameters))
    trained = [leaf for leaf, learns in zip(jax.tree.leaves(parameters), is_trained, strict=True) if learns]
    return bytes_per_device(trained) * min(2, config.train.gradient_accumulation_steps)


def largest_savings(parts: TrainingParts, now: MemoryEstimate, *, num_settings: int = 3) -> list[Saving]:
    """The settings that would reduce a run's memory most, the most first; fewer where fewer would.

    Args:
        parts: of the run as it is.
        now: its estimate.
        num_settings: most that are given.
    """
    found = []
    for changes, note in alternatives(parts.config):
        try:
            other = _changed_parts(parts, changes)
        except InputError:
            # Not to be had with these records, devices or keys.
            continue
        saved = now.total - estimate(other).total
        if saved > 0:
            found.append(Saving(as_flags(changes), note, saved))
    return sorted(found, key=lambda saving: -saving.num_bytes)[:num_settings]


def alternatives(config: Config) -> Iterator[tuple[dict[str, Any], str]]:
    """Changes that may need less memory, by dotted key, each with what else it changes."""
    data, train, mesh = config.data, config.train, config.mesh
    micro_batch_size = data.batch_size // train.gradient_accumulation_steps
    if data.batch_size > 1 and not data.packing.num_rows:
        yield {"data.batch_size": data.batch_size // 2}, "another run: half the records per update"
    if micro_batch_size > 1 and not data.packing.num_rows:
        yield (
            {"train.gradient_accumulation_steps": train.gradient_accumulation_steps * 2},
            "" if config.loss.ranking != "in_batch_softmax" else "in-batch negatives come from half as many records",
        )
    if config.model.encoders.folders() and config.model.encoders.remat != "layer":
        yield {"model.encoders.remat": "layer"}, "the same numbers, about a third more time in the encoders"
    if config.model.compute_dtype == "float32":
        yield {"model.compute_dtype": "bfloat16"}, "products in lower precision"
    for name in data.modalities if not data.packing.num_rows else ():
        lengths = getattr(data.max_tokens, name)
        if lengths[-1] > 1:
            shorter = tuple(max(1, length // _SHORTER) for length in lengths)
            yield {f"data.max_tokens.{name}": shorter}, "longer records are cut"
    num_devices = jax.device_count()
    for axis in ("fsdp", "tensor"):
        others = mesh.fsdp * mesh.tensor // getattr(mesh, axis)
        if num_devices % others == 0 and num_devices // others > getattr(mesh, axis):
            yield {"mesh.data": -1, f"mesh.{axis}": num_devices // others}, "the same numbers, more is sent"
    if data.num_prefetch_batches > 1:
        yield {"data.num_prefetch_batches": 1}, "the same numbers, less is read ahead"


def as_flags(changes: Mapping[str, Any]) -> str:
    """Changes by dotted key as a shell takes them.

    Example:
        >>> as_flags({"data.max_tokens.text": (8, 16), "seed": 1})
        "'--config.data.max_tokens.text=(8,16)' --config.seed=1"
    """

    def shown(value: Any) -> str:
        return repr(value).replace(" ", "") if isinstance(value, tuple) else str(value)

    return shlex.join(f"--config.{key}={shown(value)}" for key, value in changes.items())


def changed(config: Config, changes: Mapping[str, Any]) -> Config:
    """The configuration with some keys changed, checked.

    Args:
        config: to begin with.
        changes: by dotted key.

    Raises:
        InputError: the keys do not go together.
    """
    values = config.to_json()
    for key, value in changes.items():
        *groups, name = key.split(".")
        place = values
        for group in groups:
            place = place[group]
        place[name] = value
    return parse(values)


def most_alive(jaxpr: Jaxpr, share: Mapping[tuple[int, ...], float]) -> int:
    """Bytes of the arrays that are alive at once, at most, arguments and results left out.

    Args:
        jaxpr: of a function.
        share: by shape, the part of an array that one device holds; () for all other shapes.
    """
    return round(_Followed(share).most_alive(jaxpr))


class _Followed:
    """Follows the arrays of a traced function, and those of the functions in it."""

    def __init__(self, share: Mapping[tuple[int, ...], float]) -> None:
        self._share = share
        self._known: dict[int, float] = {}

    def most_alive(self, jaxpr: Jaxpr) -> float:
        if id(jaxpr) in self._known:
            return self._known[id(jaxpr)]
        last: dict[Any, int] = {}
        for place, equation in enumerate(jaxpr.eqns):
            last |= {variable: place for variable in equation.invars if not isinstance(variable, Literal)}
        given_back = {variable for variable in jaxpr.outvars if not isinstance(variable, Literal)}
        alive = most = 0.0
        ends: dict[int, float] = {}
        for place, equation in enumerate(jaxpr.eqns):
            for variable in equation.outvars:
                if variable in given_back:
                    continue
                size = self._bytes(variable.aval)
                alive += size
                end = last.get(variable, place)
                ends[end] = ends.get(end, 0.0) + size
            inner = [self.most_alive(getattr(one, "jaxpr", one)) for one in _inner(equation.params)]
            most = max(most, alive + max(inner, default=0.0))
            alive -= ends.pop(place, 0.0)
        self._known[id(jaxpr)] = most
        return most

    def _bytes(self, aval: Any) -> float:
        if not hasattr(aval, "shape") or not hasattr(aval.dtype, "itemsize"):
            return 0.0
        return math.prod(aval.shape) * aval.dtype.itemsize * self._share.get(aval.shape, self._share[()])


def _inner(parameters: Mapping[str, Any]) -> list[Any]:
    def is_jaxpr(value: Any) -> bool:
        return isinstance(value, Jaxpr | ClosedJaxpr)

    return [value for value in jax.tree.leaves(list(parameters.values()), is_leaf=is_jaxpr) if is_jaxpr(value)]


def _share_of(parameters: Any, mesh: jax.sharding.Mesh) -> dict[tuple[int, ...], float]:
    """By shape of the parameters, the share that a device holds; () for what is split as the batch is."""
    shares: dict[tuple[int, ...], float] = {
        leaf.shape: math.prod(leaf.sharding.shard_shape(leaf.shape)) / max(1, math.prod(leaf.shape))
        for leaf in jax.tree.leaves(parameters)
        if leaf.shape
    }
    data, fsdp, _ = (mesh.shape[axis] for axis in MESH_AXES)
    return {**shares, (): 1.0 / (data * fsdp)}


def _changed_parts(parts: TrainingParts, changes: Mapping[str, Any]) -> TrainingParts:
    """The parts with some keys changed; the optimizer knows parameters by their names, which stay.

    Raises:
        InputError: the keys do not go together, or not with the devices.
    """
    config = changed(parts.config, changes)
    mesh, model = make_mesh(config), build_model(config, parts.dataset)
    check_split(placed_variable_shapes(model, mesh)["params"], config.mesh)
    return dataclasses.replace(parts, config=config, mesh=mesh, model=model)
