"""A WordPiece tokenizer made of texts of one's own, for a BERT whose weights are random."""

import csv
from collections.abc import Sequence
from pathlib import Path

import transformers

from mmei_jax.types import InputError

_TEXT_COLUMN = "text"
_SPLIT_COLUMN = "split"
_TRAINING_SPLIT = "train"


def read_texts(path: Path) -> list[str]:
    """Texts to train on: the lines of a text file, or a column of a list of clips.

    Args:
        path: ``.txt``, one text a line; or ``.csv`` with the column ``text``. Where it has a column ``split``, only
            rows of the split ``train`` are taken, so that a vocabulary knows nothing of what is tested.

    Returns:
        Those that are not empty.

    Raises:
        InputError: another kind of file, it lacks the column, or there is no text.
        OSError: it cannot be read.
    """
    kind = path.suffix.lower()
    if kind == ".txt":
        texts = path.read_text(encoding="utf-8").splitlines()
    elif kind == ".csv":
        with path.open(encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file)
            if _TEXT_COLUMN not in (rows.fieldnames or ()):
                raise InputError(f"{path}: has no column {_TEXT_COLUMN!r}")
            texts = [
                row[_TEXT_COLUMN] or "" for row in rows if row.get(_SPLIT_COLUMN, _TRAINING_SPLIT) == _TRAINING_SPLIT
            ]
    else:
        raise InputError(f"{path}: expected a .txt file with a text a line, or a .csv file with a column 'text'")
    texts = [text.strip() for text in texts if text.strip()]
    if not texts:
        raise InputError(f"{path}: has no text to train a tokenizer on (of a list with splits, those of 'train' count)")
    return texts


def train_tokenizer(texts: Sequence[str], vocabulary_size: int, folder: Path) -> int:
    """Trains a tokenizer that lowers case, as BERT's, and writes its files; the same texts give the same bytes.

    Args:
        texts: to train on.
        vocabulary_size: most entries of the vocabulary.
        folder: there already.

    Returns:
        How many entries the vocabulary has.

    Raises:
        InputError: the texts have more characters than entries are allowed.
    """
    empty = transformers.BertTokenizer()
    pipeline = empty.backend_tokenizer
    words = {
        word
        for text in texts
        for word, _ in pipeline.pre_tokenizer.pre_tokenize_str(pipeline.normalizer.normalize_str(text))
    }
    # The trainer numbers the characters within words in the order of a hash table, another in every process, and
    # chooses by number among pairs that are equally frequent. Named before, they have numbers of their own.
    inner = sorted({f"##{character}" for word in words for character in word[1:]})
    trained = empty.train_new_from_iterator(
        [list(texts)], vocabulary_size, new_special_tokens=inner, show_progress=False
    )
    numbers = trained.get_vocab()
    if len(numbers) > vocabulary_size:
        raise InputError(f"vocab_size = {vocabulary_size}: expected at least {len(numbers)} for these texts")
    # A tokenizer of its own, in which a character within a word is no special token.
    vocabulary = {token: number for number, token in enumerate(sorted(numbers, key=lambda token: numbers[token]))}
    transformers.BertTokenizer(vocab=vocabulary).save_pretrained(folder)
    return len(vocabulary)
