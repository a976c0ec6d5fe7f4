"""An index answers what brute force does, after every change what a fresh one does, and is never half-changed."""

import dataclasses
import functools
import json
import re
import subprocess
import sys
import zlib

import numpy as np
import pyarrow as pa
import pytest

from mmei_jax.recommendation import index_files, index_writing
from mmei_jax.recommendation.index_files import CatalogueIndex, EncodedItems, Manifest, open_index, read_manifest
from mmei_jax.recommendation.index_writing import create_index, update_index
from mmei_jax.recommendation.search import IndexSearch, Wanted, answers, exact_embeddings, recall
from mmei_jax.recommendation.top_k import compress
from mmei_jax.records import Catalogue
from mmei_jax.sharding import make_evaluation_mesh
from mmei_jax.types import InputError
from mmei_jax.workdir import locked
from tests import processes

# As many rows as a table has on one device: a row of -1 must not become the last of its padding.
KINDS, DIM, NUM_ITEMS, TOWER = ("music", "video", "text"), 8, 320, "a" * 64
IDS = [f"item-{number}" for number in range(NUM_ITEMS)]


def items(ids, version=0):
    """Items whose kind, texts and embedding follow from id and version."""
    seeds = [zlib.crc32(f"{name} {version}".encode()) for name in ids]
    texts = [
        json.dumps({"title": f"{name} v{version}", "creator": f"creator-{seed % 5}", "origin": "human"})
        if seed % 4
        else "{}"
        for name, seed in zip(ids, seeds, strict=True)
    ]
    kind = np.array([seed % len(KINDS) for seed in seeds], np.int32)
    catalogue = Catalogue(list(ids), kind, KINDS, np.zeros((len(ids), 1), np.float32), texts)
    vectors = [np.random.default_rng(seed).normal(size=DIM) for seed in seeds]
    return EncodedItems(catalogue, np.array(vectors, np.float32).reshape(-1, DIM))


def blocks(ids, version=0, size=128):
    return [items(ids[start : start + size], version) for start in range(0, len(ids), size)]


def manifest(dtype="float32"):
    return Manifest("mmei_jax.catalogue_index", 1, TOWER, DIM, dtype, KINDS, 0)


def build(folder, ids=IDS, dtype="float32", **options):
    create_index(folder, manifest(dtype), blocks(ids, **options))
    return folder


# As the segment holds it.
VECTOR = items(IDS[:1]).embedding.tobytes()


def queries(count=5):
    return np.random.default_rng(1).normal(size=(count, DIM)).astype(np.float32)


def search(folder, k=10, wanted=None, **options):
    """Ids and scores by query."""
    searched = IndexSearch(open_index(folder, TOWER), make_evaluation_mesh())
    found = answers(searched.describe(searched.top(queries(), k, wanted, **options)))
    return [[(item["id"], item["score"]) for item in items] for items in found]


def brute_force(expected, k, is_allowed=None):
    """The same, of these items in NumPy; ``is_allowed`` is ``[queries, items]``."""
    scores = queries() @ expected.embedding.T
    scores = scores if is_allowed is None else np.where(is_allowed, scores, -np.inf)
    best = np.argsort(-scores, axis=1)[:, :k]
    ids = expected.items.ids
    return [
        [(ids[item], row[item]) for item in order if np.isfinite(row[item])]
        for order, row in zip(best, scores, strict=True)
    ]


