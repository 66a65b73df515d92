"""Our own layout: an Orbax checkpoint whose directory alone serves.

    text.layers_0.mlp.down.kernel/   a Zarr v3 array, uncompressed, for each parameter; and so on
    meta_only.../                    what only Meta's layout holds (see `apply.extras`); Orbax never looks at it
    config.json, tokenizer.json ...  as in Hugging Face's layout; params.json where Meta's files were the source
    manifest.json                    a SHA-256 for each array and each other file
    _METADATA                        Orbax's tree of parameters; written last

Orbax restores it as any tree that it saved with `use_ocdbt=False, use_zarr3=True`.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from mllama_jax.config import MllamaConfig
from mllama_jax.convert.apply import Extras, Parameters, paths
from mllama_jax.convert.axes import Shape
from mllama_jax.convert.files import array_bytes
from mllama_jax.convert.manifest import EXTRA, MANIFEST, TREE, VERSION, canonical, digest_of
from mllama_jax.convert.progress import Progress
from mllama_jax.convert.store import Store, explained
from mllama_jax.convert.table import table
from mllama_jax.model.mllama import abstract_parameters
from mllama_jax.model.quantize import quantization

# Chunks are the least that can be read. What a mesh may split is cut into at most 16, as far as chunks keep a quarter
# of a megabyte.
_PIECES, _SMALLEST = 16, 2**18
_IN_FLIGHT = 2**29  # bytes of arrays that go to disk together; of larger ones only one does


def write_arrays(store: Store, parameters: Parameters, config: MllamaConfig, extras: Extras, done: Progress) -> None:
    """Write every parameter that `done` does not know, the next being read while the last goes to disk."""
    quantize = quantization({path: parameter.dtype for path, parameter in parameters.items()})
    abstract = abstract_parameters(config, quantize=quantize)
    names = {path: leaf.names for path, leaf in paths(abstract).items()}
    stacks = {row.target: row.hf.stack for row in table(config)}

    def write(name: str, value: np.ndarray, chunk: list[int]) -> None:
        metadata = {
            "shape": value.shape,
            "data_type": value.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
            "fill_value": 0,
        }
        create = {"create": True, "delete_existing": True, "store_data_equal_to_fill_value": True}
        array = store.array(name, metadata=metadata, **create)
        with explained(f"{store.location}/{name}"):
            written = array.write(value, can_reference_source_data_indefinitely=True)
            digest = digest_of(array_bytes(name, value))
            written.result()
        done.add({name: {"dtype": value.dtype.name, "shape": list(value.shape), "sha256": digest}})

    waiting: deque[tuple[Future[None], int]] = deque()
    with ThreadPoolExecutor() as disk:
        for path, parameter in parameters.items():
            name = ".".join(path)
            if done.get(name) is None:
                value = np.ascontiguousarray(parameter.whole())
                while waiting and sum(size for _, size in waiting) + value.nbytes > _IN_FLIGHT:
                    waiting.popleft()[0].result()
                chunk = _chunk(value.shape, value.dtype.itemsize, names[path], stacks.get(path))
                waiting.append((disk.submit(write, name, value, chunk), value.nbytes))
        for future, _ in waiting:
            future.result()
    for name, value in extras.items():
        if done.get(EXTRA + name) is None:
            write(EXTRA + name, value, list(value.shape))


def _chunk(shape: Shape, itemsize: int, names: tuple[str | None, ...], stack: int | None) -> list[int]:
    """A chunk's shape: stacked parts apart, then the axes cut that a mesh may split."""
    chunk = [1 if axis == stack else n for axis, n in enumerate(shape)]
    left = _PIECES
    for axis, name in enumerate(names):
        if name not in (None, "embed"):
            limit = min(left, math.prod(chunk) * itemsize // _SMALLEST)
            cuts = max((n for n in (2, 4, 8, 16) if n <= limit and chunk[axis] % n == 0), default=1)
            chunk[axis] //= cuts
            left //= cuts
    return chunk


def write_index(
    store: Store, parameters: Parameters, files: Mapping[str, bytes], hf_names: str, done: Progress
) -> None:
    """Write the files that stand beside the arrays, and, last, what makes the directory a checkpoint."""
    tree = {"tree_metadata": {str(path): _tree_entry(path) for path in sorted(parameters)}}
    tree |= {"use_ocdbt": False, "use_zarr3": True, "store_array_data_equal_to_fill_value": True}
    written = json.dumps(tree | {"custom_metadata": None}).encode()
    digests = {name: digest_of(content) for name, content in {**files, TREE: written}.items()}
    for name in done.notes:
        digests[f"{name}/zarr.json"] = digest_of(store.read(f"{name}/zarr.json") or b"")
    manifest = {"version": VERSION, "hf_names": hf_names, "tensors": done.notes, "files": digests}
    for name, content in files.items():
        store.write(name, content)
    store.write(MANIFEST, canonical(manifest | {"sha256": digest_of(canonical(manifest))}))
    store.write(TREE, written)


def _tree_entry(path: tuple[str, ...]) -> dict[str, Any]:
    """How Orbax describes a leaf under dictionary keys."""
    return {
        "key_metadata": [{"key": key, "key_type": 2} for key in path],
        "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
    }
