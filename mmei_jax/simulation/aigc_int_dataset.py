"""Writes AIGC-INT-Sim as a data set of shards, with the exact ceilings of every split in its manifest.

Shards are ``mmei_jax.records``'s, a module of the same level: the command imports it and hands it on.
"""

import argparse
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from mmei_jax.command import CommandParser, report_errors
from mmei_jax.simulation.aigc_int import EMOTIONS, INTENTS, KINDS, Chunk, Latents, Tokens, draw_latents, stream
from mmei_jax.simulation.aigc_int_feedback import (
    SLATE_SIZE,
    Slates,
    draw_slates,
    item_ids,
    item_texts,
    item_world,
    relevant_items,
)
from mmei_jax.simulation.aigc_int_report import ReferenceTotals, predict, progress
from mmei_jax.types import MODALITIES, InputError

SPLITS = ("train", "validation", "test")
# Of 20 equal parts: 70 % train, 15 % validation, 15 % test.
_FIRST_VALIDATION_PART, _FIRST_TEST_PART = 14, 17
# Kinds have prior .35, .35, .15, .15: 70/15/15 exactly, in expectation.
SPLIT_OF_KIND = {"music": "train", "video": "train", "image": "validation", "text": "test"}
DESCRIPTION = (
    "SIMULATED interaction records: no person was recorded. Features are drawn from a causal model with known "
    "constants, so that the exact posterior of emotion and intent is known; the card is data/aigc_int/README.md."
)
SIMULATION_REVISION = "1"
DEFAULT_NUM_RECORDS = 20_000


def split_membership(latents: Latents, split_by: str) -> dict[str, Bool[np.ndarray, "batch"]]:
    """Which records belong to each of :data:`SPLITS`; every record to exactly one.

    Args:
        latents: of the records.
        split_by: ``record``, ``user`` (no user in two splits) or ``content_kind`` (see :data:`SPLIT_OF_KIND`).

    Raises:
        InputError: ``split_by`` is none of these.
    """
    if split_by == "content_kind":
        wanted = np.array([SPLITS.index(SPLIT_OF_KIND[kind]) for kind in KINDS])[latents.kind]
    elif split_by in ("record", "user"):
        part = latents.split_draw if split_by == "record" else latents.user_split_draw
        wanted = np.searchsorted([_FIRST_VALIDATION_PART, _FIRST_TEST_PART], part, side="right")
    else:
        raise InputError(f"split_by = {split_by!r}: expected record, user or content_kind")
    return {name: wanted == position for position, name in enumerate(SPLITS)}


def size_membership(
    records: Int[np.ndarray, "batch"], sizes: Mapping[str, int]
) -> dict[str, Bool[np.ndarray, "batch"]]:
    """Which records belong to each split when splits of exact sizes follow one another in the order of the records.

    Args:
        records: ``[batch]`` numbers of the records within their seed.
        sizes: records of each split; the first split begins at record 0.
    """
    position = np.searchsorted(np.cumsum(list(sizes.values())), records, side="right")
    return {name: position == index for index, name in enumerate(sizes)}


def _round_tokens(chunk: Chunk, dtype: str) -> Chunk:
    """The chunk with tokens as they will be stored: ceilings are computed from what a model will read."""
    tokens = {name: Tokens(part.values.astype(dtype), part.lengths) for name, part in chunk.tokens.items()}
    return Chunk(chunk.index, chunk.first_record, chunk.latents, tokens)


def main(arguments: Sequence[str]) -> int:
    """The command ``generate``: writes the shards; returns the exit code."""
    from mmei_jax import records

    options = _parse(arguments)

    def run() -> int:
        _resolve_splits(options)
        with records.DatasetWriter(options.output, _spec(records, options), overwrite=options.overwrite) as writer:
            totals = _write(records, writer, options)
        _print_summary(options, totals)
        return 0

    return report_errors(run)


def _spec(records: ModuleType, options: argparse.Namespace) -> Any:
    return records.DatasetSpec(
        name="AIGC-INT-Sim (simulated)",
        description=DESCRIPTION,
        source="mmei_jax.simulation.aigc_int",
        licence="Apache-2.0",
        modalities={
            name: records.ModalitySpec(
                options.dim, options.dtype, records.Producer(encoder="AIGC-INT-Sim", revision=SIMULATION_REVISION)
            )
            for name in MODALITIES
        },
        labels={
            "emotion": records.LabelSpec("categorical", EMOTIONS),
            "intent": records.LabelSpec("categorical", INTENTS),
        },
        has_slates=True,
        has_relevant_items=True,
        extras=dict.fromkeys(_extras(draw_latents(0, 0)), "int32"),
    )


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = CommandParser(
        prog="python -m mmei_jax.simulation.aigc_int generate",
        description="Writes simulated records as feature shards, streamed: memory does not grow with their number.",
    )
    parser.add_argument("--output", required=True, help="folder to make")
    parser.add_argument("--num_records", type=int, help=f"default: {DEFAULT_NUM_RECORDS}; the paper has 5000")
    parser.add_argument("--dim", type=int, default=32, help="features per token, at least 14 (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same bytes (default: %(default)s)")
    parser.add_argument(
        "--split_by",
        choices=("record", "user", "content_kind"),
        help="70/15/15 %% into train, validation and test; default: record",
    )
    parser.add_argument(
        "--split_sizes",
        metavar="NAME=SIZE,...",
        help="instead of --num_records and --split_by: splits of these names and exact sizes, one after the other in "
        "the order of the records, such as test=3000,train_a=1000,train_b=9000: joined, the two are 10000 to train on",
    )
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float32", help="default: %(default)s")
    parser.add_argument("--overwrite", action="store_true", help="replace a data set that is there already")
    return parser.parse_args(arguments)


