"""Where an answer looked: the cross-attention behind each of its words, laid over the pictures."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import numpy as np
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont

from mllama_jax.config import VisionConfig
from mllama_jax.generate.batch import Rows
from mllama_jax.processing.image import choose_canvas, fit, tiles_of
from mllama_jax.processing.tokenizer import TextStream, Tokenizer

PANEL = 224  # pixels of a panel's longer side
COLUMNS = 6
CAPTION, GAP = 20, 8  # pixels


@dataclasses.dataclass(frozen=True)
class View:
    """A picture and where the words of an answer looked on it.

    Attributes:
        picture: what was shown.
        patches: float32 [words, rows, columns], the share of a word's attention that goes to each patch of the canvas
            on which the picture lies. Class tokens and padding, which are nowhere to be seen, take the rest.
        covered: how many columns and rows of patches the picture covers, from the top left.
    """

    picture: Image.Image
    patches: np.ndarray
    covered: tuple[float, float]

    def heat(self, word: int, size: tuple[int, int] | None = None) -> np.ndarray:
        """float32 [height, width], the heat of one word in the picture's own pixels, or at `size` (width, height)."""
        patches = Image.fromarray(self.patches[word])
        size = size or self.picture.size
        return np.asarray(patches.resize(size, Image.Resampling.BILINEAR, box=(0, 0, *self.covered)))


@dataclasses.dataclass(frozen=True)
class Look:
    """The words of an answer and, for each picture of the conversation, where they looked."""

    words: list[str]
    views: list[View]

    def draw(self) -> Image.Image:
        """One panel for each word and picture: bright where the word looked most, dark where it did not."""
        rows = -(-len(self.words) // COLUMNS)
        columns = -(-len(self.words) // rows)
        small = [(thumbnail(view.picture), view) for view in self.views]
        heats = [[view.heat(n, picture.size) for picture, view in small] for n in range(len(self.words))]
        hottest = [max(heat.max() for heat in of_word) for of_word in heats]
        heights = [picture.height + CAPTION + GAP for picture, _ in small]
        sheet = Image.new("RGB", (columns * (PANEL + GAP) + GAP, rows * sum(heights) + GAP), (24, 24, 28))
        pen, font, top = ImageDraw.Draw(sheet), ImageFont.load_default(14), GAP
        for i, ((picture, _), height) in enumerate(zip(small, heights, strict=True)):
            for n, word in enumerate(self.words):
                x, y = GAP + n % columns * (PANEL + GAP), top + n // columns * height
                pen.text((x + PANEL // 2, y + CAPTION - 6), word, (235, 235, 235), font, anchor="ms")
                panel = overlay(picture, heats[n][i] / hottest[n])
                sheet.paste(panel, (x + (PANEL - panel.width) // 2, y + CAPTION))
            top += rows * height
        return sheet


@dataclasses.dataclass(frozen=True, eq=False)
class Question:
    """Where an answer looked, before the model has told.

    Attributes:
        rows: the conversation and the answer, as the model reads them.
        words: those of the answer, each with the positions that make its tokens.
        pictures: those of the conversation.
    """

    rows: Rows
    words: list[tuple[str, list[int]]]
    pictures: Sequence[Image.Image]
    vision: VisionConfig

    def answered(self, attention: np.ndarray) -> Look:
        """From float32 [T, M, N], how each position's attention is spread over the tiles."""
        of_words = np.stack([attention[places].mean(axis=0) for _, places in self.words])  # W M N
        views, start = [], 0
        for image in self.pictures:
            shown = tiles_of(image, self.vision)
            views.append(view(of_words[:, start : start + shown], image, self.vision))
            start += shown
        return Look([word for word, _ in self.words], views)


def thumbnail(picture: Image.Image) -> Image.Image:
    """The picture at panel size."""
    scale = PANEL / max(picture.size)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    return picture.resize(size, Image.Resampling.LANCZOS)


def overlay(picture: Image.Image, heat: np.ndarray) -> Image.Image:
    """The picture, dimmed where `heat` [height, width] is 0 and amber where it is 1."""
    amber = np.array([255, 176, 48], np.float32)
    pixels, heat = np.asarray(picture, np.float32), heat[..., None]
    return Image.fromarray((pixels * (0.45 + 0.15 * heat) + 0.4 * heat * amber).astype(np.uint8))


def words_of(tokens: Sequence[int], tokenizer: Tokenizer) -> list[tuple[str, list[int]]]:
    """The words that tokens spell, each with the places of its tokens; a token may end one word and begin another."""
    stream = TextStream(tokenizer)
    words: list[tuple[str, list[int]]] = [("", [])]
    for n, token in enumerate(tokens):
        first, *further = re.split(r"\s+", stream.push(token))
        for i, piece in enumerate([first, *further]):
            if i and words[-1][0]:
                words.append(("", []))
            text, places = words[-1]
            words[-1] = (text + piece, [*places, n] if piece or not further else places)
    return [word for word in words if word[0]]


def view(attention: np.ndarray, picture: Image.Image, vision: VisionConfig) -> View:
    """Attention [words, tiles, N] to a picture's tiles, the tiles put together again and class tokens left out."""
    side = vision.tile // vision.patch
    rows, columns = choose_canvas(picture.height, picture.width, vision.tile, vision.max_tiles)
    height, width = fit(picture.height, picture.width, rows * vision.tile, columns * vision.tile, vision.tile)
    patches = rearrange(attention[..., 1:], "w (r c) (y x) -> w (r y) (c x)", r=rows, c=columns, y=side, x=side)
    return View(picture, patches, (width / vision.patch, height / vision.patch))
