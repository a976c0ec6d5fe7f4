"""A clip that is read alone is read as the evaluation reads it, with any of its modalities."""

import json
import shutil

import jax
import numpy as np
import pyarrow.parquet as parquet
import pytest
from safetensors.numpy import load_file, save_file

from configs import default
from mmei_jax import predict as predict_module
from mmei_jax.config import parse
from mmei_jax.evaluation import evaluate_workdir, open_best_run
from mmei_jax.extraction.clips import Clip
from mmei_jax.extraction.decoding import decode_clip
from mmei_jax.extraction.encoding import ClipEncoder, open_encoders
from mmei_jax.extraction.shard_extraction import make_settings
from mmei_jax.fingerprints import sha256_of
from mmei_jax.predict import predict
from mmei_jax.serving import __main__ as serving
from mmei_jax.serving.loading import load
from mmei_jax.training import train
from mmei_jax.types import InputError
from tests import made_media, tiny_encoders, tiny_extraction


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on the features of made clips, and the folder of the clips."""
    folder = tmp_path_factory.mktemp("predict")
    encoders = tiny_encoders.make(folder / "encoders")
    (folder / "clips").mkdir()
    clips = tiny_extraction.make_clips(folder / "clips")
    tiny_extraction.run(encoders, clips, folder / "data")
    values = default.get_config()
    values.data.path = str(folder / "data")
    values.data.max_tokens.update(vision=(16,), audio=(100,), text=(32,))
    values.data.update(batch_size=4, evaluation_batch_size=4)
    values.model.update(dim=16, num_heads=2, num_layers=1, feedforward_dim=16, embedding_dim=8)
    values.loss.update(intent="none", ranking="none")
    values.train.update(num_epochs=1, best_metric="validation/emotion/accuracy")
    train(parse(values.to_dict()), folder / "run")
    return folder


def test_clip_alone_is_read_as_the_evaluation_reads_it(run):
    evaluate_workdir(run / "run", "test")
    (expected,) = parquet.read_table(run / "run" / "eval" / "test_predictions.parquet").to_pylist()
    clip = Clip("any", "any", path="10.mp4", text=tiny_extraction.TEXTS[10 % 4])
    found = predict(run / "run", clip, base=run / "clips")
    assert list(found["emotion"]["probabilities"]) == list(tiny_extraction.LABELS[0][2])
    assert list(found["emotion"]["probabilities"].values()) == pytest.approx(
        expected["emotion_probabilities"], abs=1e-5
    )
    assert found["emotion"]["choice"] == tiny_extraction.LABELS[0][2][expected["emotion_choice"]]
    assert found["modality_weights"] == pytest.approx(
        {name: expected[f"alpha_{name}"] for name in ("vision", "audio", "text")}, abs=1e-5
    )
    assert found["intent"] is found["recommended"] is None


@pytest.mark.parametrize(
    ("given", "present"),
    [
        (["--text=a happy word"], {"text"}),
        (["--audio={clips}/3.mp4"], {"audio"}),
        (["--video={clips}/silent.mp4"], {"vision"}),
        (["--video={clips}/3.mp4", "--text=a"], {"vision", "audio", "text"}),
    ],
    ids=lambda value: "+".join(sorted(value)) if isinstance(value, set) else "",
)
def test_absent_modalities_weigh_nothing(run, capsys, given, present):
    made_media.write_video(run / "clips" / "silent.mp4")
    arguments = [argument.format(clips=run / "clips") for argument in given]
    assert predict_module.main([f"--workdir={run / 'run'}", "--format=json", *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    weights = found["modality_weights"]
    assert {name for name, weight in weights.items() if weight > 0} == present
    assert sum(weights.values()) == pytest.approx(1.0, abs=1e-6)
    assert sum(found["emotion"]["probabilities"].values()) == pytest.approx(1.0, abs=1e-6)


def test_table_names_the_choice_first(run, capsys):
    assert predict_module.main([f"--workdir={run / 'run'}", "--text=a sad word"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split(": ")[1] == lines[1].split()[0]
    assert [line.split()[-1] for line in lines if line.startswith(("  vision", "  audio"))] == ["absent", "absent"]


def test_what_cannot_be_read_is_told_in_one_line(run, capsys, tmp_path):
    def line(*arguments):
        assert predict_module.main([f"--workdir={run / 'run'}", *arguments]) == 2
        (found,) = capsys.readouterr().err.splitlines()
        return found

    assert "nothing to read: expected one of vision, audio, text" in line()
    assert "missing" in line("--video=/none.mp4")
    told = line("--text=a", "--user=speaker0")
    assert "user 'speaker0': the run has no user side (config.model.user_embedding = False" in told
    for seconds in ("-2", "nan", "inf"):
        assert "expected 0 <= start < end" in line(f"--video={run / 'clips' / '3.mp4'}", f"--start_seconds={seconds}")
    (tmp_path / "text.mp4").write_text("no video")
    assert "unreadable" in line(f"--video={tmp_path / 'text.mp4'}")
    told = line("--text=a", f"--extraction={tmp_path / 'extraction.json'}")
    assert "extraction.json: missing: how this run's features were made is not known" in told
    assert "expected a run on features that mmei_jax.extraction.extract made of clips (simulated and" in told
    (tmp_path / "extraction.json").write_text("{}")
    assert "not a configuration of an extraction" in line("--text=a", f"--extraction={tmp_path / 'extraction.json'}")


def test_other_weights_than_those_of_the_features_are_refused(run, tmp_path):
    values = json.loads((run / "data" / "extraction.json").read_text())
    other = tmp_path / "text"
    shutil.copytree(values["config"]["text"]["checkpoint"], other)
    parameters = load_file(other / "parameters.safetensors")
    parameters = {name: array + 1 for name, array in parameters.items()}
    save_file(parameters, other / "parameters.safetensors")
    certificate = json.loads((other / "certificate.json").read_text())
    certificate["parameters_sha256"] = sha256_of(other / "parameters.safetensors")
    (other / "certificate.json").write_text(json.dumps(certificate))
    values["config"]["text"]["checkpoint"] = str(other)
    (tmp_path / "extraction.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match="the run's features were made by sha256:"):
        predict(run / "run", Clip("a", "a", text="a"), extraction=tmp_path / "extraction.json")


def test_what_is_longer_than_the_run_takes_is_read_to_its_limit_and_told(run, capsys):
    # Fifty tokens a second: two seconds fit into the 100 that the run takes, 2.8 do not.
    assert predict_module.main([f"--workdir={run / 'run'}", f"--audio={run / 'clips' / '5.mp4'}"]) == 0
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines() if line.startswith("  audio")] == ["99"]
    made_media.write_video(run / "clips" / "long.mp4", num_frames=28, samples=made_media.tone(2.8, 16_000))
    found = predict(run / "run", Clip("any", "any", audio_path="long.mp4"), base=run / "clips")
    assert found["num_tokens"] == {"audio": 100}
    assert found["num_tokens_cut"]["audio"] == 39
    assert predict_module.main([f"--workdir={run / 'run'}", f"--audio={run / 'clips' / 'long.mp4'}"]) == 0
    assert "100 of 139" in capsys.readouterr().out


def test_exported_programs_read_a_clip_as_it_is_read_here(run, tmp_path):
    given = [f"--workdir={run / 'run'}", f"--output={tmp_path / 'export'}", "--platforms=cpu"]
    assert serving.main(["export", "--parts=fusion,encoders", *given]) == 0
    programs = load(tmp_path / "export").programs
    clip = Clip("any", "any", path="10.mp4", text="a happy word .")
    modalities = ("vision", "audio", "text")
    dataset = open_best_run(run / "run").dataset
    encoder, config = open_encoders(dataset.path / "extraction.json", modalities, dataset.spec, ClipEncoder)
    decoded = decode_clip(clip, make_settings(config, encoder, run / "clips", None))
    ids = np.array([encoder.text.tokenizer.encode(clip.text).token_ids], np.int32)
    samples = encoder.audio.preprocessing.normalise(decoded.samples)[None]
    vision = programs["vision_encoder"](pixels=decoded.frames.pixels[decoded.frames.has_face])["features"][None]
    audio = programs["audio_encoder"](samples=samples, lengths=np.array([samples.shape[1]], np.int32))
    text = programs["text_encoder"](token_ids=ids, lengths=np.array([ids.shape[1]], np.int32))["features"]
    read = programs["fusion"](
        vision_features=vision,
        vision_lengths=np.array([vision.shape[1]], np.int32),
        audio_features=audio["features"],
        audio_lengths=audio["lengths"],
        text_features=text,
        text_lengths=np.array([text.shape[1]], np.int32),
    )
    expected = predict(run / "run", clip, base=run / "clips")
    assert audio["lengths"].tolist() == [expected["num_tokens"]["audio"]]
    probabilities = jax.nn.softmax(read["emotion"][0])
    np.testing.assert_allclose(probabilities, list(expected["emotion"]["probabilities"].values()), atol=1e-5)
    np.testing.assert_allclose(read["modality_weights"][0], list(expected["modality_weights"].values()), atol=1e-5)
