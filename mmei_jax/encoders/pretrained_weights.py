"""From the names and layouts of Hugging Face's weights to ours: one table per architecture, strict both ways."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from mmei_jax.encoders.bert import Bert, BertConfig
from mmei_jax.encoders.hugging_face_config import ConfigReader
from mmei_jax.encoders.stack import StackConfig
from mmei_jax.encoders.vit import Vit, VitConfig
from mmei_jax.types import InputError

# Reads one weight when it is needed, so that a checkpoint is never in memory twice.
Tensors = Mapping[str, Callable[[], np.ndarray]]


@dataclass(frozen=True)
class Weight:
    """Where one of our parameters comes from.

    Attributes:
        names: their names of the weights that it is made of, without the base model's prefix.
        combine: makes it of them.
    """

    names: tuple[str, ...]
    combine: Callable[..., np.ndarray]


@dataclass(frozen=True)
class Family:
    """What conversion knows about one ``model_type``.

    Attributes:
        model_type: as in ``config.json``.
        prefix: what task checkpoints put before the names of the base model's weights.
        heads: first parts of names that belong to task heads, which are left out.
        ignored: patterns of names that hold nothing learned, or nothing that encoding uses.
        renamings: pairs of pattern and replacement, from older or newer names to those of the table.
        pooler: beginning of the names of the pooler, whose presence the configuration does not tell.
        read_config: our configuration from theirs.
        make_module: our module from our configuration.
        table: our parameter names, with their dots as slashes, and where each comes from.
        example: fixed inputs of the module, for shapes and comparisons.
        original_inputs: the same inputs as Hugging Face's model takes them.
    """

    model_type: str
    prefix: str
    heads: tuple[str, ...]
    ignored: tuple[str, ...]
    renamings: tuple[tuple[str, str], ...]
    pooler: str | None
    read_config: Callable[..., Any]
    make_module: Callable[..., nn.Module]
    table: Callable[[Any], dict[str, Weight]]
    example: Callable[[Any], dict[str, np.ndarray]]
    original_inputs: Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]


def as_it_is(array: np.ndarray) -> np.ndarray:
    """The same layout."""
    return array


def transposed(array: np.ndarray) -> np.ndarray:
    """``[out, in]`` of a torch linear layer to ``[in, out]``."""
    return array.T


def _linear(ours: str, theirs: str, *, has_bias: bool = True) -> dict[str, Weight]:
    table = {f"{ours}/kernel": Weight((f"{theirs}.weight",), transposed)}
    if has_bias:
        table[f"{ours}/bias"] = Weight((f"{theirs}.bias",), as_it_is)
    return table


def _norm(ours: str, theirs: str) -> dict[str, Weight]:
    return {
        f"{ours}/scale": Weight((f"{theirs}.weight",), as_it_is),
        f"{ours}/bias": Weight((f"{theirs}.bias",), as_it_is),
    }


def _embedding(ours: str, theirs: str) -> dict[str, Weight]:
    return {f"{ours}/embedding": Weight((f"{theirs}.weight",), as_it_is)}


def _layers(config: StackConfig, layer: str, names: Mapping[str, str]) -> dict[str, Weight]:
    """The stack of layers.

    Args:
        config: its shape.
        layer: beginning of their names, with ``{}`` for the index.
        names: their name of each part of a layer, by ours.
    """
    table: dict[str, Weight] = {}
    for index in range(config.num_layers):
        for ours, theirs in names.items():
            ours_whole = f"encoder/layer_{index}/{ours}"
            theirs_whole = f"{layer.format(index)}.{theirs}"
            if ours.endswith("_norm"):
                table |= _norm(ours_whole, theirs_whole)
            else:
                has_bias = config.query_key_value_have_bias or ours not in _QUERY_KEY_VALUE
                table |= _linear(ours_whole, theirs_whole, has_bias=has_bias)
    return table


_QUERY_KEY_VALUE = ("attention/query", "attention/key", "attention/value")


def _bert_table(config: BertConfig) -> dict[str, Weight]:
    table = (
        _embedding("token_embedding", "embeddings.word_embeddings")
        | _embedding("token_type_embedding", "embeddings.token_type_embeddings")
        | _embedding("position_embedding", "embeddings.position_embeddings")
        | _norm("embedding_norm", "embeddings.LayerNorm")
        | _layers(
            config.stack,
            "encoder.layer.{}",
            {
                "attention/query": "attention.self.query",
                "attention/key": "attention.self.key",
                "attention/value": "attention.self.value",
                "attention/output": "attention.output.dense",
                "attention_norm": "attention.output.LayerNorm",
                "feed_forward/hidden": "intermediate.dense",
                "feed_forward/output": "output.dense",
                "feed_forward_norm": "output.LayerNorm",
            },
        )
    )
    return table | (_linear("pooler", "pooler.dense") if config.has_pooler else {})


def _bert_example(config: BertConfig) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    num_tokens = min(config.max_tokens, 32)
    lengths = np.array([num_tokens, max(1, num_tokens // 3)])
    shape = (len(lengths), num_tokens)
    return {
        "token_ids": generator.integers(0, config.vocabulary_size, shape, dtype=np.int32),
        "segment_ids": (np.arange(num_tokens) < lengths[:, None]).astype(np.int32),
        "token_type_ids": generator.integers(0, config.num_token_types, shape, dtype=np.int32),
    }


def _bert_original_inputs(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    names = {"token_ids": "input_ids", "segment_ids": "attention_mask", "token_type_ids": "token_type_ids"}
    return {theirs: inputs[ours].astype(np.int64) for ours, theirs in names.items()}


BERT = Family(
    model_type="bert",
    prefix="bert.",
    heads=("cls", "classifier", "qa_outputs"),
    ignored=(r"embeddings\.position_ids", r"embeddings\.token_type_ids"),
    # The names of the first TensorFlow checkpoints.
    renamings=((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")),
    pooler="pooler.",
    read_config=BertConfig.read,
    make_module=Bert,
    table=_bert_table,
    example=_bert_example,
    original_inputs=_bert_original_inputs,
)


def patch_kernel(array: np.ndarray) -> np.ndarray:
    """``[out, channels, height, width]`` of a torch convolution to ``[height * width * channels, out]``."""
    return array.transpose(2, 3, 1, 0).reshape(-1, len(array))


def _only_row(array: np.ndarray) -> np.ndarray:
    """``[1, 1, dim]`` to ``[dim]``."""
    return array.reshape(array.shape[-1]) if array.shape[:-1] == (1, 1) else array


def _only_image(array: np.ndarray) -> np.ndarray:
    """``[1, tokens, dim]`` to ``[tokens, dim]``."""
    return array[0] if len(array) == 1 else array


def _vit_table(config: VitConfig) -> dict[str, Weight]:
    table = {
        "first_token": Weight(("embeddings.cls_token",), _only_row),
        "position_embedding": Weight(("embeddings.position_embeddings",), _only_image),
        "patch_embedding/kernel": Weight(("embeddings.patch_embeddings.projection.weight",), patch_kernel),
        "patch_embedding/bias": Weight(("embeddings.patch_embeddings.projection.bias",), as_it_is),
    } | _layers(
        config.stack,
        "encoder.layer.{}",
        {
            "attention/query": "attention.attention.query",
            "attention/key": "attention.attention.key",
            "attention/value": "attention.attention.value",
            "attention/output": "attention.output.dense",
            "attention_norm": "layernorm_before",
            "feed_forward/hidden": "intermediate.dense",
            "feed_forward/output": "output.dense",
            "feed_forward_norm": "layernorm_after",
        },
    )
    return table | _norm("last_norm", "layernorm") | (_linear("pooler", "pooler.dense") if config.has_pooler else {})


def _vit_example(config: VitConfig) -> dict[str, np.ndarray]:
    pixels = np.random.default_rng(0).normal(size=(2, *config.image_size, config.num_channels))
    return {"pixels": pixels.astype(np.float32)}


def _vit_original_inputs(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"pixel_values": inputs["pixels"].transpose(0, 3, 1, 2)}


VIT = Family(
    model_type="vit",
    prefix="vit.",
    heads=("classifier", "decoder"),
    # What stood in for hidden patches while training on them.
    ignored=(r"embeddings\.mask_token",),
    # The names inside transformers 5, which its files do not have.
    renamings=(
        (r"^layers\.(\d+)\.", r"encoder.layer.\1."),
        (r"\.attention\.q_proj\.", ".attention.attention.query."),
        (r"\.attention\.k_proj\.", ".attention.attention.key."),
        (r"\.attention\.v_proj\.", ".attention.attention.value."),
        (r"\.attention\.o_proj\.", ".attention.output.dense."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
    ),
    pooler="pooler.",
    read_config=VitConfig.read,
    make_module=Vit,
    table=_vit_table,
    example=_vit_example,
    original_inputs=_vit_original_inputs,
)

FAMILIES: Mapping[str, Family] = {family.model_type: family for family in (BERT, VIT)}


@dataclass(frozen=True)
class Converted:
    """A checkpoint in our names.

    Attributes:
        family: its kind.
        config: our configuration.
        parameters: nested dicts of arrays, one entry per layer.
        left_out: names of the weights of heads.
        ignored: names of the weights that hold nothing learned or that encoding does not use.
        unread_keys: keys of ``config.json`` that change nothing about encoding.
        source_dtypes: types of the weights as stored.
    """

    family: Family
    config: Any
    parameters: dict[str, Any]
    left_out: tuple[str, ...]
    ignored: tuple[str, ...]
    unread_keys: tuple[str, ...]
    source_dtypes: tuple[str, ...]


def convert_weights(config: Mapping[str, Any], tensors: Tensors, dtype: str = "float32") -> Converted:
    """Our parameters from a configuration and weights of Hugging Face's.

    Args:
        config: what ``config.json`` holds.
        tensors: weights by name, as stored: of a base model, or of a task model, whose heads are left out.
        dtype: type of the parameters.

    Raises:
        InputError: the architecture is not implemented, or weights are missing, unexpected or of another shape; lists
            all of them.
    """
    family = FAMILIES.get(config.get("model_type", ""))
    if family is None:
        known = ", ".join(FAMILIES)
        raise InputError(
            f"config.json: model_type = {config.get('model_type')!r} is not implemented; there are {known}"
        )
    base, left_out, ignored, unexpected = _sort_names(family, tensors)
    reader = ConfigReader(config, family.model_type)
    has_pooler = family.pooler is not None and any(name.startswith(family.pooler) for name in base)
    ours = family.read_config(reader, **({"has_pooler": has_pooler} if family.pooler else {}))
    table = family.table(ours)
    parameters, dtypes = _fill(
        family, ours, table, {name: tensors[theirs] for name, theirs in base.items()}, unexpected, dtype
    )
    return Converted(
        family, ours, parameters, tuple(left_out), tuple(ignored), tuple(reader.unread), tuple(sorted(dtypes))
    )


def _sort_names(family: Family, tensors: Tensors) -> tuple[dict[str, str], list[str], list[str], list[str]]:
    """Names of the base model, by the table's spelling; those of heads; those that are ignored; all others."""
    is_task_checkpoint = any(name.startswith(family.prefix) for name in tensors)
    base: dict[str, str] = {}
    left_out, ignored, unexpected = [], [], []
    for theirs in sorted(tensors):
        name = theirs.removeprefix(family.prefix)
        for pattern, replacement in family.renamings:
            name = re.sub(pattern, replacement, name)
        is_base = theirs.startswith(family.prefix) or not is_task_checkpoint
        if any(re.fullmatch(pattern, name) for pattern in family.ignored):
            ignored.append(theirs)
        elif is_base and name not in base:
            base[name] = theirs
        elif not is_base and theirs.split(".")[0] in family.heads:
            left_out.append(theirs)
        else:
            unexpected.append(theirs)
    return base, left_out, ignored, unexpected


