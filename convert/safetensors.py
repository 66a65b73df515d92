"""Safetensors files: a strict lazy reader, and a writer whose bytes are those of the safetensors library.

Format (https://github.com/huggingface/safetensors): a little-endian u64 header length, a JSON header that gives each
tensor's dtype, shape and byte range within the rest, and the rest.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
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
    parse_json,
    valid_shape,
)
from mllama_jax.convert.store import BucketPath
from mllama_jax.errors import InputError

# In the order by which the library sorts tensors, last first: large items come first, so all are aligned.
DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "I16": np.dtype(np.int16),
    "U16": np.dtype(np.uint16),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I32": np.dtype(np.int32),
    "U32": np.dtype(np.uint32),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "I64": np.dtype(np.int64),
    "U64": np.dtype(np.uint64),
}
_MAX_HEADER = 100_000_000  # the library's limit


class SafetensorsFile(TensorFile):
    """A safetensors file. `tensors` maps each name to its dtype, shape and byte range; `metadata` is str to str.

    The header is checked in full on opening: every byte of the data belongs to exactly one tensor. InputError names the
    file and what is wrong with it.
    """

    def __init__(self, path: str | Path | BucketPath):
        super().__init__(path)
        header, data_start = self._header()
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        if not isinstance(self.metadata, dict) or not all(isinstance(value, str) for value in self.metadata.values()):
            raise InputError(f"{self.path}: header key '__metadata__': expected an object of strings")
        self.tensors = {name: self._region(name, entry, data_start) for name, entry in header.items()}
        self._check_coverage(data_start)

    def _header(self) -> tuple[dict, int]:
        head = self.map[0:32]
        length = int.from_bytes(head[:8], "little")
        if len(head) < 8 or length > _MAX_HEADER or head[8:9] not in (b"{", b""):
            raise InputError(
                f"{self.path}: not a safetensors file: expected 8 bytes of header length (at most {_MAX_HEADER}) "
                f"and a JSON object, got {len(self.map)} bytes that begin {head[:9]!r} "
                f"(length {length}), {guess_kind(head)}"
            )
        header = self.map[8 : 8 + length]
        if len(header) < length:
            raise InputError(
                f"{self.path}: truncated: expected a header of {length} bytes, got {len(header)}; download it again"
            )
        return parse_json(header, f"{self.path}: header"), 8 + length

    def _region(self, name: str, entry: object, data_start: int) -> Region:
        where = f"{self.path}: tensor {name!r}"
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise InputError(f"{where}: expected an object with just dtype, shape and data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise InputError(f"{where}: dtype {dtype!r} is not supported; expected one of {', '.join(DTYPES)}")
        if not valid_shape(shape):
            raise InputError(f"{where}: expected a shape of non-negative integers, got {str(shape)[:100]!r}")
        match offsets:
            case [start, stop] if type(start) is int and type(stop) is int and 0 <= start <= stop:
                expected = math.prod(shape) * DTYPES[dtype].itemsize
            case _:
                raise InputError(f"{where}: expected data_offsets [start, stop], got {str(offsets)[:100]!r}")
        if stop - start != expected:
            raise InputError(f"{where}: {dtype} {shape} takes {expected} bytes, but data_offsets give {stop - start}")
        return Region(DTYPES[dtype], tuple(shape), data_start + start, data_start + stop)

    def _check_coverage(self, data_start: int) -> None:
        position = data_start
        for name, region in sorted(self.tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
            if region.start != position:
                fault = "overlaps the tensor before it" if region.start < position else "leaves a gap before it"
                expected, got = position - data_start, region.start - data_start
                raise InputError(f"{self.path}: tensor {name!r} {fault}: expected offset {expected}, got {got}")
            position = region.stop
        if len(end := self.map[position - 1 : position + 1]) != 1:
            fault = "truncated" if not end else "bytes after the last tensor"
            raise InputError(
                f"{self.path}: {fault}: expected {position} bytes, got {len(self.map)}; download or copy it again"
            )


def write_safetensors(
    path: str | Path, tensors: Mapping[str, ArrayLike], metadata: Mapping[str, str], done: Done | None = None
) -> None:
    """Writes `tensors`, one at a time, to `path + ".partial"`, and renames that to `path` once it is safely on disk.

    The order is the library's (by dtype, then name), and so are the bytes. transformers wants `{"format": "pt"}` as
    `metadata`. What `done` knows is not made again. InputError for a dtype that the format lacks.
    """
    path = Path(path)
    codes = {dtype: code for code, dtype in DTYPES.items()}
    rank = {dtype: -place for place, dtype in enumerate(codes)}
    for name, array in tensors.items():
        if np.dtype(array.dtype) not in codes:
            raise InputError(f"{path}: tensor {name!r}: safetensors cannot hold dtype {array.dtype}; convert it first")
    ordered = sorted(tensors.items(), key=lambda item: (rank[np.dtype(item[1].dtype)], item[0]))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, array in ordered:
        start, end = end, end + nbytes(array)
        header[name] = {"dtype": codes[np.dtype(array.dtype)], "shape": list(array.shape), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with GrowingFile(path, done) as file, MadeAhead(dict(ordered), done) as made:
        file.append(len(text).to_bytes(8, "little") + text)
        for name, array in ordered:
            if file.note(name, nbytes(array)) is None:
                file.segment(name, {}, made[name])
            else:
                file.skip(nbytes(array))
