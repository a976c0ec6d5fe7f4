"""What is read of a program's collectives, in every form in which XLA writes them."""

import pytest

from mmei_jax.collectives import bytes_by_kind, read_collectives
from mmei_jax.program_text import array_bytes

# Put together from what the compilers for CPUs, GPUs and TPUs print, at sizes that are easily multiplied.
PROGRAM = """\
HloModule jit_step, is_scheduled=true, replica_count=1, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%scattered (p: f32[16]) -> f32[4] {
  %p = f32[16]{0} parameter(0)
  ROOT %inner_scatter = f32[4]{0} reduce-scatter(%p), replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add
}

%body (s: (s32[], f32[8])) -> (s32[], f32[8]) {
  %s = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[8]{0} get-tuple-element(%s), index=1
  %looped = f32[8]{0} all-reduce(%x), channel_id=2, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %t = (s32[], f32[8]{0}) tuple(%i, %looped)
}

%condition (s: (s32[], f32[8])) -> pred[] {
  %s.1 = (s32[], f32[8]{0}) parameter(0)
  ROOT %is_less = pred[] constant(true)
}

ENTRY %main (x: f32[8], y: bf16[2,3]) -> f32[8] {
  %x.1 = f32[8]{0} parameter(0)
  %y = bf16[2,3]{1,0:T(8,128)(2,1)} parameter(1)
  %wide = f32[16]{0} broadcast(%x.1), dimensions={0}
  %sums = (f32[8]{0}, /*index=1*/bf16[2,3]{1,0}) all-reduce(%x.1, %y), METADATA
  %begun = (bf16[2,3], bf16[4,3]) all-gather-start(bf16[2,3] %y), replica_groups=mesh['axis_0'=8] {'axis_0':(2)2}
  %ended = bf16[4,3]{1,0} all-gather-done(%begun)
  %wrapped = ((f32[16]{0}), f32[4]{0}, u32[]) async-start(%wide), calls=%scattered
  %unwrapped = f32[4]{0} async-done(%wrapped), calls=%scattered
  %moved = f32[8]{0} collective-permute(%x.1), channel_id=4, source_target_pairs={{0,1},{1,0}}
  %exchanged = f32[8]{0} all-to-all(%x.1), channel_id=5, replica_groups={}, dimensions={0}
  %alone = f32[8]{0} all-reduce(%x.1), channel_id=6, replica_groups=[8,1]<=[8], to_apply=%add
  %start = (s32[], f32[8]{0}) tuple(%x.1)
  %known = (s32[], f32[8]{0}) while(%start), condition=%condition, body=%body, backend_config=TRIPS
  %unknown = (s32[], f32[8]{0}) while(%known), condition=%condition, body=%body
  ROOT %out = f32[8]{0} get-tuple-element(%unknown), index=1
}
"""
PROGRAM = PROGRAM.replace("TRIPS", '{"known_trip_count":{"n":"5"},"known_init_step":{"init":"0","step":"1"}}').replace(
    "METADATA",
    "channel_id=1, replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0','axis_1'}, use_global_device_ids=true, "
    'to_apply=%add, metadata={op_name="jit(step)/sum" stack_frame_id=3}',
)


@pytest.fixture(scope="module")
def found():
    return {collective.name: collective for collective in read_collectives(PROGRAM)[:-1]}


@pytest.mark.parametrize(
    ("name", "kind", "num_bytes", "group_size"),
    [
        ("sums", "all-reduce", 8 * 4 + 6 * 2, 8),
        ("begun", "all-gather", 2 * 6 * 2, 2),
        ("inner_scatter", "reduce-scatter", 16 * 4, 4),
        ("moved", "collective-permute", 8 * 4, 2),
        ("exchanged", "all-to-all", 8 * 4, 8),
        ("looped", "all-reduce", 8 * 4, 4),
    ],
)
def test_collective_is_read_with_its_bytes_and_group(found, name, kind, num_bytes, group_size):
    collective = found[name]
    assert (collective.kind, collective.num_bytes, collective.group_size) == (kind, num_bytes, group_size)


