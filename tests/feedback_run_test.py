"""The command of the feedback loop, on a tiny run."""

import dataclasses
import hashlib
import json
import re
import shutil
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from configs import feedback
from mmei_jax.evaluation import Evaluator, open_best_run
from mmei_jax.feedback import loop_config, run
from mmei_jax.feedback import pools as pools_module
from mmei_jax.feedback.learning import policy_scores
from mmei_jax.feedback.loop import FeedbackLoop
from mmei_jax.feedback.pools import load_pools, read_pools
from mmei_jax.feedback.run import read_loop_config, run_loop
from mmei_jax.feedback.slate_policies import PolicyMaker
from mmei_jax.reports.claims import read_ab
from mmei_jax.simulation import aigc_int_dataset
from mmei_jax.training import train
from mmei_jax.types import InputError
from mmei_jax.workdir import Stopped, StopRequest
from tests import markdown, processes, synthetic_pool, tiny

# Enough for every emotion with every intent.
NUM_VALIDATION, NUM_TEST = 620, 600
# Converting a configuration, comparing and hashing it read every key without using any.
NOT_A_USE = (loop_config.__file__, dataclasses.__file__, "<string>")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    data = tmp_path_factory.mktemp("data") / "aigc_int"
    sizes = f"--split_sizes=train=140,validation={NUM_VALIDATION},test={NUM_TEST}"
    assert aigc_int_dataset.main([f"--output={data}", sizes, f"--dim={tiny.DIM}", "--seed=0"]) == 0
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    train(tiny.config(data, train__num_epochs=1), folder)
    return folder


def make_config(trained, **changes):
    small = {
        "visits__num_users": 60,
        "pool__num_records": 0,
        "learning__temperature": 0.1,
        "ab__num_draws": 50,
    }
    return synthetic_pool.make_config(**{**small, "pool__run": str(trained), **changes})


@pytest.fixture(scope="module")
def keys_read():
    """Keys of the configuration that the loop of :func:`finished` used, by group."""
    return set()


@pytest.fixture(scope="module")
def finished(trained, keys_read, tmp_path_factory):
    workdir, lines = tmp_path_factory.mktemp("loops") / "first", []
    config = make_config(trained)
    with pytest.MonkeyPatch.context() as patch:
        for group in groups_of(config):
            patch.setattr(group, "__getattribute__", watch(group, keys_read), raising=False)
        run_loop(config, workdir, command="python -m mmei_jax.feedback.run", tell=lines.append)
    return workdir, lines


def groups_of(config):
    return {type(value) for value in vars(config).values() if dataclasses.is_dataclass(value)} | {type(config)}


def watch(group, read):
    names = {field.name for field in dataclasses.fields(group)}

    def note(self, name):
        caller = sys._getframe(1).f_code
        if name in names and caller.co_filename not in NOT_A_USE and caller.co_name != "__post_init__":
            read.add((group.__name__, name))
        return object.__getattribute__(self, name)

    return note


def files_of(workdir):
    """Contents by name, but for the log, whose segments are named by their writers."""
    paths = [path for path in sorted(workdir.rglob("*")) if path.is_file() and "log" not in path.parts]
    return {str(path.relative_to(workdir)): path.read_bytes() for path in paths}


def test_loop_that_was_stopped_leaves_the_same_files(trained, finished, tmp_path):
    workdir, lines = finished
    # Killed in the second round, then stopped before its result, and in the A/B.
    shutil.copytree(workdir, tmp_path / "loop")
    for name in ("rounds/round_0001.json", "rounds.json", "ab.json", "report/report.md"):
        (tmp_path / "loop" / name).unlink()
    told = []

    def go_on(last):
        """Asks to stop once a line is told that begins so."""
        stop = StopRequest()

        def tell(line):
            told.append(line)
            if last and line.startswith(last):
                stop.signal_name = "SIGTERM"

        options = {"command": "python -m mmei_jax.feedback.run", "tell": tell, "stop": stop}
        run_loop(make_config(trained), tmp_path / "loop", **options)

    pool, *_ = (line for line in lines if line.startswith("pool: "))
    of_round = [line for line in lines if line.startswith("round 2 of 2: ")]
    for begun, last, so_far in (
        ([pool, "going on after round 1", *of_round[:3]], "round 2 of 2: judging", 1),
        ([pool, "going on after round 1", *of_round, *lines[10:13]], "A/B, behaviour_only", 2),
    ):
        told.clear()
        with pytest.raises(Stopped, match="SIGTERM"):
            go_on(last)
        assert told == begun
        assert len(list((tmp_path / "loop" / "rounds").glob("*.json"))) == so_far
        assert not (tmp_path / "loop" / "ab.json").exists()
    told.clear()
    go_on("")
    assert told == [pool, "going on after round 2", *lines[10:]]
    ours, theirs = files_of(tmp_path / "loop"), files_of(workdir)
    assert ours.keys() == theirs.keys()
    assert {"rounds.json", "ab.json", "report/report.md", "report/report.html", "report/feedback.png"} <= ours.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []


