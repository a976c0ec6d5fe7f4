"""The feedback log: what may be written, and that nothing is lost, whoever writes and however they end."""

import contextlib
import fcntl
import os
import resource
import signal
import subprocess
import sys

import pyarrow as pa
import pytest

from mmei_jax.feedback import log as log_module
from mmei_jax.feedback.log import (
    SCHEMA,
    FeedbackWriter,
    check_impressions,
    make_impressions,
    read_log,
    recover,
    segments,
)
from mmei_jax.types import InputError
from tests import processes


def columns(num_rows=3, start=0, **changes):
    """Slates of one, two, three ... items."""
    sizes = [1 + (start + row) % 3 for row in range(num_rows)]
    values = {
        "impression_id": [f"i{start + row}" for row in range(num_rows)],
        "user_id": ["u"] * num_rows,
        "time_seconds": [float(start + row) for row in range(num_rows)],
        "policy_version": ["p1"] * num_rows,
        "context": [[0.5, -1.0]] * num_rows,
        "item_ids": [[f"c{place}" for place in range(size)] for size in sizes],
        "positions": [list(range(size)) for size in sizes],
        "propensities": [[0.5] * size for size in sizes],
        "dwell_seconds": [[2.5] * size for size in sizes],
        "num_replays": [[1] * size for size in sizes],
        "is_liked": [[True] * size for size in sizes],
        "satisfaction": [None] * num_rows,
    }
    return {**values, **changes}


def impressions(*args, **changes):
    return make_impressions(columns(*args, **changes))


def ids(folder):
    return sorted(read_log(folder)["impression_id"].to_pylist())


def test_what_was_appended_is_read_back(tmp_path):
    first, second = impressions(4), impressions(3, 4, satisfaction=[1.0, None, 4.5])
    with FeedbackWriter(tmp_path / "log", rows_per_segment=5) as writer:
        writer.append(first)
        assert segments(tmp_path / "log") == []
        writer.append(second)
        assert len(segments(tmp_path / "log")) == 1
        writer.append(impressions(1, 7))
    assert (
        read_log(tmp_path / "log").combine_chunks()
        == pa.concat_tables([first, second, impressions(1, 7)]).combine_chunks()
    )
    # Any Arrow reader opens a segment.
    with pa.memory_map(str(segments(tmp_path / "log")[0])) as source:
        assert pa.ipc.open_file(source).schema.equals(SCHEMA)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"propensities": [[0.5], [0.0, 0.5], [0.5] * 3]}, r"propensities, row 1: .*above 0 and at most 1"),
        ({"propensities": [[0.5], [0.5, 0.5], [0.5, 1.5, 0.5]]}, r"propensities, row 2: .*above 0 and at most 1"),
        ({"propensities": [[0.5], [0.5, 0.5], [0.5, 0.5]]}, r"propensities, row 2: .*one value for each item"),
        ({"positions": [[0], [0], [0, 1, 2]]}, r"positions, row 1: .*one value for each item"),
        ({"positions": [[0], [0, None], [0, 1, 2]]}, r"positions, row 1: .*a value in every place"),
        ({"positions": [None, [0, 1], [0, 1, 2]]}, r"positions, row 0: None: expected a value"),
        ({"positions": [[0], [1, 1], [0, 1, 2]]}, r"positions, row 1: .*each one once"),
        ({"positions": [[-1], [0, 1], [0, 1, 2]]}, r"positions, row 0: .*places from 0"),
        ({"dwell_seconds": [[1.0], [float("nan"), 1.0], [1.0] * 3]}, r"dwell_seconds, row 1: .*finite numbers"),
        ({"dwell_seconds": [[1.0], [-2.0, 1.0], [1.0] * 3]}, r"dwell_seconds, row 1: .*at least 0"),
        ({"num_replays": [[-1], [0, 1], [0, 1, 2]]}, r"num_replays, row 0: .*at least 0"),
        ({"satisfaction": [None, 6.0, None]}, r"satisfaction, row 1: 6.0: expected a rating from 1 to 5"),
        ({"satisfaction": [None, float("nan"), None]}, r"satisfaction, row 1: nan: expected a finite number"),
        ({"context": [[0.5, 1.0], [0.5, 1.0], [0.5]]}, r"context, row 2: .*expected one length"),
        ({"context": [[0.5, 1.0], [0.5, float("inf")], [0.5, 1.0]]}, r"context, row 1: .*finite numbers"),
        ({"item_ids": [["c0"], ["c1", "c1"], ["c0", "c1", "c2"]]}, r"item_ids, row 1: .*each one once"),
        ({"item_ids": [["c0"], ["c0", "x"], ["c0", "y", "c2"]]}, r"item_ids, row 1, 2: .*items of the catalogue"),
        ({"user_id": ["u", None, "u"]}, r"user_id, row 1: None: expected a value"),
    ],
)
def test_what_is_not_valid_is_refused_with_its_rows_and_nothing_is_written(tmp_path, changes, message):
    with FeedbackWriter(tmp_path / "log", known_items=["c0", "c1", "c2"]) as writer:
        writer.append(impressions(2))
        with pytest.raises(InputError, match=message):
            writer.append(impressions(**changes))
    assert ids(tmp_path / "log") == ["i0", "i1"]
    check_impressions(impressions(0))