def check(found, expected):
    assert [[name for name, _ in items] for items in found] == [[name for name, _ in items] for items in expected]
    flat = [[score for items in each for _, score in items] for each in (found, expected)]
    np.testing.assert_allclose(*flat, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return build(tmp_path_factory.mktemp("index") / "built")


def test_answers_are_those_of_brute_force(index):
    check(search(index), brute_force(items(IDS), 10))


def test_filters_are_those_of_brute_force(index):
    every = items(IDS)
    is_music_or_text = every.items.kind != 1
    best = brute_force(every, 20)
    denied = [name for name, _ in best[0]] + ["unknown"]
    is_denied = np.isin(IDS, denied)
    allowed = IDS[::2]
    seen = [[name for name, _ in row[:place]] for place, row in enumerate(best)]
    is_seen = np.array([np.isin(IDS, ids) for ids in seen])
    kinds = ["music", "text"]
    check(search(index, 10, Wanted(kinds=kinds)), brute_force(every, 10, is_music_or_text[None]))
    check(search(index, 10, Wanted(denied=denied)), brute_force(every, 10, ~is_denied[None]))
    check(search(index, 10, Wanted(allowed=allowed)), brute_force(every, 10, np.isin(IDS, allowed)[None]))
    check(search(index, 10, seen=seen), brute_force(every, 10, ~is_seen))
    together = is_music_or_text & ~is_denied & np.isin(IDS, allowed) & ~is_seen
    check(search(index, 10, Wanted(kinds, allowed, denied), seen=seen), brute_force(every, 10, together))
    assert search(index, 10, Wanted(allowed=["item-3"]))[0][0][0] == "item-3"
    assert search(index, 10, Wanted(allowed=["unknown"])) == [[]] * 5


def test_found_items_carry_what_a_reranking_needs(index):
    searched = IndexSearch(open_index(index), make_evaluation_mesh())
    described = searched.describe(searched.top(queries(), 7, Wanted(allowed=IDS[:4])))
    assert described.row.shape == (5, 7)
    every = items(IDS)
    for name in range(5):
        for rank in range(7):
            found = {key: getattr(described, key)[name, rank] for key in ("id", "kind", "title", "creator", "origin")}
            if rank >= 4:
                assert set(found.values()) == {None}
                assert described.row[name, rank] == -1
                continue
            place = IDS.index(found["id"])
            text = json.loads(every.items.texts[place])
            assert found["kind"] == KINDS[every.items.kind[place]]
            assert all(found[key] == text.get(key) for key in ("title", "creator", "origin"))
            np.testing.assert_array_equal(described.embedding[name, rank], every.embedding[place])
    scores = np.einsum("qkd,qd->qk", described.embedding[:, :4], queries())
    np.testing.assert_allclose(scores, described.score[:, :4], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_smaller_index_answers_what_its_embeddings_say(tmp_path, dtype):
    folder = build(tmp_path / "index", dtype=dtype)
    stored, scales = compress(items(IDS).embedding, dtype)
    values = stored.astype(np.float32) * (1 if scales is None else scales[:, None])
    read = open_index(folder)
    np.testing.assert_array_equal(read.take(np.arange(NUM_ITEMS))[1], values)
    given = queries() if dtype == "int8" else np.asarray(compress(queries(), dtype)[0], np.float32)
    found = IndexSearch(read, make_evaluation_mesh()).top(queries(), 10)
    np.testing.assert_allclose(found.score, -np.sort(-(given @ values.T))[:, :10], rtol=1e-5, atol=1e-5)
    # Its recall is that of its answers among the exact ones.
    exact = IndexSearch(read, make_evaluation_mesh(), exact_embeddings(read, blocks(IDS)))
    best = brute_force(items(IDS), 10)
    check(
        [[(item["id"], item["score"]) for item in row] for row in answers(exact.describe(exact.top(queries(), 10)))],
        best,
    )
    common = [
        len({IDS[place] for place in row} & {name for name, _ in ids}) for row, ids in zip(found.row, best, strict=True)
    ]
    assert recall(found.row, exact.top(queries(), 10).row) == pytest.approx(sum(common) / 50)
    with pytest.raises(InputError, match=r"1 items of .* not in the catalogue, such as 'item-319'"):
        exact_embeddings(read, blocks(IDS[:-1]))


def test_recall_counts_answers_that_are_among_the_exact_ones():
    exact = np.array([[1, 2, 3], [4, 5, -1], [-1, -1, -1]], np.int32)
    found = np.array([[3, 9, 1], [4, -1, -1], [7, -1, -1]], np.int32)
    assert recall(found, exact) == pytest.approx(3 / 5)
    assert np.isnan(recall(found[2:], exact[2:]))


def test_changed_index_answers_what_a_fresh_one_does(tmp_path):
    """Items removed, replaced, added, added again after they were removed, and removed after they were replaced."""
    folder = build(tmp_path / "index", IDS[:200])
    update_index(folder, removed=[*IDS[:10], IDS[0]])
    change = update_index(folder, blocks=blocks(IDS[190:], 1), tower_sha256=TOWER)
    assert (change.num_added, change.num_replaced, change.num_removed) == (130, 10, 0)
    change = update_index(folder, blocks=blocks(IDS[5:15], 2, size=4), removed=IDS[195:205], tower_sha256=TOWER)
    assert (change.num_added, change.num_replaced, change.num_removed) == (10, 5, 10)
    parts = [items(IDS[5:15], 2), items(IDS[15:190]), items(IDS[190:195], 1), items(IDS[205:], 1)]
    fresh = tmp_path / "fresh"
    create_index(fresh, manifest(), parts)
    changed = read_manifest(folder)
    assert changed.num_items == read_manifest(fresh).num_items == 10 + 175 + 5 + 115
    assert [len(changed.segments), len(changed.removals)] == [3, 2]
    for wanted in (None, Wanted(kinds=["video"]), Wanted(denied=IDS[5:60]), Wanted(allowed=IDS[:20])):
        check(search(folder, 15, wanted), search(fresh, 15, wanted))
    assert [row[0][0] for row in search(folder, 1, Wanted(allowed=IDS[7:8]))] == ["item-7"] * 5
    read = open_index(folder)
    rows = read.rows_of([IDS[7], IDS[0], IDS[192]])
    assert rows[1] == -1
    expected = [items(IDS[7:8], 2).embedding, items(IDS[192:193], 1).embedding]
    np.testing.assert_array_equal(read.take(rows[::2])[1], np.concatenate(expected))


def test_many_changes_leave_what_the_last_of_them_says(tmp_path):
    """Ten updates in a row, each of random items, beside a dict of what is there."""
    generator, folder = np.random.default_rng(4), build(tmp_path / "index", IDS[:12])
    versions = dict.fromkeys(IDS[:12], 0)
    for version in range(1, 11):
        removed = generator.permutation(sorted(versions))[: len(versions) // 4].tolist()
        added = sorted(set(generator.choice(IDS[:24], 6).tolist()) - set(removed))
        update_index(folder, blocks=[items(added, version)], removed=removed, tower_sha256=TOWER)
        versions = {name: own for name, own in versions.items() if name not in removed} | dict.fromkeys(added, version)
        index = open_index(folder)
        assert sorted(index.live_ids.to_pylist()) == sorted(versions)
        expected = [items([name], own).embedding[0] for name, own in versions.items()]
        np.testing.assert_array_equal(index.take(index.rows_of(list(versions)))[1], expected)
    assert len(index.manifest.removals) == 10


def test_ids_are_looked_up_in_a_table_that_is_made_once(index, monkeypatch):
    read = open_index(index)
    assert read.rows_of([IDS[3], "unknown"]).tolist() == [3, -1]
    monkeypatch.setattr(CatalogueIndex, "live_ids", property(lambda _: pytest.fail("the ids are read again")))
    searched = IndexSearch(read, make_evaluation_mesh())
    assert searched.top(queries(1), 2, Wanted(allowed=IDS[:3]), seen=[IDS[1:2]]).row[0].tolist() in ([0, 2], [2, 0])


def test_everything_can_be_removed(tmp_path):
    folder = build(tmp_path / "index", IDS[:3])
    assert update_index(folder, removed=IDS[:3]).manifest.num_items == 0
    assert search(folder) == [[]] * 5
    assert update_index(folder, blocks=[items(IDS[:1])], tower_sha256=TOWER).num_replaced == 0
    assert [row[0][0] for row in search(folder)] == [IDS[0]] * 5


def test_large_builds_have_several_segments(tmp_path, monkeypatch):
    monkeypatch.setattr(index_writing, "_BLOCKS_PER_SEGMENT", 2)
    folder = build(tmp_path / "index", size=50)
    assert [segment.num_records for segment in read_manifest(folder).segments] == [100, 100, 100, 20]
    check(search(folder), brute_force(items(IDS), 10))


def test_updates_that_cannot_be_are_refused_and_change_nothing(tmp_path):
    folder = build(tmp_path / "index", IDS[:20])
    files = {path.name: path.read_bytes() for path in folder.iterdir()}

    def refused(match, **changes):
        with pytest.raises(InputError, match=match):
            update_index(folder, **changes)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == files

    told = "2 of 3 ids to remove are not in the index: 'x', 'y'; expected ids of its items; nothing was changed"
    refused(re.escape(f"{folder}: {told}"), removed=["x", IDS[0], "y", "x"])
    # All of them, however many somebody mistypes; of a list of something else as many as a line can take.
    refused(re.escape(", ".join(f"'x{number}'" for number in range(9)) + "; "), removed=[f"x{row}" for row in range(9)])
    refused("'x99' and 1,901 more; expected", removed=[f"x{number}" for number in range(2_001)])
    both = {"blocks": blocks(IDS[2:4]), "removed": [IDS[0], IDS[3]]}
    refused("1 ids are both added and removed: 'item-3'; expected one of the two; nothing was changed", **both)
    refused("embeddings of the content tower aaaaaaaaaaaaaaaa.*, the run's is bbbb", tower_sha256="b" * 64)
    refused("expected a JSON object", blocks=[_with_text("no JSON")])
    with locked(folder):
        refused(re.escape(f"--index={folder}: in use by another process"), removed=[IDS[0]])
    with pytest.raises(InputError, match="no catalogue index; expected a folder that"):
        update_index(tmp_path / "none", removed=["x"])
    assert not (tmp_path / "none").exists()


def _with_text(text):
    block = items(IDS[:1])
    return dataclasses.replace(block, items=dataclasses.replace(block.items, texts=[text]))


def test_builds_that_cannot_be_are_refused_and_leave_nothing(tmp_path):
    folder = build(tmp_path / "index", IDS[:20])
    before = (folder / "manifest.json").read_bytes()
    with pytest.raises(InputError, match="is an index already"):
        build(folder, IDS[:5])
    assert (folder / "manifest.json").read_bytes() == before
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds 'notes\.txt'; expected a new or an empty folder"):
        build(other)
    assert (other / "notes.txt").read_text() == "mine"
    # What a killed build left is no hindrance.
    killed = tmp_path / "killed"
    killed.mkdir()
    for name in ("segment-00000.arrow", "segment-00001.arrow.partial", "manifest.json.partial"):
        (killed / name).write_text("half of it")
    check(search(build(killed, IDS[:5])), brute_force(items(IDS[:5]), 10))
    assert sorted(path.name for path in killed.iterdir()) == [".lock", "manifest.json", "segment-00000.arrow"]
    with pytest.raises(InputError, match="expected a JSON object"):
        create_index(tmp_path / "new", manifest(), [items(IDS[1:]), _with_text("{")])
    assert not (tmp_path / "new").exists()


def _change_manifest(**changes):
    def damage(folder):
        values = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps(values | changes))

    return damage


def _change_segment(change):
    def damage(folder):
        path = folder / "segment-00000.arrow"
        path.write_bytes(change(path.read_bytes()))

    return damage


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (_change_manifest(format="mmei_jax.records"), "format 'mmei_jax.records': expected 'mmei_jax.catalogue_index'"),
        (_change_manifest(version=2), "version 2: this program reads version 1"),
        (_change_manifest(dtype="int4"), "dtype = 'int4': expected one of"),
        (_change_manifest(dtype="int8"), "column 'embedding' is"),
        (_change_manifest(tower_sha256="c" * 64), "with another description"),
        (_change_manifest(num_items=7), "num_items = 7: its segments hold 20 items"),
        (_change_manifest(surprise=1), "surprise: unknown key"),
        (
            _change_manifest(segments=[{"file": "../x", "num_bytes": 1, "num_records": 1, "sha256": ""}]),
            "file '../x': expected the name of a file in the same folder",
        ),
        (lambda folder: (folder / "manifest.json").write_text("{"), "expected the manifest of a catalogue index"),
        (lambda folder: (folder / "manifest.json").unlink(), "no catalogue index"),
        (lambda folder: (folder / "segment-00000.arrow").unlink(), "missing; the manifest lists it"),
        (_change_segment(lambda content: content[:-100]), "not a readable Arrow IPC file"),
        (_change_segment(lambda content: b"no Arrow"), "not a readable Arrow IPC file"),
    ],
)
def test_damaged_and_foreign_indexes_are_told_in_one_line(tmp_path, damage, expected):
    folder = build(tmp_path / "index", IDS[:20])
    damage(folder)
    with pytest.raises(InputError) as error:
        open_index(folder)
    assert str(folder) in str(error.value)
    assert expected in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_changed_byte_of_a_large_file_is_found_where_that_is_asked_for(tmp_path, monkeypatch):
    """It changes neither size nor shape, and a large index is opened without being read in full."""
    monkeypatch.setattr(index_files, "HASHED_BYTES", 0)
    folder = build(tmp_path / "index", IDS[:20])
    update_index(folder, removed=IDS[:1])
    open_index(folder, verify=True)
    whole = {path: path.read_bytes() for path in folder.glob("*.arrow")}
    change = {"segment-00000.arrow": (VECTOR, VECTOR[::-1]), "removed-00000.arrow": (b"item-0", b"item-1")}
    assert sorted(path.name for path in whole) == sorted(change)
    for path, content in whole.items():
        path.write_bytes(content.replace(*change[path.name]))
        open_index(folder)
        for opened in (open_index, functools.partial(update_index, removed=IDS[5:6])):
            with pytest.raises(InputError, match=rf"{path.name}: SHA-256 .*: the file was changed"):
                opened(folder, verify=True)
        path.write_bytes(content)
    assert update_index(folder, removed=IDS[5:6], verify=True).num_removed == 1


