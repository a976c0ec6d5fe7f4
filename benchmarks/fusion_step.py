"""Is a train step of MMEI as fast as the same step in PyTorch?

    python -m benchmarks.fusion_step [--quick] [--case=WORDS] [--results=benchmarks/results/DATE_fusion_step.json]

The step is the package's own, at the sizes of ``configs/default.py`` (d = 256, 4 layers, 16 vision, 50 audio, 32 text
tokens of 768 features, batch 32): standardisation, Eq. 1-6 with the emotion, intent and ranking heads, modality dropout
and dropout as the recipe trains, backward pass, clipping, AdamW with schedule, and the report to the host. Batches lie
on the device; reading them is another benchmark's question. The peer (``torch_mmei``) starts from the same weights.
Before anything is measured, updates without dropout must give both sides the same losses and gradients (``agreement``).
"""

import argparse
import functools
import gc
import itertools
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import agreement, rounds
from benchmarks.agreement import NUM_UPDATES, Evidence
from benchmarks.fusion_cases import (
    CASES,
    COMPILED,
    EAGER,
    NUM_BATCHES,
    QUICK_CASES,
    Case,
)
from benchmarks.matmul import matmul_operations
from mmei_jax.config import Config
from mmei_jax.host_memory import keep_freed_memory
from mmei_jax.models.mmei import Mmei
from mmei_jax.optimizer import make_optimizer, make_schedule
from mmei_jax.profiling.ceilings import matmul_rate
from mmei_jax.sharding import batch_sharding, make_mesh
from mmei_jax.state import initial_encoders, initial_state, initialize, state_shapes, variable_shapes
from mmei_jax.train_step import TrainStep, jit_train_step, make_train_step, step_compiler_options
from mmei_jax.training import MAX_UPDATES_IN_FLIGHT
from mmei_jax.types import Batch, StepReport, TrainState

# Updates of the run whose schedule both sides follow.
NUM_SCHEDULED_UPDATES = 10_000


class OurRun:
    """The package's step on these batches, from the seed's weights and those of the encoders' folders."""

    def __init__(self, case: Case, config: Config, batches: Sequence[Batch]):
        mesh = make_mesh(config)
        model = Mmei(config.model, case.tasks(config))
        schedule = make_schedule(config.optimizer, num_steps=NUM_SCHEDULED_UPDATES, steps_per_epoch=1.0)
        optimizer = make_optimizer(config.optimizer, variable_shapes(model)["params"], schedule)
        encoders = initial_encoders(config.model)
        self.state = initial_state(model, optimizer, mesh, seed=config.seed, statistics={}, encoders=encoders)
        self.shapes = state_shapes(model, optimizer, mesh)
        self.step: TrainStep = make_train_step(model, optimizer, config, None)
        self.jitted = jit_train_step(self.step, self.shapes)
        self._batch_sharding = batch_sharding(mesh)
        self.place(batches)

    def place(self, batches: Sequence[Batch]) -> None:
        """Puts these batches on the device, to be read in turns."""
        self.batches = [jax.device_put(batch, self._batch_sharding) for batch in batches]

    def update(self, index: int) -> jax.Array:
        """One update; its loss."""
        self.state, report = self.jitted(self.state, self.batches[index % NUM_BATCHES])
        return report.loss

    def evidence(self) -> Evidence:
        """Updates on the first batch, over and over."""
        return our_evidence(self, lambda state: self.jitted(state, self.batches[0]))

    def dispatcher(self, num_updates: int) -> Callable[[], jax.Array]:
        """A function that makes ``num_updates`` updates in one call, and gives the loss of the last."""
        if num_updates == 1:
            turn = itertools.count()
            return lambda: self.update(next(turn))
        order = [self.batches[index % NUM_BATCHES] for index in range(num_updates)]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *order)

        def several(state: TrainState, batches: Batch) -> tuple[TrainState, jax.Array]:
            state, reports = jax.lax.scan(self.step, state, batches)
            return state, reports.loss[-1]

        compiled = jax.jit(several, donate_argnums=0, compiler_options=step_compiler_options(jax.devices()[0]))

        def dispatch() -> jax.Array:
            self.state, loss = compiled(self.state, stacked)
            return loss

        return dispatch


def our_evidence(run: Any, step: Callable[[TrainState], tuple[TrainState, StepReport]]) -> Evidence:
    """What the first updates of ``run.state`` give, which they leave behind; ``step`` makes one."""
    losses, norms = [], []
    for _ in range(NUM_UPDATES):
        run.state, report = step(run.state)
        losses.append(float(report.loss))
        norms.append(float(report.gradient_norm))
    return Evidence(np.array(losses), np.array(norms), agreement.our_moments(run.state.optimizer_state))


