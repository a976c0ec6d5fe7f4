"""ViT against Hugging Face's, stage by stage and in its gradients; images of other sizes; what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from mmei_jax.encoders import pretrained, vit
from mmei_jax.encoders.stack import stack_layers, unstack_layers
from mmei_jax.encoders.vit import Vit, VitConfig, interpolate_positions, mean_of_patches
from mmei_jax.types import InputError
from tests import hugging_face

# Differently shaped; every variant of the architecture stands alone in one of them.
SHAPES = {
    "two_layers": dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64),
    "one_head_small_patches": dict(hidden_size=24, num_hidden_layers=1, num_attention_heads=1, patch_size=4),
    "oblong_image": dict(hidden_size=32, num_attention_heads=8, image_size=[16, 32]),
    "oblong_patches": dict(hidden_size=32, num_attention_heads=2, image_size=[16, 24], patch_size=[8, 4]),
    "rest_of_image": dict(hidden_size=32, num_attention_heads=4, image_size=29),
    "grey": dict(hidden_size=32, num_attention_heads=4, num_channels=1),
    "without_query_key_value_bias": dict(hidden_size=32, num_attention_heads=4, qkv_bias=False),
    "tanh_gelu": dict(hidden_size=32, num_attention_heads=4, hidden_act="gelu_new"),
    "norm_epsilon": dict(hidden_size=32, num_attention_heads=4, layer_norm_eps=1e-2),
    "pooler_of_another_size": dict(hidden_size=32, num_attention_heads=4, pooler_output_size=12),
    "pooler_with_relu": dict(hidden_size=32, num_attention_heads=4, pooler_act="relu"),
    "without_pooler": dict(hidden_size=40, num_attention_heads=5),
}


@functools.cache
def make_reference(name):
    shape = dict(num_hidden_layers=2, intermediate_size=48, image_size=24, patch_size=8)
    config = transformers.ViTConfig(**{**shape, **SHAPES[name]})
    return hugging_face.randomised(transformers.ViTModel(config, add_pooling_layer=name != "without_pooler"))


@functools.cache
def make_ours(name):
    converted = hugging_face.converted(make_reference(name))
    return converted.config, jax.tree.map(jnp.asarray, converted.parameters)


def make_pixels(config, size=None, num_frames=3, seed=0):
    shape = (num_frames, *(size or config.image_size), config.num_channels)
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def run_reference(model, pixels, **options):
    pixels = torch.tensor(pixels.transpose(0, 3, 1, 2))
    return model(pixels, output_hidden_states=True, **options)


def differentiate(model, config, parameters, pixels, options=hugging_face.PLAIN, **reference_options):
    """Our outputs and the gradients of a loss of all of them; the reference's outputs, its gradients in the model."""
    generator = np.random.default_rng(1)
    expected = run_reference(model, pixels, **reference_options)
    weights = generator.normal(size=expected.last_hidden_state.shape).astype(np.float32)
    pooled_weights = generator.normal(size=(len(pixels), config.pooler_dim)).astype(np.float32)

    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss_and_outputs(parameters):
        outputs = Vit(config, options).apply({"params": parameters}, pixels, with_hidden_states=True)
        loss = jnp.sum(sum(outputs.hidden_states, outputs.last_hidden_state) * weights)
        if config.has_pooler:
            loss = loss + jnp.sum(outputs.pooled * pooled_weights)
        return loss, outputs

    (_, outputs), gradients = jax.jit(loss_and_outputs)(stack_layers(parameters) if options.scan_layers else parameters)
    gradients = unstack_layers(gradients) if options.scan_layers else gradients
    model.zero_grad()
    loss = (sum(expected.hidden_states, expected.last_hidden_state) * torch.tensor(weights)).sum()
    if config.has_pooler:
        loss = loss + (expected.pooler_output * torch.tensor(pooled_weights)).sum()
    loss.backward()
    return outputs, gradients, expected


def assert_stages_end_and_gradients_agree(name, pixels, **options):
    model = make_reference(name)
    config, parameters = make_ours(name)
    outputs, gradients, expected = differentiate(model, config, parameters, pixels, **options)
    for ours, theirs in zip(outputs.hidden_states, expected.hidden_states, strict=True):
        hugging_face.assert_close(ours, theirs, hugging_face.STAGE_TOLERANCE)
    hugging_face.assert_close(outputs.last_hidden_state, expected.last_hidden_state, hugging_face.STAGE_TOLERANCE)
    assert config.has_pooler == (name != "without_pooler")
    if config.has_pooler:
        hugging_face.assert_close(outputs.pooled, expected.pooler_output, hugging_face.STAGE_TOLERANCE)
    else:
        assert outputs.pooled is None
    assert np.all(outputs.is_valid)
    assert outputs.is_valid.shape == expected.last_hidden_state.shape[:2]
    hugging_face.assert_gradients_agree(gradients, model)


@pytest.mark.parametrize("name", SHAPES)
def test_stages_end_and_gradients_equal_hugging_face(name):
    assert_stages_end_and_gradients_agree(name, make_pixels(make_ours(name)[0]))


@pytest.mark.parametrize("size", [(48, 40), (17, 31), (8, 8)])
def test_image_of_another_size_equals_interpolated_position_encoding(size):
    config, _ = make_ours("two_layers")
    pixels = make_pixels(config, size)
    assert_stages_end_and_gradients_agree("two_layers", pixels, interpolate_pos_encoding=True)


