"""How fast are exact searches of a catalogue, and simulated users, beside faiss and the Open Bandit Pipeline?

    python -m benchmarks.retrieval [--quick] [--case=WORDS] [--results=benchmarks/results/DATE_retrieval.json]

* **search**: the exact 100 best of a million items of 256 float32 features for 64 queries, by
  ``recommendation/top_k.py`` with one CPU device per core, against faiss' ``IndexFlatIP`` on as many threads: as it
  comes, and with ``distance_compute_blas_threshold = 20``, so that it multiplies matrices for 64 queries too, which
  version 1.15 does from 128,000 on only. All must find the same items first.
* **memory** of our search: how much more a process holds at its peak with all items than with a hundredth of them,
  from before the items are read to the last answer. The items lie in a file that is mapped into memory; pages of it
  that the system may take back at any time are not counted. The "ratio" is bytes of items over bytes held.
* **simulator**: slates of 8 of 2,000 items shown to thousands of simulated users (``feedback/environment.py``) under
  the uniform policy, as one program, against the generators of the Open Bandit Pipeline (obp), whose policy is uniform
  over as many items too: ``SyntheticBanditDataset`` fills one place a round, ``SyntheticSlateBanditDataset`` slates of
  8. Each gives contexts, items, propensities and rewards; what happens in a round is not the same, and ours does more.
* **gpu**: the exact 100 best of ten million items of 256 bfloat16 features, against the rate at which the same GPU
  copies memory (``retrieval_device.py``). Where there is none, a line says so.

Peers that are installed by hand (a case is left out where its peer is missing): ``pip install faiss-cpu`` and
``pip install --no-deps obp==0.4.1``.
"""

import argparse
import importlib
import importlib.util
import sys
import tempfile
import threading
import types
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import retrieval_device, rounds
from benchmarks.retrieval_cases import (
    FEW_ACTIONS,
    GPU_SEARCH,
    QUICK_SEARCH,
    QUICK_SIMULATOR,
    SEARCH,
    SIMULATOR,
    TOLERANCE,
    SearchCase,
    SimulatorCase,
    differ_in_answers,
)
from mmei_jax.feedback import environment
from mmei_jax.feedback.policies import uniform_slates
from mmei_jax.host_devices import one_device_per_core
from mmei_jax.recommendation.top_k import Filters, make_table, top_items
from mmei_jax.sharding import make_evaluation_mesh, spread_over
from mmei_jax.simulation.aigc_int import EMOTIONS, INTENTS
from mmei_jax.simulation.aigc_int_feedback import NUM_ITEMS, SLATE_SIZE

FAISS, FAISS_BLAS = "faiss IndexFlatIP", "faiss IndexFlatIP, BLAS"
INSTALL = {"faiss": "pip install faiss-cpu", "obp": "pip install --no-deps obp==0.4.1"}
SEARCH_GOAL, SIMULATOR_GOAL = 1.0, 10.0
# Bytes that a search may hold beside the items, as a share of theirs.
MEMORY_GOAL = 1.0 / 1.1
# Queries from which faiss multiplies matrices; the default of older versions.
BLAS_THRESHOLD = 20
MEMORY = "memory, "
# Whatever else the machine has: all but one case are about processors.
CPU = {"JAX_PLATFORMS": "cpu"}
_SAMPLE_SECONDS = 0.002


def our_search(case: SearchCase) -> rounds.Ready:
    """One device per core."""
    one_device_per_core()
    mesh = make_evaluation_mesh()
    table = make_table(case.items(), np.zeros(case.num_items, np.int32), mesh)
    queries = jnp.asarray(case.queries())

    def search() -> Any:
        return jax.block_until_ready(top_items(queries, table, Filters(), k=case.k, mesh=mesh))

    found = jax.device_get(search())
    settings = {"devices": jax.device_count(), **rounds.versions("jax", "jaxlib")}
    return rounds.Ready(rounds.timed(search), (found.row, found.score), settings)


