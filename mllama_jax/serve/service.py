"""What a server answers with: a model, its engine, a guard in front, and the answers in progress."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import gc
import json
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from jax.errors import JaxRuntimeError

from mllama_jax.api import Mllama
from mllama_jax.errors import InputError
from mllama_jax.generate.answer import Answer
from mllama_jax.generate.batch import Rows
from mllama_jax.generate.engine import Engine
from mllama_jax.generate.levels import free_memory, row_bytes
from mllama_jax.generate.requests import Pictures, Request
from mllama_jax.generate.slots import picture_tiles
from mllama_jax.generate.warm import warm_up
from mllama_jax.look import Look
from mllama_jax.processes import leaving
from mllama_jax.processing.chat import Read
from mllama_jax.processing.guard import SAFE, Verdict
from mllama_jax.serve import protocol
from mllama_jax.serve.guard import Guard, as_conversation
from mllama_jax.serve.guide import Guide, Vocabulary
from mllama_jax.serve.hosts import FollowedEngine, Follower, Leader
from mllama_jax.serve.images import read_picture
from mllama_jax.serve.looking import Looking
from mllama_jax.serve.metrics import Metrics
from mllama_jax.serve.protocol import Asked
from mllama_jax.serve.replies import Job
from mllama_jax.serve.worker import Piece, Worker

log = logging.getLogger("mllama_jax.serve")

PREPARING = 4  # requests at once: more would keep Python's lock from the first
FETCHING = 32  # that wait for their pictures' hosts meanwhile


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a server takes.

    Attributes:
        queue: requests that may wait for a slot.
        pictures: of a request.
        body: bytes of a request, which must come within `seconds`.
        hosts: from which pictures may be fetched.
        keys: one of which a request must bear, if there are any.
    """

    queue: int = 256
    pictures: int = 4
    body: int = 32 * 2**20
    seconds: float = 30.0
    hosts: frozenset[str] = frozenset()
    keys: tuple[str, ...] = ()