def test_loop_tells_what_it_does_and_what_came_of_it(trained, finished):
    workdir, lines = finished
    results = [json.loads((workdir / "rounds" / f"round_000{number}.json").read_text()) for number in range(2)]
    ab = read_ab(workdir)
    expected = [
        f"reading {trained}: the users' side of its validation splits for the rounds and of its test splits",
        f"pool: {NUM_VALIDATION} records for the rounds and {NUM_TEST} for the A/B, 2,000 items",
    ]
    for number, result in enumerate(results, 1):
        learned = result["candidates"][0]
        expected += [
            f"round {number} of 2: {result['policy']} fills the slates of 3 visits of 60 simulated users",
            f"round {number} of 2: learning from {result['num_learning_visits']} visits",
            f"round {number} of 2: judging 8 policies on 90 visits of other users",
            f"round {number} of 2: {learned['policy']} {learned['gate']['reason']} (true simulated gain ",
        ]
    expected += [
        "A/B: behaviour_only fills 6 slates of each simulated user",
        "A/B: 3 arms, 2 seeds of 3 visits of each user",
    ]
    for arm, policy in ab["policies"].items():
        level = ab["arms"][arm]["dwell_seconds"]["value"]
        expected.append(f"A/B, {arm} ({policy}): {level:.1f} s per visit, satisfaction ")
    expected += [
        "simulated: engagement time in online evaluation, emotion-driven over behaviour only: ",
        "simulated: satisfaction in online evaluation, emotion-driven over behaviour only: ",
    ]
    assert [line[: len(part)] for line, part in zip(lines, expected, strict=True)] == expected
    deployed = [line.split("deployed: ")[1] for line in lines if "deployed: " in line]
    assert deployed == [result["deployed"] for result in results]
    uplift = 100 * ab["uplift"]["emotion_driven"]["satisfaction"]["value"]
    assert f"{uplift:+.1f} % [" in lines[-1]


def test_report_tells_rounds_policies_uplifts_and_claims(finished):
    workdir, _ = finished
    report = (workdir / "report" / "report.md").read_text()
    tables = markdown.tables(report)
    rounds = next(rows for head, rows in tables.items() if head.startswith("round |"))
    assert len(rounds[1:]) == 2
    policies = next(rows for head, rows in tables.items() if head.startswith("policy |"))
    assert len(policies[1:]) == 8
    arms = next(rows for head, rows in tables.items() if head.startswith("arm |"))
    assert [row[0] for row in arms[1:]] == ["behaviour only", "emotion-driven", "placebo (another user's record)"]
    claims = next(rows for head, rows in tables.items() if head.startswith("claim |"))
    assert [row[1] for row in claims[1:]] == ["+15.2 %", "+11.8 %"]
    assert "Simulated" in report
    assert read_ab(workdir)["num_users"] == 60
    found = json.loads((workdir / "rounds.json").read_text())
    source = found["source"]
    assert (source["split"], source["num_records"]) == ("validation", NUM_VALIDATION)
    assert (source["ab_split"], source["ab_num_records"]) == ("test", NUM_TEST)


