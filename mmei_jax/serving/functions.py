"""The functions that are exported: a run's fusion model, its encoders, both together, and a search behind them.

Each takes parameters by group and name, and inputs by name, and gives outputs by name: flat dicts of arrays, so that
whoever loads a program needs no class of this package.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from mmei_jax.encoders.pretrained_weights import flatten, unflatten
from mmei_jax.evaluation import BestRun
from mmei_jax.extraction.encoding import ClipEncoder, open_encoders
from mmei_jax.extraction.shard_units import EXTRACTION_NAME
from mmei_jax.fingerprints import parameters_hash
from mmei_jax.models.baselines import Model
from mmei_jax.models.mmei import ModalityInput
from mmei_jax.recommendation.index_files import open_index
from mmei_jax.recommendation.item_encoding import ItemEncoder
from mmei_jax.recommendation.top_k import (
    BLOCK_SIZE,
    CPU_BLOCK_SIZE,
    Filters,
    ItemTable,
    make_table,
    padded_rows,
    top_items,
)
from mmei_jax.serving.encoder_functions import (
    ModalityReading,
    encoder_functions,
    inner_encoder_functions,
    inner_parameters,
    read_features,
    read_raw,
)
from mmei_jax.serving.manifest import Size, Tensor
from mmei_jax.serving.signatures import BATCH, Function, Parameters
from mmei_jax.sharding import mesh_over
from mmei_jax.state import Variables
from mmei_jax.types import Batch, InputError, Outputs, TokenSequence, UserContext

# Of a model's outputs, what is exported where the model has it, and what it means.
_FUSION_OUTPUTS = {
    "emotion": "logits of the classes, whose softmax or sigmoid are probabilities; values of a regression",
    "intent": "logits of the classes, whose softmax are probabilities",
    "modality_weights": "alpha of vision, audio, text; 0 where absent",
    "fused": "F of Eq. 3",
    "user_embedding": "F_u of Eq. 7, whose inner products with items rank them",
}


def fusion_function(run: BestRun) -> Function:
    """The run's model: from features of tokens to emotion, intent, alpha and the user's embedding.

    Of a run with encoders inside, the model behind them: its features are what the encoders give.

    Args:
        run: any.
    """
    tasks, modalities = run.model.tasks, run.dataset.spec.modalities
    dtypes = {name: "float32" if given.encoder else modalities[name].dtype for name, given in tasks.inputs().items()}
    return model_function(*_without_encoders(run), dtypes, _settings(run))


def model_function(model: Model, variables: Variables, dtypes: Mapping[str, str], settings: dict[str, Any]) -> Function:
    """A model: from features of tokens to emotion, intent, alpha and the user's embedding.

    Args:
        model: of any architecture, without encoders inside.
        variables: its own.
        dtypes: by modality, of its features.
        settings: JSON values of the group of parameters.
    """
    inputs = model.tasks.inputs()
    readings = {name: read_features(name, given, dtypes[name]) for name, given in inputs.items()}
    groups = {"fusion": Parameters(_fusion_arrays(variables), settings)}
    return _heads_function(model, readings, groups, lambda parameters: unflatten(parameters["fusion"]))


def end_to_end_function(run: BestRun) -> Function:
    """A run with encoders inside, whole: from frames, samples and token ids to what :func:`fusion_function` gives.

    Args:
        run: with encoders inside.

    Raises:
        InputError: it has none.
    """
    encoders = inner_parameters(run)
    if not encoders:
        raise InputError("config.model.encoders: none: expected a run with encoders inside; others are of features")
    modalities = run.dataset.spec.modalities
    readings = {
        name: read_features(name, given, modalities[name].dtype)
        if given.encoder is None
        else read_raw(name, given.encoder, given.max_tokens)
        for name, given in run.model.tasks.inputs().items()
    }
    groups = {
        "fusion": Parameters(_fusion_arrays(_without_encoders(run)[1]), _settings(run)),
        **{f"{name}_encoder": group for name, group in encoders.items()},
    }

    def join(parameters: dict[str, dict[str, Any]]) -> Variables:
        variables = unflatten(parameters["fusion"])
        own = {f"encoder_{name}": unflatten(parameters[f"{name}_encoder"]) for name in encoders}
        return {**variables, "params": {**variables["params"], **own}}

    return _heads_function(run.model, readings, groups, join)


def _without_encoders(run: BestRun) -> tuple[Model, Variables]:
    """The run's model on what its encoders give, and its variables; both as they are where it has none."""
    tasks = run.model.tasks
    changed: dict[str, Any] = {
        name: ModalityInput(given.feature_dim, given.max_positions)
        for name, given in tasks.inputs().items()
        if given.encoder is not None
    }
    kept = {key: value for key, value in run.variables["params"].items() if key not in _encoder_groups(changed)}
    model = run.model.clone(tasks=dataclasses.replace(tasks, **changed))
    return model, {**run.variables, "params": kept}


