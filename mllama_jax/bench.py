"""`mllama bench`: how fast a model runs on this machine, each figure beside the floor that the hardware sets.

Weights are random and made on the device, so no checkpoint is needed and any size that fits can be measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllama_jax.config import CACHES, QUANTIZATIONS
from mllama_jax.errors import InputError

if TYPE_CHECKING:
    from mllama_jax.config import MllamaConfig
    from mllama_jax.sharding.mesh import Chip

DTYPES = ("bfloat16", *QUANTIZATIONS)
CONTEXT, LONG = 1024, 8192  # positions in decode, tokens of a long prompt, in models that have so many
PROMPT, NEW = 128, 128  # tokens behind the picture in the figures of a first token and an answer, and of the answer
SPREAD_ERROR = 0.05  # of the largest logit, that weights of any dtype may round differently on several devices


@dataclasses.dataclass(frozen=True)
class Figure:
    """One measurement, in milliseconds.

    Attributes:
        name: what was measured; a decode figure is of one step, which makes a token for every row.
        devices: over how many the model was spread, by the preset `serve`.
        median, low, high: of the repetitions, after a warm-up.
        floor: below what it cannot be by the chip's datasheet; None where the chip is not known.
        binds: which of "bandwidth" and "compute" sets the floor.
        read, operations: what a device has to do at least: bytes, and sums and products.
        compiled: seconds that its programs took to lower and compile; little where JAX_COMPILATION_CACHE_DIR has them.
        held, beside: bytes of a device, of what its largest program takes, and of what that needs beside.
        peak: bytes that the first device has held at most, from the start to this figure; None where it does not say.
        peer: the same of `--versus`.
    """

    name: str
    dtype: str
    devices: int
    median: float
    low: float
    high: float
    floor: float | None
    binds: str | None
    read: int
    operations: float
    compiled: float
    held: int
    beside: int
    peak: int | None
    peer: float | None = None


def add_parser(commands: Any) -> None:
    """Add `bench` to the subcommands of a parser."""
    parser = commands.add_parser("bench", help="time decode, image encoding, prefill and answers on random weights")
    parser.add_argument("model", nargs="?", default="11b-instruct", help="a preset, or a directory for its config")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bfloat16"], help="of the decoder's weights")
    parser.add_argument("--cache", choices=CACHES, help="of keys and values (default: bfloat16)")
    parser.add_argument(
        "--mesh", nargs="+", type=int, default=[1], metavar="DEVICES", help="over how many devices to spread the model"
    )
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 32], help="batch sizes of decode")
    parser.add_argument("--images", nargs="+", type=int, default=[1, 8], help="pictures encoded at once")
    parser.add_argument("--context", type=int, help=f"positions of a row in decode (default: {CONTEXT}, or all)")
    parser.add_argument("--prompt", type=int, help=f"tokens of a long prompt (default: {LONG}, or all)")
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--versus", choices=["transformers"], help="the peer, on the same device just before")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the figures over their floors")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object; figures go to stderr as they are measured"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from mllama_jax.check import environment
    from mllama_jax.generate.decode import STEPS
    from mllama_jax.planner import check_plot, config_of

    for name in ("rows", "images", "mesh"):
        if bad := [n for n in getattr(args, name) if n < 1]:
            raise InputError(f"--{name} must be at least 1, got {bad[0]}")
    if args.repeat < 1:
        raise InputError(f"--repeat must be at least 1, got {args.repeat}")
    check_plot(args.plot)
    config = config_of(args.model)
    longest, heads = config.text.context, config.text.heads
    for name, least, default in (("context", STEPS + 1, CONTEXT), ("prompt", 1, LONG)):
        if (value := getattr(args, name)) is None:
            setattr(args, name, min(default, longest))
        elif value < least:
            raise InputError(f"--{name} must be at least {least}, got {value}")
        elif value > longest:
            raise InputError(f"--{name} must be at most the model's {longest}, got {value}")
    for devices in args.mesh:
        if heads % devices:  # the preset would split rows, of which most figures have one
            works = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
            raise InputError(f"--mesh must divide the model's {heads} heads, got {devices}; {works} do")
    asked = ["--context", args.context, "--prompt", args.prompt, "--rows", *args.rows, "--images", *args.images]
    peers = ask_peer("figures", *asked) if args.versus else {}  # first: JAX keeps the memory that it once had
    import jax

    if (most := max(args.mesh)) > jax.device_count():
        raise InputError(f"--mesh must be at most {jax.device_count()}, the devices of this machine, got {most}")
    where, found = environment() | {"model": args.model, "versus": args.versus}, []
    shown = {name: value for name, value in where.items() if value is not None}
    tell = functools.partial(print, file=sys.stderr if args.json else sys.stdout, flush=True)
    tell("\n".join(f"{name:<12} {value}" for name, value in shown.items()) + "\n\n" + HEADER)
    errors: dict[str, float] = {}
    for dtype, devices in itertools.product(args.dtype, args.mesh):
        if devices > 1:
            errors[f"{dtype} {devices}"] = error = checked(config, dtype, devices, args.cache)
            tell(f"over {devices} devices logits of a few layers are {error:.2%} from one device's")
        for figure in figures(config, dtype, devices, args):
            peer = peers.get(figure.name) if (dtype, devices) == ("bfloat16", 1) else None
            found.append(dataclasses.replace(figure, peer=peer))
            tell(line(found[-1]))
    rates = best(found)
    if args.json:
        told = [dataclasses.asdict(each) for each in found]
        print(json.dumps({**where, "spread_errors": errors, "best": rates, "figures": told}))
    else:
        for name, unit in (("read", "B/s"), ("computed", "OP/s")):
            rate, figure = rates[name]
            print(f"best rate of this run, {name}: {rate / 1e12:.3g} T{unit} a device ({figure})")
    if args.plot is not None:
        draw(f"{args.model} on {where['devices']}", found, args.plot)


_COLUMNS = {"median": 9, "low": 9, "high": 9, "floor": 9, "x floor": 8, "GiB": 7, "peer": 9, "ratio": 7}
HEADER = f"{'ms':<44}{'dtype':<9}{'devices':>7}" + "".join(f"{name:>{width}}" for name, width in _COLUMNS.items())


def line(figure: Figure) -> str:
    """A figure as a line under HEADER."""
    text = (
        f"{figure.name:<44}{figure.dtype:<9}{figure.devices:7}{figure.median:9.2f}{figure.low:9.2f}{figure.high:9.2f}"
    )
    if figure.floor is not None:
        text += f"{figure.floor:9.2f}{figure.median / figure.floor:8.2f}"
    text += f"{(figure.held + figure.beside) / 2**30:{7 if figure.floor is not None else 24}.2f}"
    if figure.peer is not None:
        text += f"{figure.peer:9.2f}{figure.peer / figure.median:7.1f}"
    return text


def checked(config: MllamaConfig, dtype: str, devices: int, cache: str | None) -> float:
    """What `spread_error` says, once it is known to be rounding's. Raises InputError."""
    from mllama_jax.bench_model import spread_error

    error = spread_error(config, dtype, devices, cache)
    if not error < SPREAD_ERROR:
        raise InputError(
            f"{dtype} over {devices} devices: logits are {error:.1%} from those of one device, expected below "
            f"{SPREAD_ERROR:.0%}; figures would mean nothing, try `mllama check`"
        )
    return error


