"""Is jit with NamedSharding as fast as pmap on the same devices, and what does a device hold?

    python -m benchmarks.pmap [--quick] [--case=WORDS] [--results=benchmarks/results/DATE_pmap.json]

The step is the package's own, at the sizes of ``configs/default.py``, on 8 CPU devices that JAX makes of this machine's
cores: the batch split over all (``8 x 1 x 1``), and with it the parameters (``1 x 8 x 1``). The peer is the same model
and update as one writes them for ``jax.pmap``: each device has all parameters and its own part of the batch, gathers
what the losses need of the others by hand, adds up gradients by ``psum``, and updates all parameters like every other
device. In this version of JAX ``pmap`` itself is made of ``jit`` and ``shard_map``. Before anything is measured,
updates without dropout must give both sides the same losses and gradients (``agreement``).
"""

import argparse
import dataclasses
import itertools
import math
import os
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, cast

import jax
import numpy as np
import optax

from benchmarks import agreement, rounds
from benchmarks.agreement import NUM_UPDATES, Evidence
from benchmarks.fusion_cases import NUM_BATCHES, Case
from benchmarks.fusion_step import NUM_SCHEDULED_UPDATES, OurRun
from mmei_jax.config import Config
from mmei_jax.host_memory import keep_freed_memory
from mmei_jax.losses import task_counts, task_losses, total_loss
from mmei_jax.models.mmei import Mmei
from mmei_jax.optimizer import make_optimizer, make_schedule
from mmei_jax.sharding import mesh_over
from mmei_jax.state import initial_state, variable_shapes
from mmei_jax.train_step import step_compiler_options
from mmei_jax.types import Batch, Outputs, TrainState

PMAP = "pmap"
NUM_DEVICES = 8
AXIS = "devices"
# Losses without dropout; sums over devices are added up in another order.
TOLERANCE = 2e-5
CASES = (
    Case("8 cpu devices, 8 x 1 x 1, batch 64", {PMAP: None}, batch_size=64, tolerance=TOLERANCE),
    Case(
        "8 cpu devices, 1 x 8 x 1, batch 64",
        {PMAP: None},
        batch_size=64,
        changes={"mesh__fsdp": 8},
        tolerance=TOLERANCE,
    ),
)
# What is measured is what was compared, so that each side compiles one program.
QUICK_CASES = (
    Case(
        "8 cpu devices, 8 x 1 x 1, batch 16, 1 layer, no dropout (quick)",
        {PMAP: None},
        batch_size=16,
        changes={"model__num_layers": 1, **agreement.CHANGES},
        num_updates=2,
        tolerance=TOLERANCE,
    ),
)


class PmapRun:
    """The same model and update by ``pmap``, from the same weights.

    Args:
        case: what is measured.
        config: the configuration of the run.
        batches: whole batches, on the host.
    """

    def __init__(self, case: Case, config: Config, batches: Sequence[Batch]):
        model = Mmei(config.model, case.tasks(config))
        schedule = make_schedule(config.optimizer, num_steps=NUM_SCHEDULED_UPDATES, steps_per_epoch=1.0)
        optimizer = make_optimizer(config.optimizer, variable_shapes(model)["params"], schedule)
        one = mesh_over(jax.devices()[:1])
        state = jax.device_get(initial_state(model, optimizer, one, seed=config.seed, statistics={}))
        count = jax.device_count()
        self.state: Any = jax.tree.map(lambda leaf: np.stack([leaf] * count), state)
        self._step = jax.pmap(pmapped_step(model, optimizer, config, count), axis_name=AXIS, donate_argnums=0)
        split = [jax.tree.map(lambda leaf: leaf.reshape(count, -1, *leaf.shape[1:]), batch) for batch in batches]
        # One pass through an identity puts each device's part where it belongs.
        place = jax.pmap(lambda part: part)
        self._batches = [place(batch) for batch in split]

    def update(self, index: int) -> tuple[jax.Array, jax.Array]:
        """One update; its loss and the norm of its gradient."""
        self.state, loss, norm = self._step(self.state, self._batches[index % NUM_BATCHES])
        return loss[0], norm[0]

    def evidence(self) -> Evidence:
        """Updates on the first batch, over and over."""
        made = [[float(each) for each in self.update(0)] for _ in range(NUM_UPDATES)]
        losses, norms = np.transpose(made)
        moments = agreement.our_moments(jax.tree.map(lambda leaf: leaf[0], self.state.optimizer_state))
        return Evidence(losses, norms, moments)


