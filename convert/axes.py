"""The axes of one source tensor against those of one of our parameters, by the einops patterns of the table."""

from __future__ import annotations

import math
from collections.abc import Sequence

import einops
import numpy as np

from mllama_jax.config import ASPECT_RATIOS
from mllama_jax.convert.table import Row, Source
from mllama_jax.errors import InputError

Shape = tuple[int, ...]
Index = tuple[slice, ...]


def everything(shape: Shape) -> Index:
    """The index of a whole array."""
    return tuple(slice(0, n) for n in shape)


def bounded(index: Sequence[slice], shape: Shape) -> Index:
    """`index` with plain bounds."""
    return tuple(slice(*cut.indices(n)[:2]) for cut, n in zip(index, shape, strict=True))


def forward(row: Row, pattern: str, files: list[np.ndarray], split: int | None, index: Index) -> np.ndarray:
    """The slice `index` of the part of our parameter that a tensor, in `files` split along `split`, makes.

    Only bytes that the slice needs are touched, unless the split cuts through heads. A view where axes allow it.
    """
    left, right = pattern.split(" -> ")
    flat = [axis for group in groups(right) for axis in group]
    lengths = _sizes(row, pattern)
    joined = None
    if split is None:
        files = files[:1]
    if len(files) > 1:
        assert split is not None
        joined = groups(left)[split][0]
        if lengths.get(joined, 0) % len(files):
            files, joined = [np.concatenate(files, axis=split)], None
        elif joined in lengths:
            lengths[joined] //= len(files)
    # Axes that stand alone are cut while this is a view; what a pattern merges, which needs a copy, is cut after that.
    cuts = {group[0]: cut for group, cut in zip(groups(right), index, strict=True) if len(group) == 1}
    pieces, start = [], 0
    for file in files:
        view = einops.rearrange(file, f"{left} -> {' '.join(flat)}", **lengths)
        here = dict(cuts)
        if joined is not None:
            length = view.shape[flat.index(joined)]
            here[joined] = slice(max(cuts[joined].start - start, 0), max(min(cuts[joined].stop - start, length), 0))
            start += length
            if here[joined].start >= here[joined].stop:
                continue
        pieces.append(view[tuple(here.get(axis, slice(None)) for axis in flat)])
    view = pieces[0] if joined is None or len(pieces) == 1 else np.concatenate(pieces, axis=flat.index(joined))
    merged = einops.rearrange(view, f"{' '.join(flat)} -> {right}")
    return merged[tuple(slice(None) if len(g) == 1 else cut for g, cut in zip(groups(right), index, strict=True))]


def backward(row: Row, pattern: str, part: np.ndarray, cut: tuple[str, int] | None = None) -> np.ndarray:
    """A part of our parameter -> the source tensor; a view where axes allow it.

    Args:
        cut: an axis of the pattern of which `part` has only one of so many equal pieces.
    """
    pattern = " -> ".join(reversed(pattern.split(" -> ")))
    lengths = _sizes(row, pattern)
    if cut is not None and cut[0] in lengths:
        lengths[cut[0]] //= cut[1]
    return einops.rearrange(part, pattern, **lengths)


def part_index(source: Source, i: int, shape: Shape) -> Index:
    """Where the part number `i` lies in a parameter of `shape`; a stacked part keeps its axis, of length 1."""
    if source.stack is not None:
        return tuple(slice(i, i + 1) if axis == source.stack else slice(0, n) for axis, n in enumerate(shape))
    if source.concat:
        start = sum(source.concat[:i])
        return (slice(start, start + source.concat[i]), *everything(shape[1:]))
    return everything(shape)


