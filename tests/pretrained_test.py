"""Conversion: the same numbers out of every kind of file, strict both ways, certified, and complete or not there."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import jax
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from mmei_jax.encoders import pretrained
from mmei_jax.encoders.stack import ComputeOptions
from mmei_jax.types import InputError
from tests import hugging_face

ROOT = Path(__file__).parents[1]


def bert_config(**changes):
    shape = dict(vocab_size=31, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    return transformers.BertConfig(**{**shape, "max_position_embeddings": 12, **changes})


@functools.cache
def base_model():
    return hugging_face.randomised(transformers.BertModel(bert_config()))


def save(folder, model, *, form="safetensors"):
    """Writes a checkpoint in one of the forms that the hub holds."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(model.config.to_dict()))
    state = {name: tensor.detach().clone().contiguous() for name, tensor in model.state_dict().items()}
    names = sorted(state)
    halves = {1: {name: state[name] for name in names[::2]}, 2: {name: state[name] for name in names[1::2]}}
    writers = {"safetensors": safetensors.torch.save_file, "bin": torch.save}
    stem = {"safetensors": "model", "bin": "pytorch_model"}
    kind = form.removeprefix("sharded_")
    if form == kind:
        writers[kind](state, folder / f"{stem[kind]}.{kind}")
        return folder
    weight_map = {}
    for part, tensors in halves.items():
        name = f"{stem[kind]}-0000{part}-of-00002.{kind}"
        writers[kind](tensors, folder / name)
        weight_map |= dict.fromkeys(tensors, name)
    (folder / f"{stem[kind]}.{kind}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def edit(folder, change):
    """Changes the tensors of a saved model.safetensors."""
    state = safetensors.torch.load_file(folder / "model.safetensors")
    safetensors.torch.save_file(change(state), folder / "model.safetensors")


def assert_same_weights(parameters, model):
    expected = hugging_face.converted(model).parameters
    assert jax.tree.structure(parameters) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, parameters, expected)


@pytest.mark.parametrize("form", ["safetensors", "sharded_safetensors", "bin", "sharded_bin"])
def test_every_form_of_checkpoint_gives_exactly_the_weights(tmp_path, form):
    source = save(tmp_path / "source", base_model(), form=form)
    certificate = pretrained.convert(source, tmp_path / "ours", compare=False)
    loaded = pretrained.load(tmp_path / "ours")
    assert_same_weights(loaded.parameters, base_model())
    assert loaded.certificate == certificate
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == [
        "certificate.json",
        "config.json",
        "parameters.safetensors",
    ]


def test_certificate_tells_source_architecture_and_differences(tmp_path):
    source = save(tmp_path / "source", base_model())
    certificate = pretrained.convert(source, tmp_path / "ours")
    digest = subprocess.run(["sha256sum", source / "model.safetensors"], capture_output=True, text=True, check=True)
    assert certificate["source"]["sha256"]["model.safetensors"] == digest.stdout.split()[0]
    assert set(certificate["source"]["sha256"]) == {"config.json", "model.safetensors"}
    written = tmp_path / "ours" / "parameters.safetensors"
    digest = subprocess.run(["sha256sum", written], capture_output=True, text=True, check=True)
    assert certificate["parameters_sha256"] == digest.stdout.split()[0]
    assert certificate["num_parameters"] == sum(parameter.numel() for parameter in base_model().parameters())
    assert certificate["architecture"]["stack"]["dim"] == 16
    assert certificate["dtype"] == "float32"
    assert certificate["source"]["dtypes"] == ["float32"]
    assert "hidden_dropout_prob" in certificate["config_keys_without_effect"]
    differences = certificate["comparison"]["largest_absolute_difference"]
    assert list(differences) == [*(f"hidden_states[{index}]" for index in range(3)), "last_hidden_state", "pooled"]
    assert max(differences.values()) <= hugging_face.STAGE_TOLERANCE
    assert certificate["comparison"]["with"]["torch"] == torch.__version__


