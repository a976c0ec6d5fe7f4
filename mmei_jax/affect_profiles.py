"""Long-term affect: what a trained run read in a user's earlier records, averaged, for the user side of Eq. 7.

Command, for instance::

    python -m mmei_jax.affect_profiles --workdir=runs/first --output=runs/profiles.parquet
    python train.py --config=... --config.data.affect_profiles=runs/profiles.parquet --workdir=runs/second

A record's profile is the mean of the emotion and intent probabilities of the same user's records before it, in the
order of its split; splits are sessions of their own, so that none tells about another. A record without an earlier one,
or without a named user, has no profile. Beside it the file has what was read in the record itself: a new clip of a user
comes after all of their records, and :mod:`mmei_jax.predict` takes the mean of them all, each counted once, whatever
their splits. Labels are not read; that the first run knows its training records better than others stays in their
profiles.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Float

from mmei_jax import compilation_cache
from mmei_jax.command import CommandParser, report_errors
from mmei_jax.evaluation import Evaluator, open_best_run
from mmei_jax.types import InputError
from mmei_jax.user_context import PROFILE_COLUMNS


def write_profiles(workdir: Path, output: Path, data_path: str | None = None) -> str:
    """Writes the profiles of every record of a run's splits, and says what they are.

    Args:
        workdir: of the run.
        output: Parquet file to write.
        data_path: folder of the data set, where it moved since training.

    Raises:
        InputError: the run cannot be used.
    """
    run = open_best_run(workdir, data_path)
    evaluator = Evaluator(run.model, run.config, run.dataset, run.mesh)
    data, tables, lines = run.config.data, [], []
    for name in (*data.train_splits, *data.validation_splits, *data.test_splits):
        split = run.dataset.split(name)
        parts = [
            np.concatenate(
                [np.asarray(part.emotion, np.float64).reshape(len(part.record_index), -1)]
                + ([] if part.intent is None else [np.asarray(part.intent, np.float64)]),
                axis=1,
            )[part.record_index >= 0]
            for part in evaluator.predict(run.variables, (name,))
        ]
        affect = np.concatenate(parts)
        users = [None if user is None else str(user) for user in split.column("user_id")]
        profile, has_profile = running_means(affect, users)
        lists = [
            pa.FixedSizeListArray.from_arrays(
                pa.array(values.reshape(-1).astype(np.float32)), values.shape[1], mask=pa.array(is_null)
            )
            for values, is_null in ((profile, ~has_profile), (affect, np.zeros(len(affect), bool)))
        ]
        ids = split.column("id")
        columns = [pa.array([name] * len(ids)), pa.array(ids), *lists]
        tables.append(pa.Table.from_arrays(columns, names=list(PROFILE_COLUMNS)))
        lines.append(f"{name}: {len(ids):,} records, {int(has_profile.sum()):,} with an earlier one of their user")
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f"{output.name}.partial")
    pq.write_table(pa.concat_tables(tables), partial)
    partial.replace(output)
    return "\n".join([*lines, f"written: {output}"])


def running_means(
    affect: Float[np.ndarray, "records affect"], users: Sequence[str | None]
) -> tuple[Float[np.ndarray, "records affect"], Bool[np.ndarray, "records"]]:
    """The mean over each user's records before every record.

    Args:
        affect: ``[records, affect]`` in the order of the records.
        users: one for each; None where unknown.

    Returns:
        ``[records, affect]``, 0 where there is none, and ``[records]`` whether there is one.

    Raises:
        InputError: there is not one user for each record.
    """
    if len(affect) != len(users):
        raise InputError(f"{len(affect)} records and {len(users)} users: expected one for each")
    sums: dict[str, np.ndarray] = {}
    counts: dict[str, int] = {}
    means, has_mean = np.zeros(affect.shape), np.zeros(len(users), bool)
    for row, user in enumerate(users):
        if user is None:
            continue
        if user in counts:
            means[row], has_mean[row] = sums[user] / counts[user], True
        sums[user] = sums.get(user, 0.0) + affect[row]
        counts[user] = counts.get(user, 0) + 1
    return means, has_mean


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the profiles; gives the exit status: 0, or 2 after one line on what is wrong."""
    parser = CommandParser(
        prog="python -m mmei_jax.affect_profiles",
        description="What a run read in each user's earlier records, as a file for config.data.affect_profiles.",
    )
    parser.add_argument("--workdir", type=Path, required=True, help="folder of a run that train.py made")
    parser.add_argument("--output", type=Path, required=True, help="Parquet file to write")
    parser.add_argument("--data", help="folder of the data set, if it is not where the run found it")
    given = parser.parse_args(arguments)

    def run() -> int:
        compilation_cache.enable()
        print(write_profiles(given.workdir, given.output, given.data))
        return 0

    return report_errors(run)


if __name__ == "__main__":
    sys.exit(main())
