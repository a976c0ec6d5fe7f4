"""Several processes train as one: the same losses; a lost one ends the others, and any number of processes goes on."""

import json
import shutil
import signal
import socket
import time
from collections import Counter

import numpy as np
import pytest

from mmei_jax import processes as job
from mmei_jax.types import InputError
from tests import processes

FLAGS = {"train.num_epochs": 4, "train.evaluate_every_epochs": 2, "train.save_every_steps": 5}


def flags(data, workdir, **changes):
    values = {**FLAGS, "data.path": data, "train.log_every_steps": 1, **changes}
    given = [f"--config.{key}={value}" for key, value in values.items()]
    return ["train.py", "--config=tests/tiny_config.py", f"--workdir={workdir}", *given]


def start_job(arguments, count, cache, num_devices=4):
    """Starts ``count`` processes of one job."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = processes.environment(cache, num_devices=num_devices)
    own = [f"--coordinator_address=127.0.0.1:{port}", f"--num_processes={count}"]
    return [processes.start(*arguments, *own, f"--process_index={index}", env=environment) for index in range(count)]


def finish(started):
    """Exit codes and outputs."""
    outputs = [process.communicate(timeout=300)[0] for process in started]
    return [process.returncode for process in started], outputs


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {
        (line["step"], name): value
        for line in lines
        for name, value in line.items()
        if name.startswith(("train/loss", "validation/"))
    }


def ids_seen(workdir):
    lines = [json.loads(line) for line in (workdir / "record_ids.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return Counter(name for line in lines for name in line["ids"])


def assert_close(ours, theirs):
    assert ours
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        np.testing.assert_allclose(value, theirs[key], rtol=1e-5, atol=1e-6, err_msg=str(key))


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """The run in one process of eight devices."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    code, output = processes.run(*flags(data, workdir), env=processes.environment(num_devices=8))
    assert code == 0, output
    return workdir


def test_two_processes_train_as_one(data, alone, tmp_path):
    codes, outputs = finish(start_job(flags(data, tmp_path / "run"), 2, tmp_path / "cache"))
    assert codes == [0, 0], outputs
    assert "on 8 device(s) of 2 processes" in outputs[0]
    assert "step 35/35" in outputs[0]
    # Beside what the runtime prints itself, the second one is silent.
    assert "step 35/35" not in outputs[1]
    assert_close(losses(tmp_path / "run"), losses(alone))
    assert ids_seen(tmp_path / "run") == ids_seen(alone)


@pytest.mark.slow
def test_job_whose_process_was_killed_goes_on_with_any_number_of_processes(data, tmp_path):
    num_epochs, workdirs, cache = 8, {count: tmp_path / f"run{count}" for count in (1, 2)}, tmp_path / "cache"
    arguments = {count: flags(data, workdir, **{"train.num_epochs": num_epochs}) for count, workdir in workdirs.items()}
    started = start_job(arguments[2], 2, cache)
    processes.wait_for_step(workdirs[2], 12, started[0])
    started[1].send_signal(signal.SIGKILL)
    began = time.monotonic()
    codes, outputs = finish(started)
    # A supervisor must not wait for a job that stands still.
    assert time.monotonic() - began < 60.0
    assert codes[0] not in (0, 143), outputs[0]
    shutil.copytree(workdirs[2], workdirs[1])
    for count in workdirs:
        if count == 1:
            done = [processes.start(*arguments[1], env=processes.environment(cache, num_devices=8))]
        else:
            done = start_job(arguments[2], 2, cache)
        codes, outputs = finish(done)
        assert set(codes) == {0}, outputs
        assert "going on from the checkpoint of step" in outputs[0]
        # Every record once in every epoch, whoever read it.
        seen = ids_seen(workdirs[count])
        assert len(seen) == 140
        assert set(seen.values()) == {num_epochs}


@pytest.mark.slow
def test_signal_to_one_process_saves_all_at_the_same_step(data, tmp_path):
    arguments = flags(data, tmp_path / "run", **{"train.num_epochs": 400, "train.save_every_steps": 10_000})
    started = start_job(arguments, 2, tmp_path / "cache")
    processes.wait_for_step(tmp_path / "run", 10, started[0])
    started[1].send_signal(signal.SIGTERM)
    codes, outputs = finish(started)
    assert codes == [143, 143], outputs
    assert "stopped by SIGTERM at step" in outputs[0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(address="a:1"), "--num_processes=None --process_index=None: expected all three or none"),
        (dict(address="a:1", count=2, index=2), r"--process_index=2: expected an index in \[0, 2\)"),
        (dict(address="a", count=2, index=0), "expected an address such as node-0:12345"),
        (dict(launcher="slurm"), "--launcher=slurm: SLURM_STEP_NUM_TASKS is not set"),
        (dict(launcher="kubernetes"), "--launcher=kubernetes: COORDINATOR_ADDRESS=, NUM_PROCESSES=, "),
    ],
)
def test_what_is_no_job_is_refused(given, message, monkeypatch):
    for name in ("SLURM_STEP_NUM_TASKS", "COORDINATOR_ADDRESS", "NUM_PROCESSES", "JOB_COMPLETION_INDEX"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match=message):
        job.join(**given)


@pytest.fixture
def joined(monkeypatch):
    """What the distributed runtime would be started with."""
    found = []
    monkeypatch.setattr(job.jax.distributed, "initialize", lambda **options: found.append(options))
    for name in ("SLURM_STEP_NUM_TASKS", "COORDINATOR_ADDRESS", "NUM_PROCESSES", "JOB_COMPLETION_INDEX"):
        monkeypatch.delenv(name, raising=False)
    return found


@pytest.mark.parametrize(
    ("variables", "given", "expected"),
    [
        ({}, {}, []),
        ({}, dict(address="node:1", count=1, index=0), []),
        ({"SLURM_STEP_NUM_TASKS": "1"}, {}, []),
        ({"SLURM_STEP_NUM_TASKS": "4"}, {}, [dict(cluster_detection_method="slurm")]),
        ({"SLURM_STEP_NUM_TASKS": "4"}, dict(launcher="none"), []),
        ({}, dict(launcher="cloud_tpu"), [{}]),
        (
            {"COORDINATOR_ADDRESS": "job-0:1", "NUM_PROCESSES": "4", "JOB_COMPLETION_INDEX": "3"},
            {},
            [dict(coordinator_address="job-0:1", num_processes=4, process_id=3)],
        ),
        (
            {"SLURM_STEP_NUM_TASKS": "4"},
            dict(address="node:1", count=2, index=1),
            [dict(coordinator_address="node:1", num_processes=2, process_id=1)],
        ),
    ],
)
def test_launchers_tell_the_job(variables, given, expected, joined, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    job.join(**given)
    assert joined == [{"heartbeat_timeout_seconds": 20, **each} for each in expected]
