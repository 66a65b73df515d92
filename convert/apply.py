"""Between a checkpoint's tensors and our parameter tree, both ways, one tensor at a time, by the rows of the table."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import einops
import flax.linen as nn
import jax
import numpy as np
from tqdm import tqdm

from mllama_jax.config import ASPECT_RATIOS, MllamaConfig
from mllama_jax.convert.files import LazyArray
from mllama_jax.convert.sources import Checkpoint
from mllama_jax.convert.table import Layout, Row, Source, table
from mllama_jax.errors import InputError
from mllama_jax.model.mllama import abstract_parameters

Shape = tuple[int, ...]
Path = tuple[str, ...]

# Names since transformers 4.52 -> names before it, which the table uses.
_RENAMED = {
    "model.language_model.": "language_model.model.",
    "model.vision_model.": "vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "lm_head.": "language_model.lm_head.",
}


def read_config(checkpoint: Checkpoint) -> MllamaConfig:
    """The configuration that a checkpoint's JSON files, and in Meta's layout its tensors, describe."""
    if checkpoint.layout == "hf":
        return MllamaConfig.from_hf(checkpoint.config_json, checkpoint.generation_json)
    return MllamaConfig.from_meta(checkpoint.params_json, checkpoint.shapes)


def load_parameters(
    checkpoint: Checkpoint, config: MllamaConfig, put: Callable[[Path, np.ndarray], Any]
) -> dict[str, Any]:
    """Read every parameter of `config`, handing each to `put` as soon as it is assembled.

    Args:
        put: takes a target path and its host array to where it shall live (casts, places on devices).

    Raises:
        InputError: see `check_shapes`.
    """
    names = _canonical_names(checkpoint, config)
    shapes = check_shapes(checkpoint, config)
    rows = table(config)
    tree: dict[str, Any] = {}
    total = sum(math.prod(shapes[row.target]) for row in rows)
    with tqdm(total=total, unit="param", unit_scale=True, desc="loading", leave=False, disable=None) as progress:
        for row in rows:
            source = row.source(checkpoint.layout)
            parts = [_whole(checkpoint, names[name]) for name in source.names]
            _insert(tree, row.target, put(row.target, assemble(row, source, parts)))
            progress.update(math.prod(shapes[row.target]))
    return tree


def disassemble_all(
    params: Mapping[str, Any], config: MllamaConfig, layout: Layout, dtype: np.dtype
) -> dict[str, LazyArray]:
    """Every tensor of `params` by its name in `layout`, made when it is written; the inverse of `load_parameters`."""

    def make(row: Row, source: Source, value: Any, i: int) -> np.ndarray:
        return disassemble(row, source, np.asarray(value))[i].astype(dtype)

    tensors = {}
    for row in table(config):
        value: Any = params
        for key in row.target:
            value = value[key]
        source = row.source(layout)
        shapes = source_shapes(row, source, value.shape)
        for i, (name, shape) in enumerate(zip(source.names, shapes, strict=True)):
            tensors[name] = LazyArray(shape, dtype, functools.partial(make, row, source, value, i))
    return tensors


def assemble(row: Row, source: Source, parts: list[np.ndarray]) -> np.ndarray:
    """Source tensors -> our parameter."""
    parts = [
        einops.rearrange(part, pattern, **_sizes(row, pattern))
        for part, pattern in zip(parts, source.patterns, strict=True)
    ]
    if source.grid:
        return _grid_to_ratios(parts[0])
    if source.stack is not None:
        return np.stack(parts, axis=source.stack)
    return np.concatenate(parts) if source.concat else parts[0]


def disassemble(row: Row, source: Source, value: np.ndarray) -> list[np.ndarray]:
    """Our parameter -> source tensors."""
    if source.grid:
        parts = [_ratios_to_grid(row, value)]
    elif source.stack is not None:
        parts = [np.take(value, i, axis=source.stack) for i in range(len(source.names))]
    elif source.concat:
        parts = np.split(value, np.cumsum(source.concat[:-1]))
    else:
        parts = [value]
    backward = [" -> ".join(reversed(pattern.split("->"))) for pattern in source.patterns]
    return [
        np.ascontiguousarray(einops.rearrange(part, pattern, **_sizes(row, pattern)))
        for part, pattern in zip(parts, backward, strict=True)
    ]


def source_shapes(row: Row, source: Source, target: Shape) -> list[Shape]:
    """The shapes that the source tensors of a parameter of shape `target` must have."""
    if source.grid:
        parts = [(target[1], target[1], *target[2:])]
    elif source.stack is not None:
        parts = [tuple(n for axis, n in enumerate(target) if axis != source.stack)] * len(source.names)
    else:
        parts = [(length, *target[1:]) for length in source.concat] or [target]
    shapes = []
    for part, pattern in zip(parts, source.patterns, strict=True):
        left, right = (_groups(side) for side in pattern.split("->"))
        sizes = dict(row.sizes) | {"1": 1}
        for group, length in zip(right, part, strict=True):
            known = math.prod(sizes[axis] for axis in group if axis in sizes and len(group) > 1)
            sizes[next((axis for axis in group if len(group) == 1 or axis not in sizes), "1")] = length // known
        shapes.append(tuple(math.prod(sizes[axis] for axis in group) for group in left))
    return shapes


def _groups(side: str) -> list[list[str]]:
    """`"(k g h) d"` -> `[["k", "g", "h"], ["d"]]`."""
    groups: list[list[str]] = []
    inside = False
    for token in side.replace("(", " ( ").replace(")", " ) ").split():
        if token in "()":
            inside = token == "("
            groups += [[]] if inside else []
        elif inside:
            groups[-1].append(token)
        else:
            groups.append([token])
    return groups


def _sizes(row: Row, pattern: str) -> dict[str, int]:
    """The row's axis lengths that einops needs: those inside parentheses on the left."""
    left = pattern.split("->")[0]
    inside = {axis for group in _groups(left) if len(group) > 1 for axis in group}
    return {axis: size for axis, size in row.sizes if axis in inside}


