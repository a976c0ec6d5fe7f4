"""What F_u of Eq. 7 knows of a user beyond this moment: an embedding of their own, and their affect so far."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from mmei_jax.config import ModelConfig
from mmei_jax.encoders.transformer import Dense, embedding_init, with_axes
from mmei_jax.types import Dimension, UserContext


class UserSide(nn.Module):
    """A vector that is added to the projection of a record's affect: exactly 0 for a user of whom nothing is known.

    A user's row of the table and the projection of their profile are learned. While training, a user is unknown with
    probability ``user_dropout_rate``, so that affect alone is learned to be enough.

    Attributes:
        config: the embedding's size, and the rate.
        num_users: rows of the table of users; 0 has none.
        profile_dim: features of an affect profile; 0 reads none.
    """

    config: ModelConfig
    num_users: int
    profile_dim: int

    @nn.compact
    def __call__(
        self, context: UserContext | None, num_records: Dimension, *, is_training: bool
    ) -> Float[Array, "batch embedding"]:
        """``[num_records, embedding]`` float32."""
        size, zeros = self.config.embedding_dim, jnp.zeros(num_records, jnp.int32)
        is_known = self._is_known(num_records, is_training=is_training)
        total = jnp.zeros((num_records, size))
        if self.num_users:
            table = self.param("embedding", with_axes(embedding_init, "user", "embed"), (self.num_users, size))
            index = zeros - 1 if context is None or context.index is None else context.index
            own = jnp.take(table, jnp.maximum(index, 0), axis=0)
            total += jnp.where((is_known & (index >= 0))[:, None], own, 0.0)
        if self.profile_dim:
            project = Dense(size, ("features", "embed"), use_bias=False, name="profile_projection")
            has_profile = jnp.zeros(num_records, bool)
            profile = jnp.zeros((num_records, self.profile_dim))
            if context is not None and context.profile is not None and context.has_profile is not None:
                profile, has_profile = context.profile, context.has_profile
            total += jnp.where((is_known & has_profile)[:, None], project(profile), 0.0)
        return total

    def _is_known(self, num_records: Dimension, *, is_training: bool) -> Bool[Array, "batch"]:
        rate = self.config.user_dropout_rate
        if not is_training or rate == 0.0:
            return jnp.ones(num_records, bool)
        return jax.random.uniform(self.make_rng("dropout"), (num_records,)) >= rate
