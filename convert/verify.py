"""`verify`: whether a checkpoint is what was written, and whether its numbers are numbers."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from tqdm import tqdm

from mllama_jax.convert.files import array_bytes
from mllama_jax.convert.manifest import StoredArrays, damaged_files, digest_of
from mllama_jax.convert.sources import Checkpoint, open_checkpoint
from mllama_jax.convert.store import Store
from mllama_jax.errors import InputError


def verify(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Read every byte of a checkpoint of any layout.

    Returns:
        `damaged`: names of the tensors and files that differ from the manifest, each with the reason; `nan` and
        `infinite`: counts of such values by tensor, where there are any; `manifest`: whether there was one to compare
        with, which only our layout has; `tensors`, `bytes`, `seconds`.
    """
    start = time.monotonic()
    checkpoint = open_checkpoint(directory)
    report: dict[str, Any] = {"directory": str(directory), "layout": checkpoint.layout}
    report |= {"manifest": checkpoint.layout == "orbax", "damaged": {}, "nan": {}, "infinite": {}}
    count = size = 0
    if checkpoint.layout == "orbax":
        for name in damaged_files(Store(directory), checkpoint.manifest):
            report["damaged"][name] = "is not what was written"
    for name, value in _tensors(checkpoint, report["damaged"]):
        count, size = count + 1, size + value.nbytes
        nan, infinite = _not_finite(value)
        if nan:
            report["nan"][name] = report["nan"].get(name, 0) + nan
        if infinite:
            report["infinite"][name] = report["infinite"].get(name, 0) + infinite
    return report | {"tensors": count, "bytes": size, "seconds": round(time.monotonic() - start, 3)}


def check(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """`verify`'s report, once it is known that nothing is damaged; InputError names the first that is."""
    report = verify(directory)
    if report["damaged"]:
        (name, reason), *others = report["damaged"].items()
        more = f" and {len(others)} more" if others else ""
        raise InputError(f"{directory}: damaged: {name}{more} ({reason}); copy or convert the checkpoint again")
    return report


def _tensors(checkpoint: Checkpoint, damaged: dict[str, str]) -> Iterator[tuple[str, np.ndarray]]:
    """Each tensor, in Meta's layout each part of it, one at a time; those that are damaged are noted by name."""
    names = checkpoint.manifest["tensors"] if checkpoint.layout == "orbax" else checkpoint.shapes
    stored = StoredArrays(Store(checkpoint.directory), checkpoint.manifest) if checkpoint.layout == "orbax" else None
    for name in tqdm(names, unit="tensor", desc="verifying", leave=False, disable=None):
        if stored is None:
            for part in checkpoint.parts(name):
                yield name, part
            continue
        try:
            value = stored.read(name)[...]
        except InputError as error:
            damaged.setdefault(name, str(error))
            continue
        if digest_of(array_bytes(name, value)) != stored.entries[name]["sha256"]:
            damaged.setdefault(name, "is not what was written")
        yield name, value


def _not_finite(value: np.ndarray) -> tuple[int, int]:
    """How many values are NaN, and how many infinite. By 16 million at a time: the masks take memory."""
    if value.dtype.kind in "biu":
        return 0, 0
    nan = infinite = 0
    flat = value.reshape(-1)
    for start in range(0, flat.size, 2**24):
        block = flat[start : start + 2**24]
        if not np.isfinite(block).all():
            nan += int(np.isnan(block).sum())
            infinite += int(np.isinf(block).sum())
    return nan, infinite
