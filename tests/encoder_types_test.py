"""Sixteen bits in every encoder, stage by stage: of what products read, of the parameters, and of both."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import linen as nn

from mmei_jax.encoders import (
    AudioCnn,
    AudioCnnConfig,
    Bert,
    ComputeOptions,
    EncoderOutputs,
    ResNet,
    Vit,
    Wav2Vec2,
    stack_layers,
)
from tests import hugging_face

# As deep as the real ones, and narrow.
SIZE = dict(hidden_size=32, num_hidden_layers=12, num_attention_heads=4, intermediate_size=64)
AUDIO = dict(
    conv_dim=(8, 8, 12),
    conv_kernel=(10, 3, 2),
    conv_stride=(5, 2, 2),
    num_conv_pos_embeddings=6,
    num_conv_pos_embedding_groups=4,
)
STABLE = dict(do_stable_layer_norm=True, feat_extract_norm="layer", conv_bias=True)
RESNET = dict(embedding_size=8, hidden_sizes=[16, 32, 32, 64], depths=[1, 2, 2, 1])
MODELS = {
    "bert": (Bert, transformers.BertModel, dict(vocab_size=97, max_position_embeddings=24, **SIZE)),
    "vit": (Vit, transformers.ViTModel, dict(image_size=24, patch_size=8, **SIZE)),
    "wav2vec2": (Wav2Vec2, transformers.Wav2Vec2Model, dict(**AUDIO, **SIZE)),
    "stable_wav2vec2": (Wav2Vec2, transformers.Wav2Vec2Model, dict(**AUDIO, **SIZE, **STABLE)),
    "resnet": (ResNet, transformers.ResNetModel, RESNET),
}
# What products read, and the type of the parameters.
TYPES = [
    *(("bfloat16", "bfloat16"), ("float16", "float16")),
    *(("bfloat16", "float32"), ("float16", "float32"), ("float32", "bfloat16"), ("float32", "float16")),
]
# Of each encoder its worst case is quick; of float16 the one encoder that has both convolutions and attention.
QUICK = [*((name, *TYPES[0]) for name in ("bert", "vit", "wav2vec2", "resnet", "audio_cnn")), ("wav2vec2", *TYPES[1])]
# Relative L2 error of a stage: of bfloat16 the goal, of float16 what its three more bits make of it.
LARGEST_ERROR = {"bfloat16": 2e-2, "float16": 2e-2 / 8}


def make_inputs(name):
    generator = np.random.default_rng(0)
    if name == "bert":
        return generator.integers(1, 97, (4, 11), dtype=np.int32), np.ones((4, 11), np.int32)
    if name in ("vit", "resnet"):
        size = 24 if name == "vit" else 65
        return (generator.normal(size=(2, size, size, 3)).astype(np.float32),)
    return (0.3 * generator.normal(size=(2, 4000 if name == "audio_cnn" else 700)).astype(np.float32),)


@functools.cache
def make_case(name):
    """What makes our module for given options, float32 parameters, and the stages in float32, Hugging Face's if any."""
    if name == "audio_cnn":
        config = AudioCnnConfig(dim=12, channels=(4, 6, 8), num_mels=16)
        variables = jax.jit(AudioCnn(config).init)(jax.random.key(0), *make_inputs(name))
        parameters = nn.meta.unbox(variables["params"])
        return functools.partial(AudioCnn, config), parameters, run(AudioCnn(config), parameters, name)[0]
    module, original, shape = MODELS[name]
    model = hugging_face.randomised(original(original.config_class(**shape)))
    converted = hugging_face.converted(model)
    tensors = [torch.tensor(array) for array in make_inputs(name)]
    if name in ("vit", "resnet"):
        tensors = [tensors[0].permute(0, 3, 1, 2)]
    with torch.no_grad():
        outputs = model(*tensors, output_hidden_states=True)
    stages = [*outputs.hidden_states, outputs.last_hidden_state]
    if outputs.get("pooler_output") is not None:
        stages.append(outputs.pooler_output.flatten(1))
    stages = [stage.flatten(2).transpose(1, 2) if stage.ndim == 4 else stage for stage in stages]
    return functools.partial(module, converted.config), converted.parameters, [stage.numpy() for stage in stages]


@functools.partial(jax.jit, static_argnums=0)
def outputs_and_gradients(module, parameters, *inputs):
    def loss(parameters) -> tuple[jax.Array, EncoderOutputs]:
        outputs = module.apply({"params": parameters}, *inputs, with_hidden_states=True)
        return jnp.square(outputs.last_hidden_state).mean(), outputs

    gradients, outputs = jax.grad(loss, has_aux=True)(parameters)
    return outputs, gradients


def run(module, parameters, name):
    """All stages, and the gradients of a loss."""
    given = stack_layers(parameters) if module.options.scan_layers else parameters
    outputs, gradients = outputs_and_gradients(module, given, *make_inputs(name))
    pooled = [] if outputs.pooled is None else [outputs.pooled]
    return [*outputs.hidden_states, outputs.last_hidden_state, *pooled], gradients


@pytest.mark.parametrize(
    ("name", "compute_dtype", "dtype"),
    [
        pytest.param(*case, marks=[] if case in QUICK else [pytest.mark.slow])
        for case in ((name, *types) for name in [*MODELS, "audio_cnn"] for types in TYPES)
    ],
)
def test_every_stage_stays_near_float32(name, compute_dtype, dtype):
    make_module, parameters, expected = make_case(name)
    # Twelve layers compile as one.
    options = ComputeOptions(compute_dtype, scan_layers=name not in ("resnet", "audio_cnn"))
    rounded = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), parameters)
    stages, gradients = run(make_module(options), rounded, name)
    bits = compute_dtype if dtype == "float32" else dtype
    errors = []
    for ours, theirs in zip(stages, expected, strict=True):
        assert ours.dtype == jnp.float32
        errors.append(hugging_face.relative_error(ours, theirs))
    assert max(errors) <= LARGEST_ERROR[bits]
    assert errors[-1] > 1e-4  # something really is rounded
    for leaf in jax.tree.leaves(gradients):
        assert leaf.dtype == dtype
        assert np.isfinite(np.asarray(leaf, np.float32)).all()
    assert any(np.any(leaf) for leaf in jax.tree.leaves(gradients))
