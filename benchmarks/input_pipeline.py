"""How fast shuffled batches come from disk, ours against torch's DataLoader: python -m benchmarks.input_pipeline.

Each side passes twice over the same records and shuffles each time; what is timed starts when the first batch is
asked for and ends when the last one is there. Batches carry float16 features, as they are stored, label and record
index; ours token masks besides, torch's only where lengths differ. Files are in the system's page cache, as they are
from the second epoch on, and are mapped or listed before the clock starts. Every side takes the best of its settings,
found by a pre-run.

Ours: ``ours`` is the iterator that training reads from, ``jax.Array``s on the CPU device; ``ours, host`` stops before
that, at NumPy arrays in memory: what torch's tensors are.

Peers (``benchmarks/input_pipeline_torch.py``):

* ``torch memmap``: a dataset of single records over memory-mapped arrays;
* ``torch pickle``: the same over one pickle file per record;
* ``torch batched``: a dataset that reads a whole batch by fancy indexing (``__getitems__``).
"""

import argparse
import contextlib
import pickle
import tempfile
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import rounds

DIM = 768
# Tokens of the longest record by modality: 98 x 768 float16 are 150.5 kB.
MAX_TOKENS = {"vision": 16, "audio": 50, "text": 32}
BATCH_SIZE = 32
NUM_EPOCHS = 2
NUM_EMOTIONS = 7
GOALS = {("fixed", "torch memmap"): 1.2, ("fixed", "torch pickle"): 2.0}
OUR_HOST = "ours, host"
READER_THREADS = (1, 2)
SIDES = {
    rounds.OURS: "benchmarks.input_pipeline:ours",
    OUR_HOST: "benchmarks.input_pipeline:ours_on_host",
    "torch memmap": "benchmarks.input_pipeline_torch:memory_mapped",
    "torch pickle": "benchmarks.input_pipeline_torch:pickled",
    "torch batched": "benchmarks.input_pipeline_torch:batched",
}


@dataclass(frozen=True)
class Case:
    """What is read.

    Attributes:
        folder: holds ``shards`` (ours), ``arrays`` and ``pickles`` (the peers').
        lengths: "fixed": every record has the most tokens; "ragged": 1 to the most, evenly, and padded in the batch.
        num_records: records per epoch.
        is_quick: whether torch tries only the first of its settings.
    """

    folder: Path
    lengths: str
    num_records: int
    is_quick: bool = False


@dataclass(frozen=True)
class HostBatch:
    """One batch of either side as NumPy arrays, to be compared; ``num_tokens`` by modality where lengths differ."""

    record_index: np.ndarray
    emotion: np.ndarray
    features: Mapping[str, np.ndarray]
    num_tokens: Mapping[str, np.ndarray]