def faiss_search(case: SearchCase) -> rounds.Ready:
    """As faiss comes, a thread per core."""
    return _faiss_side(importlib.import_module("faiss"), case)


def faiss_blas_search(case: SearchCase) -> rounds.Ready:
    """With matrix products by its BLAS."""
    faiss = importlib.import_module("faiss")
    faiss.cvar.distance_compute_blas_threshold = BLAS_THRESHOLD
    return _faiss_side(faiss, case)


def _faiss_side(faiss: Any, case: SearchCase) -> rounds.Ready:
    index = faiss.IndexFlatIP(case.dim)
    index.add(np.ascontiguousarray(case.items()))
    queries = case.queries()
    score, row = index.search(queries, case.k)
    settings = {
        "threads": faiss.omp_get_max_threads(),
        "compiled_for": faiss.get_compile_options().strip(),
        "blas_threshold": faiss.cvar.distance_compute_blas_threshold,
    }
    return rounds.Ready(
        rounds.timed(lambda: index.search(queries, case.k)), (row, score), settings | rounds.versions("faiss-cpu")
    )


def our_simulator(case: SimulatorCase) -> rounds.Ready:
    """Users spread over one device per core; every visit is logged, as the peer logs its rounds."""
    one_device_per_core()
    mesh = make_evaluation_mesh()
    num_states = len(EMOTIONS) * len(INTENTS)
    state = np.arange(100 * num_states) % num_states
    world = environment.make_world(state // len(INTENTS), state % len(INTENTS))
    config = environment.EnvironmentConfig()
    num_users = case.num_users // mesh.size

    def simulate(keys: jax.Array, world: environment.World) -> Any:
        def visit(users: environment.Users, key: jax.Array) -> tuple[environment.Users, Any]:
            policy_key, key = jax.random.split(key)
            slates = uniform_slates(policy_key, num_users, NUM_ITEMS, slate_size=SLATE_SIZE)
            later, feedback = environment.show(key, world, users, slates.items, config)
            return later, (users.record, slates, feedback)

        first, key = jax.random.split(keys[0])
        users = environment.new_users(first, world, num_users, config)
        log = jax.lax.scan(visit, users, jax.random.split(key, case.num_visits))[1]
        return jax.tree.map(lambda leaf: leaf[None], log)

    program = jax.jit(spread_over(mesh, simulate, is_split=(True, False)))
    seeds = iter(range(1_000_000))

    def run() -> Any:
        return jax.block_until_ready(program(jax.random.split(jax.random.key(next(seeds)), mesh.size), world))

    _, slates, feedback = jax.device_get(run())
    if not np.isfinite(feedback.dwell_seconds).all():
        raise RuntimeError("dwell seconds of the simulator are not finite")
    settings = {"devices": jax.device_count(), "slates": case.num_users * case.num_visits}
    first_place = float(slates.propensity[..., 0].mean() * NUM_ITEMS)
    return rounds.Ready(rounds.timed(run), first_place, settings | rounds.versions("jax", "jaxlib"))


def obp_generator(case: SimulatorCase) -> rounds.Ready:
    """Contexts of 5 numbers and logistic rewards, as in obp's example; uniform choice is what it does by default."""
    # Its plots want a library that the generators do not.
    sys.modules.setdefault("seaborn", types.ModuleType("seaborn"))
    dataset = importlib.import_module("obp.dataset")
    common = {"dim_context": 5, "random_state": 0}
    if case.slate_size == 1:
        generator = dataset.SyntheticBanditDataset(
            n_actions=case.num_items, reward_function=dataset.logistic_reward_function, **common
        )
        generate = partial(generator.obtain_batch_bandit_feedback, n_rounds=case.num_rounds)
    else:
        # Its progress bar writes to the terminal at every round otherwise.
        slates = importlib.import_module("obp.dataset.synthetic_slate")
        slates.tqdm = lambda rows, **_: rows
        generator = dataset.SyntheticSlateBanditDataset(
            n_unique_action=case.num_items,
            len_list=case.slate_size,
            reward_structure="independent",
            click_model="pbm",
            base_reward_function=dataset.logistic_reward_function,
            **common,
        )
        # The marginal propensities of its positions would take hours; ours are those of a position given the others.
        generate = partial(
            generator.obtain_batch_bandit_feedback, n_rounds=case.num_rounds, return_pscore_item_position=False
        )
    log = generate()
    first_place = log["pscore"] if case.slate_size == 1 else log["pscore_cascade"].reshape(-1, case.slate_size)[:, 0]
    settings = {"slates": case.num_rounds, **rounds.versions("obp", "numpy")}
    return rounds.Ready(rounds.timed(generate), float(first_place.mean() * case.num_items), settings)


def measure_search(case: SearchCase, *, num_rounds: int, is_quick: bool) -> list[dict[str, Any]]:
    """One entry for each way of faiss to search.

    Raises:
        rounds.SidesDiffer: they do not find the same.
    """
    sides = {
        rounds.OURS: "benchmarks.retrieval:our_search",
        FAISS: "benchmarks.retrieval:faiss_search",
        FAISS_BLAS: "benchmarks.retrieval:faiss_blas_search",
    }
    timing = _measure(sides, case, num_rounds, differ_in_answers, is_quick)
    for side in sides:
        seconds = timing.median_seconds(side)
        rate = case.item_bytes / seconds / 1e9
        print(f"{case.name}: {side} {1e3 * seconds:.0f} ms, {rate:.2f} GB of items/s", flush=True)
    goal = None if is_quick else SEARCH_GOAL
    return [rounds.case_record(case.name, timing, peer, goal=goal) for peer in sides if peer != rounds.OURS]


def measure_memory(case: SearchCase, *, is_quick: bool) -> list[dict[str, Any]]:
    """The entry of the memory of our search."""
    held = {}
    for num_items in (case.num_items // 100, case.num_items):
        with tempfile.TemporaryDirectory() as folder:
            sized = replace(case, num_items=num_items).write_items(Path(folder) / "items.npy")
            # A process of its own: what another case left behind would count.
            held[sized.item_bytes] = rounds.in_new_process(peak_bytes_of_search, sized, environment=CPU)
        print(f"memory: {held[sized.item_bytes] / 1e6:.0f} MB with {num_items} items", flush=True)
    (few, least), (many, most) = held.items()
    return [
        {
            "case": MEMORY + case.name.removeprefix("search, "),
            "peer": "the items",
            "ratio": round((many - few) / (most - least), 4),
            "goal": None if is_quick else round(MEMORY_GOAL, 4),
            "item_bytes": [few, many],
            "peak_bytes": [least, most],
        }
    ]


def peak_bytes_of_search(case: SearchCase) -> int:
    """The most memory of its own that this process, which must be new, held from reading the items to an answer."""
    peak, is_done = [0], threading.Event()

    def watch() -> None:
        while not is_done.wait(_SAMPLE_SECONDS):
            peak[0] = max(peak[0], _own_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    our_search(case).measure()
    is_done.set()
    watcher.join()
    return max(peak[0], _own_bytes())


def _own_bytes() -> int:
    """Without the pages of files."""
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    lines = dict(line.split(":", 1) for line in status if ":" in line)
    return 1024 * (int(lines["RssAnon"].split()[0]) + int(lines["RssShmem"].split()[0]))


def measure_simulator(cases: dict[str, SimulatorCase], *, num_rounds: int, is_quick: bool) -> list[dict[str, Any]]:
    """One entry for each peer: the ratio is one of slates per second."""
    entries = []
    for peer, case in cases.items():
        sides = {rounds.OURS: "benchmarks.retrieval:our_simulator", peer: "benchmarks.retrieval:obp_generator"}
        agree = partial(rounds.differ_by, relative=TOLERANCE)
        timing = _measure(sides, case, num_rounds, agree, is_quick)
        slates = {side: int(timing.settings[side]["slates"]) for side in sides}
        per_second = {side: slates[side] / timing.median_seconds(side) for side in sides}
        # Each side makes another number of slates in one measurement.
        share = slates[rounds.OURS] / slates[peer]
        per_slate = rounds.Timing(
            {**timing.seconds, peer: [share * seconds for seconds in timing.seconds[peer]]},
            timing.settings,
            timing.is_disturbed,
        )
        entries.append(
            rounds.case_record(
                case.name,
                per_slate,
                peer,
                goal=None if is_quick or peer == FEW_ACTIONS else SIMULATOR_GOAL,
                our_slates_per_second=round(per_second[rounds.OURS]),
                peer_slates_per_second=round(per_second[peer]),
            )
        )
        print(
            f"{case.name}: {per_second[rounds.OURS]:,.0f} slates/s against {peer} {per_second[peer]:,.0f}", flush=True
        )
    return entries


def measure_on_gpu(case: SearchCase, *, num_rounds: int) -> dict[str, Any]:
    """The entry of a search on a GPU, which says so where there is none."""
    reason = rounds.missing_gpu()
    if reason:
        return rounds.unmeasured(case.name, retrieval_device.COPY, reason, goal=retrieval_device.GOAL)
    # A process of its own: this one leaves the GPU alone.
    return rounds.in_new_process(retrieval_device.measure, case, num_rounds)


def _measure(sides: dict[str, str], case: Any, num_rounds: int, agree: Any, is_quick: bool) -> rounds.Timing:
    return rounds.measure_sides(
        sides,
        case,
        num_rounds=num_rounds,
        agree=agree,
        environment=dict.fromkeys(sides, CPU),
        is_quick=is_quick,
    )


def main() -> None:
    """Measures, prints a table, and a JSON line at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small catalogue and few users, within a minute")
    parser.add_argument("--case", default="", help="part of the name of the cases to measure; by default all")
    parser.add_argument("--num_rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--results", help="JSON file for the figures, date, versions and command")
    arguments = parser.parse_args()
    is_quick = arguments.quick
    search, simulator = (QUICK_SEARCH, QUICK_SIMULATOR) if is_quick else (SEARCH, SIMULATOR)
    names = ("search", "memory", "simulator") if is_quick else ("search", "memory", "simulator", "gpu")
    chosen = [name for name in names if arguments.case in name]
    if not chosen:
        parser.error(f"--case={arguments.case}: expected a part of one of: " + "; ".join(names))
    for module, command in INSTALL.items():
        left_out = "search" if module == "faiss" else "simulator"
        if left_out in chosen and importlib.util.find_spec(module) is None:
            print(f"{module} is not installed, so {left_out} is left out: {command}", flush=True)
            chosen = [name for name in chosen if name != left_out]
    options = {"num_rounds": 2 if is_quick else arguments.num_rounds, "is_quick": is_quick}
    entries = []
    if "search" in chosen:
        with tempfile.TemporaryDirectory() as folder:
            entries += measure_search(search.write_items(Path(folder) / "items.npy"), **options)
    if "memory" in chosen:
        entries += measure_memory(search, is_quick=is_quick)
    if "simulator" in chosen:
        entries += measure_simulator(simulator, **options)
    if "gpu" in chosen:
        entries.append(measure_on_gpu(GPU_SEARCH, num_rounds=arguments.num_rounds))
    for entry in entries:
        if "our_settings" in entry:
            print(f"{entry['case']}: {rounds.spread(entry)}", flush=True)
            print(f"  ours: {entry['our_settings']}\n  {entry['peer']}: {entry['peer_settings']}", flush=True)
    rounds.print_summary("retrieval", entries, arguments.results, versions=rounds.versions("jax", "jaxlib", "numpy"))


if __name__ == "__main__":
    main()
