"""Wav2Vec2 against Hugging Face's: each row alone, padded as theirs, lengths, times, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from mmei_jax.encoders import pretrained
from mmei_jax.encoders.audio_cnn import AudioCnnConfig
from mmei_jax.encoders.stack import stack_layers, unstack_layers
from mmei_jax.encoders.wav2vec2 import SAMPLING_RATE, Wav2Vec2, Wav2Vec2Config, check_waveform
from mmei_jax.types import InputError
from tests import hugging_face

STABLE = dict(do_stable_layer_norm=True, feat_extract_norm="layer", conv_bias=True)
ADAPTER = dict(add_adapter=True, num_adapter_layers=2)
# Differently shaped; every variant of the architecture stands alone in one of them.
SHAPES = {
    "group_norm": {},
    "layer_norm": dict(feat_extract_norm="layer", hidden_size=24, num_attention_heads=3),
    "stable_layer_norm": dict(do_stable_layer_norm=True, num_hidden_layers=1),
    "convolution_bias": dict(conv_bias=True, conv_dim=(6, 10, 12)),
    "large_like": dict(**STABLE, hidden_size=40, num_attention_heads=5, layer_norm_eps=1e-3),
    "odd_position_window": dict(num_conv_pos_embeddings=5, num_conv_pos_embedding_groups=1),
    "norm_epsilon": dict(layer_norm_eps=1e-2),
    "front_with_tanh_gelu": dict(feat_extract_activation="gelu_new"),
    "relu": dict(hidden_act="relu"),
    "two_convolutions": dict(conv_dim=(8, 8), conv_kernel=(10, 4), conv_stride=(5, 3), num_attention_heads=1),
    "adapter": dict(**ADAPTER),
    "adapter_of_another_size": dict(**ADAPTER, output_hidden_size=20),
    "adapter_with_other_windows": dict(**ADAPTER, adapter_kernel_size=4, adapter_stride=3),
    "large_like_with_adapter": dict(
        **STABLE, **ADAPTER, output_hidden_size=20, adapter_kernel_size=4, adapter_stride=3
    ),
}
LENGTHS = (700, 433, 160, 301)


def with_folded_kernel(model):
    """The model with random weights, and the folded kernel as a parameter, so that its gradient can be compared."""
    hugging_face.randomised(model)
    torch.nn.utils.parametrize.remove_parametrizations(model.encoder.pos_conv_embed.conv, "weight")
    return model


@functools.cache
def make_reference(name):
    shape = dict(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        conv_dim=(8, 8, 12),
        conv_kernel=(10, 3, 2),
        conv_stride=(5, 2, 2),
        num_conv_pos_embeddings=6,
        num_conv_pos_embedding_groups=4,
    )
    return with_folded_kernel(transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(**{**shape, **SHAPES[name]})))


@functools.cache
def make_ours(name):
    converted = hugging_face.converted(make_reference(name))
    return converted.config, jax.tree.map(jnp.asarray, converted.parameters)


def make_audio(lengths=LENGTHS, seed=0, width=None):
    """Ragged rows with zeros behind their ends, and the lengths."""
    lengths = np.array(lengths, np.int32)
    samples = np.random.default_rng(seed).normal(size=(len(lengths), width or lengths.max())).astype(np.float32)
    return np.where(np.arange(samples.shape[1]) < lengths[:, None], samples, 0.0).astype(np.float32), lengths


def run_reference(model, samples, mask=None):
    mask = None if mask is None else torch.tensor(mask, dtype=torch.long)
    return model(torch.tensor(samples, dtype=model.dtype), attention_mask=mask, output_hidden_states=True)


def assert_each_row_agrees(model, config, parameters, lengths, end_tolerance, options=hugging_face.PLAIN):
    """Stages, end and gradients of a ragged batch equal the reference's on each row alone."""
    samples, lengths = make_audio(lengths)
    num_frames = config.num_frames(max(lengths))
    generator = np.random.default_rng(1)
    weights = generator.normal(size=(len(lengths), num_frames, config.adapter_dim)).astype(np.float32)
    hidden_shape = (len(lengths), config.num_encoder_frames(max(lengths)), config.stack.dim)
    hidden_weights = generator.normal(size=hidden_shape).astype(np.float32)

    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss_and_outputs(parameters):
        garbage = jnp.where(np.arange(samples.shape[1]) < lengths[:, None], samples, jnp.nan)
        outputs = Wav2Vec2(config, options).apply({"params": parameters}, garbage, lengths, with_hidden_states=True)
        loss = jnp.sum(outputs.last_hidden_state * weights) + jnp.sum(sum(outputs.hidden_states) * hidden_weights)
        return loss, outputs

    (_, outputs), gradients = jax.jit(loss_and_outputs)(stack_layers(parameters) if options.scan_layers else parameters)
    gradients = unstack_layers(gradients) if options.scan_layers else gradients
    assert len(outputs.hidden_states) == config.stack.num_layers + 1

    model.zero_grad()
    for row, length in enumerate(lengths):
        expected = run_reference(model, samples[row : row + 1, :length])
        own = expected.last_hidden_state[0]
        hidden = sum(expected.hidden_states)[0]
        loss = (own * torch.tensor(weights[row, : len(own)])).sum()
        (loss + (hidden * torch.tensor(hidden_weights[row, : len(hidden)])).sum()).backward()
        assert config.num_frames(length) == len(own)
        np.testing.assert_array_equal(outputs.is_valid[row], np.arange(num_frames) < len(own))
        hugging_face.assert_close(outputs.last_hidden_state[row, : len(own)], own, end_tolerance)
        assert not np.any(outputs.last_hidden_state[row, len(own) :])
        for ours, theirs in zip(outputs.hidden_states, expected.hidden_states, strict=True):
            own_frames = theirs.shape[1]
            scale = max(1.0, float(theirs.detach().std()))
            hugging_face.assert_close(ours[row, :own_frames] / scale, theirs[0] / scale, hugging_face.STAGE_TOLERANCE)
    hugging_face.assert_gradients_agree(gradients, model)


