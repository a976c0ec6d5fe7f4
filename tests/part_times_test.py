"""Times of parts, with a clock that the tests move."""

import json
import threading

import jax
import pytest

from mmei_jax import part_times
from mmei_jax.part_times import PartTimes, by_part


class Clock:
    """Stands in for the module ``time``."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(part_times, "time", clock)
    return clock


def compile_for(clock, seconds, event="backend_compile_duration"):
    """JAX says at the end of a compilation how long it took."""
    clock.now += seconds
    jax.monitoring.record_event_duration_secs(f"/jax/core/compile/{event}", seconds)


def test_part_within_another_is_not_counted_twice(clock, tmp_path):
    times = PartTimes(tmp_path / "times.json")
    with times.stage("seeds"):
        clock.now += 1.0
        with times.part("updates"):
            clock.now += 2.0
            with times.part("data"):
                clock.now += 4.0
            clock.now += 8.0
        with times.part("data"):
            clock.now += 16.0
    expected = {"seeds": {"other": 1.0, "updates": 10.0, "data": 20.0, "compilation": 0.0}}
    assert times.seconds == expected
    assert json.loads((tmp_path / "times.json").read_text()) == expected


def test_compilation_is_told_apart_wherever_it_happens(clock, tmp_path):
    times = PartTimes(tmp_path / "times.json")
    with times.stage("seeds"):
        compile_for(clock, 0.5)
        with times.part("updates"):
            clock.now += 1.0
            # A function traced within another: the outer one's time holds the inner one's.
            compile_for(clock, 2.0, "jaxpr_trace_duration")
            clock.now += 2.0
            jax.monitoring.record_event_duration_secs("/jax/core/compile/jaxpr_trace_duration", 4.5)
            compile_for(clock, 8.0)
        other = threading.Thread(target=compile_for, args=(clock, 32.0))
        other.start()
        other.join()
        jax.monitoring.record_event_duration_secs("/jax/another/event", 64.0)
    assert times.seconds == {"seeds": {"other": 32.0, "updates": 0.5, "compilation": 13.0}}
    # Outside of a stage nothing is noted.
    compile_for(clock, 1.0)
    assert sum(times.seconds["seeds"].values()) == 45.5


def test_later_commands_add_to_what_is_there_also_after_one_that_failed(clock, tmp_path):
    first = PartTimes(tmp_path / "times.json")

    def fail():
        with first.stage("search"), first.part("updates"):
            clock.now += 1.0
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    second = PartTimes(tmp_path / "times.json")
    with second.stage("search"), second.part("updates"):
        clock.now += 2.0
    with second.stage("seeds"), second.part("data"):
        clock.now += 4.0
    assert by_part(PartTimes(tmp_path / "times.json").seconds) == {
        "data": 4.0,
        "updates": 3.0,
        "compilation": 0.0,
        "other": 0.0,
    }


def test_command_that_is_killed_leaves_what_was_saved(clock, tmp_path):
    times = PartTimes(tmp_path / "times.json")
    with times.stage("seeds"):
        with times.part("updates"):
            clock.now += 1.0
        times.save()
        assert PartTimes(tmp_path / "times.json").seconds["seeds"]["updates"] == 1.0


def test_real_compilation_is_noted(tmp_path):
    times = PartTimes(tmp_path / "times.json")
    with times.stage("seeds"):
        jax.jit(lambda x: x * 3.0 + 17.0)(2.0).block_until_ready()
    assert times.seconds["seeds"]["compilation"] > 0.0
