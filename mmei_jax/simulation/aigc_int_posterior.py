"""The exact posterior of (emotion, intent) in AIGC-INT-Sim, for any set of modalities, in closed form.

Given manner k, displayed emotion z and intent i, the tokens of a modality are independent, so

    log p(x_m | z, k, i) = sum over tokens t of log(1 - rho + rho * N(x_t; mean, 1) / N(x_t; 0, 1))    (+ a constant)

and the joint posterior sums over manners, the conflict, and the shown emotion. An absent modality gives factor 1.
Everything is float64.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from mmei_jax.simulation.aigc_int import (
    AMPLITUDE,
    CONFLICT_RATE,
    DISPLAY_CLASS,
    EMOTION_PRIOR,
    EMOTIONS,
    INFORMATIVE_RATE,
    INTENT_SCALE,
    INTENTS,
    MANNER_PRIOR,
    MANNER_SCALE,
    MISLABEL_RATE,
    NUM_MANNERS,
    Tokens,
    basis,
    intent_given_emotion,
    token_means,
)
from mmei_jax.types import MODALITIES

# All sets of modalities, in the order in which they are reported.
SUBSETS: tuple[tuple[str, ...], ...] = (
    ("text",),
    ("vision",),
    ("audio",),
    ("vision", "text"),
    ("audio", "text"),
    ("vision", "audio"),
    ("vision", "audio", "text"),
)
# exp() is finite up to here; beyond it the share of uninformative tokens no longer counts.
_LARGEST_EXPONENT = 600.0


def log_sum_exp(values: Float[np.ndarray, "..."], axis: int | tuple[int, ...]) -> Float[np.ndarray, "..."]:
    """Log of the sum of exponentials along ``axis``; at least one value along it must be finite."""
    largest = values.max(axis=axis, keepdims=True)
    return np.log(np.exp(values - largest).sum(axis=axis)) + largest.squeeze(axis)


def prior() -> Float[np.ndarray, "emotions intents"]:
    """P(e, i), with kinds and user types, of which the tokens know nothing, summed out."""
    return EMOTION_PRIOR[:, None] * intent_given_emotion()


def evidence(
    tokens: Tokens, modality: str, amplitude: float | None = None
) -> Float[np.ndarray, "batch manners emotions intents"]:
    """Log p(x_m | k, z, i) up to a constant per record; exactly 0 everywhere for a record without this modality.

    Args:
        tokens: those of one modality; any floating type.
        modality: which one it is.
        amplitude: the a_m to assume; the frozen one by default.
    """
    amplitude = AMPLITUDE[modality] if amplitude is None else amplitude
    lengths = np.maximum(tokens.lengths, 0)
    dim = tokens.values.shape[1]
    # Rotated into the span of E, M and I, where the means have 14 coordinates: the rest of a token says nothing.
    rows = basis(modality, dim)
    directions = token_means(modality, dim, amplitude).reshape(-1, dim) @ rows.T
    half_square = 0.5 * amplitude**2 * (1.0 + MANNER_SCALE**2 + INTENT_SCALE**2)
    log_ratio = (tokens.values.astype(np.float64) @ rows.T) @ directions.T - half_square
    excess = np.maximum(log_ratio - _LARGEST_EXPONENT, 0.0)
    log_token = np.log(1.0 - INFORMATIVE_RATE + INFORMATIVE_RATE * np.exp(log_ratio - excess)) + excess
    total = np.zeros((len(lengths), log_token.shape[1]))
    is_present = lengths > 0
    if is_present.any():
        starts = np.cumsum(lengths) - lengths
        total[is_present] = np.add.reduceat(log_token, starts[is_present], axis=0)
    by_class = total.reshape(-1, NUM_MANNERS, len(EMOTIONS), len(INTENTS))
    manners = np.arange(NUM_MANNERS)[:, None]
    return by_class[:, manners, DISPLAY_CLASS[modality]]


def _mean_of_others(log_values: Float[np.ndarray, "batch manners emotions intents"]) -> np.ndarray:
    """Log of the mean over the six emotions that are not z, for each z."""
    largest = log_values.max(axis=2, keepdims=True)
    others = (1.0 - np.eye(len(EMOTIONS))) / (len(EMOTIONS) - 1)
    # A sum that rounds to 0 is e**-700 times smaller than the undisturbed case, to which it is added.
    with np.errstate(divide="ignore"):
        return np.log(others @ np.exp(log_values - largest)) + largest


def log_posterior(
    evidences: Mapping[str, Float[np.ndarray, "batch manners emotions intents"]], subset: Sequence[str] = MODALITIES
) -> Float[np.ndarray, "batch emotions intents"]:
    """Log p(e, i | tokens of the modalities in ``subset``), normalised.

    Args:
        evidences: what :func:`evidence` gave, for at least the modalities in ``subset``.
        subset: names of the modalities that are read.
    """
    total = np.sum([evidences[name] for name in subset], axis=0)
    # A conflict in a modality that is not read leaves no trace.
    undisturbed = 1.0 - CONFLICT_RATE * len(subset) / len(MODALITIES)
    terms = [np.log(undisturbed) + total]
    for name in subset:
        disturbed = total - evidences[name] + _mean_of_others(evidences[name])
        terms.append(np.log(CONFLICT_RATE / len(MODALITIES)) + disturbed)
    given_manner = log_sum_exp(np.stack(terms), axis=0)
    given_shown = log_sum_exp(given_manner + np.log(MANNER_PRIOR)[:, None, None], axis=1)
    num_emotions = len(EMOTIONS)
    shown_given_emotion = np.full((num_emotions, num_emotions), MISLABEL_RATE / (num_emotions - 1))
    np.fill_diagonal(shown_given_emotion, 1.0 - MISLABEL_RATE)
    largest = given_shown.max(axis=1, keepdims=True)
    joint = np.log(shown_given_emotion @ np.exp(given_shown - largest)) + largest + np.log(prior())
    return joint - log_sum_exp(joint, axis=(1, 2))[:, None, None]


def product_of_unimodal(
    unimodal: Sequence[Float[np.ndarray, "batch ..."]], log_prior: Float[np.ndarray, "..."]
) -> Float[np.ndarray, "batch ..."]:
    """Late fusion: the normalised product of unimodal posteriors, the prior counted once; in logs.

    Exact if modalities were independent given the predicted classes, which manner and conflicts make untrue.

    Args:
        unimodal: log posteriors of the same classes; equal to the prior where the modality is absent.
        log_prior: log probabilities of these classes.
    """
    product = np.sum(unimodal, axis=0) - (len(unimodal) - 1) * log_prior
    axes = tuple(range(1, product.ndim))
    return product - log_sum_exp(product, axis=axes).reshape(-1, *[1] * len(axes))
