"""Many clients at once: requests that fail, memory, and time, of a server of the checkpoint that ships.

    python -m mllama_jax.serve.measure

Each client sends one question with a picture after the other over connections of their own. Every question is asked
twice, half of all requests apart, and must be answered alike. Linux only: memory is VmRSS of the server. What it would
keep of each request or picture shows as growth: the median of the last quarter's readings over that of the second.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mllama_jax.errors import InputError
from mllama_jax.train.pictures import FAMILIES, conversation, held_out

SLOTS, NEW = 16, 16  # of the server, tokens of an answer
POINTS = 20  # at which memory is read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--clients", type=int, default=200)
    args = parser.parse_args()
    each = -(-args.requests // (2 * len(FAMILIES)))
    mixed = zip(*(held_out(family, each) for family in FAMILIES), strict=True)
    bodies = [_body(conversation(example)[:1]) for examples in mixed for example in examples]
    with _server() as (pid, port):
        load = Load(bodies, pid, port, args.requests)
        asyncio.run(load.run(args.clients))
    print(json.dumps({"requests": args.requests, "clients": args.clients} | load.report()))
    sys.exit(bool(load.failed))


def _body(messages: list[dict[str, Any]]) -> bytes:
    def part(each: dict[str, Any]) -> dict[str, Any]:
        if "image" not in each:
            return each
        each["image"].save(file := io.BytesIO(), "PNG")
        return {"type": "image_url", "image_url": {"url": data_url(file.getvalue(), "png")}}

    told = [message | {"content": [part(each) for each in message["content"]]} for message in messages]
    return json.dumps({"messages": told, "temperature": 0, "max_tokens": NEW}).encode()


def data_url(content: bytes, kind: str) -> str:
    """A picture file of this kind, "png" or "jpeg", as a URL."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


async def post(port: int, body: bytes) -> bytes:
    """What this machine's server at a port answers to a chat request. Raises ValueError where it is a fault."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"POST /v1/chat/completions HTTP/1.0\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    status, _, told = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    if b" 200 " not in status.partition(b"\r\n")[0]:
        raise ValueError(status.partition(b"\r\n")[0], told[:100])
    return told


@contextmanager
def _server() -> Iterator[tuple[int, int]]:
    """A server that is ready: its process and port."""
    command = [sys.executable, "-m", "mllama_jax.cli", "serve", "--port=0", f"--slots={SLOTS}", "--context=512"]
    with tempfile.NamedTemporaryFile("r") as log, subprocess.Popen(command, stderr=Path(log.name).open("w")) as process:
        try:
            while '"ready"' not in (told := Path(log.name).read_text()):
                if process.poll() is not None:
                    raise InputError(f"the server ended with {process.returncode}: {told.strip()[-200:]}")
                time.sleep(0.2)
            (port,) = re.findall(r'"url": "http://[^"]+:(\d+)"', told)
            yield process.pid, int(port)
        finally:
            process.terminate()


class Load:
    """Clients that share a number of requests."""

    def __init__(self, bodies: list[bytes], pid: int, port: int, requests: int):
        self.bodies, self.pid, self.port, self.requests = bodies, pid, port, requests
        self.failed: list[str] = []
        self.seconds: list[float] = []
        self.megabytes: list[int] = []
        self._answers: dict[int, str] = {}
        self._left = iter(range(requests))

    async def run(self, clients: int) -> None:
        self._began = time.monotonic()
        await asyncio.gather(*(self._client() for _ in range(clients)))
        self.whole = time.monotonic() - self._began

    async def _client(self) -> None:
        for i in self._left:
            began = time.monotonic()
            try:
                await self._ask(i % len(self.bodies))
            except (OSError, ValueError, LookupError) as error:
                self.failed.append(repr(error)[:200])
            self.seconds.append(time.monotonic() - began)
            if len(self.seconds) % max(self.requests // POINTS, 1) == 0:
                self.megabytes.append(_memory(self.pid))
                print(f"{len(self.seconds)} answered, {self.megabytes[-1]} MB", file=sys.stderr)

    async def _ask(self, question: int) -> None:
        text = json.loads(await post(self.port, self.bodies[question]))["choices"][0]["message"]["content"]
        if self._answers.setdefault(question, text) != text:
            raise ValueError(f"question {question} had another answer: {text!r}")

    def report(self) -> dict[str, Any]:
        """Seconds of a request are from its connection to its end; megabytes at POINTS moments, evenly spread."""
        cuts = statistics.quantiles(self.seconds, n=100)
        speed = {"seconds": round(self.whole, 1), "requests_per_second": round(self.requests / self.whole, 1)}
        spread = {"median_seconds": round(cuts[49], 2), "p99_seconds": round(cuts[98], 2)}
        memory = {"megabytes": self.megabytes, "growth": round(self.growth(), 4)}
        return {"failed": len(self.failed), "faults": self.failed[:3], **speed, **spread, **memory}

    def growth(self) -> float:
        """Of memory, from the second quarter to the last, as a share; what comes before finds its size."""
        quarter = len(self.megabytes) // 4
        second, last = self.megabytes[quarter : 2 * quarter], self.megabytes[-quarter:]
        return statistics.median(last) / statistics.median(second) - 1


def _memory(pid: int) -> int:
    (kilobytes,) = re.findall(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return int(kilobytes) // 1000


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"measure: {error}")
