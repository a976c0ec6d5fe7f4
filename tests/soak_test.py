"""A thousand steps of the real train.py: memory, compilations and checkpoints stay what they were."""

import json

import pytest

from tests import processes

NUM_STEPS = 1000
# The whole command, which notes after every flush of its log what the process holds.
_PROGRAM = """
import json, os, pathlib, runpy, sys
from mmei_jax import training_log
from mmei_jax.compilations import CompilationCounter

workdir, path = sys.argv[1:3]
sys.argv = ["train.py", *sys.argv[3:]]
compilations, flush = CompilationCounter(), training_log.TrainingLog.flush


def noting(self, schedule):
    steps = [step for step, _ in self._pending]
    flush(self, schedule)
    if steps:
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
        saved = [each.name for each in pathlib.Path(workdir, "checkpoints").iterdir() if each.name.isdigit()]
        held = pages * os.sysconf("SC_PAGE_SIZE")
        note = dict(step=steps[-1], bytes=held, compiled=compilations.count, saved=len(saved))
        with open(path, "a") as file:
            file.write(json.dumps(note) + chr(10))


training_log.TrainingLog.flush = noting
runpy.run_path("train.py", run_name="__main__")
"""


@pytest.mark.slow
def test_a_thousand_steps_hold_no_more_memory_than_two_hundred(data, tmp_path):
    workdir, notes = tmp_path / "run", tmp_path / "notes.jsonl"
    code, output = processes.run(
        "-c",
        _PROGRAM,
        str(workdir),
        str(notes),
        "--config=tests/tiny_config.py",
        f"--config.data.path={data}",
        f"--workdir={workdir}",
        "--config.train.num_epochs=115",
        "--config.train.evaluate_every_epochs=5",
        "--config.train.save_every_steps=20",
        env=processes.environment(num_devices=2),
    )
    assert code == 0, output
    found = {note["step"]: note for note in map(json.loads, notes.read_text().splitlines())}
    early, late = found[200], found[NUM_STEPS]
    assert late["bytes"] <= 1.02 * early["bytes"]
    assert late["compiled"] == early["compiled"]
    # The latest, the best, and one that goes while the next is written.
    assert max(note["saved"] for note in found.values()) <= 3
    left = sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())
    assert len(left) <= 2
    assert left[-1] == max(found) >= NUM_STEPS