def pmapped_step(
    model: Mmei, optimizer: optax.GradientTransformation, config: Config, num_devices: int
) -> Callable[[TrainState, Batch], tuple[TrainState, jax.Array, jax.Array]]:
    """One device's part of an update, which gives its state, the whole batch's loss, and the norm of the gradient."""

    def gathered(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: jax.lax.all_gather(leaf, AXIS, tiled=True), tree)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, jax.Array, jax.Array]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        dropout_key, modality_key = jax.random.split(jax.random.fold_in(key, jax.lax.axis_index(AXIS)))
        targets = gathered(dataclasses.replace(batch, vision=None, audio=None, text=None))
        counts = task_counts(targets, config.loss)

        def loss_of(parameters: Any) -> jax.Array:
            answer = model.apply(
                {"params": parameters, "statistics": state.statistics},
                batch,
                is_training=True,
                rngs={"dropout": dropout_key, "modality_dropout": modality_key},
            )
            # In-batch negatives come from every device, so every device computes the whole batch's loss.
            losses = task_losses(gathered(cast(Outputs, answer)), targets, config.loss)
            loss, _ = total_loss(losses, config.loss, counts=counts)
            return loss / num_devices

        loss, gradients = jax.lax.psum(jax.value_and_grad(loss_of)(state.parameters), AXIS)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer_state, state.parameters)
        new_state = TrainState(
            step=state.step + 1,
            parameters=optax.apply_updates(state.parameters, updates),
            statistics=state.statistics,
            optimizer_state=optimizer_state,
        )
        return new_state, loss, optax.tree.norm(gradients)

    return step


def our_side(case: Case) -> rounds.Ready:
    """Ours: jit with NamedSharding, on the mesh that the case names."""
    return _side(case, OurRun)


def pmap_side(case: Case) -> rounds.Ready:
    """The peer: pmap over the same devices."""
    return _side(case, PmapRun)


def _side(case: Case, make_run: Callable[..., Any]) -> rounds.Ready:
    keep_freed_memory()
    batches = case.batches(case.tasks(case.config()))
    compared, measured = case.config(**agreement.CHANGES), case.config()
    run = make_run(case, compared, batches)
    evidence = run.evidence()
    if measured != compared:
        run = make_run(case, measured, batches)
    turn = itertools.count()

    def measure() -> float:
        started = time.perf_counter()
        made = [run.update(next(turn)) for _ in range(case.num_updates)]
        # The last update waits for all others.
        loss = float(jax.tree.leaves(made[-1])[0])
        seconds = time.perf_counter() - started
        if not np.isfinite(loss):
            raise RuntimeError(f"loss {loss} while measuring")
        return seconds

    measure()
    settings = {
        "devices": jax.device_count(),
        "state_bytes_per_device": state_bytes_per_device(run.state),
        **rounds.versions("jax", "jaxlib", "flax", "optax"),
    }
    return rounds.Ready(measure, evidence, settings)


def state_bytes_per_device(state: TrainState) -> int:
    """Bytes of parameters and optimizer state that the first device holds."""
    arrays = jax.tree.leaves((state.parameters, state.optimizer_state))
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in arrays)


SIDES = {rounds.OURS: "benchmarks.pmap:our_side", PMAP: "benchmarks.pmap:pmap_side"}


def environments() -> dict[str, dict[str, str]]:
    """Variables of the processes: the same devices, and our compiler options for pmap, which takes none itself."""
    shared = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(NUM_DEVICES)}
    options = step_compiler_options(SimpleNamespace(platform="cpu"))
    flags = [os.environ.get("XLA_FLAGS", ""), *(f"--{name}={value}" for name, value in options.items())]
    return {rounds.OURS: shared, PMAP: {**shared, "XLA_FLAGS": " ".join(flags).strip()}}


def measure_case(case: Case, *, num_rounds: int, is_quick: bool = False) -> dict[str, Any]:
    """The entry of a case.

    Raises:
        rounds.SidesDiffer: the losses or gradients of the first updates differ.
    """
    timing = rounds.measure_sides(
        SIDES,
        case,
        num_rounds=num_rounds,
        agree=lambda ours, theirs: agreement.differ(ours, theirs, tolerance=case.tolerance),
        environment=environments(),
        is_quick=is_quick,
    )
    return rounds.case_record(
        case.name,
        timing,
        PMAP,
        goal=case.goals[PMAP],
        our_updates_per_second=round(case.num_updates / timing.median_seconds(rounds.OURS), 4),
        peer_updates_per_second=round(case.num_updates / timing.median_seconds(PMAP), 4),
    )


def main() -> None:
    """Measures every case, prints a table, and a JSON line at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller model and batch, within a minute")
    parser.add_argument("--num_rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--results", help="JSON file for the figures, date, versions and command")
    arguments = parser.parse_args()
    entries = []
    for case in rounds.chosen_cases(parser, QUICK_CASES if arguments.quick else CASES, arguments.case):
        num_rounds = 2 if arguments.quick else arguments.num_rounds
        entry = measure_case(case, num_rounds=num_rounds, is_quick=arguments.quick)
        entries.append(entry)
        print(
            f"{case.name}: {entry['our_updates_per_second']:.2f} updates/s against {PMAP} "
            f"{entry['peer_updates_per_second']:.2f}, {rounds.spread(entry)}; bytes of the state on each device: "
            f"{entry['our_settings']['state_bytes_per_device']:,} against "
            f"{entry['peer_settings']['state_bytes_per_device']:,}",
            flush=True,
        )
    rounds.print_summary("pmap", entries, arguments.results, versions=rounds.versions("jax"))


if __name__ == "__main__":
    main()
