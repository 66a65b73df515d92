"""`mllama serve`: load, warm up, listen, drain."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllama_jax.errors import InputError
from mllama_jax.processes import before_leaving

if TYPE_CHECKING:
    from mllama_jax.serve.service import Service

KEYS = "MLLAMA_API_KEYS"  # in the environment, separated by commas
EVERY = 5  # seconds between what is told of the warm-up
HTTP: dict[str, Any] = {  # settings of uvicorn
    "http": "mllama_jax.serve.patience:PatientProtocol",  # on h11, which bounds headers
    "log_config": None,
    "access_log": False,
    "timeout_keep_alive": 30,
    "lifespan": "off",
}


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add `serve` to the subcommands of a parser."""
    parser = commands.add_parser("serve", help="answer over HTTP as OpenAI's API does; a page to talk to is at /")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--name", help="of the model in requests (default: that of its directory)")
    parser.add_argument("--slots", type=int, default=8, help="requests that are answered at once")
    parser.add_argument("--context", type=int, default=8192, help="positions of a request, its answer included")
    parser.add_argument("--images", type=int, default=4, help="pictures of a request at most; 0 answers texts alone")
    parser.add_argument("--queue", type=int, default=256, help="requests that may wait")
    parser.add_argument(
        "--image-host", action="append", default=[], help="fetch pictures from there; may be given again"
    )
    parser.add_argument(
        "--guard", metavar="DIR", help="a Llama Guard 3 11B Vision, which judges each conversation and each answer"
    )
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> None:
    for name in ("slots", "context", "queue"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.images < 0:
        raise InputError(f"--images must be at least 0, got {args.images}")
    if not 0 <= args.port < 2**16:
        raise InputError(f"--port must be 0 to 65535, got {args.port}")
    try:
        import uvicorn  # noqa: F401  used below, missed here: before the model is loaded

        from mllama_jax.serve.service import Limits, Service
    except ImportError as error:
        raise InputError(f"serving needs {error.name}: pip install 'mllama-jax[serve]'") from None
    from mllama_jax.cli import join, load_model, not_first

    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    logging.getLogger("jax").setLevel(logging.WARNING)
    keys = tuple(key for key in os.environ.get(KEYS, "").split(",") if key)
    join(args)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # JAX, once joined, would note it and go on
    model = load_model(args)
    if model.groups > 1:
        raise InputError(
            f"--preset {args.preset}: this mesh splits rows in {model.groups}, and a server's slots are not; start "
            f"{model.groups} servers, each on a part of the devices"
        )
    guard = None if args.guard is None else load_model(argparse.Namespace(**vars(args) | {"model": args.guard}))
    limits = Limits(queue=args.queue, pictures=args.images, hosts=frozenset(args.image_host), keys=keys)
    name = args.name or Path(str(args.model).rstrip("/")).name
    service = Service(model, name, slots=args.slots, context=args.context, limits=limits, guard=guard)
    if not_first():
        service.follower().run(service.warming())
    else:
        _lead(service, args)


def _lead(service: Service, args: argparse.Namespace) -> None:
    """Answer clients."""
    import uvicorn

    from mllama_jax.serve.app import App
    from mllama_jax.serve.hosts import Leader

    listening, scheduler = listen(args.host, args.port), service.worker.engine.scheduler
    service.lead(Leader.of_all())
    shown = {"event": "starting", "url": "http://{}:{}".format(*listening.getsockname()[:2])}
    shown |= {"model": service.name, "dtype": args.dtype, "processes": 1 + len(service.worker.leader.followers)}
    shown |= {"slots": args.slots, "context": scheduler.room(0), "images": args.images, "queue": args.queue}
    levels = scheduler.levels
    shown["fitting"] = [{"slots": each.rows, "positions": each.positions, "tiles": each.tiles} for each in levels]
    shown |= {"image_hosts": args.image_host, "guard": args.guard, "keys": len(service.limits.keys)}
    print(json.dumps(shown), file=sys.stderr)

    class Server(uvicorn.Server):
        def capture_signals(self) -> contextlib.nullcontext[None]:  # pyright: ignore[reportIncompatibleMethodOverride]
            return contextlib.nullcontext()  # `serve` listens for them, and drains

    asyncio.run(serve(service, Server(uvicorn.Config(App(service).starlette(), **HTTP)), listening))


def listen(host: str, port: int) -> socket.socket:
    try:
        (family, *_, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        raise InputError(f"--host {host} --port {port}: cannot listen there: {error.strerror}") from None


async def serve(service: Any, server: Any, listening: socket.socket) -> None:
    """Listen at once, be ready after warming up; on SIGTERM or SIGINT answer what is open, take no more, and stop."""
    loop = asyncio.get_running_loop()
    service.start()
    running = asyncio.ensure_future(server.serve(sockets=[listening]))
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    service.worker.leader.watch(lambda: loop.call_soon_threadsafe(stopping.set))
    told = threading.Event()

    def farewell() -> None:
        with contextlib.suppress(RuntimeError):  # the loop may have ended
            service.give_up("a process of this server failed; it starts again")
            loop.call_soon_threadsafe(stopping.set)
            told.wait()

    before_leaving(farewell)
    warm = asyncio.ensure_future(warm_up(service))
    stop = asyncio.ensure_future(stopping.wait())
    await asyncio.wait([running, stop, warm], return_when=asyncio.FIRST_COMPLETED)
    if warm.done():
        warm.result()  # a model that cannot answer is not served
        await asyncio.wait([running, stop], return_when=asyncio.FIRST_COMPLETED)
    service.ready = False
    warm.cancel()
    while service.worker.open and not running.done():
        await asyncio.sleep(0.05)
    server.should_exit = True
    await running
    told.set()
    service.stop()


async def warm_up(service: Any) -> None:
    """Compile all that will be run, telling every few seconds how far this is, then be ready."""
    began = last = time.monotonic()

    def tell(done: int, steps: int) -> None:
        nonlocal last
        if (now := time.monotonic()) - last >= EVERY:
            last = now
            told = {"event": "warming up", "done": done, "of": steps, "seconds": round(now - began, 1)}
            print(json.dumps(told), file=sys.stderr)

    await service.warm_up(tell)
    print(json.dumps({"event": "ready", "seconds": round(time.monotonic() - began, 1)}), file=sys.stderr)
