"""How well does MMEI read emotion from RAVDESS, by actor, beside logistic regression on the same inputs?

    python -m benchmarks.ravdess --input=PATH/actors_01_18.npz --workdir=runs/ravdess [--quick]

Six actor folds: one tested, the next one for validation, four trained on (the regression has the validation fold too).
Text is one of two fixed sentences and carries no emotion: it must not help. A control has its labels shuffled within
each actor: nothing may be learned from it.
"""

import argparse
import datetime
import json
import os
import shlex
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import jax
import numpy as np
from sklearn.base import BaseEstimator
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from configs import ravdess
from mmei_jax.config import parse
from mmei_jax.evaluation import evaluate_workdir
from mmei_jax.extraction import import_features
from mmei_jax.records import Dataset
from mmei_jax.training import train
from mmei_jax.workdir import write_json

NUM_FOLDS = 6
INPUTS = {
    "text": ("text",),
    "audio": ("audio",),
    "vision": ("vision",),
    "audio + vision": ("vision", "audio"),
    "all three": ("vision", "audio", "text"),
}
CLASS_NAMES = "neutral,calm,happy,sad,angry,fearful,disgust,surprised"


@dataclass(frozen=True)
class Score:
    """Accuracy and macro-F1 on one test fold."""

    accuracy: float
    macro_f1: float


