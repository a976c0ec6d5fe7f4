"""The robustness card of a tiny run: its scores against ordinary evaluations, its files, and what it refuses."""

import dataclasses
import io
import json
import math
import shutil
import sys
from contextlib import closing

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.metrics import f1_score

from mmei_jax import input_pipeline, robustness
from mmei_jax.compilations import CompilationCounter
from mmei_jax.config import parse
from mmei_jax.corruptions import corrupt, draw
from mmei_jax.evaluation import Evaluator, open_best_run
from mmei_jax.metrics import batch_metrics, compute_all, merge_all
from mmei_jax.records import Split
from mmei_jax.reports.drawing import report_style
from mmei_jax.reports.robustness_card import CardSubject, card_lines
from mmei_jax.reports.robustness_figure import robustness_figure
from mmei_jax.robustness import RobustnessEvaluator, grid_conditions, main, measure_robustness, record_parts
from mmei_jax.robustness_files import summary, table, write_robustness
from mmei_jax.robustness_metrics import ALL, CONFLICT, NO_CONFLICT, Grid
from mmei_jax.sharding import batch_sharding
from mmei_jax.state import build_model, initialize
from mmei_jax.training import train
from mmei_jax.types import MODALITIES, InputError, Outputs
from tests import processes, tiny

SPLITS = ("validation", "test")
GRID = Grid(MODALITIES, (0.0, 0.6), (0.0, 2.0))
PACKING = {"records_per_row": 6, "num_rows": (6,), "tokens_per_row": {"vision": 32, "audio": 48, "text": 32}}
SAME = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(scope="module")
def workdir(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    train(tiny.config(data, train__num_epochs=1), folder)
    return folder


@pytest.fixture(scope="module")
def run(workdir):
    return open_best_run(workdir)


@pytest.fixture(scope="module")
def variables(run):
    """The run's, shaken, so that its answers differ from record to record."""
    leaves, structure = jax.tree.flatten(run.variables["params"])
    keys = jax.random.split(jax.random.key(0), len(leaves))
    shaken = [leaf + 0.5 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return {**run.variables, "params": jax.tree.unflatten(structure, shaken)}


@pytest.fixture(scope="module")
def evaluator(run):
    return RobustnessEvaluator(run.model, run.config, run.dataset, run.mesh, GRID, seed=3)


@pytest.fixture(scope="module")
def found(evaluator, variables):
    return evaluator.measure(variables, SPLITS, name="ours")


def batches(run, config=None):
    config = config or run.config
    return closing(input_pipeline.evaluation_batches(run.dataset, config, SPLITS, batch_sharding(run.mesh)))


def assert_same(ours, theirs):
    assert ours.figures.keys() == theirs.figures.keys()
    for part, figures in ours.figures.items():
        for name, values in figures.items():
            np.testing.assert_allclose(values, theirs.figures[part][name], err_msg=f"{part} {name}", **SAME)
            # Counts have no rounding.
            if name.endswith(("/accuracy", "f1")):
                np.testing.assert_array_equal(values, theirs.figures[part][name], err_msg=f"{part} {name}")
    assert ours.constant == theirs.constant


def test_clean_condition_is_the_ordinary_evaluation(run, variables, found):
    expected = Evaluator(run.model, run.config, run.dataset, run.mesh).measure(variables, SPLITS)
    clean = {name: values[GRID.clean] for name, values in found.figures[ALL].items()}
    assert {name for name in expected if not name.startswith(("loss", "ranking"))} == clean.keys()
    assert len({clean[name] for name in ("emotion/accuracy", "emotion/macro_f1", "intent/accuracy")}) == 3
    for name, value in clean.items():
        if name.endswith(("/accuracy", "f1")):
            assert value == expected[name], name
        np.testing.assert_allclose(value, expected[name], rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("subset", GRID.subsets[:-1], ids="+".join)
def test_subset_is_the_evaluation_of_batches_without_the_other_modalities(run, variables, found, subset):
    def measure(batch):
        reduced = batch.replace(ranking=None, **{name: None for name in MODALITIES if name not in subset})
        outputs = run.model.apply(variables, reduced, is_training=False)
        return batch_metrics(outputs, reduced, run.config.loss)

    with batches(run) as given:
        expected = compute_all(merge_all(jax.device_get([jax.jit(measure)(batch) for batch in given])))
    place = GRID.subsets.index(subset)
    for name in ("emotion/accuracy", "intent/macro_f1", "joint/accuracy"):
        assert found.figures[ALL][name][place, 0, 0] == expected[name]
    np.testing.assert_allclose(
        found.figures[ALL]["emotion/cross_entropy"][place, 0, 0], expected["emotion/cross_entropy"], rtol=1e-6
    )


@pytest.mark.parametrize("place", [(6, 1, 1), (3, 1, 0), (2, 0, 1)])
def test_condition_is_what_a_loop_over_its_batches_and_scikit_learn_give(run, variables, evaluator, found, place):
    conditions = grid_conditions(GRID)
    number = int(np.ravel_multi_index(place, GRID.shape))
    condition = jax.tree.map(lambda leaf: leaf[number], conditions)
    deviations = {name: jnp.asarray(values) for name, values in evaluator.deviations.items()}

    def answer(batch):
        given = corrupt(batch.replace(ranking=None), draw(3, batch), condition, deviations)
        return run.model.apply(variables, given, is_training=False).emotion

    truth, answers = [], []
    with batches(run) as given:
        for batch in given:
            kept = np.asarray(batch.emotion.is_labelled)
            truth.append(np.asarray(batch.emotion.value)[kept])
            answers.append(np.asarray(jax.jit(answer)(batch)).argmax(axis=1)[kept])
    truth, answers = np.concatenate(truth), np.concatenate(answers)
    assert found.figures[ALL]["emotion/accuracy"][place] == pytest.approx((truth == answers).mean())
    f1 = f1_score(truth, answers, average="macro", zero_division=0)
    assert found.figures[ALL]["emotion/macro_f1"][place] == pytest.approx(f1)
    column = run.dataset.split(*SPLITS).column("extra_conflict_modality")
    for part, is_in in ((CONFLICT, column >= 0), (NO_CONFLICT, column < 0)):
        assert found.figures[part]["emotion/accuracy"][place] == pytest.approx((truth == answers)[is_in].mean())


def test_corruption_changes_scores(found):
    losses = found.figures[ALL]["emotion/cross_entropy"][-1]
    assert len(np.unique(losses)) == losses.size


def test_scores_depend_neither_on_batches_nor_on_how_many_conditions_are_taken_at_once(run, variables, found):
    small = dataclasses.replace(run.config, data=dataclasses.replace(run.config.data, evaluation_batch_size=7))
    other = RobustnessEvaluator(run.model, small, run.dataset, run.mesh, GRID, seed=3, records_at_once=30)
    assert_same(other.measure(variables, SPLITS, name="ours"), found)


def test_scores_do_not_depend_on_packing(run, variables, found):
    values = tiny.config_dict(run.dataset.path)
    with values.data.ignore_type():
        values.data.packing = PACKING
    packed = parse(values.to_dict())
    with batches(run, packed) as given:
        assert next(given).vision.segment_ids.shape[0] < packed.data.evaluation_batch_size
    options = {"grid": GRID, "seed": 3}
    assert_same(measure_robustness(run.model, packed, run.dataset, variables, SPLITS, **options), found)


def test_one_program_serves_all_conditions_and_all_variables(run, evaluator, found):
    counter = CompilationCounter()
    other = evaluator.measure(run.variables, SPLITS)
    counter.close()
    assert counter.count == 0
    assert np.any(other.figures[ALL]["emotion/cross_entropy"] != found.figures[ALL]["emotion/cross_entropy"])


def test_another_seed_changes_corrupted_scores_alone(run, variables, found):
    other = measure_robustness(run.model, run.config, run.dataset, variables, SPLITS, grid=GRID, seed=4)
    ours, theirs = (part.figures[ALL]["emotion/cross_entropy"] for part in (found, other))
    np.testing.assert_array_equal(ours[:, 0, 0], theirs[:, 0, 0])
    assert (ours[-1].ravel()[1:] != theirs[-1].ravel()[1:]).all()


def test_records_in_conflict_and_not_make_up_all(run, found):
    column = run.dataset.split(*SPLITS).column("extra_conflict_modality")
    assert found.num_records == {ALL: 60, CONFLICT: (column >= 0).sum(), NO_CONFLICT: (column < 0).sum()}
    weights = np.array([found.num_records[part] for part in (CONFLICT, NO_CONFLICT)]) / 60
    for name in ("emotion/accuracy", "joint/cross_entropy"):
        parts = np.stack([found.figures[part][name] for part in (CONFLICT, NO_CONFLICT)], axis=-1)
        np.testing.assert_allclose(parts @ weights, found.figures[ALL][name], rtol=1e-6)


def test_data_that_do_not_tell_of_conflicts_are_measured_as_a_whole(run, variables, evaluator, found, monkeypatch):
    monkeypatch.setattr(robustness, "CONFLICT_COLUMN", "unheard_of")
    whole = evaluator.measure(variables, SPLITS, name="ours")
    assert list(whole.figures) == list(whole.num_records) == [ALL]
    np.testing.assert_array_equal(whole.figures[ALL]["emotion/accuracy"], found.figures[ALL]["emotion/accuracy"])


def test_records_of_which_no_conflict_is_known_count_among_all_alone(run, monkeypatch):
    split = run.dataset.split("test")
    column = np.array([np.nan, 0.0, -1.0, 2.0])
    monkeypatch.setattr(Split, "column", lambda *_: column)
    parts, part_of_record = record_parts(split)
    assert [parts[place] for place in part_of_record] == ["not known", CONFLICT, NO_CONFLICT, CONFLICT]
    monkeypatch.setattr(Split, "column", lambda *_: np.full(4, np.nan))
    assert record_parts(split)[0] == (ALL,)


def test_any_model_that_gives_outputs_is_measured(run):
    """One that names the class by how many tokens of text are left."""

    class CountsTokens:
        def apply(self, variables, batch, *, is_training):
            assert not is_training
            num_tokens = (batch.text.segment_ids > 0).sum(axis=1)
            known = {
                "emotion": jax.nn.one_hot(jnp.clip(num_tokens - 3, 0, 6), 7) * variables["scale"],
                "modality_weights": jnp.ones((len(num_tokens), 3)),
            }
            return Outputs(**{**dict.fromkeys(Outputs.__annotations__), **known})

    found = measure_robustness(
        CountsTokens(),
        run.config,
        run.dataset,
        {"scale": jnp.float32(2)},
        ("test",),
        grid=Grid(MODALITIES, (0.0, 1.0), (0.0, 1.0)),
    )
    split = run.dataset.split("test")
    labels = split.gather_label("emotion", np.arange(split.num_records))[0]
    expected = (labels == np.clip(np.minimum(split.lengths("text"), 16) - 3, 0, 6)).mean()
    accuracy = found.figures[ALL]["emotion/accuracy"]
    assert accuracy[-1, 0, 0] == accuracy[-1, 0, 1] == pytest.approx(expected)
    assert accuracy[-1, 1, 0] == pytest.approx((labels == 0).mean())
    assert accuracy[0, 0, 0] == pytest.approx((labels == 0).mean())


# --- files


def subject_of(run, split="test"):
    return CardSubject(run.dataset.spec, split, run.dataset.reference(split), 3)


def read(paths):
    return {path.suffix: path.read_bytes() for path in paths}


def test_card_has_the_same_bytes_when_it_is_made_again(run, found, tmp_path):
    made = [write_robustness(tmp_path / name, "test", [found], subject_of(run), {"seed": 3}) for name in ("a", "b")]
    assert read(made[0]) == read(made[1])
    assert set(read(made[0])) == {".json", ".parquet", ".md", ".png"}
    assert Image.open(io.BytesIO(read(made[0])[".png"])).width == 990


def test_card_says_that_the_data_are_simulated_and_names_its_picture(run, found, tmp_path):
    text = read(write_robustness(tmp_path, "test", [found], subject_of(run), {}))[".md"].decode()
    assert "**Simulated.**" in text
    assert "](test_robustness.png)" in text
    caption = text.partition("](test_robustness.png)\n\n")[2].partition("\n")[0]
    assert "simulated" in caption
    assert f"{found.num_records[CONFLICT]:,} records one modality displays another" in text
    assert f"| vision+audio+text | {found.figures[ALL]['emotion/accuracy'][GRID.clean]:.4f} |" in text
    ceiling = run.dataset.reference("test")["emotion/accuracy[text, every record]"]
    assert f"| {ceiling:.4f} |\n" in text


def test_card_of_real_data_speaks_of_no_simulation_and_no_conflict(run, found, tmp_path):
    spec = dataclasses.replace(run.dataset.spec, name="real", description="people", source="a camera")
    alone = dataclasses.replace(found, figures={ALL: found.figures[ALL]}, num_records={ALL: 60})
    text = read(write_robustness(tmp_path, "test", [alone], CardSubject(spec, "test", {}, 3), {}))[".md"].decode()
    assert "imulated" not in text
    assert "in conflict is not known" in text
    assert "exact ceiling" not in text


def test_json_tells_the_areas_of_the_table(found, tmp_path):
    values = table([found]).to_pandas()
    assert len(values) == 3 * math.prod(GRID.shape)
    is_kept = np.array([values[f"keeps_{name}"] for name in MODALITIES]).T
    rows = values[(values["records"] == CONFLICT) & (is_kept == [True, False, True]).all(axis=1)]
    curve = rows[rows["noise_level"] == 0.0].sort_values("missing_rate")
    told = summary(found)["records"][CONFLICT]["scores"]["intent/accuracy"]
    area = np.trapezoid(curve["intent/accuracy"], curve["missing_rate"]) / 0.6
    assert told["subsets"]["vision+text"]["area"]["missing"] == pytest.approx(area)
    first, constant = curve["intent/accuracy"].iloc[0], told["constant_answer"]
    relative = told["subsets"]["vision+text"]["relative_robustness"]["missing"]
    assert relative == pytest.approx((area - constant) / (first - constant))


def test_several_models_and_seeds_share_a_card(run, found, evaluator, tmp_path):
    others = [evaluator.measure(run.variables, SPLITS, name="another"), dataclasses.replace(found, name="another")]
    files = read(write_robustness(tmp_path, "test", [found, *others], subject_of(run), {}))
    text = files[".md"].decode()
    assert "| ours | vision+audio+text |" in text
    assert "| another | vision+audio+text |" in text
    assert "effective robustness" in text
    pair = sorted(part.figures[ALL]["emotion/accuracy"][GRID.clean] for part in others)
    assert f"{np.mean(pair):.4f} ({pair[0]:.4f} to {pair[1]:.4f})" in text
    assert [model["name"] for model in json.loads(files[".json"])["models"]] == ["ours", "another", "another"]


def test_model_without_a_task_is_left_out_of_what_is_told_of_it(run, found, tmp_path):
    figures = {
        part: {name: values for name, values in scores.items() if not name.startswith(("intent/", "joint/"))}
        for part, scores in found.figures.items()
    }
    other = dataclasses.replace(found, name="of emotion alone", figures=figures)
    text = read(write_robustness(tmp_path, "test", [found, other], subject_of(run), {}))[".md"].decode()
    sections = {section.partition("\n")[0]: section for section in text.split("### ")[1:]}
    assert "| of emotion alone | vision+audio+text |" in sections["emotion/accuracy"]
    assert "of emotion alone" not in sections["intent/accuracy"]
    assert "| vision+audio+text |" in sections["intent/accuracy"]
    lines = "\n".join(card_lines([found, other], subject_of(run)))
    assert "of emotion alone:" in lines.partition("intent/accuracy")[0]
    assert "of emotion alone:" not in lines.partition("intent/accuracy")[2]


def test_twelve_models_have_twelve_colours(found):
    rows = [dataclasses.replace(found, name=f"model {place}") for place in range(12)]
    with report_style():
        (legend,) = robustness_figure(rows, {}).legends
    colours = {
        text.get_text(): line.get_color() for text, line in zip(legend.get_texts(), legend.get_lines(), strict=True)
    }
    assert len({colours[row.name] for row in rows}) == 12


def test_models_on_several_grids_share_no_card(run, found, tmp_path):
    other = dataclasses.replace(found, grid=Grid(MODALITIES, (0.0, 0.5), (0.0, 2.0)))
    with pytest.raises(InputError, match="one grid"):
        write_robustness(tmp_path, "test", [found, other], subject_of(run), {})


def test_two_modalities_have_three_subsets(run, tmp_path):
    config = tiny.config(run.dataset.path, data__modalities=("vision", "text"))
    model = build_model(config, run.dataset)
    grid = Grid(("vision", "text"), (0.0, 0.5), (0.0,))
    found = measure_robustness(model, config, run.dataset, initialize(model, 0), ("test",), grid=grid)
    assert found.figures[ALL]["emotion/accuracy"].shape == (3, 2, 1)
    text = read(write_robustness(tmp_path, "test", [found], subject_of(run), {}))[".md"].decode()
    assert "| vision+text |" in text


# --- the command


@pytest.fixture
def copy(workdir, tmp_path):
    return shutil.copytree(workdir, tmp_path / "tiny")


def test_command_writes_the_card_of_a_run(copy, capsys):
    arguments = [f"--workdir={copy}", "--missing_rates=0,0.6", "--noise_levels=0,2", "--seed=3"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "30 records" in printed
    assert "28 conditions" in printed
    assert all(str(copy / "eval" / f"test_robustness.{end}") in printed for end in ("json", "parquet", "md", "png"))
    told = json.loads((copy / "eval" / "test_robustness.json").read_text())
    assert (told["split"], told["seed"], told["missing_rates"]) == ("test", 3, [0.0, 0.6])
    assert told["models"][0]["records"][ALL]["num_records"] == 30


def test_three_devices_measure_what_one_does(copy, capsys):
    arguments = [f"--workdir={copy}", "--missing_rates=0,0.6", "--noise_levels=0,2"]
    assert main(arguments) == 0
    path = copy / "eval" / "test_robustness.parquet"
    ours = pq.read_table(path).to_pandas()
    path.unlink()
    code, output = processes.run("-m", "mmei_jax.robustness", *arguments, env=processes.environment(num_devices=3))
    assert code == 0, output
    theirs = pq.read_table(path).to_pandas()
    # Shares are quotients of these figures by differences that may be close to 0 (robustness_metrics_test).
    for name in (name for name in ours if not name.startswith("share_kept/")):
        if ours[name].dtype == float:
            np.testing.assert_allclose(theirs[name], ours[name], rtol=1e-5, atol=1e-6, err_msg=name)
        else:
            assert (ours[name] == theirs[name]).all()


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--missing_rates=0.5,0.2"], ["missing_rates = 0.5, 0.2", "rise from 0"]),
        (["--missing_rates=0,1.2"], ["missing_rates = 0, 1.2", "at most 1"]),
        (["--noise_levels=0,loud"], ["--noise_levels", "loud"]),
        (["--split=final"], ["final", "test"]),
        (["--data=nowhere"], ["nowhere"]),
    ],
)
def test_command_refuses_in_one_line(copy, capsys, flags, parts):
    try:
        code = main([f"--workdir={copy}", *flags])
    except SystemExit as exit_:
        code = exit_.code
    error = capsys.readouterr().err
    assert code == 2
    assert error.count("\n") == 1
    assert error.startswith("error: ")
    assert all(part in error for part in parts), error
    assert not (copy / "eval").exists()


def test_folder_without_a_run_is_told_in_one_line(tmp_path, capsys):
    assert main([f"--workdir={tmp_path}"]) == 2
    assert "config.json" in capsys.readouterr().err


def test_help_explains_the_levels(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["robustness", "--help"])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 0
    assert "0.0,0.25,0.5,0.75" in capsys.readouterr().out
