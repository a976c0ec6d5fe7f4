"""Extraction with ResNet and the Audio-CNN: tokens are what the encoders give of each clip alone."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from mmei_jax.encoders.preprocessing import ImagePreprocessing
from mmei_jax.encoders.pretrained import load
from mmei_jax.encoders.pretrained_files import read_preprocessing
from mmei_jax.extraction.encoder_loading import Devices
from mmei_jax.extraction.encoding import ClipEncoder
from mmei_jax.extraction.media import Span, decode_audio, decode_frames
from mmei_jax.extraction.vision_encoding import VisionEncoder
from mmei_jax.records import Dataset
from mmei_jax.types import InputError
from tests import random_weights_test, tiny_encoders, tiny_extraction
from tests.tiny_extraction import RATE, features


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders of all five, tiny, by kind."""
    folder = tmp_path_factory.mktemp("encoders")
    return {kind: random_weights_test.make(folder, kind, kind)[0] for kind in random_weights_test.TINY_CONFIGS}


@pytest.fixture(scope="module")
def encoders(made):
    return SimpleNamespace(converted={"vision": made["resnet"], "audio": made["audio_cnn"], "text": made["bert"]})


@pytest.fixture(scope="module")
def extracted(encoders, tmp_path_factory):
    clips = tiny_extraction.make_clips(tmp_path_factory.mktemp("clips"))
    output = tmp_path_factory.mktemp("extracted") / "data"
    tiny_extraction.run(encoders, clips, output, changes={"vision__token": "pooled"})
    return clips.parent, output


def test_tokens_are_those_of_the_encoders_on_each_clip_alone(made, extracted):
    clips, output = extracted
    states = features(output)
    resnet, audio_cnn = load(made["resnet"]), load(made["audio_cnn"])
    image = ImagePreprocessing.read(read_preprocessing(made["resnet"]))
    for index in (0, 3):
        path, key = clips / f"{index}.mp4", f"clip{index}"
        frames = np.stack([image.resize(frame) for _, frame in decode_frames(path, Span(), 5.0, 16)])
        pooled = resnet.module.apply({"params": resnet.parameters}, image.normalise(frames)).pooled
        scale = np.abs(pooled).max()
        np.testing.assert_allclose(states["vision"][key] / scale, np.asarray(pooled) / scale, atol=1e-5)
        samples = decode_audio(path, Span(), RATE)
        heard = audio_cnn.module.apply({"params": audio_cnn.parameters}, samples[None]).last_hidden_state[0]
        # Bands between a tone's harmonics are near silence, whose logarithm tells orders of summation apart.
        np.testing.assert_allclose(states["audio"][key], heard, atol=1e-4)
        assert states["vision"][key].shape == (len(frames), 20)
        assert states["audio"][key].shape[1] == 12


def test_manifest_says_which_encoders_ran_and_that_their_weights_are_random(extracted):
    modalities = Dataset.open(extracted[1]).spec.modalities
    assert {name: spec.producer.encoder for name, spec in modalities.items()} == {
        "vision": "resnet random weights, seed 0",
        "audio": "audio_cnn random weights, seed 0",
        "text": "bert random weights, seed 0",
    }
    assert modalities["vision"].producer.pooling == "pooled"
    assert (modalities["audio"].producer.layer, modalities["audio"].producer.padding_policy) == ("last", "exact")


def test_pooled_token_of_a_vit_is_its_poolers_output(tmp_path):
    tiny = tiny_encoders.make(tmp_path)
    encoder = VisionEncoder(tiny_extraction.config(tiny, vision__token="pooled"), Devices())
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    vit = load(tiny.converted["vision"])
    expected = vit.module.apply({"params": vit.parameters}, encoder.settings.preprocessing.normalise(pixels)).pooled
    np.testing.assert_allclose(encoder.dispatch(pixels)[:3], expected, atol=1e-5)
    assert encoder.dim == expected.shape[1]
    assert np.abs(jax.device_get(expected)).max() <= 1.0


REFUSED = [
    ({}, {}, "config.vision.token = 'first': expected 'pooled' for a ResNet"),
    ({}, {"vision__token": "mean_of_patches"}, "config.vision.token = 'mean_of_patches': expected 'pooled'"),
    ({"vision": "vit"}, {"vision__token": "pooled"}, "config.vision.token = 'pooled': expected 'first' or 'mean_of_p"),
    ({"vision": "audio_cnn"}, {}, "holds a AudioCnnConfig: expected a VitConfig or a ResNetConfig"),
    (
        {},
        {"vision__token": "pooled", "audio__layers": "sum_of_last_four"},
        "config.audio.layers = 'sum_of_last_four': expected 'last' for an Audio-CNN",
    ),
    ({"audio": "bert"}, {"vision__token": "pooled"}, "holds a BertConfig: expected a Wav2Vec2Config or a AudioCnn"),
]


@pytest.mark.parametrize(("kinds", "changes", "message"), REFUSED)
def test_what_an_encoder_does_not_have_is_refused_in_one_line(made, encoders, kinds, changes, message):
    converted = {**encoders.converted, **{modality: made[kind] for modality, kind in kinds.items()}}
    config = tiny_extraction.config(SimpleNamespace(converted=converted), **changes)
    with pytest.raises(InputError, match=message) as caught:
        ClipEncoder(config)
    assert "\n" not in str(caught.value)


def test_audio_cnn_of_another_rate_is_refused(tmp_path, made):
    folder, _ = random_weights_test.make(tmp_path, "audio_cnn")
    (folder / "preprocessor_config.json").write_text(json.dumps({"sampling_rate": 8000}))
    config = tiny_extraction.config(SimpleNamespace(converted={"audio": folder}), modalities=("audio",))
    with pytest.raises(InputError, match="sampling_rate = 8000: expected 16000 for an Audio-CNN"):
        ClipEncoder(config)
