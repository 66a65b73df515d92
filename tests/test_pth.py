"""Our reader and writer of torch files, without torch: round trips, a file of torch.save, and files made to harm."""

import copyreg
import mmap
import os
import pickle
import random
import struct
import zipfile
from contextlib import suppress
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from mllama_jax.convert.files import LazyArray
from mllama_jax.convert.pth import PthFile, write_pth
from mllama_jax.errors import InputError
from tests.archives import fault, torch_archive
from tests.test_safetensors import ARRAYS as SAFETENSORS_ARRAYS

ARRAYS = SAFETENSORS_ARRAYS | {"turned": np.arange(6, dtype=np.float32).reshape(2, 3).T}
SAVED = Path(__file__).parent / "data" / "torch_save.pth"  # torch 2.13's file of tests.oracle.test_pth_live.saved_state
_BASE = np.arange(12, dtype=np.float32).reshape(3, 4)
SAVED_ARRAYS = {
    "weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "bias": np.arange(2, dtype=np.float32),
    "parameter": _BASE,
    "transposed": _BASE.astype(np.float16).T,
    "shared": _BASE,
    "shared.slice": _BASE[1:, ::2],
    "expanded": np.full((3, 2), 7, np.int64),
    "scalar": np.array(2.5),
    "empty": np.zeros((0, 4), np.float32),
    "bfloat16": _BASE.astype(ml_dtypes.bfloat16)[:, 1],
    "float8": _BASE.astype(ml_dtypes.float8_e4m3fn)[1:],
} | {f"torch.{name}": _BASE.astype(name) for name in ("int32", "int16", "int8", "uint8", "bool", "uint16")}


def assert_reads(file: PthFile, arrays: dict[str, np.ndarray]) -> None:
    assert list(file.tensors) == list(arrays)
    for name, array in arrays.items():
        read = file.read(name)
        assert (read.dtype, read.shape, read.tobytes()) == (array.dtype, array.shape, array.tobytes()), name


def test_reads_what_torch_saves():
    assert_reads(PthFile(SAVED), SAVED_ARRAYS)


def test_reads_what_we_write(tmp_path):
    write_pth(tmp_path / "ours.pth", ARRAYS)
    assert_reads(PthFile(tmp_path / "ours.pth"), ARRAYS)
    assert all(region.start % 64 == 0 for region in PthFile(tmp_path / "ours.pth").tensors.values())


def test_written_bytes_depend_on_the_tensors_only(tmp_path):
    write_pth(tmp_path / "one.pth", ARRAYS)
    write_pth(tmp_path / "two.pth", {name: LazyArray(a.shape, a.dtype, lambda a=a: a) for name, a in ARRAYS.items()})
    assert (tmp_path / "one.pth").read_bytes() == (tmp_path / "two.pth").read_bytes()


def test_views_are_read_only_parts_of_the_mapping():
    view = PthFile(SAVED).read("shared.slice")
    assert isinstance(view.base, mmap.mmap)
    assert not view.flags.writeable
    assert view.strides == (16, 8)


def test_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "x.pth"
    path.write_bytes(b"old")
    wrong = LazyArray((2,), np.dtype(np.float32), lambda: np.zeros(2, np.float64))
    with pytest.raises(ValueError, match="b: announced as float32"):
        write_pth(path, {"a": np.ones(9), "b": wrong})
    assert "tensor 'a': torch has no dtype <U1" in fault(write_pth, path, {"a": np.array(["x"])})
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


# --- Files that are no state dicts -----------------------------------------------------------------------------------


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def storage(kind: str = "FloatStorage", key: str = "0", count: int = 4) -> bytes:
    return (
        b"(" + text("storage") + b"ctorch\n" + kind.encode() + b"\n" + text(key) + text("cpu") + number(count) + b"tQ"
    )


def tensor(offset: int = 0, shape: tuple = (2, 2), stride: tuple = (2, 1), stored: bytes | None = None) -> bytes:
    sizes = [b"(" + b"".join(map(number, values)) + b"t" for values in (shape, stride)]
    hooks = b"ccollections\nOrderedDict\n)R"
    start = b"ctorch._utils\n_rebuild_tensor_v2\n(" + (stored or storage()) + number(offset)
    return start + b"".join(sizes) + b"\x89" + hooks + b"tR"


def state_dict(*values: bytes) -> bytes:
    return b"\x80\x02}(" + b"".join(text(f"w{place}") + value for place, value in enumerate(values)) + b"u."


def opened(path: Path, program: bytes, **members: bytes) -> PthFile:
    return PthFile(torch_archive(path, program, {"data/0": bytes(16), **members}))


