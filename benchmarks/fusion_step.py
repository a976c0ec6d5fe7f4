"""Is a train step of MMEI as fast as the same step in PyTorch?

    python -m benchmarks.fusion_step [--quick] [--num_rounds=5] [--results=benchmarks/results/DATE_fusion_step.json]

The step is the package's own, at the sizes of ``configs/default.py`` (d = 256, 4 layers, 16 vision, 50 audio and 32 text
tokens of 768 features, batch 32): standardisation, Eq. 1-6 with the emotion, intent and ranking heads, modality dropout and
dropout as the recipe trains, backward pass, clipping, AdamW with schedule, and the report to the host. Batches lie on the
device; reading them is ``input_pipeline``'s question. The peer (``torch_mmei``) starts from the same weights. Before
anything is measured, five updates without dropout must give the same losses on both sides.
"""

import argparse
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import rounds
from configs import default
from mmei_jax.config import Config, parse
from mmei_jax.models.mmei import Mmei, ModalityInput, Tasks
from mmei_jax.optimizer import make_optimizer, make_schedule
from mmei_jax.sharding import batch_sharding, make_mesh
from mmei_jax.state import initial_state, state_shapes, variable_shapes
from mmei_jax.train_step import TrainStep, jit_train_step, make_train_step
from mmei_jax.training import MAX_UPDATES_IN_FLIGHT
from mmei_jax.types import MODALITIES, Batch, Items, Label, RankingTargets, TokenSequence, TrainState

NUM_COMPARED_UPDATES = 5
NUM_BATCHES = 4
NUM_EMOTIONS, NUM_INTENTS, NUM_KINDS, NUM_ITEMS = 7, 4, 4, 2000
# Updates of the run whose schedule both sides follow.
NUM_SCHEDULED_UPDATES = 10_000
EAGER, COMPILED = "torch eager", "torch compiled"


@dataclass(frozen=True)
class Case:
    """One workload, and what is hoped for.

    Attributes:
        name: in the table.
        goals: by peer, the ratio aimed at.
        batch_size: records.
        changes: by ``"group__key"``, what differs from ``configs/default.py``.
        feature_dim: features of a token and of an item.
        platform: "cpu" or "gpu".
        updates_per_dispatch: updates that one call of our program makes.
        num_updates: updates of one measurement, a multiple of ``updates_per_dispatch``.
        tolerance: largest relative difference of the compared losses.
    """

    name: str
    goals: Mapping[str, float | None]
    batch_size: int = 32
    changes: Mapping[str, Any] = field(default_factory=dict)
    feature_dim: int = 768
    platform: str = "cpu"
    updates_per_dispatch: int = 1
    num_updates: int = 8
    tolerance: float = 2e-5

    def config(self, **changes: Any) -> Config:
        """The configuration, with further changes."""
        config = default.get_config()
        config.data.batch_size = self.batch_size
        for dotted, value in {**self.changes, **changes}.items():
            group, _, key = dotted.partition("__")
            config[group][key] = value
        return parse(config.to_dict())


WITHOUT_DROPOUT = {"model__dropout_rate": 0.0, "model__modality_dropout_rate": 0.0}
BFLOAT16 = {"model__compute_dtype": "bfloat16"}
CASES = (
    Case("cpu, batch 32, as the recipe trains", {EAGER: 1.0, COMPILED: 1.0}),
    Case("cpu, batch 32, no dropout", {EAGER: None, COMPILED: None}, changes=WITHOUT_DROPOUT),
)
# The same step at a size that ends within a minute, compilation included.
QUICK_CASES = (
    Case(
        "cpu, batch 8, 1 layer (quick)", {EAGER: None}, batch_size=8, changes={"model__num_layers": 1}, num_updates=10
    ),
)
GPU_CASES = tuple(
    Case(
        f"gpu, batch {batch_size}, bfloat16",
        {EAGER: None, COMPILED: 1.5},
        batch_size=batch_size,
        changes=BFLOAT16,
        platform="gpu",
        updates_per_dispatch=8,
        num_updates=num_updates,
        tolerance=2e-2,
    )
    for batch_size, num_updates in ((32, 400), (1024, 80))
)


