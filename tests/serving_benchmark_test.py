"""The benchmark of exported programs: its torch peer answers as we do, and one that does not is refused."""

import numpy as np
import pytest

from benchmarks import rounds, serving
from benchmarks.fusion_cases import EAGER
from tests.fusion_step_test import TINY


def test_torch_peer_answers_as_the_exported_program_does():
    ours, theirs = serving.our_request(TINY), serving.torch_request(TINY, is_compiled=False)
    examples = serving.our_inputs(TINY)
    # Records of different lengths, some of which lack a modality, and fewer of them.
    lengths = np.array([[1, 0, 2], [0, 2, 0], [2, 4, 3]], np.int32)
    ragged = {
        name: lengths[:, ("vision", "audio", "text").index(name.partition("_")[0])]
        if name.endswith("lengths")
        else array[:3, :4]
        for name, array in examples[1].items()
    }
    for inputs in (examples[0], ragged):
        for found, expected in zip(theirs(inputs), ours(inputs), strict=True):
            np.testing.assert_allclose(found, expected, atol=2e-6)


def test_percentiles_are_those_of_the_requests(monkeypatch):
    clock = iter(np.cumsum([0.0, *[duration for seconds in range(1, 101) for duration in (seconds, 0.0)]]))
    monkeypatch.setattr(serving.time, "perf_counter", lambda: next(clock))
    case = serving.ServingCase(TINY, (50, 95), num_requests=100)
    asked = []
    found = serving.percentiles_of(asked.append, ["a", "b"], case)
    assert found == pytest.approx(np.percentile(range(1, 101), (50, 95)))
    assert asked == ["a", "b"] * 50


def stub_side(case):
    """Stands in for ours."""
    return rounds.Ready(measure=lambda: np.array([1.0, 2.0]), evidence=np.array([1.0, -2.0]))


def perturbed_side(case):
    """Answers a little more."""
    return rounds.Ready(measure=lambda: pytest.fail("measured"), evidence=np.array([1.0001, -2.0]))


def test_ratio_is_refused_when_outputs_differ():
    case = serving.ServingCase(TINY, (50,), num_requests=1, goals={EAGER: 1.0})
    sides = {
        rounds.OURS: "tests.serving_benchmark_test:stub_side",
        EAGER: "tests.serving_benchmark_test:perturbed_side",
    }
    with pytest.raises(rounds.SidesDiffer, match="torch eager and ours differ"):
        serving.measure_case(case, num_rounds=1, sides=sides)


def slower_side(case):
    """Answers the same, later."""
    return rounds.Ready(measure=lambda: np.array([3.0, 5.0]), evidence=np.array([1.0, -2.0]))


def test_every_percentile_is_compared_with_the_same_of_each_peer():
    case = serving.ServingCase(TINY, (50, 99), num_requests=1, goals={EAGER: 1.0})
    sides = {
        rounds.OURS: "tests.serving_benchmark_test:stub_side",
        EAGER: "tests.serving_benchmark_test:slower_side",
    }
    entries = serving.measure_case(case, num_rounds=1, sides=sides, is_quick=True)

    assert [entry["case"].rpartition(", ")[2] for entry in entries] == ["p50", "p99"]
    assert [entry["ratio_range"] for entry in entries] == [[3.0, 3.0], [2.5, 2.5]]


def test_requests_of_one_and_of_32_records_are_measured_at_three_percentiles():
    assert [(case.name, case.percentiles) for case in serving.CASES] == [
        (f"cpu, batch {size}", (50, 95, 99)) for size in (1, 32)
    ]
