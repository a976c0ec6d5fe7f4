"""A table: rows, search, seeds, evaluation and report, as train.py and eval.py make it."""

import csv
import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import sklearn.metrics
from scipy import stats

from configs import table1_small
from mmei_jax import command, replica_training
from mmei_jax.evaluation import Evaluator
from mmei_jax.part_times import PartTimes, by_part
from mmei_jax.records import Dataset, Producer
from mmei_jax.reports import table_sections
from mmei_jax.reports.claims import online_claims
from mmei_jax.reports.evaluated_table import read_table
from mmei_jax.reports.main_table import encoders_text, main_section
from mmei_jax.reports.paired_resampling import ResampledMeans, resample_rows
from mmei_jax.reports.paper_table import PAPER_METRICS, PAPER_TABLE
from mmei_jax.reports.record_table import read_record_table
from mmei_jax.reports.resampling import resampling_units
from mmei_jax.reports.table_report import write_table_report
from mmei_jax.reports.training_times import times_sections
from mmei_jax.robustness import measure_robustness
from mmei_jax.robustness_metrics import Grid
from mmei_jax.sharding import make_evaluation_mesh
from mmei_jax.state import build_model
from mmei_jax.table_config import parse_table, search_points
from mmei_jax.table_evaluation import evaluate_table
from mmei_jax.table_training import read_row, train_table
from mmei_jax.training import train
from mmei_jax.types import InputError, OutOfMemoryError
from mmei_jax.workdir import StopRequest
from tests import processes, tiny

RESAMPLES = 20


def table_dict(data, **changes):
    """Two rows that compile in a second, a search of two points, two seeds."""
    config = tiny.config_dict(data, train__num_epochs=2, model__architecture="pooled_logistic")
    config.table = ml_collections.ConfigDict(
        {
            "title": "A table",
            "order": ("text_only", "pooled_logistic"),
            "rows": {"text_only": {"data": {"modalities": ("text",)}}, "pooled_logistic": {}},
            "reference_row": "pooled_logistic",
            "num_seeds": 2,
            "updates_per_dispatch": 5,
            "memory_limit_gib": 0.0,
            "search": {
                "kind": "random",
                "num_points": 2,
                "seed": 7,
                "num_epochs": 1,
                "ranges": (("optimizer.learning_rate", "log", 1e-4, 1e-2), ("model.dropout_rate", "linear", 0.0, 0.3)),
                "grid": (),
            },
        }
    )
    values = config.to_dict()
    for dotted, value in changes.items():
        *groups, key = dotted.split("__")
        place = values
        for group in groups:
            place = place[group]
        place[key] = value
    return values


def run(values, workdir):
    return train_table(parse_table(values), values, workdir, command=None)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("table")
    values = table_dict(data)
    assert run(values, workdir).finished == ("text_only", "pooled_logistic")
    return workdir, values


@pytest.fixture(scope="module")
def evaluated(trained):
    workdir, _ = trained
    evaluate_table(workdir)
    return workdir, write_table_report(workdir, "test", command="python eval.py", num_resamples=RESAMPLES)


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_search_chooses_the_best_point_on_validation_and_every_seed_trains_with_it(trained):
    workdir, values = trained
    points = search_points(parse_table(values).search)
    for name in ("text_only", "pooled_logistic"):
        search = json.loads((workdir / "rows" / name / "search.json").read_text())
        assert [{key: point[key] for key in points[0]} for point in search["points"]] == points
        assert search["metric"] == "validation/mean_accuracy"
        # The search's own seed, not that of the row's first replica, 0.
        assert search["seed"] == 7
        best = int(np.argmax([point["value"] for point in search["points"]]))
        assert search["chosen"] == points[best]
        row = read_row(workdir, name)
        assert row.config.optimizer.learning_rate == points[best]["optimizer.learning_rate"]
        assert row.summary["seeds"] == [0, 1]
        assert not list((workdir / "rows" / name).glob("seeds*"))


