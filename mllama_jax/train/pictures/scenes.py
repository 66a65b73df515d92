"""Scenes of coloured shapes, each in one of nine places, and questions that only the picture can answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw

from mllama_jax.train.pictures import canvas
from mllama_jax.train.pictures.canvas import Colour, coin, pick
from mllama_jax.train.pictures.example import Asked, Box, Example

SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross", "ring", "heart")
COLOURS: dict[str, Colour] = {
    "red": (220, 38, 38),
    "orange": (246, 128, 14),
    "yellow": (247, 205, 23),
    "green": (34, 158, 70),
    "cyan": (34, 196, 214),
    "blue": (38, 96, 226),
    "purple": (138, 62, 196),
    "pink": (244, 132, 186),
}
PLACES = ("top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right")
_PREPOSITIONS = {"top": "at", "bottom": "at", "left": "on", "right": "on"}  # the others: "in the top left"


Way = tuple[str | None, str | None]  # to name things: by colour, by shape, by both


@dataclasses.dataclass(frozen=True)
class Thing:
    """A coloured shape; `place` is one of PLACES and holds the whole `box`."""

    shape: str
    colour: str
    place: str
    box: Box


@dataclasses.dataclass(frozen=True)
class Scene:
    """What a picture of `size` (width, height in pixels) shows."""

    size: tuple[int, int]
    dark: bool
    things: tuple[Thing, ...]

    def find(self, colour: str | None = None, shape: str | None = None) -> tuple[Thing, ...]:
        """The things of this colour and this shape; None stands for any."""
        return tuple(t for t in self.things if colour in (None, t.colour) and shape in (None, t.shape))


# ---- Drawing ------------------------------------------------------------------------------------------------------


def compose(rng: np.random.Generator, *, size: tuple[int, int] | None = None, most: int = 6, image: int = 0) -> Scene:
    """A random scene of 1 to `most` things, no two in the same place; `image` numbers the boxes."""
    size = size or canvas.size(rng)
    # Few shapes and few colours in a scene make counts above one; many make things that can be named.
    shapes = rng.permutation(SHAPES)[: rng.integers(1, 7)].tolist()
    colours = rng.permutation(tuple(COLOURS))[: rng.integers(1, 7)].tolist()
    things = [
        Thing(pick(rng, shapes), pick(rng, colours), PLACES[place], _box(int(place), size, image, rng))
        for place in rng.permutation(len(PLACES))[: rng.integers(1, most + 1)]
    ]
    return Scene(size, coin(rng, 0.3), tuple(things))


def _box(place: int, size: tuple[int, int], image: int, rng: np.random.Generator) -> Box:
    """A square box inside the cell of `place`, its centre in the middle half of the cell."""
    cell = size[0] / 3, size[1] / 3
    side = int(min(cell) * rng.uniform(0.6, 0.92))
    corner = []
    for index, length in zip((place % 3, place // 3), cell, strict=True):
        slack = min(length - side - 2, length / 2)  # what the box may move by, a pixel kept free on either side
        corner.append(round((index + 0.5) * length - side / 2 + slack * rng.uniform(-0.5, 0.5)))
    left, top = corner
    return Box(left, top, left + side, top + side, image)


def _outlines() -> dict[str, np.ndarray]:
    """Each shape's outline, float [points, 2] (x right, y down), centred on its bounding box of half side 1."""
    turn = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    circle = np.stack([np.sin(turn), -np.cos(turn)], -1)
    star = np.where(np.arange(10) % 2, 0.45, 1.0)[:, None] * circle[::6]
    arm = 0.34
    corners = [(arm, -1), (arm, -arm), (1, -arm), (1, arm), (arm, arm), (arm, 1)]
    cross = np.array(corners + [(-x, -y) for x, y in corners])
    heart_y = -13 * np.cos(turn) + 5 * np.cos(2 * turn) + 2 * np.cos(3 * turn) + np.cos(4 * turn)
    heart = np.stack([16 * np.sin(turn) ** 3, heart_y], -1)
    return {
        "circle": circle,
        "square": 0.9 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]),
        "triangle": circle[::20],
        "star": star,
        "diamond": np.array([(0, -1), (0.72, 0), (0, 1), (-0.72, 0)]),
        "cross": cross,
        "ring": circle,
        "heart": heart,
    }


_OUTLINES = _outlines()
_OVERSAMPLE = 4


def _mask(shape: str, side: int, angle: float) -> Image.Image:
    """The shape turned by `angle` radians, as coverage (0..255) of a square of `side` pixels, with smooth edges."""
    turn = np.array([(np.cos(angle), np.sin(angle)), (-np.sin(angle), np.cos(angle))])
    points = _OUTLINES[shape] @ turn
    low, high = points.min(0), points.max(0)
    points = (points - (low + high) / 2) / max(1.0, ((high - low) / 2).max())
    half = side * _OVERSAMPLE / 2
    mask = Image.new("L", (side * _OVERSAMPLE, side * _OVERSAMPLE))
    draw = ImageDraw.Draw(mask)
    draw.polygon((half + (half - 1) * points).ravel().tolist(), fill=255)
    if shape == "ring":
        draw.polygon((half + 0.55 * half * points).ravel().tolist(), fill=0)
    return mask.reduce(_OVERSAMPLE)


