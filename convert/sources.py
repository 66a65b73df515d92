"""A checkpoint of any layout, in a directory or a bucket, as one set of named tensors, none of them read yet."""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mllama_jax.convert.files import Tensors, read_json
from mllama_jax.convert.hub import NAME
from mllama_jax.convert.manifest import EXTRA, MANIFEST, TREE, StoredArrays, read_manifest
from mllama_jax.convert.progress import unfinished
from mllama_jax.convert.pth import PthFile
from mllama_jax.convert.safetensors import SafetensorsFile
from mllama_jax.convert.store import BucketPath, Store, absolute, is_bucket
from mllama_jax.convert.table import Layout
from mllama_jax.errors import InputError
from mllama_jax.model.quantize import quantization

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_META_SHARD = re.compile(r"consolidated(?:\.(\d\d))?\.pth")
# How Meta's fairscale layers split over model-parallel ranks: columns by output, rows by input, the rest replicated.
_COLUMN_PARALLEL = {
    *("wq", "wk", "wv", "w1", "w3", "c_fc"),
    *("tok_embeddings", "learnable_embedding", "output", "_linear", "vision_projection"),
}
_ROW_PARALLEL = {"wo", "w2", "c_proj"}


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a checkpoint by their raw names. Views are read-only and lazy: bytes are read as they are used.

    `shapes` are those of whole tensors; `parts` gives one view per file that holds a part, in rank order. Parts join
    along `split_dim(name)`; where that is None they are copies of the whole tensor.
    """

    layout: Layout
    directory: Path | BucketPath
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)
    dtypes: Mapping[str, np.dtype] = field(repr=False)
    split_dim: Callable[[str], int | None] = field(repr=False)
    files: Mapping[str, Sequence[Tensors]] = field(repr=False)
    config_json: dict[str, Any] = field(default_factory=dict)  # hf
    generation_json: dict[str, Any] = field(default_factory=dict)  # hf, where there is one
    params_json: dict[str, Any] = field(default_factory=dict)  # meta

    manifest: dict[str, Any] = field(default_factory=dict)  # orbax

    def names(self) -> Iterator[str]:
        return iter(self.shapes)

    @property
    def quantized(self) -> str | None:
        """What the decoder's kernels are quantised to, which only our layout holds."""
        if self.layout != "orbax":
            return None
        return quantization({tuple(name.split(".")): dtype for name, dtype in self.dtypes.items()})

    def extras(self) -> dict[str, np.ndarray]:
        """What our layout keeps of Meta's beyond our parameters."""
        file = StoredArrays(Store(self.directory), self.manifest)
        return {
            name.removeprefix(EXTRA): file.read(name)[...]
            for name in self.manifest["tensors"]
            if name.startswith(EXTRA)
        }

    def parts(self, name: str) -> list[Any]:
        """The tensor's part in each file: an array, or in our layout what gives one when it is indexed."""
        return [file.read(name) for file in self.files[name]]


def meta_split(name: str) -> int | None:
    """The dimension along which Meta's model-parallel files split the tensor `name`; None if each holds all of it."""
    module, _, kind = name.rpartition(".")
    module = module.rpartition(".")[2]
    if module in _COLUMN_PARALLEL:
        return 0
    return 1 if module in _ROW_PARALLEL and kind == "weight" else None


def open_checkpoint(
    directory: str | os.PathLike[str], split_dim: Callable[[str], int | None] = meta_split
) -> Checkpoint:
    """Opens a Hugging Face directory (model.safetensors, or an index with its shards, and config.json), a release
    directory of Meta's (consolidated.pth, or consolidated.00.pth and so on, and params.json), or one of ours.

    Every file's header is checked, and the files against each other; InputError says which file is at fault.
    """
    place = absolute(directory) if is_bucket(directory) else Path(directory)
    if isinstance(place, Path) and not place.is_dir():
        fault = "is a file" if place.exists() else "does not exist"
        hub = NAME.fullmatch(os.fspath(directory)) and not place.exists()
        hint = f"; if huggingface.co has it, `mllama convert {place} DIR` fetches it" if hub else ""
        raise InputError(f"{place}: {fault}; expected a checkpoint directory{hint}")
    store = Store(place)
    if unfinished(store):
        raise InputError(f"{place}: its conversion has not ended; run the same `mllama convert` again to finish it")
    if (place / TREE).exists():
        return _open_ours(place)
    present = set(store.top())
    hf = sorted(present & {_SINGLE, _INDEX})
    meta = sorted(filter(_META_SHARD.fullmatch, present))
    if len(hf) > 1 or (hf and meta) or (len(meta) > 1 and "consolidated.pth" in meta):
        raise InputError(f"{place}: ambiguous: holds {' and '.join((hf + meta)[:3])}; keep one checkpoint in it")
    if hf:
        return _open_hf(place, present)
    if meta and isinstance(place, Path):
        return _open_meta(place, meta, split_dim)
    if meta:
        raise InputError(f"{place}: Meta's files are read from disks only; copy them to one")
    hint = "; its folder 'original' may be one" if "original" in present else ""
    raise InputError(
        f"{place}: no checkpoint: expected {_SINGLE}, {_INDEX}, consolidated.pth, consolidated.00.pth "
        f"or {MANIFEST}{hint}"
    )


