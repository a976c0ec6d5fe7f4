"""Benchmarks on imported features by fold: who is trained and tested on what, the peer, the intervals, CMU-MOSI."""

import contextlib
import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from scipy import stats
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import RidgeClassifier
from sklearn.model_selection import GridSearchCV, PredefinedSplit
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks import fold_study, mosi, ravdess
from mmei_jax.config import parse
from mmei_jax.records import Dataset
from mmei_jax.training import TrainResult
from mmei_jax.types import InputError

REAL_FILE = Path(__file__).parents[2] / "shared" / "data" / "mosi" / "utterances.npz"
NUM_RECORDS = 240
NUM_VIDEOS = 10
DIMS = {"text": 100, "audio": 73, "vision": 100}


def _made_up() -> dict[str, np.ndarray]:
    """Arrays of MOSI's shapes: text tells the sentiment, audio and vision are noise of another scale."""
    generator = np.random.default_rng(0)
    sentiment = generator.permutation(np.arange(NUM_RECORDS) % 2 > 0).astype(np.int32)
    arrays = {name: generator.normal(size=(NUM_RECORDS, dim)).astype(np.float32) for name, dim in DIMS.items()}
    arrays["text"][:, :20] += 2.0 * (2 * sentiment[:, None] - 1)
    arrays["audio"] = 200 * arrays["audio"] + 50
    videos = np.array([f"video{index % NUM_VIDEOS}" for index in range(NUM_RECORDS)])
    ids = np.array([f"{video}_{index}" for index, video in enumerate(videos)])
    return arrays | {"sentiment": sentiment, "video_id": videos, "segment_id": ids}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mosi")
    np.savez(folder / "utterances.npz", **_made_up())
    return fold_study.import_folds(mosi.STUDY, str(folder / "utterances.npz"), folder / "data", ())


@pytest.mark.slow
def test_mosi_configuration_learns_made_up_features_and_is_tested_on_the_named_fold(data, tmp_path):
    (score,) = fold_study.our_scores(mosi.STUDY, data, ("vision", "audio", "text"), range(1), range(1), tmp_path)
    majority = fold_study.majority_score(mosi.STUDY, data, 0)
    assert score.accuracy > majority.accuracy + 0.2
    evaluated = (tmp_path / "fold0_seed0" / "eval" / "test.json").read_text()
    assert '"fold0"' in evaluated
    assert '"fold1"' not in evaluated


def test_run_that_a_signal_stopped_is_not_evaluated(data, tmp_path, monkeypatch):
    stopped = TrainResult(step=1, best_step=1, stopped_by="SIGTERM")
    monkeypatch.setattr(fold_study, "train", lambda config, folder: stopped)
    monkeypatch.setattr(fold_study, "evaluate_workdir", lambda *arguments: pytest.fail("evaluated"))
    with pytest.raises(SystemExit, match=r"SIGTERM: .*fold0_seed0 is not finished"):
        next(fold_study.our_scores(mosi.STUDY, data, ("text",), range(1), range(1), tmp_path))


@pytest.mark.parametrize("study", [mosi.STUDY, ravdess.STUDY], ids=["mosi", "ravdess"])
def test_every_fold_is_tested_once_and_never_trained_or_validated_on_at_the_same_time(study):
    tested = []
    for fold in range(study.num_folds):
        train_folds, validation, test = fold_study.fold_splits(study, fold)
        assert len({*train_folds, validation, test}) == study.num_folds
        tested.append(test)
    assert sorted(tested) == [f"fold{index}" for index in range(study.num_folds)]
    config = parse(study.get_config().to_dict())
    used = (config.data.train_splits, *config.data.validation_splits, *config.data.test_splits)
    assert used == fold_study.fold_splits(study, 0)


def test_no_video_is_in_two_folds(data):
    videos = [set(Dataset.open(data).split(f"fold{fold}").column("user_id")) for fold in range(5)]
    assert sum(map(len, videos)) == len(set.union(*videos)) == NUM_VIDEOS