def test_an_append_looks_up_what_it_shows_and_not_the_catalogue(tmp_path, monkeypatch):
    """A set of a million ids for each append would cost seconds."""
    catalogue, sizes = [f"c{number}" for number in range(1_000)], []
    array = pa.array

    def made(values, *args):
        sizes.append(len(values))
        return array(values, *args)

    with FeedbackWriter(tmp_path, known_items=catalogue) as writer, monkeypatch.context() as patch:
        patch.setattr(log_module.pa, "array", made)
        writer.append(impressions(3))
        with pytest.raises(InputError, match=r"item_ids, row 0: .*items of the catalogue"):
            writer.append(make_impressions(columns(1, item_ids=[["c1000"]])))
    assert sizes
    assert max(sizes) < 10


def test_columns_that_are_not_those_of_a_log_are_refused(tmp_path):
    good = columns()
    with pytest.raises(InputError, match=r'\["positions"\] are missing or unknown'):
        make_impressions({name: value for name, value in good.items() if name != "positions"})
    with pytest.raises(InputError, match="num_replays: expected list"):
        make_impressions(columns(num_replays=[["x"], [1, 1], [1, 1, 1]]))
    with pytest.raises(InputError, match="'user_id': 2"):
        make_impressions(columns(user_id=["u", "u"]))
    with pytest.raises(InputError, match="differ from the schema of a feedback log"):
        check_impressions(pa.table({"impression_id": ["i0"]}))
    log = tmp_path / "log"
    log.mkdir()
    with pytest.raises(InputError, match="expected a feedback log, with segments"):
        read_log(log)
    (log / "a-000000.arrow").write_bytes(b"ARROW1 not")
    with pytest.raises(InputError, match=r"a-000000.arrow: expected a sealed segment"):
        read_log(log)
    other = pa.table({"impression_id": ["i0"]})
    with pa.ipc.new_file(str(log / "a-000000.arrow"), other.schema) as writer:
        writer.write_table(other)
    with pytest.raises(InputError, match=r"a-000000.arrow: format '': expected 'mmei_jax feedback log 1'"):
        read_log(log)


APPENDS = """
import sys
from pathlib import Path
from mmei_jax.feedback.log import FeedbackWriter
from tests.feedback_log_test import impressions
folder, start, is_endless = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "endless"
with FeedbackWriter(folder, rows_per_segment=40) as writer:
    for index in range(10_000_000 if is_endless else 30):
        writer.append(impressions(3, start + 3 * index))
        print(start + 3 * index + 3, flush=True)
"""


