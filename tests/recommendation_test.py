"""From a run to recommendations by commands: the page on indexes as it stands, the encoder, and `predict`."""

import dataclasses
import functools
import json
import shlex
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs import default
from mmei_jax import affect_profiles, predict
from mmei_jax.compilations import CompilationCounter
from mmei_jax.config import parse
from mmei_jax.evaluation import (
    BestRun,
    Evaluator,
    catalogue_items,
    embed_catalogue,
    evaluate_workdir,
    open_best_run,
)
from mmei_jax.fingerprints import parameters_hash
from mmei_jax.item_words import open_dataset
from mmei_jax.recommendation import __main__ as command
from mmei_jax.recommendation import catalogue_files, index_files, item_encoding
from mmei_jax.recommendation.catalogue_files import read_catalogue, split_catalogue
from mmei_jax.recommendation.explanations import recommendation_lines
from mmei_jax.recommendation.index_evaluation import IndexEvaluation
from mmei_jax.recommendation.index_files import Manifest, open_index
from mmei_jax.recommendation.index_writing import create_index
from mmei_jax.recommendation.item_encoding import ItemEncoder
from mmei_jax.recommendation.reranking import RerankConfig
from mmei_jax.recommendation.run_reranking import RunReranker, logits_of
from mmei_jax.recommendation.users import user_evaluator
from mmei_jax.records import Catalogue, Dataset, DatasetWriter, Record, Slate
from mmei_jax.reports.calibration import best_temperature
from mmei_jax.state import build_model, initialize
from mmei_jax.training import train
from mmei_jax.types import InputError, Items
from tests import markdown, random_encoders, tiny_extraction

PAGE = "docs/catalogue_index.md"
KINDS, ITEM_DIM, NUM_ITEMS = ("music", "video"), 3, 50
SPLITS = {"train": 8, "validation": 2, "test": 5}
# Of the test records, the second has none, and the last no user; the first two users are those of training records.
RELEVANT = {
    ("test", row): np.array(items, np.int32) for row, items in {0: [3, 8, 41], 2: [7], 3: [20, 0], 4: [12]}.items()
}


def catalogue():
    generator = np.random.default_rng(0)
    texts = [
        json.dumps({"title": f"Song {item}", "creator": f"creator-{item % 4}", "origin": "human"})
        for item in range(NUM_ITEMS)
    ]
    return Catalogue(
        ids=[f"item-{item:04d}" for item in range(NUM_ITEMS)],
        kind=np.arange(NUM_ITEMS, dtype=np.int32) % 2,
        kind_names=KINDS,
        features=generator.normal(size=(NUM_ITEMS, ITEM_DIM)).astype(np.float32),
        texts=texts,
    )


def slate(seed):
    shown = np.random.default_rng(seed).permutation(NUM_ITEMS)[:4].astype(np.int32)
    if seed % 3 == 0 and 11 not in shown:
        # What pleases most, of several records the same.
        shown[-1] = 11
    ones = np.ones(4, np.float32)
    return Slate(shown, ones / 4, ones, np.zeros(4, np.int32), np.zeros(4, bool), 1 + np.arange(4, dtype=np.float32))


def make_dataset(folder):
    """Words, encoded by a small random BERT, with a catalogue and slates, as whoever brings both would write them."""
    encoders = random_encoders.make(folder / "encoders")
    rows = [
        {
            "id": f"{split}{row}",
            "split": split,
            "text": tiny_extraction.TEXTS[row % 2],
            "emotion": tiny_extraction.LABELS[0][2][row % 3],
        }
        for split, count in SPLITS.items()
        for row in range(count)
    ]
    clips = tiny_extraction.write_list(folder / "clips.csv", rows)
    tiny_extraction.run(encoders, clips, folder / "features", changes={"modalities": ("text",)})
    extracted = Dataset.open(folder / "features")
    spec = dataclasses.replace(extracted.spec, has_slates=True, has_relevant_items=True)
    with DatasetWriter(folder / "data", spec) as writer:
        writer.write_catalogue(catalogue())
        for split, count in SPLITS.items():
            labels = extracted.split(split).gather_label("emotion", np.arange(count))[0]
            tokens = tiny_extraction.features(folder / "features", split)["text"]
            for row, (name, values) in enumerate(tokens.items()):
                extras = dict.fromkeys(spec.extras)
                features, label = {"text": values}, {"emotion": int(labels[row])}
                more = {"slate": slate(row), "relevant_items": RELEVANT.get((split, row)), "extras": extras}
                user = None if row == 4 else f"user-{row if split == 'train' else row + 6}"
                writer.write(split, Record(name, user_id=user, features=features, labels=label, **more))
    shutil.copy(folder / "features" / "extraction.json", folder / "data")


def config_dict(folder):
    """A small model of words alone."""
    values = default.get_config()
    values.data.path = str(folder / "data")
    values.data.modalities = ("text",)
    values.data.max_tokens.update(vision=(1,), audio=(1,), text=(32,))
    values.data.update(batch_size=4, evaluation_batch_size=4)
    values.model.update(dim=16, num_heads=2, num_layers=1, head_num_layers=0, feedforward_dim=16, embedding_dim=8)
    values.loss.update(intent="none", ranking="in_batch_softmax")
    values.train.update(num_epochs=1, best_metric="validation/emotion/accuracy")
    return values


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder that looks like the project's, with a run of words alone in the place of the quickstart."""
    folder = tmp_path_factory.mktemp("recommendation")
    make_dataset(folder)
    train(parse(config_dict(folder).to_dict()), folder / "runs" / "quickstart")
    return folder


@pytest.fixture(scope="module")
def run(project):
    return open_best_run(project / "runs" / "quickstart")


@pytest.fixture(scope="module")
def encoder(run):
    return ItemEncoder(run)


@pytest.fixture(scope="module")
def evaluator(run):
    return Evaluator(run.model, run.config, run.dataset, run.mesh)


@pytest.fixture(scope="module")
def reader(run):
    return user_evaluator(run)


