"""The profiling command: in this process on one device, and as it is called, on four fake devices."""

import json
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmei_jax.config import parse
from mmei_jax.packing import padded_layouts
from mmei_jax.profiling import traces
from mmei_jax.profiling.__main__ import MAX_TRACED_STEPS, profile_training
from mmei_jax.profiling.ceilings import copy_rate, matmul_rate
from mmei_jax.profiling.profile import make_profile
from mmei_jax.record_order import ShuffledOrder
from mmei_jax.records import Dataset
from mmei_jax.types import InputError
from tests import processes, tiny

NUM_STEPS = 6
# Two shapes of batches.
CHANGES = {
    **tiny.LEAST,
    "data__modalities": ("vision", "text"),
    "data__max_tokens": {"vision": (12, 16), "audio": (24, 24), "text": (12, 16)},
    "data__batch_size": 4,
}
NUM_DEVICES, LEAST = 4, "--config.model.architecture=pooled_logistic"
OLD_TRACE = "trace/plugins/profile/2020_01_01/host.xplane.pb"


def small(monkeypatch):
    """Ceilings of small arrays: what they are is tested apart."""
    monkeypatch.setattr("mmei_jax.profiling.measurement.matmul_rate", lambda *given: matmul_rate(*given, side=64))
    monkeypatch.setattr("mmei_jax.profiling.measurement.copy_rate", lambda *given: copy_rate(*given, num_bytes=2**12))


@pytest.fixture(scope="module")
def config(data):
    return tiny.config(data, **CHANGES)


@pytest.fixture(scope="module")
def report(config, tmp_path_factory):
    """Of one device: the folder, the lines for the terminal, and what was measured."""
    folder = tmp_path_factory.mktemp("profile") / "report"
    (folder / OLD_TRACE).parent.mkdir(parents=True)
    (folder / OLD_TRACE).write_text("no trace that could be read")
    (folder / "profile.json").write_text("{}")
    made = []

    def kept(measurement, num_devices):
        made.append(measurement)
        return make_profile(measurement, num_devices)

    with pytest.MonkeyPatch.context() as patch:
        small(patch)
        patch.setattr("mmei_jax.profiling.__main__.make_profile", kept)
        lines = profile_training(config, folder, num_steps=NUM_STEPS, command="the command")
    return folder, lines, made[0]


@pytest.fixture(scope="module")
def found(report):
    return json.loads((report[0] / "profile.json").read_text())


def batches(config, steps):
    """Of the run's batches the records' lengths by modality, and the layout that holds them."""
    split = Dataset.open(config.data.path).split("train")
    order = ShuffledOrder(num_records=split.num_records, batch_size=4, num_batches=steps.stop, seed=config.seed)
    layouts = padded_layouts(config.data, 4)
    for step in steps:
        lengths = {name: np.minimum(split.lengths(name)[order[step]], 16) for name in ("vision", "text")}
        fitting = (one for one in layouts if all(lengths[name].max() <= one.num_tokens[name] for name in lengths))
        yield lengths, next(fitting, layouts[-1])


@pytest.fixture(scope="module")
def split(data, tmp_path_factory):
    """Of four devices: the command's outcome, and its figures."""
    folder = tmp_path_factory.mktemp("profile") / "split"
    flags = ["--config=tests/tiny_config.py", f"--config.data.path={data}", "--config.mesh.fsdp=2", "--steps=2", LEAST]
    code, output = processes.run(
        "-m", "mmei_jax.profiling", *flags, f"--output={folder}", env=processes.environment(num_devices=NUM_DEVICES)
    )
    assert code == 0, output
    return output, folder, json.loads((folder / "profile.json").read_text())


def test_files_are_written_and_the_trace_is_kept(report):
    folder, lines, _ = report
    assert (folder / "profile.png").read_bytes().startswith(b"\x89PNG")
    text = (folder / "profile.md").read_text()
    assert "![Memory, longest operations and roofline.](profile.png)" in text
    for line in lines:
        name, _, value = line.partition(": ")
        assert f"| {name} |" in text, name
        assert value
    for section in ("Memory", "Compilation", "Operations", "Exchange between devices", "What the figures mean"):
        assert f"\n## {section}\n" in text
    assert "The update sends nothing between devices." in text
    assert any("idle for at most" in line for line in lines)
    assert len(list((folder / "trace").rglob("*.xplane.pb"))) == 2
    # For Perfetto.
    assert len(list((folder / "trace").rglob("*.trace.json.gz"))) == 1


def test_rates_follow_from_what_was_counted(found):
    rates, flops = found["throughput"], found["flops"]
    assert rates["num_steps"] == NUM_STEPS
    assert rates["records_per_second"] == pytest.approx(4 * rates["steps_per_second"])
    assert flops["per_second"] == pytest.approx(flops["per_step"] * rates["steps_per_second"])
    ceiling = found["ceilings"]["matmul_flops_per_second"]
    assert flops["utilization"] == pytest.approx(flops["per_second"] / ceiling)
    assert 0.0 < flops["products_per_step_and_device"] < flops["per_step_and_device"]
    assert 0.0 <= rates["input_wait_share"] <= 1.0


def test_useful_tokens_are_those_of_the_batches_that_were_timed(config, found):
    tokens, places = dict.fromkeys(("vision", "text"), 0), dict.fromkeys(("vision", "text"), 0)
    for lengths, layout in batches(config, range(2, 2 + NUM_STEPS)):
        for name in tokens:
            tokens[name] += int(lengths[name].sum())
            places[name] += 4 * layout.num_tokens[name]
    shares = {name: tokens[name] / places[name] for name in tokens}
    assert found["throughput"]["useful_token_share_by_modality"] == pytest.approx(shares)
    assert found["throughput"]["useful_token_share"] == pytest.approx(sum(tokens.values()) / sum(places.values()))