def test_model_as_wide_as_its_example_is_long_is_compared(tmp_path):
    """Nothing but the number of axes tells pooled outputs from tokens' states then."""
    model = hugging_face.randomised(transformers.BertModel(bert_config(max_position_embeddings=32, hidden_size=32)))
    comparison = pretrained.convert(save(tmp_path / "source", model), tmp_path / "ours")["comparison"]
    assert comparison["input_shapes"]["token_ids"][1] == 32
    assert max(comparison["largest_absolute_difference"].values()) <= hugging_face.STAGE_TOLERANCE


def test_comparison_finds_a_wrong_weight(tmp_path, monkeypatch):
    source = save(tmp_path / "source", base_model())
    converted = hugging_face.converted(base_model())
    converted.parameters["encoder"]["layer_1"]["attention"]["value"]["kernel"][:] *= 1.01
    monkeypatch.setattr(pretrained, "convert_weights", lambda *_: converted)
    certificate = pretrained.convert(source, tmp_path / "ours")
    differences = certificate["comparison"]["largest_absolute_difference"]
    assert differences["hidden_states[1]"] <= hugging_face.STAGE_TOLERANCE
    assert differences["hidden_states[2]"] > 1e-3


TASKS = {
    "BertForMaskedLM": ("cls.", False),
    "BertForPreTraining": ("cls.", True),
    "BertForSequenceClassification": ("classifier.", True),
    "BertForTokenClassification": ("classifier.", False),
    "BertForQuestionAnswering": ("qa_outputs.", False),
    "BertForNextSentencePrediction": ("cls.", True),
}


@pytest.mark.parametrize("task", TASKS)
def test_task_checkpoint_loads_with_its_head_listed_as_left_out(tmp_path, task):
    head, has_pooler = TASKS[task]
    model = hugging_face.randomised(getattr(transformers, task)(bert_config()))
    model.save_pretrained(tmp_path / "source")
    certificate = pretrained.convert(tmp_path / "source", tmp_path / "ours", compare=False)
    assert certificate["heads_left_out"]
    assert all(name.startswith(head) for name in certificate["heads_left_out"])
    assert certificate["architecture"]["has_pooler"] == has_pooler
    assert_same_weights(pretrained.load(tmp_path / "ours").parameters, model.bert)


def test_names_of_the_first_tensorflow_checkpoints_are_known(tmp_path):
    source = save(tmp_path / "source", base_model())

    def rename(state):
        new = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        old = {
            next((f"bert.{name.replace(a, b)}" for a, b in new.items() if name.endswith(a)), f"bert.{name}"): tensor
            for name, tensor in state.items()
        }
        return {**old, "bert.embeddings.position_ids": torch.arange(12)[None]}

    edit(source, rename)
    certificate = pretrained.convert(source, tmp_path / "ours", compare=False)
    assert certificate["weights_ignored"] == ["bert.embeddings.position_ids"]
    assert_same_weights(pretrained.load(tmp_path / "ours").parameters, base_model())


def test_missing_unexpected_and_misshapen_weights_are_all_told_and_nothing_is_written(tmp_path):
    source = save(tmp_path / "source", base_model())

    def spoil(state):
        del state["encoder.layer.0.attention.self.key.bias"]
        del state["pooler.dense.bias"]
        state["encoder.layer.2.output.dense.bias"] = torch.zeros(16)
        state["extra"] = torch.zeros(1)
        state["encoder.layer.1.output.dense.weight"] = torch.zeros(16, 25)
        state["embeddings.LayerNorm.bias"] = torch.zeros(1, 16)
        return state

    edit(source, spoil)
    with pytest.raises(InputError) as error:
        pretrained.convert(source, tmp_path / "ours", compare=False)
    for part in (
        "missing encoder.layer.0.attention.self.key.bias",
        "missing pooler.dense.bias",
        "unexpected encoder.layer.2.output.dense.bias",
        "unexpected extra",
        "encoder.layer.1.output.dense.weight [16, 25] gives encoder/layer_1/feed_forward/output/kernel [25, 16]",
        "embeddings.LayerNorm.bias [1, 16]",
    ):
        assert part in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_head_of_an_unknown_name_is_unexpected(tmp_path):
    model = transformers.BertForTokenClassification(bert_config())
    source = save(tmp_path / "source", model)
    edit(source, lambda state: {name.replace("classifier", "tagger"): tensor for name, tensor in state.items()})
    with pytest.raises(InputError, match=r"unexpected tagger\.bias; unexpected tagger\.weight"):
        pretrained.convert(source, tmp_path / "ours", compare=False)


