"""The functions that are exported: a run's fusion model, its encoders, and its fusion model with a search behind it.

Each takes parameters by group and name, and inputs by name, and gives outputs by name: flat dicts of arrays, so that
whoever loads a program needs no class of this package.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from mmei_jax.encoders.audio_cnn import SAMPLING_RATE
from mmei_jax.encoders.pretrained_weights import flatten, unflatten
from mmei_jax.encoders.wav2vec2 import LONGEST_SECONDS
from mmei_jax.evaluation import BestRun
from mmei_jax.extraction.audio_encoding import AudioEncoder
from mmei_jax.extraction.encoding import ClipEncoder, open_encoders
from mmei_jax.extraction.extraction_config import ExtractionConfig
from mmei_jax.extraction.shard_units import EXTRACTION_NAME
from mmei_jax.extraction.text_encoding import TextEncoder
from mmei_jax.extraction.vision_encoding import VisionEncoder
from mmei_jax.models.baselines import Model
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
from mmei_jax.serving.manifest import Size, Tensor
from mmei_jax.sharding import mesh_over
from mmei_jax.state import Variables
from mmei_jax.types import Batch, InputError, Outputs, TokenSequence, UserContext

BATCH = Size("batch", 1, 0)
# Of a model's outputs, what is exported where the model has it, and what it means.
_FUSION_OUTPUTS = {
    "emotion": "logits of the classes, whose softmax or sigmoid are probabilities; values of a regression",
    "intent": "logits of the classes, whose softmax are probabilities",
    "modality_weights": "alpha of vision, audio, text; 0 where absent",
    "fused": "F of Eq. 3",
    "user_embedding": "F_u of Eq. 7, whose inner products with items rank them",
}


@dataclass(frozen=True)
class Parameters:
    """A group of parameters, on the host.

    Attributes:
        arrays: by name.
        settings: JSON values that they were trained or made with.
    """

    arrays: Mapping[str, np.ndarray]
    settings: dict[str, Any]


@dataclass(frozen=True)
class Function:
    """A function to be exported.

    Attributes:
        function: ``(parameters by group and name, inputs by name) -> outputs by name``.
        groups: its parameters.
        sizes: that differ from call to call.
        inputs: as the manifest describes them.
        meanings: of outputs.
        item_ids: of rows that it gives; None where it gives none.
    """

    function: Callable[[dict[str, dict[str, Any]], dict[str, Any]], dict[str, Any]]
    groups: Mapping[str, Parameters]
    sizes: tuple[Size, ...]
    inputs: tuple[Tensor, ...]
    meanings: Mapping[str, str]
    item_ids: tuple[str | None, ...] | None = None


def fusion_function(run: BestRun) -> Function:
    """The run's model: from features of tokens to emotion, intent, alpha and the user's embedding.

    Args:
        run: on features.

    Raises:
        InputError: it has encoders inside the model.
    """
    if folders := run.config.model.encoders.folders():
        raise InputError(f"config.model.encoders: {', '.join(folders)}: a run with encoders inside is not exported yet")
    dtypes = {name: run.dataset.spec.modalities[name].dtype for name in run.model.tasks.inputs()}
    config = run.config.to_json()
    # The same run, wherever its data lie.
    del config["data"]["path"]
    return model_function(run.model, run.variables, dtypes, {"config": config})


def model_function(model: Model, variables: Variables, dtypes: Mapping[str, str], settings: dict[str, Any]) -> Function:
    """A model: from features of tokens to emotion, intent, alpha and the user's embedding.

    Args:
        model: of any architecture.
        variables: its own.
        dtypes: by modality, of its features.
        settings: JSON values of the group of parameters.
    """
    tasks = model.tasks
    inputs, sizes = [], [BATCH]
    for name, given in tasks.inputs().items():
        sizes.append(Size(f"{name}_tokens", 1, given.max_tokens))
        shape = f"batch, {name}_tokens, {given.dim}"
        inputs.append(Tensor(f"{name}_features", shape, dtypes[name], "tokens; behind a record's last one anything"))
        inputs.append(Tensor(f"{name}_lengths", "batch", "int32", "tokens of each record; 0 where it is absent"))
    if tasks.num_users:
        inputs.append(Tensor("user_index", "batch", "int32", "row of the user, -1 for one who is unknown"))
    if tasks.profile_dim:
        inputs.append(Tensor("user_profile", f"batch, {tasks.profile_dim}", "float32", "affect of earlier records"))
        inputs.append(Tensor("user_has_profile", "batch", "bool", "whether there were earlier records"))

    def function(parameters: dict[str, dict[str, Any]], given: dict[str, Any]) -> dict[str, Any]:
        batch = _batch(list(tasks.inputs()), given)
        outputs = cast(Outputs, model.apply(unflatten(parameters["fusion"]), batch, is_training=False))
        found = {name: getattr(outputs, name) for name in _FUSION_OUTPUTS}
        return {name: value for name, value in found.items() if value is not None}

    # Items were embedded beforehand.
    params = {name: value for name, value in variables["params"].items() if name != "content_tower"}
    arrays = jax.device_get(flatten({**variables, "params": params}))
    groups = {"fusion": Parameters(arrays, settings)}
    return Function(function, groups, tuple(sizes), tuple(inputs), _FUSION_OUTPUTS)


def _batch(names: list[str], given: dict[str, Any]) -> Batch:
    """One record a row."""
    sequences = {
        name: TokenSequence(
            given[f"{name}_features"], _segment_ids(given[f"{name}_features"], given[f"{name}_lengths"])
        )
        for name in names
    }
    num_records = given[f"{names[0]}_lengths"].shape[0]
    user = UserContext(given.get("user_index"), given.get("user_profile"), given.get("user_has_profile"))
    return Batch(
        vision=sequences.get("vision"),
        audio=sequences.get("audio"),
        text=sequences.get("text"),
        is_record=jnp.ones(num_records, bool),
        record_index=jnp.zeros(num_records, jnp.int32),
        user=user,
    )


def _segment_ids(tokens: Array, lengths: Int[Array, "rows"]) -> Int[Array, "rows tokens"]:
    """1 for a row's first tokens, 0 for what follows them."""
    return (jnp.arange(tokens.shape[1])[None] < lengths[:, None]).astype(jnp.int32)


