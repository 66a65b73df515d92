"""Pictures in requests: data URLs, and http(s) from hosts that the operator names, never into private networks."""

from __future__ import annotations

import base64
import binascii
import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Collection
from urllib.parse import urljoin, urlsplit

from mllama_jax.errors import InputError

TYPES = ("image/jpeg", "image/png", "image/webp")
MAX_BYTES = 20 * 2**20
SECONDS = 10.0  # for a download, its redirects included
REDIRECTS = 3


def read_picture(url: str, hosts: Collection[str] = ()) -> bytes:
    """The picture file that a URL holds or names, in one of `TYPES` as it begins; `hosts` are those from which it may
    be fetched. Raises InputError."""
    scheme = url.partition(":")[0].lower()
    if scheme not in ("data", "http", "https"):
        raise InputError(f"image_url: expected a data URL or http(s), got {url[:40]!r}")
    content = _inline(url) if scheme == "data" else fetch(url, hosts)
    known = content[:3] == b"\xff\xd8\xff" or content[:8] == b"\x89PNG\r\n\x1a\n" or content[8:12] == b"WEBP"
    if not known:
        raise InputError(f"image_url: expected a JPEG, PNG or WebP picture, got {len(content)} bytes that are none")
    return content


def _inline(url: str) -> bytes:
    head, comma, body = url.partition(",")
    kind, *options = head[len("data:") :].lower().split(";")
    if not comma or kind not in TYPES or options[-1:] != ["base64"]:
        raise InputError(f"image_url: expected data:image/jpeg|png|webp;base64,..., got {head[:60]!r}")
    if len(body) > MAX_BYTES * 4 // 3 + 4:
        raise InputError(f"image_url: at most {MAX_BYTES} bytes, got more")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"image_url: not base64: {error}") from None


# ---- Fetching -----------------------------------------------------------------------------------------------------


def fetch(url: str, hosts: Collection[str]) -> bytes:
    """What an http(s) URL on one of `hosts` holds. Each host's name is resolved once, and only the address that was
    judged is called."""
    deadline = time.monotonic() + SECONDS
    for _ in range(REDIRECTS + 1):
        host, port, path, secure = _parts(url)
        if host not in hosts:
            allowed = ", ".join(sorted(hosts)) or "none, send a data URL"
            raise InputError(f"image_url: pictures are not fetched from {host!r}; allowed are: {allowed}")
        try:
            answer = _get(host, port, path, secure, deadline)
        except (OSError, http.client.HTTPException) as error:
            raise InputError(f"image_url: {host}: cannot be fetched: {str(error)[:80]}") from None
        if isinstance(answer, bytes):
            return answer
        url = urljoin(url, answer)
    raise InputError(f"image_url: more than {REDIRECTS} redirects")


def _parts(url: str) -> tuple[str, int, str, bool]:
    """Host, port, path and whether it is https; InputError for what browsers and libraries read differently."""
    try:
        split = urlsplit(url)
        host, port = split.hostname or "", split.port
    except ValueError:
        host, port, split = "", None, urlsplit("")
    odd = any(c in url for c in "\\@") or any(ord(c) <= 32 or ord(c) > 126 for c in url)
    if odd or split.scheme not in ("http", "https") or not host:
        raise InputError(f"image_url: expected a plain http(s) URL, got {url[:60]!r}")
    secure = split.scheme == "https"
    path = (split.path or "/") + (f"?{split.query}" if split.query else "")
    return host, port or (443 if secure else 80), path, secure


def public_address(host: str, port: int) -> str:
    """The address to call for a host, once all of its addresses are known to be public ones."""
    try:
        found = {info[4][0] for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError):
        raise InputError(f"image_url: {host}: no such host") from None
    for address in found:
        if not ipaddress.ip_address(str(address).partition("%")[0]).is_global:
            raise InputError(f"image_url: {host}: its address is not a public one")
    return str(min(found))


def _get(host: str, port: int, path: str, secure: bool, deadline: float) -> bytes | str:
    """The content, or where it has gone. Hung up at the deadline, however slowly the other side talks."""
    address, left = public_address(host, port), max(deadline - time.monotonic(), 0.01)
    connection = http.client.HTTPConnection(host, port)
    with socket.create_connection((address, port), timeout=left) as raw, raw.dup() as line:
        hanging_up = threading.Timer(left, _hang_up, (line,))
        hanging_up.start()
        try:
            connection.sock = ssl.create_default_context().wrap_socket(raw, server_hostname=host) if secure else raw
            connection.request("GET", path, headers={"Accept": ", ".join(TYPES)})
            answer = connection.getresponse()
            if answer.status in (301, 302, 303, 307, 308):
                return answer.getheader("Location") or ""
            if answer.status != 200:
                raise InputError(f"image_url: {host}: expected status 200, got {answer.status}")
            content = answer.read(MAX_BYTES + 1)
        finally:
            hanging_up.cancel()
            connection.close()
    if len(content) > MAX_BYTES:
        raise InputError(f"image_url: {host}: at most {MAX_BYTES} bytes, got more")
    if time.monotonic() >= deadline:  # what came may be cut off
        raise TimeoutError(f"took more than {SECONDS:.0f} s")
    return content


def _hang_up(line: socket.socket) -> None:
    with contextlib.suppress(OSError):
        line.shutdown(socket.SHUT_RDWR)
