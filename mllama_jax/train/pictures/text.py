"""Signs with a few printed words, numbers or codes, and questions about what they say."""

from __future__ import annotations

import colorsys
import dataclasses
import itertools
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw

from mllama_jax.train.pictures import canvas
from mllama_jax.train.pictures.canvas import Colour, coin, pick
from mllama_jax.train.pictures.example import Asked, Box, Example

WORDS = (
    *("open", "exit", "stop", "slow", "push", "pull", "danger", "hello", "hotel", "cafe", "bank", "park", "school"),
    *("market", "bridge", "garden", "museum", "river", "harbor", "north", "south", "east", "west", "street", "road"),
    *("station", "airport", "platform", "gate", "room", "floor", "ticket", "office", "library", "bakery", "fresh"),
    *("coffee", "lunch", "sale", "free", "quiet", "please", "welcome", "private", "parking", "taxi", "bus", "train"),
    *("left", "right", "keep", "clear", "caution", "water", "fire", "mind", "step", "the", "no", "entry", "closed"),
    *("today", "monday", "friday", "summer", "winter", "light", "yellow", "green", "blue", "red", "apple", "bread"),
)
# Random strings leave out what this typeface draws alike (I and l, O and 0) and letters whose two cases look alike.
_LETTERS, _CODE, _DIGITS = "abdefghjkmnpqrtuy", "ABCDEFGHJKLMNPQRSTUVWXYZ", "0123456789"
_STYLES = (str.lower, str.title, str.upper)
_RATIOS = ((1, 1), (1, 2), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2))
_SMALLEST, _LARGEST = 16, 40  # pixels an em
_MARGIN, _LEADING = 12, 1.3  # pixels from the edge of the picture; line height in ems


@dataclasses.dataclass(frozen=True)
class Sign:
    """A picture of `size` (width, height in pixels) with `words` in reading order, each in its box."""

    size: tuple[int, int]
    words: tuple[str, ...]
    boxes: tuple[Box, ...]
    font: int
    dark: bool
    framed: bool
    plate: Colour
    ink: Colour


# ---- Drawing ------------------------------------------------------------------------------------------------------


def _string(rng: np.random.Generator, alphabet: str, low: int, high: int) -> str:
    return "".join(alphabet[i] for i in rng.integers(len(alphabet), size=rng.integers(low, high + 1)))


def _word(rng: np.random.Generator) -> str:
    """A word of the list or, as often, letters that can only be read."""
    return pick(rng, WORDS) if coin(rng) else _string(rng, _LETTERS, 2, 6)


def _number(rng: np.random.Generator) -> str:
    """One to four digits, the first not zero."""
    return str(rng.integers(1, 10 ** rng.integers(1, 5)))


def _code(rng: np.random.Generator) -> str:
    return _string(rng, _CODE, 1, 3) + _string(rng, _DIGITS, 1, 3)


def compose(rng: np.random.Generator, words: Sequence[str]) -> Sign:
    """A sign that says `words`, those of letters in one random style, on a plate of random size, colour and layout."""
    style = pick(rng, _STYLES)
    words = [style(word) if word.isalpha() else word for word in words]
    while True:
        width, height = size = canvas.size(rng, _RATIOS)
        cuts = [0, *(i for i in range(1, len(words)) if coin(rng, 0.3 if width > 2 * height else 0.7)), len(words)]
        lines = [words[start:end] for start, end in itertools.pairwise(cuts)]
        longest = max(canvas.font(_LARGEST).getlength(" ".join(line)) for line in lines) / _LARGEST
        largest = min((width - 2 * _MARGIN) / longest, (height - 2 * _MARGIN) / (_LEADING * len(lines)), _LARGEST)
        if largest >= _SMALLEST:
            break
    font = int(rng.integers(_SMALLEST, int(largest) + 1))
    hue, reverse = rng.random(), coin(rng)
    deep = _colour(hue, rng.uniform(0.5, 0.9), rng.uniform(0.15, 0.5))
    pale = _colour(hue, rng.uniform(0.03, 0.25), 0.97)
    plate, ink = (deep, pale) if reverse else (pale, deep)
    boxes = _boxes(size, lines, font)
    return Sign(size, tuple(words), boxes, font, dark=coin(rng, 0.3), framed=coin(rng), plate=plate, ink=ink)


