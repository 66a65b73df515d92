"""What is compared with Meta's code: the cases, and goldens, which keep a sample of every array Meta computed.

A golden file (`tests/data/goldens/<case>.npz`) holds for n arrays in the order in which they are computed

    names   str [n]         see below
    shapes  int32 [n, 5]    each array's shape, filled up with zeros
    scales  float32 [n]     each array's largest absolute value
    values  float32 [n, S]  each array at the flat positions `sample_positions(size)`
    greedy  int32 [B, 32]   what Meta's code decodes greedily after each row, through its key/value cache

Axes: B rows, T positions, I images that are present (row by row), C = 4 tiles including padding tiles, N tokens of a
tile without padding tokens, D width, K key/value heads, h head dim, V vocabulary. A case's arrays are

    features  [I, C, N, D]   projected vision features             logits  [positions of all rows, V]

and, where its rows are equally long, the intermediates of both towers

    vision/patch       [I, C, N - 1, D]  before the class token      vision/embedded  positions added, before ln_pre
    vision/ln_pre      vision/local_0..31 (outputs of blocks)        vision/ln_post   vision/post_tile
    vision/global_0..7 (outputs of blocks)                           vision/features  [I, C, N, 6 D], before projection
    vision/projected   all [I, C, N, D] where not said otherwise
    text/embedded      text/layer_j (outputs)  text/norm  [B, T, D]  text/logits [B, T, V]
    cross/keys_j, cross/values_j  [I, C, N, K, h]  of cross-attention layer j; keys normalised

where j counts self- and cross-attention layers alike, as Hugging Face does: of the toy's, 3 and 8 are cross layers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.toy import toy_image, toy_params, toy_weights

Array = np.ndarray

GOLDENS = Path(__file__).parent / "data" / "goldens"
GREEDY = 32
SAMPLES = 512
RELATIVE_TOLERANCE = 1e-5  # of an array's largest absolute value
LOGITS_TOLERANCE = 1e-4  # absolute


@dataclasses.dataclass(frozen=True)
class Row:
    """A prompt of `length` tokens and its images, (position of the image token, width, height) each."""

    length: int
    images: tuple[tuple[int, int, int], ...] = ()


@dataclasses.dataclass(frozen=True)
class Case:
    """A batch of rows and the toy model that reads it. Meta's code gets rows of different lengths one by one."""

    name: str
    rows: tuple[Row, ...]
    tile: int = 84
    kv_heads: int = 2
    shards: int = 1
    seed: int = 1

    @property
    def params(self) -> dict[str, Any]:
        return toy_params(self.tile, self.kv_heads)

    @property
    def weights(self) -> dict[str, Array]:
        return toy_weights(self.params, seed=self.seed)

    @property
    def ragged(self) -> bool:
        return len({row.length for row in self.rows}) > 1

    @property
    def tokens(self) -> list[Array]:
        """Ids int64 [T] of each row: BOS, then text with the image tokens in their places."""
        vocab = self.params["vocab_size"]
        rows = []
        for b, row in enumerate(self.rows):
            ids = np.random.default_rng([self.seed, b]).integers(0, vocab - 256, row.length)
            ids[0] = vocab - 256
            ids[[start for start, _, _ in row.images]] = vocab
            rows.append(ids)
        return rows

    @property
    def images(self) -> list[list[Image.Image]]:
        return [[toy_image(w, h, self.seed + start) for start, w, h in row.images] for row in self.rows]

    def reseeded(self, seed: int) -> Case:
        return dataclasses.replace(self, seed=seed)


# One picture for each of the eight canvases; some are scaled up (50 x 40) or down (400 x 390) on the way.
RATIO_SIZES = ((50, 40), (160, 80), (240, 70), (330, 60), (75, 150), (400, 390), (60, 250), (90, 500))

