"""An exported program gives what the run gives, anywhere, for any sizes; what does not fit is refused."""

import dataclasses
import json
import re
import shlex
import shutil

import jax
import numpy as np
import pytest
from jax import export

from mmei_jax.encoders.audio_cnn import AudioCnn, AudioCnnConfig
from mmei_jax.encoders.resnet import ResNet, ResNetConfig
from mmei_jax.evaluation import BestRun, Evaluator, open_best_run
from mmei_jax.extraction.encoding import ClipEncoder
from mmei_jax.fingerprints import sha256_of
from mmei_jax.item_words import open_dataset
from mmei_jax.recommendation import __main__ as recommendation
from mmei_jax.recommendation.index_files import open_index
from mmei_jax.recommendation.search import IndexSearch
from mmei_jax.serving import __main__ as command
from mmei_jax.serving.checking import synthetic_inputs
from mmei_jax.serving.encoder_functions import encoder_functions
from mmei_jax.serving.exporting import lower, model_hash, write_export
from mmei_jax.serving.functions import fusion_function, top_k_function
from mmei_jax.serving.loading import load
from mmei_jax.serving.manifest import PLATFORMS
from mmei_jax.sharding import make_evaluation_mesh
from mmei_jax.state import build_model, initialize
from mmei_jax.training import train
from mmei_jax.types import InputError
from tests import markdown, processes, random_encoders, tiny, tiny_extraction

PAGE = "docs/serving.md"
TOLERANCE = 1e-6
# Of the waveforms of an Audio-CNN.
CONSTRAINTS = ("samples >= 400",)


def untrained(config):
    """A run of random parameters."""
    dataset = open_dataset(config)
    model = build_model(config, dataset)
    variables = jax.jit(lambda: initialize(model, 0))()
    return BestRun(config, dataset, model, variables, make_evaluation_mesh(), 0)


def inputs_of(run, records):
    """What the programs take of records of the test split, in rows as long as the longest needs."""
    split = run.dataset.split(*run.config.data.test_splits)
    found = {}
    for name, given in run.model.tasks.inputs().items():
        lengths = np.minimum(split.lengths(name)[records], given.max_tokens)
        tokens, _ = split.gather_tokens(name, records, int(lengths.max()))
        found |= {f"{name}_features": tokens, f"{name}_lengths": lengths.astype(np.int32)}
    return found


def predictions_of(run, records):
    evaluator = Evaluator(run.model, run.config, run.dataset, run.mesh)
    parts = list(evaluator.predict(run.variables, run.config.data.test_splits))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[records], *parts)


def check_reading(found, expected):
    """Outputs of a program against predictions of the evaluation."""
    for task in ("emotion", "intent"):
        probabilities = jax.nn.softmax(found[task])
        np.testing.assert_allclose(probabilities, getattr(expected, task), atol=TOLERANCE)
    for name in ("modality_weights", "user_embedding"):
        np.testing.assert_allclose(found[name], getattr(expected, name), atol=TOLERANCE)


@pytest.fixture(scope="module")
def workdir(data, tmp_path_factory):
    """A trained run whose model compiles quickly."""
    folder = tmp_path_factory.mktemp("serving") / "run"
    train(tiny.config(data, **tiny.LEAST, train__num_epochs=1), folder)
    return folder


@pytest.fixture(scope="module")
def exported(workdir):
    """What the command makes of it."""
    folder = workdir.parent / "export"
    assert command.main(["export", f"--workdir={workdir}", f"--output={folder}", "--parts=fusion,top_k", "--k=5"]) == 0
    return folder


