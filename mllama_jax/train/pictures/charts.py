"""Bar charts with labelled bars and a scale, and questions about their values."""

from __future__ import annotations

import dataclasses
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from mllama_jax.train.pictures import canvas
from mllama_jax.train.pictures.canvas import Colour, coin, pick
from mllama_jax.train.pictures.example import Asked, Box, Example

CATEGORIES = (
    *("apple", "pear", "plum", "fig", "lime", "kiwi", "grape", "corn", "rice", "bean", "milk", "tea", "bread", "fish"),
    *("cat", "dog", "fox", "bear", "wolf", "hen", "cow", "duck", "car", "bus", "bike", "train", "boat", "plane"),
    *("north", "south", "east", "west", "gold", "iron", "coal", "oil", "wind", "sun", "rain", "snow"),
)
# The scale's end, the step of its ticks, and what values are multiples of where only the scale tells them.
_SCALES = (
    *((10, 2, 1), (20, 5, 1), (40, 10, 2), (50, 10, 5), (100, 20, 5), (100, 25, 5)),
    *((10, 5, 1), (20, 10, 1), (50, 25, 5), (100, 50, 5)),  # for small charts
)
_PALETTE: tuple[Colour, ...] = (
    *((66, 133, 214), (234, 120, 66), (70, 168, 122), (226, 92, 110), (148, 112, 204), (222, 168, 40)),
    *((62, 172, 186), (204, 106, 170), (132, 150, 74), (120, 132, 158)),
)
_RATIOS = ((2, 2), (2, 2), (1, 2), (1, 3), (1, 4))


@dataclasses.dataclass(frozen=True)
class Bar:
    """One bar: its `box` begins at the axis and ends at the value; `box` and `colour` are what is drawn."""

    name: str
    value: int
    box: Box
    colour: Colour


@dataclasses.dataclass(frozen=True)
class Chart:
    """A picture of `size` (width, height in pixels) with bars inside `plot`.

    The scale runs from 0 to `end` with a number every `step`. Either each bar bears its value (`printed`), or values
    are multiples of `unit`, so that the scale tells them exactly.
    """

    size: tuple[int, int]
    dark: bool
    horizontal: bool
    printed: bool
    end: int
    step: int
    unit: int
    font: int
    plot: Box
    bars: tuple[Bar, ...] = ()

    def along(self, value: float) -> int:
        """Where `value` lies on the scale: x for horizontal bars, y for upright ones, in pixels."""
        if self.horizontal:
            return round(self.plot.left + (self.plot.right - self.plot.left) * value / self.end)
        return round(self.plot.bottom - (self.plot.bottom - self.plot.top) * value / self.end)


# ---- Drawing ------------------------------------------------------------------------------------------------------


@cache
def _widest(font: int) -> int:
    """Pixels that the widest category takes."""
    return max(int(canvas.font(font).getlength(name)) for name in CATEGORIES) + 1


