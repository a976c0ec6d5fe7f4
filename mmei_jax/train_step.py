"""One update: forward, Eq. 6, backward, AdamW; a pure function of (state, batch), jitted and donated."""

from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from mmei_jax.config import Config
from mmei_jax.losses import RecordLosses, task_counts, task_losses, total_loss
from mmei_jax.models.baselines import Model
from mmei_jax.optimizer import trained_mask
from mmei_jax.sharding import place_activations
from mmei_jax.state import variable_shapes
from mmei_jax.types import Batch, Outputs, StepReport, TrainState

TrainStep = Callable[[TrainState, Batch], tuple[TrainState, StepReport]]


def make_train_step(
    model: Model,
    optimizer: optax.GradientTransformation,
    config: Config,
    class_weights: Float[Array, "emotions"] | None,
    log_priors: Mapping[str, ArrayLike] | None = None,
    *,
    parameters: Any = None,
) -> TrainStep:
    """The update as a function of state and batch, not yet jitted.

    Dropout keys derive from (seed, step, micro-batch): the state carries no generator. With gradient accumulation each
    task is divided by its count in the *whole* batch, so the accumulated gradient is that of the whole batch; only the
    in-batch negatives of the ranking loss come from the micro-batch alone.

    Args:
        model: what is trained.
        optimizer: how.
        config: losses, micro-batches and seed.
        class_weights: ``[emotions]`` float32 in label order; None weighs all 1.
        log_priors: by task ``[classes]`` float32 in label order, what ``config.loss.logit_adjustment`` multiplies.
        parameters: the tree of the model's parameters, or their shapes; None finds it by tracing the model. Must be
            given where numbers of the configuration are traced (:data:`mmei_jax.replicas.VARIED_KEYS`).

    Raises:
        ValueError: the logits are to be adjusted, but there are no priors.
    """
    if config.loss.logit_adjustment and not log_priors:
        raise ValueError("config.loss.logit_adjustment is on, but log_priors is empty")
    priors = {task: jnp.asarray(prior, jnp.float32) for task, prior in (log_priors or {}).items()}
    num_micro_batches = config.train.gradient_accumulation_steps
    is_trained = trained_mask(config.optimizer, variable_shapes(model)["params"] if parameters is None else parameters)

    def micro_loss(
        parameters: Any, statistics: Any, batch: Batch, key: Array, counts: dict[str, Array]
    ) -> tuple[Array, tuple[dict[str, RecordLosses], Array]]:
        dropout_key, modality_key = jax.random.split(key)
        # Frozen parameters get no backward pass, and their gradients are not in the norm.
        learned = jax.tree.map(
            lambda leaf, trained: leaf if trained else jax.lax.stop_gradient(leaf), parameters, is_trained
        )
        answer = model.apply(
            {"params": learned, "statistics": statistics},
            batch,
            is_training=True,
            rngs={"dropout": dropout_key, "modality_dropout": modality_key},
        )
        outputs = cast(Outputs, answer)
        losses = task_losses(outputs, batch, config.loss, class_weights, log_priors=priors)
        loss, _ = total_loss(losses, config.loss, outputs.task_log_variances, counts=counts)
        weights = jnp.sum(outputs.modality_weights * batch.is_record[:, None], axis=0)
        return loss, (losses, weights)

    value_and_gradient = jax.value_and_grad(micro_loss, has_aux=True)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, StepReport]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        counts = task_counts(batch, config.loss, class_weights)

        def one(micro_batch: Batch, index: Array | int) -> tuple[Any, Any]:
            micro_key = jax.random.fold_in(key, index)
            return value_and_gradient(state.parameters, state.statistics, micro_batch, micro_key, counts)

        if num_micro_batches == 1:
            (loss, (losses, weights)), gradients = one(batch, 0)
            record_index = batch.record_index
        else:
            micro_batches = split_batch(batch, num_micro_batches)

            def accumulate(total: Any, item: tuple[Batch, Array]) -> tuple[Any, Any]:
                (loss, (losses, weights)), gradients = one(*item)
                return jax.tree.map(jnp.add, total, (loss, weights, gradients)), losses

            first = jax.eval_shape(one, jax.tree.map(lambda leaf: leaf[0], micro_batches), 0)
            (loss_shape, (_, weights_shape)), gradient_shapes = first
            zeros = jax.tree.map(
                lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (loss_shape, weights_shape, gradient_shapes)
            )
            items = (micro_batches, jnp.arange(num_micro_batches))
            (loss, weights, gradients), losses = jax.lax.scan(accumulate, zeros, items)
            losses = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), losses)
            record_index = micro_batches.record_index.reshape(-1)

        updates, optimizer_state = optimizer.update(gradients, state.optimizer_state, state.parameters)
        report = StepReport(
            loss=loss,
            task_totals={task: records.total() for task, records in losses.items()},
            task_counts=counts,
            gradient_norm=optax.tree.norm(gradients),
            modality_weights=weights / jnp.maximum(jnp.sum(batch.is_record), 1),
            is_finite={task: jnp.isfinite(records.values) for task, records in losses.items()},
            record_index=record_index,
        )
        new_state = TrainState(
            step=state.step + 1,
            parameters=optax.apply_updates(state.parameters, updates),
            statistics=state.statistics,
            optimizer_state=optimizer_state,
        )
        return new_state, report

    return step


def jit_train_step(step: TrainStep, shapes: TrainState) -> TrainStep:
    """Compiles an update that overwrites the state it is given.

    Args:
        step: what :func:`make_train_step` gave.
        shapes: the state's shapes with shardings; what comes out is placed like what goes in, so that no later update
            meets another program. Activations are placed on the same mesh.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    mesh = cast(Mesh, cast(NamedSharding, shapes.step.sharding).mesh)
    # Every process reads the whole report; a single one reads it wherever it is. Asked of the devices, which may be
    # those of a topology that the update is only compiled for.
    has_processes = len({device.process_index for device in mesh.devices.flat}) > 1
    report = shapes.step.sharding if has_processes else None
    return jax.jit(
        place_activations(mesh, step),
        donate_argnums=0,
        out_shardings=(shardings, report),
        compiler_options=step_compiler_options(mesh.devices.flat[0]),
    )


def step_compiler_options(device: Any) -> dict[str, str]:
    """Options for compiling an update for a device.

    XLA's CPU compiler drops optimization barriers before it fuses. It then computes the residual stream's gradient anew
    for each reader, from the branches of all layers above: a fifth of the update (see ``transformer.add_branch``). With
    that pass off, the barriers last. Other compilers keep them by themselves.

    Args:
        device: one of those that the program will run on.
    """
    return {"xla_disable_hlo_passes": "cse_barrier_expander"} if device.platform == "cpu" else {}


def split_batch(batch: Batch, num_micro_batches: int) -> Batch:
    """A batch with a leading axis of micro-batches.

    Record ``r`` goes to micro-batch ``r % num_micro_batches``, so that every device's rows are dealt out evenly and
    none has to move to another device.

    Raises:
        ValueError: several records share a row, so that tokens and labels would part.
    """
    num_records = batch.is_record.shape[0]
    for name, sequence in batch.sequences().items():
        if sequence.segment_ids.shape[0] != num_records:
            raise ValueError(f"batch.{name}: packed rows cannot be dealt into micro-batches")

    def split(leaf: Array) -> Array:
        dealt = leaf.reshape(leaf.shape[0] // num_micro_batches, num_micro_batches, *leaf.shape[1:])
        return jnp.swapaxes(dealt, 0, 1)

    return jax.tree.map(split, batch)