def main() -> None:
    """Prints a table, and as the last line its JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.input_pipeline", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="240 records of fixed lengths, fewer settings, 2 rounds")
    parser.add_argument("--cases", nargs="+", choices=["fixed", "ragged"], default=["fixed", "ragged"])
    parser.add_argument("--results", help="JSON file to write; none by default")
    options = parser.parse_args()
    num_records, num_rounds = (240, 2) if options.quick else (2000, 9)
    cases = []
    for lengths in options.cases[: 1 if options.quick else None]:
        with tempfile.TemporaryDirectory() as folder:
            case = Case(Path(folder), lengths, num_records, is_quick=options.quick)
            make_data(case)
            timing = rounds.measure_sides(SIDES, case, num_rounds=num_rounds, agree=agree, is_quick=options.quick)
        _print_rates(case, timing)
        peers = [name for name in SIDES if name not in (rounds.OURS, OUR_HOST)]
        cases += [_record(case, timing, our, peer) for our in (rounds.OURS, OUR_HOST) for peer in peers]
    versions = rounds.versions("jax", "jaxlib", "grain", "numpy", "pyarrow", "torch")
    rounds.print_summary("input_pipeline", cases, options.results, versions=versions)


def make_data(case: Case) -> None:
    """Writes the same records as shards, as ``.npy`` arrays (tokens end to end) and as pickles."""
    from mmei_jax.records import (
        DatasetSpec,
        DatasetWriter,
        LabelSpec,
        MaskedColumn,
        ModalitySpec,
        Ragged,
        RecordColumns,
    )

    generator = np.random.default_rng(0)
    emotion = generator.integers(0, NUM_EMOTIONS, case.num_records)
    num_tokens = {
        name: np.full(case.num_records, most)
        if case.lengths == "fixed"
        else generator.integers(1, most + 1, case.num_records)
        for name, most in MAX_TOKENS.items()
    }
    features = {
        name: generator.random((int(sizes.sum()), DIM), np.float32).astype(np.float16)
        for name, sizes in num_tokens.items()
    }
    spec = DatasetSpec(
        name="benchmark",
        description="random features",
        source="benchmarks/input_pipeline.py",
        licence="Apache-2.0",
        modalities={name: ModalitySpec(DIM, "float16") for name in MAX_TOKENS},
        labels={"emotion": LabelSpec("categorical", tuple(f"emotion{index}" for index in range(NUM_EMOTIONS)))},
    )
    columns = RecordColumns(
        ids=[f"record{index}" for index in range(case.num_records)],
        features={name: Ragged(features[name], num_tokens[name]) for name in MAX_TOKENS},
        labels={"emotion": MaskedColumn(emotion.astype(np.int32))},
    )
    # Validation and test are not read; a data set that is trained on has them.
    with DatasetWriter(case.folder / "shards", spec) as writer:
        for split in ("train", "validation", "test"):
            writer.write_columns(split, columns)
    for kind in ("arrays", "pickles"):
        (case.folder / kind).mkdir()
    np.save(case.folder / "arrays" / "emotion.npy", emotion)
    for name in MAX_TOKENS:
        np.save(case.folder / "arrays" / f"{name}.npy", features[name])
        np.save(case.folder / "arrays" / f"{name}_num_tokens.npy", num_tokens[name])
    starts = {name: np.cumsum(sizes) - sizes for name, sizes in num_tokens.items()}
    for index in range(case.num_records):
        record: dict[str, Any] = {
            name: features[name][starts[name][index] : starts[name][index] + num_tokens[name][index]]
            for name in MAX_TOKENS
        }
        content = pickle.dumps({**record, "emotion": int(emotion[index])}, protocol=pickle.HIGHEST_PROTOCOL)
        (case.folder / "pickles" / f"{index}.pickle").write_bytes(content)


def ours(case: Case) -> rounds.Ready:
    """The package's own reader, as training opens it."""
    return _our_side(case, is_placed=True)


def ours_on_host(case: Case) -> rounds.Ready:
    """The same reader without the last stage, which places batches on devices."""
    return _our_side(case, is_placed=False)


def _our_side(case: Case, *, is_placed: bool) -> rounds.Ready:
    # Here and not at the top: the torch sides' processes import this module too.
    import jax

    num_batches = NUM_EPOCHS * case.num_records // BATCH_SIZE

    def batches(iterator: Any) -> Iterator[Any]:
        # Batches that were read ahead during others' turns are dropped, so that all of them are read on the clock.
        iterator.set_state(iterator.get_state())
        for _ in range(num_batches):
            yield jax.block_until_ready(next(iterator))

    def seconds(iterator: Any) -> float:
        started = time.perf_counter()
        for _ in batches(iterator):
            pass
        return time.perf_counter() - started

    tried = {}
    for num_threads in READER_THREADS:
        with contextlib.closing(_open_iterator(case, num_threads, is_placed)) as iterator:
            seconds(iterator)
            tried[num_threads] = seconds(iterator)
    best = min(tried, key=tried.__getitem__)
    iterator = _open_iterator(case, best, is_placed)
    evidence = summarize(case, (_to_host(batch) for batch in batches(iterator)))
    pre_run = {f"num_reader_threads={number}": round(value, 3) for number, value in tried.items()}
    return rounds.Ready(lambda: seconds(iterator), evidence, {"num_reader_threads": best, "pre_run_seconds": pre_run})


