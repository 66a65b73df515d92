"""Real processes on loopback: together they are one model; what is lost is told in a line, and nothing hangs."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import pytest

import mllama_jax
from mllama_jax import processes
from mllama_jax.convert.run import convert
from mllama_jax.errors import InputError
from mllama_jax.processes import LOST, SILENCE
from tests.sharded import rows
from tests.test_convert import assert_same, read

ROOT = Path(__file__).parents[1]
Start = Callable[..., list[subprocess.Popen[str]]]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a process for each list of arguments, `count` of which shall meet; none is left behind.

    `second` is in the environment of the second one only.
    """
    everyone: list[subprocess.Popen[str]] = []

    def start(
        *each: Sequence[str],
        count: int = 0,
        devices: int = 1,
        second: Mapping[str, str] | None = None,
        **environment: str,
    ) -> list[subprocess.Popen[str]]:
        coordinator = f"127.0.0.1:{free_port()}"
        path = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        flags = f"--xla_force_host_platform_device_count={devices}"
        for number, args in enumerate(each):
            own = (second or {}) if number == 1 else {}
            command = [coordinator, str(number), str(count or len(each)), *args]
            everyone.append(
                subprocess.Popen(
                    [sys.executable, "-m", "mllama_jax.run", "tests/process.py", *command],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    cwd=ROOT,
                    env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, **path, **environment, **own},
                )
            )
        return everyone[-len(each) :]

    yield start
    for process in everyone:
        for child in children(process):
            os.kill(child, signal.SIGKILL)
        process.kill()
        process.communicate()


