"""Several processes that run one program: they meet, make sure that they agree, and leave when one of them is lost.

JAX itself would wait: a collective hangs for as long as a peer is silent, and where JAX notices, its C++ layer ends the
process in the middle of a log of its own. Here every process gives a sign of life each second and leaves with one line
when another has given none for `SILENCE` seconds, or when a collective fails because its connection closed.
"""

from __future__ import annotations

import atexit
import itertools
import json
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mllama_jax.errors import InputError

BEAT = 1.0  # seconds between signs of life
SILENCE = 15.0  # seconds without one after which a process counts as lost
MEETING = int(os.environ.get("MLLAMA_MEETING", "300"))  # seconds to wait for all processes at the start
ADVICE = "start all of them with the same coordinator, each with its own number"
LOST = 4  # the exit code of a process that left because another was lost
GONE = "another process is gone"
FAREWELL = 5.0  # seconds for what is to be done before a process leaves
PACKAGES = (
    *("mllama-jax", "jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin", "flax", "numpy"),
    *("orbax-checkpoint", "tokenizers", "llguidance"),
)
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_ENABLE_X64", "JAX_DEFAULT_MATMUL_PRECISION")  # that change programs

_LOG = "MLLAMA_JAX_LOG"  # names the log of a process that has an attendant, in its environment
_COLLECTIVE = re.compile(r"(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION): ")
_rounds = itertools.count()
_farewells: list[Callable[[], None]] = []
_left = threading.Lock()


def join(
    coordinator: str | None = None,
    process: int | None = None,
    processes: int | None = None,
    *,
    facts: Mapping[str, str] | None = None,
) -> None:
    """Meet the other processes; from here on devices and collectives span all of them. Comes before any use of JAX.

    Args:
        coordinator: "host:port" of process 0. None of the three on a Cloud TPU slice or another cluster that JAX knows.
        process: this process's number, from 0.
        processes: how many there are.
        facts: what must be the same in all of them beside versions and flags; see `agree`.

    Raises:
        InputError: the coordinator cannot be reached, not all processes came, or they are not alike.
    """
    import jax

    if (coordinator, process, processes) != (None, None, None):
        _check(coordinator, process, processes)
    if coordinator is not None and process:
        _reach(coordinator)
    try:  # JAX's own heartbeat ends a process from C++; it is there for the case that ours fails
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            initialization_timeout=MEETING,
            heartbeat_timeout_seconds=100,
            shutdown_timeout_seconds=30,
        )
    except (RuntimeError, ValueError) as error:
        where = coordinator or "of the environment"
        raise InputError(f"coordinator {where}: cannot meet the other processes ({_short(error)}); {ADVICE}") from None
    watch = _Watch()
    watch.start()
    atexit.register(watch.end)
    agree({**versions(), **{name: os.environ.get(name, "") for name in FLAGS}, **(facts or {})})


def join_by_name(where: str, facts: Mapping[str, str]) -> None:
    """`join` as the commands' `--join` says: `auto`, or `HOST:PORT,PROCESS,PROCESSES`; raises InputError."""
    if where == "auto":
        return join(facts=facts)
    found = re.fullmatch(r"([^,]+),(\d+),(\d+)", where)
    if not found:
        raise InputError(f"--join: expected auto or HOST:PORT,PROCESS,PROCESSES (10.0.0.1:8476,0,4), got {where!r}")
    return join(found[1], int(found[2]), int(found[3]), facts=facts)


def agree(facts: Mapping[str, str]) -> None:
    """Make sure that all processes have the same facts; every one must call it. One process agrees with itself.

    Raises:
        InputError: they do not; it names each fact that differs, and who has which value.
    """
    import jax

    client, me, n = store(), *place()
    if client is None:
        return
    key = f"mllama/agree/{next(_rounds)}"
    try:
        client.key_value_set(f"{key}/{me}", json.dumps(dict(facts)))
        everyone = [json.loads(client.blocking_key_value_get(f"{key}/{i}", 1000 * MEETING)) for i in range(n)]
        client.wait_at_barrier(key.replace("/", "-"), 1000 * MEETING)  # nobody leaves before all have read
    except RuntimeError as error:
        raise InputError(f"the processes did not meet within {MEETING} s ({_short(error)}); {ADVICE}") from None
    differ = []
    for name in dict.fromkeys(name for each in everyone for name in each):
        holders: dict[str, list[str]] = {}
        for i, each in enumerate(everyone):
            holders.setdefault(each.get(name) or "nothing", []).append(str(i))
        if len(holders) > 1:
            told = ", ".join(f"{value} in process {' and '.join(numbers)}" for value, numbers in holders.items())
            differ.append(f"{name}: {told}")
    if differ:
        jax.distributed.shutdown()  # all leave together: JAX would end those that see process 0 gone
        raise InputError(f"processes differ in {'; '.join(differ)}; start all of them alike")


def before_leaving(action: Callable[[], None]) -> None:
    """Have something done before this process leaves; `FAREWELL` seconds later it leaves all the same."""
    _farewells.append(action)


def leave(code: int, line: str = "") -> None:
    """End this process, without waiting for the others, which notice by themselves; the first reason counts."""
    _left.acquire()  # for good: another thread that comes here waits for the end
    if line:
        print(line, file=sys.stderr, flush=True)
    for action in _farewells:
        thread = threading.Thread(target=action, daemon=True)
        thread.start()
        thread.join(FAREWELL)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextmanager
