"""What checkpoint files of every format share: mapped reading, strict JSON, replacement in one step."""

import json
import math
import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from mllama_jax.errors import InputError

# What turns up under a checkpoint's file name, by its first bytes.
_SIGNATURES = (
    (b"version https://git-lfs", "a Git LFS pointer (run `git lfs pull`)"),
    (b"PK\x03\x04", "a zip archive, as torch.save writes"),
    (b"\x80\x02", "a pickle"),
    (b"\x80\x03", "a pickle"),
    (b"\x80\x04", "a pickle"),
    (b"\x80\x05", "a pickle"),
    (b"\x1f\x8b", "a gzip file"),
    (b"GGUF", "a GGUF file"),
    (b"\x89HDF", "an HDF5 file"),
    (b"<", "a web page"),
)
_MAX_DIMENSIONS = 64  # NumPy's own limit
_MAX_ELEMENTS = 2**48


class ArrayLike(Protocol):
    """What the writers take: an array, or anything that becomes one only when its turn to be written comes."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> Any: ...
    def __array__(self) -> np.ndarray: ...


@dataclass(frozen=True)
class LazyArray:
    """An array of known `shape` and `dtype` that `make()` computes when it is written: writers hold one at a time."""

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.make(), dtype=dtype)


@dataclass(frozen=True)
class Region:
    """Where a tensor lies: bytes `start` to `stop` of its file; `strides`, in bytes, only if not contiguous."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    stop: int
    strides: tuple[int, ...] | None = None


class TensorFile:
    """A mapped file of named tensors. Nothing is read until a view is used, and views are read-only."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.map = map_file(self.path)
        self.tensors: Mapping[str, Region] = {}

    def read(self, name: str) -> np.ndarray:
        """The tensor `name` as a zero-copy view of the file; KeyError for a name that `tensors` does not hold."""
        region = self.tensors[name]
        return np.ndarray(region.shape, region.dtype, self.map, region.start, region.strides)


def map_file(path: Path) -> mmap.mmap:
    """Maps a file for reading; InputError if it is absent, unreadable, not a file, or empty."""
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise InputError(f"{path}: the file is empty (0 bytes); download or copy it again")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def guess_kind(head: bytes) -> str:
    """Names the format that a file's first bytes suggest, for error messages."""
    return next((kind for signature, kind in _SIGNATURES if head.startswith(signature)), "no known format")


def plain_sizes(sizes: object) -> bool:
    """Whether a file's word for a shape or for strides is a list or tuple of plain integers, none absurd."""
    return (
        isinstance(sizes, list | tuple)
        and len(sizes) <= _MAX_DIMENSIONS
        and all(type(size) is int and 0 <= size <= _MAX_ELEMENTS for size in sizes)
    )


def valid_shape(shape: Any) -> bool:
    """Whether NumPy can hold a file's word for a shape."""
    return plain_sizes(shape) and math.prod(max(size, 1) for size in shape) <= _MAX_ELEMENTS


def parse_json(text: bytes, origin: str) -> dict[str, Any]:
    """A JSON object, without duplicate keys and NaN; InputError, beginning with `origin`, for anything else."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise InputError(f"{origin}: key {twice!r} appears twice; expected it once")
        return found

    def refuse(constant: str) -> None:
        raise InputError(f"{origin}: holds {constant}, which is not JSON")

    try:
        value = json.loads(text.decode(), object_pairs_hook=unique, parse_constant=refuse)
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{origin}: invalid JSON ({reason}); download or copy the file again") from None
    if not isinstance(value, dict):
        raise InputError(f"{origin}: expected a JSON object, got a {type(value).__name__}")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds one JSON object; InputError says what is wrong with it."""
    try:
        return parse_json(path.read_bytes(), str(path))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def array_bytes(name: str, array: ArrayLike) -> memoryview:
    """An array's bytes in C order; ValueError if it is not of the shape and dtype by which the header announced it."""
    made = np.asarray(array)
    if (made.shape, made.dtype) != (tuple(array.shape), array.dtype):
        raise ValueError(f"{name}: announced as {array.dtype} {array.shape}, made as {made.dtype} {made.shape}")
    return np.ascontiguousarray(made).reshape(-1).view(np.uint8).data  # the buffer protocol knows no bfloat16


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Opens `path + ".partial"` for writing and renames it to `path` once all is on disk; removes it on an error."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
