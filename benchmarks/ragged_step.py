"""How many more records a second does training take in, when records of ragged lengths are packed and not padded?

    python -m benchmarks.ragged_step [--quick] [--num_rounds=5] [--peers=eager|compiled] [--results=FILE.json]

The model, the losses and the update are ``fusion_step``'s: d = 256, 4 layers, batch 32, at most 16 vision, 50 audio and
32 text tokens of 768 features, dropout as the recipe trains. The lengths are drawn from a table of MELD's utterances
(``utterance_lengths``). We train through the package's own input pipeline: reading memory-mapped shards, packing and
placing are part of what is measured. The peers' batches, of the same records in the same order, lie ready in memory,
padded as is usual, each modality to the longest of the batch; and, for a second figure, to the maxima. Each measurement
goes on to other batches, of 32 in all, which then come again. No side compiles after its warm-up. Before anything is
measured, updates without dropout must give the same losses and gradients on all sides (``agreement``).
"""

import argparse
import dataclasses
import itertools
import json
import tempfile
import time
from collections import Counter, deque
from pathlib import Path

import jax
import numpy as np

from benchmarks import agreement, fusion_cases, fusion_step, rounds
from benchmarks.random_records import write_records
from benchmarks.utterance_lengths import draw_lengths
from configs import default
from mmei_jax import input_pipeline
from mmei_jax.batching import BatchReader
from mmei_jax.compilations import CompilationCounter
from mmei_jax.config import Config, parse
from mmei_jax.host_memory import keep_freed_memory
from mmei_jax.optimizer import make_optimizer, make_schedule
from mmei_jax.packing import padded_layouts
from mmei_jax.records import Dataset
from mmei_jax.sharding import batch_sharding, make_mesh
from mmei_jax.state import build_model, initial_state, state_shapes, variable_shapes
from mmei_jax.train_step import jit_train_step, make_train_step
from mmei_jax.training import MAX_UPDATES_IN_FLIGHT
from mmei_jax.types import Batch, TokenSequence

# Four mean records to a row, and room for more where they are short.
RECORDS_PER_ROW, TOKENS_PER_ROW = 8, {"vision": 28, "audio": 66, "text": 60}
EAGER_LONGEST, EAGER_MAXIMA = "torch eager, padded to the batch's longest", "torch eager, padded to the maxima"
COMPILED_LONGEST, COMPILED_MAXIMA = "torch compiled, padded to the longest", "torch compiled, padded to the maxima"
GOAL = 1.5


@dataclasses.dataclass(frozen=True)
class Case:
    """One workload.

    Attributes:
        path: of its records.
        num_layers: of the model.
        num_updates: of one measurement.
        num_batches: different batches; then they come again.
        num_rows: of packed batches; each is one more shape to compile.
    """

    path: str
    num_layers: int
    num_updates: int
    num_batches: int
    num_rows: tuple[int, ...]

    def config(self, *, is_packed: bool, is_measured: bool) -> Config:
        """The default configuration on these records; that of the comparison where nothing is measured."""
        config = default.get_config()
        config.data.path = self.path
        config.model.num_layers = self.num_layers
        config.train.num_epochs = 10_000
        if is_packed:
            config.data.packing.records_per_row, config.data.packing.num_rows = RECORDS_PER_ROW, self.num_rows
            config.data.packing.tokens_per_row.update(TOKENS_PER_ROW)
        for dotted, value in ({} if is_measured else agreement.CHANGES).items():
            group, _, key = dotted.partition("__")
            config[group][key] = value
        return parse(config.to_dict())


CASE = Case("", num_layers=4, num_updates=16, num_batches=32, num_rows=(8, 9, 11))
QUICK_CASE = Case("", num_layers=1, num_updates=2, num_batches=2, num_rows=(11,))


