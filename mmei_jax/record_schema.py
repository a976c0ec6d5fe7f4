"""What a data set of records holds: its description, one record, many records, and the Arrow columns of a shard.

Arrow columns of a shard, by name: ``id``, ``user_id``, ``dialogue_id`` (large_string), ``turn`` (int32), one per
modality (large_list<fixed_size_list<dtype, dim>>, null where absent), ``label_<name>`` (int32, float32, or
fixed_size_list<float32, classes>; null where not labelled), ``slate_<field>`` and ``relevant_items`` (large_list), and
``extra_<name>``. The schema's metadata carries the format's name and version, the split and the whole description, so
that a shard says by itself where its features come from.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Int32, Integer, Shaped

from mmei_jax.fingerprints import canonical_json
from mmei_jax.types import MODALITIES, InputError

SCHEMA_VERSION = 1
RECORDS_FORMAT = "mmei_jax.records"
CATALOGUE_FORMAT = "mmei_jax.catalogue"
# Keys of the Arrow schema's metadata.
FORMAT_KEY, VERSION_KEY, SPLIT_KEY, SPEC_KEY = (
    b"mmei_jax.format",
    b"mmei_jax.schema_version",
    b"mmei_jax.split",
    b"mmei_jax.spec",
)
# Fields of Slate and their Arrow types; the column of each is slate_<field>.
SLATE_FIELDS: dict[str, pa.DataType] = {
    "item_index": pa.int32(),
    "propensity": pa.float32(),
    "dwell_seconds": pa.float32(),
    "num_replays": pa.int32(),
    "is_liked": pa.bool_(),
    "satisfaction": pa.float32(),
}
FEATURE_DTYPES = ("float16", "float32")
RAW_DTYPES = ("uint8", "int16", "int32")
EXTRA_TYPES: dict[str, pa.DataType] = {"int32": pa.int32(), "float32": pa.float32(), "string": pa.large_string()}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


# What a producer's encoder says of weights that nothing was learned with: extraction writes it, reports look for it.
RANDOM_WEIGHTS = "random weights"


@dataclass(frozen=True)
class Producer:
    """What made the features of one modality. None: unknown or without meaning for it.

    ``encoder`` is its kind, such as ``bert``, a space, and where its weights come from.
    """

    encoder: str | None = None
    revision: str | None = None
    layer: str | int | None = None
    pooling: str | None = None
    frames_per_second: float | None = None
    sample_rate_hz: int | None = None
    padding_policy: str | None = None


@dataclass(frozen=True)
class ModalitySpec:
    """What a token is, how it is stored, and what made it.

    Attributes:
        dim: numbers per token.
        dtype: of features float16 or float32; of raw media uint8 (pixels), int16 (samples) or int32 (token ids).
        producer: what made it.
        token_shape: shape of a token whose numbers are no vector, such as height, width and channels of a frame; their
            product is ``dim``.
    """

    dim: int
    dtype: Literal["float16", "float32", "uint8", "int16", "int32"]
    producer: Producer = Producer()
    token_shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class LabelSpec:
    """A label's kind, and its class names in label order (``()`` for a real number)."""

    kind: Literal["categorical", "multi_label", "real"]
    class_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class DatasetSpec:
    """What every record of a data set may carry, and where the data set comes from.

    Raises:
        InputError: a modality, type, kind or class list that is not accepted; names it.
    """

    name: str
    description: str
    source: str
    licence: str
    modalities: dict[str, ModalitySpec]
    labels: dict[str, LabelSpec] = field(default_factory=dict)
    has_slates: bool = False
    has_relevant_items: bool = False
    extras: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuses what a shard cannot hold."""
        for name, modality in self.modalities.items():
            if name not in MODALITIES:
                raise InputError(f"modality {name!r}: expected one of {', '.join(MODALITIES)}")
            if modality.dim < 1 or modality.dtype not in FEATURE_DTYPES + RAW_DTYPES:
                accepted = ", ".join(FEATURE_DTYPES + RAW_DTYPES)
                raise InputError(f"modality {name!r}: expected dim >= 1 and a dtype of {accepted}, got {modality}")
            if modality.token_shape and math.prod(modality.token_shape) != modality.dim:
                raise InputError(
                    f"modality {name!r}: tokens of {modality.token_shape} do not hold {modality.dim} numbers"
                )
        for name, label in self.labels.items():
            check_name(name, "label")
            if label.kind not in ("categorical", "multi_label", "real"):
                raise InputError(f"label {name!r}: kind {label.kind!r}: expected categorical, multi_label or real")
            if (label.kind == "real") == bool(label.class_names):
                raise InputError(f"label {name!r} ({label.kind}): class names {label.class_names} do not fit its kind")
            if len(set(label.class_names)) != len(label.class_names):
                raise InputError(f"label {name!r}: class names {label.class_names}: each name once")
        for name, kind in self.extras.items():
            check_name(name, "extra column")
            if kind not in EXTRA_TYPES:
                raise InputError(f"extra column {name!r}: type {kind!r}: expected {', '.join(EXTRA_TYPES)}")

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict from which :meth:`from_json` makes an equal description."""
        values = dataclasses.asdict(self)
        for label in values["labels"].values():
            label["class_names"] = list(label["class_names"])
        for modality in values["modalities"].values():
            # Left out where it says nothing: data sets of vectors keep the bytes that they always had.
            shape = modality.pop("token_shape")
            if shape:
                modality["token_shape"] = list(shape)
        return values

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "DatasetSpec":
        """Reads what :meth:`to_json` gave.

        Raises:
            KeyError, TypeError, AttributeError: keys are missing or unknown.
            InputError: a value is not accepted.
        """
        modalities = {
            name: ModalitySpec(
                **{
                    **modality,
                    "producer": Producer(**modality["producer"]),
                    "token_shape": tuple(modality.get("token_shape", ())),
                }
            )
            for name, modality in values["modalities"].items()
        }
        labels = {
            name: LabelSpec(label["kind"], tuple(label["class_names"])) for name, label in values["labels"].items()
        }
        return cls(**{**values, "modalities": modalities, "labels": labels})