def test_feature_that_is_not_implemented_is_refused_by_name(tmp_path):
    source = save(tmp_path / "source", base_model())
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "position_embedding_type": "relative_key"}))
    with pytest.raises(InputError, match="position_embedding_type = 'relative_key' is not implemented"):
        pretrained.convert(source, tmp_path / "ours", compare=False)
    quantised = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
    (source / "config.json").write_text(json.dumps({**config, **quantised}))
    with pytest.raises(InputError, match=r"quantization_config = .*bitsandbytes.* is not implemented"):
        pretrained.convert(source, tmp_path / "ours", compare=False)
    (source / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    with pytest.raises(InputError, match="model_type = 'gpt2' is not implemented; there are bert, "):
        pretrained.convert(source, tmp_path / "ours", compare=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_checkpoint_becomes_float32_exactly(tmp_path, dtype):
    source = save(tmp_path / "source", base_model())
    edit(source, lambda state: {name: tensor.to(dtype) for name, tensor in state.items()})
    certificate = pretrained.convert(source, tmp_path / "ours", compare=False)
    assert certificate["source"]["dtypes"] == [str(dtype).removeprefix("torch.")]
    kernel = pretrained.load(tmp_path / "ours").parameters["pooler"]["kernel"]
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel, base_model().pooler.dense.weight.detach().to(dtype).float().numpy().T)


def test_parameters_are_stored_and_loaded_in_the_type_asked_for(tmp_path):
    source = save(tmp_path / "source", base_model())
    pretrained.convert(source, tmp_path / "ours", dtype="bfloat16", compare=False)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(pretrained.load(tmp_path / "ours").parameters)} == {"bfloat16"}
    loaded = pretrained.load(tmp_path / "ours", dtype="float32")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(loaded.parameters)} == {"float32"}
    exact = base_model().pooler.dense.weight.detach()
    np.testing.assert_array_equal(loaded.parameters["pooler"]["kernel"], exact.bfloat16().float().numpy().T)


def test_weight_that_is_too_large_for_float16_is_refused_by_name(tmp_path):
    source = save(tmp_path / "source", base_model())
    edit(source, lambda state: {**state, "pooler.dense.bias": torch.full((16,), -1e6)})
    message = r"pooler/bias holds 1e\+06, too large for float16; expected dtype bfloat16 or float32"
    with pytest.raises(InputError, match=message):
        pretrained.convert(source, tmp_path / "ours", dtype="float16", compare=False)
    pretrained.convert(source, tmp_path / "ours", compare=False)
    with pytest.raises(InputError, match=message):
        pretrained.load(tmp_path / "ours", dtype="float16")
    assert np.isfinite(pretrained.load(tmp_path / "ours", dtype="bfloat16").parameters["pooler"]["bias"]).all()


def test_loaded_parameters_lie_on_the_device(tmp_path):
    pretrained.convert(save(tmp_path / "source", base_model()), tmp_path / "ours", compare=False)
    for options in (ComputeOptions(), ComputeOptions(scan_layers=True)):
        loaded = pretrained.load(tmp_path / "ours", options=options)
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(loaded.parameters))


