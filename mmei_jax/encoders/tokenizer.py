"""A checkpoint's own tokenizer: words to token ids."""

import hashlib
from dataclasses import dataclass
from typing import Any

from mmei_jax.types import InputError


@dataclass(frozen=True)
class EncodedText:
    """Token ids of a text, and whether some were cut off."""

    token_ids: list[int]
    is_cut: bool


class Tokenizer:
    """A checkpoint's tokenizer, which cuts what is too long."""

    def __init__(self, folder: str, max_tokens: int, *, keeps_end: bool = False) -> None:
        """Loads it from the checkpoint's folder.

        Args:
            folder: of the checkpoint.
            max_tokens: most tokens of a text.
            keeps_end: whether what is too long loses its start instead of its end.

        Raises:
            InputError: the folder has none.
        """
        self._tokenizer = _load(folder)
        self._max_tokens = max_tokens
        self._tokenizer.truncation_side = "left" if keeps_end else "right"

    def encode(self, text: str) -> EncodedText:
        """Token ids with what the tokenizer puts around them, at most ``max_tokens``."""
        whole = self._tokenizer(text, add_special_tokens=True, verbose=False)["input_ids"]
        if len(whole) <= self._max_tokens:
            return EncodedText(whole, is_cut=False)
        cut = self._tokenizer(text, truncation=True, max_length=self._max_tokens)["input_ids"]
        return EncodedText(cut, is_cut=True)

    def context_length(self, token_ids: list[int]) -> int:
        """Tokens up to the last separator within a text, that one included; 0 without any."""
        inner = token_ids[:-1]
        separator = self._tokenizer.sep_token_id
        return len(inner) - inner[::-1].index(separator) if separator in inner else 0


def vocabulary_fingerprint(folder: str) -> str:
    """What identifies the words and ids of a checkpoint's tokenizer, in whatever files it is kept.

    Args:
        folder: of the checkpoint.

    Raises:
        InputError: the folder has none.
    """
    vocabulary = sorted(_load(folder).get_vocab().items())
    return f"sha256:{hashlib.sha256(repr(vocabulary).encode()).hexdigest()}"


def _load(folder: str) -> Any:
    # More than a second to import, which runs without words do without.
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        wanted = "expected the checkpoint's tokenizer files (tokenizer.json, or vocab.txt) in it"
        raise InputError(f"{folder}: no tokenizer: {wanted}: {' '.join(str(error).split())[:200]}") from error
