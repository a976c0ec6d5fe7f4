"""How fast does XLA multiply matrices of a Transformer's shapes on this machine, beside torch?

    python -m benchmarks.matrix_products [--quick] [--results=benchmarks/results/DATE_matrix_products.json]

Everything else in this folder that compares with torch on a CPU lies under this: most of an encoder's or an update's
time is matrix products, and no code of ours is in them. float32, one product of random matrices at a time, the best of
several in each round.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import rounds

# Rows, shared dimension, columns: a square; BERT-base's layers on 4,096 and 1,024 tokens; MMEI's on 3,136.
SHAPES = (
    (2048, 2048, 2048),
    (4096, 768, 3072),
    (4096, 3072, 768),
    (4096, 768, 768),
    (1024, 768, 3072),
    (3136, 256, 1024),
)
TORCH = "torch"
SIDES = {rounds.OURS: "benchmarks.matrix_products:xla_side", TORCH: "benchmarks.matrix_products:torch_side"}


def xla_side(shape: tuple[int, int, int]) -> rounds.Ready:
    """A jitted product."""
    import jax
    import jax.numpy as jnp

    left, right = (jnp.asarray(each) for each in _matrices(shape))
    product = jax.jit(lambda left, right: left @ right)
    evidence = np.asarray(product(left, right))
    return _ready(lambda: product(left, right).block_until_ready(), evidence, rounds.versions("jax", "jaxlib"))


def torch_side(shape: tuple[int, int, int]) -> rounds.Ready:
    """The product of torch itself."""
    import torch

    left, right = (torch.from_numpy(each) for each in _matrices(shape))
    settings = {"threads": torch.get_num_threads(), **rounds.versions("torch")}
    return _ready(lambda: left @ right, (left @ right).numpy(), settings)


def _matrices(shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    rows, shared, columns = shape
    generator = np.random.default_rng(0)
    left, right = generator.normal(size=(rows, shared)), generator.normal(size=(shared, columns))
    return left.astype(np.float32), right.astype(np.float32)


def _ready(multiply: Callable[[], Any], evidence: np.ndarray, settings: dict[str, Any]) -> rounds.Ready:
    def measure() -> float:
        seconds = []
        for _ in range(10):
            started = time.perf_counter()
            multiply()
            seconds.append(time.perf_counter() - started)
        return min(seconds)

    measure()
    return rounds.Ready(measure, evidence, settings)


def main() -> None:
    """Prints a table, and as the last line its JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two shapes, 2 rounds")
    parser.add_argument("--results", help="JSON file for the figures, date, versions and command")
    options = parser.parse_args()
    cases = []
    for shape in SHAPES[: 2 if options.quick else None]:
        timing = rounds.measure_sides(
            SIDES,
            shape,
            num_rounds=2 if options.quick else 5,
            agree=lambda ours, theirs: rounds.differ_by(ours, theirs, relative=1e-5),
            environment={name: {"JAX_PLATFORMS": "cpu"} for name in SIDES},
            is_quick=options.quick,
        )
        rows, shared, columns = shape
        operations = 2e-9 * rows * shared * columns
        rates = {
            f"{who}_gflop_per_second": round(operations / timing.median_seconds(side))
            for who, side in (("our", rounds.OURS), ("peer", TORCH))
        }
        cases.append(rounds.case_record(f"{rows} x {shared} x {columns}", timing, TORCH, goal=None, **rates))
        print(f"{rows} x {shared} x {columns}: {rates}", flush=True)
    rounds.print_summary("matrix_products", cases, options.results, versions=rounds.versions("jax", "jaxlib", "torch"))


if __name__ == "__main__":
    main()
