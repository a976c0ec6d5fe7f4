"""Emotion of MELD's utterances from their words as a text encoder reads them behind the three turns before.

Features: as for configs/meld_text.py, with ``--option=context_turns=3 --option="context_separator=[SEP]"`` and
``--config.text.stored=after_context --config.text.max_tokens=160 --config.text.tokens_per_row=160``: the states of the
utterance's own tokens, the speaker's name among them, are stored. With those of all tokens the model did worse on dev.
"""

import ml_collections

from configs import meld_text


def get_config() -> ml_collections.ConfigDict:
    """As configs/meld_text.py, with the speaker's name before each utterance."""
    config = meld_text.get_config()
    config.data.path = "runs/data/meld_dialogue"
    config.data.packing.num_rows = (11, 12, 14)
    return config
