r"""Loads TFDS builders of clips by path, builds them without TensorFlow, and reads their clips.

A builder is a file ``<name>_dataset_builder.py`` with one class derived from
:class:`~mmei_jax.extraction.clip_builder.ClipBuilder`; those of this project are in ``data/``. What it builds is kept
under ``data_dir``, in a folder whose name depends on the options and on the bytes of the lists that were read: changed
options or lists are never answered with what was built before.

Command, for instance::

    python -m mmei_jax.extraction.dataset_builders data/meld --option folder=MELD --data_dir=runs/tfds --clips=clips.csv
"""

import contextlib
import hashlib
import importlib.util
import io
import math
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from mmei_jax.command import CommandParser, report_errors
from mmei_jax.extraction.class_weights import balanced_weights, count_classes
from mmei_jax.extraction.clip_builder import CONTEXT_OPTIONS, ClipBuilder, ClipConfig, to_clip
from mmei_jax.extraction.clips import Clip
from mmei_jax.extraction.utterance_lists import Utterance, write_clip_list
from mmei_jax.fingerprints import canonical_json
from mmei_jax.records import LabelSpec
from mmei_jax.types import InputError

_SUFFIX = "_dataset_builder.py"


def open_builder(path: str | Path, options: Mapping[str, str], data_dir: str | Path) -> ClipBuilder:
    """Loads a builder, and builds its data set where that has not been done yet.

    Args:
        path: the builder's folder or file.
        options: by name, as the builder's ``OPTIONS`` describes them.
        data_dir: where data sets are kept; made where it does not exist.

    Raises:
        InputError: there is no builder, an option is unknown, missing or not accepted, or a list is wrong.
    """
    file = _find_file(Path(path))
    builder_class = _load_class(file)
    complete = _complete_options(builder_class, options, file)
    config = ClipConfig(name=_fingerprint(builder_class, complete), options=complete)
    with _quiet():
        builder = builder_class(data_dir=str(data_dir), config=config, file_format="array_record")
        if not builder.info.splits:
            _build(builder)
            builder = builder_class(data_dir=str(data_dir), config=config, file_format="array_record")
    return builder


def parse_options(given: Sequence[str]) -> dict[str, str]:
    """Options from ``NAME=VALUE``, as commands take them.

    Raises:
        InputError: one has another form.
    """
    options = {}
    for item in given:
        name, equals, value = item.partition("=")
        if not (name and equals):
            raise InputError(f"--option {item!r}: expected NAME=VALUE")
        options[name] = value
    return options


def split_names(builder: ClipBuilder) -> tuple[str, ...]:
    """Names of the splits that were built, in alphabetical order."""
    return tuple(sorted(builder.info.splits))


def builder_clips(builder: ClipBuilder, split: str) -> Iterator[Clip]:
    """The clips of a split, always in the order in which the builder read them.

    Raises:
        InputError: there is no such split.
    """
    labels = label_specs(builder)
    source = _open_split(builder, split)
    return (to_clip(source[index], split, labels) for index in range(len(source)))


def builder_utterances(builder: ClipBuilder, split: str) -> Iterator[Utterance]:
    """The clips of a split with their labels by name and their episodes, as lists of clips have them.

    Raises:
        InputError: there is no such split.
    """
    labels = label_specs(builder)
    source = _open_split(builder, split)
    for index in range(len(source)):
        example = source[index]
        clip = to_clip(example, split, labels)
        yield Utterance(clip, _cells(clip, labels), example["episode"].decode() or None)


def label_specs(builder: ClipBuilder) -> dict[str, LabelSpec]:
    """Kinds and class names, in label order, by label."""
    return dict(builder.labels)


def _open_split(builder: ClipBuilder, split: str) -> Sequence[dict[str, Any]]:
    if split not in builder.info.splits:
        raise InputError(f"{builder.name}: split {split!r}: expected one of {', '.join(split_names(builder))}")
    source: Sequence[dict[str, Any]] = builder.as_data_source(split=split)
    return source


def _find_file(path: Path) -> Path:
    if path.is_file():
        return path
    found = sorted(path.glob(f"*{_SUFFIX}")) if path.is_dir() else []
    if len(found) != 1:
        raise InputError(f"{path}: {len(found)} files *{_SUFFIX}: expected a builder's file, or a folder with one")
    return found[0]