@pytest.mark.parametrize("name", SHAPES)
def test_each_row_of_a_ragged_batch_equals_hugging_face_on_the_row_alone(name):
    assert_each_row_agrees(make_reference(name), *make_ours(name), LENGTHS, hugging_face.STAGE_TOLERANCE)


@pytest.mark.parametrize("has_mask", [True, False])
@pytest.mark.parametrize("name", ["group_norm", "large_like", "adapter"])
def test_padding_as_hugging_face_gives_its_padded_numbers(name, has_mask):
    config, parameters = make_ours(name)
    samples, lengths = make_audio()
    mask = (np.arange(samples.shape[1]) < lengths[:, None]) if has_mask else None
    with torch.no_grad():
        expected = run_reference(make_reference(name), samples, mask)
    module = Wav2Vec2(config).clone(padding="huggingface")  # as after pretrained.load
    apply = jax.jit(functools.partial(module.apply, with_hidden_states=True))
    outputs = apply({"params": parameters}, samples, lengths if has_mask else None)
    hugging_face.assert_close(outputs.last_hidden_state, expected.last_hidden_state, hugging_face.STAGE_TOLERANCE)
    for ours, theirs in zip(outputs.hidden_states, expected.hidden_states, strict=True):
        scale = max(1.0, float(theirs.detach().std()))
        hugging_face.assert_close(ours / scale, theirs / scale, hugging_face.STAGE_TOLERANCE)


def test_hugging_faces_padding_changes_a_row_and_ours_does_not():
    config, parameters = make_ours("group_norm")
    samples, lengths = make_audio(LENGTHS[1:2])
    wider, _ = make_audio(LENGTHS[1:2], width=LENGTHS[0])
    num_frames = config.num_frames(LENGTHS[1])

    def difference(padding):
        apply = Wav2Vec2(config, padding=padding).apply
        alone, padded = (jax.jit(apply)({"params": parameters}, rows, lengths) for rows in (samples, wider))
        return np.abs(alone.last_hidden_state - padded.last_hidden_state[:, :num_frames]).max()

    assert difference("exact") <= hugging_face.STAGE_TOLERANCE
    assert difference("huggingface") > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("shape", [{}, STABLE], ids=["base", "base_width_stable_layer_norm"])
def test_base_size_equals_hugging_face(shape):
    model = with_folded_kernel(transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(**shape)))
    converted = hugging_face.converted(model)
    # In 64 bits: of twelve layers the reference's own rounding is as large as what may differ on some processors.
    exact = model.double()
    assert_each_row_agrees(exact, converted.config, converted.parameters, (32_000, 11_111), hugging_face.END_TOLERANCE)


