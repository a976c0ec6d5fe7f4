"""Impressions of a log as arrays."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int


@dataclass(frozen=True)
class LoggedVisits:
    """Impressions of a log as arrays, in the order of their ids.

    Attributes:
        user: ``[visits]`` int64.
        record: ``[visits]`` int64, row of the pool that the user showed.
        kind: ``[visits]`` int64 of the content that was asked for.
        items: ``[visits, slate]`` int64 rows of the catalogue.
        propensities: ``[visits, slate]`` float64 of each item at its position, given the items before it.
        dwell_seconds, num_replays, is_liked: ``[visits, slate]``.
        rating: ``[visits]`` float64, NaN where none was given in time.
    """

    user: Int[np.ndarray, "visits"]
    record: Int[np.ndarray, "visits"]
    kind: Int[np.ndarray, "visits"]
    items: Int[np.ndarray, "visits slate"]
    propensities: Float[np.ndarray, "visits slate"]
    dwell_seconds: Float[np.ndarray, "visits slate"]
    num_replays: Int[np.ndarray, "visits slate"]
    is_liked: Bool[np.ndarray, "visits slate"]
    rating: Float[np.ndarray, "visits"]

    @property
    def is_click(self) -> Bool[np.ndarray, "visits slate"]:
        """Replayed or liked."""
        return (self.num_replays > 0) | self.is_liked

    def __len__(self) -> int:
        return len(self.user)

    def where(self, is_chosen: Bool[np.ndarray, "visits"]) -> "LoggedVisits":
        """Some of the visits."""
        return LoggedVisits(**{name: values[is_chosen] for name, values in vars(self).items()})


def join_visits(parts: Sequence[LoggedVisits]) -> LoggedVisits:
    """One after the other; all have slates of one size."""
    names = vars(parts[0])
    return LoggedVisits(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})
