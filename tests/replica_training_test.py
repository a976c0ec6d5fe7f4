"""Early stopping of replicas, on validation figures that are written here; and how often checkpoints are."""

import jax
import numpy as np
import pytest

from mmei_jax import replica_training
from mmei_jax.item_words import open_dataset
from mmei_jax.part_times import PartTimes
from mmei_jax.replica_training import Budget, train_replicas
from mmei_jax.workdir import Stopped, StopRequest
from tests import tiny

# By replica, the figure after each pass; patience is two evaluations. Equal is not better, and what comes after the end
# of a replica's patience counts no more.
FIGURES = {
    "stops": [0.1, 0.5, 0.4, 0.5, 0.9, 0.9],
    "improves": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6],
    "recovers": [0.3, 0.2, 0.35, 0.3, 0.4, 0.3],
}
BEST_PLACES, ENDS = [1, 5, 4], [3, 5, 5]


class Training:
    """Trains a replica for each list of figures; in the evaluator's place stands what gives these out."""

    def __init__(self, data, folder, figures, *, metric="mean_accuracy", patience=2):
        changes = {
            "data__modalities": ("text",),
            "loss__ranking": "none",
            "train__num_epochs": len(figures[0]),
            "train__patience_evaluations": patience,
            "train__best_metric": f"validation/{metric}",
        }
        self._config = tiny.config(data, **tiny.LEAST, **changes)
        self._folder, self._figures, self._metric = folder, figures, metric
        # After each evaluation, the parameters of all replicas.
        self.seen = []
        self.stop = StopRequest()
        self.saved_steps = []

    def run(self, stop_after=None):
        outer = self

        class Evaluator:
            def __init__(self, *_):
                pass

            def measure_replicas(self, variables, splits):
                assert splits == ("validation",)
                outer.seen.append(jax.device_get(variables["params"]))
                if len(outer.seen) == stop_after:
                    outer.stop.signal_name = "SIGTERM"
                return [{"loss": 1.0, outer._metric: part[len(outer.seen) - 1]} for part in outer._figures]

        class Checkpointer(replica_training.ReplicaCheckpointer):
            def save(self, step, *arguments):
                outer.saved_steps.append(step)
                super().save(step, *arguments)

        times = PartTimes(self._folder / "times.json")
        with pytest.MonkeyPatch.context() as patch, times.stage("seeds"):
            patch.setattr(replica_training, "Evaluator", Evaluator)
            patch.setattr(replica_training, "ReplicaCheckpointer", Checkpointer)
            return train_replicas(
                self._config,
                {"seed": list(range(len(self._figures)))},
                open_dataset(self._config),
                self._folder / "seeds",
                Budget(20, 0),
                self.stop,
                times,
                title="row",
            )


def parameters_equal(one, other, index):
    """Whether a replica's parameters are the same in two trees, to the bit."""
    return all(
        np.array_equal(left[index], right[index])
        for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    )


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    training = Training(data, tmp_path_factory.mktemp("training"), list(FIGURES.values()))
    return training, training.run()


def test_replica_is_frozen_exactly_when_its_patience_ends_and_the_others_go_on(trained):
    training, result = trained
    (history,) = (part["evaluations"] for part in result.progress.history)
    assert [part["is_active"] for part in history] == [[place < end or end == 5 for end in ENDS] for place in range(6)]
    for index, end in enumerate(ENDS):
        for place in range(1, 6):
            is_same = parameters_equal(training.seen[place], training.seen[place - 1], index)
            assert is_same == (place > end), (index, place)


def test_best_parameters_of_each_replica_are_those_of_its_best_evaluation(trained):
    training, result = trained
    (history,) = (part["evaluations"] for part in result.progress.history)
    values = list(FIGURES.values())
    assert result.progress.best_values == [part[place] for part, place in zip(values, BEST_PLACES, strict=True)]
    assert result.progress.best_steps == [history[place]["step"] for place in BEST_PLACES]
    for index, place in enumerate(BEST_PLACES):
        assert parameters_equal(result.variables["params"], training.seen[place], index)
        assert not parameters_equal(result.variables["params"], training.seen[place - 1], index)


def test_patience_is_kept_by_a_training_that_stops_and_goes_on_also_where_smaller_is_better(trained, data, tmp_path):
    whole, expected = trained
    figures = [[-value for value in part] for part in FIGURES.values()]
    training = Training(data, tmp_path, figures, metric="emotion/cross_entropy")
    # In the middle of the first replica's patience.
    with pytest.raises(Stopped, match="SIGTERM"):
        training.run(stop_after=3)
    assert len(training.seen) == 3
    updates = PartTimes(tmp_path / "times.json").seconds["seeds"]["updates"]
    training.stop = StopRequest()
    found = training.run()
    assert len(training.seen) == 6
    assert found.progress.best_steps == expected.progress.best_steps
    assert found.progress.best_values == [-value for value in expected.progress.best_values]
    for index in range(3):
        assert parameters_equal(found.variables["params"], expected.variables["params"], index)
        assert parameters_equal(training.seen[5], whole.seen[5], index)
    # The second command's time is added to the first one's.
    assert PartTimes(tmp_path / "times.json").seconds["seeds"]["updates"] > updates > 0.0


@pytest.mark.parametrize(("patience", "num_evaluations"), [(1, 3), (0, 4)], ids=["all stop", "no patience is set"])
def test_training_ends_with_its_last_replica(data, tmp_path, patience, num_evaluations):
    training = Training(data, tmp_path, [[0.3, 0.2, 0.1, 0.0], [0.1, 0.2, 0.1, 0.0]], patience=patience)
    result = training.run()
    assert len(training.seen) == num_evaluations
    assert result.progress.best_values == [0.3, 0.2]


def test_checkpoint_is_saved_at_the_end_when_asked_to_stop_and_once_in_a_while(data, tmp_path, monkeypatch):
    figures = [[0.1, 0.2, 0.3]]
    training = Training(data, tmp_path / "seldom", figures)
    result = training.run()
    steps = [part["step"] for part in result.progress.history[0]["evaluations"]]
    assert training.saved_steps == steps[-1:]
    stopped = Training(data, tmp_path / "stopped", figures)
    with pytest.raises(Stopped):
        stopped.run(stop_after=2)
    assert stopped.saved_steps == steps[1:2]
    monkeypatch.setattr(replica_training, "_SAVE_EVERY_SECONDS", 0.0)
    often = Training(data, tmp_path / "often", figures)
    often.run()
    assert often.saved_steps == steps
