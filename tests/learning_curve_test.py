"""The learning curve's benchmark: which records are trained on at each size, and what the regression reads."""

import json

import numpy as np
import pytest

from benchmarks import learning_curve
from mmei_jax.records import Dataset
from mmei_jax.simulation import aigc_int
from mmei_jax.training import TrainResult
from mmei_jax.types import MODALITIES, InputError
from mmei_jax.workdir import write_json

RECIPE = learning_curve.Recipe(num_epochs=1, dropout_rate=0.25)
SMALL = learning_curve.Curve(dict.fromkeys((20, 50, 300), RECIPE), 2, num_validation=30, num_test=40)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return learning_curve.make_data(SMALL, tmp_path_factory.mktemp("curve") / "data")


def _ids(data, splits):
    split = Dataset.open(data).split(*splits)
    return split.ids(np.arange(split.num_records))


def test_training_sets_have_the_asked_sizes_and_share_no_record_with_validation_and_test(data):
    held_out = {*_ids(data, ("validation",)), *_ids(data, ("test",))}
    assert len(held_out) == 70
    for seed in (0, 1):
        for size in SMALL.recipes:
            ids = _ids(data, SMALL.train_splits(size, seed))
            assert len(ids) == len(set(ids)) == size
            assert not held_out & set(ids)


def test_training_sets_of_one_seed_are_nested_and_of_two_seeds_disjoint_but_for_the_largest(data):
    by_seed = [[set(_ids(data, SMALL.train_splits(size, seed))) for size in SMALL.recipes] for seed in (0, 1)]
    for smallest, middle, largest in by_seed:
        assert smallest < middle < largest
    assert not by_seed[0][1] & by_seed[1][1]
    assert by_seed[0][2] == by_seed[1][2]


@pytest.mark.parametrize("curve", [learning_curve.FULL, learning_curve.QUICK, SMALL])
def test_configuration_of_every_size_and_seed_is_accepted_and_selects_on_validation_only(curve, tmp_path):
    for seed in range(curve.num_seeds):
        for size in curve.recipes:
            config = curve.config(tmp_path, size, seed)
            sizes = curve.split_sizes()
            assert sum(sizes[name] for name in config.data.train_splits) == size
            assert (config.data.validation_splits, config.data.test_splits) == (("validation",), ("test",))
            assert config.seed == seed
            recipe = curve.recipes[size]
            assert (config.train.num_epochs, config.model.dropout_rate) == (recipe.num_epochs, recipe.dropout_rate)


def test_data_of_another_curve_is_refused(data):
    other = learning_curve.Curve(dict.fromkeys((20, 60, 300), RECIPE), 2, num_validation=30, num_test=40)
    with pytest.raises(SystemExit, match="other splits"):
        learning_curve.make_data(other, data)


def test_regression_reads_mean_tokens_and_presence(data):
    """Against the tokens as they were drawn, record by record."""
    (chunk,) = aigc_int.stream(learning_curve.DATA_SEED, 400, learning_curve.DATA_DIM)
    found = learning_curve.pooled_features(Dataset.open(data).split("test"))
    assert found.shape == (40, 3 * (learning_curve.DATA_DIM + 1))
    assert found.dtype == np.float32
    num_absent = 0
    for record in range(40):
        expected = []
        for name in MODALITIES:
            lengths = np.maximum(chunk.tokens[name].lengths, 0)
            start = lengths[:record].sum()
            tokens = chunk.tokens[name].values[start : start + lengths[record]]
            is_present = len(tokens) > 0
            num_absent += not is_present
            expected += [*(tokens.mean(axis=0) if is_present else np.zeros(learning_curve.DATA_DIM)), is_present]
        np.testing.assert_allclose(found[record], np.array(expected, np.float64), rtol=1e-5, atol=1e-6)
    assert num_absent


def test_regression_is_joint_right_only_where_both_tasks_are(data, tmp_path):
    config = SMALL.config(data, 50, 0)
    found = learning_curve.logistic_accuracies(config, tmp_path / "logistic.json")
    assert found["joint"] <= min(found["emotion"], found["intent"])
    assert found["emotion"] > 0.24  # the most frequent emotion's share
    (tmp_path / "logistic.json").write_text('{"emotion": 0.5, "intent": 0.25, "joint": 0.125}')
    assert learning_curve.logistic_accuracies(config, tmp_path / "logistic.json")["joint"] == 0.125


