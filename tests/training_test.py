"""A run learns, resumes to the bit, keeps its best checkpoint, and stops where it must, saying why."""

import json
import shutil
import time
from contextlib import closing

import jax
import numpy as np
import pytest

from mmei_jax import checkpointing, training, training_log
from mmei_jax.batching import BatchReader
from mmei_jax.checkpointing import Checkpointer
from mmei_jax.evaluation import Evaluator, evaluate_workdir, open_best_run
from mmei_jax.packing import Layout
from mmei_jax.records import Dataset
from mmei_jax.sharding import make_mesh
from mmei_jax.state import build_model, placed_variable_shapes
from mmei_jax.training import train
from mmei_jax.training_log import NonFiniteLossError, TrainingLog
from mmei_jax.types import InputError, StepReport
from tests import tiny


@pytest.fixture(scope="module")
def whole_run(data, tmp_path_factory):
    """An uninterrupted run of 17 updates, and its working directory."""
    workdir = tmp_path_factory.mktemp("whole")
    return train(tiny.config(data, train__write_record_ids=True), workdir), workdir


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def saved_variables(data, workdir, step):
    config = tiny.config(data)
    checkpointer = Checkpointer(workdir, best_metric=config.train.best_metric)
    model = build_model(config, Dataset.open(data))
    variables = checkpointer.restore_model(step, placed_variable_shapes(model, make_mesh(config)))
    checkpointer.close()
    return variables


def test_run_learns_and_writes_what_it_says(whole_run):
    result, workdir = whole_run
    lines = read_lines(workdir / "metrics.jsonl")
    losses = [line["train/loss/emotion"] for line in lines if "train/loss/emotion" in line]
    assert losses[-1] < losses[0]
    assert result.step == 17
    assert [line["step"] for line in lines if "validation/loss" in line] == [9, 17]
    for name in ("config.json", "environment.json", "parameters.txt", "tensorboard", "checkpoints"):
        assert (workdir / name).exists()
    assert "emotion_head" in (workdir / "parameters.txt").read_text()


def test_train_lines_hold_loss_rate_alpha_throughput_and_input_wait(whole_run):
    line = read_lines(whole_run[1] / "metrics.jsonl")[0]
    assert {
        "train/loss",
        "train/loss/intent",
        "train/loss/ranking",
        "train/gradient_norm",
        "train/learning_rate",
    } <= set(line)
    assert {"throughput/records_per_second", "throughput/input_wait_share"} <= set(line)
    assert sum(line[f"train/alpha/{name}"] for name in ("vision", "audio", "text")) == pytest.approx(1.0, abs=1e-5)


def test_input_wait_is_the_share_of_the_time_in_which_the_devices_lack_a_batch(data, tmp_path, monkeypatch):
    read = BatchReader.read

    def read_slowly(self, *arguments):
        time.sleep(0.4)
        return read(self, *arguments)

    monkeypatch.setattr(BatchReader, "read", read_slowly)
    training.train(tiny.config(data, train__num_epochs=3, train__evaluate_every_epochs=3, **tiny.LEAST), tmp_path)
    lines = [line for line in read_lines(tmp_path / "metrics.jsonl") if line["step"] > 10]
    # Batches of the first steps were read while the update was compiled.
    shares = [line["throughput/input_wait_share"] for line in lines if "throughput/input_wait_share" in line]
    assert shares
    assert np.median(shares) > 0.5


class _Clock:
    """Stands in for the log's ``time``: an update takes a second, a compilation a thousand."""

    now = 0.0

    def perf_counter(self):
        return self.now

    def note(self, event, seconds, **_):
        self.now += 1000.0 * event.endswith("backend_compile_duration")


def test_rates_leave_out_every_shapes_compilation(data, tmp_path, monkeypatch, capsys):
    """Batches of two lengths: the second program is compiled in the middle of an interval between log lines."""
    clock, add = _Clock(), TrainingLog.add

    def add_and_advance(self, *arguments):
        add(self, *arguments)
        clock.now += 1.0

    monkeypatch.setattr(training_log, "time", clock)
    monkeypatch.setattr(TrainingLog, "add", add_and_advance)
    buckets = dict(vision=(16, 16), audio=(24, 24), text=(8, 16))
    only_text = dict(data__modalities=("text",), loss__intent="none", loss__ranking="none", **tiny.LEAST)
    few = dict(data__max_tokens=buckets, data__batch_size=4, train__num_epochs=1)
    jax.monitoring.register_event_duration_secs_listener(clock.note)
    try:
        train(tiny.config(data, **few, **only_text), tmp_path)
    finally:
        jax.monitoring.unregister_event_duration_listener(clock.note)
    output = capsys.readouterr().out.splitlines()
    assert sum("batches of another shape, compilation included" in line for line in output) == 1
    lines = read_lines(tmp_path / "metrics.jsonl")
    rates = {line["throughput/records_per_second"] for line in lines if "throughput/records_per_second" in line}
    assert rates == {4.0}
    assert output[-1].startswith("4 records/s while training; ")
    assert not any("left" in line and "left 0:" not in line for line in output)


