"""The quickstart, as `make train` runs it, on half of its records: what the README promises of its result."""

import json
import re

import pytest

from mmei_jax.simulation import aigc_int_dataset
from tests import processes

SINGLE = ("[vision]", "[audio]", "[text]")


@pytest.mark.slow
def test_quickstart_reads_emotion_five_points_better_than_any_single_modality_could(tmp_path):
    data, workdir = tmp_path / "data", tmp_path / "run"
    assert aigc_int_dataset.main([f"--output={data}", "--num_records=10000", "--dim=32", "--seed=1"]) == 0
    environment = processes.environment(tmp_path / "compiled")
    del environment["XLA_FLAGS"]
    flags = ["--config=configs/quickstart.py", f"--config.data.path={data}", f"--workdir={workdir}"]
    code, output = processes.run("train.py", *flags, env=environment)
    assert code == 0, output
    wait_percent = float(re.search(r"input wait ([\d.]+)% of the step time", output)[1])
    assert wait_percent < 2.0, output
    code, output = processes.run("eval.py", f"--workdir={workdir}", "--split=test", env=environment)
    assert code == 0, output
    summary = json.loads((workdir / "eval" / "test.json").read_text())
    reference = summary["reference"]
    best_single = max(reference[f"emotion/accuracy{suffix}"] for suffix in SINGLE)
    accuracy = summary["metrics"]["emotion/accuracy"]
    assert best_single + 0.05 <= accuracy <= reference["emotion/accuracy"] + 0.01, output
    assert "exact ceiling" in output