def test_changed_byte_of_the_smallest_files_is_always_found(tmp_path, monkeypatch):
    """Of as many as the limit has room for together, however many there are."""
    folder = build(tmp_path / "index", IDS[:20])
    update_index(folder, blocks=blocks(IDS[20:24]), removed=IDS[:1], tower_sha256=TOWER)
    entry = read_manifest(folder)
    (large, small), (list_of_ids,) = entry.segments, entry.removals
    assert list_of_ids.num_bytes < small.num_bytes < large.num_bytes

    def told(file):
        """What opening says of a changed byte of a vector, or of an id."""
        path = folder / file.file
        content, vector = path.read_bytes(), items(IDS[20:21]).embedding.tobytes()
        old = {large.file: VECTOR, small.file: vector, list_of_ids.file: b"item-0"}[file.file]
        assert old in content
        path.write_bytes(content.replace(old, old[:-1] + bytes([old[-1] ^ 1])))
        try:
            open_index(folder)
            return None
        except InputError as error:
            return str(error)
        finally:
            path.write_bytes(content)

    files = (list_of_ids, small, large)
    assert all(f"{folder / file.file}: SHA-256" in told(file) for file in files)
    total = 0
    for number, file in enumerate(files):
        total += file.num_bytes
        monkeypatch.setattr(index_files, "HASHED_BYTES", total - 1)
        assert [told(each) is not None for each in files] == [place < number for place in range(3)]