def test_peer_is_the_ridge_classifier_that_scikit_learns_own_search_finds_on_the_raw_arrays(data):
    """On inputs that tell nothing, so that training sets and penalties differ in their errors."""
    arrays = _made_up()
    inputs, labels = np.concatenate([arrays["audio"], arrays["vision"]], axis=1), arrays["sentiment"]
    chosen = set()
    for fold in range(5):
        _, *held_out = fold_study.fold_splits(mosi.STUDY, fold)
        splits = [Dataset.open(data).split(name) for name in held_out]
        is_validation, is_test = (
            np.isin(arrays["segment_id"], split.ids(np.arange(split.num_records))) for split in splits
        )
        search = GridSearchCV(
            make_pipeline(StandardScaler(), RidgeClassifier()),
            {"ridgeclassifier__alpha": [1.0, 10.0, 100.0, 1000.0]},
            cv=PredefinedSplit(np.where(is_validation, 0, -1)[~is_test]),
        ).fit(inputs[~is_test], labels[~is_test])
        chosen.add(search.best_params_["ridgeclassifier__alpha"])
        expected = np.mean(search.predict(inputs[is_test]) == labels[is_test])
        assert fold_study.peer_score(mosi.STUDY, data, ("audio", "vision"), fold).accuracy == expected
    assert len(chosen) > 1


def test_shuffled_control_keeps_how_positive_each_video_is(data, tmp_path):
    flags = ("--shuffle_labels_within=group", "--seed=0")
    np.savez(tmp_path / "utterances.npz", **_made_up())
    control = fold_study.import_folds(mosi.STUDY, str(tmp_path / "utterances.npz"), tmp_path / "control", flags)
    folds = [f"fold{fold}" for fold in range(5)]
    plain, shuffled = (Dataset.open(path).split(*folds) for path in (data, control))
    assert plain.ids(np.arange(NUM_RECORDS)) == shuffled.ids(np.arange(NUM_RECORDS))
    before, after = plain.column("label_sentiment"), shuffled.column("label_sentiment")
    assert (before != after).any()
    videos = np.array(plain.column("user_id"))
    for video in np.unique(videos):
        assert before[videos == video].sum() == after[videos == video].sum()


def _scores(values):
    return [fold_study.Score(fold=0, seed=None, accuracy=value, macro_f1=0.0) for value in values]


def test_paired_difference_averages_seeds_and_has_a_t_interval_over_the_folds():
    """Against scipy's own paired test; seeds that differ within a fold alone do not widen the interval."""
    by_fold, peer = np.array([[0.5, 0.7], [0.6, 0.8], [0.9, 0.9]]), (0.5, 0.7, 0.6)
    low, high = stats.ttest_rel(by_fold.mean(axis=1), peer).confidence_interval(0.95)
    found = fold_study.paired_difference(_scores(by_fold.ravel()), _scores(peer), 3)
    assert found == f"+0.133, 95 % t interval over 3 folds [{low:+.3f}, {high:+.3f}]"
    same, level = _scores(0.5 + 0.1 * (index % 2) for index in range(6)), _scores([0.5] * 3)
    assert fold_study.paired_difference(same, level, 3) == "+0.050, 95 % t interval over 3 folds [+0.050, +0.050]"


def test_one_fold_gives_a_difference_without_interval():
    assert fold_study.paired_difference(_scores([0.5, 0.7]), _scores([0.5]), 1) == "+0.100, a single fold: no interval"


def test_results_hold_every_folds_and_seeds_scores_and_a_table_with_a_header(data, tmp_path, monkeypatch, capsys):
    inputs = {"text": ("text",), fold_study.ALL_INPUTS: ("vision", "text")}
    study = dataclasses.replace(mosi.STUDY, inputs=inputs, make_peers=lambda: (RidgeClassifier(),))
    given = {(fold, seed): 0.5 + 0.1 * fold + 0.01 * seed for fold in range(5) for seed in range(2)}

    def train_nothing(config, folder):
        metrics = dict.fromkeys(("emotion/accuracy", "emotion/macro_f1"), given[int(folder.name[4]), config.seed])
        (folder / "eval").mkdir(parents=True)
        (folder / "eval" / "test.json").write_text(json.dumps({"metrics": metrics}))
        (folder / "config.json").write_text(json.dumps(config.to_json()))
        return TrainResult(step=1, best_step=1, stopped_by="")

    monkeypatch.setattr(fold_study, "train", train_nothing)
    monkeypatch.setattr(fold_study, "evaluate_workdir", lambda *arguments: None)
    monkeypatch.setattr(fold_study, "import_folds", lambda *arguments: data)
    command = ["mosi", "--input=it", f"--workdir={tmp_path}", "--num_seeds=2", f"--results={tmp_path / 'it.json'}"]
    monkeypatch.setattr("sys.argv", [*command, "--reuse"])
    with keeping_jax_settings():
        fold_study.run(study, None)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "| inputs | MMEI: accuracy | MMEI: macro-f1 | ridge classifier: accuracy | ridge classifier: macro-f1 |"
    )
    assert any(line.startswith("| text | 0.705 ± ") for line in lines)
    written = json.loads((tmp_path / "it.json").read_text())
    case = written["cases"][0]
    assert {(score["fold"], score["seed"]): score["accuracy"] for score in case["scores"]} == given
    assert [score["fold"] for score in case["peer_scores"]] == list(range(5))
    assert case["accuracy_deviation"] == pytest.approx(np.std(list(given.values()), ddof=1))
    assert {"majority_accuracy", "majority_macro_f1"} <= written.keys()
    # The runs are there now, and another start trains nothing.
    monkeypatch.setattr(fold_study, "train", lambda *arguments: pytest.fail("trained"))
    again = fold_study.our_scores(study, data, ("text",), range(5), range(2), tmp_path / "runs" / "text")
    assert [score.accuracy for score in again] == list(given.values())
    assert json.loads(lines[-1])["cases"] == written["cases"]