def _log(workdir, **changes):
    arguments = dict(num_steps=10, batch_size=8, num_records=80, writes_record_ids=False, resumed_step=0)
    nothing = {"latest_saved_step": lambda: None}
    return TrainingLog(
        workdir, lambda index: [f"r{one}" for one in index], np.zeros_like, **{**arguments, **nothing, **changes}
    )


def _report(loss):
    return StepReport(
        loss=np.float32(loss),
        gradient_norm=np.float32(1.0),
        task_totals={},
        task_counts={},
        is_finite={},
        modality_weights=np.ones(3, np.float32) / 3,
        record_index=np.arange(8, dtype=np.int32),
    )


def test_summary_of_one_update_says_that_it_was_made(tmp_path):
    with closing(_log(tmp_path)) as log:
        assert log.summary() == "no update was made"
        log.add(1, _report(1.0), 0.0)
        log.restart_clock()
        log.flush(lambda step: 0.1)
        assert log.summary().startswith("updates made: 1, too few to tell how fast")


@pytest.mark.parametrize("saved", [None, 7])
def test_non_finite_loss_names_the_checkpoint_that_is_kept_if_there_is_one(saved, tmp_path):
    said = "no checkpoint was saved yet" if saved is None else "the checkpoint of step 7 is kept"
    with closing(_log(tmp_path, latest_saved_step=lambda: saved)) as log:
        log.add(9, _report(np.nan), 0.0)
        with pytest.raises(NonFiniteLossError, match=rf"step 9: .* is not finite for records .*; {said}\."):
            log.flush(lambda step: 0.1)


