"""Audio-CNN: its spectrogram against transformers', its layers and gradients against torch's, and its lengths."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import audio_utils

from mmei_jax.encoders.audio_cnn import SAMPLING_RATE, AudioCnn, AudioCnnConfig, log_mel
from mmei_jax.encoders.stack import ComputeOptions
from mmei_jax.types import InputError
from tests import hugging_face

# Differently shaped.
SHAPES = {
    "three_convolutions": AudioCnnConfig(dim=12, channels=(4, 6, 8), num_mels=16),
    "one_convolution": AudioCnnConfig(dim=7, channels=(5,), num_mels=9),
    "five_convolutions": AudioCnnConfig(dim=10, channels=(3, 4, 5, 6, 7), num_mels=33),
    "fewer_and_fewer_channels": AudioCnnConfig(dim=3, channels=(16, 8, 2), num_mels=20),
    "one_band": AudioCnnConfig(dim=8, channels=(6, 6), num_mels=1),
    "wide": AudioCnnConfig(dim=40, channels=(24, 32), num_mels=64),
}
CONFIG = SHAPES["three_convolutions"]
LENGTHS = (4000, 2313, 399, 400, 0)


def make_audio(seed=0):
    generator = np.random.default_rng(seed)
    return 0.3 * generator.normal(size=(len(LENGTHS), max(LENGTHS))).astype(np.float32), np.array(LENGTHS, np.int32)


@functools.cache
def make_parameters(config=CONFIG):
    samples, lengths = make_audio()
    variables = jax.eval_shape(lambda: AudioCnn(config).init(jax.random.key(0), samples, lengths))
    generator = np.random.default_rng(3)

    def draw(path, leaf):
        noise = generator.normal(size=leaf.shape).astype(np.float32)
        if leaf.ndim == 1:
            return jnp.asarray(0.2 * noise + ("scale" in jax.tree_util.keystr(path)))
        return jnp.asarray(noise * np.prod(leaf.shape[:-1]).astype(np.float32) ** -0.5)

    return jax.tree_util.tree_map_with_path(draw, nn.meta.unbox(variables["params"]))


@pytest.mark.parametrize("num_mels", [16, 64])
def test_spectrogram_equals_transformers(num_mels):
    samples, _ = make_audio()
    samples[1] = 0.0  # silence lies on the floor
    filters = audio_utils.mel_filter_bank(257, num_mels, 0.0, 8000.0, SAMPLING_RATE, norm=None, mel_scale="htk")
    ours = jax.jit(log_mel, static_argnums=1)(samples, num_mels)
    for row, waveform in zip(ours, samples, strict=True):
        expected = audio_utils.spectrogram(
            waveform,
            audio_utils.window_function(400, "hann"),
            frame_length=400,
            hop_length=160,
            fft_length=512,
            power=2.0,
            center=False,
            mel_filters=filters,
            mel_floor=1e-6,
            log_mel="log",
        )
        np.testing.assert_allclose(row, expected.T, rtol=0, atol=1e-4)


def as_torch(parameters):
    """The parameters as torch's, that gradients can be taken of, in our layout and under our names."""
    return {
        layer: {name: torch.tensor(np.asarray(array), requires_grad=True) for name, array in arrays.items()}
        for layer, arrays in parameters.items()
    }


def run_torch(config, parameters, samples):
    """What enters each convolution, what leaves the last, and the states, by torch's layers on one row alone."""
    norm = torch.nn.functional.layer_norm
    spectrogram = log_mel(jnp.asarray(samples)[None], config.num_mels)[0]
    stages = [torch.tensor(np.asarray(spectrogram))[..., None]]  # [places, bands, channels]
    for index, channels in enumerate(config.channels):
        convolution, scaling = parameters[f"conv_{index}"], parameters[f"norm_{index}"]
        x = stages[-1].permute(2, 0, 1)[None]
        kernel = convolution["kernel"].permute(3, 2, 0, 1)
        x = torch.nn.functional.conv2d(x, kernel, convolution["bias"], stride=2, padding=1)[0].permute(1, 2, 0)
        stages.append(torch.nn.functional.gelu(norm(x, (channels,), scaling["scale"], scaling["bias"], 1e-5)))
    stages = [stage.flatten(1) for stage in stages]
    states = stages[-1] @ parameters["projection"]["kernel"] + parameters["projection"]["bias"]
    scaling = parameters["last_norm"]
    return stages, norm(states, (config.dim,), scaling["scale"], scaling["bias"], 1e-5)


