"""Predictions for TPU topologies: all of it with a CPU device in the place of a chip, and with libtpu where it is."""

import dataclasses
import importlib.util
import json
import re

import jax
import pytest

from mmei_jax.profiling import topology as prediction
from mmei_jax.profiling.candidates import MeshShape
from mmei_jax.profiling.lowering import UpdateLowering
from mmei_jax.profiling.product_flops import product_flops
from mmei_jax.profiling.topology import PREDICTIONS_NAME, REPORT_NAME, predict_topologies
from mmei_jax.sharding import mesh_over
from mmei_jax.training_parts import TrainingParts
from mmei_jax.types import InputError
from mmei_jax.workdir import locked
from tests import processes, tiny

ONE = MeshShape(1, 1, 1)
CHANGES = {**tiny.LEAST, "data__modalities": ("vision", "text"), "data__batch_size": 4}
HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None
COMMAND = "mmei_jax/profiling/__main__.py"


@pytest.fixture(scope="module")
def config(data):
    return tiny.config(data, **CHANGES)


def run(config, output, names=("v5e:1x1",), *, meshes=None, records=3, command="the command"):
    lines = []
    found = predict_topologies(
        config, names, meshes=meshes, records_per_chip=records, output=output, command=command, report=lines.append
    )
    return found, lines


@pytest.fixture
def no_tpu(monkeypatch):
    """A CPU device in the place of a chip."""
    monkeypatch.setattr(prediction, "topology_devices", lambda topology: jax.devices()[: topology.num_chips])


@pytest.fixture(scope="module")
def folder(config, tmp_path_factory):
    """What two calls wrote, and what they told."""
    folder = tmp_path_factory.mktemp("topologies")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prediction, "topology_devices", lambda topology: jax.devices()[: topology.num_chips])
        _, first = run(config, folder, records=2, command="first")
        found, second = run(config, folder, records=3, command="second")
    return folder, found, first + second


def test_update_is_lowered_for_any_number_of_records(config):
    lowering = UpdateLowering(config)
    assert lowering.head_counts() == (2,)
    # More than the data set has.
    parts = lowering.on(mesh_over(jax.devices()[:1]), ONE, 4096)
    assert parts.batch_shapes().is_record.shape == (4096,)
    assert parts.batch_shapes().text.features.shape[:2] == (4096, 16)


def test_model_flops_are_those_of_the_products_of_the_update(config):
    lowering = UpdateLowering(config)
    flops = {size: lowering.model_flops(size) for size in (8, 16)}
    parts = lowering.on(mesh_over(jax.devices()[:1]), ONE, 8)
    traced = product_flops(jax.make_jaxpr(parts.train_step())(parts.state_shapes(), parts.batch_shapes()))
    assert flops[8] == traced > 0
    # In-batch negatives cost the square of the records.
    assert 2.0 <= flops[16] / flops[8] < 2.2


def test_folder_gathers_what_several_calls_predict(folder):
    path, found, lines = folder
    assert [one.records_per_chip for one in found] == [2, 3]
    values = json.loads((path / PREDICTIONS_NAME).read_text())
    assert values["commands"] == ["first", "second"]
    assert len(values["predictions"]) == 2
    assert "batch_size" not in values["config"]["data"]
    assert values["versions"]["jax"] == jax.__version__
    assert [line.partition(":  ")[0].partition(" records")[0] for line in lines] == [
        "v5e:1x1 1x1x1, 2",
        "v5e:1x1 1x1x1, 3",
    ]
    page = (path / REPORT_NAME).read_text()
    assert "first\nsecond" in page
    assert page.count("| v5e-1 (v5e:1x1) | 1 | ") == 2


def test_a_prediction_holds_what_the_compiler_says(folder):
    costs = folder[1][0].costs
    assert costs.memory["parameters"] > 0
    assert costs.memory_bytes > costs.memory["parameters"] + costs.memory["optimizer state"]
    assert costs.product_flops == pytest.approx(costs.model_flops, rel=0.05)
    assert costs.times.optimal_seconds > 0
    # A single chip sends nothing.
    assert costs.collectives == ()
    assert costs.seconds == costs.times.optimal_seconds


def test_the_same_mesh_again_takes_the_place_of_what_was_there(folder, config, no_tpu, monkeypatch, tmp_path):
    again = dataclasses.replace(folder[1][0], compile_seconds=-1.0)
    monkeypatch.setattr(prediction, "predict", lambda *given: again)
    (tmp_path / PREDICTIONS_NAME).write_text((folder[0] / PREDICTIONS_NAME).read_text())
    assert run(config, tmp_path, records=2)[0] == [folder[1][1], again]


