"""Kernel by kernel, where time goes on a GPU in what `mllama bench` measures, and what of the collectives is hidden.

    python -m mllama_jax.bench_profile 11b-instruct decode:1 decode:32 text:1 encode:1 first:128 prefill:8192 --mesh 4

A number is of rows, pictures or tokens, of `first` of those behind a picture. Decode does not run as one graph then,
and other graphs XLA leaves while it is profiled.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mllama_jax.bench import DTYPES
from mllama_jax.config import CACHES
from mllama_jax.errors import InputError

if TYPE_CHECKING:
    from mllama_jax.bench_model import Bench, Job

CONTEXT = 1024  # positions of a row in decode
KINDS: dict[str, Callable[[Bench, int], Job]] = {
    "decode": lambda bench, n: bench.decode(n, CONTEXT, True),
    "text": lambda bench, n: bench.decode(n, CONTEXT, False),
    "encode": lambda bench, n: bench.encode(n),
    "first": lambda bench, n: bench.first_token(n, bench.encode(1)),
    "prefill": lambda bench, n: bench.first_token(n, None),
}
Kernel = tuple[str, float, float]
"""A kernel that ran: its name, start and end in microseconds."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a preset, or a directory for its config")
    parser.add_argument("jobs", nargs="+", metavar="KIND:NUMBER", help=f"{', '.join(KINDS)}, and how many")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the decoder's weights")
    parser.add_argument("--cache", choices=CACHES, help="of keys and values (default: bfloat16)")
    parser.add_argument("--mesh", type=int, default=1, metavar="DEVICES", help="over how many to spread the model")
    parser.add_argument("--top", type=int, default=20, help="kernels to tell")
    args = parser.parse_args()
    from mllama_jax.bench_model import Bench
    from mllama_jax.planner import config_of

    bench = Bench.of(config_of(args.model), args.dtype, args.mesh, args.cache)
    bench = dataclasses.replace(bench, one_graph=False)
    jobs = {name: job(bench, name) for name in args.jobs}
    for each in jobs.values():  # compilers choose kernels on the device
        for program in each.programs:
            program.compiled.result()
    for name, each in jobs.items():
        lines = table(profiled(each), each.times, args.top)
        print("\n".join([f"{name}, {args.dtype}, {args.mesh} devices", *lines, ""]))


def job(bench: Bench, name: str) -> Job:
    """What a name such as `decode:8` means. Raises InputError."""
    kind, _, number = name.partition(":")
    if not number.isdecimal() or not int(number):
        raise InputError(f"{name}: expected a kind and a number above 0 such as decode:8")
    n = int(number)
    if kind not in KINDS:
        raise InputError(f"{name}: expected one of {', '.join(KINDS)}, got {kind}")
    return KINDS[kind](bench, n)


def profiled(each: Job) -> list[Kernel]:
    """The kernels of a run on the first GPU, after two to compile and warm up. Raises InputError."""
    import jax

    for _ in range(2):
        jax.block_until_ready(each.run())
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            jax.block_until_ready(each.run())
        (file,) = Path(directory).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(file))
    kernels = [
        (event.name, event.start_ns / 1e3, (event.start_ns + event.duration_ns) / 1e3)
        for plane in data.planes
        if plane.name.startswith("/device:GPU:0")
        for line in plane.lines
        if "Stream" in line.name
        for event in line.events
    ]
    if not kernels:
        raise InputError("a profile without kernels; expected a GPU, run it on a machine with one")
    return sorted(kernels, key=lambda kernel: kernel[1])


def table(kernels: Sequence[Kernel], steps: int, top: int) -> list[str]:
    """Lines: what was busy, what collectives took and how much of it lay beside other kernels, and the longest ones."""
    spans = [kernel[1:] for kernel in kernels]
    sums = [kernel[1:] for kernel in kernels if is_collective(kernel[0])]
    rest = [kernel[1:] for kernel in kernels if not is_collective(kernel[0])]
    busy, took, each = covered(spans), covered(sums), 1e3 * steps
    whole, hidden = max(end for _, end in spans) - spans[0][0], took - (busy - covered(rest))
    lines = [
        f"  busy {busy / each:.3f} ms of {whole / each:.3f}; {len(sums) / steps:.0f} collectives {took / each:.3f}, "
        f"of which hidden {hidden / each:.3f}"
    ]
    kinds: dict[str, list[float]] = {}
    for name, start, end in kernels:
        kinds.setdefault(name, []).append(end - start)
    for name, times in sorted(kinds.items(), key=lambda kind: -sum(kind[1]))[:top]:
        count, mean = len(times) / steps, sum(times) / len(times)
        lines.append(f"  {count:8.1f} x {mean:9.1f} us {sum(times) / each:9.3f} ms  {name[:90]}")
    return lines


def is_collective(name: str) -> bool:
    return any(part in name.lower() for part in ("nccl", "all_reduce", "all-reduce"))


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Over how long at least one of spans ran."""
    total = until = 0.0
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"bench_profile: {error}")
