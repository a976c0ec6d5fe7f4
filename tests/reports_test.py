"""Reports of tiny runs: what stands in them, and that they stay right where something is missing."""

import dataclasses
import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmei_jax.config import parse
from mmei_jax.evaluation import evaluate_workdir
from mmei_jax.extraction import import_features
from mmei_jax.reports import drawing, evaluated_run
from mmei_jax.reports.report import write_report
from mmei_jax.reports.resampling import bootstrap_intervals
from mmei_jax.simulation import aigc_int_dataset
from mmei_jax.training import train
from mmei_jax.types import InputError
from tests import markdown, processes, tiny

EMOTIONS = ("neutral", "joy", "anger")
# By part of the imported data: records, and what it lacks.
PARTS = {
    "train": 40,
    "validation": 12,
    "test": 24,
    "without_joy": 12,
    "without_audio": 12,
    "single": 1,
    "unlabelled": 6,
}
KINDS = {
    "softmax": {},
    "sigmoid": {"loss__emotion": "sigmoid", "loss__emotion_label": "feelings"},
    "regression": {
        "loss__emotion": "regression",
        "loss__emotion_label": "sentiment",
        "train__best_metric": "validation/emotion/mae",
    },
}


def make_arrays():
    generator = np.random.default_rng(0)
    part = np.repeat(list(PARTS), list(PARTS.values()))
    num_records = len(part)
    emotion = generator.integers(0, 3, num_records).astype(float)
    emotion[part == "without_joy"] = np.tile([0.0, 2.0], 6)
    emotion[part == "unlabelled"] = np.nan
    feelings = generator.random((num_records, 3)) < 0.5
    feelings[part == "without_joy", 1] = False
    names = ["|".join(np.array(EMOTIONS)[row]) or "none" for row in feelings]
    sentiment = np.round(generator.uniform(-3, 3, num_records), 1)
    lengths = {name: generator.integers(1, 5, num_records) for name in ("audio", "text")}
    lengths["text"][::5] = 0
    lengths["audio"][part == "without_audio"] = 0
    return {
        "id": np.array([f"clip{row}" for row in range(num_records)]),
        "part": part,
        "emotion": emotion,
        "feelings": np.where(part == "unlabelled", "", names),
        "sentiment": np.where(part == "unlabelled", np.nan, sentiment),
        "vision": generator.normal(size=(num_records, 5)).astype(np.float32),
        **{name: generator.normal(size=(num_records, 4, 3)).astype(np.float32) for name in ("audio", "text")},
        **{f"{name}_lengths": value for name, value in lengths.items()},
    }


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("features")
    np.savez(folder / "features.npz", **make_arrays())
    arguments = [f"--input={folder / 'features.npz'}", f"--output={folder / 'data'}", "--source=here", "--licence=CC0"]
    arguments += ["--labels=emotion,feelings:multi_label,sentiment:real", "--split_key=part"]
    arguments += [f"--class_names={label}={','.join(EMOTIONS)}" for label in ("emotion", "feelings")]
    assert import_features.main(arguments) == 0
    return folder / "data"


@pytest.fixture(scope="module")
def imported_run(imported, tmp_path_factory):
    """Trains one epoch of a kind of emotion task, once."""
    runs = {}

    def run(kind):
        if kind not in runs:
            changes = {"loss__intent": "none", "loss__ranking": "none", "data__batch_size": 8, "train__num_epochs": 1}
            config = tiny.config_dict(imported, model__num_layers=0, **changes, **KINDS[kind])
            for name, limit in {"vision": 1, "audio": 3, "text": 4}.items():
                config.data.max_tokens[name] = (limit,)
            runs[kind] = tmp_path_factory.mktemp(kind)
            train(parse(config.to_dict()), runs[kind])
        return runs[kind]

    return run


@pytest.fixture
def quick_report(monkeypatch):
    """For tests of what neither resamples nor the size of pictures change."""
    hasten(monkeypatch)


def hasten(monkeypatch):
    monkeypatch.setattr(evaluated_run, "bootstrap_intervals", functools.partial(bootstrap_intervals, num_resamples=20))
    monkeypatch.setitem(drawing._STYLE, "savefig.dpi", 30.0)


