r"""Profiles the training of a configuration on the devices that are there, or predicts it for TPUs that are not.

For instance::

    python -m mmei_jax.profiling --config=configs/quickstart.py --steps=50 --output=runs/profile

    python -m mmei_jax.profiling --config=configs/end_to_end.py --topology=v5e:4x4,v5e:16x16 --per_chip_batch=8 \
        --output=runs/topologies
"""

import shlex
import sys
from pathlib import Path
from typing import Any

import jax

from mmei_jax.config import Config
from mmei_jax.out_of_memory import explained
from mmei_jax.profiling.measurement import measure
from mmei_jax.profiling.profile import make_profile
from mmei_jax.profiling.report import TRACE_NAME, known_files, summary_lines, write_profile
from mmei_jax.profiling.topology import PREDICTIONS_NAME, REPORT_NAME, predict_topologies
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
        given["output"] = flags.DEFINE_string("output", "runs/profile", "Folder for the report, and the trace.")
        given["topology"] = flags.DEFINE_list(
            "topology",
            [],
            "TPU topologies to compile for, ahead of time, in place of measuring: such as v5e:16x16 or v4-32.",
        )
        given["meshes"] = flags.DEFINE_string(
            "meshes", None, "With --topology: meshes to compile for, data x fsdp x tensor, such as 16x16x1,256x1x1."
        )
        given["per_chip_batch"] = flags.DEFINE_integer(
            "per_chip_batch",
            None,
            "With --topology: records of an update for each chip; else config.data.batch_size over all.",
        )
        flags.mark_flag_as_required("config")

    def predict(config: Config, output: Path, started_by: str) -> int:
        # Nothing runs: devices of this machine are left alone.
        jax.config.update("jax_platforms", "cpu")
        if given["steps"].present:
            raise InputError(f"--steps={given['steps'].value}: expected none with --topology, for which nothing runs")
        predict_topologies(
            config,
            given["topology"].value,
            meshes=given["meshes"].value,
            records_per_chip=given["per_chip_batch"].value,
            output=output,
            command=started_by,
            report=lambda line: print(line, flush=True),
        )
        print(f"written: {output / REPORT_NAME}, {output / PREDICTIONS_NAME}")
        return 0

    def run() -> int:
        keep_freed_memory()
        values, output = given["config"].value.to_dict(), Path(given["output"].value)
        if is_table(values):
            raise InputError("--config: a table of many runs: expected the configuration of one, such as its base")
        started_by = shlex.join(["python", "-m", "mmei_jax.profiling", *sys.argv[1:]])
        if given["topology"].value:
            return predict(parse(values), output, started_by)
        for name in ("meshes", "per_chip_batch"):
            if given[name].value is not None:
                raise InputError(f"--{name}={given[name].value}: expected --topology too, which it is for")
        for line in profile_training(parse(values), output, num_steps=given["steps"].value, command=started_by):
            print(line)
        print("written: " + ", ".join(str(path) for path in known_files(output)))
        return 0

    command.run(run, define=define)


if __name__ == "__main__":
    main()
