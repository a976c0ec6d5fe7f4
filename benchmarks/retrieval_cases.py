"""What ``retrieval`` measures: its searches, its simulations, and when two answers are the same."""

from dataclasses import dataclass, replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from benchmarks import rounds
from mmei_jax.simulation.aigc_int_feedback import NUM_ITEMS, SLATE_SIZE

BANDIT, SLATES, FEW_ACTIONS = "obp, 1 place", "obp, slates of 8", "obp, 1 place, 10 items"
# Of scores, relative to the largest; of items whose scores lie closer, either may be the last answer.
TOLERANCE = 1e-5
_PIECE_ROWS = 65_536


@dataclass(frozen=True)
class SearchCase:
    """One search.

    Attributes:
        name: in the table.
        num_items: of the catalogue.
        dim: features of an item.
        num_queries: answered together.
        k: items answered.
        path: of the items, a ``.npy`` file.
        dtype: of the items where they are searched.
    """

    name: str
    num_items: int
    dim: int
    num_queries: int
    k: int
    path: str = ""
    dtype: str = "float32"

    @property
    def item_bytes(self) -> int:
        """Of all items where they are searched."""
        return jnp.dtype(self.dtype).itemsize * self.num_items * self.dim

    def queries(self) -> np.ndarray:
        """``[queries, dim]`` float32."""
        return np.random.default_rng(1).standard_normal((self.num_queries, self.dim), np.float32)

    def write_items(self, path: Path) -> "SearchCase":
        """The case with its items in a file, written piece by piece."""
        generator = np.random.default_rng(0)
        items = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(self.num_items, self.dim))
        for start in range(0, self.num_items, _PIECE_ROWS):
            piece = items[start : start + _PIECE_ROWS]
            piece[:] = generator.standard_normal(piece.shape, np.float32)
        items.flush()
        return replace(self, path=str(path))

    def items(self) -> np.ndarray:
        """``[items, dim]`` float32, mapped."""
        return np.load(self.path, mmap_mode="r")


@dataclass(frozen=True)
class SimulatorCase:
    """One simulation.

    Attributes:
        name: in the table.
        num_users: at once.
        num_visits: of each, in one measurement of ours.
        num_rounds: of the peer in one measurement.
        num_items: among which the peer chooses.
        slate_size: places that the peer fills in a round.
    """

    name: str
    num_users: int
    num_visits: int
    num_rounds: int
    num_items: int = NUM_ITEMS
    slate_size: int = 1


SEARCH = SearchCase("search, 100 of 1,000,000 x 256, 64 queries", 1_000_000, 256, 64, 100)
QUICK_SEARCH = SearchCase("search, 100 of 100,000 x 64, 64 queries (quick)", 100_000, 64, 64, 100)
GPU_SEARCH = SearchCase(
    "gpu, search, 100 of 10,000,000 x 256 bfloat16, 64 queries", 10_000_000, 256, 64, 100, dtype="bfloat16"
)
SIMULATOR = {
    BANDIT: SimulatorCase("simulator, 8,192 users", 8_192, 16, 10_000),
    SLATES: SimulatorCase("simulator, 8,192 users", 8_192, 16, 1_000, slate_size=SLATE_SIZE),
    FEW_ACTIONS: SimulatorCase("simulator, 8,192 users", 8_192, 16, 100_000, num_items=10),
}
QUICK_SIMULATOR = {BANDIT: SimulatorCase("simulator, 1,024 users (quick)", 1_024, 4, 1_000)}


def differ_in_answers(ours: tuple[np.ndarray, np.ndarray], theirs: tuple[np.ndarray, np.ndarray]) -> str:
    """Says how the answers differ, but for items at the last place whose scores are equal within rounding."""
    (our_rows, our_scores), (their_rows, their_scores) = ours, theirs
    difference = rounds.differ_by(our_scores, their_scores, relative=TOLERANCE)
    if difference:
        return difference
    near = TOLERANCE * np.abs(our_scores).max()
    for query, (mine, other) in enumerate(zip(our_rows, their_rows, strict=True)):
        is_far = our_scores[query] > our_scores[query, -1] + 2.0 * near
        missing = set(mine[is_far].tolist()) - set(other.tolist())
        if missing:
            return f"query {query}: items {sorted(missing)} are ours only"
    return ""
