"""The content tower over words: what a frozen BERT gives it, a BERT that is trained with it, and each part alone."""

import dataclasses
import functools
import shutil

import jax
import numpy as np
import pytest
import torch
import transformers

from mmei_jax import item_words
from mmei_jax.evaluation import catalogue_items, embed_catalogue, open_best_run
from mmei_jax.item_words import describe_item, encoder_fingerprint, open_dataset, read_words, trained_encoder_parameters
from mmei_jax.recommendation.item_encoding import ItemEncoder
from mmei_jax.records import Dataset
from mmei_jax.state import build_model, initial_encoders, initialize, tasks_of, with_encoders
from mmei_jax.training import train
from mmei_jax.types import InputError
from tests import tiny, tiny_encoders

TEXTS = ["happy voice. sad, word. a. music", "the voices.", "", "sad " * 40, "unknown letters"]
# Names of parameters as the optimizer and the warm start see them.
BUT_TOWER = "^(?!content_tower/)"


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    return tiny_encoders.make(tmp_path_factory.mktemp("encoders"))


def configure(data, encoders, training, **changes):
    """The least of a user side: what is tested here is the other one."""
    least = {**tiny.LEAST, "model__content_max_tokens": 12, "train__num_epochs": 1}
    changes = {**least, **changes}
    encoder = str(encoders.converted["text"])
    return tiny.config(data, model__content_encoder=encoder, model__content_encoder_training=training, **changes)


@pytest.fixture(scope="module")
def frozen_run(data, encoders, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("frozen")
    train(configure(data, encoders, "frozen"), workdir)
    return workdir


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            '{"title": "Rain", "tags": ["calm", "night"], "creator": "Ada", "origin": "human"}',
            "Rain. calm, night. Ada. k",
        ),
        ('{"description": "long", "title": "Rain"}', "Rain. long. k"),
        ('{"tags": [], "title": null}', "k"),
        ("{}", "k"),
    ],
)
def test_item_is_described_by_its_metadata(text, expected):
    assert describe_item(text, "k", "1") == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no JSON", "item '7': text 'no JSON': expected a JSON object"),
        ("[1]", "expected a JSON object"),
        ('{"title": 3}', "title = 3: expected a text or a list of texts"),
        ('{"tags": ["a", 1]}', "tags = "),
    ],
)
def test_metadata_that_are_no_words_are_refused(text, message):
    with pytest.raises(InputError, match=message.replace("[", r"\[")):
        describe_item(text, "k", "7")