def _grid_to_ratios(grid: np.ndarray) -> np.ndarray:
    """Meta's [4, 4, ...] over tile coordinates -> [9, 4, ...]: for each aspect ratio id its tiles in reading order."""
    ratios = np.zeros((1 + len(ASPECT_RATIOS), *grid.shape[1:]), grid.dtype)
    for i, (h, w) in enumerate(ASPECT_RATIOS, start=1):
        ratios[i, : h * w] = grid[:h, :w].reshape(h * w, *grid.shape[2:])
    return ratios


def _ratios_to_grid(row: Row, ratios: np.ndarray) -> np.ndarray:
    """The inverse; the eight cells that no picture reaches become zero."""
    grid = np.zeros((ratios.shape[1], *ratios.shape[1:]), ratios.dtype)
    for i, (h, w) in enumerate(ASPECT_RATIOS, start=1):
        grid[:h, :w] = ratios[i, : h * w].reshape(h, w, *ratios.shape[2:])
    if _grid_to_ratios(grid)[1:].tobytes() != _only_tiles(ratios)[1:].tobytes():
        raise InputError(
            f"{'/'.join(row.target)}: its aspect ratio rows disagree about a tile, which Meta's layout cannot hold; "
            "write Hugging Face's layout instead"
        )
    return grid


def _only_tiles(ratios: np.ndarray) -> np.ndarray:
    """`ratios` with zeros where an aspect ratio has no tile."""
    kept = np.zeros_like(ratios)
    for i, (h, w) in enumerate(ASPECT_RATIOS, start=1):
        kept[i, : h * w] = ratios[i, : h * w]
    return kept


def _whole(checkpoint: Checkpoint, name: str) -> np.ndarray:
    """A tensor from its model-parallel parts."""
    parts, split = checkpoint.parts(name), checkpoint.split_dim(name)
    return parts[0] if len(parts) == 1 or split is None else np.concatenate(parts, axis=split)


def _canonical_names(checkpoint: Checkpoint, config: MllamaConfig) -> dict[str, str]:
    """Names as the table has them -> names as the files have them."""
    names = {}
    for name in checkpoint.shapes:
        canonical = name
        if checkpoint.layout == "hf" and config.vision is not None:
            for new, old in _RENAMED.items():
                if name.startswith(new):
                    canonical = old + name[len(new) :]
        if not name.endswith("rope.freqs"):
            names[canonical] = name
    if config.text.tied:
        names.pop("lm_head.weight", None)
    return names


def check_shapes(checkpoint: Checkpoint, config: MllamaConfig) -> dict[Path, Shape]:
    """The shape of every parameter of `config`, once the checkpoint's tensors are known to be exactly those it needs.

    Raises:
        InputError: tensors are missing, unexpected or misshapen: how many of each, and the first of them, in one line.
    """
    shapes = {path: leaf.shape for path, leaf in paths(nn.unbox(abstract_parameters(config))).items()}
    names, expected = _canonical_names(checkpoint, config), {}
    for row in table(config):
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


def _insert(tree: dict[str, Any], path: Path, value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def paths(tree: Any) -> dict[Path, Any]:
    """A nested tree of dictionaries as {path: leaf}; a parameter boxed with its axis names is a leaf."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda leaf: not isinstance(leaf, dict))
    return {tuple(key.key for key in path): leaf for path, leaf in flat}
