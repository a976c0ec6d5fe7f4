"""TPU topologies by name: their devices for compiling ahead of time, and what is published of their chips.

A name is that of libtpu, generation and chips along each axis ("v5e:16x16"), or Cloud TPU's type of accelerator, whose
number counts chips for v5e and v6e, and TensorCores for v4 and v5p. There a chip has two, which work as one device:
"v4-32" is 16 chips, 2x2x4. No TPU is needed, but libtpu is: the extra ``tpu``.
"""

import importlib.util
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies

from mmei_jax.types import InputError

_GIB = 2**30
_SOURCE = "https://docs.cloud.google.com/tpu/docs/{}"


@dataclass(frozen=True)
class Chip:
    """What is published of a generation's chip.

    Attributes:
        name: of the generation.
        flops_per_second: peak of matrix products in bfloat16.
        flops_per_cycle: of all of its matrix units in a cycle: two for each of their cells. With the peak it gives the
            clock.
        memory_bytes: of its HBM.
        memory_bytes_per_second: peak rate of its HBM.
        link_bytes_per_second: peak rate of one ICI link in one direction: the published "bidirectional bandwidth per
            chip" over twice the links; of v4 that of Jouppi et al., "TPU v4", 2023, Table 4.
        num_links: ICI links; two for each axis.
        cores_in_type: TensorCores that Cloud TPU's types count for a chip: 2, or 1 where they count chips.
        pod_axis: of v5e and v6e the chips along each axis of a pod, where they close to a ring; of others whole cubes
            of so many chips an axis do, by optical switches.
        source: of the figures.
    """

    name: str
    flops_per_second: float
    flops_per_cycle: int
    memory_bytes: int
    memory_bytes_per_second: float
    link_bytes_per_second: float
    num_links: int
    cores_in_type: int
    pod_axis: int
    source: str


# Of v6e two matrix units are published, with which the peak would be a clock of 3.5 GHz, and the compiler would expect
# products beyond the peak; with the four that a clock of 1.75 GHz means it expects 86 % of it.
CHIPS: Mapping[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip("v4", 275e12, 8 * 2 * 128**2, 32 * _GIB, 1200e9, 50e9, 6, 2, 4, _SOURCE.format("v4")),
        Chip("v5e", 197e12, 4 * 2 * 128**2, 16 * _GIB, 819e9, 50e9, 4, 1, 16, _SOURCE.format("v5e")),
        Chip("v5p", 459e12, 8 * 2 * 128**2, 95 * _GIB, 2765e9, 100e9, 6, 2, 4, _SOURCE.format("v5p")),
        Chip("v6e", 918e12, 4 * 2 * 256**2, 32 * _GIB, 1638e9, 100e9, 4, 1, 16, _SOURCE.format("v6e")),
    )
}
# No metadata server is asked what TPUs this machine has, and no other process is kept from them.
_NO_TPU_HERE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# Shapes of Cloud TPU's types, by chips.
_SHAPES_2D = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_SHAPES_3D = {
    4: "2x2x1",
    8: "2x2x2",
    16: "2x2x4",
    32: "2x4x4",
    64: "4x4x4",
    128: "4x4x8",
    256: "4x8x8",
    512: "8x8x8",
    1024: "8x8x16",
    2048: "8x16x16",
}


@dataclass(frozen=True)
class Topology:
    """Chips and how they are arranged.

    Attributes:
        chip: of the generation.
        shape: chips along each axis: two axes of v5e and v6e, three of v4 and v5p.
    """

    chip: Chip
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """As libtpu says it."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def accelerator_type(self) -> str:
        """As Cloud TPU says it."""
        return f"{self.chip.name}-{self.num_chips * self.chip.cores_in_type}"

    @property
    def num_chips(self) -> int:
        """Chips, each of which is one device of JAX."""
        return math.prod(self.shape)

    @property
    def is_ring(self) -> tuple[bool, ...]:
        """For each axis, whether its chips' links close to a ring."""
        axis = self.chip.pod_axis
        has_whole_cubes = all(size % axis == 0 for size in self.shape)
        return tuple(has_whole_cubes if len(self.shape) == 3 else size == axis for size in self.shape)


def parse_topology(name: str) -> Topology:
    """The topology of a name such as "v5e:16x16" or "v4-32".

    Raises:
        InputError: there is none of that name.

    Example:
        >>> parse_topology("v4-32").name
        'v4:2x2x4'
        >>> parse_topology("v5e:4x4").accelerator_type
        'v5e-16'
    """
    generation, colon, shape = name.partition(":")
    if not colon:
        generation, _, number = name.partition("-")
        chip = CHIPS.get(generation)
        if chip is not None and number.isdecimal():
            num_chips, rest = divmod(int(number), chip.cores_in_type)
            shape = _shapes(chip).get(num_chips, "") if not rest else ""
    chip, sizes = CHIPS.get(generation), shape.split("x")
    num_axes = None if chip is None else chip.num_links // 2
    is_shape = len(sizes) == num_axes and all(size.isdecimal() and int(size) for size in sizes)
    if chip is None or not is_shape or (num_axes == 2 and max(map(int, sizes)) > chip.pod_axis):
        raise InputError(f"--topology={name}: expected {_accepted()}")
    return Topology(chip, tuple(map(int, sizes)))


def topology_devices(topology: Topology) -> Sequence[jax.Device]:
    """Devices to compile for, in JAX's order; they run nothing.

    Raises:
        InputError: libtpu is not installed, or knows no such topology.
    """
    if importlib.util.find_spec("libtpu") is None and not os.path.isfile(os.environ.get("TPU_LIBRARY_PATH", "")):
        raise InputError(
            f"--topology={topology.name}: libtpu is not installed: expected the extra tpu, pip install 'mmei_jax[tpu]' "
            "(of a checkout: pip install -e '.[tpu]')"
        )
    for name, value in _NO_TPU_HERE.items():
        os.environ.setdefault(name, value)
    try:
        found: Any = topologies.get_topology_desc(topology.name, platform="tpu", **_options(topology))
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        expected = f"expected {_accepted()}; " if "INVALID_ARGUMENT" in reason else ""
        raise InputError(f"--topology={topology.name}: {expected}libtpu says: {reason}") from error
    return tuple(found.devices)


def _options(topology: Topology) -> dict[str, Any]:
    """How libtpu is to make the topology: a chip one device, rings as they are, one host for a single chip."""
    options: dict[str, Any] = {"wrap": (*topology.is_ring, False)[:3]}
    if topology.chip.cores_in_type == 2:
        options["chip_config_name"] = "megacore"
    if topology.num_chips == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    return options


def _shapes(chip: Chip) -> Mapping[int, str]:
    return _SHAPES_3D if chip.num_links == 6 else _SHAPES_2D


def _accepted() -> str:
    """What may be given, in words."""
    return (
        "v5e or v6e with two sizes (v5e:16x16 at most), v4 or v5p with three (v4:2x2x4), all even but for one chip, "
        "or a type of Cloud TPU (v5e-256, v4-32)"
    )
