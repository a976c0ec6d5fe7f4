"""Meshes worth compiling for on so many chips, and which of them is best."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mmei_jax.types import InputError

# Chips over which parameters are split where not over all: more of them save little memory and send the same bytes.
_SPLIT = 16


@dataclass(frozen=True)
class MeshShape:
    """Devices along the axes of a mesh, by the names of ``config.mesh``.

    Attributes:
        data: copies of the parameters, each for a part of the batch.
        fsdp: devices that share one copy, and its part of the batch.
        tensor: devices that share heads and hidden features.
    """

    data: int
    fsdp: int
    tensor: int

    def __str__(self) -> str:
        """Such as 16x16x1."""
        return f"{self.data}x{self.fsdp}x{self.tensor}"

    @property
    def num_devices(self) -> int:
        """All of them."""
        return self.data * self.fsdp * self.tensor


def candidate_meshes(num_chips: int, head_counts: Sequence[int]) -> list[MeshShape]:
    """Pure data parallelism, parameters split over some chips and over all, and pairs that share the heads.

    Not all factorisations: each takes a minute or so to compile. ``--meshes`` names others.

    Args:
        num_chips: of the topology.
        head_counts: attention heads of the model and its encoders; a tensor axis divides each.

    Example:
        >>> [str(mesh) for mesh in candidate_meshes(64, (12, 8))]
        ['64x1x1', '4x16x1', '1x64x1', '32x1x2']
        >>> [str(mesh) for mesh in candidate_meshes(1, (12, 8))]
        ['1x1x1']
    """
    split = math.gcd(num_chips, _SPLIT)
    found = [
        MeshShape(num_chips, 1, 1),
        MeshShape(num_chips // split, split, 1),
        MeshShape(1, num_chips, 1),
    ]
    if not num_chips % 2 and not any(count % 2 for count in head_counts):
        found.append(MeshShape(num_chips // 2, 1, 2))
    return list(dict.fromkeys(found))


def parse_meshes(text: str, num_chips: int) -> list[MeshShape]:
    """The meshes that ``--meshes`` names: data x fsdp x tensor, such as "16x16x1,256x1x1"; -1 for data is what is left.

    Args:
        text: of the flag.
        num_chips: that each must have.

    Raises:
        InputError: it names something else, or a mesh of another number of devices.

    Example:
        >>> [str(mesh) for mesh in parse_meshes("-1x4x1,16x1x1", 16)]
        ['4x4x1', '16x1x1']
    """
    found = []
    for word in text.split(","):
        sizes = word.strip().split("x")
        if len(sizes) != 3 or not all(size.isdecimal() and int(size) for size in sizes[sizes[0] == "-1" :]):
            raise InputError(f"--meshes={text}: {word!r}: expected data x fsdp x tensor, such as {num_chips}x1x1")
        data, fsdp, tensor = map(int, sizes)
        if data == -1 and not num_chips % (fsdp * tensor):
            data = num_chips // (fsdp * tensor)
        mesh = MeshShape(data, fsdp, tensor)
        if mesh.num_devices != num_chips:
            raise InputError(f"--meshes={text}: {word!r}: expected {num_chips} devices, the chips of the topology")
        found.append(mesh)
    return list(dict.fromkeys(found))


def best_of(seconds: Iterable[tuple[MeshShape, float]]) -> MeshShape | None:
    """The mesh with the fewest seconds of those that fit; of equals the first; None where none fits.

    Args:
        seconds: by mesh those of one update of the same number of records; only of meshes that fit.
    """
    return min(seconds, key=lambda item: item[1], default=(None, 0.0))[0]
