"""The model that a configuration and a data set describe, and its training state, placed on a mesh."""

import functools
import operator
from collections.abc import Mapping
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Integer

from mmei_jax.config import Config, MeshConfig, ModelConfig
from mmei_jax.item_words import frozen_word_dim, trained_encoder, trained_encoder_parameters
from mmei_jax.models.baselines import ARCHITECTURES, Model
from mmei_jax.models.mmei import ModalityInput, Tasks
from mmei_jax.models.pretraining import PretrainingMmei
from mmei_jax.optimizer import matching_patterns, parameter_names
from mmei_jax.pretraining_losses import objective_weights
from mmei_jax.raw_inputs import encoder_parameters, raw_encoding
from mmei_jax.records import Dataset
from mmei_jax.sharding import parameter_shardings, replicated
from mmei_jax.types import Batch, InputError, TokenSequence, TrainState
from mmei_jax.user_context import profile_dim, user_names

# Group of the parameters of the encoder over items' words.
WORD_ENCODER = "content_tower/encoder"

# A model's variables: {"params": trained, "statistics": constants of the inputs}.
Variables = dict[str, Any]

# Numbers of a parameter that must not lie whole on every device of a mesh that splits parameters, unless the
# configuration says so: smaller ones cost nothing.
SMALLEST_SPLIT_SIZE = 2**16


def build_model(config: Config, dataset: Dataset) -> Model:
    """The model for the configuration's tasks on this data set's features and classes."""
    return build_model_for(config, tasks_of(config, dataset))


def tasks_of(config: Config, dataset: Dataset) -> Tasks:
    """What the model reads and is asked for: the configuration's tasks on this data set's features and classes.

    Raises:
        InputError: the content tower reads words, and the data set was opened without them; or what is to be read of
            the users is not there.
    """
    spec, model = dataset.spec, config.model
    # What the manifest tells is enough: items and their words are not read.
    catalogue = dataset.manifest["catalogue"] if config.loss.ranking != "none" else None
    has_words = catalogue is not None and bool(model.content_encoder)
    if has_words and dataset.read_item_words is None:
        raise InputError(f"{dataset.path}: opened without the words of its items; expected item_words.open_dataset")
    inputs = {
        name: ModalityInput(
            dim=spec.modalities[name].dim,
            max_tokens=getattr(config.data.max_tokens, name)[-1],
            encoder=raw_encoding(config, name, spec.modalities[name]),
        )
        for name in config.data.modalities
    }
    return Tasks(
        vision=inputs.get("vision"),
        audio=inputs.get("audio"),
        text=inputs.get("text"),
        emotion=config.loss.emotion,
        num_emotions=1
        if config.loss.emotion == "none"
        else max(1, len(spec.labels[config.loss.emotion_label].class_names)),
        num_intents=len(spec.labels["intent"].class_names) if config.loss.intent != "none" else None,
        has_ranking=catalogue is not None,
        item_dim=catalogue["dim"] if catalogue is not None and model.content_features else 0,
        num_kinds=0 if catalogue is None else len(catalogue["kind_names"]),
        learns_task_weights=config.loss.task_weighting == "uncertainty",
        word_dim=frozen_word_dim(model) if has_words else 0,
        word_encoder=trained_encoder(model) if has_words else None,
        num_users=len(user_names(dataset, config)),
        profile_dim=profile_dim(config),
    )


def build_model_for(config: Config, tasks: Tasks) -> Model:
    """The model of the configured architecture for these tasks, and for the objectives that are on."""
    if objective_weights(config.pretraining):
        return PretrainingMmei(config=config.model, tasks=tasks, objectives=config.pretraining)
    return ARCHITECTURES[config.model.architecture](config=config.model, tasks=tasks)


