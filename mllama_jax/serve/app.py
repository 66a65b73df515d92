"""The routes: OpenAI's chat and text completions, and what operators ask."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import resources
from typing import Any

import numpy as np
from jax.errors import JaxRuntimeError
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from mllama_jax.api import Mllama
from mllama_jax.errors import InputError
from mllama_jax.generate import requests
from mllama_jax.generate.answer import Answer
from mllama_jax.generate.batch import Rows
from mllama_jax.generate.engine import Engine
from mllama_jax.generate.levels import free_memory, row_bytes
from mllama_jax.generate.slots import picture_tiles
from mllama_jax.generate.warm import warm_up
from mllama_jax.processes import leaving, versions
from mllama_jax.processing.chat import Prompt
from mllama_jax.processing.guard import SAFE, NoVerdict, Verdict
from mllama_jax.processing.image import tiles_of
from mllama_jax.serve import protocol
from mllama_jax.serve.guard import Guard, as_conversation
from mllama_jax.serve.guide import Guide, Vocabulary
from mllama_jax.serve.hosts import FollowedEngine, Follower, Leader
from mllama_jax.serve.images import read_picture
from mllama_jax.serve.keys import Keys
from mllama_jax.serve.looking import Looking
from mllama_jax.serve.metrics import Metrics
from mllama_jax.serve.protocol import Asked
from mllama_jax.serve.replies import Job, Replies, told_look
from mllama_jax.serve.worker import EngineFault, Piece, Worker

log = logging.getLogger("mllama_jax.serve")

PREPARING = 4  # requests whose pictures are prepared at once: a picture may take 400 MB
RETRY = {"Retry-After": "2"}
POLICY = (  # of the page, which needs nothing from elsewhere
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; connect-src 'self'"
)


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


class Refused(Exception):
    """A request that is answered with a status and a fault."""

    def __init__(
        self, status: int, message: str, kind: str = "invalid_request_error", code: str | None = None, **headers: str
    ):
        super().__init__(message)
        self.response = JSONResponse(protocol.fault(message, kind, code), status, headers)


class Service:
    """A model, its engine, and the requests that it answers; a Llama Guard in front if there is one."""

    def __init__(
        self, model: Mllama, name: str, *, slots: int, context: int, limits: Limits, guard: Mllama | None = None
    ):
        self.guard: Guard | None = None
        if model.tokenizer is None:
            raise InputError(f"{model.directory}: no tokenizer.json or tokenizer.model here; serving needs one, add it")
        self.model, self.name, self.limits, self.tokenizer = model, name, limits, model.tokenizer
        self.replies = Replies(name, model.tokenizer)
        self._turns = turns = ThreadPoolExecutor(1)  # of those who use the devices
        pictures = min(limits.pictures, 1), limits.pictures
        memory, guards = shared(free_memory(), model, guard, context, limits.pictures)
        engine = Engine(model.model, model.params, slots=slots, context=context, pictures=pictures, memory=memory)
        self.worker = Worker(engine, turns)
        if guard is not None:
            room = engine.room(0)
            self.guard = Guard(guard, slots=slots, context=room, memory=guards, turns=turns, aside=self._aside)
        self.metrics = Metrics(self.worker)
        self.ready = False
        self._arriving = 0  # requests that are being prepared
        self.looking = Looking(model, engine.room(0), limits.pictures)
        self._one_looks = asyncio.Lock()  # one at a time, between steps of the engine
        self._preparing = ThreadPoolExecutor(PREPARING)

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

    def app(self) -> Starlette:
        routes = [
            Route("/", self.page),
            Route("/health", self.health),
            Route("/ready", self.readiness),
            Route("/metrics", self.tell_metrics),
            Route("/version", self.version),
            Route("/v1/models", self.models),
            Route("/look", self.guarded(self.look), methods=["POST"]),
            Route("/tokenize", self.guarded(self.tokenize), methods=["POST"]),
            Route("/v1/chat/completions", self.guarded(self.chat), methods=["POST"]),
            Route("/v1/completions", self.guarded(self.complete), methods=["POST"]),
        ]
        app = Starlette(routes=routes)
        app.add_middleware(Keys, keys=self.limits.keys)
        return app

    # ---- What operators ask -----------------------------------------------------------------------------------------

    async def page(self, request: Request) -> Response:
        page = resources.files("mllama_jax.serve").joinpath("page.html").read_text("utf-8")
        return HTMLResponse(page, headers={"Content-Security-Policy": POLICY})

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "alive"})

    async def readiness(self, request: Request) -> Response:
        return JSONResponse({"ready": self.ready}, 200 if self.ready else 503)

    async def tell_metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def version(self, request: Request) -> Response:
        return JSONResponse({"version": versions()["mllama-jax"], **versions()})

    async def models(self, request: Request) -> Response:
        card = {"id": self.name, "object": "model", "created": 0, "owned_by": "mllama-jax"}
        return JSONResponse({"object": "list", "data": [card | {"max_model_len": self.worker.engine.room(0)}]})

    async def tokenize(self, body: dict[str, Any], request: Request) -> Response:
        if "messages" in body:
            asked = await self._aside(protocol.chat_request, body, self.name, self._picture)
        else:
            asked = protocol.text_request(body, self.name)
        tokens = (await self._aside(self._prompt, asked.prompts[0], asked.tools)).tokens
        return JSONResponse({"tokens": tokens, "count": len(tokens), "max_model_len": self.worker.engine.room(0)})

    async def look(self, body: dict[str, Any], request: Request) -> Response:
        """Where the words of the answer with which a conversation ends look on its pictures."""
        with self._arrival():
            asked = await self._aside(protocol.chat_request, body, self.name, self._picture)
            *conversation, last = asked.prompts[0] or [{}]
            answer = last.get("content") if last.get("role") == "assistant" else None
            if not isinstance(answer, str):
                raise InputError("messages: expected an assistant's text at the end, where shall it have looked?")
            prompt = await self._aside(self._prompt, asked.prompts[0], asked.tools)
            self.looking.check(len(prompt.tokens), len(prompt.images))
            question = await self._aside(self.model.looking, conversation, answer, asked.tools)
            rows = self.looking.padded(question.rows)
            async with self._one_looks:
                attention = await asyncio.get_running_loop().run_in_executor(self._turns, self._attend, rows)
            found = await self._aside(question.answered, attention)
        return JSONResponse(told_look(found))

    def _attend(self, rows: Rows) -> np.ndarray:
        with leaving():  # the others would wait for what failed here
            self.worker.leader.tell_attention(rows)
            return self.model.attention(rows)

    def warming(self) -> Iterator[tuple[int, int]]:
        """Compile and run all that may be asked for, in every process alike; gives how many of how many steps of this
        are done."""
        for worker in self._workers():
            yield from warm_up(worker.engine)
        yield from self.looking.warm_up()

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
        self.ready = True

    async def answer(self, conversation: list[Any], **settings: Any) -> AsyncIterator[Piece]:
        """Answer a conversation piece by piece as a route would, but without HTTP and a guard."""
        asked = Asked([conversation], settings, None, False, False, False)
        async for _, piece in self._pieces(await self._aside(self._jobs, asked, time.monotonic())):
            yield piece

    # ---- Completions ------------------------------------------------------------------------------------------------

    async def chat(self, body: dict[str, Any], request: Request) -> Response:
        with self._arrival():
            asked, jobs = await self._aside(self._read_chat, body, time.monotonic())
            await self._take(asked, jobs, "messages")
        return await self._respond(asked, jobs, request, "chat.completion")

    async def complete(self, body: dict[str, Any], request: Request) -> Response:
        with self._arrival():
            asked = protocol.text_request(body, self.name)
            jobs = await self._aside(self._jobs, asked, time.monotonic())
            await self._take(asked, jobs, "prompt")
        return await self._respond(asked, jobs, request, "text_completion")

    @contextmanager
    def _arrival(self) -> Iterator[None]:
        """Refuses a request for which there is no room before its pictures take any."""
        self._admit(1)
        self._arriving += 1
        try:
            yield
        finally:
            self._arriving -= 1

    def _admit(self, more: int) -> None:
        if self.worker.open + self._arriving + more > self.worker.engine.levels[0].rows + self.limits.queue:
            raise Refused(429, "too many requests wait; try again later", "rate_limit_error", **RETRY)

    async def _take(self, asked: Asked, jobs: list[Job], field: str) -> None:
        """Refuses what does not fit, and what the guard refuses."""
        self._admit(len(jobs) - 1)
        for job in jobs:
            self.worker.engine.check(job.request)
        for prompt in asked.prompts:
            verdict = await self._judge(prompt)
            if not verdict.safe:
                raise Refused(400, f"{field}: judged {verdict}", code="content_filter")

    async def _respond(self, asked: Asked, jobs: list[Job], request: Request, kind: str) -> Response:
        if asked.stream:
            events = self.replies.stream(asked, jobs, kind, self._judged(jobs))
            return StreamingResponse(events, media_type="text/event-stream")
        whole = asyncio.ensure_future(self._whole(jobs))
        gone = asyncio.ensure_future(_gone(request))
        try:
            await asyncio.wait([whole, gone], return_when=asyncio.FIRST_COMPLETED)
            if not whole.done():
                raise ClientDisconnect
            await whole
        finally:
            whole.cancel()
            gone.cancel()
        return JSONResponse(self.replies.whole(asked, jobs, kind))

    def _prompt(self, prompt: Any, tools: list[Any] | None) -> Prompt:
        if isinstance(prompt, str):
            return Prompt([self.tokenizer.bos, *self.tokenizer.encode(prompt, specials=False)], [])
        if prompt and isinstance(prompt[0], int):
            return Prompt(list(prompt), [])
        return self.model.prompt(prompt, tools)

    def _read_chat(self, body: dict[str, Any], began: float) -> tuple[Asked, list[Job]]:
        """All in one go: in stages, the first of many requests would be ready when the last has come as far."""
        asked = protocol.chat_request(body, self.name, self._picture)
        return asked, self._jobs(asked, began)

    def _jobs(self, asked: Asked, began: float) -> list[Job]:
        """The answers that are asked for, prepared as far as the engine is not needed."""
        config, made = self.model.config, []
        for asked_prompt in asked.prompts:
            prompt = self._prompt(asked_prompt, asked.tools)
            tiles = sum(tiles_of(image, config.vision) for image in prompt.images if config.vision)
            room = self.worker.engine.room(tiles) - len(prompt.tokens)
            for params in protocol.sampling(asked, room, config.stops).each():
                answer = Answer(params, config.stops if params.stop_ids is None else params.stop_ids, self.tokenizer)
                guide = None if asked.schema is None else self.guide(asked.schema)
                made.append(Job(requests.Request.of(config, prompt, answer, guide), asked_prompt, began))
        return made

    async def _judge(self, prompt: Any, answer: str | None = None) -> Verdict:
        """What the guard says of a prompt's last turn, or of the answer to it; safe where there is no guard."""
        if self.guard is None:
            return SAFE
        conversation = as_conversation(prompt, self.tokenizer)
        if answer is not None:
            conversation = [*conversation, {"role": "assistant", "content": answer}]
        verdict = await self.guard.judge(conversation)
        self.metrics.verdicts.labels("safe" if verdict.safe else "unsafe").inc()
        return verdict

    async def _whole(self, jobs: list[Job]) -> None:
        async for _ in self._judged(jobs):
            pass

    async def _judged(self, jobs: list[Job]) -> AsyncIterator[tuple[int, Piece]]:
        """The pieces of all answers as they come; in the end each answer is judged."""
        async for piece in self._pieces(jobs):
            yield piece
        for job in jobs:
            job.verdict = await self._judge(job.prompt, job.answer.text)

    async def _pieces(self, jobs: list[Job]) -> AsyncIterator[tuple[int, Piece]]:
        """The pieces of all answers as they come; left early, all are cancelled."""
        heard: asyncio.Queue[tuple[int, Piece] | BaseException | None] = asyncio.Queue()

        async def follow(i: int, job: Job) -> None:
            try:
                async for piece in self.worker.answer(job.request):
                    self._observe(job, piece)
                    heard.put_nowait((i, piece))
                self._finish(job)
                heard.put_nowait(None)
            except Exception as error:
                heard.put_nowait(error)

        tasks = [asyncio.ensure_future(follow(i, job)) for i, job in enumerate(jobs)]
        try:
            left = len(tasks)
            while left:
                found = await heard.get()
                if isinstance(found, BaseException):
                    raise found
                if found is None:
                    left -= 1
                else:
                    yield found
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

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

    # ---- How --------------------------------------------------------------------------------------------------------

    def guarded(self, handler: Callable[[dict[str, Any], Request], Awaitable[Response]]) -> Callable[..., Any]:
        """A route whose body is read within the limits and whose faults become responses."""

        @functools.wraps(handler)
        async def route(request: Request) -> Response:
            try:
                if not self.ready:
                    raise Refused(
                        503, "the server is not ready or going down; try again later", "server_error", **RETRY
                    )
                response = await handler(protocol.parse(await self._body(request)), request)
            except Refused as refused:
                response = refused.response
            except protocol.ModelNotFound as error:
                response = JSONResponse(protocol.fault(str(error), "invalid_request_error", "model_not_found"), 404)
            except (EngineFault, NoVerdict) as error:
                response = JSONResponse(protocol.fault(str(error), "server_error"), 500)
            except InputError as error:
                response = JSONResponse(protocol.fault(str(error), "invalid_request_error"), 400)
            except ClientDisconnect:
                response = Response(status_code=499)
            except Exception:
                log.exception("a request failed")
                response = JSONResponse(protocol.fault("the server failed on this request", "server_error"), 500)
            self.metrics.responses.labels(response.status_code).inc()
            return response

        return route

    async def _body(self, request: Request) -> bytes:
        limit, body = self.limits.body, bytearray()
        too_large = Refused(413, f"body: at most {limit} bytes, got more")
        if int(request.headers.get("content-length") or 0) > limit:
            raise too_large
        try:
            async with asyncio.timeout(self.limits.seconds):
                async for piece in request.stream():
                    body += piece
                    if len(body) > limit:
                        raise too_large
        except TimeoutError:
            raise Refused(408, f"body: did not come within {self.limits.seconds:.0f} s") from None
        return bytes(body)

    def guide(self, schema: dict[str, Any]) -> Guide:
        """What holds an answer to a schema; InputError where it is none."""
        return self._vocabulary.guide(schema)

    @functools.cached_property
    def _vocabulary(self) -> Vocabulary:
        return Vocabulary(self.tokenizer, self.model.config.text.vocab, self.model.config.stops)

    def _picture(self, url: str) -> Any:
        return read_picture(url, self.limits.hosts)

    async def _aside(self, work: Callable[..., Any], *args: Any) -> Any:
        """Do what takes time outside of the event loop, few at once."""
        return await asyncio.get_running_loop().run_in_executor(self._preparing, work, *args)


async def _gone(request: Request) -> None:
    """Returns when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def shared(
    memory: int | None, model: Mllama, guard: Mllama | None, context: int, pictures: int
) -> tuple[int | None, int | None]:
    """Memory for the caches of a model and of its guard: each gets as much as its largest requests weigh."""
    if memory is None or guard is None:
        return memory, None
    tiles = picture_tiles(model.model)
    own, guards = row_bytes(model.model, context, tiles * pictures), row_bytes(guard.model, context, tiles)
    return memory * own // (own + guards), memory * guards // (own + guards)
