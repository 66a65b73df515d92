"""Files of torch.save without torch: a lazy reader, and a writer that torch.load(weights_only=True) reads.

Format (torch/serialization.py, caffe2/serialize/inline_container.cc): a zip archive of uncompressed members under one
folder: `data.pkl`, the pickled state dict (see `unpickle`), and `data/<key>`, the bytes of one storage each.
"""

import math
import pickle
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mllama_jax.convert.files import (
    ArrayLike,
    Done,
    GrowingFile,
    MadeAhead,
    Region,
    TensorFile,
    guess_kind,
    nbytes,
    plain_sizes,
    valid_shape,
)
from mllama_jax.convert.unpickle import STORAGES, UNTYPED, UNTYPED_STORAGE, Callables, Storage, View, unpickle
from mllama_jax.errors import InputError

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, length of the name, length of the extra field
_MAX_PICKLE = 64 * 2**20
_ALIGNMENT = 64  # of storages, as in torch's files
_ZIP64_SIZE = 2**30  # zip's plain size fields end at 4 GiB, and zipfile leaves them earlier


class PthFile(TensorFile):
    """A .pth file of one state dict. `tensors` maps each name to its dtype, shape, byte range and strides.

    Names, storages and bounds are checked on opening, before any tensor is read, and nothing the file holds is run.
    InputError names the file and what is wrong with it.
    """

    def __init__(self, path: str | Path):
        super().__init__(path)
        self._members = self._directory()
        self._starts: dict[str, tuple[int, int]] = {}
        if "byteorder" in self._members and self._small_member("byteorder") != b"little":
            raise InputError(f"{self.path}: expected byte order 'little'; save it again on a little-endian machine")
        state = unpickle(self._small_member("data.pkl"), f"{self.path}: data.pkl")
        if not isinstance(state, dict):
            raise InputError(f"{self.path}: expected a state dict (name to tensor), got a {type(state).__name__}")
        self.tensors = {name: self._region(name, value) for name, value in state.items()}

    def _directory(self) -> dict[str, zipfile.ZipInfo]:
        """The members by their name within the archive's one folder."""
        head = self.map[:32]
        if not head.startswith(b"PK\x03\x04"):
            raise InputError(
                f"{self.path}: not a zip archive as torch.save writes it, but {guess_kind(head)}; "
                "a file of torch before 1.6 has to be loaded and saved again with a current torch"
            )
        try:
            with zipfile.ZipFile(self.path) as archive:
                infos = archive.infolist()
        except (zipfile.BadZipFile, ValueError, OverflowError, struct.error, NotImplementedError, OSError) as error:
            raise InputError(f"{self.path}: truncated or damaged zip archive ({error}); download it again") from None
        roots = {info.filename.removesuffix("/data.pkl") for info in infos if info.filename.endswith("/data.pkl")}
        if len(roots) != 1:
            raise InputError(f"{self.path}: expected one member <folder>/data.pkl in the zip archive, got {len(roots)}")
        root = roots.pop()
        members = {info.filename.removeprefix(root + "/"): info for info in infos}
        if len(members) < len(infos):
            raise InputError(f"{self.path}: two members of the zip archive have one name; download it again")
        return members

    def _locate(self, member: str) -> tuple[int, int]:
        """Start and length of a member's bytes. The directory omits the extra field by which torch aligns storages."""
        if member not in self._members:
            raise InputError(f"{self.path}: member {member!r} is missing; the file is incomplete, download it again")
        info = self._members[member]
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise InputError(
                f"{self.path}: member {member!r} is compressed or encrypted; save it again with torch.save"
            )
        header = self.map[info.header_offset : info.header_offset + _LOCAL_HEADER.size]
        if len(header) < _LOCAL_HEADER.size or not header.startswith(b"PK\x03\x04"):
            raise InputError(f"{self.path}: member {member!r} has no local header; download the file again")
        _, name_length, extra_length = _LOCAL_HEADER.unpack(header)
        start = info.header_offset + _LOCAL_HEADER.size + name_length + extra_length
        if start + info.file_size > len(self.map):
            raise InputError(f"{self.path}: member {member!r} ends beyond the file; download it again")
        return start, info.file_size

    def _small_member(self, member: str) -> bytes:
        start, size = self._locate(member)
        if size > _MAX_PICKLE:
            raise InputError(f"{self.path}: member {member!r}: expected at most {_MAX_PICKLE} bytes, got {size}")
        data = self.map[start : start + size]
        if zlib.crc32(data) != self._members[member].CRC:
            raise InputError(f"{self.path}: member {member!r} does not match its checksum; download the file again")
        return data

    def _storage(self, where: str, storage: Storage) -> int:
        """The byte at which a storage starts."""
        member = f"data/{storage.key}"
        if member not in self._starts:
            self._starts[member] = self._locate(member)
        start, size = self._starts[member]
        if size != storage.nbytes:
            raise InputError(f"{where}: expected {storage.nbytes} bytes in {member!r}, got {size}; download it again")
        return start

    def _region(self, name: object, view: object) -> Region:
        where = f"{self.path}: entry {name!r}"
        if not isinstance(name, str) or not isinstance(view, View):
            raise InputError(
                f"{where}: expected a tensor, got a {type(view).__name__}; save a flat dict of name to tensor"
            )
        shape, stride, itemsize = view.shape, view.stride, view.dtype.itemsize
        if not valid_shape(shape) or not plain_sizes(stride) or len(shape) != len(stride):
            raise InputError(f"{where}: expected a shape and strides of non-negative integers of one length")
        if type(view.offset) is not int or view.offset < 0:
            raise InputError(f"{where}: expected a storage offset of 0 or more, got {view.offset!r}")
        span = 0 if 0 in shape else 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        if (view.offset + span) * itemsize > view.storage.nbytes:
            raise InputError(
                f"{where}: the view ends at byte {(view.offset + span) * itemsize} of a storage of "
                f"{view.storage.nbytes}; the file is damaged, download it again"
            )
        start = self._storage(where, view.storage) + view.offset * itemsize
        strides = tuple(step * itemsize for step in stride)
        return Region(view.dtype, shape, start, start + span * itemsize, strides)


