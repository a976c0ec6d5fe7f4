"""Hugging Face's names and layouts of weights: one table per architecture says where our parameters come from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmei_jax.encoders.architectures import AUDIO_CNN, Architecture
from mmei_jax.encoders.bert import Bert, BertConfig
from mmei_jax.encoders.resnet import ResNet, ResNetConfig
from mmei_jax.encoders.stack import StackConfig
from mmei_jax.encoders.vit import Vit, VitConfig
from mmei_jax.encoders.wav2vec2 import Wav2Vec2, Wav2Vec2Config


@dataclass(frozen=True)
class Weight:
    """Where one of our parameters comes from.

    Attributes:
        names: their names of the weights that it is made of, without the base model's prefix.
        combine: makes it of them.
        instead: another way to it, taken where the checkpoint has those names.
    """

    names: tuple[str, ...]
    combine: Callable[..., np.ndarray]
    instead: "Weight | None" = None


@dataclass(frozen=True)
class Family(Architecture):
    """What conversion knows about one ``model_type``; further attributes as those of :class:`Architecture`.

    Attributes:
        prefix: what task checkpoints put before the names of the base model's weights.
        heads: first parts of names that belong to task heads, which are left out.
        ignored: patterns of names that hold nothing learned, or nothing that encoding uses.
        renamings: pairs of pattern and replacement, from older or newer names to those of the table.
        table: our parameter names, with their dots as slashes, and where each comes from.
        original_inputs: the same inputs as Hugging Face's model takes them.
    """

    prefix: str
    heads: tuple[str, ...]
    ignored: tuple[str, ...]
    renamings: tuple[tuple[str, str], ...]
    table: Callable[[Any], dict[str, Weight]]
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


def _images_channels_first(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
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
    original_inputs=_images_channels_first,
)


def kernel_1d(array: np.ndarray) -> np.ndarray:
    """``[out, in, window]`` of a torch convolution to ``[window, in, out]``."""
    return array.transpose(2, 1, 0)


def fold_weight_norm(magnitude: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """A kernel from its weight norm along the window: for each place of it a magnitude and a direction.

    Args:
        magnitude: ``[1, 1, window]``.
        direction: ``[out, in, window]``, of any length.

    Returns:
        ``[window, in, out]``.
    """
    exact = direction.astype(np.float64)
    norm = np.sqrt((exact**2).sum(axis=(0, 1), keepdims=True))
    return kernel_1d((magnitude.astype(np.float64) * exact / norm).astype(np.float32))


def _convolution_1d(ours: str, theirs: str, *, has_bias: bool = True) -> dict[str, Weight]:
    table = {f"{ours}/kernel": Weight((f"{theirs}.weight",), kernel_1d)}
    return table | ({f"{ours}/bias": Weight((f"{theirs}.bias",), as_it_is)} if has_bias else {})


def _wav2vec2_table(config: Wav2Vec2Config) -> dict[str, Weight]:
    table: dict[str, Weight] = {}
    for index in range(len(config.front_dims)):
        theirs = f"feature_extractor.conv_layers.{index}"
        table |= _convolution_1d(f"front_{index}", f"{theirs}.conv", has_bias=config.front_has_bias)
        if config.front_norm == "layer" or index == 0:
            table |= _norm(f"front_norm_{index}", f"{theirs}.layer_norm")
    position = "encoder.pos_conv_embed.conv"
    parts = tuple(f"{position}.parametrizations.weight.original{index}" for index in (0, 1))
    table |= {
        **_norm("projection_norm", "feature_projection.layer_norm"),
        **_linear("projection", "feature_projection.projection"),
        "position/kernel": Weight(parts, fold_weight_norm, Weight((f"{position}.weight",), kernel_1d)),
        "position/bias": Weight((f"{position}.bias",), as_it_is),
        **_norm("encoder_norm", "encoder.layer_norm"),
    }
    if config.num_adapter_layers and config.adapter_dim != config.stack.dim:
        table |= _linear("adapter", "adapter.proj") | _norm("adapter_norm", "adapter.proj_layer_norm")
    for index in range(config.num_adapter_layers):
        table |= _convolution_1d(f"adapter_{index}", f"adapter.layers.{index}.conv")
    return table | _layers(
        config.stack,
        "encoder.layers.{}",
        {
            "attention/query": "attention.q_proj",
            "attention/key": "attention.k_proj",
            "attention/value": "attention.v_proj",
            "attention/output": "attention.out_proj",
            "attention_norm": "layer_norm",
            "feed_forward/hidden": "feed_forward.intermediate_dense",
            "feed_forward/output": "feed_forward.output_dense",
            "feed_forward_norm": "final_layer_norm",
        },
    )


def _wav2vec2_example(config: Wav2Vec2Config) -> dict[str, np.ndarray]:
    # Without padding, where Hugging Face's outputs and ours are the same in every mode.
    num_samples = config.receptive_field + 24 * int(np.prod(config.front_strides)) + 1
    return {"samples": np.random.default_rng(0).normal(size=(2, num_samples)).astype(np.float32)}


def _wav2vec2_original_inputs(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"input_values": inputs["samples"]}


WAV2VEC2 = Family(
    model_type="wav2vec2",
    prefix="wav2vec2.",
    heads=(
        *("lm_head", "project_hid", "project_q", "quantizer"),
        *("projector", "classifier", "layer_weights", "tdnn", "feature_extractor", "objective"),
    ),
    # What stands in for hidden frames while training on them.
    ignored=(r"masked_spec_embed",),
    # Weight norm as torch wrote it before version 2.
    renamings=(
        (r"\.weight_g$", ".parametrizations.weight.original0"),
        (r"\.weight_v$", ".parametrizations.weight.original1"),
    ),
    pooler=None,
    read_config=Wav2Vec2Config.read,
    make_module=Wav2Vec2,
    table=_wav2vec2_table,
    example=_wav2vec2_example,
    original_inputs=_wav2vec2_original_inputs,
)


def kernel_2d(array: np.ndarray) -> np.ndarray:
    """``[out, in, height, width]`` of a torch convolution to ``[height, width, in, out]``."""
    return array.transpose(2, 3, 1, 0)


def _stored_norm_convolution(ours: str, theirs: str) -> dict[str, Weight]:
    """A convolution without bias and the batch norm after it."""
    norm = f"{theirs}.normalization"
    return {
        f"{ours}/kernel": Weight((f"{theirs}.convolution.weight",), kernel_2d),
        **_norm(f"{ours}_norm", norm),
        f"{ours}_norm/mean": Weight((f"{norm}.running_mean",), as_it_is),
        f"{ours}_norm/variance": Weight((f"{norm}.running_var",), as_it_is),
    }


def _resnet_table(config: ResNetConfig) -> dict[str, Weight]:
    table = _stored_norm_convolution("stem", "embedder.embedder")
    dim = config.stem_dim
    for stage, depth in enumerate(config.depths):
        for block in range(depth):
            ours, theirs = f"stage_{stage}_block_{block}", f"encoder.stages.{stage}.layers.{block}"
            for index in range(len(config.convolutions(stage, block))):
                table |= _stored_norm_convolution(f"{ours}/convolution_{index}", f"{theirs}.layer.{index}")
            if config.has_shortcut(dim, stage, block):
                table |= _stored_norm_convolution(f"{ours}/shortcut", f"{theirs}.shortcut")
            dim = config.stage_dims[stage]
    return table


def _resnet_example(config: ResNetConfig) -> dict[str, np.ndarray]:
    pixels = np.random.default_rng(0).normal(size=(2, 96, 64, config.num_channels))
    return {"pixels": pixels.astype(np.float32)}


RESNET = Family(
    model_type="resnet",
    prefix="resnet.",
    heads=("classifier",),
    # How many batches the statistics were made of.
    ignored=(r".*\.num_batches_tracked",),
    renamings=(),
    pooler=None,
    read_config=ResNetConfig.read,
    make_module=ResNet,
    table=_resnet_table,
    example=_resnet_example,
    original_inputs=_images_channels_first,
)

# What is converted, and what a converted folder may hold.
FAMILIES: Mapping[str, Family] = {family.model_type: family for family in (BERT, VIT, WAV2VEC2, RESNET)}
ARCHITECTURES: Mapping[str, Architecture] = {**FAMILIES, AUDIO_CNN.model_type: AUDIO_CNN}
