"""A bucket on this machine: as much of Cloud Storage's JSON interface as TensorStore, gcsfs and tensorboardX call."""

from __future__ import annotations

import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit


class Bucket(ThreadingHTTPServer):
    """Objects by name; `got` counts the bytes that were read of each."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.objects: dict[str, tuple[bytes, int]] = {}  # content and generation
        self.got: dict[str, int] = {}
        self.uploads: dict[str, bytes] = {}  # what came of objects that are not whole yet
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
        if urlsplit(self.path).path.endswith("/o"):
            return self.send(200, json.dumps(self.listing(**self.query())).encode())
        if "/o/" not in urlsplit(self.path).path:
            return self.send(200, json.dumps({"name": "bucket"}).encode())
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

    def listing(
        self, startOffset: str = "", endOffset: str = "\U0010ffff", prefix: str = "", delimiter: str = "", **_: str
    ) -> dict[str, Any]:
        """All in one page: folders are what stands between the prefix and a delimiter."""
        found = {name: each for name, each in sorted(self.server.objects.items()) if name.startswith(prefix)}
        found = {name: each for name, each in found.items() if startOffset <= name < endOffset}
        ends = {name: name.find(delimiter, len(prefix)) if delimiter else -1 for name in found}
        items = [json.loads(metadata(name, *each)) for name, each in found.items() if ends[name] < 0]
        return {"items": items, "prefixes": sorted({name[: end + 1] for name, end in ends.items() if end >= 0})}

    def write(self, name: str, content: bytes) -> None:
        generation = self.server.objects.get(name, (b"", 0))[1]
        if self.query().get("ifGenerationMatch", str(generation)) != str(generation):
            return self.send(412)
        self.server.writes += 1
        self.server.objects[name] = (content, self.server.writes)
        return self.send(200, metadata(name, content, self.server.writes))

    def do_POST(self) -> None:
        """Write an object, whole or in pieces, or move one."""
        content, query = self.rfile.read(int(self.headers["Content-Length"] or 0)), self.query()
        if "/moveTo/" in self.path:
            old, new = (unquote(part) for part in urlsplit(self.path).path.partition("/o/")[2].split("/moveTo/o/"))
            return self.write(new, self.server.objects.pop(old)[0])
        if "upload_id" in query:
            self.server.uploads[query["name"]] += content
            if self.headers["Content-Range"].endswith("/*"):
                return self.send(308, Range=f"bytes=0-{len(self.server.uploads[query['name']]) - 1}")
            return self.write(query["name"], self.server.uploads.pop(query["name"]))
        if query["uploadType"] == "resumable":
            self.server.uploads[query["name"]] = b""
            return self.send(200, Location=f"{self.server.url}/upload?upload_id=1&name={quote(query['name'], safe='')}")
        if query["uploadType"] == "multipart":
            boundary = self.headers["Content-Type"].partition("boundary=")[2].strip('"').encode()
            about, content = (
                re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1] for part in content.split(b"--" + boundary)[1:3]
            )
            return self.write(json.loads(about)["name"], re.sub(rb"\r?\n\Z", b"", content))
        return self.write(query["name"], content)

    do_PUT = do_POST

    def do_DELETE(self) -> None:
        name, found = self.found()
        self.server.objects.pop(name, None)
        self.send(404 if found is None else 204)
