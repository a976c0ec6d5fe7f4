"""States of items' words are kept whole, found again, and never the reason why a command fails."""

import io

import numpy as np
import pytest

from mmei_jax.word_cache import kept_states

STATES = np.arange(6, dtype=np.float32).reshape(2, 3)


def kept_before():
    pytest.fail("made again")


def test_states_are_made_once_for_each_source(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for source, states in (({"encoder": "a"}, STATES), ({"encoder": "b"}, STATES + 1)):
        np.testing.assert_array_equal(kept_states(source, (2, 3), lambda states=states: states), states)
        np.testing.assert_array_equal(kept_states(source, (2, 3), kept_before), states)
    files = list((tmp_path / "mmei_jax" / "item_words").iterdir())
    assert [path.suffix for path in files] == [".npy"] * 2
    assert capsys.readouterr().err == ""


def test_damaged_file_is_told_and_made_anew(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kept_states({}, (2, 3), lambda: STATES)
    (path,) = (tmp_path / "mmei_jax" / "item_words").iterdir()
    whole = path.read_bytes()
    np.save(tmp_path / "other.npy", STATES.T)
    number = STATES[1, 1].tobytes()
    assert whole.count(number) == 1
    # Of the right shape, with another number in it; and without its hash.
    changed, hashless = whole.replace(number, np.float32(4.5).tobytes()), whole[:-32]
    assert np.load(io.BytesIO(changed)).shape == np.load(io.BytesIO(hashless)).shape == (2, 3)
    other = (tmp_path / "other.npy").read_bytes()
    for damage in (changed, hashless, whole[:-1], whole + b"0", b"", b"no array", np.lib.format.magic(1, 0), other):
        path.write_bytes(damage)
        np.testing.assert_array_equal(kept_states({}, (2, 3), lambda: STATES), STATES)
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"warning: {path}: damaged (")
        assert path.read_bytes() == whole


def test_folder_that_cannot_be_written_costs_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    np.testing.assert_array_equal(kept_states({}, (2, 3), lambda: STATES), STATES)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {tmp_path / 'file'}")
    assert line.endswith("is not kept; XDG_CACHE_HOME names another folder")
