"""Profiles the training of a configuration on the devices that are there.

For instance::

    python -m mmei_jax.profiling --config=configs/quickstart.py --steps=50 --output=runs/profile
"""

import shlex
import sys
from pathlib import Path
from typing import Any

from mmei_jax.config import Config
from mmei_jax.out_of_memory import explained
from mmei_jax.profiling.measurement import measure
from mmei_jax.profiling.profile import make_profile
from mmei_jax.profiling.report import TRACE_NAME, known_files, summary_lines, write_profile
from mmei_jax.training_parts import prepare
from mmei_jax.types import InputError
from mmei_jax.workdir import locked

# Updates that are traced: enough to average, few enough for a trace that opens.
MAX_TRACED_STEPS = 5


def profile_training(config: Config, output: Path, *, num_steps: int, command: str | None = None) -> list[str]:
    """Measures a training's updates and writes what was found; gives the main figures in words.

    Args:
        config: of the run.
        output: folder of the report; what an earlier one wrote is replaced, traces are kept.
        num_steps: updates that are timed.
        command: the command line; None when Python code measures.

    Raises:
        InputError: configuration, data and devices do not fit.
        OutOfMemoryError: a device's memory is too small; with what needs how much.
    """
    if num_steps < 1:
        raise InputError(f"--steps={num_steps}: expected at least 1")
    with locked(output, "--output"), explained(config):
        parts = prepare(config)
        measurement = measure(
            parts,
            num_steps=num_steps,
            num_traced_steps=min(num_steps, MAX_TRACED_STEPS),
            trace_folder=output / TRACE_NAME,
        )
        profile = make_profile(measurement, parts.mesh.size)
        write_profile(profile, output, command=command, config=config.to_json())
    return summary_lines(profile)


def main() -> None:
    """The command."""
    from absl import flags
    from ml_collections import config_flags

    from mmei_jax import command
    from mmei_jax.config import parse
    from mmei_jax.host_memory import keep_freed_memory
    from mmei_jax.table_config import is_table

    given: dict[str, Any] = {}

    def define() -> None:
        given["config"] = config_flags.DEFINE_config_file(
            "config", None, "Configuration of a training; --config.group.key=value changes a key."
        )
        given["steps"] = flags.DEFINE_integer("steps", 20, "Updates that are timed.")
        given["output"] = flags.DEFINE_string("output", "runs/profile", "Folder for the report and the trace.")
        flags.mark_flag_as_required("config")

    def run() -> int:
        keep_freed_memory()
        values, output = given["config"].value.to_dict(), Path(given["output"].value)
        if is_table(values):
            raise InputError("--config: a table of many runs: expected the configuration of one, such as its base")
        started_by = shlex.join(["python", "-m", "mmei_jax.profiling", *sys.argv[1:]])
        for line in profile_training(parse(values), output, num_steps=given["steps"].value, command=started_by):
            print(line)
        print("written: " + ", ".join(str(path) for path in known_files(output)))
        return 0

    command.run(run, define=define)


if __name__ == "__main__":
    main()
