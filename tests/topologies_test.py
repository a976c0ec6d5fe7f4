"""Names of TPU topologies, and the errors of those that are none; nothing here needs libtpu."""

import importlib.util

import pytest

from mmei_jax.profiling.topologies import CHIPS, parse_topology, topology_devices
from mmei_jax.types import InputError


@pytest.mark.parametrize(
    ("name", "accelerator_type", "num_chips"),
    [
        # Cloud's types count TensorCores of v4 and v5p, two to a chip, and chips of v5e and v6e.
        ("v4:2x2x4", "v4-32", 16),
        ("v5p:2x4x4", "v5p-64", 32),
        ("v5e:1x1", "v5e-1", 1),
        ("v5e:4x4", "v5e-16", 16),
        ("v5e:16x16", "v5e-256", 256),
        ("v6e:16x16", "v6e-256", 256),
    ],
)
def test_names_of_libtpu_and_of_cloud_mean_the_same(name, accelerator_type, num_chips):
    topology = parse_topology(name)
    assert (topology.name, topology.accelerator_type, topology.num_chips) == (name, accelerator_type, num_chips)
    assert parse_topology(accelerator_type) == topology


@pytest.mark.parametrize(
    "name", ["", "v5e", "v5e:16", "v5e:4x4x4", "v4:2x2", "v5e:0x4", "v5e:32x32", "v9:2x2", "v4-33", "v5e-7", "h100:8"]
)
def test_other_names_are_refused_in_one_line_that_says_what_is_accepted(name):
    with pytest.raises(InputError) as caught:
        parse_topology(name)
    message = str(caught.value)
    assert message.startswith(
        f"--topology={name}: expected v5e or v6e with two sizes (v5e:16x16 at most), v4 or v5p with three"
    )
    assert "\n" not in message


def test_axes_are_rings_where_the_chips_say_so():
    assert parse_topology("v5e:16x16").is_ring == (True, True)
    assert parse_topology("v5e:8x16").is_ring == (False, True)
    assert parse_topology("v5e:4x4").is_ring == (False, False)
    assert parse_topology("v4:2x2x4").is_ring == (False, False, False)
    assert parse_topology("v5p:4x4x8").is_ring == (True, True, True)


def test_published_figures_are_those_of_the_generations():
    assert {name: chip.flops_per_second / 1e12 for name, chip in CHIPS.items()} == {
        "v4": 275, "v5e": 197, "v5p": 459, "v6e": 918
    }  # fmt: skip


def test_absent_libtpu_is_told_in_one_line_that_names_the_extra(monkeypatch):
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=r"--topology=v5e:2x2: libtpu is not installed: expected the extra tpu, pip install"
    ) as error:
        topology_devices(parse_topology("v5e:2x2"))
    assert "\n" not in str(error.value)
