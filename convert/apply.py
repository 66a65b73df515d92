"""Between a checkpoint's tensors and our parameters, both ways, one tensor at a time, by the rows of the table."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import einops
import flax.linen as nn
import jax
import numpy as np
from tqdm import tqdm

from mllama_jax.config import MllamaConfig
from mllama_jax.convert.axes import (
    UNREACHABLE,
    Index,
    Shape,
    backward,
    bounded,
    everything,
    forward,
    grid_to_ratios,
    part_index,
    piece,
    ratios_to_grid,
    source_shapes,
)
from mllama_jax.convert.files import LazyArray
from mllama_jax.convert.sources import Checkpoint, meta_split
from mllama_jax.convert.table import Layout, Row, Source, table
from mllama_jax.errors import InputError
from mllama_jax.model.mllama import abstract_parameters

Path = tuple[str, ...]

# Names since transformers 4.52 -> names before it, which the table uses.
RENAMED = {
    "model.language_model.": "language_model.model.",
    "model.vision_model.": "vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "lm_head.": "language_model.lm_head.",
}


@dataclass(frozen=True)
class Parameter:
    """One of our parameters, not read yet: `read(index)` reads the bytes of that slice, as `dtype`."""

    shape: Shape
    dtype: np.dtype
    read: Callable[[Index], np.ndarray]
    mixed: bool = False  # whether it is made of tensors of several dtypes, of which `dtype` is the widest

    @classmethod
    def of(cls, value: Any) -> Parameter:
        """An array that is in memory."""
        array = np.asarray(value)
        return cls(array.shape, array.dtype, lambda index: array[index])

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def whole(self) -> np.ndarray:
        return self.read(everything(self.shape))

    def astype(self, dtype: np.dtype) -> Parameter:
        """The same in another dtype, rounded to nearest even."""
        return Parameter(self.shape, dtype, lambda index: self.read(index).astype(dtype, copy=False))


Parameters = Mapping[Path, Parameter]


def read_config(checkpoint: Checkpoint) -> MllamaConfig:
    """The configuration that a checkpoint's JSON files, and in Meta's layout its tensors, describe."""
    try:
        if checkpoint.layout == "meta":
            return MllamaConfig.from_meta(checkpoint.params_json, checkpoint.shapes)
        return MllamaConfig.from_hf(checkpoint.config_json, checkpoint.generation_json)
    except InputError as error:
        raise InputError(f"{checkpoint.directory}/{error}") from None


def parameters(checkpoint: Checkpoint, config: MllamaConfig) -> dict[Path, Parameter]:
    """Every parameter of `config`, to be read from the checkpoint.

    Raises:
        InputError: see `check_shapes`.
    """
    names, shapes = _canonical_names(checkpoint, config), check_shapes(checkpoint, config)
    found = {}
    for row in table(config, checkpoint.quantized):
        source, shape = row.source(checkpoint.layout), shapes[row.target]
        raw = [names[name] for name in source.names]
        kinds = {checkpoint.dtypes[name] for name in raw}
        read = functools.partial(_read, checkpoint, row, source, raw, shape)
        found[row.target] = Parameter(shape, functools.reduce(np.promote_types, kinds), read, len(kinds) > 1)
    return found


def _read(checkpoint: Checkpoint, row: Row, source: Source, names: list[str], shape: Shape, index: Index) -> np.ndarray:
    """A slice of our parameter of `shape` from the tensors of which it is made."""
    if checkpoint.layout == "orbax":
        return np.asarray(checkpoint.parts(names[0])[0][index])

    def part(i: int, index: Index) -> np.ndarray:
        files, split = checkpoint.parts(names[i]), checkpoint.split_dim(names[i])
        return forward(row, source.patterns[i], files, split, index)

    if source.grid:
        return grid_to_ratios(part(0, everything((shape[1], *shape[1:]))))[index]
    if source.stack is not None:
        rest = tuple(cut for axis, cut in enumerate(index) if axis != source.stack)
        parts = [part(i, rest) for i in range(len(names))[index[source.stack]]]
        return np.expand_dims(parts[0], source.stack) if len(parts) == 1 else np.stack(parts, axis=source.stack)
    if source.concat:
        pieces, start = [], 0
        for i, length in enumerate(source.concat):
            rows = slice(max(index[0].start - start, 0), min(index[0].stop - start, length))
            pieces += [part(i, (rows, *index[1:]))] if rows.start < rows.stop else []
            start += length
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
    return part(0, index)


def load_parameters(
    parameters: Parameters, put: Callable[[Path, Shape, Callable[[Index], np.ndarray]], Any]
) -> dict[str, Any]:
    """The tree of parameters, each handed to `put` in turn.

    Args:
        put: takes a target path, a shape and a function that reads a slice of that parameter, to where it shall live.
    """
    tree: dict[str, Any] = {}
    total = sum(math.prod(parameter.shape) for parameter in parameters.values())
    with tqdm(total=total, unit="param", unit_scale=True, desc="loading", leave=False, disable=None) as progress:
        for path, parameter in parameters.items():
            shape = parameter.shape
            insert(tree, path, put(path, shape, lambda index, p=parameter: p.read(bounded(index, p.shape))))
            progress.update(math.prod(shape))
    return tree


def from_tree(params: Mapping[str, Any], dtype: np.dtype) -> dict[Path, Parameter]:
    """A tree of arrays as `Parameters` of one dtype."""
    return {path: Parameter.of(value).astype(dtype) for path, value in paths(params).items()}


# ---- Writing ------------------------------------------------------------------------------------------------------


def tensors(
    parameters: Parameters,
    config: MllamaConfig,
    layout: Layout,
    extras: Extras | None = None,
    shard: int = 0,
    shards: int = 1,
) -> dict[str, LazyArray]:
    """Every tensor of Hugging Face's or Meta's layout by name, made when it is written; the inverse of `parameters`.

    Args:
        extras: see `extras`.
        shard: in Meta's layout, number of the model-parallel file, of `shards`, whose parts are wanted.
    """
    made, extras = {}, extras or {}
    for row in table(config):
        source, parameter = row.source(layout), parameters[row.target]
        shapes = source_shapes(row, source, parameter.shape)
        for i, (name, shape) in enumerate(zip(source.names, shapes, strict=True)):
            split = meta_split(name) if layout == "meta" and shards > 1 else None
            if split is not None and shape[split] % shards:
                raise InputError(f"{name}: {list(shape)} does not divide into {shards} shards along axis {split}")
            lengths = tuple(n // shards if axis == split else n for axis, n in enumerate(shape))
            cut = None if split is None else (split, shard, shards)
            make = functools.partial(_write, row, source, parameter, i, cut, extras.get(row.name))
            made[name] = LazyArray(lengths, parameter.dtype, make)
    if layout == "meta":
        for name, value in extras.items():
            if name in _DERIVED:
                made[name] = LazyArray(value.shape, value.dtype, lambda value=value: value)
    return made


def _write(
    row: Row,
    source: Source,
    parameter: Parameter,
    i: int,
    cut: tuple[int, int, int] | None,
    cells: np.ndarray | None,
) -> np.ndarray:
    """The source tensor number `i` of a parameter; a view where axes allow it.

    Args:
        cut: axis, number and count, where only one of so many equal pieces is wanted.
    """
    index, shortened = part_index(source, i, parameter.shape), None
    if cut is not None and (found := piece(source, i, index, *cut)):
        index, shortened = found[0], (found[1], cut[2])
    part = parameter.read(index)
    if source.grid:
        part = ratios_to_grid(row, part, cells)
    if source.stack is not None:
        part = part.squeeze(source.stack)
    if not source.patterns[i].startswith("..."):
        part = backward(row, source.patterns[i], part, shortened)
    if cut is not None and shortened is None:
        part = np.split(part, cut[2], cut[0])[cut[1]]
    return part


Extras = Mapping[str, np.ndarray]
_DERIVED = ("rope.freqs", "text_model.rope.freqs")  # follow from the configuration; releases hold them all the same


def extras(checkpoint: Checkpoint, config: MllamaConfig) -> dict[str, np.ndarray]:
    """What Meta's layout holds beyond our parameters: the cells of the tile tables that no picture reaches, [8, ...] by
    our parameter's name, and rotary frequencies by theirs. Our layout keeps them in a file beside."""
    if checkpoint.layout == "orbax":
        return checkpoint.extras()
    found = {}
    if checkpoint.layout == "meta":
        for row in table(config):
            if row.meta.grid:
                name, pattern = row.meta.names[0], row.meta.patterns[0]
                grid = einops.rearrange(checkpoint.parts(name)[0], pattern)
                found[row.name] = np.stack([grid[cell] for cell in UNREACHABLE])
        for name in checkpoint.shapes:
            if name in _DERIVED:
                found[name] = np.array(checkpoint.parts(name)[0])
    return found


