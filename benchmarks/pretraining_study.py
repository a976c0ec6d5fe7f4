"""Does pretraining without labels help where labels are few, on simulated records?

    python -m benchmarks.pretraining_study [--workdir=runs/pretraining_study] [--results=FILE] [--quick]

Records of AIGC-INT-Sim (simulated); one validation and one test split. For each seed MMEI is pretrained on all training
records without their labels (configs/pretrain.py), and then compared with the same model without pretraining:

* linear probe: logistic regressions (scikit-learn) read the frozen model's pooled modality vectors, trained on the
  labels of all training records, their penalty chosen on validation; beside them those of the same model as it was
  initialised, and of the mean input tokens.
* fine-tuning with 1 % and with 10 % of the training labels, other records for each seed; both sides with the same
  records, updates, learning rate and choice of the checkpoint on the validation split, whose labels both see.

Intervals are those of a paired bootstrap: seeds and test records are drawn with replacement, the same for both sides.
A start of the same command keeps the runs that an earlier one finished.
"""

import argparse
import dataclasses
import datetime
import json
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
import pyarrow.parquet as pq
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks import rounds
from benchmarks.learning_curve import INVERSE_PENALTIES, pooled_features
from configs import pretrain, quickstart, table1_small
from mmei_jax import input_pipeline
from mmei_jax.command import CommandParser, report_errors
from mmei_jax.config import Config, parse
from mmei_jax.evaluation import BestRun, evaluate_workdir, open_best_run
from mmei_jax.records import Dataset
from mmei_jax.sharding import batch_sharding
from mmei_jax.simulation import aigc_int_dataset
from mmei_jax.state import Variables, initialize
from mmei_jax.training import train
from mmei_jax.types import InputError
from mmei_jax.workdir import read_config, write_json

TASKS = ("emotion", "intent")
METRICS = ("accuracy", "macro_f1")
PRETRAINED, SCRATCH = "pretrained", "not pretrained"
PROBE = "linear probe"
MEAN_TOKENS = "linear probe of mean input tokens"
DATA_SEED, DATA_DIM = 1, 32
LEVEL, NUM_RESAMPLES = 0.95, 2_000

# Predicted classes of the test records: ``[seeds, tasks, records]`` by side.
Sides = dict[str, np.ndarray]


