"""Continuous batching: requests come and go between blocks of decode steps, each in a slot of the caches.

Slots are the cache of what was read: a slot keeps it when its request is gone, and the next request that begins alike,
pictures included, goes there, or copies it, and reads only the rest. So a picture that some slot holds is not encoded
again, whoever shows it.

How many slots there are, and how large, follows from what they hold and from what fits into memory (`levels`): requests
that are too long or show too much for many slots have few.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from mllama_jax.config import MllamaConfig
from mllama_jax.errors import InputError
from mllama_jax.generate import decode, levels, slots
from mllama_jax.generate.batch import fit
from mllama_jax.generate.levels import Level, Need
from mllama_jax.generate.requests import Picture, Request, settings_of
from mllama_jax.generate.sampling import Settings
from mllama_jax.generate.slots import Caches, Layers, picture_tiles
from mllama_jax.model.mllama import MllamaModel, Params

CHUNKS = 4  # times as many tokens of prompts as a chunk are read between two dispatches
PICTURES = 8  # encoded between two dispatches
STEPS, HURRY = 8, 2  # decode steps in a dispatch, and while someone waits who could be read
WORTH_A_COPY = 64  # tokens that another slot has read and a free one has not


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


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """New tokens on their way from the device.

    Attributes:
        rows: who gets them.
        state, settings, spans, top: what the next block goes on from; the caches are the engine's.
        made, columns: the tokens, and how many a row got.
    """

    rows: list[tuple[Slot, Request]]
    state: decode.State
    settings: Settings
    spans: jax.Array
    top: int
    made: decode.Made
    columns: jax.Array


class Engine:
    """Serves requests in turn, as many at once as there are slots. All of its work happens in `step`.

    Its memory follows the longest request and the most pictures of one in few levels: each takes programs of its own,
    all of which `warm_up` compiles. Where the largest do not fit into memory with all slots, requests that need them
    wait until few enough others are left; and where one becomes too long for all to go on, who came last waits until
    there is room again.

    Args:
        slots: how many requests are answered at once, where they fit.
        context: positions of a request at most, its answer included.
        pictures: how many a slot has room for at first and at most.
        memory: bytes that each device has for the caches; None for as many as they take.

    Attributes:
        levels: what the caches may be, from the smallest to the largest.
        counts: of admitted requests: prompt tokens (`prefix_cache_queries`) and how many of them a slot had read
            (`prefix_cache_hits`), pictures and how many of them some slot held (`image_cache_...`).
    """

    def __init__(
        self,
        model: MllamaModel,
        params: Params,
        *,
        slots: int,
        context: int,
        pictures: tuple[int, int] = (0, 16),
        memory: int | None = None,
    ):
        self.model, self.params, self.pictures = model, params, pictures[1]
        self.context = min(context, model.config.text.context)
        self.levels = levels.levels_of(model, rows=slots, context=self.context, pictures=pictures, memory=memory)
        self.waiting: deque[Request] = deque()
        self.slots = [Slot(row) for row in range(self.levels[0].rows)]
        self.counts: Counter[str] = Counter()
        self._level, self._caches = self.levels[0], None
        self._clock = 0
        self._has_read = False  # rather than decoded, in the last step
        self._under_way: Block | None = None
        self._dispatcher = ThreadPoolExecutor(1, "dispatch")

    @property
    def config(self) -> MllamaConfig:
        return self.model.config

    @property
    def busy(self) -> bool:
        return bool(self.waiting) or any(slot.request for slot in self.slots)

    def check(self, request: Request) -> None:
        """Raises InputError where a request cannot fit a slot."""
        prompt, new, room = len(request.marks), request.answer.params.max_new_tokens, self.room(request.tiles)
        if len(request.pictures) > self.pictures:
            raise InputError(f"{len(request.pictures)} pictures exceed the {self.pictures} of a slot; show fewer")
        if prompt + new > room:
            shown = f" beside {request.tiles} tiles of pictures" if request.tiles else ""
            why = "of a slot" if room == self.context else f"that fit into memory{shown}"
            raise InputError(
                f"{prompt} prompt tokens and {new} new ones exceed the {room} positions {why}; shorten the prompt or "
                f"max_new_tokens{', or show less' if room < self.context and shown else ''}"
            )

    def room(self, tiles: int) -> int:
        """How many positions a request may have that shows pictures of so many tiles."""
        fitting = (level.positions for level in self.levels if level.tiles >= tiles)
        return min(self.context, max(fitting, default=0))

    def submit(self, request: Request) -> None:
        """Queue a request. Raises InputError where it cannot fit a slot."""
        self.check(request)
        self.waiting.append(request)

    def cancel(self, request: Request) -> None:
        """Forget a request, wherever it is; its slot is free at once."""
        if request in self.waiting:
            self.waiting.remove(request)
        for slot in self.slots:
            if slot.request is request:
                slot.request, slot.reading = None, False

    def newest(self) -> Request | None:
        """The request that was given a slot last, of those that have one; else the first that waits."""
        active = [slot for slot in self.slots if slot.request is not None]
        if active:
            return max(active, key=lambda slot: slot.used).request
        return self.waiting[0] if self.waiting else None

    def fullness(self) -> float:
        """The share of the slots' positions, `context` each, that hold something."""
        return sum(len(slot.marks) for slot in self.slots) / (len(self.slots) * self.context)

    def step(self) -> Iterator[tuple[Request, str]]:
        """Admit who waits and read, or decode a block, in turn where there is both; gives who got which new text.

        A request is finished when its answer has a `finish_reason`. Where this is left by an exception, what the slots
        held is lost, and the next call reads it again.
        """
        if self._caches is None:
            self._begin_anew()
        decoding = any(slot.request and not slot.reading for slot in self.slots)
        if self._under_way is None and not (self._has_read and decoding):
            self._admit()
            self._has_read = any(slot.reading for slot in self.slots)
            if self._has_read:
                yield from self._read()
                return
        self._has_read = False
        yield from self._decode()

    # ---- Admission --------------------------------------------------------------------------------------------------

    def _begin_anew(self, level: Level | None = None) -> None:
        """Empty caches; who had a slot waits in front, and goes on where the answer was."""
        self._under_way = None
        self._give_way(0)
        self._level = level or self.levels[0]
        self.slots = [Slot(row) for row in range(self._level.rows)]
        self._caches = slots.empty(
            self.model, slots=self._level.rows, length=self._level.positions, tiles=self._level.tiles
        )

    def _active(self) -> list[Request]:
        """Who has a slot, in the order in which they were given it."""
        return [slot.request for slot in sorted(self.slots, key=lambda slot: slot.used) if slot.request]

    def _give_way(self, left: int) -> None:
        """Let only so many keep their slots, those who came first; the others wait in front."""
        for request in reversed(self._active()[left:]):
            self.cancel(request)
            self.waiting.appendleft(request)

    def _level_with(self, *more: Request) -> Level | None:
        """The level for who has a slot, and more; None where these have to wait."""
        needs = [need(request) for request in (*self._active(), *more)]
        return levels.choose(self.levels, self._level, needs)

    def _admit(self) -> None:
        """Give slots to those who wait, first come, first served, as far as they fit and their pictures can be
        encoded."""
        admitted, missing, level = [], {}, self._level
        for request in self.waiting:
            new = {p.digest: p for p in request.pictures if self._holder(p.digest) is None}
            wanted = self._level_with(*admitted, request)
            if wanted is None or (admitted and len(missing | new) > PICTURES):
                break
            admitted, missing, level = [*admitted, request], missing | new, wanted
        self._move(level)
        encoded = {digest: self._encode(picture) for digest, picture in missing.items()}
        for request in admitted:
            self._place(request, encoded)
            self.waiting.popleft()  # not before: whatever fails on the way, the request is somewhere

    def _holder(self, digest: bytes) -> tuple[Slot, int] | None:
        """A slot, and the tile in it, where a picture's keys and values begin."""
        places = ((slot, slot.place_of(digest)) for slot in self.slots)
        return next(((slot, tile) for slot, tile in places if tile is not None), None)

    def _encode(self, picture: Picture) -> Layers:
        """Keys and values of a picture. Several at once would gain little, and the first would wait for all pixels."""
        features = decode.encode(self.model, self.params, picture.pixels, picture.ratio_id)
        tiles = np.arange(picture_tiles(self.model), dtype=np.int32)[None]
        nobody = np.zeros((*tiles.shape, 2), np.int32)
        return decode.keys_values(self.model, self.params, features, tiles, nobody).layers

    def _place(self, request: Request, encoded: dict[bytes, Layers]) -> None:
        """Give a request the slot that serves it best, and bring its pictures there."""
        wanted = [*request.marks, *request.answer.tokens][:-1]  # the last token is read for what it foretells

        def known(slot: Slot) -> int:
            return common(wanted, slot.marks)

        free = [slot for slot in self.slots if slot.request is None]
        slot, best = max(free, key=lambda slot: (known(slot), -slot.used)), max(self.slots, key=known)
        if known(best) >= known(slot) + WORTH_A_COPY:
            slot = min(free, key=lambda slot: slot.used)
            self._change(slots.copy_row, best.row, slot.row)
            slot.marks, slot.pictures = list(best.marks), list(best.pictures)
        slot.marks = slot.marks[: known(slot)]
        held = sum(self._holder(picture.digest) is not None for picture in request.pictures)
        self.counts.update(prefix_cache_queries=len(request.marks), prefix_cache_hits=len(slot.marks))
        self.counts.update(image_cache_queries=len(request.pictures), image_cache_hits=held)
        there = sum(isinstance(mark, bytes) for mark in slot.marks)
        pieces = [encoded.get(p.digest) or self._take(p) for p in request.pictures[there:]]  # before any is overwritten
        slot.pictures = slot.pictures[:there]
        for picture, piece in zip(request.pictures[there:], pieces, strict=True):
            self._put(piece, slot.row, sum(each.tiles for each in slot.pictures))
            slot.pictures.append(picture)
        self._clock += 1
        slot.request, slot.reading, slot.used = request, True, self._clock

    def _put(self, piece: Layers, row: int, first: int) -> None:
        self._change(functools.partial(slots.put_tiles, self.model), piece, row, first)

    def _take(self, picture: Picture) -> Layers:
        if (held := self._holder(picture.digest)) is None:  # it went when another request took its slot
            return self._encode(picture)
        slot, tile = held
        assert self._caches is not None
        return slots.take_tiles(self.model, self._caches, slot.row, tile)

    # ---- Reading and decoding ---------------------------------------------------------------------------------------

    def _read(self) -> list[tuple[Request, str]]:
        """Read prompts in turn, a chunk of each; whose prompt ends has its first token."""
        reading = deque(sorted((slot for slot in self.slots if slot.reading), key=lambda slot: slot.used))
        left, read = CHUNKS * levels.CHUNK, []
        while reading and left > 0:
            group = self._together(reading)
            made, tokens = self._read_chunks(group)
            left -= tokens
            unread = [len(self._unread(slot)) for slot in group]
            read.append((made, [(row, slot) for row, slot in enumerate(group) if unread[row] <= levels.CHUNK]))
            for slot, left_of_it in zip(group, unread, strict=True):
                if slot.request and left_of_it > levels.CHUNK:
                    slot.marks = [*slot.request.marks, *slot.request.answer.tokens][: len(slot.marks) + levels.CHUNK]
                    reading.append(slot)
        found = []
        for made, ended in read:  # on the device the next is under way
            block = jax.tree.map(lambda x: x[:, None], decode.on_host(made)) if ended else made
            for row, slot in ended:
                assert slot.request is not None
                slot.reading = False
                found.append((slot.request, self._push(slot, block, row, 1)))
        return found

    def _unread(self, slot: Slot) -> list[int]:
        """What a slot has yet to read."""
        assert slot.request is not None
        return slot.request.tokens[len(slot.marks) :]

    def _size(self, slot: Slot) -> int:
        """How many tokens a program that reads the next chunk of a slot takes."""
        return fit(len(self._unread(slot)[: levels.CHUNK]), levels.sizes())

    def _together(self, reading: deque[Slot]) -> list[Slot]:
        """Take who is to read next, and as many of those behind as can read at once with it."""
        group, longest = [], 0
        while reading and len(group) < self._level.together:
            longest = max(longest, self._size(reading[0]))
            if group and levels.TOGETHER * longest > 2 * levels.CHUNK:
                break
            group.append(reading.popleft())
        return group

    def _read_chunks(self, group: Sequence[Slot]) -> tuple[decode.Made, int]:
        """Let slots read a chunk each: what follows each, on the device, and how many tokens went through the model."""
        length = max(map(self._size, group))
        size = 1 if len(group) == 1 else self._level.together  # one or all, for few programs
        padded = [*group, *[group[0]] * (size - len(group))]
        requests = [slot.request for slot in padded if slot.request]
        tokens = np.full((size, length), self.config.pad, np.int32)
        starts, ends = np.zeros((2, size), np.int32)
        for row, (slot, request) in enumerate(zip(padded, requests, strict=True)):
            end = min(len(slot.marks) + levels.CHUNK, len(request.tokens))
            start = min(len(slot.marks), self._level.positions - length)  # what would end behind the cache, earlier
            new = request.tokens[start:end]
            tokens[row, : len(new)], starts[row], ends[row] = new, start, len(new) - 1
        settings, counts, top = settings_of(self.config, requests)
        spans = np.stack([slot.spans(self._level.tiles) for slot in padded])
        rows = np.array([slot.row for slot in padded], np.int32)
        made = np.array([len(each.answer.tokens) for each in requests], np.int32)
        caches, self._caches = self._caches, None
        assert caches is not None
        self._caches, logits = slots.read(self.model, self.params, caches, spans, rows, tokens, starts, ends)
        return slots.follow(logits, settings, made, counts, top=top), size * length

    def _decode(self) -> Iterator[tuple[Request, str]]:
        """A block of new tokens for everyone whose prompt has been read; when it comes the next is under way."""
        block, self._under_way = self._under_way or self._begin(), None
        if block is None:
            return
        following = self._go_on(block) if self._may_go_on(block) else None
        known = False
        try:
            made, columns = decode.on_host(block.made), int(block.columns)
            rows = [(slot, request) for slot, request in block.rows if slot.request is request]  # but who was cancelled
            texts = [self._push(slot, made, slot.row, columns) for slot, _ in rows]
            known = True
            yield from ((request, text) for (_, request), text in zip(rows, texts, strict=True))
        finally:
            after = following.result() if following is not None else None
            self._under_way = after if known else None  # what follows a block that was lost is lost too

    def _begin(self) -> Block | None:
        """Decode from where the answers are; None where there are none."""
        while (level := self._level_with()) is None:
            self._give_way(len(self._active()) - 1)
        self._move(level)
        rows = [(slot, slot.request) for slot in self.slots if slot.request and not slot.reading]
        if not rows:
            return None
        n, caches = len(self.slots), self._caches
        assert caches is not None
        token, made = np.zeros(n, np.int32), np.zeros(n, np.int32)
        # Idle rows write at the last position, which nobody ever sees.
        position, done = np.full(n, caches.text[0].length - 1, np.int32), np.ones(n, bool)
        spans = np.zeros((n, self._level.tiles, 2), np.int32)
        requests: list[Request | None] = [None] * n
        for slot, request in rows:
            answer, i = request.answer, slot.row
            token[i], made[i], position[i], done[i] = answer.tokens[-1], len(answer.tokens), len(slot.marks), False
            spans[i] = slot.spans(self._level.tiles)
            requests[i] = request
        settings, counts, top = settings_of(self.config, requests)
        state = self.state(token, position, made, done, counts)
        return self._dispatch(rows, state, settings, jax.device_put(spans), top).result()

    def state(self, *columns: np.ndarray | jax.Array | None) -> decode.State:
        """Of a token, its position, ... a row; where a block leaves it, lest the first take a program of its own."""
        place = jax.tree.leaves(self.params)[0].sharding
        mesh = place.mesh if isinstance(place, NamedSharding) and place.is_fully_addressable else None
        whole = mesh and NamedSharding(mesh, PartitionSpec())
        token, position, made, done, counts = jax.device_put(columns, whole)
        return decode.State((), token, position, made, done, counts)

    def _may_go_on(self, block: Block) -> bool:
        """Whether the next block can begin before this one is known, and keeps nobody waiting."""
        if self._hurried or any(request.guide for _, request in block.rows):
            return False
        if self._level_with() is not self._level:
            return False
        if not block.columns.is_fully_addressable:
            return False  # to gather a block from several processes is itself a program, behind the next block
        return any(
            request.answer.params.max_new_tokens > len(request.answer.tokens) + STEPS for _, request in block.rows
        )

    def _go_on(self, block: Block) -> Future[Block]:
        """Decode from where a block ends, on the device."""
        return self._dispatch(block.rows, block.state, block.settings, block.spans, block.top)

    def _dispatch(
        self, rows: list[tuple[Slot, Request]], state: decode.State, settings: Settings, spans: jax.Array, top: int
    ) -> Future[Block]:
        """Decode in the thread for that: a GPU asks its host before each step whether there is another, so that a
        dispatch lasts as long as the block. Nobody else touches the caches until it is done."""
        caches, self._caches = self._caches, None
        assert caches is not None
        steps = HURRY if self._hurried else STEPS
        if any(request.guide for _, request in rows):
            steps = 1

        def run() -> Block:
            after, made, columns = decode.decode(
                self.model,
                self.params,
                dataclasses.replace(state, cache=caches.text),
                caches.cross(spans, slots.tile_tokens(self.model)),
                settings,
                steps=steps,
                top=top,
            )
            self._caches = dataclasses.replace(caches, text=after.cache)
            return Block(rows, dataclasses.replace(after, cache=()), settings, spans, top, made, columns)

        return self._dispatcher.submit(run)

    @property
    def _hurried(self) -> bool:
        """Whether someone waits only for the others to let it read."""
        fits = bool(self.waiting) and self._level_with(self.waiting[0]) is not None
        return fits or any(slot.reading for slot in self.slots)

    def _push(self, slot: Slot, made: decode.Made, row: int, columns: int) -> str:
        """Give an answer its new tokens; all but the last of them are in the cache."""
        request = slot.request
        assert request is not None
        known = len(request.answer.tokens)
        text = request.answer.push(made, row, columns)
        if request.guide is not None:
            for token in request.answer.tokens[known:]:
                request.guide.take(token)
        slot.marks = [*request.marks, *request.answer.tokens[:-1]]
        if request.answer.finish_reason:
            slot.request = None
        return text

    # ---- Memory -----------------------------------------------------------------------------------------------------

    def _change(self, program: Callable[..., Caches], *args: Any) -> None:
        """Run a program that takes the caches and gives them back."""
        caches, self._caches = self._caches, None
        self._caches = program(caches, *args)

    def _move(self, level: Level) -> None:
        """Go on at a level that holds who has a slot; of the free slots those are kept that were used last."""
        if level is self._level:
            return
        assert self._caches is not None
        kept = sorted(self.slots, key=lambda slot: (slot.request is None, -slot.used))[: level.rows]
        kept = sorted(kept, key=lambda slot: slot.row)
        rows = np.array([*(slot.row for slot in kept), *[0] * (level.rows - len(kept))], np.int32)
        text, tiles, self._caches = [*self._caches.text], [*self._caches.tiles], None
        tile = slots.tile_length(self.model)
        for layers, length, axis in (text, level.positions, "cache"), (tiles, level.tiles * tile, "image_seq"):
            for i, layer in enumerate(layers):  # one after the other, so that no two whole caches exist
                if (layer.rows, layer.length) != (level.rows, length):
                    layers[i] = layer = slots.moved(self.model, layer, rows, length=length, axis=axis)
        self._caches, self._level = Caches(tuple(text), tuple(tiles)), level
        for slot in kept:
            slot.cut(level)
        self.slots = [*kept, *(Slot(0) for _ in range(level.rows - len(kept)))]
        for row, slot in enumerate(self.slots):
            slot.row = row


def need(request: Request) -> Need:
    """What a request takes until the block after the next one has come, at most what it takes at its end."""
    prompt, answer = len(request.prompt.tokens), request.answer
    return Need(prompt + min(len(answer.tokens) + 2 * STEPS, answer.params.max_new_tokens), request.tiles)


def common(a: Sequence[int | bytes], b: Sequence[int | bytes]) -> int:
    """How many tokens two sequences have in common from their beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
