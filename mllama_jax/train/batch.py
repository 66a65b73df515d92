"""What a training step reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from flax import struct
from PIL import Image

from mllama_jax.config import MllamaConfig
from mllama_jax.model.vision import TILES
from mllama_jax.processing.chat import image_spans
from mllama_jax.processing.image import open_image, split_tiles
from mllama_jax.processing.tokenizer import Tokenizer

IGNORED = -1


@dataclasses.dataclass(frozen=True)
class Row:
    """Tokens, the label of each, where the pictures of its image tokens are, and whether tokens were cut off."""

    tokens: list[int]
    labels: list[int]
    sources: list[Path | bytes]
    cut: bool = False

    def images(self) -> list[Image.Image]:
        return [open_image(source) for source in self.sources]


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the rows of a batch are padded to: so many tokens, so many pictures each."""

    length: int
    pictures: int


@struct.dataclass
class Batch:
    """Rows to learn from.

    Attributes:
        tokens: int32 [B, T].
        labels: int32 [B, T], the token that follows, or IGNORED; never the image token, which the head cannot make.
        pixels: uint8 [I, C, 3, P, P], tiles before normalisation; the pictures of row 0, of row 1 ..., each I / B.
        ratio_ids: int32 [I]; 0 for a picture that is not there.
        spans: int32 [B, M, 2], from which text positions a row sees each of its tiles, M = I / B * C; (0, 0) for a tile
            that is not there.
    """

    tokens: jax.Array | np.ndarray
    labels: jax.Array | np.ndarray
    pixels: jax.Array | np.ndarray
    ratio_ids: jax.Array | np.ndarray
    spans: jax.Array | np.ndarray


def make_batch(rows: Sequence[tuple[Row, list[Image.Image]] | None], shape: Shape, config: MllamaConfig) -> Batch:
    """Rows padded to `shape`; None for one that is empty."""
    tokens = np.full((len(rows), shape.length), config.pad, np.int32)
    labels = np.full((len(rows), shape.length), IGNORED, np.int32)
    vision = config.vision
    tiles, tile = (vision.max_tiles, vision.tile) if vision is not None else (0, 0)
    pixels = np.zeros((len(rows) * shape.pictures, tiles, 3, tile, tile), np.uint8)
    ratio_ids = np.zeros(len(pixels), np.int32)
    spans = np.zeros((len(rows), shape.pictures, tiles, 2), np.int32)
    for b, filled in enumerate(rows):
        if filled is None:
            continue
        row, images = filled
        tokens[b, : len(row.tokens)], labels[b, : len(row.labels)] = row.tokens, row.labels
        for i, (image, span) in enumerate(zip(images, image_spans(row.tokens, config.image_token), strict=True)):
            place = b * shape.pictures + i
            split, ratio_ids[place] = split_tiles(image, tile, tiles)
            pixels[place, : len(split)] = split
            spans[b, i, : TILES[ratio_ids[place]]] = span
    return Batch(tokens, labels, pixels, ratio_ids, spans.reshape(len(rows), shape.pictures * tiles, 2))


def stacked(batches: list[Batch]) -> Batch:
    """Batches of the same shapes, each array with a first axis for them."""
    return jax.tree.map(lambda *each: np.stack(each), *batches)


def answer_labels(tokens: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """For each token of a conversation the next one where the assistant makes it: its answers and their ends, but no
    picture in them, whose token the head cannot make."""
    header = tokenizer.encode("<|start_header_id|>assistant<|end_header_id|>\n\n", specials=True)
    ends = {tokenizer.special(name) for name in ("<|eot_id|>", "<|eom_id|>")}
    labels, answering = [IGNORED] * len(tokens), False
    for i, token in enumerate(tokens):
        answering = (answering and token not in ends) or list(tokens[i + 1 - len(header) : i + 1]) == header
        if answering and i + 1 < len(tokens) and tokens[i + 1] != tokenizer.image_token:
            labels[i] = tokens[i + 1]
    return labels
