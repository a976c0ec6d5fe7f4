"""Encoders inside the model: what they give is what extraction gives, and they learn, or stay as they were."""

import dataclasses
import json
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as parquet
import pytest
from flax.linen import unbox

from configs import default
from mmei_jax import input_pipeline
from mmei_jax.config import parse
from mmei_jax.encoders.preprocessing import AudioPreprocessing
from mmei_jax.encoders.vit import Vit
from mmei_jax.encoders.wav2vec2 import Wav2Vec2
from mmei_jax.evaluation import evaluate_workdir, open_best_run
from mmei_jax.extraction.clips import Clip
from mmei_jax.item_words import open_dataset
from mmei_jax.models.raw_encoders import normalised_samples
from mmei_jax.optimizer import make_optimizer, make_schedule
from mmei_jax.predict import predict
from mmei_jax.recommendation import __main__ as recommendation
from mmei_jax.robustness import RobustnessEvaluator
from mmei_jax.serving import __main__ as serving
from mmei_jax.serving.loading import load
from mmei_jax.sharding import batch_sharding, mesh_over
from mmei_jax.state import build_model, initial_encoders, initial_state, initialize, state_shapes, with_encoders
from mmei_jax.train_step import jit_train_step, make_train_step
from mmei_jax.training import train
from mmei_jax.types import InputError, TokenSequence
from tests import random_encoders, tiny_extraction, tiny_slates

# Of the tiny clips: two seconds of sound at most, 50 frames of Wav2Vec2 a second.
SAMPLES, FRAMES_PER_TOKEN = 34_000, 5
FROZEN = (("^encoder_", 0.0),)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with encoders, clips, and two data sets of these: features and raw media."""
    folder = tmp_path_factory.mktemp("raw")
    encoders = random_encoders.make(folder / "encoders")
    (folder / "clips").mkdir()
    clips = tiny_extraction.make_clips(folder / "clips")
    changes = {"audio__frames_per_token": FRAMES_PER_TOKEN}
    files = tiny_slates.write(folder)
    tiny_slates.extract(encoders, clips, folder / "features", files, changes=changes)
    tiny_slates.extract(encoders, clips, folder / "media", files, depth="raw")
    return folder


def config_dict(made, depth, **changes):
    """Of a small model on one of the two data sets; ``group__key=value`` changes a key."""
    values = default.get_config()
    values.data.path = str(made / depth)
    values.data.update(batch_size=3, evaluation_batch_size=3)
    values.data.max_tokens.update(vision=(16,), audio=(22 if depth == "features" else SAMPLES,), text=(32,))
    values.model.update(dim=16, num_heads=2, num_layers=1, feedforward_dim=16, embedding_dim=8, dropout_rate=0.0)
    values.model.modality_dropout_rate = 0.0
    if depth == "media":
        folders = {name: str(made / "encoders" / name) for name in ("vision", "audio", "text")}
        values.model.encoders.update(folders, audio_frames_per_token=FRAMES_PER_TOKEN)
    values.loss.update(intent="none", ranking="none")
    values.train.update(num_epochs=1, best_metric="validation/emotion/accuracy")
    for key, value in changes.items():
        values.update_from_flattened_dict({key.replace("__", "."): value})
    return values.to_dict()


def config(made, depth, **changes):
    return parse(config_dict(made, depth, **changes))


def variables_of(config):
    """Of a fresh model with the encoders' weights."""
    model = build_model(config, open_dataset(config))
    variables = jax.jit(lambda: initialize(model, 0))()
    variables["params"] = with_encoders(variables["params"], jax.device_put(initial_encoders(config.model)))
    return model, variables


def batch_of(config, split="train"):
    mesh = mesh_over(jax.devices()[:1])
    return next(input_pipeline.evaluation_batches(open_dataset(config), config, (split,), batch_sharding(mesh)))


def answer_of(model, variables, config):
    return jax.jit(lambda batch: model.apply(variables, batch, is_training=False))(batch_of(config))


@pytest.fixture(scope="module")
def on_features(made):
    """What the model says of three records' features, and its parameters without encoders."""
    own = config(made, "features")
    model, variables = variables_of(own)
    return answer_of(model, variables, own), variables["params"]


