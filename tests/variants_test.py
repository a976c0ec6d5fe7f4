"""Every kind of emotion task, and the switches of a run, end to end on imported features: train, evaluate, read back.

What an evaluation writes is computed a second time, with scikit-learn, from the predictions it writes beside it.
"""

import json

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn import metrics as sklearn_metrics

from mmei_jax import training
from mmei_jax.checkpointing import Checkpointer
from mmei_jax.config import parse
from mmei_jax.evaluation import evaluate_workdir
from mmei_jax.extraction import import_features
from mmei_jax.records import Dataset
from mmei_jax.sharding import make_mesh
from mmei_jax.state import build_model, placed_variable_shapes
from mmei_jax.training import train
from tests import tiny

NUM_RECORDS = 60
EMOTIONS = ("neutral", "joy", "anger")
FEELINGS = ("glad", "sad", "cross", "afraid")
# Some records are longer than the limits of audio and text, which their arrays give 8 and 5 tokens.
MAX_TOKENS = {"vision": 1, "audio": 6, "text": 4}
# Small enough that the 10 test records take two batches, the last one with filler.
TINY = {
    "data__batch_size": 8,
    "data__evaluation_batch_size": 6,
    "model__head_num_layers": 0,
    "loss__intent": "none",
    "loss__ranking": "none",
    "optimizer__learning_rate": 1e-2,
    "train__num_epochs": 3,
    "train__log_every_steps": 1,
    "train__save_every_steps": 100,
}
SIGMOID = {"loss__emotion": "sigmoid", "loss__emotion_label": "feelings"}
REGRESSION = {
    "loss__emotion": "regression",
    "loss__emotion_label": "sentiment",
    "train__best_metric": "validation/emotion/mae",
}
NO_NOISE = {"model__dropout_rate": 0.0, "model__modality_dropout_rate": 0.0, "train__num_epochs": 1}
VARIANTS = {
    "softmax": {},
    "sigmoid": SIGMOID | {"loss__task_weighting": "uncertainty"},
    "regression": REGRESSION,
    "bfloat16": {"model__compute_dtype": "bfloat16"},
    "standardized": {"data__standardize": True},
    # Uncertainty too: its s_t / 2 must be added once, not once a micro-batch.
    "whole_batch": NO_NOISE | {"loss__task_weighting": "uncertainty"},
    "accumulated": NO_NOISE | {"loss__task_weighting": "uncertainty", "train__gradient_accumulation_steps": 2},
}