def test_hand_made_archives_can_be_read(tmp_path):
    """So that what follows fails for what it says and nothing else."""
    views = [
        tensor(),
        tensor(3, (), ()),
        tensor(0, (5, 5), (0, 0)),
        tensor(0, (0, 3), (2**30, 2**30)),
        tensor(4, (0,), (1,)),
    ]
    strides = tensor(0, (1, 2, 2), (2**31 - 1, 2, 1))
    file = opened(tmp_path / "x.pth", state_dict(*views, strides), byteorder=b"little")
    assert [file.read(name).shape for name in file.tensors] == [(2, 2), (), (5, 5), (0, 3), (0,), (1, 2, 2)]


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (tensor(1), "the view ends at byte 20 of a storage of 16"),
        (tensor(0, (2, 2), (3, 1)), "the view ends at byte 20 of a storage of 16"),
        (tensor(0, (5,), (1,)), "the view ends at byte 20 of a storage of 16"),
        (tensor(5, (0,), (1,)), "the view ends at byte 20 of a storage of 16"),
        (tensor(-1), "expected a storage offset of 0 or more, got -1"),
        (tensor(0, (-2, 2)), "expected a shape and strides of non-negative integers of one length"),
        (tensor(3, (2, 2), (-1, 1)), "expected a shape and strides of non-negative integers of one length"),
        (tensor(0, (2, 2), (1,)), "expected a shape and strides of non-negative integers of one length"),
        (tensor(0, (2**30, 2**30), (0, 0)), "expected a shape and strides of non-negative integers of one length"),
        (tensor(stored=storage(key="1")), "member 'data/1' is missing; the file is incomplete"),
        (tensor(stored=storage(key="../0")), "member 'data/../0' is missing"),
        (tensor(stored=storage(count=5)), "expected 20 bytes in 'data/0', got 16"),
        (tensor(stored=storage("DoubleStorage")), "expected 32 bytes in 'data/0', got 16"),
        (b"}(" + text("inner") + tensor() + b"u", "entry 'w0': expected a tensor, got a dict; save a flat dict"),
        (storage(), "entry 'w0': expected a tensor, got a Storage"),
        (number(5), "entry 'w0': expected a tensor, got a int"),
    ],
)
def test_faulty_tensors_are_refused(tmp_path, value, says):
    message = fault(opened, tmp_path / "x.pth", state_dict(value))
    assert message.startswith(f"{tmp_path / 'x.pth'}: ")
    assert says in message


@pytest.mark.parametrize(
    ("program", "says"),
    [
        (b"\x80\x02]q\0.", "expected a state dict (name to tensor), got a list"),
        (b"\x80\x02}" + number(1) + tensor() + b"s.", "entry 1: expected a tensor, got a View"),
        (state_dict(tensor())[:-9], "damaged pickle ("),
        (b"\x80\x02h\7.", "damaged pickle (7)"),
        (b"\x80\x02R.", "damaged pickle (pop from empty list)"),
        (b"", "damaged pickle (pickle exhausted before seeing STOP)"),
        (b"\x80\x02}((tNu.", "refused: sets a tuple key of a dict"),
        (b"\x80\x02](" + text("a") + b"Nu.", "refused: sets a str key of a list"),
        (b"\x80\x02}Na.", "refused: appends to a dict"),
        (b"\x80\x02" + number(1) + b")R.", "refused: a call of int with arguments"),
        (b"\x80\x02ctorch\nFloatStorage\n)R.", "refused: a call of torch.FloatStorage with arguments"),
        (b"\x80\x02ctorch\nSize\n)R.", "refused: a call of torch.Size with arguments"),
        (b"\x80\x02ctorch\nSize\n}b.", "refused: sets attributes of a Name"),
        (b"\x80\x02})b.", "refused: sets attributes of a dict"),
        (b"\x80\x02ctorch\nSize\n)\x81.", "refused: pickle opcode NEWOBJ is not part of a state dict"),
        (b"\x80\x02(itorch\nSize\n.", "refused: pickle opcode INST is not part of a state dict"),
        (b"\x80\x02\x82\1.", "refused: pickle opcode EXT1 is not part of a state dict"),
        (b"Pstorage\n.", "refused: pickle opcode PERSID is not part of a state dict"),
        (b"\x80\x02" + text("x") + b"Q.", "refused: a persistent id that is not a torch storage"),
        (b"\x80\x04))\x93.", "damaged pickle ("),
    ],
)
def test_faulty_pickles_are_refused(tmp_path, program, says):
    assert says in fault(opened, tmp_path / "x.pth", program)