@pytest.mark.parametrize("architecture", ["mmei", "multimodal_transformer"])
def test_model_on_media_says_what_the_same_model_says_of_their_features(architecture, made, on_features):
    media = config(made, "media", model__architecture=architecture)
    model, variables = variables_of(media)
    answer, parameters = on_features
    if architecture != "mmei":
        own = config(made, "features", model__architecture=architecture)
        reader, found = variables_of(own)
        answer, parameters = answer_of(reader, found, own), found["params"]
    assert set(variables["params"]) - set(parameters) == {"encoder_vision", "encoder_audio", "encoder_text"}
    variables["params"] |= parameters
    found = answer_of(model, variables, media)
    np.testing.assert_allclose(found.emotion, answer.emotion, atol=1e-4)
    np.testing.assert_allclose(found.modality_vectors, answer.modality_vectors, atol=1e-4)


def encoded(encoding, parameters, sequence):
    return jax.jit(encoding.make().apply)({"params": parameters}, sequence)


def test_mean_of_patches_can_stand_for_a_frame(made):
    own = config(made, "media", model__encoders__vision_token="mean_of_patches")
    parameters = jax.device_put(initial_encoders(own.model)["encoder_vision"])
    encoding, frames = build_model(own, open_dataset(own)).tasks.vision.encoder, batch_of(own).vision
    found = encoded(encoding, parameters, frames)
    pixels = encoding.image.normalise(np.asarray(frames.features).reshape(-1, 32, 32, 3))
    vit = jax.jit(Vit(encoding.architecture).apply)({"params": parameters}, pixels)
    np.testing.assert_allclose(found.features.reshape(-1, 16), vit.last_hidden_state[:, 1:].mean(axis=1), atol=1e-5)


def test_sum_of_four_layers_can_stand_for_sound(made):
    own = config(made, "media")
    encoding = build_model(own, open_dataset(own)).tasks.audio.encoder
    stack = dataclasses.replace(encoding.architecture.stack, num_layers=5)
    architecture = dataclasses.replace(encoding.architecture, stack=stack)
    encoding = dataclasses.replace(encoding, architecture=architecture, layers="sum_of_last_four", frames_per_token=1)
    features = np.random.default_rng(0).integers(-9_000, 9_000, (2, 2_000, 1)).astype(np.int16)
    segment_ids = (np.arange(2_000)[None] < np.array([[2_000], [1_500]])).astype(np.int32)
    sequence = TokenSequence(jnp.asarray(features), jnp.asarray(segment_ids))
    wav2vec2 = Wav2Vec2(architecture)
    alone = encoding.audio.normalise(features[1, :1_500, 0] / np.float32(32_767))[None]
    variables = unbox(jax.jit(wav2vec2.init)(jax.random.key(0), alone))
    outputs = jax.jit(partial(wav2vec2.apply, with_hidden_states=True))(variables, alone)
    expected = np.sum(outputs.hidden_states[-4:], axis=0)[0]
    found = encoded(encoding, variables["params"], sequence)
    assert int(found.segment_ids[1].sum()) == len(expected)
    np.testing.assert_allclose(found.features[1, : len(expected)], expected, atol=1e-4)


def steps(config, num_steps=2):
    """The state before and after some updates."""
    dataset, mesh = open_dataset(config), mesh_over(jax.devices()[:1])
    model = build_model(config, dataset)
    schedule = make_schedule(config.optimizer, num_steps=8, steps_per_epoch=3.0)
    optimizer = make_optimizer(config.optimizer, variables_shapes(model), schedule)
    encoders = initial_encoders(config.model)
    state = initial_state(model, optimizer, mesh, seed=0, statistics={}, encoders=encoders)
    before = jax.device_get(state.parameters)
    step = jit_train_step(make_train_step(model, optimizer, config, None), state_shapes(model, optimizer, mesh))
    batches, losses = input_pipeline.train_iterator(dataset, config, batch_sharding(mesh)), []
    for _ in range(num_steps):
        state, report = step(state, next(batches))
        losses.append(float(report.loss))
    batches.close()
    return before, jax.device_get(state.parameters), losses, state


def variables_shapes(model):
    return jax.eval_shape(lambda: initialize(model, 0))["params"]


def largest_change(before, after):
    changes = jax.tree.map(lambda old, new: float(np.abs(old - new).max()), before, after)
    return {name: max(jax.tree.leaves(group)) for name, group in changes.items()}


@pytest.fixture(scope="module")
def trained(made):
    return steps(config(made, "media"))


def test_every_encoder_begins_with_its_folder_and_learns(trained, made):
    before, after, losses, _ = trained
    for name, own in initial_encoders(config(made, "media").model).items():
        jax.tree.map(np.testing.assert_array_equal, before[name], own)
    assert np.isfinite(losses).all()
    assert all(change > 0.0 for change in largest_change(before, after).values())


