"""The records that a loop's users show, as a trained run reads them: written once, the same for a resumed loop.

The true labels are the environment's: they choose which record shows a mood, and no policy reads them.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from mmei_jax.evaluation import BestRun, Evaluator, open_best_run
from mmei_jax.feedback.environment import World, make_world
from mmei_jax.feedback.loop_config import LoopConfig, check_slate_size
from mmei_jax.feedback.slate_policies import Pool
from mmei_jax.fingerprints import check_hash
from mmei_jax.origin import manifest_fingerprint
from mmei_jax.record_files import MANIFEST_NAME
from mmei_jax.simulation import aigc_int_feedback
from mmei_jax.types import InputError
from mmei_jax.workdir import read_json, write_bytes, write_json

_NAME = "pool.safetensors"
_ROUNDS, _AB = "rounds", "ab"
_HASH = "pool_sha256"
_NOTED = "where the pools of a loop are from"


@dataclass(frozen=True)
class Pools:
    """Records of the rounds, and of the comparison after them.

    Attributes:
        rounds: what policies may read while they learn and are judged.
        rounds_world: the simulation whose users show those records.
        ab: what the arms may read.
        ab_world: of the comparison.
        source: JSON values: the run, its data, splits and counts.
    """

    rounds: Pool
    rounds_world: World
    ab: Pool
    ab_world: World
    source: dict[str, Any]


def read_pools(config: LoopConfig) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """What the run says of both groups of records.

    Args:
        config: of the loop.

    Returns:
        Arrays by name for :func:`write_pools`, and JSON values on where they are from.

    Raises:
        InputError: the run cannot be opened, has another catalogue, or reads whose record it is; no record of a split
            shows one of the states; or slates are larger than a kind of the catalogue.
    """
    check_slate_size(config, aigc_int_feedback.item_world().kind)
    run = _open_run(config)
    catalogue = run.dataset.with_item_words(None).catalogue()
    if catalogue is None or tuple(catalogue.ids) != _item_ids():
        raise InputError(
            f"config.pool.run = {config.pool.run!r}: its data, {run.dataset.path}, have another catalogue; expected a "
            "run on AIGC-INT-Sim, whose users are known"
        )
    for key, value in (
        ("model.user_embedding", run.config.model.user_embedding),
        ("data.affect_profiles", run.config.data.affect_profiles),
    ):
        if value:
            raise InputError(
                f"config.pool.run = {config.pool.run!r}: trained with {key} = {value!r}, and reads whose record it is; "
                "expected a run without, since any user of the loop may show any record"
            )
    evaluator = Evaluator(run.model, run.config, run.dataset, run.mesh)
    arrays: dict[str, np.ndarray] = {}
    counts: dict[str, int] = {}
    for group, key, split in ((_ROUNDS, "pool.split", config.pool.split), (_AB, "ab.split", config.ab.split)):
        found, arrays["item_embedding"] = _read_split(run, evaluator, split, config.pool.num_records or None)
        try:
            make_world(found["emotion"], found["intent"])
        except InputError as error:
            raise InputError(
                f"config.{key} = {split!r}, config.pool.num_records = {config.pool.num_records}: {error}; take more "
                "records (0 takes all) or another split"
            ) from error
        arrays |= {f"{group}.{name}": values for name, values in found.items()}
        counts[group] = len(found["emotion"])
    return arrays, {
        "run": config.pool.run,
        "checkpoint_step": run.step,
        "manifest_sha256": manifest_fingerprint(run.dataset),
        "dataset": run.dataset.spec.name,
        "split": config.pool.split,
        "num_records": counts[_ROUNDS],
        "ab_split": config.ab.split,
        "ab_num_records": counts[_AB],
    }


def _open_run(config: LoopConfig) -> BestRun:
    folder, data = config.pool.run, config.pool.data
    if not (Path(folder) / "config.json").is_file():
        raise InputError(f"config.pool.run = {folder!r}: expected the folder of a run that train.py made")
    if data and not (Path(data) / MANIFEST_NAME).is_file():
        raise InputError(f"config.pool.data = {data!r}: expected the folder of a data set, with {MANIFEST_NAME}")
    try:
        return open_best_run(Path(folder), data or None)
    except InputError as error:
        raise InputError(f"config.pool.run = {folder!r}: {error}") from error


def _read_split(
    run: BestRun, evaluator: Evaluator, split: str, num_records: int | None
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    names = getattr(run.config.data, f"{split}_splits")
    users, items = evaluator.embed(run.variables, names)
    records, kept = run.dataset.split(*names), slice(None, num_records)
    labels = {
        name: np.asarray(records.column(f"label_{name}"))[kept].astype(np.int32) for name in ("emotion", "intent")
    }
    return {"user_embedding": users[kept], **labels}, items


def write_pools(workdir: Path, arrays: dict[str, np.ndarray], source: dict[str, Any]) -> bool:
    """Writes what :func:`read_pools` gave, and their hash; the arrays last, whose file says that all is there.

    Args:
        workdir: of the loop.
        arrays: by name.
        source: where they are from.

    Returns:
        Whether the hash was there already: the arrays were lost, or not written, and are the same again.

    Raises:
        InputError: they are not the same: rounds that are there were made with others.
    """
    path, content = workdir / _NAME, safetensors.numpy.save(arrays)
    noted, sha256 = path.with_suffix(".json"), hashlib.sha256(content).hexdigest()
    is_known = noted.exists()
    if is_known and (known := _noted_hash(noted, read_json(noted, _NOTED))) != sha256:
        raise InputError(
            f"{path}: missing, and made again from {source['run']} it has SHA-256 {sha256[:16]}..., {noted.name} says "
            f"{known[:16]}...; expected the run and the data with which this loop began, or another --workdir"
        )
    write_json(noted, {**source, _HASH: sha256})
    write_bytes(path, content)
    return is_known


def has_pools(workdir: Path) -> bool:
    """Whether :func:`write_pools` came to its end there."""
    return (workdir / _NAME).exists()


def load_pools(workdir: Path) -> Pools:
    """What :func:`write_pools` wrote.

    Args:
        workdir: of the loop.

    Raises:
        InputError: a file is missing or damaged, was changed since, or no record shows one of the states.
    """
    path, items, ids = workdir / _NAME, aigc_int_feedback.item_world(), _item_ids()
    noted = path.with_suffix(".json")
    source = read_json(noted, _NOTED)
    sha256 = _noted_hash(noted, source)
    try:
        check_hash(path, sha256, noted.name)
        arrays = safetensors.numpy.load(path.read_bytes())
        pools = {
            group: Pool(arrays[f"{group}.user_embedding"], arrays["item_embedding"], items.kind, ids)
            for group in (_ROUNDS, _AB)
        }
        labels = {group: (arrays[f"{group}.emotion"], arrays[f"{group}.intent"]) for group in pools}
    except (OSError, KeyError, safetensors.SafetensorError) as error:
        raise InputError(f"{path}: expected the pools of a loop: {error}") from error
    return Pools(pools[_ROUNDS], make_world(*labels[_ROUNDS]), pools[_AB], make_world(*labels[_AB]), source)


def _noted_hash(path: Path, source: Any) -> str:
    """The hash that stands in what ``path`` holds."""
    if not isinstance(source, dict) or not isinstance(source.get(_HASH), str):
        raise InputError(f"{path}: expected {_NOTED}, with {_HASH!r} of {_NAME}")
    return str(source[_HASH])


def _item_ids() -> tuple[str, ...]:
    return tuple(aigc_int_feedback.item_ids())
