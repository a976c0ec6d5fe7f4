"""Encoders inside a model as programs: alone and as a whole they give what the run gives, for any lengths."""

import dataclasses

import jax
import numpy as np
import pytest
from jax import export

from configs import default
from mmei_jax.config import parse
from mmei_jax.evaluation import BestRun, Evaluator
from mmei_jax.item_words import open_dataset
from mmei_jax.recommendation.item_encoding import ItemEncoder
from mmei_jax.serving.encoder_functions import inner_encoder_functions
from mmei_jax.serving.exporting import lower, model_hash
from mmei_jax.serving.functions import functions, fusion_function, top_k_function
from mmei_jax.serving.manifest import PLATFORMS
from mmei_jax.sharding import make_evaluation_mesh
from mmei_jax.state import build_model, initialize
from mmei_jax.types import Batch, InputError, TokenSequence
from tests import random_encoders, tiny, tiny_extraction, tiny_slates

TOLERANCE = 1e-6
NAMES = ("vision", "audio", "text")
SAMPLES, FRAMES_PER_TOKEN = 34_000, 5


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Of random parameters, on raw media, that ranks."""
    folder = tmp_path_factory.mktemp("inner")
    encoders = random_encoders.make(folder / "encoders")
    (folder / "clips").mkdir()
    clips = tiny_extraction.make_clips(folder / "clips")
    tiny_slates.extract(encoders, clips, folder / "data", tiny_slates.write(folder), depth="raw")
    values = default.get_config()
    values.data.path = str(folder / "data")
    values.data.update(batch_size=3, evaluation_batch_size=3)
    values.data.max_tokens.update(vision=(16,), audio=(SAMPLES,), text=(32,))
    values.model.update(dim=16, num_heads=2, num_layers=1, feedforward_dim=16, embedding_dim=8, head_num_layers=0)
    folders = {name: str(encoders.converted[name]) for name in NAMES}
    values.model.encoders.update(folders, audio_frames_per_token=FRAMES_PER_TOKEN)
    values.loss.intent = "none"
    config = parse(values.to_dict())
    dataset = open_dataset(config)
    model = build_model(config, dataset)
    variables = jax.jit(lambda: initialize(model, 0))()
    return BestRun(config, dataset, model, variables, make_evaluation_mesh(), 0)


def inputs_of(run, records):
    """What the programs take of training records, in rows as long as the longest needs."""
    split, found = run.dataset.split("train"), {}
    for name, own in zip(NAMES, ("pixels", "samples", "token_ids"), strict=True):
        lengths = split.lengths(name)[records]
        tokens, _ = split.gather_tokens(name, records, int(lengths.max()))
        end = {"vision": (32, 32, 3)}.get(name, ())
        found[f"{name}_{own}"] = tokens.reshape(*tokens.shape[:2], *end)
        found[f"{name}_lengths"] = lengths.astype(np.int32)
    return found


def lowered(function):
    """The exported program, for every platform, and its parameters."""
    program = export.deserialize(lower(function, PLATFORMS).serialize())
    assert program.platforms == PLATFORMS
    return program, {name: dict(group.arrays) for name, group in function.groups.items()}


RECORDS = (np.arange(2), np.arange(3, 8))


@pytest.fixture(scope="module")
def answers(run):
    """What the model says of both sets of records, jitted, in rows of the same lengths."""
    apply, found = jax.jit(lambda batch: run.model.apply(run.variables, batch, is_training=False)), []
    for records in RECORDS:
        given, sequences = inputs_of(run, records), {}
        for name, own in zip(NAMES, ("pixels", "samples", "token_ids"), strict=True):
            tokens, lengths = given[f"{name}_{own}"], given[f"{name}_lengths"]
            ids = (np.arange(tokens.shape[1]) < lengths[:, None]).astype(np.int32)
            sequences[name] = TokenSequence(tokens.reshape(*ids.shape, -1), ids)
        num_records = len(records)
        found.append(
            apply(
                Batch(
                    **sequences,
                    is_record=np.ones(num_records, bool),
                    record_index=np.arange(num_records, dtype=np.int32),
                )
            )
        )
    return found


@pytest.fixture(scope="module")
def predictions(run):
    """What the evaluation says of all training records."""
    parts = list(Evaluator(run.model, run.config, run.dataset, run.mesh).predict(run.variables, ("train",)))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def test_whole_reads_and_ranks_as_the_run_does(run, answers, predictions):
    program, parameters = lowered(top_k_function(run, k=3, index=None, platforms=PLATFORMS))
    for records, own in zip(RECORDS, answers, strict=True):
        inputs = {**inputs_of(run, records), "excluded": np.full((len(records), 1), -1, np.int32)}
        found = program.call(parameters, inputs)
        for name in ("emotion", "modality_weights", "fused", "user_embedding"):
            np.testing.assert_allclose(found[name], getattr(own, name), atol=TOLERANCE)
        np.testing.assert_array_equal(found["row"], predictions.top_items[records, :3])
        # In rows as long as the run takes.
        np.testing.assert_allclose(jax.nn.softmax(found["emotion"]), predictions.emotion[records], atol=1e-5)
    # What stands behind a record's last frame, sample or word has no effect.
    other = dict(inputs)
    for name, unit in (("vision_pixels", "vision"), ("audio_samples", "audio"), ("text_token_ids", "text")):
        is_behind = np.arange(other[name].shape[1]) >= other[f"{unit}_lengths"][:, None]
        other[name] = np.where(is_behind.reshape(is_behind.shape + (1,) * (other[name].ndim - 2)), 1, other[name])
        other[name] = other[name].astype(inputs[name].dtype)
    again = program.call(parameters, other)
    np.testing.assert_allclose(again["emotion"], found["emotion"], atol=TOLERANCE)


def test_encoders_and_the_fusion_behind_them_are_the_whole(run, answers):
    programs = {name: lowered(function) for name, function in inner_encoder_functions(run).items()}
    fusion, parameters = lowered(fusion_function(run))
    for records, own in zip(RECORDS, answers, strict=True):
        given, features = inputs_of(run, records), {}
        for name in NAMES:
            program, group = programs[f"{name}_encoder"]
            alone = {key.removeprefix(f"{name}_"): value for key, value in given.items() if key.startswith(name)}
            encoded = program.call(group, alone)
            features |= {f"{name}_{key}": np.asarray(value) for key, value in encoded.items()}
        found = fusion.call(parameters, features)
        for name in ("emotion", "modality_weights", "fused", "user_embedding"):
            np.testing.assert_allclose(found[name], getattr(own, name), atol=TOLERANCE)
    assert features["audio_features"].dtype == np.float32
    # Some ten tokens a second.
    assert (features["audio_lengths"] == -(-((given["audio_lengths"] - 400) // 320 + 1) // FRAMES_PER_TOKEN)).all()


def test_hash_of_the_model_knows_its_encoders(run):
    params = run.variables["params"]
    changed = jax.tree.map(lambda leaf: leaf + 1, params["encoder_text"])
    other = dataclasses.replace(run, variables={**run.variables, "params": {**params, "encoder_text": changed}})
    assert model_hash(other) != model_hash(run)
    # Their parameters are in no other group.
    assert not any("encoder_" in name for name in fusion_function(run).groups["fusion"].arrays)
    assert ItemEncoder(run).tower_sha256 == ItemEncoder(other).tower_sha256


def test_run_on_features_has_no_whole(data):
    config = tiny.config(data, **tiny.LEAST)
    dataset = open_dataset(config)
    model = build_model(config, dataset)
    run = BestRun(config, dataset, model, {}, make_evaluation_mesh(), 0)
    with pytest.raises(InputError, match=r"config\.model\.encoders: none: expected a run with encoders inside"):
        functions(run, ("end_to_end",), k=1, index=None, platforms=("cpu",), report=lambda line: None)
