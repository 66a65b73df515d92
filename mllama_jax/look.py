"""Where an answer looked: the cross-attention behind each of its words, laid over the pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mllama_jax.config import VisionConfig
from mllama_jax.processing.image import choose_canvas, fit
from mllama_jax.processing.tokenizer import TextStream, Tokenizer

PANEL = 224  # pixels of a panel's longer side
COLUMNS = 6
CAPTION, GAP = 20, 8  # pixels


@dataclasses.dataclass(frozen=True)
class Look:
    """Heat of each word of an answer on each picture.

    Attributes:
        words: the answer's words, in order.
        pictures: what was shown.
        heat: for each picture float32 [words, height, width], in its own pixels: the share of a word's attention that
            goes to the patch there. Class tokens and padding, which are nowhere to be seen, take the rest.
    """

    words: list[str]
    pictures: list[Image.Image]
    heat: list[np.ndarray]

    def draw(self) -> Image.Image:
        """One panel for each word and picture: bright where the word looked most, dark where it did not."""
        rows = -(-len(self.words) // COLUMNS)
        columns = -(-len(self.words) // rows)
        hottest = np.max([heat.max(axis=(1, 2)) for heat in self.heat], axis=0)
        panels = [
            [overlay(picture, heat[n] / hottest[n]) for n in range(len(self.words))]
            for picture, heat in zip(self.pictures, self.heat, strict=True)
        ]
        heights = [own[0].height + CAPTION + GAP for own in panels]
        sheet = Image.new("RGB", (columns * (PANEL + GAP) + GAP, rows * sum(heights) + GAP), (24, 24, 28))
        pen, font, top = ImageDraw.Draw(sheet), ImageFont.load_default(14), GAP
        for own, height in zip(panels, heights, strict=True):
            for n, (word, panel) in enumerate(zip(self.words, own, strict=True)):
                x, y = GAP + n % columns * (PANEL + GAP), top + n // columns * height
                pen.text((x + PANEL // 2, y + CAPTION - 6), word, (235, 235, 235), font, anchor="ms")
                sheet.paste(panel, (x + (PANEL - panel.width) // 2, y + CAPTION))
            top += rows * height
        return sheet


def overlay(picture: Image.Image, heat: np.ndarray) -> Image.Image:
    """The picture at panel size, dimmed where `heat` [height, width] is 0 and amber where it is 1."""
    amber = np.array([255, 176, 48], np.float32)
    pixels, heat = np.asarray(picture, np.float32), heat[..., None]
    mixed = Image.fromarray((pixels * (0.45 + 0.15 * heat) + 0.4 * heat * amber).astype(np.uint8))
    scale = PANEL / max(mixed.size)
    return mixed.resize((round(mixed.width * scale), round(mixed.height * scale)), Image.Resampling.LANCZOS)


def words_of(tokens: Sequence[int], tokenizer: Tokenizer) -> list[tuple[str, list[int]]]:
    """The words that tokens spell, each with the places of its tokens; a word begins at white space."""
    stream, words = TextStream(tokenizer), []
    for n, token in enumerate(tokens):
        piece = stream.push(token)
        if not words or (piece[:1].isspace() and words[-1][0].strip()):
            words.append(("", []))
        text, places = words[-1]
        words[-1] = (text + piece, [*places, n])
    return [(text.strip(), places) for text, places in words if text.strip()]


def on_picture(attention: np.ndarray, picture: Image.Image, vision: VisionConfig) -> np.ndarray:
    """Attention [..., tiles, N] to a picture's tiles as heat [..., height, width] in its own pixels.

    Tiles are put together again; the class token and what lies beyond the picture's edge are left out.
    """
    side = vision.tile // vision.patch
    rows, columns = choose_canvas(picture.height, picture.width, vision.tile, vision.max_tiles)
    height, width = fit(picture.height, picture.width, rows * vision.tile, columns * vision.tile, vision.tile)
    *lead, _, _ = attention.shape
    grid = attention[..., 1:].reshape(-1, rows, columns, side, side).transpose(0, 1, 3, 2, 4)
    box = (0, 0, width / vision.patch, height / vision.patch)
    heat = [
        np.asarray(
            Image.fromarray(each.reshape(rows * side, columns * side)).resize(
                picture.size, Image.Resampling.BILINEAR, box=box
            )
        )
        for each in grid
    ]
    return np.stack(heat).reshape(*lead, picture.height, picture.width)
