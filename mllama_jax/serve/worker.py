"""The engine in a thread of its own, and what an event loop hears of its requests."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor, ThreadPoolExecutor

from mllama_jax.generate.engine import Engine, Request

log = logging.getLogger("mllama_jax.serve")

ATTEMPTS = 3  # steps that may fail in a row before a request is blamed


class EngineFault(Exception):
    """The engine failed on a request."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """What a request got since the last piece: its text, and its tokens up to number `end`."""

    text: str
    end: int


class Worker:
    """Runs `Engine.step` while there is something to do. The engine is touched by its thread alone.

    Whatever runs on the same devices takes `turns`, in an executor of one thread: where two dispatch programs at once,
    the devices of a mesh may begin different ones, and wait for each other for ever.
    """

    def __init__(self, engine: Engine, turns: Executor | None = None):
        self.engine, self._turns = engine, turns or ThreadPoolExecutor(1)
        self._orders: deque[Callable[[], None]] = deque()
        self._listeners: dict[Request, Callable[[Piece | EngineFault], None]] = {}
        self._awake, self._stopping, self._failed = threading.Event(), False, 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the step that it is in."""
        self._stopping = True
        self._awake.set()
        self._thread.join()

    @property
    def open(self) -> int:
        """Requests that have neither ended nor been given up."""
        return len(self._listeners)

    async def answer(self, request: Request) -> AsyncIterator[Piece]:
        """Submit a request and hear of it until it ends; left early, it is cancelled.

        Raises InputError where it cannot fit a slot, EngineFault where the engine failed on it.
        """
        self.engine.check(request)
        loop, heard = asyncio.get_running_loop(), asyncio.Queue[Piece | EngineFault]()

        def listen(piece: Piece | EngineFault) -> None:
            loop.call_soon_threadsafe(heard.put_nowait, piece)

        self._listeners[request] = listen
        self._order(lambda: self.engine.submit(request))
        ended = False
        try:
            while not ended:
                piece = await heard.get()
                if isinstance(piece, EngineFault):
                    raise piece
                ended = request.answer.finish_reason is not None and piece.end == len(request.answer.tokens)
                yield piece
        finally:
            self._listeners.pop(request, None)
            if not ended:
                self._order(lambda: self.engine.cancel(request))

    def _order(self, order: Callable[[], None]) -> None:
        self._orders.append(order)
        self._awake.set()

    def _run(self) -> None:
        while not self._stopping:
            self._awake.wait()
            self._awake.clear()
            while not self._stopping and (self._orders or self.engine.busy):
                while self._orders:
                    self._orders.popleft()()
                self._turns.submit(self._step).result()

    def _step(self) -> None:
        try:
            for request, text in self.engine.step():
                if listen := self._listeners.get(request):
                    listen(Piece(text, len(request.answer.tokens)))
            self._failed = 0
        except Exception:
            self._failed += 1
            log.exception("a step failed, %d in a row", self._failed)
            if self._failed >= ATTEMPTS:
                self._blame()

    def _blame(self) -> None:
        """Give up the request that came last, so that those before it may go on."""
        self._failed = 0
        if (request := self.engine.newest()) is not None:
            self.engine.cancel(request)
            if listen := self._listeners.get(request):
                listen(EngineFault("the engine failed on this request"))
