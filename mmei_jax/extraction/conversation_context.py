"""Puts what was said before into a clip's text, as EmoBERTa does (Kim and Vossen, 2021, arXiv 2108.12009).

``MONICA: What? ROSS: Nothing.</s></s>MONICA: Ross!`` are two turns of context and the turn itself. Departures from the
paper: only turns that lie before are taken, since a dialogue that goes on has no later ones.
"""

import bisect
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from mmei_jax.extraction.clips import Clip
from mmei_jax.types import InputError


@dataclass(frozen=True)
class ContextOptions:
    """How much context a text gets, and in which form.

    Attributes:
        num_turns: previous turns, at most; 0 leaves texts as they are, speaker names included.
        separator: between the context and the turn itself: the tokenizer's separators, ``</s></s>`` for RoBERTa,
            ``[SEP]`` for BERT.
        turn_separator: between turns of the context.
        with_speakers: whether each turn begins with its speaker's name in capitals and a colon.
    """

    num_turns: int
    separator: str = "</s></s>"
    turn_separator: str = " "
    with_speakers: bool = True

    def __post_init__(self) -> None:
        """Refuses a negative number of turns."""
        if self.num_turns < 0:
            raise InputError(f"context of {self.num_turns} turns: expected at least 0")


def add_context(clips: Sequence[Clip], options: ContextOptions) -> list[Clip]:
    """The same clips in the same order, their texts preceded by up to ``num_turns`` turns.

    A turn of context is of the same dialogue *and* the same split, and lies before: neither another dialogue nor
    another split nor what comes later reaches a text. Turns that the list lacks, or that have no text, are passed over;
    clips without text, dialogue or turn stay as they are, but for the speaker's name before a text.

    Args:
        clips: of any number of dialogues and splits, in any order.
        options: how.

    Raises:
        InputError: a dialogue has the same turn twice within a split.

    Example:
        >>> said = [("Ann", "Hello."), ("Bo", "Hi."), ("Ann", "Well?")]
        >>> clips = [Clip(str(turn), "train", text=text, speaker=speaker, dialogue="d", turn=turn)
        ...          for turn, (speaker, text) in enumerate(said)]
        >>> add_context(clips, ContextOptions(2, separator="[SEP]"))[2].text
        'ANN: Hello. BO: Hi.[SEP]ANN: Well?'
    """
    if options.num_turns == 0:
        return list(clips)
    spoken: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for clip in clips:
        if clip.text is not None and clip.dialogue is not None and clip.turn is not None:
            spoken.setdefault((clip.split, clip.dialogue), []).append((clip.turn, _say(clip, options)))
    for (split, dialogue), turns in spoken.items():
        turns.sort()
        numbers = [turn for turn, _ in turns]
        if len(set(numbers)) < len(numbers):
            raise InputError(f"dialogue {dialogue!r} of split {split!r} has a turn twice: {numbers}")
    return [_with_context(clip, spoken, options) for clip in clips]


def _say(clip: Clip, options: ContextOptions) -> str:
    if options.with_speakers and clip.speaker is not None:
        return f"{clip.speaker.upper()}: {clip.text}"
    return str(clip.text)


def _with_context(clip: Clip, spoken: dict[tuple[str, str], list[tuple[int, str]]], options: ContextOptions) -> Clip:
    if clip.text is None:
        return clip
    text = _say(clip, options)
    if clip.dialogue is not None and clip.turn is not None:
        turns = spoken[clip.split, clip.dialogue]
        position = bisect.bisect_left(turns, clip.turn, key=lambda pair: pair[0])
        before = [said for _, said in turns[max(0, position - options.num_turns) : position]]
        if before:
            text = options.turn_separator.join(before) + options.separator + text
    return dataclasses.replace(clip, text=text)
