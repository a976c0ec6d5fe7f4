"""Bootstrap intervals: weighted metrics are those of repeated records, percentiles those of plain resampling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from mmei_jax.metrics import (
    Means,
    classification_metrics,
    compute_all,
    joint_metrics,
    multi_label_metrics,
)
from mmei_jax.recognition_metrics import Sentiment
from mmei_jax.reports import resampling
from mmei_jax.reports.record_table import RecordTable, TaskRecords
from mmei_jax.reports.resampling import WeightedMetrics, bootstrap_intervals, resampling_units
from mmei_jax.types import MODALITIES, Label

NUM_RECORDS = 41
EMOTIONS, INTENTS = ("neutral", "joy", "anger"), ("relax", "learn")


def softmax_task(generator, names):
    logits = generator.normal(size=(NUM_RECORDS, len(names))).astype(np.float32)
    label, is_labelled = (
        generator.integers(0, len(names), NUM_RECORDS).astype(np.int32),
        generator.random(NUM_RECORDS) > 0.2,
    )
    logits[np.arange(NUM_RECORDS), label] += 1.0
    log_probabilities = np.asarray(jax.nn.log_softmax(logits))
    cross_entropy = np.where(is_labelled, -log_probabilities[np.arange(NUM_RECORDS), label], 0.0).astype(np.float32)
    choice = logits.argmax(axis=1).astype(np.int32)
    return logits, TaskRecords("softmax", names, label, is_labelled, np.exp(log_probabilities), choice, cross_entropy)


def make_records(kind="softmax", *, user_ids=None, seed=0):
    """A table of records, and the logits or values behind its emotion and intent."""
    generator = np.random.default_rng(seed)
    intent_logits = intent = None
    if kind == "softmax":
        logits, emotion = softmax_task(generator, EMOTIONS)
        intent_logits, intent = softmax_task(generator, INTENTS)
    elif kind == "sigmoid":
        logits = generator.normal(size=(NUM_RECORDS, 3)).astype(np.float32)
        label = (generator.random((NUM_RECORDS, 3)) < 0.4).astype(np.float32)
        binary = np.mean(label * np.logaddexp(0, -logits) + (1 - label) * np.logaddexp(0, logits), axis=1)
        is_labelled = generator.random(NUM_RECORDS) > 0.2
        probabilities = 1 / (1 + np.exp(-logits))
        emotion = TaskRecords(
            "sigmoid", EMOTIONS, label, is_labelled, probabilities, logits > 0, binary.astype(np.float32)
        )
    else:
        label = np.round(generator.uniform(-9, 9, NUM_RECORDS)).astype(np.float32) / 3
        logits = (label + generator.normal(size=NUM_RECORDS)).astype(np.float32)
        emotion = TaskRecords("regression", (), label, generator.random(NUM_RECORDS) > 0.2, logits, None, None)
    has_modality = generator.random((NUM_RECORDS, 3)) > 0.3
    alpha = np.where(has_modality, generator.random((NUM_RECORDS, 3)), 0.0).astype(np.float32)
    records = RecordTable(
        ids=[str(number) for number in range(NUM_RECORDS)],
        user_ids=user_ids or [None] * NUM_RECORDS,
        has_modality=has_modality,
        alpha=alpha,
        emotion=emotion,
        intent=intent,
        ranking={"map": generator.random(NUM_RECORDS).astype(np.float32)},
        is_judged=generator.random(NUM_RECORDS) > 0.1,
    )
    return records, logits, intent_logits


def repeated_metrics(records, logits, intent_logits, times):
    """The evaluation's own metrics of a split in which records occur several times."""
    rows = np.repeat(np.arange(NUM_RECORDS), times)
    label = Label(
        value=jnp.asarray(records.emotion.label[rows]), is_labelled=jnp.asarray(records.emotion.is_labelled[rows])
    )
    emotion = jnp.asarray(logits[rows])
    found = {}
    for place, name in enumerate(MODALITIES):
        counted = jnp.asarray(records.has_modality[rows, place])
        found[f"alpha/{name}"] = Means.from_model_output({name: jnp.asarray(records.alpha[rows, place])}, counted)
    if records.emotion.kind == "softmax":
        intent = Label(
            value=jnp.asarray(records.intent.label[rows]), is_labelled=jnp.asarray(records.intent.is_labelled[rows])
        )
        found |= classification_metrics("emotion", emotion, label)
        found |= classification_metrics("intent", jnp.asarray(intent_logits[rows]), intent)
        found |= joint_metrics(emotion, label, jnp.asarray(intent_logits[rows]), intent)
    elif records.emotion.kind == "sigmoid":
        found |= multi_label_metrics("emotion", emotion, label, class_names=EMOTIONS)
    else:
        found["emotion/sentiment"] = Sentiment.from_model_output(emotion, label.value, label.is_labelled)
    ranking = {name: jnp.asarray(values[rows]) for name, values in records.ranking.items()}
    found["ranking/catalogue"] = Means.from_model_output(ranking, jnp.asarray(records.is_judged[rows]))
    return compute_all(jax.device_get(found))


