"""What an exported folder holds, and its manifest.

A folder is written whole or not at all::

    manifest.json              what follows, versions, hashes
    fusion.bin ...             programs: StableHLO, as jax.export serialises it
    fusion.safetensors ...     parameters of the programs, which are inputs of theirs
    item_ids.json              ids of the items that the program top_k answers with, by row

No code of models is imported here, nor by :mod:`mmei_jax.serving.loading`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmei_jax.config_values import build
from mmei_jax.types import InputError
from mmei_jax.workdir import read_versioned

FORMAT, VERSION = "mmei_jax.export", 1
MANIFEST_NAME = "manifest.json"
ITEM_IDS_NAME = "item_ids.json"
PLATFORMS = ("cpu", "cuda", "tpu")


@dataclass(frozen=True)
class Tensor:
    """An input or an output of a program.

    Attributes:
        name: of the argument, or of the entry in what is returned.
        shape: sizes joined by commas: numbers, names of :class:`Size`, or for outputs expressions of them.
        dtype: of its numbers.
        meaning: what it holds, in words.
    """

    name: str
    shape: str
    dtype: str
    meaning: str

    @property
    def sizes(self) -> tuple[str, ...]:
        """The sizes one by one; of inputs only, whose sizes hold no commas of their own."""
        return tuple(size.strip() for size in self.shape.split(",") if size.strip())


@dataclass(frozen=True)
class Size:
    """A size that differs from call to call.

    Attributes:
        name: in the shapes.
        least, most: what is accepted; ``most`` is 0 where any size is.
    """

    name: str
    least: int
    most: int


@dataclass(frozen=True)
class Program:
    """One exported function: ``(parameters by group and name, inputs by name) -> outputs by name``.

    Attributes:
        name: of the function.
        file: its name.
        groups: names of the groups of parameters that it takes.
        sizes: that differ from call to call.
        inputs, outputs: in the order of the program.
    """

    name: str
    file: str
    groups: tuple[str, ...]
    sizes: tuple[Size, ...]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


@dataclass(frozen=True)
class Group:
    """Parameters that belong together.

    Attributes:
        name: of the group.
        file: its name.
        sha256: of the parameters and the settings (:func:`~mmei_jax.fingerprints.parameters_hash`).
        settings: JSON values that the parameters were trained or made with.
    """

    name: str
    file: str
    sha256: str
    settings: dict[str, Any]


@dataclass(frozen=True)
class StoredFile:
    """A file of the folder.

    Attributes:
        file: its name.
        num_bytes: its size.
        sha256: of its bytes.
    """

    file: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Everything about an export.

    Attributes:
        format, version: of the folder.
        jax, jaxlib: versions that exported the programs, and that alone may run them.
        calling_convention_version: of ``jax.export``.
        platforms: that the programs run on.
        model_sha256: of the fusion model's parameters and configuration.
        data_sha256: of the manifest of the data set that the run was trained on.
        data: name of that data set.
        checkpoint_step: updates of the checkpoint.
        labels: by task, ``kind`` of its output and ``classes`` in their order.
        programs, groups, files: what there is.
    """

    format: str
    version: int
    jax: str
    jaxlib: str
    calling_convention_version: int
    platforms: tuple[str, ...]
    model_sha256: str
    data_sha256: str
    data: str
    checkpoint_step: int
    labels: dict[str, Any]
    programs: tuple[Program, ...]
    groups: tuple[Group, ...]
    files: tuple[StoredFile, ...]


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an exported folder.

    Args:
        folder: that ``python -m mmei_jax.serving export`` made.

    Raises:
        InputError: there is none, or it is damaged, foreign or of another version.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise InputError(f"{folder}: no exported programs; expected a folder that mmei_jax.serving export made")
    values = read_versioned(path, FORMAT, VERSION, "the manifest of exported programs")
    manifest: Manifest = build(Manifest, values, str(path))
    listed = {entry.file for entry in manifest.files}
    named = [*(program.file for program in manifest.programs), *(group.file for group in manifest.groups)]
    for file in (*listed, *named):
        if Path(file).name != file or file not in listed:
            raise InputError(f"{path}: file {file!r}: expected the name of a file that it lists, in the same folder")
    groups = {group.name for group in manifest.groups}
    for program in manifest.programs:
        missing = sorted(set(program.groups) - groups)
        if missing:
            raise InputError(f"{path}: program {program.name} takes parameters {missing[0]!r}, which are not there")
    return manifest
