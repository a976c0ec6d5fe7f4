"""Runs an encoder and its Hugging Face original on the same inputs, where torch is installed."""

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mmei_jax.encoders.outputs import EncoderOutputs
from mmei_jax.encoders.pretrained_weights import Converted


def largest_differences(converted: Converted, folder: Path) -> dict[str, Any]:
    """The largest absolute difference of every stage's outputs, on the architecture's fixed example inputs.

    Padding, where the original holds numbers without a meaning, is not compared.

    Args:
        converted: the encoder.
        folder: where the original's files are.

    Returns:
        What was compared with which versions, the inputs' shapes, and by stage the largest difference.
    """
    family = converted.family
    inputs = family.example(converted.config)
    apply = jax.jit(family.make_module(converted.config).apply, static_argnames="with_hidden_states")
    ours = apply({"params": converted.parameters}, **inputs, with_hidden_states=True)
    theirs = _run_original(converted, inputs, folder)
    stages = named_stages(ours)
    is_valid = np.asarray(ours.is_valid)[..., None]
    differences = {}
    for name, expected in theirs.items():
        difference = np.abs(np.asarray(stages[name]) - expected)
        # Not of a pooled output, nor of a stage that has other tokens than the last.
        if difference.ndim == is_valid.ndim and difference.shape[:2] == is_valid.shape[:2]:
            difference = np.where(is_valid, difference, 0.0)
        differences[name] = float(difference.max())
    return {
        "with": {name: importlib.metadata.version(name) for name in ("transformers", "torch")},
        "input_shapes": {name: list(array.shape) for name, array in inputs.items()},
        "largest_absolute_difference": differences,
    }


def named_stages(outputs: EncoderOutputs) -> dict[str, Any]:
    """The outputs by name, hidden states by their number."""
    stages = {f"hidden_states[{index}]": states for index, states in enumerate(outputs.hidden_states or ())}
    stages["last_hidden_state"] = outputs.last_hidden_state
    if outputs.pooled is not None:
        stages["pooled"] = outputs.pooled
    return stages


def _run_original(converted: Converted, inputs: Mapping[str, np.ndarray], folder: Path) -> dict[str, np.ndarray]:
    """The original's outputs by stage. torch is reached through transformers alone: it is no dependency."""
    import transformers

    family = converted.family
    without_pooler = {} if family.pooler is None or converted.config.has_pooler else {"add_pooling_layer": False}
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        model = transformers.AutoModel.from_pretrained(folder, dtype="float32", local_files_only=True, **without_pooler)
    finally:
        transformers.logging.set_verbosity(verbosity)
        transformers.logging.enable_progress_bar()
    model.eval().requires_grad_(False)
    tensors = transformers.BatchFeature(family.original_inputs(inputs), tensor_type="pt")
    outputs = model(**tensors, output_hidden_states=True)
    stages = {f"hidden_states[{index}]": states for index, states in enumerate(outputs.hidden_states)}
    stages["last_hidden_state"] = outputs.last_hidden_state
    if outputs.get("pooler_output") is not None:
        stages["pooled"] = outputs.pooler_output.flatten(1)
    return {name: _as_tokens(states.numpy()) for name, states in stages.items()}


def _as_tokens(states: np.ndarray) -> np.ndarray:
    """Images, ``[frames, channels, height, width]``, as rows of tokens; what is none stays as it is."""
    if states.ndim != 4:
        return states
    return states.reshape(*states.shape[:2], -1).transpose(0, 2, 1)
