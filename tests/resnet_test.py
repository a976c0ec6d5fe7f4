"""ResNet against Hugging Face's, stage by stage and in its gradients; stored statistics; what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from mmei_jax.encoders import pretrained
from mmei_jax.encoders.resnet import Block, ResNet, ResNetConfig
from mmei_jax.encoders.stack import ComputeOptions
from mmei_jax.types import InputError
from tests import hugging_face

# Differently shaped; every variant of the architecture stands alone in one of them.
SHAPES = {
    "bottleneck": {},
    "basic": dict(layer_type="basic", depths=[2, 1], hidden_sizes=[8, 12]),
    "first_stage_halves": dict(downsample_in_first_stage=True, depths=[1, 1, 1], hidden_sizes=[8, 16, 24]),
    "first_convolution_halves": dict(downsample_in_bottleneck=True, embedding_size=12),
    "no_first_shortcut": dict(layer_type="basic", embedding_size=8, hidden_sizes=[8], depths=[2]),
    "grey": dict(num_channels=1, depths=[1, 1]),
    "gelu": dict(hidden_act="gelu", hidden_sizes=[8, 20]),
}


@functools.cache
def make_reference(name):
    shape = dict(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2])
    return hugging_face.randomised(transformers.ResNetModel(transformers.ResNetConfig(**{**shape, **SHAPES[name]})))


@functools.cache
def make_ours(name):
    converted = hugging_face.converted(make_reference(name))
    return converted.config, jax.tree.map(jnp.asarray, converted.parameters)


def make_pixels(config, size=(33, 40), num_frames=2, seed=0):
    shape = (num_frames, *size, config.num_channels)
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def run_reference(model, pixels):
    return model(torch.tensor(pixels.transpose(0, 3, 1, 2)), output_hidden_states=True)


def as_tokens(images):
    return images.flatten(2).transpose(1, 2)


def differentiate(model, config, parameters, pixels):
    """Our outputs and the gradients of a loss of all of them; the reference's outputs, its gradients in the model."""
    expected = run_reference(model, pixels)
    generator = np.random.default_rng(1)
    weights = generator.normal(size=as_tokens(expected.last_hidden_state).shape).astype(np.float32)

    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss_and_outputs(parameters):
        outputs = ResNet(config).apply({"params": parameters}, pixels, with_hidden_states=True)
        return jnp.sum(outputs.last_hidden_state * weights) + jnp.sum(outputs.pooled), outputs

    (_, outputs), gradients = jax.jit(loss_and_outputs)(parameters)
    model.zero_grad()
    ((as_tokens(expected.last_hidden_state) * torch.tensor(weights)).sum() + expected.pooler_output.sum()).backward()
    return outputs, gradients, expected


@pytest.mark.parametrize("name", SHAPES)
def test_stages_end_and_gradients_equal_hugging_face(name):
    model = make_reference(name)
    config, parameters = make_ours(name)
    outputs, gradients, expected = differentiate(model, config, parameters, make_pixels(config))
    for ours, theirs in zip(outputs.hidden_states, expected.hidden_states, strict=True):
        hugging_face.assert_close(ours, as_tokens(theirs), hugging_face.STAGE_TOLERANCE)
    hugging_face.assert_close(outputs.pooled, expected.pooler_output[..., 0, 0], hugging_face.STAGE_TOLERANCE)
    hugging_face.assert_gradients_agree(gradients, model)


@pytest.mark.slow
def test_resnet_50_equals_hugging_face():
    model = hugging_face.randomised(transformers.ResNetModel(transformers.ResNetConfig()))
    converted = hugging_face.converted(model)
    pixels = make_pixels(converted.config, (224, 224), 1)
    outputs, gradients, expected = differentiate(model, converted.config, converted.parameters, pixels)
    stages = [stage.detach().permute(0, 2, 3, 1).numpy() for stage in expected.hidden_states]
    # Tolerances are for outputs of order 1; residual sums grow beyond that.
    scales = [max(1.0, float(stage.std())) for stage in stages]

    def assert_stage(ours, index, tolerance):
        theirs = stages[index].reshape(1, -1, stages[index].shape[-1])
        ours = ours.reshape(theirs.shape)
        np.testing.assert_allclose(ours / scales[index], theirs / scales[index], rtol=0, atol=tolerance)

    # Each stage alone, on what the reference gives it; then all of them in a row.
    assert_stage(outputs.hidden_states[0], 0, hugging_face.STAGE_TOLERANCE)
    for stage, depth in enumerate(converted.config.depths):
        x = jnp.asarray(stages[stage])
        for index in range(depth):
            block = Block(converted.config, stage, index, "float32")
            x = jax.jit(block.apply)({"params": converted.parameters[f"stage_{stage}_block_{index}"]}, x)
        assert_stage(x, stage + 1, hugging_face.STAGE_TOLERANCE)
    for index, states in enumerate(outputs.hidden_states):
        assert_stage(states, index, hugging_face.END_TOLERANCE)
    pooled = expected.pooler_output[..., 0, 0] / scales[-1]
    hugging_face.assert_close(outputs.pooled / scales[-1], pooled, hugging_face.END_TOLERANCE)
    hugging_face.assert_gradients_agree(gradients, model)