def _open_hf(directory: Path | BucketPath, present: set[str]) -> Checkpoint:
    config = read_json(directory / "config.json")
    generation = directory / "generation_config.json"
    if _SINGLE in present:
        file = SafetensorsFile(directory / _SINGLE)
        files = dict.fromkeys(file.tensors, file)
    else:
        files = _open_index(directory, present)
    return Checkpoint(
        layout="hf",
        directory=directory,
        shapes={name: file.tensors[name].shape for name, file in files.items()},
        dtypes={name: file.tensors[name].dtype for name, file in files.items()},
        split_dim=lambda name: None,
        files={name: [file] for name, file in files.items()},
        config_json=config,
        generation_json=read_json(generation) if generation.exists() else {},
    )


def _open_ours(directory: Path | BucketPath) -> Checkpoint:
    config, generation = directory / "config.json", directory / "generation_config.json"
    params, manifest = directory / "params.json", read_manifest(Store(directory))
    arrays = StoredArrays(Store(directory), manifest)
    names = [name for name in manifest["tensors"] if not name.startswith(EXTRA)]
    return Checkpoint(
        layout="orbax",
        directory=directory,
        shapes={name: arrays.shape(name) for name in names},
        dtypes={name: arrays.dtype(name) for name in names},
        split_dim=lambda name: None,
        files={name: [arrays] for name in names},
        config_json=read_json(config),
        generation_json=read_json(generation) if generation.exists() else {},
        params_json=read_json(params) if params.exists() else {},
        manifest=manifest,
    )


def _open_index(directory: Path | BucketPath, present: set[str]) -> dict[str, SafetensorsFile]:
    """Each tensor's file. The index and its files must agree on where every tensor is."""
    path = directory / _INDEX
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError(f"{path}: expected an object 'weight_map' of tensor name to file name")
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if not re.fullmatch(r"[\w.-]+\.safetensors", shard):
            raise InputError(f"{path}: expected names of .safetensors files beside it, got {shard!r}")
    absent = [shard for shard in shards if shard not in present]
    if absent:
        raise InputError(f"{path}: names {len(absent)} absent files: {', '.join(absent)}; download them")
    files = {shard: SafetensorsFile(directory / shard) for shard in shards}
    for name, shard in weight_map.items():
        if name not in files[shard].tensors:
            raise InputError(f"{files[shard].path}: tensor {name!r} is missing, though {_INDEX} places it there")
    for shard, file in files.items():
        for name in file.tensors:
            if name not in weight_map:
                raise InputError(f"{file.path}: tensor {name!r} is not in {_INDEX}; the files are of two checkpoints")
            if weight_map[name] != shard:
                raise InputError(f"{file.path}: tensor {name!r} is also in {weight_map[name]}; expected it in one file")
    return {name: files[shard] for name, shard in weight_map.items()}


def _open_meta(directory: Path, shards: list[str], split_dim: Callable[[str], int | None]) -> Checkpoint:
    params = read_json(directory / "params.json")
    if shards != ["consolidated.pth"]:
        last = int(shards[-1].split(".")[1])
        absent = sorted({f"consolidated.{rank:02d}.pth" for rank in range(last + 1)} - set(shards))
        if absent:
            raise InputError(f"{directory}: missing {', '.join(absent)}, though {shards[-1]} is there; download them")
    if 8 % len(shards):
        raise InputError(
            f"{directory}: holds {len(shards)} consolidated files; expected 1, 2, 4 or 8; one may be missing"
        )
    files = [PthFile(directory / shard) for shard in shards]
    first = files[0]
    for file in files[1:]:
        _check_same_model(first, file)
    shapes = {}
    for name, region in first.tensors.items():
        dim = split_dim(name)
        if dim is not None and dim >= len(region.shape):
            raise InputError(f"{first.path}: tensor {name!r}: expected more than {dim} dimensions, got {region.shape}")
        shapes[name] = tuple(size * len(files) if axis == dim else size for axis, size in enumerate(region.shape))
    return Checkpoint(
        layout="meta",
        directory=directory,
        shapes=shapes,
        dtypes={name: region.dtype for name, region in first.tensors.items()},
        split_dim=split_dim,
        files=dict.fromkeys(first.tensors, files),
        params_json=params,
    )


def _check_same_model(first: PthFile, other: PthFile) -> None:
    """Model-parallel files split every tensor evenly, so they agree on all names, shapes and dtypes."""
    differing = sorted(first.tensors.keys() ^ other.tensors.keys())
    if differing:
        raise InputError(
            f"{other.path}: a shard of another model than {first.path.name}: only one of them holds {differing[0]!r} "
            f"({len(differing)} such tensors); download the release again"
        )
    for name, region in first.tensors.items():
        here = other.tensors[name]
        if (here.shape, here.dtype) != (region.shape, region.dtype):
            raise InputError(
                f"{other.path}: tensor {name!r}: expected {region.dtype} {list(region.shape)} as in {first.path.name}, "
                f"got {here.dtype} {list(here.shape)}; the files are shards of two models"
            )