@pytest.mark.parametrize("new_grid", [(14, 14), (7, 3), (1, 1), (28, 9)])
def test_interpolated_positions_equal_torch(new_grid):
    positions = np.random.default_rng(0).normal(size=(14 * 14, 6)).astype(np.float32)
    square = torch.tensor(positions).reshape(1, 14, 14, 6).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(square, size=new_grid, mode="bicubic", align_corners=False)
    ours = interpolate_positions(jnp.asarray(positions), (14, 14), new_grid)
    hugging_face.assert_close(ours, expected.permute(0, 2, 3, 1).reshape(-1, 6), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(224, 224), (160, 256)])
def test_base_size_equals_hugging_face(size):
    model = hugging_face.randomised(transformers.ViTModel(transformers.ViTConfig()))
    converted = hugging_face.converted(model)
    assert sum(leaf.size for leaf in jax.tree.leaves(converted.parameters)) == 86_389_248
    pixels = make_pixels(converted.config, size, 2)
    outputs, gradients, expected = differentiate(
        model, converted.config, converted.parameters, pixels, interpolate_pos_encoding=True
    )
    # Tolerances are for outputs of order 1; the sums that pre-norm layers hand on grow beyond that.
    for ours, theirs in zip(outputs.hidden_states, expected.hidden_states, strict=True):
        scale = float(theirs.detach().std())
        hugging_face.assert_close(ours / scale, theirs / scale, hugging_face.STAGE_TOLERANCE)
    hugging_face.assert_close(outputs.last_hidden_state, expected.last_hidden_state, hugging_face.END_TOLERANCE)
    hugging_face.assert_close(outputs.pooled, expected.pooler_output, hugging_face.END_TOLERANCE)
    hugging_face.assert_gradients_agree(gradients, model)


def test_image_does_not_depend_on_the_others():
    config, parameters = make_ours("two_layers")
    apply = jax.jit(Vit(config).apply)
    pixels = make_pixels(config)
    others = make_pixels(config, seed=4)
    others[0, 3, 5, 1] = np.nan
    others[1] = pixels[1]
    states = np.asarray(apply({"params": parameters}, others).last_hidden_state)
    np.testing.assert_allclose(states[1], apply({"params": parameters}, pixels).last_hidden_state[1], rtol=0, atol=1e-5)
    assert np.isnan(states[0]).all()
    assert np.isfinite(states[1:]).all()


def test_mean_of_patches_leaves_the_first_token_out():
    config, parameters = make_ours("two_layers")
    outputs = jax.jit(Vit(config).apply)({"params": parameters}, make_pixels(config))
    expected = np.asarray(outputs.last_hidden_state)[:, 1:].mean(axis=1)
    np.testing.assert_allclose(mean_of_patches(outputs), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", hugging_face.SCAN_AND_REMAT, ids=str)
def test_scan_and_remat_change_neither_stages_nor_gradients(options):
    assert_stages_end_and_gradients_agree("two_layers", make_pixels(make_ours("two_layers")[0]), options=options)


def test_defaults_are_hugging_faces():
    ours = VitConfig.from_hugging_face({"model_type": "vit"})
    assert ours == VitConfig.from_hugging_face(transformers.ViTConfig().to_dict())
    assert (ours.image_size, ours.patch_size, ours.pooler_dim) == ((224, 224), (16, 16), 768)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "laplace"}, "'laplace': not implemented"),
        ({"pooler_act": "laplace"}, "'laplace': not implemented"),
        ({"head_dim": 3}, "head_dim = 3 is not implemented"),
        ({"image_size": 8}, "at least one patch"),
        ({"image_size": [224, 224, 3]}, "one or two whole numbers"),
        ({"image_size": "large"}, "image_size = 'large'"),
        ({"patch_size": 0}, "patch_size"),
        ({"pooler_output_size": "wide"}, "pooler_output_size = 'wide'"),
        ({"model_type": "deit"}, "model_type = 'deit'"),
    ],
)
def test_configuration_that_is_not_implemented_is_refused_by_name(change, message):
    with pytest.raises(InputError, match=message):
        VitConfig.from_hugging_face({"model_type": "vit", **change})


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 1, 1, 3), "image of 1 x 1 pixels"),
        ((1, 7, 64, 3), "7 x 64"),
        ((1, 3, 24, 24), "24 channels, which come last"),
    ],
)
def test_image_that_does_not_fit_is_refused(shape, message):
    config, parameters = make_ours("two_layers")
    with pytest.raises(InputError, match=message):
        Vit(config).apply({"params": parameters}, np.zeros(shape, np.float32))


@pytest.mark.parametrize("task", ["ViTModel", "ViTForImageClassification", "ViTForMaskedImageModeling"])
def test_checkpoint_as_transformers_saves_it_is_converted_and_certified(tmp_path, task):
    shape = make_reference("two_layers").config.to_dict() | {"encoder_stride": 8}
    model = hugging_face.randomised(getattr(transformers, task)(transformers.ViTConfig(**shape)))
    model.save_pretrained(tmp_path / "source")
    certificate = pretrained.convert(tmp_path / "source", tmp_path / "ours")
    assert max(certificate["comparison"]["largest_absolute_difference"].values()) <= hugging_face.STAGE_TOLERANCE
    assert bool(certificate["heads_left_out"]) == (task != "ViTModel")
    assert certificate["architecture"]["has_pooler"] == (task == "ViTModel")
    loaded = pretrained.load(tmp_path / "ours")
    assert isinstance(loaded.module, vit.Vit)
    kernel = loaded.parameters["encoder"]["layer_1"]["attention"]["value"]["kernel"]
    base = model if task == "ViTModel" else model.vit
    np.testing.assert_array_equal(kernel, base.layers[1].attention.v_proj.weight.detach().numpy().T)