def test_row_shorter_than_the_receptive_field_has_no_frames_and_no_gradient():
    config, parameters = make_ours("adapter")
    samples, lengths = make_audio((300, 0, 5, config.receptive_field - 1, config.receptive_field))

    def loss(parameters, first, last):
        outputs = Wav2Vec2(config).apply({"params": parameters}, samples, lengths)
        return jnp.sum(outputs.last_hidden_state[first:last] ** 2), outputs

    differentiate = jax.jit(jax.grad(loss, has_aux=True), static_argnums=(1, 2))
    gradients, outputs = differentiate(parameters, 1, 4)
    assert outputs.is_valid.sum(axis=1).tolist()[1:] == [0, 0, 0, 1]
    assert not np.any(outputs.last_hidden_state[1:4])
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(gradients))
    assert np.any(outputs.last_hidden_state[4])


def test_sample_that_is_nan_spoils_its_row_alone():
    config, parameters = make_ours("group_norm")
    samples, lengths = make_audio()
    samples[1, 7] = np.nan
    states = np.asarray(jax.jit(Wav2Vec2(config).apply)({"params": parameters}, samples, lengths).last_hidden_state)
    assert np.isnan(states[1, : config.num_frames(LENGTHS[1])]).all()
    assert np.isfinite(states[[0, 2, 3]]).all()


def test_rows_too_short_for_any_frame_and_unknown_paddings_are_refused():
    config, parameters = make_ours("group_norm")
    samples = np.zeros((1, config.receptive_field - 1), np.float32)
    with pytest.raises(InputError, match=f"at least {config.receptive_field}"):
        Wav2Vec2(config).apply({"params": parameters}, samples)
    with pytest.raises(InputError, match="padding = 'same'"):
        Wav2Vec2(config, padding="same").apply({"params": parameters}, np.zeros((1, 800), np.float32))


@pytest.mark.parametrize(("seconds", "is_accepted"), [(120, True), (121, False), (3600, False)])
def test_rows_longer_than_two_minutes_are_refused_when_the_program_is_traced(seconds, is_accepted):
    config, parameters = make_ours("group_norm")
    rows = jax.ShapeDtypeStruct((1, seconds * SAMPLING_RATE), np.float32)

    def trace():
        return jax.eval_shape(
            lambda samples: Wav2Vec2(config).apply({"params": parameters}, samples).last_hidden_state, rows
        )

    if is_accepted:
        assert trace().shape[1] == config.num_frames(rows.shape[1])
    else:
        with pytest.raises(InputError, match=f"rows of {rows.shape[1]} samples: expected at most 120 seconds"):
            trace()


@pytest.mark.parametrize(
    ("make", "rate", "message"),
    [
        (lambda: np.zeros(60 * 60 * SAMPLING_RATE, np.float32), SAMPLING_RATE, r"3600\.0 seconds.*split it"),
        (lambda: np.zeros(399, np.float32), SAMPLING_RATE, "399 samples: one frame takes at least 400"),
        (lambda: np.zeros(0, np.float32), SAMPLING_RATE, "0 samples"),
        (
            lambda: np.zeros((8000, 2), np.float32),
            SAMPLING_RATE,
            r"shape \(8000, 2\): expected one channel, .*average",
        ),
        (
            lambda: np.zeros(8000, np.int16),
            SAMPLING_RATE,
            "type int16: expected a floating type; divide .* 32768",
        ),
        (lambda: np.zeros(8000, np.float32), 44_100, "44100 samples per second: expected 16000"),
        (lambda: np.array([0, 1, np.nan, np.inf] * 200, np.float32), SAMPLING_RATE, "400 samples .* the first at 2"),
    ],
)
@pytest.mark.parametrize(
    "config", [Wav2Vec2Config.from_hugging_face({"model_type": "wav2vec2"}), AudioCnnConfig()], ids=["wav2vec2", "cnn"]
)
def test_audio_that_cannot_be_read_is_refused_in_one_line(make, rate, message, config):
    with pytest.raises(InputError, match=message):
        check_waveform(make(), rate, config)
    check_waveform(np.zeros(400, np.float32), SAMPLING_RATE, config)


