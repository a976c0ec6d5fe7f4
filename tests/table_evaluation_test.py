"""The temperatures of calibrated late fusion, on a model whose branches are too sure of what they say."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from mmei_jax import input_pipeline
from mmei_jax.evaluation import Evaluator
from mmei_jax.extraction import import_features
from mmei_jax.records import Dataset
from mmei_jax.sharding import batch_sharding, make_evaluation_mesh, mesh_over
from mmei_jax.state import build_model, initialize
from mmei_jax.table_evaluation import calibrate_late_fusion
from mmei_jax.table_training import TrainedRow
from mmei_jax.types import MODALITIES
from tests import tiny

CLASSES = {"emotion": ("neutral", "joy", "anger"), "intent": ("ask", "tell")}
TASKS = tuple(CLASSES)
SUBSETS = [subset for subset in itertools.product([True, False], repeat=3) if any(subset)]
# Each branch of each replica is sure by another factor.
SURENESS = np.array([[6.0, 9.0, 14.0], [11.0, 7.0, 16.0]])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Features that tell a little of the labels, and every subset of the modalities in each split."""
    folder, generator = tmp_path_factory.mktemp("features"), np.random.default_rng(0)
    part = np.repeat(["train", "validation", "test"], [7, 70, 70])
    labels = {task: generator.integers(0, len(names), len(part)) for task, names in CLASSES.items()}
    # Of one in ten the label is not known.
    arrays = {task: np.where(generator.random(len(part)) < 0.1, np.nan, label) for task, label in labels.items()}
    for place, name in enumerate(MODALITIES):
        features = generator.normal(size=(len(part), 3, 5))
        for label in labels.values():
            features[..., :3] += 0.5 * np.eye(3)[label][:, None]
        arrays[name] = features.astype(np.float32)
        has_it = np.array([SUBSETS[row % len(SUBSETS)][place] for row in range(len(part))])
        arrays[f"{name}_lengths"] = np.where(has_it, 3, 0)
    np.savez(folder / "features.npz", id=np.array([f"clip{row}" for row in range(len(part))]), part=part, **arrays)
    arguments = [f"--input={folder / 'features.npz'}", f"--output={folder / 'data'}", "--source=here", "--licence=CC0"]
    arguments += [f"--labels={','.join(CLASSES)}", "--split_key=part"]
    arguments += [f"--class_names={task}={','.join(names)}" for task, names in CLASSES.items()]
    assert import_features.main(arguments) == 0
    return folder / "data"


class Subject:
    """Two replicas, their calibration, and each branch's logits and labels by split, read here on one device."""

    def __init__(self, data):
        # Without layers: what is calibrated are the heads.
        small = {"model__dim": 8, "model__num_layers": 0, "loss__ranking": "none"}
        self.config = tiny.config(data, model__architecture="late_fusion", **small)
        self.dataset = Dataset.open(data)
        self.model = build_model(self.config, self.dataset)
        self._apply = jax.jit(lambda variables, batch: self.model.apply(variables, batch, is_training=False))
        self.label = {split: self._labels(split) for split in ("validation", "test")}
        self.is_present = {
            split: np.stack([self.dataset.split(split).lengths(name) > 0 for name in MODALITIES], axis=1)
            for split in ("validation", "test")
        }
        replicas = [self._informed(seed) for seed in (0, 1)]
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *replicas)
        self.row = TrainedRow("late_fusion", self.config, {"seeds": [0, 1]}, None, stacked)
        self.variables, self.temperatures = calibrate_late_fusion(self.row)

    def outputs(self, variables, split):
        """What the model says, in the order of the split."""
        sharding = batch_sharding(mesh_over(jax.devices()[:1]))
        batches = input_pipeline.evaluation_batches(self.dataset, self.config, (split,), sharding)
        names = ("emotion", "intent", "emotion_branches", "intent_branches")
        parts = []
        for batch in batches:
            found, kept = self._apply(variables, batch), np.asarray(batch.is_record)
            parts.append({name: np.asarray(getattr(found, name))[kept] for name in names})
        batches.close()
        return {name: np.concatenate([part[name] for part in parts]) for name in names}

    def replica(self, variables, index):
        return jax.tree.map(lambda leaf: jnp.asarray(leaf[index]), variables)

    def _labels(self, split):
        """Class ids by task, -1 where there is none."""
        records, found = self.dataset.split(split), {}
        for task in TASKS:
            value, is_labelled = records.gather_label(task, np.arange(records.num_records))
            found[task] = np.where(is_labelled, value, -1)
        return found

    def _informed(self, seed):
        """Fresh parameters whose heads are a regression on the validation records, times a factor."""
        variables = jax.device_get(jax.jit(lambda: initialize(self.model, seed))())
        outputs = self.outputs(variables, "validation")
        for place, name in enumerate(MODALITIES):
            for task in TASKS:
                kept = (self.label["validation"][task] >= 0) & self.is_present["validation"][:, place]
                logits, label = outputs[f"{task}_branches"][kept, place], self.label["validation"][task][kept]
                joined = np.concatenate([logits, np.ones((len(logits), 1))], axis=1)
                found, *_ = np.linalg.lstsq(joined, np.eye(logits.shape[1])[label], rcond=1e-3)
                found = (SURENESS[seed, place] * found).astype(np.float32)
                layer = variables["params"][f"branch_{name}"][f"{task}_head"]["logits"]
                layer["kernel"], layer["bias"] = layer["kernel"] @ found[:-1], layer["bias"] @ found[:-1] + found[-1]
        return variables


