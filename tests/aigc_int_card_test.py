"""The card of AIGC-INT-Sim says what the code does: every constant and table in it, and the record that it shows."""

import contextlib
import io
import re

import numpy as np
import pytest

from mmei_jax.simulation import aigc_int, aigc_int_calibration, aigc_int_dataset
from mmei_jax.simulation import aigc_int_feedback as feedback
from mmei_jax.types import MODALITIES
from tests import markdown

CARD = markdown.read("data/aigc_int/README.md")
TABLES = markdown.tables(CARD)
WORDS = " ".join(CARD.split()).replace("\N{MINUS SIGN}", "-").replace("\N{GREEK SMALL LETTER RHO}", "rho")


def short(number: float) -> str:
    """A number as the card writes it: without the zero before the point."""
    return f"{number:g}".removeprefix("0") if number < 1 else f"{number:g}"


def named(names: tuple[str, ...], numbers: np.ndarray) -> str:
    return ", ".join(f"{name} {short(number)}" for name, number in zip(names, numbers, strict=True))


def listed(numbers) -> str:
    return ", ".join(short(number) for number in numbers)


def by_modality(numbers: dict[str, float]) -> str:
    return ", ".join(f"{short(numbers[name])} ({name})" for name in MODALITIES)


USER_TYPES = ", ".join(
    f"{number:.2f}".removeprefix("0") + f" {name}"
    for number, name in zip(aigc_int.USER_TYPE_PRIOR, aigc_int.USER_TYPES, strict=True)
)
ITEMS_OF_KIND = ", ".join(
    f"{count} {kind}" for count, kind in zip(np.bincount(feedback.item_world().kind), aigc_int.KINDS, strict=True)
)
INTENT_TABLE = aigc_int.intent_table()
CLIPPED = ", ".join(f"[1, {aigc_int.MAX_TOKENS[name]}]" for name in MODALITIES)
AMPLITUDES = ", ".join(f"{aigc_int.AMPLITUDE[name]:.3f} ({name})" for name in MODALITIES)
TARGETS = ", ".join(f"{short(aigc_int_calibration.UNIMODAL_ACCURACY[name])} {name}" for name in MODALITIES)
LENGTHS = ", ".join(str(aigc_int.MEAN_TOKENS[name]) for name in MODALITIES)

# What the card says, with the code's constants put in.
SENTENCES = {
    "user types": f"user type with P = ({USER_TYPES})",
    "tastes": {4: "taste, four standard normal numbers"}[aigc_int.NUM_TASTES],
    "users": f"{aigc_int.CHUNK_USERS} users per {aigc_int.CHUNK_RECORDS:,} records",
    "chunks": f"streamed in chunks of {aigc_int.CHUNK_RECORDS:,}",
    "world": f"it is drawn from a seed of its own, {aigc_int._WORLD_SEED}",
    "least dim": f"features per token, at least {aigc_int.MIN_DIM}",
    "kinds": f"**Content kind** c: {named(aigc_int.KINDS, aigc_int.KIND_PRIOR)}.",
    "emotions": f"**Emotion** e: {named(aigc_int.EMOTIONS, aigc_int.EMOTION_PRIOR)}.",
    "emotion ids": f"| `label_emotion` | {', '.join(aigc_int.EMOTIONS)} (0 to 6) |",
    "intent ids": f"| `label_intent` | {', '.join(aigc_int.INTENTS)} (0 to 3) |",
    "modality ids": f"| `extra_conflict_modality` | {', '.join(f'{i} {name}' for i, name in enumerate(MODALITIES))} ",
    "favourite": f"is {short(aigc_int.FAVOURITE_PROBABILITY)} for the favourite and "
    f"{short((1 - aigc_int.FAVOURITE_PROBABILITY) / 3)} for each other intent",
    "intent extremes": f"Smallest entry of the table {short(INTENT_TABLE.min().round(3))}, "
    f"largest {short(INTENT_TABLE.max().round(3))}",
    "tilts": f"A tilt is {short(aigc_int.KIND_TILT)} (kinds) or {aigc_int.USER_TYPE_TILT:.2f} (user types)".replace(
        "0.", "."
    ),
    "mislabelled": f"with q = {short(aigc_int.MISLABEL_RATE)} one of the six others",
    "conflict": f"with p = {short(aigc_int.CONFLICT_RATE)} one of the three modalities",
    "manners": f"**Manner** k with P = ({listed(aigc_int.MANNER_PRIOR)})",
    "absence": f"absent with probability {by_modality(aigc_int.ABSENCE_RATE)}",
    "lengths": f"Poisson with mean {LENGTHS}, clipped to {CLIPPED}",
    "tokens": f"informative with probability rho = {short(aigc_int.INFORMATIVE_RATE)}, "
    "then N(a_m·(E_m[perm[m, k, z_m]] + "
    f"{short(aigc_int.MANNER_SCALE)}·M_m[k] + {short(aigc_int.INTENT_SCALE)}·I_m[i]), 1)",
    "amplitudes": f"**a = {AMPLITUDES}**",
    "calibration": f"Table 1 reports for its unimodal rows: {TARGETS}",
    "items": f"{feedback.NUM_ITEMS:,} items: {ITEMS_OF_KIND}",
    "item features": f"each with {feedback.ITEM_DIM} features",
    "relevant": f"the {feedback.NUM_RELEVANT} catalogue items of highest expected satisfaction",
    "satisfaction": f"1 + 4·sigmoid(emotion fit + intent fit + {short(feedback.TASTE_WEIGHT)}·⟨taste, style⟩ + "
    f"{short(feedback.QUALITY_WEIGHT)}·quality)",
    "style": f"style coordinates N(0, 1/{aigc_int.NUM_TASTES})",
    "slate": f"**Slate**: {feedback.SLATE_SIZE} items of the record's kind",
    "policy": f"{short(feedback.UNIFORM_SHARE)}·uniform + {short(1 - feedback.UNIFORM_SHARE)}·softmax("
    f"{short(feedback.POLICY_QUALITY_WEIGHT)}·quality + "
    f"{short(feedback.POLICY_INTENT_WEIGHT)}·fit to the user type's intent)",
    "policy intents": f"the types' intents are {', '.join(aigc_int.INTENTS[i] for i in aigc_int.USER_TYPE_INTENT)}",
    "examination": "(1 + p)^-0.4 = 1, " + ", ".join(f"{p:.2f}".removeprefix("0") for p in feedback.EXAMINATION[1:]),
    "noise": f"expected satisfaction + N(0, {short(feedback.SATISFACTION_NOISE)}²), clipped to [1, 5]",
    "dwell": f"({listed(feedback.DWELL_SECONDS)} s for {', '.join(aigc_int.KINDS)})·satisfaction/"
    f"{feedback.TYPICAL_SATISFACTION:g}·exp(N(0, {short(feedback.DWELL_LOG_DEVIATION)}²))",
    "replays": f"{short(feedback.REPLAY_RATE)}·max(satisfaction - {feedback.TYPICAL_SATISFACTION:g}, 0)",
    "likes": f"sigmoid({feedback.LIKE_SLOPE:g}·(satisfaction - {feedback.LIKE_MIDPOINT:g}))",
    "splits by kind": "train music and video, validation image, test text",
}