class Service:
    """A model, its engine, and the requests that it answers; a Llama Guard in front if there is one."""

    def __init__(
        self, model: Mllama, name: str, *, slots: int, context: int, limits: Limits, guard: Mllama | None = None
    ):
        self.guard: Guard | None = None
        if model.tokenizer is None:
            raise InputError(f"{model.directory}: no tokenizer.json or tokenizer.model here; serving needs one, add it")
        self.model, self.name, self.limits, self.tokenizer = model, name, limits, model.tokenizer
        self._turns = turns = ThreadPoolExecutor(1)  # of those who use the devices
        pictures = min(limits.pictures, 1), limits.pictures
        memory, guards = shared(free_memory(), model, guard, context, limits.pictures)
        engine = Engine(model.model, model.params, slots=slots, context=context, pictures=pictures, memory=memory)
        self.worker = Worker(engine, turns)
        if guard is not None:
            room = engine.scheduler.room(0)
            self.guard = Guard(guard, slots=slots, context=room, memory=guards, turns=turns, aside=self.aside)
        self.metrics = Metrics(self.worker)
        self.ready = False
        self.looking = Looking(model, engine.scheduler.room(0), limits.pictures)
        self._one_looks = asyncio.Lock()  # one at a time, between steps of the engine
        self._threads, self._few = ThreadPoolExecutor(PREPARING + FETCHING), threading.Semaphore(PREPARING)
        self._pictures = Pictures(model.config.vision)

    def start(self) -> None:
        for worker in self._workers():
            worker.start()

    def stop(self) -> None:
        """End the engines after the steps that they are in, and the other processes."""
        for worker in self._workers():
            worker.stop()
        self.worker.leader.end()

    def lead(self, leader: Leader) -> None:
        """Tell other processes what to do."""
        for worker in self._workers():
            worker.leader = leader

    def give_up(self, why: str) -> None:
        """Tell everyone who waits that there will be no answer."""
        for worker in self._workers():
            worker.give_up(why)

    def follower(self) -> Follower:
        """What does the same in another process."""
        engines = [FollowedEngine(self.worker.engine, self.tokenizer, self.guide)]
        if self.guard is not None:
            engines.append(FollowedEngine(self.guard.worker.engine, self.guard.model.tokenizer, self.guide))
        return Follower(engines, self.model.attention)

    def _workers(self) -> list[Worker]:
        return [self.worker] if self.guard is None else [self.worker, self.guard.worker]

    def warming(self) -> Iterator[tuple[int, int]]:
        """Compile and run all that may be asked for, in every process alike; gives how many of how many steps of this
        are done, as far as they are known."""
        before = 0
        for steps in (*(warm_up(worker.engine) for worker in self._workers()), self.looking.warm_up()):
            of = 0
            for done, of in steps:
                yield before + done, before + of
            before += of

    async def warm_up(self, told: Callable[[int, int], None]) -> None:
        """Go through `warming`, of which `told` hears, and be ready."""
        loop, steps = asyncio.get_running_loop(), self.warming()
        try:
            while (step := await loop.run_in_executor(self._turns, next, steps, None)) is not None:
                told(*step)
        except JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise InputError(
                "programs and their caches do not fit into memory beside the weights; lower --slots, --context or "
                "--images"
            ) from None
        if self.guard is not None:  # a model that gives no verdict is no guard
            await self.guard.judge([{"role": "user", "content": "Hello!"}])
        keep_loaded()
        self.ready = True

    async def answer(self, conversation: list[Any], **settings: Any) -> AsyncIterator[Piece]:
        """Answer a conversation whose pictures are bytes piece by piece, as a route would without HTTP and a guard."""
        asked = Asked([conversation], settings, None, False, False, False)
        async for _, piece in self._pieces(await self.aside(self.jobs, asked, time.monotonic())):
            yield piece

    async def look(self, conversation: list[Any], answer: str, tools: list[Any] | None) -> Look:
        """Where an answer to a conversation looked on its pictures."""
        question = await self.aside(self.model.looking, conversation, answer, tools)
        rows = self.looking.padded(question.rows)
        async with self._one_looks:
            attention = await asyncio.get_running_loop().run_in_executor(self._turns, self._attend, rows)
        return await self.aside(question.answered, attention)

    def _attend(self, rows: Rows) -> np.ndarray:
        with leaving():  # the others would wait for what failed here
            self.worker.leader.tell_attention(rows)
            return self.model.attention(rows)

    # ---- Answers ----------------------------------------------------------------------------------------------------

    def read(self, prompt: Any, tools: list[Any] | None) -> Read:
        """A prompt in token ids, and its pictures as they were given, under the names of their fields in a request."""
        if isinstance(prompt, str):
            return Read([self.tokenizer.bos, *self.tokenizer.encode(prompt, specials=False)], [])
        if prompt and isinstance(prompt[0], int):
            return Read(list(prompt), [])

        def field(ours: str) -> str:
            return f"messages{ours.removeprefix('conversation')}"

        try:
            read = self.model.read(prompt, tools)
        except InputError as error:
            raise InputError(field(str(error)) if str(error).startswith("conversation") else str(error)) from None
        return Read(read.tokens, [(f"{field(where)}_url", source) for where, source in read.sources])

    def read_chat(self, body: dict[str, Any], began: float) -> tuple[Asked, list[Job]]:
        """All in one go: in stages, the first of many requests would be ready when the last has come as far."""
        asked = self.understood(body)
        return asked, self.jobs(asked, began)

    def understood(self, body: dict[str, Any]) -> Asked:
        """A chat's request, its pictures fetched."""
        return protocol.chat_request(body, self.name, self.picture, self.limits.pictures)

    def jobs(self, asked: Asked, began: float) -> list[Job]:
        """The answers that are asked for, prepared as far as the engine is not needed.

        Raises InputError, also where one can never have a slot.
        """
        config, scheduler, made = self.model.config, self.worker.engine.scheduler, []
        prompts, each, most = len(asked.prompts), asked.settings.get("n", 1), self.most
        if prompts * each > most:  # before any is made
            raise InputError(f"n: {prompts} times {each} answers exceed the {most} that may wait; ask for fewer")
        for asked_prompt in asked.prompts:
            read = self.read(asked_prompt, asked.tools)
            scheduler.check_pictures(len(read.sources))
            prompt = read.opened(self._pictures.of)
            tiles = sum(picture.tiles for picture in prompt.images)
            settings = protocol.sampling(asked, scheduler.room(tiles) - len(prompt.tokens), config.stops)
            scheduler.check_length(len(prompt.tokens), settings.max_new_tokens, tiles)
            for params in settings.each():
                answer = Answer(params, config.stops if params.stop_ids is None else params.stop_ids, self.tokenizer)
                guide = None if asked.schema is None else self.guide(asked.schema)
                request = Request.of(config, prompt, answer, guide)
                made.append(Job(request, asked_prompt, began))
        return made

    @property
    def most(self) -> int:
        """How many requests may have a slot or wait for one."""
        return self.worker.engine.scheduler.levels[0].rows + self.limits.queue

    async def judge(self, prompt: Any, answer: str | None = None) -> Verdict:
        """What the guard says of a prompt's last turn, or of the answer to it; safe where there is no guard."""
        if self.guard is None:
            return SAFE
        conversation = as_conversation(prompt, self.tokenizer)
        if answer is not None:
            conversation = [*conversation, {"role": "assistant", "content": answer}]
        verdict = await self.guard.judge(conversation)
        self.metrics.verdicts.labels("safe" if verdict.safe else "unsafe").inc()
        return verdict

    async def judged(self, jobs: list[Job]) -> AsyncIterator[tuple[int, Piece]]:
        """The pieces of all answers as they come; in the end each answer is judged."""
        async for piece in self._pieces(jobs):
            yield piece
        for job in jobs:
            job.verdict = await self.judge(job.prompt, job.answer.text)

    async def _pieces(self, jobs: list[Job]) -> AsyncIterator[tuple[int, Piece]]:
        """The pieces of all answers as they come; left early, all are cancelled."""
        async with contextlib.aclosing(self.worker.answer([job.request for job in jobs])) as pieces:
            async for i, piece in pieces:
                self._observe(jobs[i], piece)
                if piece.ended:
                    self._finish(jobs[i])
                yield i, piece

    def _observe(self, job: Job, piece: Piece) -> None:
        now = time.monotonic()
        if job.last is None:
            self.metrics.first.observe(now - job.began)
        elif piece.end > job.seen:
            self.metrics.between.observe((now - job.last) / (piece.end - job.seen))
        job.last, job.seen = now, piece.end

    def _finish(self, job: Job) -> None:
        seconds = time.monotonic() - job.began
        prompt, made = len(job.request.prompt.tokens), len(job.answer.tokens)
        self.metrics.prompt_tokens.inc(prompt)
        self.metrics.generation_tokens.inc(made)
        self.metrics.finished.labels(job.answer.finish_reason).inc()
        self.metrics.whole.observe(seconds)
        told = {"event": "answered", "prompt_tokens": prompt, "completion_tokens": made}
        told |= {
            "pictures": len(job.request.pictures),
            "reason": job.answer.finish_reason,
            "seconds": round(seconds, 3),
        }
        log.info("%s", json.dumps(told))

    def guide(self, schema: dict[str, Any]) -> Guide:
        """What holds an answer to a schema; InputError where it is none."""
        return self._vocabulary.guide(schema)

    @functools.cached_property
    def _vocabulary(self) -> Vocabulary:
        return Vocabulary(self.tokenizer, self.model.config.text.vocab, self.model.config.stops)

    def picture(self, url: str) -> bytes:
        """The file at a URL, for what runs `aside`; while its host is waited for others have their turn."""
        if url.startswith("data:"):
            return read_picture(url)
        self._few.release()
        try:
            return read_picture(url, self.limits.hosts)
        finally:
            self._few.acquire()

    async def aside(self, work: Callable[..., Any], *args: Any) -> Any:
        """Do what takes time outside of the event loop, few at once."""

        def in_turn() -> Any:
            with self._few:
                return work(*args)

        return await asyncio.get_running_loop().run_in_executor(self._threads, in_turn)


def keep_loaded() -> None:
    """Spare Python's collections what is there by now: a full one holds its lock for some 40 ms, and everyone waits."""
    gc.collect()
    gc.freeze()


def shared(
    memory: int | None, model: Mllama, guard: Mllama | None, context: int, pictures: int
) -> tuple[int | None, int | None]:
    """Memory for the caches of a model and of its guard: each gets as much as its largest requests weigh."""
    if memory is None or guard is None:
        return memory, None
    tiles = picture_tiles(model.model)
    own, guards = row_bytes(model.model, context, tiles * pictures), row_bytes(guard.model, context, tiles)
    return memory * own // (own + guards), memory * guards // (own + guards)