def figures(config: MllamaConfig, dtype: str, devices: int, args: argparse.Namespace) -> Iterator[Figure]:
    """Every figure of a model whose decoder has weights of this dtype, as it is measured; all are compiled before."""
    import jax

    from mllama_jax.bench_model import Bench

    bench, known = Bench.of(config, dtype, devices, args.cache), chip()
    jobs = {f"decode, {rows} rows with a picture": bench.decode(rows, args.context, True) for rows in args.rows}
    jobs["decode, 1 row of text"] = bench.decode(1, args.context, False)
    if config.vision is not None:
        encoders = {images: bench.encode(images) for images in sorted({1, *args.images})}
        jobs |= {f"encode, {images} pictures": encoders[images] for images in args.images}
        jobs[f"first token, a picture and {PROMPT} tokens"] = bench.first_token(PROMPT, encoders[1])
        jobs[f"answer, a picture and {PROMPT} tokens, {NEW} new"] = bench.answer(PROMPT, NEW, encoders[1])
        jobs[f"prefill, a picture and {args.prompt} tokens"] = bench.first_token(args.prompt, encoders[1])
    jobs[f"prefill, {args.prompt} tokens of text"] = bench.first_token(args.prompt, None)
    compiled = {name: sum(program.seconds for program in job.programs) for name, job in jobs.items()}
    memory = {name: max((program.memory for program in job.programs), key=sum) for name, job in jobs.items()}
    while jobs:  # a job keeps the arrays that it was run on
        name = next(iter(jobs))
        job = jobs.pop(name)
        times = [1e3 * seconds / job.times for seconds in measure(job.run, args.repeat)]
        limit = (None, None) if known is None else job.limit(known, dtype)
        spread = statistics.median(times), min(times), max(times)
        work = job.read, job.operations
        peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        yield Figure(name, dtype, devices, *spread, *limit, *work, compiled[name], *memory[name], peak)


