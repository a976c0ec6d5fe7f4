"""What a run depends on beside its configuration: data set, encoders, affect profiles."""

import hashlib
from typing import Any

from mmei_jax.config import Config
from mmei_jax.item_words import encoder_fingerprint
from mmei_jax.raw_inputs import encoders_fingerprint
from mmei_jax.records import Dataset
from mmei_jax.types import InputError
from mmei_jax.user_context import profiles_fingerprint


def manifest_fingerprint(dataset: Dataset) -> str:
    """SHA-256 of a data set's manifest, which holds the hashes of all its files."""
    return hashlib.sha256((dataset.path / "manifest.json").read_bytes()).hexdigest()


def describe_origin(config: Config, dataset: Dataset) -> dict[str, str]:
    """What a run depends on beside its configuration, as hashes."""
    return {
        "manifest_sha256": manifest_fingerprint(dataset),
        "content_encoder": encoder_fingerprint(config.model),
        "encoders": encoders_fingerprint(config.model),
        "affect_profiles": profiles_fingerprint(config),
    }


def check_origin(saved: dict[str, Any], config: Config, dataset: Dataset, run: str) -> None:
    """Refuses to use a run with another data set or other encoders than it was trained with.

    Args:
        saved: among others, what :func:`describe_origin` gave then.
        config: of the run.
        dataset: that is there now.
        run: what was trained, for the message.

    Raises:
        InputError: they differ.
    """
    now = describe_origin(config, dataset)
    if saved["manifest_sha256"] != now["manifest_sha256"]:
        raise InputError(f"{dataset.path}: not the data set that {run} was trained on")
    # None of these was there before it could be configured.
    if saved.get("content_encoder", "") != now["content_encoder"]:
        raise InputError(
            f"config.model.content_encoder = {config.model.content_encoder!r}: its weights or tokenizer are not those "
            f"that {run} was trained with"
        )
    if saved.get("encoders", "") != now["encoders"]:
        folders = ", ".join(config.model.encoders.folders().values())
        raise InputError(f"config.model.encoders: {folders}: not the encoders that {run} was trained with")
    if saved.get("affect_profiles", "") != now["affect_profiles"]:
        given = config.data.affect_profiles
        raise InputError(f"config.data.affect_profiles = {given!r}: not the file that {run} was trained with")
