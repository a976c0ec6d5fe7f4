"""Whether two sides make the same updates: losses, gradients and moments of a few updates on one batch.

Losses alone tell little of a backward pass: on batches that differ they fall whatever the update does, and AdamW takes
the same steps whatever factor the gradients have. So one batch is repeated, at a rate at which its loss falls with each
update, and the gradients' norms are compared before clipping, and by group of parameters afterwards.
"""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax

from benchmarks import rounds

NUM_UPDATES = 5
# What differs from the configuration that is measured.
CHANGES = {
    "model__dropout_rate": 0.0,
    "model__modality_dropout_rate": 0.0,
    "optimizer__schedule": "constant",
    "optimizer__learning_rate": 1e-4,
}
# Gradients carry more rounding than losses: their norms may differ by this times the losses' tolerance, but by no more
# than the second number.
GRADIENT_FACTOR, LARGEST_GRADIENT_TOLERANCE = 50.0, 0.05


@dataclass(frozen=True)
class Evidence:
    """What a side's updates of one batch gave, from weights that all sides share.

    Attributes:
        losses: ``[updates]`` before each update.
        gradient_norms: ``[updates]`` global norms before clipping.
        moments: norm of AdamW's first moment after the last update, by group of parameters: what was clipped,
            averaged over the updates.
    """

    losses: np.ndarray
    gradient_norms: np.ndarray
    moments: dict[str, float]


def differ(ours: Evidence, theirs: Evidence, *, tolerance: float) -> str:
    """Says in one line how they differ, "" where they agree.

    Args:
        ours: of our side.
        theirs: of a peer.
        tolerance: largest relative difference of the losses; :data:`GRADIENT_FACTOR` tells that of gradients.
    """
    found = rounds.differ_by(ours.losses, theirs.losses, relative=tolerance)
    if found:
        return f"losses of {NUM_UPDATES} updates on one batch: {found}"
    if ours.moments.keys() != theirs.moments.keys():
        return f"groups of parameters {sorted(theirs.moments)} against {sorted(ours.moments)}"
    allowed = min(GRADIENT_FACTOR * tolerance, LARGEST_GRADIENT_TOLERANCE)
    norms = {"norms of the gradients": (ours.gradient_norms, theirs.gradient_norms)}
    norms |= {f"first moment of {name}": (ours.moments[name], theirs.moments[name]) for name in ours.moments}
    for title, pair in norms.items():
        found = rounds.differ_by(*pair, relative=allowed)
        if found:
            return f"{title}: {found}"
    return ""


def our_moments(optimizer_state: Any) -> dict[str, float]:
    """Norms of AdamW's first moment by the first part of a parameter's name."""
    moments = optax.tree.get(optimizer_state, "mu")
    return {name: float(optax.tree.norm(jax.device_get(group))) for name, group in moments.items()}
