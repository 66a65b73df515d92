"""The routes: OpenAI's chat and text completions, and what operators ask."""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from mllama_jax.errors import InputError
from mllama_jax.processes import versions
from mllama_jax.processing.guard import NoVerdict
from mllama_jax.serve import protocol
from mllama_jax.serve.keys import Keys
from mllama_jax.serve.protocol import Asked
from mllama_jax.serve.replies import Job, Replies, told_look
from mllama_jax.serve.service import Service
from mllama_jax.serve.worker import EngineFault

log = logging.getLogger("mllama_jax.serve")

RETRY = {"Retry-After": "2"}
POLICY = (  # of the page, which needs nothing from elsewhere
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; connect-src 'self'"
)


class Refused(Exception):
    """A request that is answered with a status and a fault."""

    def __init__(
        self, status: int, message: str, kind: str = "invalid_request_error", code: str | None = None, **headers: str
    ):
        super().__init__(message)
        self.response = JSONResponse(protocol.fault(message, kind, code), status, headers)


class App:
    """Answers requests from a service."""

    def __init__(self, service: Service):
        self.service, self.limits, self.scheduler = service, service.limits, service.worker.engine.scheduler
        self.replies = Replies(service.name, service.tokenizer)
        self._arriving = 0  # requests that are being prepared

    def starlette(self) -> Starlette:
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
        return JSONResponse({"ready": self.service.ready}, 200 if self.service.ready else 503)

    async def tell_metrics(self, request: Request) -> Response:
        return Response(self.service.metrics.text(), media_type="text/plain; version=0.0.4")

    async def version(self, request: Request) -> Response:
        return JSONResponse({"version": versions()["mllama-jax"], **versions()})

    async def models(self, request: Request) -> Response:
        card = {"id": self.service.name, "object": "model", "created": 0, "owned_by": "mllama-jax"}
        return JSONResponse({"object": "list", "data": [card | {"max_model_len": self.scheduler.room(0)}]})

    async def tokenize(self, body: dict[str, Any], request: Request) -> Response:
        if "messages" in body:
            asked = await self.service.aside(self.service.understood, body)
        else:
            asked = protocol.text_request(body, self.service.name)
        tokens = (await self.service.aside(self.service.read, asked.prompts[0], asked.tools)).tokens
        return JSONResponse({"tokens": tokens, "count": len(tokens), "max_model_len": self.scheduler.room(0)})

    async def look(self, body: dict[str, Any], request: Request) -> Response:
        """Where the words of the answer with which a conversation ends look on its pictures."""
        with self._arrival():
            asked = await self.service.aside(self.service.understood, body)
            *conversation, last = asked.prompts[0] or [{}]
            answer = last.get("content") if last.get("role") == "assistant" else None
            if not isinstance(answer, str):
                raise InputError("messages: expected an assistant's text at the end, where shall it have looked?")
            read = await self.service.aside(self.service.read, asked.prompts[0], asked.tools)
            self.service.looking.check(len(read.tokens), len(read.sources))
            return JSONResponse(told_look(await self.service.look(conversation, answer, asked.tools)))

    # ---- Completions ------------------------------------------------------------------------------------------------

    async def chat(self, body: dict[str, Any], request: Request) -> Response:
        with self._arrival():
            asked, jobs = await self.service.aside(self.service.read_chat, body, time.monotonic())
            await self._take(asked, jobs, "messages")
        return await self._respond(asked, jobs, request, "chat.completion")

    async def complete(self, body: dict[str, Any], request: Request) -> Response:
        with self._arrival():
            asked = protocol.text_request(body, self.service.name)
            jobs = await self.service.aside(self.service.jobs, asked, time.monotonic())
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
        if self.service.worker.open + self._arriving + more > self.service.most:
            raise Refused(429, "too many requests wait; try again later", "rate_limit_error", **RETRY)

    async def _take(self, asked: Asked, jobs: list[Job], field: str) -> None:
        """Refuses what finds no room, and what the guard refuses."""
        self._admit(len(jobs) - 1)
        for prompt in asked.prompts:
            verdict = await self.service.judge(prompt)
            if not verdict.safe:
                raise Refused(400, f"{field}: judged {verdict}", code="content_filter")

    async def _respond(self, asked: Asked, jobs: list[Job], request: Request, kind: str) -> Response:
        if asked.stream:
            events = self.replies.stream(asked, jobs, kind, self.service.judged(jobs))
            return EventStream(events, media_type="text/event-stream")
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

    async def _whole(self, jobs: list[Job]) -> None:
        async for _ in self.service.judged(jobs):
            pass

    # ---- How --------------------------------------------------------------------------------------------------------

    def guarded(self, handler: Callable[[dict[str, Any], Request], Awaitable[Response]]) -> Callable[..., Any]:
        """A route whose body is read within the limits and whose faults become responses."""

        @functools.wraps(handler)
        async def route(request: Request) -> Response:
            try:
                if not self.service.ready:
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
            self.service.metrics.responses.labels(response.status_code).inc()
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


class EventStream(StreamingResponse):
    """Events that begin at once. Starlette begins in a turn of the event loop of its own, and so the engine would hear
    of a request when all else that has come meanwhile is read."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def watch() -> None:
            await self.listen_for_disconnect(receive)
            raise ClientDisconnect

        try:
            async with asyncio.TaskGroup() as tasks:
                watching = tasks.create_task(watch())
                await self.stream_response(send)
                watching.cancel()
        except BaseExceptionGroup as group:
            error, *_ = group.exceptions
            if not isinstance(error, ClientDisconnect):
                raise error from None


async def _gone(request: Request) -> None:
    """Returns when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