def test_arms_meet_other_records_than_those_that_taught(trained, finished, monkeypatch):
    """Records, moods and what the model says of them are the test split's."""
    given = []
    monkeypatch.setattr(run, "compare", lambda *arguments, **options: given.append(arguments) or {})
    config = make_config(trained)
    pools = load_pools(finished[0])
    loop = FeedbackLoop(config, pools.rounds, pools.rounds_world, finished[0])
    run._compare(loop, pools)
    ((_, world, users, behaviour, emotion),) = given
    best = open_best_run(trained)
    shown, items = Evaluator(best.model, best.config, best.dataset, best.mesh).embed(best.variables, ("test",))
    scores = policy_scores(loop.state.current.parameters, jnp.asarray(shown), jnp.asarray(items))
    np.testing.assert_allclose(emotion.policy.record_scores, scores, rtol=1e-5, atol=1e-5)
    labels = {name: best.dataset.split("test").column(f"label_{name}") for name in ("emotion", "intent")}
    for name, values in labels.items():
        np.testing.assert_array_equal(np.asarray(values)[users.record], getattr(users, name))
    np.testing.assert_array_equal(users.taste, loop.state.users.taste)
    assert world.pool.max() == NUM_TEST - 1
    # What behaviour alone knows of a user does not depend on the records.
    np.testing.assert_array_equal(behaviour.policy.user_factors, loop.behaviour_history().policy.user_factors)
    assert behaviour.policy.record_scores.shape == emotion.policy.record_scores.shape
    assert not behaviour.policy.record_scores.any()
    personal = behaviour.policy.user_factors[:, :-1] @ behaviour.policy.item_factors[:, :-1].T
    known = run._deviations(behaviour.policy)
    assert known["users"] == pytest.approx(float(jnp.sqrt(jnp.square(personal).mean())), rel=1e-4, abs=1e-7)
    assert known["items"] == pytest.approx(float(behaviour.policy.item_factors[:, -1].std()), rel=1e-4)
    maker = PolicyMaker(pools.ab, config.visits.num_users, config.policies, 0.1)
    with pytest.raises(ValueError, match="reads records of another pool"):
        maker.without_records(loop.state.current.policy)


def test_loop_killed_before_its_pools_takes_no_other_configuration(trained, finished, tmp_path):
    for name in ("config.json", "pool.json"):
        (tmp_path / name).write_bytes((finished[0] / name).read_bytes())
    with pytest.raises(InputError, match=r"config.json: of a loop with another config.seed, 0 instead of 1; expected"):
        run_loop(make_config(trained, seed=1), tmp_path, command="")


@pytest.mark.parametrize(
    "changed", [{"data": {"affect_profiles": "profiles.parquet"}}, {"model": {"user_embedding": True}}]
)
def test_run_that_reads_whose_record_it_is_is_refused(trained, tmp_path, monkeypatch, changed):
    """Its F_u holds the record's owner, who is not the user of the loop that shows it."""
    best = open_best_run(trained)
    ((group, values),) = changed.items()
    ((key, value),) = values.items()
    section = dataclasses.replace(getattr(best.config, group), **values)
    other = dataclasses.replace(best, config=dataclasses.replace(best.config, **{group: section}))
    monkeypatch.setattr(pools_module, "open_best_run", lambda *_: other)
    with pytest.raises(InputError, match=f"trained with {group}.{key} = {value!r}"):
        run_loop(make_config(trained), tmp_path / "loop", command="")
    assert not (tmp_path / "loop").exists()


def records_for_every_state(workdir):
    """By split, how many of the first records show every state; and the arrays of the pools."""
    arrays = safetensors.numpy.load((workdir / "pool.safetensors").read_bytes())
    counts = {}
    for split, group in (("validation", "rounds"), ("test", "ab")):
        states = arrays[f"{group}.emotion"] * 100 + arrays[f"{group}.intent"]
        counts[split] = 1 + int(np.unique(states, return_index=True)[1].max())
    return counts, arrays


