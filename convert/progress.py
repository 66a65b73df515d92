"""What of an unfinished conversion is on disk, so that the same command goes on where it stopped."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from types import TracebackType
from typing import Any
from urllib.parse import quote

from tqdm import tqdm

from mllama_jax.convert.store import Store
from mllama_jax.errors import InputError

_FOLDER = "unfinished/"
_JOB = _FOLDER + "job.json"


def unfinished(store: Store) -> bool:
    """Whether a conversion into `store` has begun and not ended."""
    return store.read(_JOB) is not None


def check_new(store: Store) -> None:
    """Raise InputError where `store` is a file or holds anything."""
    expected = "expected a new or empty directory; choose another target"
    if not store.remote and os.path.isfile(store.location):
        raise InputError(f"{store.location}: is a file; {expected}")
    # a kill may leave the folder of notes with nothing in it
    held = [name for name in store.top() if f"{name}/" != _FOLDER] or store.names(_FOLDER)
    if held:
        more = f" and {len(held) - 1} more" if held[1:] else ""
        raise InputError(f"{store.location}: already holds {held[0]}{more}; {expected}")


class Progress:
    """Small files that note the finished tensors, written when these are on disk; gone when all is done.

    Args:
        job: what is converted into what: a target that holds part of another job is refused.
        sizes: bytes of every tensor by its key, for the progress bar.
    """

    def __init__(self, store: Store, job: Mapping[str, Any], sizes: Mapping[str, int], title: str):
        self.store, self.sizes = store, sizes
        begun = store.read(_JOB)
        if begun is None:
            check_new(store)
            store.write(_JOB, json.dumps(job, indent=1).encode())
        elif begun != json.dumps(job, indent=1).encode():
            raise InputError(
                f"{store.location}: holds part of another conversion ({_described(begun)}); delete it or choose "
                "another target"
            )
        self.notes: dict[str, dict[str, Any]] = {}
        for key in store.names(_FOLDER):
            if key != _JOB:
                self.notes |= json.loads(store.read(key) or b"{}")
        self.resumed = len(self.notes)
        before = sum(sizes[key] for key in self.notes)
        self.bar = tqdm(
            total=sum(sizes.values()), initial=before, unit="B", unit_scale=True, desc=title, disable=None
        )  # fmt: skip

    def get(self, key: str) -> dict[str, Any] | None:
        return self.notes.get(key)

    def add(self, notes: Mapping[str, dict[str, Any]]) -> None:
        """Note tensors that are on disk, by their keys."""
        self.store.write(f"{_FOLDER}{quote(next(iter(notes)), safe='')}", json.dumps(notes).encode())
        self.notes |= notes
        self.bar.update(sum(self.sizes[key] for key in notes))

    def within(self, file: str) -> FileProgress:
        return FileProgress(self, file)

    def finish(self) -> None:
        """Forget the job: the target is whole."""
        for key in self.store.names(_FOLDER):
            if key != _JOB:
                self.store.delete(key)
        self.store.delete(_JOB)
        if not self.store.remote:
            shutil.rmtree(os.path.join(self.store.location, _FOLDER))  # with what a kill may have left of locks

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.bar.close()


class FileProgress:
    """The part of a Progress that concerns the tensors of one file."""

    def __init__(self, progress: Progress, file: str):
        self.progress, self.file = progress, file

    def get(self, name: str) -> dict[str, Any] | None:
        return self.progress.get(f"{self.file}/{name}")

    def add(self, notes: Mapping[str, dict[str, Any]]) -> None:
        self.progress.add({f"{self.file}/{name}": note for name, note in notes.items()})


def _described(job: bytes) -> str:
    try:
        return ", ".join(f"{key} {value}" for key, value in json.loads(job).items() if key != "fingerprint")
    except (ValueError, AttributeError):
        return "of which nothing more can be read"