class OurRun:
    """The package's step on the first batches of its own pipeline, over and over."""

    def __init__(self, config: Config, num_batches: int):
        dataset, mesh = Dataset.open(config.data.path), make_mesh(config)
        model = build_model(config, dataset)
        schedule = make_schedule(config.optimizer, num_steps=fusion_step.NUM_SCHEDULED_UPDATES, steps_per_epoch=1.0)
        optimizer = make_optimizer(config.optimizer, variable_shapes(model)["params"], schedule)
        self.state = initial_state(model, optimizer, mesh, seed=config.seed, statistics={})
        step = make_train_step(model, optimizer, config, None)
        self._step = jit_train_step(step, state_shapes(model, optimizer, mesh))
        self._batches = input_pipeline.train_iterator(dataset, config, batch_sharding(mesh))
        self._start, self._num_batches, self._num_taken = self._batches.get_state(), num_batches, 0

    def update(self) -> jax.Array:
        """One update on the next batch; its loss."""
        self.state, report = self._step(self.state, self._next())
        return report.loss

    def evidence(self) -> agreement.Evidence:
        """Updates on the first batch, over and over."""
        batch = self._next()
        return fusion_step.our_evidence(self, lambda state: self._step(state, batch))

    def compile(self) -> None:
        """Makes two updates with every shape."""
        num_made: Counter[tuple[int, ...]] = Counter()
        for _ in range(self._num_batches):
            batch = self._next()
            shape = batch.audio.features.shape
            if num_made[shape] < 2:
                num_made[shape] += 1
                self.state, report = self._step(self.state, batch)
                report.loss.block_until_ready()

    def _next(self) -> Batch:
        # The next epoch would have these records in another order, unlike the peers.
        if self._num_taken == self._num_batches:
            self._batches.set_state(self._start)
            self._num_taken = 0
        self._num_taken += 1
        return next(self._batches)


def our_side(case: Case) -> rounds.Ready:
    """Packed rows, in a process set up as ``train.py`` does."""
    keep_freed_memory()
    evidence = OurRun(case.config(is_packed=True, is_measured=False), case.num_batches).evidence()
    config = case.config(is_packed=True, is_measured=True)
    run = OurRun(config, case.num_batches)
    run.compile()
    compilations = CompilationCounter()

    def measure() -> float:
        started = time.perf_counter()
        in_flight: deque[jax.Array] = deque()
        for _ in range(case.num_updates):
            in_flight.append(run.update())
            if len(in_flight) > MAX_UPDATES_IN_FLIGHT:
                in_flight.popleft().block_until_ready()
        loss = float(in_flight[-1])
        seconds = time.perf_counter() - started
        if compilations.count or not np.isfinite(loss):
            raise RuntimeError(f"{compilations.count} compilations after warm-up, loss {loss}")
        return seconds

    split = Dataset.open(config.data.path).split("train")
    settings = {
        "records_per_row": RECORDS_PER_ROW,
        "token_places": input_pipeline.token_use_line(split, config),
        **rounds.versions("jax", "jaxlib"),
    }
    return rounds.Ready(measure, evidence, settings)


def eager_longest_side(case: Case) -> rounds.Ready:
    """The usual collate, operation by operation."""
    return _torch_side(case, is_longest=True, mode=None)


def eager_maxima_side(case: Case) -> rounds.Ready:
    """One static shape, operation by operation."""
    return _torch_side(case, is_longest=False, mode=None)


def compiled_longest_side(case: Case) -> rounds.Ready:
    """The usual collate, compiled once for all lengths."""
    return _torch_side(case, is_longest=True, mode="default")


def compiled_maxima_side(case: Case) -> rounds.Ready:
    """One static shape, compiled."""
    return _torch_side(case, is_longest=False, mode="default")


def padded_batches(case: Case, config: Config, *, is_longest: bool) -> list[Batch]:
    """The batches of our run's records in the same order, one record a row, on the host."""
    dataset = Dataset.open(config.data.path)
    split = dataset.split("train")
    reader = BatchReader(split, config, input_pipeline.ranking_statistics(dataset, config))
    size = config.data.batch_size
    order = input_pipeline.ShuffledOrder(
        num_records=split.num_records, batch_size=size, num_batches=case.num_batches, seed=config.seed
    )
    batches = [reader.read(order[step], padded_layouts(config.data, size)[-1]) for step in range(case.num_batches)]
    return [batch.replace(**_to_longest(batch)) for batch in batches] if is_longest else batches


def _to_longest(batch: Batch) -> dict[str, TokenSequence]:
    cut = {}
    for name, sequence in batch.sequences().items():
        longest = int(sequence.segment_ids.sum(axis=1).max())
        cut[name] = TokenSequence(
            np.ascontiguousarray(sequence.features[:, :longest]),
            np.ascontiguousarray(sequence.segment_ids[:, :longest]),
        )
    return cut