def top_k_function(run: BestRun, *, k: int, index: Path | None, platforms: tuple[str, ...]) -> Function:
    """The run's model, and the best items of a catalogue for what it read: no score of another item leaves the device.

    Args:
        run: trained to rank.
        k: items for each record; no more are given than the catalogue has.
        index: folder of a catalogue index of the run; None takes the catalogue of its data set.
        platforms: that the program will run on.

    Raises:
        InputError: the run does not rank, or the index is not its own.
    """
    encoder, fusion = ItemEncoder(run), fusion_function(run)
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


def encoder_functions(clips: ClipEncoder, config: ExtractionConfig) -> dict[str, Function]:
    """The encoders of an extraction, by name: what they give is what a fusion model on its features reads.

    Args:
        clips: the encoders.
        config: of the extraction.
    """
    found = {}
    for name, encoder in clips.encoders.items():
        if isinstance(encoder, VisionEncoder):
            function = _vision_function(encoder)
        elif isinstance(encoder, AudioEncoder):
            function = _audio_function(encoder)
        else:
            function = _text_function(encoder, config.text.max_tokens)
        found[f"{name}_encoder"] = function
    return found


def _encoders_of(run: BestRun) -> tuple[ClipEncoder, ExtractionConfig]:
    """Those that made the features of the run's data set."""
    return open_encoders(run.dataset.path / EXTRACTION_NAME, run.config.data.modalities, run.dataset.spec, ClipEncoder)