def test_row_trained_alone_has_the_same_validation_metrics(trained, tmp_path):
    """What a replica is at its best is what ``train`` keeps as the best checkpoint of the same configuration."""
    workdir, _ = trained
    row = read_row(workdir, "pooled_logistic")
    train(row.config, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    values = [line["validation/mean_accuracy"] for line in lines if "validation/mean_accuracy" in line]
    history = [part["value"][0] for part in row.summary["history"][0]["evaluations"]]
    np.testing.assert_allclose(history, values, atol=1e-6)
    assert row.summary["best_values"][0] == pytest.approx(max(values), abs=1e-6)


def test_metrics_of_replicas_are_those_of_each_alone(evaluated):
    workdir, _ = evaluated
    found = json.loads((workdir / "eval" / "test.json").read_text())["rows"]["pooled_logistic"]["metrics"]
    row = read_row(workdir, "pooled_logistic")
    dataset = Dataset.open(row.config.data.path)
    evaluator = Evaluator(build_model(row.config, dataset), row.config, dataset, make_evaluation_mesh())
    for index, metrics in enumerate(found):
        variables = jax.tree.map(lambda leaf, index=index: leaf[index], row.variables)
        alone = evaluator.measure(variables, ("test",))
        assert metrics.keys() == {name for name, value in alone.items() if np.isfinite(value)}
        for name, value in metrics.items():
            assert value == pytest.approx(alone[name], abs=1e-5), name


def test_evaluation_and_report_twice_give_the_same_bytes(evaluated, tmp_path):
    workdir, folder = evaluated
    before = files_of(workdir / "eval")
    again = tmp_path / "again"
    shutil.copytree(workdir, again)
    shutil.rmtree(again / "eval")
    evaluate_table(again)
    write_table_report(again, "test", command="python eval.py", num_resamples=RESAMPLES)
    assert files_of(again / "eval") == before
    assert {"report.md", "report.html", "table.csv", "table.tex", "loss.png"} <= {
        path.name for path in folder.iterdir()
    }


def test_report_prints_means_and_deviations_of_the_seeds_and_says_simulated(evaluated):
    workdir, folder = evaluated
    rows = json.loads((workdir / "eval" / "test.json").read_text())["rows"]
    text = (folder / "report.md").read_text()
    for name, row in rows.items():
        values = np.array([found["emotion/accuracy"] for found in row["metrics"]])
        assert f"{values.mean():.3f} ± {values.std(ddof=1):.3f}" in text, name
    assert "text only (the place of Text-BERT)" in text
    assert "| 0.812 |" in text
    for heading in (
        "Finding",
        "## A table\n",
        "Against pooled_logistic",
        "Emotion by class",
        "Intent by class",
        "α by emotion",
        "Robustness",
        "Training",
        "Search on",
    ):
        assert heading in text
    assert text.count("(simulated)") >= 6
    lines = list(csv.DictReader((folder / "table.csv").read_text().splitlines()))
    order = ("text_only", "pooled_logistic")
    assert [(line["row"], line["seed"]) for line in lines] == [(name, str(seed)) for name in order for seed in (0, 1)]
    assert float(lines[0]["emotion/accuracy"]) == rows["text_only"]["metrics"][0]["emotion/accuracy"]
    latex = (folder / "table.tex").read_text()
    # A heading, the rows, the ceiling of words alone, that of everything and that of late fusion.
    assert latex.count(r" \\") == 1 + len(rows) + 3
    assert latex.count("exact posterior of text alone") == 1
    assert r"\caption{A table: AIGC-INT-Sim (simulated), test split. Emotion and ranking (simulated), mean" in latex
    known = Dataset.open(read_row(workdir, "text_only").config.data.path).reference("test")
    ceiling = cells_of(text, "A table", "*exact posterior of text alone*")
    assert ceiling[1] == f"{known['emotion/accuracy[text, every record]']:.3f}"
    # The paper's numbers are of its own rows.
    assert "The paper's claims" not in text
    assert not (folder / "claims.md").exists()


def test_row_without_a_task_has_no_difference_in_it(evaluated):
    class Means(ResampledMeans):
        def __init__(self):
            pass

        def difference(self, other, metric):
            return (np.nan,) * 3 if metric == "emotion/cross_entropy" else (0.25, 0.125, 0.5)

    first, reference = read_table(evaluated[0], "test").rows
    means = {row.name: Means() for row in (first, reference)}
    printed = table_sections.comparison_section([first, reference], reference, means, "", 10).blocks[2]
    assert "nan" not in printed
    titles, _, cells = ([part.strip() for part in line.split("|")] for line in printed.splitlines())
    assert cells[titles.index("emotion/accuracy")] == "+0.250 [+0.125, +0.500]"
    assert cells[titles.index("emotion/cross_entropy")] == ""


def times_of(workdir, name):
    return json.loads((workdir / "rows" / name / "times.json").read_text())


def test_report_tells_where_the_time_of_each_row_went(evaluated, tmp_path):
    workdir, folder = evaluated
    text, total = (folder / "report.md").read_text(), 0.0
    for name, title in (
        ("text_only", "text only (the place of Text-BERT)"),
        ("pooled_logistic", "*logistic regression"),
    ):
        times = times_of(workdir, name)
        assert times.keys() == {"start", "search", "seeds"}
        parts = by_part(times)
        assert parts.keys() == {"data", "compilation", "updates", "evaluation", "checkpoints", "other"}
        cells = cells_of(text, "Time of the training", title)
        whole = sum(parts.values())
        assert cells[:2] == [f"{whole:,.1f}", f"{sum(times['search'].values()):,.1f}"]
        assert sorted(cells[2:]) == sorted(f"{value:,.1f}" for value in parts.values())
        total += whole
    assert cells_of(text, "Time of the training", "all rows")[0] == f"{total:,.1f}"
    # A table that an earlier version trained has no such file.
    assert times_sections(tmp_path, read_table(workdir, "test").rows) == []


def test_stopped_training_goes_on_and_ends_as_one_that_was_not(trained, tmp_path, monkeypatch):
    workdir, values = trained

    class StopAfter(StopRequest):
        """Asks to stop at the seeds' first evaluation: asked before the row, at the search's, before the seeds."""

        count = 0

        def __bool__(self):
            StopAfter.count += 1
            self.signal_name = "SIGTERM" if StopAfter.count >= 4 else ""
            return bool(self.signal_name)

    with monkeypatch.context() as patch:
        patch.setattr("mmei_jax.workdir.StopRequest", StopAfter)
        result = run(values, tmp_path)
    assert (result.stopped_by, result.finished) == ("SIGTERM", ())
    assert (tmp_path / "rows" / "text_only" / "search.json").exists()
    before = times_of(tmp_path, "text_only")
    assert run(values, tmp_path).finished == ("text_only", "pooled_logistic")
    after = times_of(tmp_path, "text_only")
    # The second command's time is added to the first one's; it made no search.
    assert after["search"] == before["search"]
    assert after["seeds"]["updates"] > before["seeds"]["updates"] > 0.0
    assert after["start"]["data"] > before["start"]["data"]
    for name in ("text_only", "pooled_logistic"):
        ours, theirs = read_row(tmp_path, name), read_row(workdir, name)
        assert ours.search == theirs.search
        assert ours.summary["best_values"] == theirs.summary["best_values"]
        for group in ("params", "statistics"):
            np.testing.assert_equal(ours.variables[group], theirs.variables[group])


def test_too_little_memory_splits_the_replicas_into_groups_with_the_same_results(trained, data, tmp_path, monkeypatch):
    workdir, values = trained
    groups = []
    original = replica_training._Trainer.train
    monkeypatch.setattr(replica_training.Replicas, "peak_bytes", lambda self, *_: 2**30 * len(self.seeds))

    def note(self, varied, *arguments):
        groups.append(len(varied["seed"]))
        return original(self, varied, *arguments)

    monkeypatch.setattr(replica_training._Trainer, "train", note)
    values = {**values, "table": {**values["table"], "memory_limit_gib": 1.5}}
    values["table"]["rows"] = {"pooled_logistic": values["table"]["rows"]["pooled_logistic"]}
    values["table"] |= {"order": ("pooled_logistic",), "reference_row": "pooled_logistic"}
    run(values, tmp_path)
    assert groups == [1, 1, 1, 1]
    np.testing.assert_allclose(
        read_row(tmp_path, "pooled_logistic").summary["best_values"],
        read_row(workdir, "pooled_logistic").summary["best_values"],
        atol=1e-6,
    )
    with pytest.raises(InputError, match=r"1 replicas need 1\.00 GiB on a device: expected at most 0\.40 GiB"):
        run({**values, "table": {**values["table"], "memory_limit_gib": 0.5}}, tmp_path / "other")


REFUSED = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20G of 16G"
MEMORY_KINDS = ("parameters", "optimizer state", "state copies", "gradients", "records", "plans", "activations")


def told(values, workdir, capsys):
    """What the command prints of a table that ends with an error."""
    assert command.report_errors(lambda: len(run(values, workdir).finished)) == command.EXIT_INPUT_ERROR
    first, *details = capsys.readouterr().err.splitlines()
    for kind in (*MEMORY_KINDS, "together"):
        assert any(re.match(rf"  {kind} +[\d.]+ \w+ +\d+%", line) for line in details), kind
    settings = [line for line in details if line.startswith(("  --config.", "  '--config."))]
    assert len(settings) == 3
    assert all(re.search(r": about [\d.]+ \w+ less", line) for line in settings)
    return first, settings


def test_row_that_no_machine_holds_is_told_with_table_and_settings(data, tmp_path, capsys):
    """What the compiler needs for one replica, and what this machine has."""
    row = {"data": {"modalities": ("text",), "max_tokens": {"text": (16,)}}}
    first, settings = told(table_dict(data, model__embedding_dim=2**40, table__rows__text_only=row), tmp_path, capsys)
    assert re.match(r"error: 1 replicas need \d{5,}\.\d\d GiB on a device: expected at most [\d.]+ GiB$", first)
    # The row has a length of its own, which decides.
    assert any(line.startswith("  '--config.table.rows.text_only.data.max_tokens.text=(8,)': ") for line in settings)


def test_replicas_that_run_out_are_told_with_table_and_settings(data, tmp_path, monkeypatch, capsys):
    """An update allocates what no machine has: the runtime's own error."""

    def update(self, *_):
        return jax.jit(lambda: jnp.zeros(2**46, jnp.int8))().block_until_ready()

    monkeypatch.setattr(replica_training.Replicas, "update", update)
    first, settings = told(table_dict(data), tmp_path, capsys)
    assert first.startswith("error: out of memory: the memory of a device (cpu) does not hold the replicas of 'text_")
    # Half of the replicas halve all but the records.
    limit = re.match(r"  --config.table.memory_limit_gib=([\d.e-]+): .*the same numbers, about 1 replicas", settings[0])
    assert 0.0 < float(limit[1]) < 1.0


def test_replicas_that_the_compiler_refuses_train_in_smaller_groups(data, tmp_path, monkeypatch):
    config = tiny.config(data, model__architecture="pooled_logistic")
    varied, most = {"seed": [0, 1, 2, 3]}, [2]

    def peak_bytes(self, *_):
        if len(self.seeds) > most[0]:
            raise jax.errors.JaxRuntimeError(REFUSED)
        return 1

    monkeypatch.setattr(replica_training.Replicas, "peak_bytes", peak_bytes)
    dataset, budget, stop = Dataset.open(config.data.path), replica_training.Budget(2, 0), StopRequest()
    times = PartTimes(tmp_path / "times.json")
    trainer = replica_training._Trainer(config, dataset, budget, stop, times, lambda key: key)
    assert trainer.group_sizes(varied, tmp_path) == [2, 2]
    most[0] = 0
    monkeypatch.setattr(replica_training, "replica_memory_lines", lambda *_, **__: ["what they need"])
    message = r"does not hold the replicas of 'a row': Ran out of .* space hbm"
    with times.stage("seeds"), pytest.raises(OutOfMemoryError, match=message) as told:
        replica_training.train_replicas(config, varied, dataset, tmp_path / "other", budget, stop, times, title="a row")
    assert told.value.details == ("what they need",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"table__num_seeds": 0}, "config.table.num_seeds = 0: expected at least 1"),
        ({"table__reference_row": "mmei"}, "config.table.reference_row = 'mmei': expected one of text_only, pooled"),
        ({"table__order": ("text_only",)}, "config.table.order = .*expected each row of config.table.rows once"),
        ({"table__rows__text_only": {"data": {"colour": 1}}}, "config.table.rows.text_only.data.colour: unknown key"),
        ({"table__rows__text_only": {"model": {"dim": 15}}}, "row 'text_only': config.model.num_heads = 2"),
        ({"table__search__kind": "grid"}, "config.table.search.ranges"),
        ({"table__search__ranges": (("model.dim", "log", 1.0, 2.0),)}, "config.table.search = 'model.dim'"),
        (
            {"table__search__ranges": (("model.dropout_rate", "linear", 0.9, 1.5),), "table__search__num_points": 40},
            "config.table.search: model.dropout_rate = 1",
        ),
        ({"table__search__ranges": (("optimizer.learning_rate", "log", 0.0, 1.0),)}, "above 0 on the scale 'log'"),
        ({"train__best_metric": "test/emotion/accuracy"}, "a model must not be selected on test data"),
        ({"data__validation_splits": ("test",)}, "training data must not be tested on"),
    ],
)
def test_what_does_not_fit_is_one_line(data, changes, message):
    with pytest.raises(InputError, match=message) as caught:
        parse_table(table_dict(data, **changes))
    assert "\n" not in str(caught.value)