def _open_iterator(case: Case, num_reader_threads: int, is_placed: bool) -> Any:
    import grain

    from configs import default
    from mmei_jax import input_pipeline
    from mmei_jax.batching import BatchReader
    from mmei_jax.config import parse
    from mmei_jax.packing import Arranger
    from mmei_jax.records import Dataset
    from mmei_jax.sharding import batch_sharding, make_mesh

    values = default.get_config()
    values.data.path = str(case.folder / "shards")
    values.data.batch_size = BATCH_SIZE
    values.data.max_tokens = {name: (most,) for name, most in MAX_TOKENS.items()}
    values.data.num_reader_threads = num_reader_threads
    values.loss.intent = values.loss.ranking = "none"
    config = parse(values.to_dict())
    dataset = Dataset.open(config.data.path)
    # Far more epochs than will be read.
    num_epochs = 10_000
    if is_placed:
        return input_pipeline.train_iterator(dataset, config, batch_sharding(make_mesh(config)), num_epochs=num_epochs)
    split = dataset.split("train")
    order = input_pipeline.ShuffledOrder(
        num_records=split.num_records,
        batch_size=BATCH_SIZE,
        num_batches=input_pipeline.num_steps(split.num_records, BATCH_SIZE, num_epochs),
        seed=config.seed,
    )
    arranger = Arranger(split, config.data, BATCH_SIZE)
    rows = {BATCH_SIZE: np.arange(BATCH_SIZE)}
    source = input_pipeline.BatchSource(order, arranger, BatchReader(split, config, None), rows)
    options = grain.ReadOptions(num_threads=num_reader_threads, prefetch_buffer_size=num_reader_threads)
    return iter(grain.MapDataset.source(source).to_iter_dataset(options))


def _to_host(batch: Any) -> HostBatch:
    sequences = batch.sequences()
    return HostBatch(
        record_index=np.asarray(batch.record_index),
        emotion=np.asarray(batch.emotion.value),
        features={name: np.asarray(sequence.features) for name, sequence in sequences.items()},
        num_tokens={name: np.asarray(sequence.segment_ids).sum(axis=1) for name, sequence in sequences.items()},
    )


def summarize(case: Case, batches: Iterable[HostBatch]) -> dict[str, Any]:
    """What the sides must agree on: which records each epoch holds, and each record's label and features to the bit.

    Raises:
        ValueError: the records of an epoch come in file order, or two epochs in the same order.
    """
    order: list[int] = []
    contents: dict[int, set[tuple[Any, ...]]] = {index: set() for index in range(case.num_records)}
    for batch in batches:
        for row, index in enumerate(batch.record_index.tolist()):
            order.append(index)
            content: list[Any] = [int(batch.emotion[row])]
            for name, values in batch.features.items():
                content += [name, str(values.dtype), values.shape[1:], zlib.crc32(np.ascontiguousarray(values[row]))]
                if case.lengths == "ragged":
                    content.append(int(batch.num_tokens[name][row]))
            contents[index].add(tuple(content))
    epochs = [order[start : start + case.num_records] for start in range(0, len(order), case.num_records)]
    if any(epoch == sorted(epoch) for epoch in epochs) or epochs[0] == epochs[-1]:
        raise ValueError("records are not shuffled anew in each epoch")
    return {"records of each epoch": [sorted(epoch) for epoch in epochs], "contents": contents}


def agree(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """Names the first thing in which the summaries of two sides differ; "" if they are the same."""
    if ours["records of each epoch"] != theirs["records of each epoch"]:
        return "the epochs hold different records"
    for index, content in ours["contents"].items():
        if content != theirs["contents"][index]:
            return f"record {index} is {sorted(content)} against {sorted(theirs['contents'][index])}"
    return ""


def _print_rates(case: Case, timing: rounds.Timing) -> None:
    print(f"{case.lengths} lengths, {case.num_records} records, batches of {BATCH_SIZE}:")
    for name, settings in timing.settings.items():
        rate = NUM_EPOCHS * case.num_records / timing.median_seconds(name)
        print(f"  {name:<14}{rate:>9,.0f} records/s   {dict(settings)}", flush=True)


def _record(case: Case, timing: rounds.Timing, our: str, peer: str) -> dict[str, Any]:
    """Both of ours are held to the goals."""
    chosen = rounds.Timing(
        seconds={rounds.OURS: timing.seconds[our], peer: timing.seconds[peer]},
        settings={rounds.OURS: timing.settings[our], peer: timing.settings[peer]},
        is_disturbed=timing.is_disturbed,
    )
    num_records = NUM_EPOCHS * case.num_records
    return rounds.case_record(
        f"{case.lengths} lengths, " + ("on the device" if our == rounds.OURS else "on the host"),
        chosen,
        peer,
        goal=GOALS.get((case.lengths, peer)),
        our_records_per_second=round(num_records / timing.median_seconds(our)),
        peer_records_per_second=round(num_records / timing.median_seconds(peer)),
    )


if __name__ == "__main__":
    main()