def _load_class(file: Path) -> type[ClipBuilder]:
    """The builder's class; it enters neither TFDS's register nor, after that, the table of modules."""
    # TFDS finds a class's file through the table of modules; the path in the name keeps two builders apart.
    name = f"mmei_builder_{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:12]}_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise InputError(f"{file}: not a Python file: expected a builder")
    module: types.ModuleType = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    with tfds.core.registered.skip_registration():
        spec.loader.exec_module(module)
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, ClipBuilder) and value.__module__ == name
    ]
    if len(found) != 1:
        raise InputError(f"{file}: {len(found)} classes derived from ClipBuilder: expected one")
    found[0].name = file.name.removesuffix(_SUFFIX).removesuffix(".py")
    return found[0]


def _complete_options(builder_class: type[ClipBuilder], given: Mapping[str, str], file: Path) -> dict[str, str]:
    accepted = {**builder_class.OPTIONS, **CONTEXT_OPTIONS}
    unknown = sorted(set(given) - set(accepted))
    if unknown:
        raise InputError(f"{file}: option {unknown[0]!r}: expected some of {', '.join(accepted)}")
    complete = {}
    for name, option in accepted.items():
        value = given.get(name, option.default)
        if value is None:
            raise InputError(f"{file}: option {name!r} is missing: {option.description}")
        if option.choices and value not in option.choices:
            raise InputError(f"{file}: option {name} = {value!r}: expected one of {', '.join(option.choices)}")
        complete[name] = value
    if not complete["context_turns"].isdecimal():
        raise InputError(f"{file}: option context_turns = {complete['context_turns']!r}: expected a whole number")
    return complete


def _fingerprint(builder_class: type[ClipBuilder], options: dict[str, str]) -> str:
    """A name that other options or other lists do not have."""
    digest = hashlib.sha256(canonical_json(options).encode())
    for file in builder_class.list_files(options):
        digest.update(f"\n{file.name} ".encode())
        if file.is_file():
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return f"options_{digest.hexdigest()[:16]}"


def _build(builder: ClipBuilder) -> None:
    try:
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    except OSError:
        # Another process was faster: its folder is in the way of ours, and holds the same.
        if not (builder.data_path / "dataset_info.json").exists():
            raise


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """TFDS prints, draws bars, and warns of every configuration that is not in its own list."""
    tfds.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)


def _cells(clip: Clip, labels: Mapping[str, LabelSpec]) -> dict[str, str]:
    cells = dict.fromkeys(labels, "")
    for name, value in clip.labels.items():
        classes = labels[name].class_names
        if labels[name].kind == "multi_label":
            cells[name] = "|".join(classes[index] for index in np.flatnonzero(value)) or "none"
        else:
            cells[name] = classes[value] if labels[name].kind == "categorical" else repr(value)
    return cells


def _describe(builder: ClipBuilder, clips: Mapping[str, list[Clip]]) -> str:
    lines = [f"{builder.name}: " + ", ".join(f"{split} {len(found):,}" for split, found in clips.items()) + " clips"]
    for name, spec in builder.labels.items():
        if spec.kind == "real":
            lines.append(f"{name}: a number")
            continue
        lines += ["", f"{name:<20}{'id':>4}" + "".join(f"{split:>12}" for split in clips) + "   weight"]
        counts = {split: count_classes(found, name, spec) for split, found in clips.items()}
        first = counts.get("train", next(iter(counts.values())))
        weights = balanced_weights(first) if (first > 0).all() else np.full(len(first), math.nan)
        for index, class_name in enumerate(spec.class_names):
            numbers = "".join(f"{count[index]:>12,}" for count in counts.values())
            lines.append(f"{class_name:<20}{index:>4}{numbers}{weights[index]:>9.4f}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Builds a data set and prints what it holds; gives the exit status: 0, or 2 after one line on what is wrong."""
    parser = CommandParser(
        prog="python -m mmei_jax.extraction.dataset_builders",
        description="Build a data set of clips; print its splits, class counts and class weights (of split train).",
    )
    parser.add_argument("builder", type=Path, help="folder or file of a builder, such as data/meld")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="repeatable; see its card")
    parser.add_argument("--data_dir", type=Path, default=Path("runs/tfds"), help="(default: %(default)s)")
    parser.add_argument("--clips", type=Path, metavar="FILE", help="also write the clips as a list (CSV)")
    flags = parser.parse_args(arguments)

    def run() -> int:
        builder = open_builder(flags.builder, parse_options(flags.option), flags.data_dir)
        utterances = {split: list(builder_utterances(builder, split)) for split in split_names(builder)}
        print(_describe(builder, {split: [item.clip for item in found] for split, found in utterances.items()}))
        if flags.clips is not None:
            write_clip_list(flags.clips, [item for found in utterances.values() for item in found])
        return 0

    return report_errors(run)


if __name__ == "__main__":
    sys.exit(main())
