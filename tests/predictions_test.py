"""The arithmetic on the compiler's figures, and the page of them, on facts that are made up."""

import dataclasses
import json

import pytest

from mmei_jax.collectives import Collective
from mmei_jax.profiling.candidates import MeshShape
from mmei_jax.profiling.predictions import (
    HOP_SECONDS,
    CollectiveUse,
    Costs,
    Prediction,
    best_predictions,
    collective_seconds,
    collective_uses,
    costs_of,
    prediction_from_json,
    utilisation,
    weak_scaling,
)
from mmei_jax.profiling.programs import MemoryUse, ProgramFacts
from mmei_jax.profiling.topologies import CHIPS
from mmei_jax.profiling.topology_report import TITLE, topology_report
from mmei_jax.profiling.tpu_times import TpuTimes
from tests import tiny

V5E = CHIPS["v5e"]
MEMORY = MemoryUse(100, 200, 0, 50, 0, 30, 20, 1)


def collective(kind, num_bytes, group_size, num_calls=1):
    return Collective("one", kind, num_bytes, group_size, "", num_calls, False, False)


def prediction(topology="v5e:4x4", mesh=(16, 1, 1), *, optimal=0.1, sent=10**9, worst=0.025, records=8, refusal=""):
    use = CollectiveUse("all-reduce", 3, sent, sent, worst)
    times = TpuTimes(optimal, is_compilers=True, expected_seconds=2 * optimal)
    costs = Costs(MEMORY.by_kind(), 4e12, 5e12, 6e12, 1e10, times, (use,) if sent else ())
    return Prediction(topology, MeshShape(*mesh), records, 60.0, None if refusal else costs, refusal)


@pytest.mark.parametrize(
    ("kind", "sent", "steps"),
    [
        # A ring of n sends (n - 1)/n of what is gathered or scattered, and twice that of what is added up everywhere.
        ("all-gather", 15 / 16, 15),
        ("reduce-scatter", 15 / 16, 15),
        ("all-reduce", 30 / 16, 30),
        ("collective-permute", 1.0, 1),
    ],
)
def test_a_collective_at_its_worst_is_a_ring_over_one_link(kind, sent, steps):
    one = collective(kind, 16 * 10**9, 16)
    assert collective_seconds(one, V5E) == pytest.approx(sent * 16e9 / 50e9 + steps * HOP_SECONDS)


def test_collectives_are_added_up_by_kind_as_often_as_they_run():
    found = collective_uses(
        [collective("all-reduce", 100, 4, 3), collective("all-reduce", 50, 4), collective("all-gather", 40, 4, None)],
        V5E,
    )
    assert [(use.kind, use.num_calls, use.num_bytes, use.sent_bytes) for use in found] == [
        ("all-gather", 1, 40, 30),
        ("all-reduce", 4, 350, 3 * 150 + 75),
    ]


def test_costs_are_those_of_one_chip():
    facts = ProgramFacts(
        num_devices=16,
        flops=7.0,
        product_flops=6.0,
        compiler_flops=None,
        bytes_accessed=5.0,
        optimal_seconds=0.5,
        memory=MEMORY,
        collectives=(collective("all-reduce", 160, 16),),
        operations=(),
        is_work_known=True,
        num_unknown_loops=0,
    )
    times = TpuTimes(0.75, is_compilers=True, expected_seconds=1.0)
    costs = costs_of(facts, times, V5E, model_flops=320.0)
    assert (costs.model_flops, costs.product_flops, costs.flops, costs.times) == (20.0, 6.0, 7.0, times)
    assert costs.memory_bytes == 401
    assert costs.memory["temporaries"] == 50
    assert not {"activations", "workspace"} & set(costs.memory)
    assert costs.sent_bytes == 300


def test_update_is_a_sum_where_nothing_is_hidden_and_a_maximum_where_all_is():
    costs = prediction(optimal=0.1, sent=10**9, worst=0.025).costs
    assert costs.seconds == pytest.approx(0.125)
    assert costs.least_seconds(V5E) == 0.1
    # Over four links at once a chip of v5e sends 200 GB a second.
    assert prediction(optimal=0.1, sent=40 * 10**9).costs.least_seconds(V5E) == pytest.approx(0.2)


def test_utilisation_is_model_flops_over_the_published_peak():
    costs = prediction().costs
    assert utilisation(costs, V5E, 0.1) == pytest.approx(4e12 / (0.1 * 197e12))


def test_best_mesh_is_the_fastest_of_those_that_fit():
    slow, fast = prediction(mesh=(16, 1, 1), optimal=0.3), prediction(mesh=(1, 16, 1), optimal=0.2)
    refused = prediction(mesh=(8, 1, 2), refusal="needs 20GB")
    alone = prediction("v6e:4x4", refusal="needs 40GB")
    assert best_predictions([slow, refused, fast, alone]) == {("v5e:4x4", 8): fast}


