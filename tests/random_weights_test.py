"""Encoders of random weights: drawn by their seed, read as converted ones are, and never without saying so."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from mmei_jax.encoders import random_weights
from mmei_jax.encoders.hugging_face_config import ConfigReader
from mmei_jax.encoders.preprocessing import AudioPreprocessing, ImagePreprocessing
from mmei_jax.encoders.pretrained import load
from mmei_jax.encoders.pretrained_files import read_preprocessing
from mmei_jax.encoders.pretrained_tables import ARCHITECTURES
from mmei_jax.encoders.random_weights import SIZES, make_random_encoder
from mmei_jax.encoders.tokenizer import Tokenizer
from mmei_jax.encoders.tokenizer_training import read_texts
from mmei_jax.extraction.encoder_loading import encoder_name
from mmei_jax.types import InputError
from tests.processes import ROOT

_STACK = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
# Each kind at tiny size, as its config.json has it.
TINY_CONFIGS = {
    "vit": {**_STACK, "image_size": 32, "patch_size": 8},
    "wav2vec2": {
        **_STACK,
        "conv_dim": [8] * 7,
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 4,
    },
    "bert": {**_STACK, "vocab_size": 300, "max_position_embeddings": 256},
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 20], "depths": [1, 2], "layer_type": "basic"},
    "audio_cnn": {"dim": 12, "channels": [4, 8], "num_mels": 16},
}
TEXTS = ("I feel happy today.", "Nothing works, I am sad and tired.", "Make me a happy picture!", "tired of it all")


def write_config(folder, kind, **changes):
    """A folder with the ``config.json`` of a tiny encoder."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": kind, **TINY_CONFIGS[kind], **changes}))
    return folder


def write_texts(path, texts=TEXTS):
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


def make(folder, kind, name="made", seed=0, **changes):
    """A tiny encoder of that kind in ``folder / name``, and its certificate."""
    source = write_config(folder / f"{name}_config", kind, **changes)
    texts = write_texts(folder / "texts.txt") if kind == "bert" else None
    return folder / name, make_random_encoder(str(source), folder / name, seed=seed, texts=texts)


@pytest.mark.parametrize("kind", TINY_CONFIGS)
def test_seed_gives_the_weights_which_are_loaded_and_called_random(kind, tmp_path):
    folder, certificate = make(tmp_path, kind, seed=3)
    again, _ = make(tmp_path, kind, "again", seed=3)
    other, _ = make(tmp_path, kind, "other", seed=4)
    parameters = (folder / "parameters.safetensors").read_bytes()
    assert (again / "parameters.safetensors").read_bytes() == parameters
    assert (other / "parameters.safetensors").read_bytes() != parameters
    encoder = load(folder)
    assert encoder_name(encoder) == f"{kind} random weights, seed 3"
    assert encoder.certificate == json.loads(json.dumps(certificate))
    assert certificate["comparison"] == "not made: the weights are random"
    inputs = ARCHITECTURES[kind].example(encoder.config)
    states = encoder.module.apply({"params": encoder.parameters}, **inputs).last_hidden_state
    assert np.isfinite(states).all()
    assert np.std(states) > 0.01
    assert sum(leaf.size for leaf in jax.tree.leaves(encoder.parameters)) == certificate["num_parameters"]


@pytest.mark.parametrize("kind", ["vit", "wav2vec2", "resnet", "audio_cnn"])
def test_preprocessing_is_the_kinds_own_unless_it_stands_beside_the_configuration(kind, tmp_path):
    folder, _ = make(tmp_path, kind)
    values = read_preprocessing(folder)
    if kind in ("vit", "resnet"):
        image = ImagePreprocessing.read(values)
        expected = (32, None, 0.5) if kind == "vit" else (224, 256, 0.485)
        assert (image.height, image.shorter_edge, image.mean[0]) == expected
    else:
        assert AudioPreprocessing.read(values) == AudioPreprocessing(16_000, is_normalised=kind == "wav2vec2")
    source = write_config(tmp_path / "with", kind)
    (source / "preprocessor_config.json").write_text('{"size": 64, "sampling_rate": 8000}')
    make_random_encoder(str(source / "config.json"), tmp_path / "other")
    assert read_preprocessing(tmp_path / "other") == {"size": 64, "sampling_rate": 8000}


