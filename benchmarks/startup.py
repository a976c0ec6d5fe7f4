"""How long training takes to start, with and without kept compiled programs: python -m benchmarks.startup.

Each measurement is a process of its own that starts as ``train.py`` does on the quickstart's configuration, with
simulated data (AIGC-INT-Sim, made on the fly), and ends with its first update. What is timed goes from the process's
start to the first loss; the phases are in the results.

Sides: ``ours`` finds every program in the compilation cache (warm); ``cold cache`` finds the cache empty and fills it,
as the first run on a machine does; ``no cache`` has none. All three must report the same first loss, bit for bit.
"""

import argparse
import importlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import rounds

PHASES = ("import", "data open", "state", "first batch", "trace", "compile", "first step")
SIDES = {
    rounds.OURS: "benchmarks.startup:warm_cache",
    "cold cache": "benchmarks.startup:cold_cache",
    "no cache": "benchmarks.startup:no_cache",
}
QUICK_NOTE = "the start that gave each side's first loss; whether other processes disturbed it was not watched"
# Programs that a process compiled, and those that it found in the cache.
MISS_EVENT, HIT_EVENT = "/jax/compilation_cache/cache_misses", "/jax/compilation_cache/cache_hits"


@dataclass(frozen=True)
class Case:
    """What is started.

    Attributes:
        data: the data set.
        notes: folder in which each side notes its starts: a file of JSON lines named after it.
        is_quick: whether the model is a smaller one.
    """

    data: Path
    notes: Path
    is_quick: bool = False


def main() -> None:
    """Prints a table, and as the last line its JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smaller model, one start of each side")
    parser.add_argument("--results", help="JSON file to write; none by default")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        case = Case(Path(folder) / "data", Path(folder), is_quick=options.quick)
        make_data(case.data)
        sides = {name: SIDES[name] for name in list(SIDES)[: 2 if options.quick else None]}
        num_rounds = 1 if options.quick else 7
        timing = rounds.measure_sides(sides, case, num_rounds=num_rounds, agree=agree, is_quick=options.quick)
        # The first start of a side is the one that gave the evidence.
        num_left_out = 0 if options.quick else 1
        phases = {name: median_phases(_read_notes(case, name)[num_left_out:]) for name in sides}
        imports = {} if options.quick else import_seconds()
    _print_phases(phases)
    if imports:
        _print_imports(imports)
    cases = [
        rounds.case_record(
            "process start to first loss" + (", a smaller model (quick)" if options.quick else ""),
            timing,
            peer,
            goal=None,
            our_phases=phases[rounds.OURS],
            peer_phases=phases[peer],
            **({"note": QUICK_NOTE} if options.quick else {}),
        )
        for peer in sides
        if peer != rounds.OURS
    ]
    versions = rounds.versions("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    rounds.print_summary("startup", cases, options.results, versions=versions, import_seconds=imports)


def make_data(folder: Path) -> None:
    """Simulated records like the quickstart's, fewer."""
    from mmei_jax.simulation import aigc_int_dataset

    aigc_int_dataset.main([f"--output={folder}", "--num_records=1000", "--dim=32", "--seed=1"])


def warm_cache(case: Case) -> rounds.Ready:
    """Every start after the first one on a machine."""
    cache = tempfile.TemporaryDirectory()
    start(case, {"XDG_CACHE_HOME": cache.name})
    # The finalizer of ``cache`` removes the folder: it must live as long as the side.
    return _ready(case, rounds.OURS, lambda: ({"XDG_CACHE_HOME": cache.name}, None))


def cold_cache(case: Case) -> rounds.Ready:
    """The first start on a machine."""

    def empty() -> tuple[dict[str, str], tempfile.TemporaryDirectory[str]]:
        cache = tempfile.TemporaryDirectory()
        return {"XDG_CACHE_HOME": cache.name}, cache

    return _ready(case, "cold cache", empty)


def no_cache(case: Case) -> rounds.Ready:
    """Every start where the cache is switched off."""
    return _ready(case, "no cache", lambda: ({"JAX_ENABLE_COMPILATION_CACHE": "false"}, None))


def _ready(case: Case, side: str, prepare: Callable[[], tuple[dict[str, str], Any]]) -> rounds.Ready:
    def run() -> dict[str, Any]:
        variables, cache = prepare()
        note = start(case, variables)
        if cache is not None:
            cache.cleanup()
        with _notes(case, side).open("a", encoding="utf-8") as file:
            file.write(json.dumps(note) + "\n")
        return note

    first = run()
    settings = {"num_found": first["num_found"], "num_compiled_and_kept": first["num_kept"]}
    if case.is_quick:
        return rounds.Ready(lambda: float(first["total"]), first["loss"], settings)
    return rounds.Ready(lambda: float(run()["total"]), first["loss"], settings)


