"""How well does MMEI read emotion (MELD) and intent (MIntRec) from words alone, beside logistic regression?

    python -m benchmarks.text_study --data=PATH/meld --mintrec=PATH/mintrec --checkpoint=FOLDER [--quick]

Features are the token states of a frozen BERT, such as MiniLM, that ``python -m mmei_jax.encoders.pretrained`` has
converted. MELD: official split, utterances alone, and as the encoder reads them behind the turns before. MIntRec,
whose public copies lack the test split: a part of train is held out to choose on, and dev is tested. Every model is
trained on the same records and chosen by the same figure on the same held-out split; the test split is read once. The
peers are multinomial logistic regressions (scikit-learn) on TF-IDF and on the mean token state. A start of the same
command keeps the runs that an earlier one finished.
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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from scipy import stats
from sklearn.base import BaseEstimator
from sklearn.dummy import DummyClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from sklearn.model_selection import StratifiedShuffleSplit
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks import rounds
from configs import extraction, meld_dialogue, meld_text, mintrec
from mmei_jax.command import CommandParser, report_errors
from mmei_jax.config import Config, parse
from mmei_jax.encoders.pretrained import CERTIFICATE_NAME
from mmei_jax.evaluation import evaluate_workdir
from mmei_jax.extraction import dataset_builders, extraction_config
from mmei_jax.extraction.clips import Clip
from mmei_jax.extraction.extract import extract
from mmei_jax.extraction.shard_units import read_summary
from mmei_jax.host_memory import keep_freed_memory
from mmei_jax.records import Dataset, Split
from mmei_jax.training import train
from mmei_jax.types import InputError
from mmei_jax.workdir import read_config, write_json

ROOT = Path(__file__).parents[1]
METRICS = ("weighted_f1", "accuracy", "macro_f1")
SPLITS = ("train", "validation", "test")
HELD_OUT_SHARE = 0.15
# Records of each split in quick runs.
NUM_QUICK_RECORDS = 200
FEATURES_PEER = "logistic regression, mean token state"
# Inverse strengths of the regressions' penalty, of which the held-out split picks one.
INVERSE_PENALTIES = {"TF-IDF": (0.1, 1.0, 10.0, 100.0), FEATURES_PEER: (0.001, 0.01, 0.1, 1.0)}


@dataclass(frozen=True)
class Case:
    """One row of questions: a data set, and how MMEI is trained on it.

    Attributes:
        data: name of the data set.
        builder: folder below ``data/``.
        get_config: the configuration of a run; its splits are set here.
        options: of the builder, besides its folder.
        text: keys of the extraction's group ``text``, where they are not those of a text without context.
        holds_out: whether a part of train is held out, and dev is tested.
    """

    data: str
    builder: str
    get_config: Callable[[], ml_collections.ConfigDict]
    options: Mapping[str, str] = field(default_factory=dict)
    text: Mapping[str, Any] = field(default_factory=dict)
    holds_out: bool = False

    def splits(self) -> tuple[str, str, str]:
        """Names of the splits that are trained on, chosen on and tested."""
        return ("train", "held_out", "dev") if self.holds_out else ("train", "dev", "test")

    def config(self, data: Path, seed: int, *, is_quick: bool = False) -> Config:
        """What is run with a seed; quick runs have one epoch, and batches of one shape."""
        config = self.get_config()
        config.seed = seed
        config.data.path = str(data)
        for key, split in zip(SPLITS, self.splits(), strict=True):
            config.data[f"{key}_splits"] = (split,)
        if is_quick:
            config.train.num_epochs = 1
            config.data.packing.num_rows = config.data.packing.num_rows[-1:]
        return parse(config.to_dict())

    def criterion(self) -> str:
        """The figure on the held-out split by which every model of the case is chosen."""
        return str(self.get_config().train.best_metric.rpartition("/")[2])

    def label(self) -> str:
        """The data set's label that is learned."""
        return str(self.get_config().loss.emotion_label)