def test_split_that_lacks_a_state_is_refused_before_anything_is_written(trained, finished, tmp_path, monkeypatch):
    counts, _ = records_for_every_state(finished[0])
    read = pools_module._read_split
    for key, short in (("ab", "test"), ("pool", "validation")):

        def read_fewer(run, evaluator, split, num_records, *, short=short):
            found, items = read(run, evaluator, split, num_records)
            kept = slice(None, counts[split] - (split == short))
            return {name: values[kept] for name, values in found.items()}, items

        monkeypatch.setattr(pools_module, "_read_split", read_fewer)
        message = f"config.{key}.split = '{short}', config.pool.num_records = 0: pool of {counts[short] - 1} records: "
        with pytest.raises(InputError, match=re.escape(message)):
            run_loop(make_config(trained), tmp_path / "loop", command="")
        assert not (tmp_path / "loop").exists()


def test_pools_are_the_first_records_of_both_splits(trained, finished):
    counts, whole = records_for_every_state(finished[0])
    num_records = max(counts.values())
    assert num_records < NUM_TEST
    arrays, source = read_pools(make_config(trained, pool__num_records=num_records))
    assert source["num_records"] == source["ab_num_records"] == num_records
    assert arrays.keys() == whole.keys()
    for name, values in arrays.items():
        expected = whole[name] if name == "item_embedding" else whole[name][:num_records]
        np.testing.assert_array_equal(values, expected, err_msg=name)


def test_changed_pools_are_refused(trained, finished, tmp_path):
    """A bit of an embedding once changed the results, and nobody was told."""
    shutil.copytree(finished[0], tmp_path / "loop")
    path = tmp_path / "loop" / "pool.safetensors"
    whole, noted = path.read_bytes(), json.loads((tmp_path / "loop" / "pool.json").read_text())
    flipped = bytearray(whole)
    flipped[-100] ^= 1
    for content in (bytes(flipped), whole[:200]):
        path.write_bytes(content)
        found, known = hashlib.sha256(content).hexdigest()[:16], hashlib.sha256(whole).hexdigest()[:16]
        message = f"{path}: SHA-256 {found}..., pool.json says {known}...: the file was changed"
        with pytest.raises(InputError, match=re.escape(message)):
            run_loop(make_config(trained), tmp_path / "loop", command="")
    for lacking in ({name: value for name, value in noted.items() if name != "pool_sha256"}, []):
        path.with_suffix(".json").write_text(json.dumps(lacking))
        with pytest.raises(InputError, match=r"pool.json: expected where the pools of a loop are from, with 'pool_sha"):
            load_pools(tmp_path / "loop")


def test_lost_pools_are_told_and_made_again_only_if_they_are_the_same(trained, finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "loop")
    path, told = tmp_path / "loop" / "pool.safetensors", []
    whole = path.read_bytes()
    path.unlink()
    run_loop(make_config(trained), tmp_path / "loop", command="", tell=told.append)
    assert "pool: its file was missing and is made again, the same as pool.json notes" in told
    assert path.read_bytes() == whole
    path.unlink()
    noted = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps({**noted, "pool_sha256": "0" * 64}))
    message = (
        f"{path}: missing, and made again from {trained} it has SHA-256 {noted['pool_sha256'][:16]}..., pool.json "
    )
    with pytest.raises(InputError, match=re.escape(f"{message}says {'0' * 16}...; expected the run and the data")):
        run_loop(make_config(trained), tmp_path / "loop", command="")
    assert not path.exists()


def test_embeddings_are_those_of_eq_7(trained):
    """Against the ranking that the evaluation writes."""
    best_run = open_best_run(trained)
    evaluator = Evaluator(best_run.model, best_run.config, best_run.dataset, best_run.mesh)
    users, items = evaluator.embed(best_run.variables, ("test",))
    assert users.shape == (NUM_TEST, 8)
    assert items.shape == (2_000, 8)
    np.testing.assert_allclose(np.linalg.norm(users, axis=1), 1.0, rtol=1e-5)
    scores = users @ items.T
    best = np.concatenate([part.top_scores for part in evaluator.predict(best_run.variables, ("test",))])[:NUM_TEST]
    np.testing.assert_allclose(np.sort(scores, axis=1)[:, ::-1][:, :10], best, rtol=1e-4, atol=1e-5)


def test_another_configuration_in_the_same_folder_is_refused(trained, finished):
    with pytest.raises(InputError, match=r"config.json: of a loop with another config.seed"):
        run_loop(make_config(trained, seed=1), finished[0], command="")


