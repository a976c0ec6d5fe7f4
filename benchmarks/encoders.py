"""Are our encoders as fast as Hugging Face's in PyTorch, and how soon do they start?

    python -m benchmarks.encoders [--quick] [--case=WORDS] [--results=benchmarks/results/DATE_encoders.json]

Both sides read one checkpoint of the base size with random weights, converted by the package's own converter, and one
set of inputs; before anything is measured the last hidden states must agree (of ragged texts, those of their first
tokens). Inference, weights and inputs on the device; on CPUs, both sides keep the memory that they free. Each side
tries how many rows one call should take, and the peers' other settings, and takes what is fastest; all of it is
printed.

Ragged texts have the lengths of MELD's utterances (``utterance_lengths``: words and punctuation marks, and one token
more at either end). Ours are packed into rows of 64 tokens, and packing is part of what is measured; the peers' are
padded beforehand. Useful tokens, and so the ratio, are those of the texts.

Cold start: seconds and peak memory of converting BERT-base, and the compilation of each encoder in a process that finds
the persistent compilation cache filled. There the "ratio" is what is allowed divided by what was measured.
"""

import argparse
import dataclasses
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import rounds
from benchmarks.encoder_cases import (
    CASES,
    COMPILED,
    EAGER,
    OUR_CHECKPOINT,
    PADDED,
    QUICK_CASES,
    SORTED,
    Case,
    save_checkpoint,
)
from benchmarks.matmul import matmul_operations
from mmei_jax import compilation_cache
from mmei_jax.encoders import ComputeOptions, Pretrained, convert, first_token, in_corpus_order, load, pack_texts
from mmei_jax.host_memory import keep_freed_memory
from mmei_jax.profiling.ceilings import matmul_rate

TOKENS_PER_ROW, TEXTS_PER_ROW = 64, 16
# Padded texts that take about the place of a packed row.
TEXTS_PER_PACKED_ROW = 4
SIDES = {
    rounds.OURS: "benchmarks.encoders:our_side",
    EAGER: "benchmarks.encoders_torch:eager",
    COMPILED: "benchmarks.encoders_torch:compiled",
    PADDED: "benchmarks.encoders_torch:padded",
    SORTED: "benchmarks.encoders_torch:sorted_by_length",
}
COLD_START = "cold start"
CONVERSION_SECONDS, CONVERSION_MEMORY, COMPILATION_SECONDS = 10.0, 1.5, 0.3


def our_side(case: Case) -> rounds.Ready:
    """Our encoder, compiled and warm."""
    keep_freed_memory()
    encoder = _load(case)
    rate = matmul_rate(case.compute_dtype)
    run, evidence = (_ragged_calls if case.is_ragged else _dense_calls)(case, encoder)
    seconds: dict[int, float] = {}
    for num_rows in case.rows_per_call:
        run(num_rows)
        seconds[num_rows] = min(_timed(run, num_rows) for _ in range(2))
    best = min(seconds, key=seconds.__getitem__)
    num_operations = _operations(case, encoder)
    settings = {
        "device": jax.devices()[0].device_kind,
        "options": dataclasses.asdict(encoder.module.options),
        "padding": "packed" if case.is_ragged else "none",
        "chosen": f"rows_per_call={best}",
        "pre_run_seconds": {f"rows_per_call={number}": round(value, 3) for number, value in seconds.items()},
        "matmul_gflop": round(num_operations / 1e9, 1),
        "measured_matmul_gflop_per_second": round(rate / 1e9, 1),
        **rounds.versions("jax", "jaxlib", "flax"),
    }
    return rounds.Ready(lambda: _timed(run, best), evidence(best), settings)


def _load(case: Case) -> Pretrained:
    options = ComputeOptions(compute_dtype=case.compute_dtype)
    return load(case.folder / OUR_CHECKPOINT, options=options, dtype=case.compute_dtype)


def _timed(run: Callable[[int], Any], num_rows: int) -> float:
    started = time.perf_counter()
    jax.block_until_ready(run(num_rows))
    return time.perf_counter() - started


