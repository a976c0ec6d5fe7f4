"""How near does a search of ten million items come to the rate at which a GPU copies memory? ``retrieval`` asks it.

The search is a user's: items as a catalogue index of bfloat16 stores them (``make_table``), ``top_items`` with the
blocks that it chooses itself, on one device. Before anything is measured, the items found must be those with the
largest products of the same bfloat16 values, summed in float32 by NumPy.

How bytes are counted: a copy of ``n`` bytes within the device reads ``n`` and writes ``n``, so it moves ``2 n``. A
search has to read every item once, which is all that is counted of it, whatever else it moves: ``items x dim x 2``
bytes, without the rows that pad the table. The ratio is ``(bytes of items / seconds of a search) / (2 n / seconds of a
copy)``; what is copied is the table's array of items. Each call is waited for. Search and copy take turns in the same
process, each repeated until a round is long enough; the ratio is the median over rounds.

The entry also names the kernels in which a search spends its time, of a profile made after the measurement, and the
most memory that the device held until the first answer.
"""

import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import rounds
from benchmarks.retrieval_cases import SearchCase, differ_in_answers
from mmei_jax.profiling import traces
from mmei_jax.recommendation.top_k import Filters, make_table, top_items
from mmei_jax.sharding import mesh_over

COPY = "copy bandwidth"
GOAL = 0.8
# Items drawn, and looked at for the comparison, at once.
_PIECE_ROWS = 262_144
_NUM_PROFILED = 10
_NUM_KERNELS_TOLD = 12

copy_on_device = jax.jit(jnp.copy)


def measure(case: SearchCase, num_rounds: int, is_quick: bool = False) -> dict[str, Any]:
    """The entry of the case, on the first device of this process.

    Args:
        case: its items are drawn here, and have no file.
        num_rounds: rounds that count.
        is_quick: whether a round that others disturb is kept as it is, and no goal is set.

    Raises:
        rounds.SidesDiffer: other items are better than those found.
    """
    device = jax.devices()[0]
    mesh = mesh_over([device])
    items = draw_items(case)
    table = make_table(items, np.zeros(case.num_items, np.int32), mesh, dtype=case.dtype)
    queries = jax.device_put(case.queries(), device)

    def search() -> Any:
        return jax.block_until_ready(top_items(queries, table, Filters(), k=case.k, mesh=mesh))

    found = jax.device_get(search())
    peak_bytes = (device.memory_stats() or {}).get("peak_bytes_in_use")
    difference = differ_in_answers((found.row, found.score), best_by_numpy(case, items))
    if difference:
        raise rounds.SidesDiffer(f"the search and NumPy differ, so that no ratio is given: {difference}")
    del items
    moved_bytes = 2 * table.embeddings.nbytes
    settings = {
        "device": device.device_kind,
        "rows_with_padding": len(table.embeddings),
        **rounds.versions("jax", "jaxlib"),
    }
    timing = rounds.measure_here(
        {
            rounds.OURS: rounds.timed(search),
            COPY: rounds.timed(lambda: jax.block_until_ready(copy_on_device(table.embeddings))),
        },
        {rounds.OURS: settings, COPY: {"device": device.device_kind, "moved_bytes": moved_bytes}},
        num_rounds=num_rounds,
        is_quick=is_quick,
    )
    copy_seconds = timing.median_seconds(COPY)
    # The peer's seconds are those in which the items' bytes pass at the rate of the copy.
    at_rate = [case.item_bytes * seconds / moved_bytes for seconds in timing.seconds[COPY]]
    timing = rounds.Timing({**timing.seconds, COPY: at_rate}, timing.settings, timing.is_disturbed)
    entry = rounds.case_record(
        case.name,
        timing,
        COPY,
        goal=None if is_quick else GOAL,
        search_gb_per_second=round(case.item_bytes / timing.median_seconds(rounds.OURS) / 1e9, 3),
        copy_gb_per_second=round(moved_bytes / copy_seconds / 1e9, 3),
        item_bytes=case.item_bytes,
        peak_bytes=peak_bytes,
    )
    print(
        f"{case.name}: {1e3 * entry['our_median_seconds']:.2f} ms, {entry['search_gb_per_second']:.0f} GB of items/s; "
        f"copies move {entry['copy_gb_per_second']:.0f} GB/s",
        flush=True,
    )
    return entry | profile(search)


def draw_items(case: SearchCase) -> np.ndarray:
    """``[items, dim]`` float32, drawn on the device, which is faster, and taken from there piece by piece."""
    items = np.empty((case.num_items, case.dim), np.float32)
    shape = (min(_PIECE_ROWS, case.num_items), case.dim)
    draw = jax.jit(lambda key: jax.random.normal(key, shape))
    for start in range(0, case.num_items, _PIECE_ROWS):
        piece = items[start : start + _PIECE_ROWS]
        piece[:] = jax.device_get(draw(jax.random.fold_in(jax.random.key(0), start)))[: len(piece)]
    return items


def best_by_numpy(case: SearchCase, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows and scores ``[queries, k]``, the best first, of products of values of the case's type summed in float32.

    Args:
        case: how many of them, and for which queries.
        items: ``[items, dim]`` float32 before they are rounded.
    """
    queries = case.queries().astype(jnp.dtype(case.dtype)).astype(np.float32)
    rows = np.empty((case.num_queries, 0), np.int64)
    scores = np.empty((case.num_queries, 0), np.float32)
    for start in range(0, case.num_items, _PIECE_ROWS):
        piece = items[start : start + _PIECE_ROWS].astype(jnp.dtype(case.dtype)).astype(np.float32)
        scores = np.concatenate([scores, queries @ piece.T], axis=1)
        here = np.broadcast_to(np.arange(start, start + len(piece)), (case.num_queries, len(piece)))
        rows = np.concatenate([rows, here], axis=1)
        best = np.argpartition(-scores, min(case.k, scores.shape[1]) - 1, axis=1)[:, : case.k]
        rows, scores = np.take_along_axis(rows, best, axis=1), np.take_along_axis(scores, best, axis=1)
    order = np.argsort(-scores, axis=1)
    return np.take_along_axis(rows, order, axis=1), np.take_along_axis(scores, order, axis=1)


def profile(search: Any) -> dict[str, Any]:
    """Seconds of one search by kernel, those that take most, and those in which the device was at work."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(_NUM_PROFILED):
                search()
        spans = traces.device_spans(Path(folder))
    by_operation = list(traces.seconds_by_operation(spans).items())
    return {
        "device_busy_seconds": traces.busy_seconds(spans) / _NUM_PROFILED,
        "device_seconds_by_kernel": {
            name: seconds / _NUM_PROFILED for name, seconds in by_operation[:_NUM_KERNELS_TOLD]
        },
    }
