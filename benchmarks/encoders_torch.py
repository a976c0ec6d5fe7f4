"""The peers of ``encoders``: Hugging Face's models in torch, attention by scaled_dot_product_attention."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks import rounds
from benchmarks.encoder_cases import Case

_MODELS = {"bert": "BertModel", "vit": "ViTModel", "wav2vec2": "Wav2Vec2Model"}
# A call of the model, and what it reads; gives the last hidden states.
Run = Callable[[Any], torch.Tensor]


def eager(case: Case) -> rounds.Ready:
    """Rows of one length, operation by operation."""
    model = _load(case)
    return _dense_side(case, {f"rows_per_call={rows}": (model, rows) for rows in case.rows_per_call})


def compiled(case: Case) -> rounds.Ready:
    """Rows of one length through TorchInductor; on CPUs with and without frozen, that is prepacked, weights."""
    mode = "max-autotune" if case.platform == "gpu" else "default"
    candidates = {
        f"mode={mode}, rows_per_call={rows}": (torch.compile(_load(case), mode=mode, fullgraph=True), rows)
        for rows in case.rows_per_call
    }
    if case.platform == "cpu":
        for rows in case.rows_per_call:
            model = torch.compile(_load(case), mode=mode, fullgraph=True)
            candidates[f"mode={mode}, freezing, rows_per_call={rows}"] = (_frozen(model), rows)
    return _dense_side(case, candidates)


def padded(case: Case) -> rounds.Ready:
    """Texts in file order, each batch padded to its longest."""
    return _ragged_side(case, list(range(case.num_rows)))


def sorted_by_length(case: Case) -> rounds.Ready:
    """Texts sorted by length, each batch padded to its longest."""
    lengths = [len(text) for text in case.texts()]
    return _ragged_side(case, sorted(range(case.num_rows), key=lambda index: -lengths[index]))


def _device(case: Case) -> str:
    return "cuda" if case.platform == "gpu" else "cpu"


def _load(case: Case) -> Any:
    transformers.utils.logging.disable_progress_bar()
    model = getattr(transformers, _MODELS[case.family]).from_pretrained(case.folder, attn_implementation="sdpa")
    return model.eval().to(_device(case), getattr(torch, case.compute_dtype))


def _frozen(model: Any) -> Any:
    """Compiles, at the first call of a shape, with the weights taken for constants."""

    def run(*arguments: Any) -> Any:
        with torch._inductor.config.patch(freezing=True):
            return model(*arguments)

    return run


def _dense_side(case: Case, candidates: dict[str, tuple[Any, int]]) -> rounds.Ready:
    (array,) = case.inputs().values()
    if case.family == "vit":
        array = array.transpose(0, 3, 1, 2)
    tensor = torch.from_numpy(np.ascontiguousarray(array)).to(_device(case))
    if case.family != "bert":
        tensor = tensor.to(getattr(torch, case.compute_dtype))
    calls = {
        name: (model, [(part,) for part in tensor.split(num_rows)]) for name, (model, num_rows) in candidates.items()
    }
    best, seconds = _fastest(calls)
    model, parts = calls[best]
    with torch.no_grad():
        evidence = torch.cat([model(*part).last_hidden_state for part in parts]).float().cpu().numpy()
    return rounds.Ready(lambda: _seconds(model, parts), evidence, _settings(case, best, seconds))


def _ragged_side(case: Case, order: list[int]) -> rounds.Ready:
    texts = case.texts()
    model = _load(case)
    batches = {rows: _pad(texts, order, rows, _device(case)) for rows in case.rows_per_call}
    calls: dict[str, tuple[Any, Sequence[Any]]] = {
        f"eager, rows_per_call={rows}": (model, parts) for rows, parts in batches.items()
    }
    if case.compiles_ragged:
        dynamic = torch.compile(_load(case), dynamic=True)
        calls |= {
            f"compiled, dynamic shapes, rows_per_call={rows}": (dynamic, parts) for rows, parts in batches.items()
        }
    best, seconds = _fastest(calls)
    model, parts = calls[best]
    with torch.no_grad():
        first = torch.cat([model(*part).last_hidden_state[:, 0] for part in parts]).float().cpu().numpy()
    evidence = np.empty_like(first)
    evidence[order] = first
    return rounds.Ready(lambda: _seconds(model, parts), evidence, _settings(case, best, seconds))


def _pad(texts: Sequence[Sequence[int]], order: Sequence[int], num_rows: int, device: str) -> list[Any]:
    """Token ids and masks of each batch, on the device."""
    batches = []
    for start in range(0, len(order), num_rows):
        chosen = [texts[index] for index in order[start : start + num_rows]]
        longest = max(len(text) for text in chosen)
        ids = torch.zeros((len(chosen), longest), dtype=torch.int64)
        mask = torch.zeros((len(chosen), longest), dtype=torch.int64)
        for row, text in enumerate(chosen):
            ids[row, : len(text)] = torch.tensor(text)
            mask[row, : len(text)] = 1
        batches.append((ids.to(device), mask.to(device)))
    return batches


def _fastest(calls: dict[str, tuple[Any, Sequence[Any]]]) -> tuple[str, dict[str, float]]:
    """The name of the fastest call, and the seconds of each, all of them warm."""
    seconds = {}
    for name, (model, parts) in calls.items():
        _seconds(model, parts)
        seconds[name] = min(_seconds(model, parts) for _ in range(2))
    return min(seconds, key=seconds.__getitem__), {name: round(value, 3) for name, value in seconds.items()}


def _seconds(model: Any, parts: Sequence[Any]) -> float:
    started = time.perf_counter()
    with torch.no_grad():
        for part in parts:
            states = model(*part).last_hidden_state
        if states.is_cuda:
            torch.cuda.synchronize()
    return time.perf_counter() - started


def _settings(case: Case, best: str, seconds: dict[str, float]) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name() if case.platform == "gpu" else "cpu",
        "threads": torch.get_num_threads(),
        "attention": "sdpa",
        "dtype": case.compute_dtype,
        "chosen": best,
        "pre_run_seconds": seconds,
        **rounds.versions("torch", "transformers"),
    }