def test_unknown_kinds_are_refused(index):
    with pytest.raises(InputError, match="kind 'book': expected some of music, video, text"):
        search(index, 3, Wanted(kinds=["music", "book"]))


# Child processes are killed at a named point of an update; the parent says what is there then, and after the next one.
KILLED = """
import json, os, signal, sys, warnings
from pathlib import Path
from mmei_jax.recommendation import index_writing
from mmei_jax.recommendation.index_files import open_index
from mmei_jax.recommendation.index_writing import update_index
from mmei_jax.types import InputError
from mmei_jax.workdir import locked
from tests.catalogue_index_test import IDS, TOWER, blocks, build

warnings.simplefilter("ignore")
folder, seen = Path(sys.argv[1]), {}

def die(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)

def update():
    update_index(folder, blocks=blocks(IDS[18:22], 1), removed=IDS[:3], tower_sha256=TOWER)

def die_within(*arguments):
    partial = folder / "segment-00001.arrow.partial"
    partial.write_bytes(b"half of it")
    die()

def kill_at(name, replacement):
    original = getattr(index_writing, name)
    child = os.fork()
    if not child:
        setattr(index_writing, name, replacement(original))
        update()
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (name, status)

def after(original):
    return lambda *arguments: (original(*arguments), die())

points = {
    "before a segment": ("_write_segments", lambda original: die),
    "within a segment": ("_to_arrow", lambda original: die_within),
    "before the manifest": ("write_json", lambda original: die),
    "after the manifest": ("write_json", after),
}
for number, (name, (patched, replacement)) in enumerate(points.items()):
    folder = Path(sys.argv[1]) / str(number)
    build(folder, IDS[:20])
    kill_at(patched, replacement)
    left = sorted(path.name for path in folder.iterdir())
    killed = open_index(folder).live_ids.to_pylist()
    if name != "after the manifest":
        update()
    files = sorted(path.name for path in folder.iterdir())
    seen[name] = {"left": left, "killed": killed, "then": open_index(folder).live_ids.to_pylist(), "files": files}

read, write = os.pipe()
child = os.fork()
if not child:
    with locked(folder, "--index"):
        os.write(write, b"x")
        signal.pause()
os.read(read, 1)
try:
    update_index(folder, removed=[IDS[4]])
except InputError as error:
    seen["locked"] = str(error)
os.kill(child, signal.SIGKILL)
os.waitpid(child, 0)
seen["unlocked"] = update_index(folder, removed=[IDS[4]]).num_removed
print(json.dumps(seen))
"""