def test_names_stand_for_the_base_sizes():
    read = {
        name: ARCHITECTURES[values["model_type"]].read_config(ConfigReader(values, values["model_type"]))
        for name, values in SIZES.items()
    }
    assert [read[name].stack.dim for name in ("vit-base", "wav2vec2-base", "bert-base")] == [768] * 3
    assert [read[name].stack.num_layers for name in ("vit-base", "wav2vec2-base", "bert-base")] == [12] * 3
    assert read["resnet-50"].depths == (3, 4, 6, 3)
    assert read["resnet-50"].stage_dims[-1] == 2048
    assert read["audio-cnn"].dim == 256


def test_tokenizer_knows_the_words_of_its_texts_and_is_the_same_in_every_process(tmp_path):
    folder, certificate = make(tmp_path, "bert")
    tokenizer = Tokenizer(str(folder), 64)
    tokens = tokenizer._tokenizer.convert_ids_to_tokens(tokenizer.encode("Happy, sad, happily!").token_ids)
    assert tokens[:5] == ["[CLS]", "happy", ",", "sad", ","]
    # A word that the texts lack is put together from parts of theirs.
    assert "".join(tokens[5:]).replace("##", "") == "happily![SEP]"
    assert max(tokenizer._tokenizer.get_vocab().values()) < load(folder).config.vocabulary_size
    assert certificate["tokenizer"].endswith("trained on 4 texts of texts.txt")
    arguments = [tmp_path / "made_config", tmp_path / "again", f"--texts={tmp_path / 'texts.txt'}"]
    command = [sys.executable, "-m", "mmei_jax.encoders.random_weights", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "bert of random weights, seed 0" in done.stdout
    for path in folder.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def test_vocabulary_of_a_list_knows_training_texts_alone(tmp_path):
    path = tmp_path / "clips.csv"
    path.write_text("id,split,text\n1,train,one happy word\n2,test,secret\n3,train,\n4,validation,other\n")
    assert read_texts(path) == ["one happy word"]
    path.write_text("id,text\n1,one\n2, two \n")
    assert read_texts(path) == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("clips.csv", "id,words\n1,one\n", r"clips\.csv: has no column 'text'"),
        ("clips.csv", "split,text\ntest,one\n", r"clips\.csv: has no text to train a tokenizer on"),
        ("texts.txt", "\n \n", r"texts\.txt: has no text to train a tokenizer on"),
        ("texts.pdf", "one", r"texts\.pdf: expected a \.txt file"),
        ("texts.txt", "".join(map(chr, range(0x4E00, 0x4F40))), r"vocab_size = 300: expected at least 325 for these"),
    ],
)
def test_texts_that_cannot_be_used_are_told_in_one_line(name, content, message, tmp_path):
    (tmp_path / name).write_text(content, encoding="utf-8")
    source = write_config(tmp_path / "config", "bert")
    with pytest.raises(InputError, match=message) as caught:
        make_random_encoder(str(source), tmp_path / "made", texts=tmp_path / name)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("vit-huge", {}, "vit-huge: expected vit-base, wav2vec2-base, bert-base, resnet-50, audio-cnn, a config.json"),
        ("resnet-50", {"seed": -1}, "seed = -1: expected 0 to 4294967295"),
        ("resnet-50", {"texts": Path("texts.txt")}, "texts = texts.txt for resnet-50: expected a file of texts"),
        ("bert-base", {}, "texts = None for bert-base: expected a file of texts for a BERT"),
    ],
)
def test_other_arguments_are_told_in_one_line(kind, options, message, tmp_path):
    with pytest.raises(InputError, match=message):
        make_random_encoder(kind, tmp_path / "made", **options)


def test_other_architectures_and_folders_that_exist_are_told_in_one_line(tmp_path, capsys):
    source = tmp_path / "config.json"
    source.write_text('{"model_type": "gpt2"}')
    assert random_weights.main([str(source), str(tmp_path / "made")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "model_type = 'gpt2': expected bert, vit, wav2vec2, resnet, audio_cnn" in line
    assert random_weights.main(["audio-cnn", str(tmp_path)]) == 2
    assert "exists already" in capsys.readouterr().err
