"""Which meshes are tried, what --meshes may name, and which is best."""

import pytest

from mmei_jax.profiling.candidates import MeshShape, best_of, candidate_meshes, parse_meshes
from mmei_jax.types import InputError


@pytest.mark.parametrize("num_chips", [1, 2, 4, 8, 12, 16, 32, 256])
def test_every_candidate_has_all_chips_and_none_comes_twice(num_chips):
    found = candidate_meshes(num_chips, (12, 8))
    assert found[0] == MeshShape(num_chips, 1, 1)
    assert {mesh.num_devices for mesh in found} == {num_chips}
    assert len(set(found)) == len(found) <= 4
    assert any(mesh.fsdp == num_chips for mesh in found)


def test_heads_are_shared_only_where_two_devices_can_share_each():
    assert MeshShape(2, 1, 2) in candidate_meshes(4, (12, 8))
    assert {mesh.tensor for mesh in candidate_meshes(4, (12, 3))} == {1}


def test_named_meshes_are_taken_as_they_are():
    assert parse_meshes("4x4x1, -1x2x2,4x4x1", 16) == [MeshShape(4, 4, 1), MeshShape(4, 2, 2)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("16x1", "'16x1': expected data x fsdp x tensor, such as 16x1x1"),
        ("ax1x1", "'ax1x1': expected data x fsdp"),
        ("16x0x1", "'16x0x1': expected data x fsdp"),
        ("1x-1x1", "'1x-1x1': expected data x fsdp"),
        ("8x1x1", "'8x1x1': expected 16 devices, the chips of the topology"),
        ("-1x3x1", "'-1x3x1': expected 16 devices"),
    ],
)
def test_other_meshes_are_refused(text, message):
    with pytest.raises(InputError, match=f"--meshes={text}: {message}"):
        parse_meshes(text, 16)


def test_best_is_the_fastest_and_of_equals_the_first():
    data, fsdp = MeshShape(4, 1, 1), MeshShape(1, 4, 1)
    assert best_of([(data, 0.2), (fsdp, 0.1)]) == fsdp
    assert best_of([(data, 0.1), (fsdp, 0.1)]) == data
    assert best_of([]) is None
