"""From nothing to a run that ranks from raw media: every command that configs/end_to_end.py lists, at tiny size."""

import json

import pytest

from tests import processes, random_weights_test

# Of the configuration, what makes a processor wait.
TINY = {
    "data.max_tokens.vision": (4,),
    "data.max_tokens.audio": (16_000,),
    "data.batch_size": 8,
    "model.dim": 16,
    "model.num_heads": 2,
    "model.num_layers": 1,
    "model.feedforward_dim": 16,
    "model.embedding_dim": 8,
    "model.content_max_tokens": 8,
    "model.compute_dtype": "float32",
    "train.num_epochs": 1,
}


def run(*arguments):
    code, output = processes.run(*map(str, arguments))
    assert code == 0, output
    return output


# Nine commands, each with its own imports and programs.
@pytest.mark.timeout(1800)
@pytest.mark.slow
def test_rendered_clips_end_in_a_run_that_ranks_and_is_exported(tmp_path):
    rendered, encoders, workdir = (tmp_path / name for name in ("rendered", "encoders", "run"))
    small = ("--num_records=24", "--size=64", "--frames_per_second=5", "--seed=1")
    run("-m", "mmei_jax.simulation.render", f"--output={rendered}", *small)
    for seed, kind in enumerate(("vit", "wav2vec2", "bert")):
        source = random_weights_test.write_config(tmp_path / "configs" / kind, kind)
        texts = [f"--texts={rendered / 'clips.csv'}"] if kind == "bert" else []
        run("-m", "mmei_jax.encoders.random_weights", source, encoders / kind, f"--seed={seed}", *texts)
    names = {"vision": "vit", "audio": "wav2vec2", "text": "bert"}
    told = run(
        *("-m", "mmei_jax.extraction.extract", "--config=configs/extraction_rendered.py", "--depth=raw"),
        *(f"--input={rendered / 'clips.csv'}", f"--output={tmp_path / 'data'}"),
        *(f"--config.{modality}.checkpoint={encoders / kind}" for modality, kind in names.items()),
        *("--config.vision.max_frames=4", "--config.text.max_tokens=64"),
        *(f"--catalogue={rendered / 'catalogue.jsonl'}", f"--slates={rendered / 'slates.csv'}"),
        f"--relevant_items={rendered / 'relevant_items.csv'}",
    )
    assert "slates.csv: slates of 24 of 24 clips" in told
    assert "clips_without_slate: 0" in told
    changes = {
        "data.path": tmp_path / "data",
        "model.content_encoder": encoders / "bert",
        **{f"model.encoders.{modality}": encoders / kind for modality, kind in names.items()},
        **TINY,
    }
    flags = [f"--config.{key}={value}" for key, value in changes.items()]
    run("train.py", "--config=configs/end_to_end.py", f"--workdir={workdir}", *flags)
    run("eval.py", f"--workdir={workdir}")
    metrics = json.loads((workdir / "eval" / "test.json").read_text())["metrics"]
    assert 0.0 < metrics["ranking/map"] <= 1.0
    assert metrics["loss/ranking"] > 0.0
    assert "content_tower/encoder/" in (workdir / "parameters.txt").read_text()
    export = tmp_path / "export"
    given = (f"--workdir={workdir}", f"--output={export}", "--platforms=cpu", "--parts=end_to_end")
    run("-m", "mmei_jax.serving", "export", *given)
    told = run("-m", "mmei_jax.serving", "check", f"--export={export}", f"--workdir={workdir}")
    assert "end_to_end: at most" in told
