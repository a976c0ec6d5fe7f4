"""Which parameters are trained, by the names that the real encoders give them."""

import jax
import numpy as np
import optax
import pytest
from flax import linen as nn

from mmei_jax.encoders.audio_cnn import AudioCnn, AudioCnnConfig
from mmei_jax.encoders.bert import BertConfig
from mmei_jax.encoders.freezing import trainable_parameters
from mmei_jax.encoders.pretrained_tables import FAMILIES
from mmei_jax.encoders.pretrained_weights import flatten, parameter_shapes, unflatten
from mmei_jax.encoders.resnet import ResNetConfig
from mmei_jax.encoders.stack import stack_layers
from mmei_jax.encoders.vit import VitConfig
from mmei_jax.encoders.wav2vec2 import Wav2Vec2Config
from mmei_jax.types import InputError

STACK = dict(hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=8)
AUDIO = dict(**STACK, conv_dim=[4], conv_kernel=[4], conv_stride=[2], num_conv_pos_embedding_groups=2)
ADAPTER = dict(add_adapter=True, output_hidden_size=4, num_adapter_layers=1)
CONFIGS = {
    "bert": BertConfig.from_hugging_face({"model_type": "bert", "vocab_size": 9, **STACK}),
    "vit": VitConfig.from_hugging_face({"model_type": "vit", "image_size": 32, **STACK}),
    "post_wav2vec2": Wav2Vec2Config.from_hugging_face({"model_type": "wav2vec2", **AUDIO, **ADAPTER}),
    "stable_wav2vec2": Wav2Vec2Config.from_hugging_face(
        {"model_type": "wav2vec2", "do_stable_layer_norm": True, **AUDIO}
    ),
    "resnet": ResNetConfig.from_hugging_face(
        {"model_type": "resnet", "embedding_size": 4, "hidden_sizes": [8, 8], "depths": [1, 2]}
    ),
}


def make_parameters(name):
    family = FAMILIES[name.rpartition("_")[2]]
    return unflatten({key: np.ones(shape) for key, shape in parameter_shapes(family, CONFIGS[name]).items()})


def trained(name, num_layers):
    mask = trainable_parameters(make_parameters(name), CONFIGS[name], num_layers)
    return {key for key, is_trained in flatten(mask).items() if is_trained}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bert", {"encoder/layer_1", "encoder/layer_2", "pooler"}),
        ("vit", {"encoder/layer_1", "encoder/layer_2", "pooler", "last_norm"}),
        ("post_wav2vec2", {"encoder/layer_1", "encoder/layer_2", "adapter", "adapter_norm", "adapter_0"}),
        ("stable_wav2vec2", {"encoder/layer_1", "encoder/layer_2", "encoder_norm"}),
        ("resnet", {"stage_1_block_0", "stage_1_block_1"}),
    ],
)
def test_last_layers_are_trained_with_what_stands_behind_them(name, expected):
    found = {"/".join(key.split("/")[: 2 if key.startswith("encoder/") else 1]) for key in trained(name, 2)}
    assert found == expected


@pytest.mark.parametrize("name", CONFIGS)
def test_none_trains_everything_but_stored_statistics_and_zero_nothing(name):
    everything = set(flatten(make_parameters(name)))
    statistics = {key for key in everything if key.endswith(("/mean", "/variance"))}
    assert trained(name, None) == everything - statistics
    assert bool(statistics) == (name == "resnet")
    assert trained(name, 0) == set()


def test_audio_cnn_is_trained_as_a_whole_or_not_at_all():
    config = AudioCnnConfig(dim=2, channels=(2,), num_mels=2)
    samples = np.zeros((1, 400), np.float32)
    parameters = nn.meta.unbox(jax.eval_shape(AudioCnn(config).init, jax.random.key(0), samples)["params"])
    assert all(flatten(trainable_parameters(parameters, config)).values())
    assert not any(flatten(trainable_parameters(parameters, config, 0)).values())
    with pytest.raises(InputError, match="num_layers = 2: expected None or 0; this encoder is trained as a whole"):
        trainable_parameters(parameters, config, 2)


def test_frozen_parameters_stay_as_they_are_under_an_optimizer_with_weight_decay():
    parameters = make_parameters("bert")
    mask = trainable_parameters(parameters, CONFIGS["bert"], 1)
    frozen = jax.tree.map(lambda is_trained: not is_trained, mask)
    optimizer = optax.chain(optax.adamw(0.1, weight_decay=0.1), optax.masked(optax.set_to_zero(), frozen))
    updates, _ = optimizer.update(parameters, optimizer.init(parameters), parameters)
    for key, update in flatten(updates).items():
        assert np.any(update) == flatten(mask)[key]


def test_impossible_numbers_and_stacked_layers_are_refused():
    parameters = make_parameters("bert")
    for num_layers in (-1, 4):
        with pytest.raises(InputError, match="expected 0 to 3"):
            trainable_parameters(parameters, CONFIGS["bert"], num_layers)
    stacked = stack_layers(parameters)
    with pytest.raises(InputError, match="unstack_layers"):
        trainable_parameters(stacked, CONFIGS["bert"], 1)
    assert all(flatten(trainable_parameters(stacked, CONFIGS["bert"])).values())
