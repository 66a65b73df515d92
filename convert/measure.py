"""Memory and speed of conversions at the 11B's real shapes, beside `cp` and `sync` of the same bytes.

    python -m mllama_jax.convert.measure SCRATCH

Writes 21 GB of random weights into SCRATCH and converts them Hugging Face -> ours -> Meta (2 files) -> Hugging Face;
at most two copies stand at once, and nothing is left. Linux only: memory is RssAnon of the converting process.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import flax.linen as nn
import ml_dtypes
import numpy as np

from mllama_jax.config import PRESETS
from mllama_jax.convert.apply import Parameter, paths
from mllama_jax.convert.axes import Index
from mllama_jax.convert.model import Model
from mllama_jax.convert.run import write
from mllama_jax.errors import InputError
from mllama_jax.model.mllama import abstract_parameters

CHAIN = (("hf", "orbax", 1), ("orbax", "meta", 2), ("meta", "hf", 1))
_BF16 = np.dtype(ml_dtypes.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path, help="an empty or new directory on the disk to measure")
    parser.add_argument("--preset", choices=PRESETS, default="11b-instruct")
    args = parser.parse_args()
    config = PRESETS[args.preset]
    shapes = {path: leaf.shape for path, leaf in paths(nn.unbox(abstract_parameters(config))).items()}
    size = sum(map(math.prod, shapes.values())) * _BF16.itemsize
    largest = max(map(math.prod, shapes.values())) * _BF16.itemsize
    with _scratch(args.scratch, 2.1 * size) as scratch:
        weights = {path: _random(path, shape) for path, shape in shapes.items()}
        model = Model(weights, config, {}, "4.45", {"config.json": {}, "params.json": {}}, {})
        write(model, scratch / "hf", "hf", "writing")
        for start, end, shards in CHAIN:
            report = {"from": start, "to": end, "shards": shards, "gigabytes": size / 1e9, **_copy(scratch / start)}
            report |= _convert(scratch / start, scratch / end, end, shards)
            report |= {"limit_memory_gigabytes": (3 * largest + 1e9) / 1e9}
            report["share_of_cp"] = report["cp_seconds"] / report["convert_seconds"]
            print(
                json.dumps({key: round(v, 3) if isinstance(v, float) else v for key, v in report.items()}), flush=True
            )
            shutil.rmtree(scratch / start)


@contextmanager
def _scratch(directory: Path, needed: float) -> Iterator[Path]:
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.iterdir()):
        raise InputError(f"{directory}: is not empty; expected a directory to write to and to clear")
    if (free := shutil.disk_usage(directory).free) < needed:
        raise InputError(f"{directory}: {needed / 1e9:.0f} GB are needed, {free / 1e9:.0f} GB are free")
    try:
        yield directory
    finally:
        for path in directory.iterdir():
            shutil.rmtree(path)


def _random(path: tuple[str, ...], shape: tuple[int, ...]) -> Parameter:
    """Random weights, none infinite; tile tables are zero, for their rows must agree."""

    def read(index: Index) -> np.ndarray:
        lengths = tuple(len(range(n)[cut]) for cut, n in zip(index, shape, strict=True))
        bits = np.random.default_rng().integers(0, 2**16, lengths, np.uint16) & np.uint16(0xBFFF)
        return bits.view(_BF16)

    if path[-1] in ("table", "tiles"):
        return Parameter(shape, _BF16, lambda index: np.zeros(shape, _BF16)[index])
    return Parameter(shape, _BF16, read)


def _copy(source: Path) -> dict[str, float]:
    """`cp -r` and `sync`, from a cold cache."""
    target = source.with_name("copy")
    _forget(source)
    start = time.monotonic()
    subprocess.run(["cp", "-r", source, target], check=True)
    os.sync()
    seconds = time.monotonic() - start
    shutil.rmtree(target)
    os.sync()
    return {"cp_seconds": seconds}


def _convert(source: Path, target: Path, to: str, shards: int) -> dict[str, Any]:
    """`mllama convert` and `sync`, from a cold cache."""
    _forget(source)
    start, peak = time.monotonic(), 0
    command = [sys.executable, "-m", "mllama_jax.cli", "convert", source, target, "--to", to, f"--shards={shards}"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            peak = max(peak, _anonymous(process.pid))
            time.sleep(0.02)
    if process.returncode:
        raise InputError(f"{source}: its conversion to {to} ended with {process.returncode}")
    os.sync()
    return {"convert_seconds": time.monotonic() - start, "peak_memory_gigabytes": peak / 1e9}


def _anonymous(pid: int) -> int:
    """Bytes of a process's memory that no file backs."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    lines = [line.split() for line in status.splitlines() if line.startswith("RssAnon")]
    return int(lines[0][1]) * 1024 if lines else 0


def _forget(directory: Path) -> None:
    """Drop the directory's files from the page cache."""
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"measure: {error}")
