"""Continuous batching: requests come and go between blocks of decode steps, each in a slot of the caches."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from mllama_jax.config import MllamaConfig
from mllama_jax.generate import decode, levels
from mllama_jax.generate.batch import fit
from mllama_jax.generate.requests import Request
from mllama_jax.generate.runner import Pending, Runner
from mllama_jax.generate.scheduler import Scheduler, Slot
from mllama_jax.model.mllama import MllamaModel, Params

CHUNKS = 4  # times as many tokens of prompts as a chunk are read between two dispatches
STEPS, HURRY = 8, 1  # decode steps in a dispatch, and while someone waits who could be read


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """New tokens on their way from the device, and who gets them."""

    rows: list[tuple[Slot, Request]]
    pending: Pending


class Engine:
    """Serves requests in turn, as many at once as there are slots. All of its work happens in `step`.

    Its memory follows the longest request and the most pictures of one in few levels: each takes programs of its own,
    all of which `warm_up` compiles.

    Args:
        slots: how many requests are answered at once, where they fit.
        context: positions of a request at most, its answer included.
        pictures: how many a slot has room for at first and at most.
        memory: bytes that each device has for the caches; None for as many as they take.

    Attributes:
        runner: runs its programs.
        scheduler: knows who has a slot, and who waits for one.
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
        context = min(context, model.config.text.context)
        found = levels.levels_of(model, rows=slots, context=context, pictures=pictures, memory=memory)
        self.runner = Runner(model, params, found[0])
        self.scheduler = Scheduler(self.runner, found, context=context, pictures=pictures[1], ahead=2 * STEPS)
        self._has_read = False  # rather than decoded, in the last step
        self._under_way: Block | None = None

    @property
    def config(self) -> MllamaConfig:
        return self.runner.model.config

    @property
    def busy(self) -> bool:
        return bool(self.scheduler.waiting or self.scheduler.active())

    def submit(self, request: Request) -> None:
        """Queue a request. Raises InputError where it can never have a slot."""
        self.scheduler.check(request)
        self.scheduler.waiting.append(request)

    def cancel(self, request: Request) -> None:
        """Forget a request, wherever it is; its slot is free at once."""
        self.scheduler.cancel(request)

    def step(self) -> Iterator[tuple[Request, str]]:
        """Admit who waits and read, or decode a block, in turn where there is both; gives who got which new text.
        While nobody decodes a step may also only begin to encode pictures of who waits.

        A request is finished when its answer has a `finish_reason`. Where this is left by an exception, what the slots
        held is lost, and the next call reads it again.
        """
        if self.runner.caches is None:
            self._under_way = None
            self.scheduler.begin_anew()
        decoding = any(slot.request and not slot.reading for slot in self.scheduler.slots)
        if self._under_way is None and not (self._has_read and decoding):
            if not decoding and (seconds := self.scheduler.encode_ahead()):
                self.scheduler.linger(seconds)
                return  # who has come meanwhile is read at once with them
            self.scheduler.admit()
            self._has_read = any(slot.reading for slot in self.scheduler.slots)
            if self._has_read:
                yield from self._read()
                return
        self._has_read = False
        yield from self._decode()

    # ---- Reading ----------------------------------------------------------------------------------------------------

    def _read(self) -> list[tuple[Request, str]]:
        """Read prompts in turn, a chunk of each; whose prompt ends has its first token."""
        reading = deque(sorted((slot for slot in self.scheduler.slots if slot.reading), key=lambda slot: slot.used))
        left, read, begun = CHUNKS * levels.CHUNK, [], set[Slot]()
        while reading and left > 0:
            group = self._together(reading)
            if read and begun.isdisjoint(group) and self._has_room(group):
                break  # in the next step those who come meanwhile are read with it
            made, tokens = self._read_chunks(group)
            left -= tokens
            unread = [len(self._unread(slot)) for slot in group]
            read.append((made, [(row, slot) for row, slot in enumerate(group) if unread[row] <= levels.CHUNK]))
            for slot, left_of_it in zip(group, unread, strict=True):
                if slot.request and left_of_it > levels.CHUNK:
                    slot.marks = [*slot.request.marks, *slot.request.answer.tokens][: len(slot.marks) + levels.CHUNK]
                    reading.append(slot)
                    begun.add(slot)
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
        while reading and len(group) < self.runner.level.together:
            longest = max(longest, self._size(reading[0]))
            if group and not levels.is_short(longest):
                break
            group.append(reading.popleft())
        return group

    def _has_room(self, group: Sequence[Slot]) -> bool:
        """Whether more could be read at once with these."""
        return len(group) < self.runner.level.together and levels.is_short(max(map(self._size, group)))

    def _read_chunks(self, group: Sequence[Slot]) -> tuple[decode.Made, int]:
        """Let slots read a chunk each: what follows each, on the device, and how many tokens went through the model."""
        level, length = self.runner.level, max(map(self._size, group))
        size = 1 if len(group) == 1 else level.together  # one or all, for few programs
        padded = [*group, *[group[0]] * (size - len(group))]
        requests = [slot.request for slot in padded if slot.request]
        tokens = np.full((size, length), self.config.pad, np.int32)
        starts, ends = np.zeros((2, size), np.int32)
        for row, (slot, request) in enumerate(zip(padded, requests, strict=True)):
            end = min(len(slot.marks) + levels.CHUNK, len(request.tokens))
            start = min(len(slot.marks), level.positions - length)  # what would end behind the cache, earlier
            new = request.tokens[start:end]
            tokens[row, : len(new)], starts[row], ends[row] = new, start, len(new) - 1
        spans = np.stack([slot.spans(level.tiles) for slot in padded])
        made = self.runner.read(requests, spans, [slot.row for slot in padded], tokens, starts, ends)
        return made, size * length

    # ---- Decoding ---------------------------------------------------------------------------------------------------

    def _decode(self) -> Iterator[tuple[Request, str]]:
        """A block of new tokens for everyone whose prompt has been read; when it comes the next is under way."""
        self._under_way = block = self._under_way or self._begin()
        if block is None:
            return
        if self._hurried and block.pending.columns.is_fully_addressable:
            self.scheduler.encode_ahead()  # while the block comes and is told; where it fails the block is still there
        self._under_way = None
        following = self.runner.go_on(block.pending, self._steps(block.rows)) if self._may_go_on(block) else None
        known = False
        try:
            made, columns = decode.on_host(block.pending.made), int(block.pending.columns)
            rows = [(slot, request) for slot, request in block.rows if slot.request is request]  # but who was cancelled
            texts = [self._push(slot, made, slot.row, columns) for slot, _ in rows]
            known = True
            yield from ((request, text) for (_, request), text in zip(rows, texts, strict=True))
        finally:
            after = Block(block.rows, following.result()) if following is not None else None
            self._under_way = after if known else None  # what follows a block that was lost is lost too

    def _begin(self) -> Block | None:
        """Decode from where the answers are; None where there are none."""
        self.scheduler.make_room()
        slots, tiles = self.scheduler.slots, self.runner.level.tiles
        rows = [(slot, slot.request) for slot in slots if slot.request and not slot.reading]
        if not rows:
            return None
        requests: list[Request | None] = [None] * len(slots)
        spans = np.zeros((len(slots), tiles, 2), np.int32)
        # Idle rows write at the last position, which nobody ever sees.
        position = np.full(len(slots), self.runner.level.positions - 1, np.int32)
        for slot, request in rows:
            requests[slot.row], spans[slot.row], position[slot.row] = request, slot.spans(tiles), len(slot.marks)
        return Block(rows, self.runner.decode(requests, spans, position, self._steps(rows)))

    def _may_go_on(self, block: Block) -> bool:
        """Whether the next block can begin before this one is known, and keeps nobody waiting."""
        if self._hurried or any(request.guide for _, request in block.rows):
            return False
        if self.scheduler.level_with() is not self.runner.level:
            return False
        if not block.pending.columns.is_fully_addressable:
            return False  # to gather a block from several processes is itself a program, behind the next block
        return any(
            request.answer.params.max_new_tokens > len(request.answer.tokens) + STEPS for _, request in block.rows
        )

    def _steps(self, rows: Sequence[tuple[Slot, Request]]) -> int:
        """Of the next dispatch."""
        if any(request.guide for _, request in rows):
            return 1
        return HURRY if self._hurried else STEPS

    @property
    def _hurried(self) -> bool:
        """Whether someone waits only for the others to let it read."""
        waiting = self.scheduler.waiting
        fits = bool(waiting) and self.scheduler.level_with(waiting[0]) is not None
        return fits or any(slot.reading for slot in self.scheduler.slots)

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