def _boxes(size: tuple[int, int], lines: list[list[str]], font: int) -> tuple[Box, ...]:
    """Where each word stands when the lines are centred: from the top to the bottom of its line."""
    face, pitch, boxes = canvas.font(font), _LEADING * font, []
    for n, line in enumerate(lines):
        top = size[1] / 2 + (n - len(lines) / 2) * pitch
        left = (size[0] - face.getlength(" ".join(line))) / 2
        for word in line:
            boxes.append(Box(round(left), round(top), round(left + face.getlength(word)), round(top + pitch)))
            left += face.getlength(word + " ")
    return tuple(boxes)


def _colour(hue: float, saturation: float, value: float) -> Colour:
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def render(sign: Sign, rng: np.random.Generator) -> Image.Image:
    """The picture of `sign`; `rng` decides only the shade of the background and the grain."""
    image = canvas.ground(sign.size, sign.dark, rng)
    for inset, colour in ((4, sign.plate), *((((6, sign.ink), (8, sign.plate))) if sign.framed else ())):
        mask = Image.new("L", (2 * sign.size[0], 2 * sign.size[1]))
        corners = (2 * inset, 2 * inset, mask.width - 2 * inset - 1, mask.height - 2 * inset - 1)
        ImageDraw.Draw(mask).rounded_rectangle(corners, 2 * (14 - inset), fill=255)
        image.paste(colour, (0, 0), mask.reduce(2))
    draw = ImageDraw.Draw(image)
    for word, box in zip(sign.words, sign.boxes, strict=True):
        draw.text((box.left, (box.top + box.bottom) / 2), word, sign.ink, canvas.font(sign.font), anchor="lm")
    return canvas.grain(image, rng)


# ---- Asking -------------------------------------------------------------------------------------------------------


def _asked_all(sign: Sign, rng: np.random.Generator) -> Asked:
    return Asked(
        pick(rng, ("What does the sign say?", "What is written?", "Read the sign.")), " ".join(sign.words), sign.boxes
    )


def _asked_word(sign: Sign, rng: np.random.Generator) -> Asked | None:
    count = len(sign.words)
    if count < 2 or not all(word.isalpha() for word in sign.words):
        return None
    n = int(rng.integers(count))
    ordinal = "last" if n == count - 1 and coin(rng, 0.7) else ("first", "second", "third")[n]
    ask = pick(rng, ("What is the {} word?", "Which word is the {} one?", "Read the {} word."))
    return Asked(ask.format(ordinal), sign.words[n], (sign.boxes[n],))


def _asked_number(sign: Sign, rng: np.random.Generator) -> Asked | None:
    numbers = [n for n, word in enumerate(sign.words) if not word.isalpha()]
    if len(numbers) != 1 or not sign.words[numbers[0]].isdigit():
        return None
    ask = pick(rng, ("What number is written?", "Which number is on the sign?", "Read the number."))
    return Asked(ask, sign.words[numbers[0]], (sign.boxes[numbers[0]],))


KINDS: dict[str, Callable[[Sign, np.random.Generator], Asked | None]] = {
    "read": _asked_all,
    "word": _asked_word,
    "number": _asked_number,
}
_MAKERS = {"read": (_word, _word, _number, _code), "word": (_word,), "number": (_word, _number)}


def sample(rng: np.random.Generator) -> Example:
    """A random sign, and a question about all of it, one of its words, or the one number on it."""
    kind = pick(rng, tuple(KINDS))
    while True:
        sign = compose(rng, [pick(rng, _MAKERS[kind])(rng) for _ in range(rng.integers(1, 4))])
        asked = KINDS[kind](sign, rng)
        if asked is not None:
            return Example((render(sign, rng),), asked.question, asked.answer, f"text/{kind}", asked.boxes, (sign,))
