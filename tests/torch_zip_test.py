"""Reading torch's files without torch: the same numbers, and nothing that a hostile file asks for."""

import io
import pickle
import struct
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch

from mmei_jax.encoders.torch_zip import read_torch_zip
from mmei_jax.types import InputError


def test_tensors_equal_what_torch_saved(tmp_path):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, 4, generator=generator)
    state = OrderedDict(
        plain=base,
        transposed=base.T,
        view=base[2:5, 1:],
        every_second=base[::2],
        scalar=torch.tensor(3.5),
        empty=torch.zeros(0, 3),
        half=base.half(),
        brain=base.bfloat16(),
        double=base.double(),
        whole=torch.arange(5),
        yes=torch.tensor([True, False]),
        parameter=torch.nn.Parameter(base.clone()),
    )
    torch.save(state, tmp_path / "model.bin")
    tensors = read_torch_zip(tmp_path / "model.bin")
    assert list(tensors) == list(state)
    for name, expected in state.items():
        array = tensors[name]()
        expected = expected.detach()
        if expected.dtype == torch.bfloat16:
            assert array.dtype == "bfloat16"
            array, expected = array.astype(np.float32), expected.float()
        assert array.dtype == expected.numpy().dtype
        np.testing.assert_array_equal(array, expected.numpy())


def test_state_dict_of_a_module_is_read(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    torch.save(module.state_dict(), tmp_path / "model.bin")
    tensors = read_torch_zip(tmp_path / "model.bin")
    for name, expected in module.state_dict().items():
        np.testing.assert_array_equal(tensors[name](), expected.numpy())


def write_archive(path, program, **files):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        for name, content in files.items():
            archive.writestr(f"archive/data/{name}", content)


class Calls:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def touch(path):
    path.write_text("the program ran")


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("where", ["value", "container", "key"])
def test_program_that_calls_something_else_is_refused_before_it_runs(tmp_path, protocol, where):
    call = Calls(touch, tmp_path / "evidence")
    program = {"value": {"a": call}, "container": call, "key": {"a": 1, call: 2}}[where]
    write_archive(tmp_path / "model.bin", pickle.dumps(program, protocol))
    with pytest.raises(InputError, match="not allowed"):
        read_torch_zip(tmp_path / "model.bin")
    assert not (tmp_path / "evidence").exists()
    pickle.loads(pickle.dumps(program, protocol))
    assert (tmp_path / "evidence").exists()


@pytest.mark.parametrize(
    "name",
    ["builtins eval", "os system", "torch load", "torch._utils _rebuild_tensor_v3", "collections OrderedDict.fromkeys"],
)
def test_other_names_are_refused(tmp_path, name):
    module, _, attribute = name.partition(" ")
    write_archive(tmp_path / "model.bin", f"c{module}\n{attribute}\n.".encode())
    with pytest.raises(InputError, match=f"names {module}.{attribute}"):
        read_torch_zip(tmp_path / "model.bin")


def forge(path, *, offset=0, shape=(2,), strides=(1,), num_values=4, storage=None, after=b""):
    """A file with one tensor ``a``, whose numbers are free; ``after`` is put behind the tensor's opcodes."""
    buffer = io.BytesIO()

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", torch.FloatStorage, "0", "cpu", num_values) if value == "the storage" else None

    class Tensor:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, ("the storage", offset, shape, strides, False, OrderedDict())

    Pickler(buffer, 2).dump(Tensor())
    tensor = buffer.getvalue()[2:-1]
    program = b"\x80\x02}X\x01\x00\x00\x00a" + tensor + after + b"s."
    write_archive(path, program, **{"0": struct.pack("<4f", 1, 2, 3, 4) if storage is None else storage})


def test_forged_file_is_read_if_it_is_sound(tmp_path):
    forge(tmp_path / "model.bin", offset=1, shape=(2,), strides=(2,))
    np.testing.assert_array_equal(read_torch_zip(tmp_path / "model.bin")["a"](), [2, 4])


@pytest.mark.parametrize(
    "what",
    [
        dict(shape=(5,)),
        dict(offset=3),
        dict(strides=(4,)),
        dict(offset=-1),
        dict(shape=(2,), strides=(-1,)),
        dict(shape=(2, 2), strides=(1,)),
        dict(shape=(10**30,)),
        dict(shape=("2",)),
        dict(shape=(True,)),
    ],
    ids=str,
)
def test_tensor_beyond_its_storage_is_refused(tmp_path, what):
    forge(tmp_path / "model.bin", **what)
    with pytest.raises(InputError, match=r"beyond their storage: a|refused to unpickle"):
        read_torch_zip(tmp_path / "model.bin")


def test_tensor_cannot_be_changed_by_its_program(tmp_path):
    # BUILD with a state sets attributes of what was made: {"shape": (1000,)} on the checked tensor.
    state = pickle.dumps({"shape": (1000,)}, 2)[2:-1]
    forge(tmp_path / "model.bin", after=state + b"b")
    with pytest.raises(InputError, match="refused to unpickle"):
        read_torch_zip(tmp_path / "model.bin")


def test_storage_of_another_size_is_refused(tmp_path):
    forge(tmp_path / "model.bin", storage=b"\0" * 12)
    with pytest.raises(InputError, match="size"):
        read_torch_zip(tmp_path / "model.bin")["a"]()


def test_missing_storage_is_told(tmp_path):
    torch.save({"a": torch.ones(3)}, tmp_path / "whole.bin")
    with zipfile.ZipFile(tmp_path / "whole.bin") as whole, zipfile.ZipFile(tmp_path / "model.bin", "w") as archive:
        for name in whole.namelist():
            if "/data/" not in name:
                archive.writestr(name, whole.read(name))
    with pytest.raises(InputError, match=r"model\.bin"):
        read_torch_zip(tmp_path / "model.bin")["a"]()


@pytest.mark.parametrize("content", [{"a": 1}, {"a": [torch.ones(1)]}, [torch.ones(1)], {1: torch.ones(1)}], ids=str)
def test_what_is_no_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "model.bin")
    with pytest.raises(InputError, match="tensors"):
        read_torch_zip(tmp_path / "model.bin")