@pytest.fixture
def call_afresh(project, monkeypatch, capsys):
    """Runs a command of the page's program in the project's folder; gives its exit code, output and errors."""
    monkeypatch.chdir(project)

    def call(*arguments):
        code = command.main(arguments)
        found = capsys.readouterr()
        return code, found.out, found.err

    return call


@pytest.fixture
def call(call_afresh, run, encoder, reader, monkeypatch):
    """The same, with the run opened and its programs compiled once for all tests."""
    monkeypatch.setattr(command, "open_best_run", lambda workdir, data: run)
    monkeypatch.setattr(command, "ItemEncoder", lambda run: encoder)
    monkeypatch.setattr(command, "user_evaluator", lambda run: reader)
    return call_afresh


@pytest.fixture(scope="module")
def index(project):
    folder = project / "runs" / "built"
    assert command.main(["build", f"--workdir={project / 'runs' / 'quickstart'}", f"--output={folder}"]) == 0
    return folder


def test_page_works_as_it_stands(call_afresh):
    blocks = [content for language, content in markdown.blocks(markdown.read(PAGE)) if language == "bash"]
    printed = []
    for line in "".join(blocks).splitlines():
        words = shlex.split(line)
        assert words[:3] == ["python", "-m", "mmei_jax.recommendation"]
        code, out, err = call_afresh(*words[3:])
        assert (code, err) == (0, ""), line
        printed.append(out)
    built, searched, small, measured, explained, evaluated, updated = printed
    assert built.startswith("runs/catalogue: 50 items, 8 x float32, 1 segment(s)")
    assert "8 x int8" in small
    assert "0 added (0 of them replaced), 2 removed\nruns/catalogue: 48 items" in updated
    lines = searched.splitlines()
    assert lines[0] == "test0"
    assert len(lines) == 3 * (1 + 5)
    assert "Song " in lines[1]
    assert "creator-" in lines[1]
    first, *items = explained.splitlines()[1:6]
    assert first.startswith("  emotion ")
    assert all("in the search" in line for line in items)
    assert evaluated.splitlines()[0].startswith("clips, split test, checkpoint of step 2")
    recall = float(measured.splitlines()[-1].rpartition(" ")[2])
    assert 0.5 < recall <= 1.0


def test_example_of_the_readme_works_beside_the_page(call):
    """Both in one folder, in whatever order."""
    (example,) = [text for _, text in markdown.blocks(markdown.read("README.md")) if "--output=runs/index\n" in text]
    for line in example.splitlines():
        words = shlex.split(line)
        assert words[:3] == ["python", "-m", "mmei_jax.recommendation"]
        code, out, err = call(*words[3:])
        assert (code, err) == (0, ""), line
    assert len(out.splitlines()) == 3 * (1 + 10)


def test_words_of_an_answer_are_explained_on_the_page_and_in_the_help(capsys):
    explained = markdown.tables(markdown.read("docs/reranking.md"))["word"]
    assert {"*standardised*", "`affect`", "`affect_free`", "`diversity`"} <= {cells[0] for cells in explained}
    for program in (functools.partial(command.main, ["search", "--help"]), functools.partial(predict.main, ["--help"])):
        with pytest.raises(SystemExit):
            program()
        told = " ".join(capsys.readouterr().out.split())
        assert all(word in told for word in ("affect_free (popularity", "standardised over", "diversity is 0 for the"))
        assert "a byte that was changed in a larger one goes unnoticed" in told


def test_help_names_the_commands(capsys):
    with pytest.raises(SystemExit) as end:
        command.main(["--help"])
    assert end.value.code == 0
    assert all(name in capsys.readouterr().out for name in ("{build,search,evaluate,update}",))


def test_page_lists_every_flag_of_the_search(capsys):
    with pytest.raises(SystemExit):
        command.main(["search", "--help"])
    told, page = capsys.readouterr().out, markdown.read(PAGE)
    flags = {word.strip("[],") for word in told.split() if word.startswith(("--", "[--"))}
    assert len(flags) > 10
    assert not [flag for flag in flags - {"--help", "--index", "--workdir", "--data"} if f"`{flag}" not in page]


def test_items_are_those_that_the_evaluation_recommends(run, index, evaluator, call):
    part = next(evaluator.predict(run.variables, ("test",)))
    code, out, _ = call("search", f"--index={index}", "--workdir=runs/quickstart", "--num_records=4", "--format=json")
    assert code == 0
    found = json.loads(out)
    assert found["recall"] is None
    ids = catalogue().ids
    assert [result["user"] for result in found["results"]] == [f"test{row}" for row in range(4)]
    for row, result in enumerate(found["results"]):
        scores = [item["score"] for item in result["items"]]
        np.testing.assert_allclose(scores, part.top_scores[row], rtol=1e-5, atol=1e-6)
        assert {item["id"] for item in result["items"]} == {ids[item] for item in part.top_items[row]}
        assert all(item["title"] == f"Song {ids.index(item['id'])}" for item in result["items"])


