"""Does an exported MMEI answer as fast as the same model in PyTorch?

    python -m benchmarks.serving [--quick] [--case=WORDS] [--results=benchmarks/results/DATE_serving.json]

The fusion model at the sizes of ``configs/default.py`` (d = 256, 4 layers, 16 vision, 50 audio, 32 text tokens of 768
features), for 1 record and for 32 records at once. A request goes from features in the host's memory to logits and F_u
in the host's memory; requests follow one another. Ours is the exported program (``mmei_jax.serving``) after it was
written and read; the peers are the same weights in eager torch and compiled by TorchInductor, in inference mode. Of the
seconds of many requests the 50th, 95th and 99th percentile are compared. Before anything is
measured, all sides must give the same outputs.
"""

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from benchmarks import rounds
from benchmarks.fusion_cases import COMPILED, EAGER, Case
from benchmarks.fusion_step import initial_parameters
from mmei_jax.host_memory import keep_freed_memory

# Of the largest output.
TOLERANCE = 1e-5


# Compared by identity, as what it holds is.
@dataclass(frozen=True, eq=False)
class ServingCase:
    """One size of requests.

    Attributes:
        fusion: the model and its records.
        percentiles: of the requests' seconds, each in [0, 100].
        num_requests: of one measurement, for each side.
        goals: by peer, the ratio aimed at.
    """

    fusion: Case
    percentiles: tuple[int, ...]
    num_requests: int
    goals: Mapping[str, float | None] = field(default_factory=lambda: {EAGER: 1.0, COMPILED: 1.0})

    @property
    def name(self) -> str:
        """As ``--case`` chooses it."""
        return self.fusion.name


CASES = tuple(
    ServingCase(Case(f"cpu, batch {size}", {}, batch_size=size), (50, 95, 99), num_requests)
    for size, num_requests in ((1, 300), (32, 60))
)
QUICK_CASES = (
    ServingCase(
        Case("cpu, batch 1, 1 layer (quick)", {}, batch_size=1, changes={"model__num_layers": 1}),
        (50,),
        num_requests=20,
        goals={EAGER: None},
    ),
)


def our_inputs(case: Case) -> list[dict[str, np.ndarray]]:
    """The records of the case as the exported program takes them."""
    return [
        {
            key: value
            for name, each in batch.sequences().items()
            for key, value in (
                (f"{name}_features", np.asarray(each.features)),
                (f"{name}_lengths", (np.asarray(each.segment_ids) > 0).sum(axis=1).astype(np.int32)),
            )
        }
        for batch in case.batches(case.tasks(case.config()))
    ]


def our_request(case: Case) -> Callable[[Mapping[str, np.ndarray]], tuple[np.ndarray, ...]]:
    """From inputs to emotion, intent and F_u, by the exported program."""
    from jax import export

    from mmei_jax.models.mmei import Mmei
    from mmei_jax.serving.exporting import describe, lower
    from mmei_jax.serving.functions import model_function
    from mmei_jax.serving.loading import LoadedProgram
    from mmei_jax.state import initialize

    config = case.config()
    tasks = case.tasks(config)
    model = Mmei(config.model, tasks)
    variables = jax.jit(lambda: initialize(model, config.seed))()
    function = model_function(model, variables, dict.fromkeys(tasks.inputs(), "float32"), {})
    exported = export.deserialize(lower(function, ("cpu",)).serialize())
    parameters = {name: jax.device_put(dict(group.arrays)) for name, group in function.groups.items()}
    program = LoadedProgram(describe("fusion", function, exported), exported, parameters)

    def request(inputs: Mapping[str, np.ndarray]) -> tuple[np.ndarray, ...]:
        found = program(**inputs)
        return tuple(np.asarray(found[name]) for name in ("emotion", "intent", "user_embedding"))

    return request


def torch_request(case: Case, *, is_compiled: bool) -> Callable[[Mapping[str, np.ndarray]], tuple[np.ndarray, ...]]:
    """The same by the peer, from the same inputs."""
    import torch
    import torch.nn.functional as F

    from benchmarks import torch_mmei

    config = case.config()
    tasks = case.tasks(config)
    model = torch_mmei.TorchMmei(config, tasks)
    torch_mmei.load_parameters(model, initial_parameters(case))
    model.eval()
    names = list(tasks.inputs())

    def read(features: Mapping[str, Any], lengths: Mapping[str, Any]) -> tuple[Any, ...]:
        is_token = {name: torch.arange(features[name].shape[1])[None] < lengths[name][:, None] for name in names}
        emotion, intent, users = model.read({"features": features, "is_token": is_token})
        return emotion, intent, F.normalize(users, dim=1)

    function = torch.compile(read, fullgraph=True) if is_compiled else read

    def request(inputs: Mapping[str, np.ndarray]) -> tuple[np.ndarray, ...]:
        with torch.inference_mode():
            features = {name: torch.from_numpy(inputs[f"{name}_features"]) for name in names}
            lengths = {name: torch.from_numpy(inputs[f"{name}_lengths"]) for name in names}
            return tuple(each.numpy() for each in function(features, lengths))

    return request