def test_parts_can_be_frozen_and_have_rates_of_their_own(made, trained):
    rates = (("^encoder_vision/", 0.0), ("^encoder_audio/front_", 0.0), ("^encoder_", 0.1))
    before, after, _, state = steps(config(made, "media", optimizer__rate_multipliers=rates), num_steps=1)
    assert largest_change(before, after)["encoder_vision"] == 0.0
    front = largest_change(before["encoder_audio"], after["encoder_audio"])
    assert {name for name, change in front.items() if change == 0.0} == {
        name for name in front if name.startswith("front_")
    }
    # Adam's first update is the rate, whatever the gradient.
    assert front["projection"] == pytest.approx(0.1 * largest_change(before, after)["embed_text"], rel=0.2)
    # What is frozen has no moments.
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state.optimizer_state)]
    assert any("encoder_text" in path for path in paths)
    assert not any("encoder_vision" in path for path in paths)


def test_what_is_computed_again_changes_nothing(made, trained):
    _, _, losses, _ = steps(config(made, "media", model__encoders__remat="layer"))
    assert losses == pytest.approx(trained[2], rel=1e-5)
    assert losses[1] != losses[0]


def test_accumulated_gradients_are_those_of_the_whole_batch(made, trained):
    _, _, losses, _ = steps(config(made, "media", train__gradient_accumulation_steps=3))
    assert losses == pytest.approx(trained[2], rel=1e-5)


def ranking_dict(made, **changes):
    """With encoders that stay as they are, and a content tower that reads words."""
    words = str(made / "encoders" / "text")
    ranking = {"loss__ranking": "in_batch_softmax", "model__content_encoder": words, "model__content_max_tokens": 16}
    return config_dict(made, "media", optimizer__rate_multipliers=FROZEN, **ranking, **changes)


@pytest.fixture(scope="module")
def run_on_media(made):
    """A trained run that ranks, evaluated."""
    train(parse(ranking_dict(made)), made / "run")
    evaluate_workdir(made / "run", "test")
    return made / "run"


def test_run_on_media_is_evaluated_ranks_and_reads_a_clip(made, run_on_media):
    metrics = json.loads((run_on_media / "eval" / "test.json").read_text())["metrics"]
    assert {"ranking/map", "ranking/ndcg@10", "loss/ranking"} <= set(metrics)
    (expected,) = parquet.read_table(run_on_media / "eval" / "test_predictions.parquet").to_pylist()
    clip = Clip("any", "any", path="10.mp4", text=tiny_extraction.TEXTS[10 % 4])
    found = predict(run_on_media, clip, base=made / "clips")
    assert list(found["emotion"]["probabilities"].values()) == pytest.approx(
        expected["emotion_probabilities"], abs=1e-5
    )
    assert found["num_tokens"]["audio"] > 10_000
    items = [f"item{row}" for row in expected["top_item_index"]]
    assert [item["id"] for item in found["recommended"]] == items
    # An index of the run's own catalogue recommends the same.
    index = made / "index"
    assert recommendation.main(["build", f"--workdir={run_on_media}", f"--output={index}"]) == 0
    again = predict(run_on_media, clip, base=made / "clips", index=index, k=3)
    assert [item["id"] for item in again["recommended"]] == items[:3]


def test_run_on_media_goes_on_with_its_own_parameters_and_no_other_encoders(made, run_on_media, tmp_path):
    shutil.copytree(run_on_media, tmp_path / "run")
    values = ranking_dict(made)
    # The same parameters are restored, though the folder's are others by now.
    before = open_best_run(tmp_path / "run").variables["params"]["encoder_text"]
    train(parse(values), tmp_path / "run")
    jax.tree.map(
        np.testing.assert_array_equal, open_best_run(tmp_path / "run").variables["params"]["encoder_text"], before
    )
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    shutil.copytree(made / "encoders" / "text", tmp_path / "others" / "text")
    with (tmp_path / "others" / "text" / "tokenizer_config.json").open("a") as stream:
        stream.write("\n")
    saved["model"]["encoders"]["text"] = str(tmp_path / "others" / "text")
    (tmp_path / "run" / "config.json").write_text(json.dumps(saved))
    with pytest.raises(InputError, match=r"others/text: not the encoders that .* was trained with"):
        evaluate_workdir(tmp_path / "run", "test")