@dataclass
class Slate:
    """The items that a user was shown, and what came of each. What a log does not tell is None, and null in the shard.

    Attributes:
        item_index: ``[slate]`` int32 catalogue rows.
        propensity: ``[slate]`` float32 in (0, 1], the logging policy's probability of showing the item here.
        dwell_seconds: ``[slate]`` float32.
        num_replays: ``[slate]`` int32.
        is_liked: ``[slate]`` bool.
        satisfaction: ``[slate]`` float32, larger is better.
    """

    item_index: Integer[np.ndarray, "slate"]
    propensity: Float[np.ndarray, "slate"] | None
    dwell_seconds: Float[np.ndarray, "slate"] | None
    num_replays: Integer[np.ndarray, "slate"] | None
    is_liked: Bool[np.ndarray, "slate"] | None
    satisfaction: Float[np.ndarray, "slate"]


@dataclass
class Record:
    """One record as a user gives it.

    Attributes:
        id: unique within its split.
        user_id, dialogue_id, turn: speaker or user, dialogue and position in it; None where unknown.
        features: per modality ``[tokens, dim]`` float with at least one token; None or no entry where absent.
        labels: class id (categorical), ``[classes]`` in [0, 1] (multi_label) or number (real); None or no entry where
            not labelled.
        slate: what the user was shown; None where unknown.
        relevant_items: ``[relevant]`` int32 catalogue rows of the truly relevant items; None where unknown.
        extras: further scalars, by name.
    """

    id: str
    user_id: str | None = None
    dialogue_id: str | None = None
    turn: int | None = None
    features: dict[str, Float[np.ndarray, "tokens dim"] | None] = field(default_factory=dict)
    labels: dict[str, Any] = field(default_factory=dict)
    slate: Slate | None = None
    relevant_items: Integer[np.ndarray, "relevant"] | None = None
    extras: dict[str, int | float | str | None] = field(default_factory=dict)


@dataclass
class Ragged:
    """Values of many records end to end.

    Attributes:
        values: ``[total, ...]``, the records' values in order; ``total`` is the sum of the non-negative lengths.
        lengths: ``[records]`` integer, -1 where the record has none (null).
    """

    values: Shaped[np.ndarray, "total ..."]
    lengths: Integer[np.ndarray, "records"]


@dataclass
class MaskedColumn:
    """One scalar (or one row, for multi-label) per record.

    Attributes:
        values: ``[records]`` or ``[records, classes]`` array, or a sequence of strings; arbitrary where not present.
        is_present: ``[records]`` bool; None means all are.
    """

    values: Shaped[np.ndarray, "records ..."] | Sequence[str | None]
    is_present: Bool[np.ndarray, "records"] | None = None