@settings(max_examples=60, deadline=None)
@given(
    layers=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 4)), min_size=1, max_size=4),
    adapter=st.one_of(st.none(), st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 3))),
    num_samples=st.integers(0, 300),
)
def test_lengths_equal_those_of_the_real_convolutions(layers, adapter, num_samples):
    kernels, strides = zip(*layers, strict=True)
    keys = dict(conv_kernel=list(kernels), conv_stride=list(strides), conv_dim=[1] * len(layers))
    if adapter:
        num_layers, kernel, stride = adapter
        names = ("num_adapter_layers", "adapter_kernel_size", "adapter_stride")
        keys |= dict(zip(names, adapter, strict=True), add_adapter=True)
    config = Wav2Vec2Config.from_hugging_face({"model_type": "wav2vec2", **keys})
    signal = torch.zeros(1, 1, num_samples)
    for kernel_size, step in layers:
        fits = signal.shape[2] >= kernel_size
        signal = (
            torch.nn.functional.conv1d(signal, torch.ones(1, 1, kernel_size), stride=step) if fits else signal[..., :0]
        )
    assert config.num_encoder_frames(num_samples) == signal.shape[2]
    assert (config.num_encoder_frames(num_samples) > 0) == (num_samples >= config.receptive_field)
    if adapter:
        for _ in range(num_layers):
            fits = signal.shape[2] > 0 and signal.shape[2] + 2 >= kernel
            weight = torch.ones(1, 1, kernel)
            signal = torch.nn.functional.conv1d(signal, weight, stride=stride, padding=1) if fits else signal[..., :0]
    assert config.num_frames(num_samples) == signal.shape[2]
    array = config.num_frames(np.array([num_samples, num_samples]))
    np.testing.assert_array_equal(array, signal.shape[2])


@pytest.mark.parametrize("name", ["group_norm", "adapter", "large_like_with_adapter"])
def test_frame_times_are_the_middle_of_what_each_frame_hears(name):
    config, parameters = make_ours(name)
    starts, ends = np.arange(700.0), np.arange(1.0, 701.0)

    def windows(kernel, stride, padding):
        nonlocal starts, ends
        # Behind the ends the frames would go on as they came.
        steps = starts[1] - starts[0]
        starts = np.concatenate(
            [starts[0] - steps * np.arange(padding, 0, -1), starts, starts[-1] + steps * np.arange(1, padding + 1)]
        )
        ends = np.concatenate(
            [ends[0] - steps * np.arange(padding, 0, -1), ends, ends[-1] + steps * np.arange(1, padding + 1)]
        )
        first = np.arange(0, len(starts) - kernel + 1, stride)
        starts, ends = starts[first], ends[first + kernel - 1]

    for kernel, stride in zip(config.front_kernels, config.front_strides, strict=True):
        windows(kernel, stride, 0)
    for _ in range(config.num_adapter_layers):
        windows(config.adapter_kernel, config.adapter_stride, 1)
    samples, lengths = make_audio()
    outputs = jax.jit(Wav2Vec2(config).apply)({"params": parameters}, samples, lengths)
    np.testing.assert_allclose(outputs.frame_times_seconds, (starts + ends) / 2 / SAMPLING_RATE, rtol=1e-6)


def test_base_frames_come_every_twenty_milliseconds():
    config = Wav2Vec2Config.from_hugging_face({"model_type": "wav2vec2"})
    times = config.frame_times_seconds(config.num_frames(SAMPLING_RATE))
    assert len(times) == 49
    np.testing.assert_allclose(np.diff(times), 0.02, rtol=1e-4)
    assert times[0] == pytest.approx(0.0125)


@pytest.mark.parametrize("options", hugging_face.SCAN_AND_REMAT, ids=str)
def test_scan_and_remat_change_neither_stages_nor_gradients(options):
    name = "large_like"
    assert_each_row_agrees(make_reference(name), *make_ours(name), LENGTHS, hugging_face.STAGE_TOLERANCE, options)


