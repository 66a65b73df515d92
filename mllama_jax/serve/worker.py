"""The engine in a thread of its own, and what an event loop hears of its requests."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor

from jax.errors import JaxRuntimeError

from mllama_jax.generate.engine import Engine
from mllama_jax.generate.requests import Request
from mllama_jax.processes import leaving
from mllama_jax.serve.hosts import Leader, Order, obey

log = logging.getLogger("mllama_jax.serve")

ATTEMPTS = 3  # steps that may fail in a row before a request is blamed


class EngineFault(Exception):
    """The engine failed on a request."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """What a request got since the last piece: its text, and its tokens up to number `end`; whether it has ended."""

    text: str
    end: int
    ended: bool


class Worker:
    """Runs `Engine.step` while there is something to do. The engine is touched by its thread alone.

    Whatever runs on the same devices takes `turns`, in an executor of one thread: where two dispatch programs at once,
    the devices of a mesh may begin different ones, and wait for each other for ever.

    Attributes:
        leader: tells other processes what to do.
        number: of the engine, among those that the processes have.
    """

    def __init__(self, engine: Engine, turns: Executor | None = None, number: int = 0):
        self.engine, self.number, self.leader = engine, number, Leader()
        self._turns = turns or ThreadPoolExecutor(1)
        self._orders: deque[Order] = deque()
        self._listeners: dict[Request, Callable[[Piece | EngineFault], None]] = {}
        self._awake, self._stopping = threading.Event(), False
        self._failed = self._in_a_row = 0  # steps
        self._lost: EngineFault | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the step that it is in. Raises EngineFault after `give_up`."""
        if self._lost:
            raise self._lost
        self._stopping = True
        self._awake.set()
        self._thread.join()

    def give_up(self, why: str) -> None:
        """Tell everyone that there will be no answer, from another thread: the engine's may be in a step forever."""
        self._lost = EngineFault(why)
        for listen in list(self._listeners.values()):
            listen(self._lost)

    @property
    def open(self) -> int:
        """Requests that have neither ended nor been given up."""
        return len(self._listeners)

    async def answer(self, requests: Sequence[Request]) -> AsyncGenerator[tuple[int, Piece], None]:
        """Submit requests and hear of them, by their numbers, until all have ended; left early, they are cancelled.

        Raises InputError where one cannot fit a slot, EngineFault where the engine failed on one.
        """
        for request in requests:
            self.engine.scheduler.check(request)
        if self._lost:
            raise self._lost
        loop, heard = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Piece | EngineFault]]()

        def listen(i: int, piece: Piece | EngineFault) -> None:
            loop.call_soon_threadsafe(heard.put_nowait, (i, piece))

        for i, request in enumerate(requests):
            self._listeners[request] = functools.partial(listen, i)
            self._order(("submit", request))
        left = dict(enumerate(requests))
        try:
            while left:
                i, piece = await heard.get()
                if isinstance(piece, EngineFault):
                    raise piece
                if piece.ended:
                    self._listeners.pop(left.pop(i), None)
                yield i, piece
        finally:
            for request in left.values():
                self._listeners.pop(request, None)
                self._order(("cancel", request))

    def _order(self, order: Order) -> None:
        self._orders.append(order)
        self._awake.set()

    def _run(self) -> None:
        with leaving():
            while not self._stopping:
                self._awake.wait()
                self._awake.clear()
                while not self._stopping and (self._orders or self.engine.busy):
                    self._turns.submit(self._step).result()

    def _step(self) -> None:
        orders = [self._orders.popleft() for _ in range(len(self._orders))]
        self.leader.tell_step(self.number, orders, self._failed)
        obey(self.engine, orders)
        try:
            for request, text in self.engine.step():
                if listen := self._listeners.get(request):
                    answer = request.answer
                    listen(Piece(text, len(answer.tokens), answer.finish_reason is not None))
            self._in_a_row = 0
        except Exception as error:
            if self.leader.followers and isinstance(error, JaxRuntimeError):
                raise  # the others need not have met it, and their devices would wait for ours
            self._failed += 1
            self._in_a_row += 1
            log.exception("a step failed, %d in a row", self._in_a_row)
            if self._in_a_row >= ATTEMPTS:
                self._blame()

    def _blame(self) -> None:
        """Give up the request that came last, so that those before it may go on."""
        self._in_a_row = 0
        if (request := self.engine.scheduler.newest()) is not None:
            self._orders.appendleft(("cancel", request))
            if listen := self._listeners.get(request):
                listen(EngineFault("the engine failed on this request"))
