"""Catalogue, slates and feedback of AIGC-INT-Sim."""

import json
import math

import numpy as np
import pytest

from mmei_jax.simulation import (
    aigc_int,
    aigc_int_feedback,
)


def share(is_true: np.ndarray) -> float:
    return float(np.mean(is_true))


def allowed_error(probability: float, num: int) -> float:
    """Four standard errors of a share."""
    return 4.0 * math.sqrt(probability * (1.0 - probability) / num)


def test_relevant_items_are_the_twenty_of_highest_expected_satisfaction() -> None:
    latents = aigc_int.draw_latents(3, 0)
    relevant = aigc_int_feedback.relevant_items(latents)
    world = aigc_int_feedback.item_world()
    for record in range(0, 1000, 50):
        satisfaction = []
        for item in range(aigc_int_feedback.NUM_ITEMS):
            score = (
                world.emotion_fit[item, latents.emotion[record]]
                + world.intent_fit[item, latents.intent[record]]
                + 0.7 * sum(latents.taste[record, t] * world.style[item, t] for t in range(4))
                + 0.4 * world.quality[item]
            )
            satisfaction.append(1.0 + 4.0 / (1.0 + math.exp(-score)))
        expected = sorted(range(aigc_int_feedback.NUM_ITEMS), key=lambda item: -satisfaction[item])[:20]
        assert relevant[record].tolist() == expected


def test_item_features_carry_what_satisfaction_is_made_of() -> None:
    world = aigc_int_feedback.item_world()
    causes = np.column_stack([world.emotion_fit, world.intent_fit, world.style, world.quality])
    solution, *_ = np.linalg.lstsq(world.features.astype(np.float64), causes, rcond=None)
    np.testing.assert_allclose(world.features @ solution, causes, atol=1e-5)
    assert np.bincount(world.kind).tolist() == [700, 700, 300, 300]
    texts = [json.loads(text) for text in aigc_int_feedback.item_texts()]
    assert texts[0].keys() == {"title", "tags", "creator", "origin"}
    assert {text["origin"] for text in texts} == {"ai_generated", "human"}
    assert [text["tags"][0] for text in texts] == [aigc_int.KINDS[kind] for kind in world.kind]


def test_policy_is_a_distribution_over_the_kinds_items_with_full_support() -> None:
    policy = aigc_int_feedback.policy()
    kind = aigc_int_feedback.item_world().kind
    np.testing.assert_allclose(policy.sum(axis=-1), 1.0, atol=1e-12)
    for position in range(4):
        assert (policy[:, position, kind != position] == 0.0).all()
        least = 0.1 / np.sum(kind == position)
        assert policy[:, position, kind == position].min() >= least


def test_propensities_are_the_conditional_probabilities_of_the_slate() -> None:
    latents = aigc_int.draw_latents(3, 0)
    slates = aigc_int_feedback.draw_slates(3, 0, latents)
    policy = aigc_int_feedback.policy()
    for record in range(0, 1000, 25):
        probabilities = policy[latents.user_type[record], latents.kind[record]].copy()
        for item, propensity in zip(slates.item_index[record], slates.propensity[record], strict=True):
            assert propensity == pytest.approx(probabilities[item] / probabilities.sum(), rel=1e-5)
            probabilities[item] = 0.0


def test_items_are_shown_as_often_as_their_propensities_say() -> None:
    """Whatever the order in which they were drawn: first position against the policy, second against the mean."""
    fields = aigc_int.Latents.__dataclass_fields__
    one = aigc_int.draw_latents(3, 0)
    rows = np.zeros(40_000, int) + int(np.flatnonzero((one.user_type == 0) & (one.kind == 2))[0])
    latents = aigc_int.Latents(**{name: getattr(one, name)[rows] for name in fields})
    slates = aigc_int_feedback.draw_slates(3, 0, latents)
    probabilities = aigc_int_feedback.policy()[0, 2]
    # P(second = b) = sum over a != b of p(a) p(b) / (1 - p(a)).
    odds = probabilities / (1.0 - probabilities)
    second = probabilities * (odds.sum() - odds)
    for position, expected in enumerate((probabilities, second)):
        counts = np.bincount(slates.item_index[:, position], minlength=len(probabilities))
        assert counts[expected == 0.0].sum() == 0
        support = expected > 0.0
        chi_square = ((counts - 40_000 * expected)[support] ** 2 / (40_000 * expected[support])).sum()
        freedom = support.sum() - 1
        assert abs(chi_square - freedom) < 5.0 * math.sqrt(2.0 * freedom)
    assert (np.diff(np.sort(slates.item_index, axis=1), axis=1) > 0).all()


def test_feedback_follows_position_and_satisfaction() -> None:
    parts = [(aigc_int.draw_latents(3, chunk), chunk) for chunk in range(10)]
    slates = [aigc_int_feedback.draw_slates(3, chunk, latents) for latents, chunk in parts]
    is_examined = np.concatenate([part.is_examined for part in slates])
    satisfaction = np.concatenate([part.satisfaction for part in slates])
    dwell = np.concatenate([part.dwell_seconds for part in slates])
    liked = np.concatenate([part.is_liked for part in slates])
    replays = np.concatenate([part.num_replays for part in slates])
    for position in range(8):
        rate = (1 + position) ** -0.4
        assert abs(share(is_examined[:, position]) - rate) <= allowed_error(rate, len(is_examined))
    np.testing.assert_array_equal(dwell > 0.0, is_examined)
    assert (satisfaction[~is_examined] == 1.0).all()
    assert not liked[~is_examined].any()
    assert not replays[~is_examined].any()
    assert satisfaction.min() >= 1.0
    assert satisfaction.max() <= 5.0
    expected = np.concatenate([
        aigc_int_feedback.satisfaction_from_score(
            np.take_along_axis(aigc_int_feedback.true_scores(latents), part.item_index, axis=1)
        )
        for (latents, _), part in zip(parts, slates, strict=True)
    ])  # fmt: skip
    noise = (satisfaction - expected)[is_examined & (expected > 2.5) & (expected < 3.5)]
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 0.5) < 0.02
    happy, unhappy = is_examined & (satisfaction > 4.0), is_examined & (satisfaction < 2.5)
    assert share(liked[happy]) > share(liked[unhappy]) + 0.5
    assert replays[happy].mean() > replays[unhappy].mean()
    assert dwell[happy].mean() > dwell[unhappy].mean()


def test_relevance_given_state_is_the_share_of_tastes() -> None:
    relevance = aigc_int_feedback.relevance_given_state()
    np.testing.assert_allclose(relevance.sum(axis=1), 20.0, atol=1e-3)
    latents = aigc_int.draw_latents(3, 0)
    state = latents.emotion * 4 + latents.intent
    relevant = aigc_int_feedback.relevant_items(latents)
    # Items called relevant in half of all cases are so in half of them.
    is_relevant = np.zeros((1000, aigc_int_feedback.NUM_ITEMS), bool)
    is_relevant[np.arange(1000)[:, None], relevant] = True
    near_half = np.abs(relevance[state] - 0.5) < 0.1
    assert abs(is_relevant[near_half].mean() - 0.5) < 0.05
