"""Our own layout's manifest, and its arrays: `orbax` describes the whole directory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import tensorstore as ts

from mllama_jax.convert.axes import Shape
from mllama_jax.convert.files import parse_json
from mllama_jax.convert.store import Store, explained
from mllama_jax.errors import InputError

TREE, MANIFEST, EXTRA = "_METADATA", "manifest.json", "meta_only."
VERSION = 1
DTYPES = {dtype.name: dtype for dtype in map(np.dtype, (ml_dtypes.bfloat16, np.float32, np.float16))}
_STORED = DTYPES | {"int8": np.dtype(np.int8), "uint8": np.dtype(np.uint8)}


class StoredArrays:
    """The arrays of a checkpoint by name; nothing is read before an array is indexed."""

    def __init__(self, store: Store, manifest: Mapping[str, Any]):
        self.store, self.entries = store, manifest["tensors"]

    def shape(self, name: str) -> Shape:
        return tuple(self.entries[name]["shape"])

    def dtype(self, name: str) -> np.dtype:
        return _STORED[self.entries[name]["dtype"]]

    def read(self, name: str) -> StoredArray:
        return StoredArray(self, name)


class StoredArray:
    """`array[index]` reads the chunks in which that slice lies."""

    def __init__(self, arrays: StoredArrays, name: str):
        self.arrays, self.name = arrays, name

    def __getitem__(self, index: Any) -> np.ndarray:
        where = f"{self.arrays.store.location}/{self.name}"
        array = self.arrays.store.array(self.name, open=True, fill_missing_data_reads=False)
        expected, found = self.arrays.entries[self.name], (array.dtype.name, list(array.shape))
        if found != (expected["dtype"], expected["shape"]):
            raise InputError(
                f"{where}: expected {expected['dtype']} {expected['shape']} as in {MANIFEST}, got {found[0]} "
                f"{found[1]}; copy or convert again"
            )
        with explained(where):
            wanted = array[index][ts.d[:].translate_to[0]]
            out = np.empty(wanted.shape, _STORED[expected["dtype"]])  # NumPy's large arrays take huge pages
            ts.array(out, copy=False, write=True).write(wanted).result()
            return out


def read_manifest(store: Store) -> dict[str, Any]:
    """The manifest, once it is known to be whole: it is written in one way only."""
    content, where = store.read(MANIFEST), f"{store.location}/{MANIFEST}"
    if content is None:
        raise InputError(f"{where}: is missing; expected a checkpoint that `mllama convert` wrote; convert again")
    manifest = parse_json(content, where)
    check = manifest.pop("sha256", None)
    if manifest.get("version") != VERSION or check != digest_of(canonical(manifest)):
        raise InputError(f"{where}: is damaged or of another version of this program; copy or convert again")
    if canonical(manifest | {"sha256": check}) != content:
        raise InputError(f"{where}: is damaged; copy or convert again")
    return manifest


def canonical(manifest: Mapping[str, Any]) -> bytes:
    return (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode()


def digest_of(content: bytes | memoryview) -> str:
    return hashlib.sha256(content).hexdigest()


def damaged_files(store: Store, manifest: Mapping[str, Any]) -> list[str]:
    """The files beside the arrays that are not as they were written."""
    return [name for name, digest in manifest["files"].items() if digest_of(store.read(name) or b"") != digest]