def children(process: subprocess.Popen[str]) -> list[int]:
    """The process that JAX runs in; the one we started attends it."""
    try:
        return [int(each) for each in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    except OSError:
        return []


def test_together_they_are_one_model(spread_directory: Path, tmp_path: Path, start: Start) -> None:
    """Each of two reads what its devices hold; four go on on another mesh with what two saved; tokens are one's."""
    single = mllama_jax.load(spread_directory, dtype="float32")
    tokens = single.generate_tokens(*rows(), max_new_tokens=8, stop_ids=())
    convert(spread_directory, tmp_path / "by 1", to="orbax")
    for source, count, kv in ((spread_directory, 2, 4), (tmp_path / "by 2", 4, 2)):
        args = ["model", str(source), str(kv), str(tmp_path / f"by {count}")]
        for process in start(*[args] * count, devices=4 // count):
            out, error = process.communicate(timeout=240)
            assert process.returncode == 0, error
            told = json.loads(out)
            assert told["read"] == told["held"] < 1.2 * told["whole"] / min(count, kv)
            assert told["tokens"] == tokens
        assert_same(read(tmp_path / f"by {count}")[1], read(tmp_path / "by 1")[1])


@pytest.mark.parametrize(
    ("number", "how", "within"),
    [(0, signal.SIGKILL, 30), (1, signal.SIGKILL, 30), (0, signal.SIGSTOP, 30), (1, signal.SIGSTOP, 30)],
    ids=["coordinator killed", "killed", "coordinator stopped", "stopped"],
)
def test_a_lost_process_ends_the_others(number: int, how: signal.Signals, within: float, start: Start) -> None:
    everyone = start(*[["add", "a"]] * 3)
    for process in everyone:
        assert process.stdout is not None
        while (line := process.stdout.readline()) != "running\n":
            assert line, process.communicate()[1]
    (lost,) = children(everyone[number])
    began = time.monotonic()
    os.kill(lost, how)
    others = [process for process in everyone if process is not everyone[number]]
    errors = [process.communicate(timeout=within)[1] for process in others]
    print(f"{how.name} of {number}: the others left after {time.monotonic() - began:.1f} s")
    assert [process.returncode for process in others] == [LOST, LOST]
    silent = f"process {number} gave no sign of life for {SILENCE:.0f} s"
    for error in errors:  # who leaves second may see the first gone before it hears the silence
        assert error.count("\n") == 1, error
        assert "is gone" in error or (how == signal.SIGSTOP and silent in error), error
    assert how == signal.SIGKILL or any(silent in error for error in errors), errors


def refusals(everyone: Sequence[subprocess.Popen[str]]) -> set[str]:
    errors = {process.communicate(timeout=120)[1] for process in everyone}
    assert [process.returncode for process in everyone] == [2] * len(everyone), errors
    return errors


def test_the_first_process_speaks_for_all(small_directory: Path, tmp_path: Path) -> None:
    """`mllama generate --join` in two processes prints what it prints in one, once; programs are kept for next time."""
    coordinator = f"127.0.0.1:{free_port()}"
    command = ["generate", "--model", str(small_directory), "--max-new-tokens", "4", "Hello"]
    printed = []
    for joins in ([[]], [["--join", f"{coordinator},{number},2"] for number in (0, 1)]):
        everyone = [
            subprocess.Popen(
                [sys.executable, "-m", "mllama_jax.cli", *command, *join],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "XDG_CACHE_HOME": str(tmp_path)},
            )
            for join in joins
        ]
        ended = [process.communicate(timeout=240) for process in everyone]
        assert [error for _, error in ended] == [""] * len(joins)
        printed.append([out for out, _ in ended])
    assert printed[1] == [printed[0][0], ""]
    assert any((tmp_path / "mllama-jax").iterdir())


def test_processes_that_differ_are_told_apart(start: Start, tmp_path: Path) -> None:
    """In the second of three flags differ and flax, as if another image had been rolled out to a part of a slice."""
    other = tmp_path / "flax-0.0.1.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: flax\nVersion: 0.0.1\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])
    second = {"PYTHONPATH": path, "XLA_FLAGS": "--xla_cpu_enable_fast_math=true"}
    (error,) = refusals(start(*[["add", flag] for flag in "aba"], second=second))
    assert error == (
        f"processes differ in flax: {version('flax')} in process 0 and 2, 0.0.1 in process 1; "
        "XLA_FLAGS: --xla_force_host_platform_device_count=1 in process 0 and 2, --xla_cpu_enable_fast_math=true in "
        "process 1; flags: a in process 0 and 2, b in process 1; start all of them alike\n"
    )


def test_models_that_differ_are_told_apart(small_directory: Path, spread_directory: Path, start: Start) -> None:
    first, second = ["load", str(small_directory), "float32"], ["load", str(spread_directory), "bfloat16"]
    (error,) = refusals(start(first, second))
    assert error.startswith(
        "processes differ in dtype: float32 in process 0, bfloat16 in process 1; config text.layers:"
    )
    assert error.count("\n") == 1


def test_nobody_else_comes(start: Start) -> None:
    (alone,) = start(["add", "a"], count=2, MLLAMA_MEETING="3")
    error = alone.communicate(timeout=60)[1]
    assert alone.returncode == 2
    assert error.count("\n") == 1
    assert error.startswith("the processes did not meet within 3 s; start all of them with the same coordinator, each")


def test_a_coordinator_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "MEETING", 1)
    with pytest.raises(
        InputError, match=r"coordinator 127.0.0.1:\d+: cannot be reached within 1 s \(.*refused\); start"
    ):
        processes.join(f"127.0.0.1:{free_port()}", 1, 2)


def test_the_readme_script_joins_and_loads(small_directory: Path, tmp_path: Path) -> None:
    (script,) = re.findall(
        r"```\n(from mllama_jax [^`]*processes\.join\(.*?)```", (ROOT / "README.md").read_text(), re.S
    )
    script = script.replace("join() ", f'join("127.0.0.1:{free_port()}", 0, 1) ').replace(
        "gs://bucket/90b", str(small_directory)
    )
    (tmp_path / "script.py").write_text(script + "print(model.config.text.layers)\n")
    done = subprocess.run(
        [sys.executable, "-m", "mllama_jax.run", str(tmp_path / "script.py")],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "6\n", "")


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("10.0.0.1:8476", "expected auto or HOST:PORT,PROCESS,PROCESSES"),
        ("10.0.0.1,0,2", "coordinator must be HOST:PORT, got '10.0.0.1'"),
        ("10.0.0.1:99999,0,2", "coordinator must be HOST:PORT, got '10.0.0.1:99999'"),
        ("10.0.0.1:8476,0,0", "processes must be at least 1, got 0"),
        ("10.0.0.1:8476,2,2", "process must be 0 to 1 of 2 processes, got 2"),
    ],
)
def test_places_that_cannot_be_are_refused(where: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        processes.join_by_name(where, {})
