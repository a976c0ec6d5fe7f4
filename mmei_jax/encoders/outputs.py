"""What every encoder returns, by name, and how one vector per record is read from it."""

import jax
import numpy as np
from flax import struct
from jax import export, lax
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mmei_jax.types import Dimension, InputError

# What encoders take: numpy arrays on the host as well as arrays of jax.
ArrayLike = Array | np.ndarray
# Of speech encoders, what is summed where "sum_of_last_four" is asked for.
NUM_LAYERS_SUMMED = 4


def places(count: Dimension) -> ArrayLike:
    """``0, 1 .. count - 1``: a NumPy array, or where ``count`` is a symbolic size of an exported program one of jax."""
    return jnp.arange(count) if export.is_symbolic_dim(count) else np.arange(count)


@struct.dataclass
class EncoderOutputs:
    """Outputs of an encoder on ``rows`` token rows.

    Padding holds exact zeros in every output.

    Attributes:
        last_hidden_state: ``[rows, tokens, dim]`` float32, after the encoder's last norm.
        is_valid: ``[rows, tokens]`` bool, False for padding.
        pooled: ``[rows * segments, dim]`` float32, what the architecture's own pooler gives for each record, row by
            row; zeros for a segment that the row lacks. None where the model has no pooler.
        hidden_states: where asked for, ``num_layers + 1`` arrays ``[rows, tokens, dim]`` float32: what enters the first
            layer, then what leaves each. A norm that follows the last layer is in ``last_hidden_state`` alone. Where
            an encoder changes the number of tokens or features on its way, they have those of their stage.
        frame_times_seconds: ``[tokens]`` float32, audio only: the middle of what each token hears.
    """

    last_hidden_state: Float[Array, "rows tokens dim"]
    is_valid: Bool[Array, "rows tokens"]
    pooled: Float[Array, "batch pooled_dim"] | None = None
    hidden_states: tuple[Float[Array, "rows _ _"], ...] | None = None
    frame_times_seconds: Float[Array, "tokens"] | None = None


def is_token_of_segment(
    segment_ids: Int[ArrayLike, "rows tokens"] | Bool[ArrayLike, "rows tokens"], num_segments: int
) -> Bool[Array, "rows segments tokens"]:
    """Which tokens belong to each of a row's segments ``1 .. num_segments``.

    Raises:
        InputError: there is a segment beyond ``num_segments``. (Not in a compiled program, which gets ``segment_ids``
            as an argument: there, no value can be checked.)
    """
    if not isinstance(segment_ids, jax.core.Tracer) and num_segments < (most := int(np.max(segment_ids, initial=0))):
        raise InputError(f"num_segments = {num_segments}: expected at least {most}, which segment_ids hold")
    segment_ids = jnp.asarray(segment_ids, jnp.int32)
    return segment_ids[:, None, :] == jnp.arange(1, num_segments + 1, dtype=jnp.int32)[None, :, None]


def nan_where_dropped(
    vectors: Float[Array, "batch dim"],
    segment_ids: Int[ArrayLike, "rows tokens"] | Bool[ArrayLike, "rows tokens"],
    num_segments: int,
) -> Float[Array, "batch dim"]:
    """The vectors of each row's segments ``1 .. num_segments``; all NaN where the row has further segments.

    A compiled program cannot raise, and a record that is dropped must not go unnoticed.

    Args:
        vectors: ``[rows * num_segments, dim]``.
        segment_ids: ``[rows, tokens]``, as everywhere.
        num_segments: records per row, at most.
    """
    has_more = (jnp.asarray(segment_ids, jnp.int32) > num_segments).any(axis=1)
    return jnp.where(jnp.repeat(has_more, num_segments)[:, None], jnp.nan, vectors)