def test_undefined_metric_is_null_in_the_log_and_absent_from_events_and_terminal(tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with closing(_log(tmp_path)) as log:
        log.write_evaluation(3, {"validation/loss": 1.5, "validation/emotion/accuracy": float("nan")})
    (text,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    found = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert found == {"step": 3, "validation/loss": 1.5, "validation/emotion/accuracy": None}
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["validation/loss"]
    assert capsys.readouterr().out.split() == ["validation/loss", "1.5000"]


def test_event_files_hold_the_same_scalars(whole_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(whole_run[1] / "tensorboard")).Reload()
    written = {event.step: event.value for event in events.Scalars("train/loss")}
    lines = read_lines(whole_run[1] / "metrics.jsonl")
    assert written == pytest.approx({line["step"]: line["train/loss"] for line in lines if "train/loss" in line})


def test_latest_and_best_checkpoints_are_kept(data, whole_run, tmp_path):
    result, workdir = whole_run
    lines = [line for line in read_lines(workdir / "metrics.jsonl") if "validation/mean_accuracy" in line]
    best = max(lines, key=lambda line: (line["validation/mean_accuracy"], line["step"]))
    assert result.best_step == best["step"]
    assert {int(path.name) for path in (workdir / "checkpoints").iterdir()} == {result.best_step, 17}


def test_smallest_loss_is_the_best(data, tmp_path, monkeypatch):
    measure, losses = Evaluator.measure, iter([2.0, 1.0, 4.0, 3.0])
    monkeypatch.setattr(Evaluator, "measure", lambda *given: {**measure(*given), "loss": next(losses)})
    result = train(tiny.config(data, train__best_metric="validation/loss", train__num_epochs=4, **tiny.LEAST), tmp_path)
    assert (result.best_step, result.step) == (18, 35)
    assert {int(path.name) for path in (tmp_path / "checkpoints").iterdir()} == {18, 35}


@pytest.mark.parametrize("stop_step", [3, pytest.param(11, marks=pytest.mark.slow)])
def test_run_stopped_by_sigterm_resumes_to_the_bit(data, whole_run, tmp_path, monkeypatch, stop_step):
    config = tiny.config(data, train__write_record_ids=True)
    monkeypatch.setattr(training, "TrainingLog", tiny.StopAfter)
    monkeypatch.setattr(tiny.StopAfter, "step", stop_step)
    stopped = train(config, tmp_path)
    assert (stopped.step, stopped.stopped_by) == (stop_step, "SIGTERM")
    monkeypatch.setattr(tiny.StopAfter, "step", 0)
    assert train(config, tmp_path).step == 17

    _, whole_dir = whole_run
    assert (tmp_path / "record_ids.jsonl").read_bytes() == (whole_dir / "record_ids.jsonl").read_bytes()
    expected, resumed = saved_variables(data, whole_dir, 17), saved_variables(data, tmp_path, 17)
    jax.tree.map(np.testing.assert_array_equal, resumed, expected)
    evaluations = [
        [line for line in read_lines(folder / "metrics.jsonl") if "validation/loss" in line]
        for folder in (tmp_path, whole_dir)
    ]
    assert evaluations[0] == evaluations[1]


def test_every_epoch_shows_every_record_once(whole_run, data):
    ids = [record for line in read_lines(whole_run[1] / "record_ids.jsonl") for record in line["ids"]]
    split = Dataset.open(data).split("train")
    assert sorted(ids[: split.num_records]) == sorted(split.ids(np.arange(split.num_records)))


def test_finished_run_is_left_alone(data, whole_run):
    result, workdir = whole_run
    before = (workdir / "metrics.jsonl").read_bytes()
    assert train(tiny.config(data, train__write_record_ids=True), workdir) == result
    assert (workdir / "metrics.jsonl").read_bytes() == before


def test_resuming_with_another_key_or_other_data_is_refused(data, whole_run, tmp_path):
    _, workdir = whole_run
    with pytest.raises(InputError, match=r"config\.optimizer\.learning_rate = 0\.5: expected 0\.003"):
        train(tiny.config(data, optimizer__learning_rate=0.5), workdir)
    other = tiny.make_dataset(tmp_path / "other", seed=1)
    with pytest.raises(InputError, match="not the data set that the run"):
        train(tiny.config(other), workdir)


def test_patience_stops_early_and_a_restart_stays_stopped(data, tmp_path):
    # At this rate nothing moves, so that no evaluation is better than the first.
    never = dict(train__num_epochs=6, train__patience_evaluations=1, optimizer__learning_rate=1e-12)
    config = tiny.config(data, **never, **tiny.LEAST)
    result = train(config, tmp_path)
    assert result.step == 18
    assert train(config, tmp_path).step == 18


def test_best_metric_that_is_not_a_number_is_refused(data, tmp_path, monkeypatch):
    measure = Evaluator.measure
    monkeypatch.setattr(Evaluator, "measure", lambda *given: {**measure(*given), "mean_accuracy": float("nan")})
    with pytest.raises(InputError, match=r"step 9: validation/mean_accuracy = nan: no checkpoint can be chosen by it"):
        train(tiny.config(data, **tiny.LEAST), tmp_path)


def test_evaluating_on_other_data_is_refused(data, whole_run, tmp_path):
    other = tiny.make_dataset(tmp_path / "other", seed=1)
    with pytest.raises(InputError, match="not the data set that the run in"):
        evaluate_workdir(whole_run[1], "test", str(other))


def test_unknown_best_metric_is_refused_by_name(data, tmp_path):
    with pytest.raises(InputError, match=r"best_metric = 'validation/beauty': expected one of .*validation/loss"):
        train(tiny.config(data, train__best_metric="validation/beauty", **tiny.LEAST), tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_non_finite_loss_stops_the_run_and_keeps_the_last_good_checkpoint(data, tmp_path):
    # After the first epoch the rate is multiplied by 1e30: its checkpoints are sound, then the parameters overflow.
    wild = {"schedule": "step", "step_epochs": (1,), "step_factor": 1e30, "weight_decay": 0.0}
    changes = {f"optimizer__{key}": value for key, value in wild.items()}
    with pytest.raises(NonFiniteLossError, match=r"step \d+: the [\w ]+ is not finite for records \S+") as error:
        train(tiny.config(data, **changes), tmp_path)
    split = Dataset.open(data).split("train")
    named = str(error.value).split("records ")[1].split(";")[0].split(" and ")[0].split(", ")
    assert set(named) <= set(split.ids(np.arange(split.num_records)))
    bad_step = int(str(error.value).split()[1].rstrip(":"))
    kept = max(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert 9 <= kept < bad_step
    jax.tree.map(
        lambda leaf: np.testing.assert_array_equal(np.isfinite(leaf), True), saved_variables(data, tmp_path, kept)
    )


def test_full_disk_is_told_in_one_line_and_the_last_good_checkpoint_is_kept(data, tmp_path, monkeypatch):
    full_after = []

    def disk_usage(folder):
        full_after.append(folder)
        return shutil._ntuple_diskusage(total=10**9, used=10**9, free=10**9 if len(full_after) == 1 else 10)

    monkeypatch.setattr(checkpointing.shutil, "disk_usage", disk_usage)
    with pytest.raises(InputError, match=r"disk full: the checkpoint of step 9 needs [\d,]+ bytes, 10 are free"):
        train(tiny.config(data, **tiny.LEAST), tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["5"]
    monkeypatch.undo()
    assert train(tiny.config(data, **tiny.LEAST), tmp_path).step == 17


def test_second_process_on_the_same_workdir_is_refused(data, tmp_path):
    from mmei_jax.workdir import locked

    with locked(tmp_path), pytest.raises(InputError, match="in use by another process"):
        train(tiny.config(data), tmp_path)


def test_evaluation_restores_the_best_checkpoint_and_writes_metrics_and_predictions(data, whole_run):
    import pandas as pd

    result, workdir = whole_run
    table = evaluate_workdir(workdir, "test")
    summary = json.loads((workdir / "eval" / "test.json").read_text())
    predictions = pd.read_parquet(workdir / "eval" / "test_predictions.parquet")
    split = Dataset.open(data).split("test")
    assert summary["checkpoint_step"] == result.best_step
    assert summary["num_records"] == split.num_records == len(predictions)
    assert predictions["id"].tolist() == split.ids(np.arange(split.num_records))
    chosen = np.stack(predictions["emotion_probabilities"]).argmax(axis=1)
    assert (chosen == predictions["emotion_label"]).mean() == pytest.approx(summary["metrics"]["emotion/accuracy"])
    np.testing.assert_allclose(predictions[["alpha_vision", "alpha_audio", "alpha_text"]].sum(axis=1), 1.0, atol=1e-5)
    assert predictions["user_id"].tolist() == split.column("user_id")
    for task in ("emotion", "intent"):
        assert (
            predictions[f"{task}_choice"].tolist() == np.stack(predictions[f"{task}_probabilities"]).argmax(1).tolist()
        )
    for name, metric in {
        "average_precision": "ranking/map",
        "reciprocal_rank": "ranking/mrr",
        "ndcg@10": "ranking/ndcg@10",
        "hr@10": "ranking/hr@10",
        "recall@10": "ranking/recall@10",
        "emotion_cross_entropy": "emotion/cross_entropy",
        "intent_cross_entropy": "intent/cross_entropy",
    }.items():
        assert predictions[name].mean() == pytest.approx(summary["metrics"][metric], rel=1e-5), name
    for name in ("vision", "audio", "text"):
        assert predictions[f"has_{name}"].tolist() == (split.lengths(name) > 0).tolist()
    # A record alone, of which nothing is known but its tokens, is recommended the same items.
    run = open_best_run(workdir)
    evaluator = Evaluator(run.model, run.config, run.dataset, run.mesh)
    reader = BatchReader(split, run.config, evaluator.ranking_statistics)
    layout = Layout(1, 1, {name: getattr(run.config.data.max_tokens, name)[-1] for name in ("vision", "audio", "text")})
    batch = reader.read(np.array([3]), layout).replace(emotion=None, intent=None, ranking=None)
    alone = evaluator.predict_batch(run.variables, batch)
    assert alone.top_items[0].tolist() == predictions["top_item_index"][3].tolist()
    np.testing.assert_allclose(alone.emotion[0], predictions["emotion_probabilities"][3], atol=1e-5)
    assert alone.ranking is None
    assert "exact ceiling" in table
    assert str(workdir / "eval" / "test.json") in table
    first = (workdir / "eval" / "test.json").read_bytes()
    evaluate_workdir(workdir, "test")
    assert (workdir / "eval" / "test.json").read_bytes() == first


def test_damaged_checkpoint_is_told_in_one_line(data, whole_run, tmp_path):
    workdir = shutil.copytree(whole_run[1], tmp_path / "copy")
    for path in (workdir / "checkpoints").rglob("model/**/*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(InputError, match=r"checkpoints: the checkpoint of step \d+ could not be read: ") as error:
        evaluate_workdir(workdir, "test")
    assert "\n" not in str(error.value)


def test_evaluating_an_empty_workdir_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"config\.json: expected the configuration that train\.py wrote"):
        evaluate_workdir(tmp_path, "test")
