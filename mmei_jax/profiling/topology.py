"""Compiles a run's update for TPU topologies that are not there, and writes what it would cost.

A folder gathers what several calls predict for one configuration: ``predictions.json``, and ``topologies.md`` of all
of it.
"""

import re
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from mmei_jax import environment
from mmei_jax.config import Config
from mmei_jax.fingerprints import canonical_json
from mmei_jax.out_of_memory import is_out_of_memory
from mmei_jax.profiling.candidates import MeshShape, candidate_meshes, parse_meshes
from mmei_jax.profiling.lowering import UpdateLowering
from mmei_jax.profiling.predictions import Prediction, costs_of, prediction_from_json
from mmei_jax.profiling.programs import describe_program
from mmei_jax.profiling.topologies import Topology, parse_topology, topology_devices
from mmei_jax.profiling.topology_report import topology_report
from mmei_jax.profiling.tpu_times import tpu_times
from mmei_jax.sharding import mesh_over
from mmei_jax.types import InputError
from mmei_jax.workdir import locked, read_versioned, write_json, write_text

PREDICTIONS_NAME = "predictions.json"
REPORT_NAME = "topologies.md"
_FORMAT, _VERSION = "mmei_jax TPU predictions", 1
# What the compiler says of a program that does not fit.
_TOO_MUCH = re.compile(r"Used ([\d.]+\w*) of ([\d.]+\w*) (hbm|vmem|smem)")


def predict_topologies(
    config: Config,
    names: Sequence[str],
    *,
    meshes: str | None,
    records_per_chip: int | None,
    output: Path,
    command: str,
    report: Callable[[str], None],
) -> list[Prediction]:
    """Predictions for each topology and mesh, written as they are made.

    Args:
        config: of the run; its mesh is not read.
        names: of topologies.
        meshes: what ``--meshes`` gives, for all topologies; None takes the candidates.
        records_per_chip: of an update; None divides ``config.data.batch_size`` by the chips.
        output: folder of what is written. Earlier predictions of the same configuration are kept beside these.
        command: that was given.
        report: told of each prediction.

    Returns:
        All predictions of the folder.

    Raises:
        InputError: a topology or a mesh is none, libtpu is missing, the configuration does not fit the data, or the
            folder holds predictions of another configuration or of other versions, or is in use by another process.
    """
    given = [(topology, topology_devices(topology)) for topology in map(parse_topology, names)]
    # What is there is read once, and written again with each prediction.
    with locked(output, "--output"):
        path, conditions = output / PREDICTIONS_NAME, _conditions(config)
        found, commands = _earlier(path, conditions)
        lowering = UpdateLowering(config)
        work = [
            (topology, devices, mesh, _records_per_chip(config, topology, records_per_chip))
            for topology, devices in given
            for mesh in (
                candidate_meshes(topology.num_chips, lowering.head_counts())
                if meshes is None
                else parse_meshes(meshes, topology.num_chips)
            )
        ]
        commands.append(command)
        for topology, devices, shape, records in work:
            prediction = predict(lowering, topology, devices, shape, records)
            key = (prediction.topology, prediction.mesh, records)
            found = [one for one in found if (one.topology, one.mesh, one.records_per_chip) != key] + [prediction]
            report(describe(prediction))
            values = {"format": _FORMAT, "version": _VERSION, "commands": commands, **conditions}
            write_json(path, {**values, "predictions": [one.to_json() for one in found]})
            write_text(output / REPORT_NAME, topology_report(found, commands, conditions["versions"], config))
    return found


def predict(
    lowering: UpdateLowering,
    topology: Topology,
    devices: Sequence[jax.Device],
    shape: MeshShape,
    records_per_chip: int,
) -> Prediction:
    """What the compiler makes of an update on one mesh; a program that does not fit is no error, but an answer.

    Args:
        lowering: of the run's update.
        topology: that it is compiled for.
        devices: of the topology.
        shape: of the mesh.
        records_per_chip: of an update.
    """
    num_records = records_per_chip * topology.num_chips
    started, seconds, costs, refusal = time.perf_counter(), 0.0, None, ""
    try:
        parts = lowering.on(mesh_over(devices, fsdp=shape.fsdp, tensor=shape.tensor), shape, num_records)
        lowered = parts.lower()
        started = time.perf_counter()
        compiled = lowered.compile()
    except InputError as error:
        refusal = str(error)
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        seconds = time.perf_counter() - started
        needed = _TOO_MUCH.search(str(error))
        refusal = f"needs {needed[1]}B of {needed[2]}B {needed[3]}" if needed else "does not fit the chip's memory"
    else:
        seconds = time.perf_counter() - started
        facts = describe_program(compiled, state=parts.state_shapes())
        times = tpu_times(facts, _optimal_seconds(compiled), topology.chip)
        costs = costs_of(facts, times, topology.chip, model_flops=lowering.model_flops(num_records))
    return Prediction(topology.name, shape, records_per_chip, seconds, costs, refusal)


def _optimal_seconds(compiled: jax.stages.Compiled) -> float | None:
    costs: Any = compiled.cost_analysis()
    found = (costs or {}).get("optimal_seconds")
    return None if found is None else float(found)


def describe(prediction: Prediction) -> str:
    """One line for the terminal."""
    where = f"{prediction.topology} {prediction.mesh}, {prediction.records_per_chip} records a chip"
    took = f"(compiled in {prediction.compile_seconds:.0f} s)"
    costs = prediction.costs
    if costs is None:
        return f"{where}: does not fit: {prediction.refusal} {took}"
    return (
        f"{where}: {costs.memory_bytes / 2**30:.2f} GiB, {1e3 * costs.times.optimal_seconds:.1f} ms and "
        f"{1e3 * costs.collective_seconds:.1f} ms of collectives {took}"
    )


def _conditions(config: Config) -> dict[str, Any]:
    """What predictions must have in common to be compared."""
    versions = {name: environment.versions()[name] for name in ("python", "jax", "jaxlib", "flax", "optax")}
    try:
        versions["libtpu"] = metadata.version("libtpu")
    except metadata.PackageNotFoundError:
        # TPU_LIBRARY_PATH names a library that no package brought.
        versions["libtpu"] = "unknown"
    values = config.to_json()
    # These are told of each prediction.
    del values["mesh"], values["data"]["batch_size"]
    return {"config": values, "versions": versions}


def _earlier(path: Path, conditions: dict[str, Any]) -> tuple[list[Prediction], list[str]]:
    """Predictions that a folder holds already, and the commands that made them."""
    if not path.exists():
        return [], []
    values = read_versioned(path, _FORMAT, _VERSION, "predictions of an earlier call")
    for key, own in conditions.items():
        if canonical_json(values.get(key)) != canonical_json(own):
            raise InputError(f"{path}: holds predictions of another {key}: expected another --output")
    return [prediction_from_json(one) for one in values["predictions"]], list(values["commands"])


def _records_per_chip(config: Config, topology: Topology, given: int | None) -> int:
    if given is not None:
        if given < 1:
            raise InputError(f"--per_chip_batch={given}: expected at least 1")
        return given
    records, rest = divmod(config.data.batch_size, topology.num_chips)
    if rest or not records:
        raise InputError(
            f"config.data.batch_size = {config.data.batch_size}: expected a multiple of the {topology.num_chips} chips "
            f"of {topology.name}, or --per_chip_batch"
        )
    return records