@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "regression"])
@pytest.mark.parametrize("draws", ["each record once", "some records several times, others never"])
def test_weighted_metrics_are_the_evaluations_metrics_of_repeated_records(kind, draws):
    records, logits, intent_logits = make_records(kind)
    times = np.ones(NUM_RECORDS, np.int64)
    if draws != "each record once":
        times = np.random.default_rng(3).integers(0, 4, NUM_RECORDS)
    expected = repeated_metrics(records, logits, intent_logits, times)
    found = WeightedMetrics(records)(times.astype(np.float64))
    assert set(found) - set(expected) == {name for name in found if "/ece" in name}
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=2e-6, abs=1e-6, nan_ok=True)


def test_intervals_are_percentiles_of_plainly_resampled_records():
    records, _, _ = make_records()
    emotion = records.emotion
    generator, accuracies, f1 = np.random.default_rng(5), [], []
    for _ in range(200):
        rows = generator.integers(0, NUM_RECORDS, NUM_RECORDS)
        rows = rows[emotion.is_labelled[rows]]
        accuracies.append(sklearn_metrics.accuracy_score(emotion.label[rows], emotion.choice[rows]))
        f1.append(sklearn_metrics.f1_score(emotion.label[rows], emotion.choice[rows], average="macro", zero_division=0))
    found = bootstrap_intervals(records, num_resamples=200, seed=5)
    assert (found.unit, found.num_units, found.num_undefined) == ("record", NUM_RECORDS, {})
    for name, values in {"emotion/accuracy": accuracies, "emotion/macro_f1": f1}.items():
        assert found.bounds[name] == pytest.approx(tuple(np.percentile(values, [2.5, 97.5])), abs=1e-12)


def test_users_are_drawn_with_all_their_records():
    owner = np.random.default_rng(1).permutation(np.arange(NUM_RECORDS) % 12)
    user_ids = [f"user{user:02d}" for user in owner]
    records, _, _ = make_records(user_ids=user_ids)
    generator, expected = np.random.default_rng(2), []
    members = [np.flatnonzero(owner == user) for user in range(12)]
    for _ in range(100):
        rows = np.concatenate([members[user] for user in generator.integers(0, 12, 12)])
        rows = rows[records.emotion.is_labelled[rows]]
        expected.append((records.emotion.label[rows] == records.emotion.choice[rows]).mean())
    found = bootstrap_intervals(records, num_resamples=100, seed=2)
    assert (found.unit, found.num_units) == ("user", 12)
    assert found.bounds["emotion/accuracy"] == pytest.approx(tuple(np.percentile(expected, [2.5, 97.5])), abs=1e-12)


def test_records_are_drawn_where_a_user_is_unknown_or_none_has_several():
    assert resampling_units(["a", None, "a"])[0] == "record"
    assert resampling_units(["a", "b", "c"])[0] == "record"
    assert resampling_units(["a"])[0] == "record"


def test_same_seed_same_intervals():
    records, _, _ = make_records()
    first, again, other = (bootstrap_intervals(records, num_resamples=50, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first.bounds != other.bounds


@pytest.mark.parametrize("num_users", [1, 2, resampling.MIN_UNITS - 1])
def test_few_units_have_no_interval(num_users):
    """Two users whose accuracies are both 0.5 once had the interval 0.5000 to 0.5000."""
    records, _, _ = make_records(user_ids=[f"user{place % num_users}" for place in range(NUM_RECORDS)])
    found = bootstrap_intervals(records)
    assert (found.unit, found.num_units, found.bounds) == ("user", num_users, {})
    assert found.missing("emotion/accuracy") == f"too few users ({num_users})"
    assert found.missing("loss") == ""


def test_metric_for_which_few_units_count_has_no_interval():
    records, _, _ = make_records()
    records.is_judged[:] = np.arange(NUM_RECORDS) < resampling.MIN_UNITS - 1
    records.has_modality[:, 1] = np.arange(NUM_RECORDS) < resampling.MIN_UNITS
    found = bootstrap_intervals(records, num_resamples=50)
    assert found.too_few_units == {"ranking/map": resampling.MIN_UNITS - 1}
    assert "ranking/map" not in found.bounds
    assert {"alpha/audio", "emotion/accuracy", "intent/accuracy", "joint/accuracy", "emotion/ece"} <= set(found.bounds)


def test_resamples_that_define_nothing_are_counted_and_left_out():
    records, _, _ = make_records("regression")
    # One label differs from the others: about 37 % of the resamples lack it, and have no correlation.
    records.emotion.is_labelled[:] = True
    records.emotion.label[:] = np.arange(NUM_RECORDS) == 7
    found = bootstrap_intervals(records, num_resamples=300)
    low, high = found.bounds["emotion/pearson"]
    assert low < high
    assert 80 < found.num_undefined["emotion/pearson"] < 140