@pytest.fixture(scope="module")
def report_on(imported_run, tmp_path_factory):
    """The report of a kind of task on a part of the data, made once: its text, and the folder."""

    @functools.cache
    def report(kind, part):
        workdir = tmp_path_factory.mktemp("reports") / f"{kind}_{part}"
        shutil.copytree(imported_run(kind), workdir)
        path = workdir / "config.json"
        values = json.loads(path.read_text())
        values["data"]["test_splits"] = [part]
        path.write_text(json.dumps(values))
        with pytest.MonkeyPatch.context() as patch:
            hasten(patch)
            evaluate_workdir(workdir, "test")
            folder = write_report(workdir, "test")
        return (folder / "report.md").read_text(), folder

    return report


@pytest.fixture(scope="module")
def simulated_run(data, tmp_path_factory):
    """A run on simulated records, evaluated, and its first report."""
    folder = tmp_path_factory.mktemp("simulated")
    # The report does not depend on how deep the model is.
    train(tiny.config(data, model__num_layers=0), folder / "run", command="python train.py --config=it")
    evaluate_workdir(folder / "run", "test")
    write_report(folder / "run", "test", command="python eval.py --workdir=runs/it")
    return folder / "run"


def read_summary(folder):
    return json.loads((folder.parent / "test.json").read_text())


def section(text, title):
    """Lines under a heading, until the next of the same level."""
    (found,) = [part for part in text.split("\n## ") if part.startswith(title + "\n")]
    return found


