"""Class counts and weights: scikit-learn's, in the order of the label ids."""

import numpy as np
import pytest
from sklearn.utils.class_weight import compute_class_weight

from mmei_jax.extraction.class_weights import balanced_weights, count_classes
from mmei_jax.extraction.clips import Clip
from mmei_jax.records import LabelSpec
from mmei_jax.types import InputError

MOOD = LabelSpec("categorical", ("calm", "glad", "sad"))


def clips_of(label, values):
    return [
        Clip(str(index), "train", labels={} if value is None else {label: value}) for index, value in enumerate(values)
    ]


def test_counts_follow_label_ids_and_leave_out_what_is_not_labelled():
    clips = clips_of("mood", [2, 2, None, 0, 2, 1, 2])
    np.testing.assert_array_equal(count_classes(clips, "mood", MOOD), [1, 1, 4])


def test_multi_label_classes_are_counted_each():
    spec = LabelSpec("multi_label", ("a", "b", "c"))
    clips = clips_of("all", [np.array([1, 0, 1.0]), np.array([0, 0, 0.5]), None])
    np.testing.assert_array_equal(count_classes(clips, "all", spec), [1, 0, 2])


def test_weights_equal_those_of_scikit_learn_and_average_to_one():
    values = np.repeat([0, 1, 2], [50, 7, 3])
    counts = count_classes(clips_of("mood", values.tolist()), "mood", MOOD)
    weights = balanced_weights(counts)
    np.testing.assert_allclose(weights, compute_class_weight("balanced", classes=np.arange(3), y=values), rtol=1e-15)
    assert np.isclose(weights[values].mean(), 1)


def test_what_cannot_be_counted_or_weighted_is_refused():
    with pytest.raises(InputError, match="is a number"):
        count_classes([], "sentiment", LabelSpec("real"))
    with pytest.raises(InputError, match="clip '1': mood = 3"):
        count_classes(clips_of("mood", [0, 3]), "mood", MOOD)
    with pytest.raises(InputError, match="class 1 has no record"):
        balanced_weights(np.array([3, 0, 1]))
