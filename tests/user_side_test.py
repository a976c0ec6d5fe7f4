"""The user side of Eq. 7: embeddings of users, affect profiles, and users of whom nothing is known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmei_jax import affect_profiles, input_pipeline, user_context
from mmei_jax.affect_profiles import running_means
from mmei_jax.batching import BatchReader
from mmei_jax.evaluation import Evaluator, open_best_run
from mmei_jax.models.user_side import UserSide
from mmei_jax.packing import padded_layouts
from mmei_jax.records import Dataset
from mmei_jax.state import build_model, initialize
from mmei_jax.training import train
from mmei_jax.types import InputError, UserContext
from mmei_jax.user_context import read_user
from tests import tiny

EMOTIONS_AND_INTENTS = 7 + 4


@pytest.fixture(scope="module")
def profiles(data, tmp_path_factory):
    """Those of a run of its own."""
    folder = tmp_path_factory.mktemp("profiles")
    train(tiny.config(data, train__num_epochs=1, **tiny.LEAST), folder / "run")
    path = folder / "made" / "profiles.parquet"
    assert affect_profiles.main([f"--workdir={folder / 'run'}", f"--output={path}"]) == 0
    return path


def configure(data, profiles, **changes):
    changes = {"train__num_epochs": 1, **tiny.LEAST, **changes}
    return tiny.config(data, model__user_embedding=True, data__affect_profiles=str(profiles), **changes)


def test_running_means_are_those_of_pandas():
    generator = np.random.default_rng(0)
    users = [None if user == 3 else f"user {user}" for user in generator.integers(0, 4, 40)]
    affect = generator.random((40, 2))
    found, has_profile = running_means(affect, users)
    frame = pandas.DataFrame({"user": users, "a": affect[:, 0], "b": affect[:, 1]})
    expected = frame.groupby("user")[["a", "b"]].transform(lambda column: column.expanding().mean().shift())
    np.testing.assert_array_equal(has_profile, expected["a"].notna())
    assert 20 < has_profile.sum() < 40
    np.testing.assert_allclose(found, expected.fillna(0.0), atol=1e-12)


def read_batch(config, split, indices):
    dataset = Dataset.open(config.data.path)
    reader = BatchReader(dataset.split(split), config, input_pipeline.ranking_statistics(dataset, config))
    return reader.read(np.asarray(indices), padded_layouts(config.data, len(indices))[-1])


def test_batch_tells_rows_of_training_users_and_profiles_of_its_records(data, profiles):
    config, dataset = configure(data, profiles), Dataset.open(data)
    names = sorted(set(dataset.split("train").column("user_id")))
    users = dataset.split("validation").column("user_id")
    indices = [5, -1, 0, *range(10, 20)]
    found = read_batch(config, "validation", indices).user
    expected = [names.index(users[index]) if index >= 0 and users[index] in names else -1 for index in indices]
    np.testing.assert_array_equal(found.index, expected)
    assert (found.index >= 0).any()
    lines = {(line["split"], line["id"]): line["profile"] for line in pq.read_table(profiles).to_pylist()}
    ids = dataset.split("validation").column("id")
    for row, index in enumerate(indices):
        profile = lines["validation", ids[index]] if index >= 0 else None
        assert found.has_profile[row] == (profile is not None)
        np.testing.assert_array_equal(
            found.profile[row], np.zeros(EMOTIONS_AND_INTENTS) if profile is None else profile
        )
    assert read_batch(tiny.config(data), "validation", [0]).user is None


def test_profiles_are_means_of_what_the_run_predicts(data, profiles):
    """Of emotions and intents, over the records before; first records have none."""
    run, table = open_best_run(profiles.parents[1] / "run"), pq.read_table(profiles).to_pandas()
    evaluator = Evaluator(run.model, run.config, run.dataset, run.mesh)
    for name in run.dataset.split_names:
        split, lines = run.dataset.split(name), table[table["split"] == name]
        parts = list(evaluator.predict(run.variables, (name,)))
        read = np.concatenate([np.concatenate([part.emotion, part.intent], axis=1) for part in parts])
        read = read[: split.num_records]
        np.testing.assert_allclose(np.stack(lines["affect"]), read, atol=1e-6)
        users = pandas.Series(split.column("user_id"))
        before = pandas.DataFrame(read).groupby(users).transform(lambda column: column.expanding().mean().shift())
        np.testing.assert_array_equal(lines["profile"].isna(), ~users.duplicated())
        means = np.stack(lines["profile"].dropna().to_list())
        np.testing.assert_allclose(means, before[users.duplicated()], atol=1e-6)


def test_user_of_a_new_clip_has_all_of_their_records_in_the_profile(data, profiles):
    config, dataset = configure(data, profiles), Dataset.open(data)
    table, names = pq.read_table(profiles).to_pandas(), sorted(set(dataset.split("train").column("user_id")))
    users = {
        (split, record): user
        for split in dataset.split_names
        for record, user in zip(dataset.split(split).column("id"), dataset.split(split).column("user_id"), strict=True)
    }
    of_lines = [users[key] for key in zip(table["split"], table["id"], strict=True)]
    expected = pandas.DataFrame(np.stack(table["affect"])).groupby(of_lines).mean()
    only_tested = sorted(set(of_lines) - set(names))[0]
    for user in (names[0], names[-1], only_tested):
        found = read_user(dataset, config, user)
        assert found.index.tolist() == [names.index(user) if user in names else -1]
        assert found.has_profile.tolist() == [True]
        np.testing.assert_allclose(found.profile, expected.loc[[user]], atol=1e-6)
    unknown = read_user(dataset, config, "nobody")
    assert (unknown.index.tolist(), unknown.has_profile.tolist()) == ([-1], [False])
    np.testing.assert_array_equal(unknown.profile, np.zeros((1, EMOTIONS_AND_INTENTS)))
    # A run may read one of the two alone.
    assert read_user(dataset, configure(data, ""), names[0]).profile is None
    profile_alone = tiny.config(data, data__affect_profiles=str(profiles))
    assert read_user(dataset, profile_alone, names[0]).index is None


def test_user_is_refused_where_nothing_can_be_known_of_them(data, profiles, tmp_path):
    dataset = Dataset.open(data)
    with pytest.raises(InputError, match=r"user 'someone': the run has no user side .*: expected no user"):
        read_user(dataset, tiny.config(data), "someone")
    older = tmp_path / "profiles.parquet"
    pq.write_table(pq.read_table(profiles).drop_columns(["affect"]), older)
    assert read_batch(configure(data, older), "train", [0]).user.profile is not None
    with pytest.raises(InputError, match=r"no column affect, .*: expected a file that .* makes now"):
        read_user(dataset, configure(data, older), "someone")


def side(rate=0.0):
    config = tiny.config("unused", model__user_embedding=True, model__user_dropout_rate=rate)
    return UserSide(config.model, num_users=3, profile_dim=2)


CONTEXT = UserContext(
    index=jnp.array([2, -1, 0, -1]),
    profile=jnp.array([[1.0, 0.0], [0.5, 0.5], [0.0, 0.0], [0.0, 0.0]]),
    has_profile=jnp.array([True, True, False, False]),
)


def test_user_side_adds_a_row_and_a_projected_profile_and_nothing_for_the_unknown():
    module = side()
    variables = jax.jit(lambda: module.init(jax.random.key(0), None, 4, is_training=False))()
    variables = jax.tree.map(lambda box: box.unbox(), variables, is_leaf=lambda leaf: hasattr(leaf, "unbox"))
    table, kernel = variables["params"]["embedding"], variables["params"]["profile_projection"]["kernel"]
    assert table.shape == (3, 8)
    found = module.apply(variables, CONTEXT, 4, is_training=False)
    expected = np.zeros((4, 8))
    expected[0] = table[2] + kernel[0]
    expected[1] = (kernel[0] + kernel[1]) / 2
    expected[2] = table[0]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_array_equal(found[3], np.zeros(8))
    np.testing.assert_array_equal(module.apply(variables, None, 4, is_training=True), np.zeros((4, 8)))
    # The unknown get no gradient either.
    gradient = jax.grad(lambda values: module.apply(values, CONTEXT, 4, is_training=False).sum())(variables)
    np.testing.assert_array_equal(gradient["params"]["embedding"][1], np.zeros(8))


def test_users_are_left_out_at_the_rate_in_training_alone():
    module, many = side(rate=0.25), UserContext(index=jnp.zeros(4000, jnp.int32))
    variables = module.init(jax.random.key(0), None, 4, is_training=False)
    found = module.apply(variables, many, 4000, is_training=True, rngs={"dropout": jax.random.key(1)})
    share = float((found == 0.0).all(axis=1).mean())
    assert abs(share - 0.25) < 0.03
    assert (module.apply(variables, many, 4000, is_training=False) != 0.0).any(axis=1).all()


@pytest.mark.parametrize("architecture", ["mmei", "late_fusion", "pooled_logistic"])
def test_user_of_whom_nothing_is_known_is_ranked_for_by_affect_alone(data, profiles, architecture):
    """The same parameters without a user side give the same embedding; known users get another one."""
    config = configure(data, profiles, model__architecture=architecture)
    model = build_model(config, Dataset.open(data))
    variables = jax.jit(lambda: initialize(model, 0))()
    batch = jax.device_put(read_batch(config, "train", range(8)))
    apply = jax.jit(lambda values, given: model.apply(values, given, is_training=False).user_embedding)
    known, unknown = apply(variables, batch), apply(variables, batch.replace(user=None))
    plain = build_model(tiny.config(data, model__architecture=architecture), Dataset.open(data))
    parameters = {key: value for key, value in variables["params"].items() if key != "user_side"}
    alone = jax.jit(functools.partial(plain.apply, is_training=False))(
        {**variables, "params": parameters}, batch.replace(user=None)
    )
    np.testing.assert_allclose(unknown, alone.user_embedding, rtol=0, atol=1e-6)
    assert (np.abs(known - unknown).max(axis=1) > 1e-4).all()


def test_run_learns_users_and_is_refused_with_other_profiles(data, profiles, tmp_path):
    path = tmp_path / "profiles.parquet"
    path.write_bytes(profiles.read_bytes())
    config = configure(data, path, model__user_dropout_rate=0.2)
    train(config, tmp_path / "run")
    run = open_best_run(tmp_path / "run")
    assert run.model.tasks.num_users == len(set(Dataset.open(data).split("train").column("user_id")))
    assert run.model.tasks.profile_dim == EMOTIONS_AND_INTENTS
    fresh = jax.jit(lambda: initialize(run.model, config.seed))()["params"]["user_side"]
    for name, (before, after) in {
        "embedding": (fresh["embedding"], run.variables["params"]["user_side"]["embedding"]),
        "profile": (fresh["profile_projection"], run.variables["params"]["user_side"]["profile_projection"]),
    }.items():
        differences = jax.tree.map(
            lambda old, new: float(np.abs(np.asarray(old) - np.asarray(new)).max()), before, after
        )
        assert max(jax.tree.leaves(differences)) > 1e-4, name
    table = pq.read_table(path)
    pq.write_table(table.slice(0, table.num_rows), path, compression="none")
    # As a new process would see the file.
    user_context._read_profiles.cache_clear()
    with pytest.raises(InputError, match=r"affect_profiles = .*: not the file that the run in .* was trained with"):
        open_best_run(tmp_path / "run")


def profile_column(values):
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ravel(values), pa.float32()), 2)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"id": ["a"], "profile": profile_column([[0, 1]])}, "columns id, profile: expected split, id, profile"),
        ({"split": ["t"], "id": ["a"], "profile": [[0.0, 1.0]]}, "columns split, id, profile: expected"),
        (
            {"split": ["t"], "id": ["a"], "profile": profile_column([[0, 1]]), "affect": [[0.0, 1.0]]},
            "columns split, id, profile, affect: expected",
        ),
        (
            {"split": ["t", "t"], "id": ["a", "b"], "profile": profile_column([[0, 1], [0, np.nan]])},
            "row 1: profile .*: expected finite numbers",
        ),
        ({"split": ["t"], "id": ["a"], "profile": profile_column([[0, 1]])}, "no line for record '.*' of split train"),
    ],
)
def test_unfit_profiles_are_refused(data, tmp_path, columns, message):
    path = tmp_path / "profiles.parquet"
    pq.write_table(pa.table(columns), path)
    with pytest.raises(InputError, match=message):
        read_batch(configure(data, path), "train", [0])


def test_missing_file_of_profiles_and_a_missing_run_are_refused(data, tmp_path, capsys):
    with pytest.raises(InputError, match=r"config\.data\.affect_profiles = .*: expected a Parquet file"):
        read_batch(configure(data, tmp_path / "missing.parquet"), "train", [0])
    output = tmp_path / "profiles.parquet"
    assert affect_profiles.main([f"--workdir={tmp_path / 'no_run'}", f"--output={output}"]) == 2
    assert str(tmp_path / "no_run") in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__user_embedding": True, "loss__ranking": "none"}, "model.user_embedding = True: expected False when"),
        ({"data__affect_profiles": "x", "loss__ranking": "none"}, "data.affect_profiles = 'x': expected '' when"),
        ({"model__user_dropout_rate": 0.1}, "model.user_dropout_rate = 0.1: expected 0 without"),
        ({"model__user_dropout_rate": 1.0, "model__user_embedding": True}, "expected a rate in"),
    ],
)
def test_keys_that_would_change_nothing_are_refused(data, changes, message):
    with pytest.raises(InputError, match=message):
        tiny.config(data, **changes)
