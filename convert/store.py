"""A directory on a disk or in a bucket, as keys and bytes; writing a key is atomic and durable."""

from __future__ import annotations

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

    def read(self, key: str) -> bytes | None:
        """The content of `key`; None where there is none."""
        with explained(f"{self.location}/{key}"):
            found = self._files.read(key).result()
        return bytes(found.value) if found.state == "value" else None

    def write(self, key: str, content: bytes) -> None:
        with explained(f"{self.location}/{key}"):
            self._files.write(key, content).result()

    def delete(self, key: str) -> None:
        with explained(f"{self.location}/{key}"):
            self._files.write(key, None).result()

    def keys(self, prefix: str = "") -> list[str]:
        """Every key that begins with `prefix`, sorted."""
        behind = prefix[:-1] + chr(ord(prefix[-1]) + 1) if prefix else ""  # "" is the end of all
        with explained(self.location):
            return sorted(key.decode() for key in self._files.list(ts.KvStore.KeyRange(prefix, behind)).result())

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
        number = re.search(r"os_error_code='(\d+)'", str(error))
        reason = os.strerror(int(number[1])) if number else " ".join(str(error).split())[:300]
        raise InputError(f"{where}: {reason}") from None