@pytest.mark.parametrize("name", SENTENCES)
def test_card_states_the_constant_of_the_code(name):
    assert SENTENCES[name] in WORDS


def test_card_shows_each_favourite_intent():
    header, row = TABLES["emotion"]
    assert header[1:] == list(aigc_int.EMOTIONS)
    assert row[1:] == [aigc_int.INTENTS[intent] for intent in aigc_int.FAVOURITE_INTENT]


def test_card_shows_the_tilts_of_intents():
    header, *rows = TABLES["tilt of"]
    assert header[1:] == list(aigc_int.INTENTS)
    by_kind = aigc_int.intent_given_kind()[:, 0] - aigc_int.intent_given_emotion()[0]
    by_type = INTENT_TABLE[:, 0, 0] - aigc_int.intent_given_kind()[0, 0]
    assert [row[0] for row in rows] == [*aigc_int.KINDS, *aigc_int.USER_TYPES]
    found = np.array([[float(cell) for cell in row[1:]] for row in rows])
    np.testing.assert_allclose(found, np.concatenate([by_kind, by_type]), rtol=0, atol=5e-4)


def test_card_shows_the_intents_of_every_favourite_and_kind():
    header, *rows = TABLES["favourite of e"]
    assert header[2:] == list(aigc_int.INTENTS)
    found = {(row[0], row[1]): [float(cell) for cell in row[2:]] for row in rows}
    table = aigc_int.intent_given_kind()
    assert len(found) == len(aigc_int.INTENTS) * len(aigc_int.KINDS)
    for kind, name in enumerate(aigc_int.KINDS):
        for emotion, favourite in enumerate(aigc_int.FAVOURITE_INTENT):
            np.testing.assert_allclose(
                found[aigc_int.INTENTS[favourite], name], table[kind, emotion], rtol=0, atol=5.1e-4
            )


def test_card_shows_the_classes_that_emotions_are_displayed_as():
    header, *rows = TABLES["emotion z"]
    assert header[1:] == [str(emotion) for emotion in range(len(aigc_int.EMOTIONS))]
    found = {row[0]: [int(cell) for cell in row[1:]] for row in rows}
    expected = {
        f"{name}, k = {manner}": aigc_int.DISPLAY_CLASS[name][manner].tolist()
        for name in MODALITIES
        for manner in range(1, aigc_int.NUM_MANNERS)
    }
    assert found == expected


def test_card_shows_the_calibrated_amplitudes_and_their_targets():
    rows = TABLES[" | amplitude | share right | mean probability | target"][1:]
    assert {row[0]: float(row[1]) for row in rows} == aigc_int.AMPLITUDE
    assert {row[0]: float(row[4]) for row in rows} == aigc_int_calibration.UNIMODAL_ACCURACY


def test_card_shows_a_record_as_it_is_generated(tmp_path, monkeypatch):
    languages = markdown.blocks(CARD)
    (command,) = [text for language, text in languages if language == "bash"]
    (code,) = [text for language, text in languages if language == "python"]
    (shown,) = [text for language, text in languages if language == "text"]
    monkeypatch.chdir(tmp_path)
    assert aigc_int_dataset.main(command.split("generate ")[1].split()) == 0
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "data/aigc_int/README.md", "exec"), {})
    expected, found = shown.split(), printed.getvalue().split()
    assert len(expected) == len(found)
    for left, right in zip(expected, found, strict=True):
        if re.fullmatch(r"-?\d+\.\d\d", left):
            # Another processor may round the last digit of a feature differently.
            assert abs(float(left) - float(right)) < 0.011
        else:
            assert left == right
