"""Context of a turn: what was said before in the same dialogue, and nothing else."""

import pytest

from mmei_jax.extraction.clips import Clip
from mmei_jax.extraction.conversation_context import ContextOptions, add_context
from mmei_jax.types import InputError


def say(turn, text, speaker="Ann", dialogue="d0", split="train"):
    return Clip(f"{split}_{dialogue}_{turn}", split, text=text, speaker=speaker, dialogue=dialogue, turn=turn)


DIALOGUE = [say(0, "One."), say(1, "Two.", "Bo"), say(2, "Three.", "Cy"), say(3, "Four.", "Bo")]


def texts(clips, **options):
    return [clip.text for clip in add_context(clips, ContextOptions(**options))]


def test_previous_turns_precede_a_text_with_speakers_and_separators():
    assert texts(DIALOGUE, num_turns=2) == [
        "ANN: One.",
        "ANN: One.</s></s>BO: Two.",
        "ANN: One. BO: Two.</s></s>CY: Three.",
        "BO: Two. CY: Three.</s></s>BO: Four.",
    ]


def test_separators_and_speakers_are_as_asked():
    found = texts(DIALOGUE, num_turns=2, separator=" [SEP] ", turn_separator=" | ", with_speakers=False)
    assert found[3] == "Two. | Three. [SEP] Four."


def test_no_turns_leave_clips_as_they_are():
    assert add_context(DIALOGUE, ContextOptions(0)) == DIALOGUE


def test_order_of_the_list_does_not_matter_and_is_kept():
    turned = DIALOGUE[::-1]
    assert texts(turned, num_turns=3) == texts(DIALOGUE, num_turns=3)[::-1]


def test_other_dialogues_and_splits_and_later_turns_are_never_read():
    others = [
        say(1, "Other dialogue.", dialogue="d1"),
        say(0, "Other split.", split="test"),
        say(9, "Later."),
        Clip("loose", "train", text="No dialogue.", speaker="Bo"),
    ]
    alone = texts(DIALOGUE, num_turns=9)
    assert texts([*others, *DIALOGUE], num_turns=9)[len(others) :] == alone
    assert texts(others, num_turns=9) == [
        "ANN: Other dialogue.",
        "ANN: Other split.",
        "ANN: Later.",
        "BO: No dialogue.",
    ]


def test_missing_turns_texts_and_speakers_are_passed_over():
    clips = [say(0, "One."), say(4, None), say(7, "Two.", speaker=None)]
    assert texts(clips, num_turns=1) == ["ANN: One.", None, "ANN: One.</s></s>Two."]


def test_a_turn_that_occurs_twice_and_a_negative_number_are_refused():
    with pytest.raises(InputError, match=r"'d0' of split 'train' has a turn twice: \[1, 1\]"):
        add_context([say(1, "a"), say(1, "b")], ContextOptions(1))
    with pytest.raises(InputError, match="-1 turns"):
        ContextOptions(-1)
