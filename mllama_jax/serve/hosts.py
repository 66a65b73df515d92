"""Several hosts answer as one: process 0 listens to clients, and all processes run the same steps of the same engine.

What an engine does follows from its calls alone. So each process has one, and before every step process 0 tells the
others which requests came and which were given up; they do the same, and step. So they do with the guard's engine, and
where an answer's look is asked for. They hear of it over a connection of their own: not by a collective, which would
keep the devices of an idle server busy and time out, and not through JAX's key-value store, which on loopback takes
8 ms for a message and 0.4 s for 15 MB of pixels where a connection takes 0.03 ms and 0.08 s. A message is JSON and
arrays, in safetensors; an empty one asks to end, or says so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hmac
import itertools
import json
import queue
import secrets
import signal
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
from jax.errors import JaxRuntimeError
from safetensors.numpy import load, save

from mllama_jax.errors import InputError
from mllama_jax.generate.answer import Answer
from mllama_jax.generate.batch import Rows
from mllama_jax.generate.engine import Engine
from mllama_jax.generate.requests import Guide, Picture, Request
from mllama_jax.generate.sampling import SamplingParams
from mllama_jax.processes import LOST, coordinator_host, leave, place, store
from mllama_jax.processing.chat import Prompt
from mllama_jax.processing.tokenizer import Tokenizer

KEY = "mllama/serve"  # in the store: the port where process 0 waits for the others, and what they must show
DAY = 24 * 3600  # seconds for all to have loaded the model; one that is lost until then is noticed otherwise
PATIENCE = 10  # seconds without a word after which a stranger is sent away
IDLE = 60  # seconds after which an idle connection gives a sign, before firewalls forget it

What = Literal["submit", "cancel"]
Order = tuple[What, Request]


def obey(engine: Engine, orders: Sequence[Order]) -> None:
    """Give an engine what happened since its last step."""
    for what, request in orders:
        (engine.submit if what == "submit" else engine.cancel)(request)


class Connection:
    """Messages over a socket."""

    def __init__(self, peer: socket.socket):
        peer.settimeout(None)
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if sys.platform == "linux":
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, IDLE)
        self._socket, self._file = peer, peer.makefile("rb")

    def send(self, message: bytes) -> None:
        """To nobody where the peer is gone, which `receive` tells."""
        with contextlib.suppress(OSError):
            self._socket.sendall(struct.pack("!Q", len(message)))
            self._socket.sendall(message)

    def receive(self) -> bytes | None:
        """The next message; None where the peer is gone."""
        with contextlib.suppress(OSError):
            if len(head := self._file.read(8)) == 8:
                (size,) = struct.unpack("!Q", head)
                if len(message := self._file.read(size)) == size:
                    return message
        return None


class Leader:
    """Process 0, as the others follow it; alone where there are none."""

    def __init__(self, followers: Sequence[Connection] = ()):
        self.followers = followers
        self._numbers: WeakKeyDictionary[Request, int] = WeakKeyDictionary()
        self._count, self._ended = itertools.count(), False

    @classmethod
    def of_all(cls) -> Leader:
        """Waits until all others follow, who show the secret that they alone can know; others are sent away."""
        _, n = place()
        if n == 1:
            return cls()
        dual = socket.has_dualstack_ipv6()
        family, secret = socket.AF_INET6 if dual else socket.AF_INET, secrets.token_bytes(32)
        found: queue.Queue[Connection] = queue.Queue()
        with socket.create_server(("", 0), family=family, dualstack_ipv6=dual) as server:
            store().key_value_set(KEY, f"{server.getsockname()[1]} {secret.hex()}")
            threading.Thread(target=_admit, args=[server, secret, found], daemon=True).start()
            followers = [found.get() for _ in range(n - 1)]
            server.shutdown(socket.SHUT_RDWR)  # which ends the thread
        return cls(followers)

    def watch(self, asked_to_end: Callable[[], None]) -> None:
        """Leave when a follower is gone; do something when one is asked to end, which none does alone."""

        def listen(follower: Connection) -> None:
            while follower.receive() is not None:
                asked_to_end()
            if not self._ended:
                leave(LOST, "another process is gone, so process 0 leaves")

        for follower in self.followers:
            threading.Thread(target=listen, args=[follower], daemon=True).start()

    def tell_step(self, engine: int, orders: Sequence[Order], failed: int) -> None:
        """Let the others give this to an engine and step it; `failed` of its steps ended in an exception so far."""
        if not self.followers:
            return
        told, pixels = [], {}
        for what, request in orders:
            if what == "submit":
                self._numbers[request] = next(self._count)
                pixels |= {picture.digest.hex(): picture.pixels for picture in request.pictures}
            told.append([what, self._numbers[request], _told(request) if what == "submit" else None])
        self._tell({"engine": engine, "failed": failed, "orders": told}, pixels)

    def tell_attention(self, rows: Rows) -> None:
        """Let the others compute `Mllama.attention`."""
        if self.followers:
            self._tell({"engine": None}, {field.name: getattr(rows, field.name) for field in dataclasses.fields(rows)})

    def end(self) -> None:
        """Let the others end."""
        self._ended = True
        self._say(b"")

    def _tell(self, told: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        body = {"": np.frombuffer(json.dumps(told).encode(), np.uint8), **arrays}
        self._say(save({name: np.ascontiguousarray(array) for name, array in body.items()}))  # views would be garbled

    def _say(self, message: bytes) -> None:
        for follower in self.followers:
            follower.send(message)


def _admit(server: socket.socket, secret: bytes, found: queue.Queue[Connection]) -> None:
    """Let in who shows the secret, each in a thread of its own: a stranger may say nothing."""

    def meet(peer: socket.socket) -> None:
        peer.settimeout(PATIENCE)
        shown = b""
        with contextlib.suppress(OSError):
            while len(shown) < len(secret) and (more := peer.recv(len(secret) - len(shown))):
                shown += more
        if hmac.compare_digest(shown, secret):
            found.put(Connection(peer))
        else:
            peer.close()

    with contextlib.suppress(OSError):
        while True:
            threading.Thread(target=meet, args=[server.accept()[0]], daemon=True).start()


def _told(request: Request) -> dict[str, Any]:
    """A request without its pictures' pixels."""
    guide: Any = request.guide
    return {
        "tokens": request.prompt.tokens,
        "pictures": [[picture.digest.hex(), picture.ratio_id.tolist()] for picture in request.pictures],
        "params": dataclasses.asdict(request.answer.params),
        "stop_ids": sorted(request.answer.stop_ids),
        "schema": None if guide is None else guide.schema,
    }