def _encoder_groups(modalities: Iterable[str]) -> set[str]:
    return {f"encoder_{name}" for name in modalities}


def _settings(run: BestRun) -> dict[str, Any]:
    """Of the group of the fusion model's parameters; the hashes of encoders inside make them part of the model's."""
    config = run.config.to_json()
    # The same run, wherever its data lie.
    del config["data"]["path"]
    encoders = {name: parameters_hash(own.arrays, own.settings) for name, own in inner_parameters(run).items()}
    return {"config": config, **({"encoders": encoders} if encoders else {})}


def _fusion_arrays(variables: Variables) -> dict[str, np.ndarray]:
    """All but the content tower: items were embedded beforehand."""
    params = {name: value for name, value in variables["params"].items() if name != "content_tower"}
    arrays: dict[str, np.ndarray] = jax.device_get(flatten({**variables, "params": params}))
    return arrays


def _heads_function(
    model: Model,
    readings: Mapping[str, ModalityReading],
    groups: Mapping[str, Parameters],
    join: Callable[[dict[str, dict[str, Any]]], Variables],
) -> Function:
    """A model behind what its records come as.

    Args:
        model: any.
        readings: of each modality that it reads.
        groups: its parameters.
        join: makes its variables of them.
    """
    tasks = model.tasks
    inputs = [tensor for reading in readings.values() for tensor in reading.inputs]
    if tasks.num_users:
        inputs.append(Tensor("user_index", "batch", "int32", "row of the user, -1 for one who is unknown"))
    if tasks.profile_dim:
        inputs.append(Tensor("user_profile", f"batch, {tasks.profile_dim}", "float32", "affect of earlier records"))
        inputs.append(Tensor("user_has_profile", "batch", "bool", "whether there were earlier records"))

    def function(parameters: dict[str, dict[str, Any]], given: dict[str, Any]) -> dict[str, Any]:
        sequences = {name: reading.sequence(given) for name, reading in readings.items()}
        outputs = cast(Outputs, model.apply(join(parameters), _batch(sequences, given), is_training=False))
        found = {name: getattr(outputs, name) for name in _FUSION_OUTPUTS}
        return {name: value for name, value in found.items() if value is not None}

    sizes = (BATCH, *(reading.size for reading in readings.values()))
    return Function(function, groups, sizes, tuple(inputs), _FUSION_OUTPUTS)


def _batch(sequences: Mapping[str, TokenSequence], given: Mapping[str, Any]) -> Batch:
    """One record a row."""
    num_records = next(iter(sequences.values())).segment_ids.shape[0]
    user = UserContext(given.get("user_index"), given.get("user_profile"), given.get("user_has_profile"))
    return Batch(
        vision=sequences.get("vision"),
        audio=sequences.get("audio"),
        text=sequences.get("text"),
        is_record=jnp.ones(num_records, bool),
        record_index=jnp.zeros(num_records, jnp.int32),
        user=user,
    )