def our_side(case: Case) -> rounds.Ready:
    """Our step, compiled and warm, in a process set up as ``train.py`` does."""
    keep_freed_memory()
    config = case.config()
    batches = case.batches(case.tasks(config))
    rate = matmul_rate(config.model.compute_dtype)
    compared = case.config(**agreement.CHANGES)
    run = OurRun(case, compared, batches)
    evidence = run.evidence()
    if config != compared:
        # Two states at once would take twice the memory.
        del run
        run = OurRun(case, config, batches)
    num_operations = matmul_operations(run.step, run.state, run.batches[0])
    dispatch = run.dispatcher(case.updates_per_dispatch)

    def measure() -> float:
        started = time.perf_counter()
        in_flight: deque[jax.Array] = deque()
        for _ in range(case.num_updates // case.updates_per_dispatch):
            in_flight.append(dispatch())
            if len(in_flight) > MAX_UPDATES_IN_FLIGHT:
                in_flight.popleft().block_until_ready()
        return _seconds_since(started, float(in_flight[-1]))

    measure()
    settings = {
        "device": jax.devices()[0].device_kind,
        "updates_per_dispatch": case.updates_per_dispatch,
        "compiler_options": step_compiler_options(jax.devices()[0]),
        "matmul_gflop_per_update": round(num_operations / 1e9, 2),
        "measured_matmul_gflop_per_second": round(rate / 1e9, 1),
        **rounds.versions("jax", "jaxlib", "flax", "optax"),
    }
    return rounds.Ready(measure, evidence, settings)


def _seconds_since(started: float, loss: float) -> float:
    """Seconds until now, when the last loss has arrived."""
    seconds = time.perf_counter() - started
    if not np.isfinite(loss):
        raise RuntimeError(f"loss {loss} while measuring")
    return seconds


def eager_side(case: Case) -> rounds.Ready:
    """The peer, run operation by operation."""
    return _torch_side(case, is_compiled=False)


def compiled_side(case: Case) -> rounds.Ready:
    """The peer, its forward and backward pass compiled by TorchInductor."""
    return _torch_side(case, is_compiled=True)


def _torch_side(case: Case, *, is_compiled: bool) -> rounds.Ready:
    import torch

    from benchmarks import torch_mmei

    # What train.py does for us serves the peer too.
    keep_freed_memory()
    device = "cuda" if case.platform == "gpu" else "cpu"
    config = case.config()
    batches = case.batches(case.tasks(config))
    torch.set_float32_matmul_precision("high" if device == "cuda" else "highest")
    tensors = [torch_mmei.to_torch(batch, device) for batch in batches]
    torch.manual_seed(config.seed)
    mode = ("max-autotune" if case.platform == "gpu" else "default") if is_compiled else None

    evidence = TorchRun(case, case.config(**agreement.CHANGES), tensors, device, mode).evidence()
    # A compiled model stands in a cycle, and would keep its parameters and moments beside those of the next.
    gc.collect()
    update = TorchRun(case, config, tensors, device, mode).update
    turn = itertools.count()

    def measure() -> float:
        started = time.perf_counter()
        for _ in range(case.num_updates):
            loss = update(next(turn))
        return _seconds_since(started, float(loss))

    measure()
    settings = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "compile_mode": mode or "none",
        "attention": "scaled_dot_product_attention",
        "optimizer": "AdamW(fused=True)",
        **rounds.versions("torch"),
    }
    return rounds.Ready(measure, evidence, settings)


@functools.cache
def initial_parameters(case: Case) -> Any:
    """The parameters that both sides start from, without those of encoders, which lie in their folders."""
    config = case.config()
    model = Mmei(config.model, case.tasks(config))

    def make() -> Any:
        parameters = initialize(model, config.seed)["params"]
        return {name: group for name, group in parameters.items() if not name.startswith("encoder_")}

    return jax.device_get(jax.jit(make)())


class TorchRun:
    """The peer's step on these batches, from the seed's weights.

    Args:
        case: what is measured.
        config: the configuration of the run.
        batches: tensors on the device.
        device: "cpu" or "cuda".
        mode: of ``torch.compile``; None runs operation by operation.
    """

    def __init__(self, case: Case, config: Config, batches: Sequence[Mapping[str, Any]], device: str, mode: str | None):
        import torch

        from benchmarks import torch_mmei

        self.model = case.torch_model(config, initial_parameters(case)).to(device).train()
        self.optimizer = torch_mmei.make_optimizer(self.model, config, fused=True)
        schedule = make_schedule(config.optimizer, num_steps=NUM_SCHEDULED_UPDATES, steps_per_epoch=1.0)
        self._rates = np.asarray([schedule(index) for index in range(NUM_UPDATES)])
        self._forward = self.model if mode is None else torch.compile(self.model, mode=mode, fullgraph=True)
        self._config, self._batches, self._device = config, batches, device

    def update(self, index: int) -> Any:
        """One update; its loss."""
        return self._update(index, self._batches[index % len(self._batches)])[0]

    def evidence(self) -> Evidence:
        """Updates on the first batch, over and over."""
        made = [[float(each) for each in self._update(index, self._batches[0])] for index in range(NUM_UPDATES)]
        squares: dict[str, float] = {}
        for name, parameter in self.model.named_parameters():
            moment = self.optimizer.state[parameter].get("exp_avg")
            square = 0.0 if moment is None else float(moment.double().square().sum())
            group = name.partition(".")[0]
            squares[group] = squares.get(group, 0.0) + square
        losses, norms = np.transpose(made)
        return Evidence(losses, norms, {group: value**0.5 for group, value in squares.items()})

    def _update(self, index: int, batch: Mapping[str, Any]) -> tuple[Any, Any]:
        import torch

        for group in self.optimizer.param_groups:
            group["lr"] = float(self._rates[min(index, len(self._rates) - 1)]) * group["rate_multiplier"]
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self._device, torch.bfloat16, enabled=self._config.model.compute_dtype == "bfloat16"):
            loss = self._forward(batch)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._config.optimizer.clip_norm)
        self.optimizer.step()
        return loss.detach(), norm


