"""Eight fake CPU devices compute what one computes, and read each other's checkpoints."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import pytest

from mmei_jax import evaluation, state
from mmei_jax.config import parse
from mmei_jax.sharding import mesh_over
from mmei_jax.training import train
from mmei_jax.types import InputError
from tests import processes, tiny_config

FLAGS = {"train.num_epochs": 4, "train.evaluate_every_epochs": 2, "data.evaluation_batch_size": 8}
# A process of eight devices, beside the test's of one: its arguments are the data and the folder of the runs.
EIGHT_DEVICES = "from tests.multi_device_test import work_on_eight_devices; work_on_eight_devices()"


def train_here(data, workdir, **mesh):
    values = tiny_config.get_config()
    values.data.path = str(data)
    values.mesh.update(mesh)
    values.update_from_flattened_dict(FLAGS)
    train(parse(values.to_dict()), workdir)


def evaluate_here(workdir):
    evaluation.evaluate_workdir(workdir, "test")
    return json.loads((workdir / "eval" / "test.json").read_text())["metrics"]


def work_on_eight_devices():
    """Trains and evaluates, also the run on one device that is there, and also on three of the eight."""
    assert jax.device_count() == 8
    data, folder = map(Path, sys.argv[1:])
    train_here(data, folder / "eight")
    train_here(data, folder / "split", fsdp=2, tensor=2)
    figures = {f"{name} on eight": evaluate_here(folder / name) for name in ("one", "eight")}
    evaluation.make_evaluation_mesh = lambda: mesh_over(jax.devices()[:3])
    figures["eight on three"] = evaluate_here(folder / "eight")
    (folder / "figures.json").write_text(json.dumps(figures))
    # No parameter of the tiny model is large.
    state.SMALLEST_SPLIT_SIZE = 100
    try:
        train_here(data, folder / "refused", tensor=8)
    except InputError as error:
        (folder / "refusal.txt").write_text(str(error))


def scalars(workdir, prefixes=("train/", "validation/")):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {(line["step"], name): value for line in lines for name, value in line.items() if name.startswith(prefixes)}


def validation(workdir):
    """The interrupted run has another log line at the interruption, but the same evaluations."""
    return scalars(workdir, "validation/")


def assert_close(ours, theirs):
    assert ours
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        np.testing.assert_allclose(value, theirs[key], rtol=1e-5, atol=1e-5, err_msg=str(key))


@dataclass(frozen=True)
class Runs:
    """The same run on one device, on eight, and on eight with split parameters: "one", "eight" and "split".

    Attributes:
        folder: of their working directories.
        figures: of the test split; "one on eight" are those of the first's checkpoint on eight devices.
    """

    folder: Path
    figures: dict[str, dict[str, float]]


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    assert jax.device_count() == 1
    folder = tmp_path_factory.mktemp("runs")
    train_here(data, folder / "one")
    environment = processes.environment(num_devices=8)
    code, output = processes.run("-c", EIGHT_DEVICES, str(data), str(folder), env=environment)
    assert code == 0, output
    assert output.count("updates of 16 on 8 device(s)") == 2
    figures = json.loads((folder / "figures.json").read_text())
    figures |= {f"{name} on one": evaluate_here(folder / name) for name in ("one", "eight", "split")}
    return Runs(folder, figures)


def test_mesh_that_leaves_large_parameters_whole_is_refused_before_anything_is_trained(runs):
    message = (runs.folder / "refusal.txt").read_text()
    # Neither positions nor the model dimension are split over the tensor axis.
    assert "config.mesh.tensor = 8" in message
    assert "'embed_text/position_embedding' of shape (16, 16), and 2 more" in message
    assert not (runs.folder / "refused" / "checkpoints").exists()


def test_eight_devices_train_as_one(runs):
    assert_close(scalars(runs.folder / "eight"), scalars(runs.folder / "one"))


def test_checkpoint_of_eight_is_evaluated_on_one_and_the_other_way_round(runs):
    for name in ("one", "eight"):
        assert_close(runs.figures[f"{name} on one"], runs.figures[f"{name} on eight"])


def test_evaluation_takes_any_number_of_devices(runs):
    # Neither the training batch of 16 nor the evaluation batch of 8 is a multiple of 3, and the 30 test records take
    # several batches: the ranking loss, whose negatives are those of the batch, must not notice the filler.
    assert_close(runs.figures["eight on three"], runs.figures["eight on one"])


@pytest.mark.slow
def test_run_begun_on_one_device_goes_on_on_eight(data, runs, tmp_path):
    flags = ["train.py", "--config=tests/tiny_config.py", f"--config.data.path={data}", f"--workdir={tmp_path}"]
    flags += [f"--config.{key}={value}" for key, value in FLAGS.items()]
    process = processes.start(*flags, env=processes.environment())
    processes.wait_for_step(tmp_path, 10, process)
    process.terminate()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 143, output
    code, output = processes.run(*flags, env=processes.environment(num_devices=8))
    assert code == 0, output
    assert "going on from the checkpoint of step" in output
    assert_close(validation(tmp_path), validation(runs.folder / "one"))


def test_parameters_split_over_fsdp_and_tensor_train_as_one_device(runs):
    assert_close(scalars(runs.folder / "split"), scalars(runs.folder / "one"))
    assert_close(runs.figures["split on one"], runs.figures["one on one"])
