"""Reading pickled features: the same values, and nothing that a hostile file asks for."""

import collections
import contextlib
import datetime
import fractions
import functools
import os
import pickle
import pickletools
import struct

import numpy as np
import pytest

from mmei_jax.extraction import feature_pickles
from mmei_jax.extraction.feature_pickles import read_feature_pickle
from mmei_jax.types import InputError

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


def read(tmp_path, content, protocol=4):
    path = tmp_path / "features.pkl"
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol))
    return read_feature_pickle(path)


def example():
    generator = np.random.default_rng(0)
    audio = generator.normal(size=(3, 4, 2))
    audio[1, 2, 0] = -np.inf
    return {
        "train": {
            "audio": audio,
            "half": audio.astype(np.float16),
            "columns first": np.asfortranarray(audio),
            "not contiguous": audio[:, ::2].T,
            "big end first": audio.astype(">f4"),
            "whole": np.arange(6, dtype=np.int64).reshape(2, 3),
            "yes": np.array([True, False]),
            "id": np.array(["v$_$1", "ü"]),
            "bytes": np.array([b"ab", b"c"]),
            "raw_text": np.array(["one", "two and more", None, 3, 0.5], object),
            "empty": np.zeros((0, 3), np.float32),
            "no axis": np.array(1.5),
            "lengths": [1, 2, 3],
            "mixed": ("a", 1.5, None, True, b"raw", [np.float32(0.5), np.int64(7), np.str_("text")]),
        }
    }


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_values_equal_those_of_the_real_unpickler(tmp_path, protocol):
    found, expected = read(tmp_path, example(), protocol)["train"], example()["train"]
    assert list(found) == list(expected)
    for name, value in expected.items():
        if isinstance(value, np.ndarray):
            assert found[name].dtype == value.dtype
            assert found[name].shape == value.shape
            np.testing.assert_array_equal(found[name], value)
        else:
            assert found[name] == value
    numbers = found["mixed"][-1]
    assert [type(number) for number in numbers] == [float, int, str]


def test_names_of_both_generations_of_numpy_are_read(tmp_path):
    content = pickle.dumps(np.arange(3.0), 2)
    assert b"numpy._core.multiarray" in content
    old = content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    np.testing.assert_array_equal(read(tmp_path, old), np.arange(3.0))


class Calls:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def touch(path):
    with open(path, "w") as stream:
        stream.write("the program ran")


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("where", ["file", "value", "key", "object array", "dtype", "shape"])
def test_program_that_calls_something_else_is_refused_before_it_runs(tmp_path, protocol, where):
    call = Calls(touch, str(tmp_path / "evidence"))
    array = np.empty(2, object)
    array[:] = ["text", call]
    program = {
        "file": call,
        "value": {"train": {"audio": call}},
        "key": {"train": {call: 1}},
        "object array": {"train": {"raw_text": array}},
        "dtype": Calls(np.dtype, call),
        "shape": Calls(np._core.multiarray._reconstruct, np.ndarray, (call,), b"b"),
    }[where]
    with pytest.raises(InputError, match=r"names (tests\.)?feature_pickles_test\.touch, which is not allowed"):
        read(tmp_path, program, protocol)
    assert not (tmp_path / "evidence").exists()


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Calls(os.system, "true"), "system"),
        (functools.partial(print), "functools.partial"),
        (collections.OrderedDict(a=1), "collections.OrderedDict"),
        (collections.Counter("ab"), "collections.Counter"),
        (fractions.Fraction(1, 2), "fractions.Fraction"),
        (datetime.date(2020, 1, 1), "datetime.date"),
        (Calls(eval, "1"), "builtins.eval"),
        (Calls(getattr, "a", "b"), "builtins.getattr"),
        (Calls(np.load, "a"), "numpy.load"),
        (np.random.default_rng(0), "numpy.random"),
        (np.array([fractions.Fraction(1, 2)], object), "fractions.Fraction"),
        (print, "builtins.print"),
        (np.ndarray, "_ArrayType"),
        (np.dtype("f4"), "_Dtype"),
        ({1, 2}, "set"),
    ],
    # The texts of some values hold addresses, which no two processes share.
    ids=lambda part: part if isinstance(part, str) else "",
)
def test_what_is_no_array_text_number_or_container_is_refused_by_its_name(tmp_path, value, name):
    with pytest.raises(InputError, match=rf"features\.pkl: refused to unpickle: .*{name}"):
        read(tmp_path, {"train": value})


@pytest.mark.parametrize(
    "name",
    ["numpy\nload", "numpy._core.multiarray\nfromfile", "numpy\nndarray.tofile", "builtins\nexec", "nt\nsystem"],
)
def test_names_near_the_allowed_ones_are_refused(tmp_path, name):
    module, attribute = name.split("\n")
    old = f"c{module}\n{attribute}\n.".encode()
    new = (
        b"\x80\x04" + b"".join(b"\x8c" + bytes([len(part)]) + part.encode() for part in (module, attribute)) + b"\x93."
    )
    for content in (old, new):
        with pytest.raises(InputError, match="not allowed"):
            read(tmp_path, content)