def start(folder, first, how):
    command = [sys.executable, "-c", APPENDS, str(folder), str(first), how]
    return subprocess.Popen(command, cwd=processes.ROOT, stdout=subprocess.PIPE, text=True)


def test_two_writers_lose_nothing(tmp_path):
    writers = [start(tmp_path, first, "ends") for first in (0, 1_000)]
    for writer in writers:
        writer.communicate(timeout=120)
        assert writer.returncode == 0
    expected = [f"i{number}" for first in (0, 1_000) for number in range(first, first + 90)]
    assert ids(tmp_path) == sorted(expected)
    assert {path.suffix for path in tmp_path.iterdir()} == {".arrow"}


def test_killed_writer_loses_nothing_that_was_appended(tmp_path):
    writer = start(tmp_path, 0, "endless")
    for line in writer.stdout:
        if int(line) >= 150:
            break
    os.kill(writer.pid, signal.SIGKILL)
    rest, _ = writer.communicate(timeout=60)
    # The last line may be cut off.
    confirmed = max([150, *(int(line) for line in rest.split("\n")[:-1])])
    alive = FeedbackWriter(tmp_path)
    alive.append(impressions(1, 10_000_000))
    # The killed one's partial is sealed by now; the living one's is not touched.
    assert recover(tmp_path) == []
    found = ids(tmp_path)
    assert {f"i{number}" for number in range(confirmed)} <= set(found)
    assert len(found) == len(set(found))
    assert "i10000000" not in found
    alive.seal()
    assert len(ids(tmp_path)) == len(found) + 1
    assert {path.suffix for path in tmp_path.iterdir()} == {".arrow"}


def test_partial_that_was_cut_off_gives_its_whole_appends(tmp_path):
    writer = FeedbackWriter(tmp_path)
    writer.append(impressions(2))
    writer.append(impressions(2, 2))
    (partial,) = tmp_path.glob("*.partial")
    content = partial.read_bytes()
    for length, expected in ((len(content) - 9, ["i0", "i1"]), (len(content), ["i0", "i1", "i2", "i3"]), (20, None)):
        folder = tmp_path / str(length)
        folder.mkdir()
        (folder / partial.name).write_bytes(content[:length])
        assert len(recover(folder)) == (expected is not None)
        if expected is not None:
            assert ids(folder) == expected
        assert not list(folder.glob("*.partial"))
    writer.seal()


def test_partial_that_another_writer_takes_for_a_dead_ones_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    lock, taken = fcntl.flock, []

    def recover_first(file, how):
        if how == fcntl.LOCK_EX and not taken:
            taken.append(file.name)
            assert recover(tmp_path) == []
            assert not list(tmp_path.iterdir())
        lock(file, how)

    monkeypatch.setattr(log_module.fcntl, "flock", recover_first)
    with FeedbackWriter(tmp_path) as writer:
        writer.append(impressions(2))
        assert len(taken) == 1
        # From here on it is locked.
        assert recover(tmp_path) == []
        writer.append(impressions(2, 2))
    assert ids(tmp_path) == ["i0", "i1", "i2", "i3"]


@pytest.mark.parametrize("num_free", [0, 1, 2])
def test_partial_that_cannot_be_read_now_is_kept(tmp_path, num_free):
    """With too few files that may be open, as a busy server has it."""
    writer = FeedbackWriter(tmp_path / "theirs")
    writer.append(impressions(2))
    (partial,) = (tmp_path / "theirs").glob("*.partial")
    log = tmp_path / "log"
    log.mkdir()
    (log / partial.name).write_bytes(partial.read_bytes())
    writer.seal()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    next_file = os.open(tmp_path, os.O_RDONLY)
    os.close(next_file)
    resource.setrlimit(resource.RLIMIT_NOFILE, (next_file + num_free, hard))
    try:
        with contextlib.suppress(OSError):
            recover(log)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    recover(log)
    assert ids(log) == ["i0", "i1"]
