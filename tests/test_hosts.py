"""How the processes of a server meet: who knows the secret is let in, whoever else comes does not disturb."""

from __future__ import annotations

import contextlib
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from mllama_jax.serve import hosts
from mllama_jax.serve.hosts import Leader


class Store:
    """What the processes share."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.filled = threading.Event()

    def key_value_set(self, key: str, value: str) -> None:
        self.values[key] = value
        self.filled.set()


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    store = Store()
    monkeypatch.setattr(hosts, "store", lambda: store)
    monkeypatch.setattr(hosts, "place", lambda: (0, 3))
    monkeypatch.setattr(hosts, "PATIENCE", 0.5)
    return store


def test_strangers_are_sent_away(store: Store) -> None:
    """Before, between and behind the two that may come, of which one takes its time to show the secret."""
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(1) as pool:
        meeting = pool.submit(Leader.of_all)
        assert store.filled.wait(10)
        port, secret = store.values[hosts.KEY].split()
        shown = bytes.fromhex(secret)
        said = [b"", b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", bytes(32), shown[:31]]

        def call(words: bytes) -> socket.socket:
            peer = stack.enter_context(socket.create_connection(("127.0.0.1", int(port)), timeout=5))
            peer.sendall(words)
            return peer

        strangers = [call(words) for words in said]
        call(b"").close()
        first = call(shown[:10])
        strangers += [call(words) for words in said]
        first.sendall(shown[10:])
        second = call(shown)
        leader = meeting.result(5)
        leader.end()
        for peer in (first, second):
            assert peer.recv(8) == bytes(8)  # the length of an empty message
        for peer in strangers:
            with contextlib.suppress(ConnectionResetError):
                assert peer.recv(1) == b""
        with pytest.raises(ConnectionRefusedError):
            call(shown)
        for follower in leader.followers:
            follower._file.close()
            follower._socket.close()