def test_update_that_is_killed_leaves_the_old_index_or_the_new_one(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        env=processes.environment(),
        cwd=processes.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    old, new = IDS[:20], [*IDS[3:18], *IDS[18:22]]
    whole = [".lock", "manifest.json", "removed-00000.arrow", "segment-00000.arrow", "segment-00001.arrow"]
    for name in ("before a segment", "within a segment", "before the manifest", "after the manifest"):
        assert seen[name]["killed"] == (new if name == "after the manifest" else old), name
        assert seen[name]["then"] == new, name
        # Nothing of the killed update is left.
        assert seen[name]["files"] == whole, name
    assert "segment-00001.arrow.partial" in seen["within a segment"]["left"]
    assert "segment-00001.arrow" in seen["before the manifest"]["left"]
    # Two processes do not change one index at once.
    assert "in use by another process" in seen["locked"]
    assert seen["unlocked"] == 1


FOUR_DEVICES = """
import jax
from pathlib import Path
import sys
from tests.catalogue_index_test import IDS, Wanted, brute_force, build, check, items, search
assert jax.device_count() == 4
folder = build(Path(sys.argv[1]) / "index")
check(search(folder), brute_force(items(IDS), 10))
check(search(folder, 5, Wanted(allowed=IDS[:9], denied=IDS[:4])), brute_force(items(IDS[4:9]), 5))
"""


def test_four_devices_answer_what_one_does(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FOUR_DEVICES, str(tmp_path)],
        env=processes.environment(num_devices=4),
        cwd=processes.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_segments_are_read_without_this_package(index):
    """By any Arrow reader, as the page on indexes says."""
    with pa.ipc.open_file(index / "segment-00000.arrow") as file:
        table = file.read_all()
    assert table.column_names == ["id", "kind", "creator", "origin", "text", "embedding"]
    assert table.column("id").to_pylist() == IDS
    np.testing.assert_array_equal(np.array(table.column("embedding").to_pylist(), np.float32), items(IDS).embedding)