CONTEXT = {"context_turns": "3", "context_separator": "[SEP]"}
# The longest text has 159 tokens. The encoder reads the context; what is stored are the utterance's own tokens.
CONTEXT_TEXT = {"max_tokens": 160, "tokens_per_row": 160, "stored": "after_context"}
CASES = {
    "MELD, utterance alone": Case("meld_text", "meld", meld_text.get_config),
    "MELD, with three turns before": Case("meld_dialogue", "meld", meld_dialogue.get_config, CONTEXT, CONTEXT_TEXT),
    "MIntRec": Case("mintrec", "mintrec", mintrec.get_config, holds_out=True),
}


@dataclass(frozen=True)
class Score:
    """Figures on the test split, in [0, 1], and the criterion on the held-out split; the peers have no seed."""

    weighted_f1: float
    accuracy: float
    macro_f1: float
    criterion: float
    seed: int | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs every case and seed; prints a table, and a JSON line at the end; gives the exit status."""
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="folder with MELD's three CSVs")
    parser.add_argument(
        "--mintrec", type=Path, help="folder with MIntRec's train.tsv and dev.tsv; left out: no MIntRec"
    )
    parser.add_argument("--checkpoint", required=True, type=Path, help="folder of a converted BERT with its tokenizer")
    parser.add_argument("--workdir", type=Path, default=Path("runs/text_study"), help="(default: %(default)s)")
    parser.add_argument("--num_seeds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--results", type=Path, help="JSON file for the figures, date, versions and command")
    parser.add_argument("--quick", action="store_true", help="first case, 200 records a split, one seed and epoch")
    options = parser.parse_args(arguments)
    return report_errors(lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    folders = {"meld": options.data, "mintrec": options.mintrec}
    cases = {name: case for name, case in CASES.items() if folders[case.builder] is not None}
    if options.quick:
        cases = dict([next(iter(cases.items()))])
    if options.num_seeds < 1:
        raise InputError(f"--num_seeds={options.num_seeds}: expected at least 1")
    if not (options.checkpoint / CERTIFICATE_NAME).is_file():
        raise InputError(
            f"--checkpoint={options.checkpoint}: no {CERTIFICATE_NAME}: expected a folder that "
            "python -m mmei_jax.encoders.pretrained has written"
        )
    workdir = options.workdir / "quick" if options.quick else options.workdir
    # As train.py does; and runs share their programs.
    keep_freed_memory()
    jax.config.update("jax_compilation_cache_dir", str(workdir / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    found = []
    print("\n".join(HEADER), flush=True)
    for name, case in cases.items():
        limit = NUM_QUICK_RECORDS if options.quick else None
        data = make_data(case, folders[case.builder], options.checkpoint, workdir, limit)
        peers = kept_peer_scores(case, data, workdir / "peers" / f"{case.data}.json")
        ours = []
        for seed in range(1 if options.quick else options.num_seeds):
            print(f"{name}, seed {seed}", file=sys.stderr, flush=True)
            config = case.config(data, seed, is_quick=options.quick)
            ours.append(our_score(case, config, workdir / "runs" / f"{_file_name(name)}_seed{seed}"))
        for line in table(name, ours, peers):
            print(line, flush=True)
        found.append(describe(name, case, ours, peers, (read_summary(data) or {})["texts_cut"]))
    print(rounds.total_line())
    summary = {"benchmark": "text_study", "cases": found}
    if options.results:
        write_json(options.results, {**_context(options.checkpoint), **summary})
    print(json.dumps(summary))
    return 0


def _file_name(name: str) -> str:
    return name.lower().replace(",", "").replace(" ", "_")


def make_data(case: Case, folder: Path, checkpoint: Path, workdir: Path, limit: int | None = None) -> Path:
    """Token states of a case's texts, unless they are there; gives the data set's folder.

    Args:
        case: names builder and options.
        folder: holds the lists.
        checkpoint: the encoder.
        workdir: receives the data set in ``data/``.
        limit: most records of each split; None takes all.

    Raises:
        InputError: lists or checkpoint are missing or wrong, or the folder holds another extraction.
    """
    builder_folder = ROOT / "data" / case.builder
    builder = dataset_builders.open_builder(builder_folder, {"folder": str(folder), **case.options}, workdir / "tfds")
    clips = {
        name: list(dataset_builders.builder_clips(builder, name)) for name in dataset_builders.split_names(builder)
    }
    if case.holds_out:
        clips = hold_out(clips, case.label())
    values = extraction.get_config()
    values.name, values.source, values.modalities = case.data, f"{builder_folder.name}: texts alone", ("text",)
    values.licence = "of the data set's authors"
    longest = case.get_config().data.max_tokens.text[-1]
    values.text.update(checkpoint=str(checkpoint), max_tokens=longest, tokens_per_row=longest)
    values.text.update(case.text)
    values.records_per_shard, values.dtype = 1024, "float16"
    output = workdir / "data" / case.data
    extract(
        extraction_config.parse(values.to_dict()),
        [clip for name in case.splits() for clip in clips[name][:limit]],
        output,
        labels=dataset_builders.label_specs(builder),
        base=Path(),
        num_workers=2,
        report=lambda line: print(line, file=sys.stderr, flush=True),
    )
    return output


def hold_out(clips: Mapping[str, Sequence[Clip]], label: str) -> dict[str, list[Clip]]:
    """Moves a part of train, with the same shares of the classes, into a split "held_out"; always the same part."""
    train_clips = clips["train"]
    values = [clip.labels[label] for clip in train_clips]
    splitter = StratifiedShuffleSplit(1, test_size=HELD_OUT_SHARE, random_state=0)
    _, chosen = next(splitter.split(np.zeros(len(values)), values))
    is_held_out = np.isin(np.arange(len(values)), chosen)
    pairs = list(zip(train_clips, is_held_out, strict=True))
    return {
        **{name: list(found) for name, found in clips.items()},
        "train": [clip for clip, held in pairs if not held],
        "held_out": [dataclasses.replace(clip, split="held_out") for clip, held in pairs if held],
    }


def our_score(case: Case, config: Config, folder: Path) -> Score:
    """Trains and tests MMEI, unless an earlier start did.

    Raises:
        InputError: an earlier start had another configuration.
    """
    result = folder / "eval" / "test.json"
    if not result.exists():
        stopped_by = train(config, folder).stopped_by
        if stopped_by:
            raise SystemExit(f"{stopped_by}: {folder} is not finished; the same command goes on with it")
        evaluate_workdir(folder, "validation")
        evaluate_workdir(folder, "test")
    elif read_config(folder) != config:
        raise InputError(f"{folder}: a run with another configuration; remove it, or name another --workdir")
    held_out, test = (
        json.loads((folder / "eval" / f"{split}.json").read_text())["metrics"] for split in ("validation", "test")
    )
    figures = {name: test[f"emotion/{name}"] for name in METRICS}
    return Score(**figures, criterion=held_out[f"emotion/{case.criterion()}"], seed=config.seed)


def kept_peer_scores(case: Case, data: Path, path: Path) -> dict[str, Score]:
    """What :func:`peer_scores` gives, kept in ``path``: the regressions take minutes."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {name: dataclasses.asdict(score) for name, score in peer_scores(case, data).items()})
    return {name: Score(**values) for name, values in json.loads(path.read_text()).items()}


