import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from mmei_jax.mergeable import Means
from mmei_jax.recognition_metrics import ConfusionMatrix, MultiLabelConfusion, Sentiment

NUM_RECORDS, CLASSES = 60, 6

count_confusion = jax.jit(ConfusionMatrix.from_model_output, static_argnames="num_classes")
count_multi_label = jax.jit(MultiLabelConfusion.from_model_output, static_argnames="class_names")
sum_sentiment = jax.jit(Sentiment.from_model_output)


def pad(*arrays, fill, size=NUM_RECORDS + 4):
    """Appends records that are not counted and hold ``fill``."""
    padded = [np.concatenate([array, np.full((size - len(array), *array.shape[1:]), fill)]) for array in arrays]
    is_counted = jnp.arange(size) < len(arrays[0])
    return (*(jnp.asarray(new, old.dtype) for new, old in zip(padded, arrays, strict=True)), is_counted)


def averages(labels, predictions, **options):
    return {
        name: sklearn.metrics.precision_recall_fscore_support(
            labels, predictions, average=name, zero_division=0, **options
        )
        for name in ("macro", "weighted")
    }


@pytest.mark.parametrize(
    ("label_classes", "predicted_classes"),
    [
        (range(6), range(6)),
        ((0, 2, 5), (0, 2, 5)),  # classes 1, 3, 4 occur nowhere
        ((0, 1, 2), (2, 3)),  # 0 and 1 are never predicted, 3 is never true
        ((4,), (4,)),
        ((4,), (1,)),  # nothing is right
    ],
)
@pytest.mark.parametrize("seed", range(2))
def test_confusion_matrix_equals_scikit_learn(label_classes, predicted_classes, seed):
    random = np.random.default_rng(seed)
    labels = random.choice(label_classes, NUM_RECORDS).astype(np.int32)
    predictions = np.where(random.random(NUM_RECORDS) < 0.5, random.choice(predicted_classes, NUM_RECORDS), labels)
    predictions = np.where(np.isin(predictions, predicted_classes), predictions, predicted_classes[0]).astype(np.int32)
    padded_predictions, padded_labels, is_counted = pad(predictions, labels, fill=3)

    figures = count_confusion(padded_predictions, padded_labels, is_counted, num_classes=CLASSES).compute()

    peer = averages(labels, predictions)
    precision, recall = peer["macro"][:2]
    expected = {
        "accuracy": sklearn.metrics.accuracy_score(labels, predictions),
        "macro_precision": precision,
        "macro_recall": recall,
        "f1_of_macro": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
        "macro_f1": peer["macro"][2],
        "weighted_f1": peer["weighted"][2],
    }
    assert figures == pytest.approx(expected, rel=1e-12)


def test_confusion_matrix_has_labels_in_rows():
    matrix = ConfusionMatrix.from_model_output(jnp.array([2]), jnp.array([1]), jnp.array([True]), num_classes=3)

    assert matrix.counts.tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 0]]


def test_the_three_f1_differ_from_each_other():
    labels, predictions = np.array([0] * 8 + [1, 2]), np.array([0] * 5 + [1, 1, 2] + [1, 0])

    figures = ConfusionMatrix.from_model_output(
        jnp.asarray(predictions), jnp.asarray(labels), jnp.ones(10, bool), num_classes=3
    ).compute()

    values = [figures[name] for name in ("f1_of_macro", "macro_f1", "weighted_f1", "accuracy")]
    assert len({round(value, 3) for value in values}) == 4


@pytest.mark.parametrize("rate", [0.4, 0.05])
@pytest.mark.parametrize("seed", range(2))
def test_multi_label_figures_equal_scikit_learn(rate, seed):
    random = np.random.default_rng(seed)
    targets = (random.random((NUM_RECORDS, CLASSES)) < rate).astype(np.float32)
    targets[:, 4] = 0  # a class that nobody shows
    logits = (random.normal(size=targets.shape) + 2 * targets - 1).astype(np.float32)
    logits[:, 5] = -1  # a class that is never predicted
    padded_logits, padded_targets, is_counted = pad(logits, targets, fill=1)
    names = tuple("abcdef")

    figures = count_multi_label(padded_logits, padded_targets, is_counted, class_names=names).compute()

    present, predicted = targets > 0.5, logits > 0
    peer = averages(present, predicted)
    expected = {
        "accuracy": (present == predicted).mean(),
        "macro_f1": peer["macro"][2],
        "weighted_f1": peer["weighted"][2],
        "exact_match": sklearn.metrics.accuracy_score(present, predicted),
    }
    balanced = []
    for index, name in enumerate(names):
        label, prediction = present[:, index], predicted[:, index]
        rates = [(prediction[label == side] == side).mean() for side in (False, True) if (label == side).any()]
        balanced.append(np.mean(rates))
        expected[f"accuracy/{name}"] = sklearn.metrics.accuracy_score(label, prediction)
        expected[f"weighted_accuracy/{name}"] = balanced[-1]
        if label.any():
            np.testing.assert_allclose(balanced[-1], sklearn.metrics.balanced_accuracy_score(label, prediction))
        expected[f"weighted_f1/{name}"] = averages(label, prediction)["weighted"][2]
    expected["weighted_accuracy"] = np.mean(balanced)
    assert figures == pytest.approx(expected, rel=1e-12)


