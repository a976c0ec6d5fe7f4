"""The benchmark of retrieval: answers that differ are refused, and what is held and simulated is what it says."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import retrieval, retrieval_cases, retrieval_device, rounds
from mmei_jax.simulation.aigc_int_feedback import NUM_ITEMS

CASE = retrieval_cases.SearchCase("tiny", num_items=3_000, dim=8, num_queries=4, k=10)


@pytest.fixture
def case(tmp_path, monkeypatch):
    # The devices of a test's process are made already.
    monkeypatch.setattr(retrieval, "one_device_per_core", lambda: None)
    return CASE.write_items(tmp_path / "items.npy")


def test_our_answers_are_those_of_a_sort_and_others_are_refused(case):
    ready = retrieval.our_search(case)
    scores = case.queries() @ case.items().T
    rows = np.argsort(-scores, axis=1)[:, : case.k]
    theirs = rows, np.take_along_axis(scores, rows, axis=1)
    assert retrieval_cases.differ_in_answers(ready.evidence, theirs) == ""
    assert ready.measure() > 0.0
    assert "largest absolute difference" in retrieval_cases.differ_in_answers(ready.evidence, (rows, theirs[1] + 1.0))
    wrong = rows.copy()
    wrong[2, 0] = np.setdiff1d(np.arange(case.num_items), rows[2])[0]
    assert f"query 2: items [{rows[2, 0]}] are ours only" == retrieval_cases.differ_in_answers(
        ready.evidence, (wrong, theirs[1])
    )


def test_either_of_two_equal_items_may_be_the_last_answer(case):
    scores = np.array([[3.0, 2.0, 1.0]])
    ours, theirs = (np.array([[7, 8, 9]]), scores), (np.array([[8, 7, 4]]), scores)
    assert retrieval_cases.differ_in_answers(ours, theirs) == ""
    assert (
        retrieval_cases.differ_in_answers(ours, (np.array([[7, 4, 9]]), scores)) == "query 0: items [8] are ours only"
    )


def test_faiss_finds_the_same(case):
    pytest.importorskip("faiss", reason="faiss is not installed: pip install faiss-cpu")
    ours = retrieval.our_search(case).evidence
    for side in (retrieval.faiss_search, retrieval.faiss_blas_search):
        assert retrieval_cases.differ_in_answers(ours, side(case).evidence) == ""


def test_simulated_slates_are_uniform_and_new_in_every_measurement(monkeypatch):
    monkeypatch.setattr(retrieval, "one_device_per_core", lambda: None)
    case = retrieval_cases.SimulatorCase("tiny", num_users=16, num_visits=3, num_rounds=50)
    ready = retrieval.our_simulator(case)
    assert rounds.differ_by(ready.evidence, 1.0, relative=retrieval_cases.TOLERANCE) == ""
    assert ready.settings["slates"] == 48
    assert ready.measure() > 0.0


# Of its own strings.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("slate_size", [1, 4])
def test_obp_chooses_uniformly_as_we_do(slate_size):
    pytest.importorskip("obp", reason="obp is not installed: pip install --no-deps obp==0.4.1")
    case = retrieval_cases.SimulatorCase("tiny", 1, 1, num_rounds=20, num_items=NUM_ITEMS, slate_size=slate_size)
    assert rounds.differ_by(1.0, retrieval.obp_generator(case).evidence, relative=retrieval_cases.TOLERANCE) == ""
    few = retrieval.obp_generator(dataclasses.replace(case, num_items=10))
    assert rounds.differ_by(1.0, few.evidence, relative=retrieval_cases.TOLERANCE) == ""


GPU_CASE = retrieval_cases.SearchCase("gpu, tiny", num_items=3_001, dim=8, num_queries=4, k=10, dtype="bfloat16")


@pytest.fixture
def few_rows_at_once(monkeypatch):
    monkeypatch.setattr(retrieval_device, "_PIECE_ROWS", 1_000)
    monkeypatch.setattr(rounds, "MIN_SIDE_SECONDS", 0.01)


def test_best_of_pieces_are_those_of_all_products_of_the_rounded_values(few_rows_at_once):
    items = retrieval_device.draw_items(GPU_CASE)
    assert items.shape == (3_001, 8)
    assert len(np.unique(items, axis=0)) == 3_001
    rows, scores = retrieval_device.best_by_numpy(GPU_CASE, items)
    queries, items = (each.astype(jnp.bfloat16).astype(np.float64) for each in (GPU_CASE.queries(), items))
    expected = np.argsort(-(queries @ items.T), axis=1)[:, : GPU_CASE.k]
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_allclose(scores, np.take_along_axis(queries @ items.T, expected, axis=1), rtol=1e-6)


def test_case_of_a_gpu_sets_the_bytes_of_items_against_those_that_a_copy_moves(few_rows_at_once, monkeypatch):
    seconds = {rounds.OURS: [4.0, 2.0], retrieval_device.COPY: [6.0, 6.0]}
    measure_here = rounds.measure_here

    def measure_and_make_up(measures, settings, **options):
        timing = measure_here(measures, settings, **options)
        assert all(each > 0.0 for found in timing.seconds.values() for each in found)
        return dataclasses.replace(timing, seconds=seconds, is_disturbed=[False, False])

    monkeypatch.setattr(rounds, "measure_here", measure_and_make_up)
    entry = retrieval_device.measure(GPU_CASE, 2, is_quick=True)
    item_bytes, moved_bytes = 2 * 8 * 3_001, entry["peer_settings"]["moved_bytes"]
    assert entry["item_bytes"] == item_bytes
    # The table is copied with the rows that pad it.
    assert moved_bytes == 2 * 2 * 8 * entry["our_settings"]["rows_with_padding"] >= 2 * item_bytes
    by_round = [(item_bytes / ours) / (moved_bytes / copy) for ours, copy in zip(*seconds.values(), strict=True)]
    np.testing.assert_allclose(entry["ratio"], np.mean(by_round), atol=1e-4)
    np.testing.assert_allclose(entry["ratio_range"], by_round, atol=1e-4)
    # A CPU's operations are not those of a device.
    assert entry["device_seconds_by_kernel"] == {}
    json.dumps(entry)


def test_case_of_a_gpu_refuses_a_search_that_misses_an_item(few_rows_at_once, monkeypatch):
    top_items = retrieval_device.top_items

    def others(queries, table, *arguments, **options):
        return top_items(queries, table.replace(is_listed=table.is_listed.at[:1_500].set(False)), *arguments, **options)

    monkeypatch.setattr(retrieval_device, "top_items", others)
    monkeypatch.setattr(rounds, "measure_here", lambda *_, **__: pytest.fail("measured"))
    with pytest.raises(rounds.SidesDiffer, match="the search and NumPy differ"):
        retrieval_device.measure(GPU_CASE, 2, is_quick=True)


def test_what_is_copied_is_somewhere_else():
    array = jnp.arange(1_024.0)
    copied = jax.block_until_ready(retrieval_device.copy_on_device(array))
    assert copied.unsafe_buffer_pointer() != array.unsafe_buffer_pointer()


@pytest.mark.parametrize("reason", ["no GPU", ""])
def test_command_measures_on_a_gpu_where_there_is_one_and_else_says_so(reason, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["retrieval", "--case=gpu", "--num_rounds=3"])
    monkeypatch.setattr(rounds, "missing_gpu", lambda: reason)
    asked = []

    def in_new_process(*arguments):
        asked.append(arguments)
        return {"case": retrieval_cases.GPU_SEARCH.name, "peer": "copy bandwidth", "ratio": 0.9, "goal": 0.8}

    monkeypatch.setattr(rounds, "in_new_process", in_new_process)
    retrieval.main()
    name = "gpu, search, 100 of 10,000,000 x 256 bfloat16, 64 queries"
    (case,) = json.loads(capsys.readouterr().out.splitlines()[-1])["cases"]
    assert (case["peer"], case["goal"]) == ("copy bandwidth", 0.8)
    if reason:
        assert (case["case"], case["ratio"], asked) == (f"{name}: not measured (no GPU)", None, [])
    else:
        assert (case["case"], case["ratio"]) == (name, 0.9)
        assert asked == [(retrieval_device.measure, retrieval_cases.GPU_SEARCH, 3)]
