"""The TPU compiler's times, of a text in its style: a loop of whose turns only its condition tells."""

import pytest

from mmei_jax.profiling.operations import read_operations
from mmei_jax.profiling.programs import MemoryUse, ProgramFacts
from mmei_jax.profiling.topologies import CHIPS
from mmei_jax.profiling.tpu_times import roofline_seconds, tpu_times
from mmei_jax.program_text import parse_program

V5E = CHIPS["v5e"]
NUM_TURNS = 4
LOOP = """HloModule jit_step, is_scheduled=true

%body (state: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %state = (s32[], f32[8,8]) parameter(0)
  %count = s32[] get-tuple-element(%state), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%count, %one)
  %x = f32[8,8] get-tuple-element(%state), index=1
  %product = f32[8,8] dot(%x, %x), lhs_contracting_dims={1}, backend_config={"estimated_cycles":"100"}
  ROOT %turn = (s32[], f32[8,8]) tuple(%next, %product)
}

%condition (state.1: (s32[], f32[8,8])) -> pred[] {
  %limit = s32[] constant(4)
  %state.1 = (s32[], f32[8,8]) parameter(0)
  %count.1 = s32[] get-tuple-element(%state.1), index=0
  ROOT %goes_on = pred[] compare(%count.1, %limit), direction=LT
}

ENTRY %main (x.1: f32[8,8]) -> f32[8,8] {
  %x.1 = f32[8,8] parameter(0)
  %zero = s32[] constant(0)
  %zero.1 = s32[] copy(%zero)
  %first = (s32[], f32[8,8]) tuple(%zero.1, %x.1)
  %loop = (s32[], f32[8,8]) while(%first), condition=%condition, body=%body
  %room = f32[512,512] custom-call(), custom_call_target="AllocateBuffer"
  %last = f32[8,8] get-tuple-element(%loop), index=1
  ROOT %doubled = f32[8,8] add(%last, %last), backend_config={"estimated_cycles":"7"}
}
"""


def trip_counts(text):
    program = parse_program(text)
    return [one.trip_count for own in program.computations.values() for one in own if one.opcode == "while"]


def facts_of(text, optimal_seconds):
    program = parse_program(text)
    memory = MemoryUse(0, 0, 0, 0, 0, 0, 0, 0)
    facts = ProgramFacts(1, 0.0, 0.0, None, 0.0, optimal_seconds, memory, (), tuple(read_operations(program)), True, 0)
    return tpu_times(facts, optimal_seconds, V5E)


def test_turns_of_a_loop_are_read_from_its_condition():
    assert trip_counts(LOOP) == [NUM_TURNS]
    told = 'body=%body, backend_config={"known_trip_count":{"n":"9"}}'
    assert trip_counts(LOOP.replace("body=%body", told)) == [9]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("direction=LT", "direction=NE"),
        ("%one = s32[] constant(1)", "%one = s32[] constant(2)"),
        ("%zero = s32[] constant(0)", "%zero = s32[] constant(1)"),
        ("%limit = s32[] constant(4)", "%limit = s32[] get-tuple-element(%state.1), index=0"),
        ("add(%count, %one)", "multiply(%count, %one)"),
        ("tuple(%next, %product)", "tuple(%count, %product)"),
    ],
)
def test_turns_of_other_loops_are_not_guessed(old, new):
    assert old in LOOP
    assert trip_counts(LOOP.replace(old, new)) == [None]


def test_cycles_count_as_often_as_a_loop_runs():
    times = facts_of(LOOP, 0.5)
    # Four matrix units of 128 x 128 cells, two operations a cycle: the peak of 197 TFLOP/s is a clock of 1.5 GHz.
    assert times.expected_seconds == pytest.approx((NUM_TURNS * 100 + 7) / 1.503e9, rel=1e-3)


def test_compilers_optimal_time_counts_only_without_loops():
    times = facts_of(LOOP, 0.5)
    assert not times.is_compilers
    assert times.optimal_seconds == pytest.approx(roofline_seconds(tuple(read_operations(parse_program(LOOP))), V5E))
    before, _, after = LOOP.partition("  %loop = ")
    straight = before + "  %loop = (s32[], f32[8,8]) tuple(%zero.1, %x.1)\n" + after.partition("\n")[2]
    assert facts_of(straight, 0.5).is_compilers
    # A second less for each operation whose time it does not know.
    assert [facts_of(straight, told).optimal_seconds for told in (0.25, -0.75, -1.75)] == [0.25] * 3


def test_roofline_is_the_slower_of_products_and_memory():
    operations = tuple(read_operations(parse_program(LOOP)))
    seconds = {one.name: roofline_seconds((one,), V5E) for one in operations}
    # Three arrays of 64 numbers at 819 GB/s take longer than 1,024 operations at the peak.
    assert seconds["product"] == pytest.approx(NUM_TURNS * 3 * 256 / 819e9)
    # Room that is only set aside moves nothing.
    assert seconds["room"] == 0.0
    assert roofline_seconds(operations, V5E) == pytest.approx(sum(seconds.values()))