def test_defaults_are_hugging_faces():
    ours = Wav2Vec2Config.from_hugging_face({"model_type": "wav2vec2"})
    assert ours == Wav2Vec2Config.from_hugging_face(transformers.Wav2Vec2Config().to_dict())
    assert ours.receptive_field == 400


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adapter_attn_dim": 16}, "adapter_attn_dim = 16 is not implemented"),
        ({"feat_extract_norm": "batch"}, "feat_extract_norm = 'batch' is not implemented"),
        ({"feat_extract_activation": "laplace"}, "feat_extract_activation = 'laplace': expected gelu"),
        ({"conv_dim": [512]}, "as many of each"),
        ({"conv_stride": [5, 2, 2, 2, 2, 2, 0]}, "at least 1"),
        ({"conv_kernel": "long"}, "conv_kernel = 'long'"),
        ({"num_conv_pos_embedding_groups": 7}, "num_conv_pos_embedding_groups = 7: expected a divisor of 768"),
        ({"num_conv_pos_embedding_groups": 0}, "num_conv_pos_embedding_groups = 0"),
        ({"num_conv_pos_embeddings": 0}, "num_conv_pos_embeddings = 0: expected at least 1"),
        ({"add_adapter": True, "adapter_stride": 0}, "adapter_stride = 0: expected at least 1"),
        ({"add_adapter": True, "adapter_kernel_size": -3}, "adapter_kernel_size = -3: expected at least 1"),
        ({"add_adapter": True, "num_adapter_layers": 0}, "num_adapter_layers = 0: .* with add_adapter"),
        ({"add_adapter": True, "output_hidden_size": -8}, "output_hidden_size = -8: expected at least 1"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantization_config = .*bitsandbytes.* not impl"),
        ({"model_type": "hubert"}, "model_type = 'hubert'"),
    ],
)
def test_configuration_that_is_not_implemented_is_refused_by_name(change, message):
    with pytest.raises(InputError, match=message):
        Wav2Vec2Config.from_hugging_face({"model_type": "wav2vec2", **change})


TASKS = {
    "Wav2Vec2Model": set(),
    "Wav2Vec2ForCTC": {"lm_head"},
    "Wav2Vec2ForPreTraining": {"project_hid", "project_q", "quantizer"},
    "Wav2Vec2ForSequenceClassification": {"classifier", "layer_weights", "projector"},
    "Wav2Vec2ForAudioFrameClassification": {"classifier", "layer_weights"},
    "Wav2Vec2ForXVector": {"classifier", "feature_extractor", "layer_weights", "objective", "projector", "tdnn"},
}


@pytest.mark.parametrize(
    ("task", "style"), [*((task, "parametrizations") for task in TASKS), ("Wav2Vec2ForCTC", "weight_g")]
)
def test_checkpoint_of_either_weight_norm_is_converted_and_certified(tmp_path, task, style):
    import safetensors.torch

    shape = make_reference("large_like").config.to_dict() | dict(codevector_dim=8, proj_codevector_dim=8)
    shape |= dict(use_weighted_layer_sum="layer_weights" in TASKS[task])
    model = hugging_face.randomised(getattr(transformers, task)(transformers.Wav2Vec2Config(**shape)))
    model.save_pretrained(tmp_path / "source")
    if style == "weight_g":
        path = tmp_path / "source" / "model.safetensors"
        old = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
        state = safetensors.torch.load_file(path)
        for new_name, old_name in old.items():
            state = {name.replace(new_name, old_name): tensor for name, tensor in state.items()}
        assert any(name.endswith("weight_g") for name in state)
        safetensors.torch.save_file(state, path, metadata={"format": "pt"})
    certificate = pretrained.convert(tmp_path / "source", tmp_path / "ours")
    differences = certificate["comparison"]["largest_absolute_difference"]
    assert differences.pop("last_hidden_state") <= hugging_face.STAGE_TOLERANCE
    assert max(differences.values()) <= hugging_face.END_TOLERANCE  # sums of pre-norm layers, larger than order 1
    assert {name.split(".")[0] for name in certificate["heads_left_out"]} == TASKS[task]
    base = model if task == "Wav2Vec2Model" else model.wav2vec2
    folded = base.encoder.pos_conv_embed.conv.weight.detach().numpy().transpose(2, 1, 0)
    kernel = pretrained.load(tmp_path / "ours").parameters["position"]["kernel"]
    np.testing.assert_allclose(kernel, folded, rtol=1e-6, atol=1e-7)


def test_frames_of_seven_convolutions_are_counted_with_one_division():
    """A chain of divisions is what XLA takes minutes over, in the program of a single row."""
    config = Wav2Vec2Config.from_hugging_face({"model_type": "wav2vec2"})
    lengths = np.arange(0, 3_000, dtype=np.int32)
    program = jax.jit(config.num_encoder_frames).lower(lengths).as_text()
    assert program.count("stablehlo.divide") == 1
    model = transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(num_hidden_layers=0, hidden_size=16))
    expected = model._get_feat_extract_output_lengths(torch.from_numpy(lengths)).numpy()
    np.testing.assert_array_equal(config.num_encoder_frames(lengths), np.maximum(expected, 0))
