"""The benchmark of extraction compares what it claims to compare."""

import dataclasses

import numpy as np
import pytest

from benchmarks import extraction, extraction_pyav, extraction_torch, rounds
from benchmarks.extraction_cases import Case, Sizes, render_clips, save_checkpoints

TINY = Sizes(dim=32, num_layers=1, num_heads=2, image_size=32, patch_size=16, conv_dim=8)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """Few rendered clips and tiny encoders; the first eleven lack a modality here and there."""
    folder = tmp_path_factory.mktemp("extraction")
    render_clips(folder / "clips", 11, 1)
    save_checkpoints(folder / "encoders", folder / "clips", TINY)
    return Case(folder / "clips", folder / "encoders", 11, batch_size=4, is_quick=True)


@pytest.fixture(scope="module")
def our_features(case):
    """Of all clips, at coarser buckets than the default: each is a program to compile."""
    audio = {"bucket_seconds": (3.0, 60.0), "seconds_per_batch": 60.0}
    return extraction._extract(case, reads=True, audio=audio)[1]


def test_sides_agree_on_every_feature_of_every_clip(case, our_features, tmp_path):
    rows = case.rows()
    with_media = {row["id"] for row in rows if row["path"].endswith("mp4")}
    assert set(our_features["vision"]) == with_media
    assert len(our_features["text"]) == sum(bool(row["text"]) for row in rows)
    for num_ahead in (0, 2):
        theirs = extraction_torch.extract(case, num_ahead, tmp_path, keeps=True)
        assert extraction.agree_on_features(our_features, theirs) == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.npz", "4.npz", "8.npz"]


def test_a_peer_without_masks_is_refused(case, our_features, tmp_path, monkeypatch):
    encode = extraction_torch.Encoders.encode

    def without_mask(self, rows, media):
        model = self.wav2vec2
        self.wav2vec2 = _Unmasked(model)
        try:
            return encode(self, rows, media)
        finally:
            self.wav2vec2 = model

    monkeypatch.setattr(extraction_torch.Encoders, "encode", without_mask)
    theirs = extraction_torch.extract(case, 0, tmp_path, keeps=True)
    assert extraction.agree_on_features(our_features, theirs).startswith("audio of aigc-int-sim-1-")


class _Unmasked:
    def __init__(self, model):
        self._model = model

    def __call__(self, input_values, attention_mask):
        return self._model(input_values)

    def __getattr__(self, name):
        return getattr(self._model, name)


def test_features_of_other_clips_shapes_and_values_are_differences(our_features):
    key = next(iter(our_features["text"]))
    states = our_features["text"][key]
    changes = {
        "or of others": None,
        "shape": states[:-1],
        "largest absolute difference": states + 2e-4,
        "difference nan": np.full_like(states, np.nan),
    }
    for words, changed in changes.items():
        text = {name: own for name, own in our_features["text"].items() if name != key}
        if changed is not None:
            text[key] = changed
        assert words in extraction.agree_on_features(our_features, {**our_features, "text": text})


def test_decoding_sides_give_the_same_bits_and_another_frame_is_refused(case, monkeypatch):
    # Frames as they are in the files: ours resizes them to what the encoder takes.
    encoders = case.encoders.parent / "encoders_128"
    save_checkpoints(encoders, case.clips, dataclasses.replace(TINY, image_size=128))
    ours = extraction.our_decoding(dataclasses.replace(case, encoders=encoders))
    theirs = extraction_pyav.bare_loop(case)
    assert len(ours.evidence) == sum(bool(row["path"]) for row in case.rows())
    assert extraction.agree_on_media(ours.evidence, theirs.evidence) == ""
    assert ours.measure() > 0.0
    assert theirs.measure() > 0.0
    monkeypatch.setattr(extraction_pyav, "FRAMES_PER_SECOND", 4.0)
    found = extraction.agree_on_media(ours.evidence, extraction_pyav.bare_loop(case).evidence)
    assert found.startswith("frames of clip ")


def test_timed_cases_compare_before_they_measure(case, monkeypatch):
    """What ``measure_sides`` does with a difference is tests/rounds_test.py's."""
    asked = []

    def refuse(sides, case, *, agree, **options):
        asked.append((list(sides), agree))
        raise rounds.SidesDiffer

    monkeypatch.setattr(rounds, "measure_sides", refuse)
    for name in (extraction.END_TO_END, extraction.DECODING):
        with pytest.raises(rounds.SidesDiffer):
            extraction._timed_cases(dataclasses.replace(case, is_quick=False), name, 1)
    assert asked == [
        ([rounds.OURS, extraction.LOOP, extraction.LOOP_AHEAD], extraction.agree_on_features),
        ([rounds.OURS, extraction.BARE], extraction.agree_on_media),
    ]


@pytest.mark.slow
def test_memory_and_the_case_of_a_gpu_run_through(case):
    extraction._keep_programs(case)
    assert rounds.in_new_process(extraction.measure_peak_memory, case) > 1e8
    entry = rounds.in_new_process(extraction.on_gpu, dataclasses.replace(case, compute_dtype="bfloat16"))
    assert entry["bounded_by"] in ("decoding", "encoding")
    # A CPU is no device of its own.
    assert entry["device_busy_share"] is None
    assert entry["clips_per_second"] > 0.0
