"""Corrupted copies of a batch, on devices: modalities left out, tokens lost, noise added. Pure; meant for ``jax.jit``.

What is lost and what is added is drawn once for each token, from a key of (seed, modality, record, position in the
record) alone. So it depends neither on the batch, its padding and packing, nor on the number of devices; and all
conditions share it: what is lost at a lower rate is lost at a higher one, and noise of another level is the same noise
in another size. Differences between conditions, and between models, are then not differences between draws.

Lost tokens are *taken out*, and the rest moves together: a record whose frames were not delivered is a shorter record,
as the shards hold it and as the model was trained on; positions count what is there. A record that lost all of a
modality's tokens lacks the modality. (Zeros in their place, as some do, would be read as a kind of frame.)
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from mmei_jax.encoders.transformer import positions_in_segment
from mmei_jax.types import MODALITIES, Batch, TokenSequence


@struct.dataclass
class Draws:
    """The chances of one modality's tokens.

    Attributes:
        survival: ``[rows, tokens]`` float32 in [0, 1): a token is lost at every missing rate above it.
        noise: ``[rows, tokens, dim]`` float32, standard normal.
    """

    survival: Float[Array, "rows tokens"]
    noise: Float[Array, "rows tokens dim"]


@struct.dataclass
class Condition:
    """What is done to a batch; several conditions, for ``jax.vmap``, have a leading axis.

    Attributes:
        is_kept: ``[modalities]`` bool, which modalities are left, in the order of MODALITIES.
        missing_rate: scalar float32 in [0, 1], the probability that a token is lost.
        noise_level: scalar float32, standard deviation of the noise in units of each feature's own.
    """

    is_kept: Bool[Array, "*conditions modalities"]
    missing_rate: Float[Array, "*conditions"]
    noise_level: Float[Array, "*conditions"]


def draw(seed: int, batch: Batch) -> dict[str, Draws]:
    """The chances of every token of a batch, by modality; what padding and filler get is arbitrary."""
    num_records, draws = batch.is_record.shape[0], {}
    for name, sequence in batch.sequences().items():
        key = jax.random.fold_in(jax.random.key(seed), MODALITIES.index(name))
        num_rows, _, dim = sequence.features.shape
        records = batch.record_index.reshape(num_rows, num_records // num_rows)
        record = jnp.take_along_axis(records, jnp.maximum(sequence.segment_ids - 1, 0), axis=1)
        position = positions_in_segment(sequence.segment_ids)

        def of_token(record: Array, position: Array, key: Array = key, dim: int = dim) -> tuple[Array, Array]:
            own = jax.random.fold_in(jax.random.fold_in(key, record), position)
            lost, added = jax.random.split(own)
            return jax.random.uniform(lost), jax.random.normal(added, (dim,))

        survival, noise = jax.vmap(jax.vmap(of_token))(record, position)
        draws[name] = Draws(survival=survival, noise=noise)
    return draws


def corrupt(
    batch: Batch,
    draws: Mapping[str, Draws],
    condition: Condition,
    deviations: Mapping[str, Float[Array, "_"]],
) -> Batch:
    """The batch under a condition; of the same shapes, labels untouched.

    A modality that the condition leaves out becomes padding, which the model takes as absent. Under the clean condition
    tokens and their order are the batch's own, to the bit.

    Args:
        batch: records; features of any float type become float32.
        draws: what :func:`draw` gave for it.
        condition: one of them.
        deviations: by modality, ``[dim]`` standard deviation of each feature.
    """
    corrupted: dict[str, Any] = {}
    for name, sequence in batch.sequences().items():
        is_left = (
            (sequence.segment_ids > 0)
            & condition.is_kept[MODALITIES.index(name)]
            & (draws[name].survival >= condition.missing_rate)
        )
        scaled = draws[name].noise * (condition.noise_level * deviations[name])[None, None]
        features = sequence.features.astype(jnp.float32) + scaled
        corrupted[name] = _taken_together(features, sequence.segment_ids, is_left)
    return dataclasses.replace(batch, **corrupted)


def _taken_together(
    features: Float[Array, "rows tokens dim"],
    segment_ids: Int[Array, "rows tokens"],
    is_left: Bool[Array, "rows tokens"],
) -> TokenSequence:
    """What is left, in order, at the start of each row."""
    order = jnp.argsort(~is_left, axis=1, stable=True)
    return TokenSequence(
        features=jnp.take_along_axis(features, order[..., None], axis=1),
        segment_ids=jnp.take_along_axis(jnp.where(is_left, segment_ids, 0), order, axis=1),
    )