def leaving() -> Iterator[None]:
    """Leave at once when this block fails: JAX would wait for processes that wait for this one, or are gone.

    With one process alone, errors pass.
    """
    try:
        yield
    except Exception as error:
        if place()[1] == 1:
            raise
        if isinstance(error, InputError):
            leave(2, str(error))
        if _COLLECTIVE.match(str(error)):
            leave(LOST, f"{GONE}, so this one leaves ({_short(error)})")
        leave(1, traceback.format_exc().rstrip())


def attend(command: Sequence[str]) -> int:
    """Run `command`, what follows `python`, in a child and return its exit code.

    All passes through but what JAX's C++ layer logs, which goes to a file; where that layer ends the child, one line
    says so and names the file.
    """
    with tempfile.NamedTemporaryFile(prefix="mllama-jax-", suffix=".log", delete=False) as file:
        log = Path(file.name)
    child = subprocess.Popen([sys.executable, *command], env={**os.environ, _LOG: str(log)})
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: child.send_signal(number))
    code = child.wait()
    words = log.read_text(errors="replace")
    if code >= 0 or not words:
        log.unlink()
    if code >= 0:
        return code
    if code != -signal.SIGABRT:
        print(
            f"process ended by {signal.Signals(-code).name}{f'; JAX logged to {log}' if words else ''}", file=sys.stderr
        )
        return 128 - code
    if "RegisterTask" in words or "DEADLINE_EXCEEDED: Barrier timed out" in words:
        print(f"the processes did not meet within {MEETING} s; {ADVICE}; JAX logged to {log}", file=sys.stderr)
        return 2
    print(f"{GONE}, so this one left; JAX logged to {log}", file=sys.stderr)
    return LOST


def attended() -> bool:
    """Whether an attendant started this process; what C++ prints goes to its log from here on."""
    if (log := os.environ.pop(_LOG, None)) is None:
        return False
    sys.stdout, sys.stderr = (os.fdopen(os.dup(number), "w", buffering=1) for number in (1, 2))
    with open(log, "ab") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    return True


def _check(coordinator: str | None, process: int | None, processes: int | None) -> None:
    if coordinator is None or process is None or processes is None:
        raise InputError("join takes coordinator, process and processes together, or none of them")
    if not re.fullmatch(r".+:\d{1,5}", coordinator) or int(coordinator.rpartition(":")[2]) > 65535:
        raise InputError(f"coordinator must be HOST:PORT, got {coordinator!r}")
    if processes < 1:
        raise InputError(f"processes must be at least 1, got {processes}")
    if not 0 <= process < processes:
        raise InputError(f"process must be 0 to {processes - 1} of {processes} processes, got {process}")


def _reach(coordinator: str) -> None:
    """Wait until somebody listens there: where nobody does, JAX ends the process from C++."""
    host, _, port = coordinator.rpartition(":")
    end = time.monotonic() + MEETING
    while True:
        try:
            return socket.create_connection((host, int(port)), timeout=5).close()
        except OSError as error:
            if time.monotonic() > end:
                raise InputError(
                    f"coordinator {coordinator}: cannot be reached within {MEETING} s ({_short(error)}); {ADVICE}"
                ) from None
        time.sleep(0.2)


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:160]


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide what is computed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from its folder
            found[package] = "not installed"
    return found


def store() -> Any:
    """The key-value store that all processes share, None for one process alone; JAX has no public name for it."""
    from jax._src import distributed

    return distributed.global_state.client


def place() -> tuple[int, int]:
    """This process's number, and how many there are."""
    from jax._src import distributed

    state = distributed.global_state
    return (state.process_id or 0, state.num_processes or 1)


def coordinator_host() -> str:
    """Where process 0 is."""
    from jax._src import distributed

    return (distributed.global_state.coordinator_address or "").rpartition(":")[0].strip("[]")


class _Watch:
    """Gives signs of life through the shared store and watches those of the others.

    Asking the store may hang with the process that holds it, so another thread looks at the clock.
    """

    def __init__(self) -> None:
        self.me, self.n = place()
        self.seen = dict.fromkeys((i for i in range(self.n) if i != self.me), time.monotonic())
        self.answered = time.monotonic()  # when the store last answered
        self.ending = threading.Event()
        self.threads = [threading.Thread(target=run, daemon=True) for run in (self._beat, self._look)]

    def start(self) -> None:
        for thread in self.threads:
            thread.start()

    def end(self) -> None:
        """Wait for the others to end too, and ask no more: Python would cut a thread off in C++, which aborts."""
        import jax

        jax.distributed.shutdown()
        self.ending.set()
        for thread in self.threads:
            thread.join(2 * BEAT)

    def _beat(self) -> None:
        client, last = store(), {}
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
            if self.ending.wait(BEAT):
                return

    def _look(self) -> None:
        while not self.ending.wait(BEAT):
            now = time.monotonic()
            if now - self.answered > 3 * BEAT:  # process 0 holds the store, without which nobody is heard
                silent = [0] if now - self.answered > SILENCE else []
            else:
                silent = [i for i, when in self.seen.items() if now - when > SILENCE]
            if silent:
                names = ", ".join(map(str, silent))
                leave(LOST, f"process {names} gave no sign of life for {SILENCE:.0f} s, so process {self.me} leaves")