@pytest.mark.parametrize("records", [np.arange(3), np.arange(4, 24)], ids=["3", "20"])
def test_programs_read_and_rank_as_the_evaluation_does(workdir, exported, records):
    run, loaded = open_best_run(workdir), load(exported)
    expected = predictions_of(run, records)
    check_reading(loaded.programs["fusion"](**inputs_of(run, records)), expected)
    excluded = np.full((len(records), 2), -1, np.int32)
    found = loaded.programs["top_k"](**inputs_of(run, records), excluded=excluded)
    check_reading(found, expected)
    np.testing.assert_array_equal(found["row"], expected.top_items[:, :5])
    np.testing.assert_allclose(found["score"], expected.top_scores[:, :5], atol=TOLERANCE)
    assert [loaded.item_ids[row] for row in found["row"][0]] == [
        run.dataset.catalogue().ids[row] for row in expected.top_items[0, :5]
    ]
    # The best two are not to be answered.
    without = loaded.programs["top_k"](**inputs_of(run, records), excluded=np.asarray(found["row"][:, :2]))
    np.testing.assert_array_equal(without["row"][:, :3], found["row"][:, 2:])


def test_fusion_model_with_users_is_exported_for_every_platform(data):
    # Two modalities have all that three have.
    run = untrained(tiny.config(data, data__modalities=("vision", "text"), model__user_embedding=True))
    function = fusion_function(run)
    program = export.deserialize(lower(function, PLATFORMS).serialize())
    assert program.platforms == ("cpu", "cuda", "tpu")
    parameters = {"fusion": dict(function.groups["fusion"].arrays)}
    jitted = jax.jit(function.function)
    for records in (np.arange(2), np.arange(2, 9)):
        unknown = np.full(len(records), -1, np.int32)
        inputs = {**inputs_of(run, records), "user_index": unknown}
        found = program.call(parameters, inputs)
        for name, value in jitted(parameters, inputs).items():
            np.testing.assert_allclose(found[name], value, atol=TOLERANCE)
        known = program.call(parameters, {**inputs, "user_index": unknown + 2})
        assert not np.allclose(known["user_embedding"], found["user_embedding"])
    expected = predictions_of(run, records)
    np.testing.assert_allclose(found["modality_weights"], expected.modality_weights, atol=TOLERANCE)
    np.testing.assert_allclose(jax.nn.softmax(found["emotion"]), expected.emotion, atol=TOLERANCE)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Of random numbers."""
    return random_encoders.make(tmp_path_factory.mktemp("encoders") / "made")


@pytest.mark.parametrize("name", ["vision", "audio", "text"])
def test_encoder_is_exported_for_every_platform_and_any_lengths(encoders, name):
    config = tiny_extraction.config(encoders, modalities=(name,), audio__frames_per_token=3)
    clips = ClipEncoder(config)
    ((key, function),) = encoder_functions(clips, config).items()
    program = export.deserialize(lower(function, PLATFORMS).serialize())
    assert program.platforms == ("cpu", "cuda", "tpu")
    encoder = clips.encoders[name]
    generator = np.random.default_rng(0)
    for rows, width in ((1, 400), (3, 1234)):
        lengths = np.array([width, width // 2, 0][:rows], np.int32)
        if name == "vision":
            inputs = {"pixels": generator.integers(0, 256, (rows, 32, 32, 3)).astype(np.uint8)}
            given = (inputs["pixels"],)
        elif name == "audio":
            inputs = {"samples": generator.normal(size=(rows, width)).astype(np.float32), "lengths": lengths}
            given = (inputs["samples"], lengths)
        else:
            lengths = lengths // 80
            ids = generator.integers(0, len(random_encoders.WORDS), (rows, width // 80)).astype(np.int32)
            inputs = {"token_ids": ids, "lengths": lengths}
            given = (ids, (np.arange(ids.shape[1]) < lengths[:, None]).astype(np.int32))
        found = program.call({key: dict(function.groups[key].arrays)}, inputs)
        expected = encoder.encode(encoder.parameters, *given)
        if name == "audio":
            expected, is_valid = expected
            np.testing.assert_array_equal(found["lengths"], is_valid.sum(axis=1))
        assert found["features"].dtype == config.dtype
        np.testing.assert_array_equal(found["features"], np.asarray(expected).astype(config.dtype))


@pytest.mark.parametrize(
    ("module", "shape", "examples"),
    [
        (AudioCnn(AudioCnnConfig(dim=4, channels=(2, 2), num_mels=8)), "rows, samples", [(1, 400), (2, 1999)]),
        (
            ResNet(ResNetConfig(3, 2, (4, 8), (1, 1), True, "relu", False, False)),
            "frames, 16, 16, 3",
            [(1, 16, 16, 3), (3, 16, 16, 3)],
        ),
    ],
    ids=["audio_cnn", "resnet"],
)
def test_encoder_of_baselines_is_lowered_with_symbolic_sizes(module, shape, examples):
    generator = np.random.default_rng(0)
    variables = jax.jit(module.init)(jax.random.key(0), np.zeros(examples[0], np.float32))
    given = jax.ShapeDtypeStruct(
        export.symbolic_shape(shape, constraints=CONSTRAINTS[: shape.count("samples")]), "float32"
    )
    program = export.export(jax.jit(module.apply), platforms=PLATFORMS)(variables, given)
    for example in examples:
        inputs = generator.normal(size=example).astype(np.float32)
        found, expected = program.call(variables, inputs), jax.jit(module.apply)(variables, inputs)
        np.testing.assert_allclose(found.pooled, expected.pooled, atol=TOLERANCE)


# As one who has JAX and this package's loader, and nothing else of it.
_SERVER = """
import sys
from pathlib import Path
class Forbidding:
    def find_spec(self, name, path=None, target=None):
        if name.startswith(("mmei_jax.models", "mmei_jax.encoders", "mmei_jax.state", "grain", "orbax", "pyarrow")):
            raise ImportError(f"{name} is imported")
