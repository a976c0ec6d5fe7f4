"""Generated words (*simulated*): a phrase per token, most about emotion, manner or intent, some about nothing."""

import numpy as np

from mmei_jax.simulation import render_constants as constants
from mmei_jax.simulation.aigc_int import EMOTIONS, INTENTS
from mmei_jax.simulation.render_plan import RecordPlan

MANNERS = ("plain", "irony", "play")

# What a phrase about an emotion is made of; the words are of the class that the text shows.
EMOTION_WORDS = {
    "neutral": ("fine", "okay", "ordinary", "usual", "even", "unremarkable", "alright", "standard"),
    "joy": ("happy", "delightful", "wonderful", "cheerful", "sunny", "lovely", "joyful", "great"),
    "surprise": ("surprising", "astonishing", "unexpected", "amazing", "startling", "incredible", "sudden", "stunning"),
    "anger": ("infuriating", "outrageous", "annoying", "maddening", "unfair", "irritating", "insulting", "enraging"),
    "sadness": ("sad", "gloomy", "heartbreaking", "lonely", "miserable", "hopeless", "tearful", "sorrowful"),
    "fear": ("scary", "frightening", "terrifying", "alarming", "threatening", "worrying", "dreadful", "creepy"),
    "disgust": ("disgusting", "revolting", "gross", "nasty", "sickening", "filthy", "foul", "repulsive"),
}
EMOTION_TEMPLATES = (
    "this is {word}",
    "it all feels {word}",
    "that was {word}",
    "everything looks {word} to me",
    "today is {word}",
    "I find it {word}",
)
MANNER_PHRASES = {
    "plain": ("simply put", "as it is", "to be plain", "just as I say", "no more and no less"),
    "irony": ("oh sure", "yeah right", "as if", "what a genius plan", "of course it would"),
    "play": ("haha", "just kidding", "tag, you are it", "wheee", "knock knock"),
}
INTENT_PHRASES = {
    "relax": ("I want to rest", "let me unwind", "a quiet hour would do", "time to lie down", "slow it down for me"),
    "learn": ("show me how it works", "I want to understand it", "teach me more", "let me study that", "explain it"),
    "create": (
        "I want to build something",
        "let me draw it",
        "I will write a song",
        "hand me the paint",
        "let us make one",
    ),
    "be_entertained": ("play me something", "tell me a story", "put on a show", "I want to watch it", "make me laugh"),
}
NEUTRAL_PHRASES = (
    "the window is open",
    "it is Tuesday",
    "the cup is on the table",
    "we took the second bus",
    "the door is on the left",
    "there are two chairs",
    "the call was at noon",
    "my jacket is in the hall",
    "the list has four points",
    "they painted the fence",
    "the road goes along the river",
    "the lamp stands in the corner",
)
_JOINTS = (", ", " and ", ", so ", "; ")
_PHRASES_PER_SENTENCE = 3


def write_text(plan: RecordPlan) -> str:
    """The transcript of a record that has text: as many phrases as it has tokens, in sentences; not empty."""
    generator = plan.generator("text")
    phrases = [
        _write_cue(plan, generator) if is_informative else _pick(generator, NEUTRAL_PHRASES)
        for is_informative in plan.is_informative["text"]
    ]
    sentences = []
    for start in range(0, len(phrases), _PHRASES_PER_SENTENCE):
        sentence = phrases[start]
        for phrase in phrases[start + 1 : start + _PHRASES_PER_SENTENCE]:
            sentence += _pick(generator, _JOINTS) + phrase
        sentences.append(sentence[0].upper() + sentence[1:] + ".")
    return " ".join(sentences)


def _pick(generator: np.random.Generator, choices: tuple[str, ...]) -> str:
    return choices[int(generator.integers(len(choices)))]


def _write_cue(plan: RecordPlan, generator: np.random.Generator) -> str:
    """One phrase about the emotion, the manner or the intent, now and then about another one than the record's."""
    is_confused = generator.random() < constants.CUE_CONFUSION_RATE
    about = int((generator.random() >= np.cumsum(constants.CUE_PROBABILITY)).sum())
    shown = (plan.shown_class["text"], plan.manner, plan.intent)[min(about, 2)]
    names = (EMOTIONS, MANNERS, INTENTS)[min(about, 2)]
    if is_confused:
        shown = (shown + 1 + int(generator.integers(len(names) - 1))) % len(names)
    if names is EMOTIONS:
        return _pick(generator, EMOTION_TEMPLATES).format(word=_pick(generator, EMOTION_WORDS[names[shown]]))
    return _pick(generator, (MANNER_PHRASES if names is MANNERS else INTENT_PHRASES)[names[shown]])