def example_batch(model: Model) -> Batch:
    """A batch of one record of zeros, of the shapes that ``model`` reads: enough to initialise its parameters."""
    sequences = {
        name: TokenSequence(
            features=jnp.asarray(_example_tokens(given)),
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


def _example_tokens(given: ModalityInput) -> np.ndarray:
    if given.encoder is None:
        return np.zeros((1, given.max_tokens, given.dim), np.float32)
    return given.encoder.example(given.max_tokens)


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


def check_split(parameters: Any, config: MeshConfig) -> None:
    """Refuses a mesh that leaves a large parameter whole on every device, unless ``config.replicated`` says so.

    Args:
        parameters: tree of shapes with shardings on the mesh, of :func:`placed_variable_shapes`.
        config: of the mesh. Where ``fsdp`` and ``tensor`` are 1, parameters are not to be split.

    Raises:
        InputError: a parameter of :data:`SMALLEST_SPLIT_SIZE` numbers or more is split by neither axis and matches no
            pattern; or a pattern is no regular expression, or matches no parameter.
    """
    named = list(zip(jax.tree.leaves(parameter_names(parameters)), jax.tree.leaves(parameters), strict=True))
    patterns = matching_patterns(config.replicated, "mesh.replicated", [name for name, _ in named])
    if config.fsdp * config.tensor == 1:
        return
    whole = [
        (name, leaf.shape)
        for name, leaf in named
        if leaf.size >= SMALLEST_SPLIT_SIZE
        and leaf.sharding.shard_shape(leaf.shape) == leaf.shape
        and not any(pattern.search(name) for pattern in patterns)
    ]
    if whole:
        (name, shape), others = whole[0], f", and {len(whole) - 1} more" if len(whole) > 1 else ""
        raise InputError(
            f"config.mesh.fsdp = {config.fsdp}, config.mesh.tensor = {config.tensor}: every device would hold all of "
            f"parameter {name!r} of shape {shape}{others}: expected another mesh, or a pattern in "
            "config.mesh.replicated that says it may"
        )


def optimizer_shapes(optimizer: optax.GradientTransformation, parameters: Any, mesh: Mesh) -> Any:
    """Shapes of the optimizer's state; what belongs to a parameter is sharded like it, the rest is replicated.

    Args:
        optimizer: its state is described.
        parameters: tree of shapes with shardings.
        mesh: where the state lives.
    """
    sharding_of = {_path(path): leaf.sharding for path, leaf in jax.tree_util.tree_leaves_with_path(parameters)}
    everywhere = replicated(mesh)

    def place(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        # Moments lie in trees like that of the parameters, however deep in the state; frozen ones have none.
        names = _path(path)
        own = (sharding_of[names[start:]] for start in range(len(names)) if names[start:] in sharding_of)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=next(own, everywhere))

    return jax.tree_util.tree_map_with_path(place, jax.eval_shape(optimizer.init, parameters))


def initial_state(
    model: Model,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    seed: int,
    statistics: dict[str, tuple[np.ndarray, np.ndarray]],
    encoders: Mapping[str, dict[str, Any]] | None = None,
) -> TrainState:
    """A fresh state on the mesh.

    Args:
        model: its parameters are made.
        optimizer: its state is made.
        mesh: where it lives.
        seed: of the parameters.
        statistics: by modality, ``[dim]`` mean and ``[dim]`` factor that standardise its features; empty leaves
            features as they are.
        encoders: parameters that encoders begin with, see :func:`initial_encoders`; others are random.
    """
    shapes = state_shapes(model, optimizer, mesh)
    variable_shardings = _shardings({"params": shapes.parameters, "statistics": shapes.statistics})
    variables = jax.jit(lambda: initialize(model, seed), out_shardings=variable_shardings)()
    placed = jax.device_put(dict(statistics), replicated(mesh))
    placed_encoders = {
        name: jax.device_put(own, _group(variable_shardings["params"], name)) for name, own in (encoders or {}).items()
    }
    parameters = with_encoders(variables["params"], placed_encoders)
    return TrainState(
        step=jax.device_put(jnp.zeros((), jnp.int32), replicated(mesh)),
        parameters=parameters,
        statistics=with_statistics(variables["statistics"], placed),
        optimizer_state=jax.jit(optimizer.init, out_shardings=_shardings(shapes.optimizer_state))(parameters),
    )


def initial_encoders(config: ModelConfig) -> dict[str, dict[str, Any]]:
    """What the encoders inside a model begin with: by the name of the group, nested dicts of arrays on the host.

    Raises:
        InputError: an encoder's folder cannot be used.
    """
    words = trained_encoder_parameters(config)
    return encoder_parameters(config) | ({} if words is None else {WORD_ENCODER: words})


def with_encoders(parameters: dict[str, Any], encoders: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters with those of some encoders replaced.

    Args:
        parameters: of the model.
        encoders: by the name of the group, such as "encoder_vision" or "content_tower/encoder".
    """
    for name, own in encoders.items():
        first, _, rest = name.partition("/")
        parameters = {**parameters, first: with_encoders(parameters[first], {rest: own}) if rest else own}
    return parameters


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


def _path(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(str(getattr(entry, "key", entry)) for entry in path)


def _group(tree: Any, name: str) -> Any:
    return functools.reduce(operator.getitem, name.split("/"), tree)


def _shardings(shapes: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, shapes)
