"""The words of catalogue items (title, description, tags, creator, kind), as the content tower of Eq. 7 reads them.

A frozen BERT encodes every item of a data set once, and its states are kept for all later commands
(:mod:`mmei_jax.word_cache`); one that is trained with the tower reads token ids instead
(``config.model.content_encoder_training``). Whoever does not read the catalogue waits for neither.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from mmei_jax.config import Config, ModelConfig
from mmei_jax.encoders.bert import Bert, BertConfig
from mmei_jax.encoders.outputs import mean_of_tokens
from mmei_jax.encoders.pretrained import Pretrained, load, read_architecture
from mmei_jax.encoders.stack import ComputeOptions
from mmei_jax.encoders.text_packing import pack_texts
from mmei_jax.encoders.tokenizer import Tokenizer
from mmei_jax.recommendation.catalogue_files import parse_metadata
from mmei_jax.records import Dataset
from mmei_jax.sharding import batch_sharding, mesh_over, replicated
from mmei_jax.types import InputError
from mmei_jax.word_cache import kept_states

# Parts of an item's text, in the order in which they are read: what is cut off at the end is told least.
_PARTS = ("title", "description", "tags", "creator")
# Of describe_item: to be raised when its words change, so that states of others are not taken for them.
_DESCRIPTION_VERSION = 1
# Beside the weights, what decides over what an encoder gives.
_DECIDING_FILES = ("config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
# Packed rows of a batch on each device, and their length: several items lie in a row.
_ROWS_PER_DEVICE, _TOKENS_PER_ROW = 16, 128
# The shortest metadata have about as many tokens: fewer would leave rows partly empty.
_FEWEST_TOKENS = 8


def open_dataset(config: Config) -> Dataset:
    """Opens the data set of a configuration; its catalogue comes with the words that the content tower reads.

    They are read when the catalogue is first asked for, which raises InputError where an item's text or the encoder
    cannot be used.

    Raises:
        InputError: the data set cannot be read.
    """
    dataset = Dataset.open(config.data.path)
    entry = dataset.manifest["catalogue"]
    if not config.model.content_encoder or entry is None:
        return dataset
    read = functools.partial(
        _words_of_catalogue, dataset.path.absolute(), entry["sha256"], entry["num_records"], config.model
    )
    return dataset.with_item_words(read)


# A run asks several times; the key holds the hash of what is read.
@functools.lru_cache(maxsize=2)
def _words_of_catalogue(path: Path, sha256: str, num_items: int, config: ModelConfig) -> dict[str, np.ndarray]:
    if config.content_encoder_training != "frozen":
        return _read_catalogue(path, config)
    # What decides over the states, and their last digits.
    source = {
        "catalogue": sha256,
        "encoder": encoder_fingerprint(config),
        "max_tokens": config.content_max_tokens,
        "compute_dtype": config.compute_dtype,
        "device": jax.local_devices()[0].device_kind,
        "description": _DESCRIPTION_VERSION,
    }
    shape = num_items, frozen_word_dim(config)
    return {"word_state": kept_states(source, shape, lambda: _read_catalogue(path, config)["word_state"])}


def _read_catalogue(path: Path, config: ModelConfig) -> dict[str, np.ndarray]:
    catalogue = Dataset.open(path).catalogue()
    assert catalogue is not None
    pairs = zip(catalogue.texts, catalogue.kind, catalogue.ids, strict=True)
    try:
        texts = [describe_item(text, catalogue.kind_names[kind], item) for text, kind, item in pairs]
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return read_words(texts, config)


def describe_item(text: str, kind: str, item: str) -> str:
    """One line of words: title, description, kind, tags and creator, as far as there are any.

    Args:
        text: the item's metadata, a JSON object; other keys are not read.
        kind: name of its kind.
        item: its id, for the error.

    Raises:
        InputError: the metadata are no JSON object, or a part is neither text nor a list of texts.

    Example:
        >>> describe_item('{"title": "Rain", "tags": ["calm", "night"], "creator": "Ada"}', "music", "1")
        'Rain. calm, night. Ada. music'
    """
    values, found = parse_metadata(text, item), []
    for name in _PARTS:
        value = values.get(name)
        listed = value if isinstance(value, list) else [value] if value is not None else []
        if not all(isinstance(each, str) for each in listed):
            raise InputError(f"item {item!r}: {name} = {value!r}: expected a text or a list of texts")
        if listed:
            found.append(", ".join(listed))
    return ". ".join([*found, kind])


def read_words(texts: Sequence[str], config: ModelConfig) -> dict[str, Any]:
    """What the content tower reads of texts, see :meth:`WordReader.read`; nothing without an encoder.

    Args:
        texts: of :func:`describe_item`.
        config: names the encoder.

    Raises:
        InputError: the encoder's folder cannot be used.
    """
    return WordReader(config).read(texts) if config.content_encoder else {}


class WordReader:
    """An encoder over words, loaded and compiled once for any number of texts.

    Args:
        config: names the encoder.

    Raises:
        InputError: the encoder's folder cannot be used.
    """

    def __init__(self, config: ModelConfig):
        architecture, given = _architecture(config), config.content_max_tokens
        self._max_tokens, self._dim = given, architecture.stack.dim
        self._tokenizer = Tokenizer(config.content_encoder, given)
        self._is_frozen = config.content_encoder_training == "frozen"
        if not self._is_frozen:
            return
        self._mesh = mesh_over(jax.local_devices())
        self._tokens_per_row = max(given, min(_TOKENS_PER_ROW, architecture.max_tokens))
        self._texts_per_row = max(1, self._tokens_per_row // _FEWEST_TOKENS)
        self._parameters = jax.device_put(_load(config.content_encoder).parameters, replicated(self._mesh))
        self._bert = Bert(architecture, ComputeOptions(compute_dtype=config.compute_dtype))
        self._mean_states = jax.jit(self._mean_states_of_batch)

    def read(self, texts: Sequence[str]) -> dict[str, Any]:
        """Fields of :class:`~mmei_jax.types.Items` and of a catalogue.

        Args:
            texts: of :func:`describe_item`; what is beyond ``config.content_max_tokens`` is cut off.

        Returns:
            ``word_state`` ``[texts, dim]`` float32 with a frozen encoder, ``word_ids`` ``[texts, content_max_tokens]``
            int32 (-1 is padding) with one that is trained.
        """
        token_ids = [self._tokenizer.encode(text).token_ids for text in texts]
        if self._is_frozen:
            return {"word_state": self._encode(token_ids)}
        return {"word_ids": _padded(token_ids, self._max_tokens)}

    def _encode(self, token_ids: Sequence[Sequence[int]]) -> Float32[np.ndarray, "texts dim"]:
        """The mean state over the tokens of each text, batches of packed rows spread over all local devices."""
        packed = pack_texts(
            token_ids,
            tokens_per_row=self._tokens_per_row,
            rows_per_batch=_ROWS_PER_DEVICE * self._mesh.size,
            texts_per_row=self._texts_per_row,
        )
        sharding = batch_sharding(self._mesh)
        sent = [
            self._mean_states(
                self._parameters,
                jax.device_put(batch.token_ids, sharding),
                jax.device_put(batch.segment_ids, sharding),
            )
            for batch in packed.batches
        ]
        found = np.empty((len(token_ids), self._dim), np.float32)
        for states, batch in zip(sent, packed.batches, strict=True):
            is_text = batch.record_index >= 0
            found[batch.record_index[is_text]] = np.asarray(states)[is_text]
        return found

    def _mean_states_of_batch(self, parameters: Any, ids: Array, segment_ids: Array) -> Float[Array, "texts dim"]:
        outputs: Any = self._bert.apply({"params": parameters}, ids, segment_ids)
        return mean_of_tokens(outputs.last_hidden_state, segment_ids, self._texts_per_row)


def frozen_word_dim(config: ModelConfig) -> int:
    """Features of what a frozen encoder makes of an item's words; 0 where none does.

    Raises:
        InputError: the encoder's folder cannot be used.
    """
    if not config.content_encoder or config.content_encoder_training != "frozen":
        return 0
    return _architecture(config).stack.dim


def trained_encoder(config: ModelConfig) -> BertConfig | None:
    """The BERT that is trained with the content tower; None if there is none.

    Raises:
        InputError: the encoder's folder cannot be used.
    """
    if not config.content_encoder or config.content_encoder_training == "frozen":
        return None
    # The tower reads the mean over tokens, and would train a pooler on nothing.
    return dataclasses.replace(_architecture(config), has_pooler=False)


def trained_encoder_parameters(config: ModelConfig) -> dict[str, Any] | None:
    """What such a BERT begins with: nested dicts of arrays on the host; None if there is none.

    Raises:
        InputError: the encoder's folder cannot be used.
    """
    if trained_encoder(config) is None:
        return None
    parameters = jax.device_get(_load(config.content_encoder).parameters)
    return {name: value for name, value in parameters.items() if name != "pooler"}


def encoder_fingerprint(config: ModelConfig) -> str:
    """What identifies weights and tokenizer of the encoder over words; "" without one.

    Raises:
        InputError: the encoder's folder cannot be used.
    """
    return folder_fingerprint(config.content_encoder) if config.content_encoder else ""


def folder_fingerprint(folder: str) -> str:
    """What identifies weights, preprocessing and tokenizer of an encoder's folder.

    Raises:
        InputError: the folder cannot be used.
    """
    found = hashlib.sha256(read_architecture(folder)[1]["parameters_sha256"].encode())
    for name in _DECIDING_FILES:
        path = Path(folder) / name
        if path.is_file():
            found.update(path.read_bytes())
    return f"sha256:{found.hexdigest()}"


def _architecture(config: ModelConfig) -> BertConfig:
    """Of the encoder, whose weights are not read for it."""
    found, certificate = read_architecture(config.content_encoder)
    if not isinstance(found, BertConfig):
        kind = certificate["model_type"]
        raise InputError(
            f"config.model.content_encoder = {config.content_encoder!r}: holds a {kind!r}: expected a BERT"
        )
    if config.content_max_tokens > found.max_tokens:
        raise InputError(
            f"config.model.content_max_tokens = {config.content_max_tokens}: expected at most the encoder's "
            f"{found.max_tokens}"
        )
    return found


@functools.lru_cache(maxsize=1)
def _load(folder: str) -> Pretrained:
    return load(folder, dtype="float32")


def _padded(token_ids: Sequence[Sequence[int]], width: int) -> Int32[np.ndarray, "texts tokens"]:
    padded = np.full((len(token_ids), width), -1, np.int32)
    for row, ids in zip(padded, token_ids, strict=True):
        row[: len(ids)] = ids
    return padded