def test_run_on_media_is_exported_as_a_whole(made, run_on_media, capsys):
    folder = made / "export"
    given = [f"--workdir={run_on_media}", f"--output={folder}", "--platforms=cpu", "--k=3"]
    assert serving.main(["export", *given]) == 0
    programs = load(folder).programs
    encoders = {"vision_encoder", "audio_encoder", "text_encoder"}
    assert set(programs) == {"fusion", *encoders, "end_to_end", "top_k"}
    assert set(programs["end_to_end"].description.groups) == {"fusion", *encoders}
    capsys.readouterr()
    assert serving.main(["check", f"--export={folder}", f"--workdir={run_on_media}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.partition(":")[0] for line in lines[-6:]} == set(programs)


def test_normalised_samples_are_those_of_each_clip_alone():
    lengths = (40, 25, 0)
    samples = np.random.default_rng(0).normal(0.3, 0.2, (3, 40)).astype(np.float32)
    is_sample = np.arange(40)[None] < np.array(lengths)[:, None]
    found = normalised_samples(jnp.asarray(samples), jnp.asarray(is_sample))
    for row, length in enumerate(lengths[:2]):
        expected = AudioPreprocessing(16_000, True).normalise(samples[row, :length])
        np.testing.assert_allclose(found[row, :length], expected, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(found)[~is_sample], 0.0)


@pytest.mark.parametrize(
    ("depth", "changes", "message"),
    [
        ("media", {"model__encoders__audio": ""}, r"media: audio holds raw media \(int16\): expected features"),
        (
            "media",
            {"model__encoders__text": "{made}/encoders/vision"},
            "encoders.text = .*holds a 'vit': expected a BERT",
        ),
        ("media", {"data__max_tokens__audio": (300,)}, "config.data.max_tokens.audio: 300 samples: expected 400 to"),
        ("media", {"data__max_tokens__text": (300,)}, "config.data.max_tokens.text: 300: expected at most 256"),
        ("features", {"model__encoders__text": "{made}/encoders/text"}, r"features holds features \(float"),
    ],
)
def test_data_and_encoders_that_do_not_fit_are_refused(depth, changes, message, made, tmp_path):
    changes = {key: value.format(made=made) if isinstance(value, str) else value for key, value in changes.items()}
    with pytest.raises(InputError, match=message):
        train(config(made, depth, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        (
            "vision",
            '"height": 32',
            '"height": 16',
            "reads frames of 16 x 32 pixels: expected those of the data set, 32 x 32",
        ),
        ("audio", '"sampling_rate": 16000', '"sampling_rate": 8000', "hears 8000 samples a second: expected the data"),
        ("text", '"happy"', '"merry"', "its vocabulary is sha256:.*expected the tokenizer that they were made with"),
    ],
)
def test_preprocessing_other_than_the_data_sets_is_refused(name, old, new, message, made, tmp_path):
    encoders = random_encoders.make(tmp_path / "encoders")
    folder = encoders.converted[name]
    path = folder / ("tokenizer.json" if name == "text" else "preprocessor_config.json")
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    own = config(made, "media", **{f"model__encoders__{name}": str(folder)})
    with pytest.raises(InputError, match=message):
        build_model(own, open_dataset(own))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__architecture": "late_fusion"}, "config.model.architecture = 'late_fusion': expected 'mmei' or"),
        ({"data__modalities": ("vision", "text")}, r"config.model.encoders.audio = '.*': expected '' without 'audio'"),
        ({"data__standardize": True}, "config.data.standardize = True: expected False where encoders read all"),
        ({"model__encoders__audio_frames_per_token": 0}, "audio_frames_per_token = 0: expected at least 1"),
        (
            {"data__packing__records_per_row": 2, "data__packing__num_rows": (2,)},
            "config.data.packing.records_per_row = 2: expected 1 with model.encoders.audio",
        ),
    ],
)
def test_configurations_that_cannot_be_are_refused(changes, message, made):
    if "data__packing__records_per_row" in changes:
        changes = changes | {"data__packing__tokens_per_row__audio": SAMPLES}
    with pytest.raises(InputError, match=message):
        config(made, "media", **changes)


def test_remat_without_encoders_is_refused(made):
    with pytest.raises(InputError, match=r"config\.model\.encoders\.remat = 'layer': expected 'none' without"):
        config(made, "features", model__encoders__remat="layer")


def test_robustness_of_raw_media_is_refused(made):
    own = config(made, "media")
    dataset = open_dataset(own)
    with pytest.raises(InputError, match=r"model\.encoders: vision, audio, text: expected a run on features"):
        RobustnessEvaluator(build_model(own, dataset), own, dataset)