def test_frozen_states_are_the_mean_over_tokens_of_hugging_faces_bert(data, encoders):
    config = configure(data, encoders, "frozen").model
    found = read_words(TEXTS, config)
    assert list(found) == ["word_state"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoders.source["text"])
    given = tokenizer(TEXTS, padding=True, truncation=True, max_length=12, return_tensors="pt")
    with torch.no_grad():
        states = transformers.AutoModel.from_pretrained(encoders.source["text"]).eval()(**given).last_hidden_state
    mask = given["attention_mask"][..., None].float()
    expected = ((states * mask).sum(1) / mask.sum(1)).numpy()
    np.testing.assert_allclose(found["word_state"], expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_ids_of_a_trained_encoder_are_the_tokenizers(data, encoders):
    found = read_words(TEXTS, configure(data, encoders, "trained").model)
    assert list(found) == ["word_ids"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoders.source["text"])
    expected = tokenizer(TEXTS, padding="max_length", truncation=True, max_length=12, return_tensors="np")
    np.testing.assert_array_equal(found["word_ids"], np.where(expected["attention_mask"], expected["input_ids"], -1))


@pytest.fixture
def as_new_process(monkeypatch):
    """Forgets what this process has read."""

    def forget():
        item_words._words_of_catalogue.cache_clear()
        item_words._load.cache_clear()

    forget()
    yield forget
    forget()


def test_frozen_states_are_kept_for_later_commands(data, encoders, tmp_path, as_new_process, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = configure(data, encoders, "frozen")
    first = open_dataset(config).catalogue().word_state
    (kept,) = (tmp_path / "mmei_jax" / "item_words").iterdir()
    with monkeypatch.context() as changes:
        changes.setattr(item_words, "_load", functools.lru_cache(lambda _: pytest.fail("the encoder is loaded")))
        item_words._words_of_catalogue.cache_clear()
        np.testing.assert_array_equal(open_dataset(config).catalogue().word_state, first)
    # Other tokens are other states.
    shorter = configure(data, encoders, "frozen", model__content_max_tokens=3)
    assert (open_dataset(shorter).catalogue().word_state != first).any()
    assert len(list(kept.parent.iterdir())) == 2


def test_run_is_opened_without_reading_words(frozen_run, as_new_process, monkeypatch):
    for name in ("_load", "_read_catalogue", "kept_states"):
        monkeypatch.setattr(item_words, name, functools.lru_cache(lambda *_: pytest.fail("words are read")))
    run = open_best_run(frozen_run)
    assert run.model.tasks.word_dim == tiny_encoders.DIM
    assert len(ItemEncoder(run).tower_sha256) == 64
    assert run.dataset.with_item_words(None).catalogue().word_state is None


def test_no_encoder_reads_no_words(data):
    assert read_words(TEXTS, tiny.config(data).model) == {}
    assert encoder_fingerprint(tiny.config(data).model) == ""
    assert open_dataset(tiny.config(data)).catalogue().word_state is None


def tower_of(config, dataset, seed=0):
    model = build_model(config, dataset)
    variables = jax.jit(lambda: initialize(model, seed))()
    variables["params"] = with_encoders(variables["params"], initial_encoders(config.model))
    return model, jax.device_put(variables)


def some_items(config):
    items = catalogue_items(open_dataset(config).catalogue())
    return jax.tree.map(lambda leaf: leaf[:300], items)


def embed(model, variables, items):
    return np.asarray(jax.jit(functools.partial(embed_catalogue, model))(variables, items))


@pytest.mark.parametrize("features", [True, False])
def test_tower_projects_features_and_normalised_words_and_adds_the_kind(data, encoders, features):
    config = configure(data, encoders, "frozen", model__content_features=features)
    dataset = open_dataset(config)
    model, variables = tower_of(config, dataset)
    items = some_items(config)
    items = items.replace(word_state=items.word_state + jax.random.normal(jax.random.key(0), items.word_state.shape))
    found = embed(model, variables, items)
    tower = jax.tree.map(np.asarray, variables["params"]["content_tower"])
    words = np.asarray(items.word_state, np.float64)
    centred = words - words.mean(axis=1, keepdims=True)
    normalised = centred / np.sqrt(centred.var(axis=1, keepdims=True) + 1e-6)
    normalised = normalised * tower["word_norm"]["scale"] + tower["word_norm"]["bias"]
    expected = normalised @ tower["word_projection"]["kernel"]
    if features:
        expected += np.asarray(items.features) @ tower["projection"]["kernel"] + tower["projection"]["bias"]
    expected += tower["kind_embedding"][np.asarray(items.kind)]
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_trained_encoder_begins_as_the_frozen_one(data, encoders):
    frozen, trained = (configure(data, encoders, training) for training in ("frozen", "trained"))
    (model, variables), (other, others) = (tower_of(config, open_dataset(config)) for config in (frozen, trained))
    # Fresh parameters of one module depend on its place alone: the towers have the same.
    items, words = some_items(frozen), some_items(trained)
    assert items.word_ids is None
    assert words.word_state is None
    np.testing.assert_allclose(embed(model, variables, items), embed(other, others, words), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ("trained", r"items\.word_ids: expected token ids"),
        ("frozen", r"items\.word_state: expected an encoder's states"),
    ],
)
def test_items_without_the_words_that_the_tower_reads_are_refused(data, encoders, training, message):
    config = configure(data, encoders, training)
    model, variables = tower_of(config, open_dataset(config))
    catalogue = Dataset.open(data).catalogue()
    with pytest.raises(ValueError, match=message):
        embed_catalogue(model, variables, catalogue_items(catalogue))
    with pytest.raises(InputError, match="opened without the words of its items"):
        tasks_of(config, Dataset.open(data))


def parameters_of(workdir):
    return jax.device_get(open_best_run(workdir).variables["params"])


def changed_parts(before, after):
    """Names of the parameters that differ."""
    different = jax.tree.map(lambda old, new: bool((old != new).any()), before, after)
    leaves = jax.tree_util.tree_leaves_with_path(different)
    return {"/".join(entry.key for entry in path) for path, differs in leaves if differs}


def test_trained_encoder_learns_but_for_what_is_frozen(data, encoders, tmp_path):
    """Updates reach the last layer alone; the run is evaluated and goes on from its checkpoint."""
    frozen = (("content_tower/encoder/(?!encoder/layer_3/)", 0.0),)
    config = configure(data, encoders, "trained", optimizer__rate_multipliers=frozen)
    result = train(config, tmp_path / "run")
    assert result.best_step == result.step
    after = parameters_of(tmp_path / "run")["content_tower"]["encoder"]
    changed = changed_parts(trained_encoder_parameters(config.model), after)
    assert changed
    assert all(name.startswith("encoder/layer_3/") for name in changed)
    assert any(name.endswith("query/kernel") for name in changed)


def test_content_tower_is_trained_alone(data, encoders, frozen_run, tmp_path):
    """The user side of another run, which had no words, and a fresh tower over words."""
    start = tmp_path / "start"
    train(tiny.config(data, train__num_epochs=1, **tiny.LEAST), start)
    alone = {
        "train__initial_workdir": str(start),
        "train__initial_parameters": BUT_TOWER,
        "optimizer__rate_multipliers": ((BUT_TOWER, 0.0),),
    }
    train(configure(data, encoders, "frozen", **alone), tmp_path / "alone")
    before, after = parameters_of(start), parameters_of(tmp_path / "alone")
    tower, other = after.pop("content_tower"), before.pop("content_tower")
    assert changed_parts(before, after) == set()
    assert "word_projection" in tower.keys() - other.keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__initial_parameters": "nothing"}, "matches no parameter of the model"),
        ({"train__initial_parameters": "("}, "is no regular expression"),
        ({"train__initial_parameters": "word_norm"}, "has no parameter 'content_tower/word_norm/"),
        (
            {"train__initial_parameters": "", "model__embedding_dim": 4},
            r"content_tower/kind_embedding: of shape \(4, 8\) there",
        ),
    ],
)
def test_unfit_start_is_refused(data, encoders, tmp_path, plain_run, changes, message):
    changes = {"train__initial_workdir": str(plain_run), **changes}
    with pytest.raises(InputError, match=message):
        train(configure(data, encoders, "frozen", **changes), tmp_path / "run")


