"""Several processes that run one program: they meet, make sure that they agree, and leave when one of them is lost.

JAX itself would wait: a collective hangs for as long as a peer is silent, and where JAX notices, its C++ layer ends the
process in the middle of a log of its own. Here every process gives a sign of life each second and leaves with one line
when another has given none for `SILENCE` seconds, or when a collective fails because its connection closed.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from mllama_jax.errors import InputError

BEAT = 1.0  # seconds between signs of life
SILENCE = 15.0  # seconds without one after which a process counts as lost
MEETING = int(os.environ.get("MLLAMA_MEETING", "300"))  # seconds to wait for all processes at the start
ADVICE = "start all of them with the same coordinator, each with its own number"
LOST = 4  # the exit code of a process that left because another was lost

_ATTENDED = "MLLAMA_ATTENDED"  # set in the environment of a process that has an attendant
_CPP_LOG = re.compile(
    rb"[EFIW]\d{4} \d\d:\d\d:\d\d\.\d+ +\d+ \S+:\d+\] |Additional GRPC error|:[A-Z]+:Error received from peer"
)
GONE = "another process is gone"
_OURS = (GONE.encode(), b"process")  # how the lines begin with which a process leaves
_COLLECTIVE = re.compile(r"(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION): ")
_rounds = itertools.count()


def join(coordinator: str | None = None, process: int | None = None, processes: int | None = None) -> None:
    """Meet the other processes; from here on devices and collectives span all of them.

    Args:
        coordinator: "host:port" of process 0. None of the three on a Cloud TPU slice or another cluster that JAX knows.

    Raises:
        InputError: they did not meet.
    """
    import jax

    # JAX's own heartbeat ends a process from C++; it is there for the case that ours fails.
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            initialization_timeout=MEETING,
            heartbeat_timeout_seconds=100,
            shutdown_timeout_seconds=30,
        )
    except (RuntimeError, ValueError) as error:
        where = coordinator or "found in the environment"
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"coordinator {where}: cannot meet the other processes ({reason}); {ADVICE}") from None
    _Watch().start()


def agree(facts: Mapping[str, str]) -> None:
    """Make sure that all processes have the same facts; every one must call it.

    Raises:
        InputError: they do not; it names the fact, and who has which value.
    """
    client, me, n = _client(), *_place()
    key = f"mllama/agree/{next(_rounds)}"
    client.key_value_set(f"{key}/{me}", json.dumps(dict(facts)))
    everyone = [json.loads(client.blocking_key_value_get(f"{key}/{i}", 1000 * MEETING)) for i in range(n)]
    client.wait_at_barrier(key.replace("/", "-"), 1000 * MEETING)  # nobody leaves before all have read
    for name in dict.fromkeys(name for each in everyone for name in each):
        holders: dict[str, list[str]] = {}
        for i, each in enumerate(everyone):
            holders.setdefault(each.get(name, "nothing"), []).append(str(i))
        if len(holders) > 1:
            told = "; ".join(f"{value} in process {', '.join(numbers)}" for value, numbers in holders.items())
            raise InputError(f"processes differ in {name}: {told}; start all of them alike")


def leave(code: int, line: str = "") -> None:
    """End this process at once, without waiting for the others, which notice by themselves."""
    if line:
        print(line, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextmanager
def leaving() -> Iterator[None]:
    """Leave when a collective in this block fails because another process is gone."""
    try:
        yield
    except Exception as error:
        if not _COLLECTIVE.match(str(error)) or _place()[1] == 1:
            raise
        leave(LOST, f"{GONE}, so this one leaves ({' '.join(str(error).split())[:160]})")


def attend(command: Sequence[str]) -> int:
    """Run `command`, a Python module and its arguments, in a child and return its exit code.

    All passes through but what JAX's C++ layer logs as it goes down; that is told in one line.
    """
    child = subprocess.Popen(
        [sys.executable, "-m", *command], stderr=subprocess.PIPE, env={**os.environ, _ATTENDED: "1"}
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: child.send_signal(number))
    assert child.stderr is not None
    last_words, told = b"", False
    for line in child.stderr:
        ours = line.startswith(_OURS)
        if not ours and (last_words or _CPP_LOG.match(line)):
            last_words += line if last_words or line.startswith(b"F") else b""
        else:
            told |= ours
            sys.stderr.buffer.write(line)
            sys.stderr.flush()
    code = child.wait()
    if b"RegisterTask" in last_words:
        print(f"the processes did not meet within {MEETING} s; {ADVICE}", file=sys.stderr)
        return 2
    if last_words and not told:
        print(f"{GONE}, so this one left", file=sys.stderr)
    if last_words and code != 2:
        return LOST
    return 128 - code if code < 0 else code


def attended() -> bool:
    return _ATTENDED in os.environ


def _client() -> Any:
    """The key-value store that all processes share; JAX has no public name for it."""
    from jax._src import distributed

    return distributed.global_state.client


def _place() -> tuple[int, int]:
    """This process's number, and how many there are."""
    from jax._src import distributed

    return distributed.global_state.process_id, distributed.global_state.num_processes


class _Watch:
    """Gives signs of life through the shared store and watches those of the others.

    Asking the store may hang with the process that holds it, so another thread looks at the clock.
    """

    def __init__(self) -> None:
        self.me, self.n = _place()
        self.seen = dict.fromkeys((i for i in range(self.n) if i != self.me), time.monotonic())
        self.answered = time.monotonic()  # when the store last answered

    def start(self) -> None:
        for run in (self._beat, self._look):
            threading.Thread(target=run, daemon=True).start()

    def _beat(self) -> None:
        client, last = _client(), {}
        for count in itertools.count():
            try:
                client.key_value_set(f"mllama/alive/{self.me}", str(count), allow_overwrite=True)
                signs = dict(client.key_value_dir_get("mllama/alive/"))
            except Exception:  # the store is gone or going: the clock decides
                signs = {}
            now = time.monotonic()
            for key, value in signs.items():
                i = int(key.rpartition("/")[2])
                if i != self.me and last.get(i) != value:
                    last[i], self.seen[i] = value, now
            if signs:
                self.answered = now
            time.sleep(BEAT)

    def _look(self) -> None:
        while True:
            time.sleep(BEAT)
            now = time.monotonic()
            silent = [i for i, when in self.seen.items() if now - when > SILENCE]
            if now - self.answered > SILENCE:
                silent = [0]  # it holds the store
            if silent:
                names = ", ".join(map(str, silent))
                leave(LOST, f"process {names} gave no sign of life for {SILENCE:.0f} s, so process {self.me} leaves")
