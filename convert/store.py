"""A directory on a disk or in a bucket, as keys and bytes; writing a key is atomic and durable."""

from __future__ import annotations

import bisect
import contextlib
import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tensorstore as ts

from mllama_jax.errors import InputError

_BUCKET = "gs://"


class BucketPath:
    """As much of `pathlib.Path` as reading small files in a bucket takes."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")

    def __str__(self) -> str:
        return self.url

    def __fspath__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    def __truediv__(self, name: str) -> BucketPath:
        return BucketPath(f"{self.url}/{name}")

    def exists(self) -> bool:
        return self._content() is not None

    def read_bytes(self) -> bytes:
        content = self._content()
        if content is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.url)
        return content

    def _content(self) -> bytes | None:
        folder, _, name = self.url.rpartition("/")
        return Store(folder).read(name)


class BucketFile:
    """A file's bytes; a slice is read when it is asked for, as far as the file goes."""

    def __init__(self, path: BucketPath):
        folder, _, self._name = path.url.rpartition("/")
        self._store = Store(folder)

    def __getitem__(self, cut: slice) -> bytes:
        try:
            return self._store.read(self._name, cut) or b""
        except BeyondEnd:  # what is left is shorter than what was asked for
            with contextlib.suppress(BeyondEnd):
                return self._store.read(self._name, slice(cut.start, None)) or b""
            return b""

    def __len__(self) -> int:
        return bisect.bisect_left(range(2**44), True, key=lambda end: not self[end : end + 1])


class BeyondEnd(InputError):
    """A range of bytes that a file has not got."""


def is_bucket(location: str | os.PathLike[str]) -> bool:
    return os.fspath(location).startswith(_BUCKET)


def absolute(location: str | os.PathLike[str]) -> Path | BucketPath:
    """Where a checkpoint lies, whatever the working directory is."""
    return BucketPath(os.fspath(location)) if is_bucket(location) else Path(location).absolute()


class Store:
    """The files under `location`: a local directory, or `gs://bucket/path`.

    Methods raise InputError where the disk or the bucket refuses.
    """

    def __init__(self, location: str | os.PathLike[str]):
        self.location = os.fspath(location).rstrip("/")
        self.remote = is_bucket(location)
        self.url = self.location + "/" if self.remote else Path(location).absolute().as_uri() + "/"
        with explained(self.location):
            self._files = ts.KvStore.open(self.url).result()

    def read(self, key: str, cut: slice | None = None) -> bytes | None:
        """The content of `key`, or a slice of it; None where there is none."""
        with explained(f"{self.location}/{key}"):
            found = self._files.read(key, byte_range=cut).result()
        return bytes(found.value) if found.state == "value" else None

    def generation(self, key: str) -> bytes:
        """Changes whenever `key` is written."""
        with explained(f"{self.location}/{key}"):
            return self._files.read(key, byte_range=slice(0, 0)).result().stamp.generation

    def write(self, key: str, content: bytes) -> None:
        with explained(f"{self.location}/{key}"):
            self._files.write(key, content).result()

    def delete(self, key: str) -> None:
        with explained(f"{self.location}/{key}"):
            self._files.write(key, None).result()

    def names(self, prefix: str = "") -> list[str]:
        """Every key that begins with `prefix`, sorted."""
        behind = prefix[:-1] + chr(ord(prefix[-1]) + 1) if prefix else ""  # "" is the end of all
        with explained(self.location):
            return sorted(key.decode() for key in self._files.list(ts.KvStore.KeyRange(prefix, behind)).result())

    def top(self) -> list[str]:
        """The files and folders at its top, sorted; none where there is no such directory."""
        if self.remote:
            return sorted({key.partition("/")[0] for key in self.names()})
        try:
            return sorted(os.listdir(self.location or "/"))  # the root has lost its slash
        except FileNotFoundError:
            return []
        except OSError as error:
            raise InputError(f"{self.location}: {error.strerror}") from None

    def array(self, name: str, **spec: Any) -> ts.TensorStore:
        """Opens the Zarr array `name`; `spec` as TensorStore takes it."""
        where = f"{self.location}/{name}"
        with explained(where):
            return ts.open({"driver": "zarr3", "kvstore": f"{self.url}{name}/"} | spec).result()


@contextmanager
def explained(where: str) -> Iterator[None]:
    """TensorStore's errors as InputError: the operating system's word where it gives one, else its own."""
    try:
        yield
    except InputError:
        raise
    except ValueError as error:
        if str(error).startswith("OUT_OF_RANGE"):
            raise BeyondEnd(f"{where}: {' '.join(str(error).split())[:300]}") from None
        number = re.search(r"os_error_code='(\d+)'", str(error))
        reason = os.strerror(int(number[1])) if number else " ".join(str(error).split())[:300]
        raise InputError(f"{where}: {reason}") from None