def make_arrays():
    """60 records of 12 speakers, in which each modality tells one of the labels; about a sixth of each label lacks."""
    generator = np.random.default_rng(0)
    rows = np.arange(NUM_RECORDS)
    emotion = generator.integers(0, 3, NUM_RECORDS)
    feelings = generator.integers(0, 2, (NUM_RECORDS, 4))
    sentiment = np.round(generator.uniform(-9, 9, NUM_RECORDS)) / 3
    sentiment[::5] = 0.0
    vision = generator.normal(size=(NUM_RECORDS, 5))
    vision[rows, emotion] += 3.0
    # Far from mean 0 and deviation 1, and one feature that never changes.
    audio = generator.normal(size=(NUM_RECORDS, 8, 6))
    audio[:, :, :4] += 2.0 * feelings[:, None, :]
    audio = audio * np.linspace(0.5, 2.0, 6) + np.linspace(-3.0, 3.0, 6)
    audio[:, :, 5] = 0.25
    text = generator.normal(size=(NUM_RECORDS, 5, 4))
    text[:, :, 0] += sentiment[:, None]
    audio_lengths, text_lengths = generator.integers(1, 9, NUM_RECORDS), generator.integers(1, 6, NUM_RECORDS)
    audio_lengths[generator.permutation(NUM_RECORDS)[:12]] = 0
    text_lengths[generator.permutation(NUM_RECORDS)[:6]] = 0
    names = np.array(["|".join(np.array(FEELINGS)[row > 0]) or "none" for row in feelings])
    speaker = rows % 12
    # In every split some records lack each label.
    missing = (speaker + rows // 12) % 6
    return {
        "id": np.array([f"clip{row}" for row in rows]),
        "speaker": speaker,
        "part": np.array(["train"] * 8 + ["validation"] * 2 + ["test"] * 2)[speaker],
        "emotion": np.where(missing == 0, np.nan, emotion),
        "feelings": np.where(missing == 1, "", names),
        "sentiment": np.where(missing == 2, np.nan, sentiment),
        "vision": vision.astype(np.float32),
        "audio": audio.astype(np.float32),
        "audio_lengths": audio_lengths,
        "text": text.astype(np.float32),
        "text_lengths": text_lengths,
    }


def expected_labels(label):
    """Labels by id, None where a record has none, straight from the arrays."""
    arrays = make_arrays()
    values = {
        "emotion": lambda value: None if np.isnan(value) else int(value),
        "feelings": lambda value: [float(name in value.split("|")) for name in FEELINGS] if value else None,
        "sentiment": lambda value: None if np.isnan(value) else pytest.approx(float(value)),
    }
    return {name: values[label](value) for name, value in zip(arrays["id"].tolist(), arrays[label], strict=True)}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("features")
    np.savez(folder / "features.npz", **make_arrays())
    labels = "--labels=emotion,feelings:multi_label,sentiment:real"
    classes = [f"--class_names=emotion={','.join(EMOTIONS)}", f"--class_names=feelings={','.join(FEELINGS)}"]
    splits = ["--user_key=speaker", "--group_key=speaker", "--split_key=part"]
    files = [f"--input={folder / 'features.npz'}", f"--output={folder / 'data'}", "--source=here", "--licence=CC0"]
    assert import_features.main([*files, labels, *classes, *splits]) == 0
    return folder / "data"


@pytest.fixture(scope="module")
def config_of(data):
    def make(variant):
        config = tiny.config_dict(data, **{**TINY, **VARIANTS[variant]})
        for name, limit in MAX_TOKENS.items():
            config.data.max_tokens[name] = (limit,)
        return parse(config.to_dict())

    return make


@pytest.fixture(scope="module")
def run_of(config_of, tmp_path_factory):
    """Trains a variant once; gives the result and the working directory."""
    runs = {}

    def run(variant):
        if variant not in runs:
            workdir = tmp_path_factory.mktemp(variant)
            runs[variant] = train(config_of(variant), workdir), workdir
        return runs[variant]

    return run


@pytest.fixture(scope="module")
def evaluation_of(run_of):
    """Evaluates a variant once; gives what test.json and the predictions hold."""
    evaluations = {}

    def evaluate(variant):
        if variant not in evaluations:
            workdir = run_of(variant)[1]
            evaluate_workdir(workdir, "test")
            summary = json.loads((workdir / "eval" / "test.json").read_text())
            evaluations[variant] = summary, pq.read_table(workdir / "eval" / "test_predictions.parquet")
        return evaluations[variant]

    return evaluate


def read_lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def saved_variables(config, workdir, step):
    checkpointer = Checkpointer(workdir, best_metric=config.train.best_metric)
    model = build_model(config, Dataset.open(config.data.path))
    variables = checkpointer.restore_model(step, placed_variable_shapes(model, make_mesh(config)))
    checkpointer.close()
    return jax.device_get(variables)


def softmax_figures(labels, probabilities):
    chosen, every = probabilities.argmax(axis=1), {"average": "macro", "zero_division": 0}
    precision = sklearn_metrics.precision_score(labels, chosen, **every)
    recall = sklearn_metrics.recall_score(labels, chosen, **every)
    return {
        "accuracy": sklearn_metrics.accuracy_score(labels, chosen),
        "macro_precision": precision,
        "macro_recall": recall,
        "f1_of_macro": 2 * precision * recall / (precision + recall),
        "macro_f1": sklearn_metrics.f1_score(labels, chosen, **every),
        "weighted_f1": sklearn_metrics.f1_score(labels, chosen, average="weighted", zero_division=0),
        "cross_entropy": sklearn_metrics.log_loss(labels, probabilities, labels=[0, 1, 2]),
    }


def sigmoid_figures(labels, probabilities):
    labels, chosen = labels.astype(int), (probabilities > 0.5).astype(int)
    figures = {
        "exact_match": sklearn_metrics.accuracy_score(labels, chosen),
        "macro_f1": sklearn_metrics.f1_score(labels, chosen, average="macro", zero_division=0),
        "weighted_f1": sklearn_metrics.f1_score(labels, chosen, average="weighted", zero_division=0),
    }
    entropies = []
    for name, label, choice, probability in zip(FEELINGS, labels.T, chosen.T, probabilities.T, strict=True):
        figures[f"accuracy/{name}"] = sklearn_metrics.accuracy_score(label, choice)
        figures[f"weighted_accuracy/{name}"] = sklearn_metrics.balanced_accuracy_score(label, choice)
        figures[f"weighted_f1/{name}"] = sklearn_metrics.f1_score(label, choice, average="weighted", zero_division=0)
        entropies.append(sklearn_metrics.log_loss(label, probability, labels=[0, 1]))
    for name in ("accuracy", "weighted_accuracy"):
        figures[name] = np.mean([figures[f"{name}/{feeling}"] for feeling in FEELINGS])
    return figures | {"cross_entropy": np.mean(entropies)}


def regression_figures(labels, values):
    def rounded_accuracy(limit):
        pairs = [np.round(np.clip(numbers, -limit, limit)).astype(int) for numbers in (labels, values)]
        return sklearn_metrics.accuracy_score(*pairs)

    def binary(label, value):
        f1 = sklearn_metrics.f1_score(label, value, average="weighted", zero_division=0)
        return sklearn_metrics.accuracy_score(label, value), f1

    is_polar = labels != 0
    assert not is_polar.all()
    acc2_has0, f1_has0 = binary(labels >= 0, values >= 0)
    acc2_non0, f1_non0 = binary(labels[is_polar] > 0, values[is_polar] > 0)
    return {
        "acc2_has0": acc2_has0,
        "f1_has0": f1_has0,
        "acc2_non0": acc2_non0,
        "f1_non0": f1_non0,
        "acc7": rounded_accuracy(3),
        "acc5": rounded_accuracy(2),
        "mae": sklearn_metrics.mean_absolute_error(labels, values),
        "pearson": np.corrcoef(labels, values)[0, 1],
    }


FIGURES = {"softmax": softmax_figures, "sigmoid": sigmoid_figures, "regression": regression_figures}
EVALUATED = ("softmax", "sigmoid", "regression", "bfloat16", "standardized")


@pytest.mark.parametrize("variant", EVALUATED)
def test_run_writes_finite_losses_and_learns(run_of, variant):
    result, workdir = run_of(variant)
    lines = read_lines(workdir)
    losses = [line["train/loss/emotion"] for line in lines if "train/loss/emotion" in line]
    assert result.step == len(losses) == 15
    assert np.isfinite([line[name] for line in lines for name in line if "loss" in name]).all()
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    assert [line["step"] for line in lines if "validation/loss" in line] == [5, 10, 15]


@pytest.mark.parametrize("variant", ["softmax", "sigmoid", "regression"])
def test_best_checkpoint_is_of_the_largest_accuracy_or_the_smallest_error(config_of, run_of, evaluation_of, variant):
    result, workdir = run_of(variant)
    name = config_of(variant).train.best_metric
    value_of = {line["step"]: line[name] for line in read_lines(workdir) if name in line}
    best = (min if variant == "regression" else max)(value_of.values())
    assert len(set(value_of.values())) > 1
    assert value_of[result.best_step] == best
    assert evaluation_of(variant)[0]["checkpoint_step"] == result.best_step
    assert {int(path.name) for path in (workdir / "checkpoints").iterdir()} == {result.best_step, 15}


@pytest.mark.parametrize("variant", EVALUATED)
def test_predictions_hold_every_record_in_the_tasks_own_columns(config_of, evaluation_of, variant):
    loss = config_of(variant).loss
    summary, table = evaluation_of(variant)
    answer = "emotion_value" if loss.emotion == "regression" else "emotion_probabilities"
    judged = [] if loss.emotion == "regression" else ["emotion_choice", "emotion_cross_entropy"]
    assert table.column_names == [
        *("id", "user_id", "has_vision", "has_audio", "has_text", "emotion_label", answer, *judged),
        *("alpha_vision", "alpha_audio", "alpha_text"),
    ]
    arrays = make_arrays()
    ids = arrays["id"][arrays["part"] == "test"].tolist()
    assert table["id"].to_pylist() == ids
    assert summary["num_records"] == len(ids) == 10

    labels = expected_labels(loss.emotion_label)
    assert table["emotion_label"].to_pylist() == [labels[name] for name in ids]
    assert 0 < table["emotion_label"].null_count < 5
    names = {"softmax": EMOTIONS, "sigmoid": FEELINGS, "regression": ()}[loss.emotion]
    assert json.loads(table.schema.metadata[b"emotion_classes"]) == list(names)

    assert table[answer].null_count == 0
    answers = np.asarray(table[answer].to_pylist(), np.float32)
    assert answers.shape == ((10,) if loss.emotion == "regression" else (10, len(names)))
    assert np.isfinite(answers).all()
    if loss.emotion != "regression":
        assert ((answers > 0) & (answers < 1)).all()
    if loss.emotion == "softmax":
        np.testing.assert_allclose(answers.sum(axis=1), 1.0, atol=1e-5)
    else:
        # Each class has a probability of its own.
        assert np.ptp(answers if answers.ndim == 1 else answers.sum(axis=1)) > 1e-3


@pytest.mark.parametrize("variant", EVALUATED)
def test_metrics_are_those_that_scikit_learn_finds_in_the_predictions(config_of, evaluation_of, variant):
    kind = config_of(variant).loss.emotion
    summary, table = evaluation_of(variant)
    is_labelled = np.asarray(table["emotion_label"].is_valid())
    answer = table["emotion_value" if kind == "regression" else "emotion_probabilities"].to_pylist()
    labels = np.asarray(table["emotion_label"].drop_null().to_pylist())
    expected = FIGURES[kind](labels, np.asarray(answer, np.float32)[is_labelled])
    expected = {f"emotion/{name}": value for name, value in expected.items()}
    expected["loss/emotion"] = expected["emotion/mae" if kind == "regression" else "emotion/cross_entropy"]
    if kind != "regression":
        expected["mean_accuracy"] = expected["emotion/accuracy"]
    arrays = make_arrays()
    is_test = arrays["part"] == "test"
    for name in ("vision", "audio", "text"):
        has_modality = arrays[f"{name}_lengths"][is_test] > 0 if name != "vision" else np.ones(10, bool)
        weights = table[f"alpha_{name}"].to_numpy()
        assert table[f"has_{name}"].to_pylist() == has_modality.tolist()
        assert (weights[~has_modality] == 0).all()
        assert (weights[has_modality] > 0).all()
        expected[f"alpha/{name}"] = weights[has_modality].mean()
    assert set(summary["metrics"]) == {*expected, "loss"}
    assert summary["undefined_metrics"] == []
    assert {name: summary["metrics"][name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)
    if config_of(variant).loss.task_weighting == "fixed":
        assert summary["metrics"]["loss"] == pytest.approx(expected["loss/emotion"], rel=1e-4)


def test_learned_task_weight_is_saved_and_weighs_the_loss(config_of, run_of, evaluation_of):
    result, workdir = run_of("sigmoid")
    variables = saved_variables(config_of("sigmoid"), workdir, result.best_step)
    (log_variance,) = variables["params"]["task_log_variances"]
    assert abs(log_variance) > 1e-3
    found = evaluation_of("sigmoid")[0]["metrics"]
    assert found["loss"] == pytest.approx(np.exp(-log_variance) * found["loss/emotion"] + log_variance / 2, rel=1e-5)


def test_bfloat16_computes_nearly_the_same_and_keeps_float32_parameters(config_of, run_of):
    lines, exact = (read_lines(run_of(variant)[1]) for variant in ("bfloat16", "softmax"))
    assert lines[0]["train/loss"] == pytest.approx(exact[0]["train/loss"], rel=0.03)
    # Further from float32 than float32's own rounding: the products were made in bfloat16.
    assert lines[0]["train/loss"] != pytest.approx(exact[0]["train/loss"], rel=1e-5)
    result, workdir = run_of("bfloat16")
    for leaf in jax.tree.leaves(saved_variables(config_of("bfloat16"), workdir, result.best_step)):
        assert leaf.dtype == np.float32


@pytest.mark.parametrize("modality", ["vision", "audio", "text"])
def test_saved_statistics_are_those_of_the_training_tokens(config_of, run_of, modality):
    _, workdir = run_of("standardized")
    found = saved_variables(config_of("standardized"), workdir, 15)["statistics"][f"embed_{modality}"]
    arrays = make_arrays()
    rows = np.flatnonzero(arrays["part"] == "train")
    if modality == "vision":
        tokens = arrays["vision"][rows]
    else:
        lengths = np.minimum(arrays[f"{modality}_lengths"], MAX_TOKENS[modality])
        tokens = np.concatenate([arrays[modality][row, : lengths[row]] for row in rows])
    tokens = tokens.astype(np.float64)
    deviation = tokens.std(axis=0)
    deviation[deviation == 0] = 1.0
    np.testing.assert_allclose(found["mean"], tokens.mean(axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["scale"], 1.0 / deviation, rtol=1e-5)


def test_statistics_reach_the_model(run_of):
    plain, standardized = (read_lines(run_of(variant)[1])[0] for variant in ("softmax", "standardized"))
    assert abs(plain["train/loss"] - standardized["train/loss"]) > 1e-3


@pytest.mark.slow
def test_standardized_run_that_was_stopped_resumes_to_the_bit(config_of, run_of, tmp_path, monkeypatch):
    config = config_of("standardized")
    with monkeypatch.context() as patch:
        patch.setattr(training, "TrainingLog", tiny.StopAfter)
        patch.setattr(tiny.StopAfter, "step", 7)
        stopped = train(config, tmp_path)
    assert (stopped.step, stopped.stopped_by) == (7, "SIGTERM")
    assert train(config, tmp_path).step == 15
    whole = saved_variables(config, run_of("standardized")[1], 15)
    jax.tree.map(np.testing.assert_array_equal, saved_variables(config, tmp_path, 15), whole)


@pytest.mark.slow
def test_accumulated_micro_batches_make_the_update_of_the_whole_batch(run_of):
    names = ("train/loss", "train/loss/emotion", "train/gradient_norm", "train/alpha/audio")
    whole, accumulated = (
        {name: [line[name] for line in read_lines(run_of(variant)[1]) if name in line] for name in names}
        for variant in ("whole_batch", "accumulated")
    )
    assert len(whole["train/loss"]) == 5
    for name in names:
        assert accumulated[name] == pytest.approx(whole[name], rel=1e-3), name
