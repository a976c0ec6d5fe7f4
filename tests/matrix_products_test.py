"""The benchmark of matrix products multiplies the same matrices on both sides."""

from benchmarks import matrix_products, rounds


def test_sides_multiply_the_same_matrices():
    shape = (6, 5, 4)
    ours, theirs = matrix_products.xla_side(shape), matrix_products.torch_side(shape)
    assert ours.evidence.shape == (6, 4)
    assert rounds.differ_by(ours.evidence, theirs.evidence, relative=1e-5) == ""
    assert rounds.differ_by(ours.evidence, -theirs.evidence, relative=1e-5) != ""
    assert ours.measure() > 0.0
    assert theirs.measure() > 0.0