def test_other_configuration_in_the_same_folder_is_refused(trained):
    workdir, values = trained
    with pytest.raises(InputError, match="begun with another configuration"):
        run({**values, "seed": 5}, workdir)


def test_row_that_is_not_trained_is_named(data, tmp_path):
    (tmp_path / "table.json").write_text(json.dumps(table_dict(data)))
    with pytest.raises(InputError, match=r"rows/text_only: not trained yet"):
        evaluate_table(tmp_path)


@pytest.mark.parametrize("text", ["{}", "[]", "{"])
def test_damaged_table_is_named(tmp_path, text):
    (tmp_path / "table.json").write_text(text)
    with pytest.raises(InputError, match=r"table\.json: expected the table that train\.py wrote"):
        evaluate_table(tmp_path)


def test_point_that_diverges_is_not_chosen(data, tmp_path):
    changes = {"kind": "grid", "ranges": (), "grid": (("optimizer.learning_rate", (1e30, 1e-3)),), "num_points": 0}
    values = table_dict(data, **{f"table__search__{key}": value for key, value in changes.items()}, table__num_seeds=1)
    run(values, tmp_path)
    search = json.loads((tmp_path / "rows" / "text_only" / "search.json").read_text())
    assert search["chosen"] == {"optimizer.learning_rate": 1e-3}
    assert [point["has_diverged"] for point in search["points"]] == [True, False]
    assert search["points"][0]["value"] is None


