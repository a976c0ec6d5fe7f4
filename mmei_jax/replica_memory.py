"""What replicas that train at once need of a device's memory, and which settings would reduce it most.

Estimated from the traced program, as :mod:`mmei_jax.memory_estimates` does for a single run. Replicas share no mesh and
read no batches ahead: their records lie on every device, and a plan says which of them an update takes.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mmei_jax.config import Config
from mmei_jax.device_split import DeviceSplit
from mmei_jax.memory_estimates import Saving, alternatives, as_flags, changed, gradient_bytes, most_alive
from mmei_jax.out_of_memory import memory_lines, saving_lines
from mmei_jax.profiling.programs import bytes_per_device
from mmei_jax.records import Split
from mmei_jax.replicas import Replicas
from mmei_jax.sharding import replicated
from mmei_jax.types import InputError

# Plans that a device holds: that of the dispatch under way, and the next.
_NUM_PLANS = 2
# That are told of.
_NUM_SETTINGS = 3

# Of a configuration, so many replicas, and the shapes of the records on the devices.
Build = Callable[[Config, int], tuple[Replicas, DeviceSplit]]


def estimate_replicas(replicas: Replicas, table: DeviceSplit, updates_per_dispatch: int) -> dict[str, int]:
    """Bytes on one device while replicas train, by kind; nothing is compiled or allocated.

    Args:
        replicas: all that train at once.
        table: shapes of the records on the devices, with shardings.
        updates_per_dispatch: updates of one program.
    """
    state, plan = replicas.shapes(updates_per_dispatch)
    # A dispatch keeps the state before it, which a replica goes back to whose loss is not finite.
    carried = bytes_per_device(state)
    gradients = gradient_bytes(replicas.config, state.train.parameters)
    # What a device runs is traced with its own part of the replicas.
    alive = most_alive(replicas.trace(table, updates_per_dispatch).jaxpr, {(): 1.0})
    return {
        "parameters": bytes_per_device(state.train.parameters),
        "optimizer state": bytes_per_device(state.train.optimizer_state),
        "state copies": carried + bytes_per_device(state.train.variables),
        "gradients": gradients,
        "records": bytes_per_device(table),
        "plans": _NUM_PLANS * bytes_per_device(plan),
        "activations": max(0, alive - carried - gradients),
    }


def replica_memory_lines(
    config: Config,
    num_replicas: int,
    updates_per_dispatch: int,
    build: Build,
    *,
    predicted_bytes: int | None,
    usable_share: float,
    key_of: Callable[[str], str],
) -> list[str]:
    """The table of what replicas need, and the three settings that would reduce it most.

    Args:
        config: what the replicas share.
        num_replicas: that train at once.
        updates_per_dispatch: updates of one program.
        build: gives the replicas of a configuration.
        predicted_bytes: what the compiler said that these need on a device; None where it did not.
        usable_share: of the table's memory limit that replicas may take.
        key_of: by a key of the configuration, that by which the table sets it.

    Raises:
        InputError: the configuration does not fit the data.
    """
    replicas, table = build(config, num_replicas)
    now = estimate_replicas(replicas, table, updates_per_dispatch)
    total = sum(now.values())
    found: list[Saving] = []

    def consider(setting: dict[str, object], note: str, other: int) -> None:
        if other < total:
            found.append(Saving(as_flags(setting), note, total - other))

    # Every device has as many replicas.
    fewer = max(1, num_replicas // replicas.mesh.size // 2) * replicas.mesh.size
    if fewer < num_replicas:
        other = sum(estimate_replicas(*build(config, fewer), updates_per_dispatch).values())
        # Half-way to what all of them need: the estimate's share need not be the compiler's.
        limit = (predicted_bytes or total) * 0.5 * (other / total + 1.0) / usable_share
        note = f"the same numbers, about {fewer} replicas at once"
        consider({"table.memory_limit_gib": f"{limit / 2**30:.3g}"}, note, other)
    if updates_per_dispatch > 1:
        updates = updates_per_dispatch // 2
        other = sum(estimate_replicas(replicas, table, updates).values())
        consider({"table.updates_per_dispatch": updates}, "the same numbers, the host waits more often", other)
    for changes, note in _alternatives(config):
        try:
            built = build(changed(config, changes), num_replicas)
        except InputError:
            # Not to be had with these records or keys.
            continue
        other = sum(estimate_replicas(*built, updates_per_dispatch).values())
        consider({key_of(key): value for key, value in changes.items()}, note, other)
    title = (
        f"what {num_replicas} replicas on {replicas.mesh.size} device(s) need on each, estimated from their shapes "
        "before any compiler's savings:"
    )
    most = sorted(found, key=lambda saving: -saving.num_bytes)[:_NUM_SETTINGS]
    return [*memory_lines(now, title), *saving_lines(most)]


def table_shapes(host_table: DeviceSplit, split: Split, config: Config, mesh: Mesh) -> DeviceSplit:
    """Shapes of a split's records on the devices of a mesh, cut at the configuration's longest lengths.

    Args:
        host_table: the records, read with the same or longer lengths.
        split: that of the table.
        config: says how long.
        mesh: every device of which has all of them.
    """

    def shape(leaf: np.ndarray, num_rows: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((num_rows, *leaf.shape[1:]), leaf.dtype, sharding=replicated(mesh))

    tokens = {}
    for name, leaf in host_table.tokens.items():
        lengths = np.minimum(split.lengths(name), getattr(config.data.max_tokens, name)[-1])
        tokens[name] = shape(leaf, max(1, int(lengths.sum())))
    records = jax.tree.map(lambda leaf: shape(leaf, len(leaf)), host_table.records)
    return DeviceSplit(tokens=tokens, records=records)


def memory_of_a_device() -> int:
    """Bytes that a device offers; of the host's memory its share, where the devices are the host's."""
    device: Any = jax.devices()[0]
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    available = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    return 1024 * available // jax.device_count()


def _alternatives(config: Config) -> Iterator[tuple[dict[str, object], str]]:
    """Those of a single run that change anything for replicas, which have no mesh and read nothing ahead."""
    for changes, note in alternatives(config):
        if not any(key.startswith("mesh.") or key == "data.num_prefetch_batches" for key in changes):
            yield changes, note