def test_image_does_not_depend_on_the_others():
    config, parameters = make_ours("bottleneck")
    apply = jax.jit(ResNet(config).apply)
    pixels = make_pixels(config)
    others = 100 * make_pixels(config, seed=3)
    others[0] = pixels[0]
    ours, among_others = (apply({"params": parameters}, images).pooled[0] for images in (pixels, others))
    np.testing.assert_allclose(among_others, ours, rtol=0, atol=1e-5)


def test_pixel_that_is_nan_spoils_the_places_that_see_it_and_the_mean():
    config, parameters = make_ours("basic")
    pixels = make_pixels(config, (400, 40))
    pixels[1, 3, 5, 2] = np.nan
    outputs = jax.jit(ResNet(config).apply)({"params": parameters}, pixels)
    is_spoilt = np.isnan(outputs.last_hidden_state)
    expected = as_tokens(run_reference(make_reference("basic"), pixels).last_hidden_state).isnan().numpy()
    np.testing.assert_array_equal(is_spoilt, expected)
    assert is_spoilt[1].any()
    assert not is_spoilt[1].all()
    assert not is_spoilt[0].any()
    np.testing.assert_array_equal(np.isnan(outputs.pooled).all(axis=1), [False, True])


def test_one_pixel_is_an_image():
    config, parameters = make_ours("bottleneck")
    pixels = make_pixels(config, (1, 1))
    outputs = jax.jit(ResNet(config).apply)({"params": parameters}, pixels)
    hugging_face.assert_close(
        outputs.pooled, run_reference(make_reference("bottleneck"), pixels).pooler_output[..., 0, 0], 1e-5
    )


def test_bfloat16_and_remat():
    config, parameters = make_ours("basic")
    pixels = make_pixels(config)

    def run(options):
        def loss(parameters):
            outputs = ResNet(config, options).apply({"params": parameters}, pixels, with_hidden_states=True)
            return outputs.pooled.sum(), outputs

        return jax.jit(jax.grad(loss, has_aux=True))(parameters)

    gradients, exact = run(ComputeOptions())
    again, same = run(ComputeOptions(remat="layer"))
    np.testing.assert_allclose(same.pooled, exact.pooled, rtol=0, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), again, gradients)
    _, rounded = run(ComputeOptions("bfloat16"))
    for actual, expected in zip(rounded.hidden_states, exact.hidden_states, strict=True):
        assert 1e-4 < hugging_face.relative_error(actual, expected) <= 2e-2


def test_defaults_are_hugging_faces():
    ours = ResNetConfig.from_hugging_face({"model_type": "resnet"})
    assert ours == ResNetConfig.from_hugging_face(transformers.ResNetConfig().to_dict())
    assert ours.depths == (3, 4, 6, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_type": "wide"}, "layer_type = 'wide' is not implemented"),
        ({"hidden_act": "laplace"}, "'laplace': not implemented"),
        ({"depths": [1, 2]}, "as many of each"),
        ({"hidden_sizes": [2, 2, 2, 2]}, "at least 4"),
        ({"embedding_size": 0}, "embedding_size"),
        ({"model_type": "regnet"}, "model_type = 'regnet'"),
    ],
)
def test_configuration_that_is_not_implemented_is_refused_by_name(change, message):
    with pytest.raises(InputError, match=message):
        ResNetConfig.from_hugging_face({"model_type": "resnet", **change})


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((1, 3, 24, 24), ComputeOptions(), "24 channels, which come last"),
        ((1, 0, 24, 3), ComputeOptions(), "0 x 24 pixels"),
        ((1, 24, 24, 3), ComputeOptions(scan_layers=True), "scan_layers"),
        ((1, 24, 24, 3), ComputeOptions(remat="products"), "remat = 'products': .* expected none or layer"),
    ],
)
def test_what_does_not_fit_is_refused(shape, options, message):
    config, parameters = make_ours("bottleneck")
    with pytest.raises(InputError, match=message):
        ResNet(config, options).apply({"params": parameters}, np.zeros(shape, np.float32))


def test_classifier_is_converted_and_certified_without_its_head(tmp_path):
    config = make_reference("bottleneck").config
    model = hugging_face.randomised(transformers.ResNetForImageClassification(config))
    model.save_pretrained(tmp_path / "source")
    certificate = pretrained.convert(tmp_path / "source", tmp_path / "ours")
    assert max(certificate["comparison"]["largest_absolute_difference"].values()) <= hugging_face.STAGE_TOLERANCE
    assert certificate["heads_left_out"] == ["classifier.1.bias", "classifier.1.weight"]
    variance = pretrained.load(tmp_path / "ours").parameters["stem_norm"]["variance"]
    np.testing.assert_array_equal(variance, model.resnet.embedder.embedder.normalization.running_var.numpy())
