import functools

import clu.metrics
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics

from mmei_jax.config import LossConfig
from mmei_jax.metrics import Means, batch_metrics, compute_all, merge_all
from mmei_jax.types import Batch, Items, Label, Outputs, RankingTargets, TokenSequence

NUM_RECORDS, EMOTIONS, INTENTS, ITEMS, EMBEDDING = 37, 5, 3, 40, 4
CONFIG = {
    "emotion_label": "emotion",
    "emotion_class_weights": (),
    "focal_gamma": 0.0,
    "logit_adjustment": 0.0,
    "intent": "softmax",
    "ranking": "in_batch_softmax",
    "recognition_weight": 1.0,
    "ranking_weight": 0.5,
    "task_weighting": "fixed",
    "temperature": 0.5,
    "logq_correction": True,
    "remove_accidental_hits": True,
}
KINDS = ("softmax", "sigmoid", "regression")
CLASSIFICATION = (
    "accuracy",
    "macro_precision",
    "macro_recall",
    "f1_of_macro",
    "macro_f1",
    "weighted_f1",
    "cross_entropy",
)


def make_config(kind="softmax", **changes):
    return LossConfig(**(CONFIG | {"emotion": kind} | changes))


@functools.cache
def make_records(kind):
    """Outputs and targets of the whole split, as NumPy: some labels, relevant items and modalities are missing."""
    random = np.random.default_rng(7)

    def normal(*shape):
        return random.normal(size=shape).astype(np.float32)

    def miss(share):
        return random.random(NUM_RECORDS) >= share

    if kind == "softmax":
        emotion = random.integers(0, EMOTIONS, NUM_RECORDS).astype(np.int32)
    elif kind == "sigmoid":
        emotion = random.integers(0, 2, (NUM_RECORDS, EMOTIONS)).astype(np.float32)
    else:
        emotion = (random.integers(-9, 10, NUM_RECORDS) / 3).astype(np.float32)
    logits = normal(NUM_RECORDS) * 2 if kind == "regression" else normal(NUM_RECORDS, EMOTIONS)
    if kind == "sigmoid":
        logits += 3 * emotion - 1.5  # now and then every class is right
    relevant = np.where(random.random((NUM_RECORDS, 3)) < 0.5, random.integers(0, ITEMS // 3, (NUM_RECORDS, 3)), -1)
    relevant = np.where(relevant >= 0, 3 * relevant + np.arange(3)[None, :], -1).astype(np.int32)
    has_audio = miss(0.3)
    alpha = random.dirichlet(np.ones(3), NUM_RECORDS).astype(np.float32)
    alpha[:, 1] *= has_audio
    outputs = Outputs(
        emotion=logits,
        intent=normal(NUM_RECORDS, INTENTS),
        modality_weights=alpha,
        modality_vectors=normal(NUM_RECORDS, 3, 2),
        fused=normal(NUM_RECORDS, 2),
        emotion_state=None,
        intent_state=None,
        user_embedding=normal(NUM_RECORDS, EMBEDDING),
        positive_embedding=None,
        slate_embedding=None,
        task_log_variances=None,
    )
    batch = Batch(
        vision=None,
        audio=TokenSequence(
            features=normal(NUM_RECORDS, 2, 3),
            segment_ids=np.stack([has_audio, 0 * has_audio], axis=1).astype(np.int32),
        ),
        text=TokenSequence(features=normal(NUM_RECORDS, 2, 3), segment_ids=np.ones((NUM_RECORDS, 2), np.int32)),
        is_record=np.ones(NUM_RECORDS, bool),
        record_index=np.arange(NUM_RECORDS, dtype=np.int32),
        emotion=Label(value=emotion, is_labelled=miss(0.2)),
        intent=Label(value=random.integers(0, INTENTS, NUM_RECORDS).astype(np.int32), is_labelled=miss(0.2)),
        ranking=RankingTargets(
            positive=Items(features=normal(NUM_RECORDS, 2), kind=np.zeros(NUM_RECORDS, np.int32)),
            positive_index=np.zeros(NUM_RECORDS, np.int32),
            has_positive=np.ones(NUM_RECORDS, bool),
            log_sampling_probability=np.zeros(NUM_RECORDS, np.float32),
            relevant_index=relevant,
        ),
    )
    return outputs, batch


CATALOGUE = jnp.asarray(np.random.default_rng(3).normal(size=(ITEMS, EMBEDDING)), jnp.float32)


def take(tree, start, size):
    """Records from ``start``, completed to ``size`` by filler: copies of a real record, whose masks alone are off."""
    rows = np.arange(start, start + size)
    is_filler = rows >= NUM_RECORDS
    return jax.tree.map(
        lambda leaf: np.where(is_filler.reshape(-1, *[1] * (leaf.ndim - 1)), leaf[0], leaf[rows % NUM_RECORDS]), tree
    ), is_filler


def spoil_filler(outputs, batch, is_filler, fill):
    """Filler as the input pipeline makes it, with outputs that would poison every figure if they were counted."""

    def mask(label):
        return label.replace(is_labelled=label.is_labelled & ~is_filler)

    outputs = jax.tree.map(
        lambda leaf: np.where(is_filler.reshape(-1, *[1] * (leaf.ndim - 1)), np.asarray(fill, leaf.dtype), leaf),
        outputs,
    )
    # Relevant items stay: is_record alone must keep filler out of the ranking.
    return outputs, batch.replace(
        is_record=batch.is_record & ~is_filler, emotion=mask(batch.emotion), intent=mask(batch.intent)
    )


measure = jax.jit(batch_metrics, static_argnames="config")


def evaluate(kind, sizes, fill=np.nan, **changes):
    config = make_config(kind, **changes)
    outputs, batch = make_records(kind)
    parts, start = [], 0
    for size in sizes:
        (some_outputs, some_batch), is_filler = take((outputs, batch), start, size)
        inputs = spoil_filler(some_outputs, some_batch, is_filler, fill)
        inputs = jax.tree.map(jnp.asarray, inputs)
        parts.append(jax.device_get(measure(*inputs, config=config, catalogue_embedding=CATALOGUE)))
        start += size
    assert start >= NUM_RECORDS
    return merge_all(parts)


COUNTED = ("accuracy", "precision", "recall", "f1", "exact", "acc2", "acc5", "acc7")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("sizes", "fill"), [([16] * 3, np.nan), ([8] * 5, np.inf), ([8] * 6, 1e6)])
def test_any_split_into_batches_with_filler_gives_the_figures_of_one_batch(kind, sizes, fill):
    whole = compute_all(evaluate(kind, [NUM_RECORDS]))

    split = compute_all(evaluate(kind, sizes, fill))

    assert list(split) == list(whole)
    assert np.isfinite(list(whole.values())).all()
    for name, value in whole.items():
        is_ratio_of_counts = not name.startswith("ranking/") and any(word in name for word in COUNTED)
        if is_ratio_of_counts:
            assert split[name] == value, name
        else:
            assert split[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name


def test_merging_is_associative():
    outputs, batch = jax.tree.map(jnp.asarray, make_records("regression"))
    parts = []
    for start in (0, 9, 18, 27):
        rows = slice(start, start + 9)
        some_outputs, some_batch = jax.tree.map(lambda leaf, rows=rows: leaf[rows], (outputs, batch))
        config = make_config("regression")
        parts.append(jax.device_get(measure(some_outputs, some_batch, config=config, catalogue_embedding=CATALOGUE)))

    left = compute_all(merge_all(parts))
    paired = compute_all(merge_all([merge_all(parts[:2]), merge_all(parts[2:])]))

    assert paired == pytest.approx(left, rel=1e-12)


def test_figures_of_one_class_tasks_equal_scikit_learn():
    outputs, batch = make_records("softmax")

    figures = compute_all(evaluate("softmax", [16] * 3))

    both = batch.emotion.is_labelled & batch.intent.is_labelled
    probabilities = {
        "emotion": np.asarray(jax.nn.softmax(outputs.emotion)),
        "intent": np.asarray(jax.nn.softmax(outputs.intent)),
    }
    pairs = probabilities["emotion"][:, :, None] * probabilities["intent"][:, None, :]
    cases = {
        "emotion": (probabilities["emotion"], batch.emotion.value, batch.emotion.is_labelled),
        "intent": (probabilities["intent"], batch.intent.value, batch.intent.is_labelled),
        "joint": (pairs.reshape(NUM_RECORDS, -1), batch.emotion.value * INTENTS + batch.intent.value, both),
    }
    for task, (probability, label, mask) in cases.items():
        label, prediction = label[mask], probability[mask].argmax(axis=1)
        peer = functools.partial(sklearn.metrics.precision_recall_fscore_support, label, prediction, zero_division=0)
        precision, recall, macro_f1, _ = peer(average="macro")
        expected = (
            sklearn.metrics.accuracy_score(label, prediction),
            precision,
            recall,
            2 * precision * recall / (precision + recall),
            macro_f1,
            peer(average="weighted")[2],
            sklearn.metrics.log_loss(label, probability[mask], labels=np.arange(probability.shape[1])),
        )
        for name, value in zip(CLASSIFICATION, expected, strict=True):
            assert figures[f"{task}/{name}"] == pytest.approx(value, rel=1e-6), f"{task}/{name}"
    assert figures["mean_accuracy"] == (figures["emotion/accuracy"] + figures["intent/accuracy"]) / 2


def test_joint_is_right_only_where_both_are():
    outputs, batch = make_records("softmax")
    both = batch.emotion.is_labelled & batch.intent.is_labelled
    is_right = (outputs.emotion.argmax(axis=1) == batch.emotion.value) & (
        outputs.intent.argmax(axis=1) == batch.intent.value
    )

    assert compute_all(evaluate("softmax", [16] * 3))["joint/accuracy"] == is_right[both].mean()


def test_cross_entropy_of_several_emotions_equals_scikit_learn():
    outputs, batch = make_records("sigmoid")
    keep = batch.emotion.is_labelled
    probability = np.asarray(jax.nn.sigmoid(outputs.emotion))[keep]

    figures = compute_all(evaluate("sigmoid", [16] * 3))

    expected = [sklearn.metrics.log_loss(batch.emotion.value[keep, i], probability[:, i]) for i in range(EMOTIONS)]
    assert figures["emotion/cross_entropy"] == pytest.approx(np.mean(expected), rel=1e-6)
    assert "emotion/weighted_accuracy/4" in figures


def test_alpha_is_averaged_over_the_records_that_have_the_modality():
    outputs, batch = make_records("softmax")
    has_audio = batch.audio.segment_ids.any(axis=1)

    figures = compute_all(evaluate("softmax", [16] * 3))

    assert 0 < has_audio.sum() < NUM_RECORDS
    assert figures["alpha/audio"] == pytest.approx(outputs.modality_weights[has_audio, 1].mean(), rel=1e-6)
    assert figures["alpha/text"] == pytest.approx(outputs.modality_weights[:, 2].mean(), rel=1e-6)
    assert "alpha/vision" not in figures


def test_alpha_finds_the_records_of_packed_rows():
    # Two rows of three records each; record 2 of row 0 and record 0 of row 1 lack text.
    outputs, batch = jax.tree.map(lambda leaf: jnp.asarray(leaf[:6]), make_records("softmax"))
    segment_ids = jnp.array([[1, 1, 2, 0, 0], [2, 2, 2, 3, 0]], jnp.int32)
    text = TokenSequence(features=jnp.zeros((2, 5, 3)), segment_ids=segment_ids)

    figures = compute_all(batch_metrics(outputs, batch.replace(audio=None, text=text), make_config()))

    expected = outputs.modality_weights[jnp.array([0, 1, 4, 5]), 2].mean()
    assert figures["alpha/text"] == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize(
    ("kind", "changes", "tasks"),
    [
        ("softmax", {}, {"alpha", "emotion", "intent", "joint", "ranking", "mean_accuracy"}),
        ("softmax", {"intent": "none"}, {"alpha", "emotion", "ranking", "mean_accuracy"}),
        ("softmax", {"ranking": "none"}, {"alpha", "emotion", "intent", "joint", "mean_accuracy"}),
        ("sigmoid", {}, {"alpha", "emotion", "intent", "ranking", "mean_accuracy"}),
        ("regression", {}, {"alpha", "emotion", "intent", "ranking"}),
    ],
)
def test_only_tasks_that_are_on_are_measured(kind, changes, tasks):
    figures = compute_all(evaluate(kind, [16] * 3, **changes))

    assert {name.partition("/")[0] for name in figures} == tasks


def test_without_intent_mean_accuracy_is_that_of_emotion():
    figures = compute_all(evaluate("softmax", [16] * 3, intent="none"))

    assert figures["mean_accuracy"] == figures["emotion/accuracy"]


def test_targets_without_labels_are_not_measured():
    outputs, batch = jax.tree.map(jnp.asarray, make_records("softmax"))
    batch = batch.replace(emotion=None, intent=None, ranking=None)

    figures = compute_all(batch_metrics(outputs, batch, make_config(), catalogue_embedding=CATALOGUE))

    assert set(figures) == {"alpha/audio", "alpha/text"}


def test_logits_that_are_not_finite_show_in_the_figures():
    outputs, batch = jax.tree.map(jnp.asarray, make_records("softmax"))
    row = int(np.flatnonzero(batch.emotion.is_labelled)[0])

    figures = compute_all(
        batch_metrics(outputs.replace(emotion=outputs.emotion.at[row].set(jnp.nan)), batch, make_config())
    )

    assert np.isnan(figures["emotion/cross_entropy"])
    assert np.isfinite(figures["intent/cross_entropy"])


def test_every_metric_is_a_clu_metric():
    assert all(isinstance(metric, clu.metrics.Metric) for metric in evaluate("regression", [16] * 3).values())


def test_metrics_of_different_tasks_do_not_merge():
    one = Means.from_model_output({"loss": jnp.ones(1)}, jnp.ones(1, bool))

    with pytest.raises(ValueError, match=r"\['a/x'\] with \['a/x', 'b/x'\]"):
        merge_all([{"a/x": one}, {"a/x": one, "b/x": one}])


def test_an_evaluation_without_batches_is_refused():
    with pytest.raises(ValueError, match="no batch"):
        merge_all([])