def _encoder_parameters(encoder: VisionEncoder | AudioEncoder | TextEncoder, **more: Any) -> Parameters:
    settings = {"producer": dataclasses.asdict(encoder.producer), "dtype": encoder.dtype, **more}
    return Parameters(jax.device_get(flatten(encoder.parameters)), settings)


def _vision_function(encoder: VisionEncoder) -> Function:
    preprocessing = encoder.preprocessing

    def function(parameters: dict[str, dict[str, Any]], given: dict[str, Any]) -> dict[str, Any]:
        states = encoder.encode(unflatten(parameters["vision_encoder"]), given["pixels"])
        return {"features": states.astype(encoder.dtype)}

    shape = f"frames, {preprocessing.height}, {preprocessing.width}, 3"
    return Function(
        function,
        {"vision_encoder": _encoder_parameters(encoder, preprocessing=dataclasses.asdict(preprocessing))},
        (Size("frames", 1, 0),),
        (Tensor("pixels", shape, "uint8", "frames, resized as settings.preprocessing says"),),
        {"features": "a token for each frame"},
    )


def _audio_function(encoder: AudioEncoder) -> Function:
    def function(parameters: dict[str, dict[str, Any]], given: dict[str, Any]) -> dict[str, Any]:
        states, is_valid = encoder.encode(unflatten(parameters["audio_encoder"]), given["samples"], given["lengths"])
        return {"features": states.astype(encoder.dtype), "lengths": is_valid.sum(axis=1, dtype=jnp.int32)}

    preprocessing = encoder.preprocessing
    most = int(LONGEST_SECONDS * SAMPLING_RATE)
    return Function(
        function,
        {"audio_encoder": _encoder_parameters(encoder, preprocessing=dataclasses.asdict(preprocessing))},
        (BATCH, Size("samples", encoder.settings.fewest_samples, most)),
        (
            Tensor("samples", "batch, samples", "float32", "one channel, normalised as settings.preprocessing says"),
            Tensor("lengths", "batch", "int32", "samples of each row; 0 for a row of padding"),
        ),
        {"features": "tokens; zeros behind a row's last one", "lengths": "tokens of each row"},
    )


def _text_function(encoder: TextEncoder, max_tokens: int) -> Function:
    def function(parameters: dict[str, dict[str, Any]], given: dict[str, Any]) -> dict[str, Any]:
        ids = given["token_ids"]
        states = encoder.encode(unflatten(parameters["text_encoder"]), ids, _segment_ids(ids, given["lengths"]))
        return {"features": states.astype(encoder.dtype)}

    return Function(
        function,
        {"text_encoder": _encoder_parameters(encoder, max_tokens=max_tokens)},
        (BATCH, Size("tokens", 1, max_tokens)),
        (
            Tensor("token_ids", "batch, tokens", "int32", "of the checkpoint's tokenizer, one text a row"),
            Tensor("lengths", "batch", "int32", "tokens of each text; 0 for a row of padding"),
        ),
        {"features": "a state for each token; zeros behind a text's last one"},
    )


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
        parts: some of "fusion", "encoders", "top_k"; None takes those that the run has, and reports which it lacks.
        k: see :func:`top_k_function`.
        index: see :func:`top_k_function`.
        platforms: that the programs will run on.
        report: takes a line for each part that is left out.

    Raises:
        InputError: the run lacks a part that was asked for, or has none at all.
    """
    makers: dict[str, Callable[[], dict[str, Function]]] = {
        "fusion": lambda: {"fusion": fusion_function(run)},
        "encoders": lambda: encoder_functions(*_encoders_of(run)),
        "top_k": lambda: {"top_k": top_k_function(run, k=k, index=index, platforms=platforms)},
    }
    found: dict[str, Function] = {}
    refusals: list[InputError] = []
    for part, make in makers.items():
        if parts is not None and part not in parts:
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
