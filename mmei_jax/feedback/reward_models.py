"""Reward models for off-policy estimates: what an item is worth to a user in a state, learned from a log.

The model is a ridge regression, and may be wrong: doubly robust estimates correct it with the log. It must not have
seen the decision that it is asked about, or its error would look smaller than it is: predictions are cross-fitted,
each from the units of the other folds.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from mmei_jax.types import InputError


@dataclass(frozen=True)
class RewardModel:
    """Reward of item j at position p for a user whose score for it is s: ``factor_p * (level + slope * s + effect_j)``.

    Attributes:
        level: of all items.
        slope: on the score.
        item_effect: ``[items]``, shrunk towards 0 the less an item was shown.
        position_factor: ``[positions]``, 1 at the first.
    """

    level: float
    slope: float
    item_effect: Float[np.ndarray, "items"]
    position_factor: Float[np.ndarray, "positions"]

    def predict(self, scores: Float[np.ndarray, "slates items"]) -> Float[np.ndarray, "slates items"]:
        """The reward of every item at the first position; float32."""
        return (self.level + self.slope * scores + self.item_effect).astype(np.float32)


def fit_reward_model(
    scores: Float[np.ndarray, "slates items"],
    items: Int[np.ndarray, "slates positions"],
    rewards: Float[np.ndarray, "slates positions"],
    *,
    penalty: float = 20.0,
) -> RewardModel:
    """Fits the model to a log.

    Args:
        scores: ``[slates, items]`` of each user for the whole catalogue.
        items: ``[slates, positions]`` shown.
        rewards: ``[slates, positions]``.
        penalty: of squared item effects, in decisions.

    Raises:
        InputError: there are no slates.
    """
    if not len(items):
        raise InputError("reward model of 0 slates: expected at least one")
    by_position = rewards.mean(axis=0)
    # A position without any reward tells nothing: its factor is 0.
    factors = by_position / by_position[0] if by_position[0] > 0.0 else np.ones(len(by_position))
    shown = np.take_along_axis(scores, items, axis=1)
    owner = items.reshape(-1)
    weight = np.broadcast_to(factors, items.shape).reshape(-1)
    # Weighted least squares of rewards on factor * (1, score, one-hot item); item columns by elimination (Schur).
    features = np.stack([weight, weight * shown.reshape(-1)], axis=1)
    target = rewards.reshape(-1).astype(np.float64)
    num_items = scores.shape[1]
    diagonal = np.bincount(owner, weight**2, num_items) + penalty
    cross = np.stack([np.bincount(owner, column * weight, num_items) for column in features.T], axis=1)
    right = np.bincount(owner, target * weight, num_items)
    gram = features.T @ features - cross.T @ (cross / diagonal[:, None])
    moments = features.T @ target - cross.T @ (right / diagonal)
    # A score that is the same everywhere has no slope of its own.
    level, slope = np.linalg.lstsq(gram, moments, rcond=1e-9)[0]
    effect = (right - cross @ [level, slope]) / diagonal
    return RewardModel(float(level), float(slope), effect, factors)


@dataclass(frozen=True)
class CrossFitted:
    """Predictions of models that had not seen the slate.

    Attributes:
        predicted: ``[slates, items]`` float32, the reward of every item at the first position.
        position_factor: ``[slates, positions]`` float32, by which it is multiplied at each position.
    """

    predicted: Float[np.ndarray, "slates items"]
    position_factor: Float[np.ndarray, "slates positions"]


def cross_fit(
    scores: Float[np.ndarray, "slates items"],
    items: Int[np.ndarray, "slates positions"],
    rewards: Float[np.ndarray, "slates positions"],
    units: Int[np.ndarray, "slates"],
    *,
    num_folds: int = 5,
    penalty: float = 20.0,
    seed: int = 0,
) -> CrossFitted:
    """Fits a model to all folds but one, and asks it about that one.

    Args:
        scores: as :func:`fit_reward_model` takes them.
        items: likewise.
        rewards: likewise.
        units: ``[slates]``, such as users: slates of one unit are in one fold.
        num_folds: at least 2.
        penalty: of item effects.
        seed: of the folds.

    Raises:
        InputError: there are fewer units than folds.
    """
    names, place = np.unique(units, return_inverse=True)
    if num_folds < 2 or len(names) < num_folds:
        raise InputError(
            f"cross-fitting of {len(names)} units in {num_folds} folds: expected at least 2, a unit in each"
        )
    fold = (np.random.default_rng(seed).permutation(len(names)) % num_folds)[place]
    predicted = np.empty(scores.shape, np.float32)
    factors = np.empty(items.shape, np.float32)
    for number in range(num_folds):
        own = fold == number
        model = fit_reward_model(scores[~own], items[~own], rewards[~own], penalty=penalty)
        predicted[own] = model.predict(scores[own])
        factors[own] = model.position_factor
    return CrossFitted(predicted, factors)
