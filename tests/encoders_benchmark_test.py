"""The benchmark of the encoders compares what it claims to compare."""

import dataclasses

import jax
import numpy as np
import pytest
import torch

from benchmarks import encoders, encoders_torch, rounds
from benchmarks.encoder_cases import CASES, COMPILED, EAGER, QUICK_CASES, Case, save_checkpoint
from benchmarks.matmul import matmul_operations

# Rows of one length through BERT are not among the quick cases, which shall end within a minute.
SMALL_CASES = (Case("cpu, BERT of 1 layer, 8 x 64", "bert", ((EAGER, 1.0),), 8, 64, (8,), num_layers=1), *QUICK_CASES)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The small cases, on fewer and shorter rows still."""
    smaller = {"bert": (4, 16), "vit": (2, 224), "wav2vec2": (2, 2_000)}
    cases = []
    for index, case in enumerate(SMALL_CASES):
        num_rows, length = (24, 64) if case.is_ragged else smaller[case.family]
        rows_per_call = (8, 24) if case.is_ragged else (num_rows, num_rows // 2)
        folder = tmp_path_factory.mktemp(str(index)) / case.family
        case = dataclasses.replace(case, num_rows=num_rows, length=length, rows_per_call=rows_per_call, folder=folder)
        save_checkpoint(case)
        cases.append(case)
    return cases


@pytest.mark.parametrize("index", range(len(SMALL_CASES)), ids=[case.name for case in SMALL_CASES])
def test_sides_agree_on_what_they_compute(tiny, index):
    case = tiny[index]
    ours = encoders.our_side(case)
    assert ours.evidence.shape[0] == case.num_rows
    assert ours.measure() > 0.0
    peers = [encoders_torch.padded, encoders_torch.sorted_by_length] if case.is_ragged else [encoders_torch.eager]
    for peer in peers:
        theirs = peer(case)
        assert rounds.differ_by(ours.evidence, theirs.evidence, relative=case.tolerance) == ""
        assert theirs.measure() > 0.0
        assert len(theirs.settings["pre_run_seconds"]) == 2


def test_each_setting_of_the_compiled_peer_is_compiled_anew(tiny, monkeypatch):
    calls = []

    def compile_nothing(model, **options):
        calls.append(options)
        return model

    monkeypatch.setattr(torch.compiler, "reset", lambda: calls.append("reset"))
    monkeypatch.setattr(torch, "compile", compile_nothing)
    theirs = encoders_torch.compiled(tiny[0])
    plain = {"mode": "default", "fullgraph": True, "dynamic": False}
    frozen = {"options": {"freezing": True}, "fullgraph": True, "dynamic": False}
    assert calls[:8] == ["reset", plain, "reset", plain, "reset", frozen, "reset", frozen]
    assert len(theirs.settings["pre_run_seconds"]) == 4


def test_other_weights_are_a_difference(tiny, monkeypatch):
    load = encoders_torch._load

    def with_another_bias(case):
        model = load(case)
        with torch.no_grad():
            model.encoder.layer[0].output.dense.bias[3] += 0.01
        return model

    ours = encoders.our_side(tiny[0]).evidence
    monkeypatch.setattr(encoders_torch, "_load", with_another_bias)
    theirs = encoders_torch.eager(tiny[0]).evidence
    assert "largest absolute difference" in rounds.differ_by(ours, theirs, relative=tiny[0].tolerance)


def test_operations_of_convolutions_are_those_of_the_products_that_they_equal():
    x, kernel = np.ones((2, 11, 6), np.float32), np.ones((3, 2, 12), np.float32)

    def convolve(x):
        return jax.lax.conv_general_dilated(
            x, kernel, (2,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=3
        )

    assert matmul_operations(convolve, x) == 2 * (2 * 5 * 12) * (3 * 2)


def test_every_goal_of_a_gpu_has_its_case():
    cases = [case for case in CASES if case.platform == "gpu"]
    assert {(case.family, case.goal_share) for case in cases} >= {("vit", 0.5), ("wav2vec2", 0.3), ("bert", 0.45)}
    assert all(case.compute_dtype == "bfloat16" for case in cases)
    assert all(dict(case.goals) == {EAGER: 1.2, COMPILED: 1.2} for case in cases if not case.is_ragged)


def test_conversion_and_warm_compilation_are_held_to_what_is_allowed(tmp_path, monkeypatch):
    # The tests' own processes keep no programs.
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "true")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    case = dataclasses.replace(SMALL_CASES[0], folder=tmp_path / "bert")
    save_checkpoint(case)
    seconds, memory = rounds.in_new_process(encoders.convert_and_measure, case)
    assert seconds > 0.0
    assert memory > 0.5
    assert encoders._allowed("x", 10.0, 4.0)["ratio"] == 2.5
    kept = []
    for _ in range(2):
        assert rounds.in_new_process(encoders.compile_and_measure, case, str(tmp_path / "cache")) > 0.0
        kept.append(set((tmp_path / "cache").rglob("*-cache")))
    # The second process compiles nothing that the first had not left behind.
    assert kept[0] == kept[1] != set()