def test_grid_is_the_product_of_its_values(data):
    grid = (("optimizer.learning_rate", (1e-3, 1e-2)), ("loss.ranking_weight", (0.1, 0.5, 1.0)))
    changes = {"kind": "grid", "ranges": (), "grid": grid, "num_points": 0}
    values = table_dict(data, **{f"table__search__{key}": value for key, value in changes.items()})
    points = search_points(parse_table(values).search)
    assert len(points) == 6
    assert points[-1] == {"optimizer.learning_rate": 1e-2, "loss.ranking_weight": 1.0}


def test_random_points_are_those_of_their_seed_and_lie_in_their_ranges(data):
    search = parse_table(table_dict(data, table__search__num_points=200)).search
    points = search_points(search)
    assert points == search_points(search)
    rates = np.array([point["optimizer.learning_rate"] for point in points])
    assert ((rates >= 1e-4) & (rates <= 1e-2)).all()
    # Even on the logarithm: half of them below the geometric middle.
    assert 0.4 < (rates < 1e-3).mean() < 0.6


def test_paired_differences_are_those_of_the_same_draws(evaluated):
    workdir, _ = evaluated
    rows = json.loads((workdir / "eval" / "test.json").read_text())["rows"]
    records = {}
    for name, row in rows.items():
        classes = Dataset.open(read_row(workdir, name).config.data.path).spec.labels
        records[name] = [
            read_record_table(
                workdir / "eval" / "test" / name / f"seed_{seed}_predictions.parquet",
                "softmax",
                classes["emotion"].class_names,
                classes["intent"].class_names,
            )
            for seed in row["seeds"]
        ]
    metrics = ["emotion/accuracy", "ranking/map"]
    means = resample_rows(records, metrics, num_resamples=200)
    ours, other = means["pooled_logistic"], means["text_only"]
    for metric in metrics:
        averages = [
            np.mean([found[metric] for found in rows[name]["metrics"]]) for name in ("pooled_logistic", "text_only")
        ]
        value, low, high = ours.difference(other, metric)
        assert value == pytest.approx(averages[0] - averages[1], abs=1e-6)
        assert low <= value <= high
        assert ours.value(metric)[0] == pytest.approx(averages[0], abs=1e-6)
        assert ours.relative_change(other, metric)[0] == pytest.approx(averages[0] / averages[1] - 1, abs=1e-5)
    assert ours.difference(ours, "emotion/accuracy") == (0.0, 0.0, 0.0)
    # By hand: the accuracy of one seed under each draw of the same generator.
    table = records["pooled_logistic"][0]
    alone = resample_rows({"one": [table]}, ["emotion/accuracy"], num_resamples=3, seed=4)["one"]
    generator, hits = np.random.default_rng(4), table.emotion.choice == table.emotion.label
    _, unit = resampling_units(table.user_ids)
    for place in range(3):
        count = unit.max() + 1
        weights = np.bincount(generator.integers(0, count, count), minlength=count)[unit]
        assert alone.draws[place, 0] == pytest.approx((hits * weights).sum() / weights.sum())