def first_token(
    states: Float[ArrayLike, "rows tokens dim"],
    segment_ids: Int[ArrayLike, "rows tokens"] | Bool[ArrayLike, "rows tokens"],
    num_segments: int = 1,
) -> Float[Array, "batch dim"]:
    """The state of each record's first token (BERT's and ViT's ``[CLS]``).

    Args:
        states: ``[rows, tokens, dim]``.
        segment_ids: ``[rows, tokens]`` int32: 0 is padding, ``s >= 1`` the row's ``s``-th record. For one record per
            row, a mask of bools says the same.
        num_segments: records per row, at most.

    Returns:
        ``[rows * num_segments, dim]``; exact zeros for a record without tokens. NaN for a row of more than
        ``num_segments`` records (:func:`nan_where_dropped`).

    Raises:
        InputError: as :func:`is_token_of_segment`.
    """
    is_own = is_token_of_segment(segment_ids, num_segments)
    states = jnp.take_along_axis(states, is_own.argmax(axis=-1)[..., None], axis=1)
    states = jnp.where(is_own.any(axis=-1)[..., None], states, 0.0)
    return nan_where_dropped(states.reshape(-1, states.shape[-1]), segment_ids, num_segments)


def mean_of_tokens(
    states: Float[ArrayLike, "rows tokens dim"],
    segment_ids: Int[ArrayLike, "rows tokens"] | Bool[ArrayLike, "rows tokens"],
    num_segments: int = 1,
) -> Float[Array, "batch dim"]:
    """The mean state over each record's tokens; padding takes no part.

    Args:
        states: ``[rows, tokens, dim]``, finite where padding.
        segment_ids: ``[rows, tokens]`` int32: 0 is padding, ``s >= 1`` the row's ``s``-th record. For one record per
            row, a mask of bools says the same.
        num_segments: records per row, at most.

    Returns:
        ``[rows * num_segments, dim]`` float32; exact zeros for a record without tokens. NaN for a row of more
        than ``num_segments`` records (:func:`nan_where_dropped`).

    Raises:
        InputError: as :func:`is_token_of_segment`.
    """
    is_own = is_token_of_segment(segment_ids, num_segments).astype(jnp.float32)
    total = jnp.einsum("rst,rtd->rsd", is_own, states, precision=lax.Precision.HIGHEST)
    mean = total / jnp.maximum(is_own.sum(axis=-1, keepdims=True), 1.0)
    return nan_where_dropped(mean.reshape(-1, mean.shape[-1]), segment_ids, num_segments)


def sum_of_last_layers(outputs: EncoderOutputs) -> Float[Array, "rows tokens dim"]:
    """The sum of the states after the last :data:`NUM_LAYERS_SUMMED` layers, which the encoder was asked for.

    Raises:
        ValueError: the encoder was not asked for its hidden states.
    """
    if outputs.hidden_states is None:
        raise ValueError("outputs.hidden_states is None: expected an encoder called with with_hidden_states=True")
    return jnp.stack(outputs.hidden_states[-NUM_LAYERS_SUMMED:]).sum(axis=0)


def mean_of_frames(
    states: Float[Array, "rows frames dim"], is_valid: Bool[Array, "rows frames"], frames_per_token: int
) -> tuple[Float[Array, "rows tokens dim"], Array]:
    """The mean of each ``frames_per_token`` frames that follow each other, of the valid ones among them.

    Returns:
        ``[rows, tokens, dim]`` states, and which tokens have at least one valid frame.
    """
    if frames_per_token == 1:
        return states, is_valid
    rows, frames, dim = states.shape
    tokens = -(-frames // frames_per_token)
    # So written that it divides evenly for symbolic sizes too.
    filler = tokens * frames_per_token - frames
    grouped = jnp.pad(states, ((0, 0), (0, filler), (0, 0))).reshape(rows, tokens, frames_per_token, dim)
    is_counted = jnp.pad(is_valid, ((0, 0), (0, filler))).reshape(rows, tokens, frames_per_token)
    total = jnp.where(is_counted[..., None], grouped, 0.0).sum(axis=2)
    return total / jnp.maximum(is_counted.sum(axis=2), 1)[..., None], is_counted.any(axis=2)
