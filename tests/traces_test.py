"""What is read of a profile: the operations of a device by name, and the time in which any ran."""

import jax
import jax.numpy as jnp
import pytest

from mmei_jax.profiling.traces import Span, busy_seconds, device_spans, num_fetches, seconds_by_operation


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


def write_profile(folder, planes):
    """A profile of events that took no time.

    Args:
        folder: to write to.
        planes: by name, by name of a line, the names of its events.
    """
    text = ""
    for plane, lines in planes.items():
        names = sorted({name for events in lines.values() for name in events})
        known = " ".join(
            f'event_metadata {{ key: {names.index(name)} value {{ id: {names.index(name)} name: "{name}" }} }}'
            for name in names
        )
        own = " ".join(
            f'lines {{ name: "{line}" '
            + " ".join(f"events {{ metadata_id: {names.index(name)} }}" for name in events)
            + " }"
            for line, events in lines.items()
        )
        text += f'planes {{ name: "{plane}" {own} {known} }}\n'
    (folder / "host.xplane.pb").write_bytes(jax.profiler.ProfileData.text_proto_to_serialized_xspace(text))


HOST, FETCH, COPY = "/host:CPU", "np.asarray(jax.Array)", "MemcpyD2H"


@pytest.mark.parametrize(
    ("planes", "expected"),
    [
        # A processor, and TPUs: no copy is told of.
        ({HOST: {"python": [FETCH, "PjitFunction(step)", FETCH]}, "/device:TPU:0": {"XLA Ops": ["add"]}}, 2),
        # A GPU: the call, what the driver is asked for, and the copy.
        (
            {
                HOST: {"python": [FETCH, FETCH], "driver": ["cuMemcpyDtoHAsync_v2", "cuMemcpyDtoHAsync_v2"]},
                "/device:GPU:0": {"Stream #13(MemcpyD2H)": [COPY, COPY], "Stream #14(Compute)": ["gemm", "MemcpyD2D"]},
            },
            2,
        ),
        # One more that the program itself waits for.
        ({HOST: {"python": [FETCH]}, "/device:GPU:0": {"Stream #13(MemcpyD2H)": [COPY, COPY]}}, 2),
        ({HOST: {"python": ["PjitFunction"]}, "/device:GPU:0": {"Stream #14(Compute)": ["gemm"]}}, 0),
    ],
)
def test_a_fetch_counts_once_though_host_and_device_tell_of_it(tmp_path, planes, expected):
    write_profile(tmp_path, planes)
    assert num_fetches(tmp_path) == expected