def test_run_on_other_data_is_refused(trained, finished, tmp_path, monkeypatch):
    monkeypatch.setattr(pools_module.aigc_int_feedback, "item_ids", lambda: ["another"])
    with pytest.raises(InputError, match="expected a run on AIGC-INT-Sim"):
        run_loop(make_config(trained), tmp_path / "loop", command="")
    assert not (tmp_path / "loop").exists()


def test_slates_that_a_kind_of_the_catalogue_cannot_fill_are_refused(tmp_path):
    config = make_config(tmp_path / "no_run", visits__slate_size=2_000)
    with pytest.raises(InputError, match=r"config.visits.slate_size = 2000: expected at most \d+, the items of"):
        run_loop(config, tmp_path / "loop", command="")
    assert not (tmp_path / "loop").exists()


def test_every_key_is_read_outside_the_configuration_itself(trained, finished, keys_read):
    groups = groups_of(make_config(trained))
    declared = {(group.__name__, field.name) for group in groups for field in dataclasses.fields(group)}
    assert len(declared) > 40
    assert declared - keys_read == set()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_share": 1.0}, "config.learning_share = 1.0: expected above 0 and below 1"),
        ({"learning__uniform_share": 0.0}, "config.learning.uniform_share = 0.0: expected above 0"),
        ({"reward_model__num_folds": 101}, "config.reward_model.num_folds = 101: expected from 2 to the 100 users"),
        ({"visits__slate_size": 0}, "config.visits.slate_size = 0: expected above 0"),
        ({"policies__bandit_width": -1.0}, "config.policies.bandit_width = -1.0: expected at least 0"),
        (
            {"environment__rating_delay_visits": 3},
            "config.environment.rating_delay_visits = 3: expected below visits.visits_per_round",
        ),
        (
            {"visits__truth_visits": 5},
            "config.visits.truth_visits = 5: expected visits.visits_per_round (3), so that as many ratings arrive",
        ),
        # Records that taught answer no A/B, and those of the A/B teach nothing.
        ({"ab__split": "validation"}, "config.ab.split = 'validation': expected another split than pool.split"),
        ({"ab__split": "train"}, "config.ab.split = 'train': expected one of 'validation', 'test'"),
        ({"pool__split": "test"}, "config.pool.split = 'test': expected one of 'train', 'validation'"),
        (
            {"pool__split": "test", "ab__split": "validation"},
            "config.pool.split = 'test': expected one of 'train', 'validation'",
        ),
        # The key that is wrong, and not one that is derived from it.
        ({"visits__num_users": -4}, "config.visits.num_users = -4: expected above 0"),
        ({"visits__num_users": 2}, "config.visits.num_users = 2: expected so many that at least 2 learn and 2 judge"),
        ({"visits__num_users": 4.5}, "config.visits.num_users = 4.5: expected int, got float"),
        ({"visits__visits_per_round": -1}, "config.visits.visits_per_round = -1: expected above 0"),
        ({"visits__truth_visits": 0}, "config.visits.truth_visits = 0: expected above 0"),
        ({"pool__num_records": -1}, "config.pool.num_records = -1: expected at least 0"),
        ({"environment__taste_drift": 1.5}, "config.environment.taste_drift = 1.5: expected from 0 to 1"),
        ({"environment__rating_delay_visits": -1}, "config.environment.rating_delay_visits = -1: expected at least 0"),
        ({"policies__behaviour_penalties": ()}, "config.policies.behaviour_penalties = (): expected at least one num"),
        ({"reward__dwell": -0.5}, "config.reward.dwell = -0.5: expected at least 0"),
        ({"reward__full_replays": 0.0}, "config.reward.full_replays = 0.0: expected above 0"),
        ({"reward_model__penalty": 0.0}, "config.reward_model.penalty = 0.0: expected above 0"),
        ({"learning__gradient": "none"}, "config.learning.gradient = 'none': expected one of 'doubly_robust', 'rein"),
        ({"learning__temperature": 0.0}, "config.learning.temperature = 0.0: expected above 0"),
        ({"gate__estimator": "magic"}, "config.gate.estimator = 'magic': expected one of dm, ips"),
        ({"gate__confidence": 0.3}, "config.gate.confidence = 0.3: expected at least 0.5 and below 1"),
        ({"gate__mean_weight_range": (1.1, 1.2)}, "config.gate.mean_weight_range = (1.1, 1.2): expected a range aro"),
        ({"ab__num_draws": 0}, "config.ab.num_draws = 0: expected above 0"),
        ({"ab__confidence": 1.0}, "config.ab.confidence = 1.0: expected at least 0.5 and below 1"),
        ({"seed": -1}, "config.seed = -1: expected an integer in [0, 2**31)"),
        ({"nonsense": 1}, "config.nonsense: unknown key"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        synthetic_pool.make_config(**changes)


def test_settings_may_be_tried_with_test_unread():
    config = synthetic_pool.make_config(pool__split="train", ab__split="validation")
    assert (config.pool.split, config.ab.split) == ("train", "validation")


def test_loop_that_exists_is_never_told_to_change_its_configuration(tmp_path):
    """Who follows the advice of the first message would be refused by the second."""
    values = synthetic_pool.make_config().to_json()
    values["visits"]["truth_visits"] = 4
    advice = "config.visits.truth_visits = 4: expected visits.visits_per_round (3), so that as many ratings arrive"
    with pytest.raises(InputError, match=f"^{re.escape(advice)} [^;]*$"):
        read_loop_config(values, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(values))
    message = (
        rf"^{re.escape(advice)}.*; the loop in {tmp_path} goes on with its own .* so that another needs another --"
    )
    with pytest.raises(InputError, match=message):
        read_loop_config(values, tmp_path)


@pytest.mark.parametrize("changes", [{"reward__satisfaction": 0.0}, {"environment__rating_delay_visits": 0}])
def test_truth_may_take_more_visits_where_no_rating_is_late(changes):
    config = synthetic_pool.make_config(visits__truth_visits=50, **changes)
    assert config.visits.truth_visits == 50


def test_configuration_file_is_whole_and_survives_json():
    config = loop_config.parse(feedback.get_config().to_dict())
    assert loop_config.parse(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("run", "config.pool.run = '{}': expected the folder of a run that train.py made"),
        ("data", "config.pool.data = '{}': expected the folder of a data set, with manifest.json"),
    ],
)
def test_missing_run_or_data_are_told_by_their_key(trained, tmp_path, missing, message):
    nowhere = str(tmp_path / "nowhere")
    with pytest.raises(InputError, match=f"^{re.escape(message.format(nowhere))}$"):
        run_loop(make_config(trained, **{f"pool__{missing}": nowhere}), tmp_path / "loop", command="")
    assert not (tmp_path / "loop").exists()


