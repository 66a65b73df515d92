"""Our safetensors reader and writer against the library's, and against files that are not what they seem."""

import json
import mmap
import pickle
import random
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from mllama_jax.convert.files import LazyArray
from mllama_jax.convert.safetensors import DTYPES, SafetensorsFile, write_safetensors
from mllama_jax.errors import InputError
from tests.archives import fault

METADATA = {"format": "pt"}
ARRAYS = {code.lower(): np.arange(-3, 3).astype(dtype).reshape(2, 3) for code, dtype in DTYPES.items()} | {
    "scalar": np.array(2.5, np.float32),
    "empty": np.zeros((0, 4), np.float16),
    'näme "quoted"\n': np.ones(5, np.uint8),
    "\U0001f999": np.ones(1, np.uint8),
    "\uffff": np.ones(1, np.uint8),
}
F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def raw(path: Path, header: object, data: bytes = bytes(8)) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_writes_the_librarys_bytes(tmp_path):
    write_safetensors(tmp_path / "ours", ARRAYS, METADATA)
    assert (tmp_path / "ours").read_bytes() == safetensors.numpy.save(ARRAYS, METADATA)
    write_safetensors(tmp_path / "ours", {}, {})
    assert (tmp_path / "ours").read_bytes() == safetensors.numpy.save({})


def test_reads_what_the_library_writes(tmp_path):
    safetensors.numpy.save_file(ARRAYS, tmp_path / "theirs", METADATA)
    file = SafetensorsFile(tmp_path / "theirs")
    assert file.metadata == METADATA
    assert file.tensors.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        read = file.read(name)
        assert (read.dtype, read.shape, read.tobytes()) == (array.dtype, array.shape, array.tobytes()), name
        assert (file.tensors[name].dtype, file.tensors[name].shape) == (array.dtype, array.shape)


def test_writes_lazy_and_strided_arrays(tmp_path):
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    lazy = LazyArray((3, 4), array.dtype, lambda: array)
    write_safetensors(tmp_path / "ours", {"lazy": lazy, "turned": array.T}, METADATA)
    theirs = safetensors.numpy.load_file(tmp_path / "ours")
    np.testing.assert_array_equal(theirs["lazy"], array)
    np.testing.assert_array_equal(theirs["turned"], array.T)


def test_views_are_read_only_parts_of_the_mapping(tmp_path):
    path = raw(tmp_path / "big", {"x": {"dtype": "U8", "shape": [2**33], "data_offsets": [0, 2**33]}}, b"\7")
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1 + 2**33)  # sparse: 8 GiB that take no space
    view = SafetensorsFile(path).read("x")
    assert isinstance(view.base, mmap.mmap)
    assert not view.flags.writeable
    assert (view[0], view[-1], view.size) == (7, 0, 2**33)


def test_unknown_tensor_is_a_key_error(tmp_path):
    with pytest.raises(KeyError):
        SafetensorsFile(raw(tmp_path / "x", {"a": F32})).read("b")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "the file is empty (0 bytes)"),
        (b"1234567", "not a safetensors file: expected 8 bytes of header length"),
        ((2**40).to_bytes(8, "little") + b"{}", "(length 1099511627776)"),
        ((100).to_bytes(8, "little") + b"{}", "truncated: expected a header of 100 bytes, got 2"),
        ((8).to_bytes(8, "little"), "truncated: expected a header of 8 bytes, got 0"),
        (b"PK\3\4" + bytes(60), "a zip archive, as torch.save writes"),
        (pickle.dumps({"weight": [1.0] * 9}), "a pickle"),
        (pickle.dumps({}, 2) + bytes(60), "a pickle"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer (run `git lfs pull`)"),
        (b"<!DOCTYPE html><html></html>", "a web page"),
        (b"GGUF" + bytes(60), "a GGUF file"),
    ],
)
def test_other_files_are_recognised(tmp_path, content, says):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    message = fault(SafetensorsFile, path)
    assert message.startswith(f"{path}: ")
    assert says in message