def test_rows_of_other_records_are_not_compared(evaluated):
    records = {row.name: row.records for row in read_table(evaluated[0], "test").rows}
    part = records["text_only"][1]
    swapped = [*part.ids[:2], part.ids[3], part.ids[2], *part.ids[4:]]
    for ids in (swapped, part.ids[:-1]):
        other = {**records, "text_only": [records["text_only"][0], dataclasses.replace(part, ids=ids)]}
        place = 2 if ids is swapped else len(part.ids) - 1
        with pytest.raises(InputError, match=f"and '[a-z_]+' have other records, first at place {place}: ") as caught:
            resample_rows(other, ["emotion/accuracy"], num_resamples=2)
        assert "\n" not in str(caught.value)


def test_unimodal_row_bears_the_papers_name_where_the_papers_encoder_ran(evaluated):
    row = next(row for row in read_table(evaluated[0], "test").rows if row.name == "text_only")
    assert row.title == "text only (the place of Text-BERT)"
    for name, modality, kind, title in (
        ("text_only", "text", "bert", "Text-BERT"),
        ("vision_only", "vision", "resnet", "Visual-ResNet50"),
        ("audio_only", "audio", "audio_cnn", "Audio-CNN"),
        ("vision_only", "vision", "vit", "vision only (the place of Visual-ResNet50)"),
    ):
        producer = Producer(encoder=f"{kind} random weights, seed 3")
        assert dataclasses.replace(row, name=name, producers={modality: producer}).title == title