def _torch_side(case: Case, *, is_longest: bool, mode: str | None) -> rounds.Ready:
    import torch

    from benchmarks import torch_mmei

    # What train.py does for us serves the peer too.
    keep_freed_memory()
    config = case.config(is_packed=False, is_measured=True)
    compared = case.config(is_packed=False, is_measured=False)
    batches = padded_batches(case, config, is_longest=is_longest)
    tensors = [torch_mmei.to_torch(batch, "cpu") for batch in batches]
    torch.manual_seed(config.seed)
    # The peer's model is that of fusion_step's cases, from the same parameters as ours.
    peer = fusion_cases.Case("ragged", {}, changes={"model__num_layers": case.num_layers})
    evidence = fusion_step.TorchRun(peer, compared, tensors, "cpu", None).evidence()
    update = fusion_step.TorchRun(peer, config, tensors, "cpu", mode).update
    for index in range(3):
        update(index)
    turn = itertools.count()

    def measure() -> float:
        started = time.perf_counter()
        for _ in range(case.num_updates):
            loss = update(next(turn))
        value = float(loss)
        seconds = time.perf_counter() - started
        if not np.isfinite(value):
            raise RuntimeError(f"loss {value}")
        return seconds

    tokens = sum(int((sequence.segment_ids > 0).sum()) for batch in batches for sequence in batch.sequences().values())
    places = sum(sequence.segment_ids.size for batch in batches for sequence in batch.sequences().values())
    settings = {
        "token_places": f"{tokens / places:.0%} used",
        "threads": torch.get_num_threads(),
        "compile_mode": mode or "none",
        **rounds.versions("torch"),
    }
    return rounds.Ready(measure, evidence, settings)


SIDES = {
    rounds.OURS: "benchmarks.ragged_step:our_side",
    EAGER_LONGEST: "benchmarks.ragged_step:eager_longest_side",
    EAGER_MAXIMA: "benchmarks.ragged_step:eager_maxima_side",
    COMPILED_LONGEST: "benchmarks.ragged_step:compiled_longest_side",
    COMPILED_MAXIMA: "benchmarks.ragged_step:compiled_maxima_side",
}
GOALS = {EAGER_LONGEST: GOAL, EAGER_MAXIMA: None, COMPILED_LONGEST: GOAL, COMPILED_MAXIMA: None}


def main() -> None:
    """Measures, prints a table, and a JSON line at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1 layer, one peer, 2 rounds: within a minute")
    parser.add_argument("--num_rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--peers", default="eager", choices=("eager", "compiled"), help="default: %(default)s")
    parser.add_argument("--results", help="JSON file for the figures, date, versions and command")
    arguments = parser.parse_args()
    peers = [name for name in GOALS if f"torch {arguments.peers}" in name][: 1 if arguments.quick else None]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "records"
        case = QUICK_CASE if arguments.quick else CASE
        lengths = draw_lengths(32 * case.num_batches, seed=0, max_tokens=(16, 50, 32))
        write_records(path, lengths)
        case = dataclasses.replace(case, path=str(path))
        timing = rounds.measure_sides(
            {name: SIDES[name] for name in (rounds.OURS, *peers)},
            case,
            num_rounds=2 if arguments.quick else arguments.num_rounds,
            agree=lambda ours, theirs: agreement.differ(ours, theirs, tolerance=2e-5),
            environment={name: {"JAX_PLATFORMS": "cpu"} for name in (rounds.OURS, *peers)},
            is_quick=arguments.quick,
        )
    num_records = 32 * case.num_updates
    name = "cpu, batch 32, lengths of utterances" + (", 1 layer (quick)" if arguments.quick else "")
    entries = [
        rounds.case_record(
            name,
            timing,
            peer,
            goal=None if arguments.quick else GOALS[peer],
            our_records_per_second=round(num_records / timing.median_seconds(rounds.OURS), 1),
            peer_records_per_second=round(num_records / timing.median_seconds(peer), 1),
        )
        for peer in peers
    ]
    for entry in entries:
        print(
            f"{entry['our_records_per_second']} records/s packed against {entry['peer']} "
            f"{entry['peer_records_per_second']}, {rounds.spread(entry)}\n"
            f"  ours: {json.dumps(entry['our_settings'])}\n  {entry['peer']}: {json.dumps(entry['peer_settings'])}",
            flush=True,
        )
    rounds.print_summary("ragged_step", entries, arguments.results, versions=rounds.versions("jax", "torch"))


if __name__ == "__main__":
    main()
