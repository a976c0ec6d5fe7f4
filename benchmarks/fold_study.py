"""MMEI on imported features, one token per modality: folds x seeds, beside a scikit-learn peer on the same inputs.

Folds never divide a group (actor, video). One fold is tested, the next one is for validation, the others are trained
on. The peer chooses its penalty on the validation fold, and is then trained on that fold too. A control has its labels
shuffled within each group: nothing may be learned from it. Differences of accuracy stand beside a t interval over the
folds.
"""

import argparse
import dataclasses
import datetime
import json
import math
import os
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import jax
import ml_collections
import numpy as np
from scipy import stats
from sklearn.base import BaseEstimator
from sklearn.dummy import DummyClassifier
from sklearn.metrics import accuracy_score, f1_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks import rounds
from mmei_jax.command import CommandParser, report_errors
from mmei_jax.config import Config, parse
from mmei_jax.evaluation import evaluate_workdir
from mmei_jax.extraction import import_features
from mmei_jax.records import Dataset
from mmei_jax.training import train
from mmei_jax.types import InputError
from mmei_jax.workdir import read_config, write_json

ALL_INPUTS = "all three"
SHUFFLED = "labels shuffled"
METRICS = ("accuracy", "macro_f1")


@dataclass(frozen=True)
class Study:
    """What is asked of one file of features.

    Attributes:
        name: of the benchmark.
        input_name: the file that is asked for.
        get_config: the configuration of a run; its splits and modalities are set here.
        label: the manifest's label that is learned.
        import_flags: of ``mmei_jax.extraction.import_features``, besides input, output and folds.
        num_folds: folds of whole groups.
        inputs: modalities by the name of a row; one is :data:`ALL_INPUTS`.
        comparisons: pairs of rows whose accuracies are compared, fold by fold and seed by seed.
        peer_name: the peer, in words.
        make_peers: makes the peer; where there are several candidates, each test fold has the one that is best on its
            validation fold. Inputs are standardised.
    """

    name: str
    input_name: str
    get_config: Callable[[], ml_collections.ConfigDict]
    label: str
    import_flags: tuple[str, ...]
    num_folds: int
    inputs: Mapping[str, tuple[str, ...]]
    comparisons: tuple[tuple[str, str], ...]
    peer_name: str
    make_peers: Callable[[], tuple[BaseEstimator, ...]]


@dataclass(frozen=True)
class Score:
    """Accuracy and macro-F1 on one test fold; the peer has no seed."""

    fold: int
    seed: int | None
    accuracy: float
    macro_f1: float


def run(study: Study, description: str | None) -> int:
    """The command of a study: runs every fold, seed and input; prints a table, and a JSON line at the end.

    Returns:
        The exit code; what was given wrong is told in one line.
    """
    options = _parse(study, description)
    return report_errors(lambda: _run(study, options))