def test_records_dates_and_complex_numbers_are_refused(tmp_path):
    for array in (
        np.zeros(2, [("a", "f4")]),
        np.zeros(2, "M8[s]"),
        np.zeros(2, complex),
        np.zeros(2, "V3"),
        np.ma.masked_array([1.0, 2.0], [True, False]),
    ):
        with pytest.raises(InputError, match="allowed"):
            read(tmp_path, array)


def pickled(value):
    """The opcodes of a plain value, without header, memo and end."""
    content = pickle.dumps(value, 3)
    found = [(opcode.name, position) for opcode, _, position in pickletools.genops(content)]
    ends = [*(position for _, position in found[1:]), len(content)]
    left_out = ("PROTO", "BINPUT", "STOP")
    parts = zip(found, ends, strict=True)
    return b"".join(content[position:end] for (name, position), end in parts if name not in left_out)


def array_program(shape, code, content, names=None):
    """An array as NumPy pickles it, of parts that need not fit each other."""
    dtype = (
        b"cnumpy\ndtype\n(" + pickled(code) + b"I00\nI01\ntR" + pickled((3, "<", None, names, None, -1, -1, 0)) + b"b"
    )
    array = b"cnumpy._core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tC\x01btR"
    return b"\x80\x03" + array + b"(K\x01" + pickled(shape) + dtype + b"I00\n" + pickled(content) + b"tb."


def test_arrays_made_by_hand_are_read(tmp_path):
    content = array_program((2,), "f4", struct.pack("<2f", 1.5, -2))
    np.testing.assert_array_equal(read(tmp_path, content), np.array([1.5, -2], np.float32))


def test_record_in_the_dress_of_a_number_is_refused(tmp_path):
    with pytest.raises(InputError, match="an array of records"):
        read(tmp_path, array_program((2,), "f4", bytes(8), names=("a",)))


@pytest.mark.parametrize(
    ("shape", "code", "content", "message"),
    [
        ((3,), "f4", b"\0" * 8, "another size"),
        ((10**12,), "f4", b"", "another size"),
        ((-2,), "f4", b"\0" * 8, "shape or type"),
        ((2.0,), "f4", b"\0" * 8, "shape or type"),
        ((10**12,), "U0", b"", "type 'U0'"),
        ((1,), "f3", b"\0" * 3, "refused"),
        ((1,), "f4,f4", b"\0" * 8, "type 'f4,f4'"),
        ((2,), "O8", b"\0" * 16, "another size"),
        ((2,), "O8", [1], "another size"),
        ((0, 10**30), "f4", b"", "refused"),
        ("ab", "f4", b"\0" * 8, "shape or type"),
    ],
    ids=str,
)
def test_arrays_that_do_not_add_up_are_refused(tmp_path, shape, code, content, message):
    with pytest.raises(InputError, match=message):
        read(tmp_path, array_program(shape, code, content))


def test_program_cannot_change_what_it_is_given(tmp_path):
    before = {name: vars(value).copy() for name, value in vars(feature_pickles).items() if isinstance(value, type)}
    for module, name in feature_pickles._ALLOWED:
        for state in (b"}X\x03\x00\x00\x00newK\x01s", b"N}X\x07\x00\x00\x00resolveK\x01s\x86"):
            with pytest.raises(InputError, match="refused"):
                read(tmp_path, b"\x80\x02c" + f"{module}\n{name}\n".encode() + state + b"b.")
    for name, attributes in before.items():
        assert dict(vars(vars(feature_pickles)[name])) == attributes


def test_containers_within_themselves_and_too_deep_ones_are_refused(tmp_path):
    cycle = []
    cycle.append(cycle)
    for content in (pickle.dumps(cycle), b"]" * 3000 + b"a" * 2999 + b"."):
        with pytest.raises(InputError, match="refused to unpickle: containers within containers"):
            read(tmp_path, content)
    # 10 ** 7 values if each were made anew.
    wide = [0.5]
    for _ in range(7):
        wide = [wide] * 10
    found = read(tmp_path, wide)
    assert found[9][9][9][9][9][9][9] == [0.5]
    assert found[0] is found[9]


def test_damaged_files_are_told_in_one_line(tmp_path):
    content = pickle.dumps(example(), 4)
    for cut in (0, 1, 10, len(content) // 2, len(content) - 1):
        with pytest.raises(InputError, match=r"features\.pkl: refused to unpickle"):
            read(tmp_path, content[:cut])
    # LONG4 of two gigabytes that are not there; BINUNICODE8 of more than any machine has.
    for program in (b"\x80\x02\x8b\xff\xff\xff\x7f.", b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7f.", b"not a pickle"):
        with pytest.raises(InputError, match="refused to unpickle"):
            read(tmp_path, program)
    with pytest.raises(InputError, match="no such file"):
        read_feature_pickle(tmp_path / "nowhere.pkl")


def test_flipped_bytes_never_do_more_than_change_values(tmp_path):
    content = bytearray(pickle.dumps(example(), 2))
    generator = np.random.default_rng(0)
    for _ in range(400):
        changed = bytearray(content)
        for position in generator.integers(0, len(content), 3):
            changed[position] = generator.integers(0, 256)
        # Any other error fails the test.
        with contextlib.suppress(InputError):
            read(tmp_path, bytes(changed))
