"""Is a train step from raw media as fast as the same step in PyTorch with Hugging Face's encoders?

    python -m benchmarks.end_to_end [--quick] [--case=WORDS] [--results=benchmarks/results/DATE_end_to_end.json]

The step is that of ``configs/end_to_end.py``: ViT-B, Wav2Vec2-B (its front end frozen) and BERT-B before the model of
``fusion_step``, 8 frames of 224 x 224 pixels, 4 seconds of sound at 16 kHz and 64 tokens a clip, of full length; the
encoders learn at a tenth of the rate; emotion, intent and in-batch ranking; normalisation of pixels and samples,
dropout of the fusion, backward pass, clipping, AdamW and the report to the host. Activations are kept, not computed
again. Batches lie on the device. The checkpoints are of the base size with random weights, made once and read by both
sides (``end_to_end_torch``). Before anything is measured, updates without dropout must give both sides the same losses
and gradients (``agreement``). Ours is measured beside one peer at a time, so that two processes share the memory.
"""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import fusion_step, rounds
from benchmarks.end_to_end_cases import CASES, QUICK_CASES, Case, save_checkpoints


def measure_case(case: Case, *, num_rounds: int, is_quick: bool = False) -> list[dict[str, Any]]:
    """One entry for each peer of the case.

    Raises:
        rounds.SidesDiffer: the losses or gradients of the first updates differ.
    """
    entries = []
    with tempfile.TemporaryDirectory() as folder:
        case = dataclasses.replace(case, folder=Path(folder))
        # In a process of its own: torch's threads stay out of this one.
        rounds.in_new_process(save_checkpoints, case)
        for peer, goal in case.goals.items():
            alone = dataclasses.replace(case, goals={peer: goal})
            entries += fusion_step.measure_case(alone, num_rounds=num_rounds, is_quick=is_quick)
    return entries


def main() -> None:
    """Measures every case, prints a table, and a JSON line at the end."""
    fusion_step.run_command(
        "end_to_end",
        __doc__,
        cases=CASES,
        quick_cases=QUICK_CASES,
        measure=measure_case,
        packages=("jax", "torch", "transformers"),
    )


if __name__ == "__main__":
    main()