def test_every_shape_is_compiled_once(found):
    compilation = found["compilation"]
    titles = [step["batch"] for step in compilation["steps"]]
    assert len(titles) == len(set(titles)) == compilation["num_step_programs"] == 2
    assert all(step["compile_seconds"] > 0.0 for step in compilation["steps"])
    assert compilation["num_programs"] >= 2


def test_operations_of_other_shapes_are_not_traced(config, report):
    """One name stands for the programs of all shapes, and for many of their operations."""
    measurement = report[2]
    timed, traced = (
        Counter(layout.num_rows * layout.num_tokens["text"] for _, layout in batches(config, steps))
        for steps in (range(2, 2 + NUM_STEPS), range(2 + NUM_STEPS, 2 + NUM_STEPS + MAX_TRACED_STEPS))
    )
    assert len({step.module for step in measurement.steps.values()}) == 1
    # The batches that came were of both shapes.
    assert len(timed) == len(traced) == 2, (timed, traced)
    assert measurement.traced.num_steps_of == {measurement.main_step.title: MAX_TRACED_STEPS}
    assert measurement.main_step.title == measurement.timing.main_title
    assert {span.name for span in measurement.spans} & {one.name for one in measurement.main_step.facts.operations}


def test_memory_is_told_by_kind(found):
    memory = found["memory_bytes_per_device"]
    kinds = ("parameters", "optimizer state", "batch", "activations", "workspace")
    assert all(memory[kind] > 0 for kind in kinds)
    assert memory["optimizer state"] == pytest.approx(2 * memory["parameters"], rel=0.01)
    assert memory["together"] == sum(size for kind, size in memory.items() if kind not in ("together", "peak_in_use"))


def test_update_fetches_nothing(found):
    assert found["throughput"]["host_fetches_per_step"] == 0


def test_fetches_are_counted(tmp_path):
    step = jax.jit(lambda x: x + 1.0)
    x = step(jnp.zeros(8))
    with jax.profiler.trace(str(tmp_path)):
        for _ in range(3):
            x = step(x)
            float(x.sum())
    assert traces.num_fetches(tmp_path) == 3


def test_operations_have_time_and_what_bounds_them(found):
    operations = found["operations"]
    assert len(operations) > 20
    assert [one["seconds"] for one in operations] == sorted((one["seconds"] for one in operations), reverse=True)
    assert "memory" in {one["bound"] for one in operations} <= {"compute", "memory", "unknown"}
    assert any("transpose(jvp" in one["op_name"] for one in operations)
    assert sum(found["seconds_by_bound"].values()) == pytest.approx(sum(one["seconds"] for one in operations))
    assert 0.0 < found["traced"]["device_busy_share"] <= 1.0


def test_command_measures_several_devices_of_one_process(split):
    output, folder, found = split
    assert f"written: {folder}/profile.md" in output
    assert "steps per second: " in output
    assert (found["num_mesh_devices"], found["num_devices"]) == (NUM_DEVICES, NUM_DEVICES)
    assert found["command"].startswith("python -m mmei_jax.profiling --config=tests/tiny_config.py")
    flops = found["flops"]
    assert flops["per_step"] == pytest.approx(NUM_DEVICES * flops["per_step_and_device"])


def test_collectives_have_bytes_and_time(split):
    _, folder, found = split
    kinds = {one["kind"] for one in found["collectives"]}
    assert {"all-reduce", "all-gather"} <= kinds
    assert all(one["num_bytes"] > 0 and one["group_size"] in (2, 4) for one in found["collectives"])
    assert any(one["seconds"] > 0.0 for one in found["collectives"])
    assert "exchange" in found["seconds_by_bound"]
    assert re.search(r"\| all-reduce \| \d+ \| [\d,]+ \| [\d.]+ \|", (folder / "profile.md").read_text())


def test_what_an_earlier_profile_wrote_is_replaced_and_its_trace_kept(report, found):
    folder = report[0]
    assert found["command"] == "the command"
    assert (folder / OLD_TRACE).read_text() == "no trace that could be read"


def test_wrong_steps_are_refused_and_leave_nothing(config, tmp_path):
    with pytest.raises(InputError, match=r"^--steps=0: expected at least 1$"):
        profile_training(config, tmp_path / "none", num_steps=0)
    with pytest.raises(InputError, match=r"config\.data\.path|manifest\.json"):
        profile_training(parse(tiny.config_dict(tmp_path / "nowhere").to_dict()), tmp_path / "none", num_steps=1)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("num_devices", [1, 4])
def test_ceilings_are_rates_of_all_devices_together(num_devices, monkeypatch):
    calls = []

    def quarter(function, arguments):
        calls.append(len(arguments))
        jax.block_until_ready([function(*own) for own in arguments])
        return 0.25

    monkeypatch.setattr("mmei_jax.profiling.ceilings._least_seconds", quarter)
    devices = jax.devices()[:1] * num_devices
    # A multiplication and an addition for each of 128^3 pairs; every byte is read and written.
    assert matmul_rate("float32", devices, side=128) == num_devices * 2 * 128**3 / 0.25
    assert copy_rate(devices, num_bytes=2**16) == num_devices * 2 * 2**16 / 0.25
    assert calls == [num_devices, num_devices]


def test_ceilings_are_measured():
    assert 1e6 < matmul_rate("float32", side=128) < 1e15
    assert 1e6 < copy_rate(num_bytes=2**16) < 1e15