def test_run_that_cannot_be_used_is_told_by_its_key(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("[]")
    with pytest.raises(InputError, match=r"^config.pool.run = '.*run': .*config.json: expected the configuration that"):
        run_loop(make_config(tmp_path / "run"), tmp_path / "loop", command="")


# The command, told to stop once its first line is out; each time in a fork, since it takes over its signals.
_STOPPED = """
import os, signal
from mmei_jax import command, compilation_cache, host_memory
from mmei_jax.feedback import run
def run_loop(config, workdir, *, command, tell, stop):
    tell("begun")
    for number in signals:
        os.kill(os.getpid(), number)
    stop.check()
run.run_loop = run_loop
for signals in ([signal.SIGINT], [signal.SIGTERM], [signal.SIGINT, signal.SIGINT]):
    if os.fork() == 0:
        run.main()
    print("code", os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


def test_command_that_is_stopped_says_so_in_one_line(tmp_path):
    arguments = ["--config=configs/feedback.py", f"--workdir={tmp_path / 'loop'}"]
    code, output = processes.run("-c", _STOPPED, *arguments, env=processes.environment())
    assert code == 0, output
    expected = []
    for name in ("SIGINT", "SIGTERM", "SIGINT"):
        said = f"stopped by {name}, whole rounds are saved; the same command goes on from there"
        expected += ["begun", said, "code 143"]
    assert output.splitlines() == expected
