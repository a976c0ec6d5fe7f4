"""Which record goes into which split, by groups that are never divided; and labels permuted within groups."""

import itertools

import numpy as np
from jaxtyping import Int64, Shaped

from mmei_jax.types import InputError


def split_by_fractions(
    groups: Shaped[np.ndarray, "records"], fractions: dict[str, float], seed: int
) -> Shaped[np.ndarray, "records"]:
    """Deals whole groups to splits, so that each comes close to its fraction of the records.

    Groups are dealt from the largest to the smallest (equal ones in an order drawn from ``seed``), each to the split
    that lacks most records.

    Args:
        groups: ``[records]`` strings.
        fractions: positive, adding up to 1, by split.
        seed: of the order.

    Returns:
        ``[records]`` split names.

    Raises:
        InputError: the fractions are not positive or do not add up to 1, or a split would be empty.
    """
    if any(fraction <= 0 for fraction in fractions.values()) or abs(sum(fractions.values()) - 1) > 1e-6:
        raise InputError(f"splits {fractions}: expected positive fractions that add up to 1")
    wanted = np.array([fraction * len(groups) for fraction in fractions.values()])
    return _deal(groups, list(fractions), wanted, seed)


def split_into_folds(groups: Shaped[np.ndarray, "records"], num_folds: int, seed: int) -> Shaped[np.ndarray, "records"]:
    """Deals whole groups to ``fold0`` ... ``fold<num_folds - 1>`` of about equal size, as :func:`split_by_fractions`.

    Raises:
        InputError: fewer than 2 folds, or fewer groups than folds.
    """
    if num_folds < 2:
        raise InputError(f"num_folds = {num_folds}: expected at least 2")
    names = [f"fold{fold}" for fold in range(num_folds)]
    return _deal(groups, names, np.full(num_folds, len(groups) / num_folds), seed)


def split_like(
    groups: Shaped[np.ndarray, "records"], splits: Shaped[np.ndarray, "records"], seed: int
) -> Shaped[np.ndarray, "records"]:
    """Deals whole groups to the splits that the records have now, so that each comes close to its present size.

    For an episode-disjoint or speaker-disjoint split beside an official one that divides episodes or speakers.

    Args:
        groups: ``[records]`` strings.
        splits: ``[records]`` present split names.
        seed: of the order in which groups of equal size are dealt.

    Returns:
        ``[records]`` split names; records of one group have the same.

    Raises:
        InputError: there are fewer groups than splits, or a split would be empty.
    """
    names, counts = np.unique(splits, return_counts=True)
    shares = {str(name): int(count) / len(splits) for name, count in zip(names, counts, strict=True)}
    return split_by_fractions(groups, shares, seed)


def check_groups_undivided(groups: Shaped[np.ndarray, "records"], splits: Shaped[np.ndarray, "records"]) -> None:
    """Raises InputError if records of one group are in two splits."""
    pairs = sorted(set(zip(groups.tolist(), splits.tolist(), strict=True)))
    for (group, split), (next_group, next_split) in itertools.pairwise(pairs):
        if group == next_group:
            raise InputError(
                f"group {group!r} is in the splits {split!r} and {next_split!r}: expected one split per group"
            )


def shuffle_within_groups(groups: Shaped[np.ndarray, "records"], seed: int) -> Int64[np.ndarray, "records"]:
    """A permutation of the records that moves each only within its group: a control whose labels carry no information.

    Returns:
        ``[records]``: from which record each takes its labels.
    """
    generator = np.random.default_rng(seed)
    source = np.arange(len(groups), dtype=np.int64)
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        source[members] = generator.permutation(members)
    return source


def _deal(groups: np.ndarray, names: list[str], wanted: np.ndarray, seed: int) -> np.ndarray:
    unique, members, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    if len(unique) < len(names):
        raise InputError(f"{len(unique)} groups for {len(names)} splits: expected at least one group for each split")
    order = np.random.default_rng(seed).permutation(len(unique))
    order = order[np.argsort(-sizes[order], kind="stable")]
    given = np.zeros(len(names))
    choice = np.zeros(len(unique), np.int64)
    for group in order:
        choice[group] = np.argmax(wanted - given)
        given[choice[group]] += sizes[group]
    if (given == 0).any():
        raise InputError(f"split {names[int(np.argmin(given))]!r} would be empty: its fraction is smaller than a group")
    return np.array(names)[choice[members]]
