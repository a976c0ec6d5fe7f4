"""The real train.py, killed and started again, ends as if nothing had happened."""

import random
import signal
import time

import jax
import numpy as np
import pytest

from mmei_jax.checkpointing import Checkpointer
from mmei_jax.config import parse
from mmei_jax.records import Dataset
from mmei_jax.sharding import make_mesh
from mmei_jax.state import build_model, placed_variable_shapes
from tests import processes, tiny_config

LAST_STEP = 525


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


def arguments(data, workdir):
    return ["train.py", "--config=tests/tiny_config.py", f"--config.data.path={data}", f"--workdir={workdir}"]


@pytest.fixture(scope="module")
def whole_run(data, cache, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    code, output = processes.run(*arguments(data, workdir), env=processes.environment(cache))
    assert code == 0, output
    return workdir


def last_variables(data, workdir):
    config = tiny_config.get_config()
    config.data.path = str(data)
    config = parse(config.to_dict())
    model = build_model(config, Dataset.open(data))
    checkpointer = Checkpointer(workdir, best_metric=config.train.best_metric)
    assert checkpointer.latest_step == LAST_STEP
    variables = checkpointer.restore_model(LAST_STEP, placed_variable_shapes(model, make_mesh(config)))
    checkpointer.close()
    return variables


def assert_same_end(data, workdir, whole_dir):
    assert (workdir / "record_ids.jsonl").read_bytes() == (whole_dir / "record_ids.jsonl").read_bytes()
    jax.tree.map(np.testing.assert_array_equal, last_variables(data, workdir), last_variables(data, whole_dir))


def kill_and_finish(data, workdir, environment, steps):
    """Kills the run after each of ``steps``, then lets it end; exit code and output of the last start."""
    for step in steps:
        process = processes.start(*arguments(data, workdir), env=environment)
        processes.wait_for_step(workdir, step, process)
        time.sleep(random.random() * 0.05)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    return processes.run(*arguments(data, workdir), env=environment)


@pytest.mark.slow
def test_run_killed_once_ends_bit_equal(data, cache, whole_run, tmp_path):
    # The save of step 60 begins when that of step 30 is complete: there is a checkpoint, however busy the machine is.
    code, output = kill_and_finish(data, tmp_path, processes.environment(cache), [random.randrange(70, 400)])
    assert code == 0, output
    assert "going on from the checkpoint of step" in output
    assert_same_end(data, tmp_path, whole_run)


@pytest.mark.slow
def test_run_killed_at_three_random_times_ends_bit_equal_as_users_compile_it(data, tmp_path):
    """With XLA's own options, and every start compiling anew: no cache hands one program to the next."""
    environment = {key: value for key, value in processes.environment(tmp_path).items() if key != "XLA_FLAGS"}
    environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    code, output = processes.run(*arguments(data, tmp_path / "whole"), env=environment)
    assert code == 0, output
    steps = sorted(random.sample(range(20, 480), 3))
    code, output = kill_and_finish(data, tmp_path / "killed", environment, steps)
    assert code == 0, f"killed after {steps}: {output}"
    assert_same_end(data, tmp_path / "killed", tmp_path / "whole")


def test_sigterm_saves_before_exit_and_a_second_process_is_refused(data, cache, whole_run, tmp_path):
    process = processes.start(*arguments(data, tmp_path), env=processes.environment(cache))
    processes.wait_for_step(tmp_path, 50, process)
    code, output = processes.run(*arguments(data, tmp_path), env=processes.environment(cache))
    process.send_signal(signal.SIGTERM)
    first_output, _ = process.communicate(timeout=120)
    assert code == 2
    assert output.splitlines()[-1] == (
        f"error: --workdir={tmp_path}: in use by another process; expected a folder of its own"
    )
    assert process.returncode == 143, first_output
    said = first_output.splitlines()[-1]
    assert said.startswith("stopped by SIGTERM at step ")
    step = int(said.split("step ")[1].split(",")[0])
    assert (tmp_path / "checkpoints" / str(step)).is_dir()
    code, output = processes.run(*arguments(data, tmp_path), env=processes.environment(cache))
    assert code == 0, output
    assert f"going on from the checkpoint of step {step}" in output
    assert_same_end(data, tmp_path, whole_run)