# ---- Names and shapes ---------------------------------------------------------------------------------------------


def _canonical_names(checkpoint: Checkpoint, config: MllamaConfig) -> dict[str, str]:
    """Names as the table has them -> names as the files have them."""
    names = {}
    for name in checkpoint.shapes:
        if name not in _DERIVED:
            known = canonical(name) if checkpoint.layout == "hf" and config.vision is not None else name
            if known in names:
                raise InputError(f"{checkpoint.directory}: {name!r} and {names[known]!r} are one tensor twice")
            names[known] = name
    if config.text.tied:
        names.pop("lm_head.weight", None)
    return names


def canonical(name: str) -> str:
    """A tensor's name in the table, from that of any release of transformers."""
    for new, old in RENAMED.items():
        if name.startswith(new):
            return old + name[len(new) :]
    return name


def renamed(name: str) -> str:
    """A tensor's name since transformers 4.52, from the table's."""
    for new, old in RENAMED.items():
        if name.startswith(old):
            return new + name[len(old) :]
    return name


def has_new_names(checkpoint: Checkpoint) -> bool:
    """Whether a Hugging Face checkpoint of the whole model has the names of transformers 4.52 and later."""
    return any(name.startswith("model.language_model.") for name in checkpoint.shapes)


def check_shapes(checkpoint: Checkpoint, config: MllamaConfig) -> dict[Path, Shape]:
    """The shape of every parameter of `config`, once the checkpoint's tensors are known to be exactly those it needs.

    Raises:
        InputError: tensors are missing, unexpected or misshapen: how many of each, and the first of them, in one line.
    """
    abstract = paths(nn.unbox(abstract_parameters(config, quantize=checkpoint.quantized)))
    shapes = {path: leaf.shape for path, leaf in abstract.items()}
    names, expected = _canonical_names(checkpoint, config), {}
    for row in table(config, checkpoint.quantized):
        source = row.source(checkpoint.layout)
        expected |= zip(source.names, source_shapes(row, source, shapes[row.target]), strict=True)
    found = {name: checkpoint.shapes[raw] for name, raw in names.items()}
    problems = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "misshapen": [
            f"{name} {list(found[name])} instead of {list(shape)}"
            for name, shape in expected.items()
            if name in found and found[name] != shape
        ],
    }
    report = [
        f"{len(names)} {kind}: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
        for kind, names in problems.items()
        if names
    ]
    if report:
        raise InputError(f"{checkpoint.directory}: the tensors do not fit its config: {'; '.join(report)}")
    return shapes


def insert(tree: dict[str, Any], path: Path, value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def paths(tree: Any) -> dict[Path, Any]:
    """A nested tree of dictionaries as {path: leaf}; a parameter boxed with its axis names is a leaf."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda leaf: not isinstance(leaf, dict))
    return {tuple(key.key for key in path): leaf for path, leaf in flat}
