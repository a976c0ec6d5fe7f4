"""What bounds an operation at given rates."""

import pytest

from mmei_jax.profiling.operations import Operation, Work
from mmei_jax.profiling.roofline import classify, seconds_by_bound, time_operations

RATES = {"flops_per_second": 100.0, "bytes_per_second": 10.0}


def operation(name, flops, num_bytes, *, opcode="fusion", is_known=True, num_calls=1):
    return Operation(name, opcode, "", Work(flops, is_known=is_known), num_bytes, num_calls)


@pytest.mark.parametrize(
    ("given", "bound"),
    [
        (operation("dense", 101.0, 10), "compute"),
        (operation("sparse", 99.0, 10), "memory"),
        (operation("copy", 0.0, 10), "memory"),
        (operation("sum", 1000.0, 10, opcode="all-reduce-start"), "exchange"),
        (operation("library", 0.0, 10, opcode="Secret", is_known=False), "unknown"),
    ],
)
def test_operation_is_bound_by_what_takes_longer(given, bound):
    assert classify(given, **RATES) == bound


def test_time_stands_beside_the_least_time_that_the_rates_allow():
    operations = [
        operation("dense", 200.0, 10, num_calls=3),
        operation("copy", 0.0, 50),
        operation("unseen", 1.0, 1),
        operation("secret", 0.0, 10, is_known=False),
        operation("looped", 200.0, 10, num_calls=None),
    ]
    timed = time_operations(operations, {"copy": 20.0, "dense": 8.0, "secret": 1.0, "looped": 2.0}, **RATES)
    assert [one.operation.name for one in timed] == ["copy", "dense", "looped", "secret", "unseen"]
    assert [one.roof_seconds for one in timed] == [5.0, 6.0, None, None, 0.1]
    assert [one.intensity for one in timed] == [0.0, 20.0, 20.0, None, 1.0]
    assert seconds_by_bound(timed) == {"memory": 20.0, "compute": 10.0, "unknown": 1.0}