def test_folder_of_another_configuration_is_refused(folder, data, no_tpu):
    other = tiny.config(data, **CHANGES, model__dim=8)
    with pytest.raises(
        InputError, match=r"predictions.json: holds predictions of another config: expected another --output"
    ):
        run(other, folder[0])


def test_folder_that_another_call_writes_is_refused(config, no_tpu, tmp_path):
    with locked(tmp_path, "--output"), pytest.raises(InputError, match=r"^--output=.*: in use by another process"):
        run(config, tmp_path)


def test_program_that_does_not_fit_is_an_answer(config, no_tpu, monkeypatch, tmp_path):
    def refuse(parts):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used "
            "23.43G of 15.75G hbm. Exceeded hbm capacity by 7.68G."
        )

    monkeypatch.setattr(TrainingParts, "lower", refuse)
    (one,), (line,) = run(config, tmp_path)
    assert one.costs is None
    assert one.refusal == "needs 23.43GB of 15.75GB hbm"
    assert "does not fit: needs 23.43GB of 15.75GB hbm" in line
    assert "| no | 3 |" in (tmp_path / REPORT_NAME).read_text()


def test_records_that_micro_batches_cannot_share_are_an_answer(data, no_tpu, tmp_path):
    (one,), _ = run(tiny.config(data, **CHANGES, train__gradient_accumulation_steps=2), tmp_path)
    assert "gradient_accumulation_steps = 3 / 2: expected a multiple of the 1 devices" in one.refusal


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (
            ("v5e:4x4",),
            {"records": None},
            r"config.data.batch_size = 4: expected a multiple of the 16 chips of v5e:4x4, or",
        ),
        (("v5e:1x1",), {"records": 0}, r"--per_chip_batch=0: expected at least 1"),
        (("v5e:1x1",), {"meshes": "2x1x1"}, r"--meshes=2x1x1: '2x1x1': expected 1 devices"),
        (("v5e:1x1", "h100"), {}, r"--topology=h100: expected v5e or v6e"),
    ],
)
def test_what_cannot_be_predicted_is_refused_before_anything_is_written(
    names, options, message, config, no_tpu, tmp_path
):
    with pytest.raises(InputError, match=message):
        run(config, tmp_path / "out", names, **options)
    assert not (tmp_path / "out").exists()


def test_command_tells_what_is_wrong_in_one_line(tmp_path):
    config = "--config=configs/quickstart.py"
    commands = [
        [COMMAND, config, "--topology=v9:2x2"],
        [COMMAND, config, "--meshes=4x1x1"],
        [COMMAND, config, "--topology=v5e:2x2", "--steps=3"],
    ]
    expected = [
        r"error: --topology=v9:2x2: expected v5e or v6e with two sizes",
        r"error: --meshes=4x1x1: expected --topology too",
        r"error: --steps=3: expected none with --topology",
    ]
    for (code, _, error), pattern in zip(processes.run_forked(commands, tmp_path), expected, strict=True):
        assert code == 2
        assert re.match(pattern, error)
        assert error.count("\n") == 1


@pytest.mark.slow
@pytest.mark.skipif(not HAS_LIBTPU, reason="libtpu is not installed: pip install -e '.[tpu]'")
def test_update_compiles_for_four_chips_that_are_not_there(data, tmp_path):
    found, _ = run(
        tiny.config(data, **CHANGES | {"model__architecture": "mmei"}), tmp_path, ("v5e:2x2",), meshes="4x1x1,1x4x1"
    )
    costs = {str(one.mesh): one.costs for one in found}
    assert all(one is not None for one in costs.values()), [one.refusal for one in found]
    data, fsdp = costs["4x1x1"], costs["1x4x1"]
    assert fsdp.memory["parameters"] < 0.4 * data.memory["parameters"]
    # All gradients are added up everywhere; of split parameters each chip gathers what it lacks.
    kinds = {mesh: {use.kind for use in one.collectives} for mesh, one in costs.items()}
    assert "all-reduce" in kinds["4x1x1"]
    assert "all-gather" in kinds["1x4x1"]
    assert data.sent_bytes > 1.5 * data.memory["parameters"] * 3 / 4
    for one in (data, fsdp):
        assert min(one.times.optimal_seconds, one.times.expected_seconds) > 0.0
        assert one.product_flops == pytest.approx(one.model_flops, rel=0.5)