def _fill(
    family: Family,
    config: Any,
    table: Mapping[str, Weight],
    tensors: Tensors,
    unexpected: Sequence[str],
    dtype: str,
) -> tuple[dict[str, Any], set[str]]:
    """Our parameters as nested dicts, and the types of what they were made of; a mismatch raises with the full list."""
    shapes = parameter_shapes(family, config)
    if set(table) != set(shapes):
        raise AssertionError(f"the table of {family.model_type} and its module differ: {set(table) ^ set(shapes)}")
    wanted = {name for weight in table.values() for name in weight.names}
    problems = [f"missing {name}" for name in sorted(wanted - set(tensors))]
    problems += [f"unexpected {name}" for name in sorted({*unexpected, *(set(tensors) - wanted)})]
    parameters: dict[str, np.ndarray] = {}
    dtypes: set[str] = set()
    for ours, weight in table.items():
        if not set(weight.names) <= set(tensors):
            continue
        arrays = [tensors[name]() for name in weight.names]
        dtypes |= {str(array.dtype) for array in arrays}
        try:
            array = weight.combine(*arrays)
        except ValueError as error:
            problems.append(f"{' and '.join(weight.names)}: {error}")
            continue
        if array.shape != shapes[ours]:
            theirs = " and ".join(
                f"{name} {list(array.shape)}" for name, array in zip(weight.names, arrays, strict=True)
            )
            problems.append(f"{theirs} gives {ours} {list(array.shape)}, expected {list(shapes[ours])}")
        parameters[ours] = np.ascontiguousarray(array, dtype=jnp.dtype(dtype))
    if problems:
        raise InputError(f"the weights do not fit config.json: {'; '.join(problems)}")
    return unflatten(parameters), dtypes


def parameter_shapes(family: Family, config: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of the module's parameters by name, with slashes."""
    module = family.make_module(config)
    inputs: dict[str, Any] = dict(family.example(config))
    variables = jax.eval_shape(lambda: module.init(jax.random.key(0), **inputs))
    return {name: leaf.shape for name, leaf in flatten(nn.meta.unbox(variables["params"])).items()}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of nested mappings by their names, joined with slashes."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}/") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`flatten`."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *folders, last = name.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = value
    return tree
