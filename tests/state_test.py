"""Which parameters a mesh may leave whole on every device."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from configs import default
from mmei_jax.config import MeshConfig, parse
from mmei_jax.sharding import MESH_AXES
from mmei_jax.state import SMALLEST_SPLIT_SIZE, check_split
from mmei_jax.types import InputError

SHAPE = (SMALLEST_SPLIT_SIZE // 64, 64)
CONFIG = MeshConfig(data=1, fsdp=4, tensor=2, replicated=())


def parameters(mesh=CONFIG, **specs):
    """A tree of one large parameter for each name, split as told."""
    on = AbstractMesh((mesh.data, mesh.fsdp, mesh.tensor), MESH_AXES)
    return {
        name: {"kernel": jax.ShapeDtypeStruct(SHAPE, jnp.float32, sharding=NamedSharding(on, PartitionSpec(*spec)))}
        for name, spec in specs.items()
    }


def test_large_parameter_that_no_axis_splits_is_refused_in_one_line():
    found = parameters(split=(None, "tensor"), whole=(), other=(None, None))
    with pytest.raises(InputError) as raised:
        check_split(found, CONFIG)
    assert "\n" not in str(raised.value)
    for part in ("fsdp = 4", "tensor = 2", "'other/kernel' of shape (1024, 64), and 1 more", "config.mesh.replicated"):
        assert part in str(raised.value)


def test_axis_of_one_device_splits_nothing():
    mesh = dataclasses.replace(CONFIG, tensor=1)
    with pytest.raises(InputError, match="'whole/kernel'"):
        check_split(parameters(mesh, whole=(None, "tensor")), mesh)
    check_split(parameters(mesh, split=("fsdp", "tensor")), mesh)


def test_what_the_configuration_names_may_stay_whole():
    check_split(parameters(whole=(), other=()), dataclasses.replace(CONFIG, replicated=("^whole/", "other")))
    with pytest.raises(InputError, match="'other/kernel' of shape"):
        check_split(parameters(whole=(), other=()), dataclasses.replace(CONFIG, replicated=("^whole/",)))


def test_small_parameters_and_meshes_that_split_no_parameter_are_taken():
    small = jax.tree.map(lambda leaf: leaf.update(shape=(SHAPE[0] - 1, SHAPE[1])), parameters(whole=()))
    check_split(small, CONFIG)
    data_alone = dataclasses.replace(CONFIG, data=8, fsdp=1, tensor=1)
    check_split(parameters(data_alone, whole=()), data_alone)


@pytest.mark.parametrize("fsdp", [1, 4])
@pytest.mark.parametrize(
    ("pattern", "message"),
    [("(", r"config\.mesh\.replicated: '\(' is no regular expression"), ("^no", "'.no' matches no parameter")],
)
def test_patterns_that_can_mean_nothing_are_refused_on_every_mesh(fsdp, pattern, message):
    mesh = dataclasses.replace(CONFIG, fsdp=fsdp, tensor=1, replicated=(pattern,))
    with pytest.raises(InputError, match=message):
        check_split(parameters(mesh, split=("fsdp",)), mesh)


def test_key_takes_a_tuple_of_expressions():
    config = default.get_config()
    config.mesh.replicated = ("a", "b")
    assert parse(config.to_dict()).mesh.replicated == ("a", "b")
