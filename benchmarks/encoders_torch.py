"""The peers of ``encoders``: Hugging Face's models in torch, attention by scaled_dot_product_attention."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks import rounds
from benchmarks.encoder_cases import Case, without_pooler
from mmei_jax.host_memory import keep_freed_memory

_MODELS = {"bert": "BertModel", "vit": "ViTModel", "wav2vec2": "Wav2Vec2Model"}


@dataclass(frozen=True)
class Setting:
    """One way to run the model.

    Attributes:
        rows_per_call: rows that one call takes.
        mode: of torch.compile; None runs operation by operation.
        is_frozen: whether the compiler takes the weights for constants.
        is_dynamic: whether one program serves rows of all lengths.
    """

    rows_per_call: int
    mode: str | None = None
    is_frozen: bool = False
    is_dynamic: bool = False


def eager(case: Case) -> rounds.Ready:
    """Rows of one length, operation by operation."""
    return _dense_side(case, [Setting(rows) for rows in case.rows_per_call])


def compiled(case: Case) -> rounds.Ready:
    """Rows of one length through TorchInductor; on CPUs with and without frozen, that is prepacked, weights."""
    mode = "max-autotune" if case.platform == "gpu" else "default"
    settings = [Setting(rows, mode) for rows in case.rows_per_call]
    if case.platform == "cpu":
        settings += [Setting(rows, mode, is_frozen=True) for rows in case.rows_per_call]
    return _dense_side(case, settings)


def padded(case: Case) -> rounds.Ready:
    """Texts in file order, each batch padded to its longest."""
    return _ragged_side(case, list(range(case.num_rows)))


def sorted_by_length(case: Case) -> rounds.Ready:
    """Texts sorted by length, each batch padded to its longest."""
    lengths = [len(text) for text in case.texts()]
    return _ragged_side(case, sorted(range(case.num_rows), key=lambda index: -lengths[index]))


def _device(case: Case) -> str:
    return "cuda" if case.platform == "gpu" else "cpu"


def load_model(family: str, folder: Path, **options: Any) -> Any:
    """Hugging Face's model of a checkpoint, without pooler.

    Args:
        family: "bert", "vit" or "wav2vec2".
        folder: of the checkpoint.
        options: entries of its configuration that are to be others.
    """
    transformers.utils.logging.disable_progress_bar()
    kind = getattr(transformers, _MODELS[family])
    return kind.from_pretrained(folder, attn_implementation="sdpa", **without_pooler(family), **options)


def _load(case: Case) -> Any:
    model = load_model(case.family, case.folder)
    return model.eval().to(_device(case), getattr(torch, case.compute_dtype))


def _build(case: Case, setting: Setting) -> Any:
    """The model as the setting says; compiled ones forget what was compiled for another setting."""
    model = _load(case)
    if setting.mode is None:
        return model
    torch.compiler.reset()
    options: dict[str, Any] = {"fullgraph": not setting.is_dynamic, "dynamic": setting.is_dynamic}
    if setting.is_frozen:
        # torch takes a mode or options; the default mode is one without options.
        return torch.compile(model, options={"freezing": True}, **options)
    return torch.compile(model, mode=setting.mode, **options)


def _dense_side(case: Case, settings: list[Setting]) -> rounds.Ready:
    (array,) = case.inputs().values()
    if case.family == "vit":
        array = array.transpose(0, 3, 1, 2)
    tensor = torch.from_numpy(np.ascontiguousarray(array)).to(_device(case))
    if case.family != "bert":
        tensor = tensor.to(getattr(torch, case.compute_dtype))
    parts = {setting: [(part,) for part in tensor.split(setting.rows_per_call)] for setting in settings}
    model, best, about = _fastest(case, parts)
    with torch.inference_mode():
        evidence = torch.cat([model(*part).last_hidden_state for part in parts[best]]).float().cpu().numpy()
    return rounds.Ready(lambda: _seconds(model, parts[best]), evidence, about)


def _ragged_side(case: Case, order: list[int]) -> rounds.Ready:
    texts = case.texts()
    settings = [Setting(rows) for rows in case.rows_per_call]
    if case.compiles_ragged:
        settings += [Setting(rows, "default", is_dynamic=True) for rows in case.rows_per_call]
    parts = {setting: _pad(texts, order, setting.rows_per_call, _device(case)) for setting in settings}
    model, best, about = _fastest(case, parts)
    with torch.inference_mode():
        first = torch.cat([model(*part).last_hidden_state[:, 0] for part in parts[best]]).float().cpu().numpy()
    evidence = np.empty_like(first)
    evidence[order] = first
    return rounds.Ready(lambda: _seconds(model, parts[best]), evidence, about)


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


def _fastest(case: Case, parts: dict[Setting, Sequence[Any]]) -> tuple[Any, Setting, dict[str, Any]]:
    """The model at its fastest setting, warm, that setting, and what is printed about it."""
    keep_freed_memory()
    seconds, model = {}, None
    for setting, batches in parts.items():
        model = _build(case, setting)
        _seconds(model, batches)
        seconds[setting] = min(_seconds(model, batches) for _ in range(2))
    best = min(seconds, key=seconds.__getitem__)
    if best != setting:
        model = _build(case, best)
        _seconds(model, parts[best])
    about = {
        "device": torch.cuda.get_device_name() if case.platform == "gpu" else "cpu",
        "threads": torch.get_num_threads(),
        "attention": "sdpa",
        "dtype": case.compute_dtype,
        "chosen": str(best),
        "pre_run_seconds": {str(setting): round(value, 3) for setting, value in seconds.items()},
        **rounds.versions("torch", "transformers"),
    }
    return model, best, about


def _seconds(model: Any, parts: Sequence[Any]) -> float:
    started = time.perf_counter()
    with torch.inference_mode():
        for part in parts:
            states = model(*part).last_hidden_state
        if states.is_cuda:
            torch.cuda.synchronize()
    return time.perf_counter() - started
