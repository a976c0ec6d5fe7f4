"""Words to tokens, several texts in a row."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from mmei_jax.encoders.bert import BertConfig
from mmei_jax.encoders.corpus_order import states_of_records
from mmei_jax.encoders.text_packing import pack_texts
from mmei_jax.encoders.tokenizer import Tokenizer
from mmei_jax.extraction.encoder_loading import (
    Collect,
    Devices,
    apply_encoder,
    encoder_fingerprint,
    encoder_name,
    load_encoder,
)
from mmei_jax.extraction.extraction_config import ExtractionConfig, TextExtraction
from mmei_jax.records import Producer
from mmei_jax.types import InputError

# A text of the fewest tokens that a tokenizer gives: one, and the two around it.
_FEWEST_TOKENS = 3


class TextEncoder:
    """Words to tokens; attributes as those of :class:`VisionEncoder`."""

    def __init__(self, config: ExtractionConfig, device: Devices) -> None:
        """Loads the checkpoint and its tokenizer; raises as :class:`VisionEncoder`."""
        text: TextExtraction = config.text
        encoder = load_encoder(text.checkpoint, "text", (BertConfig,), config)
        if text.max_tokens > encoder.config.max_tokens:
            most = encoder.config.max_tokens
            raise InputError(f"config.text.max_tokens = {text.max_tokens}: expected at most the checkpoint's {most}")
        self._drops_context = text.stored == "after_context"
        self.tokenizer = Tokenizer(text.checkpoint, text.max_tokens, keeps_end=self._drops_context)
        self.dim = encoder.config.stack.dim
        self.dtype = config.dtype
        self.token_shape: tuple[int, ...] = ()
        layer = "last, tokens behind the context" if self._drops_context else "last"
        self.producer = Producer(encoder=encoder_name(encoder), revision=encoder_fingerprint(encoder), layer=layer)
        self._device = device
        self._tokens_per_row = text.tokens_per_row
        self._rows = device.rows(text.rows_per_batch)
        self.parameters = device.copy(encoder.parameters)

        @jax.jit
        def encode(parameters: Any, token_ids: Array, segment_ids: Array) -> Float[Array, "rows tokens dim"]:
            return apply_encoder(encoder, parameters, token_ids, segment_ids).last_hidden_state

        self.encode = encode

    def start(self) -> "_TextShard":
        """Begins a shard."""
        return _TextShard(self)

    def dispatch(self, texts: Sequence[list[int]]) -> Collect:
        """Encodes a shard's texts, several in a row."""
        packed = pack_texts(
            texts,
            tokens_per_row=self._tokens_per_row,
            rows_per_batch=self._rows,
            texts_per_row=self._tokens_per_row // _FEWEST_TOKENS,
        )
        place = self._device.place
        sent = [
            (self.encode(self.parameters, place(batch.token_ids), place(batch.segment_ids)), batch)
            for batch in packed.batches
        ]

        starts = [self.tokenizer.context_length(text) if self._drops_context else 0 for text in texts]

        def collect() -> dict[int, np.ndarray]:
            return {
                index: states[starts[index] :]
                for output, batch in sent
                for index, states in states_of_records(np.asarray(output), batch.segment_ids, batch.record_index)
            }

        return collect


class _TextShard:
    """Words of one shard's clips; packed when all are there."""

    def __init__(self, encoder: TextEncoder) -> None:
        self.encoder = encoder
        self._records: list[int] = []
        self._texts: list[list[int]] = []

    def add(self, record: int, token_ids: list[int]) -> None:
        """Takes a text."""
        self._records.append(record)
        self._texts.append(token_ids)

    def finish(self) -> Collect:
        """Sends everything off."""
        if not self._texts:
            return dict
        collect = self.encoder.dispatch(self._texts)
        return lambda: {self._records[index]: states for index, states in collect().items()}