def _dense_calls(case: Case, encoder: Pretrained) -> tuple[Callable[[int], Any], Callable[[int], np.ndarray]]:
    (array,) = case.inputs().values()
    segment_ids = np.ones(array.shape, np.int32) if case.family == "bert" else None

    @jax.jit
    def apply(parameters: Any, *arguments: Any) -> jax.Array:
        return encoder.module.apply({"params": parameters}, *arguments).last_hidden_state

    arguments = [each for each in (array, segment_ids) if each is not None]
    parts = {
        rows: [
            jax.device_put([each[start : start + rows] for each in arguments]) for start in range(0, len(array), rows)
        ]
        for rows in case.rows_per_call
    }

    def run(num_rows: int) -> list[jax.Array]:
        return [apply(encoder.parameters, *part) for part in parts[num_rows]]

    return run, lambda num_rows: np.concatenate(jax.device_get(run(num_rows)))


def _ragged_calls(case: Case, encoder: Pretrained) -> tuple[Callable[[int], Any], Callable[[int], np.ndarray]]:
    texts = case.texts()

    @jax.jit
    def apply(parameters: Any, token_ids: jax.Array, segment_ids: jax.Array) -> jax.Array:
        states = encoder.module.apply({"params": parameters}, token_ids, segment_ids).last_hidden_state
        return first_token(states, segment_ids, TEXTS_PER_ROW)

    def run(num_rows: int) -> tuple[list[jax.Array], Any]:
        packed = pack_texts(
            texts,
            tokens_per_row=TOKENS_PER_ROW,
            rows_per_batch=num_rows // TEXTS_PER_PACKED_ROW,
            texts_per_row=TEXTS_PER_ROW,
        )
        outputs = [apply(encoder.parameters, batch.token_ids, batch.segment_ids) for batch in packed.batches]
        return outputs, packed

    def evidence(num_rows: int) -> np.ndarray:
        outputs, packed = run(num_rows)
        return in_corpus_order(outputs, packed.batches)

    return lambda num_rows: run(num_rows)[0], evidence


def _operations(case: Case, encoder: Pretrained) -> float:
    """Multiplications and additions of one measurement; of ragged texts those of useful tokens, attention left out."""
    if case.is_ragged:
        num_tokens = sum(len(text) for text in case.texts())
        kernels = [leaf for leaf in jax.tree.leaves(encoder.parameters["encoder"]) if leaf.ndim == 2]
        return 2.0 * num_tokens * sum(leaf.size for leaf in kernels)
    (array,) = case.inputs().values()
    inputs = (array, np.ones(array.shape, np.int32)) if case.family == "bert" else (array,)
    return matmul_operations(lambda *each: encoder.module.apply({"params": encoder.parameters}, *each), *inputs)


def measure_case(case: Case, *, num_rounds: int, is_quick: bool = False) -> list[dict[str, Any]]:
    """One entry for each peer of the case.

    Raises:
        rounds.SidesDiffer: the outputs differ.
    """
    theirs = {"JAX_PLATFORMS": "cpu"}
    ours = theirs if case.platform == "cpu" else {"JAX_PLATFORMS": "cuda", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.4"}
    peers = [peer for peer, _ in case.goals]
    with tempfile.TemporaryDirectory() as folder:
        case = dataclasses.replace(case, folder=Path(folder) / case.family)
        # In a process of its own: torch's threads stay out of this one.
        rounds.in_new_process(save_checkpoint, case)
        timing = rounds.measure_sides(
            {name: SIDES[name] for name in (rounds.OURS, *peers)},
            case,
            num_rounds=num_rounds,
            agree=lambda a, b: rounds.differ_by(a, b, relative=case.tolerance),
            environment={name: ours if name == rounds.OURS else theirs for name in (rounds.OURS, *peers)},
            is_quick=is_quick,
        )
    settings, seconds = timing.settings[rounds.OURS], timing.median_seconds(rounds.OURS)
    share = settings["matmul_gflop"] / seconds / settings["measured_matmul_gflop_per_second"]
    more = {"our_share_of_measured_matmul_rate": round(share, 4), "goal_share": case.goal_share}
    if case.is_ragged:
        more["our_useful_tokens_per_second"] = round(sum(len(text) for text in case.texts()) / seconds)
    return [rounds.case_record(case.name, timing, peer, goal=goal, **more) for peer, goal in case.goals]


def cold_start(num_layers: int) -> list[dict[str, Any]]:
    """Conversion and warm compilation against what is allowed."""
    entries = []
    with tempfile.TemporaryDirectory() as folder:
        for case in (case for case in CASES if case.platform == "cpu" and not case.is_ragged):
            case = dataclasses.replace(case, num_layers=num_layers, folder=Path(folder) / case.family)
            rounds.in_new_process(save_checkpoint, case)
            if case.family == "bert":
                seconds, memory = rounds.in_new_process(convert_and_measure, case)
                entries += [
                    _allowed("converting BERT-base, seconds", CONVERSION_SECONDS, seconds),
                    _allowed("converting BERT-base, peak memory / checkpoint", CONVERSION_MEMORY, memory),
                ]
            cache = str(Path(folder) / "cache")
            compilations = [rounds.in_new_process(compile_and_measure, case, cache) for _ in range(2)]
            entries.append(
                {
                    **_allowed(f"second compilation of {case.name}, seconds", COMPILATION_SECONDS, compilations[1]),
                    "first_seconds": round(compilations[0], 3),
                }
            )
    return entries


def convert_and_measure(case: Case) -> tuple[float, float]:
    """Seconds of a conversion, and its peak memory above what the process had before, in sizes of the checkpoint."""
    before = _peak_memory_kibibytes()
    started = time.perf_counter()
    convert(case.folder, case.folder / "again", compare=False)
    seconds = time.perf_counter() - started
    grown = 1024 * (_peak_memory_kibibytes() - before)
    return seconds, grown / (case.folder / "model.safetensors").stat().st_size


def _peak_memory_kibibytes() -> int:
    # Not getrusage's: that starts at the peak of the process that started this one.
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1])