class Follower:
    """A process that does what process 0 says: with engines, in the order of their numbers, and `Mllama.attention`."""

    def __init__(self, engines: Sequence[FollowedEngine], attention: Callable[[Rows], Any]):
        self.engines, self.attention = engines, attention

    def run(self, warming: Iterable[object]) -> None:
        """Go through `warming` as process 0 does, and follow it until it ends."""
        port, secret = store().blocking_key_value_get(KEY, 1000 * DAY).split()
        try:
            peer = socket.create_connection((coordinator_host(), int(port)))
        except OSError as error:
            where = f"process 0 at {coordinator_host()}:{port}"
            raise InputError(
                f"{where}: cannot be reached ({error.strerror}); open this port between the hosts"
            ) from None
        peer.sendall(bytes.fromhex(secret))
        leader = Connection(peer)
        for number in (signal.SIGTERM, signal.SIGINT):  # all end together, once open requests are answered
            signal.signal(number, lambda *_: leader.send(b""))
        for _ in warming:
            pass
        while message := leader.receive():
            self.follow(message)
        if message is None:
            leave(LOST, f"process 0 is gone, so process {place()[0]} leaves")

    def follow(self, message: bytes) -> None:
        """Do what process 0 tells of."""
        arrays = load(message)
        told = json.loads(arrays.pop("").tobytes())
        if told["engine"] is None:
            self.attention(Rows(**arrays))
        else:
            self.engines[told["engine"]].follow(told, arrays)


class FollowedEngine:
    """An engine that does what process 0's does. `guide` makes what holds an answer to a schema."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer | None, guide: Callable[[dict[str, Any]], Guide]):
        self.engine, self.tokenizer, self.guide = engine, tokenizer, guide
        self._live: dict[int, Request] = {}
        self._failed = 0

    def follow(self, told: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        if told["failed"] != self._failed:
            raise RuntimeError(f"{self._failed} steps failed here and {told['failed']} in process 0: they have parted")
        orders = [self._order(what, number, request, arrays) for what, number, request in told["orders"]]
        obey(self.engine, [order for order in orders if order])
        try:
            for _ in self.engine.step():
                pass
        except JaxRuntimeError:
            raise
        except Exception:  # of the engine itself, the same in all processes; process 0 says what becomes of it
            self._failed += 1
        self._live = {number: each for number, each in self._live.items() if not each.answer.finish_reason}

    def _order(self, what: What, number: int, told: dict[str, Any], pixels: dict[str, np.ndarray]) -> Order | None:
        """None where a request that has ended is given up."""
        if what == "submit":
            self._live[number] = self._request(told, pixels)
            return what, self._live[number]
        request = self._live.pop(number, None)
        return (what, request) if request is not None else None

    def _request(self, told: dict[str, Any], pixels: dict[str, np.ndarray]) -> Request:
        settings = told["params"]
        settings["logit_bias"] = {int(token): bias for token, bias in settings["logit_bias"].items()}
        pictures = [
            Picture(bytes.fromhex(digest), pixels[digest], np.array(ratio_id, np.int32))
            for digest, ratio_id in told["pictures"]
        ]
        guide = None if told["schema"] is None else self.guide(told["schema"])
        answer = Answer(SamplingParams(**settings), told["stop_ids"], self.tokenizer)
        return Request.prepared(self.engine.config, Prompt(told["tokens"], []), answer, pictures, guide)