def make_tasks(case: Case, config: Config) -> Tasks:
    """All tasks of the default configuration, on features of one size."""
    lengths = config.data.max_tokens
    inputs = {name: ModalityInput(case.feature_dim, getattr(lengths, name)[-1]) for name in MODALITIES}
    return Tasks(
        **inputs,
        emotion="softmax",
        num_emotions=NUM_EMOTIONS,
        num_intents=NUM_INTENTS,
        has_ranking=True,
        item_dim=case.feature_dim,
        num_kinds=NUM_KINDS,
        learns_task_weights=False,
    )


def make_batches(case: Case, tasks: Tasks) -> list[Batch]:
    """Random records on the host, every token there and every record labelled; the same for every side."""
    generator = np.random.default_rng(0)
    size = case.batch_size

    def batch() -> Batch:
        def label(num_classes: int) -> Label:
            return Label(generator.integers(0, num_classes, size).astype(np.int32), np.ones(size, bool))

        sequences = {
            name: TokenSequence(
                generator.normal(size=(size, given.max_tokens, given.dim)).astype(np.float32),
                np.ones((size, given.max_tokens), np.int32),
            )
            for name, given in tasks.inputs().items()
        }
        index = generator.integers(0, NUM_ITEMS, size).astype(np.int32)
        ranking = RankingTargets(
            positive=Items(
                generator.normal(size=(size, case.feature_dim)).astype(np.float32),
                (index % NUM_KINDS).astype(np.int32),
            ),
            positive_index=index,
            has_positive=np.ones(size, bool),
            log_sampling_probability=np.log(generator.uniform(1e-4, 1e-2, size)).astype(np.float32),
            relevant_index=np.zeros((size, 1), np.int32),
        )
        return Batch(
            **sequences,
            is_record=np.ones(size, bool),
            record_index=np.arange(size, dtype=np.int32),
            emotion=label(NUM_EMOTIONS),
            intent=label(NUM_INTENTS),
            ranking=ranking,
        )

    return [batch() for _ in range(NUM_BATCHES)]


class OurRun:
    """The package's step on these batches, from the seed's weights."""

    def __init__(self, case: Case, config: Config, batches: Sequence[Batch]):
        tasks, self.mesh = make_tasks(case, config), make_mesh(config)
        self.model = Mmei(config.model, tasks)
        schedule = make_schedule(config.optimizer, num_steps=NUM_SCHEDULED_UPDATES, steps_per_epoch=1.0)
        optimizer = make_optimizer(config.optimizer, variable_shapes(self.model)["params"], schedule)
        self.state = initial_state(self.model, optimizer, self.mesh, seed=config.seed, statistics={})
        self.step: TrainStep = make_train_step(self.model, optimizer, config, None)
        self.jitted = jit_train_step(self.step, state_shapes(self.model, optimizer, self.mesh))
        self.batches = [jax.device_put(batch, batch_sharding(self.mesh)) for batch in batches]

    def update(self, index: int) -> jax.Array:
        """One update; its loss."""
        self.state, report = self.jitted(self.state, self.batches[index % NUM_BATCHES])
        return report.loss

    def dispatches(self, num_updates: int) -> Callable[[], jax.Array]:
        """A function that makes ``num_updates`` updates in one call, and gives their last loss."""
        order = [self.batches[index % NUM_BATCHES] for index in range(num_updates)]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *order)

        def several(state: TrainState, batches: Batch) -> tuple[TrainState, jax.Array]:
            state, reports = jax.lax.scan(self.step, state, batches)
            return state, reports.loss[-1]

        compiled = jax.jit(several, donate_argnums=0)

        def call() -> jax.Array:
            self.state, loss = compiled(self.state, stacked)
            return loss

        return call