def piece(source: Source, i: int, index: Index, split: int, number: int, pieces: int) -> tuple[Index, str] | None:
    """Of the part `i`, which lies at `index`, what makes one of some equal pieces of its source tensor along `split`.

    Returns:
        its index, and the name of the axis that is cut; None where that is no slice: it cuts through heads.
    """
    left, right = (groups(side) for side in source.patterns[i].split(" -> "))
    axis = left[split][0]
    place = right.index([axis])
    place += source.stack is not None and place >= source.stack
    start, length = index[place].start, index[place].stop - index[place].start
    if length % pieces:
        return None
    cut = slice(start + number * length // pieces, start + (number + 1) * length // pieces)
    return (*index[:place], cut, *index[place + 1 :]), axis


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
        if pattern.startswith("..."):
            shapes.append(part)
            continue
        left, right = (groups(side) for side in pattern.split(" -> "))
        sizes = dict(row.sizes) | {"1": 1}
        for group, length in zip(right, part, strict=True):
            known = math.prod(sizes[axis] for axis in group if axis in sizes and len(group) > 1)
            sizes[next((axis for axis in group if len(group) == 1 or axis not in sizes), "1")] = length // known
        shapes.append(tuple(math.prod(sizes[axis] for axis in group) for group in left))
    return shapes


def groups(side: str) -> list[list[str]]:
    """`"(k g h) d"` -> `[["k", "g", "h"], ["d"]]`."""
    found: list[list[str]] = []
    inside = False
    for token in side.replace("(", " ( ").replace(")", " ) ").split():
        if token in "()":
            inside = token == "("
            found += [[]] if inside else []
        elif inside:
            found[-1].append(token)
        else:
            found.append([token])
    return found


def _sizes(row: Row, pattern: str) -> dict[str, int]:
    """The row's axis lengths that einops needs: those inside parentheses on the left."""
    left = pattern.split(" -> ")[0]
    inside = {axis for group in groups(left) if len(group) > 1 for axis in group}
    return {axis: size for axis, size in row.sizes if axis in inside}


# ---- Tile tables --------------------------------------------------------------------------------------------------

# Where no picture reaches Meta's 4 x 4 tables: the tile in row y and column x lies in no canvas of at most 4 tiles.
UNREACHABLE = tuple((y, x) for y in range(4) for x in range(4) if (y + 1) * (x + 1) > 4)


def grid_to_ratios(grid: np.ndarray) -> np.ndarray:
    """Meta's [4, 4, ...] over tile coordinates -> [9, 4, ...]: for each aspect ratio id its tiles in reading order."""
    ratios = np.zeros((1 + len(ASPECT_RATIOS), *grid.shape[1:]), grid.dtype)
    for i, (h, w) in enumerate(ASPECT_RATIOS, start=1):
        ratios[i, : h * w] = grid[:h, :w].reshape(h * w, *grid.shape[2:])
    return ratios


def ratios_to_grid(row: Row, ratios: np.ndarray, unreachable: np.ndarray | None) -> np.ndarray:
    """The inverse; the eight cells that no picture reaches become `unreachable` [8, ...], or zero."""
    grid = np.zeros((ratios.shape[1], *ratios.shape[1:]), ratios.dtype)
    for i, (h, w) in enumerate(ASPECT_RATIOS, start=1):
        grid[:h, :w] = ratios[i, : h * w].reshape(h, w, *ratios.shape[2:])
    if grid_to_ratios(grid)[1:].tobytes() != _only_tiles(ratios)[1:].tobytes():
        raise InputError(
            f"{'/'.join(row.target)}: its aspect ratio rows disagree about a tile, which Meta's layout cannot hold; "
            "write Hugging Face's layout instead"
        )
    if unreachable is not None:
        for cell, value in zip(UNREACHABLE, unreachable, strict=True):
            grid[cell] = value
    return grid


def _only_tiles(ratios: np.ndarray) -> np.ndarray:
    """`ratios` with zeros where an aspect ratio has no tile."""
    kept = np.zeros_like(ratios)
    for i, (h, w) in enumerate(ASPECT_RATIOS, start=1):
        kept[i, : h * w] = ratios[i, : h * w]
    return kept