def our_side(case: ServingCase) -> rounds.Ready:
    """The exported program, in a process set up as docs/serving.md says."""
    keeps_memory = keep_freed_memory()
    settings = {
        "device": jax.devices()[0].device_kind,
        "keeps_freed_memory": keeps_memory,
        **rounds.versions("jax", "jaxlib"),
    }
    return _ready(case, our_request(case.fusion), settings)


def eager_side(case: ServingCase) -> rounds.Ready:
    """The peer, run operation by operation."""
    return _torch_side(case, is_compiled=False)


def compiled_side(case: ServingCase) -> rounds.Ready:
    """The peer, compiled by TorchInductor."""
    return _torch_side(case, is_compiled=True)


def _torch_side(case: ServingCase, *, is_compiled: bool) -> rounds.Ready:
    import torch

    # What serves us serves the peer too.
    keeps_memory = keep_freed_memory()
    settings = {
        "keeps_freed_memory": keeps_memory,
        "threads": torch.get_num_threads(),
        "compile_mode": "default" if is_compiled else "none",
        "attention": "scaled_dot_product_attention",
        **rounds.versions("torch"),
    }
    return _ready(case, torch_request(case.fusion, is_compiled=is_compiled), settings)


def _ready(
    case: ServingCase,
    request: Callable[[Mapping[str, np.ndarray]], tuple[np.ndarray, ...]],
    settings: Mapping[str, Any],
) -> rounds.Ready:
    examples = our_inputs(case.fusion)
    evidence = np.concatenate([part.ravel() for inputs in examples for part in request(inputs)])

    def measure() -> np.ndarray:
        return percentiles_of(request, examples, case)

    measure()
    return rounds.Ready(measure, evidence, settings)


def percentiles_of(request: Callable[[Any], Any], examples: list[Any], case: ServingCase) -> np.ndarray:
    """The case's percentiles of the seconds of its requests, which take the examples in turns."""
    seconds = []
    for index in range(case.num_requests):
        started = time.perf_counter()
        request(examples[index % len(examples)])
        seconds.append(time.perf_counter() - started)
    return np.percentile(seconds, case.percentiles)


SIDES = {
    rounds.OURS: "benchmarks.serving:our_side",
    EAGER: "benchmarks.serving:eager_side",
    COMPILED: "benchmarks.serving:compiled_side",
}


def measure_case(
    case: ServingCase, *, num_rounds: int, sides: Mapping[str, str] = SIDES, is_quick: bool = False
) -> list[dict[str, Any]]:
    """One entry for each percentile and peer of the case.

    Raises:
        rounds.SidesDiffer: the outputs differ.
    """
    chosen = {name: target for name, target in sides.items() if name == rounds.OURS or name in case.goals}
    timing = rounds.measure_sides(
        chosen,
        case,
        num_rounds=num_rounds,
        agree=lambda ours, theirs: rounds.differ_by(ours, theirs, relative=TOLERANCE),
        environment={name: {"JAX_PLATFORMS": "cpu"} for name in chosen},
        is_quick=is_quick,
    )
    return [
        rounds.case_record(
            f"{case.name}, p{percentile}", timing.figure(index), peer, goal=goal, num_requests=case.num_requests
        )
        for index, percentile in enumerate(case.percentiles)
        for peer, goal in case.goals.items()
    ]


def main() -> None:
    """Measures every case, prints a table, and a JSON line at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller model, batch 1, p50, eager torch only")
    parser.add_argument("--num_rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--results", help="JSON file for the figures, date, versions and command")
    arguments = parser.parse_args()
    entries: list[dict[str, Any]] = []
    for case in rounds.chosen_cases(parser, QUICK_CASES if arguments.quick else CASES, arguments.case):
        found = measure_case(case, num_rounds=2 if arguments.quick else arguments.num_rounds, is_quick=arguments.quick)
        entries.extend(found)
        for entry in found:
            ours, theirs = (1e3 * entry[f"{who}_median_seconds"] for who in ("our", "peer"))
            line = f"{entry['case']}: {ours:.2f} ms against {entry['peer']} {theirs:.2f} ms, {rounds.spread(entry)}"
            print(f"{line}\n  ours: {entry['our_settings']}\n  {entry['peer']}: {entry['peer_settings']}", flush=True)
    rounds.print_summary("serving", entries, arguments.results, versions=rounds.versions("jax", "jaxlib", "torch"))


if __name__ == "__main__":
    main()
