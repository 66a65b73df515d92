"""What checkpoint files of every format share: mapped reading, strict JSON, writing that can be resumed."""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from mllama_jax.convert.store import BucketFile, BucketPath
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


class Tensors(Protocol):
    """Named tensors that are read when they are used."""

    def read(self, name: str) -> Any: ...


class TensorFile:
    """A file of named tensors, mapped or in a bucket. Nothing is read until it is used, and arrays are read-only."""

    def __init__(self, path: str | Path | BucketPath):
        self.path = path if isinstance(path, BucketPath) else Path(path)
        self.map = BucketFile(self.path) if isinstance(self.path, BucketPath) else map_file(self.path)
        self.tensors: Mapping[str, Region] = {}

    def read(self, name: str) -> np.ndarray:
        """The tensor `name`, of a mapped file as a view; KeyError for a name that `tensors` does not hold."""
        region = self.tensors[name]
        if isinstance(self.map, BucketFile):
            return np.ndarray(region.shape, region.dtype, self.map[region.start : region.stop])
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


def read_json(path: Path | BucketPath) -> dict[str, Any]:
    """A file that holds one JSON object; InputError says what is wrong with it."""
    try:
        return parse_json(path.read_bytes(), str(path))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def nbytes(array: ArrayLike) -> int:
    return math.prod(array.shape) * np.dtype(array.dtype).itemsize


def array_bytes(name: str, array: ArrayLike) -> memoryview:
    """An array's bytes in C order; ValueError if it is not of the shape and dtype by which the header announced it."""
    made = np.asarray(array)
    if (made.shape, made.dtype) != (tuple(array.shape), array.dtype):
        raise ValueError(f"{name}: announced as {array.dtype} {array.shape}, made as {made.dtype} {made.shape}")
    return np.ascontiguousarray(made).reshape(-1).view(np.uint8).data  # the buffer protocol knows no bfloat16


class Done(Protocol):
    """Which segments of a file an earlier run has written, each with what it noted."""

    def get(self, name: str) -> dict[str, Any] | None: ...
    def add(self, notes: Mapping[str, dict[str, Any]]) -> None: ...


class MadeAhead:
    """Bytes of arrays that are asked for in order: the next is made while the caller works on the last."""

    def __init__(self, tensors: Mapping[str, ArrayLike], done: Done | None):
        self._left = iter([name for name in tensors if done is None or done.get(name) is None])
        self._tensors, self._worker = tensors, ThreadPoolExecutor(1)
        self._next = self._start()

    def _start(self) -> tuple[str, Future[memoryview]] | None:
        name = next(self._left, None)
        return None if name is None else (name, self._worker.submit(array_bytes, name, self._tensors[name]))

    def __getitem__(self, name: str) -> memoryview:
        if self._next is None or self._next[0] != name:  # was to be skipped, but its file has not got it
            return array_bytes(name, self._tensors[name])
        made = self._next[1].result()
        self._next = self._start()
        return made

    def __enter__(self) -> MadeAhead:
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.shutdown(cancel_futures=True)


# Segments become known as finished in groups, for each group waits for the disk: so many bytes, or so many segments.
_GROUP_BYTES, _GROUP = 2**24, 16


class GrowingFile:
    """A file that is written segment by segment, as `path + ".partial"`, and has its name once all is on disk.

    The disk works on one segment while the caller makes the next. After an error the partial file is removed, or, with
    `done`, kept for a later run, which gives the same segments again and skips those that `done` knows.
    """

    def __init__(self, path: Path, done: Done | None = None):
        self.path, self.done, self.end = path, done, 0
        self._partial = path.with_name(path.name + ".partial")
        if done is None or not self._partial.exists():
            self._partial.open("wb").close()
        self._file = self._partial.open("r+b")
        self._before = self._partial.stat().st_size
        self._disk = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None
        self._group: dict[str, dict[str, Any]] = {}
        self._group_bytes = 0

    def note(self, name: str, size: int) -> dict[str, Any] | None:
        """What was noted beside the segment `name`, of at least `size` bytes, if an earlier run wrote it."""
        return self.done.get(name) if self.done and self.end + size <= self._before else None

    def skip(self, size: int) -> None:
        """Pass over a segment of an earlier run."""
        self.end += size

    def append(self, *pieces: bytes | memoryview) -> None:
        """Write what is always written anew."""
        self._submit(pieces, None)

    def segment(self, name: str, note: dict[str, Any], *pieces: bytes | memoryview) -> None:
        """Write a segment; once it is on disk, `done` learns of it."""
        self._submit(pieces, (name, note))

    def _submit(self, pieces: Sequence[bytes | memoryview], finished: tuple[str, dict[str, Any]] | None) -> None:
        self.wait()
        self._pending = self._disk.submit(self._write, self.end, pieces, finished)
        self.end += sum(map(len, pieces))

    def _write(
        self, start: int, pieces: Sequence[bytes | memoryview], finished: tuple[str, dict[str, Any]] | None
    ) -> None:
        self._file.seek(start)
        for piece in pieces:
            self._file.write(piece)
        self._file.flush()
        if finished is not None:
            self._group |= dict([finished])
            self._group_bytes += sum(map(len, pieces))
            if self._group_bytes >= _GROUP_BYTES or len(self._group) >= _GROUP:
                self._settle()

    def _settle(self) -> None:
        """Wait for the disk, then let `done` learn of the segments that are on it."""
        if self.done is not None and self._group:
            os.fdatasync(self._file.fileno())
            self.done.add(self._group)
        self._group, self._group_bytes = {}, 0

    def finish(self, write: Callable[[BinaryIO], None]) -> None:
        """Let `write` put an ending behind all segments."""
        self.wait()
        self._file.seek(self.end)
        write(self._file)
        self.end = self._file.tell()

    def wait(self) -> None:
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def __enter__(self) -> GrowingFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.wait()
                self._settle()
                self._file.truncate(self.end)
                os.fsync(self._file.fileno())
                os.replace(self._partial, self.path)
        finally:
            self._disk.shutdown()
            with suppress(OSError):
                self._file.close()
            if self.done is None and self._partial.exists():
                self._partial.unlink()