def test_each_is_found_once_and_what_one_device_does_alone_not_at_all(found):
    assert list(found) == ["sums", "begun", "moved", "exchanged", "inner_scatter", "looped"]
    assert {name for name, collective in found.items() if collective.is_async} == {"begun", "inner_scatter"}
    assert found["sums"].op_name == "jit(step)/sum"
    assert found["moved"].op_name == ""


def test_collective_in_a_loop_counts_as_often_as_the_loop_runs(found):
    assert (found["looped"].is_in_loop, found["looped"].num_calls) == (True, 5)
    assert (found["sums"].is_in_loop, found["sums"].num_calls) == (False, 1)
    everything = read_collectives(PROGRAM)
    assert (everything[-1].name, everything[-1].is_in_loop, everything[-1].num_calls) == ("looped", True, None)
    assert bytes_by_kind(everything) == {
        "all-reduce": 44 + 5 * 32 + 32,
        "all-gather": 24,
        "reduce-scatter": 64,
        "collective-permute": 32,
        "all-to-all": 32,
    }


def test_sent_bytes_are_those_of_a_ring(found):
    sent = {name: collective.sent_bytes for name, collective in found.items()}
    assert sent == {
        "sums": 77,  # 2 * 7/8 of 44
        "begun": 12,
        "inner_scatter": 48,
        "moved": 32,
        "exchanged": 28,
        "looped": 48,
    }


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("f32[]", 4),
        ("(pred[3], s4[3]{0})", 5),
        ("f8e4m3fn[2,2]", 4),
        ("c64[2]", 16),
        ("f32[<=4,2]", 32),
        ("token[]", 0),
    ],
)
def test_bytes_of_types(shape, expected):
    assert array_bytes(shape) == expected


# As the compiler for TPUs sends one array step by step in other operations; a second chain has another number.
CHAINED = """\
HloModule jit_step, is_scheduled=true, num_partitions=4

%begin (p: f32[2,8]) -> (f32[2,8], f32[8,8]) {
  %p = f32[2,8]{1,0} parameter(0)
  %gather.1 = f32[8,8]{1,0} all-gather(%p), channel_id=3, GROUPS, frontend_attributes={chain_id="0"}
  ROOT %start = (f32[2,8]{1,0}, f32[8,8]{1,0}) custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
}

%step (q: f32[2,8], r: f32[4]) -> (f32[4], f32[2,8]) {
  %q = f32[2,8]{1,0} parameter(0)
  %r = f32[4]{0} parameter(1)
  %gather.2 = f32[8,8]{1,0} all-gather(%q), channel_id=3, GROUPS, frontend_attributes={chain_id="0"}
  %gather.3 = f32[8,8]{1,0} all-gather(%q), channel_id=5, GROUPS, frontend_attributes={chain_id="1"}
  ROOT %both = (f32[4]{0}, f32[2,8]{1,0}) tuple(%r, %q)
}

ENTRY %main (x: f32[2,8], y: f32[4]) -> f32[4] {
  %x = f32[2,8]{1,0} parameter(0)
  %y = f32[4]{0} parameter(1)
  %first = (f32[2,8]{1,0}, f32[8,8]{1,0}) fusion(%x), kind=kCustom, calls=%begin
  %second = (f32[4]{0}, f32[2,8]{1,0}) fusion(%x, %y), kind=kOutput, calls=%step
  ROOT %out = f32[4]{0} get-tuple-element(%second), index=0
}
""".replace("GROUPS", "replica_groups={{0,1,2,3}}, dimensions={0}")


def test_a_collective_that_other_operations_take_along_step_by_step_counts_once():
    found = read_collectives(CHAINED)

    assert [(one.name, one.num_bytes, one.num_calls, one.is_async) for one in found] == [
        ("gather.1", 256, 1, True),
        ("gather.3", 256, 1, True),
    ]


def test_other_texts_are_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        read_collectives("module @jit_step {\n}\n")
