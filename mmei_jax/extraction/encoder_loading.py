"""Encoders of extraction: loaded by modality, on all local devices as one."""

from collections.abc import Callable
from typing import Any, cast

import jax
import numpy as np
from jaxtyping import Array, Float32

from mmei_jax.encoders.outputs import EncoderOutputs
from mmei_jax.encoders.pretrained import Pretrained, load
from mmei_jax.encoders.stack import ComputeOptions
from mmei_jax.extraction.extraction_config import ExtractionConfig
from mmei_jax.sharding import batch_sharding, mesh_over, replicated
from mmei_jax.types import InputError

# Fetches from the devices, by the clip's index in its shard, the states of those that were sent.
Collect = Callable[[], dict[int, Float32[np.ndarray, "tokens dim"]]]


def load_encoder(folder: str, key: str, config_types: tuple[type, ...], config: ExtractionConfig) -> Pretrained:
    """The encoder of a modality.

    Args:
        folder: its checkpoint.
        key: of the modality in the configuration.
        config_types: the architectures that are accepted.
        config: says in what the encoder computes.

    Raises:
        InputError: the folder holds no checkpoint, or one of another kind.
    """
    encoder = load(folder, options=ComputeOptions(compute_dtype=config.compute_dtype))
    if not isinstance(encoder.config, config_types):
        found, expected = type(encoder.config).__name__, " or a ".join(each.__name__ for each in config_types)
        raise InputError(f"config.{key}.checkpoint = {folder!r}: holds a {found}: expected a {expected}")
    return encoder


def apply_encoder(encoder: Pretrained, parameters: Any, *inputs: Array, **options: Any) -> EncoderOutputs:
    """Runs the encoder; to be jitted."""
    return cast(EncoderOutputs, encoder.module.apply({"params": parameters}, *inputs, **options))


def encoder_fingerprint(encoder: Pretrained) -> str:
    """What identifies the weights."""
    return f"sha256:{encoder.certificate['parameters_sha256']}"


def encoder_name(encoder: Pretrained) -> str:
    """Its kind, and where it comes from."""
    return f"{encoder.certificate['model_type']} {encoder.certificate['source']['name']}"


class Devices:
    """All local devices, as one: batches are split over them, parameters are on each."""

    def __init__(self) -> None:
        mesh = mesh_over(jax.local_devices())
        self.num_devices = mesh.size
        self._batch, self._copy = batch_sharding(mesh), replicated(mesh)

    def rows(self, wanted: int) -> int:
        """The smallest number of rows, at least ``wanted``, that the devices share evenly."""
        return -(-wanted // self.num_devices) * self.num_devices

    def place(self, array: Any) -> Array:
        """A batch, split over the devices."""
        return jax.device_put(array, self._batch)

    def copy(self, parameters: Any) -> Any:
        """Parameters, on every device."""
        return jax.device_put(parameters, self._copy)
