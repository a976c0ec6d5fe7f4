"""Trains MMEI: python train.py --config=configs/quickstart.py --workdir=runs/quickstart [--config.seed=1 ...]."""

import shlex
import sys
from pathlib import Path
from typing import Any

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


def main() -> int:
    """Trains, and says how to go on."""
    # Imported here so that --help and a wrong flag answer at once.
    from mmei_jax import compilation_cache
    from mmei_jax.config import parse
    from mmei_jax.host_memory import keep_freed_memory
    from mmei_jax.table_config import is_table
    from mmei_jax.training import train

    compilation_cache.enable()
    keep_freed_memory()
    started_by = shlex.join(["python", "train.py", *sys.argv[1:]])
    values = CONFIG.value.to_dict()
    if is_table(values):
        return _train_table(values, started_by)
    result = train(parse(values), Path(WORKDIR.value), command=started_by)
    if result.stopped_by:
        print(f"stopped by {result.stopped_by} at step {result.step}, saved; the same command goes on from there")
        return command.EXIT_TERMINATED
    print(f"trained to step {result.step}; best checkpoint: step {result.best_step}; written: {WORKDIR.value}")
    print(f"next: python eval.py --workdir={WORKDIR.value} --split=test")
    return 0


def _train_table(values: dict[str, Any], started_by: str) -> int:
    """All rows of a table, each as replicas that train together."""
    from mmei_jax.host_devices import one_device_per_core
    from mmei_jax.table_config import parse_table
    from mmei_jax.table_training import train_table

    table = parse_table(values)
    one_device_per_core()
    result = train_table(table, values, Path(WORKDIR.value), command=started_by)
    if result.stopped_by:
        print(f"stopped by {result.stopped_by}, saved; the same command goes on from there")
        return command.EXIT_TERMINATED
    print(f"trained: {', '.join(result.finished)}; written: {WORKDIR.value}")
    print(f"next: python eval.py --workdir={WORKDIR.value}")
    return 0


if __name__ == "__main__":
    command.run(main)