@dataclass
class RecordColumns:
    """Many records at once, column by column; what is left out is missing for all of them.

    Attributes:
        ids, user_ids, dialogue_ids: one string per record; a user or dialogue may be None.
        turns: int32.
        features: per modality :class:`Ragged` with ``[total, dim]`` values.
        labels: per label int32, float32 or ``[records, classes]`` float32.
        slate: a :class:`Slate` whose fields hold the slates of all records end to end.
        slate_lengths: ``[records]`` integer, -1 where a record has no slate.
        relevant_items: catalogue rows.
        extras: further scalars, by name.
    """

    ids: Sequence[str]
    user_ids: Sequence[str | None] | None = None
    dialogue_ids: Sequence[str | None] | None = None
    turns: MaskedColumn | None = None
    features: dict[str, Ragged] = field(default_factory=dict)
    labels: dict[str, MaskedColumn] = field(default_factory=dict)
    slate: Slate | None = None
    slate_lengths: Integer[np.ndarray, "records"] | None = None
    relevant_items: Ragged | None = None
    extras: dict[str, MaskedColumn] = field(default_factory=dict)


@dataclass(frozen=True)
class Catalogue:
    """The items that can be recommended.

    Attributes:
        ids: one unique string per item.
        kind: ``[items]`` int32 index into ``kind_names``.
        kind_names: such as music, video, image, text.
        features: ``[items, dim]`` float32.
        texts: what describes an item (title, tags, creator ...) as JSON text, one string per item.
        word_state: ``[items, words]`` float32 and
        word_ids: ``[items, tokens]`` int32, what :class:`~mmei_jax.types.Items` holds of the words; not stored, but
            added by :func:`mmei_jax.item_words.open_dataset` where the configuration asks for one of them.
    """

    ids: list[str]
    kind: Int32[np.ndarray, "items"]
    kind_names: tuple[str, ...]
    features: Float[np.ndarray, "items dim"]
    texts: list[str]
    word_state: Float[np.ndarray, "items words"] | None = None
    word_ids: Int32[np.ndarray, "items tokens"] | None = None


def check_name(name: str, what: str) -> None:
    """Raises InputError unless ``name`` can be part of a file and column name."""
    if not _NAME.fullmatch(name):
        raise InputError(
            f"{what} {name!r}: expected letters, digits, '_', '.' and '-', starting with a letter or digit"
        )


def shard_schema(spec: DatasetSpec, split: str) -> pa.Schema:
    """The Arrow schema, with metadata, of every shard of ``split``; columns of a group are in alphabetical order."""
    columns = [
        pa.field("id", pa.large_string(), nullable=False),
        pa.field("user_id", pa.large_string()),
        pa.field("dialogue_id", pa.large_string()),
        pa.field("turn", pa.int32()),
    ]
    for name, modality in sorted(spec.modalities.items()):
        scalar = pa.from_numpy_dtype(np.dtype(modality.dtype))
        columns.append(pa.field(name, pa.large_list(pa.list_(scalar, modality.dim))))
    for name, label in sorted(spec.labels.items()):
        columns.append(pa.field(f"label_{name}", label_type(label)))
    if spec.has_slates:
        columns.extend(pa.field(f"slate_{name}", pa.large_list(kind)) for name, kind in SLATE_FIELDS.items())
    if spec.has_relevant_items:
        columns.append(pa.field("relevant_items", pa.large_list(pa.int32())))
    columns.extend(pa.field(f"extra_{name}", EXTRA_TYPES[kind]) for name, kind in sorted(spec.extras.items()))
    metadata = {SPLIT_KEY: split, SPEC_KEY: canonical_json(spec.to_json())}
    return pa.schema(columns, metadata={**_version_metadata(RECORDS_FORMAT), **metadata})


def label_type(label: LabelSpec) -> pa.DataType:
    """The Arrow type of a label's column."""
    if label.kind == "categorical":
        return pa.int32()
    return pa.float32() if label.kind == "real" else pa.list_(pa.float32(), len(label.class_names))


def catalogue_schema(dim: int, kind_names: Sequence[str]) -> pa.Schema:
    """The Arrow schema of a catalogue whose items have ``dim`` features."""
    columns = [
        pa.field("id", pa.large_string(), nullable=False),
        pa.field("kind", pa.int32(), nullable=False),
        pa.field("text", pa.large_string(), nullable=False),
        pa.field("features", pa.list_(pa.float32(), dim), nullable=False),
    ]
    metadata = {b"mmei_jax.kind_names": canonical_json(list(kind_names))}
    return pa.schema(columns, metadata={**_version_metadata(CATALOGUE_FORMAT), **metadata})


def _version_metadata(format_name: str) -> dict[bytes, str]:
    return {FORMAT_KEY: format_name, VERSION_KEY: str(SCHEMA_VERSION)}
