"""Eight fake CPU devices compute what one computes, and read each other's checkpoints."""

import json

import numpy as np
import pytest

from tests import processes, tiny


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.make_dataset(tmp_path_factory.mktemp("data") / "aigc_int")


def train(data, workdir, num_devices, num_epochs, *flags):
    code, output = processes.run(
        "train.py",
        "--config=tests/tiny_config.py",
        f"--config.data.path={data}",
        f"--config.train.num_epochs={num_epochs}",
        "--config.train.evaluate_every_epochs=2",
        "--config.data.evaluation_batch_size=8",
        f"--workdir={workdir}",
        *flags,
        env=processes.environment(num_devices=num_devices),
    )
    assert code == 0, output
    return output


def evaluate(workdir, num_devices):
    code, output = processes.run(
        "eval.py",
        f"--workdir={workdir}",
        env=processes.environment(num_devices=num_devices),
    )
    assert code == 0, output
    return json.loads((workdir / "eval" / "test.json").read_text())["metrics"]


def scalars(workdir, prefixes):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {(line["step"], name): value for line in lines for name, value in line.items() if name.startswith(prefixes)}


def validation(workdir):
    """The interrupted run has another log line at the interruption, but the same evaluations."""
    return scalars(workdir, "validation/")


def assert_close(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        np.testing.assert_allclose(value, theirs[key], rtol=1e-5, atol=1e-5, err_msg=str(key))


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """Working directories of the same run on 1 and on 8 devices."""
    folders = {number: tmp_path_factory.mktemp(f"run{number}") for number in (1, 8)}
    for number, folder in folders.items():
        output = train(data, folder, number, 4)
        assert f"on {number} device(s)" in output
    return folders


def test_eight_devices_train_as_one(runs):
    prefixes = ("train/", "validation/")
    assert_close(scalars(runs[8], prefixes), scalars(runs[1], prefixes))


def test_checkpoint_of_eight_is_evaluated_on_one_and_the_other_way_round(runs):
    for folder in runs.values():
        assert_close(evaluate(folder, 1), evaluate(folder, 8))


def test_evaluation_takes_any_number_of_devices(runs, tmp_path):
    # Neither the training batch of 16 nor the evaluation batch of 8 is a multiple of 3, and the 30 test records take
    # several batches: the ranking loss, whose negatives are those of the batch, must not notice the filler.
    assert_close(evaluate(runs[8], 3), evaluate(runs[8], 1))


@pytest.mark.slow
def test_run_begun_on_one_device_goes_on_on_eight(data, runs, tmp_path):
    flags = [
        "train.py",
        "--config=tests/tiny_config.py",
        f"--config.data.path={data}",
        "--config.train.num_epochs=4",
        "--config.train.evaluate_every_epochs=2",
        "--config.data.evaluation_batch_size=8",
        f"--workdir={tmp_path}",
    ]
    process = processes.start(*flags, env=processes.environment())
    processes.wait_for_step(tmp_path, 10, process)
    process.terminate()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 143, output
    output = train(data, tmp_path, 8, 4)
    assert "going on from the checkpoint of step" in output
    assert_close(validation(tmp_path), validation(runs[1]))


def test_parameters_split_over_fsdp_and_tensor_train_as_one_device(data, runs, tmp_path):
    output = train(data, tmp_path, 8, 4, "--config.mesh.fsdp=2", "--config.mesh.tensor=2")
    assert "on 8 device(s)" in output
    prefixes = ("train/", "validation/")
    assert_close(scalars(tmp_path, prefixes), scalars(runs[1], prefixes))
    assert_close(evaluate(tmp_path, 1), evaluate(runs[1], 1))