@pytest.mark.parametrize("name", SHAPES)
def test_each_row_of_a_ragged_batch_equals_torch_on_the_row_alone(name):
    """Stages, end and gradients."""
    config = SHAPES[name]
    samples, lengths = make_audio()
    parameters = make_parameters(config)
    generator = np.random.default_rng(1)
    num_tokens = config.num_tokens(lengths)
    weights = generator.normal(size=(len(lengths), max(num_tokens), config.dim)).astype(np.float32)
    pooled_weights = generator.normal(size=(len(lengths), config.dim)).astype(np.float32)

    @functools.partial(jax.grad, has_aux=True)
    def gradients_and_outputs(parameters):
        garbage = jnp.where(np.arange(samples.shape[1]) < lengths[:, None], samples, jnp.nan)
        outputs = AudioCnn(config).apply({"params": parameters}, garbage, lengths, with_hidden_states=True)
        return jnp.sum(outputs.last_hidden_state * weights) + jnp.sum(outputs.pooled * pooled_weights), outputs

    gradients, outputs = jax.jit(gradients_and_outputs)(parameters)
    np.testing.assert_array_equal(outputs.is_valid, np.arange(max(num_tokens)) < num_tokens[:, None])
    reference = as_torch(parameters)
    for row, length in enumerate(LENGTHS):
        own = num_tokens[row]
        assert not np.any(outputs.last_hidden_state[row, own:])
        if length < 400:
            assert own == 0
            assert not np.any(outputs.pooled[row])
            continue
        stages, states = run_torch(config, reference, samples[row, :length])
        assert len(states) == own
        for ours, theirs in zip(outputs.hidden_states, stages, strict=True):
            hugging_face.assert_close(ours[row, : len(theirs)], theirs, hugging_face.STAGE_TOLERANCE)
        hugging_face.assert_close(outputs.last_hidden_state[row, :own], states, hugging_face.STAGE_TOLERANCE)
        hugging_face.assert_close(outputs.pooled[row], states.mean(0), hugging_face.STAGE_TOLERANCE)
        loss = (states * torch.tensor(weights[row, :own])).sum() + states.mean(0) @ torch.tensor(pooled_weights[row])
        loss.backward()
    theirs = {layer: {name: leaf.grad.numpy() for name, leaf in leaves.items()} for layer, leaves in reference.items()}
    hugging_face.assert_trees_of_gradients_agree(gradients, theirs)


@settings(max_examples=60, deadline=None)
@given(num_convolutions=st.integers(1, 6), num_samples=st.integers(0, 8000))
def test_lengths_equal_those_of_the_real_convolutions(num_convolutions, num_samples):
    config = AudioCnnConfig(channels=(1,) * num_convolutions)
    signal, window = torch.zeros(1, 1, num_samples), torch.ones(1, 1, 400)
    fits = num_samples >= config.receptive_field
    signal = torch.nn.functional.conv1d(signal, window, stride=160) if fits else signal[..., :0]
    for _ in range(num_convolutions if fits else 0):
        signal = torch.nn.functional.conv1d(signal, torch.ones(1, 1, 3), stride=2, padding=1)
    assert config.num_tokens(num_samples) == signal.shape[2]
    assert (config.num_tokens(num_samples) > 0) == fits
    np.testing.assert_array_equal(config.num_tokens(np.array([num_samples] * 2)), signal.shape[2])


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(("place", "num_spoilt"), [(7, 1), (2000, 2), (3950, 0)])
def test_sample_that_is_not_finite_spoils_the_tokens_that_hear_it_and_the_mean(place, num_spoilt, value):
    samples, lengths = make_audio()
    samples[0, place] = value  # the last is behind the last window that fits
    outputs = jax.jit(AudioCnn(CONFIG).apply)({"params": make_parameters()}, samples, lengths)
    _, expected = run_torch(CONFIG, as_torch(make_parameters()), samples[0])
    states = np.asarray(outputs.last_hidden_state)
    is_spoilt = np.isnan(states[0])
    np.testing.assert_array_equal(is_spoilt, expected.isnan().numpy())
    assert is_spoilt.all(axis=1).sum() == is_spoilt.any(axis=1).sum() == num_spoilt < len(is_spoilt)
    assert np.isnan(outputs.pooled[0]).all() == (num_spoilt > 0)
    assert np.isfinite(states[1:]).all()
    assert np.isfinite(outputs.pooled[1:]).all()


def test_tokens_come_at_their_times():
    config = AudioCnnConfig()
    times = config.frame_times_seconds(config.num_tokens(2 * SAMPLING_RATE))
    assert len(times) == 13
    np.testing.assert_allclose(np.diff(times), 0.16, rtol=1e-4)
    assert times[0] == pytest.approx(0.0125)


def test_bfloat16_stays_within_two_percent_and_gradients_are_finite():
    samples, lengths = make_audio()

    def run(options):
        def loss(parameters):
            apply = functools.partial(AudioCnn(CONFIG, options).apply, with_hidden_states=True)
            outputs = apply({"params": parameters}, samples, lengths)
            return outputs.pooled.sum(), outputs

        return jax.jit(jax.grad(loss, has_aux=True))(make_parameters())

    _, exact = run(ComputeOptions())
    gradients, rounded = run(ComputeOptions("bfloat16"))
    np.testing.assert_array_equal(rounded.hidden_states[0], exact.hidden_states[0])  # the spectrogram
    stages = [(*outputs.hidden_states[1:], outputs.last_hidden_state, outputs.pooled) for outputs in (rounded, exact)]
    for actual, expected in zip(*stages, strict=True):
        assert actual.dtype == jnp.float32
        assert 1e-4 < hugging_face.relative_error(actual, expected) <= 2e-2
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match="399 samples: one window takes at least 400"):
        AudioCnn(CONFIG).apply({"params": {}}, np.zeros((1, 399), np.float32))
    with pytest.raises(InputError, match="scan_layers"):
        AudioCnn(CONFIG, ComputeOptions(scan_layers=True)).apply({"params": {}}, np.zeros((1, 400), np.float32))
    with pytest.raises(InputError, match=r"remat = 'layer': .* expected none"):
        AudioCnn(CONFIG, ComputeOptions(remat="layer")).apply({"params": {}}, np.zeros((1, 400), np.float32))
    with pytest.raises(InputError, match="channels"):
        AudioCnnConfig(channels=())
