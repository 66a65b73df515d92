"""Who goes next: requests wait in line, and get slots as far as memory has room.

Slots are the cache of what was read: a slot keeps it when its request is gone, and the next request that begins alike,
pictures included, goes there, or copies it, and reads only the rest. So a picture that some slot holds is not encoded
again, whoever shows it.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections import Counter, deque
from collections.abc import Sequence

import jax
import numpy as np

from mllama_jax.errors import InputError
from mllama_jax.generate import levels
from mllama_jax.generate.levels import Level, Need
from mllama_jax.generate.requests import Picture, Request
from mllama_jax.generate.runner import PICTURES, Runner
from mllama_jax.generate.slots import Layers

WORTH_A_COPY = 64  # tokens that another slot has read and a free one has not
LINGER = 0.02  # seconds: any device takes longer for a picture of a model whose answers are worth waiting for
PAUSE = 0.005  # seconds between those who come together


@dataclasses.dataclass(eq=False)
class Slot:
    """A row of the caches.

    Attributes:
        marks: what its self-attention cache holds, from position 0 on.
        pictures: whose tiles its image cache holds, one behind the other.
        request: who has it; None where it is free.
        reading: whether the request is still being read.
        used: when it was last given away.
    """

    row: int
    marks: list[int | bytes] = dataclasses.field(default_factory=list)
    pictures: list[Picture] = dataclasses.field(default_factory=list)
    request: Request | None = None
    reading: bool = False
    used: int = 0

    def place_of(self, digest: bytes) -> int | None:
        """The tile at which a picture begins; None where it is not here."""
        first = 0
        for picture in self.pictures:
            if picture.digest == digest:
                return first
            first += picture.tiles
        return None

    def cut(self, level: Level) -> None:
        """Forget what has no room at a level."""
        ends = itertools.accumulate(picture.tiles for picture in self.pictures)
        self.pictures = self.pictures[: sum(end <= level.tiles for end in ends)]
        shown = [position for position, mark in enumerate(self.marks) if isinstance(mark, bytes)]
        self.marks = self.marks[: min([level.positions - 1, *shown[len(self.pictures) :]])]

    def spans(self, width: int) -> np.ndarray:
        """int32 [width, 2], the text positions that see each tile; (0, 0) for none."""
        spans = np.zeros((width, 2), np.int32)
        if self.request is not None:
            tiles = [picture.tiles for picture in self.request.pictures]
            spans[: sum(tiles)] = np.repeat(np.reshape(self.request.spans, (-1, 2)), tiles, axis=0)
        return spans


class Scheduler:
    """Gives slots to requests, first come, first served.

    How many slots there are, and how large, follows from what they hold: the caches are at one of few levels. Where a
    request needs a level with fewer slots than are taken, it waits, and those behind it too; where one becomes too long
    for all to go on, those who came last wait in front until there is room again.

    Args:
        levels: what the caches may be, from the smallest to the largest.
        context: positions of a request at most, its answer included.
        pictures: of a request at most.
        ahead: tokens for which an answer must have room before they are known.

    Attributes:
        counts: of admitted requests: prompt tokens (`prefix_cache_queries`) and how many of them a slot had read
            (`prefix_cache_hits`), pictures and how many of them some slot held (`image_cache_...`).
    """

    def __init__(self, runner: Runner, levels: list[Level], *, context: int, pictures: int, ahead: int):
        self.runner, self.levels, self.context, self.pictures, self.ahead = runner, levels, context, pictures, ahead
        self.waiting: deque[Request] = deque()
        self.slots = [Slot(row) for row in range(levels[0].rows)]
        self.counts: Counter[str] = Counter()
        self._clock = 0
        self._ahead: dict[bytes, Layers] = {}  # pictures of who is admitted next
        self._gathered = 0  # how many requests these are

    def check(self, request: Request) -> None:
        """Raises InputError where a request can never have a slot."""
        self.check_pictures(len(request.pictures))
        self.check_length(len(request.marks), request.answer.params.max_new_tokens, request.tiles)

    def check_length(self, prompt: int, new: int, tiles: int) -> None:
        """Raises InputError where so many tokens beside pictures of so many tiles can never have a slot."""
        room = self.room(tiles)
        if prompt + new > room:
            shown = f" beside {tiles} tiles of pictures" if tiles else ""
            why = "of a slot" if room == self.context else f"that fit into memory{shown}"
            raise InputError(
                f"{prompt} prompt tokens and {new} new ones exceed the {room} positions {why}; shorten the prompt or "
                f"max_new_tokens{', or show less' if room < self.context and shown else ''}"
            )

    def check_pictures(self, shown: int) -> None:
        """Raises InputError where so many can never have a slot."""
        if shown > self.pictures:
            raise InputError(f"{shown} pictures exceed the {self.pictures} of a slot; show fewer")

    def room(self, tiles: int) -> int:
        """How many positions a request may have that shows pictures of so many tiles."""
        fitting = (level.positions for level in self.levels if level.tiles >= tiles)
        return min(self.context, max(fitting, default=0))

    def cancel(self, request: Request) -> None:
        """Forget a request, wherever it is; its slot is free at once."""
        if request in self.waiting:
            self.waiting.remove(request)
            if not self.waiting:
                self._ahead = {}
        for slot in self.slots:
            if slot.request is request:
                slot.request, slot.reading = None, False

    def active(self) -> list[Request]:
        """Who has a slot, in the order in which they were given it."""
        return [slot.request for slot in sorted(self.slots, key=lambda slot: slot.used) if slot.request]

    def newest(self) -> Request | None:
        """The request that was given a slot last, of those that have one; else the first that waits."""
        active = self.active()
        return active[-1] if active else next(iter(self.waiting), None)

    def fullness(self) -> float:
        """The share of the slots' positions, `context` each, that hold something."""
        return sum(len(slot.marks) for slot in self.slots) / (len(self.slots) * self.context)

    # ---- Levels -----------------------------------------------------------------------------------------------------

    def begin_anew(self, level: Level | None = None) -> None:
        """Empty caches; who had a slot waits in front, and goes on where the answer was."""
        self._give_way(0)
        self._ahead, self._gathered = {}, 0
        level = level or self.levels[0]
        self.slots = [Slot(row) for row in range(level.rows)]
        self.runner.begin(level)

    def make_room(self) -> None:
        """Let those go on who came first, as many as fit."""
        while (level := self.level_with()) is None:
            self._give_way(len(self.active()) - 1)
        self.move(level)

    def level_with(self, *more: Request) -> Level | None:
        """The level for who has a slot, and more; None where these have to wait."""
        needs = [self._need(request) for request in (*self.active(), *more)]
        return levels.choose(self.levels, self.runner.level, needs)

    def move(self, level: Level) -> None:
        """Go on at a level that holds who has a slot; of the free slots those are kept that were used last."""
        if level is self.runner.level:
            return
        kept = sorted(self.slots, key=lambda slot: (slot.request is None, -slot.used))[: level.rows]
        kept = sorted(kept, key=lambda slot: slot.row)
        self.runner.move(level, [slot.row for slot in kept])
        self.slots = [*kept, *(Slot(0) for _ in range(level.rows - len(kept)))]
        for row, slot in enumerate(self.slots):
            slot.row = row
            slot.cut(level)

    def _need(self, request: Request) -> Need:
        """What a request takes for now, at most what it takes at its end."""
        made, most = len(request.answer.tokens), request.answer.params.max_new_tokens
        return Need(len(request.marks) + min(made + self.ahead, most), request.tiles)

    def _give_way(self, left: int) -> None:
        """Let only so many keep their slots, those who came first; the others wait in front."""
        for request in reversed(self.active()[left:]):
            self.cancel(request)
            self.waiting.appendleft(request)

    # ---- Admission --------------------------------------------------------------------------------------------------

    def admit(self) -> None:
        """Give slots to those who wait, as far as they fit and their pictures can be encoded."""
        admitted, missing, level = self._next()
        ahead, self._ahead, self._gathered = self._ahead, {}, 0
        self.move(level)
        encoded = self._encoded(missing, ahead)
        for request in admitted:
            self._place(request, encoded)
            self.waiting.popleft()  # not before: whatever fails on the way, the request is somewhere

    def encode_ahead(self) -> float:
        """Encode the pictures of those who are admitted next, where that takes no other level.

        Gives for how many seconds to leave time for more to come, who may show the same.
        """
        admitted, missing, level = self._next()
        more, self._gathered = len(admitted) > self._gathered, len(admitted)
        if level is not self.runner.level or not missing:
            return 0
        if missing.keys() <= self._ahead.keys():
            return PAUSE if more else 0
        self._ahead = self._encoded(missing, self._ahead)
        return LINGER if len(missing) < PICTURES else 0

    def linger(self, seconds: float) -> None:
        """Leave time for more to come, until the device has encoded what is read next."""
        ends, newest = time.monotonic() + seconds, jax.tree.leaves([*self._ahead.values()])[-1]
        while not newest.is_ready() and time.monotonic() < ends:
            time.sleep(PAUSE / 5)

    def _encoded(self, pictures: dict[bytes, Picture], known: dict[bytes, Layers]) -> dict[bytes, Layers]:
        """Keys and values of pictures, some of which are known."""
        new = {digest: picture for digest, picture in pictures.items() if digest not in known}
        found = known | dict(zip(new, self.runner.encode([*new.values()]), strict=True))
        return {digest: found[digest] for digest in pictures}

    def _next(self) -> tuple[list[Request], dict[bytes, Picture], Level]:
        """Who can be given a slot now, the pictures that no slot holds, and at which level."""
        admitted, missing, level = [], {}, self.runner.level
        for request in self.waiting:
            new = {p.digest: p for p in request.pictures if self._holder(p.digest) is None}
            wanted = self.level_with(*admitted, request)
            if wanted is None or (admitted and len(missing | new) > PICTURES):
                break
            admitted, missing, level = [*admitted, request], missing | new, wanted
        return admitted, missing, level

    def _place(self, request: Request, encoded: dict[bytes, Layers]) -> None:
        """Give a request the slot that serves it best, and bring its pictures there."""
        wanted = [*request.marks, *request.answer.tokens][:-1]  # the last token is read for what it foretells

        def known(slot: Slot) -> int:
            return common(wanted, slot.marks)

        free = [slot for slot in self.slots if slot.request is None]
        slot, best = max(free, key=lambda slot: (known(slot), -slot.used)), max(self.slots, key=known)
        if known(best) >= known(slot) + WORTH_A_COPY:
            slot = min(free, key=lambda slot: slot.used)
            self.runner.copy(best.row, slot.row)
            slot.marks, slot.pictures = list(best.marks), list(best.pictures)
        slot.marks = slot.marks[: known(slot)]
        held = sum(self._holder(picture.digest) is not None for picture in request.pictures)
        self.counts.update(prefix_cache_queries=len(request.marks), prefix_cache_hits=len(slot.marks))
        self.counts.update(image_cache_queries=len(request.pictures), image_cache_hits=held)
        there = sum(isinstance(mark, bytes) for mark in slot.marks)
        new = {picture.digest: picture for picture in request.pictures[there:]}
        pieces = {digest: encoded.get(digest) or self._take(new[digest]) for digest in new}  # before any is overwritten
        slot.pictures = slot.pictures[:there]
        for picture in request.pictures[there:]:
            self.runner.put(pieces[picture.digest], slot.row, sum(each.tiles for each in slot.pictures))
            slot.pictures.append(picture)
        self._clock += 1
        slot.request, slot.reading, slot.used = request, True, self._clock

    def _holder(self, digest: bytes) -> tuple[Slot, int] | None:
        """A slot, and the tile in it, where a picture's keys and values begin."""
        places = ((slot, slot.place_of(digest)) for slot in self.slots)
        return next(((slot, tile) for slot, tile in places if tile is not None), None)

    def _take(self, picture: Picture) -> Layers:
        if (held := self._holder(picture.digest)) is None:  # it went when another request took its slot
            return next(self.runner.encode([picture]))
        slot, tile = held
        return self.runner.take(slot.row, tile)


def common(a: Sequence[int | bytes], b: Sequence[int | bytes]) -> int:
    """How many tokens two sequences have in common from their beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