SIDES = {
    rounds.OURS: "benchmarks.fusion_step:our_side",
    EAGER: "benchmarks.fusion_step:eager_side",
    COMPILED: "benchmarks.fusion_step:compiled_side",
}


def measure_case(
    case: Case, *, num_rounds: int, sides: Mapping[str, str] = SIDES, is_quick: bool = False
) -> list[dict[str, Any]]:
    """One entry for each peer of the case.

    Raises:
        rounds.SidesDiffer: the losses or gradients of the first updates differ.
    """
    # Both would take most of a GPU's memory beforehand; the peers' processes use JAX for the weights only.
    theirs = {"JAX_PLATFORMS": "cpu"}
    ours = theirs if case.platform == "cpu" else {"JAX_PLATFORMS": "cuda", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.4"}
    chosen = {name: target for name, target in sides.items() if name == rounds.OURS or name in case.goals}
    timing = rounds.measure_sides(
        chosen,
        case,
        num_rounds=num_rounds,
        agree=lambda ours, theirs: agreement.differ(ours, theirs, tolerance=case.tolerance),
        environment={name: ours if name == rounds.OURS else theirs for name in chosen},
        is_quick=is_quick,
    )
    settings = timing.settings[rounds.OURS]
    rate = case.num_updates / timing.median_seconds(rounds.OURS)
    share = rate * settings["matmul_gflop_per_update"] / settings["measured_matmul_gflop_per_second"]
    return [
        rounds.case_record(
            case.name,
            timing,
            peer,
            goal=goal,
            our_updates_per_second=round(rate, 4),
            peer_updates_per_second=round(case.num_updates / timing.median_seconds(peer), 4),
            our_share_of_measured_matmul_rate=round(share, 4),
            goal_share=case.goal_share,
        )
        for peer, goal in case.goals.items()
    ]


def run_command(
    benchmark: str,
    documentation: str | None,
    *,
    cases: Sequence[Case],
    quick_cases: Sequence[Case],
    measure: Callable[..., list[dict[str, Any]]],
    packages: Sequence[str],
) -> None:
    """The command of a benchmark of training steps: measures its cases, prints a table, and a JSON line at the end.

    Args:
        benchmark: name of its module.
        documentation: of its module.
        cases: what it measures.
        quick_cases: what it measures with ``--quick``.
        measure: as :func:`measure_case`.
        packages: whose versions are noted.
    """
    parser = argparse.ArgumentParser(description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller model, eager torch only, within a minute")
    parser.add_argument("--num_rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--results", help="JSON file for the figures, date, versions and command")
    arguments = parser.parse_args()
    entries: list[dict[str, Any]] = []
    for case in rounds.chosen_cases(parser, quick_cases if arguments.quick else cases, arguments.case):
        reason = rounds.missing_gpu() if case.platform == "gpu" else ""
        if reason:
            entries.extend(rounds.unmeasured(case.name, peer, reason, goal=goal) for peer, goal in case.goals.items())
            continue
        found = measure(case, num_rounds=2 if arguments.quick else arguments.num_rounds, is_quick=arguments.quick)
        entries.extend(found)
        for entry in found:
            print(
                f"{case.name}: {entry['our_updates_per_second']:.2f} updates/s against {entry['peer']} "
                f"{entry['peer_updates_per_second']:.2f}, {rounds.spread(entry)}, "
                f"{100 * entry['our_share_of_measured_matmul_rate']:.0f} % of the measured matmul rate",
                flush=True,
            )
            print(f"  ours: {entry['our_settings']}\n  {entry['peer']}: {entry['peer_settings']}", flush=True)
    rounds.print_summary(benchmark, entries, arguments.results, versions=rounds.versions(*packages))


def main() -> None:
    """Measures every case, prints a table, and a JSON line at the end."""
    run_command(
        "fusion_step",
        __doc__,
        cases=CASES,
        quick_cases=QUICK_CASES,
        measure=measure_case,
        packages=("jax", "torch"),
    )


if __name__ == "__main__":
    main()