def main() -> None:
    """Runs every fold, seed and input; prints a table, and a JSON line at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, help="actors_01_18.npz")
    parser.add_argument("--workdir", default="runs/ravdess", help="receives shards and runs (default: %(default)s)")
    parser.add_argument("--num_seeds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--reuse", action="store_true", help="keep finished runs of an earlier start of this command")
    parser.add_argument("--results", help="JSON file for the figures, date, versions and command")
    parser.add_argument("--quick", action="store_true", help="one fold, one seed, all three modalities only")
    options = parser.parse_args()
    workdir = Path(options.workdir)
    if workdir.exists() and not options.reuse:
        parser.error(f"--workdir={workdir}: exists; give --reuse to keep its finished runs, or another folder")
    # Runs of one input set share their programs.
    jax.config.update("jax_compilation_cache_dir", str(workdir / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    plain = _import(options.input, workdir / "data", ())
    control = _import(options.input, workdir / "data_shuffled", ("--shuffle_labels_within=user", "--seed=0"))
    inputs = {"all three": INPUTS["all three"]} if options.quick else INPUTS
    folds = range(1 if options.quick else NUM_FOLDS)
    seeds = range(1 if options.quick else options.num_seeds)

    rows: list[tuple[str, list[Score], list[Score]]] = []
    for name, modalities in inputs.items():
        ours = list(_our_scores(plain, modalities, folds, seeds, workdir / "runs" / name.replace(" ", "_")))
        peer = [_logistic_regression(plain, modalities, fold) for fold in folds]
        rows.append((name, ours, peer))
        _print_row(*rows[-1])
    shuffled = list(_our_scores(control, INPUTS["all three"], folds, seeds, workdir / "runs" / "shuffled"))
    rows.append(("labels shuffled", shuffled, [_logistic_regression(control, INPUTS["all three"], f) for f in folds]))
    _print_row(*rows[-1])
    majority = [_majority(plain, fold) for fold in folds]
    print(f"majority class: accuracy {_mean(majority, 'accuracy'):.3f}, macro-F1 {_mean(majority, 'macro_f1'):.3f}")
    ours_by_name = {name: ours for name, ours, _ in rows}
    if "audio + vision" in ours_by_name:
        print(
            f"all three - audio + vision, paired: {_paired(ours_by_name['all three'], ours_by_name['audio + vision'])}"
        )
    summary = {"benchmark": "ravdess", "cases": [_case(*row) for row in rows]}
    if options.results:
        names = ("jax", "flax", "numpy", "scikit-learn")
        context = {
            "date": datetime.date.today().isoformat(),
            "command": "python -m benchmarks.ravdess " + shlex.join(sys.argv[1:]),
            "versions": {name: metadata.version(name) for name in names},
            "machine": f"{os.cpu_count()} CPU cores",
        }
        write_json(Path(options.results), {**context, **summary})
    print(json.dumps(summary))


def _paired(ours: list[Score], others: list[Score]) -> str:
    """Mean difference of accuracy over the same folds and seeds, with a 95 % bootstrap interval over those."""
    differences = np.array([one.accuracy - other.accuracy for one, other in zip(ours, others, strict=True)])
    draws = np.random.default_rng(0).choice(differences, size=(10_000, len(differences))).mean(axis=1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return f"{differences.mean():+.3f}, 95 % interval [{low:+.3f}, {high:+.3f}]"


def _import(source: str, output: Path, flags: tuple[str, ...]) -> Path:
    if not (output / "manifest.json").exists():
        arguments = [
            f"--input={source}",
            f"--output={output}",
            "--id_key=clip_id",
            "--user_key=actor",
            "--group_key=actor",
            f"--num_folds={NUM_FOLDS}",
            "--labels=emotion",
            f"--class_names={CLASS_NAMES}",
            "--source=RAVDESS speech, actors 1-18",
            "--licence=CC BY-NC-SA 4.0",
            *flags,
        ]
        if import_features.main(arguments):
            raise SystemExit(2)
    return output


def _folds(fold: int) -> tuple[tuple[str, ...], str, str]:
    """Names of the training, validation and test splits."""
    validation = (fold + 1) % NUM_FOLDS
    train_folds = tuple(f"fold{index}" for index in range(NUM_FOLDS) if index not in (fold, validation))
    return train_folds, f"fold{validation}", f"fold{fold}"


def _our_scores(data: Path, modalities: tuple[str, ...], folds: range, seeds: range, workdir: Path) -> Iterator[Score]:
    for fold in folds:
        for seed in seeds:
            config = ravdess.get_config()
            config.seed = seed
            config.data.path = str(data)
            config.data.modalities = modalities
            train_folds, validation, test = _folds(fold)
            config.data.train_splits = train_folds
            config.data.validation_splits, config.data.test_splits = (validation,), (test,)
            folder = workdir / f"fold{fold}_seed{seed}"
            train(parse(config.to_dict()), folder)
            evaluate_workdir(folder, "test")
            metrics = json.loads((folder / "eval" / "test.json").read_text())["metrics"]
            yield Score(metrics["emotion/accuracy"], metrics["emotion/macro_f1"])


def _arrays(data: Path, modalities: tuple[str, ...], splits: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    split = Dataset.open(data).split(*splits)
    everything = np.arange(split.num_records)
    features = [split.gather_tokens(name, everything, 1)[0][:, 0].astype(np.float32) for name in modalities]
    return np.concatenate(features, axis=1), split.gather_label("emotion", everything)[0]


def _fit_and_score(model: BaseEstimator, data: Path, modalities: tuple[str, ...], fold: int) -> Score:
    train_folds, validation, test = _folds(fold)
    model.fit(*_arrays(data, modalities, (*train_folds, validation)))
    inputs, labels = _arrays(data, modalities, (test,))
    predictions = model.predict(inputs)
    return Score(accuracy_score(labels, predictions), f1_score(labels, predictions, average="macro", zero_division=0))


def _logistic_regression(data: Path, modalities: tuple[str, ...], fold: int) -> Score:
    """Multinomial logistic regression on standardised inputs, scikit-learn's C = 1.

    It has no use for validation, so it is trained on that fold too: five folds, where MMEI has four.
    """
    return _fit_and_score(make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)), data, modalities, fold)


def _majority(data: Path, fold: int) -> Score:
    return _fit_and_score(DummyClassifier(strategy="most_frequent"), data, ("text",), fold)


def _mean(scores: list[Score], name: str) -> float:
    return statistics.fmean(getattr(score, name) for score in scores)


def _deviation(scores: list[Score], name: str) -> float:
    return statistics.stdev(getattr(score, name) for score in scores) if len(scores) > 1 else 0.0


def _print_row(name: str, ours: list[Score], peer: list[Score]) -> None:
    cells = [
        f"{_mean(scores, metric):.3f} ± {_deviation(scores, metric):.3f}"
        for scores in (ours, peer)
        for metric in ("accuracy", "macro_f1")
    ]
    print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def _case(name: str, ours: list[Score], peer: list[Score]) -> dict[str, object]:
    accuracy, reference = _mean(ours, "accuracy"), _mean(peer, "accuracy")
    return {
        "case": name,
        "peer": "multinomial logistic regression, scikit-learn, standardised, C=1, trained on the validation fold too",
        "ratio": accuracy / reference,
        "goal": None,
        "accuracy": accuracy,
        "macro_f1": _mean(ours, "macro_f1"),
        "peer_accuracy": reference,
        "peer_macro_f1": _mean(peer, "macro_f1"),
    }


if __name__ == "__main__":
    main()
