"""Evaluates a run's best checkpoint: python eval.py --workdir=runs/quickstart --split=test."""

from pathlib import Path

from absl import flags

from mmei_jax import command

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run that train.py made.", required=True)
SPLIT = flags.DEFINE_enum(
    "split", "test", ["train", "validation", "test"], "Which of the configuration's splits to evaluate."
)
DATA = flags.DEFINE_string("data", None, "Folder of the data set, if it is not where the run found it.")


def main() -> int:
    """Evaluates, prints the table."""
    # Imported here so that --help and a wrong flag answer at once.
    from mmei_jax import compilation_cache
    from mmei_jax.evaluation import evaluate_workdir

    compilation_cache.enable()
    print(evaluate_workdir(Path(WORKDIR.value), SPLIT.value, DATA.value))
    return 0


if __name__ == "__main__":
    command.run(main)