def test_old_form_and_damaged_files_are_refused(tmp_path):
    path = tmp_path / "model.bin"
    torch.save({"a": torch.ones(1)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match="zip form"):
        read_torch_zip(path)
    write_archive(path, pickle.dumps({"a": 1})[:-3])
    with pytest.raises(InputError, match="refused to unpickle"):
        read_torch_zip(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/other", b"")
    with pytest.raises(InputError, match=r"data\.pkl"):
        read_torch_zip(path)


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize("place", ["directory", "local header", "content", "compression method"])
def test_archive_that_is_damaged_inside_is_told_in_one_line(tmp_path, place):
    path = tmp_path / "model.bin"
    forge(path)
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        entry = next(entry for entry in archive.infolist() if "/data/" in entry.filename)
    directory = content.index(b"PK\x01\x02")
    name_size, more_size = struct.unpack("<HH", content[entry.header_offset + 26 : entry.header_offset + 30])
    position = {
        "directory": directory,
        "local header": entry.header_offset,
        "content": entry.header_offset + 30 + name_size + more_size,
        "compression method": content.rindex(b"PK\x01\x02") + 10,
    }[place]
    flip(path, position)
    with pytest.raises(InputError, match=r"model\.bin: "):
        {name: read() for name, read in read_torch_zip(path).items()}


def test_program_that_wants_all_memory_is_refused(tmp_path):
    # LONG4 of two gigabytes that are not there; BINUNICODE8 of more than any machine has.
    for program in (b"\x80\x02\x8b\xff\xff\xff\x7f.", b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7f."):
        write_archive(tmp_path / "model.bin", program)
        with pytest.raises(InputError, match="refused to unpickle"):
            read_torch_zip(tmp_path / "model.bin")