def test_type_that_cannot_hold_weights_is_refused(tmp_path):
    pretrained.convert(save(tmp_path / "source", base_model()), tmp_path / "ours", compare=False)
    with pytest.raises(InputError, match="dtype = 'int8': expected float32"):
        pretrained.load(tmp_path / "ours", dtype="int8")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    (tmp_path / "ours" / "config.json").write_text(json.dumps({**config, "model_type": "gpt"}))
    with pytest.raises(InputError, match=r"config\.json: model_type = 'gpt': expected bert"):
        pretrained.load(tmp_path / "ours")


def test_loaded_module_runs_with_its_options(tmp_path):
    source = save(tmp_path / "source", base_model())
    pretrained.convert(source, tmp_path / "ours", compare=False)
    ids = np.arange(1, 9, dtype=np.int32)[None]
    outputs = []
    for options in (ComputeOptions(), ComputeOptions(scan_layers=True)):
        loaded = pretrained.load(tmp_path / "ours", options=options)
        outputs.append(jax.jit(loaded.module.apply)({"params": loaded.parameters}, ids, np.ones_like(ids)).pooled)
    np.testing.assert_allclose(*outputs, rtol=0, atol=1e-5)


def change_parameter_file(folder):
    safetensors.torch.save_file({"token_embedding/embedding": torch.zeros(3, 16)}, folder / "parameters.safetensors")


def change_one_bit(folder):
    content = bytearray((folder / "parameters.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "parameters.safetensors").write_bytes(content)


def make_certificate_older(folder):
    certificate = json.loads((folder / "certificate.json").read_text())
    (folder / "certificate.json").write_text(json.dumps({**certificate, "version": 1}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "certificate.json").unlink(), r"has no certificate\.json"),
        (lambda folder: (folder / "parameters.safetensors").write_bytes(b"\x10" * 40), r"parameters\.safetensors"),
        (change_parameter_file, r"does not fit config\.json: embedding_norm/bias.*token_embedding/embedding"),
        (change_one_bit, r"parameters\.safetensors: is not the file that certificate\.json is about \(SHA-256\)"),
        (make_certificate_older, r"certificate\.json: version = 1: expected 2; convert the checkpoint again"),
        (lambda folder: (folder / "config.json").write_text("[]"), "expected a JSON object"),
    ],
)
def test_changed_folder_is_not_loaded(tmp_path, spoil, message):
    pretrained.convert(save(tmp_path / "source", base_model()), tmp_path / "ours", compare=False)
    spoil(tmp_path / "ours")
    with pytest.raises(InputError, match=message):
        pretrained.load(tmp_path / "ours")


def index_with(content):
    return lambda folder: (
        (folder / "model.safetensors").unlink(),
        (folder / "model.safetensors.index.json").write_text(json.dumps(content)),
    )


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), r"has no config\.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "no JSON"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no weights"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"not one"), r"model\.safetensors"),
        (index_with({}), "expected a weight_map"),
        (index_with({"weight_map": {"a": "missing.safetensors"}}), r"has no missing\.safetensors"),
        (index_with({"weight_map": {"a": "../model.safetensors"}}), "not the name of a file beside it"),
    ],
)
def test_damaged_source_is_told(tmp_path, spoil, message):
    source = save(tmp_path / "source", base_model())
    spoil(source)
    with pytest.raises(InputError, match=message):
        pretrained.convert(source, tmp_path / "ours", compare=False)
    assert not (tmp_path / "ours").exists()


def test_weight_in_two_files_is_refused(tmp_path):
    source = save(tmp_path / "source", base_model(), form="sharded_safetensors")
    part = source / "model-00002-of-00002.safetensors"
    other = safetensors.torch.load_file(source / "model-00001-of-00002.safetensors")
    safetensors.torch.save_file({**safetensors.torch.load_file(part), **other}, part)
    with pytest.raises(InputError, match=r"embeddings\.LayerNorm\.bias.* stand in another file too"):
        pretrained.convert(source, tmp_path / "ours", compare=False)


