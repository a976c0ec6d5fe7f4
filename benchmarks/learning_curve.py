"""How much does MMEI learn from how many records, beside logistic regression and what is possible? Simulated data.

    python -m benchmarks.learning_curve --workdir=runs/learning_curve [--quick]

Records of AIGC-INT-Sim (simulated); one validation and one test split for all sizes. The training sets of a seed are
nested, those of two seeds share no record; the largest takes all records with every seed. The ceilings are those of the
test split's own records: the exact posterior, and the product of the unimodal posteriors (late fusion). The regression
(multinomial logistic, scikit-learn) reads the mean token of each modality. A start of the same command keeps the runs
that an earlier one finished, and goes on with the one that it left.
"""

import argparse
import dataclasses
import datetime
import json
import os
import shlex
import statistics
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks import rounds
from configs import learning_curve
from mmei_jax.command import CommandParser, report_errors
from mmei_jax.config import Config, parse
from mmei_jax.evaluation import evaluate_workdir, read_config
from mmei_jax.records import Dataset, Split
from mmei_jax.simulation import aigc_int_dataset
from mmei_jax.training import train
from mmei_jax.types import MODALITIES, InputError
from mmei_jax.workdir import write_json

TASKS = ("emotion", "intent", "joint")
# Inverse strengths of the regression's penalty, of which validation picks one for each fit.
INVERSE_PENALTIES = (0.001, 0.01, 0.1, 1.0)
# Emotion accuracy that may be missing at the largest size.
GOAL_GAP = 0.02
SIZE_OF_LOGISTIC_GOAL = 3_500
# Records of this seed are numbered as its splits follow one another; the quickstart has another seed.
DATA_SEED = 3
DATA_DIM = 32
_RECORDS_PER_CHUNK = 8_192

# Test accuracies by the number of training records: of each seed, by task.
Scores = dict[int, list[dict[str, float]]]


@dataclass(frozen=True)
class Recipe:
    """What depends on the number of training records.

    Attributes:
        num_epochs: passes over them.
        dropout_rate: of the model.
    """

    num_epochs: int
    dropout_rate: float


