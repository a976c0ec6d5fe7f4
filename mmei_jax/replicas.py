"""Many runs of one model as one program: ``vmap`` over replicas of state and record order.

A replica is an ordinary run in every respect but that its steps are compiled together with those of others: the same
update (:mod:`mmei_jax.train_step`), the same order of records, the same generators. Replicas differ in their seed and
in the numbers of :data:`VARIED_KEYS`. The split lies on the devices (:mod:`mmei_jax.device_split`), several updates go
out in one dispatch, and replicas are spread over the devices without any communication between them.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.extend.core import ClosedJaxpr
from jax.sharding import Mesh
from jaxtyping import Array, Float

from mmei_jax.config import Config
from mmei_jax.data_statistics import class_log_priors
from mmei_jax.device_split import BatchPlan, DeviceSplit, Planner, gather_batch
from mmei_jax.input_pipeline import ShuffledOrder, num_steps
from mmei_jax.models.mmei import Tasks
from mmei_jax.optimizer import make_optimizer, make_schedule
from mmei_jax.records import Split
from mmei_jax.sharding import batch_sharding, spread_over
from mmei_jax.state import build_model_for, initialize, variable_shapes, with_encoders, with_statistics
from mmei_jax.train_step import make_train_step, step_compiler_options
from mmei_jax.types import InputError, TrainState

# Numbers in which replicas may differ; all others are part of the one program.
VARIED_KEYS = (
    "seed",
    "optimizer.learning_rate",
    "optimizer.weight_decay",
    "model.dropout_rate",
    "model.modality_dropout_rate",
    "loss.recognition_weight",
    "loss.ranking_weight",
    "loss.temperature",
)


@struct.dataclass
class ReplicaState:
    """Everything that training replicas changes; every array has a leading axis of replicas.

    Attributes:
        train: the states.
        is_active: False for a replica that has stopped: its state stays as it is. A replica whose loss or gradient is
            not finite stops by itself, and its state is that before the dispatch in which it was not.
    """

    train: TrainState
    # Any, here and below: arrays, their shapes, and one replica's part of them.
    is_active: Any


@struct.dataclass
class ReplicaReport:
    """What a dispatch tells the host, which fetches it late.

    Attributes:
        loss: ``[replicas, steps]`` float32, Eq. 6; of a replica that has stopped, of updates that were not kept; 0 for
            steps of the plan that the dispatch left out.
        task_losses: by task, ``[replicas, steps]`` float32 means; the same.
        is_active: ``[replicas]`` after the last step.
    """

    loss: Any
    task_losses: dict[str, Any]
    is_active: Any


def replace_key(config: Config, key: str, value: Any) -> Config:
    """The configuration with one value replaced, which may be traced; nothing is checked."""
    group, _, name = key.rpartition(".")
    if not group:
        return dataclasses.replace(config, **{name: value})
    return dataclasses.replace(config, **{group: dataclasses.replace(getattr(config, group), **{name: value})})


class Replicas:
    """Replicas of one configuration, and the programs that train them.

    Args:
        config: what they share.
        varied: by key of :data:`VARIED_KEYS`, one value for each replica; with "seed" in any case.
        tasks: inputs and tasks of the model.
        split: training records.
        mesh: devices over which the replicas are spread; their number divides that of the replicas.
        class_weights: ``[emotions]`` float32 of the emotion loss, or None.

    Raises:
        InputError: a key cannot differ between replicas, or there is not one value for each.
    """

    def __init__(
        self,
        config: Config,
        varied: Mapping[str, Sequence[int | float]],
        tasks: Tasks,
        split: Split,
        mesh: Mesh,
        class_weights: Float[Array, "emotions"] | None = None,
    ) -> None:
        self.config, self.mesh, self._tasks, self._class_weights = config, mesh, tasks, class_weights
        self.seeds = [int(seed) for seed in varied["seed"]]
        for key, values in varied.items():
            if key not in VARIED_KEYS:
                raise InputError(f"{key!r} cannot differ between replicas; expected one of {', '.join(VARIED_KEYS)}")
            if len(values) != len(self.seeds):
                raise InputError(f"{len(values)} values of {key} for {len(self.seeds)} replicas: expected one for each")
        if len(self.seeds) % mesh.size:
            raise InputError(f"{len(self.seeds)} replicas: expected a multiple of the {mesh.size} devices")
        # A number that all share stays a constant of the program: a rate of 0 then costs nothing.
        shared = {key: values[0] for key, values in varied.items() if len(set(values)) == 1 and key != "seed"}
        for key, value in shared.items():
            self.config = replace_key(self.config, key, value)
        sharding = batch_sharding(mesh)
        self.settings = {
            key: jax.device_put(np.asarray(values, np.uint32 if key == "seed" else np.float32), sharding)
            for key, values in varied.items()
            if key not in shared
        }
        self.num_steps = num_steps(split.num_records, config.data.batch_size, config.train.num_epochs)
        self._steps_per_epoch = split.num_records / config.data.batch_size
        self.model = build_model_for(self.config, tasks)
        self._shapes = variable_shapes(self.model)
        self._log_priors = class_log_priors(split, config.loss)
        self._planner = Planner(split, config)
        self._orders = [
            ShuffledOrder(
                num_records=split.num_records,
                batch_size=config.data.batch_size,
                num_batches=self.num_steps,
                seed=seed,
            )
            for seed in self.seeds
        ]
        self._update = self._jit_update()
        self._programs: dict[Any, Any] = {}

    def initial_state(
        self,
        statistics: Mapping[str, tuple[np.ndarray, np.ndarray]],
        encoders: Mapping[str, dict[str, Any]] | None = None,
    ) -> ReplicaState:
        """Fresh states, each from its replica's seed.

        Args:
            statistics: by modality, ``[dim]`` mean and factor that standardise its features; the same for all.
            encoders: parameters that encoders begin with (:func:`mmei_jax.state.initial_encoders`).
        """
        # One after the other: the program is then the same for any number of replicas, and compiled once.
        fresh = jax.jit(self._fresh)
        states = [jax.device_get(fresh(np.uint32(seed), statistics, dict(encoders or {}))) for seed in self.seeds]
        state = ReplicaState(
            train=jax.tree.map(lambda *leaves: np.stack(leaves), *states), is_active=np.ones(len(states), bool)
        )
        placed: ReplicaState = jax.device_put(state, batch_sharding(self.mesh))
        return placed

    def plan(self, start: int, stop: int, size: int | None = None) -> BatchPlan:
        """What the updates from ``start`` to ``stop`` read: ``[replicas, steps, ...]``, on the devices.

        Args:
            start: the first update.
            stop: the one after the last.
            size: steps of the plan, so that shorter dispatches need no program of their own: the last batch again
                for those beyond ``stop``; None makes none.
        """
        placed: BatchPlan = jax.device_put(self._host_plan(start, stop, size), batch_sharding(self.mesh))
        return placed

    def _host_plan(self, start: int, stop: int, size: int | None) -> BatchPlan:
        steps = [min(step, stop - 1) for step in range(start, start + (size or stop - start))]
        batches = [order[step] for order in self._orders for step in steps]
        shape = (len(self.seeds), len(steps))
        plan: BatchPlan = jax.tree.map(lambda leaf: leaf.reshape(*shape, *leaf.shape[1:]), self._planner.plan(batches))
        return plan

    def update(
        self, state: ReplicaState, table: DeviceSplit, plan: BatchPlan, num_steps: int
    ) -> tuple[ReplicaState, ReplicaReport]:
        """The first ``num_steps`` updates of a plan; overwrites the state that it is given.

        Args:
            state: of all replicas.
            table: on the devices of the mesh.
            plan: of :meth:`plan`.
            num_steps: at most the steps of the plan. Another number is no other program.
        """
        done: tuple[ReplicaState, ReplicaReport] = self._program(state, table, plan)(
            state, self.settings, table, plan, np.int32(num_steps)
        )
        return done

    def peak_bytes(self, table: DeviceSplit, num_steps: int) -> int:
        """What the program of ``num_steps`` updates needs on each device, as the compiler counts it before it runs.

        Args:
            table: shapes with shardings.
            num_steps: updates of one dispatch.
        """
        state, plan = self.shapes(num_steps)
        found = self._program(state, table, plan).memory_analysis()
        return int(
            found.argument_size_in_bytes
            + found.output_size_in_bytes
            + found.temp_size_in_bytes
            - found.alias_size_in_bytes
        )

    def shapes(self, num_steps: int) -> tuple[ReplicaState, BatchPlan]:
        """Shapes of the states and of a plan of ``num_steps`` updates, with shardings; nothing is allocated.

        Args:
            num_steps: updates of one dispatch.
        """
        count, sharding = len(self.seeds), batch_sharding(self.mesh)
        one = ReplicaState(
            train=jax.eval_shape(self._fresh, np.uint32(0), {}, {}),
            is_active=jax.ShapeDtypeStruct((), np.dtype(bool)),
        )
        state: ReplicaState = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype, sharding=sharding), one
        )
        plan: BatchPlan = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            self._host_plan(0, min(num_steps, self.num_steps), num_steps),
        )
        return state, plan

    def trace(self, table: DeviceSplit, num_steps: int) -> ClosedJaxpr:
        """The program of ``num_steps`` updates before any compiler sees it.

        Args:
            table: shapes with shardings.
            num_steps: updates of one dispatch.
        """
        state, plan = self.shapes(num_steps)
        traced: ClosedJaxpr = self._update.trace(state, self.settings, table, plan, np.int32(0)).jaxpr
        return traced

    def _program(self, state: ReplicaState, table: DeviceSplit, plan: BatchPlan) -> Any:
        """The compiled update for plans of such a shape, compiled once, whether for its memory or to run it."""
        key = tuple(leaf.shape for leaf in jax.tree.leaves(plan))
        if key not in self._programs:
            lowered = self._update.lower(state, self.settings, table, plan, np.int32(0))
            self._programs[key] = lowered.compile()
        return self._programs[key]

    def _fresh(
        self,
        seed: Array,
        statistics: Mapping[str, tuple[np.ndarray, np.ndarray]],
        encoders: Mapping[str, dict[str, Any]],
    ) -> TrainState:
        """The state of one replica before its first update."""
        variables = initialize(self.model, seed)
        variables["params"] = with_encoders(variables["params"], encoders)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            parameters=variables["params"],
            statistics=with_statistics(variables["statistics"], statistics),
            optimizer_state=self._optimizer(self.config).init(variables["params"]),
        )

    def _configured(self, settings: Mapping[str, Array]) -> Config:
        """One replica's configuration, with traced numbers."""
        config = self.config
        for key, value in settings.items():
            config = replace_key(config, key, value)
        return config

    def _optimizer(self, config: Config) -> Any:
        schedule = make_schedule(config.optimizer, num_steps=self.num_steps, steps_per_epoch=self._steps_per_epoch)
        return make_optimizer(config.optimizer, self._shapes["params"], schedule)

    def _jit_update(self) -> Any:
        """The jitted ``(state, settings, table, plan, num_steps) -> (state, report)``: the first updates of a plan.

        It overwrites the state that it is given.
        """
        sharding = batch_sharding(self.mesh)

        def one(
            state: ReplicaState, settings: dict[str, Array], table: DeviceSplit, plan: BatchPlan, num_steps: Array
        ) -> tuple[ReplicaState, ReplicaReport]:
            config = self._configured(settings)
            model = build_model_for(config, self._tasks)
            step = make_train_step(
                model,
                self._optimizer(config),
                config,
                self._class_weights,
                self._log_priors,
                parameters=self._shapes["params"],
            )

            def body(index: Array, carry: tuple[ReplicaState, Array, dict[str, Array]]) -> Any:
                state, losses, task_losses = carry
                here = jax.tree.map(lambda leaf: leaf[index], plan)
                new, report = step(state.train, gather_batch(table, here))
                is_active = state.is_active & jnp.isfinite(report.loss) & jnp.isfinite(report.gradient_norm)
                means = {
                    task: values.at[index].set(report.task_totals[task] / jnp.maximum(report.task_counts[task], 1.0))
                    for task, values in task_losses.items()
                }
                return ReplicaState(train=new, is_active=is_active), losses.at[index].set(report.loss), means

            # Not a scan: how many updates are made is a value, so that a shorter dispatch is the same program.
            zeros = jnp.zeros(plan.record_index.shape[0])
            start = (state, zeros, dict.fromkeys(self._tasks.names(), zeros))
            after, losses, task_losses = jax.lax.fori_loop(0, num_steps, body, start)
            # Chosen once a dispatch: within the loop, every update would copy the whole state.
            kept = jax.tree.map(lambda new, old: jnp.where(after.is_active, new, old), after.train, state.train)
            report = ReplicaReport(loss=losses, task_losses=task_losses, is_active=after.is_active)
            return ReplicaState(train=kept, is_active=after.is_active), report

        mapped = jax.vmap(one, in_axes=(0, 0, None, 0, None))
        return jax.jit(
            spread_over(self.mesh, mapped, is_split=(True, True, False, True, False)),
            donate_argnums=0,
            out_shardings=sharding,
            compiler_options=step_compiler_options(self.mesh.devices.flat[0]),
        )