@pytest.fixture(scope="module")
def plain_run(data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("plain")
    train(tiny.config(data, train__num_epochs=1, **tiny.LEAST), workdir)
    return workdir


def test_run_is_refused_with_another_encoder(data, encoders, frozen_run, tmp_path):
    folder = encoders.converted["text"]
    kept = shutil.copytree(folder, tmp_path / "kept")
    vocabulary = folder / "tokenizer.json"
    try:
        vocabulary.write_text(vocabulary.read_text().replace("happy", "merry"))
        with pytest.raises(
            InputError, match=r"its weights or tokenizer are not those that the run in .* was trained with"
        ):
            open_best_run(frozen_run)
    finally:
        shutil.copytree(kept, folder, dirs_exist_ok=True)
    assert open_best_run(frozen_run).model.tasks.word_dim == tiny_encoders.DIM


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__content_features": False}, "config.model.content_features = False: expected True without"),
        ({"model__content_max_tokens": 2}, "config.model.content_max_tokens = 2: expected at least 3"),
        ({"model__content_encoder": "x", "loss__ranking": "none"}, "config.model.content_encoder = 'x': expected ''"),
        ({"train__initial_parameters": "x"}, "config.train.initial_parameters = 'x': expected '' without"),
    ],
)
def test_keys_that_would_change_nothing_are_refused(data, changes, message):
    with pytest.raises(InputError, match=message):
        tiny.config(data, **changes)


def test_unfit_encoders_are_refused(data, encoders):
    config = configure(data, encoders, "frozen").model
    with pytest.raises(InputError, match=r"content_max_tokens = 65: expected at most the encoder's 64"):
        read_words(TEXTS, dataclasses.replace(config, content_max_tokens=65))
    with pytest.raises(InputError, match=r"content_encoder = .*holds a 'vit': expected a BERT"):
        read_words(TEXTS, dataclasses.replace(config, content_encoder=str(encoders.converted["vision"])))
    with pytest.raises(InputError, match=r"missing: has no config\.json"):
        read_words(TEXTS, dataclasses.replace(config, content_encoder="missing"))
