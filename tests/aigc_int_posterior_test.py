"""The exact posterior of AIGC-INT-Sim, against an enumeration of the generative story."""

import math

import numpy as np

from mmei_jax.simulation import (
    aigc_int,
    aigc_int_posterior,
)
from mmei_jax.types import MODALITIES


def likelihood_tables(tokens: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """p(tokens | k, z, i) of one record over that of pure noise, in float64, from whole token vectors."""
    num_emotions, num_intents = len(aigc_int.EMOTIONS), len(aigc_int.INTENTS)
    likelihood = {}
    for name in MODALITIES:
        rows = aigc_int.basis(name, tokens[name].shape[1])
        table = np.ones((3, num_emotions, num_intents))
        for k in range(3):
            for z in range(num_emotions):
                shown = rows[aigc_int.DISPLAY_CLASS[name][k][z]]
                for i in range(num_intents):
                    mean = aigc_int.AMPLITUDE[name] * (shown + 0.5 * rows[7 + k] + 0.3 * rows[10 + i])
                    for token in tokens[name].astype(np.float64):
                        ratio = math.exp(0.5 * float(token @ token) - 0.5 * float((token - mean) @ (token - mean)))
                        table[k, z, i] *= 0.2 + 0.8 * ratio
        likelihood[name] = table
    return likelihood


def enumerate_joint(likelihood: dict[str, np.ndarray], subset: tuple[str, ...]) -> np.ndarray:
    """p(e, i | tokens) of one record by walking through the generative story, every latent explicit.

    Nothing is shared with the module under test but its constants.
    """
    num_emotions, num_intents = len(aigc_int.EMOTIONS), len(aigc_int.INTENTS)
    given_shown = np.zeros((num_emotions, num_intents))
    for s in range(num_emotions):
        for k, p_manner in enumerate((0.5, 0.3, 0.2)):
            for conflict in (None, *MODALITIES):
                for z in [z for z in range(num_emotions) if z != s] if conflict else [s]:
                    p_conflict = 0.2 / 3 / 6 if conflict else 0.8
                    for i in range(num_intents):
                        p_tokens = 1.0
                        for name in subset:
                            p_tokens *= likelihood[name][k, z if name == conflict else s, i]
                        given_shown[s, i] += p_manner * p_conflict * p_tokens
    joint = np.zeros((num_emotions, num_intents))
    for e, p_emotion in enumerate((0.24, 0.18, 0.16, 0.14, 0.11, 0.09, 0.08)):
        for i in range(num_intents):
            p_intent = 0.7 if i == aigc_int.FAVOURITE_INTENT[e] else 0.1
            for s in range(num_emotions):
                p_shown = 0.95 if s == e else 0.05 / 6
                joint[e, i] += p_emotion * p_intent * p_shown * given_shown[s, i]
    return joint / joint.sum()


def test_posterior_equals_enumeration_of_the_story_for_every_subset() -> None:
    chunk = next(aigc_int.stream(3, 100, 16))
    evidences = {name: aigc_int_posterior.evidence(chunk.tokens[name], name) for name in MODALITIES}
    ends = {name: np.cumsum(np.maximum(chunk.tokens[name].lengths, 0)) for name in MODALITIES}
    exact = {
        subset: np.exp(aigc_int_posterior.log_posterior(evidences, subset)) for subset in aigc_int_posterior.SUBSETS
    }
    assert len(exact) == 7
    assert not chunk.latents.is_present().all()
    for record in range(100):
        tokens = {}
        for name in MODALITIES:
            length = max(int(chunk.tokens[name].lengths[record]), 0)
            tokens[name] = chunk.tokens[name].values[ends[name][record] - length : ends[name][record]]
        likelihood = likelihood_tables(tokens)
        for subset, posterior in exact.items():
            np.testing.assert_allclose(posterior[record], enumerate_joint(likelihood, subset), rtol=1e-6, atol=0.0)


def test_posterior_of_a_record_without_any_modality_is_the_prior() -> None:
    tokens = aigc_int.Tokens(np.zeros((0, 20), np.float32), np.array([-1, -1]))
    evidences = {name: aigc_int_posterior.evidence(tokens, name) for name in MODALITIES}
    posterior = np.exp(aigc_int_posterior.log_posterior(evidences))
    np.testing.assert_allclose(posterior, np.broadcast_to(aigc_int_posterior.prior(), posterior.shape), atol=1e-12)


def test_posterior_stays_finite_for_tokens_far_outside_the_simulation() -> None:
    rows = aigc_int.basis("text", 20)
    values = np.stack([3000.0 * rows[0], -3000.0 * rows[1], 3000.0 * rows[2]]).astype(np.float32)
    evidences = {"text": aigc_int_posterior.evidence(aigc_int.Tokens(values, np.array([1, 2])), "text")}
    posterior = aigc_int_posterior.log_posterior(evidences, ("text",))
    assert np.isfinite(posterior).all()
    np.testing.assert_allclose(np.exp(posterior).sum(axis=(1, 2)), 1.0, atol=1e-9)


def test_product_of_unimodal_posteriors_counts_the_prior_once() -> None:
    log_prior = np.log(aigc_int.EMOTION_PRIOR)
    unread = np.broadcast_to(log_prior, (2, 7))
    read = np.log(np.full((2, 7), 0.05) + 0.65 * np.eye(7)[[1, 4]])
    fused = aigc_int_posterior.product_of_unimodal([unread, read, unread], log_prior)
    np.testing.assert_allclose(fused, read, atol=1e-12)