def test_every_record_is_answered_without_what_it_was_shown(index, call, tmp_path):
    rows = [{"user": f"test{row}", "item": f"item-{row + 20:04d}"} for row in (0, 1, 1)] + [{"user": "x", "item": "y"}]
    rows[2]["item"] = "item-0049"
    (tmp_path / "seen.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    seen = {0: {"item-0020"}, 1: {"item-0021", "item-0049"}}
    arguments = [
        f"--seen={tmp_path / 'seen.jsonl'}",
        f"--index={index}",
        "--workdir=runs/quickstart",
        "--k=60",
        "--exclude_seen",
        "--format=json",
    ]
    code, out, _ = call("search", *arguments)
    assert code == 0
    results = json.loads(out)["results"]
    assert len(results) == SPLITS["test"]
    ids = catalogue().ids
    for row, result in enumerate(results):
        shown = {ids[item] for item in slate(row).item_index}
        assert {item["id"] for item in result["items"]} == set(ids) - shown - seen.get(row, set())


def test_vectors_of_a_file_and_lists_of_ids(index, call, encoder, tmp_path):
    users = np.random.default_rng(3).normal(size=(2, 8))
    np.save(tmp_path / "users.npy", users)
    allowed, denied = catalogue().ids[:30], catalogue().ids[20:]
    (tmp_path / "allow.txt").write_text("\n".join(allowed))
    (tmp_path / "exclude.txt").write_text("\n".join([*denied, "unknown"]))
    lists = [f"--{name}={tmp_path / name}.txt" for name in ("allow", "exclude")]
    scores = users @ encoder.encode(catalogue()).T
    is_allowed = np.tile((np.arange(NUM_ITEMS) < 20) & (catalogue().kind == 1), (2, 1))
    seen = np.argmax(np.where(is_allowed, scores, -np.inf), axis=1)[1]
    is_allowed[1, seen] = False
    (tmp_path / "seen.csv").write_text(f"user,item\n1,{catalogue().ids[seen]}\n1,unknown\n")
    given = [f"--index={index}", f"--queries={tmp_path / 'users.npy'}", "--kinds=video", "--k=3", "--format=json"]
    code, out, err = call("search", *given, *lists, f"--seen={tmp_path / 'seen.csv'}")
    assert code == 0
    assert err.splitlines() == [f"--exclude={tmp_path / 'exclude.txt'}: 1 of 31 ids are not in the index"]
    best = np.argsort(-np.where(is_allowed, scores, -np.inf), axis=1)[:, :3]
    results = json.loads(out)["results"]
    assert [[item["id"] for item in result["items"]] for result in results] == [
        [catalogue().ids[item] for item in row] for row in best
    ]


def standardise(values):
    return (values - values.mean()) / values.std()


def positives():
    """Training records by the item that pleased most: the last one of their slates."""
    return np.bincount([slate(row).item_index[-1] for row in range(SPLITS["train"])], minlength=NUM_ITEMS)


def test_answers_ranked_again_weigh_what_the_run_read_and_say_so(run, index, evaluator, encoder, call):
    arguments = [f"--index={index}", "--workdir=runs/quickstart", "--num_candidates=50", "--k=6", "--format=json"]
    code, out, err = call("search", *arguments, "--rerank", "--relevance_weight=0.6", "--least_affect_weight=0.0")
    assert (code, err) == (0, "")
    found = json.loads(out)
    validation, test = (next(evaluator.predict(run.variables, (split,))) for split in ("validation", "test"))
    labels = run.dataset.split("validation").gather_label("emotion", np.arange(2))[0]
    temperature = best_temperature(np.log(validation.emotion[:2]), labels)
    assert temperature != 1.0
    settings = found["reranking"]
    assert (settings["emotion_temperature"], settings["intent_temperature"]) == (temperature, 1.0)
    assert (settings["relevance_weight"], settings["num_candidates"]) == (0.6, 50)
    scores = np.asarray(test.user_embedding, np.float64) @ encoder.encode(catalogue()).T
    popularity = standardise(np.log1p(positives()))
    for row, result in enumerate(found["results"][:4]):
        probability = test.emotion[row].astype(np.float64) ** (1.0 / temperature)
        probability /= probability.sum()
        certainty = 1.0 + (probability * np.log(probability)).sum() / np.log(3)
        assert result["affect_weight"] == pytest.approx(certainty, abs=1e-5)
        np.testing.assert_allclose(list(result["emotion"]["probabilities"].values()), probability, rtol=1e-4)
        np.testing.assert_allclose(list(result["modality_weights"].values()), test.modality_weights[row], rtol=1e-5)
        assert (result["intent"], result["shortfall"]) == (None, None)
        affect, order = standardise(scores[row]), np.argsort(-scores[row]).tolist()
        for item in result["items"]:
            place = catalogue().ids.index(item["id"])
            assert item["parts"]["affect"] == pytest.approx(0.6 * certainty * affect[place], abs=1e-3)
            expected = 0.6 * (1.0 - certainty) * popularity[place]
            assert item["parts"]["affect_free"] == pytest.approx(expected, abs=1e-4)
            assert item["affect_score"] == pytest.approx(scores[row, place], abs=1e-5)
            assert item["search_rank"] == order.index(place) + 1
            assert (item["title"], item["kind"]) == (f"Song {place}", KINDS[place % 2])
        best = result["items"][0]
        relevance = 0.6 * (certainty * affect + (1.0 - certainty) * popularity)
        assert best["score"] == pytest.approx(relevance.max(), abs=1e-3)
        assert [item["rank"] for item in result["items"]] == list(range(1, 7))


class MadeUpReader(Evaluator):
    """Reads what a test says of the records of each split."""

    def __init__(self, reader, changes):
        self._reader, self._changes = reader, changes

    def predict(self, variables, splits):
        for part in self._reader.predict(variables, splits):
            rows = np.maximum(part.record_index, 0)
            yield part.replace(**{name: values[rows] for name, values in self._changes["+".join(splits)].items()})


def test_temperatures_suit_the_validation_records(run, index, reader):
    made_up, expected = {}, {}
    for split, likely in (("train", (0.5, 0.4)), ("validation", (0.9, 0.2))):
        labels = run.dataset.split(split).gather_label("emotion", np.arange(SPLITS[split]))[0]
        right = np.resize(np.array(likely, np.float32), len(labels))
        probability = np.repeat((1.0 - right[:, None]) / 2.0, 3, axis=1)
        probability[np.arange(len(labels)), labels] = right
        made_up[split] = {"emotion": probability}
        expected[split] = best_temperature(np.log(probability), labels)
    config = RunReranker(run, MadeUpReader(reader, made_up), open_index(index), RerankConfig()).config
    assert config.emotion_temperature == pytest.approx(expected["validation"])
    assert abs(expected["validation"] - expected["train"]) > 0.1
    assert 0.2 < expected["validation"] < 9.0


def test_ranking_again_wants_probabilities_and_finds_logits_of_them(run, index, reader):
    loss = dataclasses.replace(run.config.loss, emotion="regression")
    other = dataclasses.replace(run, config=dataclasses.replace(run.config, loss=loss))
    with pytest.raises(InputError, match="--rerank: the run reads no probabilities of emotions or intents"):
        RunReranker(other, reader, open_index(index), RerankConfig())
    probability = np.random.default_rng(0).dirichlet(np.ones(3), 4).astype(np.float32)
    np.testing.assert_allclose(jax.nn.softmax(logits_of(probability, "softmax")), probability, rtol=1e-5)
    np.testing.assert_allclose(jax.nn.sigmoid(logits_of(probability, "sigmoid")), probability, rtol=1e-5)
    for kind in ("softmax", "sigmoid"):
        assert np.isfinite(logits_of(np.array([[0.0, 1.0]], np.float32), kind)).all()


def test_caps_move_answers_and_are_told(index, call):
    arguments = ["search", f"--index={index}", "--workdir=runs/quickstart", "--num_records=2", "--k=5", "--rerank"]
    code, out, _ = call(*arguments, "--most_per_creator=1", "--least_affect_weight=1", "--format=json")
    assert code == 0
    result = json.loads(out)["results"][0]
    # There are four creators.
    assert len({item["creator"] for item in result["items"]}) == len(result["items"]) == 4
    assert result["shortfall"] == "caps"
    moved = next(item for item in result["items"] if item["cap"] is not None)
    assert moved["cap"] == "creator"
    lines = recommendation_lines({**result, "recommended": result["items"]})
    assert lines[0].startswith(f"  emotion {result['emotion']['choice']} (")
    assert f"affect weighs {result['affect_weight']:.2f}; alpha: vision" in lines[0]
    line = lines[moved["rank"]]
    assert line.split()[:3] == [f"{moved['score']:.4f}", moved["kind"], moved["id"]]
    assert line.endswith(f"{moved['search_rank']} in the search; in place of {moved['in_place_of']} (creator)]")
    assert f"[affect {moved['parts']['affect']:+.3f}, affect_free" in line
    assert lines[5] == "  fewer than asked for: the caps allow no more"


def rank_measures(scores, relevant, is_listed):
    """By the definitions, of one record: average precision, reciprocal rank, and of the best 10: NDCG, HR, recall."""
    order = [item for item in np.argsort(-scores, kind="stable") if is_listed[item]]
    ranks = sorted(order.index(item) + 1 for item in relevant if is_listed[item])
    ideal = sum(1.0 / np.log2(1 + rank) for rank in range(1, 1 + min(10, len(relevant))))
    return {
        "map": sum((place + 1) / rank for place, rank in enumerate(ranks)) / len(relevant),
        "mrr": 1.0 / ranks[0] if ranks else 0.0,
        "ndcg@10": sum(1.0 / np.log2(1 + rank) for rank in ranks if rank <= 10) / ideal,
        "hr@10": float(any(rank <= 10 for rank in ranks)),
        "recall@10": sum(rank <= 10 for rank in ranks) / len(relevant),
    }, order[:10]


def check_groups(groups, scores, kinds, is_listed, popularity):
    """Every figure of every group, from all scores; without test1, which has no relevant items."""
    relevant = {row: RELEVANT["test", row].tolist() for row in (0, 2, 3, 4)}
    top = {row: rank_measures(scores[row], items, is_listed)[1] for row, items in relevant.items()}
    cases = {"all": (relevant, None), "warm": ({0: relevant[0]}, None)}
    cases["cold"] = {row: relevant[row] for row in (2, 3, 4)}, None
    for number, name in enumerate(KINDS):
        own = {row: [item for item in items if kinds[item] == number] for row, items in relevant.items()}
        cases[f"kind/{name}"] = {row: items for row, items in own.items() if items}, number
    assert groups.keys() == cases.keys()
    for name, (records, kind) in cases.items():
        figures = groups[name]
        assert figures["num_records"] == len(records)
        measures = [rank_measures(scores[row], items, is_listed)[0] for row, items in records.items()]
        for metric in measures[0]:
            assert figures[metric] == pytest.approx(np.mean([each[metric] for each in measures]), abs=1e-6), metric
        in_group = np.ones(len(kinds), bool) if kind is None else kinds == kind
        shown = np.concatenate([top[row] for row in (records if kind is None else relevant)])
        shown = shown[in_group[shown]]
        counts = np.bincount(shown, minlength=len(kinds))[in_group & is_listed]
        gini = np.abs(counts[:, None] - counts[None]).mean() / (2.0 * counts.mean())
        mean, own = popularity[shown].mean(), popularity[in_group]
        assert figures["coverage@10"] == pytest.approx((counts > 0).mean())
        assert figures["gini@10"] == pytest.approx(gini)
        assert figures["mean_popularity@10"] == pytest.approx(mean)
        assert figures["popularity_ratio@10"] == pytest.approx(mean * own.sum() / (own**2).sum())


@pytest.fixture(scope="module")
def users(run, evaluator):
    parts = evaluator.predict(run.variables, ("test",))
    return np.concatenate([part.user_embedding for part in parts])[: SPLITS["test"]].astype(np.float64)


def test_figures_of_the_own_catalogue_are_those_of_the_evaluation(project, index, users, encoder, call):
    evaluate_workdir(project / "runs" / "quickstart", "test")
    written = json.loads((project / "runs" / "quickstart" / "eval" / "test.json").read_text())["metrics"]
    code, out, err = call("evaluate", f"--index={index}", "--workdir=runs/quickstart", "--split=test", "--format=json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    for name in ("map", "mrr", "ndcg@10", "hr@10", "recall@10"):
        assert found["groups"]["all"][name] == pytest.approx(written[f"ranking/{name}"], abs=1e-6)
    counts = {"num_records": 5, "num_left_out": 1, "num_items": 50, "num_missing": 0}
    assert {name: found[name] for name in counts} == counts
    scores = users @ encoder.encode(catalogue()).T
    check_groups(found["groups"], scores, catalogue().kind, np.ones(NUM_ITEMS, bool), positives())
    lines = IndexEvaluation(**counts, groups=found["groups"]).lines()
    assert lines[0] == "5 records (1 without relevant items, left out), 50 items"
    assert lines[1].split() == list(found["groups"])
    (line,) = [line for line in lines if line.startswith("map")]
    assert line.split()[1:] == [f"{group['map']:.4f}" for group in found["groups"].values()]


def test_relevant_items_that_an_index_lacks_are_never_found(reader, call, monkeypatch, tmp_path):
    """An index of new items, one of which replaces one of the data set's, searched for users who want all sorts."""
    users = np.random.default_rng(0).normal(size=(SPLITS["test"], 8)).astype(np.float32)
    made_up = MadeUpReader(reader, {"test": {"user_embedding": users}})
    monkeypatch.setattr(command, "user_evaluator", lambda run: made_up)
    new = (("a", 3.0), ("b", -1.0), ("item-0003", 0.5))
    rows = [{"id": name, "kind": "video", "features": [0.3, value, 1.0]} for name, value in new]
    (tmp_path / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "foreign.jsonl").write_text(json.dumps(rows[0]))
    folder, of_run = tmp_path / "index", "--workdir=runs/quickstart"
    assert call("build", of_run, f"--output={folder}", "--dtype=int8")[0] == 0
    changes = [f"--add={tmp_path / 'new.jsonl'}", "--remove=item-0008,item-0012,item-0030"]
    assert call("update", f"--index={folder}", of_run, *changes)[0] == 0
    code, out, err = call("evaluate", f"--index={folder}", of_run, "--format=json")
    assert code == 0
    told = f"{folder}: lacks 3 of the data set's items, which count as never found; the command update adds them"
    assert err.splitlines() == [told]
    found = json.loads(out)
    assert (found["num_items"], found["num_missing"]) == (49, 3)
    is_listed = ~np.isin(np.arange(NUM_ITEMS + 2), [8, 12, 30])
    changed, items = open_index(folder), np.zeros((NUM_ITEMS + 2, 8))
    known = np.array([*catalogue().ids, "a", "b"], object)[is_listed]
    items[is_listed] = changed.take(changed.rows_of(known.tolist()))[1]
    kinds, popularity = np.append(catalogue().kind, [1, 1]), np.append(positives(), [0, 0])
    check_groups(found["groups"], users.astype(np.float64) @ items.T, kinds, is_listed, popularity)
    foreign = tmp_path / "foreign"
    assert call("build", of_run, f"--output={foreign}", f"--catalogue={tmp_path / 'foreign.jsonl'}")[0] == 0
    code, out, err = call("evaluate", f"--index={foreign}", of_run)
    assert (code, out) == (2, "")
    assert "has no item of the data set" in err
    assert "expected an index that the command build made without --catalogue" in err
    code, _, err = call("evaluate", f"--index={folder}", of_run, "--split=validation")
    assert code == 2
    assert "no record of split validation has a relevant item" in err


def test_items_of_a_file_are_added_replaced_and_removed(encoder, call, tmp_path):
    rows = [
        {"id": name, "kind": "music", "features": [value, 0.0, 1.0], "title": f"New {name}"}
        for name, value in (("item-0000", 3.0), ("new", -1.0))
    ]
    path = tmp_path / "items.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "index"
    assert call("build", "--workdir=runs/quickstart", f"--output={folder}")[0] == 0
    (tmp_path / "gone.txt").write_text("item-0001\n")
    update = ["update", f"--index={folder}", f"--add={path}", f"--remove={tmp_path / 'gone.txt'}"]
    code, out, _ = call(*update, "--workdir=runs/quickstart")
    assert code == 0
    assert out.splitlines()[0] == "2 added (1 of them replaced), 1 removed"
    ids = open_index(folder).live_ids.to_pylist()
    assert sorted(ids) == sorted([*catalogue().ids[:1], *catalogue().ids[2:], "new"])
    changed = open_index(folder)
    columns, embedding = changed.take(changed.rows_of(["new", "item-0000"]))
    assert [json.loads(text) for text in columns["text"]] == [{"title": "New new"}, {"title": "New item-0000"}]
    features = np.array([[-1.0, 0.0, 1.0], [3.0, 0.0, 1.0]], np.float32)
    expected = dataclasses.replace(catalogue(), ids=["a", "b"], kind=np.zeros(2, np.int32), features=features)
    np.testing.assert_allclose(embedding, encoder.encode(expected), atol=1e-6)


def test_items_are_encoded_in_blocks_of_one_shape(run, monkeypatch):
    monkeypatch.setattr(item_encoding, "ROWS_PER_BLOCK", 16)
    encoder = ItemEncoder(run)
    items = catalogue()
    found = encoder.encode(items)
    counter = CompilationCounter()
    few = dataclasses.replace(items, ids=items.ids[:7], kind=items.kind[:7], features=items.features[:7])
    assert [block.embedding.shape for block in encoder.encode_blocks([few, items])] == [(7, 8), (50, 8)]
    counter.close()
    assert counter.count == 0
    embed = jax.jit(functools.partial(run.model.apply, method="embed_items"))
    whole = embed(run.variables, Items(jnp.asarray(items.features), jnp.asarray(items.kind)))
    np.testing.assert_allclose(found, whole, rtol=1e-5, atol=1e-6)


def fresh_run(run, project, **changes):
    """Of random parameters, whose content tower reads words as ``changes`` of the model's configuration say."""
    encoder = {"content_encoder": str(project / "encoders" / "text"), "content_max_tokens": 8}
    model = dataclasses.replace(run.config.model, **{**encoder, **changes})
    config = dataclasses.replace(run.config, model=model)
    dataset = open_dataset(config)
    built = build_model(config, dataset)
    return BestRun(config, dataset, built, jax.jit(lambda: initialize(built, 0))(), run.mesh, 0)


@pytest.mark.parametrize("training", ["frozen", pytest.param("trained", marks=pytest.mark.slow)])
def test_words_of_items_are_encoded_as_for_the_evaluation(run, project, training, monkeypatch, tmp_path):
    """Items of a file, which brings no words of its own."""
    own = fresh_run(run, project, content_encoder_training=training)
    items = own.dataset.catalogue()
    whole = jax.jit(functools.partial(embed_catalogue, own.model))(own.variables, catalogue_items(items))
    rows = [
        {"id": name, "kind": KINDS[kind], "features": features.tolist(), **json.loads(text)}
        for name, kind, features, text in zip(items.ids, items.kind, items.features, items.texts, strict=True)
    ]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(item_encoding, "ROWS_PER_BLOCK", 16)
    monkeypatch.setattr(catalogue_files, "ROWS_PER_BLOCK", 16)
    encoder = ItemEncoder(own)
    blocks = encoder.encode_blocks(read_catalogue(tmp_path / "items.jsonl", KINDS, ITEM_DIM))
    found = [next(blocks).embedding]
    counter = CompilationCounter()
    found += [block.embedding for block in blocks]
    counter.close()
    assert counter.count == 0
    assert len(found) == 4
    np.testing.assert_allclose(np.concatenate(found), whole, rtol=0, atol=1e-5)
    # Those of the data set come with their words.
    blocks = encoder.encode_blocks(split_catalogue(items))
    np.testing.assert_allclose(np.concatenate([block.embedding for block in blocks]), whole, rtol=0, atol=1e-5)


def test_tower_of_words_alone_needs_no_features(run, project, tmp_path):
    own = fresh_run(run, project, content_features=False)
    encoder = ItemEncoder(own)
    assert encoder.item_dim == 0
    (tmp_path / "items.jsonl").write_text('{"id": "a", "kind": "video", "title": "Song 1", "creator": "creator-1"}\n')
    (block,) = encoder.encode_blocks(read_catalogue(tmp_path / "items.jsonl", KINDS, encoder.item_dim))
    # As an item of the data set with the same words and kind, whatever its features are.
    np.testing.assert_allclose(block.embedding[0], encoder.encode(catalogue())[1], rtol=0, atol=1e-5)
    shorter = fresh_run(run, project, content_features=False, content_max_tokens=5)
    assert ItemEncoder(shorter).tower_sha256 != encoder.tower_sha256


def test_items_that_the_tower_cannot_take_are_refused(run):
    encoder, items = ItemEncoder(run), catalogue()
    with pytest.raises(InputError, match="items of kinds music with 3 features: expected kinds music, video and 3"):
        encoder.encode(dataclasses.replace(items, kind_names=("music",)))
    with pytest.raises(InputError, match="'item-0000': its embedding is 0 or not finite"):
        encoder.encode(dataclasses.replace(items, features=np.full((NUM_ITEMS, ITEM_DIM), 3e38, np.float32)))
    diverged = dataclasses.replace(run, variables=jax.tree.map(lambda leaf: leaf * jnp.nan, run.variables))
    with pytest.raises(InputError, match="'item-0000': its embedding is 0 or not finite"):
        ItemEncoder(diverged).encode(items)
    model = run.model.clone(tasks=dataclasses.replace(run.model.tasks, has_ranking=False))
    with pytest.raises(InputError, match=r"config\.loss\.ranking of the run = .*: expected a run that was trained"):
        ItemEncoder(dataclasses.replace(run, model=model))


def test_hash_tells_towers_apart(run):
    parameters = {"a": np.zeros((2, 3), np.float32), "b": np.ones(3, np.float32)}
    settings = {"dim": 3}
    same = parameters_hash({name: parameters[name] for name in reversed(parameters)}, settings)
    assert same == parameters_hash(parameters, settings)
    others = [
        parameters_hash(parameters | {"b": np.array([1, 1, 2], np.float32)}, settings),
        parameters_hash(parameters | {"a": np.zeros((3, 2), np.float32)}, settings),
        parameters_hash(parameters | {"a": np.zeros((2, 3), np.int32)}, settings),
        parameters_hash({"a": parameters["a"], "c": parameters["b"]}, settings),
        parameters_hash(parameters, {"dim": 4}),
    ]
    assert len({same, *others}) == 6
    model = dataclasses.replace(run.config.model, normalize_embeddings=False)
    other = dataclasses.replace(run, config=dataclasses.replace(run.config, model=model))
    tower = run.variables["params"]["content_tower"]
    changed = {"params": run.variables["params"] | {"content_tower": jax.tree.map(lambda leaf: leaf + 1, tower)}}
    encoders = [ItemEncoder(each) for each in (run, other, dataclasses.replace(run, variables=changed))]
    assert len({encoder.tower_sha256 for encoder in encoders}) == 3


@pytest.fixture(scope="module")
def foreign(encoder, tmp_path_factory):
    """An index of another tower."""
    folder = tmp_path_factory.mktemp("foreign") / "index"
    manifest = Manifest("mmei_jax.catalogue_index", 1, "f" * 64, 8, "float32", KINDS, 0)
    create_index(folder, manifest, encoder.encode_blocks([catalogue()]))
    return folder


def test_what_cannot_be_searched_or_changed_is_told_in_one_line(project, index, foreign, call, tmp_path):
    np.save(tmp_path / "wide.npy", np.zeros((2, 9), np.float32))
    np.save(tmp_path / "nan.npy", np.full((2, 8), np.nan, np.float32))
    np.save(tmp_path / "whole.npy", np.zeros((2, 8), np.int64))
    (tmp_path / "text.npy").write_text("no array")
    (tmp_path / "bad.csv").write_text('id,kind,features\na,book,"[1,2,3]"\n')
    here, of_run = f"--index={index}", "--workdir=runs/quickstart"

    def line(*arguments):
        code, out, err = call(*arguments)
        assert (code, out) == (2, "")
        (found,) = err.splitlines()
        return found

    for name in ("search", "update"):
        more = ["--add=none.jsonl"] if name == "update" else []
        assert "expected an index that this run built" in line(name, f"--index={foreign}", of_run, *more)
    assert "no catalogue index" in line("search", f"--index={tmp_path}", of_run)
    assert "expected a run, or embeddings of users" in line("search", here)
    assert "--k=0: expected at least 1" in line("search", here, of_run, "--k=0")
    assert "kind 'book': expected some of music, video" in line("search", here, of_run, "--kinds=music,book")
    assert "these answers are exact" in line("search", here, of_run, "--measure_recall")
    for file, told in (
        ("wide", "9 numbers a row: the index has 8"),
        ("nan", "row 0: not finite"),
        ("whole", "int64 (2, 8): expected floats [queries, 8]"),
        ("text", "not a readable .npy file"),
        ("none", "not a readable .npy file"),
    ):
        assert told in line("search", here, f"--queries={tmp_path / file}.npy")
    np.save(tmp_path / "users.npy", np.zeros((2, 8), np.float32))
    queries = f"--queries={tmp_path / 'users.npy'}"
    (tmp_path / "seen.jsonl").write_text('{"user": "0", "item": "a"}\n{"user": 1, "item": "a"}\n')
    told = line("search", here, queries, f"--seen={tmp_path / 'seen.jsonl'}")
    assert "seen.jsonl, line 2: user 1: expected a text" in told
    assert "--exclude_seen: expected records" in line("search", here, queries, "--exclude_seen")
    assert "--rerank: expected records of --workdir" in line("search", here, of_run, queries, "--rerank")
    assert "--most_human_share=0.5: expected --rerank too" in line("search", here, of_run, "--most_human_share=0.5")
    assert "--num_candidates=20: expected --rerank too" in line("search", here, of_run, "--num_candidates=20")
    few = ["--rerank", "--k=9", "--num_candidates=8"]
    assert "--num_candidates=8: expected at least as many as answers, 9" in line("search", here, of_run, *few)
    told = line("search", here, of_run, "--rerank", "--relevance_weight=2")
    assert "rerank.relevance_weight = 2.0: expected from 0 to 1" in told
    assert "--k=0: expected at least 1" in line("evaluate", here, of_run, "--k=0")
    assert "expected an index that this run built" in line("evaluate", f"--index={foreign}", of_run)
    small = project / "runs" / "small"
    assert call("build", of_run, f"--output={small}", "--dtype=int8")[0] == 0
    told = line("search", f"--index={small}", queries, "--measure_recall")
    assert "--measure_recall: the index holds int8; expected --workdir" in told
    assert "is an index already" in line("build", of_run, f"--output={index}")
    assert "bad.csv, line 2: kind 'book'" in line(
        "build", of_run, f"--output={tmp_path / 'x'}", f"--catalogue={tmp_path / 'bad.csv'}"
    )
    assert not (tmp_path / "x").exists()
    assert "--add, --remove: expected at least one" in line("update", here)
    assert "--add: expected --workdir too" in line("update", here, f"--add={tmp_path / 'bad.csv'}")
    assert "1 of 2 ids to remove are not in the index: 'x'" in line("update", here, "--remove=x,item-0001")
    # What is meant as a file is no id.
    for name in (str(tmp_path / "nope.txt"), "nope.CSV", "item-0001,nope.txt"):
        assert f"--remove={name}: no such file: expected one with one id a line" in line(
            "update", here, f"--remove={name}"
        )
    assert "--remove=x,: expected a file with one id a line" in line("update", here, "--remove=x,")


def test_prediction_recommends_from_the_index(project, index, foreign, monkeypatch, capsys):
    workdir = f"--workdir={project / 'runs' / 'quickstart'}"
    given = [workdir, f"--text={tiny_extraction.TEXTS[0]}", "--format=json"]
    assert predict.main(given) == 0
    own = json.loads(capsys.readouterr().out)
    # The data set's own catalogue is not even read.
    monkeypatch.setattr(Dataset, "catalogue", lambda _: pytest.fail("the catalogue is read"))
    assert predict.main([*given, f"--index={index}", "--k=12"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["recommended"]) == 12
    # Without an index, ten are known.
    assert [item["id"] for item in found["recommended"]][:10] == [item["id"] for item in own["recommended"]]
    assert found["recommended"][0].keys() == {"id", "title", "creator", "origin", "kind", "score"}
    assert found["emotion"] == own["emotion"]
    best = found["recommended"][0]
    assert predict.main([workdir, f"--text={tiny_extraction.TEXTS[0]}", f"--index={index}", "--verify"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if best["id"] in line]
    assert line.split()[:3] == [f"{best['score']:.4f}", best["kind"], best["id"]]
    assert line.endswith(f"{best['title']}, {best['creator']}")
    assert predict.main([workdir, "--text=a", f"--index={foreign}"]) == 2
    assert "expected an index that this run built" in capsys.readouterr().err
    assert predict.main([workdir, "--text=a", "--rerank"]) == 2
    assert "--rerank: expected --index too" in capsys.readouterr().err
    assert predict.main([workdir, "--text=a", "--kinds=video"]) == 2
    assert "--kinds: expected --index too" in capsys.readouterr().err
    assert predict.main([workdir, "--text=a", f"--index={index}", "--seen=seen.csv"]) == 2
    assert "--seen=seen.csv: expected --user too" in capsys.readouterr().err
    assert predict.main([workdir, "--text=a", "--verify"]) == 2
    assert "--verify: expected --index too" in capsys.readouterr().err
    assert predict.main([workdir, "--text=a", "--k=11"]) == 2
    assert "--k=11: expected at least 1 and, without --index, at most 10" in capsys.readouterr().err
    assert predict.main([workdir, "--text=a", f"--index={index}", "--k=0"]) == 2
    assert "--k=0: expected at least 1\n" in capsys.readouterr().err


def test_prediction_compares_hashes_where_that_is_asked_for(project, index, monkeypatch, capsys, tmp_path):
    """Of an index of more bytes than are always hashed."""
    monkeypatch.setattr(index_files, "HASHED_BYTES", 0)
    damaged = shutil.copytree(index, tmp_path / "index")
    path = damaged / "segment-00000.arrow"
    embedding = open_index(index).take(np.zeros(1, np.int32))[1].tobytes()
    content = path.read_bytes()
    assert content.count(embedding) == 1
    path.write_bytes(content.replace(embedding, embedding[::-1]))
    given = [f"--workdir={project / 'runs' / 'quickstart'}", "--text=a", f"--index={damaged}", "--verify"]
    assert predict.main(given) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{path}: SHA-256" in line


def test_prediction_for_a_user_is_that_of_a_record_of_theirs(project, capsys):
    """In this file of profiles every record has all of its user's records in its profile, as a new clip would."""
    folder, profiles = project / "users", project / "users" / "profiles.parquet"
    assert affect_profiles.main([f"--workdir={project / 'runs' / 'quickstart'}", f"--output={profiles}"]) == 0
    table, dataset = pq.read_table(profiles), Dataset.open(project / "data")
    lines = table.to_pylist()
    users = [user for split in SPLITS for user in dataset.split(split).column("user_id")]
    for line, user in zip(lines, users, strict=True):
        own = [other["affect"] for other, name in zip(lines, users, strict=True) if name == user]
        line["profile"] = None if user is None else np.mean(own, axis=0)
    pq.write_table(pa.Table.from_pylist(lines, table.schema), profiles)
    values = config_dict(project)
    values.data.affect_profiles = str(profiles)
    values.model.update(architecture="pooled_logistic", user_embedding=True)
    values.optimizer.learning_rate = 0.1
    train(parse(values.to_dict()), folder / "run")
    run = open_best_run(folder / "run")
    parts = Evaluator(run.model, run.config, run.dataset, run.mesh).predict(run.variables, ("test",))
    expected = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
    capsys.readouterr()
    scores = []
    for record, user, has_embedding, has_profile in (
        (0, "user-6", True, True),
        (2, "user-8", False, True),
        (4, "nobody", False, False),
    ):
        given = [f"--workdir={folder / 'run'}", f"--text={tiny_extraction.TEXTS[record % 2]}", f"--user={user}"]
        assert predict.main([*given, "--format=json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["user"] == {"id": user, "has_embedding": has_embedding, "has_profile": has_profile}
        top = [dataset.catalogue().ids[item] for item in expected.top_items[record]]
        assert [item["id"] for item in found["recommended"]] == top
        scores.append([item["score"] for item in found["recommended"]])
        np.testing.assert_allclose(scores[-1], expected.top_scores[record], atol=1e-5)
    # Of the same words.
    assert min(np.abs(np.subtract(scores[row], scores[other])).max() for row, other in ((0, 1), (0, 2), (1, 2))) > 1e-2
    assert predict.main(given) == 0
    assert capsys.readouterr().out.splitlines()[0] == "user: nobody (unknown, affect alone)"
    # An index is searched, and its answers ranked again, for the same user, without what that user has seen.
    encoder, best = ItemEncoder(run), dataset.catalogue().ids[expected.top_items[0][0]]
    manifest = Manifest("mmei_jax.catalogue_index", 1, encoder.tower_sha256, 8, "float32", KINDS, 0)
    create_index(folder / "index", manifest, encoder.encode_blocks([catalogue()]))
    (folder / "seen.csv").write_text(f"user,item\nuser-6,{best}\nnobody,item-0001\n")
    given = [f"--workdir={folder / 'run'}", f"--text={tiny_extraction.TEXTS[0]}", "--user=user-6", "--rerank"]
    given += [f"--index={folder / 'index'}", f"--seen={folder / 'seen.csv'}", "--num_candidates=49"]
    assert predict.main([*given, "--format=json"]) == 0
    found = json.loads(capsys.readouterr().out)
    own = dict(zip(catalogue().ids, expected.user_embedding[0] @ encoder.encode(catalogue()).T, strict=True))
    assert found["user"] == {"id": "user-6", "has_embedding": True, "has_profile": True}
    assert best not in {item["id"] for item in found["recommended"]}
    for item in found["recommended"]:
        assert item["affect_score"] == pytest.approx(own[item["id"]], abs=1e-5)


def test_prediction_recommends_again_with_reasons(project, index, reader, call, monkeypatch, capsys, tmp_path):
    """The text of the first test record, for which the search gives the same answers, of the same items."""
    excluded = [f"item-{item:04d}" for item in range(25)]
    (tmp_path / "exclude.txt").write_text("\n".join(excluded))
    lists = ["--kinds=video", f"--exclude={tmp_path / 'exclude.txt'}"]
    capped = [f"--index={index}", "--rerank", "--most_per_creator=2", "--k=6", *lists]
    code, out, _ = call("search", *capped, "--workdir=runs/quickstart", "--num_records=1", "--format=json")
    assert code == 0
    (expected,) = json.loads(out)["results"]
    given = [f"--workdir={project / 'runs' / 'quickstart'}", f"--text={tiny_extraction.TEXTS[0]}", *capped]
    monkeypatch.setattr(predict, "user_evaluator", lambda run: reader)
    assert predict.main([*given, "--format=json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [item["id"] for item in found["recommended"]] == [item["id"] for item in expected["items"]]
    assert {item["kind"] for item in found["recommended"]} == {"video"}
    assert not {item["id"] for item in found["recommended"]} & set(excluded)
    assert [item["cap"] for item in found["recommended"]] == [item["cap"] for item in expected["items"]]
    assert found["reranking"]["affect_weight"] == pytest.approx(expected["affect_weight"], abs=1e-4)
    assert found["reranking"]["shortfall"] == expected["shortfall"] == "caps"
    assert found["reranking"]["num_candidates"] == 30
    assert predict.main(given) == 0
    lines = capsys.readouterr().out.splitlines()
    best = found["recommended"][0]
    (line,) = [line for line in lines if f"{best['score']:.4f}" in line]
    assert f"{best['search_rank']} in the search" in line
    assert lines[-1] == "  fewer than asked for: the caps allow no more"
