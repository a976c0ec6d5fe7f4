"""Evaluates a run's best checkpoint: python eval.py --workdir=runs/quickstart --split=test."""

import shlex
import sys
from pathlib import Path

from absl import flags

from mmei_jax import command

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run or of a table that train.py made.", required=True)
SPLIT = flags.DEFINE_enum("split", "test", ["train", "validation", "test"], "Which of the configuration's splits.")
DATA = flags.DEFINE_string("data", None, "Folder of the data set, if it is not where the run found it.")
FEEDBACK = flags.DEFINE_string("feedback", None, "For a table: folder of a feedback loop, for the ledger of claims.")
UNSEEN = flags.DEFINE_multi_string("unseen", [], "For a table: one of data split by user or content kind, likewise.")


def main() -> int:
    """Evaluates, prints the table, writes the report."""
    # Imported here so that --help and a wrong flag answer at once.
    from mmei_jax import compilation_cache
    from mmei_jax.evaluation import evaluate_workdir, is_pretraining
    from mmei_jax.reports.report import write_report
    from mmei_jax.table_training import is_table_workdir
    from mmei_jax.types import InputError
    from mmei_jax.workdir import read_config

    compilation_cache.enable()
    workdir = Path(WORKDIR.value)
    called_by = shlex.join(["python", "eval.py", *sys.argv[1:]])
    if is_table_workdir(workdir):
        return _evaluate_table(workdir, called_by)
    if FEEDBACK.value is not None or UNSEEN.value:
        raise InputError(f"{workdir}: --feedback and --unseen are for a table (configs/table1_small.py trains one)")
    print(evaluate_workdir(workdir, SPLIT.value, DATA.value), flush=True)
    if not is_pretraining(read_config(workdir)):
        folder = write_report(workdir, SPLIT.value, DATA.value, command=called_by)
        print(f"report: {folder / 'report.html'}, {folder / 'report.md'}")
    return 0


def _evaluate_table(workdir: Path, called_by: str) -> int:
    """Every row and seed of a table, and the report on them."""
    from mmei_jax.host_devices import one_device_per_core
    from mmei_jax.reports.further_claims import read_further_claims
    from mmei_jax.reports.table_report import write_table_report
    from mmei_jax.table_evaluation import evaluate_table
    from mmei_jax.types import InputError

    if SPLIT.value == "train" or DATA.value is not None:
        raise InputError("--split=train and --data are for the folder of a single run; a table has neither")
    further = read_further_claims(FEEDBACK.value, UNSEEN.value)
    one_device_per_core()
    print(f"written: {evaluate_table(workdir, SPLIT.value)}", flush=True)
    print(f"report: {write_table_report(workdir, SPLIT.value, command=called_by, further=further)}")
    return 0


if __name__ == "__main__":
    command.run(main)