def start(case: Case, variables: Mapping[str, str]) -> dict[str, Any]:
    """Starts one process of :func:`probe`; its phases in seconds, their sum, the first loss and what the cache did."""
    # The caller's own settings of the cache; its shortest kept compilation would make the number kept one of chance.
    unset = (
        "JAX_COMPILATION_CACHE_DIR",
        "JAX_ENABLE_COMPILATION_CACHE",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS",
    )
    environment = {key: value for key, value in os.environ.items() if key not in unset}
    size = "quick" if case.is_quick else "quickstart"
    program = "from benchmarks import startup; startup.probe()"
    command = [sys.executable, "-c", program, str(case.data), size, repr(time.time())]
    done = subprocess.run(command, env={**environment, **variables}, stdout=subprocess.PIPE, text=True, check=True)
    note: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**note, "total": sum(note["phases"].values())}


def probe() -> None:
    """The work of one measured process: starts as ``train.py`` does, makes one update, prints the phases as JSON."""
    data, size, begun = sys.argv[1], sys.argv[2], float(sys.argv[3])
    ends = [begun]
    # All that train.py imports, then what is used here.
    importlib.import_module("mmei_jax.training")
    import jax

    from configs import quickstart
    from mmei_jax import compilation_cache, input_pipeline
    from mmei_jax.config import parse
    from mmei_jax.optimizer import make_optimizer, make_schedule
    from mmei_jax.records import Dataset
    from mmei_jax.sharding import batch_sharding, make_mesh
    from mmei_jax.state import build_model, initial_state, state_shapes, variable_shapes
    from mmei_jax.train_step import jit_train_step, make_train_step

    counts = {HIT_EVENT: 0, MISS_EVENT: 0}

    def count(event: str, **_: Any) -> None:
        if event in counts:
            counts[event] += 1

    jax.monitoring.register_event_listener(count)
    compilation_cache.enable()
    values = quickstart.get_config()
    values.data.path = data
    if size == "quick":
        values.model.num_layers = 1
        values.loss.intent = values.loss.ranking = "none"
    config = parse(values.to_dict())
    ends.append(time.time())
    dataset = Dataset.open(config.data.path)
    input_pipeline.check(dataset, config)
    ends.append(time.time())
    mesh = make_mesh(config)
    model = build_model(config, dataset)
    schedule = make_schedule(config.optimizer, num_steps=1000, steps_per_epoch=100.0)
    optimizer = make_optimizer(config.optimizer, variable_shapes(model)["params"], schedule)
    state = jax.block_until_ready(initial_state(model, optimizer, mesh, seed=config.seed, statistics={}))
    ends.append(time.time())
    iterator = input_pipeline.train_iterator(dataset, config, batch_sharding(mesh))
    batch = jax.block_until_ready(next(iterator))
    ends.append(time.time())
    step = make_train_step(model, optimizer, config, None)
    lowered = jit_train_step(step, state_shapes(model, optimizer, mesh)).lower(state, batch)
    ends.append(time.time())
    compiled = lowered.compile()
    ends.append(time.time())
    _, report = compiled(state, batch)
    loss = float(report.loss)
    ends.append(time.time())
    iterator.close()
    seconds = [end - start for start, end in itertools.pairwise(ends)]
    note = {"phases": dict(zip(PHASES, seconds, strict=True)), "loss": loss.hex()}
    print(json.dumps({**note, "num_found": counts[HIT_EVENT], "num_kept": counts[MISS_EVENT]}))


def agree(ours: str, theirs: str) -> str:
    """Compares first losses, as exact hexadecimal numbers."""
    return "" if ours == theirs else f"the first loss is {float.fromhex(theirs)} against {float.fromhex(ours)}"


def median_phases(notes: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Median seconds of each phase, and of their sum."""
    medians = {name: statistics.median(note["phases"][name] for note in notes) for name in PHASES}
    return {**medians, "total": statistics.median(note["total"] for note in notes)}


def import_seconds() -> dict[str, float]:
    """Seconds that importing ``mmei_jax.training`` takes, by package, each with what it alone brings in; largest first.

    A module's own time counts for the package that it belongs to.
    """
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import mmei_jax.training"],
        stderr=subprocess.PIPE,
        text=True,
        check=True,
    )
    seconds: dict[str, float] = {}
    for line in done.stderr.splitlines()[1:]:
        if line.startswith("import time:") and line.count("|") == 2:
            own, _, name = line.removeprefix("import time:").split("|")
            package = name.strip().split(".")[0]
            seconds[package] = seconds.get(package, 0.0) + int(own) / 1e6
    largest = sorted(seconds, key=seconds.__getitem__, reverse=True)[:12]
    return {name: round(seconds[name], 3) for name in largest}


def _notes(case: Case, side: str) -> Path:
    return case.notes / f"{side}.jsonl"


def _read_notes(case: Case, side: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in _notes(case, side).read_text(encoding="utf-8").splitlines()]


def _print_phases(phases: Mapping[str, Mapping[str, float]]) -> None:
    print("median seconds  " + "  ".join(f"{name:>10}" for name in phases))
    for phase in (*PHASES, "total"):
        print(f"{phase:<16}" + "  ".join(f"{seconds[phase]:>10.2f}" for seconds in phases.values()), flush=True)


def _print_imports(seconds: Mapping[str, float]) -> None:
    print("imports, own seconds by package: " + ", ".join(f"{name} {value:.2f}" for name, value in seconds.items()))


if __name__ == "__main__":
    main()
