"""How many requests with a picture this machine answers a second, and what HTTP costs; weights are random.

    python -m mllama_jax.serve.throughput 11b-instruct --versus transformers --dtype bfloat16 int8

32 requests come at once, each of a picture of four tiles and 128 tokens, and get 128 tokens each. Beside them stand
what decoding alone reaches, and transformers' `generate` of the same as one batch. Every picture and question is new
to the server.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import dataclasses
import gc
import io
import itertools
import json
import multiprocessing
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from PIL import Image

from mllama_jax import bench
from mllama_jax.config import CACHES
from mllama_jax.errors import InputError
from mllama_jax.serve.measure import data_url, post

if TYPE_CHECKING:
    from mllama_jax.config import MllamaConfig
    from mllama_jax.processing.tokenizer import Tokenizer
    from mllama_jax.serve.service import Service

ROWS, PROMPT, NEW = 32, 128, 128  # requests at once, tokens of a prompt, tokens of an answer
CLIENTS = 4  # processes that ask over HTTP
PEER = "transformers, one batch"
T = TypeVar("T")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="11b-instruct", help="a preset, or a directory for its config")
    parser.add_argument(
        "--dtype", nargs="+", choices=bench.DTYPES, default=["bfloat16"], help="of the decoder's weights"
    )
    parser.add_argument("--cache", choices=CACHES, help="of keys and values (default: bfloat16)")
    parser.add_argument("--rounds", type=int, default=3, help="of requests; medians are told")
    parser.add_argument("--versus", choices=["transformers"], help="the peer, on the same device just before")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    if args.rounds < 1:
        raise InputError(f"--rounds must be at least 1, got {args.rounds}")
    from mllama_jax.config import PRESETS
    from mllama_jax.planner import config_of

    config = config_of(args.model)
    if config.vision is None:
        raise InputError(f"{args.model}: expected a model that sees, got one of text only; choose another")
    if args.versus and config != PRESETS["11b-instruct"]:
        raise InputError(f"--versus transformers: expected the shapes of 11b-instruct, got {args.model}; leave it out")
    told = Told(quiet=args.json)
    if args.versus:  # first: JAX keeps the memory that it once had
        seconds = bench.ask_peer("batch", "--rows", ROWS, "--prompt", PROMPT, "--new", NEW)[str(ROWS)] / 1e3
        told.add(PEER, ROWS / seconds)
    for dtype in args.dtype:
        told.dtype = dtype
        run(config, args.model, args.cache, args.rounds, told)
        gc.unfreeze()  # what `keep_loaded` spared
        gc.collect()  # the caches, before the next weights
    if args.json:
        from mllama_jax.check import environment

        print(json.dumps({**environment(), "model": args.model, "figures": told.figures, "ratios": told.ratios()}))


@dataclasses.dataclass
class Told:
    """Figures of a dtype as they are found: requests a second, and tokens a second while all rows decode."""

    quiet: bool
    dtype: str = ""
    figures: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)

    def add(self, name: str, requests: float | None = None, tokens: float | None = None) -> None:
        name = f"{name}, {self.dtype}" if self.dtype else name
        found = {"requests_per_second": requests, "tokens_per_second": tokens}
        self.figures[name] = own = {key: value for key, value in found.items() if value is not None}
        if not self.quiet:
            print(f"{name:<40}" + ", ".join(f"{value:.2f} {key.replace('_', ' ')}" for key, value in own.items()))
            for ratio, value in self.ratios().items():
                if ratio.startswith(name):
                    print(f"    {ratio[len(name) + 2 :]}: {value:.3f}")
            sys.stdout.flush()

    def ratios(self) -> dict[str, float]:
        """What the figures are of each other, by the name of the figure and what it is compared with."""
        found, peer = {}, self.figures.get(PEER)
        for name, own in self.figures.items():
            bare = self.figures.get(f"decode alone, {name.rpartition(', ')[2]}")
            if bare and name.startswith("engine"):
                found[f"{name}, of decode alone"] = own["tokens_per_second"] / bare["tokens_per_second"]
            if peer and name.startswith(("engine", "HTTP")):
                found[f"{name}, times transformers"] = own["requests_per_second"] / peer["requests_per_second"]
            engine = self.figures.get(name.replace("HTTP", "engine"))
            if engine and name.startswith("HTTP"):
                found[f"{name}, of the engine"] = own["requests_per_second"] / engine["requests_per_second"]
        return found


def run(config: MllamaConfig, name: str, cache: str | None, rounds: int, told: Told) -> None:
    """Measure decoding alone, the engine, and the server."""
    from mllama_jax.api import Mllama
    from mllama_jax.bench_model import Bench
    from mllama_jax.processing.chat import load_template
    from mllama_jax.serve.service import Limits, Service

    bare = Bench.of(config, told.dtype, cache=cache)
    job = bare.decode(ROWS, PROMPT + NEW, True)
    told.add("decode alone", tokens=ROWS * job.times / statistics.median(bench.measure(job.run, 5)))
    del job  # and its caches
    with tempfile.TemporaryDirectory() as directory:
        place, tokenizer = Path(directory), made_up_tokenizer(config.text.vocab, Path(directory))
        served = Mllama(bare.model, bare.params, tokenizer, load_template(place), place)
        service = Service(served, name, slots=ROWS, context=8192, limits=Limits())
    with listening(service) as port, ProcessPoolExecutor(CLIENTS, multiprocessing.get_context("spawn")) as clients:
        measure(service, port, clients, rounds, told)


def measure(service: Service, port: int, clients: Executor, rounds: int, told: Told) -> None:
    """Rounds of requests to the engine and over HTTP in turn, after one of each kind to compile and warm up."""
    from mllama_jax.serve.service import keep_loaded

    kinds, draw = {"32 pictures": ROWS, "one picture": 1}, Questions(service)

    def both(pictures: int) -> dict[str, Round]:
        questions = [in_process(service, question) for question in draw.round(pictures)]
        bodies = [request_body(question) for question in draw.round(pictures)]
        return {"engine": asyncio.run(together(questions)), "HTTP": over_http(clients, port, bodies)}

    asyncio.run(together([in_process(service, draw.round(1, length=2 * PROMPT)[0])]))  # caches get their size
    for pictures in kinds.values():
        both(pictures)
    keep_loaded()
    for kind, pictures in kinds.items():
        found = [both(pictures) for _ in range(rounds)]
        for way in found[0]:
            requests = ROWS / statistics.median(each[way].seconds for each in found)
            tokens = statistics.median(each[way].decoding for each in found) if way == "engine" else None
            told.add(f"{way}, {kind}", requests, tokens)


# ---- Requests -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Question:
    """A picture file, in JPEG, and a text."""

    picture: bytes
    text: str


class Questions:
    """Draws pictures and questions that nobody has seen."""

    def __init__(self, service: Service):
        self.random, vision = np.random.default_rng(0), service.model.config.vision
        assert vision is not None
        self.side = 2 * vision.tile
        nothing = service.model.read(conversation(Question(self._picture(), "")))
        self.others = len(nothing.tokens)  # tokens around a text

    def round(self, pictures: int, length: int = PROMPT) -> list[Question]:
        """As many questions of so many tokens as there are rows, about so many pictures."""
        shown = [self._picture() for _ in range(pictures)]
        return [Question(shown[i % pictures], self._text(length - self.others)) for i in range(ROWS)]

    def _picture(self) -> bytes:
        coarse = Image.fromarray(self.random.integers(0, 256, (28, 28, 3), np.uint8))
        coarse.resize((self.side, self.side), Image.Resampling.BICUBIC).save(file := io.BytesIO(), "JPEG", quality=90)
        return file.getvalue()

    def _text(self, length: int) -> str:
        """Digits and letters in turn, of which each is a token."""
        signs = zip(self.random.choice([*"0123456789"], length), self.random.choice([*"abcdefgh"], length), strict=True)
        return "".join(itertools.chain.from_iterable(signs))[:length]


def conversation(question: Question) -> list[dict[str, Any]]:
    content = [{"type": "image", "image": question.picture}, {"type": "text", "text": question.text}]
    return [{"role": "user", "content": content}]


@dataclasses.dataclass(frozen=True)
class Answered:
    """A text; within the engine also when its pieces came, each with the number of tokens that had come then."""

    text: str
    tokens: int
    pieces: list[tuple[float, int]] = dataclasses.field(default_factory=list)


async def in_process(service: Service, question: Question) -> Answered:
    """Ask the engine as the server does, but without HTTP."""
    text, pieces = "", []
    async for piece in service.answer(conversation(question), max_new_tokens=NEW, stop_ids=()):
        text += piece.text
        pieces.append((time.perf_counter(), piece.end))
    return Answered(text, pieces[-1][1], pieces)


def request_body(question: Question) -> bytes:
    """For an answer that the server tells as it grows."""
    content = [
        {"type": "image_url", "image_url": {"url": data_url(question.picture, "jpeg")}},
        {"type": "text", "text": question.text},
    ]
    asked = {"messages": [{"role": "user", "content": content}], "max_tokens": NEW, "temperature": 0}
    asked |= {"ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
    return json.dumps(asked).encode()


def over_http(clients: Executor, port: int, bodies: Sequence[bytes]) -> Round:
    """Requests at once, from processes of their own: what a client does is no work of the server's."""
    begins = time.time() + 0.2  # when all have theirs
    asked = [clients.submit(_ask, port, bodies[i::CLIENTS], begins) for i in range(CLIENTS)]
    told = [each.result() for each in asked]
    answers = [told[i % CLIENTS][0][i // CLIENTS] for i in range(len(bodies))]
    return Round.of(answers, max(ended for _, ended in told) - begins)


def _ask(port: int, bodies: Sequence[bytes], begins: float) -> tuple[list[Answered], float]:
    """The answers, and when the last had come."""
    time.sleep(max(0, begins - time.time()))
    came, _ = asyncio.run(_timed([post(port, body) for body in bodies]))
    ended = time.time()
    return [_read(each) for each in came], ended


def _read(events: bytes) -> Answered:
    """An answer from the server-sent events that told it."""
    lines = events.split(b"\n\n")
    *told, usage = [json.loads(line.removeprefix(b"data: ")) for line in lines if line.startswith(b"data: {")]
    text = "".join(event["choices"][0]["delta"].get("content", "") for event in told)
    return Answered(text, usage["usage"]["completion_tokens"])


@dataclasses.dataclass(frozen=True)
class Round:
    """Answers to requests that came at once, and how long the last one took."""

    answers: list[Answered]
    seconds: float

    @classmethod
    def of(cls, answers: list[Answered], seconds: float) -> Round:
        """Raises InputError where an answer was cut short."""
        if short := [answer.tokens for answer in answers if answer.tokens != NEW]:
            raise InputError(f"expected {NEW} tokens of each answer, got {short[0]}; was the server stopped?")
        return cls(answers, seconds)

    @property
    def decoding(self) -> float:
        """Tokens a second from when every answer had begun to when the first ended; 0 where it ended before."""
        begun = max(answer.pieces[0][0] for answer in self.answers)
        ended = min(answer.pieces[-1][0] for answer in self.answers)
        if begun >= ended:
            return 0
        made = sum(_by(answer, ended) - _by(answer, begun) for answer in self.answers)
        return made / (ended - begun)


def _by(answer: Answered, moment: float) -> int:
    """How many tokens of an answer had come."""
    return max(end for when, end in answer.pieces if when <= moment)


async def together(asked: Sequence[Awaitable[Answered]]) -> Round:
    return Round.of(*await _timed(asked))


async def _timed(asked: Sequence[Awaitable[T]]) -> tuple[list[T], float]:
    """What all give at once, and the seconds until the last."""
    began = time.perf_counter()
    given = await asyncio.gather(*asked)
    return given, time.perf_counter() - began


# ---- The server ---------------------------------------------------------------------------------------------------


@contextmanager
def listening(service: Service) -> Iterator[int]:
    """The port of a server in a thread of this process."""
    import uvicorn

    from mllama_jax.serve.app import App
    from mllama_jax.serve.command import HTTP, listen

    server, place = uvicorn.Server(uvicorn.Config(App(service).starlette(), **HTTP)), listen("127.0.0.1", 0)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[place])))
    service.start()
    thread.start()
    service.ready = True
    try:
        yield place.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()
        service.stop()


def made_up_tokenizer(vocab: int, directory: Path) -> Tokenizer:
    """One of as many tokens as a model has, the shortest that there are, in Llama 3's form."""
    from mllama_jax.processing.tokenizer import SPECIALS, Tokenizer

    texts = (bytes(text) for length in itertools.count(1) for text in itertools.product(range(256), repeat=length))
    ranked = enumerate(itertools.islice(texts, vocab + 1 - len(SPECIALS)))  # the picture's is not in the vocabulary
    lines = (f"{base64.b64encode(text).decode()} {rank}\n" for rank, text in ranked)
    (directory / "tokenizer.model").write_text("".join(lines))
    return Tokenizer.from_directory(directory)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"throughput: {error}")