def peer_scores(case: Case, data: Path) -> dict[str, Score]:
    """Of the most frequent class and of both regressions, each with the penalty that is best on the held-out split."""
    splits = [Dataset.open(data).split(name) for name in case.splits()]
    labels = [split.gather_label(case.label(), np.arange(split.num_records))[0] for split in splits]
    texts = [split.column("extra_text") for split in splits]
    states = [mean_states(split) for split in splits]
    makers: dict[str, tuple[list[Any], list[BaseEstimator]]] = {
        "most frequent class": (states, [DummyClassifier(strategy="most_frequent")]),
        "logistic regression, TF-IDF": (
            texts,
            [
                make_pipeline(
                    TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=c, max_iter=2000)
                )
                for c in INVERSE_PENALTIES["TF-IDF"]
            ],
        ),
        FEATURES_PEER: (
            states,
            [
                make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=2000))
                for c in INVERSE_PENALTIES[FEATURES_PEER]
            ],
        ),
    }
    return {name: _best(case, inputs, labels, models) for name, (inputs, models) in makers.items()}


def _best(case: Case, inputs: list[Any], labels: list[np.ndarray], models: list[BaseEstimator]) -> Score:
    """Test figures of the model that is best on the held-out split; the first of equal ones."""
    criteria = [
        _figures(labels[1], model.fit(inputs[0], labels[0]).predict(inputs[1]))[case.criterion()] for model in models
    ]
    best = int(np.argmax(criteria))
    return Score(**_figures(labels[2], models[best].predict(inputs[2])), criterion=criteria[best])


