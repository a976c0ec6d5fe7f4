"""Trains MMEI: python train.py --config=configs/quickstart.py --workdir=runs/quickstart [--config.seed=1 ...]."""

import shlex
import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from mmei_jax import command

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Configuration file; --config.group.key=value changes a key (configs/default.py explains them all)."
)
WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Folder for checkpoints, metrics and evaluations. The same command goes on where a run stopped.",
    required=True,
)
flags.mark_flag_as_required("config")
PROCESSES = command.define_process_flags()


def main() -> int:
    """Trains, and says how to go on."""
    # Imported here so that --help and a wrong flag answer at once.
    from mmei_jax import compilation_cache, processes
    from mmei_jax.config import parse
    from mmei_jax.host_devices import one_device_per_core
    from mmei_jax.host_memory import keep_freed_memory
    from mmei_jax.table_config import is_table, parse_table
    from mmei_jax.table_training import train_table
    from mmei_jax.training import train

    processes.join(**PROCESSES())
    compilation_cache.enable()
    keep_freed_memory()
    values, workdir = CONFIG.value.to_dict(), Path(WORKDIR.value)
    started_by = shlex.join(["python", "train.py", *sys.argv[1:]])
    if is_table(values):
        one_device_per_core()
        table = train_table(parse_table(values), values, workdir, command=started_by)
        stopped_by, done = table.stopped_by, f"trained the rows {', '.join(table.finished)}"
    else:
        run = train(parse(values), workdir, command=started_by)
        stopped_by = f"{run.stopped_by} at step {run.step}" if run.stopped_by else ""
        done = f"trained to step {run.step}; best checkpoint: step {run.best_step}"
    if stopped_by:
        print(f"stopped by {stopped_by}, saved; the same command goes on from there")
        return command.EXIT_TERMINATED
    print(f"{done}; written: {workdir}")
    print(f"next: python eval.py --workdir={workdir} --split=test")
    return 0


if __name__ == "__main__":
    command.run(main)
