r"""Do eight seeds of MMEI train faster as one program than one after the other in PyTorch?

    python -m benchmarks.replicas [--quick] [--case=cpu|gpu] [--num_rounds=5] \
        [--results=benchmarks/results/DATE_replicas.json]

The model, the losses and the update are ``fusion_step``'s: the sizes of ``configs/default.py`` (d = 256, 4 layers, 16
vision, 50 audio, 32 text tokens of 768 features, batch 32), dropout as the recipe trains. Ours is what ``train.py``
does with a table: replicas spread over one CPU device per core, their records on the devices, 20 updates of each in one
dispatch. The peer is the ordinary loop over seeds: the same model (``torch_mmei``) from the same weights, batches taken
from the same records, which lie in memory as tensors, in the same order. Before anything is measured, five updates of
every seed without dropout must give the same losses on both sides. On a GPU ten seeds make two epochs of 3,520 records
in bfloat16, and both sides' records and models lie there.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import agreement, rounds
from benchmarks.random_records import write_records
from configs import default
from mmei_jax import input_pipeline
from mmei_jax.batching import BatchReader
from mmei_jax.config import Config, parse
from mmei_jax.device_split import read_device_split
from mmei_jax.host_devices import one_device_per_core
from mmei_jax.host_memory import keep_freed_memory
from mmei_jax.optimizer import make_schedule
from mmei_jax.packing import padded_layouts
from mmei_jax.records import Dataset
from mmei_jax.replicas import Replicas
from mmei_jax.sharding import make_evaluation_mesh, replicated
from mmei_jax.state import build_model, initialize, tasks_of

EAGER, COMPILED = "torch eager", "torch compiled"


@dataclass(frozen=True)
class Case:
    """One workload.

    Attributes:
        name: in the table.
        path: of its records.
        num_layers: of the model.
        num_seeds: replicas.
        num_updates: of each, in one measurement.
        batch_size: records of an update of one seed.
        goal: the ratio aimed at.
        num_epochs: passes over the records that ``num_updates`` make.
        platform: "cpu" or "gpu".
        compute_dtype: of what is measured; the comparison is made in float32.
        tolerance: of the losses of the first updates, relative to the largest.
        has_dropout: whether what is measured trains as the recipe does; else the comparison's program serves again.
    """

    name: str
    path: str
    num_layers: int
    num_seeds: int
    num_updates: int
    batch_size: int = 32
    goal: float | None = None
    num_epochs: int = 1
    platform: str = "cpu"
    compute_dtype: str = "float32"
    tolerance: float = 2e-5
    has_dropout: bool = True

    @property
    def num_records(self) -> int:
        """Records in memory."""
        return self.num_updates * self.batch_size // self.num_epochs

    @property
    def torch_device(self) -> str:
        """Where the peer works."""
        return "cuda" if self.platform == "gpu" else "cpu"

    def config(self, *, is_measured: bool) -> Config:
        """The default configuration on these records; that of the comparison where nothing is measured."""
        config = default.get_config()
        config.data.path = self.path
        config.data.batch_size = self.batch_size
        config.model.num_layers = self.num_layers
        config.train.num_epochs = 10_000
        config.model.compute_dtype = self.compute_dtype if is_measured else "float32"
        for dotted, value in ({} if is_measured and self.has_dropout else agreement.CHANGES).items():
            group, _, key = dotted.partition("__")
            config[group][key] = value
        return parse(config.to_dict())


CASES = (
    Case("cpu, 8 seeds x 20 updates, batch 32", "", num_layers=4, num_seeds=8, num_updates=20, goal=1.0),
    # TF32 rounds the comparison's products.
    Case(
        "gpu, 10 seeds x 2 epochs, bfloat16",
        "",
        num_layers=4,
        num_seeds=10,
        num_updates=220,
        goal=20.0,
        num_epochs=2,
        platform="gpu",
        compute_dtype="bfloat16",
        tolerance=2e-3,
    ),
)
QUICK_CASES = (
    Case(
        "cpu, 2 seeds x 3 updates, batch 4, 1 layer, no dropout (quick)",
        "",
        num_layers=1,
        num_seeds=2,
        num_updates=3,
        batch_size=4,
        has_dropout=False,
    ),
)


class OurRun:
    """All seeds as one program."""

    def __init__(self, case: Case, config: Config):
        dataset, mesh = Dataset.open(config.data.path), make_evaluation_mesh()
        split = dataset.split("train")
        seeds = list(range(case.num_seeds))
        self._replicas = Replicas(config, {"seed": seeds}, tasks_of(config, dataset), split, mesh)
        table = read_device_split(split, config, input_pipeline.ranking_statistics(dataset, config))
        self._table = jax.device_put(table, replicated(mesh))
        self._state, self._step = self._replicas.initial_state({}), 0
        # One plan's size, so that the comparison and the measurement are one program.
        self._most = max(agreement.NUM_UPDATES, case.num_updates)

    def update(self, num_updates: int) -> np.ndarray:
        """The next updates of every seed; their losses ``[seeds, updates]``."""
        plan = self._replicas.plan(self._step, self._step + num_updates, self._most)
        self._state, report = self._replicas.update(self._state, self._table, plan, num_updates)
        self._step += num_updates
        losses: np.ndarray = jax.device_get(report.loss)[:, :num_updates]
        return losses


def our_side(case: Case) -> rounds.Ready:
    """One device per core, in a process set up as ``train.py`` does."""
    one_device_per_core()
    keep_freed_memory()
    run = OurRun(case, case.config(is_measured=False))
    evidence = run.update(agreement.NUM_UPDATES)
    if case.has_dropout:
        run = OurRun(case, case.config(is_measured=True))
    run.update(case.num_updates)

    def measure() -> float:
        started = time.perf_counter()
        losses = run.update(case.num_updates)
        return _seconds_since(started, losses)

    measure()
    settings = {
        "devices": f"{jax.device_count()} {jax.devices()[0].device_kind}",
        **rounds.versions("jax", "jaxlib", "flax", "optax"),
    }
    return rounds.Ready(measure, evidence, settings)


def eager_side(case: Case) -> rounds.Ready:
    """The loop over seeds, run operation by operation."""
    return _torch_side(case, mode=None)


def compiled_side(case: Case) -> rounds.Ready:
    """The same, forward and backward pass compiled by TorchInductor."""
    # "max-autotune" records CUDA graphs, of which those of ten models would not share memory.
    return _torch_side(case, mode="max-autotune-no-cudagraphs" if case.platform == "gpu" else "default")


class TorchRun:
    """One seed in PyTorch, on the device of its records."""

    def __init__(self, config: Config, records: dict[str, Any], num_batches: int, mode: str | None):
        import torch

        from benchmarks import torch_mmei

        dataset = Dataset.open(config.data.path)
        jax_model = build_model(config, dataset)
        parameters = jax.device_get(jax.jit(lambda: initialize(jax_model, config.seed))()["params"])
        model = torch_mmei.TorchMmei(config, tasks_of(config, dataset))
        torch_mmei.load_parameters(model, parameters)
        self._device = records["emotion"].device
        self._model = model.to(self._device).train()
        self._optimizer = torch_mmei.make_optimizer(self._model, config, fused=True)
        self._forward = self._model if mode is None else torch.compile(self._model, mode=mode, fullgraph=True)
        size, num_records = config.data.batch_size, dataset.split("train").num_records
        num_steps = input_pipeline.num_steps(num_records, size, config.train.num_epochs)
        schedule = make_schedule(config.optimizer, num_steps=num_steps, steps_per_epoch=num_records / size)
        self._rates = np.asarray([schedule(index) for index in range(num_batches)])
        self._order = input_pipeline.ShuffledOrder(
            num_records=num_records, batch_size=size, num_batches=num_steps, seed=config.seed
        )
        self._records, self._config, self._step = records, config, 0

    def update(self, num_updates: int) -> np.ndarray:
        """The next updates; their losses."""
        import torch

        losses = []
        is_bfloat16 = self._config.model.compute_dtype == "bfloat16"
        for _ in range(num_updates):
            index = torch.from_numpy(np.asarray(self._order[self._step], np.int64)).to(self._device)
            batch = _taken(self._records, index)
            for group in self._optimizer.param_groups:
                group["lr"] = float(self._rates[min(self._step, len(self._rates) - 1)])
            self._optimizer.zero_grad(set_to_none=True)
            with torch.autocast(self._device.type, torch.bfloat16, enabled=is_bfloat16):
                loss = self._forward(batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._config.optimizer.clip_norm)
            self._optimizer.step()
            losses.append(loss.detach())
            self._step += 1
        found: np.ndarray = torch.stack(losses).float().cpu().numpy()
        return found


def _taken(records: dict[str, Any], index: Any) -> dict[str, Any]:
    return {name: _taken(value, index) if isinstance(value, dict) else value[index] for name, value in records.items()}


def _torch_side(case: Case, *, mode: str | None) -> rounds.Ready:
    import torch

    from benchmarks import torch_mmei

    # What train.py does for us serves the peer too.
    keep_freed_memory()
    config, compared = case.config(is_measured=True), case.config(is_measured=False)
    dataset = Dataset.open(config.data.path)
    split = dataset.split("train")
    reader = BatchReader(split, config, input_pipeline.ranking_statistics(dataset, config))
    everything = reader.read(np.arange(split.num_records), padded_layouts(config.data, split.num_records)[-1])
    records = torch_mmei.to_torch(everything, case.torch_device)
    torch.set_float32_matmul_precision("high" if case.platform == "gpu" else "highest")
    torch.manual_seed(config.seed)

    def run(base: Config, seed: int, mode: str | None) -> TorchRun:
        return TorchRun(replace(base, seed=seed), records, case.num_updates, mode)

    seeds = range(case.num_seeds)
    evidence = np.stack([run(compared, seed, None).update(agreement.NUM_UPDATES) for seed in seeds])
    runs = [run(config, seed, mode) for seed in seeds]

    def measure() -> float:
        started = time.perf_counter()
        losses = np.stack([one.update(case.num_updates) for one in runs])
        return _seconds_since(started, losses)

    measure()
    settings = {
        "device": torch.cuda.get_device_name() if case.platform == "gpu" else "cpu",
        "threads": torch.get_num_threads(),
        "compile_mode": mode or "none",
        "attention": "scaled_dot_product_attention",
        "optimizer": "AdamW(fused=True)",
        **rounds.versions("torch"),
    }
    return rounds.Ready(measure, evidence, settings)


def _seconds_since(started: float, losses: np.ndarray) -> float:
    seconds = time.perf_counter() - started
    if not np.isfinite(losses).all():
        raise RuntimeError(f"losses {losses} while measuring")
    return seconds


SIDES = {
    rounds.OURS: "benchmarks.replicas:our_side",
    EAGER: "benchmarks.replicas:eager_side",
    COMPILED: "benchmarks.replicas:compiled_side",
}


def measure_case(case: Case, peers: Sequence[str], *, num_rounds: int, is_quick: bool = False) -> list[dict[str, Any]]:
    """One entry for each peer.

    Raises:
        rounds.SidesDiffer: the losses of the first updates differ.
    """
    # Both would take most of a GPU's memory beforehand; the peers' processes use JAX for the weights only.
    theirs = {"JAX_PLATFORMS": "cpu"}
    ours = theirs if case.platform == "cpu" else {"JAX_PLATFORMS": "cuda", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.4"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "records"
        longest = default.get_config().data.max_tokens
        lengths = np.tile([longest.vision[-1], longest.audio[-1], longest.text[-1]], (case.num_records, 1))
        write_records(path, lengths)
        timing = rounds.measure_sides(
            {name: target for name, target in SIDES.items() if name in (rounds.OURS, *peers)},
            replace(case, path=str(path)),
            num_rounds=num_rounds,
            agree=lambda ours, theirs: rounds.differ_by(ours, theirs, relative=case.tolerance),
            environment={name: ours if name == rounds.OURS else theirs for name in SIDES},
            is_quick=is_quick,
        )
    num_records = case.num_seeds * case.num_records * case.num_epochs
    return [
        rounds.case_record(
            case.name,
            timing,
            peer,
            goal=case.goal,
            our_records_per_second=round(num_records / timing.median_seconds(rounds.OURS), 2),
            peer_records_per_second=round(num_records / timing.median_seconds(peer), 2),
        )
        for peer in peers
    ]


def main() -> None:
    """Measures, prints a table, and a JSON line at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller model, eager torch only, within a minute")
    parser.add_argument("--num_rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--results", help="JSON file for the figures, date, versions and command")
    arguments = parser.parse_args()
    peers = [EAGER] if arguments.quick else [EAGER, COMPILED]
    num_rounds = 2 if arguments.quick else arguments.num_rounds
    entries: list[dict[str, Any]] = []
    for case in rounds.chosen_cases(parser, QUICK_CASES if arguments.quick else CASES, arguments.case):
        reason = rounds.missing_gpu() if case.platform == "gpu" else ""
        if reason:
            entries.extend(rounds.unmeasured(case.name, peer, reason, goal=case.goal) for peer in peers)
            continue
        found = measure_case(case, peers, num_rounds=num_rounds, is_quick=arguments.quick)
        entries.extend(found)
        for entry in found:
            print(
                f"{case.name}: {entry['our_records_per_second']:.1f} records/s against {entry['peer']} "
                f"{entry['peer_records_per_second']:.1f}, {rounds.spread(entry)}",
                flush=True,
            )
            print(f"  ours: {entry['our_settings']}\n  {entry['peer']}: {entry['peer_settings']}", flush=True)
    rounds.print_summary("replicas", entries, arguments.results, versions=rounds.versions("jax", "torch"))


if __name__ == "__main__":
    main()
