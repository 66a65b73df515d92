"""Run by `test_resume`: conversions killed at random moments, each finished by the same call.

A process of its own, because it forks: nothing that has threads may have run before.
"""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from mllama_jax.config import MllamaConfig
from mllama_jax.convert.files import read_json
from mllama_jax.convert.run import convert
from mllama_jax.model.mllama import abstract_parameters

POINTS = 20


def fork(work: Callable[[], object]) -> int:
    """A child that does `work`; its status is 0 if it could."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


def done(work: Callable[[], object]) -> bool:
    return os.waitpid(fork(work), 0)[1] == 0


def convert_to(source: Path, target: Path, settings: dict[str, Any]) -> None:
    """Convert, and leave how many tensors were found finished in `target + ".resumed"`."""
    report = convert(source, target, **settings)
    target.with_suffix(".resumed").write_text(str(report["resumed"]))


def content(directory: Path) -> dict[str, bytes]:
    """All files but TensorStore's locks, which a kill may leave and nothing minds."""
    files = (path for path in directory.rglob("*") if path.is_file() and not path.name.endswith("__lock"))
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def finished(target: Path) -> set[str]:
    """The tensors that are noted as finished."""
    names = set()
    for path in target.glob("unfinished/*"):
        if not path.name.endswith(("job.json", "__lock")):
            names |= json.loads(path.read_bytes()).keys()
    return names


def kill_after(child: int, target: Path, tensors: int) -> bool:
    """Kill a conversion some moments after so many tensors are finished; whether it still ran."""
    while len(finished(target)) < tensors:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.002)
    time.sleep(random.random() * 0.01)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def main(source: Path, scratch: Path) -> None:
    random.seed(0)
    ways = [{"to": "orbax"}, {"to": "hf", "dtype": "bfloat16"}, {"to": "meta", "shards": 2}]
    expected = []
    for i, settings in enumerate(ways):
        assert done(lambda i=i, settings=settings: convert_to(source, scratch / f"whole-{i}", settings))
        expected.append(content(scratch / f"whole-{i}"))
    killed = 0
    for point in range(POINTS):
        i, target = point % len(ways), scratch / f"target-{point}"
        run = functools.partial(convert_to, source, target, ways[i])
        killed += kill_after(fork(run), target, random.randrange(50))
        if target.exists() and not (target / "unfinished/job.json").exists():  # the first thing to come, the last to go
            left = content(target)
            assert left in ({}, expected[i])
            if left:
                continue
        before = finished(target)
        arrays = {p: p.stat().st_mtime_ns for p in target.rglob("*") if p.is_file() and p.parts[-3] in before}
        assert done(run)
        assert int(target.with_suffix(".resumed").read_text()) == len(before)
        assert {p: p.stat().st_mtime_ns for p in arrays} == arrays  # what was finished is not touched again
        assert content(target) == expected[i]
    print(f"{killed} of {POINTS} killed")


if __name__ == "__main__":
    warnings.filterwarnings("ignore", "os.fork")
    jax.default_backend = lambda: "cpu"  # traced without starting a backend, whose threads a fork would leave behind
    abstract_parameters(MllamaConfig.from_hf(read_json(Path(sys.argv[1], "config.json"))))
    main(Path(sys.argv[1]), Path(sys.argv[2]))