def make_hub(monkeypatch, folder, *, commit="c0ffee", online=True):
    """Stands in for the hub: one repository, whose files lie in a cache like huggingface_hub's."""
    requests = []
    response = huggingface_hub.errors.EntryNotFoundError

    def hf_hub_download(repository, name, revision=None):
        requests.append((name, revision))
        if not online:
            raise huggingface_hub.errors.LocalEntryNotFoundError("out of reach")
        assert repository == "someone/tiny-bert"
        path = folder / "snapshots" / commit / name
        if not path.exists():
            raise response(f"no {name}")
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    return requests


def test_repository_of_the_hub_is_converted_at_one_commit(tmp_path, monkeypatch):
    (tmp_path / "snapshots").mkdir()
    save(tmp_path / "snapshots" / "c0ffee", base_model(), form="bin")
    requests = make_hub(monkeypatch, tmp_path)
    certificate = pretrained.convert("someone/tiny-bert", tmp_path / "ours", revision="v1", compare=False)
    assert certificate["source"]["name"] == "someone/tiny-bert"
    assert certificate["source"]["revision"] == "c0ffee"
    assert requests[0] == ("config.json", "v1")
    assert {revision for _, revision in requests[1:]} == {"c0ffee"}
    assert_same_weights(pretrained.load(tmp_path / "ours").parameters, base_model())


def test_hub_out_of_reach_is_told_in_one_line(tmp_path, monkeypatch):
    make_hub(monkeypatch, tmp_path, online=False)
    with pytest.raises(InputError, match=r"someone/tiny-bert: no folder, not in the hub's cache"):
        pretrained.convert("someone/tiny-bert", tmp_path / "ours", compare=False)


def test_source_that_is_neither_folder_nor_repository_is_refused(tmp_path):
    for source in (tmp_path / "missing", "a/b/c", "./x"):
        with pytest.raises(InputError, match="neither a folder nor the id"):
            pretrained.convert(source, tmp_path / "ours", compare=False)
    with pytest.raises(InputError, match="no revision 'v1'"):
        pretrained.convert(save(tmp_path / "s", base_model()), tmp_path / "ours", revision="v1", compare=False)


def test_existing_destination_is_left_alone(tmp_path):
    (tmp_path / "ours").mkdir()
    with pytest.raises(InputError, match="exists already"):
        pretrained.convert(save(tmp_path / "source", base_model()), tmp_path / "ours", compare=False)
    assert not list((tmp_path / "ours").iterdir())


def test_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch):
    source = save(tmp_path / "source", base_model())

    def fail(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr(pretrained, "save_file", fail)
    assert pretrained.main([str(source), str(tmp_path / "ours"), "--no-compare"]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_command_converts_and_tells_what_it_did(tmp_path, capsys):
    model = hugging_face.randomised(transformers.BertForMaskedLM(bert_config()))
    source = save(tmp_path / "source", model)
    assert pretrained.main([str(source), str(tmp_path / "ours")]) == 0
    printed = capsys.readouterr().out
    assert "bert," in printed
    assert "heads left out: cls.predictions.bias" in printed
    assert "hidden_states[2]" in printed
    assert pretrained.main([str(source), str(tmp_path / "ours")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_command_converts_where_torch_is_not_installed(tmp_path):
    # None in sys.modules makes an import fail, as it does where the module is not installed.
    source = save(tmp_path / "source", base_model(), form="bin")
    program = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "import importlib.util\n"
        "find_spec = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'torch' else find_spec(name, *rest)\n"
        "from mmei_jax.encoders import pretrained\n"
        f"sys.exit(pretrained.main([{str(source)!r}, {str(tmp_path / 'ours')!r}]))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "not made: torch is not installed" in done.stdout
    assert_same_weights(pretrained.load(tmp_path / "ours").parameters, base_model())
