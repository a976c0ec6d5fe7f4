"""Evaluates a run's best checkpoint: python eval.py --workdir=runs/quickstart --split=test."""

import shlex
import sys
from pathlib import Path

from absl import flags

from mmei_jax import command

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run that train.py made.", required=True)
SPLIT = flags.DEFINE_enum(
    "split", "test", ["train", "validation", "test"], "Which of the configuration's splits to evaluate."
)
DATA = flags.DEFINE_string("data", None, "Folder of the data set, if it is not where the run found it.")


def main() -> int:
    """Evaluates, prints the table, writes the report."""
    # Imported here so that --help and a wrong flag answer at once.
    from mmei_jax import compilation_cache
    from mmei_jax.evaluation import evaluate_workdir
    from mmei_jax.reports.report import write_report

    compilation_cache.enable()
    workdir = Path(WORKDIR.value)
    print(evaluate_workdir(workdir, SPLIT.value, DATA.value), flush=True)
    called_by = shlex.join(["python", "eval.py", *sys.argv[1:]])
    folder = write_report(workdir, SPLIT.value, DATA.value, command=called_by)
    print(f"report: {folder / 'report.html'}, {folder / 'report.md'}")
    return 0


if __name__ == "__main__":
    command.run(main)