def _figures(labels: np.ndarray, predictions: np.ndarray) -> dict[str, float]:
    f1 = {name: f1_score(labels, predictions, average=name, zero_division=0) for name in ("weighted", "macro")}
    accuracy = accuracy_score(labels, predictions)
    return {"weighted_f1": float(f1["weighted"]), "accuracy": float(accuracy), "macro_f1": float(f1["macro"])}


def mean_states(split: Split) -> np.ndarray:
    """``[records, dim]`` float32: the mean state of each record's tokens, those around the text among them."""
    rows = []
    longest = int(split.lengths("text").max())
    for start in range(0, split.num_records, 512):
        indices = np.arange(start, min(start + 512, split.num_records))
        tokens, lengths = split.gather_tokens("text", indices, longest)
        rows.append(tokens.sum(axis=1, dtype=np.float32) / lengths[:, None].astype(np.float32))
    return np.concatenate(rows)


def t_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % t interval of the mean over seeds; None of a single one.

    It tells how much training varies, not how much another test split would.
    """
    if len(values) < 2:
        return None
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return mean - half, mean + half


HEADER = ("| data | model | weighted F1 | accuracy | macro F1 |", "|---|---|---|---|---|")


def table(name: str, ours: Sequence[Score], peers: Mapping[str, Score]) -> list[str]:
    """Rows of a Markdown table, in points: each peer, and MMEI's mean, deviation and interval over the seeds."""
    lines = []
    for peer, score in peers.items():
        cells = [f"{100 * getattr(score, metric):.1f}" for metric in METRICS]
        lines.append(f"| {name} | {peer} | " + " | ".join(cells) + " |")
    cells = []
    for metric in METRICS:
        values = [100 * getattr(score, metric) for score in ours]
        deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        interval = t_interval(values)
        cells.append(
            f"{statistics.fmean(values):.1f}{deviation}" + (" [{:.1f}, {:.1f}]".format(*interval) if interval else "")
        )
    lines.append(f"| {name} | MMEI | " + " | ".join(cells) + " |")
    return lines


def describe(
    name: str, case: Case, ours: Sequence[Score], peers: Mapping[str, Score], num_cut: int
) -> dict[str, object]:
    """One entry of the summary; the ratio is that of the criterion, on test, to the regression on the same states."""
    metric = case.criterion()
    values = [getattr(score, metric) for score in ours]
    return {
        "case": name,
        "peer": FEATURES_PEER,
        "ratio": statistics.fmean(values) / getattr(peers[FEATURES_PEER], metric),
        "goal": 1.0,
        "metric": metric,
        "mean": statistics.fmean(values),
        "deviation": statistics.stdev(values) if len(values) > 1 else None,
        "t_interval_95": t_interval(values),
        "scores": [dataclasses.asdict(score) for score in ours],
        "peers": {peer: dataclasses.asdict(score) for peer, score in peers.items()},
        "texts_cut": num_cut,
    }


def _context(checkpoint: Path) -> dict[str, object]:
    names = ("jax", "flax", "numpy", "scikit-learn", "transformers")
    certificate = json.loads((checkpoint / CERTIFICATE_NAME).read_text())
    return {
        "date": datetime.date.today().isoformat(),
        "command": "python -m benchmarks.text_study " + shlex.join(sys.argv[1:]),
        "versions": {name: metadata.version(name) for name in names},
        "machine": f"{os.cpu_count()} CPU cores",
        "checkpoint": {key: certificate[key] for key in ("source", "parameters_sha256")},
    }


if __name__ == "__main__":
    sys.exit(main())