def top_k_function(run: BestRun, *, k: int, index: Path | None, platforms: tuple[str, ...]) -> Function:
    """The run's model, and the best items of a catalogue for what it read: no score of another item leaves the device.

    With encoders inside it reads what :func:`end_to_end_function` does, without them what :func:`fusion_function` does.

    Args:
        run: trained to rank.
        k: items for each record; no more are given than the catalogue has.
        index: folder of a catalogue index of the run; None takes the catalogue of its data set.
        platforms: that the program will run on.

    Raises:
        InputError: the run does not rank, or the index is not its own.
    """
    encoder = ItemEncoder(run)
    fusion = end_to_end_function(run) if run.config.model.encoders.folders() else fusion_function(run)
    mesh = mesh_over(jax.devices()[:1])
    # Blocks that suit accelerators cost a processor some of its caches, and the other way round costs much more.
    block_size = CPU_BLOCK_SIZE if platforms == ("cpu",) else BLOCK_SIZE
    items, ids = _items(run, encoder, index, block_size)
    k = min(k, len(ids))
    settings = {"tower_sha256": encoder.tower_sha256, "block_size": block_size}

    def function(parameters: dict[str, dict[str, Any]], given: dict[str, Any]) -> dict[str, Any]:
        excluded = given["excluded"]
        found = fusion.function(parameters, {name: value for name, value in given.items() if name != "excluded"})
        own = parameters["items"]
        kind = jnp.zeros(own["is_listed"].shape, jnp.int32)
        table = ItemTable(own["embeddings"], own.get("scales"), kind, own["is_listed"])
        best = top_items(
            found["user_embedding"], table, Filters(excluded=excluded), k=k, mesh=mesh, block_size=block_size
        )
        return {**found, "row": best.row, "score": best.score}

    meanings = {
        "row": "of the best items, the best first, in item_ids.json; -1 where there are no more",
        "score": "of Eq. 7; -inf where there are no more",
    }
    excluded = Tensor("excluded", "batch, excluded", "int32", "rows of items that may not be answered, -1 for none")
    return Function(
        function,
        {**fusion.groups, "items": Parameters(items, settings)},
        (*fusion.sizes, Size("excluded", 1, 0)),
        (*fusion.inputs, excluded),
        {**fusion.meanings, **meanings},
        ids,
    )


def _items(
    run: BestRun, encoder: ItemEncoder, index: Path | None, block_size: int
) -> tuple[dict[str, np.ndarray], tuple[str | None, ...]]:
    """Embeddings of items as they are searched, and their ids by row."""
    mesh = mesh_over(jax.devices()[:1])
    if index is None:
        # Whatever was trained to rank has one.
        catalogue: Any = run.dataset.catalogue()
        table = make_table(encoder.encode(catalogue), catalogue.kind, mesh, block_size=block_size)
        return {name: np.asarray(getattr(table, name)) for name in ("embeddings", "is_listed")}, tuple(catalogue.ids)
    opened = open_index(index, encoder.tower_sha256)
    num_rows = len(opened.is_live)
    num_padded = padded_rows(num_rows, mesh, block_size)
    embeddings, scales = opened.padded_embeddings(num_padded)
    ids: list[str | None] = [None] * num_rows
    for row, item in zip(np.flatnonzero(opened.is_live), opened.live_ids.to_pylist(), strict=True):
        ids[row] = item
    found = {"embeddings": embeddings, "is_listed": np.pad(opened.is_live, (0, num_padded - num_rows))}
    return {**found, **({} if scales is None else {"scales": scales})}, tuple(ids)


def _encoder_functions(run: BestRun) -> dict[str, Function]:
    """The encoders inside the run's model; those that made its features, where there are none and these are known."""
    inner = inner_encoder_functions(run)
    if inner:
        return inner
    path = run.dataset.path / EXTRACTION_NAME
    return encoder_functions(*open_encoders(path, run.config.data.modalities, run.dataset.spec, ClipEncoder))


def functions(
    run: BestRun,
    parts: tuple[str, ...] | None,
    *,
    k: int,
    index: Path | None,
    platforms: tuple[str, ...],
    report: Callable[[str], None],
) -> dict[str, Function]:
    """What is to be exported of a run, by name.

    Args:
        run: any.
        parts: some of "fusion", "encoders", "end_to_end", "top_k"; None takes those that the run has, and reports which
            it lacks.
        k: see :func:`top_k_function`.
        index: see :func:`top_k_function`.
        platforms: that the programs will run on.
        report: takes a line for each part that is left out.

    Raises:
        InputError: the run lacks a part that was asked for, or has none at all.
    """
    makers: dict[str, Callable[[], dict[str, Function]]] = {
        "fusion": lambda: {"fusion": fusion_function(run)},
        "encoders": lambda: _encoder_functions(run),
        "end_to_end": lambda: {"end_to_end": end_to_end_function(run)},
        "top_k": lambda: {"top_k": top_k_function(run, k=k, index=index, platforms=platforms)},
    }
    found: dict[str, Function] = {}
    refusals: list[InputError] = []
    for part, make in makers.items():
        is_wanted = part != "end_to_end" or bool(run.config.model.encoders.folders())
        if not (is_wanted if parts is None else part in parts):
            continue
        try:
            found |= make()
        except InputError as error:
            # An index that was named is wanted.
            if parts is not None or (part == "top_k" and index is not None):
                raise
            report(f"{part}: left out: {error}")
            refusals.append(error)
    if not found:
        raise InputError(f"nothing to export: {refusals[0]}")
    return found