def compile_and_measure(case: Case, cache: str) -> float:
    """Seconds of compiling the encoder's largest call, with a persistent cache as the package's commands keep it."""
    os.environ["XDG_CACHE_HOME"] = cache
    compilation_cache.enable()
    encoder = load(case.folder / OUR_CHECKPOINT)
    (array,) = case.inputs().values()
    inputs = (array, np.ones(array.shape, np.int32)) if case.family == "bert" else (array,)

    def apply(parameters: Any, *each: Any) -> Any:
        return encoder.module.apply({"params": parameters}, *each)

    lowered = jax.jit(apply).lower(encoder.parameters, *inputs)
    started = time.perf_counter()
    lowered.compile()
    return time.perf_counter() - started


def _allowed(name: str, most: float, found: float) -> dict[str, Any]:
    return {"case": name, "peer": f"at most {most:g}", "ratio": round(most / found, 4), "goal": 1.0, "found": found}


def _print(entries: Sequence[dict[str, Any]]) -> None:
    for entry in entries:
        ratio = "only disturbed rounds" if entry["ratio"] is None else f"{entry['ratio']:.2f}"
        print(f"{entry['case']}: {ratio} against {entry['peer']}", flush=True)
        for key in ("ratio_range", "our_settings", "peer_settings", "our_share_of_measured_matmul_rate", "found"):
            if key in entry:
                print(f"  {key}: {entry[key]}", flush=True)


def main() -> None:
    """Measures every case, prints a table, and a JSON line at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="encoders of one layer, few rows, within a minute")
    parser.add_argument("--num_rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--case", default="", help="only cases whose name contains this; 'cold start' is one")
    parser.add_argument("--results", help="JSON file for the figures, date, versions and command")
    arguments = parser.parse_args()
    entries: list[dict[str, Any]] = []
    others = () if arguments.quick else (COLD_START,)
    for case in rounds.chosen_cases(parser, QUICK_CASES if arguments.quick else CASES, arguments.case, others):
        reason = rounds.missing_gpu() if case.platform == "gpu" else ""
        if reason:
            entries.extend(rounds.unmeasured(case.name, peer, reason, goal=goal) for peer, goal in case.goals)
            continue
        num_rounds = 2 if arguments.quick else arguments.num_rounds
        found = measure_case(case, num_rounds=num_rounds, is_quick=arguments.quick)
        _print(found)
        entries.extend(found)
    if arguments.case in COLD_START and not arguments.quick:
        found = cold_start(num_layers=12)
        _print(found)
        entries.extend(found)
    versions = rounds.versions("jax", "torch", "transformers")
    rounds.print_summary("encoders", entries, arguments.results, versions=versions)


if __name__ == "__main__":
    main()