def render(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """The picture of `scene`; `rng` decides shades, small turns and grain, nothing that a question asks about."""
    image = canvas.ground(scene.size, scene.dark, rng)
    for thing in scene.things:
        shade = np.clip(np.array(COLOURS[thing.colour]) + rng.integers(-8, 9, 3), 0, 255)
        mask = _mask(thing.shape, thing.box.right - thing.box.left, rng.uniform(-0.14, 0.14))
        image.paste(tuple(shade.tolist()), thing.box[:2], mask)
    return canvas.grain(image, rng)


# ---- Asking -------------------------------------------------------------------------------------------------------


def noun(colour: str | None = None, shape: str | None = None, *, many: bool = False) -> str:
    """ "red circle", "circles", "blue shape": what `Scene.find` finds, in words."""
    word = shape or "shape"
    ending = ("es" if word.endswith("s") else "s") if many else ""
    return " ".join(filter(None, (colour, word + ending)))


def boxes(things: Sequence[Thing]) -> tuple[Box, ...]:
    return tuple(thing.box for thing in things)


def a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def at(place: str) -> str:
    """ "in the top left", "at the bottom"."""
    return f"{_PREPOSITIONS.get(place, 'in')} the {place}"


def alone(scene: Scene, thing: Thing) -> bool:
    """Whether its place names the thing: "at the top" would not, were there another in the top left."""
    if thing.place not in _PREPOSITIONS:
        return True
    return not any(thing.place in other.place.split() for other in scene.things if other is not thing)


def names(scene: Scene) -> list[tuple[Thing, Way]]:
    """Every way to name one single thing of the scene."""
    ways: list[tuple[Thing, Way]] = []
    for thing in scene.things:
        ways += [(thing, way) for way in ((thing.colour, None), (None, thing.shape), (thing.colour, thing.shape))]
    return [(thing, way) for thing, way in ways if len(scene.find(*way)) == 1]


def _shape(scene: Scene, rng: np.random.Generator) -> Asked | None:
    by_place = [(t, at(t.place)) for t in scene.things if alone(scene, t)]
    by_colour = [(t, t.colour) for t in scene.things if len(scene.find(t.colour)) == 1]
    forms = [form for form in (by_place, by_colour) if form]
    if not forms:
        return None
    thing, which = pick(rng, pick(rng, forms))
    ask = pick(rng, ("What shape is {}?", "Which shape is {}?", "Name the shape that is {}."))
    return Asked(ask.format(which), thing.shape, (thing.box,))


def _colour(scene: Scene, rng: np.random.Generator) -> Asked | None:
    by_place = [(t, f"shape {at(t.place)}") for t in scene.things if alone(scene, t)]
    by_shape = [(t, t.shape) for t in scene.things if len(scene.find(None, t.shape)) == 1]
    forms = [form for form in (by_place, by_shape) if form]
    if not forms:
        return None
    thing, which = pick(rng, pick(rng, forms))
    ask = pick(rng, ("What colour is the {}?", "Which colour is the {}?", "What is the colour of the {}?"))
    return Asked(ask.format(which), thing.colour, (thing.box,))


def _place(scene: Scene, rng: np.random.Generator) -> Asked | None:
    ways = names(scene)
    if not ways:
        return None
    thing, way = pick(rng, ways)
    ask = pick(rng, ("Where is the {}?", "Which place is the {} in?", "Where do you see the {}?"))
    return Asked(ask.format(noun(*way)), thing.place, (thing.box,))


def _count(scene: Scene, rng: np.random.Generator) -> Asked:
    if coin(rng, 0.2):
        ask = pick(rng, ("How many shapes are there in all?", "How many shapes do you see?", "Count all shapes."))
        return Asked(ask, str(len(scene.things)), boxes(scene.things))
    form = pick(rng, ((True, False), (False, True), (True, True)))
    there, absent = _split(scene, *form)
    counts: dict[int, list[Way]] = {0: absent}
    for way in there:
        counts.setdefault(len(scene.find(*way)), []).append(way)
    likely = [n for n in counts if n] + [0] * coin(rng, 0.5)  # zero is always possible: let it not crowd out the rest
    way = pick(rng, counts[pick(rng, likely)])
    ask = pick(rng, ("How many {} are there?", "How many {} do you see?", "Count the {}."))
    found = scene.find(*way)
    return Asked(ask.format(noun(*way, many=True)), str(len(found)), boxes(found))


def _exists(scene: Scene, rng: np.random.Generator) -> Asked:
    form = pick(rng, ((True, False), (False, True), (True, True)))
    there, absent = _split(scene, *form)
    yes = coin(rng)
    way = pick(rng, there if yes else absent)
    ask = pick(rng, ("Is there {}?", "Do you see {}?", "Is there {} in the picture?"))
    return Asked(ask.format(a(noun(*way))), "yes" if yes else "no", boxes(scene.find(*way)))


def _split(scene: Scene, by_colour: bool, by_shape: bool) -> tuple[list[Way], list[Way]]:
    """What there is and what there is not, as (colour, shape), None where that is not asked for.

    Of the pairs that are absent, those of a colour and a shape that are both there come first: only they make one look
    at the two together. The others are left out where there are such.
    """
    colours: Sequence[str | None] = tuple(COLOURS) if by_colour else (None,)
    shapes: Sequence[str | None] = SHAPES if by_shape else (None,)
    ways = [(colour, shape) for colour in colours for shape in shapes]
    there = [way for way in ways if scene.find(*way)]
    absent = [way for way in ways if not scene.find(*way)]
    near = [(colour, shape) for colour, shape in absent if scene.find(colour) and scene.find(None, shape)]
    return there, near or absent


KINDS: dict[str, Callable[[Scene, np.random.Generator], Asked | None]] = {
    "shape": _shape,
    "colour": _colour,
    "place": _place,
    "count": _count,
    "exists": _exists,
}


def sample(rng: np.random.Generator) -> Example:
    """A question of a random kind about a random scene."""
    kind = pick(rng, tuple(KINDS))
    while True:
        scene = compose(rng)
        asked = KINDS[kind](scene, rng)
        if asked is not None:
            return Example((render(scene, rng),), asked.question, asked.answer, f"scenes/{kind}", asked.boxes, (scene,))