def rows_of(text):
    """Cells of every table row by the first cell."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in rows}


def assert_complete(folder):
    """Every picture that the report shows is there and can be read, and nothing else is."""
    text = (folder / "report.md").read_text()
    shown = {line.rpartition("](")[2].removesuffix(")") for line in text.splitlines() if line.startswith("![")}
    assert {path.name for path in folder.iterdir()} == {"report.md", "report.html", *shown}
    for name in shown:
        with Image.open(folder / name) as image:
            image.load()
            assert not image.info.get("Software")
            # Something is drawn: not one colour throughout.
            assert len(image.convert("RGB").getcolors(1 << 24)) > 10
    assert (folder / "report.html").read_text().count("data:image/png;base64,") == len(shown)


def test_report_holds_every_section_and_picture(simulated_run):
    folder = simulated_run / "eval" / "test_report"
    text = (folder / "report.md").read_text()
    assert_complete(folder)
    titles = [line.removeprefix("## ") for line in text.splitlines() if line.startswith("## ")]
    assert titles == [
        *("Metrics", "Loss curves", "Confusion: emotion", "Confusion: intent", "Modality weights α", "Calibration"),
        *("Throughput and input wait", "Truncation", "Data", "Versions", "Commands", "Configuration"),
    ]
    assert {path.stem for path in folder.glob("*.png")} == {
        *("metrics", "loss_curves", "emotion_confusion", "intent_confusion", "modality_weights"),
        *("emotion_reliability", "intent_reliability", "throughput"),
    }


def test_simulated_data_are_called_simulated(simulated_run):
    text = (simulated_run / "eval" / "test_report" / "report.md").read_text()
    assert "simulated" in text.splitlines()[0]
    assert "**Simulated.**" in text


def test_every_metric_stands_in_the_table_with_an_interval_around_it_beside_its_ceiling(simulated_run):
    summary = read_summary(simulated_run / "eval" / "test_report")
    rows = rows_of(section((simulated_run / "eval" / "test_report" / "report.md").read_text(), "Metrics"))
    for name, value in summary["metrics"].items():
        (cells,) = [cells for metric, cells in rows.items() if metric.removesuffix(" (less is better)") == name]
        assert cells[0] == f"{value:.4f}"
        if name.split("/")[0] == "loss":
            assert cells[1] == "–"
        else:
            low, high = map(float, cells[1].partition(" (")[0].split(" to "))
            assert low <= float(cells[0]) <= high or name.split("/")[1] in ("macro_precision", "f1_of_macro")
    assert rows["emotion/accuracy"][2] == f"{summary['reference']['emotion/accuracy']:.4f}"
    assert rows["ranking/map"][2] == f"{summary['reference']['ranking/map']:.4f}"


def test_conditions_of_the_run_are_told(data, simulated_run):
    text = (simulated_run / "eval" / "test_report" / "report.md").read_text()
    manifest = json.loads((data / "manifest.json").read_text())
    told = section(text, "Data")
    for shard in [
        *(shard for split in manifest["splits"].values() for shard in split["shards"]),
        manifest["catalogue"],
    ]:
        assert shard["sha256"] in told
    assert manifest["spec"]["licence"] in told
    assert read_summary(simulated_run / "eval" / "test_report")["manifest_sha256"] in told
    assert "python train.py --config=it\npython eval.py --workdir=runs/it" in section(text, "Commands")
    environment = json.loads((simulated_run / "environment.json").read_text())
    assert rows_of(section(text, "Versions"))["jax"] == [environment["versions"]["jax"]] * 2
    block = section(text, "Configuration").partition("```json\n")[2].partition("```")[0]
    assert json.loads(block) == json.loads((simulated_run / "config.json").read_text())
    assert "× cpu" in section(text, "Throughput and input wait")


def test_alpha_by_emotion_and_by_subset_is_the_mean_of_the_predictions(simulated_run):
    import pandas as pd

    frame = pd.read_parquet(simulated_run / "eval" / "test_predictions.parquet")
    rows = rows_of(section((simulated_run / "eval" / "test_report" / "report.md").read_text(), "Modality weights α"))
    weights = ["alpha_vision", "alpha_audio", "alpha_text"]
    joyful = frame[frame["emotion_label"] == 1]
    assert rows["joy"] == [str(len(joyful)), *(f"{value:.3f}" for value in joyful[weights].mean())]
    without_vision = frame[~frame["has_vision"] & frame["has_audio"] & frame["has_text"]]
    assert rows["audio + text"] == [
        str(len(without_vision)),
        *(f"{value:.3f}" for value in without_vision[weights].mean()),
    ]


def test_columns_of_the_predictions_are_those_that_the_page_lists(simulated_run):
    rows = markdown.tables(markdown.read("docs/read_our_shards.md"))["column | content"][1:]
    listed = {name for row in rows for name in re.findall(r"`([\w@]+)`", row[0])}
    written = pq.read_schema(simulated_run / "eval" / "test_predictions.parquet").names
    # A regression's answer stands in place of probabilities; tests of the variants hold its columns.
    assert set(written) == listed - {"emotion_value"}


def test_same_inputs_give_the_same_bytes_in_another_process(simulated_run):
    folder = simulated_run / "eval" / "test_report"
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    program = (
        "import sys; from pathlib import Path; from mmei_jax.reports.report import write_report\n"
        "write_report(Path(sys.argv[1]), 'test', command='python eval.py --workdir=runs/it')"
    )
    # Another one than this process has.
    hash_seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": processes.PYTHONPATH}
    command = [sys.executable, "-c", program, str(simulated_run)]
    subprocess.run(command, cwd=folder.parent, env=environment, check=True, capture_output=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first


def test_interrupted_writing_leaves_the_old_report_and_nothing_else(simulated_run, monkeypatch, quick_report):
    folder = simulated_run / "eval" / "test_report"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    write, written = Path.write_bytes, []

    def write_until_full(path, content):
        written.append(path)
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", write_until_full)
    with pytest.raises(OSError, match="No space left"):
        write_report(simulated_run, "test")
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert sorted(path.name for path in folder.parent.iterdir()) == [
        "test.json",
        "test_predictions.parquet",
        "test_report",
    ]


def test_report_without_ranking_data_says_so(tmp_path, monkeypatch, quick_report):
    """Slates to learn from, and no list of relevant items to measure by."""
    spec, columns = aigc_int_dataset._spec, aigc_int_dataset._columns
    without = {"_spec": {"has_relevant_items": False}, "_columns": {"relevant_items": None}}
    for name, made in {"_spec": spec, "_columns": columns}.items():

        def make(*arguments, made=made, changes=without[name]):
            return dataclasses.replace(made(*arguments), **changes)

        monkeypatch.setattr(aigc_int_dataset, name, make)
    data, workdir = tiny.make_dataset(tmp_path / "data"), tmp_path / "run"
    small = dict(data__modalities=("text",), loss__intent="none", train__num_epochs=1)
    train(tiny.config(data, **small, **tiny.LEAST), workdir)
    evaluate_workdir(workdir, "test")
    folder = write_report(workdir, "test")
    text = (folder / "report.md").read_text()
    assert_complete(folder)
    assert "No ranking metrics: no record of this split lists relevant items." in text
    assert "### Ranking" not in text
    assert "ranking/map" in section(text, "Metrics").partition("Undefined on this split")[2]
    # The log holds the same metrics, undefined at each evaluation.
    logged = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["validation/ranking/map"] for line in logged if "validation/ranking/map" in line] == [None]
    assert "loss_curves.png" in text


def test_report_of_few_users_has_no_intervals_and_says_so(simulated_run, tmp_path, quick_report):
    workdir = shutil.copytree(simulated_run, tmp_path / "run")
    path = workdir / "eval" / "test_predictions.parquet"
    table = pq.read_table(path)
    users = pa.array([f"user{row % 2}" for row in range(len(table))], table.schema.field("user_id").type)
    pq.write_table(table.set_column(table.column_names.index("user_id"), "user_id", users), path)
    folder = write_report(workdir, "test")
    text = (folder / "report.md").read_text()
    assert_complete(folder)
    assert "**No intervals**: too few users (2) for an interval, which takes at least 10" in text
    assert "Metrics without an interval say why." in text
    cells = rows_of(section(text, "Metrics"))
    assert cells["emotion/accuracy"][1] == cells["ranking/map"][1] == "too few users (2)"
    assert cells["loss (less is better)"][1] == "–"
    assert rows_of(section(text, "Calibration"))["emotion"][1] == "too few users (2)"


def test_report_of_an_unfinished_run_says_so(simulated_run, tmp_path, quick_report):
    finished = (simulated_run / "eval" / "test_report" / "report.md").read_text()
    assert "unfinished" not in finished
    workdir = shutil.copytree(simulated_run, tmp_path / "run")
    lines = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["step"] <= 9]
    (workdir / "metrics.jsonl").write_text("".join(kept))
    text = (write_report(workdir, "test") / "report.md").read_text()
    assert rows_of(text)["training"][0].startswith("**unfinished**: at step 9, epoch 1.03 of 2;")
    # It stopped early where patience had run out, and was not to go on.
    values = json.loads((workdir / "config.json").read_text())
    values["train"]["patience_evaluations"] = 1
    (workdir / "config.json").write_text(json.dumps(values))
    worse = {**json.loads(kept[-1]), "validation/mean_accuracy": -1.0, "step": 10}
    (workdir / "metrics.jsonl").write_text("".join([*kept, json.dumps(worse) + "\n"]))
    assert "unfinished" not in (write_report(workdir, "test") / "report.md").read_text()


def test_report_without_intent_and_ranking_says_so(report_on):
    text, folder = report_on("softmax", "test")
    assert_complete(folder)
    assert text.count("No intent task: config.loss.intent is none.") == 3
    assert "No ranking task: config.loss.ranking is none." in text
    assert "### Ranking" not in text
    assert "imulated" not in text
    # Python code trained and evaluated.
    assert "The training command was not recorded" in text


def test_class_without_records_is_named_and_has_no_recall(report_on):
    text, folder = report_on("softmax", "without_joy")
    assert_complete(folder)
    assert "**Without any record in this split: joy.**" in text
    rows = rows_of(section(text, "Confusion: emotion"))
    assert rows["joy"][0] == "0"
    assert rows["joy"][3] == "no records"
    # What it does to macro averages depends on whether the model names it.
    sentence = "In macro averages a class without records that the model names counts with recall 0"
    assert (sentence in text) == (rows["joy"][1] != "0")
    assert ("left out of macro averages: joy." in text) == (rows["joy"][1] == "0")
    assert sentence not in report_on("softmax", "test")[0]
    assert rows["neutral"][0] == rows["anger"][0] == "6"
    assert rows_of(section(text, "Modality weights α"))["joy"] == ["0", "–", "–", "–"]


def test_modality_absent_everywhere_is_told_and_weighs_nothing(report_on):
    text, folder = report_on("softmax", "without_audio")
    assert_complete(folder)
    weights = section(text, "Modality weights α")
    assert "**No record of this split has audio**: its weight is 0 throughout." in weights
    groups = rows_of(weights)
    assert set(groups) == {"records", "---", *EMOTIONS, "vision + text", "vision"}
    for name in ("vision + text", "vision"):
        assert groups[name][2] == "0.000"
    assert groups["vision"][1:] == ["1.000", "0.000", "0.000"]
    assert "alpha/audio" in text.partition("Undefined on this split")[2]


def test_single_record_has_figures_without_intervals(report_on):
    text, folder = report_on("softmax", "single")
    assert_complete(folder)
    assert "**a single record**" in text
    assert "**No intervals**: the split holds a single record" in text
    cells = rows_of(section(text, "Metrics"))["emotion/accuracy"]
    assert cells[0] in ("0.0000", "1.0000")
    assert cells[1] == "too few records (1)"


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] if kind == "regression" else []) for kind in KINDS]
)
def test_split_without_labels_says_that_nothing_was_measured(report_on, kind):
    text, folder = report_on(kind, "unlabelled")
    assert_complete(folder)
    assert "No record of this split carries the label of emotion." in section(text, "Calibration")
    assert "emotion/" in text.partition("Undefined on this split")[2]


def test_several_emotions_at_once_have_a_matrix_and_a_curve_each(report_on):
    text, folder = report_on("sigmoid", "without_joy")
    assert_complete(folder)
    table = pq.read_table(folder.parent / "test_predictions.parquet")
    labels = np.array(table["emotion_label"].to_pylist())
    named = np.array(table["emotion_choice"].to_pylist())
    rows = rows_of(section(text, "Confusion: emotion"))
    for place, name in enumerate(EMOTIONS):
        assert rows[name][:2] == [str(int(labels[:, place].sum())), str(int(named[:, place].sum()))]
    assert "**Without any record in this split: joy.**" in text
    assert "In macro-F1, which averages over all classes, each counts with F1 0." in text
    assert set(EMOTIONS) <= set(rows_of(section(text, "Calibration")))


def test_regression_has_residuals_in_place_of_classes(report_on):
    text, folder = report_on("regression", "test")
    assert_complete(folder)
    metrics = read_summary(folder)["metrics"]
    assert "Emotion is a regression and has no classes" in section(text, "Confusion: emotion")
    expected = f"MAE {metrics['emotion/mae']:.4f}, Pearson correlation {metrics['emotion/pearson']:.4f}."
    assert expected in section(text, "Calibration")
    assert {"negative", "zero", "positive"} <= set(rows_of(section(text, "Modality weights α")))


def test_regression_of_a_single_record_has_no_correlation(report_on):
    text, folder = report_on("regression", "single")
    assert_complete(folder)
    assert "Pearson correlation undefined" in text


def test_run_without_a_log_says_so(simulated_run, tmp_path, quick_report):
    workdir = shutil.copytree(simulated_run, tmp_path / "run")
    (workdir / "metrics.jsonl").unlink()
    (workdir / "environment.json").unlink()
    folder = write_report(workdir, "test")
    text = (folder / "report.md").read_text()
    assert_complete(folder)
    assert "No loss curves: metrics.jsonl" in text
    assert "No throughput" in text
    assert "not recorded" in section(text, "Versions")


def test_report_before_an_evaluation_is_refused_in_one_line(simulated_run, tmp_path):
    workdir = shutil.copytree(simulated_run, tmp_path / "run")
    (workdir / "eval" / "test_predictions.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(InputError, match=r"test_predictions\.parquet: expected the predictions"):
        write_report(workdir, "test")
    shutil.rmtree(workdir / "eval")
    with pytest.raises(InputError, match=r"test\.json: expected what train\.py or eval\.py wrote"):
        write_report(workdir, "test")