def best(figures: list[Figure]) -> dict[str, tuple[float, str]]:
    """The best rates at which a device did what it had to, bytes and operations a second, and in which figure."""
    rates: dict[str, Callable[[Figure], float]] = {
        "read": lambda figure: 1e3 * figure.read / figure.median,
        "computed": lambda figure: 1e3 * figure.operations / figure.median,
    }
    fastest = {name: max(figures, key=rate) for name, rate in rates.items()}
    return {name: (rates[name](each), f"{each.name}, {each.dtype}, {_devices(each)}") for name, each in fastest.items()}


def _devices(figure: Figure) -> str:
    return f"{figure.devices} device{'s' if figure.devices > 1 else ''}"


def measure(run: Callable[[], Any], repeat: int) -> list[float]:
    """Seconds of each of `repeat` runs, to the last result on the device, after two to compile and warm up."""
    import jax

    times = []
    for _ in range(repeat + 2):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return times[2:]


def chip() -> Chip | None:
    """What the datasheet says of this machine's device; None where it is not known."""
    import jax

    from mllama_jax.sharding.mesh import CHIPS

    return next((chip for chip in CHIPS.values() if jax.devices()[0].device_kind in chip.kinds), None)


# ---- The peer, and the drawing ------------------------------------------------------------------------------------


def ask_peer(what: str, *options: Any) -> dict[str, float]:
    """What `bench_peer` measures of transformers, in a process of its own so that its memory is free afterwards."""
    if missing := [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]:
        raise InputError(f"--versus transformers needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    command = [sys.executable, "-m", "mllama_jax.bench_peer", what, *options]
    done = subprocess.run([str(each) for each in command], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise InputError(f"--versus: the peer ended with code {done.returncode}: {reason}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def draw(title: str, figures: list[Figure], path: Path) -> None:
    """Draw every figure as a bar, its floor as a line in it."""
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(9, 1 + 0.4 * len(figures)), layout="constrained")
    axes = canvas.subplots()
    names = [f"{each.name}, {each.dtype}, {_devices(each)}" for each in figures]
    axes.bar_label(
        axes.barh(names, [figure.median for figure in figures], color="tab:blue", label="measured"), fmt="%.2f"
    )
    for i, figure in enumerate(figures):
        if figure.floor is not None:
            axes.plot([figure.floor] * 2, [i - 0.4, i + 0.4], color="black", label="floor" if i == 0 else None)
        if figure.peer is not None:
            axes.plot(figure.peer, i, "o", color="tab:red", label="transformers" if i == 0 else None)
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="ms", title=title)
    axes.legend()
    try:
        canvas.savefig(path, dpi=150)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}; choose another place") from None
