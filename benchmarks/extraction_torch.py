"""The peer of ``extraction``: a loop of PyAV, Hugging Face's processors and its models in torch, batch by batch.

Written as most scripts for it are, and then given what costs a line each: fused attention, inference mode, the fast
tokenizer, no pooling layers, as many threads as serve it best. Batches are padded to their longest clip.
"""

import dataclasses
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks import rounds
from benchmarks.extraction_cases import CHECKPOINTS, MAX_TOKENS, Case, Features
from benchmarks.extraction_pyav import SAMPLE_RATE_HZ, Media, decode
from mmei_jax.host_memory import keep_freed_memory

# Clips by which the number of threads is chosen.
_NUM_TRIAL_CLIPS = 40


class Encoders:
    """Processors and models of the three modalities."""

    def __init__(self, case: Case) -> None:
        transformers.utils.logging.disable_progress_bar()
        folder = case.encoders / CHECKPOINTS
        self.images = transformers.ViTImageProcessorPil.from_pretrained(folder / "vision")
        self.sounds = transformers.Wav2Vec2FeatureExtractor.from_pretrained(folder / "audio")
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "text", use_fast=True)
        sdpa: dict[str, Any] = {"attn_implementation": "sdpa"}
        self.vit = transformers.ViTModel.from_pretrained(folder / "vision", add_pooling_layer=False, **sdpa).eval()
        self.wav2vec2 = transformers.Wav2Vec2Model.from_pretrained(folder / "audio", **sdpa).eval()
        self.bert = transformers.BertModel.from_pretrained(folder / "text", add_pooling_layer=False, **sdpa).eval()

    def encode(self, rows: Sequence[dict[str, str]], media: Sequence[Media]) -> Features:
        """Features of a batch of clips by modality and id, without padding."""
        found: Features = {"vision": {}, "audio": {}, "text": {}}
        seen = [(row["id"], one.frames) for row, one in zip(rows, media, strict=True) if one.frames]
        if seen:
            frames = [frame for _, own in seen for frame in own]
            pixels = self.images(frames, return_tensors="pt", input_data_format="channels_last")
            states = self.vit(**pixels).last_hidden_state[:, 0].numpy()
            ends = np.cumsum([len(own) for _, own in seen])
            for (key, own), end in zip(seen, ends, strict=True):
                found["vision"][key] = states[end - len(own) : end]
        heard = [(row["id"], one.samples) for row, one in zip(rows, media, strict=True) if one.samples is not None]
        if heard:
            waveforms = [samples for _, samples in heard]
            inputs = self.sounds(waveforms, sampling_rate=SAMPLE_RATE_HZ, padding=True, return_tensors="pt")
            states = self.wav2vec2(**inputs).last_hidden_state.numpy()
            lengths = self.wav2vec2._get_feat_extract_output_lengths(inputs["attention_mask"].sum(dim=1)).tolist()
            for (key, _), own, length in zip(heard, states, lengths, strict=True):
                found["audio"][key] = own[:length]
        said = [(row["id"], row["text"]) for row in rows if row["text"]]
        if said:
            texts = [text for _, text in said]
            inputs = self.tokenizer(texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
            states = self.bert(**inputs).last_hidden_state.numpy()
            for (key, _), own, length in zip(said, states, inputs["attention_mask"].sum(dim=1).tolist(), strict=True):
                found["text"][key] = own[:length]
        return found


def loop(case: Case) -> rounds.Ready:
    """Decodes a batch, encodes it, writes it; one after the other."""
    return _side(case, num_ahead=0)


def loop_decoding_ahead(case: Case) -> rounds.Ready:
    """The same, with threads that decode ahead."""
    return _side(case, num_ahead=case.num_threads)


def _side(case: Case, num_ahead: int) -> rounds.Ready:
    keep_freed_memory()
    seconds: dict[int, float] = {}
    trial = dataclasses.replace(case, num_clips=min(case.num_clips, _NUM_TRIAL_CLIPS))
    _timed(trial, num_ahead)
    for num_threads in sorted({1, torch.get_num_threads()}):
        torch.set_num_threads(num_threads)
        seconds[num_threads] = min(_timed(trial, num_ahead) for _ in range(1 if case.is_quick else 2))
    best = min(seconds, key=seconds.__getitem__)
    torch.set_num_threads(best)
    settings = {
        "threads": best,
        "threads that decode ahead": num_ahead,
        "clips per batch": case.batch_size,
        "attention": "sdpa",
        "pre_run_seconds": {f"threads={number}": round(value, 3) for number, value in seconds.items()},
        **rounds.versions("torch", "transformers", "av"),
    }
    with tempfile.TemporaryDirectory() as folder:
        evidence = extract(case, num_ahead, Path(folder), keeps=True)
    return rounds.Ready(lambda: _timed(case, num_ahead), evidence, settings)


def _timed(case: Case, num_ahead: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        extract(case, num_ahead, Path(folder))
        return time.perf_counter() - started


def extract(case: Case, num_ahead: int, folder: Path, *, keeps: bool = False) -> Features:
    """Loads the models and writes the features of all clips, a file per batch; returns them as well if ``keeps``."""
    kept: Features = {"vision": {}, "audio": {}, "text": {}}
    encoders, rows = Encoders(case), case.rows()
    with torch.inference_mode():
        for start, media in _decoded(case, rows, num_ahead):
            batch = encoders.encode(rows[start : start + case.batch_size], media)
            arrays: dict[str, Any] = {
                f"{name}/{key}": states for name, own in batch.items() for key, states in own.items()
            }
            np.savez(folder / f"{start}.npz", **arrays)
            for name, own in batch.items() if keeps else ():
                kept[name].update(own)
    return kept


def _decoded(case: Case, rows: Sequence[dict[str, str]], num_ahead: int) -> Iterator[tuple[int, list[Media]]]:
    """Each batch's start and its media."""
    batches = [(start, rows[start : start + case.batch_size]) for start in range(0, len(rows), case.batch_size)]
    if not num_ahead:
        for start, own in batches:
            yield start, [_media(case, row) for row in own]
        return
    with ThreadPoolExecutor(num_ahead) as pool:
        ahead: deque[Any] = deque()
        for index, (start, _) in enumerate(batches):
            # Two batches beside the one that is encoded.
            for _, own in batches[0 if index == 0 else index + 2 : index + 3]:
                ahead.append([pool.submit(_media, case, row) for row in own])
            yield start, [future.result() for future in ahead.popleft()]


def _media(case: Case, row: dict[str, str]) -> Media:
    return decode(str(case.clips / row["path"])) if row["path"] else Media(None, None)
