"""A bucket on this machine: as much of Cloud Storage's JSON interface as TensorStore calls."""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


class Bucket(ThreadingHTTPServer):
    """Objects by name; `got` counts the bytes that were read of each."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.objects: dict[str, tuple[bytes, int]] = {}  # content and generation
        self.got: dict[str, int] = {}
        self.writes = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


def metadata(name: str, content: bytes, generation: int) -> bytes:
    return json.dumps({"name": name, "generation": str(generation), "size": str(len(content))}).encode()


class Handler(BaseHTTPRequestHandler):
    server: Bucket  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # headers and body in one packet

    def log_message(self, format: str, *_: object) -> None:
        pass

    def query(self) -> dict[str, str]:
        return {key: values[0] for key, values in parse_qs(urlsplit(self.path).query).items()}

    def send(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def found(self) -> tuple[str, tuple[bytes, int] | None]:
        name = unquote(urlsplit(self.path).path.partition("/o/")[2])
        return name, self.server.objects.get(name)

    def do_GET(self) -> None:
        if "/o/" not in urlsplit(self.path).path:
            start, end = self.query().get("startOffset", ""), self.query().get("endOffset", "\U0010ffff")
            names = sorted(name for name in self.server.objects if start <= name < end)
            return self.send(200, json.dumps({"items": [{"name": name} for name in names]}).encode())
        name, found = self.found()
        if found is None:
            return self.send(404)
        content, generation = found
        if self.query().get("alt") != "media":
            return self.send(200, metadata(name, content, generation))
        wanted = (self.headers.get("Range") or "bytes=0-").removeprefix("bytes=")
        first, _, last = wanted.partition("-")
        if int(first) >= len(content) and "Range" in self.headers:
            return self.send(416)
        piece = content[int(first) : int(last) + 1 if last else None]
        self.server.got[name] = self.server.got.get(name, 0) + len(piece)
        place = f"bytes {first}-{int(first) + len(piece) - 1}/{len(content)}"
        headers = {"x_goog_generation": str(generation)}
        if "Range" in self.headers:
            return self.send(206, piece, Content_Range=place, **headers)
        return self.send(200, piece, **headers)

    def do_POST(self) -> None:
        name, content = self.query()["name"], self.rfile.read(int(self.headers["Content-Length"]))
        generation = self.server.objects.get(name, (b"", 0))[1]
        if self.query().get("ifGenerationMatch", str(generation)) != str(generation):
            return self.send(412)
        self.server.writes += 1
        self.server.objects[name] = (content, self.server.writes)
        return self.send(200, metadata(name, content, self.server.writes))

    def do_DELETE(self) -> None:
        name, found = self.found()
        self.server.objects.pop(name, None)
        self.send(404 if found is None else 204)