def make_sentiment(seed):
    random = np.random.default_rng(seed)
    # Thirds, as MOSEI's annotators give them; zeros, halves and values beyond the scale among them.
    labels = (random.integers(-9, 10, NUM_RECORDS) / 3).astype(np.float32)
    predictions = (labels + random.normal(0, 1.2, NUM_RECORDS)).astype(np.float32)
    predictions[:6] = [0.0, -0.0, 0.5, 1.5, -2.5, 4.2]
    labels[:8] = [0.0, 1.0, 0.0, 2.0, -2.0, 3.0, 0.0, 0.0]
    return predictions, labels


@pytest.mark.parametrize("seed", range(3))
def test_sentiment_figures_equal_scikit_learn_and_scipy_by_mosei_conventions(seed):
    predictions, labels = make_sentiment(seed)

    figures = sum_sentiment(*pad(predictions, labels, fill=2.0)).compute()

    # The published evaluation of MulT and MMSA, line by line.
    non_zeros = np.flatnonzero(labels != 0)
    has0, non0 = (labels >= 0, predictions >= 0), (labels[non_zeros] > 0, predictions[non_zeros] > 0)
    expected = {
        "acc2_has0": sklearn.metrics.accuracy_score(*has0),
        "f1_has0": sklearn.metrics.f1_score(*has0, average="weighted"),
        "acc2_non0": sklearn.metrics.accuracy_score(*non0),
        "f1_non0": sklearn.metrics.f1_score(*non0, average="weighted"),
        "acc7": np.mean(np.round(np.clip(predictions, -3, 3)) == np.round(np.clip(labels, -3, 3))),
        "acc5": np.mean(np.round(np.clip(predictions, -2, 2)) == np.round(np.clip(labels, -2, 2))),
        "mae": sklearn.metrics.mean_absolute_error(labels, predictions),
        "pearson": scipy.stats.pearsonr(labels, predictions)[0],
    }
    assert len(non_zeros) < NUM_RECORDS
    assert figures == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_pearson_merged_from_unequal_parts_equals_scipy_far_from_zero(offset):
    random = np.random.default_rng(0)
    labels = (offset + random.normal(size=300)).astype(np.float32)
    predictions = (offset + 0.3 * (labels - offset) + random.normal(size=300)).astype(np.float32)
    bounds = [0, 0, 1, 3, 60, 124, 124, 188, 250, 300]

    parts = [
        jax.device_get(sum_sentiment(*pad(predictions[start:stop], labels[start:stop], fill=9.0)))
        for start, stop in itertools.pairwise(bounds)
    ]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)

    figures = merged.compute()
    assert merged.count == 300
    assert figures["pearson"] == pytest.approx(scipy.stats.pearsonr(labels, predictions)[0], rel=1e-5)


def test_pearson_of_a_constant_is_undefined():
    figures = sum_sentiment(jnp.full(4, 0.5), jnp.arange(4.0), jnp.ones(4, bool)).compute()

    assert np.isnan(figures["pearson"])
    assert figures["mae"] == 1.25


def nothing(metric):
    no = jnp.zeros(3, bool)
    if metric is ConfusionMatrix:
        return ConfusionMatrix.from_model_output(jnp.zeros(3, int), jnp.zeros(3, int), no, num_classes=4)
    if metric is MultiLabelConfusion:
        return MultiLabelConfusion.from_model_output(jnp.ones((3, 2)), jnp.ones((3, 2)), no)
    if metric is Sentiment:
        return Sentiment.from_model_output(jnp.ones(3), jnp.ones(3), no)
    return Means.from_model_output({"loss": jnp.ones(3)}, no)


@pytest.mark.parametrize("metric", [ConfusionMatrix, MultiLabelConfusion, Sentiment, Means])
def test_figures_of_no_record_are_undefined_and_not_zero(metric):
    figures = nothing(metric).compute()

    assert figures
    assert all(np.isnan(value) for value in figures.values())
    merged = jax.device_get(nothing(metric)).merge(jax.device_get(nothing(metric)))
    assert all(np.isnan(value) for value in merged.compute().values())


def test_host_merging_keeps_what_float32_and_int32_would_lose():
    value = np.float32(0.1)
    part = Means(totals={"loss": np.asarray(value)}, count=np.asarray(2**30, np.int32))
    merged = Means(totals={"loss": np.asarray(np.float32(2.0**24))}, count=np.asarray(2**30, np.int32))
    for _ in range(1000):
        merged = merged.merge(part)

    assert merged.totals["loss"] == pytest.approx(2.0**24 + 1000 * float(value), rel=1e-14)
    assert merged.count == 1001 * 2**30


def test_device_merging_stays_on_the_device():
    part = ConfusionMatrix.from_model_output(jnp.array([1]), jnp.array([1]), jnp.array([True]), num_classes=2)

    merged = jax.jit(lambda left, right: left.merge(right))(part, part)

    assert isinstance(merged.counts, jax.Array)
    assert merged.counts.tolist() == [[0, 0], [0, 2]]