class Call:
    """Pickles as a call of `function`; loading it with pickle would make the call."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


MARKER = "marker-of-a-pickle-that-ran"


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    ("call", "name"),
    [
        (Call(os.system, f"touch {MARKER}"), f"{os.name}.system"),
        (Call(eval, f"open({MARKER!r}, 'w')"), "builtins.eval"),
        (Call(exec, f"open({MARKER!r}, 'w')"), "builtins.exec"),
        (Call(getattr, "text", "upper"), "builtins.getattr"),
        (Call(__import__, "antigravity"), "builtins.__import__"),
        (Call(vars(copyreg)["_reconstructor"], object, object, None), "copyreg._reconstructor"),
    ],
)
def test_pickles_that_would_run_are_refused_by_name(tmp_path, monkeypatch, protocol, call, name):
    monkeypatch.chdir(tmp_path)
    program = pickle.dumps({"w": call}, protocol)
    program = program.replace(b"c__builtin__", b"cbuiltins").replace(b"ccopy_reg", b"ccopyreg")  # Python 2's names
    assert f"refused: names '{name}'" in fault(opened, tmp_path / "evil.pth", program)
    assert not (tmp_path / MARKER).exists()


def test_pickle_would_have_run_them(tmp_path, monkeypatch):
    """So the marker is one."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Call(os.system, f"touch {MARKER}")))
    assert (tmp_path / MARKER).exists()


def test_hidden_names_are_refused(tmp_path):
    module = b"(iposix\nsystem\n."
    assert "refused: names 'posix.system'" in fault(opened, tmp_path / "a.pth", module)
    after_stop = b"\x80\x02cos\nsystem\n" + text("true") + b"\x85R0" + state_dict(tensor())[2:]
    assert "refused: names 'os.system'" in fault(opened, tmp_path / "b.pth", after_stop)
    escaped = b"\x80\x02cos\nsys\\(tem\n."
    assert r"names 'os.sys\\(tem'" in fault(opened, tmp_path / "d.pth", escaped)
    dotted = b"\x80\x04" + text("torch._utils") + text("_rebuild_tensor_v2.__globals__") + b"\x93."
    assert "names 'torch._utils._rebuild_tensor_v2.__globals__'" in fault(opened, tmp_path / "c.pth", dotted)


def test_nested_references_cost_nothing(tmp_path):
    """2^1000 elements by reference, as a value, a dict key and an argument."""
    doubling = b")q\0" + b"".join(b"h\0h\0\x86q\0" for _ in range(1000))
    for use in (b"N\x86.", b"}h\0Ns.", b"h\0Q.", b"ctorch\nSize\nh\0\x85R."):
        fault(opened, tmp_path / "x.pth", b"\x80\x02" + doubling + use)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "the file is empty (0 bytes)"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02", "a pickle; a file of torch before 1.6 has to be loaded"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (SAVED.read_bytes()[:3000], "truncated or damaged zip archive"),
        (SAVED.read_bytes()[:-1], "truncated or damaged zip archive"),
    ],
)
def test_other_files_are_recognised(tmp_path, content, says):
    path = tmp_path / "consolidated.00.pth"
    path.write_bytes(content)
    assert says in fault(PthFile, path)


def test_faulty_archives_are_refused(tmp_path):
    path, program = tmp_path / "x.pth", state_dict(tensor())
    compressed = torch_archive(path, program, {"data/0": bytes(16)}, zipfile.ZIP_DEFLATED)
    assert "member 'data.pkl' is compressed or encrypted" in fault(PthFile, compressed)
    assert "expected byte order 'little'" in fault(lambda: opened(path, program, byteorder=b"big"))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/weights", b"")
    assert "expected one member <folder>/data.pkl in the zip archive, got 0" in fault(PthFile, path)
    with zipfile.ZipFile(path, "w") as archive:
        for folder in "ab":
            archive.writestr(f"{folder}/data.pkl", program)
    assert "expected one member <folder>/data.pkl in the zip archive, got 2" in fault(PthFile, path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", program)
        archive.writestr("b/data.pkl", program)
    path.write_bytes(path.read_bytes().replace(b"b/data.pkl", b"a/data.pkl"))
    assert "two members of the zip archive have one name" in fault(PthFile, path)
    torch_archive(path, program, {"data/0": bytes(16)})
    path.write_bytes(path.read_bytes().replace(b"FloatStorage", b"ByteStorage\n"))
    assert "member 'data.pkl' does not match its checksum" in fault(PthFile, path)


def test_damage_anywhere_is_an_input_error_or_harmless(tmp_path):
    whole, chance = SAVED.read_bytes(), random.Random(0)
    for _ in range(600):
        damaged = bytearray(whole)
        for _ in range(3):
            damaged[chance.randrange(len(whole))] = chance.randrange(256)
        path = tmp_path / "damaged.pth"
        path.write_bytes(damaged)
        with suppress(InputError):
            file = PthFile(path)
            assert all(file.read(name).sum() is not None for name in file.tensors)
