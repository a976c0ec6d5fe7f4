"""From nothing to Table 1 of rendered clips: every command that configs/table1_raw.py lists, at tiny size."""

import json

import pytest

from tests import processes, random_weights_test


def run(*arguments):
    code, output = processes.run(*map(str, arguments))
    assert code == 0, output
    return output


@pytest.mark.slow
def test_rendered_clips_end_in_a_table_that_names_encoders_and_their_random_weights(tmp_path):
    clips = tmp_path / "rendered" / "clips.csv"
    small = ("--num_records=24", "--size=64", "--frames_per_second=5", "--seed=1")
    run("-m", "mmei_jax.simulation.render", f"--output={clips.parent}", *small)
    folders = {}
    for seed, kind in enumerate(random_weights_test.TINY_CONFIGS):
        source = random_weights_test.write_config(tmp_path / "configs" / kind, kind)
        folders[kind] = tmp_path / "encoders" / kind
        texts = [f"--texts={clips}"] if kind == "bert" else []
        run("-m", "mmei_jax.encoders.random_weights", source, folders[kind], f"--seed={seed}", *texts)
    for name, vision, audio, flags in (
        ("first", "vit", "wav2vec2", []),
        ("second", "resnet", "audio_cnn", ["--config.vision.token=pooled", "--config.audio.frames_per_token=1"]),
    ):
        run(
            *("-m", "mmei_jax.extraction.extract", "--config=configs/extraction_rendered.py", f"--input={clips}"),
            *(f"--output={tmp_path / name}", f"--config.vision.checkpoint={folders[vision]}"),
            *(f"--catalogue={clips.parent / 'catalogue.jsonl'}", f"--slates={clips.parent / 'slates.csv'}"),
            f"--relevant_items={clips.parent / 'relevant_items.csv'}",
            *(f"--config.audio.checkpoint={folders[audio]}", f"--config.text.checkpoint={folders['bert']}", *flags),
        )
    workdir = tmp_path / "run"
    others = [f"--config.table.rows.{row}.data.path={tmp_path / 'second'}" for row in ("vision_only", "audio_only")]
    run(
        *("train.py", "--config=tests/tiny_table_raw_config.py", f"--workdir={workdir}"),
        *(f"--config.data.path={tmp_path / 'first'}", *others),
    )
    run("eval.py", f"--workdir={workdir}")

    text = (workdir / "eval" / "test_report" / "report.md").read_text()
    for title in ("Text-BERT", "Visual-ResNet50", "Audio-CNN", "Late Fusion", "Multi-Modal Transformer", "MMEI"):
        assert f"\n| {title} |" in text, title
    assert "the place of" not in text
    assert "Visual-ResNet50: vision by ResNet (random weights, seed 3)" in text
    assert "Audio-CNN: audio by Audio-CNN (random weights, seed 4)" in text
    together = (
        "vision by ViT (random weights, seed 0), audio by Wav2Vec2 (random weights, seed 1), text by BERT (random w"
    )
    assert together in text
    assert "(simulated)" in text
    assert "MAP" in text.split("## Table 1")[1].split("\n## ")[0]
    assert "random weights" in (workdir / "eval" / "test_report" / "table.tex").read_text()
    models = json.loads((workdir / "eval" / "test_robustness.json").read_text())["models"]
    assert not {"text_only", "vision_only", "audio_only"} & {model["name"] for model in models}
