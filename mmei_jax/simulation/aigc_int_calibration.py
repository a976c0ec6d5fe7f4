"""Calibration of AIGC-INT-Sim: how strongly each modality shows what it shows.

The amplitude a_m of a modality is set so that the exact posterior given that modality alone names the right emotion as
often as the paper's Table 1 reports for the unimodal models (text 81.2, vision 77.8, audio 74.3 %), over records in
which the modality is present. Nothing else is fitted. The result is frozen as :data:`aigc_int.AMPLITUDE`, before any
model is trained.
"""

import json
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from mmei_jax.command import CommandParser
from mmei_jax.simulation.aigc_int import AMPLITUDE, CHUNK_RECORDS, MIN_DIM, draw_latents, draw_tokens
from mmei_jax.simulation.aigc_int_posterior import evidence, log_posterior, log_sum_exp
from mmei_jax.types import MODALITIES, InputError

# Table 1 of the paper: emotion accuracy of the text, vision and audio models.
UNIMODAL_ACCURACY = {"vision": 0.778, "audio": 0.743, "text": 0.812}
# Seeds of their own: no data set is drawn from them unless it asks to.
CALIBRATION_SEED = 1_000_003
CHECK_SEED = 1_000_033
_AMPLITUDES = (0.5, 4.0)
_BRACKET = 0.1


class UnimodalAccuracy(NamedTuple):
    """Emotion accuracy, in [0, 1], of the exact posterior given one modality, where it is present.

    Attributes:
        measured: share of records whose most probable emotion is the true one.
        expected: mean probability of the most probable emotion. The posterior is exact, so it estimates the same,
            with half the sampling error.
    """

    measured: float
    expected: float


def measure_unimodal_accuracy(
    modality: str, num_records: int, *, seed: int, dim: int = MIN_DIM, amplitude: float | None = None
) -> UnimodalAccuracy:
    """Draws records and measures; the same seed gives the same latents and noise whatever the amplitude.

    Args:
        modality: the one that is read.
        num_records: how many to draw, with and without the modality; rounded up to whole chunks.
        seed: of the records.
        dim: features per token; the accuracy's distribution does not depend on it.
        amplitude: a_m, of both the tokens and the posterior; the frozen one by default.
    """
    num_correct = num_present = 0
    probability = 0.0
    for chunk in range(-(-num_records // CHUNK_RECORDS)):
        latents = draw_latents(seed, chunk)
        tokens = draw_tokens(seed, chunk, latents, modality, dim, amplitude)
        joint = log_posterior({modality: evidence(tokens, modality, amplitude)}, (modality,))
        is_present = tokens.lengths > 0
        posterior = log_sum_exp(joint, axis=2)[is_present]
        num_correct += int(np.sum(posterior.argmax(axis=1) == latents.emotion[is_present]))
        probability += float(np.exp(posterior.max(axis=1)).sum())
        num_present += len(posterior)
    return UnimodalAccuracy(num_correct / num_present, probability / num_present)


def bisect(rising: Callable[[float], float], target: float, low: float, high: float, tolerance: float) -> float:
    """The argument in [low, high] at which ``rising`` reaches ``target``, to within ``tolerance``.

    Raises:
        InputError: the target is not reached between ``low`` and ``high``.
    """
    if not rising(low) < target < rising(high):
        raise InputError(f"target {target}: not reached between {low} and {high}; more records give less noise")
    while high - low > tolerance:
        middle = 0.5 * (low + high)
        if rising(middle) < target:
            low = middle
        else:
            high = middle
    return 0.5 * (low + high)


def calibrate(modality: str, num_records: int, *, seed: int = CALIBRATION_SEED) -> float:
    """The amplitude a_m of one modality, by bisection with common random numbers.

    A tenth of the records brackets it, to within 0.2; all of them find it to within 0.001.
    """
    target = UNIMODAL_ACCURACY[modality]

    def accuracy_on(num: int) -> Callable[[float], float]:
        return lambda amplitude: measure_unimodal_accuracy(modality, num, seed=seed, amplitude=amplitude).expected

    coarse = bisect(accuracy_on(num_records // 10), target, *_AMPLITUDES, 0.01)
    return bisect(accuracy_on(num_records), target, coarse - _BRACKET, coarse + _BRACKET, 0.001)


def main(arguments: Sequence[str]) -> int:
    """The command ``calibrate``: prints one line of progress per modality, and the amplitudes as JSON at the end."""
    parser = CommandParser(
        prog="python -m mmei_jax.simulation.aigc_int calibrate",
        description="Calibrates the simulated evidence on the paper's unimodal accuracies. It prints what it finds and "
        "changes nothing: the amplitudes in use are constants of the code.",
    )
    parser.add_argument("--num_records", type=int, default=1_000_000, help="records per trial (default: %(default)s)")
    parser.add_argument("--num_check_records", type=int, default=1_000_000, help="fresh records for the check")
    options = parser.parse_args(arguments)
    if min(options.num_records, options.num_check_records) < 10 * CHUNK_RECORDS:
        print(f"error: --num_records and --num_check_records: expected at least {10 * CHUNK_RECORDS}", file=sys.stderr)
        return 2
    results = {}
    for modality in MODALITIES:
        amplitude = round(calibrate(modality, options.num_records), 3)
        accuracy = measure_unimodal_accuracy(modality, options.num_check_records, seed=CHECK_SEED, amplitude=amplitude)
        results[modality] = {
            "amplitude": amplitude,
            "frozen_amplitude": AMPLITUDE[modality],
            "accuracy_on_fresh_records": round(accuracy.measured, 5),
            "expected_accuracy_on_fresh_records": round(accuracy.expected, 5),
            "target": UNIMODAL_ACCURACY[modality],
        }
        print(f"{modality}: {results[modality]}", file=sys.stderr, flush=True)
    print(json.dumps(results, indent=1))
    return 0
