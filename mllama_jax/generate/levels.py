"""The few sizes that an engine's caches may have, of those that fit into memory: for each, programs are compiled."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from mllama_jax.errors import InputError
from mllama_jax.generate import slots
from mllama_jax.generate.batch import ladder
from mllama_jax.model.mllama import MllamaModel

CHUNK = 512  # tokens of a prompt read at once
TOGETHER = 8  # prompts read at once, where so many are no more tokens than two chunks
LEAST = 512  # positions of a slot at first
SPARE = 0.1  # of a device's memory, for what programs need beside caches


@dataclasses.dataclass(frozen=True)
class Need:
    """What a request takes of a slot."""

    positions: int
    tiles: int


@dataclasses.dataclass(frozen=True)
class Level:
    """Caches of so many rows, with room for so many positions and tiles each.

    Attributes:
        together: how many of the rows there is memory to read at once: that takes a copy of each.
    """

    rows: int
    positions: int
    tiles: int
    together: int

    def reads(self) -> list[tuple[int, int]]:
        """How many prompts, and tokens of each, are read at once, in all that is read."""
        together = [(self.together, size) for size in sizes() if is_short(size)] if self.together > 1 else []
        return [(1, size) for size in sizes()] + together

    def holds(self, needs: Iterable[Need]) -> bool:
        needs = list(needs)
        enough = (need.positions <= self.positions and need.tiles <= self.tiles for need in needs)
        return len(needs) <= self.rows and all(enough)


def levels_of(
    model: MllamaModel, *, rows: int, context: int, pictures: tuple[int, int], memory: int | None = None
) -> list[Level]:
    """The levels for at most so many rows of up to `context` positions, from the smallest to the largest.

    A level that does not fit has fewer rows, or is left out.

    Args:
        pictures: how many a row has room for at first and at most.
        memory: bytes that each device has for them; None for as many as they take.

    Raises:
        InputError: not even one row of the smallest level fits.
    """
    (first, most), tiles = pictures, slots.picture_tiles(model)
    lengths = ladder(LEAST, -(-context // CHUNK) * CHUNK)  # of whole chunks, so that the longest chunk fits all
    widths = ladder(tiles, tiles * most) if tiles * most else []
    if not (first and widths):
        widths = [0, *widths]
    levels = []
    for length, width in itertools.product(lengths, widths):
        fitting = rows + TOGETHER if memory is None else memory // row_bytes(model, length, width)
        if (own := min(rows, fitting - 1)) > 0:
            levels.append(Level(own, length, width, min(TOGETHER, own, fitting - own)))
    if memory is not None and not levels:
        takes = 2 * row_bytes(model, lengths[0], widths[0])
        raise InputError(
            f"{memory / 1e6:.1f} MB of memory are left beside the weights, and a slot of {lengths[0]} positions takes "
            f"{takes / 1e6:.1f}; spread the model over more devices, or quantize it"
        )
    return levels


def choose(levels: Sequence[Level], now: Level, needs: Sequence[Need]) -> Level | None:
    """The level on which requests go on that are on `now`; None where none holds them all.

    It is the same if possible. Else one of as many rows as possible, of these one that keeps what is there, of these
    the smallest.
    """
    if now.holds(needs):
        return now

    def worth(level: Level) -> tuple[int, bool]:
        return level.rows, level.positions >= now.positions and level.tiles >= now.tiles

    return max((level for level in levels if level.holds(needs)), key=worth, default=None)


def row_bytes(model: MllamaModel, positions: int, tiles: int) -> int:
    """Bytes that a row of the caches takes on a device."""
    text, constrain = model.config.text, model.constrain
    one = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(lambda: model.empty_layer(1, 1))))
    own = positions * len(text.self_layers) / constrain.parts("cache")
    pictures = tiles * slots.tile_length(model) * len(text.cross_layers) / constrain.parts("image_seq")
    return int(one * (own + pictures) / constrain.parts("kv_heads"))


def free_memory() -> int | None:
    """Bytes that caches may take on every device of all processes; None where devices do not tell."""
    found = [device.memory_stats() for device in jax.local_devices()]
    if not all(found):
        return None
    return _least([(1 - SPARE) * stats["bytes_limit"] - stats["bytes_in_use"] for stats in found if stats])


def spare_memory() -> int | None:
    """Bytes that caches leave to programs on every device of all processes; None where devices do not tell."""
    found = [device.memory_stats() for device in jax.local_devices()]
    return _least([SPARE * stats["bytes_limit"] for stats in found if stats]) if all(found) else None


def _least(found: list[float]) -> int:
    """The least number of bytes, in whole megabytes, that any process has found, so that all decide alike."""
    megabytes = np.array(int(min(found)) >> 20, np.int32)
    if jax.process_count() > 1:
        megabytes = multihost_utils.process_allgather(megabytes)
    return max(0, int(megabytes.min())) << 20


def sizes() -> list[int]:
    """How many tokens of a prompt a program may take."""
    return ladder(CHUNK // 4, CHUNK)


def is_short(size: int) -> bool:
    """Whether prompts of so many tokens are read together."""
    return TOGETHER * size <= 2 * CHUNK