sys.meta_path.insert(0, Forbidding())
import numpy as np
from mmei_jax.serving.loading import load
folder, inputs, outputs = map(Path, sys.argv[1:])
given = np.load(inputs)
np.savez(outputs, **load(folder).programs["top_k"](**given))
"""


def test_another_process_without_the_code_of_models_gives_the_same(exported, tmp_path):
    program = load(exported).programs["top_k"]
    inputs = synthetic_inputs(program.description, 1)
    np.savez(tmp_path / "in.npz", **inputs)
    code, printed = processes.run("-c", _SERVER, str(exported), str(tmp_path / "in.npz"), str(tmp_path / "out.npz"))
    assert code == 0, printed
    found, expected = np.load(tmp_path / "out.npz"), program(**inputs)
    assert set(found.files) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=TOLERANCE)


def test_command_check_compares_with_the_run(workdir, exported, capsys, tmp_path):
    assert command.main(["check", f"--export={exported}", f"--workdir={workdir}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines[-2:]] == ["fusion", "top_k"]
    assert "  -> row                int32    [batch, 5]" in lines
    arrays = synthetic_inputs(load(exported).programs["fusion"].description, 5)
    np.savez(tmp_path / "own.npz", **{f"fusion/{name}": value[:0] for name, value in arrays.items()})
    given = ["check", f"--export={exported}", f"--workdir={workdir}", f"--inputs={tmp_path / 'own.npz'}"]
    assert command.main(given) == 2
    assert "error: fusion: batch = 0: expected at least 1" in capsys.readouterr().err


def test_smaller_index_is_searched_as_the_search_does(workdir, data, tmp_path, capsys):
    index, folder = tmp_path / "index", tmp_path / "export"
    recommendation.main(["build", f"--workdir={workdir}", f"--output={index}", "--dtype=int8"])
    run = open_best_run(workdir)
    gone = run.dataset.catalogue().ids[7]
    recommendation.main(["update", f"--index={index}", f"--remove={gone}"])
    function = top_k_function(run, k=10**6, index=index, platforms=("cpu",))
    write_export(folder, run, {"top_k": function}, ("cpu",))
    loaded, records = load(folder), np.arange(4)
    assert gone not in loaded.item_ids
    assert None in loaded.item_ids
    inputs = inputs_of(run, records)
    found = loaded.programs["top_k"](**inputs, excluded=np.full((4, 1), -1, np.int32))
    searched = IndexSearch(open_index(index), run.mesh).top(np.asarray(found["user_embedding"]), 10)
    np.testing.assert_array_equal(found["row"][:, :10], searched.row)
    np.testing.assert_allclose(found["score"][:, :10], searched.score, atol=TOLERANCE)
    assert command.main(["check", f"--export={folder}", f"--workdir={workdir}"]) == 2
    assert "parameters items of program top_k" in capsys.readouterr().err
    assert command.main(["check", f"--export={folder}", f"--workdir={workdir}", f"--index={index}"]) == 0


def change_manifest(folder, change):
    path = folder / "manifest.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def set_key(**values):
    return lambda folder: change_manifest(folder, lambda manifest: manifest.update(values))


def flip_byte(name, *, tells=False):
    """Changes the last byte of a file; with ``tells`` the manifest has its new hash."""

    def change(folder):
        content = bytearray((folder / name).read_bytes())
        content[-1] ^= 1
        (folder / name).write_bytes(content)

        def tell(manifest):
            for entry in manifest["files"]:
                if entry["file"] == name:
                    entry["sha256"] = sha256_of(folder / name)

        if tells:
            change_manifest(folder, tell)

    return change


def rename_input(folder):
    def change(manifest):
        manifest["programs"][0]["inputs"][0]["name"] = "sight_features"

    change_manifest(folder, change)


def other_settings(folder):
    def change(manifest):
        manifest["groups"][0]["settings"]["config"]["model"]["dim"] += 1

    change_manifest(folder, change)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (flip_byte("fusion.safetensors"), "fusion.safetensors: SHA-256 .* the file was changed"),
        (
            flip_byte("fusion.safetensors", tells=True),
            "fusion.safetensors: with the settings of manifest.json these are",
        ),
        (flip_byte("fusion.bin"), "fusion.bin: SHA-256 .* the file was changed"),
        (other_settings, "fusion.safetensors: with the settings of manifest.json these are"),
        (lambda folder: (folder / "items.safetensors").unlink(), "items.safetensors: missing; the manifest lists it"),
        (lambda folder: (folder / "manifest.json").unlink(), "no exported programs; expected a folder that"),
        (lambda folder: (folder / "item_ids.json").write_text("[]"), "item_ids.json: 2 bytes, the manifest says"),
        (set_key(jax="0.0.1"), f"exported by jax 0.0.1, {jax.__version__} is installed: expected the same"),
        (set_key(jaxlib="0.0.1"), "exported by jaxlib 0.0.1"),
        (set_key(platforms=["tpu"]), "exported for tpu: this process runs on cpu"),
        (set_key(model_sha256="0" * 64), "model 0000000000000000..., its parameters are of"),
        (set_key(format="other"), "format 'other': expected 'mmei_jax.export'"),
        (set_key(version=2), "version 2: this program reads version 1"),
        (rename_input, "fusion.bin: takes or gives something else than manifest.json"),
    ],
)
def test_what_was_changed_is_refused(exported, tmp_path, change, told):
    folder = tmp_path / "export"
    shutil.copytree(exported, folder)
    change(folder)
    with pytest.raises(InputError, match=told):
        load(folder)


def test_another_model_or_data_set_than_expected_is_refused(workdir, exported, data):
    manifest = load(exported).manifest
    assert load(exported, model_sha256=manifest.model_sha256, data_sha256=manifest.data_sha256)
    with pytest.raises(InputError, match=f"model {manifest.model_sha256[:16]}.*: expected 1111111111111111"):
        load(exported, model_sha256="1" * 64)
    with pytest.raises(InputError, match=r"data set .*: expected 2222222222222222"):
        load(exported, data_sha256="2" * 64)
    run = open_best_run(workdir)
    assert model_hash(run) == manifest.model_sha256
    # Parameters, and what else changes what they give; where the data lie does not.
    others = (
        dataclasses.replace(run, variables=jax.tree.map(lambda leaf: leaf + 1, run.variables)),
        dataclasses.replace(run, config=tiny.config(data, **tiny.LEAST, train__num_epochs=1, loss__temperature=0.5)),
    )
    assert all(model_hash(other) != manifest.model_sha256 for other in others)
    moved = dataclasses.replace(run.config.data, path="elsewhere")
    assert model_hash(dataclasses.replace(run, config=dataclasses.replace(run.config, data=moved))) == model_hash(run)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"text_lengths": None}, "input 'text_lengths' is missing; expected vision_features"),
        ({"words": np.zeros(2)}, "input 'words' is unknown"),
        ({"text_lengths": [1, 2]}, "text_lengths is list: expected an array of int32"),
        ({"text_lengths": np.zeros(2, np.int64)}, "text_lengths is int64: expected an array of int32"),
        ({"text_lengths": np.zeros(2, np.int32)}, r"shape \(2,\): expected \(batch\) where batch = 3"),
        ({"text_features": np.zeros((3, 17, 16), np.float32)}, "text_tokens = 17: expected 1 to 16"),
        ({"text_features": np.zeros((3, 3, 15), np.float32)}, r"expected \(batch, text_tokens, 16\)"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(exported, change, told):
    program = load(exported).programs["fusion"]
    inputs = synthetic_inputs(program.description, 0) | change
    with pytest.raises(InputError, match=f"fusion: .*{told}"):
        program.check({name: value for name, value in inputs.items() if value is not None})


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--parts=fusion,heads"], "--parts=fusion,heads: 'heads': expected some of fusion,encoders,end_to_end,top_k"),
        (["--platforms=gpu"], "--platforms=gpu: 'gpu': expected some of cpu,cuda,tpu"),
        (["--parts=encoders"], "extraction.json: missing: how this run's features were made is not known"),
        (["--k=0"], "--k=0: expected at least 1"),
        (["--output={exported}"], "is there already; expected a new or an empty folder"),
        (["--parts=top_k", "--index={exported}"], "format 'mmei_jax.export': expected 'mmei_jax.catalogue_index'"),
    ],
)
def test_what_cannot_be_exported_is_told_in_one_line(workdir, exported, tmp_path, capsys, flags, told):
    given = [flag.format(exported=exported) for flag in flags]
    assert command.main(["export", f"--workdir={workdir}", f"--output={tmp_path / 'new'}", *given]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line
    assert not list(tmp_path.iterdir())


def test_page_runs_as_it_is_shown(workdir, tmp_path, monkeypatch, capsys):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "quickstart").symlink_to(workdir)
    monkeypatch.chdir(tmp_path)
    names = {}
    for language, content in markdown.blocks(markdown.read(PAGE)):
        if language == "python":
            exec(compile(content, PAGE, "exec"), names)
        for line in content.splitlines() if language == "bash" else []:
            assert line.startswith("python -m mmei_jax.serving ")
            assert command.main(shlex.split(line)[3:]) == 0, line
    assert "encoders: left out:" in capsys.readouterr().err
    assert names["program"].platforms == PLATFORMS
    np.testing.assert_array_equal(names["read"]["modality_weights"][1, :2], 0.0)
    assert set(names["export"].programs) == {"fusion", "top_k"}


def test_page_explains_every_flag_of_export(capsys):
    with pytest.raises(SystemExit):
        command.main(["export", "--help"])
    flags = set(re.findall(r"^  --(\w+)", capsys.readouterr().out, flags=re.MULTILINE)) - {"workdir", "output"}
    rows = markdown.tables(markdown.read(PAGE))["flag"][1:]
    assert {re.match(r"`--(\w+)", cells[0]).group(1) for cells in rows} == flags
