"""Parameters come back from safetensors and from Orbax as they were, to the bit, whole trees of every encoder."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import transformers
from flax import linen as nn
from safetensors.numpy import load_file, save_file

from mmei_jax.encoders import AudioCnn, AudioCnnConfig, pretrained
from mmei_jax.encoders.pretrained_weights import flatten, unflatten
from tests import hugging_face

SIZE = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
AUDIO = dict(conv_dim=(6, 8), conv_kernel=(4, 3), conv_stride=(2, 2), num_conv_pos_embeddings=4)
STABLE = dict(do_stable_layer_norm=True, feat_extract_norm="layer", conv_bias=True, num_conv_pos_embedding_groups=4)
ADAPTER = dict(add_adapter=True, num_adapter_layers=1, output_hidden_size=12)
MODELS = {
    "bert": (transformers.BertModel, dict(vocab_size=31, max_position_embeddings=12, **SIZE)),
    "vit": (transformers.ViTModel, dict(image_size=16, patch_size=8, **SIZE)),
    "wav2vec2": (transformers.Wav2Vec2Model, dict(**SIZE, **AUDIO)),
    "large_like_wav2vec2": (transformers.Wav2Vec2Model, dict(**SIZE, **AUDIO, **STABLE, **ADAPTER)),
    "resnet": (transformers.ResNetModel, dict(embedding_size=8, hidden_sizes=[16, 24], depths=[1, 2])),
}


@functools.cache
def make_model(name):
    original, shape = MODELS[name]
    return hugging_face.randomised(original(original.config_class(**shape)))


def assert_same_bits(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, ours), theirs in zip(
        jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        name = jax.tree_util.keystr(path)
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), name
        assert np.asarray(ours).tobytes() == np.ascontiguousarray(theirs).tobytes(), name


def assert_orbax_gives_the_same_bits(folder, parameters):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute(), parameters)
        checkpointer.wait_until_finished()
        abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), parameters)
        restored = checkpointer.restore(folder.absolute(), abstract)
    assert_same_bits(restored, parameters)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", MODELS)
def test_converted_parameters_come_back_to_the_bit(tmp_path, name, dtype):
    model = make_model(name)
    model.save_pretrained(tmp_path / "source")
    pretrained.convert(tmp_path / "source", tmp_path / "ours", dtype=dtype, compare=False)
    loaded = pretrained.load(tmp_path / "ours").parameters
    # Rounded by jax, to the nearest; the file's are rounded by numpy.
    expected = jax.tree.map(lambda leaf: np.asarray(jnp.asarray(leaf, dtype)), hugging_face.converted(model).parameters)
    assert_same_bits(loaded, expected)
    if dtype == "float32":
        # Whatever our names and layouts: the numbers of the checkpoint, all but what conversion computes or leaves out.
        theirs = [
            tensor for name, tensor in model.state_dict().items() if not re.search("parametriz|num_b|masked", name)
        ]
        ours = [leaf for name, leaf in flatten(loaded).items() if name != "position/kernel"]
        np.testing.assert_array_equal(*(np.sort(np.concatenate([*map(np.ravel, each)])) for each in (ours, theirs)))
    assert_orbax_gives_the_same_bits(tmp_path / "orbax", loaded)


def test_parameters_of_an_audio_cnn_come_back_to_the_bit(tmp_path):
    module = AudioCnn(AudioCnnConfig(dim=8, channels=(4, 6), num_mels=8))
    variables = jax.jit(module.init)(jax.random.key(0), np.zeros((1, 400), np.float32))
    parameters = jax.device_get(nn.meta.unbox(variables["params"]))
    assert len(jax.tree.leaves(parameters)) == 12
    save_file(flatten(parameters), tmp_path / "parameters.safetensors")
    assert_same_bits(unflatten(load_file(tmp_path / "parameters.safetensors")), parameters)
    assert_orbax_gives_the_same_bits(tmp_path / "orbax", parameters)