@dataclass(frozen=True)
class Curve:
    """Which records are trained on, and how.

    Attributes:
        recipes: by the number of training records, which rises; the last number is all there are.
        num_seeds: seeds with training records of their own.
        num_validation: records that choose the checkpoint.
        num_test: records that are tested.
        is_packed: whether records share rows, as configured; else there is one shape, and at a constant rate one
            program for all sizes, which compiles sooner.
    """

    recipes: dict[int, Recipe]
    num_seeds: int
    num_validation: int
    num_test: int
    is_packed: bool = True

    def split_sizes(self) -> dict[str, int]:
        """Splits of the data set: test, validation, the parts by which each seed's training set grows, and the rest."""
        *sizes, total = self.recipes
        steps = zip(sizes, [0, *sizes], strict=False)
        growth = {_size_name(size): size - before for size, before in steps}
        parts = {f"seed{seed}_{name}": size for seed in range(self.num_seeds) for name, size in growth.items()}
        fixed = {"test": self.num_test, "validation": self.num_validation}
        return fixed | parts | {"rest": total - sum(parts.values())}

    def train_splits(self, size: int, seed: int) -> tuple[str, ...]:
        """Splits that make up the training set of a size and seed."""
        if size == max(self.recipes):
            return tuple(self.split_sizes())[2:]
        return tuple(f"seed{seed}_{_size_name(part)}" for part in self.recipes if part <= size)

    def config(self, data: Path, size: int, seed: int) -> Config:
        """What is run at a size and seed."""
        config = learning_curve.get_config()
        config.seed = seed
        config.data.path = str(data)
        config.data.train_splits = self.train_splits(size, seed)
        recipe = self.recipes[size]
        config.model.dropout_rate = recipe.dropout_rate
        if not self.is_packed:
            config.data.packing.records_per_row, config.data.packing.num_rows = 1, ()
            config.optimizer.schedule = "constant"
            config.data.max_tokens = {name: sizes[-1:] for name, sizes in config.data.max_tokens.items()}
        config.train.num_epochs = recipe.num_epochs
        config.train.evaluate_every_epochs = max(1, recipe.num_epochs // 5)
        return parse(config.to_dict())


# Epochs and dropout at 3,500 records were compared on the validation split, with seed 0; the others follow from it.
FULL = Curve(
    {
        1_000: Recipe(24, 0.3),
        3_500: Recipe(16, 0.3),
        10_000: Recipe(10, 0.2),
        30_000: Recipe(6, 0.1),
        100_000: Recipe(4, 0.1),
    },
    num_seeds=3,
    num_validation=3_000,
    num_test=20_000,
)
QUICK = Curve(
    {200: Recipe(1, 0.1), 1_000: Recipe(1, 0.1)},
    num_seeds=1,
    num_validation=300,
    num_test=300,
    is_packed=False,
)


def _size_name(size: int) -> str:
    return f"{size / 1000:g}k"


def main() -> int:
    """Makes the data, runs every seed and size, prints a table, and a JSON line at the end; returns the exit code."""
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", default="runs/learning_curve", help="data and runs (default: %(default)s)")
    parser.add_argument("--num_seeds", type=int, default=FULL.num_seeds, help="at most, and by default, %(default)s")
    parser.add_argument("--results", help="JSON file for the figures, date, versions and command")
    parser.add_argument("--picture", help="PNG file for the curve")
    parser.add_argument("--quick", action="store_true", help="one seed, two small sizes, in WORKDIR/quick")
    parser.add_argument("--from_results", help="JSON file of an earlier start: table, cases and picture again, no runs")
    options = parser.parse_args()
    if not 1 <= options.num_seeds <= FULL.num_seeds:
        parser.error(f"--num_seeds={options.num_seeds}: expected 1 to {FULL.num_seeds}")
    return report_errors(lambda: _report_again(options) if options.from_results else _run(options))


def _report_again(options: argparse.Namespace) -> int:
    """Table, cases and picture from an earlier start's results."""
    try:
        written = json.loads(Path(options.from_results).read_text(encoding="utf-8"))
        ours, peer = ({int(size): scores for size, scores in written[key].items()} for key in ("ours", "logistic"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"--from_results={options.from_results}: expected what --results wrote: {error!r}") from error
    _report(options, ours, peer, {key: value for key, value in written.items() if key not in ("ours", "logistic")})
    return 0


def _run(options: argparse.Namespace) -> int:
    curve = QUICK if options.quick else FULL
    workdir = Path(options.workdir) / ("quick" if options.quick else "")
    # Runs share their programs.
    jax.config.update("jax_compilation_cache_dir", str(workdir / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    data = make_data(curve, workdir / "data")
    ours: Scores = {size: [] for size in curve.recipes}
    peer: Scores = {size: [] for size in curve.recipes}
    for seed in range(min(options.num_seeds, curve.num_seeds)):
        for size in reversed(curve.recipes):
            print(f"{size} records, seed {seed}", file=sys.stderr, flush=True)
            config = curve.config(data, size, seed)
            folder = workdir / "runs" / f"{_size_name(size)}_seed{seed}"
            ours[size].append(our_accuracies(config, folder))
            peer[size].append(logistic_accuracies(config, folder / "logistic.json"))
            print(f"{size} records, seed {seed}: MMEI {ours[size][-1]}, regression {peer[size][-1]}", flush=True)
    _report(options, ours, peer, _context(curve, data))
    return 0


def _report(options: argparse.Namespace, ours: Scores, peer: Scores, context: dict[str, Any]) -> None:
    """Prints the table, draws and writes what is asked for, and prints the JSON line."""
    reference = context["reference"]
    for line in table(ours, peer, reference):
        print(line)
    if options.picture:
        draw(Path(options.picture), ours, peer, reference)
    print(rounds.total_line())
    summary = {"benchmark": "learning_curve", "cases": cases(ours, peer, reference)}
    if options.results:
        write_json(Path(options.results), {**context, "ours": ours, "logistic": peer, **summary})
    print(json.dumps(summary))


def make_data(curve: Curve, path: Path) -> Path:
    """Generates the simulated records, unless they are there; gives their folder."""
    if not (path / "manifest.json").exists():
        sizes = ",".join(f"{name}={size}" for name, size in curve.split_sizes().items())
        if aigc_int_dataset.main(
            [f"--output={path}", f"--dim={DATA_DIM}", f"--seed={DATA_SEED}", f"--split_sizes={sizes}"]
        ):
            raise SystemExit(2)
    found = {name: entry["num_records"] for name, entry in Dataset.open(path).manifest["splits"].items()}
    if found != curve.split_sizes():
        raise SystemExit(
            f"error: {path}: has other splits than this benchmark makes; remove it, or name another folder"
        )
    return path


def our_accuracies(config: Config, folder: Path) -> dict[str, float]:
    """Test accuracies of MMEI by task; trains and evaluates unless an earlier start did."""
    result = folder / "eval" / "test.json"
    if not result.exists():
        stopped_by = train(config, folder).stopped_by
        if stopped_by:
            raise SystemExit(f"{stopped_by}: {folder} is not finished; the same command goes on with it")
        evaluate_workdir(folder, "test")
    elif read_config(folder) != config:
        raise InputError(f"{folder}: a run with another configuration; remove it, or name another --workdir")
    metrics = json.loads(result.read_text())["metrics"]
    return {task: metrics[f"{task}/accuracy"] for task in TASKS}


def pooled_features(split: Split) -> np.ndarray:
    """``[records, features]`` float32: of each modality the mean token (zeros where absent) and whether it is there."""
    rows = []
    for start in range(0, split.num_records, _RECORDS_PER_CHUNK):
        indices = np.arange(start, min(start + _RECORDS_PER_CHUNK, split.num_records))
        columns = []
        for name in MODALITIES:
            tokens, lengths = split.gather_tokens(name, indices, int(split.lengths(name).max()))
            columns += [tokens.sum(axis=1, dtype=np.float32) / np.maximum(lengths, 1)[:, None], (lengths > 0)[:, None]]
        rows.append(np.concatenate(columns, axis=1, dtype=np.float32))
    return np.concatenate(rows)


def logistic_accuracies(config: Config, path: Path) -> dict[str, float]:
    """Test accuracies of the regressions of emotion and of intent, kept in ``path``; joint is that both are right."""
    if not path.exists():
        dataset = Dataset.open(config.data.path)
        names = (config.data.train_splits, config.data.validation_splits, config.data.test_splits)
        splits = [dataset.split(*part) for part in names]
        inputs = [pooled_features(split) for split in splits]
        is_right, chosen = {}, {}
        for task in ("emotion", "intent"):
            labels = [split.gather_label(task, np.arange(split.num_records))[0] for split in splits]
            predictions, chosen[f"{task}_inverse_penalty"] = _fit_and_predict(inputs, labels)
            is_right[task] = predictions == labels[2]
        is_right["joint"] = is_right["emotion"] & is_right["intent"]
        write_json(path, {task: float(is_right[task].mean()) for task in TASKS} | chosen)
    found = json.loads(path.read_text())
    return {task: found[task] for task in TASKS}


def _fit_and_predict(inputs: list[np.ndarray], labels: list[np.ndarray]) -> tuple[np.ndarray, float]:
    """Test predictions of the regression that is best on validation, and its inverse penalty."""
    models = {
        inverse_penalty: make_pipeline(StandardScaler(), LogisticRegression(C=inverse_penalty, max_iter=2000))
        for inverse_penalty in INVERSE_PENALTIES
    }
    scores = {
        inverse_penalty: accuracy_score(labels[1], model.fit(inputs[0], labels[0]).predict(inputs[1]))
        for inverse_penalty, model in models.items()
    }
    best = max(scores, key=lambda inverse_penalty: scores[inverse_penalty])
    return models[best].predict(inputs[2]), best


def table(ours: Scores, peer: Scores, reference: dict[str, float]) -> list[str]:
    """Lines of a Markdown table."""
    lines = []
    for task in TASKS:
        exact, late = _ceilings(reference, task)
        lines += [
            f"| {task} accuracy, simulated | MMEI | regression | short of the exact ceiling, points |",
            "|---|---|---|---|",
        ]
        for size, scores in ours.items():
            gap = 100 * (exact - _mean(scores, task))
            lines.append(f"| {size:,} records | {_spread(scores, task)} | {_spread(peer[size], task)} | {gap:.1f} |")
        lines += [f"| exact posterior | {exact:.3f} | | |", f"| late fusion | {late:.3f} | | |", ""]
    return lines


def cases(ours: Scores, peer: Scores, reference: dict[str, float]) -> list[dict[str, object]]:
    """Every size and task against the exact ceiling, late fusion and the regression."""
    found: list[dict[str, object]] = []
    for task in TASKS:
        exact, late = _ceilings(reference, task)
        for size, scores in ours.items():
            accuracy = _mean(scores, task)
            goals: dict[str, float | None] = dict.fromkeys(("exact", "late", "logistic"))
            if task == "emotion" and size == max(ours):
                goals["exact"] = (exact - GOAL_GAP) / exact
            if task == "emotion" and size == SIZE_OF_LOGISTIC_GOAL:
                goals["logistic"] = 1.0
            # Tasks without a goal are told of as well as those that have one.
            notes = {
                "exact": f"{100 * (exact - accuracy):.1f} points short of the exact ceiling",
                "logistic": f"{100 * (accuracy - _mean(peer[size], task)):+.1f} points beside the regression",
            }
            peers = {
                "exact": ("exact posterior (ceiling)", exact),
                "late": ("late fusion: product of the exact unimodal posteriors", late),
                "logistic": ("multinomial logistic regression of mean tokens", _mean(peer[size], task)),
            }
            for name, (title, value) in peers.items():
                case = {"case": f"{task}, {size} records, simulated", "peer": title, "ratio": accuracy / value}
                figures = {"goal": goals[name], "accuracy": accuracy, "peer_accuracy": value}
                found.append({**case, **figures, **({"note": notes[name]} if name in notes else {})})
    return found


def draw(
    path: Path,
    ours: Scores,
    peer: Scores,
    reference: dict[str, float],
) -> None:
    """Draws accuracy over the number of training records, a panel for each task."""
    figure, panels = plt.subplots(1, len(TASKS), figsize=(11, 3.8), layout="constrained")
    for panel, task in zip(panels, TASKS, strict=True):
        exact, late = _ceilings(reference, task)
        panel.axhline(exact, color="black", linewidth=1, label="exact posterior (ceiling)")
        panel.axhline(late, color="black", linewidth=1, linestyle=":", label="late fusion of exact unimodal posteriors")
        for scores, label, marker, color in ((ours, "MMEI", "o", "C0"), (peer, "logistic regression", "s", "C1")):
            means = [_mean(of_size, task) for of_size in scores.values()]
            panel.plot(list(scores), means, marker=marker, color=color, label=label)
            for size, of_size in scores.items():
                panel.plot([size] * len(of_size), [one[task] for one in of_size], ".", color=color, alpha=0.5)
        panel.set(xscale="log", xlabel="training records (simulated)", title=f"{task} accuracy")
        panel.set_xticks(list(ours), [_size_name(size) for size in ours])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    figure.suptitle("AIGC-INT-Sim (simulated): learning curve, mean and single seeds", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _ceilings(reference: dict[str, float], task: str) -> tuple[float, float]:
    return reference[f"{task}/accuracy"], reference[f"{task}/accuracy[late_fusion]"]


def _mean(scores: list[dict[str, float]], task: str) -> float:
    return statistics.fmean(one[task] for one in scores)


def _spread(scores: list[dict[str, float]], task: str) -> str:
    deviation = statistics.stdev(one[task] for one in scores) if len(scores) > 1 else 0.0
    return f"{_mean(scores, task):.3f} ± {deviation:.3f}"


def _context(curve: Curve, data: Path) -> dict[str, Any]:
    names = ("jax", "flax", "numpy", "scikit-learn")
    return {
        "date": datetime.date.today().isoformat(),
        "command": "python -m benchmarks.learning_curve " + shlex.join(sys.argv[1:]),
        "versions": {name: metadata.version(name) for name in names},
        "machine": f"{os.cpu_count()} CPU cores",
        "curve": dataclasses.asdict(curve),
        "reference": Dataset.open(data).reference("test"),
    }


if __name__ == "__main__":
    sys.exit(main())