@pytest.mark.parametrize(
    ("header", "says"),
    [
        (b"{nope}", "header: invalid JSON (Expecting property name"),
        (b"{\xff}", "header: invalid JSON ('utf-8' codec"),
        (b'{"a":' + b"[" * 100_000, "header: invalid JSON ("),
        (b'{"a": NaN}', "holds NaN, which is not JSON"),
        (b"[1, 2]", "not a safetensors file: expected 8 bytes of header length"),
        (b" {}", "not a safetensors file"),
        (b"{} []", "header: invalid JSON (Extra data"),
        (f'{{"a": {json.dumps(F32)}, "a": {json.dumps(F32)}}}'.encode(), "key 'a' appears twice"),
        (b'{"a": {"dtype": "F32", "shape": [2], "shape": [2]}}', "key 'shape' appears twice"),
        ({"__metadata__": {"format": 1}, "a": F32}, "'__metadata__': expected an object of strings"),
        ({"__metadata__": ["pt"], "a": F32}, "'__metadata__': expected an object of strings"),
        ({"a": 5}, "tensor 'a': expected an object with just dtype, shape and data_offsets"),
        ({"a": {"dtype": "F32", "shape": [2]}}, "expected an object with just dtype, shape and data_offsets"),
        ({"a": F32 | {"stride": [1]}}, "expected an object with just dtype, shape and data_offsets"),
        ({"a": F32 | {"dtype": "F33"}}, "tensor 'a': dtype 'F33' is not supported; expected one of BOOL, U8"),
        ({"a": F32 | {"dtype": ["F32"]}}, "dtype ['F32'] is not supported"),
        ({"a": F32 | {"shape": [-2]}}, "expected a shape of non-negative integers, got '[-2]'"),
        ({"a": F32 | {"shape": [True, 2]}}, "expected a shape of non-negative integers, got '[True, 2]'"),
        ({"a": F32 | {"shape": [2.0]}}, "expected a shape of non-negative integers, got '[2.0]'"),
        ({"a": F32 | {"shape": 2}}, "expected a shape of non-negative integers, got '2'"),
        ({"a": F32 | {"shape": [2**62, 4]}}, "expected a shape of non-negative integers, got '[4611686"),
        ({"a": F32 | {"shape": [0, 2**62], "data_offsets": [0, 0]}}, "expected a shape of non-negative integers"),
        ({"a": F32 | {"shape": [2**40, 2**40]}}, "expected a shape of non-negative integers"),
        ({"a": F32 | {"shape": [1] * 65}}, "expected a shape of non-negative integers"),
        ({"a": F32 | {"shape": [3]}}, "tensor 'a': F32 [3] takes 12 bytes, but data_offsets give 8"),
        ({"a": F32 | {"data_offsets": [0, 4]}}, "F32 [2] takes 8 bytes, but data_offsets give 4"),
        ({"a": F32 | {"data_offsets": [-8, 0]}}, "expected data_offsets [start, stop], got '[-8, 0]'"),
        ({"a": F32 | {"data_offsets": [8, 0]}}, "expected data_offsets [start, stop], got '[8, 0]'"),
        ({"a": F32 | {"data_offsets": [False, 8]}}, "expected data_offsets [start, stop]"),
        ({"a": F32 | {"data_offsets": [0, 8, 8]}}, "expected data_offsets [start, stop]"),
        ({"a": F32, "b": F32}, "tensor 'b' overlaps the tensor before it: expected offset 8, got 0"),
        ({"a": F32, "b": F32 | {"data_offsets": [4, 12]}}, "tensor 'b' overlaps the tensor before it"),
        ({"a": F32, "b": F32 | {"data_offsets": [12, 20]}}, "tensor 'b' leaves a gap before it"),
        ({"a": F32 | {"data_offsets": [4, 12]}}, "tensor 'a' leaves a gap before it: expected offset 0, got 4"),
        ({"a": F32, "b": F32 | {"data_offsets": [8, 16]}}, "truncated: expected"),
        ({}, "bytes after the last tensor: expected 10 bytes, got 18"),
    ],
)
def test_faulty_headers_are_refused(tmp_path, header, says):
    path = raw(tmp_path / "model.safetensors", header)
    message = fault(SafetensorsFile, path)
    assert message.startswith(f"{path}: ")
    assert says in message
    assert len(message) < 1000


def test_absent_files_and_directories_are_refused(tmp_path):
    assert "cannot be read: No such file" in fault(SafetensorsFile, tmp_path / "absent")
    assert "cannot be read: Is a directory" in fault(SafetensorsFile, tmp_path)


def test_damage_anywhere_is_an_input_error_or_harmless(tmp_path):
    whole, chance = safetensors.numpy.save(ARRAYS, METADATA), random.Random(0)
    for trial in range(300):
        damaged = bytearray(whole[: chance.randrange(len(whole))] if trial % 3 == 0 else whole)
        for _ in range(trial % 3):
            damaged[chance.randrange(min(len(damaged), 400))] = chance.randrange(256)
        path = tmp_path / "damaged"
        path.write_bytes(damaged)
        with suppress(InputError):
            file = SafetensorsFile(path)
            assert sum(file.read(name).nbytes for name in file.tensors) < len(damaged)


def test_dtype_without_a_code_is_refused_before_writing(tmp_path):
    message = fault(write_safetensors, tmp_path / "x", {"a": np.zeros(2, np.complex64)}, METADATA)
    assert "tensor 'a': safetensors cannot hold dtype complex64" in message
    assert list(tmp_path.iterdir()) == []


def test_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"old")
    wrong = LazyArray((2,), np.dtype(np.float32), lambda: np.zeros(3, np.float32))
    with pytest.raises(ValueError, match=r"b: announced as float32 \(2,\), made as float32 \(3,\)"):
        write_safetensors(path, {"a": np.ones(9, np.float32), "b": wrong}, METADATA)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_killed_write_never_looks_whole(tmp_path):
    """A process that dies midway leaves only a .partial file, and even that, renamed, is recognised as truncated."""
    program = """if True:
        import os, sys, numpy as np
        from mllama_jax.convert import pth, safetensors
        from mllama_jax.convert.files import LazyArray
        die = LazyArray((2,), np.dtype(np.float32), lambda: os._exit(9))
        tensors = {"a": np.ones(100_000, np.float32), "b": die}
        if sys.argv[1].endswith("pth"):
            pth.write_pth(sys.argv[1], tensors)
        safetensors.write_safetensors(sys.argv[1], tensors, {})
    """
    from mllama_jax.convert.pth import PthFile

    for path, reader in ((tmp_path / "x.safetensors", SafetensorsFile), (tmp_path / "x.pth", PthFile)):
        assert subprocess.run([sys.executable, "-c", program, path], check=False).returncode == 9
        partial = path.with_name(path.name + ".partial")
        assert not path.exists()
        assert partial.exists()
        partial.rename(path)
        assert re.search("truncated|the file is empty", fault(reader, path))