@dataclass(frozen=True)
class Study:
    """Sizes, and how long is trained.

    Attributes:
        num_seeds: each with its own pretraining and labelled records.
        num_train: records that are pretrained on.
        num_validation: labelled records that choose checkpoints and penalties.
        num_test: labelled records that are tested.
        pretraining_epochs: passes over the training records without labels.
        epochs: of fine-tuning, by the share of the training labels, which rises.
        batch_size: of fine-tuning; at most the records of the smallest share.
    """

    num_seeds: int
    num_train: int
    num_validation: int
    num_test: int
    pretraining_epochs: int
    epochs: Mapping[float, int]
    batch_size: int

    def num_labelled(self, share: float) -> int:
        """Records whose labels are read at a share."""
        return round(share * self.num_train)

    def split_sizes(self) -> dict[str, int]:
        """Splits of the data set: test, validation, the parts by which each seed's labels grow, and the rest."""
        sizes = [self.num_labelled(share) for share in self.epochs]
        growth = [size - before for size, before in zip(sizes, [0, *sizes], strict=False)]
        parts = {
            _part(seed, share): size
            for seed in range(self.num_seeds)
            for share, size in zip(self.epochs, growth, strict=True)
        }
        fixed = {"test": self.num_test, "validation": self.num_validation}
        return fixed | parts | {"rest": self.num_train - sum(parts.values())}

    def labelled_splits(self, seed: int, share: float) -> tuple[str, ...]:
        """Splits that are fine-tuned on."""
        return tuple(_part(seed, each) for each in self.epochs if each <= share)

    def train_splits(self) -> tuple[str, ...]:
        """All training splits."""
        return tuple(self.split_sizes())[2:]

    def pretraining_config(self, data: Path, seed: int) -> Config:
        """Of a seed's pretraining."""
        config = pretrain.get_config()
        config.data.batch_size = min(config.data.batch_size, self.num_train // 2)
        self._resize(config, data, seed, self.train_splits(), self.pretraining_epochs)
        return parse(config.to_dict())

    def tuning_config(self, data: Path, seed: int, share: float, initial: Path | None) -> Config:
        """Of a seed's fine-tuning with a share of the labels.

        Args:
            data: folder of the records.
            seed: of the run.
            share: of the training labels.
            initial: folder of the pretraining that it begins with; None begins with random parameters.
        """
        config = quickstart.get_config()
        config.data.batch_size = self.batch_size
        self._resize(config, data, seed, self.labelled_splits(seed, share), self.epochs[share])
        config.loss.ranking = "none"
        config.train.initial_workdir = "" if initial is None else str(initial)
        return parse(config.to_dict())

    def _resize(
        self, config: ml_collections.ConfigDict, data: Path, seed: int, splits: tuple[str, ...], num_epochs: int
    ) -> None:
        config.seed = seed
        config.data.path = str(data)
        config.data.train_splits = splits
        # Sizes of table1_small: half of the time, most of it on tokens rather than padding.
        small = table1_small.get_config()
        for key in ("max_tokens", "packing"):
            config.data[key] = small.data[key]
        config.data.packing.num_rows = (-(-config.data.batch_size * 2 // 5),)
        for key in ("num_heads", "feedforward_dim"):
            config.model[key] = small.model[key]
        config.train.num_epochs = num_epochs
        config.train.evaluate_every_epochs = max(1, num_epochs // 10)


FULL = Study(
    num_seeds=5,
    num_train=3_500,
    num_validation=500,
    num_test=1_000,
    pretraining_epochs=15,
    epochs={0.01: 150, 0.1: 40},
    batch_size=32,
)
QUICK = Study(
    num_seeds=1,
    num_train=300,
    num_validation=60,
    num_test=100,
    pretraining_epochs=1,
    epochs={0.1: 2},
    batch_size=16,
)


def _part(seed: int, share: float) -> str:
    return f"seed{seed}_{100 * share:g}"


def main() -> int:
    """Makes the data, runs every seed, prints a table, and a JSON line at the end; returns the exit code."""
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", default="runs/pretraining_study", help="data and runs (default: %(default)s)")
    parser.add_argument("--results", help="JSON file for the figures, date, versions and command")
    parser.add_argument("--quick", action="store_true", help="one seed of a few updates, in WORKDIR/quick")
    options = parser.parse_args()
    return report_errors(lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    study = QUICK if options.quick else FULL
    workdir = Path(options.workdir) / ("quick" if options.quick else "")
    # Runs share their programs.
    jax.config.update("jax_compilation_cache_dir", str(workdir / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    data = make_data(study, workdir / "data")
    parts: dict[str, dict[str, list[np.ndarray]]] = {}
    for seed in range(study.num_seeds):
        for question, sides in seed_predictions(study, data, seed, workdir / "runs" / f"seed{seed}").items():
            for side, predictions in sides.items():
                parts.setdefault(question, {}).setdefault(side, []).append(predictions)
        print(f"seed {seed} done; {rounds.total_line()}", file=sys.stderr, flush=True)
    questions = {name: {side: np.stack(each) for side, each in sides.items()} for name, sides in parts.items()}
    labels = _labels(data, ("test",))
    found = [case for question, sides in questions.items() for case in compare(question, sides, labels)]
    tokens = mean_token_scores(study, data, labels)
    for line in table(found, tokens):
        print(line)
    print(rounds.total_line())
    summary = {"benchmark": "pretraining_study", "cases": found}
    if options.results:
        write_json(Path(options.results), {**_context(study), "mean_tokens": tokens, **summary})
    print(json.dumps(summary))
    return 0


def make_data(study: Study, path: Path) -> Path:
    """Generates the simulated records, unless they are there; gives their folder.

    Raises:
        InputError: there are others.
    """
    if not (path / "manifest.json").exists():
        sizes = ",".join(f"{name}={size}" for name, size in study.split_sizes().items())
        if aigc_int_dataset.main(
            [f"--output={path}", f"--dim={DATA_DIM}", f"--seed={DATA_SEED}", f"--split_sizes={sizes}"]
        ):
            raise SystemExit(2)
    found = {name: entry["num_records"] for name, entry in Dataset.open(path).manifest["splits"].items()}
    if found != study.split_sizes():
        raise InputError(f"{path}: has other splits than this benchmark makes; remove it, or name another --workdir")
    return path


def seed_predictions(study: Study, data: Path, seed: int, folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """What a seed's models say of the test records: by question and side, ``[tasks, records]`` classes."""
    pretrained = folder / "pretrained"
    _train(study.pretraining_config(data, seed), pretrained)
    found = {PROBE: _probe_predictions(study, data, seed, pretrained, folder / "probe.npz")}
    for share in study.epochs:
        sides = {}
        for side, initial in ((PRETRAINED, pretrained), (SCRATCH, None)):
            config = study.tuning_config(data, seed, share, initial)
            run = folder / f"{100 * share:g}_{side.replace(' ', '_')}"
            _train(config, run)
            choices = pq.read_table(run / "eval" / "test_predictions.parquet")
            sides[side] = np.stack([choices[f"{task}_choice"].to_numpy() for task in TASKS])
        found[f"{100 * share:g} % of labels"] = sides
    return found


def _train(config: Config, folder: Path) -> None:
    """Trains and evaluates unless an earlier start did."""
    if (folder / "eval" / "test.json").exists():
        if read_config(folder) != config:
            raise InputError(f"{folder}: a run with another configuration; remove it, or name another --workdir")
        return
    started = time.time()
    stopped_by = train(config, folder).stopped_by
    if stopped_by:
        raise SystemExit(f"{stopped_by}: {folder} is not finished; the same command goes on with it")
    evaluate_workdir(folder, "test")
    print(f"{folder}: {time.time() - started:.0f} s", file=sys.stderr, flush=True)


def _probe_predictions(study: Study, data: Path, seed: int, pretrained: Path, kept: Path) -> dict[str, np.ndarray]:
    """Of regressions on the pretrained model's vectors, and on those of the model as it was initialised."""
    if not kept.exists():
        run = open_best_run(pretrained, needs_task=False)
        initial = {**run.variables, "params": jax.jit(initialize, static_argnums=(0, 1))(run.model, seed)["params"]}
        splits = (study.train_splits(), ("validation",), ("test",))
        labels = [_labels(data, part) for part in splits]
        found = {}
        for side, variables in ((PRETRAINED, run.variables), (SCRATCH, initial)):
            inputs = [frozen_vectors(run, variables, part) for part in splits]
            found[side] = fit_and_predict(inputs, labels)
        np.savez(kept, **found)
    with np.load(kept) as stored:
        return dict(stored)


def frozen_vectors(run: BestRun, variables: Variables, splits: tuple[str, ...]) -> np.ndarray:
    """``[records, 3 * dim]`` float32: the modality vectors after fusion, in the order of the splits' records."""
    apply = jax.jit(lambda given, batch: run.model.apply(given, batch, is_training=False).modality_vectors)
    parts, indices = [], []
    batches = input_pipeline.evaluation_batches(run.dataset, run.config, splits, batch_sharding(run.mesh))
    for batch in batches:
        vectors, index = jax.device_get((apply(variables, batch), batch.record_index))
        parts.append(vectors.reshape(len(index), -1)[index >= 0])
        indices.append(index[index >= 0])
    batches.close()
    return np.concatenate(parts)[np.argsort(np.concatenate(indices), kind="stable")]


def fit_and_predict(inputs: Sequence[np.ndarray], labels: Sequence[np.ndarray]) -> np.ndarray:
    """Test predictions ``[tasks, records]`` of the regressions that are best on validation.

    Args:
        inputs: of the training, validation and test records.
        labels: of the same, ``[tasks, records]``.
    """
    predictions = []
    for task in range(len(TASKS)):
        models = [
            make_pipeline(StandardScaler(), LogisticRegression(C=penalty, max_iter=1000)).fit(
                inputs[0], labels[0][task]
            )
            for penalty in INVERSE_PENALTIES
        ]
        scores = [accuracy_score(labels[1][task], model.predict(inputs[1])) for model in models]
        predictions.append(models[int(np.argmax(scores))].predict(inputs[2]))
    return np.stack(predictions)


def mean_token_scores(study: Study, data: Path, labels: np.ndarray) -> dict[str, float]:
    """Test figures by task and metric of regressions on the mean input tokens: what needs no model at all."""
    dataset, splits = Dataset.open(data), (study.train_splits(), ("validation",), ("test",))
    inputs = [pooled_features(dataset.split(*part)) for part in splits]
    predictions = fit_and_predict(inputs, [_labels(data, part) for part in splits])
    values = scores(predictions, labels, np.ones(labels.shape[1]))
    return {f"{task} {metric}": float(values[t, m]) for t, task in enumerate(TASKS) for m, metric in enumerate(METRICS)}


def _labels(data: Path, splits: tuple[str, ...]) -> np.ndarray:
    """``[tasks, records]`` classes."""
    split = Dataset.open(data).split(*splits)
    return np.stack([split.gather_label(task, np.arange(split.num_records))[0] for task in TASKS])


def scores(predictions: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """``[tasks, metrics]``: accuracy, and the mean over classes of F1, with records counted by their weight.

    Args:
        predictions: ``[tasks, records]`` classes.
        labels: the same.
        weights: ``[records]``; a class that no weighted record has, or is said to have, takes no part in the mean.
    """
    found = np.zeros((len(TASKS), len(METRICS)))
    for task, (predicted, label) in enumerate(zip(predictions, labels, strict=True)):
        num_classes = int(max(predicted.max(), label.max())) + 1
        said, true, right = (
            np.bincount(classes, weights=counted, minlength=num_classes)
            for classes, counted in (
                (predicted, weights),
                (label, weights),
                (label, weights * (predicted == label)),
            )
        )
        is_counted = said + true > 0
        found[task] = right.sum() / weights.sum(), (2 * right[is_counted] / (said + true)[is_counted]).mean()
    return found


def compare(question: str, sides: Sides, labels: np.ndarray) -> list[dict[str, Any]]:
    """Cases of one question: by task and metric both means over seeds, and their difference with its interval."""
    generator, num_seeds = np.random.default_rng(0), len(sides[PRETRAINED])
    one = np.ones(labels.shape[1])
    whole = {side: np.stack([scores(each, labels, one) for each in given]) for side, given in sides.items()}
    draws = []
    for _ in range(NUM_RESAMPLES):
        seeds = generator.integers(0, num_seeds, num_seeds)
        weights = np.bincount(generator.integers(0, len(one), len(one)), minlength=len(one)).astype(float)
        times = np.bincount(seeds, minlength=num_seeds)
        draws.append(
            sum(
                number
                * (scores(sides[PRETRAINED][seed], labels, weights) - scores(sides[SCRATCH][seed], labels, weights))
                for seed, number in enumerate(times)
                if number
            )
            / num_seeds
        )
    low, high = np.percentile(np.stack(draws), [50 * (1 - LEVEL), 50 * (1 + LEVEL)], axis=0)
    cases = []
    for t, task in enumerate(TASKS):
        for m, metric in enumerate(METRICS):
            ours, theirs = whole[PRETRAINED][:, t, m], whole[SCRATCH][:, t, m]
            cases.append(
                {
                    "case": f"{question}, {task} {metric}, simulated",
                    "peer": "the same without pretraining",
                    "ratio": float(ours.mean() / theirs.mean()),
                    "goal": None,
                    "pretrained": ours.tolist(),
                    "not_pretrained": theirs.tolist(),
                    "difference": float(ours.mean() - theirs.mean()),
                    "interval": [float(low[t, m]), float(high[t, m])],
                }
            )
    return cases


def table(cases: Sequence[Mapping[str, Any]], mean_tokens: Mapping[str, float]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [
        f"| simulated, mean ± deviation over seeds | {PRETRAINED} | {SCRATCH} | difference, {LEVEL:.0%} interval |"
    ]
    lines.append("|---|--:|--:|--:|")
    for case in cases:
        name = str(case["case"]).removesuffix(", simulated")
        low, high = case["interval"]
        sides = " | ".join(
            f"{np.mean(case[side]):.3f} ± {np.std(case[side], ddof=1):.3f}" for side in ("pretrained", "not_pretrained")
        )
        lines.append(f"| {name} | {sides} | {case['difference']:+.3f} ({low:+.3f} to {high:+.3f}) |")
    return [*lines, *(f"{MEAN_TOKENS}, {name}: {value:.3f}" for name, value in mean_tokens.items())]


def _context(study: Study) -> dict[str, Any]:
    names = ("jax", "flax", "numpy", "scikit-learn")
    return {
        "date": datetime.date.today().isoformat(),
        "command": "python -m benchmarks.pretraining_study " + shlex.join(sys.argv[1:]),
        "versions": {name: metadata.version(name) for name in names},
        "machine": rounds.describe_machine(),
        "study": {**dataclasses.asdict(study), "epochs": {str(share): value for share, value in study.epochs.items()}},
    }


if __name__ == "__main__":
    sys.exit(main())
