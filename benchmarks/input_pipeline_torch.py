"""The torch sides of ``benchmarks/input_pipeline.py``."""

import pickle
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from benchmarks import rounds
from benchmarks.input_pipeline import BATCH_SIZE, DIM, MAX_TOKENS, NUM_EPOCHS, Case, HostBatch, summarize

# Without an accelerator, pinned memory does not exist: it is not among the settings.
WORKER_SETTINGS: tuple[dict[str, Any], ...] = (
    {"num_workers": 0},
    {"num_workers": 1, "persistent_workers": False, "prefetch_factor": 2},
    {"num_workers": 2, "persistent_workers": False, "prefetch_factor": 2},
    {"num_workers": 1, "persistent_workers": True, "prefetch_factor": 2},
    {"num_workers": 2, "persistent_workers": True, "prefetch_factor": 2},
    {"num_workers": 1, "persistent_workers": True, "prefetch_factor": 8},
    {"num_workers": 2, "persistent_workers": True, "prefetch_factor": 8},
)


class MemoryMapped(Dataset):
    """Single records of memory-mapped arrays."""

    def __init__(self, case: Case):
        self.arrays = {}
        for name, most in MAX_TOKENS.items():
            # Copy on write, because torch warns about memory that it may not write to. A plain array over the map,
            # because indexing one is faster than indexing np.memmap.
            flat = np.asarray(np.load(case.folder / "arrays" / f"{name}.npy", mmap_mode="c"))
            self.arrays[name] = flat.reshape(-1, most, DIM) if case.lengths == "fixed" else flat
        self.emotion = np.load(case.folder / "arrays" / "emotion.npy").tolist()
        self.num_tokens, self.starts = {}, {}
        for name in MAX_TOKENS:
            sizes = np.load(case.folder / "arrays" / f"{name}_num_tokens.npy")
            self.num_tokens[name], self.starts[name] = sizes.tolist(), (np.cumsum(sizes) - sizes).tolist()
        self.is_ragged = case.lengths == "ragged"

    def __len__(self) -> int:
        """Records."""
        return len(self.emotion)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One record; its features are views of the files."""
        record: dict[str, Any] = {"record_index": index, "emotion": self.emotion[index]}
        for name, array in self.arrays.items():
            if self.is_ragged:
                start = self.starts[name][index]
                record[name] = array[start : start + self.num_tokens[name][index]]
            else:
                record[name] = array[index]
        return record


class Pickled(Dataset):
    """One pickle file per record."""

    def __init__(self, case: Case):
        self.paths = [str(case.folder / "pickles" / f"{index}.pickle") for index in range(case.num_records)]

    def __len__(self) -> int:
        """Records."""
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One record."""
        with open(self.paths[index], "rb") as file:
            return {"record_index": index, **pickle.load(file)}


class Batched(MemoryMapped):
    """Whole batches of memory-mapped arrays."""

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Any]:
        """The batch, collated."""
        if self.is_ragged:
            return collate_padded([self[index] for index in indices])
        rows = np.asarray(indices)
        features = {name: torch.from_numpy(array[rows]) for name, array in self.arrays.items()}
        emotion = torch.tensor([self.emotion[index] for index in indices])
        return {"record_index": torch.from_numpy(rows), "emotion": emotion, **features}


def collate_padded(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Pads to the most tokens, as the other side does, and gives masks."""
    batch: dict[str, Any] = {
        key: torch.tensor([record[key] for record in records]) for key in ("record_index", "emotion")
    }
    for name, most in MAX_TOKENS.items():
        features = torch.zeros((len(records), most, DIM), dtype=torch.float16)
        for row, record in enumerate(records):
            features[row, : len(record[name])] = torch.from_numpy(record[name])
        num_tokens = torch.tensor([len(record[name]) for record in records])
        batch[name] = features
        batch[f"{name}_mask"] = torch.arange(most) < num_tokens[:, None]
    return batch


def memory_mapped(case: Case) -> rounds.Ready:
    """Single records over memory maps."""
    return _side(case, MemoryMapped(case), collate_padded if case.lengths == "ragged" else default_collate)


def pickled(case: Case) -> rounds.Ready:
    """Single records, one pickle file each."""
    return _side(case, Pickled(case), collate_padded if case.lengths == "ragged" else default_collate)


def batched(case: Case) -> rounds.Ready:
    """Whole batches over memory maps."""
    return _side(case, Batched(case), _as_it_is)


def _as_it_is(batch: dict[str, Any]) -> dict[str, Any]:
    return batch


def _side(case: Case, dataset: Dataset, collate: Any) -> rounds.Ready:
    def open_loader(settings: dict[str, Any]) -> DataLoader:
        generator = torch.Generator().manual_seed(0)
        # The default of Linux; a process of this harness, which was spawned, would spawn its workers too.
        context = "fork" if settings["num_workers"] else None
        return DataLoader(
            dataset,
            BATCH_SIZE,
            shuffle=True,
            generator=generator,
            collate_fn=collate,
            multiprocessing_context=context,
            **settings,
        )

    seconds = {}
    for position, settings in enumerate(WORKER_SETTINGS[: 3 if case.is_quick else None]):
        loader = open_loader(settings)
        for _ in loader:
            pass
        seconds[position] = _seconds(loader)
    best = min(seconds, key=seconds.__getitem__)
    loader = open_loader(WORKER_SETTINGS[best])
    evidence = summarize(case, (_to_host(batch) for batch in _epochs(loader)))
    tried = {_describe(WORKER_SETTINGS[position]): round(value, 3) for position, value in seconds.items()}
    settings = {**WORKER_SETTINGS[best], "threads": torch.get_num_threads(), "pre_run_seconds": tried}
    return rounds.Ready(lambda: _seconds(loader), evidence, settings)


def _describe(settings: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in settings.items())


def _epochs(loader: DataLoader) -> Iterator[dict[str, Any]]:
    for _ in range(NUM_EPOCHS):
        yield from loader


def _seconds(loader: DataLoader) -> float:
    started = time.perf_counter()
    for _ in _epochs(loader):
        pass
    return time.perf_counter() - started


def _to_host(batch: dict[str, Any]) -> HostBatch:
    return HostBatch(
        record_index=batch["record_index"].numpy(),
        emotion=batch["emotion"].numpy(),
        features={name: batch[name].numpy() for name in MAX_TOKENS},
        num_tokens={name: batch[f"{name}_mask"].sum(dim=1).numpy() for name in MAX_TOKENS if f"{name}_mask" in batch},
    )
