"""The kernels by which GPUs send each other rows: their PTX is followed here, instruction by instruction."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from mllama_jax.model import gpu_peers
from mllama_jax.model.gpu_peers import adding, putting

N, BASE = 3, 1 << 40  # devices; where the first one's slots begin, the next one's as much further
MASK = (1 << 32) - 1
Thread = Iterator[int | None]
"""Stops where it may be overtaken, and gives its result at last."""


def follow(assembly: str, operands: Sequence[int], memory: dict[int, int]) -> Thread:
    """What one thread does; it stops before whatever touches memory."""
    lines = [line for line in assembly.splitlines() if not line.startswith((".reg", "{", "}"))]
    labels = {line.rstrip(":"): i for i, line in enumerate(lines) if line.endswith(":")}
    values: dict[str, Any] = {f"${i + 1}": operand for i, operand in enumerate(operands)}

    def get(name: str) -> Any:
        name = name.strip("[]")
        return values[name] if name in values else int(name.replace("0f", "0x"), 0)

    def as_float(word: int) -> np.float32:
        return np.uint32(word).view(np.float32)

    at = 0
    while at < len(lines):
        line, at = lines[at].rstrip(";"), at + 1
        if line.endswith(":"):
            continue
        if line.startswith("@"):
            predicate, line = line[1:].split(" ", 1)
            if not values[predicate]:
                continue
        opcode, _, rest = line.partition(" ")
        args = re.findall(r"\{[^}]*\}|[^,\s]+", rest)
        if opcode == "trap":
            raise AssertionError("trap")
        if opcode == "bra":
            at = labels[args[0]]
        elif opcode.startswith("st."):
            yield None
            memory[get(args[0])] = get(args[1])
        elif opcode.startswith("ld."):
            yield None
            values[args[0]] = memory.get(get(args[1]), 0)
        elif opcode == "mov.b64" and args[0].startswith("{"):
            low, high = args[0].strip("{}").split(", ")
            values[low], values[high] = get(args[1]) & MASK, get(args[1]) >> 32
        elif opcode == "mov.b64" and args[1].startswith("{"):
            low, high = map(get, args[1].strip("{}").split(", "))
            values[args[0]] = low | high << 32
        elif opcode == "mov.b32" and args[0] == "number":
            values[args[0]] = as_float(get(args[1]))
        elif opcode == "mov.f32":
            values[args[0]] = np.float32(get(args[1]))
        elif opcode.startswith("mov."):
            values[args[0]] = get(args[1])
        elif opcode == "cvt.rn.bf16x2.f32":
            halves_of_it = np.array([get(args[2]), get(args[1])]).astype(jnp.bfloat16)
            values[args[0]] = int(halves_of_it.view(np.uint32)[0])
        else:
            values[args[0]] = OPERATIONS[opcode](*map(get, args[1:]))
    yield values["$0"]


OPERATIONS: dict[str, Callable[..., Any]] = {
    "mad.wide.u32": lambda a, b, c: a * b + c,
    "add.u64": lambda a, b: a + b,
    "add.u32": lambda a, b: a + b,
    "add.f32": lambda a, b: a + b,
    "and.b32": lambda a, b: a & b,
    "shl.b32": lambda a, b: a << b & MASK,
    "setp.eq.u32": lambda a, b: a == b,
    "setp.ne.u32": lambda a, b: a != b,
    "setp.gt.u32": lambda a, b: a > b,
}


def halves(address: int) -> tuple[int, int]:
    return address & MASK, address >> 32


def addresses(device: int) -> list[int]:
    at = [BASE * (1 + i) for i in range(N)]
    return [half for address in [*at, at[device]] for half in halves(address)]


def together(kernels: list[list[list[Thread]]], rng: np.random.Generator) -> list[list[list[int]]]:
    """Run each device's kernels one after the other, and all threads of a kernel and all devices in any order."""
    results: list[list[list[int]]] = [[] for _ in kernels]
    running = [dict(enumerate(each[0])) for each in kernels]
    made: list[dict[int, int]] = [{} for _ in kernels]
    for _ in range(5_000):
        busy = [device for device in range(len(kernels)) if running[device]]
        if not busy:
            return results
        device = int(rng.choice(busy))
        thread = int(rng.choice([*running[device]]))
        if (result := next(running[device][thread])) is not None:
            made[device][thread] = result
            del running[device][thread]
        if not running[device]:
            results[device].append([made[device][i] for i in sorted(made[device])])
            made[device], done = {}, len(results[device])
            if done < len(kernels[device]):
                running[device] = dict(enumerate(kernels[device][done]))
    raise AssertionError("they wait for each other for ever")