def test_encoders_are_told_by_row_with_their_weights(evaluated):
    rows = read_table(evaluated[0], "test").rows
    # What the simulation draws is no network's.
    assert encoders_text(rows) == ""
    given, drawn = (
        Producer(encoder="bert google-bert/bert-base-uncased"),
        Producer(encoder="vit random weights, seed 3"),
    )
    rows = [
        dataclasses.replace(row, producers={"text": given} if row.name == "text_only" else {"vision": drawn})
        for row in rows
    ]
    text = encoders_text(rows)
    assert "Text-BERT: text by BERT (given weights: google-bert/bert-base-uncased); data set AIGC-INT-Sim" in text
    assert "regression on means*: vision by ViT (random weights, seed 3); data set AIGC-INT-Sim" in text
    assert encoders_text(rows) in main_section(rows, "Title", "").blocks


def cells_of(text, heading, row, table=0):
    """The cells of a row in one of the tables of a report's section."""
    section = text.split(f"## {heading}")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith(f"| {row} ")]
    return [cell.strip() for cell in lines[table].strip("|").split("|")][1:]


def test_report_compares_rows_over_their_seeds(evaluated):
    workdir, folder = evaluated
    rows = json.loads((workdir / "eval" / "test.json").read_text())["rows"]
    ours, other = (
        np.array([found["emotion/accuracy"] for found in rows[name]["metrics"]])
        for name in ("text_only", "pooled_logistic")
    )
    low, high = stats.ttest_rel(ours, other).confidence_interval(0.95)
    printed = cells_of(
        (folder / "report.md").read_text(), "Against pooled_logistic", "text only (the place of Text-BERT)", table=1
    )
    assert printed[0] == f"{(ours - other).mean():+.3f} [{low:+.3f}, {high:+.3f}]"