CASES = (
    Case("ratios", tuple(Row(10, ((1 + b % 4, *size),)) for b, size in enumerate(RATIO_SIZES))),
    Case(
        "rows",  # no image, text before one, two apart, two in succession and one more
        (
            Row(14),
            Row(14, ((5, 180, 95),)),
            Row(14, ((1, 90, 90), (7, 300, 500))),
            Row(14, ((2, 97, 190), (3, 60, 30), (9, 98, 98))),
        ),
        tile=98,
    ),
    Case("sharded", (Row(9, ((1, 170, 70),)), Row(9, ((4, 84, 200), (5, 100, 80)))), kv_heads=8, shards=8),
    Case("ragged", (Row(6, ((2, 200, 210),)), Row(13, ((1, 110, 90), (8, 112, 224))), Row(9)), tile=112),
)


def sample_positions(size: int) -> Array:
    """int64 [S] flat positions in an array of `size` elements, spread over all of its axes."""
    return np.arange(SAMPLES) * 104729 % size  # a prime: no axis is stepped over


def all_positions(size: int) -> Array:
    return np.arange(size)


@dataclasses.dataclass(frozen=True)
class Sample:
    """What is kept of one of Meta's arrays: the values float32 [S] at flat positions int64 [S]."""

    shape: tuple[int, ...]
    scale: float
    values: Array
    positions: Array

    def error(self, array: Array) -> float:
        """The largest absolute difference of `array` from Meta's at the positions kept."""
        if array.shape != self.shape:
            raise AssertionError(f"shape {array.shape}, Meta's is {self.shape}")
        return float(np.abs(np.asarray(array, np.float64).ravel()[self.positions] - self.values).max())


@dataclasses.dataclass(frozen=True)
class Golden:
    """What Meta's code makes of a case: samples of its arrays by name, and greedy ids [B, 32]."""

    arrays: Mapping[str, Sample]
    greedy: list[list[int]]

    @classmethod
    def of(cls, arrays: Mapping[str, Array], positions: Callable[[int], Array] = sample_positions) -> Golden:
        """Keep `arrays`, named as above, at the `positions` chosen by their size."""
        samples = {}
        for name, array in arrays.items():
            if name != "greedy":
                kept = positions(array.size)
                samples[name] = Sample(array.shape, float(np.abs(array).max()), array.ravel()[kept], kept)
        return cls(samples, arrays["greedy"].tolist())

    @classmethod
    def load(cls, path: Path) -> Golden:
        with np.load(path) as file:
            stored = dict(file)
        samples = zip(stored["shapes"].tolist(), stored["scales"].tolist(), stored["values"], strict=True)
        arrays = {
            str(name): Sample(
                tuple(n for n in shape if n), scale, values, sample_positions(math.prod(filter(None, shape)))
            )
            for name, (shape, scale, values) in zip(stored["names"], samples, strict=True)
        }
        return cls(arrays, stored["greedy"].tolist())

    def save(self, path: Path) -> None:
        samples = self.arrays.values()
        np.savez_compressed(
            path,
            names=np.array(list(self.arrays)),
            shapes=np.array([sample.shape + (0,) * (5 - len(sample.shape)) for sample in samples], np.int32),
            scales=np.array([sample.scale for sample in samples], np.float32),
            values=np.stack([sample.values for sample in samples]).astype(np.float32),
            greedy=np.array(self.greedy, np.int32),
        )

    def under(self, *prefixes: str) -> dict[str, Sample]:
        return {name: sample for name, sample in self.arrays.items() if name.startswith(prefixes)}


def spans(tokens: Array, image_token: int) -> list[list[int]]:
    """[first, end) of the tokens that see each image of a row; -1: to the end, generated tokens included."""
    starts = np.flatnonzero(tokens == image_token).tolist()
    ends = [*starts[1:], -1][: len(starts)]
    for i in reversed(range(len(starts) - 1)):  # images in succession are seen as far as the last of them
        if starts[i + 1] == starts[i] + 1:
            ends[i] = ends[i + 1]
    return [list(span) for span in zip(starts, ends, strict=True)]


def present(features: Array, images: Iterable[list[Any]]) -> Array:
    """[B, I, ...] -> [images that are present, ...]: rows with fewer images than others are filled up."""
    return np.concatenate([row[: len(own)] for row, own in zip(features, images, strict=True)])
