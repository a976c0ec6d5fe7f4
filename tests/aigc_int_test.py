"""The causal model of AIGC-INT-Sim: its constants, what is drawn from it, seeds and streaming."""

import math

import numpy as np
import pytest

from mmei_jax.simulation import (
    aigc_int,
    aigc_int_posterior,
)
from mmei_jax.types import MODALITIES, InputError

QUICK_RECORDS = 40_000


@pytest.fixture(scope="module")
def latents() -> aigc_int.Latents:
    """The latents of 40,000 records, end to end."""
    parts = [aigc_int.draw_latents(7, chunk) for chunk in range(QUICK_RECORDS // aigc_int.CHUNK_RECORDS)]
    names = aigc_int.Latents.__dataclass_fields__
    return aigc_int.Latents(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


def share(is_true: np.ndarray) -> float:
    return float(np.mean(is_true))


def allowed_error(probability: float, num: int) -> float:
    """Four standard errors of a share."""
    return 4.0 * math.sqrt(probability * (1.0 - probability) / num)


def test_manners_are_derangements_and_disjoint() -> None:
    emotions = np.arange(7)
    deranged = [aigc_int.DISPLAY_CLASS[name][k] for name in MODALITIES for k in (1, 2)]
    for name in MODALITIES:
        np.testing.assert_array_equal(aigc_int.DISPLAY_CLASS[name][0], emotions)
    for index, mapping in enumerate(deranged):
        np.testing.assert_array_equal(np.sort(mapping), emotions)
        assert (mapping != emotions).all()
        for other in deranged[:index]:
            assert (mapping != other).all()


def test_basis_rows_are_orthonormal_and_differ_between_modalities() -> None:
    for name in MODALITIES:
        for dim in (14, 32, 768):
            rows = aigc_int.basis(name, dim)
            np.testing.assert_allclose(rows @ rows.T, np.eye(14), atol=1e-12)
    assert np.abs(aigc_int.basis("text", 32) - aigc_int.basis("vision", 32)).max() > 0.1
    with pytest.raises(InputError, match="dim = 13"):
        aigc_int.basis("text", 13)


def test_intent_table_is_a_distribution_whose_mean_is_the_favourite_table() -> None:
    table = aigc_int.intent_table()
    assert table.shape == (4, 4, 7, 4)
    assert table.min() > 0.0
    np.testing.assert_allclose(table.sum(axis=-1), 1.0, atol=1e-12)
    mean = np.einsum("t,c,tcei->ei", aigc_int.USER_TYPE_PRIOR, aigc_int.KIND_PRIOR, table)
    expected = np.full((7, 4), 0.1)
    expected[np.arange(7), aigc_int.FAVOURITE_INTENT] = 0.7
    np.testing.assert_allclose(mean, expected, atol=1e-12)
    np.testing.assert_allclose(aigc_int_posterior.prior(), aigc_int.EMOTION_PRIOR[:, None] * expected, atol=1e-12)
    # Kind and user type do matter.
    assert np.ptp(table, axis=0).max() > 0.15
    assert np.ptp(table, axis=1).max() > 0.05


def test_latents_follow_their_priors(latents: aigc_int.Latents) -> None:
    num = len(latents.emotion)
    shares = [
        *((share(latents.emotion == e), p) for e, p in enumerate((0.24, 0.18, 0.16, 0.14, 0.11, 0.09, 0.08))),
        *((share(latents.manner == k), p) for k, p in enumerate((0.5, 0.3, 0.2))),
        *((share(latents.kind == c), p) for c, p in enumerate((0.35, 0.35, 0.15, 0.15))),
        *((share(latents.conflict_modality == m), 0.2 / 3) for m in range(3)),
        (share(latents.shown_emotion != latents.emotion), 0.05),
        (share(latents.intent == aigc_int.FAVOURITE_INTENT[latents.emotion]), 0.7),
    ]
    for found, probability in shares:
        assert abs(found - probability) < allowed_error(probability, num), (found, probability)


def test_intents_follow_the_table_of_kind_and_user_type(latents: aigc_int.Latents) -> None:
    table = aigc_int.intent_table()[latents.user_type, latents.kind, latents.emotion]
    for intent in range(4):
        for user_type in range(4):
            rows = latents.user_type == user_type
            expected = table[rows, intent].mean()
            assert abs(share(latents.intent[rows] == intent) - expected) < allowed_error(expected, rows.sum())


def test_only_the_conflicting_modality_displays_another_emotion(latents: aigc_int.Latents) -> None:
    differs = latents.displayed_emotion != latents.shown_emotion[:, None]
    np.testing.assert_array_equal(differs, latents.conflict_modality[:, None] == np.arange(3))
    # Each of the six others equally often, for conflicts and for mislabelled records.
    shift = (latents.displayed_emotion.sum(axis=1) - 3 * latents.shown_emotion)[latents.conflict_modality >= 0] % 7
    for step in range(1, 7):
        assert abs(share(shift == step) - 1 / 6) < allowed_error(1 / 6, len(shift))
    moved = (latents.shown_emotion - latents.emotion)[latents.shown_emotion != latents.emotion] % 7
    for step in range(1, 7):
        assert abs(share(moved == step) - 1 / 6) < allowed_error(1 / 6, len(moved))


@pytest.mark.parametrize(("name", "rate", "mean", "longest"), [
    ("text", 0.02, 8, 32), ("vision", 0.08, 8, 16), ("audio", 0.05, 12, 50),
])  # fmt: skip
def test_absence_and_lengths(latents: aigc_int.Latents, name: str, rate: float, mean: int, longest: int) -> None:
    lengths = latents.num_tokens[:, MODALITIES.index(name)]
    is_present = latents.is_present()[:, MODALITIES.index(name)]
    assert abs(share(~is_present) - rate) < allowed_error(rate, len(lengths))
    assert set(lengths[~is_present]) == {-1}
    assert lengths[is_present].min() >= 1
    assert lengths[is_present].max() <= longest
    assert abs(lengths[is_present].mean() - mean) < 0.07
    probabilities = aigc_int.length_probabilities(name)
    assert len(probabilities) == longest
    assert abs(probabilities.sum() - 1.0) < 1e-12
    for length in (mean - 3, mean, mean + 3):
        poisson = math.exp(-mean) * mean**length / math.factorial(length)
        assert abs(share(lengths[is_present] == length) - poisson) < allowed_error(poisson, is_present.sum())


def test_absence_is_independent_of_what_is_shown(latents: aigc_int.Latents) -> None:
    is_present = latents.is_present()
    both = share(~is_present[:, 0] & ~is_present[:, 1])
    assert abs(both - 0.08 * 0.05) < allowed_error(0.08 * 0.05, len(is_present))
    for emotion in range(7):
        rows = latents.emotion == emotion
        assert abs(share(~is_present[rows, 0]) - 0.08) < allowed_error(0.08, rows.sum())


def test_tokens_have_the_stated_moments() -> None:
    """E[token] = 0.8 * mean of its class; and with everything else given, unit noise in every other direction."""
    latents = aigc_int.draw_latents(5, 0)
    tokens = aigc_int.draw_tokens(5, 0, latents, "audio", 20)
    record = np.repeat(np.arange(1000), np.maximum(tokens.lengths, 0))
    coordinates = tokens.values.astype(np.float64) @ aigc_int.basis("audio", 20).T
    column = MODALITIES.index("audio")
    shown = aigc_int.DISPLAY_CLASS["audio"][latents.manner, latents.displayed_emotion[:, column]][record]
    weights = {
        "shown": (shown, 1.0),
        "manner": (7 + latents.manner[record], 0.5),
        "intent": (10 + latents.intent[record], 0.3),
    }
    for direction, weight in weights.values():
        found = coordinates[np.arange(len(record)), direction].mean()
        assert abs(found - 0.8 * weight * aigc_int.AMPLITUDE["audio"]) < 0.05
    residual = tokens.values - coordinates @ aigc_int.basis("audio", 20)
    assert abs((residual**2).sum(axis=1).mean() - 6.0) < 0.12


def test_a_record_does_not_depend_on_how_many_are_made() -> None:
    few = list(aigc_int.stream(9, 1010, 14))
    many = list(aigc_int.stream(9, 2500, 14))
    assert [len(chunk.latents.emotion) for chunk in few] == [1000, 10]
    assert [len(chunk.latents.emotion) for chunk in many] == [1000, 1000, 500]
    np.testing.assert_array_equal(few[1].latents.emotion, many[1].latents.emotion[:10])
    np.testing.assert_array_equal(few[1].latents.user, many[1].latents.user[:10])
    for name in MODALITIES:
        part = few[1].tokens[name]
        np.testing.assert_array_equal(part.values, many[1].tokens[name].values[: len(part.values)])
        assert len(part.values) == np.maximum(part.lengths, 0).sum()


def test_seeds_differ_and_streams_are_independent() -> None:
    assert (aigc_int.draw_latents(0, 0).emotion != aigc_int.draw_latents(1, 0).emotion).any()
    assert (aigc_int.draw_latents(0, 0).emotion != aigc_int.draw_latents(0, 1).emotion).any()
    one = aigc_int.make_generator(0, "vision", 0).random(1000)
    other = aigc_int.make_generator(0, "audio", 0).random(1000)
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.15
    assert aigc_int.draw_latents(0, 0).user.max() < aigc_int.draw_latents(0, 1).user.min()


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(InputError, match="seed = "):
        next(aigc_int.stream(seed, 10, 14))