def _resolve_splits(options: argparse.Namespace) -> None:
    """Fills in ``num_records`` and ``split_by``, and turns ``split_sizes`` into numbers by name (None: not given).

    Raises:
        InputError: ``split_sizes`` cannot be read, or is given along with one of the options that it replaces.
    """
    if options.split_sizes is None:
        options.num_records = DEFAULT_NUM_RECORDS if options.num_records is None else options.num_records
        options.split_by = options.split_by or "record"
        return
    if options.num_records is not None or options.split_by is not None:
        raise InputError("--split_sizes: expected without --num_records and --split_by, which it replaces")
    sizes: dict[str, int] = {}
    for item in options.split_sizes.split(","):
        name, _, size = item.partition("=")
        if not (size.isdecimal() and int(size)) or name in sizes:
            raise InputError(f"--split_sizes {item!r}: expected NAME=SIZE, each name once, sizes at least 1")
        sizes[name] = int(size)
    options.split_sizes, options.num_records, options.split_by = sizes, sum(sizes.values()), "size"


def _membership(options: argparse.Namespace, chunk: Chunk) -> dict[str, Bool[np.ndarray, "batch"]]:
    if options.split_sizes is None:
        return split_membership(chunk.latents, options.split_by)
    return size_membership(chunk.first_record + np.arange(len(chunk.latents.emotion)), options.split_sizes)


def _write(records: ModuleType, writer: Any, options: argparse.Namespace) -> Mapping[str, ReferenceTotals]:
    """Streams all records into the writer; the totals of the ceilings by split.

    Raises:
        InputError: a split would be empty, or an option cannot be used.
    """
    writer.write_catalogue(_catalogue(records))
    splits = tuple(options.split_sizes or SPLITS)
    totals = {name: ReferenceTotals() for name in splits}
    num_written = dict.fromkeys(splits, 0)
    for drawn in progress(stream(options.seed, options.num_records, options.dim), options.num_records):
        chunk = _round_tokens(drawn, options.dtype)
        predictions = predict(chunk)
        # Of the whole chunk, also where the data set ends within it: a record's slate must not depend on the others.
        slates = draw_slates(options.seed, chunk.index, draw_latents(options.seed, chunk.index))
        relevant = relevant_items(chunk.latents)
        for name, is_member in _membership(options, chunk).items():
            rows = np.flatnonzero(is_member)
            if len(rows):
                totals[name].add(predictions, is_member)
                writer.write_columns(name, _columns(records, chunk, slates, relevant, rows, options.seed))
                num_written[name] += len(rows)
    empty = [name for name in splits if not num_written[name]]
    if empty:
        raise InputError(
            f"num_records = {options.num_records}: leaves split {empty[0]!r} empty when split by {options.split_by}; "
            "ask for more"
        )
    for name in splits:
        writer.set_reference(name, totals[name].named_figures())
    names = ("num_records", "dim", "seed", "split_by", "dtype")
    writer.set_counts("simulation", {name: getattr(options, name) for name in names})
    return totals


def _catalogue(records: ModuleType) -> Any:
    world = item_world()
    return records.Catalogue(item_ids(), world.kind.astype(np.int32), KINDS, world.features, item_texts())


def _extras(latents: Latents) -> dict[str, np.ndarray]:
    """Latents that are stored beside the labels, to look at results by; training does not read them."""
    return {
        "content_kind": latents.kind,
        "user_type": latents.user_type,
        "shown_emotion": latents.shown_emotion,
        "conflict_modality": latents.conflict_modality,
        "manner": latents.manner,
    }


def _columns(
    records: ModuleType,
    chunk: Chunk,
    slates: Slates,
    relevant: Int[np.ndarray, "batch relevant"],
    rows: Int[np.ndarray, "rows"],
    seed: int,
) -> Any:
    """The chunk's records at ``rows``, as ``records.RecordColumns``."""
    latents = chunk.latents
    is_member = np.isin(np.arange(len(latents.user)), rows)
    features = {}
    for name, tokens in chunk.tokens.items():
        is_token_of_member = np.repeat(is_member, np.maximum(tokens.lengths, 0))
        features[name] = records.Ragged(tokens.values[is_token_of_member], tokens.lengths[rows])

    def column(values: np.ndarray) -> Any:
        return records.MaskedColumn(values[rows].astype(np.int32))

    return records.RecordColumns(
        ids=[f"aigc-int-sim-{seed}-{chunk.first_record + row:09d}" for row in rows],
        user_ids=[f"user-{user:08d}" for user in latents.user[rows]],
        features=features,
        labels={"emotion": column(latents.emotion), "intent": column(latents.intent)},
        slate=records.Slate(
            item_index=slates.item_index[rows].ravel().astype(np.int32),
            propensity=slates.propensity[rows].ravel(),
            dwell_seconds=slates.dwell_seconds[rows].ravel(),
            num_replays=slates.num_replays[rows].ravel().astype(np.int32),
            is_liked=slates.is_liked[rows].ravel(),
            satisfaction=slates.satisfaction[rows].ravel(),
        ),
        slate_lengths=np.full(len(rows), SLATE_SIZE),
        relevant_items=records.Ragged(relevant[rows].ravel().astype(np.int32), np.full(len(rows), relevant.shape[1])),
        extras={name: column(values) for name, values in _extras(latents).items()},
    )


def _print_summary(options: argparse.Namespace, totals: Mapping[str, ReferenceTotals]) -> None:
    print(f"{options.output}: {options.num_records} simulated records, split by {options.split_by}")
    for name in totals:
        exact = totals[name].figures("emotion")["accuracy"]
        fused = totals[name].figures("emotion", "late_fusion")["accuracy"]
        print(f"  {name}: emotion accuracy of the exact posterior {exact:.4f}, of late fusion {fused:.4f}")