def test_scores_by_class_are_those_of_scikit_learn(evaluated):
    workdir, folder = evaluated
    row = read_row(workdir, "text_only")
    names = Dataset.open(row.config.data.path).spec.labels["emotion"].class_names
    scores = []
    for seed in (0, 1):
        path = workdir / "eval" / "test" / "text_only" / f"seed_{seed}_predictions.parquet"
        emotion = read_record_table(path, "softmax", names, ()).emotion
        label, choice = emotion.label[emotion.is_labelled], emotion.choice[emotion.is_labelled]
        scores.append(sklearn.metrics.f1_score(label, choice, labels=range(len(names)), average=None, zero_division=0))
    occurs = np.isin(np.arange(len(names)), label)
    found = cells_of((folder / "report.md").read_text(), "Emotion by class", "text only (the place of Text-BERT)")
    for place in np.flatnonzero(occurs):
        one = np.array(scores)[:, place]
        assert found[place] == f"{one.mean():.3f} ± {one.std(ddof=1):.3f}"


def test_robustness_of_rows_is_that_of_their_first_seed(evaluated):
    workdir, folder = evaluated
    card = json.loads((workdir / "eval" / "test_robustness.json").read_text())
    assert [model["name"] for model in card["models"]] == ["pooled_logistic"]
    row = read_row(workdir, "pooled_logistic")
    dataset = Dataset.open(row.config.data.path)
    variables = jax.tree.map(lambda leaf: leaf[0], row.variables)
    grid = Grid(("vision", "audio", "text"), (0.0,), (0.0,))
    model = build_model(row.config, dataset)
    alone = measure_robustness(model, row.config, dataset, variables, ("test",), grid=grid)
    clean = cells_of((folder / "report.md").read_text(), "Robustness", "*logistic regression on means*")
    assert clean[: len(grid.subsets)] == [f"{value:.3f}" for value in alone.figures["all"]["emotion/accuracy"].ravel()]
    assert (folder / "robustness.png").read_bytes() == (workdir / "eval" / "test_robustness.png").read_bytes()


