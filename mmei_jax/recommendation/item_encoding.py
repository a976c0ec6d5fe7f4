"""From the items of a catalogue to their embeddings, E_c of Eq. 7: the content tower of a trained run."""

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Float32

from mmei_jax.evaluation import BestRun, embed_catalogue
from mmei_jax.fingerprints import parameters_hash
from mmei_jax.item_words import WordReader, describe_item, encoder_fingerprint
from mmei_jax.recommendation.catalogue_files import ROWS_PER_BLOCK
from mmei_jax.recommendation.index_files import EncodedItems
from mmei_jax.records import Catalogue
from mmei_jax.sharding import batch_sharding
from mmei_jax.types import InputError, Items

# Keys of config.model that change what the tower's parameters give.
_TOWER_KEYS = (
    "compute_dtype",
    "content_encoder_training",
    "content_features",
    "content_max_tokens",
    "embedding_dim",
    "normalize_embeddings",
)


class ItemEncoder:
    """A run's content tower, compiled once for blocks of one size.

    Attributes:
        kind_names: kinds that an item may be of.
        item_dim: features that the tower reads of an item; 0 where it reads none.
        embedding_dim: numbers of an embedding.
        tower_sha256: tells towers apart, see :func:`~mmei_jax.fingerprints.parameters_hash`.

    Args:
        run: trained to rank.

    Raises:
        InputError: the run has no content tower.
    """

    def __init__(self, run: BestRun):
        tasks = run.model.tasks
        if not tasks.has_ranking:
            raise InputError(
                f"config.loss.ranking of the run = {run.config.loss.ranking!r}: expected a run that was trained to rank"
            )
        self.kind_names: tuple[str, ...] = tuple(run.dataset.manifest["catalogue"]["kind_names"])
        self.item_dim, self.embedding_dim = tasks.item_dim, run.config.model.embedding_dim
        settings = {name: getattr(run.config.model, name) for name in _TOWER_KEYS}
        settings |= {"item_dim": self.item_dim, "kind_names": list(self.kind_names)}
        # A frozen encoder is no part of the parameters.
        settings["content_encoder"] = encoder_fingerprint(run.config.model)
        self.tower_sha256 = parameters_hash(run.variables["params"]["content_tower"], settings)
        self._model_config = run.config.model
        self._variables = run.variables
        self._sharding = batch_sharding(run.mesh)
        # Whole rows on every device.
        self._rows_per_block = -(-ROWS_PER_BLOCK // run.mesh.size) * run.mesh.size
        self._embed = jax.jit(functools.partial(embed_catalogue, run.model))

    @functools.cached_property
    def _words(self) -> WordReader:
        """Loaded for items that come without words."""
        return WordReader(self._model_config)

    def encode(self, items: Catalogue) -> Float32[np.ndarray, "items embedding"]:
        """``[items, embedding]`` float32, in blocks of one size, of which the last is padded.

        Args:
            items: of the run's kinds and number of features.

        Raises:
            InputError: the kinds or the number of features are others, or an embedding is 0 or not finite.
        """
        if items.kind_names != self.kind_names or self.item_dim not in (0, items.features.shape[1]):
            raise InputError(
                f"items of kinds {', '.join(items.kind_names)} with {items.features.shape[1]} features: expected kinds "
                f"{', '.join(self.kind_names)} and {self.item_dim} features"
            )
        columns = self._columns(items)
        parts = []
        for start in range(0, len(items.ids), self._rows_per_block):
            num_items = min(self._rows_per_block, len(items.ids) - start)
            padding = self._rows_per_block - num_items
            block = jax.tree.map(
                lambda column, start=start, padding=padding: np.pad(
                    column[start : start + self._rows_per_block], ((0, padding), *((0, 0),) * (column.ndim - 1))
                ),
                columns,
            )
            found = self._embed(self._variables, jax.device_put(block, self._sharding))
            parts.append(np.asarray(found, np.float32)[:num_items])
        embedding = np.concatenate(parts)
        # What is not finite within the tower leaves it as 0 where embeddings have unit length.
        bad = np.flatnonzero(~np.isfinite(embedding).all(axis=1) | ~embedding.any(axis=1))
        if bad.size:
            item = items.ids[bad[0]]
            raise InputError(f"item {item!r}: its embedding is 0 or not finite; expected ordinary features and weights")
        return embedding

    def _columns(self, items: Catalogue) -> Items:
        """What the tower reads of all items, on the host; words where they do not come with the items."""
        given: Any = {"word_state": items.word_state, "word_ids": items.word_ids}
        if self._model_config.content_encoder and items.word_state is None and items.word_ids is None:
            rows = zip(items.texts, items.kind, items.ids, strict=True)
            given = self._words.read([describe_item(text, self.kind_names[kind], name) for text, kind, name in rows])
        features: Any = np.asarray(items.features, np.float32)[:, : self.item_dim]
        kind: Any = np.asarray(items.kind, np.int32)
        return Items(features=features, kind=kind, **given)

    def encode_blocks(self, blocks: Iterable[Catalogue]) -> Iterator[EncodedItems]:
        """Items block by block, as :meth:`encode` embeds them."""
        for items in blocks:
            yield EncodedItems(items, self.encode(items))