@contextlib.contextmanager
def keeping_jax_settings():
    """Undoes what a command sets for its process."""
    keys = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {key: getattr(jax.config, key) for key in keys}
    yield
    for key, value in before.items():
        jax.config.update(key, value)


def test_run_with_another_configuration_is_not_taken_over(data, tmp_path):
    config = parse(mosi.STUDY.get_config().to_dict())
    (tmp_path / "fold0_seed0" / "eval").mkdir(parents=True)
    (tmp_path / "fold0_seed0" / "eval" / "test.json").write_text("{}")
    (tmp_path / "fold0_seed0" / "config.json").write_text(json.dumps(config.to_json()))
    with pytest.raises(InputError, match=r"fold0_seed0: a run with another configuration"):
        next(fold_study.our_scores(mosi.STUDY, data, ("text",), range(1), range(1), tmp_path))


@pytest.mark.skipif(not REAL_FILE.exists(), reason="the CMU-MOSI features are not beside the checkout")
def test_ridge_by_video_on_the_real_features_is_as_known(tmp_path):
    """559 utterances; the peer's accuracies on these folds, as docs/results.md has them."""
    data = fold_study.import_folds(mosi.STUDY, str(REAL_FILE), tmp_path / "data", ())
    assert sum(Dataset.open(data).split(f"fold{fold}").num_records for fold in range(5)) == 559

    def mean(scores):
        return float(np.mean([score.accuracy for score in scores]))

    for modality, known in {"text": 0.753, "audio": 0.630, "vision": 0.660}.items():
        found = mean(fold_study.peer_score(mosi.STUDY, data, (modality,), fold) for fold in range(5))
        assert found == pytest.approx(known, abs=0.001), modality
    majority = mean(fold_study.majority_score(mosi.STUDY, data, fold) for fold in range(5))
    assert majority == pytest.approx(0.670, abs=0.001)


def test_peers_candidate_is_chosen_on_the_validation_fold_and_then_trained_on_it_too(data):
    """Of a peer that learns and one that cannot, the first is taken, whatever their order."""
    learns, cannot = RidgeClassifier(alpha=100.0), DummyClassifier(strategy="most_frequent")
    alone = fold_study.peer_score(mosi.STUDY, data, ("text",), 0)
    for candidates in ((learns, cannot), (cannot, learns)):
        study = dataclasses.replace(mosi.STUDY, make_peers=lambda candidates=candidates: candidates)
        assert fold_study.peer_score(study, data, ("text",), 0) == alone


def test_what_was_given_wrong_is_told_in_one_line(tmp_path, monkeypatch, capsys):
    np.savez(tmp_path / "it.npz", vision=np.zeros((3, 2), np.float32))
    for flags, message in (
        ([f"--input={tmp_path / 'none.npz'}"], "none.npz: no such file or folder"),
        ([f"--input={tmp_path / 'it.npz'}"], "it.npz"),
        (["--input=x", "--quick", "--peer_only"], "--peer_only --quick: expected one of them"),
        (["--input=x", "--num_seeds=two"], "--num_seeds"),
    ):
        monkeypatch.setattr("sys.argv", ["mosi", f"--workdir={tmp_path / 'run'}", *flags])
        with keeping_jax_settings():
            try:
                code = fold_study.run(mosi.STUDY, "")
            except SystemExit as stop:
                code = stop.code
        error = capsys.readouterr().err
        assert code == 2
        assert message in error
        assert len(error.splitlines()) == 1