@pytest.fixture(scope="module")
def subject(data):
    return Subject(data)


def cross_entropy(logits, label):
    return -np.mean(scipy.special.log_softmax(logits.astype(np.float64), axis=1)[np.arange(len(label)), label])


def test_temperatures_minimise_the_validation_cross_entropy_of_each_branch(subject):
    found = []
    for index in range(2):
        outputs = subject.outputs(subject.replica(subject.row.variables, index), "validation")
        for task in TASKS:
            label = subject.label["validation"][task]
            for place in range(len(MODALITIES)):
                kept = (label >= 0) & subject.is_present["validation"][:, place]
                logits = outputs[f"{task}_branches"][kept, place]

                def loss(log_temperature, logits=logits, label=label[kept]):
                    return cross_entropy(logits / np.exp(log_temperature), label)

                best = scipy.optimize.minimize_scalar(loss, bounds=np.log([0.1, 10.0]), method="bounded")
                found.append(subject.temperatures[index][task][place])
                assert 0 < kept.sum() < len(kept) - 20
                assert found[-1] == pytest.approx(np.exp(best.x), rel=6e-3), (index, task, place)
                assert loss(np.log(found[-1])) < loss(0.0)
                statistics = subject.variables["statistics"][f"{task}_temperature"]
                assert statistics[index, place] == np.float32(found[-1])
    # Within the bounds, and none the same: one in another's place would be seen.
    assert all(0.11 < value < 9.0 for value in found)
    assert len(set(found)) == len(found)


def test_calibrated_probabilities_are_the_mean_of_the_tempered_branches(subject):
    num_changed = 0
    for index in range(2):
        calibrated = subject.replica(subject.variables, index)
        evaluator = Evaluator(subject.model, subject.config, subject.dataset, make_evaluation_mesh())
        written = list(evaluator.predict(calibrated, ("test",)))
        plain = subject.outputs(subject.replica(subject.row.variables, index), "test")
        present = subject.is_present["test"]
        shares = np.where(present.any(axis=1, keepdims=True), present, 1.0)
        shares = shares / shares.sum(axis=1, keepdims=True)
        for task in TASKS:
            temperature = np.array(subject.temperatures[index][task])[None, :, None]
            tempered = scipy.special.softmax(plain[f"{task}_branches"] / temperature, axis=2)
            expected = np.einsum("rm,rmc->rc", shares, tempered)
            found, choice, losses = (
                np.concatenate([getattr(part, name) for part in written])[: len(expected)]
                for name in (task, f"{task}_choice", f"{task}_cross_entropy")
            )
            np.testing.assert_allclose(found, expected, atol=1e-5)
            np.testing.assert_array_equal(choice, expected.argmax(axis=1))
            label = subject.label["test"][task]
            of_label = np.take_along_axis(expected, np.maximum(label, 0)[:, None], axis=1)[:, 0]
            np.testing.assert_allclose(losses[label >= 0], -np.log(of_label)[label >= 0], atol=1e-4)
            # A temperature alone changes no choice; several branches weigh otherwise against one another.
            is_alone, before = present.sum(axis=1) == 1, plain[task].argmax(axis=1)
            assert is_alone.any()
            np.testing.assert_array_equal(choice[is_alone], before[is_alone])
            num_changed += (choice != before).sum()
    assert num_changed > 0


def test_calibration_changes_nothing_but_the_temperatures(subject):
    before, after = subject.row.variables, subject.variables
    jax.tree.map(np.testing.assert_array_equal, before["params"], after["params"])
    for name, value in before["statistics"].items():
        if not name.endswith("_temperature"):
            jax.tree.map(np.testing.assert_array_equal, value, after["statistics"][name])
