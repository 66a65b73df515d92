"""Real processes on loopback: what is lost is noticed, told in a line, and nothing hangs."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mllama_jax.processes import LOST, SILENCE

ROOT = Path(__file__).parents[1]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(count: int, flags: str, coordinator: str | None = None) -> list[subprocess.Popen[str]]:
    """One process for each letter of `flags`, of `count` that shall meet."""
    coordinator = coordinator or f"127.0.0.1:{free_port()}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.process", coordinator, str(number), str(count), flag],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        for number, flag in enumerate(flags)
    ]


def child_of(process: subprocess.Popen[str]) -> int:
    """The process that JAX runs in; the one we started attends it."""
    return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])


@pytest.mark.parametrize(
    ("number", "how", "within"),
    [(0, signal.SIGKILL, 15), (1, signal.SIGKILL, 15), (0, signal.SIGSTOP, 30), (1, signal.SIGSTOP, 30)],
    ids=["coordinator killed", "killed", "coordinator stopped", "stopped"],
)
def test_a_lost_process_ends_the_others(number: int, how: signal.Signals, within: float) -> None:
    everyone = start(3, "aaa")
    try:
        for process in everyone:
            assert process.stdout is not None
            while (line := process.stdout.readline()) != "running\n":
                assert line, process.communicate()[1]
        lost = child_of(everyone[number])
        began = time.monotonic()
        os.kill(lost, how)
        others = [process for process in everyone if process is not everyone[number]]
        errors = [process.communicate(timeout=within)[1] for process in others]
        assert time.monotonic() - began < within
        if how == signal.SIGSTOP:
            os.kill(lost, signal.SIGKILL)
        assert [process.returncode for process in others] == [LOST, LOST]
        for error in errors:
            assert error.count("\n") == 1, error
            told = f"process {number} gave no sign of life for {SILENCE:.0f} s" if how == signal.SIGSTOP else "is gone"
            assert told in error
    finally:
        for process in everyone:
            process.kill()
            process.communicate()


def test_processes_that_differ_are_told_apart() -> None:
    errors = []
    for process in start(3, "aba"):
        errors.append(process.communicate(timeout=120)[1])
        assert process.returncode == 2
    assert set(errors) == {"processes differ in flags: a in process 0, 2; b in process 1; start all of them alike\n"}


def test_nobody_else_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLLAMA_MEETING", "3")
    (alone,) = start(2, "a")
    error = alone.communicate(timeout=60)[1]
    assert alone.returncode == 2
    assert error == (
        "the processes did not meet within 3 s; start all of them with the same coordinator, each with its own number\n"
    )
