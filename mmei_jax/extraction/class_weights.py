"""Class weights and counts, from the data and in the order of the label ids."""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Float64, Int64, Integer

from mmei_jax.extraction.clips import Clip
from mmei_jax.records import LabelSpec
from mmei_jax.types import InputError


def count_classes(clips: Iterable[Clip], label: str, spec: LabelSpec) -> Int64[np.ndarray, "classes"]:
    """Clips of each class; of several classes for a multi-label one.

    Args:
        clips: those of one split, normally.
        label: its name; a clip without it is counted nowhere.
        spec: categorical or multi_label.

    Returns:
        ``[classes]`` int64, in the order of the label ids.

    Raises:
        InputError: the label is a number, or a clip has a class id that it does not have.

    Example:
        >>> clips = [Clip("a", "train", labels={"mood": 2}), Clip("b", "train", labels={"mood": 0}), Clip("c", "train")]
        >>> count_classes(clips, "mood", LabelSpec("categorical", ("calm", "glad", "sad")))
        array([1, 0, 1])
    """
    if spec.kind == "real":
        raise InputError(f"label {label!r} is a number: expected a categorical or multi_label one to count classes of")
    counts = np.zeros(len(spec.class_names), np.int64)
    for clip in clips:
        value = clip.labels.get(label)
        if value is None:
            continue
        if spec.kind == "multi_label":
            counts += np.asarray(value) > 0
        elif 0 <= int(value) < len(counts):
            counts[int(value)] += 1
        else:
            raise InputError(f"clip {clip.id!r}: {label} = {value}: expected a class id below {len(counts)}")
    return counts


def balanced_weights(counts: Integer[np.ndarray, "classes"]) -> Float64[np.ndarray, "classes"]:
    """Weights with which every class counts the same: ``total / (classes * count)``.

    Args:
        counts: ``[classes]`` records of each class, as :func:`count_classes` gives them for the *training* split.

    Returns:
        ``[classes]`` float64 in the same order; their mean over the records is 1.

    Raises:
        InputError: a class has no record, so that no weight could make it count.

    Example:
        >>> balanced_weights(np.array([6, 2, 1]))
        array([0.5, 1.5, 3. ])
    """
    if counts.size == 0 or (counts <= 0).any():
        missing = int(np.argmin(counts)) if counts.size else 0
        raise InputError(f"class counts {counts.tolist()}: class {missing} has no record: it cannot be weighted")
    return np.asarray(counts.sum() / (counts.size * counts), np.float64)
