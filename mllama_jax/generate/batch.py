"""From ragged rows of tokens and pictures to padded arrays, with lengths in buckets to compile few programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from mllama_jax.config import MllamaConfig
from mllama_jax.errors import InputError
from mllama_jax.model.vision import TILES
from mllama_jax.processing.chat import image_spans
from mllama_jax.processing.image import preprocess


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows as arrays.

    Attributes:
        tokens: int32 [B, T], padded on the right.
        lengths: int32 [B], the true lengths.
        pixels: float32 [I, C, 3, P, P], the different pictures of all rows in order, or None where there are none.
        ratio_ids: int32 [I].
        tiles: int32 [B, M], which of the I * C tiles each row keeps; padding tiles of a picture are left out.
        spans: int32 [B, M, 2], the text positions that see each kept tile; (0, 0) for none.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    pixels: np.ndarray | None
    ratio_ids: np.ndarray
    tiles: np.ndarray
    spans: np.ndarray


def bucket(n: int, least: int = 1) -> int:
    """The next size up for which a program is compiled: a power of two, or one and a half times one."""
    size = least
    while size < n:
        size = (
            size * 3 // 2 if size & (size - 1) == 0 and size % 2 == 0 and size * 3 // 2 >= n else 1 << size.bit_length()
        )
    return size


def ladder(least: int, most: int) -> list[int]:
    """Few sizes, for which programs are compiled: each four times the one before, but for the last, which is `most`."""
    sizes = []
    while 3 * least <= most:
        sizes.append(least)
        least *= 4
    return [*sizes, most]


def fit(n: int, sizes: Sequence[int]) -> int:
    """The smallest of rising sizes that holds n."""
    return next(size for size in sizes if size >= n)


def make_rows(
    config: MllamaConfig,
    tokens: Sequence[Sequence[int]],
    images: Sequence[Sequence[Image.Image]],
    new_tokens: Sequence[int] = (),
) -> Rows:
    """Check ragged rows and pad them.

    Args:
        tokens: each row's ids; every image token belongs to the row's next picture.
        images: each row's pictures.
        new_tokens: how many tokens shall follow each row; they must fit the context too.
    """
    check_rows(config, tokens, images, new_tokens)
    lengths = np.array([len(row) for row in tokens], np.int32)
    padded = np.full((len(tokens), bucket(int(lengths.max()), 16)), config.pad, np.int32)
    for row, ids in zip(padded, tokens, strict=True):
        row[: len(ids)] = ids
    flat = list({id(image): image for row in images for image in row}.values())  # one shown twice is encoded once
    if not flat or config.vision is None:
        empty = np.zeros((len(tokens), 0), np.int32)
        return Rows(padded, lengths, None, np.zeros(0, np.int32), empty, np.zeros((*empty.shape, 2), np.int32))
    pixels, ratio_ids = preprocess(flat, config.vision)
    places = {id(image): i for i, image in enumerate(flat)}
    kept: list[list[tuple[int, int, int]]] = []
    for ids, pictures in zip(tokens, images, strict=True):
        kept.append([])
        for image, (start, end) in zip(pictures, image_spans(ids, config.image_token), strict=True):
            i = places[id(image)]
            kept[-1] += [(i * config.vision.max_tiles + tile, start, end) for tile in range(TILES[ratio_ids[i]])]
    table = np.zeros((len(tokens), bucket(max(map(len, kept))), 3), np.int32)
    for row, entries in zip(table, kept, strict=True):
        row[: len(entries)] = np.array(entries, np.int32).reshape(-1, 3)
    return Rows(padded, lengths, pixels, ratio_ids, table[..., 0], table[..., 1:])


def check_rows(
    config: MllamaConfig,
    tokens: Sequence[Sequence[int]],
    images: Sequence[Sequence[Any]],
    new_tokens: Sequence[int],
) -> None:
    """Refuse rows (see `make_rows`) that the model cannot read."""
    if not len(tokens):
        raise InputError("no rows: give at least one prompt")
    ids = config.text.vocab + (config.vision is not None)
    for b, (row, pictures) in enumerate(zip(tokens, images, strict=True)):
        if not len(row):
            raise InputError(f"row {b}: no tokens; a prompt has at least one")
        if config.vision is None and len(pictures):
            raise InputError(f"row {b}: this model is text-only and takes no pictures")
        bad = next((t for t in row if not 0 <= t < ids), None)
        if bad is not None:
            raise InputError(f"row {b}: token {bad} is outside the vocabulary of {ids} ids")
        wanted = sum(t == config.image_token for t in row)
        if wanted != len(pictures):
            raise InputError(f"row {b}: {wanted} image tokens but {len(pictures)} pictures; they must be as many")
        following = new_tokens[b] if new_tokens else 0
        if len(row) + following > config.text.context:
            raise InputError(
                f"row {b}: {len(row)} prompt tokens and {following} new ones exceed the context of "
                f"{config.text.context}; shorten the prompt or max_new_tokens"
            )
