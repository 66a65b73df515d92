"""Pictures that requests name by URL: which hosts and addresses are called, and what they may send."""

from __future__ import annotations

import asyncio
import contextlib
import io
import itertools
import socket
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from mllama_jax.errors import InputError
from mllama_jax.processing.image import open_image
from mllama_jax.serve import images
from mllama_jax.serve.measure import data_url


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/a", "http://169.254.169.254/a", "http://[::1]/a", "http://2130706433/a", "http://0177.0.0.1/a",
        "http://10.0.0.1/a", "http://localhost/a", "http://0.0.0.0/a",
    ],
)  # fmt: skip
def test_private_addresses_are_never_called(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("was called"))
    with pytest.raises(InputError, match=r"not a public one|no such host"):
        images.fetch(url, {urlsplit(url).hostname or ""})


@pytest.mark.parametrize("url", ["http://ok\\@evil/a", "http://user@ok/a", "ftp://ok/a", "http:///a", "http://o k/a"])
def test_odd_urls_are_refused(url: str) -> None:
    with pytest.raises(InputError, match=r"image_url: expected a plain http\(s\) URL"):
        images.fetch(url, {"ok", "evil", ""})


@pytest.mark.parametrize("kind", ["WEBP", "PNG", "MPO"])
def test_of_several_frames_the_first_is_taken(kind: str) -> None:
    file, colours = io.BytesIO(), ((200, 0, 0), (0, 200, 0))
    first, second = (Image.new("RGB", (16, 16), colour) for colour in colours)
    first.save(file, kind, save_all=True, append_images=[second])
    url = data_url(file.getvalue(), "jpeg" if kind == "MPO" else kind.lower())
    picture = open_image(images.read_picture(url))
    assert (picture.mode, picture.size) == ("RGB", (16, 16))
    assert np.abs(np.asarray(picture, int) - colours[0]).max() < 8


def test_the_address_that_was_judged_is_the_one_that_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name whose second answer is another address gains nothing: nobody asks twice."""
    answers, called = iter(["93.184.216.34", "127.0.0.1"]), []

    def resolve(host: str, port: int, **_: object) -> list[object]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(answers), port))]

    def connect(address: tuple[str, int], **_: object) -> None:
        called.append(address)
        raise ConnectionRefusedError("refused")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(InputError, match="cannot be fetched: refused"):
        images.fetch("http://ok/a.png", {"ok"})
    with pytest.raises(InputError, match="not a public one"):
        images.fetch("http://ok/a.png", {"ok"})
    assert called == [("93.184.216.34", 80)]


def test_fetching(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From a server on this machine that counts as public here; it sends elsewhere, too much, and in circles."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    answers = {
        "/a.png": b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(content), content),
        "/away": b"HTTP/1.1 302 Found\r\nLocation: http://elsewhere/a\r\nContent-Length: 0\r\n\r\n",
        "/round": b"HTTP/1.1 302 Found\r\nLocation: /round\r\nContent-Length: 0\r\n\r\n",
        "/large": b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 5000,
        "/endless": b"",
        "/none": b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
    }

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        path = (await reader.readuntil(b"\r\n\r\n")).split()[1].decode()
        writer.write(answers[path])
        await writer.drain()
        if path == "/endless":
            with contextlib.suppress(ConnectionError):
                for letter in itertools.cycle(b"HTTP/1.1 200 OK\r\nX-More: more and more and more"):
                    writer.write(bytes([letter]))
                    await writer.drain()
                    await asyncio.sleep(0.05)
        writer.close()

    async def everything() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        monkeypatch.setattr(images, "public_address", lambda host, _: {"ok": "127.0.0.1"}[host])
        monkeypatch.setattr(images, "MAX_BYTES", 4000)
        monkeypatch.setattr(images, "SECONDS", 1.0)

        def fetch(path: str) -> bytes:
            return images.fetch(f"http://ok:{port}{path}", {"ok"})

        assert await asyncio.to_thread(fetch, "/a.png") == content
        for path, message in (
            ("/away", "not fetched from 'elsewhere'"),
            ("/round", "more than 3 redirects"),
            ("/large", "at most 4000 bytes"),
            ("/none", "expected status 200, got 404"),
            ("/endless", "ok: cannot be fetched"),
        ):
            with pytest.raises(InputError, match=message):
                await asyncio.to_thread(fetch, path)
        await asyncio.sleep(0.3)  # until the server, too, knows that nobody listens
        server.close()

    asyncio.run(everything())