def _run(study: Study, options: argparse.Namespace) -> int:
    workdir = Path(options.workdir)
    # Runs of one input set share their programs.
    jax.config.update("jax_compilation_cache_dir", str(workdir / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    plain = import_folds(study, options.input, workdir / "data", ())
    control = import_folds(
        study, options.input, workdir / "data_shuffled", ("--shuffle_labels_within=group", "--seed=0")
    )
    inputs = {ALL_INPUTS: study.inputs[ALL_INPUTS]} if options.quick else study.inputs
    folds = range(1 if options.quick else study.num_folds)
    seeds = range(0 if options.peer_only else 1 if options.quick else options.num_seeds)

    ours: dict[str, list[Score]] = {}
    peer: dict[str, list[Score]] = {}
    for line in _header(study, has_ours=not options.peer_only):
        print(line, flush=True)
    for name, modalities in {**inputs, SHUFFLED: study.inputs[ALL_INPUTS]}.items():
        data = control if name == SHUFFLED else plain
        runs = workdir / "runs" / name.replace(" ", "_")
        ours[name] = list(our_scores(study, data, modalities, folds, seeds, runs))
        peer[name] = [peer_score(study, data, modalities, fold) for fold in folds]
        print(f"| {name} | " + " | ".join(_cells(ours[name]) + _cells(peer[name])) + " |", flush=True)
    majority = [majority_score(study, plain, fold) for fold in folds]
    print(f"majority class: accuracy {_mean(majority, 'accuracy'):.3f}, macro-F1 {_mean(majority, 'macro_f1'):.3f}")
    paired = {} if options.peer_only else _comparisons(study, ours, peer, len(folds))
    for title, line in paired.items():
        print(f"{title}, paired: {line}")
    print(rounds.total_line())
    cases = [_case(study, name, ours[name], peer[name]) for name in ours]
    summary = {"benchmark": study.name, "cases": cases}
    if options.results:
        figures = {f"majority_{metric}": _mean(majority, metric) for metric in METRICS} | {"paired_accuracy": paired}
        write_json(Path(options.results), {**_context(study), **figures, **summary})
    print(json.dumps(summary))
    return 0


def _parse(study: Study, description: str | None) -> argparse.Namespace:
    parser = CommandParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, help=study.input_name)
    default = f"runs/{study.name}"
    parser.add_argument("--workdir", default=default, help="receives shards and runs (default: %(default)s)")
    parser.add_argument("--num_seeds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--reuse", action="store_true", help="keep finished runs of an earlier start of this command")
    parser.add_argument("--results", help="JSON file for the figures, date, versions and command")
    parser.add_argument("--quick", action="store_true", help="one fold, one seed, all three modalities only")
    parser.add_argument("--peer_only", action="store_true", help="only the peer's columns, over all folds: seconds")
    options = parser.parse_args()
    if options.peer_only and options.quick:
        parser.error("--peer_only --quick: expected one of them")
    if Path(options.workdir).exists() and not options.reuse:
        parser.error(f"--workdir={options.workdir}: exists; give --reuse to keep its finished runs, or another folder")
    return options


def import_folds(study: Study, source: str, output: Path, flags: tuple[str, ...]) -> Path:
    """Imports the features, split into folds, unless that was done; gives the data set's folder."""
    if not (output / "manifest.json").exists():
        arguments = [f"--input={source}", f"--output={output}", f"--num_folds={study.num_folds}"]
        if import_features.main([*arguments, *study.import_flags, *flags]):
            raise SystemExit(2)
    return output


def fold_splits(study: Study, fold: int) -> tuple[tuple[str, ...], str, str]:
    """Names of the training, validation and test splits."""
    validation = (fold + 1) % study.num_folds
    train_folds = tuple(f"fold{index}" for index in range(study.num_folds) if index not in (fold, validation))
    return train_folds, f"fold{validation}", f"fold{fold}"


def our_scores(
    study: Study, data: Path, modalities: tuple[str, ...], folds: range, seeds: range, workdir: Path
) -> Iterator[Score]:
    """Trains and tests MMEI, unless an earlier start did; fold by fold, and in each seed by seed.

    Raises:
        InputError: an earlier start had another configuration.
    """
    for fold in folds:
        for seed in seeds:
            print(f"{'+'.join(modalities)}, fold {fold}, seed {seed}", file=sys.stderr, flush=True)
            config = study.get_config()
            config.seed = seed
            config.data.path = str(data)
            config.data.modalities = modalities
            train_folds, validation, test = fold_splits(study, fold)
            config.data.train_splits = train_folds
            config.data.validation_splits, config.data.test_splits = (validation,), (test,)
            metrics = _test_metrics(parse(config.to_dict()), workdir / f"fold{fold}_seed{seed}")
            yield Score(fold, seed, metrics["emotion/accuracy"], metrics["emotion/macro_f1"])


def _test_metrics(config: Config, folder: Path) -> dict[str, float]:
    result = folder / "eval" / "test.json"
    if not result.exists():
        stopped_by = train(config, folder).stopped_by
        if stopped_by:
            raise SystemExit(f"{stopped_by}: {folder} is not finished; the same command with --reuse goes on")
        evaluate_workdir(folder, "test")
    elif read_config(folder) != config:
        raise InputError(f"{folder}: a run with another configuration; remove it, or name another --workdir")
    metrics: dict[str, float] = json.loads(result.read_text())["metrics"]
    return metrics


def peer_score(study: Study, data: Path, modalities: tuple[str, ...], fold: int) -> Score:
    """Of the peer on standardised inputs, trained on the validation fold too: one fold more than MMEI has.

    Candidates are compared before that, trained without the validation fold and scored on it (the first of equal ones
    is taken).
    """
    peers = [make_pipeline(StandardScaler(), peer) for peer in study.make_peers()]
    train_folds, validation, test = fold_splits(study, fold)
    best = peers[0]
    if len(peers) > 1:
        figures = [_fit_and_score(study, peer, data, modalities, train_folds, validation) for peer in peers]
        best = peers[int(np.argmax([accuracy for accuracy, _ in figures]))]
    return Score(fold, None, *_fit_and_score(study, best, data, modalities, (*train_folds, validation), test))


def majority_score(study: Study, data: Path, fold: int) -> Score:
    """Of the most frequent class of the same folds, whatever the inputs."""
    train_folds, validation, test = fold_splits(study, fold)
    model = DummyClassifier(strategy="most_frequent")
    figures = _fit_and_score(study, model, data, study.inputs[ALL_INPUTS], (*train_folds, validation), test)
    return Score(fold, None, *figures)


def _fit_and_score(
    study: Study,
    model: BaseEstimator,
    data: Path,
    modalities: tuple[str, ...],
    train_folds: tuple[str, ...],
    test: str,
) -> tuple[float, float]:
    """Accuracy and macro-F1."""
    model.fit(*_arrays(study, data, modalities, train_folds))
    inputs, labels = _arrays(study, data, modalities, (test,))
    predictions = model.predict(inputs)
    macro_f1 = f1_score(labels, predictions, average="macro", zero_division=0)
    return float(accuracy_score(labels, predictions)), float(macro_f1)


def _arrays(
    study: Study, data: Path, modalities: tuple[str, ...], splits: tuple[str, ...]
) -> tuple[np.ndarray, np.ndarray]:
    split = Dataset.open(data).split(*splits)
    everything = np.arange(split.num_records)
    features = [split.gather_tokens(name, everything, 1)[0][:, 0].astype(np.float32) for name in modalities]
    return np.concatenate(features, axis=1), split.gather_label(study.label, everything)[0]


def paired_difference(ours: list[Score], others: list[Score], num_folds: int) -> str:
    """Mean difference of accuracy, fold by fold, with a 95 % t interval over the folds; none from a single fold.

    Seeds of one fold share their test records, so that they are averaged first. Training sets of two folds share
    records, so that even this interval is rather too narrow than too wide. (A percentile bootstrap of five or six folds
    is narrower still.)

    Args:
        ours: of every fold, each with the same number of seeds, which follow one another.
        others: the same; its number of seeds may be another.
        num_folds: folds in both.
    """
    by_fold = [np.reshape([one.accuracy for one in scores], (num_folds, -1)).mean(axis=1) for scores in (ours, others)]
    differences = by_fold[0] - by_fold[1]
    mean = differences.mean()
    if num_folds < 2:
        return f"{mean:+.3f}, a single fold: no interval"
    half = stats.t.ppf(0.975, num_folds - 1) * differences.std(ddof=1) / math.sqrt(num_folds)
    return f"{mean:+.3f}, 95 % t interval over {num_folds} folds [{mean - half:+.3f}, {mean + half:+.3f}]"


def _comparisons(
    study: Study, ours: dict[str, list[Score]], peer: dict[str, list[Score]], num_folds: int
) -> dict[str, str]:
    """Our rows against one another as the study asks, and against the peer."""
    pairs = {
        f"MMEI: {one} - {other}": (ours[one], ours[other])
        for one, other in study.comparisons
        if one in ours and other in ours
    }
    pairs |= {f"{name}: MMEI - peer": (ours[name], peer[name]) for name in ours if name != SHUFFLED}
    return {title: paired_difference(*pair, num_folds) for title, pair in pairs.items()}


def _mean(scores: list[Score], name: str) -> float:
    return statistics.fmean(getattr(score, name) for score in scores)


def _deviation(scores: list[Score], name: str) -> float:
    return statistics.stdev(getattr(score, name) for score in scores) if len(scores) > 1 else 0.0


def _header(study: Study, *, has_ours: bool) -> tuple[str, str]:
    """The two lines above the rows of a Markdown table."""
    sides = (["MMEI"] if has_ours else []) + [study.peer_name.partition(",")[0]]
    titles = ["inputs", *(f"{side}: {metric.replace('_', '-')}" for side in sides for metric in METRICS)]
    return "| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)


def _cells(scores: list[Score]) -> list[str]:
    """Mean and standard deviation over folds and seeds, of each metric; none of no scores."""
    if not scores:
        return []
    return [f"{_mean(scores, metric):.3f} ± {_deviation(scores, metric):.3f}" for metric in METRICS]


def _case(study: Study, name: str, ours: list[Score], peer: list[Score]) -> dict[str, object]:
    """One entry of the summary: means, deviations, and each fold's and seed's scores."""
    found: dict[str, object] = {
        "case": name,
        "peer": f"{study.peer_name}, trained on the validation fold too",
        "ratio": _mean(ours, "accuracy") / _mean(peer, "accuracy") if ours else None,
        "goal": None,
    }
    for prefix, scores in (("", ours), ("peer_", peer)):
        for metric in METRICS if scores else ():
            found[prefix + metric] = _mean(scores, metric)
            found[f"{prefix}{metric}_deviation"] = _deviation(scores, metric)
        found[f"{prefix}scores"] = [dataclasses.asdict(score) for score in scores]
    return found


def _context(study: Study) -> dict[str, object]:
    names = ("jax", "flax", "numpy", "scikit-learn")
    return {
        "date": datetime.date.today().isoformat(),
        "command": f"python -m benchmarks.{study.name} " + shlex.join(sys.argv[1:]),
        "versions": {name: metadata.version(name) for name in names},
        "machine": f"{os.cpu_count()} CPU cores",
    }