def write_pth(path: str | Path, tensors: Mapping[str, ArrayLike], done: Done | None = None) -> None:
    """Writes `tensors`, one at a time, to `path + ".partial"`, and renames that to `path` once it is safely on disk.

    The bytes depend on nothing but the tensors and their order. What `done` knows is not made again. InputError for a
    dtype that torch lacks.
    """
    path = Path(path)
    pickled = _pickle(path, tensors)
    members: list[zipfile.ZipInfo] = []

    with GrowingFile(path, done) as file, MadeAhead(tensors, done) as made:

        def member(name: str, size: int) -> zipfile.ZipInfo:
            """A member at the end of the file, its data aligned."""
            info = zipfile.ZipInfo(f"archive/{name}")
            info.create_system, info.external_attr, info.CRC = 0, 0o600 << 16, 0
            info.file_size, info.compress_size, info.header_offset = size, size, file.end
            padding = -(file.end + len(_header(info)) + 4) % _ALIGNMENT
            info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
            members.append(info)
            return info

        def add(name: str, data: bytes) -> None:
            info = member(name, len(data))
            info.CRC = zlib.crc32(data)
            file.append(_header(info), data)

        add("data.pkl", pickled)
        add("byteorder", b"little")
        for key, (name, array) in enumerate(tensors.items()):
            info, note = member(f"data/{key}", nbytes(array)), file.note(name, nbytes(array))
            if note is None:
                data = made[name]
                info.CRC = zlib.crc32(data)
                file.segment(name, {"crc32": info.CRC}, _header(info), data)
            else:
                info.CRC = note["crc32"]
                file.skip(len(_header(info)) + info.file_size)
        add("version", b"3\n")

        def directory(raw: BinaryIO) -> None:
            with zipfile.ZipFile(raw, "w") as archive:
                archive.filelist.extend(members)

        file.finish(directory)


def _header(info: zipfile.ZipInfo) -> bytes:
    return info.FileHeader(info.file_size >= _ZIP64_SIZE)


def _pickle(path: Path, tensors: Mapping[str, ArrayLike]) -> bytes:
    """The protocol 2 pickle by which torch rebuilds a dict of contiguous tensors, storage `i` holding tensor `i`."""
    storages = {dtype: kind for kind, dtype in STORAGES.items() if kind != UNTYPED_STORAGE}
    untyped = {dtype: kind for kind, dtype in UNTYPED.items()}
    program = [b"\x80\x02}("]
    for key, (name, array) in enumerate(tensors.items()):
        dtype, shape, count = np.dtype(array.dtype), tuple(array.shape), math.prod(array.shape)
        if dtype not in storages and dtype not in untyped:
            raise InputError(f"{path}: tensor {name!r}: torch has no dtype {dtype}; convert it first")
        strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        kind, count, rebuild, extra = (
            (storages[dtype], count, Callables.TENSOR, b"")
            if dtype in storages
            else (UNTYPED_STORAGE, count * dtype.itemsize, Callables.UNTYPED_TENSOR, _global(untyped[dtype]))
        )
        storage = b"(" + _text("storage") + _global(kind) + _text(str(key)) + _text("cpu") + _int(count) + b"tQ"
        hooks = _global(Callables.ORDERED_DICT) + b")R"
        arguments = (
            storage + _int(0) + _ints(shape) + _ints(strides) + b"\x89" + hooks + extra
        )  # \x89: needs no gradient
        program.append(_text(name) + _global(rebuild) + b"(" + arguments + b"tR")
    return b"".join([*program, b"u."])


def _global(name: str) -> bytes:
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def _text(text: str) -> bytes:
    encoded = text.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def _int(value: int) -> bytes:
    if value < 2**31:
        return b"J" + struct.pack("<i", value)
    encoded = pickle.encode_long(value)
    return b"\x8a" + bytes([len(encoded)]) + encoded


def _ints(values: Sequence[int]) -> bytes:
    return b"(" + b"".join(map(_int, values)) + b"t"