def our_side(case: Case) -> rounds.Ready:
    """Our step, compiled and warm."""
    config = case.config()
    batches = make_batches(case, make_tasks(case, config))
    rate = matmul_rate(config.model.compute_dtype)
    compared = OurRun(case, case.config(**WITHOUT_DROPOUT), batches)
    evidence = np.array([float(compared.update(index)) for index in range(NUM_COMPARED_UPDATES)])
    run = OurRun(case, config, batches)
    num_operations = matmul_operations(jax.make_jaxpr(run.step)(run.state, run.batches[0]).jaxpr)
    if case.updates_per_dispatch > 1:
        dispatch = run.dispatches(case.updates_per_dispatch)
    else:
        turn = iter(range(10**9))
        dispatch = lambda: run.update(next(turn))  # noqa: E731

    def measure() -> float:
        started = time.perf_counter()
        in_flight: deque[jax.Array] = deque()
        for _ in range(case.num_updates // case.updates_per_dispatch):
            in_flight.append(dispatch())
            if len(in_flight) > MAX_UPDATES_IN_FLIGHT:
                in_flight.popleft().block_until_ready()
        loss = float(in_flight[-1])
        seconds = time.perf_counter() - started
        if not np.isfinite(loss):
            raise RuntimeError(f"loss {loss}")
        return seconds

    measure()
    settings = {
        "device": jax.devices()[0].device_kind,
        "updates_per_dispatch": case.updates_per_dispatch,
        "matmul_gflop_per_update": round(num_operations / 1e9, 2),
        "measured_matmul_gflop_per_second": round(rate / 1e9, 1),
        **rounds.versions("jax", "jaxlib", "flax", "optax"),
    }
    return rounds.Ready(measure, evidence, settings)


def eager_side(case: Case) -> rounds.Ready:
    """The peer, run operation by operation."""
    return _torch_side(case, is_compiled=False)


def compiled_side(case: Case) -> rounds.Ready:
    """The peer, its forward and backward pass compiled by TorchInductor."""
    return _torch_side(case, is_compiled=True)


def _torch_side(case: Case, *, is_compiled: bool) -> rounds.Ready:
    import torch

    from benchmarks import torch_mmei

    device = "cuda" if case.platform == "gpu" else "cpu"
    config = case.config()
    batches = make_batches(case, make_tasks(case, config))
    tensors = [torch_mmei.to_torch(batch, device) for batch in batches]
    torch.manual_seed(config.seed)
    mode = ("max-autotune" if case.platform == "gpu" else "default") if is_compiled else None

    def start(config: Config) -> Callable[[int], Any]:
        return _torch_updates(case, config, tensors, device, mode)

    update = start(case.config(**WITHOUT_DROPOUT))
    evidence = np.array([float(update(index)) for index in range(NUM_COMPARED_UPDATES)])
    update = start(config)
    turn = iter(range(10**9))

    def measure() -> float:
        started = time.perf_counter()
        for _ in range(case.num_updates):
            loss = update(next(turn))
        value = float(loss)  # waits for the device
        seconds = time.perf_counter() - started
        if not np.isfinite(value):
            raise RuntimeError(f"loss {value}")
        return seconds

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


def _torch_updates(
    case: Case, config: Config, batches: Sequence[Mapping[str, Any]], device: str, mode: str | None
) -> Callable[[int], Any]:
    """A function that makes one update of the peer, from the seed's weights, and gives its loss."""
    import torch

    from benchmarks import torch_mmei

    tasks = make_tasks(case, config)
    model = torch_mmei.TorchMmei(config, tasks)
    variables = jax.jit(lambda: initialize(Mmei(config.model, tasks), config.seed))()
    torch_mmei.load_parameters(model, variables["params"])
    model = model.to(device).train()
    optimizer = torch_mmei.make_optimizer(model, config, fused=True)
    schedule = make_schedule(config.optimizer, num_steps=NUM_SCHEDULED_UPDATES, steps_per_epoch=1.0)
    rates = np.asarray([schedule(index) for index in range(NUM_COMPARED_UPDATES)])
    is_half = config.model.compute_dtype == "bfloat16"
    forward = model if mode is None else torch.compile(model, mode=mode, fullgraph=True)

    def update(index: int) -> torch.Tensor:
        for group in optimizer.param_groups:
            group["lr"] = float(rates[min(index, len(rates) - 1)])
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=is_half):
            loss = forward(batches[index % NUM_BATCHES])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
        optimizer.step()
        return loss.detach()

    return update
