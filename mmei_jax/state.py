"""The model that a configuration and a data set describe, and its training state, placed on a mesh."""

import functools
from collections.abc import Mapping
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Integer

from mmei_jax.config import Config
from mmei_jax.models.baselines import ARCHITECTURES, Model
from mmei_jax.models.mmei import ModalityInput, Tasks
from mmei_jax.records import Dataset
from mmei_jax.sharding import parameter_shardings, replicated
from mmei_jax.types import Batch, TokenSequence, TrainState

# A model's variables: {"params": trained, "statistics": constants of the inputs}.
Variables = dict[str, Any]


def build_model(config: Config, dataset: Dataset) -> Model:
    """The model for the configuration's tasks on this data set's features and classes."""
    return build_model_for(config, tasks_of(config, dataset))


def tasks_of(config: Config, dataset: Dataset) -> Tasks:
    """What the model reads and is asked for: the configuration's tasks on this data set's features and classes."""
    spec = dataset.spec
    catalogue = dataset.catalogue() if config.loss.ranking != "none" else None
    inputs = {
        name: ModalityInput(dim=spec.modalities[name].dim, max_tokens=getattr(config.data.max_tokens, name)[-1])
        for name in config.data.modalities
    }
    return Tasks(
        vision=inputs.get("vision"),
        audio=inputs.get("audio"),
        text=inputs.get("text"),
        emotion=config.loss.emotion,
        num_emotions=max(1, len(spec.labels[config.loss.emotion_label].class_names)),
        num_intents=len(spec.labels["intent"].class_names) if config.loss.intent != "none" else None,
        has_ranking=catalogue is not None,
        item_dim=0 if catalogue is None else catalogue.features.shape[1],
        num_kinds=0 if catalogue is None else len(catalogue.kind_names),
        learns_task_weights=config.loss.task_weighting == "uncertainty",
    )


def build_model_for(config: Config, tasks: Tasks) -> Model:
    """The model of the configured architecture for these tasks."""
    return ARCHITECTURES[config.model.architecture](config=config.model, tasks=tasks)


def example_batch(model: Model) -> Batch:
    """A batch of one record of zeros, of the shapes that ``model`` reads: enough to initialise its parameters."""
    sequences = {
        name: TokenSequence(
            features=jnp.zeros((1, given.max_tokens, given.dim), jnp.float32),
            segment_ids=jnp.ones((1, given.max_tokens), jnp.int32),
        )
        for name, given in model.tasks.inputs().items()
    }
    return Batch(
        vision=sequences.get("vision"),
        audio=sequences.get("audio"),
        text=sequences.get("text"),
        is_record=jnp.ones((1,), bool),
        record_index=jnp.zeros((1,), jnp.int32),
    )


def initialize(model: Model, seed: int | Integer[Array, ""]) -> Variables:
    """Fresh variables from a seed, which may be traced, without axis names; the same on any mesh. To be jitted."""
    return nn.unbox(_initialize_boxed(model, seed))


def variable_shapes(model: Model) -> Variables:
    """Shapes and dtypes of the model's variables."""
    return nn.unbox(_boxed_shapes(model))


def placed_variable_shapes(model: Model, mesh: Mesh) -> Variables:
    """Shapes and dtypes of the model's variables, each with its sharding on ``mesh``."""
    boxed = _boxed_shapes(model)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        nn.unbox(boxed),
        parameter_shardings(boxed, mesh),
    )


def state_shapes(model: Model, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes and shardings of a whole training state: what a checkpoint is restored into."""
    shapes = placed_variable_shapes(model, mesh)
    return TrainState(
        step=cast(Array, jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh))),
        parameters=shapes["params"],
        statistics=shapes["statistics"],
        optimizer_state=optimizer_shapes(optimizer, shapes["params"], mesh),
    )


def optimizer_shapes(optimizer: optax.GradientTransformation, parameters: Any, mesh: Mesh) -> Any:
    """Shapes of the optimizer's state; what belongs to a parameter is sharded like it, the rest is replicated.

    Args:
        optimizer: its state is described.
        parameters: tree of shapes with shardings.
        mesh: where the state lives.
    """
    shapes = jax.eval_shape(optimizer.init, parameters)
    everywhere = replicated(mesh)

    def place(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return optax.tree_utils.tree_map_params(
        optimizer,
        lambda leaf, parameter: place(leaf, parameter.sharding),
        shapes,
        parameters,
        transform_non_params=lambda leaf: place(leaf, everywhere),
    )


def initial_state(
    model: Model,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    seed: int,
    statistics: dict[str, tuple[np.ndarray, np.ndarray]],
) -> TrainState:
    """A fresh state on the mesh.

    Args:
        model: its parameters are made.
        optimizer: its state is made.
        mesh: where it lives.
        seed: of the parameters.
        statistics: by modality, ``[dim]`` mean and ``[dim]`` factor that standardise its features; empty leaves
            features as they are.
    """
    shapes = state_shapes(model, optimizer, mesh)
    variable_shardings = _shardings({"params": shapes.parameters, "statistics": shapes.statistics})
    variables = jax.jit(lambda: initialize(model, seed), out_shardings=variable_shardings)()
    placed = jax.device_put(dict(statistics), replicated(mesh))
    return TrainState(
        step=jax.device_put(jnp.zeros((), jnp.int32), replicated(mesh)),
        parameters=variables["params"],
        statistics=with_statistics(variables["statistics"], placed),
        optimizer_state=jax.jit(optimizer.init, out_shardings=_shardings(shapes.optimizer_state))(variables["params"]),
    )


def with_statistics(tree: Any, statistics: Mapping[str, tuple[Any, Any]]) -> Any:
    """The ``statistics`` collection with the constants that standardise each modality set.

    Args:
        tree: the collection, or a part of it.
        statistics: by modality, ``[dim]`` mean and factor. They belong to the group ``embed_<modality>``, at whatever
            depth the architecture has it.
    """
    groups = {f"embed_{modality}": {"mean": mean, "scale": scale} for modality, (mean, scale) in statistics.items()}
    if not isinstance(tree, dict):
        return tree
    return {key: groups[key] if key in groups else with_statistics(value, statistics) for key, value in tree.items()}


# A run asks several times, and tracing the model takes a second.
@functools.lru_cache(maxsize=4)
def _boxed_shapes(model: Model) -> Variables:
    return cast(Variables, jax.eval_shape(lambda: _initialize_boxed(model, 0)))


def _initialize_boxed(model: Model, seed: int | Integer[Array, ""]) -> Variables:
    return cast(Variables, model.init({"params": jax.random.key(seed)}, example_batch(model), is_training=False))


def _shardings(shapes: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, shapes)
