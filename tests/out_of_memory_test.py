"""A device that runs out of memory: one line, a table, and the settings that would need less."""

import re
import shlex

import jax
import jax.numpy as jnp
import pytest

from mmei_jax import command, memory_estimates
from mmei_jax.memory_estimates import MemoryEstimate, Saving, alternatives, estimate, largest_savings, most_alive
from mmei_jax.out_of_memory import explained, is_out_of_memory, memory_lines, saving_lines
from mmei_jax.profiling.programs import describe_program
from mmei_jax.training import train
from mmei_jax.training_parts import prepare
from mmei_jax.types import OutOfMemoryError
from tests import tiny

# More bytes than any machine has.
TOO_LARGE = 2**46


@jax.jit
def allocate():
    return jnp.zeros(TOO_LARGE, jnp.int8)


def run_out():
    allocate().block_until_ready()


@pytest.fixture(scope="module")
def parts(data):
    """Of a model that is traced in no time."""
    return prepare(tiny.config(data, **tiny.LEAST))


@pytest.fixture(scope="module")
def now(parts):
    return estimate(parts)


def test_status_tells_it_from_other_errors_of_the_runtime():
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        run_out()
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(jax.errors.JaxRuntimeError("INTERNAL: something else"))
    assert not is_out_of_memory(ValueError("RESOURCE_EXHAUSTED"))


def test_other_errors_stay_what_they_are(parts):
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"^INTERNAL"), explained(parts.config, parts):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


def test_training_that_runs_out_ends_with_table_and_settings(data, tmp_path, monkeypatch, capsys):
    """The step allocates what no machine has: the runtime's own error."""

    def jit_step(parts):
        def step(state, batch):
            run_out()

        return step

    monkeypatch.setattr("mmei_jax.training_parts.TrainingParts.jit_step", jit_step)
    config = tiny.config(data, **tiny.LEAST)
    assert command.report_errors(lambda: int(train(config, tmp_path / "run").step)) == command.EXIT_INPUT_ERROR
    first, *details = capsys.readouterr().err.splitlines()
    assert first.startswith("error: out of memory: the memory of a device")
    for kind in ("parameters", "optimizer state", "gradients", "batches", "activations", "together"):
        assert any(re.match(rf"  {kind} +[\d.]+ \w+ +\d+%", line) for line in details), kind
    settings = [line for line in details if line.startswith(("  --config.", "  '--config."))]
    assert len(settings) == 3
    assert all(re.search(r": about [\d.]+ \w+ less", line) for line in settings)


def test_compiler_that_runs_out_is_told_in_the_same_words(parts):
    def backend_compile():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm.\nUsed 20G of 16G")

    with (
        pytest.raises(OutOfMemoryError, match=r"^out of memory: the memory .* space hbm\.$") as caught,
        explained(parts.config, parts),
    ):
        backend_compile()
    assert any(line.startswith("  activations") for line in caught.value.details)


def test_run_that_cannot_be_described_is_told_all_the_same(data, parts, monkeypatch):
    monkeypatch.setattr("mmei_jax.out_of_memory.prepare", lambda config: run_out())
    with pytest.raises(OutOfMemoryError) as caught, explained(parts.config):
        run_out()
    (line,) = caught.value.details
    assert line.startswith("what it needs could not be estimated: RESOURCE_EXHAUSTED")


def test_most_alive_follows_arrays_to_their_last_reader():
    def function(x):
        kept = jnp.exp(x)
        wide = jnp.broadcast_to(kept, (10, 100)).sum()
        return kept * wide

    jaxpr = jax.make_jaxpr(function)(jnp.ones(100)).jaxpr
    assert most_alive(jaxpr, {(): 1.0}) == 4 * (100 + 1000 + 1)
    assert most_alive(jaxpr, {(): 0.5, (10, 100): 1.0}) == 4 * (50 + 1000) + 2


def test_loops_need_what_one_turn_needs():
    def function(x):
        return jax.lax.scan(lambda total, row: (total + jnp.exp(jnp.exp(row)).sum(), None), 0.0, x)[0]

    jaxpr = jax.make_jaxpr(function)(jnp.ones((50, 100))).jaxpr
    assert 2 * 400 <= most_alive(jaxpr, {(): 1.0}) <= 2 * 400 + 16


def test_state_is_counted_exactly_and_the_rest_like_the_compiler(data):
    parts = prepare(tiny.config(data))
    now = estimate(parts)
    memory = describe_program(parts.lower().compile(), state=parts.state_shapes()).memory
    assert now.parameters == memory.parameters
    assert now.optimizer_state == memory.optimizer_state
    # Training reads no relevant items, and what nothing reads is no argument of the program.
    unread = parts.batch_shapes().ranking.relevant_index
    assert now.batches == 3 * (memory.batch + unread.size * unread.dtype.itemsize)
    assert 0.4 < memory.temporaries / (now.gradients + now.activations) < 1.5


def test_settings_are_those_that_save_most(parts, now):
    everything = largest_savings(parts, now, num_settings=100)
    savings = [saving.num_bytes for saving in everything]
    assert savings == sorted(savings, reverse=True)
    assert min(savings) > 0
    # As a shell takes them: without quotes it refuses (8,).
    assert all(shlex.join(shlex.split(saving.setting)) == saving.setting for saving in everything)
    assert "'--config.data.max_tokens.text=(8,)'" in {saving.setting for saving in everything}
    by_setting = {saving.setting: saving.num_bytes for saving in everything}
    half = by_setting["--config.data.batch_size=8"]
    assert half == pytest.approx((now.activations + now.batches) / 2, rel=0.1)
    assert by_setting["--config.data.num_prefetch_batches=1"] == pytest.approx(now.batches / 3, rel=0.01)


def test_mesh_is_among_the_settings_where_there_are_devices(parts, monkeypatch):
    monkeypatch.setattr(memory_estimates.jax, "device_count", lambda: 4)
    changes = [changes for changes, _ in alternatives(parts.config)]
    assert {"mesh.data": -1, "mesh.fsdp": 4} in changes
    assert {"mesh.data": -1, "mesh.tensor": 4} in changes


def test_lines_are_aligned_and_say_what_changes():
    table = memory_lines(MemoryEstimate(2**20, 2**21, 0, 100, 2**30).by_kind(), "title")
    assert table[0] == "title"
    assert len({len(line) for line in table[1:]}) == 1
    assert saving_lines([Saving("--config.a=1", "other numbers", 2**20)])[1] == (
        "  --config.a=1: about 1.0 MiB less (other numbers)"
    )
    assert "larger device" in saving_lines([])[0]
