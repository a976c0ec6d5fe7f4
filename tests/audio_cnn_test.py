"""Audio-CNN: its spectrogram against transformers', its layers against torch's, and what does not change a row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen as nn
from transformers import audio_utils

from mmei_jax.encoders.audio_cnn import SAMPLING_RATE, AudioCnn, AudioCnnConfig, log_mel
from mmei_jax.encoders.stack import ComputeOptions
from mmei_jax.types import InputError
from tests import hugging_face

CONFIG = AudioCnnConfig(dim=12, channels=(4, 6, 8), num_mels=16)
LENGTHS = (4000, 2313, 399, 400)


def make_audio(seed=0):
    generator = np.random.default_rng(seed)
    return 0.3 * generator.normal(size=(len(LENGTHS), max(LENGTHS))).astype(np.float32), np.array(LENGTHS, np.int32)


@functools.cache
def make_parameters():
    samples, lengths = make_audio()
    variables = jax.eval_shape(lambda: AudioCnn(CONFIG).init(jax.random.key(0), samples, lengths))
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


def run_torch(parameters, spectrogram):
    """The same layers in torch on the spectrogram of one row alone: [spectra, mels]."""
    norm = torch.nn.functional.layer_norm
    x = torch.tensor(np.asarray(spectrogram))[None, None]
    for index in range(len(CONFIG.channels)):
        kernel, bias = (torch.tensor(np.asarray(parameters[f"conv_{index}"][key])) for key in ("kernel", "bias"))
        scale, shift = (torch.tensor(np.asarray(parameters[f"norm_{index}"][key])) for key in ("scale", "bias"))
        x = torch.nn.functional.conv2d(x, kernel.permute(3, 2, 0, 1), bias, stride=2, padding=1).permute(0, 2, 3, 1)
        x = torch.nn.functional.gelu(norm(x, (x.shape[-1],), scale, shift, 1e-5)).permute(0, 3, 1, 2)
    x = x[0].permute(1, 2, 0).flatten(1)
    x = x @ torch.tensor(np.asarray(parameters["projection"]["kernel"]))
    x = x + torch.tensor(np.asarray(parameters["projection"]["bias"]))
    scale, shift = (torch.tensor(np.asarray(parameters["last_norm"][key])) for key in ("scale", "bias"))
    return norm(x, (CONFIG.dim,), scale, shift, 1e-5)


def test_each_row_of_a_ragged_batch_equals_torch_on_the_row_alone():
    samples, lengths = make_audio()
    parameters = make_parameters()
    garbage = np.where(np.arange(samples.shape[1]) < lengths[:, None], samples, np.nan).astype(np.float32)
    outputs = jax.jit(AudioCnn(CONFIG).apply)({"params": parameters}, garbage, lengths)
    for row, length in enumerate(LENGTHS):
        num_tokens = CONFIG.num_tokens(length)
        assert outputs.is_valid[row].sum() == num_tokens
        assert not np.any(outputs.last_hidden_state[row, num_tokens:])
        if length < 400:
            assert num_tokens == 0
            assert not np.any(outputs.pooled[row])
            continue
        expected = run_torch(parameters, log_mel(jnp.asarray(samples[row : row + 1, :length]), CONFIG.num_mels)[0])
        assert len(expected) == num_tokens
        hugging_face.assert_close(outputs.last_hidden_state[row, :num_tokens], expected, hugging_face.STAGE_TOLERANCE)
        hugging_face.assert_close(outputs.pooled[row], expected.mean(0), hugging_face.STAGE_TOLERANCE)


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
    assert hugging_face.relative_error(rounded.last_hidden_state, exact.last_hidden_state) <= 2e-2
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match="399 samples: one window takes at least 400"):
        AudioCnn(CONFIG).apply({"params": {}}, np.zeros((1, 399), np.float32))
    with pytest.raises(InputError, match="scan_layers"):
        AudioCnn(CONFIG, ComputeOptions(scan_layers=True)).apply({"params": {}}, np.zeros((1, 400), np.float32))
    with pytest.raises(InputError, match="channels"):
        AudioCnnConfig(channels=())