def test_run_that_a_signal_stopped_is_not_evaluated_and_a_finished_one_is_kept(data, tmp_path, monkeypatch):
    config = SMALL.config(data, 20, 0)
    stopped = TrainResult(step=1, best_step=1, stopped_by="SIGTERM")
    monkeypatch.setattr(learning_curve, "train", lambda config, folder: stopped)
    monkeypatch.setattr(learning_curve, "evaluate_workdir", lambda *arguments: pytest.fail("evaluated"))
    with pytest.raises(SystemExit, match=r"SIGTERM: .* is not finished"):
        learning_curve.our_accuracies(config, tmp_path)
    metrics = {f"{task}/accuracy": 0.5 for task in learning_curve.TASKS}
    write_json(tmp_path / "config.json", config.to_json())
    (tmp_path / "eval").mkdir()
    write_json(tmp_path / "eval" / "test.json", {"metrics": metrics})
    assert learning_curve.our_accuracies(config, tmp_path) == dict.fromkeys(learning_curve.TASKS, 0.5)
    with pytest.raises(InputError, match="another configuration"):
        learning_curve.our_accuracies(SMALL.config(data, 20, 1), tmp_path)


def test_cases_compare_with_both_ceilings_and_the_regression_and_carry_the_goals():
    ours = {3_500: [dict(emotion=0.8, intent=0.7, joint=0.6)], 100_000: [dict(emotion=0.9, intent=0.8, joint=0.7)]}
    peer = {size: [dict(emotion=0.75, intent=0.7, joint=0.5)] for size in ours}
    reference = {
        f"{task}/accuracy{suffix}": value
        for task in learning_curve.TASKS
        for suffix, value in ((("", 0.94), ("[late_fusion]", 0.92)))
    }
    cases = learning_curve.cases(ours, peer, reference)
    assert len(cases) == 3 * 2 * 3
    with_goals = {(case["case"], case["peer"]): case for case in cases if case["goal"] is not None}
    assert len(with_goals) == 2
    largest = with_goals["emotion, 100000 records, simulated", "exact posterior (ceiling)"]
    assert largest["ratio"] == pytest.approx(0.9 / 0.94)
    assert largest["goal"] == pytest.approx(0.92 / 0.94)
    assert largest["note"] == "4.0 points short of the exact ceiling"
    notes = {(case["case"], case["peer"].split()[0]): case.get("note") for case in cases}
    assert notes["intent, 100000 records, simulated", "exact"] == "14.0 points short of the exact ceiling"
    assert notes["intent, 3500 records, simulated", "multinomial"] == "+0.0 points beside the regression"
    small = with_goals["emotion, 3500 records, simulated", "multinomial logistic regression of mean tokens"]
    assert (small["ratio"], small["goal"]) == (pytest.approx(0.8 / 0.75), 1.0)


def test_table_and_picture_are_made_again_from_a_results_file(tmp_path, monkeypatch, capsys):
    reference = {f"{task}/accuracy{suffix}": 0.9 for task in learning_curve.TASKS for suffix in ("", "[late_fusion]")}
    scores = {"3500": [dict(emotion=0.8, intent=0.7, joint=0.6)] * 2}
    earlier, again = tmp_path / "earlier.json", tmp_path / "again.json"
    write_json(earlier, {"date": "1999-12-31", "reference": reference, "ours": scores, "logistic": scores, "cases": []})
    command = ["learning_curve", f"--from_results={earlier}", f"--results={again}", f"--picture={tmp_path / 'it.png'}"]
    monkeypatch.setattr("sys.argv", command)
    learning_curve.main()
    lines = capsys.readouterr().out.splitlines()
    assert "| 3,500 records | 0.800 ± 0.000 | 0.800 ± 0.000 | 10.0 |" in lines
    written = json.loads(again.read_text())
    assert (written["date"], written["ours"], len(written["cases"])) == ("1999-12-31", scores, 9)
    assert json.loads(lines[-1])["cases"] == written["cases"]
    assert (tmp_path / "it.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_seeds=0"], "error: --num_seeds=0: expected 1 to 3"),
        (["--nope"], "error: unrecognized arguments: --nope"),
        (["--from_results=FOLDER/none.json"], "No such file or directory"),
        (["--from_results=FOLDER/other.json"], "other.json: expected what --results wrote"),
    ],
)
def test_what_was_given_wrong_is_told_in_one_line(flags, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "other.json").write_text("{}")
    monkeypatch.setattr("sys.argv", ["learning_curve", *(flag.replace("FOLDER", str(tmp_path)) for flag in flags)])
    try:
        code = learning_curve.main()
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2
    assert message in error
    assert len(error.splitlines()) == 1
