"""What is read of a profile: the operations of a device by name, and the time in which any ran."""

import jax
import jax.numpy as jnp
import pytest

from mmei_jax.profiling.traces import Span, busy_seconds, device_spans, seconds_by_operation


def test_what_overlaps_is_busy_once_and_counts_for_each_operation():
    spans = [Span("product", 5e9, 6e9), Span("copy", 0.0, 2e9), Span("product", 1e9, 3e9), Span("copy", 1e9, 1.5e9)]
    assert busy_seconds(spans) == 4.0
    assert seconds_by_operation(spans) == {"product": 3.0, "copy": 2.5}
    assert list(seconds_by_operation(spans)) == ["product", "copy"]
    assert (busy_seconds([]), seconds_by_operation([])) == (0.0, {})


@pytest.mark.timeout(120)
def test_a_profile_has_operations_of_the_planes_that_are_asked_for_and_a_processor_is_no_device(tmp_path):
    with jax.profiler.trace(str(tmp_path)):
        jax.block_until_ready(jax.jit(lambda x: jnp.sort(x) + 1.0)(jnp.arange(1_000.0)))
    assert device_spans(tmp_path) == []
    spans = device_spans(tmp_path, plane="/host:CPU", line="")
    assert any("sort" in name for name in seconds_by_operation(spans))
    assert 0.0 < busy_seconds(spans) < 100.0