def test_table_with_the_rows_of_the_paper_has_its_claims(evaluated, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(evaluated[0], workdir)
    path = workdir / "eval" / "test.json"
    found = json.loads(path.read_text())
    for name in PAPER_TABLE:
        if name not in found["rows"]:
            found["rows"][name] = found["rows"]["pooled_logistic"]
            shutil.copytree(workdir / "eval" / "test" / "pooled_logistic", workdir / "eval" / "test" / name)
    path.write_text(json.dumps(found))
    folder = write_table_report(workdir, "test", command="python eval.py", num_resamples=RESAMPLES)
    text = (folder / "claims.md").read_text()
    assert "A table: " in text
    assert text.split("\n", 2)[2].strip() in (folder / "report.md").read_text()
    assert text.count("| MMEI: ") == len(PAPER_METRICS)
    assert "engagement time" not in text
    one = {"value": 0.15, "low": 0.14, "high": 0.16}
    metrics = ("dwell_seconds", "satisfaction")
    ab = {
        "uplift": {arm: dict.fromkeys(metrics, one) for arm in ("emotion_driven", "placebo")},
        "placebo_loses_uplift": dict.fromkeys(metrics, True),
        "source": {"run": "runs/some"},
        "confidence": 0.95,
    }
    again = write_table_report(
        workdir, "test", command="python eval.py", num_resamples=RESAMPLES, further=online_claims(ab)
    )
    ledger = (again / "claims.md").read_text()
    assert "| engagement time in online evaluation | +15.2 % | +15.0 [+14.0, +16.0] %, simulated" in ledger


def test_last_loss_of_a_replica_that_stopped_is_that_of_its_last_evaluation():
    evaluations = [
        {"loss": [3.0, 3.1, 3.2], "is_active": [True, True, False]},
        {"loss": [2.0, 2.1, 9.0], "is_active": [True, False, False]},
        {"loss": [1.0, 9.0, None], "is_active": [False, False, False]},
    ]
    assert table_sections._last_losses(evaluations) == [1.0, 2.1, 3.2]


@pytest.mark.slow
def test_every_row_of_the_small_table_is_trained_and_reported(data, tmp_path):
    """The six rows and the seventh as commands, at tiny size; late fusion is evaluated a second time."""
    flags = [f"--config.data.path={data}", f"--workdir={tmp_path / 'run'}"]
    code, output = processes.run("train.py", "--config=tests/tiny_table_config.py", *flags)
    assert code == 0, output
    code, output = processes.run("eval.py", f"--workdir={tmp_path / 'run'}")
    assert code == 0, output
    rows = json.loads((tmp_path / "run" / "eval" / "test.json").read_text())["rows"]
    assert set(rows) == {*table1_small.get_config().table.order, "late_fusion_calibrated"}
    plain, calibrated = (rows[name]["metrics"] for name in ("late_fusion", "late_fusion_calibrated"))
    assert [found["emotion/cross_entropy"] for found in plain] != [
        found["emotion/cross_entropy"] for found in calibrated
    ]
    for one, other in zip(plain, calibrated, strict=True):
        assert one["ranking/map"] == other["ranking/map"]
    text = (tmp_path / "run" / "eval" / "test_report" / "report.md").read_text()
    assert "Late Fusion, temperatures from validation" in text
    models = json.loads((tmp_path / "run" / "eval" / "test_robustness.json").read_text())["models"]
    together = ["late_fusion", "late_fusion_calibrated", "multimodal_transformer", "mmei", "pooled_logistic"]
    assert sorted(model["name"] for model in models) == sorted(together)