def test_best_mesh_is_one_of_those_with_as_many_records_per_chip():
    """Fewer records take less time, which makes no mesh better."""
    few = prediction(mesh=(16, 1, 1), optimal=0.1, records=4)
    other, more = (prediction(mesh=mesh, optimal=time) for mesh, time in (((1, 16, 1), 0.3), ((16, 1, 1), 0.2)))
    for order in ([few, other, more], [more, other, few]):
        assert best_predictions(order) == {("v5e:4x4", 4): few, ("v5e:4x4", 8): more}
    page = topology_report([few, other, more], [], {}, tiny.config("unread"))
    assert [line.split(" | ")[2:5] for line in page.splitlines() if "| v5e-16 (" in line] == [
        ["**16x1x1**", "best", "4"],
        ["1x16x1", "yes", "8"],
        ["**16x1x1**", "best", "8"],
    ]
    assert "| MiB | v5e:4x4 16x1x1, 4 records a chip | v5e:4x4 16x1x1, 8 records a chip |" in page
    assert "| v5e:4x4 | 16x1x1, 4 records a chip | all-reduce |" in page


@pytest.mark.parametrize(
    ("chips", "titles", "last"),
    [
        (
            {1: 0.0, 16: 0.02, 256: 0.03},
            ["efficiency from 1", "from 16", "from 16, all hidden there and nothing here"],
            ["76.9%", "92.3%", "76.9%"],
        ),
        ({4: 0.01, 64: 0.02}, ["efficiency from 4", "from 64", "from 64, all hidden there and nothing here"], None),
        ({16: 0.02, 256: 0.03}, ["efficiency from 16", "from 16, all hidden there and nothing here"], None),
        ({1: 0.0, 4: 0.01}, ["efficiency from 1"], ["90.9%"]),
    ],
)
def test_titles_of_weak_scaling_name_what_it_is_compared_with(chips, titles, last):
    sizes = {1: "1x1", 4: "2x2", 16: "4x4", 64: "8x8", 256: "16x16"}
    found = [prediction(f"v5e:{sizes[number]}", (number, 1, 1), worst=worst) for number, worst in chips.items()]
    lines = topology_report(found, [], {}, tiny.config("unread")).splitlines()
    head = next(place for place, line in enumerate(lines) if line.startswith("| chips | best mesh |"))
    assert lines[head].strip("| ").split(" | ")[6:] == titles
    rows = [line.strip("| ").split(" | ") for line in lines[head + 2 : head + 2 + len(chips)]]
    assert [int(row[0]) for row in rows] == list(chips)
    if last:
        assert rows[-1][6:] == last


def test_weak_scaling_compares_the_best_meshes_with_the_fewest_chips_above_the_base():
    one = prediction("v5e:1x1", (1, 1, 1), optimal=0.1, sent=0)
    few = prediction("v5e:4x4", (16, 1, 1), optimal=0.1, worst=0.02)
    worse = prediction("v5e:4x4", (1, 16, 1), optimal=0.1, worst=0.05)
    many = prediction("v5e:16x16", (256, 1, 1), optimal=0.1, worst=0.025)
    lines = weak_scaling([many, one, worse, few])
    assert [line.prediction for line in lines] == [one, few, many]
    assert [line.efficiency for line in lines] == pytest.approx([1.0, 0.1 / 0.12, 0.1 / 0.125])
    from_16 = weak_scaling([many, one, worse, few], base_chips=16)[-1]
    assert from_16.efficiency == pytest.approx(0.12 / 0.125)
    assert from_16.least_efficiency == pytest.approx(0.1 / 0.125)
    with pytest.raises(ValueError, match="different records per chip"):
        weak_scaling([one, dataclasses.replace(many, records_per_chip=9)])


def test_predictions_survive_a_file():
    for one in (prediction(), prediction(refusal="needs 20GB")):
        assert prediction_from_json(json.loads(json.dumps(one.to_json()))) == one


def test_page_tells_the_best_what_does_not_fit_and_how_it_scales():
    found = [
        prediction("v5e:16x16", (256, 1, 1), worst=0.026),
        prediction("v5e:4x4", (16, 1, 1), worst=0.02),
        prediction("v5e:4x4", (1, 16, 1), worst=0.5),
        prediction("v4:2x2x4", (16, 1, 1), refusal="needs 40.1GB of 31.7GB hbm"),
    ]
    config = tiny.config("unread")
    page = topology_report(found, ["python -m mmei_jax.profiling --topology=v5e:4x4"], {"jax": "0.0"}, config)
    assert page.startswith(TITLE)
    assert "not measured" in TITLE
    lines = page.splitlines()
    (best,) = [line for line in lines if line.startswith("| v5e-16 (v5e:4x4) | 16 | **16x1x1** | best | 8 |")]
    # 4 TFLOP in 0.12 s, and in 0.1 s with all hidden, of 197 TFLOP/s.
    assert best.endswith("| 100.0 | 200.0 | 20.0 | 120.0 | 16.9% | 20.3% |")
    assert any(line.startswith("| v5e-16 (v5e:4x4) | 16 | 1x16x1 | yes |") for line in lines)
    assert any(line.startswith("| v4-32 (v4:2x2x4) | 16 | 16x1x1 | no | 8 |") for line in lines)
    assert "* v4:2x2x4 16x1x1, 8 records a chip: needs 40.1GB of 31.7GB hbm" in lines
    assert "## Weak scaling of v5e, 8 records a chip" in lines
    assert "(100.00 + 20.00) ms / (100.00 + 26.00) ms = **95.2%**" in page
    assert "| all-reduce | 3 |" in page
    assert "What it leaves out" in page
    assert "With (text) it is not the compiler's figure but our calculation" in page
    assert "python -m mmei_jax.profiling --topology=v5e:4x4" in lines