def compose(rng: np.random.Generator) -> Chart:
    """A random chart of 2 to 6 bars, as many as their labels leave room for."""
    size = canvas.size(rng, _RATIOS)
    horizontal = coin(rng, 0.35)
    blank = Chart(size, coin(rng, 0.25), horizontal, coin(rng), *_scale(rng, size, horizontal))
    length = blank.plot.bottom - blank.plot.top if horizontal else blank.plot.right - blank.plot.left
    most = length // (blank.font + 5 if horizontal else _widest(blank.font) + 4)
    count = int(rng.integers(2, min(6, most) + 1))
    unit = 1 if blank.printed else blank.unit
    values = unit * rng.integers(1, blank.end // unit + 1, count)
    names = rng.permutation(CATEGORIES)[:count].tolist()
    colours = [_PALETTE[i] for i in rng.permutation(len(_PALETTE))[:count]]
    if coin(rng, 0.4):
        colours = colours[:1] * count
    share = rng.uniform(0.5, 0.8)  # of its slot that a bar fills
    boxes = [_bar(blank, i / count, 1 / count, share, value) for i, value in enumerate(values.tolist())]
    bars = tuple(Bar(*bar) for bar in zip(names, values.tolist(), boxes, colours, strict=True))
    return dataclasses.replace(blank, bars=bars)


def _scale(rng: np.random.Generator, size: tuple[int, int], horizontal: bool) -> tuple[int, int, int, int, Box]:
    """A scale whose numbers have room beside each other: `end`, `step`, `unit`, `font` and `plot` of the chart."""
    width, height = size
    font = int(rng.integers(11, 14)) if width > 200 else 11
    while True:
        end, step, unit = pick(rng, _SCALES)
        number = int(canvas.font(font).getlength(str(end)))
        if horizontal:
            plot = Box(_widest(font) + 7, 6, width - number - 8, height - font - 8)
            room, needed = plot.right - plot.left, number + 6
        else:
            plot = Box(number + 8, font + 8, width - 6, height - font - 8)
            room, needed = plot.bottom - plot.top, font
        if room * step >= needed * end:
            return end, step, unit, font, plot


def _bar(chart: Chart, start: float, slot: float, share: float, value: int) -> Box:
    """The box of a bar of `value` in the middle of a slot (`start`, `slot` as parts of the plot)."""
    plot, near, far = chart.plot, start + slot * (1 - share) / 2, start + slot * (1 + share) / 2
    if chart.horizontal:
        top, bottom = (round(plot.top + part * (plot.bottom - plot.top)) for part in (near, far))
        return Box(plot.left, top, chart.along(value), bottom)
    left, right = (round(plot.left + part * (plot.right - plot.left)) for part in (near, far))
    return Box(left, chart.along(value), right, plot.bottom)


def render(chart: Chart, rng: np.random.Generator) -> Image.Image:
    """The picture of `chart`; `rng` decides only the shade of the background and the grain."""
    image = canvas.ground(chart.size, chart.dark, rng)
    draw = ImageDraw.Draw(image)
    draw.font = canvas.font(chart.font)
    ink, line, axis = ((232,) * 3, (78,) * 3, (170,) * 3) if chart.dark else ((40,) * 3, (205,) * 3, (110,) * 3)
    left, top, right, bottom, _ = chart.plot
    for tick in range(0, chart.end + 1, chart.step):
        at = chart.along(tick)
        if chart.horizontal:
            draw.line((at, top, at, bottom), line)
            draw.text((at, bottom + 4), str(tick), ink, anchor="mt")
        else:
            draw.line((left, at, right, at), line)
            draw.text((left - 4, at), str(tick), ink, anchor="rm")
    for bar in chart.bars:
        draw.rectangle((bar.box.left, bar.box.top, bar.box.right - 1, bar.box.bottom - 1), bar.colour)
        x, y = (bar.box.left + bar.box.right) // 2, (bar.box.top + bar.box.bottom) // 2
        if chart.horizontal:
            draw.text((left - 4, y), bar.name, ink, anchor="rm")
        else:
            draw.text((x, bottom + chart.font + 1), bar.name, ink, anchor="ms")
        if chart.printed:
            place, anchor = ((bar.box.right + 3, y), "lm") if chart.horizontal else ((x, bar.box.top - 2), "ms")
            draw.text(place, str(bar.value), ink, anchor=anchor)
    draw.line((left, top, left, bottom) if chart.horizontal else (left, bottom, right, bottom), axis)
    return canvas.grain(image, rng)


# ---- Asking -------------------------------------------------------------------------------------------------------


def _value(chart: Chart, rng: np.random.Generator) -> Asked:
    bar = pick(rng, chart.bars)
    ask = pick(rng, ("What is the value of {}?", "What value does {} have?", "Read the value of {}."))
    return Asked(ask.format(bar.name), str(bar.value), (bar.box,))


def _extreme(chart: Chart, rng: np.random.Generator) -> Asked | None:
    largest = coin(rng)
    extreme = (max if largest else min)(bar.value for bar in chart.bars)
    found = [bar for bar in chart.bars if bar.value == extreme]
    if len(found) > 1:
        return None
    ask = pick(rng, ("Which is the {}?", "Which bar is the {}?", "Which one has the {} value?"))
    return Asked(ask.format("largest" if largest else "smallest"), found[0].name, (found[0].box,))


def _compare(chart: Chart, rng: np.random.Generator) -> Asked | None:
    this, that = (chart.bars[i] for i in rng.permutation(len(chart.bars))[:2])
    if this.value == that.value:
        return None
    larger = coin(rng)
    ask = pick(rng, ("Is {} {} than {}?", "Is the value of {} {} than that of {}?"))
    question = ask.format(this.name, "larger" if larger else "smaller", that.name)
    return Asked(question, "yes" if larger == (this.value > that.value) else "no", (this.box, that.box))


def _bars(chart: Chart, rng: np.random.Generator) -> Asked:
    ask = pick(rng, ("How many bars are there?", "How many bars does the chart have?", "Count the bars."))
    return Asked(ask, str(len(chart.bars)), tuple(bar.box for bar in chart.bars))


KINDS = {"value": _value, "extreme": _extreme, "compare": _compare, "bars": _bars}


def sample(rng: np.random.Generator) -> Example:
    """A question of a random kind, values twice as often as each other one, about a random chart."""
    kind = pick(rng, ("value", *KINDS))
    while True:
        chart = compose(rng)
        asked = KINDS[kind](chart, rng)
        if asked is not None:
            return Example((render(chart, rng),), asked.question, asked.answer, f"charts/{kind}", asked.boxes, (chart,))
