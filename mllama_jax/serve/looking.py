"""Where answers look, in few sizes: all programs are compiled before anyone asks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from mllama_jax.api import Mllama
from mllama_jax.errors import InputError
from mllama_jax.generate.batch import Rows, fit, ladder

SCORES = 2**29  # of all heads of a layer, that looking holds at once
LEAST = 512  # positions
STEP = 128  # of which positions are a multiple


class Looking:
    """Asks a model by `Mllama.attention`.

    Attributes:
        sizes: by how many pictures there is room for, the numbers of positions that a conversation is padded to.
    """

    def __init__(self, model: Mllama, context: int, pictures: int):
        self.model, text, vision = model, model.config.text, model.config.vision
        self.sizes: dict[int, list[int]] = {}
        for shown in sorted({1, pictures}) if vision is not None and pictures else ():
            assert vision is not None
            most = min(context, SCORES // (text.heads * shown * vision.max_tiles * vision.padded_tokens))
            self.sizes[shown] = ladder(LEAST, -(-most // STEP) * STEP)

    def check(self, tokens: int, pictures: int) -> None:
        """Raises InputError where a conversation with its answer is too long, or shows too much."""
        if pictures > (most := max(self.sizes, default=0)):
            raise InputError(f"messages: at most {most} pictures, got {pictures}")
        if pictures and tokens > (most := self.sizes[fit(pictures, [*self.sizes])][-1]):
            many = f"{pictures} pictures" if pictures > 1 else "a picture"
            raise InputError(f"messages: at most {most} tokens with {many}, got {tokens}")

    def padded(self, rows: Rows) -> Rows:
        """A row with pictures, in one of the sizes."""
        vision, config = self.model.config.vision, self.model.config
        assert vision is not None
        assert rows.pixels is not None
        pictures = fit(int((rows.tokens == config.image_token).sum()), [*self.sizes])
        length, tiles = fit(int(rows.lengths[0]), self.sizes[pictures]), pictures * vision.max_tiles
        return dataclasses.replace(
            rows,
            tokens=resized(rows.tokens, 1, length, config.pad),
            pixels=resized(rows.pixels, 0, pictures),
            ratio_ids=resized(rows.ratio_ids, 0, pictures),
            tiles=resized(rows.tiles, 1, tiles),
            spans=resized(rows.spans, 1, tiles),
        )

    def warm_up(self) -> Iterator[tuple[int, int]]:
        """Compile and run all sizes; gives how many of how many are done."""
        rows = [self._nothing(pictures, length) for pictures, lengths in self.sizes.items() for length in lengths]
        for done, each in enumerate(rows):
            self.model.attention(each)
            yield done + 1, len(rows)

    def _nothing(self, pictures: int, length: int) -> Rows:
        """A row of a size."""
        vision = self.model.config.vision
        assert vision is not None
        pixels = np.zeros((pictures, vision.max_tiles, 3, vision.tile, vision.tile), np.float32)
        tokens, tiles = np.zeros((1, length), np.int32), np.zeros((1, pictures * vision.max_tiles), np.int32)
        spans = np.zeros((*tiles.shape, 2), np.int32)
        return Rows(tokens, np.array([length], np.int32), pixels, np.zeros(pictures, np.int32), tiles, spans)


def resized(x: np.ndarray, axis: int, size: int, value: int = 0) -> np.ndarray:
    """The first `size` places of an axis, or that many with `value` in those that were not there."""
    x = x.take(range(min(x.shape[axis], size)), axis)
    return np.pad(x, [(0, (size - n) * (i == axis)) for i, n in enumerate(x.shape)], constant_values=value)