def test_every_order_gives_the_same_sums_and_leaves_slots_empty() -> None:
    rounds, size = 4, 3
    for seed in range(20):
        rng, memory = np.random.default_rng(seed), dict[int, int]()
        numbers = jnp.asarray(rng.normal(size=(rounds, N, 2 * size)).astype(np.float32)).astype("bfloat16")
        words = np.asarray(numbers).view(np.uint32)  # rounds, devices, words
        kernels = [
            [
                [
                    follow(
                        adding(N, size),
                        [int(words[k, d, i]), first + d * size + i, first + i, *addresses(d)],
                        memory,
                    )
                    for i in range(size)
                ]
                for k, first in zip(range(rounds), itertools.cycle((0, N * size)))
            ]
            for d in range(N)
        ]
        wanted = np.asarray(numbers).astype(np.float32).sum(axis=1, dtype=np.float32)
        wanted = np.asarray(jnp.asarray(wanted).astype("bfloat16")).view(np.uint32).tolist()
        for found in together(kernels, rng):
            assert found == wanted
        assert memory
        assert not any(memory.values())


def test_every_order_gathers_each_device_s_part() -> None:
    size = 2
    for seed in range(20):
        rng, memory = np.random.default_rng(seed), dict[int, int]()
        words = rng.integers(0, 1 << 32, (2, N, size), np.uint32)
        kernels = [
            [
                [
                    follow(
                        putting(N),
                        [int(words[k, d, i]), first + source * size + i, int(source == d), *addresses(d)],
                        memory,
                    )
                    for source in range(N)
                    for i in range(size)
                ]
                for k, first in enumerate((0, N * size))
            ]
            for d in range(N)
        ]
        for found in together(kernels, rng):
            assert found == words.reshape(2, -1).tolist()
        assert not any(memory.values())


def test_two_sums_in_a_row_over_the_same_slots_would_mix() -> None:
    """Why each axis has slots of its own."""
    one, two = (int(np.array([number] * 2, jnp.bfloat16).view(np.uint32)[0]) for number in (1, 100))
    wanted = np.array([3, 3, 300, 300], jnp.bfloat16).view(np.uint32)[:, None].tolist()

    def mixes(seed: int) -> bool:
        memory = dict[int, int]()
        kernels = [
            [[follow(adding(N, 1), [word, d, 0, *addresses(d)], memory)] for word in (one, two)] for d in range(N)
        ]
        try:
            return any(found != wanted for found in together(kernels, np.random.default_rng(seed)))
        except AssertionError:  # what was lost is waited for
            return True

    assert any(map(mixes, range(40)))


@pytest.mark.parametrize("axis", [*gpu_peers.SUMS, *gpu_peers.GATHERED])
def test_axes_have_slots_of_their_own(axis: str) -> None:
    room = gpu_peers._room(4)
    begins, ends = gpu_peers._first(axis, 4), gpu_peers._first(axis, 4) + room[axis]
    assert ends <= sum(room.values())
    for other in {*room} - {axis}:
        assert gpu_peers._first(other, 4) >= ends or gpu_peers._first(other, 4) + room[other] <= begins
