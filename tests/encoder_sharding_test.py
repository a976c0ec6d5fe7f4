"""Encoders whose parameters are split over a mesh of eight fake CPU devices compute what they compute on one."""

import json

import pytest

from tests import processes

# Runs in a process of its own, which has eight devices: what it measured for each encoder is its last line.
PROGRAM = """
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from mmei_jax.encoders import (
    AudioCnn, AudioCnnConfig, Bert, BertConfig, ComputeOptions, ResNet, ResNetConfig, Vit, VitConfig, Wav2Vec2,
    Wav2Vec2Config,
)
from mmei_jax.sharding import batch_sharding, mesh_over, parameter_shardings

generator = np.random.default_rng(0)
shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
audio = generator.normal(size=(8, 4000)).astype(np.float32), np.array([4000, 900, 2000, 4000, 0, 3000, 1200, 4000])
pixels = generator.normal(size=(8, 32, 32, 3)).astype(np.float32)
token_ids = generator.integers(0, 61, (8, 12))
segment_ids = np.array([[1] * 5 + [2] * 4 + [0] * 3, [1] * 12] * 4)
bert = BertConfig.from_hugging_face(dict(model_type="bert", vocab_size=62, max_position_embeddings=16, **shape))
wav2vec2 = Wav2Vec2Config.from_hugging_face(dict(
    model_type="wav2vec2", conv_dim=[32] * 7, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=4, **shape
))
cases = {
    "bert": (Bert(bert), (token_ids, segment_ids)),
    "bert, scanned": (Bert(bert, ComputeOptions(scan_layers=True, remat="layer")), (token_ids, segment_ids)),
    # A vocabulary of an odd size is not split.
    "bert, 61 tokens": (Bert(BertConfig(bert.stack, 61, 16, 2)), (token_ids, segment_ids)),
    "vit": (Vit(VitConfig.from_hugging_face(dict(model_type="vit", image_size=32, patch_size=8, **shape))), (pixels,)),
    "wav2vec2": (Wav2Vec2(wav2vec2), audio),
    "resnet": (ResNet(ResNetConfig.from_hugging_face(dict(
        model_type="resnet", embedding_size=16, hidden_sizes=[32, 64], depths=[1, 2], layer_type="bottleneck"
    ))), (pixels,)),
    "audio_cnn": (AudioCnn(AudioCnnConfig()), audio),
}
mesh = mesh_over(jax.devices(), fsdp=2, tensor=2)
assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
found = {}
for name, (module, inputs) in cases.items():
    boxed = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    leaves = jax.tree.leaves(boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))
    assert all(isinstance(leaf, nn.LogicallyPartitioned) and len(leaf.names) == leaf.value.ndim for leaf in leaves)
    parameters = nn.unbox(jax.jit(module.init)(jax.random.key(0), *inputs)["params"])

    def loss(parameters, *inputs):
        states = module.apply({"params": parameters}, *inputs).last_hidden_state
        return jnp.square(states).mean(), states

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, expected), expected_gradients = run(parameters, *inputs)
    placed = jax.device_put(parameters, parameter_shardings(boxed, mesh))
    (_, states), gradients = run(placed, *jax.device_put(inputs, batch_sharding(mesh)))
    total = sum(leaf.size for leaf in jax.tree.leaves(placed))
    own = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(placed))
    norms = [float(jnp.linalg.norm(leaf.ravel())) for leaf in jax.tree.leaves(expected_gradients)]
    errors = [
        float(jnp.linalg.norm((np.asarray(leaf) - expected).ravel()))
        for leaf, expected in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True)
    ]
    allowed = 1e-3 * np.array(norms) + 1e-6 * np.linalg.norm(norms)
    found[name] = {
        "share": own / total,
        "difference": float(np.abs(np.asarray(states) - np.asarray(expected)).max()),
        "size": float(np.abs(expected).max()),
        "gradient_error": float((np.array(errors) / allowed).max()),
        "num_devices": len(states.sharding.device_set),
    }
print(json.dumps(found))
"""

# The largest share of its parameters that a device may hold; four devices share what can be split at all.
LARGEST_SHARE = {
    "bert": 0.30,
    "bert, scanned": 0.30,
    "bert, 61 tokens": 0.35,
    "vit": 0.35,
    "wav2vec2": 0.40,
    "resnet": 0.55,
    "audio_cnn": 0.55,
}


@pytest.fixture(scope="module")
def found():
    environment = processes.environment(num_devices=8)
    code, output = processes.run("-c", PROGRAM, env=environment)
    assert code == 0, output
    return json.loads(output.splitlines()[-1])


@pytest.mark.parametrize("name", LARGEST_SHARE)
def test_encoder_on_a_mesh_equals_itself_on_one_device(found, name):
    case = found[name]
    assert case["num_devices"] == 8
    assert case["share"] <= LARGEST_SHARE[name]
    assert case["size"] > 0.1
    assert case["difference"] <= 1e-5
    assert case["gradient_error"] <= 1.0
